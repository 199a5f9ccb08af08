import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabyte_jax.errors import PlanError, UserError
from megabyte_jax.planning import step as steps
from megabyte_jax.planning.topology import parse
from megabyte_jax.sharding import AXES
from tests import runs

LOCAL = parse("local")
CONFIG = runs.tiny_config("somewhere")
CONFIG.train.update(batch_size=8, grad_accumulation=1)


def step_of(mesh, **changes):
    sizes = steps.parse_mesh(mesh, CONFIG)
    changes |= {f"mesh.{axis}": size for axis, size in sizes.items()}
    return steps.make(steps.changed(CONFIG, changes), LOCAL, jax.devices())


@given(st.dictionaries(st.sampled_from(AXES), st.integers(1, 999) | st.just(-1)))
def test_a_mesh_is_read_as_it_is_written(sizes):
    text = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    assert steps.parse_mesh(text, CONFIG) == {**CONFIG.mesh.to_dict(), **sizes}


@given(st.text(max_size=20) | st.from_regex(r"(fsdp|data)=[-0-9]{1,3},?", fullmatch=True))
def test_any_text_is_a_mesh_or_one_line(text):
    try:
        assert set(steps.parse_mesh(text, CONFIG)) == set(AXES)
    except UserError as error:
        assert "accepted are data, fsdp, sequence, tensor" in str(error)


@pytest.mark.parametrize(
    ("mesh", "changes", "message"),
    [
        ("fsdp=3", {}, "product is 8"),
        ("fsdp=-1", {}, "2 sizes of -1"),
        ("data=1,sequence=8", {}, "mesh.sequence=8: does not divide"),
        ("", {"train.batch_size": 12}, "accepted is a multiple of 8, such as 8 or 16"),
        ("", {"optimizer.offload": True}, "optimizer.offload=True"),
        ("", {"model.dtype": "f"}, "model.dtype"),
    ],
)
def test_what_cannot_be_divided_is_told_before_anything_is_compiled(mesh, changes, message):
    with pytest.raises(UserError, match=message):
        step_of(mesh, **changes)


def test_the_state_of_a_device_is_its_share_of_what_fsdp_splits():
    whole, split = steps.stored(step_of("")), steps.stored(step_of("data=2,fsdp=4"))
    matrices = 2 * 12 * 16**2 + 12 * 12**2 + 2 * 4 * 16  # of the stacks, and w_GL, at least
    assert whole.parameters - split.parameters > 4 * 3 / 4 * matrices * 0.9
    assert whole.optimizer / whole.parameters == pytest.approx(2, rel=0.01)  # Adam's moments
    assert whole.batch == split.batch == runs.T


def test_what_the_compiler_says_of_memory_is_understood():
    step = step_of("")
    held = steps.stored(step).on_device
    early = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (28.44G) exceeds available HBM (15.75G)."
    )
    late = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 49.26G of 15.75G hbm."
    errors = [steps._too_large(step, message) for message in (early, late)]
    assert [error.required for error in errors] == [28.44 * 2**30 + held, 49.26 * 2**30]
    assert {error.available for error in errors} == {15.75 * 2**30}
    unknown = steps._too_large(step, "RESOURCE_EXHAUSTED: vmem\nmore")
    assert isinstance(unknown, PlanError) and "vmem" in str(unknown)


def test_a_step_that_needs_more_than_there_is_does_not_fit(monkeypatch):
    monkeypatch.setattr(steps, "available", lambda topology: 1000)
    with pytest.raises(steps.TooLargeError) as error:
        steps.compiled(step_of("data=1,fsdp=4,sequence=2"), "it")
    assert error.value.required > 1000 == error.value.available
