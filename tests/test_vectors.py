"""The vector space of rows: what counts as rounding does not grow with their number."""

import pytest
import torch

from ntkops.vectors import Space, rank_cutoff


@pytest.mark.parametrize(
    ("dtype", "least", "rank"), [(torch.float32, 1e-3, 4), (torch.float32, 1e-7, 3), (torch.float64, 1e-9, 4)]
)
def test_directions_of_many_rows_are_kept(dtype: torch.dtype, least: float, rank: int) -> None:
    size, scales = 100_000, torch.tensor([1.0, 0.1, 0.01, least], dtype=torch.float64)
    columns = torch.randn(size, 4, dtype=torch.float64) / size**0.5 * scales
    block = (columns @ torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]).to(dtype)
    basis = Space(size, dtype, torch.device("cpu")).orthonormalize(block).double()
    assert basis.shape == (size, rank)
    torch.testing.assert_close(basis.mT @ basis, torch.eye(rank).double(), rtol=0, atol=1e-7)
    rest = columns[:, :rank] - basis @ (basis.mT @ columns[:, :rank])
    assert float(rest.norm(dim=0).max()) < 100 * torch.finfo(dtype).eps  # of the largest, which is 1


def test_a_cutoff_is_that_of_few_rows_for_many() -> None:
    eps = torch.finfo(torch.float32).eps
    assert rank_cutoff(50, torch.float32) == 50 * eps
    assert rank_cutoff(10**6, torch.float32) == rank_cutoff(10**4, torch.float32) < 2e-4
