"""Which files a source names: those of a folder, of a glob, of the standard library."""

import fnmatch
import os
import sys
import sysconfig
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from megabyte_jax.data.bad_records import BadRecords

# Distributions leave out, or package apart, the tests and everything else named here: without them
# the corpus is the same wherever the same Python runs.
_NOT_EVERYWHERE = frozenset(
    "site-packages dist-packages __pycache__ test tests idle_test "
    "distutils ensurepip idlelib lib2to3 tkinter turtledemo".split()
)


def find_stdlib() -> tuple[str, list[str]]:
    """Finds the source code of this Python's standard library.

    Returns:
        The folder that names are relative to, and the paths of the modules that are not empty.
    """
    root = sysconfig.get_path("stdlib")
    paths = []
    for path in _walk(root, BadRecords(0), skip=_NOT_EVERYWHERE):
        top = os.path.relpath(path, root).split(os.sep)[0].removesuffix(".py")
        # The build's own settings and sitecustomize.py differ between machines and are no module.
        if path.endswith(".py") and top in sys.stdlib_module_names and os.path.getsize(path):
            paths.append(path)
    return root, paths


def find_files(path: str, bad: BadRecords) -> tuple[str, list[str]]:
    """Finds the files that a path names.

    Hidden files and linked folders, which may be loops, are left out.

    Args:
        path: of a file or a folder, or a glob, in which `**` stands for any folders.
        bad: counts folders that cannot be read.

    Returns:
        The folder that names are relative to, and the paths of the files.

    Raises:
        FileNotFoundError: there is nothing of that name.
        DataError: more folders cannot be read than `bad` accepts.
    """
    if os.path.isdir(path):
        return path, list(_walk(path, bad))
    if os.path.lexists(path):
        return os.path.dirname(path), [path]
    if not any(letter in path for letter in "*?["):
        raise FileNotFoundError("no such file or folder")
    parts = Path(path).parts
    fixed = next(i for i, part in enumerate(parts) if any(letter in part for letter in "*?["))
    root = os.path.join("", *parts[:fixed])
    return root, list(dict.fromkeys(_glob(root or ".", parts[fixed:], _Folders(bad))))


class _Folders(dict[str, list[os.DirEntry[str]]]):
    """What lies in folders, hidden entries left out; one that cannot be read counts once."""

    def __init__(self, bad: BadRecords) -> None:
        self.bad = bad

    def __missing__(self, folder: str) -> list[os.DirEntry[str]]:
        try:
            with os.scandir(folder) as entries:
                self[folder] = [entry for entry in entries if entry.name[0] != "."]
        except (FileNotFoundError, NotADirectoryError):
            self[folder] = []
        except OSError as error:
            self[folder] = []
            self.bad.add(f"{folder}: {error.strerror}")
        return self[folder]


def _glob(folder: str, parts: Sequence[str], folders: _Folders) -> Iterator[str]:
    """Yields the files that match, some twice.

    Unlike glob.glob it follows no linked folder, and says what it cannot read.
    """
    first, rest = parts[0], parts[1:]
    deep = first == "**"
    if deep and rest:
        yield from _glob(folder, rest, folders)
    for entry in folders[folder]:
        if entry.is_dir(follow_symlinks=False):
            if deep:
                yield from _glob(entry.path, parts, folders)
            elif rest and fnmatch.fnmatchcase(entry.name, first):
                yield from _glob(entry.path, rest, folders)
        elif not rest and (deep or fnmatch.fnmatchcase(entry.name, first)):
            if not os.path.isdir(entry.path):
                yield entry.path


def _walk(root: str, bad: BadRecords, skip: Collection[str] = ()) -> Iterator[str]:
    def leave_out(error: OSError) -> None:
        bad.add(f"{error.filename}: {error.strerror}")

    for folder, folders, files in os.walk(root, onerror=leave_out):
        folders[:] = [name for name in folders if name[0] != "." and name not in skip]
        yield from (os.path.join(folder, name) for name in files if name[0] != ".")
