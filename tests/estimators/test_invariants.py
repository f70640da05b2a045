"""The estimate of least variance from one direction: unbiased, its jackknife, and better than pairs."""

import math

import pytest
import torch

import ntkops
from ntkops.errors import InputError
from ntkops.estimators._invariants import Invariants, RootOfSquare
from tests.estimators.problems import SPECTRA, Factored, covering, generator, repeated, with_spectrum


def invariants(one, two, size):
    def rows(part):
        return one[..., part, :].clone(), two[..., part, :].clone(), two.mT[..., part, :].clone()

    return Invariants.of(rows, one.shape[-1], size)


def drawn(n, m, runs, seed=0):
    """Probes on the sphere of radius √n, ``(runs, n, m)``."""
    probes = torch.randn(runs, n, m, generator=generator(seed), dtype=torch.float64)
    return probes * (math.sqrt(n) / probes.norm(dim=-2, keepdim=True))


def standardized(values, truth):
    return abs(float(values.mean() - truth)) / float(values.std() / math.sqrt(len(values)))


@pytest.mark.parametrize("m", [2, 3, 7])
def test_inner_products_and_squared_traces_are_unbiased_for_any_two_matrices(m):
    n, runs = 5, 60_000
    A, B = torch.randn(2, n, n, generator=generator(1), dtype=torch.float64)
    A, B = A + torch.eye(n), B + 0.5 * A
    probes = drawn(n, m, runs)
    moment = invariants(probes.mT @ A @ probes, probes.mT @ B @ probes, n)
    assert standardized(moment.value(), (A * B).sum()) < 4
    assert standardized(moment.squared_trace(), A.trace() * B.trace()) < 4


@pytest.mark.parametrize("name", SPECTRA)
def test_on_gaussian_lengths_the_mean_is_the_form_of_least_variance(name):
    # Given the directions, the mean of the Gaussian form over the lengths of the probes is ours. Squares of
    # lengths have mean 1, and the square of one has mean (n + 2) / n.
    n, m = 12, 4
    directions = drawn(n, m, 1, seed=3)[0]
    W = directions.T @ with_spectrum(SPECTRA[name](n)) @ directions
    ours = invariants(W.unsqueeze(0), W.unsqueeze(0), n)
    mean = 1 + 2 / n * torch.eye(m, dtype=torch.float64)
    squares, traces = (mean * W.square()).sum(), (mean * torch.outer(W.diagonal(), W.diagonal())).sum()
    gaussian = (squares - traces / m) / (m**2 + m - 2)
    torch.testing.assert_close(ours.value()[0], gaussian, rtol=1e-12, atol=1e-14)
    squared_trace = traces / m**2 - 2 * gaussian / m
    torch.testing.assert_close(ours.squared_trace()[0], squared_trace, rtol=1e-12, atol=1e-14)


def test_leaving_out_by_brute_force(monkeypatch):
    one, two = torch.randn(2, 3, 6, 6, generator=generator(0), dtype=torch.float64)
    whole = invariants(one, two, 9)
    monkeypatch.setattr("ntkops.estimators._invariants._ROWS", 4)
    sliced = invariants(one, two, 9)
    torch.testing.assert_close(whole.straight, sliced.straight)
    torch.testing.assert_close(whole.crossed, sliced.crossed)
    for left_out in range(6):
        rest = [i for i in range(6) if i != left_out]
        less = invariants(one[:, rest][..., rest], two[:, rest][..., rest], 9)
        torch.testing.assert_close(whole.without(0)[:, left_out], less.value())
        torch.testing.assert_close(whole.squared_trace_without()[:, left_out], less.squared_trace())
        expected = RootOfSquare(less).value()
        torch.testing.assert_close(RootOfSquare(whole).without(0)[:, left_out], expected)


@pytest.mark.parametrize("name", SPECTRA)
def test_the_variance_is_below_that_of_pairs(name):
    n, m, runs = 40, 12, 5_000
    values = SPECTRA[name](n)
    probes = drawn(n, m, runs)
    W = probes.mT @ (values.unsqueeze(-1) * probes)
    truth = values.square().sum()
    ours = invariants(W, W, n).value()
    off = W.square().sum((-2, -1)) - W.diagonal(dim1=-2, dim2=-1).square().sum(-1)
    shared = off / (m * (m - 1))
    apart = W[:, : m // 2, m // 2 :].square()  # u and v drawn apart
    single = apart.diagonal(dim1=-2, dim2=-1).mean(-1)  # Proposition 1: each u with one v
    estimates = ours, shared, apart.mean((-2, -1)), single
    errors = [float((found - truth).square().mean()) for found in estimates]
    assert errors == sorted(errors)
    assert errors[3] / errors[0] > 1.7


@pytest.mark.parametrize("method", ["reverse", "forward"])
def test_rank_one_has_effective_rank_one_at_every_number_of_probes(method):
    K = Factored(torch.arange(1.0, 9.0, dtype=torch.float64).unsqueeze(-1))
    if method == "forward":  # one parameter: nothing is left to chance
        assert float(ntkops.frobenius_norm(K, method=method, num_passes=2)) == pytest.approx(204)
    for passes in (2, 3, 8, 40):
        found = ntkops.effective_rank(K, method=method, num_passes=passes, generator=generator(passes))
        assert float(found) == pytest.approx(1, abs=0.3 if method == "reverse" else 1e-12)


@pytest.mark.parametrize("method", ["reverse", "forward"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_inner_products_of_kernels_are_unbiased(method, symmetric):
    draw = generator(2)
    L1, R1, L2, R2 = torch.randn(4, 6, 4, generator=draw, dtype=torch.float64)
    L2, R2 = L2 + L1, R2 + R1
    L1, R1, L2, R2 = (repeated(factor, 400) for factor in (L1, R1, L2, R2))
    A, B = (Factored(L1), Factored(L2)) if symmetric else (Factored(L1, R1), Factored(L2, R2))
    truth = float((A.matrix[0] * B.matrix[0]).sum())
    found = ntkops.inner(A, B, method=method, num_passes=32 * 400, generator=generator(0))
    assert standardized(found.value, truth) < 4
    assert covering(found.interval, truth, 0) >= 366  # .95 at level .001


@pytest.mark.parametrize("method", ["rhutch", "fhutch"])
def test_fine_tolerances_are_refused_without_a_limit_of_passes(method):
    K = Factored(torch.eye(6, dtype=torch.float64))
    with pytest.raises(InputError, match="'exact', 'stratified' or 'sketch'"):
        ntkops.trace(K, method=method, rtol=9e-3)
    assert ntkops.trace(K, method=method, rtol=9e-3, num_passes=200).passes <= 200


def test_results_show_themselves_in_a_line():
    K = Factored(torch.randn(30, 8, generator=generator(0), dtype=torch.float64)).matrix
    shown = [
        repr(ntkops.eigsh(K, 3)),
        repr(ntkops.truncation_rank(K, epsilon=0.1)),
        repr(ntkops.data_redundancy(K, epsilon=0.1)),
        repr(ntkops.spectral_density(K)),
    ]
    assert all(len(line) < 160 and "\n" not in line and "tensor" not in line for line in shown), shown
