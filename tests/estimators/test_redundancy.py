"""Redundancies against their definitions."""

import pytest
import torch

import ntkops
from ntkops.errors import InputError, NotConvergedWarning, ZeroKernelError
from ntkops.estimators import data_redundancy, parameter_redundancy
from tests.cases import BY_NAME
from tests.estimators.problems import SPECTRA, OnlyProducts, generator, with_spectrum
from tests.pairs import pairs

METHODS = pytest.mark.parametrize("method", ["dense", "lanczos"])


@pytest.mark.parametrize(
    "spectrum, epsilon, method",
    pairs(["power law", "exponential", "step"], [0.3, 0.05], ["dense", "lanczos"]),
    ids=str,
)
def test_data_redundancy_is_size_over_rank(spectrum, epsilon, method):
    K = OnlyProducts(with_spectrum(SPECTRA[spectrum](120)))
    rank = int(ntkops.truncation_rank(K, epsilon, method="dense"))
    found = data_redundancy(K, epsilon, method=method, generator=generator(0))
    assert float(found) == 120 / rank and found.kind == "data" and found.size == 120
    assert found.interval[0] <= found.factor <= found.interval[1]


@pytest.mark.parametrize(
    "spectrum, scale, dtype, method",
    pairs(SPECTRA, [1e-20, 1.0, 1e18], [torch.float64, torch.float32], ["dense", "lanczos"]),
    ids=str,
)
def test_parameter_redundancy_matches_the_definition(spectrum, scale, dtype, method):
    values = SPECTRA[spectrum](120).sort(descending=True).values
    epsilon = 0.1
    error = (values.square().sum() - values.square().cumsum(0)).clamp(min=0).sqrt() / values.norm()
    rank = int((error <= epsilon).long().argmax()) + 1
    K = OnlyProducts((with_spectrum(values) * scale).to(dtype))
    found = parameter_redundancy(K, epsilon, num_parameters=600, method=method, generator=generator(0))
    assert int(found.rank) == rank and float(found) == 600 / rank and found.converged
    assert found.interval == (found.factor, found.factor)


@METHODS
def test_projections_onto_that_dimension_are_as_near_as_they_should_be(method):
    case = BY_NAME["mlp"]
    J = ntkops.jacobian(case.make(), case.data(20))
    found = parameter_redundancy(J, 0.05, method=method, generator=generator(0))
    dense = J.to_dense()
    K, k = dense @ dense.T, int(found.rank)
    basis = torch.linalg.svd(dense, full_matrices=False)[2]

    def error(k):
        projected = dense @ basis[:k].T @ basis[:k]
        return float((projected @ projected.T - K).norm() / K.norm())

    assert error(k) <= 0.05 < error(k - 1)
    assert found.size == J.shape[-1]
    kernel = parameter_redundancy(ntkops.ntk(case.make(), case.data(20)), 0.05)
    assert int(kernel.rank) == k and kernel.size == J.shape[-1]


def test_classes_have_one_each():
    case = BY_NAME["mlp"]
    each = ntkops.ntk(case.make(), case.data(30), outputs="each")
    for found in (data_redundancy(each), parameter_redundancy(each)):
        assert found.factor.shape == (2,) and (found.factor >= 1).all()
    lazy = ntkops.ntk(case.make(), case.data(30), outputs="each", max_dense_bytes=0)
    torch.testing.assert_close(
        parameter_redundancy(lazy, method="lanczos").factor, parameter_redundancy(each).factor
    )


def test_too_few_products_leave_an_interval():
    values = SPECTRA["power law"](200)
    K = OnlyProducts(with_spectrum(values))
    with pytest.warns(NotConvergedWarning, match="interval"):
        found = parameter_redundancy(
            K, 1e-4, num_parameters=1000, method="lanczos", max_products=20, generator=generator(0)
        )
    exact = parameter_redundancy(K, 1e-4, num_parameters=1000, method="dense")
    assert found.interval[0] <= exact.factor <= found.interval[1]


def test_what_is_not_known_is_asked_for():
    K = OnlyProducts(torch.eye(5))
    with pytest.raises(InputError, match="num_parameters"):
        parameter_redundancy(K)
    with pytest.raises(InputError, match="epsilon"):
        parameter_redundancy(K, 2.0, num_parameters=10)
    for method in ("dense", "lanczos"):
        with pytest.raises(ZeroKernelError):
            parameter_redundancy(OnlyProducts(torch.zeros(5, 5)), num_parameters=10, method=method)
        assert float(parameter_redundancy(torch.ones(5, 5), num_parameters=10, method=method)) == 10
