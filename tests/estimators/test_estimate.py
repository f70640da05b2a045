"""What an estimate is as a number and as text: exact arithmetic, intervals that decide and are shown."""

from __future__ import annotations

import math
import operator

import numpy as np
import pytest
import torch

from ntkops.errors import EstimateError, ShapeError
from ntkops.results import Estimate
from ntkops.results.estimate import format_with_interval


def exact(value: float | list[float], passes: int = 3) -> Estimate:
    return Estimate.of_exact(torch.tensor(value, dtype=torch.float64), passes=passes, seconds=1.0)


def noisy(value: float, low: float, high: float, **more) -> Estimate:
    ends = torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64)
    error = torch.tensor((high - low) / 8, dtype=torch.float64)
    return Estimate(torch.tensor(value, dtype=torch.float64), error, ends, "hutch++", False, 9, **more)


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: a + b,
        lambda a, b: a - b,
        lambda a, b: a * b,
        lambda a, b: a / b,
        lambda a, b: a**2 + 1 - 3 * b,
        lambda a, b: 1 / a,
        lambda a, b: 1 - a / (a + b),
        lambda a, b: np.float32(0.5) * a,
        lambda a, b: torch.tensor(0.5, dtype=torch.float64) * a - b,
        lambda a, b: sum([a, b]),
        lambda a, b: max([a, b]),
    ],
)
def test_exact_estimates_are_numbers(function):
    a, b = exact(7.0), exact(2.5)
    found = function(a, b)
    assert isinstance(found, Estimate) and found.exact
    wanted = float(function(torch.tensor(7.0, dtype=torch.float64), torch.tensor(2.5, dtype=torch.float64)))
    assert (
        float(found)
        == float(found.interval[0])
        == float(found.interval[1])
        == pytest.approx(wanted, rel=1e-15)
    )
    assert float(found.stderr) == 0


def test_passes_and_seconds_of_both_are_added():
    ratio = exact(7.0, passes=3) / exact(2.0, passes=4)
    assert (ratio.passes, ratio.seconds, ratio.method) == (7, 2.0, "exact")


def test_exact_vectors_meet_entry_by_entry():
    shares = exact([1.0, 2.0]) / exact([4.0, 4.0])
    assert shares.value.tolist() == [0.25, 0.5] and shares.exact
    assert (exact([1.0, 2.0]) * exact(3.0)).value.tolist() == [3.0, 6.0]
    with pytest.raises(ShapeError, match=r"\(2,\) and \(3,\)"):
        exact([1.0, 2.0]) + exact([1.0, 2.0, 3.0])


# Each affine map, with the ends of the interval and the scale of the standard error.
@pytest.mark.parametrize(
    ("function", "value", "ends", "scale"),
    [
        (lambda e, x: e + 1e20 * x, 2e20, (2e20, 2e20), 1),
        (lambda e, x: e - x, 8, (6, 18), 1),
        (lambda e, x: x - e, -8, (-18, -6), 1),
        (lambda e, x: x * e, 20, (16, 40), 2),
        (lambda e, x: e * -x, -20, (-40, -16), 2),
        (lambda e, x: e / x, 5, (4, 10), 0.5),
        (lambda e, x: -e, -10, (-20, -8), 1),
    ],
)
@pytest.mark.parametrize("number", [2, 2.0, exact(2.0)])
def test_exact_numbers_shift_and_scale_an_interval(function, value, ends, scale, number):
    e = noisy(10.0, 8.0, 20.0)
    found = function(e, number)
    assert not found.exact and found.method == "hutch++"
    assert float(found) == pytest.approx(value) and float(found.stderr) == scale * float(e.stderr)
    assert tuple(map(float, found.interval)) == pytest.approx(ends)


@pytest.mark.parametrize(
    "function",
    [operator.add, operator.sub, operator.mul, operator.truediv, lambda a, b: 1 / a, lambda a, b: a**2],
)
def test_inexact_estimates_do_not_combine(function):
    e = noisy(10.0, 8.0, 20.0)
    with pytest.raises(EstimateError, match="alignment"):
        function(e, e)
    if function is operator.truediv:
        with pytest.raises(EstimateError, match="alignment"):
            exact(2.0) / e


@pytest.mark.parametrize("strange", ["a", None, [1.0], 1j])
def test_what_is_no_number_is_pythons_own_error(strange):
    for function in (operator.add, operator.mul, operator.truediv, operator.lt):
        with pytest.raises(TypeError):
            function(exact(1.0), strange)


@pytest.mark.parametrize("compare", [operator.lt, operator.le, operator.gt, operator.ge])
def test_comparisons_answer_where_the_interval_decides(compare):
    e = noisy(10.0, 8.0, 20.0)
    for other in (7.9, 20.1, -math.inf, exact(0.0), noisy(30.0, 21.0, 40.0), noisy(1.0, 0.0, 7.0)):
        assert compare(e, other) is compare(10.0, float(other))
    for other in (8.1, 10.0, exact(19.9), noisy(21.0, 19.0, 40.0)):
        with pytest.raises(EstimateError, match="does not decide"):
            compare(e, other)
    assert compare(exact(2.0), 2) is compare(2, 2)
    with pytest.raises(EstimateError, match="scalar"):
        compare(exact([1.0, 2.0]), 0)


def test_an_end_decides_what_holds_for_all_of_an_interval():
    assert noisy(10.0, 8.0, 20.0) >= 8 and noisy(10.0, 8.0, 20.0) <= 20
    with pytest.raises(EstimateError):
        noisy(10.0, 8.0, 20.0) > 8  # noqa: B015


def test_item_round_and_arrays():
    e = noisy(12.3456, 11.0, 13.0)
    assert (e.item(), round(e), round(e, 2)) == (12.3456, 12, 12.35)
    assert np.array([e], dtype=float).tolist() == [12.3456]
    with pytest.raises(EstimateError, match="scalar"):
        exact([1.0, 2.0]).item()


def test_what_is_printed_is_the_interval():
    e = noisy(20982.8, 15321.0, 26700.0)
    assert str(e) == repr(e) == f"{e}" == "21000 (95 %: 15300 to 26700, hutch++, 9 passes)"
    assert f"{e:.1f}" == "20982.8 (95 %: 15321.0 to 26700.0)"
    assert "not converged" in str(noisy(1.0, 0.5, 2.0, converged=False))
    assert str(Estimate.of_exact(torch.tensor(2.0), passes=1)) == "2 (exact, 1 pass)"
    assert str(exact(20095.25)) == "20095.2 (exact, 3 passes)" and f"{exact(20095.25):10.3e}" == " 2.010e+04"
    assert str(noisy(1.0, -math.inf, math.inf)) == "1 (95 %: -inf to inf, hutch++, 9 passes)"


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ((1234.5678, 1234.1, 1235.1), ("1234.57", "1234.10", "1235.10")),
        ((2233.7741, 2233.7741 - 3e-9, 2233.7741 + 3e-9), ("2233.774", "2233.774", "2233.774")),
        ((1.23456e9, 1.22e9, 1.25e9), ("1.235e+09", "1.220e+09", "1.250e+09")),
        ((1.23456e-9, 1.1e-9, 1.4e-9), ("1.23e-09", "1.10e-09", "1.40e-09")),
        ((0.0, -1.0, 1.0), ("0.0", "-1.0", "1.0")),
        ((0.0, 0.0, 0.0), ("0", "0", "0")),
        ((5.0, 5.0, 5.0), ("5", "5", "5")),
        ((math.nan, math.nan, math.nan), ("nan", "nan", "nan")),
    ],
)
def test_the_interval_decides_the_digits(numbers, text):
    assert format_with_interval(*numbers) == text


def test_vectors_are_printed_short():
    long = torch.linspace(0.1, 12.0, 3000, dtype=torch.float64)
    e = Estimate(long, 0 * long + 0.1, (long - 0.4, long + 0.4), "hutchinson", False, 64)
    assert repr(e) == "Estimate of shape (3000,), 0.1 to 12, 95 % within ± 0.4 (hutchinson, 64 passes)"
    assert str(exact([1.0, 2.0])) == "Estimate of shape (2,), 1 to 2, exact (3 passes)"
