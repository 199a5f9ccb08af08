"""How fast windows to train on are read: alone, and beside a step.

    python -m benchmarks.loader --output=loader.json

Prints a line per figure: the median of its repeats, their range and the target, if it has one. All
on one core; MB are 10^6 bytes, seconds those of the clock and core-seconds those that the core
worked. What is `cold` is read after the system was told to forget the files, `warm` right after it.

Sources, each measured in a process of its own:
sparse: a file of --sparse bytes that is one hole and takes no space on the disk.
file: a file of --size random bytes.
flat: documents of 5,000 bytes in the flat layout, --size bytes of them.
folder: 20,000 files of 5,000 bytes.

Figures of each:
windows: batches of 48 x 8,192 bytes, with 0 to 4 threads that read ahead.
step: what an update waits for such a batch where it takes 20 ms and leaves the core idle, cold.
image: one sequence of 1,228,800 bytes, an image of 640 x 640.
memory: resident at most, beyond what was before the source was opened.
"""

import argparse
import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import machine
from benchmarks.generation import Figure
from megabyte_jax.data.bad_records import BadRecords
from megabyte_jax.data.corpus import Corpus, open_corpus
from megabyte_jax.data.flat import flatten
from megabyte_jax.data.windows import TrainWindows, prefetch

BATCH, SEQ_LEN, IMAGE = 48, 8192, 640 * 640 * 3
DOCUMENT, NUM_FILES = 5000, 20_000
WORKERS = (0, 1, 2, 4)
REPEATS = 5
NUM_BATCHES = 200  # of a repeat
NUM_STEPS, STEP_SECONDS = 50, 0.02
NUM_IMAGES = 30
SOURCES = ("sparse", "file", "flat", "folder")


def _write(source: str, workdir: Path, size: int, sparse: int) -> None:
    if source == "sparse":
        (workdir / "sparse").touch()
        os.truncate(workdir / "sparse", sparse)
    elif source == "file":
        with open(workdir / "file", "wb") as file:
            file.writelines(_random(size))
    elif source == "flat":
        _flatten(workdir, size)
    else:
        for number, contents in enumerate(_documents(DOCUMENT * NUM_FILES)):
            path = workdir / "folder" / f"{number // 1000:02}" / f"{number:05}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(contents)
    os.sync()  # what is not on the disk yet could not be forgotten


def _open(source: str, workdir: Path) -> Corpus:
    return _flatten(workdir, 0) if source == "flat" else open_corpus(str(workdir / source))


def _flatten(workdir: Path, size: int) -> Corpus:
    return flatten(str(workdir / "flat"), "documents", {}, _documents(size), BadRecords(0))


def _documents(size: int) -> Iterator[bytes]:
    for piece in _random(size):
        yield from (piece[start : start + DOCUMENT] for start in range(0, len(piece), DOCUMENT))


def _random(size: int) -> Iterator[bytes]:
    generator = np.random.default_rng(0)
    for start in range(0, size, DOCUMENT * NUM_FILES):
        yield generator.bytes(min(DOCUMENT * NUM_FILES, size - start))


def _forget(corpus: Corpus) -> None:
    """Tells the system to drop the files of a corpus from its cache."""
    # A flat corpus has millions of documents in one file, a folder no more than NUM_FILES.
    for path in {document.source for document in islice(corpus, NUM_FILES)}:
        assert isinstance(path, str)
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def windows(source: str, corpus: Corpus) -> Iterator[Figure]:
    """Batches as fast as they come."""
    sampler = TrainWindows(corpus, SEQ_LEN, BATCH, seed=0)
    megabytes = NUM_BATCHES * BATCH * SEQ_LEN / 1e6
    for workers in WORKERS:
        speeds: dict[tuple[str, str], list[float]] = {}
        for repeat in range(REPEATS):
            steps = range(repeat * NUM_BATCHES, (repeat + 1) * NUM_BATCHES)
            _forget(corpus)
            for state in ("cold", "warm"):
                start, start_core = time.perf_counter(), time.process_time()
                for _ in prefetch(sampler.batch, steps, workers):
                    pass
                wall, core = time.perf_counter() - start, time.process_time() - start_core
                speeds.setdefault((state, "second"), []).append(megabytes / wall)
                speeds.setdefault((state, "core-second"), []).append(megabytes / core)
        for (state, clock), values in speeds.items():
            name = f"{source}, windows, {workers} workers, {state}"
            yield Figure(name, values, f"MB per {clock}", 100)


def step(source: str, corpus: Corpus) -> Iterator[Figure]:
    """Batches as an update asks for them."""
    sampler = TrainWindows(corpus, SEQ_LEN, BATCH, seed=1)
    for workers in WORKERS:
        _forget(corpus)
        batches, waits = prefetch(sampler.batch, range(NUM_STEPS), workers), []
        next(batches)  # for the first one there is nothing to hide behind
        while True:
            time.sleep(STEP_SECONDS)  # the accelerator's time
            start = time.perf_counter()
            if next(batches, None) is None:
                break
            waits.append(1000 * (time.perf_counter() - start))
        yield Figure(f"{source}, step of 20 ms, {workers} workers", waits, "ms waited")


def image(source: str, corpus: Corpus) -> Iterator[Figure]:
    """Long sequences, one by one."""
    sampler = TrainWindows(corpus, IMAGE, 1, seed=0)
    _forget(corpus)
    for state in ("cold", "warm"):
        times = []
        for number in range(NUM_IMAGES):
            start = time.perf_counter()
            sampler.batch(number)
            times.append(1000 * (time.perf_counter() - start))
        yield Figure(f"{source}, {IMAGE:,} bytes, {state}", times, "ms", 50, at_most=True)


def _resident(field: str) -> float:
    """A field of this process's status in MB: VmRSS, resident now, or VmHWM, at most."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(field))
    return int(line.split()[1]) * 1024 / 1e6


def _measure(source: str, workdir: Path) -> list[dict[str, Any]]:
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak that imports had
    before = _resident("VmRSS")
    corpus = _open(source, workdir)
    figures = []

    def note(figure: Figure) -> None:
        print(figure, flush=True)
        figures.append(dataclasses.asdict(figure))

    note(Figure(f"{source}, size", [corpus.num_bytes / 1e6], "MB"))
    for part in (windows, step, image):
        for figure in part(source, corpus):
            note(figure)
    grown = [_resident("VmHWM") - before]
    note(Figure(f"{source}, memory", grown, "MB above before", 500, at_most=True))
    return figures


def main() -> None:
    """Measures how fast windows to train on are read."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--source", choices=SOURCES, action="append", help="several; else all")
    parser.add_argument("--size", type=int, default=4 * 10**9, help="of file and flat, in bytes")
    parser.add_argument("--sparse", type=int, default=30 * 10**9, help="of sparse, in bytes")
    parser.add_argument("--workdir", help="for the files, which are removed; else a temporary one")
    parser.add_argument("--output", type=Path, help="a JSON file of the figures")
    options = parser.parse_args()
    figures = []
    for source in options.source or SOURCES:
        with tempfile.TemporaryDirectory(dir=options.workdir) as folder:
            _write(source, Path(folder), options.size, options.sparse)
            # A process each: the memory of one would hide that of the next.
            with ProcessPoolExecutor(1, get_context("spawn")) as process:
                figures += process.submit(_measure, source, Path(folder)).result()
    if options.output:
        command = "python -m benchmarks.loader"
        command += "".join(f" --source={source}" for source in options.source or ())
        command += f" --size={options.size} --sparse={options.sparse}"
        report = {**machine.description(command), "figures": figures}
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
