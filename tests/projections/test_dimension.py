"""How many rows a projection needs: what is promised holds, and what is false is seen to be false."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

from ntkops.errors import InputError, InterpolationWarning, NtkopsWarning
from ntkops.projections import (
    Gaussian,
    Haar,
    Rademacher,
    check_interpolation,
    jl_distortion,
    suggest_dim,
)

from .maps import vectors


@pytest.mark.parametrize("kind", [Gaussian, Rademacher, Haar])
def test_all_inner_products_stay_within_the_distortion(kind: type) -> None:
    x = vectors(40, 600)
    x[7] = x[3] + 0.01 * x[7]
    x = x / x.norm(dim=1, keepdim=True)
    epsilon = jl_distortion(k=200, n=40, failure=0.05)
    failures = 0
    for seed in range(20):
        y = kind(600, 200, seed).apply(x)
        failures += float((y @ y.mT - x @ x.mT).abs().max()) > epsilon
    assert failures <= 1 and epsilon < 1


def test_the_error_is_relative_to_lengths_and_not_to_entries() -> None:
    x = torch.eye(600, dtype=torch.float64)[:2]  # orthogonal: the entry is zero, its error is not
    y = Gaussian(600, 200, 0).apply(x)
    assert 0 < abs(float(y[0] @ y[1])) <= jl_distortion(k=200, n=2)


def test_eigenvalues_are_not_preserved() -> None:
    x = torch.linalg.qr(vectors(300, 2000).mT)[0].mT  # a kernel whose eigenvalues are all 1
    values = torch.linalg.svdvals(Gaussian(2000, 320, 0).apply(x)) ** 2
    assert float(values.max()) > 3.0 and float(values.min()) < 0.01


def test_dimension_and_distortion_are_inverse() -> None:
    for n, epsilon, failure in ((2, 0.5, 0.1), (500, 0.2, 0.05), (10**6, 0.9, 1e-6)):
        k = suggest_dim(n, epsilon, failure)
        assert (
            jl_distortion(k, n, failure)
            <= epsilon * (1 + 1e-9)
            < jl_distortion(k - 1, n, failure) * (1 + 1e-6)
        )
    distortions = [jl_distortion(k, 100) for k in (1, 10, 50, 100, 1000, 10**6)]
    assert distortions == sorted(distortions, reverse=True) and distortions[0] > 1 > distortions[4]
    assert suggest_dim(5000, 0.3, regression=True) == 10_000 == max(10_000, suggest_dim(5000, 0.3))


def test_chi_square_tails_are_below_the_bound() -> None:
    from scipy.stats import chi2

    for k in (5, 50, 500):
        for n in (1, 30):
            epsilon = jl_distortion(k, n, 0.05)
            tails = chi2.sf(k * (1 + epsilon), k) + chi2.cdf(k * max(0.0, 1 - epsilon), k)
            assert n**2 * tails <= 0.05


def test_a_warning_near_the_interpolation_peak_only() -> None:
    with pytest.warns(InterpolationWarning, match="k=512 projected features for m=500"):
        assert check_interpolation(512, 500, 1e-4)
    assert issubclass(InterpolationWarning, NtkopsWarning)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for k, m, ridge in ((1000, 500, 1e-6), (300, 500, 1e-6), (512, 500, 1e-2)):
            assert not check_interpolation(k, m, ridge)


def test_the_peak_is_there() -> None:
    """Ridgeless regression on projected features of an easy problem: worst where k is near m."""
    generator = torch.Generator().manual_seed(0)
    basis = vectors(200, 400) / torch.arange(1, 401) ** 0.5
    train, test = basis[:100], basis[100:]
    weights = vectors(1, 400, seed=8)[0] / 20
    targets = train @ weights + 0.05 * torch.randn(100, generator=generator, dtype=torch.float64)
    errors = []
    for k in (40, 100, 400):
        per_seed = []
        for seed in range(5):
            projection = Gaussian(400, k, seed)
            one, other = projection.apply(train), projection.apply(test)
            fitted = torch.linalg.lstsq(one, targets.unsqueeze(1), driver="gelsd").solution
            per_seed.append(float(((other @ fitted).squeeze(1) - test @ weights).square().mean()))
        errors.append(math.exp(sum(map(math.log, per_seed)) / 5))
    assert errors[1] > 2 * errors[0] and errors[1] > 2 * errors[2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jl_distortion(0, 5), "k=0"),
        (lambda: jl_distortion(5, 0), "n=0"),
        (lambda: jl_distortion(5, 5, failure=1.0), r"failure=1\.0"),
        (lambda: suggest_dim(5, 1.5), r"epsilon=1\.5"),
        (lambda: suggest_dim(5.0, 0.5), r"n=5\.0"),
    ],
)
def test_refusals(call, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
