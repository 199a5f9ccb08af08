"""Records that cannot be used: left out and counted up to a limit, an error beyond it."""

import sys

from megabyte_jax.errors import DataError


class BadRecords:
    """Counts the records of a source that cannot be used.

    Attributes:
        limit: how many are left out before they are an error, `data.max_bad_records`.
        reasons: what was wrong with each.
    """

    def __init__(self, limit: int) -> None:
        """Starts at none."""
        self.limit = limit
        self.reasons: list[str] = []

    def add(self, reason: object) -> None:
        """Notes a record.

        Args:
            reason: what is wrong with it, which begins with the name of the file and the record.

        Raises:
            DataError: there are more than `limit`.
        """
        self.reasons.append(str(reason))
        if len(self.reasons) > self.limit:
            raise DataError(f"{reason}; accepted are data.max_bad_records={self.limit} bad records")

    def report(self) -> None:
        """Says on stderr how many were left out, if any were."""
        if self.reasons:
            print(
                f"left out {len(self.reasons)} bad records, the first: {self.reasons[0]}",
                file=sys.stderr,
            )
