"""Samples chosen by their inputs or by a layer's activations, against dense distances."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

import ntkops
from ntkops import distill, errors

METHODS = ["kmedoids", "kmeans++", "fps", "rpcholesky", "random"]


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def blobs(count=60, dim=5, seed=1):
    """Return samples around three means, and which."""
    generator = draw(seed)
    labels = torch.arange(count) % 3
    means = 4 * torch.randn(3, dim, generator=generator).double()
    return means[labels] + torch.randn(count, dim, generator=generator).double(), labels


def squares(a, b):
    return (a[:, None] - b[None]).square().sum(-1)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("labelled", [False, True])
def test_positions_weights_and_cost(method, labelled):
    x, y = blobs()
    found = distill.select_inputs(x, 10, method, labels=y if labelled else None, generator=draw())
    assert len(found.indices.unique()) == 10 and found.method == method and found.seed == 0
    groups = [y == c for c in range(3)] if labelled else [torch.ones(60, dtype=torch.bool)]
    total, expected = 0.0, torch.zeros(10).double()
    for group in groups:
        inside = group[found.indices]
        distances = squares(x[group], x[found.indices[inside]])
        nearest = distances.argmin(1)
        total += float(distances.amin(1).sum())
        expected[inside] = torch.bincount(nearest, minlength=int(inside.sum())).double()
    torch.testing.assert_close(found.weights, expected / 6)
    assert float(found.weights.mean()) == pytest.approx(1) and found.cost == pytest.approx(total / 60)
    again = distill.select_inputs(x, 10, method, labels=y if labelled else None, generator=draw())
    assert torch.equal(again.indices, found.indices) and torch.equal(again.weights, found.weights)
    if labelled:
        assert torch.equal(found.labels, y[found.indices])
        assert torch.bincount(found.labels).tolist() == [4, 3, 3]
    else:
        assert found.labels is None


def test_medoids_are_the_best_of_all_choices():
    x = torch.randn(9, 2, generator=draw(3)).double()
    best = min(
        float(squares(x, x[list(chosen)]).amin(1).mean()) for chosen in itertools.combinations(range(9), 3)
    )
    found = min(
        (distill.select_inputs(x, 3, generator=draw(seed)) for seed in range(6)), key=lambda f: f.cost
    )
    assert found.cost == pytest.approx(best)


def test_medoids_are_a_fixed_point_of_the_alternation():
    x, _ = blobs()
    found = distill.select_inputs(x, 7, generator=draw())
    nearest = squares(x, x[found.indices]).argmin(1)
    for number, medoid in enumerate(found.indices.tolist()):
        members = (nearest == number).nonzero().flatten()
        sums = squares(x[members], x[members]).sum(0)
        assert members[sums.argmin()] == medoid
    others = [
        distill.select_inputs(x, 7, method, generator=draw()).cost
        for method in METHODS
        if method != "kmedoids"
    ]
    assert found.cost < min(others)


def test_farthest_points_cover():
    x, _ = blobs()
    found = distill.select_inputs(x, 8, "fps", generator=draw()).indices.tolist()
    for step in range(1, 8):
        nearest = squares(x, x[found[:step]]).amin(1)
        assert float(nearest[found[step]]) == pytest.approx(float(nearest.max()))


def test_pivots_are_drawn_by_what_is_left():
    # Of two points far from each other and 38 copies of a third, the law is known: the first pivot is
    # uniform, then copies have nothing left.
    x = torch.cat([torch.zeros(38, 2), torch.tensor([[50.0, 0.0], [0.0, 50.0]])])
    for seed in range(5):
        found = distill.select_inputs(x, 3, "rpcholesky", generator=draw(seed))
        assert {38, 39} <= set(found.indices.tolist())
        assert found.weights.sort().values.tolist() == pytest.approx([3 / 40, 3 / 40, 38 * 3 / 40])


@pytest.mark.parametrize("method", METHODS)
def test_copies(method):
    x = torch.ones(8, 3)
    found = distill.select_inputs(x, 5, method, generator=draw())
    assert len(found.indices.unique()) == 5 and found.cost == 0.0
    assert float(found.weights.min()) > 0  # each stands for itself at least
    two = torch.cat([torch.zeros(4, 3), torch.ones(4, 3)])
    found = distill.select_inputs(two, 8, method, generator=draw())
    assert sorted(found.indices.tolist()) == list(range(8)) and found.weights.tolist() == [1.0] * 8


def test_a_large_mean_costs_no_digits():
    x, y = blobs()
    here = distill.select_inputs(x, 9, labels=y, generator=draw())
    there = distill.select_inputs(x + 1e6, 9, labels=y, generator=draw())
    assert torch.equal(here.indices, there.indices) and there.cost == pytest.approx(here.cost, rel=1e-6)


@pytest.mark.parametrize(
    "sizes, m, expected",
    [
        ([5, 5, 5], 7, [3, 2, 2]),
        ([1, 10, 10], 12, [1, 6, 5]),
        ([2, 3], 5, [2, 3]),
        ([4, 9, 2], 3, [1, 1, 1]),
    ],
)
def test_classes_are_balanced(sizes, m, expected):
    y = torch.cat([torch.full((size,), 10 * c) for c, size in enumerate(sizes)])
    x = torch.randn(len(y), 2, generator=draw())
    found = distill.select_inputs(x, m, "random", labels=y, generator=draw())
    assert [int((found.labels == 10 * c).sum()) for c in range(len(sizes))] == expected


def test_activations_of_a_layer():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(72, 4)).double()
    net.requires_grad_(False)
    x = torch.randn(30, 1, 8, 8, generator=draw()).double()
    z = net[1](net[0](x)).flatten(1)
    expected = distill.select_inputs(z, 6, generator=draw())
    found = distill.select_inputs(x, 6, model=net, features="1", generator=draw())
    assert torch.equal(found.indices, expected.indices)
    assert found.cost == pytest.approx(expected.cost)
    batches = [x[:12], x[12:]]
    found = distill.select_inputs(batches, 6, model=net, features="1", generator=draw())
    assert torch.equal(found.indices, expected.indices)


def test_weights_go_into_a_regression():
    x, y = blobs()
    net = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    found = distill.select_inputs(x, 12, labels=y, generator=draw())
    points, targets = x[found.indices], net(x[found.indices]).detach()
    K = ntkops.ntk(net, points)
    fitted = ntkops.KernelRidge(1e-2, relative=False).fit(K, targets, sample_weight=found.weights)
    dense = K.to_dense() + torch.diag((1e-2 / found.weights).repeat_interleave(3))
    alpha = torch.linalg.solve(dense, targets.flatten())
    torch.testing.assert_close(fitted.dual_coef_.flatten(), alpha)


def test_arrays_and_whole_numbers_are_inputs():
    images = np.random.default_rng(0).integers(0, 256, (20, 4, 4), dtype=np.uint8)
    found = distill.select_inputs(images, 4, generator=draw())
    same = distill.select_inputs(torch.from_numpy(images).double(), 4, generator=draw())
    assert torch.equal(found.indices, same.indices)


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"m": 0}, errors.InputError, "1 to 60"),
        ({"m": 61}, errors.InputError, "1 to 60"),
        ({"m": 2, "labels": blobs()[1]}, errors.InputError, "number of classes, 3"),
        ({"method": "medoids"}, errors.InputError, "kmedoids"),
        ({"labels": blobs()[1][:5]}, errors.ShapeError, r"\(60,\)"),
        ({"labels": blobs()[1].double()}, errors.InputError, "integers"),
        ({"x": [1, "a"]}, errors.InputError, "model="),
        ({"x": torch.zeros(0, 3)}, errors.ShapeError, "samples first"),
        ({"x": torch.full((60, 2), torch.nan)}, errors.NonFiniteError, "sample 0"),
        ({"x": 1e200 * blobs()[0]}, errors.NonFiniteError, "overflow"),
        ({"x": torch.zeros(60, 2, dtype=torch.complex64)}, errors.InputError, "complex"),
        ({"features": "0"}, errors.InputError, "pass both"),
        ({"model": nn.Linear(5, 2).double()}, errors.InputError, "pass both"),
        ({"model": nn.Linear(5, 2).double(), "features": "body"}, errors.NtkopsError, "body"),
    ],
)
def test_bad_arguments(change, error, match):
    with pytest.raises(error, match=match):
        distill.select_inputs(**{"x": blobs()[0], "m": 10, **change})
