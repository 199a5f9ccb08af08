"""How JAX runs under test; set in the environment, before anything imports jax."""

import os
import pathlib

CACHE = pathlib.Path(__file__).parents[1] / ".cache" / "jax"

# A shell that names another backend keeps it, so that the same tests can run on an accelerator.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        # Eight devices on any machine: what holds on one device must hold on a mesh.
        "--xla_force_host_platform_device_count=8",
        # Nearly all of a test's time goes into compiling steps that then run a few times.
        "--xla_backend_optimization_level=0",
    ]
).strip()
# Compiled steps outlive the process, so the second run of the tests compiles nothing.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Shapes that broadcast by accident are how a wrong model trains without complaint.
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
