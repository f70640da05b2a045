"""Weights and evidence together: noise of variance s² r / wᵢ, against the dense Gaussian process."""

import math

import pytest
import torch

from ntkops import KernelRidge

N, NEW = 12, 4


def problem(targets=2):
    generator = torch.Generator().manual_seed(3)
    x = torch.rand(N + NEW, 2, generator=generator, dtype=torch.float64)
    whole = torch.exp(-2 * torch.cdist(x, x).square()) + 0.1
    labels = torch.randn(N, targets, generator=generator, dtype=torch.float64)
    weights = 0.2 + 3 * torch.rand(N, generator=generator, dtype=torch.float64)
    return whole, labels, weights


def evidence(K, Y, noise):
    """The log density of all targets under N(0, s² (K + diag(noise))), s² the most likely one."""
    A = K + torch.diag(noise)
    count = Y.numel()
    scale = float((Y * torch.linalg.solve(A, Y)).sum()) / count
    logs = Y.shape[1] * float(torch.linalg.slogdet(A)[1])
    return -0.5 * (count * math.log(scale) + logs + count * (1 + math.log(2 * math.pi))), scale


@pytest.mark.parametrize("method", ["cholesky", "eigh", "cg"])
@pytest.mark.parametrize("targets", [1, 2])
def test_the_evidence_of_a_weighted_regression(method, targets):
    whole, Y, w = problem(targets)
    K = whole[:N, :N]
    fit = KernelRidge(0.05, relative=False, method=method).fit(K, Y, sample_weight=w)
    for ridge in (0.05, 0.4):
        exact, scale = evidence(K, Y, ridge / w)
        found = fit.log_marginal_likelihood(ridge)
        low, high = (float(end) for end in found.interval)
        assert low - 1e-6 <= exact <= high + 1e-6
        if found.exact:
            assert float(found) == pytest.approx(exact, abs=1e-8)
        if ridge == 0.05:
            assert fit.noise_scale_ == pytest.approx(math.sqrt(scale * ridge), rel=1e-6)


def test_the_ridge_of_most_evidence_is_that_of_the_dense_process():
    whole, Y, w = problem()
    K = whole[:N, :N]
    fit = KernelRidge("evidence").fit(K, Y, sample_weight=w)
    ridges, values = fit.ridge_path_.ridges, fit.ridge_path_.values
    exact = [evidence(K, Y, float(ridge) / w)[0] for ridge in ridges]
    torch.testing.assert_close(values, torch.tensor(exact, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    best = max(exact)
    around = [evidence(K, Y, fit.ridge_ * factor / w)[0] for factor in (0.9, 1.0, 1.1)]
    assert around[1] == pytest.approx(best, abs=1e-6) and around[1] >= max(around) - 1e-9


def test_deviations_of_a_weighted_regression():
    whole, Y, w = problem()
    K, cross, own = whole[:N, :N], whole[N:, :N], whole[N:, N:]
    fit = KernelRidge(0.1, relative=False, method="cholesky").fit(K, Y, sample_weight=w)
    mean, std = fit.predict(cross, prior=own, return_std=True)
    A = K + torch.diag(0.1 / w)
    _, scale = evidence(K, Y, 0.1 / w)
    torch.testing.assert_close(mean, cross @ torch.linalg.solve(A, Y), rtol=1e-9, atol=1e-9)
    exact = scale * (own - cross @ torch.linalg.solve(A, cross.T))
    spread = exact.diagonal().sqrt().unsqueeze(1).expand(-1, 2)
    torch.testing.assert_close(std, spread, rtol=1e-7, atol=1e-9)
    _, covariance = fit.predict(cross, prior=own, return_cov=True)
    torch.testing.assert_close(covariance.to_dense(), exact, rtol=1e-7, atol=1e-9)
    block = torch.randn(NEW, 3, dtype=torch.float64)
    torch.testing.assert_close(covariance @ block, exact @ block, rtol=1e-7, atol=1e-9)
