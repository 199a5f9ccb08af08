import pytest

from tests.faults.lanes import LANES
from tests.faults.storage import can_mount


@pytest.mark.parametrize("lane", [lane for lane in LANES if lane.fast], ids=lambda lane: lane.name)
def test_nothing_is_lost_to(lane, tmp_path):
    if lane.mounts and not can_mount(tmp_path):
        pytest.skip("only root can make a file system of its own to fill")
    assert lane.run(tmp_path, lane.fast, 0).lost == []
