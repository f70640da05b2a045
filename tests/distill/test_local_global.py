"""Algorithm 1 against its listing, the faults of the listing with numbers, and the search over settings."""

from __future__ import annotations

import sys
import warnings

import pytest
import torch
from linear_operator import to_linear_operator
from torch import Tensor

import ntkops
from ntkops import distill
from ntkops.distill.local_global import Columns, distinct, orthonormal
from ntkops.errors import (
    DenseMemoryError,
    InputError,
    MissingDependencyError,
    NtkopsError,
    ShapeError,
    ZeroKernelError,
)
from tests.distill.clustered import Problem, clustered
from tests.estimators.problems import generator

RULES = ("sum", "max", "last")


def rank_of(values: Tensor, share: float) -> int:
    total, held = float(values.sum()), 0.0
    for number, value in enumerate(values.tolist(), start=1):
        held += value
        if held >= share * total:
            return number
    raise AssertionError


def listing(problem: Problem, tau_v: float, tau_g: float, rule: str) -> tuple[list[Tensor], list[int]]:
    """Follow the printed algorithm line by line up to step 5, with the rule for the coverage as an option."""
    mean = problem.kernels.mean(0)
    size = len(mean)
    values, vectors = torch.linalg.eigh(mean)
    values, vectors = values.flip(0), vectors.flip(1)
    rank = rank_of(values, tau_v)
    coverage, local = torch.zeros(rank, dtype=mean.dtype), []
    for h in range(int(problem.clusters.max()) + 1):
        index = (problem.clusters == h).nonzero().squeeze(-1)
        own, basis = torch.linalg.eigh(mean[index][:, index])
        own, basis = own.flip(0), basis.flip(1)
        kept = basis[:, : rank_of(own, tau_v)]
        for j in range(rank):
            part = vectors[index, j]
            found = (kept @ (kept.mT @ part)).square().sum()
            share = found / part.square().sum()
            if rule == "sum":
                coverage[j] += found
            elif rule == "max":
                coverage[j] = max(coverage[j], share)
            else:
                coverage[j] = share
        for j in range(kept.shape[1]):
            lifted = torch.zeros(size, dtype=mean.dtype)
            lifted[index] = kept[:, j]
            local.append(lifted)
    gaps = [j for j in range(rank) if coverage[j] < tau_g]
    return local + [vectors[:, j] for j in gaps], gaps


def same_columns(first: Tensor, second: Tensor) -> bool:
    """Whether columns agree up to their signs."""
    signs = (first * second).sum(0).sign()
    return first.shape == second.shape and bool(torch.allclose(first, second * signs, atol=1e-9))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("tau_v", "tau_g"), [(0.5, 0.9), (0.8, 0.95), (0.9, 0.5)])
def test_paper_mode_is_the_listing(rule: str, tau_v: float, tau_g: float) -> None:
    problem = clustered()
    columns, gaps = listing(problem, tau_v, tau_g, rule)
    found = distill.local_global(
        problem.kernels,
        problem.targets,
        problem.clusters,
        tau_v,
        tau_g,
        coverage=rule,
        orthogonalize="filter",
    )
    assert list(found.info.details["gaps"]) == gaps
    assert same_columns(found.U, torch.stack(columns, 1))
    assert torch.allclose(found.targets, found.U.mT @ problem.targets)


@pytest.mark.parametrize("rule", RULES)
def test_repaired_mode_is_an_orthonormal_basis_of_the_same_span(rule: str) -> None:
    problem = clustered()
    arguments = (problem.kernels, problem.targets, problem.clusters, 0.6, 0.95)
    basis = distill.local_global(*arguments, coverage=rule).U
    kept = distill.local_global(*arguments, coverage=rule, orthogonalize="filter").U
    assert torch.allclose(basis.mT @ basis, torch.eye(basis.shape[1]).double(), atol=1e-12)
    assert torch.linalg.matrix_norm(kept - basis @ (basis.mT @ kept)) < 1e-9


def test_filter_keeps_columns_that_are_not_orthogonal() -> None:
    problem = clustered(spread=2.0)
    found = distill.local_global(
        problem.kernels, problem.targets, problem.clusters, 0.6, 0.95, orthogonalize="filter"
    )
    gram = found.U.mT @ found.U
    off = (gram - torch.diag(gram.diagonal())).abs()
    gap = found.info.details["column_cluster"] < 0
    assert gap.any()
    assert off[~gap][:, ~gap].max() < 1e-12  # local ones have disjoint supports
    assert off[~gap][:, gap].max() > 0.3


def test_orthogonalization_changes_nothing_but_the_ridge() -> None:
    problem = clustered(spread=2.0)
    arguments = (problem.kernels, problem.targets, problem.clusters, 0.6, 0.95)
    sets = [distill.local_global(*arguments, orthogonalize=way) for way in ("basis", "filter")]

    def difference(ridge: float, fit: str) -> float:
        first, second = (
            one.fit(problem.kernels, problem.targets, ridge=ridge, fit=fit).predict(problem.kernels)
            for one in sets
        )
        return float((first - second).abs().max() / first.abs().max())

    assert difference(1e-12, "sketch") < 1e-8
    assert difference(1.0, "nystrom") < 1e-8
    assert difference(1.0, "sketch") > 1e-2


def test_filter_drops_a_direction_after_a_dependent_column() -> None:
    matrix = torch.eye(3).double()[:, [0, 0, 1]]
    zeros = torch.zeros(3)
    columns = Columns(matrix, zeros, zeros, zeros)
    assert torch.linalg.matrix_rank(matrix) == 2
    assert len(distinct(columns)) == 1  # e2 is lost: the arbitrary second column of Q was e2
    assert len(orthonormal(columns)) == 2


def test_filter_drops_what_comes_after_the_last_row() -> None:
    matrix = torch.tensor([[1.0, 1.0, 0.0], [0.0, 1e-9, 1.0]]).double()
    zeros = torch.zeros(3)
    columns = Columns(matrix, zeros, zeros, zeros)
    assert torch.equal(distinct(columns).matrix, matrix[:, :1])
    assert torch.linalg.matrix_rank(orthonormal(columns).matrix) == 2


def test_last_coverage_depends_on_the_order_of_clusters() -> None:
    problem = clustered(spread=2.0)
    found: dict[str, set[tuple[int, ...]]] = {rule: set() for rule in RULES}
    for turn in range(4):
        labels = (problem.clusters + turn) % 4
        for rule in RULES:
            one = distill.local_global(problem.kernels, problem.targets, labels, 0.7, 0.8, coverage=rule)
            found[rule].add(one.info.details["gaps"])
    assert len(found["last"]) > 1
    assert len(found["sum"]) == len(found["max"]) == 1


def two_clusters(share: float) -> Tensor:
    """A kernel whose first eigenvector has this energy on a cluster that covers it, the rest where none does.

    Cluster 0 is one sample. Cluster 1 has three, of which a stronger direction of its own takes its
    only local eigenvector.
    """
    first = torch.tensor([share**0.5, *[((1 - share) / 3) ** 0.5] * 3], dtype=torch.float64)
    second = torch.tensor([0.0, 1.0, -1.0, 0.0], dtype=torch.float64) / 2**0.5
    return 1.0 * torch.outer(first, first) + 1.2 * torch.outer(second, second)


def test_max_coverage_is_content_with_a_cluster_of_one_percent() -> None:
    kernel, clusters = two_clusters(0.01), [0, 1, 1, 1]
    options = {"variance_threshold": 0.547, "gap_threshold": 0.9}
    by_rule = {
        rule: distill.local_global(kernel, torch.ones(4).double(), clusters, coverage=rule, **options)
        for rule in ("sum", "max")
    }
    assert by_rule["max"].info.details["local_ranks"] == (1, 1)
    coverage = {rule: one.info.details["coverage"] for rule, one in by_rule.items()}
    assert coverage["max"].tolist() == pytest.approx([1.0, 1.0])
    assert coverage["sum"].tolist() == pytest.approx([1.0, 0.01])
    assert by_rule["max"].info.details["gaps"] == ()
    assert by_rule["sum"].info.details["gaps"] == (1,)


def test_sum_never_exceeds_max() -> None:
    for seed in range(10):
        problem = clustered(seed=seed, spread=2.0)
        labels = torch.randint(5, (40,), generator=generator(seed))
        found = [
            distill.local_global(
                problem.kernels, problem.targets, labels, 0.8, 0.9, coverage=rule
            ).info.details
            for rule in ("sum", "max")
        ]
        assert bool((found[0]["coverage"] <= found[1]["coverage"] + 1e-12).all())
        assert set(found[1]["gaps"]) <= set(found[0]["gaps"])


def test_one_cluster_without_gaps_is_pca() -> None:
    problem = clustered()
    found = distill.local_global(problem.kernels, problem.targets, 1, 0.9, 0.0)
    pca = distill.synthesize(problem.kernels, found.size, "pca", generator=generator(0))
    assert float(distill.variance_coverage(problem.kernels, found)) == pytest.approx(
        float(distill.variance_coverage(problem.kernels, pca)), abs=1e-10
    )


def test_as_many_clusters_as_samples_select_everything() -> None:
    problem = clustered(size=12)
    found = distill.local_global(problem.kernels, problem.targets, 12, 0.5, 0.9)
    assert found.info.details["local_ranks"] == (1,) * 12
    assert found.size == 12


def test_budget_in_the_papers_order_sees_the_first_clusters_alone() -> None:
    problem = clustered(size=60, clusters=6)
    coverage = {}
    for order in ("paper", "energy"):
        found = distill.local_global(
            problem.kernels, problem.targets, problem.clusters, 0.95, 0.9, budget=6, order=order
        )
        assert found.size == 6
        coverage[order] = float(distill.variance_coverage(problem.kernels, found))
        assert torch.allclose(found.U.mT @ found.U, torch.eye(6).double(), atol=1e-12)
    assert coverage["energy"] > 0.85
    assert coverage["paper"] < 0.6


def test_energy_order_sorts_by_eigenvalue() -> None:
    problem = clustered(spread=2.0)
    details = distill.local_global(
        problem.kernels, problem.targets, problem.clusters, 0.7, 0.9, order="energy"
    ).info.details
    assert bool((details["column_values"].diff() <= 0).all())
    assert (details["column_cluster"] < 0).any()


@pytest.mark.parametrize("orthogonalize", ["basis", "filter"])
def test_budget_is_a_cap_and_takes_the_leading_columns(orthogonalize: str) -> None:
    problem = clustered(spread=2.0)
    arguments = (problem.kernels, problem.targets, problem.clusters, 0.7, 0.9)
    options = {"orthogonalize": orthogonalize, "order": "energy"}
    whole = distill.local_global(*arguments, **options)
    assert torch.equal(distill.local_global(*arguments, budget=5, **options).U, whole.U[:, :5])
    assert torch.equal(distill.local_global(*arguments, budget=40, **options).U, whole.U)


def test_remark_holds_for_a_class_and_fails_with_the_eigenvectors_of_the_mean() -> None:
    problem = clustered()
    values, vectors = torch.linalg.eigh(problem.kernels[0])
    lengths = (problem.features[0].mT @ vectors).square().sum(0)
    assert torch.allclose(lengths, values, atol=1e-9)
    mean_values, mean_vectors = torch.linalg.eigh(problem.kernels.mean(0))
    lengths = (problem.features.mT @ mean_vectors).square().sum(1)  # (C, m)
    assert torch.allclose(lengths.sum(0), 3 * mean_values, atol=1e-9)  # all that is left of it
    leading = lengths[:, -1] / mean_values[-1]
    assert leading.max() / leading.min() > 1.5


def test_kernels_may_come_in_any_form() -> None:
    problem = clustered()
    arguments = (problem.targets, problem.clusters, 0.6, 0.9)
    wanted = distill.local_global(problem.kernels, *arguments).U
    for form in (to_linear_operator(problem.kernels), list(problem.kernels.unbind(0))):
        assert torch.allclose(distill.local_global(form, *arguments).U, wanted, atol=1e-12)


def test_trace_weight_gives_every_class_its_share() -> None:
    problem = clustered()
    scales = torch.tensor([1.0, 1e3, 1e-3]).double()[:, None, None]
    plain, scaled = (
        distill.local_global(
            kernels, problem.targets, problem.clusters, 0.6, 0.9, class_weight="trace"
        ).info.details["column_values"]
        for kernels in (problem.kernels, problem.kernels * scales)
    )
    assert torch.allclose(plain / plain[0], scaled / scaled[0])


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e18])
def test_float32_and_any_scale(scale: float) -> None:
    problem = clustered()
    kernels = (problem.kernels * scale).float()
    found = distill.local_global(kernels, problem.targets.float(), problem.clusters, 0.8, 0.9)
    wanted = distill.local_global(problem.kernels, problem.targets, problem.clusters, 0.8, 0.9)
    assert found.U.dtype == torch.float32
    assert found.info.details["gaps"] == wanted.info.details["gaps"]
    assert float(distill.variance_coverage(kernels, found)) == pytest.approx(
        float(distill.variance_coverage(problem.kernels, wanted)), abs=1e-5
    )


def test_a_networks_class_kernels() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()
    inputs = torch.randn(12, 3).double()
    K = ntkops.ntk(model, inputs, outputs="each")
    found = distill.local_global(K, model(inputs).detach(), 3, 0.8, 0.9, generator=generator(0))
    assert found.info.class_mean and found.info.passes > 0
    dense = distill.local_global(
        K.to_dense(), model(inputs).detach(), found.info.details["clusters"], 0.8, 0.9
    )
    assert torch.allclose(found.operator(K).to_dense(), dense.operator(K.to_dense()).to_dense(), atol=1e-8)


def test_dense_memory_is_asked_for() -> None:
    model = torch.nn.Linear(3, 2)
    K = ntkops.ntk(model, torch.randn(5, 3), outputs="each", max_dense_bytes=0)
    with pytest.raises(DenseMemoryError):
        distill.local_global(K, torch.randn(5, 2), [0, 0, 1, 1, 1], 0.8, 0.9)


def test_spectral_clustering_finds_planted_clusters() -> None:
    problem = clustered(spread=0.2)
    found = distill.spectral_clusters(problem.kernels, 4, generator=generator(0))
    assert len(set(zip(found.tolist(), problem.clusters.tolist(), strict=True))) == 4


def test_blocks_without_affinity_are_clusters_and_no_warning() -> None:
    kernel = torch.block_diag(*[torch.ones(5, 5) + torch.eye(5)] * 3).double()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = distill.spectral_clusters(kernel, 3, generator=generator(0))
    assert found.reshape(3, 5).unique(dim=1).shape == (3, 1)
    assert len(found.unique()) == 3


def test_clusters_are_reproducible_and_leave_the_global_state() -> None:
    problem = clustered(spread=3.0)
    before = torch.get_rng_state()
    first, second = (distill.spectral_clusters(problem.kernels, 5, generator=generator(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(before, torch.get_rng_state())
    sizes = distill.random_clusters(first, generator=generator(0)).bincount()
    assert torch.equal(sizes, first.bincount())


def test_search_takes_the_best_on_the_training_samples() -> None:
    problem = clustered(size=50, clusters=5)
    found = distill.search_local_global(problem.kernels, problem.targets, 10, generator=generator(0))
    trials = found.info.details["trials"]
    assert all(8 <= trial.size <= 10 for trial in trials)
    assert 8 <= found.size <= 10
    best = max(trials, key=lambda trial: trial.key)
    fitted = found.fit(problem.kernels, problem.targets, fit="sketch").predict(problem.kernels)
    assert ntkops.regression.metrics.fidelity(fitted, problem.targets) == best.fidelity
    assert found.info.details["variance_threshold"] == best.variance_threshold
    again = distill.search_local_global(problem.kernels, problem.targets, 10, generator=generator(0))
    assert torch.equal(found.U, again.U)


def test_search_agrees_with_the_algorithm_at_its_setting() -> None:
    problem = clustered(size=50, clusters=5)
    details = (
        found := distill.search_local_global(problem.kernels, problem.targets, 12, generator=generator(1))
    ).info.details
    thresholds = details["variance_threshold"], details["gap_threshold"]
    same = distill.local_global(problem.kernels, problem.targets, details["clusters"], *thresholds)
    assert torch.allclose(same.U, found.U, atol=1e-12)


def test_search_says_which_sizes_there_are() -> None:
    problem = clustered()
    with pytest.raises(InputError, match="no setting gives from 8 to 9 gradients.*4 and 40"):
        distill.search_local_global(
            problem.kernels,
            problem.targets,
            9,
            clusters=[4],
            variance_thresholds=[0.1, 1.0],
            gap_thresholds=[0],
        )


def test_grid_counts_local_and_gap_vectors() -> None:
    problem = clustered()
    trials = distill.local_global_grid(
        problem.kernels,
        problem.targets,
        clusters=[3, 6],
        variance_thresholds=[0.5, 0.9],
        gap_thresholds=[0.0, 0.9],
        generator=generator(0),
    )
    assert [(t.clusters, t.variance_threshold, t.gap_threshold) for t in trials] == [
        (h, v, g) for h in (3, 6) for v in (0.5, 0.9) for g in (0.0, 0.9)
    ]
    assert all(t.size == t.num_local + t.num_gaps for t in trials)
    assert all(t.num_gaps == 0 for t in trials if t.gap_threshold == 0)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"variance_threshold": 0.0}, InputError, "variance_threshold=0.0"),
        ({"variance_threshold": 1.2}, InputError, "variance_threshold=1.2"),
        ({"gap_threshold": -0.1}, InputError, "gap_threshold=-0.1"),
        ({"coverage": "mean"}, InputError, "coverage='mean'"),
        ({"orthogonalize": "qr"}, InputError, "orthogonalize='qr'"),
        ({"order": "size"}, InputError, "order='size'"),
        ({"budget": 0}, InputError, "budget=0"),
        ({"class_weight": "mean"}, InputError, "class_weight='mean'"),
        ({"clusters": 0}, InputError, "clusters=0"),
        ({"clusters": 41}, InputError, "40 samples"),
        ({"clusters": True}, InputError, "clusters=True"),
        ({"clusters": [0, 1]}, ShapeError, r"\(40,\)"),
        ({"clusters": torch.zeros(40)}, InputError, "integer for each sample"),
        ({"clusters": [-1] * 40}, InputError, "0 or more"),
        ({"Y": torch.zeros(39, 3).double()}, ShapeError, "39"),
        ({"K": -clustered().kernels}, NtkopsError, "positive"),
        ({"K": torch.zeros(3, 40, 40).double()}, ZeroKernelError, "no positive"),
    ],
)
def test_bad_input_is_named(change: dict[str, object], error: type[Exception], words: str) -> None:
    problem = clustered()
    given = {
        "K": problem.kernels,
        "Y": problem.targets,
        "clusters": problem.clusters,
        "variance_threshold": 0.8,
        "gap_threshold": 0.9,
    }
    with pytest.raises(error, match=words):
        distill.local_global(**{**given, **change})


def test_missing_scikit_learn_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.cluster", None)
    problem = clustered()
    with pytest.raises(MissingDependencyError, match="pip install scikit-learn"):
        distill.local_global(problem.kernels, problem.targets, 4, 0.8, 0.9)
    distill.local_global(problem.kernels, problem.targets, problem.clusters, 0.8, 0.9)
