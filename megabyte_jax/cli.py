"""What train.py, eval.py and generate.py share: flags, and mistakes told in one line."""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from absl import app, flags, logging

from megabyte_jax.errors import PeerError, RunError, UserError


def run(main: Callable[..., int | None], arguments: Sequence[str] = ()) -> NoReturn:
    """Parses the flags and runs an entry point, then exits.

    A `RunError` is one line on stderr and its exit status; so is an interrupt from the keyboard.

    Args:
        main: the entry point; returns an exit status or None for 0.
        arguments: names of those that it takes beside flags, as strings.
    """

    def guarded(argv: Sequence[str]) -> int | None:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.ERROR)  # Orbax logs thirty lines per checkpoint
        try:
            if arguments and len(argv) != 1 + len(arguments):
                names, given = " ".join(arguments), " ".join(argv[1:]) or "none"
                raise UserError(f"arguments {given!r}: accepted is {names}, and flags")
            if len(argv) > 1 + len(arguments):
                raise UserError(f"{argv[1]!r}: accepted are only flags, as --help lists them")
            return main(*argv[1:])
        except PeerError as error:
            _print(error)
            os._exit(error.exit_status)  # at exit JAX would wait for the peer that is lost
        except RunError as error:
            _fail(error, error.exit_status)
        except MemoryError as error:
            _fail(f"not enough memory: {error}; accepted is a smaller batch or model", 1)
        except KeyboardInterrupt:
            _fail("interrupted", 130)
        except BrokenPipeError:
            # Nobody reads on; flushing at exit must not fail once more.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except Exception as error:
            _tell_peers(1, error)
            raise

    app.run(guarded, flags_parser=_parse)


def define_processes() -> tuple[flags.FlagHolder[Any], ...]:
    """Defines the flags that say which process of a run this is, as `distributed.start` takes them.

    Without them JAX detects what it can, or the process is alone.
    """
    return (
        flags.DEFINE_string("coordinator", "", "HOST:PORT at which process 0 listens."),
        flags.DEFINE_integer("num_processes", -1, "Processes of the run, on all hosts."),
        flags.DEFINE_integer("process_id", -1, "Number of this process, from 0."),
    )


def require_writable(option: str, path: str | Path) -> None:
    """Checks that `write_file` can, before the work that it is for; makes the directory.

    Args:
        option: as the user gives it, for the error.
        path: of the file, which is not touched.

    Raises:
        UserError: it cannot.
    """
    # A new file takes the place of an old one, and must not take that of /dev/null.
    target = Path(os.path.realpath(path))
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=target.parent):
            ok = target.is_file() or not (target.exists() or str(path).endswith(os.sep))
    except OSError:
        ok = False
    if not ok:
        raise UserError(f"{option}={path}: accepted is a file that can be written")


def write_file(option: str, path: str | Path, contents: bytes) -> None:
    """Writes a file whole or not at all.

    Args:
        option: as the user gives it, for the error.
        path: of the file; a link stays one, and an old file keeps its permissions.
        contents: of the file.

    Raises:
        UserError: it cannot be written.
    """
    target = Path(os.path.realpath(path))
    part = target.with_name(f".{os.getpid()}-{time.time_ns()}.part")
    try:
        part.write_bytes(contents)
        if target.exists():
            part.chmod(target.stat().st_mode)
        os.replace(part, target)
    except OSError as error:
        raise UserError(
            f"{option}={path}: {error.strerror}; accepted is a file that can be written"
        ) from None
    finally:
        part.unlink(missing_ok=True)


def _parse(argv: Sequence[str]) -> list[str]:
    # config_flags lets through whatever the config file or a lookup of its keys raises.
    try:
        if "config" in flags.FLAGS:
            _require_chosen_config(argv)
        rest = flags.FLAGS(argv)
        if "config" in flags.FLAGS:
            _ = flags.FLAGS.config.to_dict  # a file that is not there fails only when used
        return rest
    except SystemExit as error:
        if any(re.match("--?(help|[?])", option) for option in argv):
            sys.exit(0)  # absl gives it the status of a mistake
        _fail(f"{_given(argv)}: exits with {error.code!r}; accepted is {_FILE}")
    except BrokenPipeError:  # of --help whose reader stops reading
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except (OSError, ImportError, SyntaxError) as error:
        reason = ([type(error).__name__] + str(error).strip().splitlines())[-1].strip()
        _fail(f"{_given(argv)}: {reason}; accepted is {_FILE}")
    except (LookupError, AttributeError) as error:
        _fail(_unknown_key(argv, error))
    except (flags.Error, UserError, TypeError, ValueError) as error:
        before, _, trace = str(error).partition("Error whilst parsing config file:")
        text = before + (trace.splitlines() or [""])[-1].removeprefix(f"{UserError.__module__}.")
        hint = "; accepted is a value of the type in configs/base.py, or what --help lists"
        _fail(text if "accepted" in text else text + hint)
    except Exception as error:  # of the config file, anything
        (reason,) = traceback.format_exception_only(error)[-1:]
        _fail(f"{_given(argv)}: {reason.strip()}; accepted is {_FILE}")


_FILE = "a Python file that defines get_config()"


def _given(argv: Sequence[str]) -> str:
    return ([option for option in argv if option.startswith("--config=")] or ["--config"])[-1]


def _require_chosen_config(argv: Sequence[str]) -> None:
    """Refuses a config file that may not be the user's own: to parse the flag is to run it.

    Raises:
        UserError: it is named without a folder, or lies in a work directory.
    """
    for option, following in pairwise([*argv, ""]):
        name, given, value = option.partition("=")
        if name in ("--config", "-config"):
            value = value if given else following
            folder = os.path.dirname(value.partition(":")[0])
            run = (os.path.join(folder, name) for name in ("config.json", "checkpoints"))
            if not folder or any(map(os.path.lexists, run)):
                raise UserError(
                    f"--config={value}: is a program that would be run; accepted is configs/NAME.py"
                    " or another path with a folder, such as ./NAME.py, in no work directory"
                )


def _unknown_key(argv: Sequence[str], error: Exception) -> str:
    options = [option.split("=")[0] for option in argv if option.startswith("--config.")]
    for word in re.findall(r"\w+", str(error)):  # the key first, then those of like name
        for option in options:
            if f".{word}." in f"{option}.":
                return f"{option}: unknown; accepted are the keys of configs/base.py"
    return f"{_given(argv)}: {type(error).__name__}: {error}; accepted is {_FILE}"


def _fail(error: object, exit_status: int = 2) -> NoReturn:
    _print(error)
    _tell_peers(exit_status, str(error))
    sys.exit(exit_status)


def _print(error: object) -> None:
    text = " ".join(str(error).split())
    if len(text) > 2000:  # the value may be as long as a command line
        text = f"{text[:1000]} ... {text[-1000:]}"
    try:
        print(f"{os.path.basename(sys.argv[0])}: error: {text}", file=sys.stderr, flush=True)
    except OSError:
        # The status must hold where stderr is on a full disk, and at exit Python tries once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


def _tell_peers(exit_status: int, error: Exception | str) -> None:
    # Who has not imported it, and JAX with it, has no peers.
    distributed = sys.modules.get("megabyte_jax.distributed")
    if distributed:
        distributed.tell(exit_status, error)
