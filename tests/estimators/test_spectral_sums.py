"""Log-determinants and effective dimensions against dense decompositions."""

import math

import pytest
import torch
from linear_operator.operators import DenseLinearOperator

import ntkops
from ntkops.errors import (
    InputError,
    NotConvergedWarning,
    NtkopsWarning,
    ShapeError,
    SingularKernelError,
    ZeroKernelError,
)
from ntkops.estimators import effective_dimension, logdet
from ntkops.operators import RidgeOperator
from tests.cases import BY_NAME
from tests.estimators.problems import SPECTRA, OnlyProducts, generator, with_spectrum
from tests.pairs import pairs

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def references(values, ridge):
    return float((values + ridge).log().sum()), float((values / (values + ridge)).sum())


@DTYPES
@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e18])
def test_exact_values(scale, spectrum, dtype):
    values = SPECTRA[spectrum](60) * scale
    K = with_spectrum(values).to(dtype)
    ridge = 1e-2 * float(values.mean())
    tolerance = 1e-9 if dtype == torch.float64 else 1e-4
    for found, expected in zip(
        (logdet(K, ridge), effective_dimension(K, ridge)), references(values, ridge), strict=True
    ):
        assert found.exact and float(found) == pytest.approx(expected, rel=tolerance, abs=tolerance)
    relative = logdet(K, 1e-2, relative=True)
    assert float(relative) == pytest.approx(references(values, ridge)[0], rel=tolerance, abs=tolerance)


@pytest.mark.parametrize(
    "spectrum, seed, dtype", pairs(SPECTRA, [1, 2], [torch.float64, torch.float32]), ids=str
)
def test_estimates(spectrum, seed, dtype):
    values = SPECTRA[spectrum](150)
    K = OnlyProducts(with_spectrum(values, seed).to(dtype))
    ridge = 0.1 * float(values.mean())
    for quantity, expected in zip((logdet, effective_dimension), references(values, ridge), strict=True):
        found = quantity(K, ridge, method="slq", rtol=0.05, atol=1.0, generator=generator(seed))
        assert found.converged and not found.exact and found.seed == seed
        assert found.interval[0] <= expected <= found.interval[1]
        assert abs(float(found) - expected) <= max(0.05 * abs(expected), 1.0)


def test_jitter_that_is_there_already_is_a_ridge():
    case = BY_NAME["mlp"]
    model, x = case.make(), case.data(60)
    lazy, dense = ntkops.ntk(model, x, max_dense_bytes=0), ntkops.ntk(model, x).to_dense().double()
    shifted = dense + 0.25 * torch.eye(len(dense))
    expected = float(torch.logdet(shifted + 0.25 * torch.eye(len(dense))))
    found = logdet(lazy.add_jitter(0.25), 0.25, rtol=0.05, generator=generator(0))
    assert found.method == "slq" and found.interval[0] <= expected <= found.interval[1]
    assert float(logdet(ntkops.ntk(model, x).add_jitter(0.25), 0.25)) == pytest.approx(expected, rel=1e-9)
    assert float(logdet(lazy.add_jitter(0.5), rtol=0.05, generator=generator(0))) == pytest.approx(
        expected, rel=0.05
    )


def test_batches_give_one_value_each():
    case = BY_NAME["mlp"]
    model, x = case.make(), case.data(30)
    each = ntkops.ntk(model, x, outputs="each", max_dense_bytes=0)
    dense = ntkops.ntk(model, x, outputs="each").to_dense().double()
    expected = torch.logdet(dense + torch.eye(30))
    found = logdet(each, 1.0, rtol=0.05, atol=0.5, generator=generator(0))
    assert found.value.shape == (2,)
    assert (found.interval[0] <= expected).all() and (expected <= found.interval[1]).all()
    exact = logdet(ntkops.ntk(model, x, outputs="each"), 1.0)
    torch.testing.assert_close(exact.value, expected)


@DTYPES
def test_singular_kernels_are_refused(dtype):
    K = with_spectrum(torch.tensor([3.0, 1.0, 0.0])).to(dtype)
    for operator in (K, OnlyProducts(K), torch.zeros(3, 3, dtype=dtype)):
        with pytest.raises(SingularKernelError):
            logdet(operator)
        with pytest.raises(SingularKernelError, match="ridge"):
            logdet(operator, method="slq")
    with pytest.raises(SingularKernelError, match="precision"):
        effective_dimension(K, 1e-30)
    with pytest.raises(SingularKernelError, match="precision"):
        effective_dimension(OnlyProducts(K), 1e-30, method="slq", num_passes=20)


@DTYPES
@pytest.mark.parametrize("method", ["exact", "slq"])
def test_zero_rank_one_and_single_entries(method, dtype):
    options = {"method": method, "generator": generator(0)}
    zero, one = torch.zeros(6, 6, dtype=dtype), torch.ones(6, 6, dtype=dtype)
    assert float(logdet(zero, 2.0, **options)) == pytest.approx(6 * math.log(2))
    assert float(effective_dimension(zero, 2.0, **options)) == 0
    assert float(effective_dimension(one, 6.0, rtol=0.05, **options)) == pytest.approx(0.5, rel=0.05)
    assert float(logdet(one[:1, :1], 1.0, **options)) == pytest.approx(math.log(2), rel=1e-5)
    assert float(logdet(torch.eye(4, dtype=dtype), **{**options, "method": "exact"})) == pytest.approx(
        0, abs=1e-6
    )


def test_the_exact_value_is_taken_where_the_estimate_is_dearer():
    values = torch.linspace(0.5, 2, 850).double()
    K = OnlyProducts(with_spectrum(values))
    found = logdet(K, 1e-3, rtol=1e-4, generator=generator(0))
    assert found.exact and float(found) == pytest.approx(references(values, 1e-3)[0], rel=1e-9)


def test_passes_are_counted_and_capped():
    columns: list[int] = []
    K = OnlyProducts(with_spectrum(SPECTRA["power law"](200)), columns)
    found = logdet(K, 0.1, num_passes=60, generator=generator(0))
    assert found.passes == sum(columns) <= 60 and found.converged
    with pytest.warns(NotConvergedWarning, match="raise num_passes"):
        short = logdet(K, 0.1, rtol=1e-6, num_passes=60, method="slq", generator=generator(0))
    assert not short.converged
    with pytest.raises(InputError, match="costs about 200"):
        logdet(K, 0.1, num_passes=60, method="exact")


def test_bad_options_are_named():
    K = torch.eye(4)
    for options in (
        {"ridge": -1.0},
        {"ridge": math.inf},
        {"atol": -1.0},
        {"deflation": -1},
        {"method": "magic"},
    ):
        with pytest.raises(InputError):
            logdet(K, **{"ridge": 1.0, **options})
    with pytest.raises(InputError, match="rank"):
        effective_dimension(K, 0.0)
    with pytest.raises(ShapeError):
        logdet(torch.ones(3, 4), 1.0)
    with pytest.raises(InputError, match="positive semidefinite"):
        logdet(-K, 2.0)
    with pytest.raises(ZeroKernelError):
        logdet(torch.zeros(3, 3), 0.1, relative=True)


@pytest.mark.parametrize("least", [-1.0, -0.3, -0.05])
@pytest.mark.parametrize("ridge", [0.01, 0.1, 2.0])
def test_indefinite_operators_are_refused_by_quadrature_as_by_the_exact_way(least, ridge):
    dtype = torch.float32 if (ridge == 0.1) == (least == -0.3) else torch.float64
    size = 8 if dtype == torch.float64 else 40  # all eigenvectors are split off, or some
    basis = torch.linalg.qr(torch.randn(size, size, generator=torch.Generator().manual_seed(0)).double())[0]
    values = torch.cat([torch.linspace(0.1, 1, size - 1), torch.tensor([least])]).double()
    A = ((basis * values) @ basis.T).to(dtype)
    A = (A + A.mT) / 2
    for quantity in (ntkops.logdet, ntkops.effective_dimension):
        for method in ("slq", "exact"):
            with pytest.raises(InputError, match="not positive semidefinite"):
                quantity(A, ridge, method=method, generator=torch.Generator().manual_seed(0))
    kernel = DenseLinearOperator(A)
    with (
        pytest.warns(NtkopsWarning, match="logdet"),
        pytest.raises(InputError, match="positive semidefinite"),
    ):
        RidgeOperator(kernel, ridge).logdet_estimate(generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ridge", [1e-2, 1e2, 1e6])
def test_kernels_of_low_rank_are_no_indefinite_ones(dtype, ridge):
    factor = torch.randn(300, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    kernel = DenseLinearOperator(factor @ factor.mT)
    exact = (ridge + torch.linalg.svdvals(factor.double()) ** 2).log().sum() + 297 * math.log(ridge)
    for operator, added in ((kernel, ridge), (RidgeOperator(kernel, ridge), 0.0)):
        found = ntkops.logdet(
            operator, added, method="slq", rtol=0.05, atol=1.0, generator=torch.Generator().manual_seed(0)
        )
        assert abs(float(found) - float(exact)) < 0.1 * abs(float(exact)) + 2
