"""Features in place of a dense kernel: the same numbers for one kernel, a refusal where there are none."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import ntkops
from ntkops.distill import local_global, local_global_grid, search_local_global, select, spectral_clusters
from ntkops.errors import DenseMemoryError, InputError

N, K_FEATURES = 48, 6


def seeded(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


@pytest.fixture(scope="module")
def scene() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """A network, samples, P, and the features ``(C, n, k)`` by torch.autograd."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Linear(4, 7), nn.Softplus(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 3)
        ).double()
        x = torch.randn(N, 4, dtype=torch.float64)
    parameters = list(model.parameters())
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(o, parameters, retain_graph=True)])
        for o in model(x).flatten()
    ]
    J = torch.stack(rows).unflatten(0, (N, 3)).transpose(0, 1)  # (C, n, P)
    P = torch.randn(K_FEATURES, J.shape[-1], dtype=torch.float64, generator=seeded(1)) / K_FEATURES**0.5
    return model, x, P, J @ P.mT


def projected(scene, outputs, limit="features"):
    model, x, P, features = scene
    count = features.shape[0] if outputs == "each" else 1
    room = 8 * count * N * K_FEATURES if limit == "features" else limit
    return ntkops.projected_ntk(ntkops.ntk(model, x, outputs=outputs), P, max_dense_bytes=room)


def test_leverage_scores_are_those_of_the_dense_kernel(scene) -> None:
    F = scene[3][1]
    dense = F @ F.mT
    ridge = 1e-2 * dense.diagonal().mean()
    expected = (dense @ torch.linalg.inv(dense + ridge * torch.eye(N, dtype=torch.float64))).diagonal()
    found = select(projected(scene, 1), 5, "leverage", ridge=1e-2, generator=seeded())
    torch.testing.assert_close(found.info.details["leverage"], expected, rtol=1e-9, atol=1e-9)
    assert found.info.details["features"] == K_FEATURES
    assert not found.info.details["second_projection"]


def test_the_mean_of_classes_is_seen_through_a_second_projection(scene) -> None:
    K, features = projected(scene, "each"), scene[3]
    mean = (features @ features.mT).mean(0)
    traces = []
    for seed in range(40):
        found = select(K, 5, "kmedoids", generator=seeded(seed))
        assert found.info.details["second_projection"]
        assert found.info.class_mean
        traces.append(found.info.details["inertia"])
    best = select(mean, 5, "kmedoids", generator=seeded()).info.details["inertia"]
    # An unbiased sketch keeps squared distances in the mean; 5 medoids of 40 starts are near the best ones.
    assert 0.5 * best < sum(traces) / len(traces) < 3 * best


def test_medoids_are_a_fixed_point_of_their_alternation(scene) -> None:
    F = scene[3][0]
    distances = torch.cdist(F, F).square()
    found = select(projected(scene, 0), 6, "kmedoids", generator=seeded())
    chosen = found.indices
    assert len(chosen.unique()) == 6
    near = distances[:, chosen].min(-1)
    assert found.info.details["inertia"] == pytest.approx(float(near.values.sum()), rel=1e-9)
    for number, medoid in enumerate(chosen.tolist()):
        members = (near.indices == number).nonzero().flatten()
        sums = distances[members][:, members].sum(0)
        assert float(distances[medoid, members].sum()) == pytest.approx(float(sums.min()), rel=1e-9)


@pytest.mark.parametrize("orthogonalize", ["basis", "filter"])
def test_algorithm_1_is_that_of_the_dense_kernel(orthogonalize, scene) -> None:
    F = scene[3][2]
    labels, Y = torch.arange(N) % 4, torch.randn(N, dtype=torch.float64, generator=seeded(2))
    options = {"orthogonalize": orthogonalize, "generator": seeded()}
    expected = local_global(F @ F.mT, Y, labels, 0.6, 0.9, **options)
    found = local_global(projected(scene, 2), Y, labels, 0.6, 0.9, **options)
    for key in ("global_rank", "local_ranks", "gaps"):
        assert found.info.details[key] == expected.info.details[key]
    for key in ("coverage", "column_values"):
        torch.testing.assert_close(found.info.details[key], expected.info.details[key], rtol=1e-9, atol=1e-9)
    signs = (found.U * expected.U).sum(0).sign()
    torch.testing.assert_close(found.U * signs, expected.U, rtol=0, atol=1e-9)


def test_the_search_is_that_of_the_dense_kernel(scene) -> None:
    F = scene[3][2]
    Y = torch.randn(N, 2, dtype=torch.float64, generator=seeded(2))
    # One cluster, and as many as samples, are the same for both: features have cosines that are not clipped.
    options = {"clusters": (1, N), "variance_thresholds": (0.3, 0.6, 0.9), "gap_thresholds": (0.0, 0.9)}
    dense = local_global_grid(F @ F.mT, Y, **options, generator=seeded())
    found = local_global_grid(projected(scene, 2), Y, **options, generator=seeded())
    assert len(found) == len(dense) == 12
    for one, other in zip(found, dense, strict=True):
        assert (one.size, one.num_gaps, one.fidelity) == (other.size, other.num_gaps, other.fidelity)
        assert one.mean_squared_error == pytest.approx(other.mean_squared_error, rel=1e-9)


@pytest.mark.parametrize("outputs", [1, "each"])
@pytest.mark.parametrize("affinity", ["cosine", "kernel"])
def test_the_search_agrees_with_the_algorithm_on_features(scene, outputs, affinity) -> None:
    K, Y = projected(scene, outputs), torch.randn(N, 3, dtype=torch.float64, generator=seeded(2))
    found = search_local_global(K, Y, 6, clusters=(2, 3), affinity=affinity, generator=seeded(4))
    details = found.info.details
    assert details["affinity"] == affinity
    assert details["features"] == K_FEATURES and details["second_projection"] == (outputs == "each")
    assert 5 <= found.size <= 6 and len(details["trials"]) > 1
    best = details["variance_threshold"], details["gap_threshold"]
    again = local_global(K, Y, details["clusters"], *best, affinity=affinity, generator=seeded(4))
    assert again.size == found.size
    torch.testing.assert_close(again.U, found.U, rtol=0, atol=1e-9)


def test_the_search_takes_float32_features(scene) -> None:
    model, x, P, features = scene
    K = ntkops.projected_ntk(
        ntkops.ntk(copy.deepcopy(model).float(), x.float(), outputs=1),
        P.float(),
        max_dense_bytes=4 * N * K_FEATURES,
    )
    Y = torch.randn(N, 2, generator=seeded(2))
    found = search_local_global(K, Y, 6, clusters=(2,), generator=seeded(4))
    assert found.U.dtype == torch.float32 and found.info.details["features"] == K_FEATURES


@pytest.mark.parametrize("affinity", ["cosine", "kernel"])
def test_clusters_of_features_are_the_blocks_that_there_are(affinity) -> None:
    model = nn.Linear(3, 1, bias=False).double()
    x = (
        torch.eye(3, dtype=torch.float64).repeat(8, 1)
        * torch.linspace(1, 2, 24, dtype=torch.float64)[:, None]
    )
    P = torch.eye(3, dtype=torch.float64)
    K = ntkops.projected_ntk(ntkops.ntk(model, x, outputs=0), P, max_dense_bytes=24 * 3 * 8)
    found = spectral_clusters(K, 3, affinity=affinity, generator=seeded())
    assert (found.reshape(8, 3) == found[:3]).all()
    assert len(found.unique()) == 3
    dense = spectral_clusters(K.features() @ K.features().mT, 3, affinity=affinity, generator=seeded())
    assert (dense.reshape(8, 3) == dense[:3]).all()


def test_a_vertex_of_negative_degree_is_refused() -> None:
    F = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-3.0, 0.2]], dtype=torch.float64)
    with pytest.raises(InputError, match="degree"):
        spectral_clusters(F @ F.mT, 2, affinity="kernel")
    with pytest.raises(InputError, match="degree"):
        search_local_global(F @ F.mT, F, 2, affinity="kernel")
    with pytest.raises(InputError, match="affinity"):
        spectral_clusters(F @ F.mT, 2, affinity="raw")
    with pytest.raises(InputError, match="affinity"):
        local_global_grid(F @ F.mT, F, affinity="raw")


@pytest.mark.parametrize("method", ["leverage", "kmedoids"])
def test_without_features_the_dense_kernel_is_refused_before_any_work(method, scene) -> None:
    model, x, *_ = scene
    K = ntkops.ntk(model, x, outputs="each", max_dense_bytes=3 * N * N * 8)
    with ntkops.count_passes() as passes, pytest.raises(DenseMemoryError, match="48 x 48.*with what is made"):
        select(K, 5, method)
    with pytest.raises(DenseMemoryError, match="48 x 48.*with what is made"):
        local_global(K, torch.ones(N, 3, dtype=torch.float64), 3, 0.5, 0.5)
    assert passes.total == 0
