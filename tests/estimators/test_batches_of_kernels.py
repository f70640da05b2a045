"""One matrix beside a batch of kernels: refused, with the way that is then taken."""

from __future__ import annotations

import pytest
import torch

import ntkops
from ntkops.errors import ShapeError


def test_one_matrix_for_all_kernels_of_a_batch_is_expanded() -> None:
    torch.manual_seed(0)
    K = ntkops.ntk(torch.nn.Linear(3, 2).double(), torch.randn(5, 3).double(), outputs="each")
    y = torch.randn(5, 1).double()
    with pytest.raises(ShapeError, match=r"such as one\.expand\(2, 5, 5\)"):
        ntkops.alignment(K, y @ y.mT)
    found = ntkops.alignment(K, (y @ y.mT).expand(2, 5, 5))
    dense = K.to_dense()
    expected = (y.mT @ dense @ y).flatten() / (dense.norm(dim=(1, 2)) * y.square().sum())
    assert torch.allclose(found.value, expected)
    with pytest.raises(ShapeError, match=r"\(2, 5, 5\) and \(4, 4\)$"):
        ntkops.alignment(K, torch.eye(4).double())
