"""Gauss and Gauss-Radau rules against dense decompositions."""

import pytest
import torch

from ntkops.spectra import Jacobi
from ntkops.vectors import Space
from tests.estimators.problems import SPECTRA, generator, with_spectrum

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def rules_of(K, steps, probes=3, seed=0):
    space = Space(len(K), K.dtype)
    starts = space.probes(probes, generator(seed), "gaussian")
    rules = Jacobi(lambda block: K @ block, space, starts)
    rules.extend(steps)
    return rules, (starts / starts.norm(dim=0)).double()


def forms(K, starts, function):
    values, vectors = torch.linalg.eigh(K.double())
    return (function(values.clamp(min=0)).unsqueeze(-1) * (vectors.T @ starts).square()).sum(0)


@DTYPES
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_gauss_rules_are_exact_for_polynomials(spectrum, dtype):
    K = with_spectrum(SPECTRA[spectrum](60)).to(dtype)
    rules, starts = rules_of(K, 5)
    nodes, weights = rules.gauss()
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, dtype=torch.float64))
    values, vectors = torch.linalg.eigh(K.double())
    masses = (vectors.T @ starts).square()
    for degree in range(10):
        exact = (values.pow(degree).unsqueeze(-1) * masses).sum(0)
        tolerance = 1e-11 if dtype == torch.float64 else 1e-4
        found = (nodes.pow(degree) * weights).sum(-1)
        torch.testing.assert_close(
            found, exact, rtol=tolerance, atol=tolerance * float(values.max()) ** degree
        )


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 5, 12])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_gauss_lies_above_and_radau_below(spectrum, steps, ridge):
    K = with_spectrum(SPECTRA[spectrum](60))
    rules, starts = rules_of(K, steps)
    for function in (lambda x: torch.log1p(x / ridge), lambda x: x / (x + ridge)):
        exact = forms(K, starts, function)
        nodes, weights = rules.gauss()
        upper = (weights * function(nodes.clamp(min=0))).sum(-1)
        nodes, weights = rules.radau(0.0)
        lower = (weights * function(nodes.clamp(min=0))).sum(-1)
        assert (lower <= exact * (1 + 1e-10)).all() and (upper >= exact * (1 - 1e-10)).all()


@DTYPES
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e18])
def test_exhausted_spaces_are_exact_at_every_scale(scale, dtype):
    K = (with_spectrum(torch.tensor([3.0, 3.0, 1.0, 0.0, 0.0])) * scale).to(dtype)
    rules, starts = rules_of(K, 5)
    assert not rules.alive.any() and rules.products <= 15
    nodes, weights = rules.gauss()
    radau, shares = rules.radau(0.0)
    exact = forms(K, starts, lambda x: x / (x + scale))
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for points, masses in ((nodes, weights), (radau, shares)):
        found = (masses * (points.clamp(min=0) / (points.clamp(min=0) + scale))).sum(-1)
        torch.testing.assert_close(found, exact, rtol=tolerance, atol=tolerance)


def test_zero_operators_and_zero_starts():
    K = torch.zeros(4, 4)
    rules, _ = rules_of(K, 3)
    assert rules.products == 3 and rules.steps == 1
    assert rules.gauss()[0].abs().max() == 0 and rules.radau(0.0)[0].abs().max() == 0
    nothing = Jacobi(lambda block: K @ block, Space(4, torch.float32), torch.zeros(4, 1))
    nothing.extend(2)
    assert nothing.products == 0


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_the_distribution_function_is_bounded(spectrum):
    K = with_spectrum(SPECTRA[spectrum](80))
    rules, starts = rules_of(K, 8)
    values, vectors = torch.linalg.eigh(K)
    masses = (vectors.T @ starts).square()  # (n, p)
    points = torch.linspace(-0.1, float(values.max()) * 1.1, 301, dtype=torch.float64)
    exact = (masses.T.unsqueeze(1) * (values <= points.unsqueeze(-1))).sum(-1)
    nodes, weights = rules.gauss()
    found = (weights.unsqueeze(1) * (nodes.unsqueeze(1) <= points.unsqueeze(-1))).sum(-1)
    assert ((found - exact).abs() <= rules.largest_mass(points) + 1e-9).all()


def test_growing_in_steps_changes_nothing():
    K = with_spectrum(SPECTRA["power law"](50))
    once, _ = rules_of(K, 12)
    twice, _ = rules_of(K, 4)
    twice.extend(12)
    torch.testing.assert_close(once.alphas, twice.alphas)
    torch.testing.assert_close(once.betas, twice.betas)
