"""Plans a run: plan.py --config=configs/NAME.py --topology=v5e:4x4 [--mesh=fsdp=8,tensor=2].

Compiles the train step of a config for a slice of TPUs, with no TPU at hand, and prints whether it
fits, what memory it takes, what it computes and sends, and how long the run takes at best.
"""

import json
import os
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from megabyte_jax import cli
from megabyte_jax.planning import topology as topologies

CONFIG = config_flags.DEFINE_config_file("config", None, "The config file.", lock_config=True)
TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "Chips, as v5e:4x4 or v5p:4x4x4, of v4, v5e, v5p, v6e or tpu7x; or a product: v5e-256 has 256 "
    "chips, v5p-128 has 128 TensorCores, which are 64 chips; or local: what is attached.",
    required=True,
)
MESH = flags.DEFINE_string("mesh", "", "Devices along axes, as fsdp=8,tensor=2; else config.mesh.")
SEARCH = flags.DEFINE_boolean("search", False, "Tries meshes and grad_accumulation, and ranks.")
MAX_COMPILES = flags.DEFINE_integer(
    "max_compiles",
    4,
    "Programs compiled in a search, or to find what makes a config fit that does not.",
    lower_bound=1,
)
OUTPUT = flags.DEFINE_string("output", None, "JSON file that holds the plan too.")
flags.mark_flag_as_required("config")


def plan(
    config: ConfigDict, topology: topologies.Topology, mesh: str, search: bool, max_compiles: int
) -> tuple[str, dict[str, Any]]:
    """Plans a run.

    Args:
        config: as `configs/base.py` declares it.
        topology: that it is to run on.
        mesh: as in --mesh.
        search: whether to try others too.
        max_compiles: as in --max_compiles.

    Returns:
        The plan for people and for programs.

    Raises:
        UserError: config, mesh or topology cannot be used.
        PlanError: the run does not fit.
    """
    # Here and not above, so that --help does not wait for JAX.
    from megabyte_jax.planning import plan as plans
    from megabyte_jax.planning import report, roofline
    from megabyte_jax.planning import search as searches
    from megabyte_jax.planning import step as steps

    sizes = steps.parse_mesh(mesh, config)
    config = steps.changed(config, {f"mesh.{axis}": size for axis, size in sizes.items()})
    devices = topologies.devices(topology)
    if search:
        ranked = searches.search(config, topology, devices, max_compiles)
        text = "\n\n".join([report.text(ranked[0][1]), report.table(ranked)])
        return text, {"ranked": [{"flags": flags, **made.as_dict()} for flags, made in ranked]}
    step = steps.make(config, topology, devices)
    try:
        made = plans.make(step, roofline.rates(topology, step.model.dtype))
    except steps.TooLargeError as error:
        raise searches.explain(step, error, devices, max_compiles) from None
    return report.text(made), made.as_dict()


def main() -> None:
    """Plans as the flags say."""
    topology = topologies.parse(TOPOLOGY.value)
    topologies.require_compiler(topology)
    if topology.generation != topologies.LOCAL:
        # Before JAX is imported; what the user has set stays, but for the platform.
        given = {**topologies.environment(), **os.environ}
        os.environ.update({**given, "JAX_PLATFORMS": "cpu"})
    if OUTPUT.value:
        cli.require_writable("--output", OUTPUT.value)
    text, fields = plan(CONFIG.value, topology, MESH.value, SEARCH.value, MAX_COMPILES.value)
    print(text)
    if OUTPUT.value:
        contents = json.dumps(fields, indent=2) + "\n"
        cli.write_file("--output", OUTPUT.value, contents.encode())


if __name__ == "__main__":
    cli.run(main)
