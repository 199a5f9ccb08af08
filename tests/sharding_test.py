"""On eight simulated devices, a model and its update are what they are on one."""

import dataclasses
import functools
import itertools
import math
import re

import jax
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from configs import base
from megabyte_jax import sharding
from megabyte_jax.errors import UserError
from megabyte_jax.models import functional
from megabyte_jax.models.config import ByteTransformerConfig, MegabyteConfig, TransformerConfig
from megabyte_jax.optimizer import make_optimizer
from megabyte_jax.planning import hlo
from megabyte_jax.training import abstract_state, init_state, make_train_step

B, T, P, D, V = 8, 128, 4, 64, 256
K, H, d = T // P, 8, D // 8
# With few leaves, as compiling is all that takes time here, and with no kinks, at which a rounding
# becomes a difference.
BLOCK = dict(norm="rmsnorm", activation="gelu", bias=False, rope=True)
STACK = TransformerConfig(dim=D, num_layers=2, num_heads=H, **BLOCK)
MESHES = [shape for shape in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(shape) == 8]
ONE = (1, 1, 1, 1)


def megabyte(**changes):
    fields = dict(seq_len=T, patch_size=P, global_model=STACK, local_model=STACK)
    return MegabyteConfig(**{**fields, "init": "scaled", "dtype": "float32", **changes})


def mesh_of(shape):
    sizes = dict(zip(sharding.AXES, shape, strict=True))
    return sharding.make_mesh(sizes, jax.devices()[: math.prod(shape)])


def rate(step):
    return 1e-3


@functools.cache
def first_state(model):
    optimizer = make_optimizer(base.get_config().optimizer, rate)
    return jax.tree.map(np.asarray, init_state(model, optimizer, 0))


def losses(model, shape, parts=1):
    """Loss and gradient norm of five updates, [5, 2], and the text of the compiled program."""
    mesh, optimizer = mesh_of(shape), make_optimizer(base.get_config().optimizer, rate)
    sharding.check(mesh.shape, model, B, parts)
    batches = np.random.default_rng(0).integers(0, V, (5, B, model.seq_len), np.uint8)
    with jax.set_mesh(mesh):
        like = abstract_state(model, optimizer, mesh)
        state = jax.tree.map(lambda x, y: jax.device_put(x, y.sharding), first_state(model), like)
        place = sharding.batch_sharding(mesh)
        update = make_train_step(model, optimizer, rate, 0, parts, like)
        update = update.lower(state, jax.device_put(batches[0], place)).compile()
        results = []
        for batch in batches:
            state, metrics = update(state, jax.device_put(batch, place))
            results.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return np.array(results), update.as_text()


@functools.cache
def on_one_device(model):
    return losses(model, ONE)[0]


def collectives(program):
    """Kind and largest array, in bytes on a device, of each collective operation."""
    kinds = "all-gather all-reduce all-to-all collective-permute reduce-scatter".split()
    return [
        (x.opcode, max(array.num_bytes for array in x.results))
        for computation in hlo.parse(program).computations.values()
        for x in computation.instructions.values()
        if x.opcode in kinds
    ]


@pytest.mark.parametrize("cross_patch", [-1, 0])
@pytest.mark.parametrize("shape", MESHES, ids=str)
def test_on_every_mesh_five_updates_are_those_of_one_device(shape, cross_patch):
    model = megabyte(cross_patch=cross_patch)
    got, program = losses(model, shape)
    np.testing.assert_allclose(got, on_one_device(model), rtol=1e-5)
    data, fsdp, sequence, tensor = shape
    rows = B // (data * fsdp)
    # What the design brings together: a layer's matrix, a table, keys or values of all patches.
    matrix, table, keys = 4 * D * 4 * D // tensor, 4 * V * D, 4 * rows * K * D // tensor
    # What it sums: gradients of those, and the outputs that `tensor` splits.
    outputs = 4 * rows * T // sequence * D if tensor > 1 else 0
    allowed = {
        "all-gather": max(matrix * (fsdp > 1), table * (fsdp > 1), keys * (sequence > 1)),
        "all-reduce": max(matrix, table, 4 * T // sequence * D // P, keys, outputs),
        # The patch before, and the keys or values of the r bytes before.
        "collective-permute": max(4 * rows * D, 4 * rows * K // sequence * model.previous * D)
        * (sequence > 1),
    }
    for kind, size in collectives(program):
        assert size <= allowed.get(kind, 0), (kind, size)


def test_without_cross_patch_the_local_model_of_a_split_sequence_sends_nothing():
    program = losses(megabyte(cross_patch=0), (1, 1, 8, 1))[1]
    sent = [(kind, size) for kind, size in collectives(program) if kind != "all-reduce"]
    assert {kind for kind, _ in sent} == {"all-gather", "collective-permute"}
    for kind, size in sent:  # keys and values of the global model, and the patch before
        assert size == 4 * B * D * (K if kind == "all-gather" else 1)


GROUPS = megabyte(seq_len=256, group_size=8)
DROPOUT = dataclasses.replace(GROUPS, local_model=dataclasses.replace(STACK, dropout=0.1))
CONVOLUTIONS = megabyte(conv_kernels=(3, 7))
BASELINE = ByteTransformerConfig(seq_len=64, transformer=STACK, init="scaled", dtype="float32")


@pytest.mark.parametrize(
    "model, whole, shape, parts",
    [
        (GROUPS, dataclasses.replace(GROUPS, group_size=0), (1, 1, 8, 1), 1),
        (DROPOUT, DROPOUT, (1, 2, 2, 2), 1),
        (CONVOLUTIONS, CONVOLUTIONS, (1, 1, 8, 1), 1),
        (megabyte(), megabyte(), (2, 1, 2, 2), 4),
        (BASELINE, BASELINE, (1, 2, 2, 2), 1),
    ],
    ids=["groups", "dropout", "convolutions", "parts", "baseline"],
)
def test_so_are_the_updates_of_other_models(model, whole, shape, parts):
    got, _ = losses(model, shape, parts)
    np.testing.assert_allclose(got, on_one_device(whole), rtol=1e-5)


def test_every_matrix_and_its_moments_are_made_in_parts():
    mesh, optimizer = mesh_of((1, 4, 1, 2)), make_optimizer(base.get_config().optimizer, rate)
    state = init_state(megabyte(), optimizer, 0, abstract_state(megabyte(), optimizer, mesh))
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        if jax.tree_util.DictKey("kernel") in path and "blocks" in str(path):
            assert x.addressable_shards[0].data.size == x.size // 8, path
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(state))
    assert held < 1.2 * sum(x.nbytes for x in jax.tree.leaves(state)) / 8


def test_the_initial_weights_do_not_depend_on_the_mesh():
    optimizer = make_optimizer(base.get_config().optimizer, rate)
    like = abstract_state(megabyte(), optimizer, mesh_of((2, 2, 1, 2)))
    split = init_state(megabyte(), optimizer, 3, like)
    whole = functional.init_params(megabyte(), jax.random.key(3))
    jax.tree.map(np.testing.assert_array_equal, split.params, whole)


SIZES = st.integers(1, 64) | st.sampled_from([-1, 1, 2, 4, 8])


@given(st.tuples(SIZES, SIZES, SIZES, SIZES), st.integers(1, 512))
@example((2, 2, 1, 1), 8)
@example((-1, -1, 1, 1), 8)
def test_a_mesh_has_all_devices_or_the_error_names_one_that_has(sizes, devices):
    asked = dict(zip(sharding.AXES, sizes, strict=True))
    try:
        shape = sharding.mesh_shape(asked, devices)
    except UserError as error:
        assert "\n" not in str(error) and str(devices) in str(error)
        works = {
            name: int(size)
            for name, size in re.findall(r"(\w+)=(\d+)", str(error).split("as ")[-1])
        }
        assert math.prod(sharding.mesh_shape(works, devices).values()) == devices
    else:
        assert list(shape) == list(sharding.AXES) and math.prod(shape.values()) == devices
        assert all(size in (-1, shape[axis]) for axis, size in asked.items())


@pytest.mark.parametrize(
    "shape, changes, batch_size, parts, named",
    [
        ((2, 2, 1, 1), {}, 6, 1, ["train.batch_size=6", "data=2", "fsdp=2", "4 or 8"]),
        ((1, 2, 1, 1), {}, 2, 2, ["train.batch_size=2", "grad_accumulation=2", "such as 4"]),
        ((1, 1, 5, 1), {}, 8, 1, ["mesh.sequence=5", "=32", "such as 4"]),
        ((1, 1, 1, 3), {}, 8, 1, ["mesh.tensor=3", "num_kv_heads=8", "such as 2"]),
        ((1, 1, 8, 1), {"group_size": 4}, 8, 1, ["mesh.sequence=8", "group_size=4", "as 4"]),
        ((1, 1, 8, 1), {"group_size": 8}, 8, 1, ["mesh.sequence=8", "groups", "=4", "as 4"]),
    ],
)
def test_what_a_mesh_does_not_divide_is_named_with_what_it_does(
    shape, changes, batch_size, parts, named
):
    sizes = dict(zip(sharding.AXES, shape, strict=True))
    with pytest.raises(UserError) as caught:
        sharding.check(sizes, megabyte(**changes), batch_size, parts)
    assert all(part in str(caught.value) for part in named), caught.value


def test_a_cpu_has_no_memory_beside_the_hosts_to_offload_to():
    optimizer = make_optimizer(base.get_config().optimizer, rate)
    with pytest.raises(UserError, match="optimizer.offload=True.*cpu"):
        abstract_state(megabyte(), optimizer, mesh_of(ONE), offload=True)
