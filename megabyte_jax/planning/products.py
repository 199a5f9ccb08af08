"""FLOPs of the matrix products of a compiled program."""

from __future__ import annotations

import math
import re

import numpy as np

from megabyte_jax.planning.hlo import Computation, Instruction


def dot_flops(where: Computation, dot: Instruction) -> int:
    """FLOPs of a `dot`: 2 m n k, for every batch."""
    left = where.instructions[dot.operands[0]].results[0]
    contracted = math.prod(left.shape[i] for i in dot.numbers("lhs_contracting_dims"))
    return 2 * dot.results[0].size * contracted


def library_flops(where: Computation, call: Instruction) -> int | None:
    """FLOPs of a product that a GPU's library computes; None if the call is something else."""
    contracted = re.search(r'"lhs_contracting_dimensions":\[([\d",]*)\]', call.attributes)
    if not contracted:
        return None
    left = where.instructions[call.operands[0]].results[0]
    shared = math.prod(left.shape[int(i)] for i in re.findall(r"\d+", contracted[1]))
    return 2 * call.results[0].size * shared


def convolution_flops(where: Computation, convolution: Instruction) -> int:
    """FLOPs of a `convolution`, which on TPU every product of matrices is.

    What falls on padding or between dilated elements is not counted: that is how a batch of
    products is written as one convolution.
    """
    left, right = (where.instructions[name].results[0] for name in convolution.operands[:2])
    (out,) = convolution.results
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    if labels is None:
        return 0
    window = re.search(r"window=\{([^}]*)\}", convolution.attributes)
    options = dict(part.split("=") for part in window[1].split()) if window else {}

    def option(name: str, axis: int, default: str) -> str:
        return options[name].split("x")[axis] if name in options else default

    positions = 1
    spatial = [label for label in labels[3] if label.isdigit()]
    for axis, label in enumerate(sorted(spatial, key=int)):
        low = int(option("pad", axis, "0_0").split("_")[0])
        positions *= _valid_positions(
            size=left.shape[labels[1].index(label)],
            kernel=right.shape[labels[2].index(label)],
            out=out.shape[labels[3].index(label)],
            low=low,
            stride=int(option("stride", axis, "1")),
            left_dilation=int(option("lhs_dilate", axis, "1")),
            right_dilation=int(option("rhs_dilate", axis, "1")),
        )
    features = right.shape[labels[2].index("i")] * out.shape[labels[3].index("f")]
    batch = left.shape[labels[1].index("b")]
    batch //= (convolution.numbers("batch_group_count") or (1,))[0]
    return 2 * batch * features * positions


def _valid_positions(
    *,
    size: int,
    kernel: int,
    out: int,
    low: int,
    stride: int,
    left_dilation: int,
    right_dilation: int,
) -> int:
    """Pairs of an element of the kernel and one of the result that meet an element of the input."""
    if (kernel, low, stride, left_dilation) == (1, 0, 1, 1):
        return min(size, out)
    # o * stride + k * right_dilation - low = i * left_dilation for some 0 <= i < size.
    offset = low - np.arange(kernel, dtype=np.int64) * right_dilation
    divisor = math.gcd(stride, left_dilation)
    period = left_dilation // divisor
    inverse = pow(stride // divisor, -1, period)
    first = (offset // divisor * inverse) % period
    lowest = np.maximum(0, -(-offset // stride))
    highest = np.minimum(out - 1, (offset + (size - 1) * left_dilation) // stride)
    lowest = lowest + (first - lowest) % period
    counts = np.maximum(0, (highest - lowest) // period + 1)
    return int(counts[offset % divisor == 0].sum())
