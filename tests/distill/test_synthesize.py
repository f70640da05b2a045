"""Syntheses: their laws, and that products are all that most of them need."""

import functools

import pytest
import torch
from linear_operator.operators import DenseLinearOperator

import ntkops
from ntkops.distill import Distilled, class_mean, select, synthesize
from ntkops.errors import InputError, NonFiniteError, ShapeError
from ntkops.regression import KernelRidge
from tests.pairs import pairs
from tests.regression.problems import network, samples

from .problems import (
    Forbidden,
    coefficients,
    features,
    full_predictions,
    generator,
    kernels,
    labels,
    objective,
    stacked_coverage,
)

K, Y = kernels(), labels()
NEW = features(seed=3, points=15) @ features().mT
MEAN = K.mean(0)
METHODS = ("pca", "kmeans", "krylov", "galerkin", "als")
COUNTS = (2, 4, 9)


def spans_agree(first, second, tolerance=1e-6):
    bases = [torch.linalg.qr(u.double())[0] for u in (first, second)]
    return bool(torch.linalg.svdvals(bases[0].mT @ bases[1]).min() > 1 - tolerance)


@functools.cache
def from_dense(count, method):
    """Return what the dense kernels give, once for all forms that are compared with it."""
    return synthesize(K, count, method, Y=Y, ridge=1e-2, generator=generator(1))


FORMS = {
    "operator": DenseLinearOperator,
    "list": list,
    "lazy": Forbidden,
    "lazy list": lambda kernels: [Forbidden(part) for part in kernels],
}
LAZY = ("lazy", "lazy list")


@pytest.mark.parametrize("form, method, count", pairs(FORMS, METHODS, COUNTS))
def test_forms_of_kernels_give_the_same_span(form, method, count):
    """Products are enough: those of lazy ones cannot become dense."""
    dense = from_dense(count, method)
    assert dense.U.shape == (40, count) and dense.indices is None
    torch.testing.assert_close(dense.targets, dense.U.mT @ Y)
    assert dense.info.class_mean == {"galerkin": count != 4, "als": count == 9}.get(method, True)
    given = FORMS[form](K)
    found = synthesize(given, count, method, Y=Y, ridge=1e-2, generator=generator(1))
    if form in LAZY:
        if method == "kmeans":  # fewer starts
            assert found.info.details["num_starts"] == 1
        elif method == "als":
            last = [d.info.details.get("objectives", [0.0])[-1] for d in (found, dense)]
            assert last[0] == pytest.approx(last[1], rel=1e-2)
        else:
            assert spans_agree(found.U, dense.U)
        assert found.info.passes > 0 or (method == "krylov" and count <= 4)
        return
    fitted, expected = (d.fit(K, Y, ridge=1e-2) for d in (found, dense))
    if method == "als" and count == 2:  # ends where the objective hardly falls, wherever that is
        values = [objective(K, Y, f.dual_coef_, 1e-2) for f in (fitted, expected)]
        assert values[0] == pytest.approx(values[1], rel=1e-2)
    else:
        torch.testing.assert_close(fitted.predict(NEW), expected.predict(NEW), rtol=1e-4, atol=1e-5)


def test_a_network_kernel_without_the_dense_matrix():
    model, x, new = network(), samples(30), samples(8, seed=3)
    lazy = ntkops.ntk(model, x, outputs="each", max_dense_bytes=0)
    dense, targets = ntkops.ntk(model, x, outputs="each").to_dense(), model(x).detach()
    cross = lazy.cross(new)
    matrix = ntkops.ntk(model, x, outputs="each").cross(new).to_dense()
    for method in METHODS:
        found = synthesize(lazy, 3, method, Y=targets, ridge=1e-2, generator=generator())
        predictions = found.fit(lazy, targets, ridge=1e-2).predict(cross)
        torch.testing.assert_close(predictions, found.fit(dense, targets, ridge=1e-2).predict(matrix))


# principal components


def test_principal_components_are_the_leading_eigenvectors():
    values, vectors = torch.linalg.eigh(MEAN)
    found = synthesize(K, 5, "pca")
    torch.testing.assert_close(found.info.details["eigenvalues"], values.flip(0)[:5])
    assert spans_agree(found.U, vectors[:, -5:])


@pytest.mark.parametrize("count", COUNTS)
def test_principal_components_cover_the_most_variance(count):
    best = stacked_coverage(K, from_dense(count, "pca").U)
    values = torch.linalg.eigvalsh(MEAN).flip(0)
    assert best == pytest.approx(float(values[:count].sum() / values.sum()), abs=1e-10)
    others = [coefficients(count, seed=seed) for seed in range(20)]
    others += [from_dense(count, method).U for method in METHODS[1:]]
    others += [select(K, count, m, generator=generator()).U for m in ("kmedoids", "greedy", "rpcholesky")]
    for other in others:
        assert stacked_coverage(K, other) <= best + 1e-10


# means


def test_means_are_means_of_clusters():
    found = synthesize(K, 5, "kmeans", generator=generator())
    clusters = found.info.details["labels"]
    for h in range(5):
        members = clusters == h
        torch.testing.assert_close(found.U[:, h], members.double() / members.sum())
    wide = features()
    stacked = wide.transpose(0, 1).flatten(1) / 2  # rows whose Gram matrix is the mean of four
    centres = found.U.mT @ stacked
    distances = torch.cdist(stacked, centres).square()
    assert distances.argmin(-1).equal(clusters)  # a fixed point of Lloyd's iteration
    assert found.info.details["inertia"] == pytest.approx(float(distances.amin(-1).sum()))


def test_means_are_as_good_as_those_of_scikit_learn():
    cluster = pytest.importorskip("sklearn.cluster")
    stacked = (features().transpose(0, 1).flatten(1) / 2).numpy()
    theirs = cluster.KMeans(5, n_init=10, random_state=0).fit(stacked).inertia_
    assert synthesize(K, 5, "kmeans", generator=generator()).info.details["inertia"] <= 1.02 * theirs


def test_clusters_that_are_apart_are_found_lazily():
    centres = 10 * torch.eye(4, dtype=torch.float64).repeat_interleave(6, 0)
    points = centres + 0.1 * torch.randn(24, 4, generator=generator(), dtype=torch.float64)
    found = synthesize(Forbidden(points @ points.T), 4, "kmeans", generator=generator())
    assert [len(set(found.info.details["labels"][6 * h : 6 * h + 6].tolist())) for h in range(4)] == [1] * 4
    assert found.info.converged


def test_copies_of_points_leave_no_cluster_empty():
    found = synthesize(torch.ones(8, 8, dtype=torch.float64), 3, "kmeans", generator=generator())
    torch.testing.assert_close(found.U.sum(0), torch.ones(3, dtype=torch.float64))


# Krylov spaces


@pytest.mark.parametrize("count", [4, 7, 12])
def test_krylov_spaces_are_those_of_the_labels(count):
    found = synthesize(K, count, "krylov", Y=Y).U
    torch.testing.assert_close(found.mT @ found, torch.eye(count, dtype=torch.float64))
    powers = torch.cat([torch.linalg.matrix_power(MEAN, p) @ Y for p in range(-(-count // 4))], dim=-1)
    inside = torch.linalg.qr(powers)[0]
    torch.testing.assert_close(inside @ (inside.mT @ found), found, rtol=1e-6, atol=1e-7)
    shorter = synthesize(K, 4, "krylov", Y=Y).U
    assert spans_agree(found[:, :4], shorter)


def test_few_columns_are_the_leading_singular_vectors_of_the_labels():
    left = torch.linalg.svd(Y, full_matrices=False)[0]
    found = synthesize(K, 2, "krylov", Y=Y).U
    torch.testing.assert_close((found.mT @ left[:, :2]).abs(), torch.eye(2, dtype=torch.float64))


def test_an_invariant_space_goes_on_at_random():
    eigenvectors = torch.linalg.eigh(MEAN)[1][:, -3:]
    found = synthesize(MEAN, 8, "krylov", Y=eigenvectors, generator=generator())
    assert found.info.details["random_directions"] > 0
    torch.testing.assert_close(found.U.mT @ found.U, torch.eye(8, dtype=torch.float64))
    assert spans_agree(found.U[:, :3], eigenvectors)


# Galerkin


@pytest.mark.parametrize(
    "form, method, count, fit",
    pairs(["tensor", "list", "lazy"], ["galerkin", "als"], [4, 6], ["sketch", "nystrom"]),
)
def test_as_many_combinations_as_labels_lose_nothing(form, method, count, fit):
    given, cross = (K, NEW) if form == "tensor" else (FORMS[form](K), FORMS[form](NEW))
    found = synthesize(given, count, method, Y=Y)
    predictions = found.fit(given, Y, fit=fit).predict(cross)
    exact = full_predictions(K, Y, 1e-4, NEW)
    # The lazy regression ends at a residual of 1e-9, the dense one at rounding.
    assert (predictions - exact).abs().max() < (1e-6 if form == "lazy" else 1e-8)
    assert found.info.details["lossless"]


def test_a_class_with_small_labels_is_not_lost():
    scales = torch.tensor([1.0, 1e-12, 1e6, 1.0], dtype=torch.float64)
    found = synthesize(K, 4, "galerkin", Y=Y * scales)
    exact = full_predictions(K, Y, 1e-4, NEW)
    gap = (found.fit(K, Y * scales, fit="sketch").predict(NEW) / scales - exact).abs().max()
    assert gap < 1e-6


def test_other_labels_are_not_what_galerkin_is_for():
    other = labels(seed=11)
    found = synthesize(K, 4, "galerkin", Y=Y)
    loss = (found.fit(K, other).predict(K) - other).square().sum()
    krylov = synthesize(K, 4, "pca").fit(K, other).predict(K)
    assert loss > 0.5 * (krylov - other).square().sum()


@pytest.mark.parametrize("method", ["galerkin", "als"])
def test_of_one_kernel_few_combinations_are_the_best_there_are(method):
    shared, ridge = K[0], 1e-2
    full = KernelRidge(ridge).fit(shared, Y)
    r = full.ridge_
    for count in (1, 2, 3):
        found = synthesize(shared, count, method, Y=Y, ridge=ridge)
        duals = found.fit(shared, Y, ridge=ridge).dual_coef_
        values = torch.linalg.eigvalsh(
            full.dual_coef_.mT @ shared @ (shared @ full.dual_coef_ + r * full.dual_coef_)
        )
        stacked = shared.expand(4, -1, -1)
        excess = objective(stacked, Y, duals, ridge) - objective(stacked, Y, full.dual_coef_, ridge)
        assert excess == pytest.approx(float(values.flip(0)[count:].sum()), rel=1e-6)


# alternating least squares


@pytest.mark.parametrize("count", [1, 2, 3])
def test_alternation_beats_every_other_set_on_its_objective(count):
    ridge = 1e-2
    found = from_dense(count, "als")
    best = objective(K, Y, found.fit(K, Y, ridge=ridge).dual_coef_, ridge)
    assert best / float(Y.square().sum()) == pytest.approx(min(found.info.details["objectives"]), rel=1e-6)
    for method in METHODS[:-1]:
        other = from_dense(count, method).fit(K, Y, ridge=ridge)
        assert best <= objective(K, Y, other.dual_coef_, ridge)


def test_alternation_recovers_combinations_that_are_there():
    # Labels that two shared combinations explain exactly.
    hidden = coefficients(2, seed=21)
    weights = torch.randn(4, 2, 1, generator=generator(4), dtype=torch.float64)
    explained = (K @ hidden @ weights).squeeze(-1).mT
    found = synthesize(K, 2, "als", Y=explained, ridge=1e-6)
    rest = found.fit(K, explained, ridge=1e-6).predict(K) - explained
    assert rest.square().sum() < 1e-3 * explained.square().sum()


# invariances


@pytest.mark.parametrize("method", [method for method in METHODS if method != "kmeans"])  # whose starts do
def test_the_order_of_points_does_not_matter(method):
    order, found = torch.randperm(40, generator=generator(1)), from_dense(3, method)
    moved = synthesize(K[:, order][..., order], 3, method, Y=Y[order], ridge=1e-2)
    if method == "als":
        last = [d.info.details["objectives"][-1] for d in (found, moved)]
        assert last[0] == pytest.approx(last[1], rel=1e-2)
        return
    assert spans_agree(found.U[order], moved.U, 1e-4)


# A scale is extreme for a dtype: these two are one choice.
SIZES = [(scale, dtype) for scale in (1e-20, 1.0, 1e18) for dtype in (torch.float32, torch.float64)]


@pytest.mark.parametrize("form, method, size", pairs(["tensor", "lazy"], METHODS, SIZES), ids=str)
def test_the_scale_of_the_kernel_does_not_matter(form, method, size):
    scale, dtype = size
    expected, given = from_dense(3, method), (scale * K).to(dtype)
    if form == "lazy" and method != "kmeans":  # which starts otherwise where it is lazy
        given = Forbidden(given)
    found = synthesize(given, 3, method, Y=Y.to(dtype), ridge=1e-2, generator=generator(1))
    assert found.U.dtype == dtype
    first, second = (
        objective(K, Y, Distilled.of(K, d.U.double()).fit(K, Y, ridge=1e-2).dual_coef_, 1e-2)
        for d in (found, expected)
    )
    for each in (found, expected) if method == "als" else ():  # no round raises the objective
        values = torch.tensor(each.info.details["objectives"])
        assert len(values) > 1 and bool((values.diff() <= 1e-6 * values[:-1]).all())
    # Turns end where the objective falls by 1e-3 a round, which rounding may move.
    assert first == pytest.approx(second, rel=1e-2 if method == "als" else 2e-3)


def test_what_was_done_is_recorded():
    found = synthesize(K, 3, "pca", generator=generator(8))
    assert found.info.method == "pca" and found.info.class_mean and found.info.seed == 8
    assert not synthesize(MEAN, 3, "pca").info.class_mean
    torch.testing.assert_close(class_mean(K).to_dense(), MEAN)


def test_messages():
    with pytest.raises(InputError, match="choose one of"):
        synthesize(K, 3, "svd")
    for method in ("krylov", "galerkin", "als"):
        with pytest.raises(InputError, match="pass Y"):
            synthesize(K, 3, method)
    with pytest.raises(InputError, match="from 1 to 40"):
        synthesize(K, 41, "pca")
    with pytest.raises(InputError, match="pass a number"):
        synthesize(K, 3, "galerkin", Y=Y, ridge="loo")
    with pytest.raises(ShapeError):
        synthesize(K, 3, "krylov", Y=Y[:20])
    with pytest.raises(NonFiniteError):
        synthesize(K, 3, "krylov", Y=Y * float("nan"))
