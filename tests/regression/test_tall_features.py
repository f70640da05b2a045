"""Features of many rows are read by blocks: every number is that of the dense kernel."""

from __future__ import annotations

import pytest
import torch
from linear_operator.operators import DenseLinearOperator, RootLinearOperator
from torch import Tensor

from ntkops.distill import Distilled, ridge
from ntkops.errors import NonFiniteError, SingularKernelError
from ntkops.regression import KernelRidge, _routes, _tall_features

RIDGE = 1e-2


@pytest.fixture(autouse=True)
def blocks(monkeypatch) -> None:
    monkeypatch.setattr(_routes, "_TALL", 0)
    monkeypatch.setattr(ridge, "_TALL", 0)
    monkeypatch.setattr(ridge, "_ROWS", 7)
    monkeypatch.setattr(_tall_features, "_BYTES", 8 * 13 * 5 * 3)


def features(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    F = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    F[..., -1] = F[..., 0] + F[..., 1]  # one that repeats others
    return F.to(dtype)


def labels(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def operator(F: Tensor) -> RootLinearOperator:
    return RootLinearOperator(DenseLinearOperator(F))


@pytest.mark.parametrize("shape", [(40, 5), (3, 40, 5)])
def test_fit_prediction_variance_and_leave_one_out(shape) -> None:
    F, Y = features(*shape), labels(40, 3)
    new = labels(*shape[:-2], 6, shape[-1])
    dense, across = F @ F.mT, new @ F.mT
    system = dense + RIDGE * torch.eye(40, dtype=torch.float64)
    columns = Y.mT.unsqueeze(-1) if len(shape) == 3 else Y
    found = KernelRidge(RIDGE, relative=False).fit(operator(F), Y)
    assert found.method_ == "features"

    def rows(values: Tensor) -> Tensor:
        return values.squeeze(-1).mT if len(shape) == 3 else values

    dual = torch.linalg.solve(system, columns)
    torch.testing.assert_close(found.dual_coef_, rows(dual), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.predict(across), rows(across @ dual), rtol=1e-9, atol=1e-9)
    inverse = torch.linalg.inv(system)
    left_out = dual / inverse.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    torch.testing.assert_close(found.leave_one_out().residuals, rows(left_out), rtol=1e-8, atol=1e-8)
    explained = ((across @ inverse) * across).sum(-1)
    prior = new.square().sum(-1)
    variance = found.variance(across, prior)
    expected = (prior - explained).mT if len(shape) == 3 else prior - explained
    torch.testing.assert_close(variance.squeeze(), expected.squeeze(), rtol=1e-8, atol=1e-9)


def test_a_grid_of_ridges_and_the_evidence_choose_as_the_dense_kernel_does() -> None:
    F, Y = features(40, 5), labels(40)
    for option in ("loo", "evidence"):
        found = KernelRidge(option).fit(operator(F), Y)
        dense = KernelRidge(option, method="eigh").fit(F @ F.mT, Y)
        assert found.ridge_ == pytest.approx(dense.ridge_, rel=1e-3)


@pytest.mark.parametrize("chosen", [False, True])
@pytest.mark.parametrize("fit", ["nystrom", "sketch"])
def test_distilled_gradients_are_fitted_in_place_of_their_products(fit, chosen) -> None:
    F, Y = features(3, 40, 5), labels(40, 3)
    U = torch.tensor([3, 0, 17, 8]) if chosen else labels(40, 4)
    columns = torch.eye(40, dtype=torch.float64)[:, U] if chosen else U
    found = Distilled.of(F @ F.mT, U).fit(F @ F.mT, Y, ridge=RIDGE, relative=False, fit=fit)
    for number, (kernel, y) in enumerate(zip(F @ F.mT, Y.mT, strict=True)):
        inside, seen = columns.mT @ kernel @ columns, kernel @ columns
        if fit == "sketch":
            beta = torch.linalg.solve(inside + RIDGE * torch.eye(4, dtype=torch.float64), columns.mT @ y)
        else:
            beta = torch.linalg.solve(seen.mT @ seen + RIDGE * inside, seen.mT @ y)
        torch.testing.assert_close(found.predict(F @ F.mT)[:, number], seen @ beta, rtol=1e-8, atol=1e-9)


def test_float32_features_lose_no_more_than_their_own_digits() -> None:
    F, Y = features(2, 40, 5, dtype=torch.float32), labels(40, 2).float()
    found = KernelRidge(RIDGE, relative=False).fit(operator(F), Y)
    system = F.double() @ F.double().mT + RIDGE * torch.eye(40, dtype=torch.float64)
    dual = torch.linalg.solve(system, Y.double().mT.unsqueeze(-1)).squeeze(-1).mT
    torch.testing.assert_close(found.dual_coef_, dual, rtol=1e-8, atol=1e-8)


def test_refusals() -> None:
    F = features(40, 5)
    with pytest.raises(SingularKernelError, match="rank 5"):
        KernelRidge(0.0).fit(operator(F), labels(40))
    F[30, 2] = torch.nan
    with pytest.raises(NonFiniteError, match="NaN or infinite"):
        KernelRidge(RIDGE, relative=False).fit(operator(F), labels(40))


def test_distilled_gradients_of_a_float32_kernel_are_fitted_in_their_own_digits() -> None:
    F, Y = features(3, 40, 5), labels(40, 3)
    U = torch.tensor([3, 0, 17, 8])
    single = Distilled.of((F @ F.mT).float(), U).fit((F @ F.mT).float(), Y.float(), ridge=RIDGE)
    double = Distilled.of(F @ F.mT, U).fit(F @ F.mT, Y, ridge=RIDGE)
    found, expected = single.predict((F @ F.mT).float()), double.predict(F @ F.mT)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    prior = (F @ F.mT).diagonal(dim1=-2, dim2=-1)
    variances = single.variance((F @ F.mT).float(), prior), double.variance(F @ F.mT, prior)
    torch.testing.assert_close(variances[0], variances[1], rtol=1e-3, atol=1e-3)
