"""A work directory from elsewhere runs no code, and is read and not written: S1."""

import os
import pickle
import random
from pathlib import Path

import numpy as np
import pytest

from megabyte_jax.data.images import encode
from tests.security import hostile

OUTSIDE = "outside"  # beside the hostile work directory


class Bomb:
    def __reduce__(self):
        return os.system, ("touch imported",)


def config(**changes):
    return lambda run: hostile.edit(run / "config.json", **changes)


def text(file, contents):
    def change(run: Path) -> None:
        data = contents if isinstance(contents, bytes) else contents.encode()
        (run / file).write_bytes(data)

    return change


def link(file, target):
    def change(run: Path) -> None:
        path = run / file
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(run.parent / target)

    return change


def in_place_of(file, make):
    def change(run: Path) -> None:
        (run / file).unlink()
        make(run / file)

    return change


def metadata(name, **changes):
    def change(run: Path) -> None:
        for path in run.rglob(name):
            hostile.edit(path, **changes)

    return change


def value_types(run: Path) -> None:
    for path in run.rglob("_METADATA"):
        path.write_text(path.read_text().replace("jax.Array", "planted.Feature"))


def images(run: Path) -> None:
    """A run on images, whose cache is to lie outside."""
    (run / "pictures" / "test").mkdir(parents=True)
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    (run / "pictures" / "test" / "0.png").write_bytes(encode(pixels))
    image = {"height": 4, "width": 4, "scan": "raster", "resize": "none"}
    config(
        data__source=str(run / "pictures"),
        data__modality="image",
        data__image=image,
        data__separator="",
        data__split__by="name",
        data__cache_dir=str(run.parent / OUTSIDE),
    )(run)


def damaged(seed: int):
    """A file that describes a run, damaged at random."""

    def change(run: Path) -> None:
        draw = random.Random(seed)
        names = "config.json config.json data.json _METADATA _CHECKPOINT_METADATA"
        name = draw.choice(names.split())
        hostile.mutate(draw.choice(sorted(run.rglob(name))), draw)

    return change


HUGE = 2**31 - 1
ACCEPTED = {  # what is no part of a run is passed over
    "modules beside it": lambda run: hostile.plant(run, run.parent / hostile.MARK),
    "a config program beside it": text("config.py", "open('imported', 'w')"),
    "a pickle as metrics": text("metrics.jsonl", pickle.dumps(Bomb())),
    "a pickle as data.json": text("data.json", pickle.dumps(Bomb())),
    "a cache elsewhere": images,
    "a handler's name": metadata(
        "_CHECKPOINT_METADATA", item_handlers={"params": "planted.Handler", "x": "os.system"}
    ),
    "metrics that name classes": metadata(
        "_CHECKPOINT_METADATA", metrics={"__qualname__": "planted.Feature"}
    ),
}
REFUSED = {
    "yaml": text("config.json", '!!python/object/apply:os.system ["touch imported"]'),
    "Python": text("config.json", "__import__('os').system('touch imported')"),
    "a pickle": text("config.json", pickle.dumps(Bomb())),
    "a class": config(model={"__qualname__": "planted.Feature"}),
    "a call": config(model={"__args__": [], "_target_": "os.system"}),
    "an expression": config(model__dtype="__import__('os').system('touch imported')"),
    "a number as an expression": config(model__seq_len="24*10**9"),
    "nested": text("config.json", '{"model":' * 900 + "1" + "}" * 900),
    "nested deeper": text("config.json", "[" * 200_000),
    "a number of any size": text("config.json", '{"model": 1' + "0" * 9999 + "}"),
    "NaN": config(model__seq_len=float("nan")),
    "no object": text("config.json", "[]"),
    "methods as names": text("config.json", '{"items": 1, "model": {"items": 2}}'),
    "a huge width": config(model__local_model__dim=3 * 10**30),
    "many layers": config(model__global_model__num_layers=HUGE),
    "a huge context": config(model__seq_len=4 * 10**12),
    "a set to download": config(data__source="tfds:mnist", data__split__by="name"),
    "a set of a stranger's builder": config(
        data__source="tfds:planted", data__split__by="name", data__tfds__data_dir="."
    ),
    "a device": config(data__source="/dev/zero"),
    "memory": config(data__source="/proc/self/mem"),
    "a huge file": lambda run: os.truncate(run / "config.json", 2**40),
    "a FIFO": in_place_of("config.json", os.mkfifo),
    "a folder": in_place_of("config.json", os.mkdir),
    "a link to another config": link("config.json", f"{OUTSIDE}/config.json"),
    "a link to itself": lambda run: link("config.json", f"{run.name}/config.json")(run),
    "no text": text("config.json", b"\xff\xfe\x00"),
}
WRITES = {  # without --output
    "reports elsewhere": link("eval", OUTSIDE),
    "a report elsewhere": link("eval/test-basic.json", f"{OUTSIDE}/report"),
    "a plot elsewhere": link("eval/test-basic.png", f"{OUTSIDE}/plot"),
    "a loop": link("eval", "run0/eval"),
}
EITHER = {"a type of values": value_types} | {f"damage {n}": damaged(n) for n in range(12)}
CASES = ACCEPTED | REFUSED | WRITES | EITHER


@pytest.fixture(scope="module")
def place(tmp_path_factory, finished_run):
    place = tmp_path_factory.mktemp("hostile")
    (place / OUTSIDE).mkdir()
    (place / OUTSIDE / "config.json").write_bytes((finished_run / "config.json").read_bytes())
    return place


@pytest.fixture(scope="module")
def results(place, finished_run, text_dir):
    def action(name):
        return "eval here" if name in WRITES else "eval"

    return hostile.attempt_each(CASES, action, finished_run, place, text_dir / "13.txt")


@pytest.mark.parametrize("case", CASES)
def test_nothing_of_it_is_run_and_nothing_else_is_changed(results, place, case):
    assert results[case]["events"] == []
    assert not list(place.rglob(hostile.MARK))
    assert os.listdir(place / OUTSIDE) == ["config.json"]
    assert (
        results[case]["ended"] in ("0", "2", "3", "4") and "Traceback" not in results[case]["told"]
    )


@pytest.mark.parametrize("case", CASES)
def test_it_takes_neither_time_nor_memory(results, case):
    assert results[case]["seconds"] < 10 and results[case]["grown"] < 2**28


@pytest.mark.parametrize("case", REFUSED | WRITES)
def test_what_is_not_a_run_is_refused_in_one_line(results, case):
    assert results[case]["ended"] in ("2", "3", "4"), results[case]
    assert "eval.py: error: " in results[case]["told"].splitlines()[-1]
    assert "Traceback" not in results[case]["told"]


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_is_no_part_of_a_run_is_not_looked_at(results, case):
    assert results[case]["ended"] == "0", results[case]


def test_what_is_decoded_is_kept_where_the_user_keeps_it(results, place):
    assert results["a cache elsewhere"]["ended"] == "0"
    (kept,) = (place / "cache" / "megabyte_jax").iterdir()
    assert kept.name.startswith("pictures-")


def test_the_audit_would_have_seen_it(place):
    (place / "yes").mkdir(exist_ok=True)
    code = "import sys, tests.security.child as c; from pathlib import Path\n"
    code += "w = c.Watch([Path('yes').resolve()]); w.on = True\n"
    code += "open('yes/x', 'w'); open('no', 'w'); import os, socket; os.system('true')\n"
    code += "exec('1')\ntry: import planted\nexcept ImportError: pass\n"
    code += "w.on = False; print([s.split()[0] for s in w.seen])\n"
    seen = hostile.python(code, place)
    assert seen == "['open', 'os.system', 'compile', 'exec', 'import']\n"
