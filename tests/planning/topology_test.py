import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megabyte_jax.errors import UserError
from megabyte_jax.planning import topology
from megabyte_jax.planning.topology import CHIPS, Topology, parse

SLICES = [slice_ for generation in CHIPS for slice_ in topology.slices(generation)]


@pytest.mark.parametrize(
    ("text", "name", "chips"),
    [
        ("v5e:4x4", "v5e:4x4", 16),
        ("V5E:8x4", "v5e:4x8", 32),
        ("v5e-256", "v5e:16x16", 256),  # chips
        ("v5litepod-8", "v5e:2x4", 8),
        ("v5p-128", "v5p:4x4x4", 64),  # TensorCores
        ("v5p-8", "v5p:2x2x1", 4),
        ("v5p:2x2", "v5p:2x2x1", 4),
        ("v5p-12288", "v5p:16x16x24", 6144),
        ("v4-32", "v4:2x2x4", 16),
        ("v6e-16", "v6e:4x4", 16),
        ("tpu7x-2", "tpu7x:1x1x1", 1),
        ("tpu7x:4x4x8", "tpu7x:4x4x8", 128),
        ("v5p:12x8x4", "v5p:4x8x12", 384),
    ],
)
def test_slices_are_known_by_shape_and_by_product(text, name, chips):
    found = parse(text)
    assert (found.name, found.chips) == (name, chips)


@given(st.sampled_from(SLICES))
def test_every_slice_is_read_as_it_is_written(slice_):
    assert parse(slice_.name) == slice_
    assert parse("local") == Topology("local")


@given(st.sampled_from(SLICES))
def test_a_product_is_a_slice_of_as_many_chips(slice_):
    assert parse(slice_.product).chips == slice_.chips


@pytest.mark.parametrize(
    ("text", "nearest"),
    [
        ("v5e:3x5", "v5e:4x4"),
        ("v5e:32x32", "v5e:16x16"),
        ("v5e-12", "v5e:"),
        ("v5p-100", "v5p:4x4x4 = v5p-128, which counts its TensorCores"),
        ("v5p:4x4", "v5p:2x2x4"),
        ("v6-8", "v6e:2x4"),
        ("v7x:2x2x3", "tpu7x:"),
        ("h100-8", "such as"),
        ("v5e", "v5e:2x2"),
        ("v5e:", "such as"),
        ("", "such as"),
    ],
)
def test_an_unknown_slice_is_one_line_with_the_nearest(text, nearest):
    with pytest.raises(UserError) as error:
        parse(text)
    message = str(error.value)
    assert f"--topology={text}:" in message and nearest in message and "\n" not in message


@given(st.text(max_size=12) | st.from_regex(r"(v5e|v5p|v4)(:|-)[0-9x]{1,9}", fullmatch=True))
def test_any_text_is_a_slice_that_exists_or_an_error(text):
    try:
        found = parse(text)
    except UserError as error:
        assert "accepted" in str(error)
    else:
        assert found.name == "local" or found in topology.slices(found.generation)


def test_the_ends_of_an_axis_are_joined_where_google_says_so():
    assert parse("v5e:8x16").wraps() == (False, True)
    assert parse("v5p:4x4x8").wraps() == (True,) * 3
    assert parse("v5p:2x4x4").wraps() == (False,) * 3


def test_the_datasheets_agree_with_the_clock():
    """A TensorCore of v4 to v5p has four arrays of 128 x 128, two FLOPs in each cell per cycle."""
    for chip in CHIPS.values():
        cores = 2 if chip.counts_cores else 1
        if chip.clock:
            assert math.isclose(cores * 4 * 128**2 * 2 * chip.clock, chip.flops, rel_tol=0.005)


def test_without_libtpu_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"v5e:2x2: libtpu.*pip install 'megabyte-jax\[tpu\]'"):
        topology.devices(parse("v5e:2x2"))


@pytest.mark.parametrize("name", ["v5e:4x4", "v5e-1", "v5p-16", "v4-8", "tpu7x-8", "v6e-8"])
def test_the_tpu_compiler_knows_the_slices(name):
    pytest.importorskip("libtpu", reason="the TPU compiler is an optional extra")
    found = parse(name)
    devices = topology.devices(found)
    assert len(devices) == found.chips * found.chip.devices
    assert devices[0].device_kind == found.chip.kind
