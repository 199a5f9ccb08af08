import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from megabyte_jax import sharding
from megabyte_jax.planning import cost, hlo
from megabyte_jax.planning.cost import Collective

L, B, D, F = 6, 24, 32, 64  # layers, rows, widths


def counted(function, *args, **kwargs):
    return cost.of(hlo.parse(jax.jit(function, **kwargs).lower(*args).compile().as_text()))


def gathered_step(weights, x):
    """A gradient step of L layers, recomputed, whose weights lie split over fsdp."""

    def loss(weights, x):
        def layer(x, w):
            w = sharding.constrain(w, None, None)
            return sharding.constrain(jnp.tanh(x @ w), "batch", None), None

        return (jax.lax.scan(jax.checkpoint(layer), x, weights)[0] ** 2).sum()

    return weights - jax.grad(loss)(weights, x)


def test_the_collectives_of_fully_sharded_layers_are_those_of_the_formula():
    mesh = sharding.make_mesh({"data": 1, "fsdp": 8, "sequence": 1, "tensor": 1}, jax.devices())
    split = NamedSharding(mesh, P(None, "fsdp"))
    weights = jax.ShapeDtypeStruct((L, D, D), jnp.float32, sharding=split)
    x = jax.ShapeDtypeStruct((B, D), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    with jax.set_mesh(mesh):
        found = counted(gathered_step, weights, x, out_shardings=split)
    layer = D * D * 4
    everyone = tuple(range(8))
    gathers = {c: n for c, n in found.collectives.items() if c.kind == "all-gather"}
    assert gathers == {Collective("all-gather", layer, everyone): 2 * L}  # forward and backward
    reduced = {
        c: n for c, n in found.collectives.items() if c.kind in ("all-reduce", "reduce-scatter")
    }
    assert sum(c.num_bytes * n for c, n in reduced.items()) == pytest.approx(L * layer, rel=0.01)
    assert found.flops == 4 * L * 2 * (B // 8) * D * D
    assert not found.unknown_loops


@pytest.mark.parametrize(
    ("kind", "sent"),
    [
        ("all-gather", 3 / 4),
        ("reduce-scatter", 3 / 4),
        ("all-reduce", 6 / 4),
        ("all-to-all", 3 / 4),
        ("collective-permute", 1),
    ],
)
def test_what_a_device_sends_is_that_of_a_ring(kind, sent):
    assert Collective(kind, 1000, (0, 1, 2, 3)).sent(8) == 1000 * sent
    assert Collective("all-reduce", 1000, ()).sent(8) == 1000 * 14 / 8


def test_a_permutation_is_between_the_first_two_devices_that_differ():
    text = """\
HloModule m
ENTRY %main (a: f32[5,7]) -> f32[5,7] {
  %a = f32[5,7]{1,0} parameter(0)
  %p = (f32[5,7]{1,0}, f32[5,7]{1,0}, u32[]) collective-permute-start(%a), channel_id=1, \
source_target_pairs={{0,0},{1,3},{3,1}}
  ROOT %d = f32[5,7]{1,0} collective-permute-done(%p)
}
"""
    permuted = Collective("collective-permute", 5 * 7 * 4, (1, 3))
    assert cost.of(hlo.parse(text)).collectives == {permuted: 1}


# An all-gather that TPU begins in one fusion, carries on in another beside what an inner loop
# does, and ends in a third; and a reduce-scatter: there an all-reduce of which a part is kept.
ASYNCHRONOUS = """\
HloModule m
%begin (p: bf16[4,8]) -> (bf16[4,8], bf16[16,8]) {
  %p = bf16[4,8]{1,0} parameter(0)
  %g = bf16[16,8]{1,0} all-gather(%p), channel_id=5, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %s = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) custom-call(%g), \
custom_call_target="AsyncCollectiveStart"
}
%on (p.1: bf16[4,8], p.2: bf16[16,8]) -> (bf16[4,8], bf16[16,8]) {
  %p.1 = bf16[4,8]{1,0} parameter(0)
  %p.2 = bf16[16,8]{1,0} parameter(1)
  %g.1 = bf16[16,8]{1,0} all-gather(%p.1), channel_id=5, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %t = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) tuple(%p.1, %g.1)
}
%end (p.4: bf16[4,8]) -> bf16[16,8] {
  %p.4 = bf16[4,8]{1,0} parameter(0)
  %g.2 = bf16[16,8]{1,0} all-gather(%p.4), channel_id=5, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %s.2 = bf16[16,8]{1,0} custom-call(%g.2), custom_call_target="AsyncCollectiveDone"
}
%all-reduce-scatter.1 (p.3: f32[16,8]) -> f32[4,8] {
  %p.3 = f32[16,8]{1,0} parameter(0)
  %r = f32[16,8]{1,0} all-reduce(%p.3), channel_id=7, replica_groups=[2,4]<=[8], to_apply=%add
  %zero = s32[] constant(0)
  ROOT %d = f32[4,8]{1,0} dynamic-slice(%r, %zero, %zero), dynamic_slice_sizes={4,8}
}
%body (s: (bf16[4,8], bf16[16,8])) -> (bf16[4,8], bf16[16,8]) {
  %s.1 = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) parameter(0)
  %x = bf16[4,8]{1,0} get-tuple-element(%s.1), index=0
  %y = bf16[16,8]{1,0} get-tuple-element(%s.1), index=1
  ROOT %f.1 = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) fusion(%x, %y), kind=kCustom, calls=%on
}
%condition (s.3: (bf16[4,8], bf16[16,8])) -> pred[] {
  ROOT %yes = pred[] constant(true)
}
ENTRY %main (a: bf16[4,8], b: f32[16,8]) -> f32[4,8] {
  %a = bf16[4,8]{1,0} parameter(0)
  %b = f32[16,8]{1,0} parameter(1)
  %f = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) fusion(%a), kind=kCustom, calls=%begin
  %w = (bf16[4,8]{1,0}, bf16[16,8]{1,0}) while(%f), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"9"}}
  %z = bf16[4,8]{1,0} get-tuple-element(%w), index=0
  %e = bf16[16,8]{1,0} fusion(%z), kind=kCustom, calls=%end
  ROOT %f.2 = f32[4,8]{1,0} fusion(%b), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_a_collective_that_goes_on_beside_an_inner_loop_is_one():
    group = (0, 1, 2, 3)
    assert cost.of(hlo.parse(ASYNCHRONOUS)).collectives == {
        Collective("all-gather", 16 * 8 * 2, group): 1,
        Collective("reduce-scatter", 16 * 8 * 4, group): 1,
    }


TRAFFIC = """\
HloModule m
%cut (p: f32[9,128], i: s32[]) -> f32[128] {
  %p = f32[9,128]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %s = f32[1,128]{1,0} dynamic-slice(%p, %i, %i), dynamic_slice_sizes={1,128}
  ROOT %b = f32[128]{0} bitcast(%s)
}
%put (q: f32[9,128], u: f32[1,128], j: s32[]) -> f32[9,128] {
  %q = f32[9,128]{1,0} parameter(0)
  %u = f32[1,128]{1,0} parameter(1)
  %j = s32[] parameter(2)
  ROOT %d = f32[9,128]{1,0} dynamic-update-slice(%q, %u, %j, %j)
}
ENTRY %main (a: f32[9,128], n: s32[], w: f32[1,128]) -> f32[9,128] {
  %a = f32[9,128]{1,0} parameter(0)
  %n = s32[] parameter(1)
  %w = f32[1,128]{1,0} parameter(2)
  %row = f32[128]{0} fusion(%a, %n), kind=kLoop, calls=%cut
  %near = f32[128]{0:T(128)S(1)} add(%row, %row), backend_config={"estimated_cycles":"70"}
  %far = f32[128]{0:T(128)S(5)} negate(%near)
  ROOT %all = f32[9,128]{1,0} fusion(%a, %w, %n), kind=kLoop, calls=%put
}
"""


def test_memory_traffic_is_that_of_the_parts_that_are_touched():
    found = cost.of(hlo.parse(TRAFFIC))
    row, number = 128 * 4, 4
    cut, added, put = 2 * row + number, 2 * row, 2 * row + number
    assert found.memory_bytes == cut + added + put  # what lies on the chip costs nothing
    assert found.host_bytes == row
    assert found.cycles == 70


def test_of_a_branch_the_dearer_side_counts():
    def either(p, x):
        return jax.lax.cond(p, lambda x: x @ x, lambda x: x @ x @ x, x)

    arguments = jax.ShapeDtypeStruct((), bool), jax.ShapeDtypeStruct((D, D), jnp.float32)
    assert counted(either, *arguments).flops == 2 * 2 * D**3


def test_a_loop_without_an_end_that_is_known_counts_once_and_is_named():
    def halve(x):
        return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x @ x / D, x)

    found = counted(halve, jax.ShapeDtypeStruct((D, D), jnp.float32))
    assert found.flops == 2 * D**3 and len(found.unknown_loops) == 1
