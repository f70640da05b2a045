"""The table of models, rows that torch alone can build."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import ntkops
from ntkops.errors import DifferentiationError
from tests.pairs import pairs

from .agreement import check_row, check_row_on_a_device
from .rows import Row
from .torch_rows import TORCH_ROWS


@pytest.mark.parametrize("row", TORCH_ROWS, ids=lambda row: row.name)
def test_row(row: Row) -> None:
    check_row(row)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "row", [row for row in TORCH_ROWS if row.dtype == torch.float64], ids=lambda row: row.name
)
def test_row_on_a_device(row: Row) -> None:
    check_row_on_a_device(row)


class Sharpened(nn.Module):
    """A network of which a small part is under torch.no_grad."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.body, self.gain, self.head = nn.Linear(20, 200), nn.Linear(200, 1), nn.Linear(200, 20)
        self.share = share

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.body(x))
        with torch.no_grad():
            gain = self.gain(hidden)
        return self.head(hidden) * (1 + self.share * gain)


@pytest.mark.parametrize(
    "seed, share, dtype", pairs(range(3), [1.0, 0.1], [torch.float32, torch.float64]), ids=str
)
def test_no_grad_inside_is_found_however_large_the_model(dtype: torch.dtype, share: float, seed: int) -> None:
    torch.manual_seed(seed)
    model = Sharpened(share).to(dtype)
    with pytest.raises(DifferentiationError, match="torch.no_grad"):
        _ = ntkops.ntk(model, torch.randn(4, 20, dtype=dtype)).engine_info
