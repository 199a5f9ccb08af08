"""The mesh of devices, and the one table that says what of a model lies where on it.

The axes of the mesh: `data` and `fsdp` split the batch, and `fsdp` the parameters and the
optimizer's state too; `sequence` splits the patches; `tensor` splits heads and hidden widths.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from megabyte_jax.errors import UserError
from megabyte_jax.models.config import ByteTransformerConfig, ModelConfig

AXES = ("data", "fsdp", "sequence", "tensor")

# What an axis of an array means -> the axes of the mesh that split it.
RULES: dict[str | None, tuple[str, ...]] = {
    "batch": ("data", "fsdp"),
    "patch": ("sequence",),
    "position": ("sequence", "fsdp"),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "mlp": ("tensor",),
    None: (),
}

# The end of a parameter's path -> what its last axes mean. Axes before them (the layers of a
# stack) and parameters that are not here, all small, are whole on every device.
_PARAMETERS: dict[tuple[str, ...], tuple[str | None, ...]] = {
    ("query", "kernel"): ("embed", "heads"),
    ("key", "kernel"): ("embed", "heads"),
    ("value", "kernel"): ("embed", "heads"),
    ("out", "kernel"): ("heads", "embed"),
    ("up", "kernel"): ("embed", "mlp"),
    ("gate", "kernel"): ("embed", "mlp"),
    ("down", "kernel"): ("mlp", "embed"),
    ("query", "bias"): ("heads",),
    ("key", "bias"): ("heads",),
    ("value", "bias"): ("heads",),
    ("up", "bias"): ("mlp",),
    ("gate", "bias"): ("mlp",),
    ("patch_embedder", "position_embedding"): ("position", None),
    ("byte_embedding",): (None, "embed"),
}


def mesh_shape(sizes: Mapping[str, int], num_devices: int) -> dict[str, int]:
    """Infers the size of -1, if there is one.

    Args:
        sizes: of each of `AXES`, as in `config.mesh`.
        num_devices: that the mesh is to have.

    Returns:
        Size of each axis, in the order of `AXES`.

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    known = math.prod(size for size in sizes.values() if size != -1)
    inferred = list(sizes.values()).count(-1)
    shape = {axis: num_devices // known if sizes[axis] == -1 else sizes[axis] for axis in AXES}
    if inferred > 1 or math.prod(shape.values()) != num_devices:
        given = ",".join(f"{axis}={sizes[axis]}" for axis in AXES)
        fits = dict.fromkeys(AXES, 1) | {"data": num_devices}
        kept = known // max(sizes["data"], 1)
        if num_devices % kept == 0 and not inferred:
            fits = {**sizes, "data": num_devices // kept}
        works = ",".join(f"{axis}={size}" for axis, size in fits.items())
        what = f"{inferred} sizes of -1" if inferred > 1 else f"{known} devices"
        raise UserError(
            f"mesh={given}: asks for {what} where there are {num_devices}; accepted are sizes "
            f"whose product is {num_devices}, one of which may be -1, such as {works}"
        )
    return shape


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any]) -> Mesh:
    """Makes the mesh, laid out so that its last axes join devices that are close.

    Args:
        sizes: of each of `AXES`; -1 for what the others leave.
        devices: all of which the mesh is made of.

    Raises:
        UserError: the sizes do not multiply to the number of devices.
    """
    shape = tuple(mesh_shape(sizes, len(devices)).values())
    array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(array, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def check(mesh: Mapping[str, int], model: ModelConfig, batch_size: int, parts: int = 1) -> None:
    """Checks that a mesh divides a model and its batch.

    Args:
        mesh: size of each axis, none of them -1; `Mesh.shape` is one.
        model: the model.
        batch_size: B, over all hosts.
        parts: equal ones that a batch is computed in, one after another.

    Raises:
        UserError: it does not; the message names both numbers.
    """
    rows = mesh["data"] * mesh["fsdp"]
    if batch_size % (rows * parts):
        step = rows * parts
        below = batch_size // step * step
        fits = " or ".join(map(str, [below, below + step] if below else [step]))
        raise UserError(
            f"train.batch_size={batch_size}: does not divide among mesh data={mesh['data']} x "
            f"fsdp={mesh['fsdp']}"
            + (f" x train.grad_accumulation={parts}" if parts > 1 else "")
            + f"; accepted is a multiple of {step}, such as {fits}"
        )
    if isinstance(model, ByteTransformerConfig):
        stacks = {"transformer": model.transformer}
        groups = -(-model.seq_len // model.window) if model.window else model.seq_len
        split = {"model.seq_len": groups}
    else:
        stacks = {"global_model": model.global_model, "local_model": model.local_model}
        K = model.seq_len // model.patch_size
        split = {"patches of model.seq_len": K}
        if model.group_size:
            split["model.group_size"] = model.group_size
            split["groups of model.group_size"] = K // model.group_size
    for name, size in split.items():
        _require_split(name, size, "sequence", mesh)
    for name, stack in stacks.items():
        _require_split(f"model.{name}.num_kv_heads", stack.kv_heads, "tensor", mesh)
        _require_split(f"model.{name}.mlp_dim", stack.hidden_dim, "tensor", mesh)


def _require_split(name: str, size: int, axis: str, mesh: Mapping[str, int]) -> None:
    if size % mesh[axis]:
        fits = [n for n in range(1, mesh[axis]) if size % n == 0]
        raise UserError(
            f"mesh.{axis}={mesh[axis]}: does not divide {name}={size}; accepted is a divisor of "
            f"it, such as {fits[-1]}"
        )


def _spec(names: Sequence[str | None], shape: Sequence[int], sizes: Mapping[str, int]) -> P:
    """Mesh axes of each axis of an array, without those that do not divide it."""
    entries = []
    for name, size in zip(names, shape, strict=True):
        axes: tuple[str, ...] = ()
        for axis in RULES[name]:
            if size % (math.prod(sizes[a] for a in axes) * sizes[axis]) == 0:
                axes += (axis,)
        entries.append(axes or None)
    return P(*entries)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Says how an array lies on the mesh at hand; without one it is as it was.

    Args:
        x: the array.
        names: what each of its axes means, keys of `RULES`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(names, x.shape, mesh.shape))


def spec(*names: str | None) -> P:
    """What `constrain` says of an array whose axes mean this, where the mesh divides them."""
    return P(*(RULES[name] or None for name in names))


def axis_size(name: str) -> int:
    """Devices along an axis of the mesh at hand; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.shape[name]


def _meaning(path: tuple[Any, ...], ndim: int) -> tuple[str | None, ...]:
    """What the axes of a parameter mean, from its path in nested dicts or in a module."""
    if path and path[-1] == jax.tree_util.GetAttrKey("value"):  # of an nnx.Param
        path = path[:-1]
    names = tuple(getattr(entry, "key", getattr(entry, "name", None)) for entry in path)
    for end, axes in _PARAMETERS.items():
        if names[-len(end) :] == end and len(axes) <= ndim:
            return (None,) * (ndim - len(axes)) + axes
    return (None,) * ndim


def shardings(mesh: Mesh, tree: Any) -> Any:
    """Where parameters lie, and all that is shaped as they are: gradients, optimizer's state.

    Args:
        mesh: the mesh.
        tree: whose leaves have shapes, and paths that end as those of parameters do; other leaves
            are whole on every device.

    Returns:
        The same tree of NamedSharding.
    """

    def place(path: tuple[Any, ...], x: Any) -> NamedSharding:
        return NamedSharding(mesh, _spec(_meaning(path, x.ndim), x.shape, mesh.shape))

    return jax.tree_util.tree_map_with_path(place, tree)


def placed(shapes: Any, places: Any) -> Any:
    """Shapes and types with the places that `shardings` gives, as jax.ShapeDtypeStruct."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How uint8 [B, T] bytes lie: the rows split, and the patches of each."""
    axes = [RULES[name] for name in ("batch", "patch")]
    return NamedSharding(mesh, P(*axes))


def gathered(module: Any, dtype: str) -> Any:
    """Brings the parameters of a layer together along `fsdp`, whole but for `tensor`.

    Done inside the scan over layers, so that no device holds more than a whole layer at a time.

    Args:
        module: the layer, whose parameters the mesh at hand splits as `shardings` says.
        dtype: of its products, to which matrices are cast first: half the traffic in bfloat16.
    """

    def gather(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        names = _meaning(path, x.ndim)
        if "embed" in names:
            x = constrain(x.astype(dtype), *names)
        return constrain(x, *(None if name == "embed" else name for name in names))

    return jax.tree_util.tree_map_with_path(gather, module)


_HOST_MEMORY = "pinned_host"


def on_host(mesh: Mesh, tree: Any) -> Any:
    """The same shardings in the memory of the hosts.

    Raises:
        UserError: the devices of the mesh do not reach it.
    """
    device = mesh.devices.flat[0]
    if device.platform not in ("tpu", "gpu", "cuda"):
        raise UserError(
            f"optimizer.offload=True: accepted is False on {device.platform}, whose devices have "
            "no memory but the host's"
        )
    return jax.tree.map(lambda place: place.with_memory_kind(_HOST_MEMORY), tree)


def on_device(tree: Any) -> Any:
    """The same shardings in the memory of the devices."""
    return jax.tree.map(lambda place: NamedSharding(place.mesh, place.spec), tree)
