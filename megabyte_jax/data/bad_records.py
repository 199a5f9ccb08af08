"""Records that cannot be used: left out and counted up to a limit, an error beyond it."""

import sys

from megabyte_jax.errors import DataError


class BadRecords:
    """Counts the records of a source that cannot be used.

    Attributes:
        limit: how many are left out before they are an error, `data.max_bad_records`.
        count: how many there were so far.
        first: what was wrong with the first of them; None before there is one.
    """

    def __init__(self, limit: int) -> None:
        """Starts at none."""
        self.limit, self.count = limit, 0
        self.first: str | None = None

    def add(self, reason: object, count: int = 1) -> None:
        """Notes records.

        Args:
            reason: what is wrong with it, which begins with the name of the file and the record.
            count: of records; the reason is that of the first.

        Raises:
            DataError: there are more than `limit`.
        """
        self.count += count
        # The name of a file may hold whatever moves a cursor.
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(reason))
        self.first = self.first or line
        if self.count > self.limit:
            raise DataError(
                f"{line}; a larger data.max_bad_records={self.limit} would leave it out"
            )

    def report(self) -> None:
        """Says on stderr how many were left out, if any were."""
        if self.count:
            print(f"left out {self.count} bad records, the first: {self.first}", file=sys.stderr)
