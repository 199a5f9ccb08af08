"""Where a figure was measured: every result in benchmarks/results carries this."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path


def description(command: str) -> dict[str, object]:
    """The machine, the versions and the commit of this process.

    Args:
        command: that anyone can run again, without paths of this machine.
    """
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    packages = ("jax", "jaxlib", "flax", "optax", "numpy")
    return {
        "command": command,
        "cpu": cpu[0].split(":")[1].strip() if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load_at_end": os.getloadavg()[0],
        "python": platform.python_version(),
        **{package: importlib.metadata.version(package) for package in packages},
        "commit": commit.stdout.strip(),
    }
