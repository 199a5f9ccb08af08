import math

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabyte_jax import run_config, training
from megabyte_jax.errors import PlanError, UserError
from megabyte_jax.optimizer import make_optimizer, make_schedule
from megabyte_jax.planning import plan, search
from megabyte_jax.planning import step as steps
from megabyte_jax.planning.estimate import estimate
from megabyte_jax.planning.roofline import Rates
from megabyte_jax.planning.topology import parse
from tests.planning.step_test import CONFIG, LOCAL, step_of

RATES = Rates(1e9, 1e8, 1e6, "made up")


@given(st.integers(1, 400))
def test_divisors_are_all_that_divide(n):
    assert search.divisors(n) == [i for i in range(1, n + 1) if n % i == 0]


@pytest.mark.parametrize(("devices", "count"), [(1, 1), (2, 4), (6, 16), (8, 20), (256, 165)])
def test_every_mesh_is_tried_once(devices, count):
    meshes = [tuple(mesh.values()) for mesh in search.meshes(devices)]
    assert len(set(meshes)) == len(meshes) == count
    assert all(math.prod(mesh) == devices for mesh in meshes)


def test_candidates_divide_model_and_batch():
    found = search.candidates(CONFIG, run_config.validate(CONFIG), 8)
    assert {"mesh.data": 4, "mesh.fsdp": 1, "mesh.sequence": 2, "mesh.tensor": 1} | {
        "train.grad_accumulation": 2
    } in found
    for changes in found:
        rows = changes["mesh.data"] * changes["mesh.fsdp"]
        assert 8 % (rows * changes["train.grad_accumulation"]) == 0
        assert changes["mesh.tensor"] == 1  # 2 heads and 3


def estimated(config, sizes):
    model = run_config.validate(config)
    optimizer = make_optimizer(config.optimizer, make_schedule(config.optimizer, config.train, 24))
    shapes = jax.eval_shape(lambda: training.init_state(model, optimizer, 0))
    mesh = dict(zip(("data", "fsdp", "sequence", "tensor"), sizes, strict=True))
    return estimate(config, model, shapes, mesh, RATES)


def test_the_state_by_formula_is_that_of_the_step():
    held = steps.stored(step_of("data=2,fsdp=4"))
    found = estimated(CONFIG, (2, 4, 1, 1)).state_bytes
    assert found == held.parameters + held.optimizer + 4  # and the count of updates


def test_by_formula_parts_save_memory_and_fsdp_costs_traffic():
    whole, split = (estimated(CONFIG, sizes) for sizes in ((8, 1, 1, 1), (1, 8, 1, 1)))
    assert split.state_bytes < whole.state_bytes
    parts = steps.changed(CONFIG, {"train.grad_accumulation": 4})
    one, four = (estimated(config, (1, 2, 1, 1)) for config in (CONFIG, parts))
    assert four.memory_bytes < one.memory_bytes and four.seconds > one.seconds


class Compiler:
    """Takes the place of the compiler, and needs what a function of the step says."""

    def __init__(self, monkeypatch, memory):
        self.memory, self.steps = memory, []
        monkeypatch.setattr(steps, "compiled", self.compiled)
        monkeypatch.setattr(steps, "memory_used", lambda program: program)

    def compiled(self, step, label):
        self.steps.append(step)
        if self.memory(step) > 100:
            raise steps.TooLargeError(self.memory(step), 100)
        return self.memory(step), 0.0


def explained(step, memory, monkeypatch, tries=9, limit=10**9):
    compiler = Compiler(monkeypatch, memory)
    error = steps.TooLargeError(2 * limit, limit)
    return str(search.explain(step, error, jax.devices(), tries)), compiler


def test_what_does_not_fit_is_told_with_what_makes_it_fit(monkeypatch):
    step = step_of("data=2,fsdp=1,sequence=2,tensor=2", **{"model.local_model.num_heads": 2})
    text, compiler = explained(
        step, lambda s: 50 if s.config.train.grad_accumulation == 4 else 200, monkeypatch
    )
    assert "1.86 of 0.93 GiB per device, 0.93 GiB too much, most of it activations" in text
    flags = text.partition("; fits with ")[2]
    assert "--config.mesh.fsdp=2" in flags and "--config.train.grad_accumulation=4" in flags
    assert "compiled)" in flags and "\n" not in text
    assert len(compiler.steps) == 4  # fsdp, remat, 2 and 4 parts; nothing divides 3 groups in two


def test_what_nothing_makes_fit_needs_more_devices(monkeypatch):
    text, compiler = explained(step_of(""), lambda s: 200, monkeypatch, tries=2)
    assert "2 compiled" in text and "2 times the devices" in text and "--search" in text
    assert len(compiler.steps) == 2


def test_a_state_that_is_too_large_is_named_and_not_compiled(monkeypatch):
    text, compiler = explained(step_of(""), lambda s: 50, monkeypatch, limit=100)
    assert "most of it parameters and optimizer's state" in text
    assert not compiler.steps


def test_the_next_larger_slice_has_enough_chips():
    assert search.larger(parse("v5e:4x4"), 2.5) == "v5e:8x8"
    assert search.larger(parse("v5p:4x4x4"), 1.5) == "v5p:4x4x8"
    assert "more than 256 chips" in search.larger(parse("v5e-256"), 1.1)


def test_a_search_ranks_what_fits_and_tells_its_flags(monkeypatch):
    class Made:
        def __init__(self, step):
            self.step, self.times = step, self
            self.apart = step.mesh.shape["fsdp"]

    def make(step, rates, label):
        if step.mesh.shape["fsdp"] == 1:
            raise steps.TooLargeError(2, 1)
        return Made(step)

    monkeypatch.setattr(plan, "make", make)
    ranked = search.search(CONFIG, LOCAL, jax.devices(), 50)
    speeds = [made.apart for _, made in ranked]
    assert speeds == sorted(speeds) and 1 not in speeds
    flags, made = ranked[0]
    assert f"--config.mesh.sequence={made.step.mesh.shape['sequence']}" in flags
    monkeypatch.setattr(steps, "available", lambda topology: 1)
    with pytest.raises(PlanError, match="none of"):
        search.search(CONFIG, LOCAL, jax.devices(), 50)


def test_a_batch_that_nothing_divides_is_a_mistake():
    config = steps.changed(CONFIG, {"train.batch_size": 7, "model.seq_len": 28})
    with pytest.raises(UserError, match="train.batch_size=7: no mesh of 8 devices"):
        search.search(config, LOCAL, jax.devices(), 1)
