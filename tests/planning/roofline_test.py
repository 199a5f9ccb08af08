import dataclasses

import jax
import numpy as np
import pytest

from megabyte_jax import flops
from megabyte_jax.models import functional
from megabyte_jax.models.config import ByteTransformerConfig, MegabyteConfig, TransformerConfig
from megabyte_jax.planning import cost, hlo, roofline
from megabyte_jax.planning.cost import Collective, Cost
from megabyte_jax.planning.roofline import Rates, Times
from megabyte_jax.planning.topology import parse

STACK = TransformerConfig(dim=512, num_layers=3, num_heads=4)
MODEL = MegabyteConfig(
    seq_len=512,
    patch_size=8,
    global_model=STACK,
    local_model=dataclasses.replace(STACK, dim=384),
    dtype="float32",
)
SWIGLU = dict(num_kv_heads=2, activation="swiglu", bias=False, norm="rmsnorm")


def remat(model, mode, **switches):
    stages = {
        field.name: dataclasses.replace(getattr(model, field.name), remat=mode, **switches)
        for field in dataclasses.fields(model)
        if isinstance(getattr(model, field.name), TransformerConfig)
    }
    return dataclasses.replace(model, **stages)


CONFIGS = {
    "none": MODEL,
    "full": remat(MODEL, "full"),
    "dots": remat(MODEL, "dots"),
    "full, swiglu": remat(MODEL, "full", **SWIGLU),
    "groups": dataclasses.replace(MODEL, group_size=16),
    "groups, full": dataclasses.replace(remat(MODEL, "full"), group_size=16),
    "baseline": remat(
        ByteTransformerConfig(seq_len=512, transformer=STACK, dtype="float32"), "full"
    ),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_what_is_computed_again_is_what_the_compiled_step_computes(config):
    params = jax.eval_shape(lambda: functional.init_params(config, jax.random.key(0)))
    x = jax.ShapeDtypeStruct((1, config.seq_len), np.uint8)
    loss = jax.grad(lambda *args: functional.nll(config, *args).mean())
    program = hlo.parse(jax.jit(loss).lower(params, x).compile().as_text())
    found = cost.of(program).flops / config.seq_len
    assert abs(roofline.executed_flops_per_byte(config) / found - 1) < 0.03


def test_without_rematerialisation_it_is_the_formula_of_training():
    assert roofline.executed_flops_per_byte(MODEL) == flops.train_flops_per_byte(MODEL)


def line(*places):
    return [(x, y, 0) for x, y in places]


def test_a_group_sends_over_the_links_that_its_chips_all_have():
    pod, part = parse("v5e:16x16"), parse("v5e:4x4")
    row = line(*((i, 0) for i in range(16)))
    assert roofline.links(row, pod) == 2  # a ring
    assert roofline.links(row[:4], pod) == 1  # a piece of it
    assert roofline.links(row[:4], part) == 1  # a line
    assert roofline.links(line(*((i, j) for i in range(4) for j in range(4))), part) == 2
    assert roofline.links(line(*((i, j) for i in range(16) for j in range(16))), pod) == 4
    assert roofline.links(line((0, 0), (0, 0)), parse("tpu7x:2x2x1")) == 6  # in one chip


class Device:
    def __init__(self, *coords):
        self.coords = coords


class Mesh:
    devices = np.array([[Device(i, j, 0) for j in range(4)] for i in range(4)])


def test_the_time_of_a_collective_is_its_bytes_over_its_links():
    topology = parse("v5e:4x4")

    def time(kind, group):
        return roofline.seconds(Collective(kind, 1600, group), Mesh(), topology, 10)

    assert time("all-gather", (0, 1, 2, 3)) == 1600 * 3 / 4 / 10
    assert time("all-reduce", (0, 4, 8, 12)) == 2 * 1600 * 3 / 4 / 10
    assert time("reduce-scatter", ()) == 1600 * 15 / 16 / 20
    assert time("collective-permute", (0, 1)) == 1600 / 10


def test_the_longest_of_the_three_bounds_a_step():
    counted = Cost(flops=600, memory_bytes=100)
    counted.collectives[Collective("all-gather", 160, (0, 1, 2, 3))] = 5
    times = roofline.times(counted, Mesh(), parse("v5e:4x4"), Rates(100, 20, 10, "made up"))
    assert times == Times(6, 5, 5 * 12)
    assert (times.seconds, times.apart, times.bound) == (60, 71, "interconnect")
    alone = roofline.times(counted, Mesh(), parse("local"), Rates(100, 20, None, "made up"))
    assert (alone.seconds, alone.interconnect, alone.bound) == (6, None, "compute")


def test_rates_are_those_of_a_device():
    v7 = roofline.rates(parse("tpu7x-8"), "bfloat16")
    assert v7.flops == 2307e12 / 2 and v7.memory == 7380e9 / 2
    measured = roofline.rates(parse("local"), "float32")
    assert measured.source == "measured" and measured.link is None
    assert 1e6 < measured.flops < 1e15 and 1e6 < measured.memory < 1e13
