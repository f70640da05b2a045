"""Training over a process group gives the trajectory of one process."""

import pytest

from .dynamics import compare_trajectories
from .launch import launch

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("count", [2])
def test_trajectories_are_those_of_one_process(count, tmp_path):
    for rank, found in enumerate(launch(compare_trajectories, count, tmp_path)):
        assert isinstance(found, dict), found
        assert max(found.values()) < 1e-8, f"rank {rank}: {found}"
