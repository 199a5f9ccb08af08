"""Runs jobs on hostile directories in a process of its own, and tells what they made Python do.

Reads a JSON list of jobs {action, path} on stdin, prints an object per job: how it ended, after how
many seconds, the memory that it took beyond what was taken before, and each event of Python's that
no job may cause. The first job is a clean one, of which nothing is noted.
"""

import contextlib
import importlib.metadata
import io
import json
import os
import resource
import sys
import sysconfig
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).parents[2]
INSTALLED = [ROOT, *map(Path, sysconfig.get_paths().values()), Path(sys.base_prefix)]
NEVER = (
    *("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "subprocess.Popen"),
    *("pty.spawn", "socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo"),
    *("urllib.Request", "ftplib.connect", "smtplib.connect", "webbrowser.open"),
    *("pickle.find_class", "ctypes.dlopen", "code.__new__", "sys.settrace"),
)
CHANGES = {"os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.truncate", "os.chmod"}
CHANGES |= {"os.link", "os.symlink", "os.utime", "shutil.rmtree", "shutil.move", "tempfile.mkstemp"}


class Watch:
    """The audit hook: notes what is forbidden while a job runs."""

    def __init__(self, writable: list[Path]) -> None:
        self.writable = writable
        self.packages = {"megabyte_jax", "configs", "tests", *sys.stdlib_module_names}
        self.packages |= {*importlib.metadata.packages_distributions(), *sys.modules}
        self.seen: list[str] = []
        self.on = False
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple) -> None:
        if self.on and self.forbidden(event, args):
            self.seen.append(f"{event} {str(args)[:200]}")

    def forbidden(self, event: str, args: tuple) -> bool:
        if event in NEVER:
            return True
        if event == "import":
            return args[0].partition(".")[0] not in self.packages
        if event == "compile":  # NumPy parses headers with ast.literal_eval, which runs nothing
            return args[1] != "<unknown>" and not self.ours(args[1])
        if event == "exec":
            return not self.ours(args[0].co_filename)
        if event == "open":
            writes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            return bool(writes) and not self.may_write(args[0])
        return event in CHANGES and not self.may_write(args[0])

    def ours(self, file: object) -> bool:  # or installed beside it
        known = isinstance(file, str | bytes) and Path(os.fsdecode(file))
        return bool(known) and any(known.is_relative_to(place) for place in INSTALLED)

    def may_write(self, path: object) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return True  # a descriptor that is open already
        real = Path(os.path.realpath(path))
        return real == Path(os.devnull) or any(real.is_relative_to(w) for w in self.writable)


def run(action: str, path: Path) -> str:
    """How a job ended: ok, the name of an error, or the status of an entry point."""
    from megabyte_jax import errors, trained
    from tests import runs, tfds_files

    try:
        if action == "load":
            return trained.load(path).digest
        if action == "tfds":
            return str(len(tfds_files.read(path)))
        extra = [] if action == "eval here" else [f"--output={os.environ['OUT']}/out.json"]
        extra += [f"--data={os.environ['DATA']}"] if action == "eval data" else []
        return str(runs.run_main("eval", f"--workdir={path}", *extra))
    except errors.RunError as error:
        return f"{type(error).__name__}: {error}"


def main() -> None:
    """Runs the jobs."""
    import tests.conftest  # noqa: F401 - how JAX runs under test

    os.environ.pop("JAX_COMPILATION_CACHE_DIR")
    watch = Watch([Path(os.environ[name]).resolve() for name in ("OUT", "XDG_CACHE_HOME")])
    for number, job in enumerate(json.load(sys.stdin)):
        before, start = memory(), time.perf_counter()
        watch.seen, watch.on, told = [], number > 0, io.StringIO()
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
            with warnings.catch_warnings(action="ignore"):
                try:
                    ended = run(job["action"], Path(job["path"]))
                except BaseException as error:
                    ended = f"not ours: {type(error).__name__}: {error}"
        watch.on = False
        seconds, grown = time.perf_counter() - start, memory() - before
        told = told.getvalue()[-2000:]
        found = dict(ended=ended, told=told, seconds=seconds, grown=grown, events=watch.seen)
        print(json.dumps(found), flush=True)


def memory() -> int:
    """The most bytes that this process had at once."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.path.remove(str(Path(__file__).parent))
    main()
