"""What a distilled set is worth beyond its own targets."""

from __future__ import annotations

import pytest
import torch

import ntkops
from ntkops import distill
from ntkops.errors import DenseMemoryError, InputError
from tests.distill.clustered import clustered
from tests.estimators.problems import generator


def halves() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return train and cross kernel, prior variances and new features of one class, split in two."""
    problem = clustered(size=80, classes=1, spread=1.5)
    features = problem.features[0]
    old, new = features[:40], features[40:]
    return old @ old.mT, new @ old.mT, new.square().sum(-1), features


def test_sets_for_one_task_may_fail_others() -> None:
    K, K_cross, K_diag, features = halves()
    weights = torch.randn(25, 8, generator=generator(3), dtype=torch.float64)
    own, other = (features @ weights).split(4, dim=1)
    galerkin = distill.synthesize(K, 4, "galerkin", Y=own[:40])
    pca = distill.synthesize(K, 12, "pca", generator=generator(0))

    def accuracy(chosen: distill.Distilled, values: torch.Tensor) -> float:
        return distill.transfer_accuracy(K, chosen, values[:40], K_cross, values[40:].argmax(-1))

    assert accuracy(galerkin, own) == 1.0
    assert accuracy(galerkin, other) < 0.65
    assert accuracy(pca, other) > 0.8
    errors = [
        float(distill.posterior_variance_error(K, one, K_cross, K_diag).relative) for one in (galerkin, pca)
    ]
    assert errors[0] > 2 * errors[1]


@pytest.mark.parametrize("fit", ["nystrom", "sketch"])
def test_all_points_leave_no_error(fit: str) -> None:
    K, K_cross, K_diag, _ = halves()
    everything = distill.Distilled.of(K, torch.arange(40))
    found = distill.posterior_variance_error(K, everything, K_cross, K_diag, ridge=1e-2, fit=fit)
    assert float(found.relative) < 1e-6


def test_variance_against_explicit_features() -> None:
    K, K_cross, K_diag, features = halves()
    old, new = features[:40], features[40:]
    U = distill.synthesize(K, 5, "pca", generator=generator(0)).U
    ridge = 1e-2 * float(K.diagonal().mean())
    eye = torch.eye(25).double()
    exact = ridge * (new @ torch.linalg.solve(old.mT @ old + ridge * eye, new.mT)).diagonal()
    small = old.mT @ U @ U.mT @ old
    sketched = ridge * (new @ torch.linalg.solve(small + ridge * eye, new.mT)).diagonal()
    found = distill.posterior_variance_error(
        K, distill.Distilled.of(K, U), K_cross, K_diag, ridge=1e-2, fit="sketch"
    )
    assert torch.allclose(found.variance, exact, atol=1e-8)
    assert torch.allclose(found.distilled, sketched, atol=1e-8)
    wanted = (sketched - exact).abs().mean() / exact.mean()
    assert float(found.relative) == pytest.approx(float(wanted), rel=1e-6)


def test_conditioning_on_less_leaves_more_variance() -> None:
    K, K_cross, K_diag, _ = halves()
    for s in (1, 4, 12):
        U = torch.linalg.qr(torch.randn(40, s, generator=generator(s), dtype=torch.float64)).Q
        found = distill.posterior_variance_error(
            K, distill.Distilled.of(K, U), K_cross, K_diag, ridge=1e-2, fit="sketch"
        )
        assert bool((found.distilled >= found.variance - 1e-9).all())


def test_variances_of_each_class() -> None:
    problem = clustered()
    pca = distill.synthesize(problem.kernels, 6, "pca", generator=generator(0))
    diagonal = problem.kernels.diagonal(dim1=-2, dim2=-1)
    found = distill.posterior_variance_error(problem.kernels, pca, problem.kernels, diagonal)
    assert found.relative.shape == (3,)
    assert found.variance.shape == found.distilled.shape == (40, 3)


def test_nystrom_error_in_three_norms() -> None:
    problem = clustered()
    U = torch.randn(40, 6, generator=generator(1), dtype=torch.float64)
    covered = distill.variance_coverage(problem.kernels, U, per="class")
    assert torch.allclose(distill.nystrom_error(problem.kernels, U), 1 - covered)
    K = problem.kernels
    approximation = K @ U @ torch.linalg.inv(U.mT @ K @ U) @ U.mT @ K
    for norm, order in (("trace", "nuc"), ("frobenius", "fro"), ("spectral", 2)):
        wanted = torch.linalg.matrix_norm(K - approximation, ord=order) / torch.linalg.matrix_norm(
            K, ord=order
        )
        assert torch.allclose(distill.nystrom_error(K, U, norm=norm), wanted, atol=1e-9)


def test_trace_norm_is_lazy_and_the_others_ask() -> None:
    torch.manual_seed(0)
    K = ntkops.ntk(torch.nn.Linear(3, 2), torch.randn(6, 3), outputs="each", max_dense_bytes=0)
    U = torch.randn(6, 2)
    assert distill.nystrom_error(K, U).shape == (2,)
    with pytest.raises(DenseMemoryError):
        distill.nystrom_error(K, U, norm="spectral")


def test_bad_options_are_named() -> None:
    K, K_cross, K_diag, _ = halves()
    chosen = distill.Distilled.of(K, [0, 1])
    with pytest.raises(InputError, match="norm='max'"):
        distill.nystrom_error(K, chosen, norm="max")
    with pytest.raises(InputError, match="ridge=0"):
        distill.posterior_variance_error(K, chosen, K_cross, K_diag, ridge=0)
