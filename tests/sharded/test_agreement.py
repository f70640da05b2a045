"""Every product, estimator and solver over a process group gives the numbers of one process."""

import pytest

from .agreement import CHECKS, OTHERS, compare, compare_others
from .launch import launch

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module", params=[1, 2, 3, 4], ids="{}-ranks".format)
def errors(request, tmp_path_factory):
    return launch(compare, request.param, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CHECKS)
def test_numbers_are_those_of_one_process(errors, name):
    for rank, found in enumerate(errors):
        assert isinstance(found, dict), found
        assert isinstance(found.get(name), float), f"rank {rank}: {list(found.items())[-1]}"
        assert found[name] < 1e-10, f"rank {rank}"


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
