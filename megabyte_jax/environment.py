"""What the bits of a run depend on besides its config, data and code."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy")
_SETTINGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")


def fingerprint(mesh: Mesh) -> dict[str, Any]:
    """What has to be the same for a resumed run to equal, bit for bit, one that went through.

    Measured on CPU: another number of devices, of cores (with one device) or another instruction
    set gives other bits.

    Args:
        mesh: the run is spread over.

    Returns:
        By name, of what JSON can hold.
    """
    device = mesh.devices.flat[0]
    return {
        **{package: metadata.version(package) for package in _PACKAGES},
        "python": platform.python_version(),
        "device": device.device_kind,
        "platform": device.client.platform_version,
        "processes": jax.process_count(),
        "mesh": {axis: int(size) for axis, size in mesh.shape.items()},
        "cores": _cores() if device.platform == "cpu" else None,
        "processor": _processor() if device.platform == "cpu" else None,
        "matmul_precision": jax.config.values["jax_default_matmul_precision"],
        **{name: os.environ.get(name, "") for name in _SETTINGS},
    }


def _cores() -> int | None:
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _processor() -> str:
    """The model of the processor and a digest of what it can do."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    model = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE)
    able = hashlib.sha256(flags[1].encode()).hexdigest()[:8] if flags else "unknown"
    return f"{model[1] if model else platform.machine()}, features {able}"


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is not as it was, a line for each: its name, the old value, the new one."""
    return [
        f"{name}: {then.get(name)!r}, now {now.get(name)!r}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]
