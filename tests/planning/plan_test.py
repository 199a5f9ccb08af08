import json
import math

import jax
import pytest

from megabyte_jax import flops
from megabyte_jax.planning import plan, report, roofline
from megabyte_jax.planning import step as steps
from tests import runs
from tests.planning import step_test

RATES = roofline.Rates(1e9, 1e8, 1e6, "made up")
MESH = {"data": 1, "fsdp": 4, "sequence": 2, "tensor": 1}


@pytest.fixture(scope="module")
def step():
    return step_test.step_of("data=1,fsdp=4,sequence=2")


@pytest.fixture(scope="module")
def planned(step):
    return plan.make(step, RATES)


def test_parameters_and_optimizer_are_what_the_compiler_takes(planned):
    kinds = dict(planned.memory_bytes)
    held = kinds["parameters"] + kinds["optimizer's state"] + kinds["batch"]
    assert held == planned.stored_bytes  # no tiles on CPU
    assert held / planned.argument_bytes == pytest.approx(1, abs=0.03)
    available, total = kinds.pop("available"), kinds.pop("total")
    assert sum(kinds.values()) == pytest.approx(total, abs=64)  # and the count of updates
    assert 0 < total < available
    assert kinds["optimizer's state"] > kinds["parameters"] > kinds["batch"] == runs.T


def test_flops_and_budget_are_those_of_the_formulas(planned, step):
    per_byte = planned.flops_per_byte
    assert per_byte["formula"] == flops.train_flops_per_byte(step.model)
    assert per_byte["compiled"] > 0.9 * per_byte["formula"]
    seconds = planned.times.seconds
    assert planned.bytes_per_second == pytest.approx(8 * runs.T / seconds)
    assert planned.days == pytest.approx(6 * seconds / 86_400)
    assert planned.chip_hours == pytest.approx(8 * 6 * seconds / 3600)
    assert (planned.mesh, planned.num_steps) == (MESH, 6)


def test_collectives_are_named_by_the_axes_they_run_over(planned):
    kinds = {(x.kind, x.axes) for x in planned.collectives}
    assert ("all-gather", "fsdp") in kinds
    assert {axes for _, axes in kinds} <= {"fsdp", "sequence", "fsdp+sequence", ""}
    total = sum(x.seconds for x in planned.collectives)
    assert total == pytest.approx(planned.times.interconnect)
    sent = sum(x.sent_bytes for x in planned.collectives)
    assert total == pytest.approx(sent / RATES.link)  # one link each, for nothing is known of them


def test_a_plan_is_json_and_text_with_a_unit_behind_every_figure(planned):
    fields = json.loads(json.dumps(planned.as_dict()))
    assert fields["mesh"] == MESH and fields["times"]["bound"] in ("compute", "interconnect")
    assert fields["chips"] is None and fields["devices"] == 8
    text = report.text(planned)
    for unit in ("GiB", "MiB", "FLOP/s", "ms", "bytes/s", "days", "device-hours", "no promise"):
        assert unit in text
    assert "IT FITS" in text and all(len(line) < 160 for line in text.splitlines())


def test_a_table_of_plans_has_the_flags_of_each(planned):
    lines = report.table([("--config.mesh.fsdp=4", planned), ("--config.a.b=2", planned)])
    head, first, second = lines.splitlines()
    assert "bytes/s" in head and first.endswith("--config.mesh.fsdp=4") and "2." in second


def test_changes_are_flags_that_train_and_plan_take():
    assert plan.flags({"mesh.fsdp": 4, "model.x.remat": "full"}) == (
        "--config.mesh.fsdp=4 --config.model.x.remat=full"
    )


def test_of_local_devices_the_memory_is_shared():
    assert 8 * steps.available(step_test.LOCAL) <= math.ceil(
        jax.local_device_count() * steps.available(step_test.LOCAL)
    )
