"""Plots: the losses of an evaluation by position, and a batch of images or sound."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

_GAP = 2  # pixels between two images
_GREY = 128  # which of black and white no image is mistaken for
_MAX_WAVEFORMS = 16


def loss_by_position(report: Mapping[str, Any]) -> bytes:
    """Draws bits per byte by position in the patch and in the context (figures 5 and 4).

    Args:
        report: see `evaluation.report`; dataset and split are in it.

    Returns:
        A PNG file.
    """
    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    # Escaped, as a path may hold what no font can draw.
    protocol = (
        f"{report['dataset']!a}, {report['split']}, {report['strategy']}, stride {report['stride']}"
    )
    figure.suptitle("\n".join(textwrap.wrap(protocol, 120)), fontsize=9, parse_math=False)
    patch, context = figure.subplots(1, 2)
    # None becomes NaN, which is a gap.
    bits = np.array(report["bits_per_byte_by_position"], np.float64)
    patch.plot(np.arange(len(bits)), bits, "o-", markersize=3)
    patch.set(xlabel=f"position in the patch of {len(bits)} bytes", ylabel="bits per byte")
    bits, size = np.array(report["bits_per_byte_by_context"], np.float64), report["context_bin"]
    context.plot(np.arange(len(bits)) * size, bits, "o-", markersize=1, lw=0.5)
    xlabel = f"position in the context of {report['context']:,} bytes, in bins of {size:,}"
    context.set(xlabel=xlabel, ylabel="bits per byte")
    return _png(figure)


def waveforms(samples: NDArray[np.int16], sample_rate: int) -> bytes:
    """Draws sounds over time, the first ones if there are many.

    Args:
        samples: int16[B, N].
        sample_rate: in samples per second.

    Returns:
        A PNG file.
    """
    shown = samples[:_MAX_WAVEFORMS]
    figure = Figure(figsize=(10, 1 + 0.8 * len(shown)), dpi=100, layout="constrained")
    axes = figure.subplots(len(shown), sharex=True, sharey=True, squeeze=False)[:, 0]
    seconds = np.arange(shown.shape[1]) / sample_rate
    for number, (axis, sound) in enumerate(zip(axes, shown, strict=True)):
        axis.plot(seconds, sound, lw=0.5)
        axis.set(ylim=(-(2**15), 2**15), ylabel=f"row {number}")
    axes[-1].set(xlabel="seconds")
    return _png(figure)


def grid(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Lays out images in lines, nearly in a square, with grey gaps and a grey rest.

    Args:
        images: uint8[B, H, W, 3].

    Returns:
        uint8[lines * (H + gap) - gap, columns * (W + gap) - gap, 3], the gap of 2 pixels.
    """
    B, H, W, _ = images.shape
    columns = min(B, max(1, round((B * H / W) ** 0.5)))
    lines = -(-B // columns)
    cells = np.full((lines * columns, H + _GAP, W + _GAP, 3), _GREY, np.uint8)
    cells[:B, :H, :W] = images
    cells = cells.reshape(lines, columns, H + _GAP, W + _GAP, 3).swapaxes(1, 2)
    return cells.reshape(lines * (H + _GAP), columns * (W + _GAP), 3)[:-_GAP, :-_GAP]


def _png(figure: Figure) -> bytes:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
