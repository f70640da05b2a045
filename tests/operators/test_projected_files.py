"""Features in memory-mapped files: the same numbers, made once, gone with the operator."""

from __future__ import annotations

import gc
import pickle

import pytest
import torch

import ntkops
from ntkops.errors import InputError
from ntkops.projections import SJLT
from ntkops.regression import KernelRidge


def kernel() -> ntkops.NTKOperator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 9), torch.nn.Tanh(), torch.nn.Linear(9, 2)).double()
        return ntkops.ntk(model, torch.randn(30, 3, dtype=torch.float64), outputs="each", max_dense_bytes=0)


def test_features_lie_in_a_file_and_are_those_in_memory(tmp_path) -> None:
    K = kernel()
    P = SJLT(dim=K.num_parameters, k=5, seed=1)
    there = ntkops.projected_ntk(K, P, memmap=tmp_path)
    expected = ntkops.projected_ntk(K, P, max_dense_bytes=10**6).features()
    assert torch.equal(there.features(), expected)
    with ntkops.count_passes() as passes:
        assert there.features().data_ptr() == there.features().data_ptr()
        KernelRidge(1e-2).fit(there, torch.ones(30, 2, dtype=torch.float64))
    assert passes.count.per_sample == passes.count.vjp == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) == expected.numel() * 8
    torch.testing.assert_close(there.to(dtype=torch.float32).features(), expected.float())
    torch.testing.assert_close(pickle.loads(pickle.dumps(there)).features(), expected)
    del there
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_a_directory_that_is_none_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="an existing directory"):
        ntkops.projected_ntk(kernel(), 5, memmap=tmp_path / "missing")
