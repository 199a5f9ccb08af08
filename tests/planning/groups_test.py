import pytest

from megabyte_jax.planning.groups import replica_group


@pytest.mark.parametrize(
    ("groups", "first"),
    [
        ("{{0,2,4,6},{1,3,5,7}}", (0, 2, 4, 6)),
        ("{}", ()),
        ("[2,4]<=[8]", (0, 1, 2, 3)),
        ("[2,4]<=[4,2]T(1,0)", (0, 2, 4, 6)),
        ("mesh['a'=4,'b'=2] {'a'}", (0, 2, 4, 6)),
        ("mesh['a'=4,'b'=2] {'b'}", (0, 1)),
        ("mesh['a'=4,'b'=2] {'a','b'}", tuple(range(8))),
        ("mesh['a'=8,'b'=2] {'a':(2)4}", (0, 2, 4, 6)),
        ("mesh['a'=8,'b'=2] {'a':(1)2}", (0, 8)),
        ("mesh['a'=1,'b'=4,'c'=16], device_ids=([16,4]T(1,0)) {'b'}", (0, 1, 2, 3)),
    ],
)
def test_groups_of_devices_are_read_in_every_spelling(groups, first):
    assert replica_group(f", channel_id=1, replica_groups={groups}, use_global=true") == first
