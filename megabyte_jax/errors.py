"""The errors that a run reports in one line, each with an exit status of its own."""


def shown(value: object) -> str:
    """The repr of a value that a user gave, cut to what fits a line."""
    try:
        text = " ".join(repr(value).split("\n"))
    except Exception as error:  # a config file may hold any object, or a number of 5,000 digits
        return f"<{type(value).__name__}: {type(error).__name__}>"
    return text if len(text) <= 200 else f"{text[:120]} ... {text[-40:]}"


class RunError(Exception):
    """Something a run cannot go on with; entry points print it on stderr and exit.

    Attributes:
        exit_status: of the process.
    """

    exit_status = 1


class UserError(RunError, ValueError):
    """A mistake in what the user gave: names the option, its value and what is accepted."""

    exit_status = 2


class EmptySplitError(UserError):
    """A split holds nothing, or there is none of its name."""


class DataError(RunError):
    """Data that cannot be read: names the file, and the record where there are several."""

    exit_status = 3


class CheckpointError(RunError):
    """There are checkpoints and none of them can be read: never a fresh start."""

    exit_status = 4


class PlanError(RunError):
    """A config does not fit the devices it is planned for: names what is too much."""

    exit_status = 4


class StorageError(RunError):
    """The work directory cannot hold what the run has to write."""

    exit_status = 5


class NonFiniteError(RunError):
    """An update or the state is not to be trusted; the checkpoints are from before that."""

    exit_status = 6


class PeerError(RunError):
    """Another process of the run cannot be reached."""

    exit_status = 7


class LockedError(RunError):
    """Another run has the work directory."""

    exit_status = 9
