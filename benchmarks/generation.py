"""How fast models generate: against the PyTorch package, a Transformer, and the memory's bandwidth.

    python -m benchmarks.generation --output=generation.json

Prints a line per figure: the median of its repeats, their range and the target, if it has one. What
is compared runs in alternation, after a round that compiles, and a ratio is that of neighbours in
time. Each part has a process of its own, all but `accelerator` one thread on one core, timed in
seconds of that core.

small: widths (256, 128), depths (4, 2), P = 8, on from a prompt of 100 bytes up to 1,024.
peer: the same in the PyTorch package (pip install torch MEGABYTE-pytorch), both with its default,
    the 25 likeliest bytes.
position: what late bytes cost in a context of 8,192; reading the prompt is not counted.
paper: MEGABYTE 1.3B + 218M with context 8,192 against the Transformer of 350M with context 1,024,
    8,192 bytes each (paper, table "Generation"): by count of what is read from memory, and by clock
    of a float32 pair of all widths / 8, whose heads keep their width.
accelerator: that pair at its real size in bfloat16, weights random, and the share of the bound that
    bandwidth sets. Without an accelerator --scale runs it small, to see that it runs.
"""

import argparse
import dataclasses
import functools
import importlib
import importlib.metadata
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from configs import enwik8
from megabyte_jax import flops
from megabyte_jax.generation import Decoder
from megabyte_jax.models import functional
from megabyte_jax.models.config import ModelConfig, TransformerConfig, from_mapping
from megabyte_jax.models.presets import paper_baseline, paper_model
from megabyte_jax.sampling import Sampling

PRIME, LENGTH = 100, 1024  # bytes of the prompt, and with those generated
PAPER_LENGTH, PAPER_SPEEDUP = 8192, 1.42  # 132 s / 93 s in the paper


@dataclasses.dataclass(frozen=True)
class Figure:
    """One line of what was measured.

    Attributes:
        name: what it is.
        values: of each repeat, in `unit`.
        unit: of the values.
        target: what was to be reached or, if `at_most`, not to be exceeded.
    """

    name: str
    values: Sequence[float]
    unit: str
    target: float | None = None
    at_most: bool = False

    def __str__(self) -> str:
        value = statistics.median(self.values)
        line = f"{self.name}: {value:,.5g} {self.unit}"
        if len(self.values) > 1:
            line += f" ({min(self.values):,.5g} to {max(self.values):,.5g})"
        if self.target is None:
            return line
        bound = "at most" if self.at_most else "at least"
        return f"{line}; target {bound} {self.target:,g}, {value / self.target:.2f} of it"


def _decoder(config: ModelConfig) -> Decoder:
    return Decoder(config, functional.init_params(config, jax.random.key(0)))


def _prompt(size: int) -> bytes:
    return np.random.default_rng(0).integers(0, 256, size, np.uint8).tobytes()


def _speed(clock: Callable[[], float], num_bytes: int, generate: Callable[[], Any]) -> float:
    """Bytes per second of a clock."""
    start = clock()
    generate()
    return num_bytes / (clock() - start)


def _alternate(repeats: int, *sides: Callable[[], float]) -> list[tuple[float, ...]]:
    """What each side measures, one after the other, again and again after a round to warm up."""
    rounds = [[side() for side in sides] for _ in range(repeats + 1)]
    return list(zip(*rounds[1:], strict=True))


def _ratios(a: Sequence[float], b: Sequence[float]) -> list[float]:
    return [x / y for x, y in zip(a, b, strict=True)]


def _small_model(seq_len: int) -> ModelConfig:
    model = from_mapping(enwik8.get_config("small").model.to_dict())
    return dataclasses.replace(model, seq_len=seq_len)


def _ours(sampling: Sampling) -> Callable[[], float]:
    decoder, made = _decoder(_small_model(LENGTH)), LENGTH - PRIME
    generate = functools.partial(decoder.generate, [_prompt(PRIME)], made, sampling)
    return functools.partial(_speed, time.process_time, made, generate)


def small(scale: int | None) -> Iterator[Figure]:
    """Our speed on one core."""
    (speeds,) = _alternate(11, _ours(Sampling()))
    yield Figure("small", speeds, "bytes per core-second", 3000)


def peer(scale: int | None) -> Iterator[Figure]:
    """Our speed and that of MEGABYTE-pytorch, as it is shipped but without gradients."""
    os.environ["TQDM_DISABLE"] = "1"
    try:
        torch, package = map(importlib.import_module, ("torch", "MEGABYTE_pytorch"))
    except ImportError as error:
        print(f"peer: skipped, {error}; pip install torch MEGABYTE-pytorch")
        return
    torch.set_num_threads(1)
    model = package.MEGABYTE(
        num_tokens=256, dim=(256, 128), depth=(4, 2), max_seq_len=(LENGTH // 8, 8), flash_attn=True
    ).eval()
    prime = torch.tensor([list(_prompt(PRIME))])

    def theirs() -> float:
        with torch.inference_mode():
            return _speed(time.process_time, LENGTH - PRIME, lambda: model.generate(prime))

    ours_speeds, theirs_speeds = _alternate(3, _ours(Sampling(top_k=25)), theirs)
    versions = " ".join(importlib.metadata.version(x) for x in ("MEGABYTE-pytorch", "torch"))
    yield Figure("peer, ours", ours_speeds, "bytes per core-second")
    yield Figure(f"peer, MEGABYTE-pytorch {versions}", theirs_speeds, "bytes per core-second")
    yield Figure("peer, ratio", _ratios(ours_speeds, theirs_speeds), "times", 100)


def position(scale: int | None) -> Iterator[Figure]:
    """The cost of bytes at the start and at the end of a long context."""
    T, made = 8192, 192
    decoder = _decoder(_small_model(T))

    def cost(start: int) -> float:
        """Core-seconds of the bytes after a prompt and a first piece, which waits for it."""
        pieces = decoder.stream(_prompt(start), made + 8 - start % 8)
        next(pieces)
        begin = time.process_time()
        for _ in pieces:
            pass
        return (time.process_time() - begin) / made

    early, late = _alternate(15, lambda: cost(PRIME), lambda: cost(T - made - 8))
    yield Figure("position, a byte from 104 to 296", early, "core-seconds")
    yield Figure("position, a byte from 8,000 to 8,192", late, "core-seconds")
    yield Figure("position, ratio", _ratios(late, early), "times", 1.3, at_most=True)


def _scaled(config: ModelConfig, scale: int, dtype: str) -> ModelConfig:
    """A model with all widths and numbers of heads divided."""
    changes: dict[str, Any] = {"dtype": dtype}
    for name, stack in vars(config).items():
        if isinstance(stack, TransformerConfig):
            heads = max(1, stack.num_heads // scale)
            changes[name] = dataclasses.replace(stack, dim=stack.dim // scale, num_heads=heads)
    return dataclasses.replace(config, **changes)


def _pair(scale: int, dtype: str) -> dict[str, ModelConfig]:
    """The paper's two models of equal compute."""
    return {
        "MEGABYTE": _scaled(paper_model("1.3b_218m"), scale, dtype),
        "Transformer": _scaled(paper_baseline("350m"), scale, dtype),
    }


def _read(config: ModelConfig, batch: int) -> float:
    """Bytes of weights and cache read for one byte in each sequence of a batch."""
    read = flops.read_per_generated_byte(config)
    return read.weights + batch * read.cache


def _race(
    pair: dict[str, ModelConfig], clock: Callable[[], float], batch: int, num_bytes: int
) -> tuple[Sequence[float], Sequence[float]]:
    """Speeds of both, each in bytes per second of the clock."""

    def side(config: ModelConfig) -> Callable[[], float]:
        generate = functools.partial(_decoder(config).generate, [b""] * batch, num_bytes)
        return functools.partial(_speed, clock, batch * num_bytes, generate)

    megabyte, transformer = _alternate(3, *map(side, pair.values()))
    return megabyte, transformer


def paper(scale: int | None) -> Iterator[Figure]:
    """The paper's claim, by count and by clock."""
    scale = scale or 8
    pairs = {
        "paper, real size, bfloat16": _pair(1, "bfloat16"),
        f"paper, widths / {scale}, float32": _pair(scale, "float32"),
    }
    for name, pair in pairs.items():
        for model, config in pair.items():
            for what, count in flops.read_per_generated_byte(config)._asdict().items():
                yield Figure(f"{name}, {model}, {what} read", [count / 1e6], "MB per byte")
        for batch in (1, 32):
            ours, theirs = (_read(config, batch) for config in pair.values())
            ratio = [theirs / ours]
            yield Figure(f"{name}, batch {batch}", ratio, "times less read", PAPER_SPEEDUP)
    speeds = _race(pair, time.process_time, 1, PAPER_LENGTH)
    for model, speed in zip(pair, speeds, strict=True):
        yield Figure(f"{name}, {model}", speed, "bytes per core-second")
    yield Figure(f"{name}, clock", _ratios(*speeds), "times as fast", PAPER_SPEEDUP)


def _bandwidth() -> float:
    """Bytes per second, read and written, of passes over half a gibibyte."""
    increment = jax.jit(lambda x: x + 1, donate_argnums=0)
    x, best = jnp.zeros(2**27, jnp.float32), 0.0
    for _ in range(5):
        x.block_until_ready()
        start = time.perf_counter()
        for _ in range(16):  # launched together
            x = increment(x)
        x.block_until_ready()
        best = max(best, 16 * 2 * x.nbytes / (time.perf_counter() - start))
    return best


def accelerator(scale: int | None) -> Iterator[Figure]:
    """The paper's pair on the default device, and the share of the memory's bound."""
    on_cpu = jax.default_backend() == "cpu"
    if on_cpu and scale is None:
        print("accelerator: skipped, JAX sees none; --scale=32 runs this part small on a CPU")
        return
    num_bytes = 128 if on_cpu else PAPER_LENGTH
    pair, real = _pair(scale or 1, "bfloat16"), scale in (None, 1)
    where = f"accelerator, {jax.devices()[0].device_kind}, widths / {scale or 1}"
    bandwidth = _bandwidth()
    yield Figure(f"{where}, bandwidth", [bandwidth / 1e9], "GB per second")
    for batch in (1, 32):
        speeds = _race(pair, time.perf_counter, batch, num_bytes)
        for (model, config), speed in zip(pair.items(), speeds, strict=True):
            name = f"{where}, batch {batch}, {model}"
            yield Figure(name, speed, "bytes per second")
            bound = batch * bandwidth / _read(config, batch)
            target = 0.6 if real and batch == 1 else None
            yield Figure(name, [x / bound for x in speed], "of the bound", target)
        target = PAPER_SPEEDUP if real else None
        yield Figure(f"{where}, batch {batch}", _ratios(*speeds), "times as fast", target)


PARTS = {part.__name__: part for part in (small, peer, position, paper, accelerator)}


def _run(part: str, scale: int | None) -> list[dict[str, Any]]:
    if part != "accelerator":
        # Before the first use of JAX, whose thread pool is as large as this process has cores.
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
        jax.config.update("jax_platforms", "cpu")
    figures = []
    for figure in PARTS[part](scale):
        print(figure, flush=True)
        figures.append(dataclasses.asdict(figure))
    return figures


def main() -> None:
    """Measures how fast models generate."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--part", choices=PARTS, action="append", help="several; else all")
    scales, what = (1, 2, 4, 8, 16, 32), "divides the widths of paper (8) and accelerator (1)"
    parser.add_argument("--scale", type=int, choices=scales, help=what)
    parser.add_argument("--output", type=Path, help="a JSON file of the figures")
    options = parser.parse_args()
    figures = []
    for part in options.part or PARTS:
        # A process each: what a part sets cannot be taken back.
        with ProcessPoolExecutor(1, get_context("spawn")) as process:
            figures += process.submit(_run, part, options.scale).result()
    if options.output:
        command = "python -m benchmarks.generation"
        command += "".join(f" --part={part}" for part in options.part or ())
        command += f" --scale={options.scale}" if options.scale else ""
        report = {**machine.description(command), "figures": figures}
        options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
