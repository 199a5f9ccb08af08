"""Slices of TPUs by name, what a chip of each generation can do, and their devices to compile for.

JAX is imported inside functions alone: `environment` must be set before.
"""

from __future__ import annotations

import difflib
import importlib.util
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megabyte_jax.errors import UserError

GIB = 2**30


@dataclass(frozen=True)
class Chip:
    """What the datasheet says of a chip (cloud.google.com/tpu/docs, November 2026).

    Attributes:
        kind: `device_kind` of its devices in JAX.
        flops: bfloat16 FLOP per second.
        hbm: bytes of memory that a program may use, as the compiler states them when one does not
            fit; the datasheet's figure is a little larger.
        hbm_bandwidth: bytes per second.
        link_bandwidth: bytes per second over one link to a neighbour, in one direction: the
            datasheet's "bidirectional bandwidth per chip" by two directions and all its links.
        axes: of the torus that the chips form.
        max_chips: of one slice.
        clock: cycles per second, from the FLOPs: a TensorCore of these has 4 arrays of 128 x 128
            that multiply and add once per cycle; None for those of which that is not documented.
        devices: that JAX makes of a chip. Those of v4 and v5p join their two TensorCores in one.
        counts_cores: whether a product's name counts TensorCores, two to a chip, and not chips.
    """

    kind: str
    flops: float
    hbm: float
    hbm_bandwidth: float
    link_bandwidth: float
    axes: int
    max_chips: int
    clock: float | None = None
    devices: int = 1
    counts_cores: bool = False


CHIPS = {
    # v4: 50 GB/s on each of six links is of the paper (Jouppi et al., 2023); the pages give none.
    "v4": Chip("TPU v4", 275e12, 30.75 * GIB, 1.2e12, 50e9, 3, 4096, 1.05e9, counts_cores=True),
    "v5e": Chip("TPU v5 lite", 197e12, 15.75 * GIB, 819e9, 50e9, 2, 256, 1.5e9),
    "v5p": Chip("TPU v5", 459e12, 95.74 * GIB, 2765e9, 100e9, 3, 6144, 1.75e9, counts_cores=True),
    "v6e": Chip("TPU v6 lite", 918e12, 31.25 * GIB, 1640e9, 100e9, 2, 256),
    "tpu7x": Chip(
        "TPU7x", 2307e12, 189.5 * GIB, 7380e9, 100e9, 3, 9216, devices=2, counts_cores=True
    ),
}
_ALIASES = {"v5litepod": "v5e", "v7x": "tpu7x", "7x": "tpu7x"}
LOCAL = "local"


@dataclass(frozen=True)
class Topology:
    """A slice of TPUs, or the devices of this machine if `generation` is `LOCAL`.

    Attributes:
        generation: a key of `CHIPS`, or `LOCAL`.
        shape: chips along each axis of the torus; empty for `LOCAL`.
    """

    generation: str
    shape: tuple[int, ...] = ()

    @property
    def chip(self) -> Chip:
        """The chip of a slice of TPUs."""
        return CHIPS[self.generation]

    @property
    def chips(self) -> int:
        """Number of chips."""
        return math.prod(self.shape)

    @property
    def name(self) -> str:
        """As libtpu spells it: v5p:4x4x4."""
        if self.generation == LOCAL:
            return LOCAL
        return f"{self.generation}:{'x'.join(map(str, self.shape))}"

    @property
    def product(self) -> str:
        """As Google names it: v5p-128 counts TensorCores, v5e-256 chips."""
        return f"{self.generation}-{self.chips * (1 + self.chip.counts_cores)}"

    def wraps(self) -> tuple[bool, ...]:
        """Whether each axis is a ring: of v5e and v6e one of 16, else in slices of whole cubes."""
        if self.chip.axes == 2:
            return tuple(size == 16 for size in self.shape)
        cubes = all(size % 4 == 0 for size in self.shape)
        return (cubes,) * 3


def parse(text: str) -> Topology:
    """Reads --topology.

    Args:
        text: GENERATION:AxB or AxBxC in chips, a product as v5e-256 or v5p-128, or `local`.

    Raises:
        UserError: there is no such slice; names the nearest that there is.
    """
    spelled = text.strip().lower()
    if spelled == LOCAL:
        return Topology(LOCAL)
    match = re.fullmatch(r"([a-z0-9]+?)(?::(\d+(?:x\d+)*)|-(\d+))", spelled)
    generation = _ALIASES.get(match[1], match[1]) if match else spelled.split(":")[0].split("-")[0]
    if generation not in CHIPS:
        (near,) = difflib.get_close_matches(generation, [*CHIPS, *_ALIASES], 1, 0)
        size = match[0][len(match[1]) :] if match else ""
        nearest = _nearest(_ALIASES.get(near, near), size)
        raise UserError(
            f"--topology={text}: unknown; accepted are local or a slice of {', '.join(CHIPS)}, "
            f"such as {nearest.name}"
        )
    size = match[0][len(match[1]) :] if match else ""
    nearest = _nearest(generation, size)
    given = sorted(map(int, match[2].split("x"))) if match and match[2] else []
    ones = [1] * (len(nearest.shape) - len(given))
    named = match and match[3] and nearest.product.split("-")[1] == match[3]
    if named or (given and sorted([*ones, *given]) == sorted(nearest.shape)):
        return nearest
    if CHIPS[generation].axes == 2:
        rule = ", ".join("x".join(map(str, shape)) for shape in _shapes(generation))
    else:
        rule = "2x2x1, 2x2x2, 2x2x4, 2x4x4 or three multiples of 4"
        rule = f"1x1x1, {rule}" if generation == "tpu7x" else rule
    cores = ", which counts its TensorCores" if CHIPS[generation].counts_cores else ""
    raise UserError(
        f"--topology={text}: no slice of {generation}; accepted are {rule}, such as "
        f"{nearest.name} = {nearest.product}{cores}"
    )


def slices(generation: str) -> list[Topology]:
    """All slices of a generation; of those of one size the most compact, its product, first."""
    return [Topology(generation, shape) for shape in _shapes(generation)]


def _shapes(generation: str) -> Iterator[tuple[int, ...]]:
    chip = CHIPS[generation]
    if chip.axes == 2:
        yield (1, 1)
        for side in (2, 4, 8, 16):
            yield (side, side)
            if side < 16:
                yield (side, 2 * side)
        return
    if generation == "tpu7x":
        yield (1, 1, 1)
    yield from ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
    cubes = range(1, 17)
    grids = ((a, b, c) for a in cubes for b in cubes if b >= a for c in cubes if c >= b)
    # The most compact of a size first.
    for a, b, c in sorted(grids, key=sum):
        if 64 * a * b * c <= chip.max_chips:
            yield (4 * a, 4 * b, 4 * c)


def _nearest(generation: str, size: str) -> Topology:
    """The slice whose number of chips, and then whose shape, is nearest to :AxB or -N."""
    numbers = [min(int(n), 10**6) for n in re.findall(r"\d+", size)] or [4]
    cores = 2 if size.startswith("-") and CHIPS[generation].counts_cores else 1
    chips = math.prod(numbers) / cores

    def distance(shape: tuple[int, ...]) -> tuple[float, int]:
        padded = sorted([1] * (len(shape) - len(numbers)) + numbers)
        ratio = abs(math.log2(math.prod(shape) / max(chips, 0.5)))
        same = size.startswith(":") and padded == sorted(shape)
        return round(ratio, 6), 0 if same else 1

    return Topology(generation, min(_shapes(generation), key=distance))


def environment() -> dict[str, str]:
    """Variables with which libtpu compiles where there is no TPU, or beside a run that has it."""
    return {
        "JAX_PLATFORMS": "cpu",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # else a second plan finds a lock file
        # Without these it says on every start that it finds no TPU.
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_STDERR_LOG_LEVEL": "3",
    }


def require_compiler(topology: Topology) -> None:
    """Checks that programs can be compiled for a slice.

    Raises:
        UserError: libtpu is missing.
    """
    if topology.generation != LOCAL and importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"--topology={topology.name}: libtpu, the TPU compiler, is missing; accepted is local, "
            "or any after pip install 'megabyte-jax[tpu]'"
        )


def devices(topology: Topology) -> list[Any]:
    """The devices of a slice, which programs can be compiled for and not run on; or the local ones.

    Raises:
        UserError: libtpu is missing, or cannot be loaded.
    """
    require_compiler(topology)
    import jax
    from jax.experimental import topologies

    if topology.generation == LOCAL:
        return list(jax.devices())

    options: dict[str, Any] = {}
    if topology.generation == "v4":  # both TensorCores as one device, as on a TPU VM
        options["chip_config_name"] = "megacore"
    if any(size % 2 for size in topology.shape[:2]):  # less than a host of 2 x 2
        options["chips_per_host_bounds"] = (1, 1, 1)
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **options
        )
    except jax.errors.JaxRuntimeError as error:
        (reason, *_) = str(error).splitlines()
        raise UserError(
            f"--topology={topology.name}: libtpu cannot be loaded ({reason}); accepted is one "
            "process at a time, or ALLOW_MULTIPLE_LIBTPU_LOAD=1 in the environment"
        ) from None
    return list(described.devices)
