"""The table of models, rows of transformers, peft and timm: built from a config, nothing is loaded."""

from __future__ import annotations

import importlib.util

import pytest
import torch

import ntkops

from .agreement import check_row
from .library_rows import LIBRARY_ROWS, PEFT, library
from .rows import Row

pytestmark = [
    pytest.mark.models,
    # peft 0.21 asks transformers 5 for an older name of a property.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def libraries() -> None:
    """Skip where a library is missing."""
    for name in ("transformers", "peft", "timm", "torchvision"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed; pip install 'ntkops[models]'")
    for name in ("transformers", "peft", "timm"):
        library(name)


@pytest.mark.parametrize("row", LIBRARY_ROWS, ids=lambda row: row.name)
def test_row(row: Row) -> None:
    check_row(row)


@pytest.mark.parametrize("row", PEFT, ids=lambda row: row.name)
def test_detached_norms_are_reported(row: Row) -> None:
    """J of DoRA is consistent and what training uses, and not the derivative; that of LoRA is."""
    torch.manual_seed(0)
    K = ntkops.ntk(row.make(), row.draw(), **row.options)
    report = ntkops.check_operator(K, generator=torch.Generator().manual_seed(0))
    assert report["true derivative"].passed is ("DoRA" not in row.name), report
    assert report["adjoint of J"].passed is True
    assert report["engines"].passed is not False
