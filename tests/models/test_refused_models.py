"""Models that cannot work as they stand: the exception, its way out, and that the way out works."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parameter import is_lazy

import ntkops
from ntkops.errors import DifferentiationError, DtypeError, NtkopsError
from tests.cases import _cast as cast
from tests.model.zoo import untouched

from .agreement import agrees_after_repair
from .networks import MeanOfEmbedding
from .refusals import REFUSALS, state_of
from .rows import Refusal
from .torch_rows import TORCH_ROWS, tokens


def specimen(refusal: Refusal) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = refusal.build()
    if refusal.error is not DtypeError and refusal.name != "complex parameters":
        model = model.double()
    return model, cast(refusal.inputs(3), torch.float64)


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda refusal: refusal.name)
@pytest.mark.filterwarnings(
    "ignore:None of the inputs have requires_grad:UserWarning"
)  # reentrant checkpointing
@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_refused_with_the_way_out(refusal: Refusal, engine: str) -> None:
    model, x = specimen(refusal)
    has_data = not any(is_lazy(p) or p.is_meta for p in model.parameters())
    with untouched(model, x) if has_data else nullcontext(), pytest.raises(refusal.error) as caught:
        _ = ntkops.ntk(model, x, **refusal.options, engine=engine).engine_info
    assert isinstance(caught.value, NtkopsError)
    assert all(word in str(caught.value) for word in refusal.words), str(caught.value)


@pytest.mark.parametrize(
    "refusal", [r for r in REFUSALS if r.repair is not None], ids=lambda refusal: refusal.name
)
def test_the_way_out_works(refusal: Refusal) -> None:
    model, x = specimen(refusal)
    agrees_after_repair(refusal.repair(model), x, refusal.options, state_of(refusal.options))


def test_time_first_works_with_batch_dim() -> None:
    refusal = REFUSALS[-1]
    model, x = specimen(refusal)
    first, swapped = copy.deepcopy(model), x.transpose(0, 1)
    first.batch_first = True
    K = ntkops.ntk(model, x, output=0, batch_dim=1)
    wanted = ntkops.ntk(first, swapped, output=0).to_dense()
    torch.testing.assert_close(K.to_dense(), wanted, rtol=1e-12, atol=1e-13)


class TestEmbeddingBag:
    """One side of its Jacobian exists; the message says what it is good for, and the way out has both."""

    row = next(row for row in TORCH_ROWS if row.mode == "reverse")

    def test_products_with_j_are_refused(self) -> None:
        model, x = self.row.make(), self.row.draw()
        J = ntkops.jacobian(model, x)
        with untouched(model, x), pytest.raises(DifferentiationError, match="method='rhutch'"):
            J @ torch.ones(J.shape[1], dtype=J.dtype)

    def test_the_one_sided_trace(self) -> None:
        model, x = self.row.make(), self.row.draw()
        K = ntkops.ntk(model, x)
        exact = ntkops.trace(K, method="exact")
        generator = torch.Generator().manual_seed(0)
        estimate = ntkops.trace(K, method="rhutch", num_passes=500, generator=generator)
        assert abs(float(estimate) - float(exact)) <= 5 * estimate.stderr

    def test_the_way_out_works(self) -> None:
        torch.manual_seed(0)
        bag = nn.EmbeddingBag(6, 3, mode="mean").double()
        model, x = MeanOfEmbedding(bag), tokens(6, 4)(3)
        torch.testing.assert_close(model(x), bag(x))
        agrees_after_repair(model, x, {}, state_of({}))
        K = ntkops.ntk(model, x)
        assert K.engine_info.mode == "forward"
        torch.testing.assert_close(K.to_dense(), ntkops.ntk(bag, x).to_dense())
