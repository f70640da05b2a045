"""Traces of functions: brackets, intervals, coverage."""

import math

import pytest
import scipy.stats
import torch

from ntkops.errors import InputError
from ntkops.spectra import function_trace, guarded_freedom, scaled_chi_square, scaled_chi_squares
from ntkops.vectors import Space
from tests.estimators.problems import SPECTRA, generator, with_spectrum
from tests.pairs import pairs

FUNCTIONS = {
    "logarithm": lambda ridge: lambda x: torch.log1p(x / ridge),
    "ratio": lambda ridge: lambda x: x / (x + ridge),
}


def trace_of(values, function, seed, **options):
    """Directions are uniform, so that a diagonal matrix stands for any rotation of it."""
    values = values.double()
    return function_trace(
        lambda block: values.unsqueeze(-1).to(block.dtype) * block,
        Space(len(values), options.pop("dtype", torch.float64)),
        function,
        generator=generator(seed),
        **options,
    )


def least_hits(count):
    """The fewest hits that a coverage of 0.95 does not contradict at level 0.001."""
    return int(scipy.stats.binom.ppf(0.001, count, 0.95))


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"max_products": 120}, {"rtol": 0.1, "max_products": 4000}], ids=str)
@pytest.mark.parametrize("kind", FUNCTIONS)
@pytest.mark.parametrize("spectrum", [*SPECTRA, "rank one", "outlier"])
def test_intervals_cover(spectrum, kind, options):
    n = 80
    made = {
        "rank one": lambda n: (torch.arange(n) == 0).double(),
        "outlier": lambda n: torch.ones(n).double(),
    }
    values = {**SPECTRA, **made}[spectrum](n)
    if spectrum == "outlier":
        values[0] = 1e3
    function = FUNCTIONS[kind](float(values.mean()))
    exact, hits, near = float(function(values).sum()), 0, 0
    for seed in range(500):
        found = trace_of(values, function, seed, **options)
        rounding = 1e-12 * exact
        hits += found.interval[0] - rounding <= exact <= found.interval[1] + rounding
        near += not found.converged or abs(found.value - exact) <= options.get("rtol", 1.0) * exact
    assert hits >= least_hits(500) and near >= least_hits(500)


@pytest.mark.parametrize("rank", [1, 3, 30])
@pytest.mark.parametrize("probes", [4, 16])
def test_matched_squares_cover(rank, probes):
    squares = torch.randn(2000, probes, rank, generator=generator(rank), dtype=torch.float64).square()
    weights = torch.linspace(1, 2, rank, dtype=torch.float64)
    forms = (squares * weights).sum(-1).mean(-1)
    variance = 2 * (squares * weights.square()).sum(-1).mean(-1) / probes
    low, high = scaled_chi_squares(forms, variance, probes, 0.05)
    hits = (low <= weights.sum()) & (weights.sum() <= high)
    assert int(hits.sum()) >= least_hits(2000)
    for i in range(20):  # one by one as all at once
        factors = scaled_chi_square(guarded_freedom(float(forms[i]), float(variance[i]), probes), 0.05)
        assert [f * float(forms[i]) for f in factors] == pytest.approx([float(low[i]), float(high[i])])


@pytest.mark.parametrize(
    "scale, dtype, deflation",
    pairs([1e-20, 1.0, 1e18], [torch.float64, torch.float32], [0, 3, None]),
    ids=str,
)
def test_scales_and_deflation(scale, dtype, deflation):
    values = SPECTRA["exponential"](50) * scale
    function = FUNCTIONS["logarithm"](1e-3 * scale)
    found = trace_of(values, function, 0, rtol=0.02, deflation=deflation, dtype=dtype)
    exact = float(function(values).sum())
    assert found.converged and found.interval[0] <= exact <= found.interval[1]
    assert abs(found.value - exact) <= 0.02 * exact


def test_everything_split_off_leaves_nothing_to_chance():
    values = torch.tensor([4.0, 2.0, 1.0])
    function = FUNCTIONS["ratio"](1.0)
    found = trace_of(values, function, 0, deflation=3, max_products=50)
    assert found.probes == 0 and found.stderr == 0
    assert found.value == pytest.approx(float(function(values.double()).sum()), rel=1e-9)


@pytest.mark.parametrize("values", [torch.zeros(20), torch.full((20,), 3.0), torch.ones(1)])
def test_flat_spectra_are_exact(values):
    function = FUNCTIONS["logarithm"](0.5)
    found = trace_of(values, function, 0, rtol=1e-6)
    assert found.value == pytest.approx(float(function(values.double()).sum()), rel=1e-12)
    assert found.converged and found.stderr <= 1e-6


def test_absolute_tolerance_where_the_value_vanishes():
    values = SPECTRA["power law"](100)
    function = FUNCTIONS["logarithm"](0.1)
    exact = float(function(values).sum())
    found = trace_of(values, function, 0, offset=-exact, atol=0.5)
    assert found.converged and abs(found.value) <= 0.5
    stuck = trace_of(values, function, 0, offset=-exact, rtol=0.01, max_products=500)
    assert not stuck.converged and stuck.interval[0] <= 0 <= stuck.interval[1]


def test_rounding_of_products_is_part_of_the_interval():
    """A ridge below the rounding of float32 products: no number of probes may claim an accuracy."""
    K = with_spectrum(SPECTRA["exponential"](200)).float()
    found = function_trace(
        lambda block: K @ block,
        Space(200, torch.float32),
        FUNCTIONS["logarithm"](1e-9),
        generator=generator(0),
        rtol=1e-2,
        max_products=20_000,
    )
    assert not found.converged and found.products < 10_000
    exact = float(FUNCTIONS["logarithm"](1e-9)(SPECTRA["exponential"](200)).sum())
    assert found.interval[0] <= exact <= found.interval[1]


def test_what_cannot_end_is_refused():
    with pytest.raises(InputError, match="nothing else ends"):
        trace_of(torch.ones(5), torch.log1p, 0)
    with pytest.raises(InputError, match="not enough"):
        trace_of(torch.ones(5), torch.log1p, 0, max_products=3)
    assert math.isfinite(trace_of(torch.ones(5), torch.log1p, 0, max_products=8).value)
