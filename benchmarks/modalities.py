"""What the tiny configs reach on small real sets of every modality, beside compressors.

    MALLOC_TRIM_THRESHOLD_=8000000000 MALLOC_MMAP_THRESHOLD_=4000000000 \
        python -m benchmarks.modalities --data=DIR --set=code --core=0

The two variables keep memory that XLA gives back after an update, only to ask for it again. DIR
holds the archives named below, each of train, valid and test. A set is unpacked, trained on by
its tiny config on one core, and its whole test split evaluated; the result is kept in
benchmarks/results/modalities.json, whose table `--table` prints. The sets are samples and subsets:
none of the figures is a score on the benchmark whose name the sample carries.
"""

import argparse
import json
import os
import resource
import tarfile
import tempfile
import time
import zipfile
import zlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

import train
from benchmarks import machine
from configs.paper import arxiv, audio, code, imagenet, pg19, text
from megabyte_jax import evaluation, run_config, trained
from megabyte_jax.data import datasets, statistics
from megabyte_jax.data.corpus import Corpus

RESULTS = Path(__file__).parent / "results" / "modalities.json"
_IMAGENET = {"data.image.resize": "box"}
_RASTER = {"data.image.scan": "raster"}
_MIDI = {"train.num_bytes": 5_600_000}  # two epochs

# Set -> archive, its folder, config, other keys.
SETS: dict[str, tuple[str, str, ConfigDict, dict[str, Any]]] = {
    "books": ("pg19_subset.tar.xz", "pg19_subset", pg19.get_config("tiny"), {}),
    "code": ("code_permissive.tar.xz", "code_permissive", code.get_config("tiny"), {}),
    "latex": ("latex_open.tar.xz", "latex_open", arxiv.get_config("tiny"), {}),
    "midi": ("nottingham_midi.tar.xz", "nottingham_midi", text.get_config("tiny"), _MIDI),
    "imagenet64": (
        "imagenet_sample256.zip",
        "",
        imagenet.get_config("image64_tiny"),
        _IMAGENET,
    ),
    "imagenet256": ("imagenet_sample256.zip", "", imagenet.get_config("image256_tiny"), {}),
    "imagenet640": ("imagenet_sample640.zip", "", imagenet.get_config("image640_tiny"), {}),
    "flowers64": ("flowers64.npz", "", imagenet.get_config("image64_tiny"), {}),
    "flowers64_raster": ("flowers64.npz", "", imagenet.get_config("image64_tiny"), _RASTER),
    "audio": ("audio16k.tar.xz", "audio16k", audio.get_config("tiny"), {}),
}


def main() -> None:
    """Trains on one set and keeps the result, or prints the table of all."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--data", help="the folder of the archives")
    parser.add_argument("--set", choices=SETS)
    parser.add_argument("--core", type=int, help="the only one to use")
    parser.add_argument("--table", action="store_true", help="print what was measured so far")
    options = parser.parse_args()
    if options.table:
        print(table(json.loads(RESULTS.read_text())))
        return
    if not (options.data and options.set):
        parser.error("--data and --set are needed")
    if options.core is not None:
        os.sched_setaffinity(0, {options.core})
    result = measure(options.set, Path(options.data))
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[options.set] = result
    RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    print(json.dumps({name: result[name] for name in ("model", "compressors")}, indent=2))


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Trains and evaluates on a set.

    Args:
        name: of the set.
        folder: of the archives.
    """
    archive, top, config, changes = SETS[name]
    with tempfile.TemporaryDirectory() as scratch:
        unpack(folder / archive, Path(scratch) / "data")
        config.data.source = str(Path(scratch) / "data" / top)
        config.data.split.update(train="train", valid="valid", test="test")
        config.data.cache_dir = f"{scratch}/cache"
        config.update_from_flattened_dict(changes)
        config.eval.interval = 0
        model_config = run_config.validate(config)
        (documents,) = datasets.open_splits(config.data, ["test"], model_config.patch_size)
        compressed = asdict(
            statistics.measure(
                documents, config.data, model_config.patch_size, documents.num_bytes, name
            )
        )
        compressed["gzip -9, each document"] = gzip_each(documents)
        before, start = cpu_seconds(), time.monotonic()
        train.train(config, f"{scratch}/run")
        seconds, wall = cpu_seconds() - before, time.monotonic() - start
        model = trained.load(f"{scratch}/run")
        scores = {}
        # A window of images that slides would cut them.
        for strategy in ("sliding", "basic") if config.data.modality == "bytes" else ("basic",):
            result = evaluation.evaluate(
                model.config, model.params, documents, config.eval.batch_size, strategy=strategy
            )
            scores[strategy] = result.bits_per_byte
        stderr = result.bits_per_byte_stderr
        report = machine.description(f"python -m benchmarks.modalities --data=DIR --set={name}")
        config.data.source, config.data.cache_dir = archive, ""
    return {
        **report,
        "updates": model.step,
        "bytes_seen": model.step * config.train.batch_size * model_config.seq_len,
        "train_cpu_seconds": round(seconds, 1),
        "train_wall_seconds": round(wall, 1),
        "model": scores,
        "stderr": stderr,
        "compressors": compressed,
        "config": config.to_dict(),
    }


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks an archive, or writes the images of a .npz as PNG files."""
    if archive.suffix == ".npz":
        with np.load(archive) as arrays:
            for split in ("train", "valid", "test"):
                (folder / split).mkdir(parents=True)
                for number, pixels in enumerate(arrays[split]):
                    Image.fromarray(pixels).save(folder / split / f"{number:05}.png")
    elif archive.suffix == ".zip":
        with zipfile.ZipFile(archive) as file:
            file.extractall(folder)
    else:
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")


def cpu_seconds() -> float:
    """Seconds of the processor that this process has used, in all its threads."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def gzip_each(documents: Corpus) -> float:
    """Bits per byte of the documents as gzip files of their own, as the model reads them."""
    size = 0
    for document in documents:
        compressor = zlib.compressobj(9, wbits=16 + zlib.MAX_WBITS)
        size += len(compressor.compress(document.data.tobytes())) + len(compressor.flush())
    return 8 * size / documents.num_bytes


def table(results: dict[str, Any]) -> str:
    """The table of benchmarks/results/README.md, in Markdown."""
    columns = ["order-0 entropy", "gzip -9", "xz -9e", "zstd -19", "PNG", "FLAC -8"]
    head = ["set", "test bytes", "updates", "CPU minutes", "basic", "sliding", *columns]
    head.append("gzip, each document")
    lines = [head, ["---"] * len(head)]
    for name, result in results.items():
        measured = result["compressors"]
        bits = [measured["bits_per_byte"].get(column) for column in columns]
        bits.append(measured["gzip -9, each document"])
        scores = [result["model"]["basic"], result["model"].get("sliding"), *bits]
        minutes = f"{result['train_cpu_seconds'] / 60:.1f}"
        cells = [name, f"{measured['bytes']:,}", f"{result['updates']:,}", minutes]
        lines.append(cells + ["-" if score is None else f"{score:.3f}" for score in scores])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
