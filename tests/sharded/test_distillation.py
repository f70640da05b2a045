"""Distillation over a process group chooses the points of one process, and predicts what it predicts."""

from __future__ import annotations

import pytest
import torch

from .distillation import NEW, of_one_process, over_ranks
from .launch import launch
from .problems import rows, share

pytestmark = pytest.mark.dist

COUNT = 3  # of which one has no samples


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Return what every rank has found, and what one process has."""
    ranks = launch(over_ranks, COUNT, tmp_path_factory.mktemp("ranks"))
    assert all(isinstance(found, dict) for found in ranks), ranks
    return ranks, of_one_process()


def pairs(results, what):
    """Yield what was found under a name by each rank, and by one process."""
    ranks, whole = results
    names = [key for key in whole if key[0] == what]
    assert names
    for rank, found in enumerate(ranks):
        for name in names:
            yield rank, name, found[name], whole[name]


def close(found, expected):
    return torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_columns_are_this_ranks_rows(results):
    for rank, name, found, whole in pairs(results, "columns"):
        here = (rows if name[1] == "all" else share)(rank, COUNT)
        close(found, whole[..., here, :])


def test_all_ranks_choose_the_points_of_one_process(results):
    for _, name, found, whole in pairs(results, "points"):
        assert found.tolist() == whole.tolist(), name
    for _, name, found, whole in pairs(results, "details"):
        assert found == pytest.approx(whole, rel=1e-9), name
    ranks, _ = results
    assert ranks[0]["seeds"].tolist() == ranks[1]["seeds"].tolist()


@pytest.mark.parametrize("what", ["predictions", "variance"])
def test_predictions_are_this_ranks_rows(what, results):
    for rank, _, found, whole in pairs(results, what):
        close(found, whole[NEW[rank] : NEW[rank + 1]])


def test_coefficients_are_those_of_one_process(results):
    for rank, _, found, whole in pairs(results, "dual"):
        close(found, whole[share(rank, COUNT)])
    for what in ("coefficients", "targets"):
        for _, _, found, whole in pairs(results, what):
            close(found, whole)


def test_nystrom_kernels_are_those_of_one_process(results):
    for what in ("nystrom", "nystrom diagonal"):
        for rank, (_, name), found, whole in pairs(results, what):
            here = (rows if name == "all" else share)(rank, COUNT)
            close(found, whole[..., here, :] if what == "nystrom" else whole[..., here])
    for rank, (_, name), found, whole in pairs(results, "nystrom cross"):
        width = 3 if name == "all" else 1
        close(found, whole[..., width * NEW[rank] : width * NEW[rank + 1], :])
    for _, name, found, whole in pairs(results, "inducing"):
        assert found[:2] == whole[:2], name
        assert torch.as_tensor(found[2]).tolist() == torch.as_tensor(whole[2]).tolist(), name


def test_what_is_not_offered_is_refused_on_all_ranks(results):
    refused = [{k[1]: v for k, v in found.items() if k[0] == "refused"} for found in results[0]]
    expected = {name: "UnsupportedOperationError" for name in refused[0]} | {
        "too many": "InputError",
        "other points": "ShardingError",
        "no such point": "OutOfRangeError",
        "no such column": "OutOfRangeError",
        "nystrom of other points": "ShardingError",
        "nystrom of no such point": "InputError",
        "a label that is not finite": "RankFailedError",
    }
    *others, last = refused
    assert others == [expected] * (COUNT - 1)
    assert last == expected | {"a label that is not finite": "NonFiniteError"}
