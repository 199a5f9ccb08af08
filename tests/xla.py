"""How XLA compiles under test: nearly all of a test's time goes into steps that run a few times."""

import importlib.metadata

_OLD = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11)
# The emitters take more than twice as long as what they replaced, which newer versions lack.
FLAGS = "--xla_backend_optimization_level=0" + _OLD * " --xla_cpu_use_fusion_emitters=false"


def flags(devices: int) -> str:
    """For a process that simulates some devices."""
    return f"{FLAGS} --xla_force_host_platform_device_count={devices}"
