"""The table of models, rows of transformers, peft, timm and torchvision: built here, nothing is loaded.

A dozen of them run with the test suite wherever the libraries are installed; ``make test-models`` runs all.
"""

from __future__ import annotations

import importlib.util

import pytest
import torch

import ntkops

from .agreement import check_row, check_row_on_a_device
from .library_rows import DOZEN, LIBRARY_ROWS, PEFT, library
from .rows import Row

pytestmark = [
    # peft 0.21 asks transformers 5 for an older name of a property.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def libraries() -> None:
    """Skip where a library is missing."""
    for name in ("transformers", "peft", "timm", "torchvision"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed; pip install -e '.[models]'")
    for name in ("transformers", "peft", "timm", "torchvision.models"):
        library(name)


@pytest.mark.parametrize("row", DOZEN, ids=lambda row: row.name)
def test_one_of_each_kind(row: Row) -> None:
    check_row(row)


@pytest.mark.models
@pytest.mark.parametrize("row", [row for row in LIBRARY_ROWS if row not in DOZEN], ids=lambda row: row.name)
def test_row(row: Row) -> None:
    check_row(row)


@pytest.mark.models
@pytest.mark.parametrize("row", PEFT, ids=lambda row: row.name)
def test_detached_norms_are_reported(row: Row) -> None:
    """J of DoRA is consistent and what training uses, and not the derivative; that of LoRA is."""
    torch.manual_seed(0)
    K = ntkops.ntk(row.make(), row.draw(), **row.options)
    report = ntkops.check_operator(K, generator=torch.Generator().manual_seed(0))
    assert report["true derivative"].passed is ("DoRA" not in row.name), report
    assert report["adjoint of J"].passed is True
    assert report["engines"].passed is not False


@pytest.mark.models
def test_batch_statistics_in_training_mode_are_refused() -> None:
    model = library("torchvision.models").resnet18(num_classes=2).train()
    with pytest.raises(ntkops.errors.CoupledSamplesError, match=r"BatchNorm2d at 'bn1'.*model\.eval\(\)"):
        ntkops.ntk(model, torch.randn(2, 3, 32, 32))


@pytest.mark.models
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("row", LIBRARY_ROWS, ids=lambda row: row.name)
def test_row_on_a_device(row: Row) -> None:
    check_row_on_a_device(row)
