"""Properties (A) and (B): what holds on every partition, what does not, and the maps of figure 4."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from ntkops import distill
from ntkops.errors import InputError, ShapeError
from tests.distill.clustered import clustered
from tests.estimators.problems import SPECTRA, generator, with_spectrum


def naive(kernel: Tensor, labels: Tensor, epsilon: float) -> tuple[list[float], Tensor]:
    """Return (A) of each cluster and |Π_loc u_j|², with projectors as dense matrices."""

    def pairs(matrix: Tensor) -> tuple[Tensor, Tensor, int]:
        values, vectors = torch.linalg.eigh(matrix)
        values, vectors = values.flip(0).clamp(min=0), vectors.flip(1)
        rank = int((values.cumsum(0) / values.sum() < 1 - epsilon).sum()) + 1
        return values, vectors, rank

    _, vectors, rank = pairs(kernel)
    inside, projector = [], torch.zeros_like(kernel)
    for h in labels.unique():
        index = (labels == h).nonzero().squeeze(-1)
        own, basis, kept = pairs(kernel[index][:, index])
        restricted = vectors[index, :rank]
        onto = restricted @ torch.linalg.pinv(restricted)
        share = (onto @ basis[:, :kept]).square().sum(0)
        inside.append(float((own[:kept] * share).sum() / own[:kept].sum()))
        block = basis[:, :kept] @ basis[:, :kept].mT
        projector[index[:, None], index] = block
    leading = vectors[:, :rank]
    return inside, (projector @ leading).square().sum(0)


@pytest.mark.parametrize("epsilon", [0.05, 0.2])
def test_against_dense_projectors(epsilon: float) -> None:
    problem = clustered(spread=2.0)
    kernel = problem.kernels[0]
    found = distill.local_global_properties(kernel, problem.clusters, epsilon)
    inside, coverage = naive(kernel, problem.clusters, epsilon)
    assert found.local_containment.tolist() == pytest.approx(inside, abs=1e-9)
    assert torch.allclose(found.coverage, coverage, atol=1e-9)
    assert found.mean_gap == pytest.approx(float((1 - coverage).mean()), abs=1e-9)


def test_bounds_hold_on_two_hundred_random_partitions() -> None:
    epsilon, worst, single = 0.05, {"A": 1.0, "truncated": 1.0, "B": 0.0}, 1.0
    for number in range(200):
        draw = generator(number)
        size = int(torch.randint(20, 50, (), generator=draw))
        kernel = with_spectrum(list(SPECTRA.values())[number % len(SPECTRA)](size), seed=number)
        labels = torch.randint(int(torch.randint(2, 9, (), generator=draw)), (size,), generator=draw)
        found = distill.local_global_properties(kernel, labels, epsilon)
        worst["A"] = min(worst["A"], found.untruncated_containment)
        worst["truncated"] = min(worst["truncated"], found.pooled_containment)
        worst["B"] = max(worst["B"], found.weighted_gap)
        single = min(single, float(found.local_containment.min()))
        assert found.untruncated_containment >= found.untruncated_bound - 1e-12
        assert found.pooled_containment >= found.pooled_bound - 1e-12
        assert found.weighted_gap <= found.weighted_gap_bound + 1e-12
    assert worst["A"] >= 0.95
    assert worst["truncated"] >= 1 - 0.05 / 0.95
    assert worst["B"] <= 0.05 / 0.95


def test_a_single_cluster_can_be_outside_altogether() -> None:
    """One sample holds 4 % of the trace in a direction of its own: truncation at 5 % drops it."""
    kernel = torch.diag(torch.tensor([50.0, 46.0, 4.0])).double()
    found = distill.local_global_properties(kernel, [0, 0, 1], 0.05)
    assert found.local_containment.tolist() == pytest.approx([1.0, 0.0])
    assert found.untruncated_containment == pytest.approx(0.96)
    assert found.pooled_containment == pytest.approx(0.96)


def test_structureless_data_show_the_gap_that_the_paper_reads_as_structure() -> None:
    features = torch.randn(300, 60, generator=generator(0), dtype=torch.float64)
    features = features * 0.93 ** torch.arange(60)
    kernel = features @ features.mT
    labels = torch.arange(300) % 10
    found = distill.local_global_properties(kernel, labels, 0.05, num_random=3, generator=generator(0))
    assert found.weighted_gap < 0.0526
    assert found.mean_gap > 2 * found.weighted_gap
    assert found.mean_gap > 0.07
    for other in found.random:
        assert abs(other.mean_gap - found.mean_gap) < 0.02  # a partition without meaning is like any other


def test_a_random_baseline_has_the_same_sizes_and_passes_a_too() -> None:
    problem = clustered(size=60, spread=0.5)
    found = distill.local_global_properties(
        problem.kernels, problem.clusters, num_random=5, generator=generator(0)
    )
    assert len(found.random) == 5
    assert found.pooled_containment > 0.99
    assert min(other.pooled_containment for other in found.random) > 0.99  # (A) does not tell them apart
    assert all(sum(found.local_ranks) < sum(other.local_ranks) for other in found.random)  # ranks do


def test_clusters_may_be_found() -> None:
    problem = clustered(spread=0.2)
    first = distill.local_global_properties(problem.kernels, 4, generator=generator(0))
    given = distill.local_global_properties(problem.kernels, problem.clusters)
    assert first.pooled_containment == pytest.approx(given.pooled_containment, abs=1e-12)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, True, "5%"])
def test_epsilon_is_a_share(epsilon: float) -> None:
    with pytest.raises(InputError, match="epsilon="):
        distill.local_global_properties(torch.eye(4), [0, 0, 1, 1], epsilon)
    with pytest.raises(InputError, match="epsilon="):
        distill.containment(torch.eye(4), [0, 0, 1, 1], epsilon)


def test_bad_numbers_are_named() -> None:
    with pytest.raises(InputError, match="num_random=-1"):
        distill.local_global_properties(torch.eye(4), [0, 0, 1, 1], num_random=-1)
    with pytest.raises(ShapeError, match=r"\(4,\)"):
        distill.containment(torch.eye(4), [0, 0, 1])


def test_containment_maps() -> None:
    problem = clustered(spread=2.0)
    kernel, labels = problem.kernels[1], problem.clusters
    maps = distill.containment(kernel, labels, 0.1)
    found = distill.local_global_properties(kernel, labels, 0.1)
    assert maps.cumulative.shape == maps.variance.shape == maps.energy.shape == (4, found.global_rank)
    assert torch.allclose(maps.cumulative[:, -1], found.local_containment, atol=1e-9)
    assert bool((maps.cumulative.diff(dim=1) >= -1e-12).all())
    assert torch.allclose(maps.energy.sum(0), torch.ones(found.global_rank).double())
    assert torch.allclose(maps.union, found.coverage, atol=1e-12)
    assert float((1 - maps.alignment.amax(0)).mean()) == pytest.approx(found.single_gap, abs=1e-12)
    assert maps.sizes.tolist() == [10] * 4
    values, vectors = torch.linalg.eigh(kernel)
    index = (labels == 2).nonzero().squeeze(-1)
    block, first = kernel[index][:, index], vectors[index, -1]
    assert float(maps.variance[2, 0]) == pytest.approx(float(first @ block @ first / block.trace()))
    assert torch.allclose(maps.values, values.flip(0)[: found.global_rank])


def test_containment_of_small_clusters_saturates() -> None:
    """With more global eigenvectors than samples in a cluster (A) is 1, whatever the partition."""
    kernel = with_spectrum(SPECTRA["power law"](30))
    maps = distill.containment(kernel, torch.arange(30) % 15, 0.05)
    assert maps.cumulative.shape[1] > 2
    assert torch.allclose(maps.cumulative[:, 1:], torch.ones_like(maps.cumulative[:, 1:]))


def test_a_cluster_without_gradients_is_contained() -> None:
    kernel = torch.diag(torch.tensor([3.0, 2.0, 0.0, 0.0])).double()
    found = distill.local_global_properties(kernel, [0, 0, 1, 1])
    assert found.local_ranks == (2, 0)
    assert found.local_containment.tolist() == [1.0, 1.0]
    assert distill.containment(kernel, [0, 0, 1, 1]).variance[1].tolist() == [0.0, 0.0]
