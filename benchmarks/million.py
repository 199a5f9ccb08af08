"""What a sequence of a million bytes costs: memory of a training step, and time of attention.

    python -m benchmarks.million --output=million.json

memory: the gradient of the loss of one sequence with the model of configs/million.py:text_tiny, its
    T and K cut to 2^16 ... 2^20 bytes, each in a process of its own: the highest resident memory,
    less that of the process before the model, and what the compiler planned. `needs` is what must
    grow with T, in bytes (N layers of width D in the global model, D_G = D / P):

        needs = T (1 + 4) + 4 T D_G (2 + E) + 4 K D (N + 8)

    bytes and losses; embeddings and their gradient, and with learned positions (E = 3) the table,
    its gradient and their sum; the input of every layer of the global model, which
    rematerialisation keeps, and of the layer being computed queries, keys, values and their
    gradients, its input and its output.
attention: forward and backward of one layer of global and one of local attention, 64 wide, with
    cross-patch attention over the whole patch, at P = T^(1/3) for T = 2^13 ... 2^20; the least of
    the repeats, in core-seconds, and the exponent of T that fits them (the paper: 4/3).
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import machine
from configs import million
from megabyte_jax import run_config
from megabyte_jax.models import functional
from megabyte_jax.models.attention import attention, with_previous
from megabyte_jax.models.config import MegabyteConfig

MEMORY_EXPONENTS = range(16, 21)
ATTENTION_EXPONENTS = range(13, 21)
WIDTH = 64
MIB = 2**20


def needs(model: MegabyteConfig) -> int:
    """Bytes that grow with the sequence, by the formula above."""
    T, P, D = model.seq_len, model.patch_size, model.global_model.dim
    tables = 3 * model.byte_positions
    embeddings = 4 * T * model.byte_dim * (2 + tables)
    return 5 * T + embeddings + 4 * T // P * D * (model.global_model.num_layers + 8)


def model_of(seq_len: int) -> MegabyteConfig:
    """The model of configs/million.py:text_tiny for sequences of seq_len bytes."""
    config = million.get_config("text_tiny")
    config.model.seq_len = seq_len
    model = run_config.validate(config)
    assert isinstance(model, MegabyteConfig)
    return model


def memory(seq_len: int) -> dict[str, Any]:
    """Measures a gradient in this process, which must not have done anything else."""
    model = model_of(seq_len)
    x = np.random.default_rng(0).integers(0, 256, (1, seq_len), np.uint8)
    params = functional.init_params(model, jax.random.key(0))

    def loss(params: functional.Params, x: jax.Array) -> jax.Array:
        return functional.nll(model, params, x).mean()

    step = jax.jit(jax.value_and_grad(loss)).lower(params, x).compile()
    planned = step.memory_analysis()
    assert planned is not None
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    start = time.process_time()
    value, grads = jax.block_until_ready(step(params, x))
    return {
        "seq_len": seq_len,
        "patches": seq_len // model.patch_size,
        "loss": float(value),
        "core_seconds": time.process_time() - start,
        "resident_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "grown_mib": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / MIB,
        "planned_mib": planned.temp_size_in_bytes / MIB,
        "needs_mib": needs(model) / MIB,
    }


def attention_seconds(exponent: int, repeats: int) -> dict[str, Any]:
    """Measures both attentions of one layer on a sequence of about 2 ** exponent bytes."""
    P = round(2 ** (exponent / 3))
    K = round(2**exponent / P)
    rng = np.random.default_rng(0)
    seconds = {}
    for name, G, T in (("global", 1, K), ("local", K, P)):
        qkv = rng.normal(size=(3, 1, G, T, 1, WIDTH)).astype(np.float32)

        def loss(qkv: jax.Array, G: int = G, T: int = T) -> jax.Array:
            q, k, v = qkv
            r = T if G > 1 else 0
            return jnp.sum(attention(q, with_previous(k, r), with_previous(v, r)))

        step = jax.jit(jax.grad(loss)).lower(qkv).compile()
        taken = []
        for _ in range(repeats):
            start = time.process_time()
            jax.block_until_ready(step(qkv))
            taken.append(time.process_time() - start)
        seconds[name] = min(taken[1:])
    total = sum(seconds.values())
    return {"bytes": K * P, "patch_size": P, **seconds, "core_seconds": total}


def fit(rows: list[dict[str, Any]], name: str) -> float:
    """Exponent of T that fits a column best, in logarithms."""
    sizes, values = (np.log([row[key] for row in rows]) for key in ("bytes", name))
    return float(np.polyfit(sizes, values, 1)[0])


def plot(rows: list[dict[str, Any]], exponent: float, path: Path) -> None:
    """Draws core-seconds by T."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5, 3.6), layout="constrained")
    axes = figure.subplots()
    T = np.array([row["bytes"] for row in rows])
    for name in ("global", "local", "core_seconds"):
        label = f"both, exponent {exponent:.2f}" if name == "core_seconds" else name
        axes.loglog(T, [row[name] for row in rows], "o-", markersize=3, label=label)
    guide = rows[-1]["core_seconds"] * (T / T[-1]) ** (4 / 3)
    axes.loglog(T, guide, "k:", linewidth=1, label="4/3")
    axes.set_xlabel("T in bytes, P = T^(1/3)")
    axes.set_ylabel("core-seconds")
    axes.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measures as the arguments say."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--output", help="JSON file; the plot is beside it")
    parser.add_argument("--max_exponent", type=int, default=20, help="largest T, as a power of 2")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(memory(arguments.one)))
        return
    used = []
    for exponent in MEMORY_EXPONENTS:
        if exponent <= arguments.max_exponent:
            command = [sys.executable, "-m", "benchmarks.million", f"--one={2**exponent}"]
            made = subprocess.run(command, capture_output=True, text=True, check=True)
            used.append(json.loads(made.stdout))
            print(used[-1], flush=True)
    beyond = {row["seq_len"]: row["planned_mib"] - row["needs_mib"] for row in used}
    grown = {row["seq_len"]: row["grown_mib"] - row["needs_mib"] for row in used}
    ratios = {
        name: values[2**20] / values[2**18]
        for name, values in (("planned", beyond), ("grown", grown))
        if 2**20 in values
    }
    print("beyond needs, 2^20 over 2^18 (at most 2.2):", ratios)
    timed = []
    for exponent in ATTENTION_EXPONENTS:
        if exponent <= arguments.max_exponent:
            timed.append(attention_seconds(exponent, arguments.repeats))
            print(timed[-1], flush=True)
    fitted = fit(timed, "core_seconds")
    print(f"exponent of attention (at most 1.40): {fitted:.3f}")
    if arguments.output:
        path = Path(arguments.output)
        plot(timed, fitted, path.with_suffix(".png"))
        result = {
            "machine": machine.description(f"python -m benchmarks.million --output={path.name}"),
            "memory": used,
            "memory_ratio": ratios,
            "attention": timed,
            "attention_exponent": fitted,
        }
        path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
