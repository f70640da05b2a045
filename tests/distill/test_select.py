"""Selections: what each rule promises, lazily where it can, refused where it cannot."""

import itertools

import pytest
import torch
from linear_operator.operators import DenseLinearOperator

import ntkops
from ntkops.distill import select
from ntkops.errors import DenseMemoryError, InputError, NonFiniteError, ShapeError, ZeroKernelError
from tests.regression.problems import network, samples

from .problems import Forbidden, generator, kernels, labels

K, Y = kernels(), labels()
MEAN = K.mean(0)
METHODS = ("random", "leverage", "kmedoids", "fps", "rpcholesky", "greedy")
DISTANCES = MEAN.diagonal().unsqueeze(0) + MEAN.diagonal().unsqueeze(1) - 2 * MEAN


@pytest.mark.parametrize("method", METHODS)
def test_forms_of_kernels_give_the_same_distinct_points(method):
    found = select(K, 8, method, Y=Y, generator=generator(1))
    assert len(set(found.indices.tolist())) == 8 and found.size == 8
    assert found.U[found.indices].equal(torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close(found.targets, Y[found.indices])
    assert found.info.class_mean == (method != "random")
    assert found.info.seed == (None if method == "greedy" else 1)
    for other in (DenseLinearOperator(K), list(K), MEAN):
        again = select(other, 8, method, generator=generator(1))
        assert again.indices.tolist() == found.indices.tolist()
    assert not again.info.class_mean  # a single kernel has no classes


@pytest.mark.parametrize("method", ["random", "fps", "rpcholesky", "greedy"])
def test_columns_are_enough(method):
    lazy = Forbidden(K)
    found = select(lazy, 8, method, generator=generator(1))
    assert found.indices.tolist() == select(K, 8, method, generator=generator(1)).indices.tolist()
    assert sum(lazy.columns) <= {"random": 0, "fps": 8, "greedy": 8, "rpcholesky": 24}[method]


@pytest.mark.parametrize("method", ["leverage", "kmedoids"])
def test_what_needs_the_dense_kernel_says_so(method):
    lazy = Forbidden(K)
    with pytest.raises(DenseMemoryError, match=rf"method='{method}'.*columns alone.*max_dense_bytes"):
        select(lazy, 8, method)
    assert not lazy.columns  # refused before any work


def test_a_network_kernel_without_the_dense_matrix():
    model, x = network(), samples(30)
    kernel = ntkops.ntk(model, x, outputs="each", max_dense_bytes=0)
    dense = ntkops.ntk(model, x, outputs="each").to_dense()
    for method in ("fps", "rpcholesky", "greedy"):
        found = select(kernel, 6, method, generator=generator())
        assert found.indices.tolist() == select(dense, 6, method, generator=generator()).indices.tolist()
        assert 0 < found.info.passes < 30 * 3 * 6


def test_farthest_points_are_farthest():
    chosen = select(K, 10, "fps", generator=generator(3)).indices.tolist()
    for i in range(1, 10):
        nearest = DISTANCES[:, chosen[:i]].amin(-1)
        assert nearest[chosen[i]] == nearest.max()


def test_farthest_points_are_within_twice_the_best_radius():
    small = torch.arange(12)
    part, distances = MEAN[:12, :12], DISTANCES[small][:, small].clamp(min=0).sqrt()
    best = min(float(distances[:, list(c)].amin(-1).max()) for c in itertools.combinations(range(12), 3))
    assert select(part, 3, "fps", generator=generator()).info.details["radius"] <= 2 * best


def test_medoids_are_the_best_of_all_sets():
    part, distances = MEAN[:14, :14], DISTANCES[:14, :14]
    best = min(float(distances[:, list(c)].amin(-1).sum()) for c in itertools.combinations(range(14), 3))
    found = select(part, 3, "kmedoids", generator=generator())
    assert found.info.details["inertia"] == pytest.approx(best)


def test_leverage_scores_are_those_of_the_ridge():
    found = select(K, 5, "leverage", ridge=1e-2, generator=generator())
    r = 1e-2 * MEAN.diagonal().mean()
    hat = MEAN @ torch.linalg.inv(MEAN + r * torch.eye(40, dtype=torch.float64))
    torch.testing.assert_close(found.info.details["leverage"], hat.diagonal())
    assert found.info.details["effective_dimension"] == pytest.approx(float(hat.trace()))


def test_leverage_draws_in_proportion():
    # Two blocks: one point alone with leverage near 1, and nine copies that share another 1.
    block = torch.block_diag(torch.ones(1, 1), torch.ones(9, 9)).double()
    first = [int(select(block, 1, "leverage", generator=generator(i)).indices[0] == 0) for i in range(200)]
    assert 75 <= sum(first) <= 125


def test_greedy_takes_the_largest_remainder():
    rest, expected = MEAN.clone(), []
    for _ in range(6):
        pivot = int(rest.diagonal().argmax())
        expected.append(pivot)
        rest = rest - torch.outer(rest[:, pivot], rest[:, pivot]) / rest[pivot, pivot]
    found = select(K, 6, "greedy")
    assert found.indices.tolist() == expected
    assert found.info.details["missing"] == pytest.approx(float(rest.trace() / MEAN.trace()))


def test_points_that_span_everything_are_enough():
    factor = torch.randn(20, 3, generator=generator(), dtype=torch.float64)
    low = factor @ factor.T
    for method in ("rpcholesky", "greedy"):
        assert select(low, 8, method, generator=generator()).size == 3
    for method in ("random", "leverage", "kmedoids", "fps"):
        assert select(low, 8, method, generator=generator()).size == 8


@pytest.mark.parametrize("method", METHODS)
def test_copies_of_points_are_no_trouble(method):
    copies = torch.ones(6, 6, dtype=torch.float64)
    found = select(copies, 4, method, generator=generator())
    assert len(set(found.indices.tolist())) == found.size


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("scale", [1e-20, 1e18])
def test_choices_do_not_depend_on_the_scale(method, scale):
    expected = select(K.float(), 6, method, generator=generator(2)).indices
    found = select((scale * K).float(), 6, method, generator=generator(2)).indices
    assert found.tolist() == expected.tolist()


@pytest.mark.parametrize("method", ["kmedoids", "greedy"])
def test_choices_follow_the_points_when_they_are_reordered(method):
    few = K[:, :14, :14]  # so few that the starts find the best medoids of all
    order = torch.randperm(14, generator=generator(5))
    moved = select(few[:, order][..., order], 3, method, generator=generator()).indices
    assert set(order[moved].tolist()) == set(select(few, 3, method, generator=generator()).indices.tolist())


def test_the_global_generator_is_left_alone():
    state = torch.random.get_rng_state()
    for method in METHODS:
        select(K, 4, method)
    assert torch.random.get_rng_state().equal(state)


def test_messages():
    with pytest.raises(InputError, match="choose one of"):
        select(K, 4, "best")
    for count, message in (
        (0, "from 1 to 40"),
        (41, "from 1 to 40"),
        (2.0, "an integer"),
        (True, "an integer"),
    ):
        with pytest.raises(InputError, match=message):
            select(K, count)
    with pytest.raises(InputError, match="leverage"):
        select(K, 4, "leverage", ridge=0.0)
    with pytest.raises(ShapeError, match="square"):
        select(K[..., :20], 4)
    with pytest.raises(ZeroKernelError, match="zero"):
        select(0 * K, 4, "fps")
    with pytest.raises(NonFiniteError):
        select(K * float("inf"), 4)
    with pytest.raises(InputError, match="generator"):
        select(K, 4, "random", generator=3)


@pytest.mark.parametrize("method", METHODS)
def test_labels_give_each_class_its_share_by_its_own_block(method):
    classes = torch.arange(len(MEAN)) % 3
    found = select(K, 8, method, Y=Y, labels=classes, generator=generator(1))
    counts = torch.bincount(classes[found.indices], minlength=3)
    assert sorted(counts.tolist()) == [2, 3, 3] and len(set(found.indices.tolist())) == 8
    drawn, own = generator(1), (classes == 0).nonzero().flatten()
    first = select(MEAN[own][:, own], int(counts[0]), method, generator=drawn).indices
    assert found.indices[: counts[0]].tolist() == own[first].tolist()
    assert len(found.info.details["classes"]) == 3
    model, x = network(), samples(30)
    lazy = ntkops.ntk(model, x, outputs="each")
    dense = [lazy.to_dense(), list(lazy.to_dense())]
    chosen = [
        select(form, 6, method, labels=classes[:30], generator=generator()).indices.tolist()
        for form in (lazy, *dense)
    ]
    assert chosen[0] == chosen[1] == chosen[2]


def test_labels_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match="labels have shape"):
        select(K, 8, labels=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(InputError, match="labels are class numbers"):
        select(K, 8, labels=torch.zeros(len(MEAN)))
    with pytest.raises(InputError, match="below the number of classes"):
        select(K, 2, labels=torch.arange(len(MEAN)) % 3)


def test_erratum_a_truncation_rank_is_no_number_of_points():
    # Definition 3.1's gloss: (r, ε)-redundant inputs give the kernel to 1 - ε from r times fewer inputs.
    # Samples with one correlation are the same to any choice; an eigenvector averages them, a sample cannot.
    n, correlation, epsilon = 400, 0.951, 0.05
    kernel = torch.full((n, n), correlation, dtype=torch.float64).fill_diagonal_(1)
    values = torch.linalg.eigvalsh(kernel).flip(0)
    assert float(values[0]) >= (1 - epsilon) * n  # truncation rank 1: redundant by 400
    chosen = select(kernel, 40, "greedy").indices
    one = float(nystrom_gap(kernel, chosen[:1]))
    assert one == pytest.approx((1 - correlation**2) * (n - 1) / n) and one > 1.9 * epsilon
    needed = next(m for m in range(1, 41) if nystrom_gap(kernel, chosen[:m]) <= epsilon)
    assert 10 <= needed <= 40


@pytest.mark.parametrize("seed", range(3))
def test_erratum_decaying_spectra_take_more_points_than_their_rank(seed):
    kernel = kernels(seed=seed, points=60).mean(0)
    values = torch.linalg.eigvalsh(kernel).flip(0)
    rank = int((values.cumsum(0) < 0.95 * values.sum()).sum()) + 1
    found = select(kernel, 60, "greedy").indices
    left = [float(nystrom_gap(kernel, found[:m])) for m in (rank, 2 * rank)]
    assert left[0] > 0.05 > left[1]


def nystrom_gap(kernel, chosen):
    """Share of the trace outside the span of the chosen points."""
    half = torch.linalg.solve_triangular(
        torch.linalg.cholesky(kernel[chosen][:, chosen]), kernel[chosen], upper=False
    )
    return 1 - half.square().sum() / kernel.trace()
