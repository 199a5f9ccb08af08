import os
import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from megabyte_jax.data.bad_records import BadRecords
from megabyte_jax.data.find import find_files, find_stdlib

NAMES = st.sampled_from(["a", "b", "ab", ".h", "x.txt", "y.txt"])
PATTERNS = st.lists(st.sampled_from(["*", "**", "a", "?", "a*", "*.txt", "[ab]"]), min_size=1)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.lists(NAMES, min_size=1, max_size=4), max_size=12), PATTERNS)
def test_a_glob_finds_what_pathlib_finds_and_nothing_hidden(paths, parts):
    pattern = "/".join(parts)
    with tempfile.TemporaryDirectory() as folder:
        for names in paths:
            path = Path(folder, *names)
            if not any(parent.is_file() for parent in [path, *path.parents]) and not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.touch()
        # Before Python 3.13 a last ** of pathlib stands for folders alone.
        matches = Path(folder).glob(pattern + "/*" if parts[-1] == "**" else pattern)
        expected = {
            str(match)
            for match in matches
            if match.is_file()
            and not any(name.startswith(".") for name in match.relative_to(folder).parts)
        }
        if any(letter in pattern for letter in "*?["):
            root, found = find_files(f"{folder}/{pattern}", BadRecords(0))
            assert {*found} == expected and len(found) == len(expected)
            assert all(path.startswith(root) for path in found)


def test_the_standard_library_has_no_empty_module():
    root, paths = find_stdlib()
    assert len(paths) > 500 and min(map(os.path.getsize, paths)) > 0
    assert all(path.startswith(root) and path.endswith(".py") for path in paths)
