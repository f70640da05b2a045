"""Intervals cover and tolerances hold, in small, on spectra that no rule was set on."""

import math

import pytest
import scipy.stats
import torch

import ntkops
from ntkops.estimators._statistics import extremal_quantile, norm_quantile, student_quantile
from tests.estimators.problems import Factored, covering, generator, repeated

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
RUNS = 160


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
    kernel = Factored(repeated(torch.diag(values.sqrt()), RUNS))
    chosen = one_sided if method == "one side" else method
    found = estimate(kernel, method=chosen, num_passes=36 * RUNS, generator=generator(0))
    covered = covering(found.interval, exact)
    assert accepted(covered), covered


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("name", QUANTITIES)
def test_a_tolerance_holds_for_the_sketch(name, spectrum):
    values = SPECTRA[spectrum](N).double()
    estimate, truth, _ = QUANTITIES[name]
    runs, exact = 60, float(truth(values))
    kernel = Factored(repeated(torch.diag(values.sqrt()), runs))
    found = estimate(kernel, method="sketch", rtol=0.1, generator=generator(0))
    covered = covering(found.interval, exact)
    held = int(((found.value - exact).abs() <= 0.1 * exact).sum())
    assert found.converged and accepted(covered, runs) and accepted(held, runs), (covered, held)


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


@pytest.mark.parametrize("count", [1, 2, 4, 30])
@pytest.mark.parametrize("level", [0.05, 0.01])
def test_the_quantile_by_lengths_is_that_of_rank_one(level, count):
    means = torch.randn(200_000, count, generator=generator(0), dtype=torch.float64).square().mean(-1)
    missed = (1 - means).abs() > norm_quantile(level, count) * (2 * means / count).sqrt()
    assert float(missed.double().mean()) == pytest.approx(level, rel=0.06)
    assert norm_quantile(level, count) < extremal_quantile(level, count)
    assert norm_quantile(level, 10**6) == pytest.approx(scipy.stats.norm.isf(level / 2), rel=1e-2)


def quarter(n):
    """A spike that holds a quarter of the trace."""
    return torch.cat([torch.full((1,), (n - 1) / 3), torch.ones(n - 1)]).double()


@pytest.mark.parametrize("spectrum", [*SPECTRA, "rank one", "quarter", "flat"])
@pytest.mark.parametrize("method", ["sketch", "xtrace", "hutch++", "hutchinson"])
@pytest.mark.parametrize("passes", [8, 24])
def test_traces_cover_with_few_probes_by_narrow_intervals(method, spectrum, passes):
    if (method, passes) == ("xtrace", 8):
        passes = 12  # the least
    more = {
        "rank one": lambda n: torch.eye(n)[0],
        "quarter": quarter,
        "flat": lambda n: torch.linspace(1, 2, n),
    }
    values = (SPECTRA | more | {"quarter": quarter})[spectrum](N).double()
    runs, truth = 400, float(values.sum())
    kernel = Factored(repeated(torch.diag(values.sqrt()), runs))
    found = ntkops.trace(kernel, method=method, num_passes=passes * runs, generator=generator(0))
    low, high = found.interval
    covered = covering(found.interval, truth)
    assert scipy.stats.binom.cdf(covered, runs, 0.93) > 1e-3, covered
    ends = (found.value / truth).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    if float(ends[0]) > 0 and float(ends[1] - ends[0]) > 1e-9:
        least = float(found.value.median()) * float(1 / ends[0] - 1 / ends[1])
        assert float((high - low).median()) <= 3.5 * least


def test_a_stationary_quantity_has_an_error():
    # (a + b)² / (a² + c) does not move to first order with a large eigenvalue a = b.
    values = SPECTRA["spike"](80)
    exact = float(values.sum() ** 2 / values.square().sum())
    kernel = Factored(repeated(torch.diag(values.sqrt()), RUNS))
    found = ntkops.effective_rank(kernel, method="ntk-hutch++", num_passes=96 * RUNS, generator=generator(0))
    covered = covering(found.interval, exact, 0)
    assert accepted(covered), covered


def one_large(n, size):
    """Two kernels alike: one sample has a long gradient."""
    first = torch.eye(n, dtype=torch.float64)
    first[7] *= size
    return first, first + 0.3 * torch.randn(n, n, generator=generator(77), dtype=torch.float64) * size / n


def orthogonal_ones(n):
    """Two kernels of rank one, nearly orthogonal: the noise is that of pairs of probes."""
    first, second = torch.randn(2, n, n, generator=generator(3), dtype=torch.float64)
    first[:, 1:], second[:, 1:] = 0, 0
    return first, second


@pytest.mark.parametrize("passes", [8, 24, 60])
@pytest.mark.parametrize(
    "pair",
    [one_large(48, 1e4), one_large(48, 11.0), orthogonal_ones(48)],
    ids=["rank one", "one sample", "orthogonal"],
)
@pytest.mark.parametrize("method", ["reverse", "forward", "wide forward", "hutchinson"])
def test_inner_products_cover_with_few_probes(method, pair, passes):
    first, second = pair
    if method == "wide forward":  # other numbers of parameters: probes of their own
        second = torch.cat([second, torch.zeros(len(second), 2, dtype=torch.float64)], dim=1)
    runs = 500
    truth = float(((first @ first.T) * (second @ second.T)).sum())
    kernels = [Factored(repeated(factor, runs)) for factor in (first, second)]
    options = {"method": method.removeprefix("wide "), "num_passes": passes * runs}
    covered = covering(ntkops.inner(*kernels, generator=generator(0), **options).interval, truth, 0)
    assert scipy.stats.binom.cdf(covered, runs, 0.93) > 1e-2, covered


@pytest.mark.parametrize("direction", ["reverse", "forward"])
def test_traces_of_products_cover_with_few_probes(direction):
    one = torch.randn(20, 20, generator=generator(1), dtype=torch.float64)
    one[:, 1:] = 0  # rank one
    truth, covered = float((one @ one.T @ one @ one.T).trace()), 0
    for seed in range(120):
        sign = (-1) ** seed
        covered += covering(
            ntkops.one_sided_product_trace(
                one, one, sign * one, one, direction=direction, num_passes=24, generator=generator(seed)
            ).interval,
            sign * truth,
            0,
        )
    assert scipy.stats.binom.cdf(covered, 120, 0.93) > 1e-2, covered
