"""Every product, estimator and solver over a process group gives the numbers of one process."""

import pytest
import torch

from .agreement import CHECKS, OTHERS, compare, compare_others
from .launch import launch

pytestmark = pytest.mark.dist


@pytest.mark.parametrize(
    ("count", "dtype", "limit"),
    [
        (1, torch.float64, 1e-10),
        (2, torch.float64, 1e-10),
        (3, torch.float64, 1e-10),
        (4, torch.float64, 1e-10),
        (3, torch.float32, 1e-4),
    ],
)
def test_numbers_are_those_of_one_process(count, dtype, limit, tmp_path):
    for rank, found in enumerate(launch(compare, count, tmp_path, {"dtype": dtype})):
        assert isinstance(found, dict), found
        wrong = {name: kind for name, kind in found.items() if not isinstance(kind, float) or kind > limit}
        assert not wrong, f"rank {rank}"
        assert set(found) == set(CHECKS)


def test_what_else_there_is_agrees_or_raises(tmp_path):
    ranks = launch(compare_others, 2, tmp_path)
    for rank, found in enumerate(ranks):
        assert isinstance(found, dict), found
        for name in OTHERS:
            assert name in found, f"rank {rank}: {list(found.items())[-1]}"
            kind = found[name]
            assert (isinstance(kind, float) and kind < 1e-10) or (
                isinstance(kind, str) and not kind.startswith(("not ours", "RankFailedError"))
            ), f"rank {rank}, {name}: {kind}"
    assert {name: type(kind) for name, kind in ranks[0].items()} == {
        name: type(kind) for name, kind in ranks[1].items()
    }
