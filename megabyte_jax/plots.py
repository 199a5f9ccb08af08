"""The plot of an evaluation: where in its patch and in the context a byte is hard to predict."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure


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
    png = io.BytesIO()
    figure.savefig(png, format="png")
    return png.getvalue()
