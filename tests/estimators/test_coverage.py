"""Intervals cover and tolerances hold, in small, on spectra that no rule was set on."""

import math

import pytest
import scipy.stats
import torch

import ntkops
from ntkops.estimators._intervals import extremal_quantile, student_quantile
from tests.estimators.problems import Factored, generator

N = 60
SPECTRA = {
    "spike": lambda n: torch.cat([torch.full((1,), float(n)), torch.ones(n - 1)]).double(),
    "clusters": lambda n: torch.cat(
        [torch.full((2,), 9.0), torch.full((6,), 3.0), torch.full((n - 8,), 0.05)]
    ),
    "cliff": lambda n: torch.cat([torch.ones(9), torch.full((n - 9,), 1e-9)]).double(),
}
QUANTITIES = {
    "trace": (ntkops.trace, lambda v: v.sum(), "rhutch"),
    "norm": (ntkops.frobenius_norm, lambda v: v.norm(), "reverse"),
    "effective rank": (ntkops.effective_rank, lambda v: v.sum() ** 2 / v.square().sum(), "reverse"),
}
RUNS = 120


def accepted(count, runs=RUNS):
    """Whether a coverage of .95 stands a one-sided binomial test at level .001."""
    return scipy.stats.binom.cdf(count, runs, 0.95) > 1e-3


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("name", QUANTITIES)
@pytest.mark.parametrize("method", ["sketch", "xtrace", "ntk-hutch++", "hutch++", "hutchinson", "one side"])
def test_intervals_cover(name, method, spectrum):
    values = SPECTRA[spectrum](N).double()
    estimate, truth, one_sided = QUANTITIES[name]
    exact = float(truth(values))
    kernel = Factored(torch.diag(values.sqrt()))
    chosen = one_sided if method == "one side" else method
    covered = 0
    for seed in range(RUNS):
        low, high = estimate(kernel, method=chosen, num_passes=36, generator=generator(seed)).interval
        covered += float(low) <= exact * (1 + 1e-12) and exact * (1 - 1e-12) <= float(high)
    assert accepted(covered), covered


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("name", QUANTITIES)
def test_a_tolerance_holds_for_the_sketch(name, spectrum):
    values = SPECTRA[spectrum](N).double()
    estimate, truth, _ = QUANTITIES[name]
    exact = float(truth(values))
    kernel = Factored(torch.diag(values.sqrt()))
    covered = held = 0
    for seed in range(RUNS // 2):
        result = estimate(kernel, method="sketch", rtol=0.1, generator=generator(seed))
        low, high = (float(end) for end in result.interval)
        covered += low <= exact * (1 + 1e-12) and exact * (1 - 1e-12) <= high
        held += abs(float(result) - exact) <= 0.1 * exact
        assert result.converged
    assert accepted(covered, RUNS // 2) and accepted(held, RUNS // 2), (covered, held)


def test_a_rounding_remainder_does_not_make_a_false_interval():
    draw = generator(0)
    factor = torch.randn(80, 6, generator=draw).float()
    truth = float(factor.double().square().sum())
    for method in ("sketch", "xtrace", "hutch++", "ntk-hutch++"):
        for seed in range(20):
            result = ntkops.trace(Factored(factor), method=method, num_passes=60, generator=generator(seed))
            low, high = (float(end) for end in result.interval)
            assert low < high and low <= truth <= high, (method, seed)


def test_quantiles_fall_with_samples_and_rise_with_certainty():
    for level in (0.05, 0.01, 1e-3, 1e-5):
        found = [extremal_quantile(level, count) for count in (2, 3, 7, 10, 100, 255, 256, 1000, 10**6)]
        assert found == sorted(found, reverse=True)
        assert all(
            extremal_quantile(level, count) >= student_quantile(level, count - 1) for count in (2, 9, 300)
        )
    assert extremal_quantile(0.01, 20) > extremal_quantile(0.05, 20)
    assert math.isinf(extremal_quantile(0.05, 1))
    assert extremal_quantile(0.05, 10**8) == pytest.approx(1.96, abs=1e-2)


def test_a_stationary_quantity_has_an_error():
    # (a + b)² / (a² + c) does not move to first order with a large eigenvalue a = b.
    values = SPECTRA["spike"](80)
    exact = float(values.sum() ** 2 / values.square().sum())
    kernel = Factored(torch.diag(values.sqrt()))
    covered = 0
    for seed in range(RUNS):
        low, high = ntkops.effective_rank(
            kernel, method="ntk-hutch++", num_passes=96, generator=generator(seed)
        ).interval
        covered += float(low) <= exact <= float(high)
    assert accepted(covered), covered
