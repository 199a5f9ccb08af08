"""A hostile checkpoint is refused, soon and in little memory, before anything of it is run: S2, S5.

The copies have a single checkpoint, so that there is nothing to fall back to.
"""

import json
import os
import random
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
import xxhash

from tests.security import hostile

STEP, ARRAY = "checkpoints/6", "checkpoints/6/params/byte_embedding"
DATA, LAYOUT = f"{ARRAY}/0.0", f"{ARRAY}/.zarray"
TREE, ABOUT = f"{STEP}/params/_METADATA", f"{STEP}/_CHECKPOINT_METADATA"
MANIFEST = f"{STEP}/manifest/metadata"
FUZZED = int(os.environ.get("FUZZED_CHECKPOINTS", "300"))  # 5,000 take some minutes


def moved(name, target="outside", relative=False):
    """A link in the place of something, to where that now is."""

    def change(run: Path) -> None:
        away = run.parent / f"{target}-{run.name}"
        (run / name).rename(away)
        (run / name).symlink_to(os.path.relpath(away, (run / name).parent) if relative else away)

    return change


def linked(name, target):
    return lambda run: (run / name).symlink_to(target)


def replaced(name, make):
    def change(run: Path) -> None:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        make(path)

    return change


def listen(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # the path of a socket has at most 107 characters
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


def sparse(name, size=2**40):
    def change(run: Path) -> None:
        with open(run / name, "ab") as file:
            os.truncate(file.fileno(), size)

    return change


def extra(name, contents=b"x"):
    def change(run: Path) -> None:
        path = Path(os.fsdecode(os.fsencode(run / STEP) + b"/" + name))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)

    return change


def many(run: Path) -> None:
    for number in range(10_000):
        (run / STEP / "params" / str(number)).touch()


def deep(run: Path) -> None:
    (run / STEP / "params" / "/".join(["d"] * 500)).mkdir(parents=True)


def named(name):
    return lambda run: (run / STEP).rename(run / "checkpoints" / name)


def layout(**changes):
    return lambda run: hostile.edit(run / LAYOUT, **changes)


def manifest(seal=True, **changes):
    """Changes the manifest, whose own digest an attacker makes anew."""

    def change(run: Path) -> None:
        hostile.edit(run / MANIFEST, **{f"body__{name}": x for name, x in changes.items()})
        body = json.loads((run / MANIFEST).read_text())["body"]
        digest = xxhash.xxh3_128_hexdigest(json.dumps(body, sort_keys=True).encode())
        hostile.edit(run / MANIFEST, digest=digest if seal else "0" * 32)

    return change


def bomb(run: Path) -> None:
    """A gigabyte of zeros in the chunk of an array of twelve kilobytes, all of it consistent."""
    import zstandard

    layout(chunks=[2**14, 2**14], compressor={"id": "zstd", "level": 1})(run)
    (run / DATA).write_bytes(zstandard.compress(bytes(2**30)))


def other_values(run: Path) -> None:
    values = np.fromfile(run / DATA, "<f4")
    values[7] *= 2
    values.tofile(run / DATA)


def huge(run: Path) -> None:
    """A config, a manifest and a layout that agree on terabytes."""
    hostile.edit(run / "config.json", model__seq_len=2**38 * 4)
    shapes = {
        name: array | {"shape": [2**40, *array["shape"][1:]]}
        for name, array in json.loads((run / MANIFEST).read_text())["body"]["arrays"].items()
        if "position" in name
    }
    manifest(**{f"arrays__{name}": array for name, array in shapes.items()})(run)


LINKS = {
    "a step that is a link": moved(STEP),
    "checkpoints that are a link to themselves": replaced(
        "checkpoints", lambda path: path.symlink_to(path)
    ),
    "an item that is a link": moved(f"{STEP}/params"),
    "an item that is a relative link": moved(f"{STEP}/params", relative=True),
    "an array that is a link": moved(ARRAY),
    "data that are a link": moved(DATA),
    "data that are a relative link": moved(DATA, relative=True),
    "data that are a link inside": replaced(DATA, lambda path: path.symlink_to("../pad/0")),
    "data that are a link to themselves": replaced(DATA, lambda path: path.symlink_to(path)),
    "a layout that is a link": moved(LAYOUT),
    "a tree that is a link": moved(TREE),
    "a manifest that is a link": moved(MANIFEST),
    "a link to the root": linked(f"{STEP}/params/root", "/"),
    "a link to nothing": linked(f"{STEP}/params/nothing", "/no/such"),
    "data that are a link to a device": replaced(DATA, lambda path: path.symlink_to("/dev/zero")),
}
KINDS = {
    "data that are a FIFO": replaced(DATA, os.mkfifo),
    "a manifest that is a FIFO": replaced(MANIFEST, os.mkfifo),
    "a layout that is a FIFO": replaced(LAYOUT, os.mkfifo),
    "a tree that is a FIFO": replaced(TREE, os.mkfifo),
    "a FIFO more": lambda run: os.mkfifo(run / STEP / "params" / "more"),
    "data that are a socket": replaced(DATA, listen),
    "data that are a folder": replaced(DATA, os.mkdir),
    "a step that is a file": replaced(STEP, Path.touch),
    "an item that is a file": replaced(f"{STEP}/params", Path.touch),
}
SIZES = {
    "another value": other_values,
    "huge data": sparse(DATA),
    "a huge manifest": sparse(MANIFEST),
    "a huge layout": sparse(LAYOUT),
    "a huge tree": sparse(TREE),
    "a huge file more": sparse(f"{STEP}/params/more"),
    "a bomb": bomb,
    "a shape of terabytes": layout(shape=[2**40, 12]),
    "a shape and chunks of terabytes": layout(shape=[2**40, 12], chunks=[2**40, 12]),
    "a shape below nothing": layout(shape=[-1, 12]),
    "elements of a gigabyte": layout(dtype="|V1073741824"),
    "objects": layout(dtype="|O"),
    "terabytes that all agree": huge,
    "a manifest of many shards": manifest(**{"arrays__params/byte_embedding__shard": [1, 1]}),
    "many files": many,
    "a file of a long name": extra(b"params/" + b"x" * 250),
}
NAMES = {
    "a step of another number": named("7"),
    "a step with zeros": named("006"),
    "a step below nothing": named("-6"),
    "a step of other digits": named("６"),
    "a step of a hundred digits": named("6" * 100),
    "an array elsewhere": manifest(
        **{"arrays__params/../../../outside": {"dtype": "int8", "shape": [1], "shard": [1]}}
    ),
    "a digest of a file elsewhere": manifest(**{"digests__params/../../../../etc/passwd": "0"}),
    "a digest of an absolute file": manifest(**{"digests__params//etc/passwd": "0"}),
    "a manifest of another seal": manifest(seal=False, step=6),
    "a manifest of a class": manifest(arrays={"__qualname__": "planted.Feature"}),
}
REFUSED = LINKS | KINDS | SIZES | NAMES
# What an older program left, or nobody reads, may lie there: nothing comes of it.
EITHER = {
    "a name that is no UTF-8": extra(b"params/\xff\xfe"),
    "a name with a line and an escape": extra(b"params/a\n\x1b[2J"),
    "a name that looks like a way up": extra("params/‥/x".encode()),
    "many folders": deep,
    "a module": extra(b"planted.py", b"open('imported', 'w')"),
    "a handler of a class": lambda run: hostile.edit(
        run / ABOUT, item_handlers={"params": "planted.Handler"}
    ),
}
CASES = REFUSED | EITHER


@pytest.fixture(scope="module")
def results(tmp_path_factory, finished_run, text_dir):
    place = tmp_path_factory.mktemp("checkpoints")
    return hostile.attempt_each(CASES, lambda _: "load", finished_run, place, text_dir)


@pytest.mark.parametrize("case", CASES)
def test_it_takes_neither_time_nor_memory_and_runs_nothing(results, case):
    assert results[case]["events"] == []
    assert results[case]["seconds"] < 10 and results[case]["grown"] < 2**27


@pytest.mark.parametrize("case", REFUSED)
def test_a_hostile_checkpoint_is_refused_by_an_error_of_ours(results, case):
    ended = results[case]["ended"]
    assert ended.startswith(("UserError: ", "CheckpointError: ")) and "\n" not in ended, ended


@pytest.mark.parametrize("case", EITHER)
def test_what_nobody_asked_for_changes_nothing(results, case):
    ended = results[case]["ended"]
    assert ended.startswith("CheckpointError: ") or len(ended) == 64, ended


def described(run: Path) -> list[Path]:
    """The small files that say what a checkpoint is, the run's config among them."""
    found = [path for path in run.glob("checkpoints/**/*") if path.is_file()]
    found = [path for path in found if not path.name.replace(".", "").isdigit()]
    return sorted(path for path in found if "opt_state" not in path.parts) + [run / "config.json"]


def test_any_damage_of_what_describes_it_is_an_error_of_ours_or_none(
    tmp_path, finished_run, text_dir
):
    draw, jobs = random.Random(0), [("load", hostile.copy_of(finished_run, tmp_path / "clean"))]
    changed = [Path()]
    for number in range(FUZZED):
        run = tmp_path / str(number)
        hostile.copy_of(finished_run, run, without=["opt_state", "tensorboard"], copy=os.link)
        changed.append(draw.choice(described(run)))
        hostile.mutate(changed[-1], draw)
        jobs.append(("load", run))
    clean, *results = hostile.attempt(jobs, tmp_path, text_dir)
    for path, found in zip(changed[1:], results, strict=True):
        same = found["ended"] == clean["ended"]
        same |= path.name == "config.json" and len(found["ended"]) == 64  # of a dropout, say
        assert same or found["ended"].startswith(("UserError: ", "CheckpointError: ")), (
            path,
            found,
        )
        assert found["events"] == [] and found["seconds"] < 10 and found["grown"] < 2**27, path
