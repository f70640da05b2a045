"""A rank that raises, runs out of memory, stays away or dies: all others raise, and nothing hangs."""

import pickle
import time

import pytest
import torch

from .faults import absent, gradients, norm, raising, reductions, refused, sketch
from .launch import launch, start

pytestmark = pytest.mark.dist

REFUSED = {
    "another model": ("ShardingError", "rank 1 differs from rank 0 in the values of parameters"),
    "another architecture": ("ShardingError", "rank 1 differs from rank 0 in the selected parameters"),
    "other outputs": ("ShardingError", r"have shape \(2,\) on rank 1 and \(3,\) on rank 0"),
    "another choice of outputs": ("ShardingError", "rank 1 differs from rank 0 in the options"),
    "no samples anywhere": ("InputError", "no rank has a sample"),
}
FAILED = {
    "a sample that is not finite": ("NonFiniteError", "row 1 is not finite"),
    "an iterator": ("InputError", "one-shot iterator"),
    "x2 of another size": ("RuntimeError|ShapeError|OutputError|InputError", ""),
}


@pytest.mark.parametrize("what", REFUSED)
def test_ranks_that_do_not_belong_together_are_refused_on_all(what, tmp_path):
    kind, text = REFUSED[what]
    for found in launch(refused, 2, tmp_path, what):
        assert found[0] == kind, found
        with pytest.raises(ValueError, match=text):
            raise ValueError(found[1])


@pytest.mark.parametrize("what", ["a sample that is not finite", "an iterator"])
def test_what_one_rank_refuses_is_told_to_all(what, tmp_path):
    kind, text = FAILED[what]
    first, last = launch(refused, 2, tmp_path, what)
    assert last[0] == kind and text in last[1]
    assert first[0] == "RankFailedError" and "rank 1 failed in ntkops.ntk" in first[1] and text in first[1]


@pytest.mark.parametrize(
    ("what", "kind"),
    [("an error", "RuntimeError"), ("out of memory", "OutOfMemoryError"), ("interrupt", "KeyboardInterrupt")],
)
def test_a_rank_that_raises_makes_all_raise(what, kind, tmp_path):
    *others, last = launch(raising, 3, tmp_path, what)
    assert last[0] == kind
    for found in others:
        assert found[0] == "RankFailedError" and "rank 2 failed in Jᵀv" in found[1] and kind in found[1]
        assert found[2] < 30


def test_a_rank_that_stays_away_is_named_after_the_timeout(tmp_path):
    first, second, _ = launch(absent, 3, tmp_path, timeout=3)
    for found in (first, second):
        assert found[0] == "RankFailedError" and "timeout" in found[1]


def test_no_reduction_answers_for_one_rank_alone(tmp_path):
    for found in launch(reductions, 2, tmp_path):
        assert isinstance(found, dict), found
        silent = sorted(name for name, kind in found.items() if kind == "nothing")
        assert not silent


def killed(job, folder, victim):
    """Start three ranks of which one dies, and return what the others have raised."""
    context = start(job, 3, folder, folder, victim)
    started = time.monotonic()
    for process in context.processes:
        process.join(60)
    assert time.monotonic() - started < 60
    assert not any(process.is_alive() for process in context.processes)
    (folder / "meeting").unlink(missing_ok=True)
    found = [pickle.loads((folder / f"rank{rank}").read_bytes()) for rank in range(3) if rank != victim]
    assert not (folder / f"rank{victim}").exists()
    return found


@pytest.mark.parametrize("job", [gradients, norm, sketch], ids=["conjugate gradients", "norm", "sketch"])
def test_a_killed_rank_ends_the_others_and_the_run_goes_on_bit_for_bit(job, tmp_path):
    whole = launch(job, 3, tmp_path / "whole", tmp_path / "whole", None)
    for found in killed(job, tmp_path / "killed", 1):
        assert found[0] == "RankFailedError" and "died" in found[1]
    resumed = launch(job, 3, tmp_path / "killed", tmp_path / "killed", None)
    for mine, theirs in zip(resumed, whole, strict=True):
        assert torch.equal(mine[0], theirs[0])
        assert mine[1:] == theirs[1:]


def test_a_part_that_is_damaged_is_refused_by_all(tmp_path):
    launch(norm, 3, tmp_path, tmp_path, None)
    for path in tmp_path.glob("norm.safetensors.rank1of3.*"):
        path.write_bytes(path.read_bytes()[:100])
    (tmp_path / "meeting").unlink(missing_ok=True)
    found = launch(norm, 3, tmp_path, tmp_path, None)
    assert [kind for kind, *_ in found] == ["CheckpointError"] * 3
    assert "cut short" in found[1][1] and "another process" in found[0][1]
