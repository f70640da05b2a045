"""Coverage and reconstruction error against explicit gradients, and what Ky Fan says of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ntkops
from ntkops import distill
from ntkops.errors import DtypeError, InputError, ShapeError, SingularKernelError, ZeroKernelError
from tests.distill.clustered import clustered
from tests.estimators.problems import generator


def stacked(features: Tensor) -> Tensor:
    """Return the gradients of all classes side by side, ``(m, C P)``."""
    return features.transpose(0, 1).flatten(1)


def explicit(features: Tensor, U: Tensor, centred: bool) -> tuple[Tensor, Tensor]:
    """Return coverage and reconstruction error of ``(m, P)`` gradients."""
    basis = torch.linalg.qr(features.mT @ U).Q
    shown = features - features.mean(0) if centred else features
    inside = shown @ basis @ basis.mT
    return (
        inside.square().sum() / shown.square().sum(),
        (shown - inside).square().sum() / len(shown),
    )


@pytest.mark.parametrize("centred", [False, True])
def test_stacked_and_class_coverage_are_those_of_the_gradients(centred: bool) -> None:
    problem = clustered()
    U = torch.randn(40, 6, generator=generator(1), dtype=torch.float64)
    for per, wanted in (
        ("stacked", explicit(stacked(problem.features), U, centred)),
        (
            "class",
            [torch.stack(v) for v in zip(*(explicit(f, U, centred) for f in problem.features), strict=True)],
        ),
    ):
        options = {"per": per, "centred": centred}
        found = distill.variance_coverage(problem.kernels, U, **options)
        missed = distill.reconstruction_error(problem.kernels, U, **options)
        assert torch.allclose(found, wanted[0], atol=1e-10)
        assert torch.allclose(missed, wanted[1], atol=1e-9)


def test_one_kernel_is_its_own_stack() -> None:
    problem = clustered()
    U = torch.randn(40, 6, generator=generator(1), dtype=torch.float64)
    kernel = problem.kernels[0]
    assert torch.equal(
        distill.variance_coverage(kernel, U), distill.variance_coverage(kernel, U, per="class")
    )
    per_class = distill.variance_coverage(problem.kernels, U, per="class")
    assert torch.allclose(distill.variance_coverage(kernel, U), per_class[0], atol=1e-12)


def test_coefficients_of_each_class() -> None:
    problem = clustered()
    U = torch.randn(3, 40, 4, generator=generator(1), dtype=torch.float64)
    found = distill.variance_coverage(problem.kernels, U, per="class")
    wanted = [explicit(f, u, False)[0] for f, u in zip(problem.features, U, strict=True)]
    assert torch.allclose(found, torch.stack(wanted), atol=1e-10)


def test_lengths_and_dependent_columns_do_not_matter() -> None:
    problem = clustered()
    U = torch.randn(40, 4, generator=generator(1), dtype=torch.float64)
    wanted = distill.variance_coverage(problem.kernels, U)
    scaled = U * torch.tensor([1e-12, 1.0, 1e9, 1e-3])
    again = torch.cat([U, U[:, :2] + U[:, 2:]], dim=1)
    assert torch.allclose(distill.variance_coverage(problem.kernels, scaled), wanted, atol=1e-10)
    assert torch.allclose(distill.variance_coverage(problem.kernels, again), wanted, atol=1e-10)


@pytest.mark.parametrize("scale", [1e-20, 1e18])
def test_float32_at_any_scale(scale: float) -> None:
    problem = clustered()
    U = torch.randn(40, 6, generator=generator(1), dtype=torch.float64)
    wanted = distill.variance_coverage(problem.kernels, U, centred=True)
    found = distill.variance_coverage((problem.kernels * scale).float(), U.float(), centred=True)
    assert float(found) == pytest.approx(float(wanted), abs=1e-5)


def test_only_products_are_needed() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2)).double()
    inputs = torch.randn(10, 3).double()
    U = torch.randn(10, 3).double()
    dense = ntkops.ntk(model, inputs, outputs="each").to_dense()
    lazy = ntkops.ntk(model, inputs, outputs="each", max_dense_bytes=0)
    for per in ("stacked", "class"):
        for centred in (False, True):
            options = {"per": per, "centred": centred}
            assert torch.allclose(
                distill.variance_coverage(lazy, U, **options),
                distill.variance_coverage(dense, U, **options),
                atol=1e-9,
            )


def unequal(seed: int) -> Tensor:
    """Return clustered kernels of three classes with a common mean and traces of 10, 1 and 0.1."""
    draw = generator(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    decay = 0.8 ** torch.arange(25)
    labels = torch.arange(40) % 4
    features = (normal(3, 40, 25) + 2 * normal(3, 4, 25)[:, labels]) * decay + normal(3, 1, 25)
    return features @ features.mT * torch.tensor([10.0, 1.0, 0.1]).double()[:, None, None]


def test_no_set_covers_more_than_principal_components() -> None:
    """Stacked and uncentred this is Ky Fan's theorem; the other coverages break it, and are expected to."""
    measures = {"stacked": {}, "class": {"per": "class"}, "centred": {"centred": True}}
    beaten = dict.fromkeys(measures, 0)
    count = 0
    for seed in range(3):
        kernels = unequal(seed)
        for H in (2, 4, 6):
            labels = distill.spectral_clusters(kernels, H, generator=generator(seed))
            for tau_v in (0.3, 0.5, 0.7, 0.9):
                found = distill.local_global(kernels, torch.zeros(40, 3).double(), labels, tau_v, 0.9)
                pca = distill.synthesize(kernels, found.size, "pca", generator=generator(0))
                count += found.size < 40
                for name, options in measures.items():
                    first, second = (
                        float(distill.variance_coverage(kernels, one, **options).mean())
                        for one in (found, pca)
                    )
                    beaten[name] += first > second + 1e-10
    assert count == 36
    assert beaten["stacked"] == 0
    assert beaten["class"] > 5
    assert beaten["centred"] > 0


def test_bad_input_is_named() -> None:
    problem = clustered()
    U = torch.ones(40, 2).double()
    with pytest.raises(InputError, match="per='mean'"):
        distill.variance_coverage(problem.kernels, U, per="mean")
    with pytest.raises(ShapeError, match="39"):
        distill.variance_coverage(problem.kernels, U[:39])
    with pytest.raises(DtypeError, match="float32"):
        distill.variance_coverage(problem.kernels, U.float())
    with pytest.raises((ZeroKernelError, SingularKernelError)):
        distill.variance_coverage(0 * problem.kernels, U)
    with pytest.raises(ShapeError, match="fit"):
        distill.variance_coverage(problem.kernels[0], U.expand(2, 40, 2))
