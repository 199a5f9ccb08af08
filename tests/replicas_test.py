import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from megabyte_jax import replicas, sharding
from megabyte_jax.errors import NonFiniteError


def copies(spec, value, flip=None):
    """An array over 2 x 2 devices; `flip` is a bit in the copy of one device."""
    sizes = {"data": 2, "fsdp": 2, "sequence": 1, "tensor": 1}
    place = NamedSharding(sharding.make_mesh(sizes, jax.devices()[:4]), PartitionSpec(*spec))
    parts = []
    for device, index in place.addressable_devices_indices_map(value.shape).items():
        part = value[index].copy()
        if flip and device.id == flip[0]:
            part.reshape(-1).view(np.uint8)[flip[1] // 8] ^= 1 << flip[1] % 8
        parts.append(jax.device_put(part, device))
    return jax.make_array_from_single_device_arrays(value.shape, place, parts)


VALUE = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


@pytest.mark.parametrize("spec", [(), ("fsdp",), (("data", "fsdp"),)])
def test_copies_that_are_equal_are_no_news(spec):
    replicas.require_equal({"a": copies(spec, VALUE), "b": jax.numpy.ones(3)}, 1)


@pytest.mark.parametrize("bit", range(0, VALUE.nbytes * 8, 37))
def test_one_bit_of_one_copy_of_four_is_found_and_its_device_named(bit):
    with pytest.raises(NonFiniteError, match=r"update 5: .*state/a .* that of \[2\] cannot") as e:
        replicas.require_equal({"a": copies((), VALUE, (2, bit))}, 5)
    assert e.value.exit_status == 6


def test_of_two_copies_neither_is_trusted():
    odd = {"b": copies((), VALUE), "a": copies(("fsdp",), VALUE, (1, 3))}
    with pytest.raises(NonFiniteError, match=r"on devices \[1, 3\] differ: those of \[1, 3\]"):
        replicas.require_equal(odd, 1)


def test_parts_without_a_copy_are_not_compared():
    replicas.require_equal({"a": copies((("data", "fsdp"),), VALUE, (2, 1))}, 1)
