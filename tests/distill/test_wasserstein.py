"""Synthesis by matching features: barycentres against transport solvers, statistics, resuming, refusals."""

import copy

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, linprog
from torch import nn

from ntkops import checkpoint
from ntkops.distill import _descent
from ntkops.distill._survey import Labelled, survey
from ntkops.distill._teacher import Teacher, class_moments
from ntkops.distill.barycenter import wasserstein_barycenter
from ntkops.distill.wasserstein import wasserstein
from ntkops.errors import (
    CheckpointError,
    InputError,
    NonDeterministicDataError,
    NonFiniteError,
    OutputError,
    ShapeError,
    UnsupportedModelError,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def network(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 5, 3, 2, 1),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 2),
    )
    model(torch.randn(64, 1, 6, 6))
    return model.eval()


def data(count=60, dtype=torch.float32):
    y = torch.arange(count) % 2
    x = torch.randn(count, 1, 6, 6, generator=seeded(1), dtype=dtype) + y.reshape(-1, 1, 1, 1)
    return x, y


def vectors(count, width=3, seed=0):
    return torch.randn(count, width, generator=seeded(seed), dtype=torch.float64)


def transport(features, points, weights):
    """Return W₂² by a linear programme over all couplings."""
    f, b = features.numpy(), points.numpy()
    costs = ((f[:, None] - b[None]) ** 2).sum(-1)
    n, k = costs.shape
    rows, columns = np.kron(np.eye(n), np.ones(k)), np.kron(np.ones(n), np.eye(k))
    masses = np.concatenate([np.full(n, 1 / n), weights.numpy()])
    found = linprog(costs.ravel(), A_eq=np.vstack([rows, columns]), b_eq=masses, method="highs")
    assert found.status == 0
    return found.fun


# barycentres


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("weights", ["free", "uniform"])
def test_the_cost_is_the_wasserstein_distance(weights, seed):
    features = vectors(23, seed=seed)
    found = wasserstein_barycenter(features, 4, weights=weights, generator=seeded(seed))
    assert found.cost == pytest.approx(transport(features, found.points, found.weights), rel=1e-8)
    assert float(found.weights.sum()) == pytest.approx(1)
    if weights == "uniform":
        assert sorted((found.weights * 23).round().tolist()) == [5, 6, 6, 6]
    assert torch.allclose(found.weights * 23, (found.weights * 23).round())


def test_free_weights_cost_no_more_than_any_others():
    features = vectors(30)
    free = wasserstein_barycenter(features, 5, generator=seeded())
    assert free.cost <= transport(features, free.points, torch.full((5,), 0.2, dtype=torch.float64))


def test_equal_shares_are_an_assignment():
    features = vectors(24)
    found = wasserstein_barycenter(features, 4, weights="uniform", generator=seeded())
    assert found.weights.tolist() == [0.25] * 4
    places = found.points.repeat_interleave(6, dim=0)
    costs = (features[:, None] - places[None]).square().sum(-1).numpy()
    assert found.cost == pytest.approx(costs[linear_sum_assignment(costs)].sum() / 24, rel=1e-8)


@pytest.mark.parametrize("weights", ["free", "uniform"])
def test_as_many_points_as_vectors_are_the_vectors(weights):
    features = vectors(6)
    found = wasserstein_barycenter(features, 6, weights=weights, generator=seeded())
    assert found.cost == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("scale", [1e-20, 1e18])
def test_barycentres_scale_with_the_vectors(scale):
    features = vectors(20)
    plain = wasserstein_barycenter(features, 3, generator=seeded())
    scaled = wasserstein_barycenter(features * scale, 3, generator=seeded())
    assert scaled.cost == pytest.approx(plain.cost * scale**2, rel=1e-9)
    torch.testing.assert_close(scaled.points / scale, plain.points)


def test_barycentres_refuse():
    same = torch.ones(5, 2)
    for error, arguments, message in [
        (InputError, (same, 2), "different"),
        (InputError, (same, 0), "at least 1"),
        (ShapeError, (same[0], 1), "shape"),
        (NonFiniteError, (same * float("nan"), 1), "NaN"),
    ]:
        with pytest.raises(error, match=message):
            wasserstein_barycenter(*arguments)
    with pytest.raises(InputError, match="'free' or 'uniform'"):
        wasserstein_barycenter(same, 1, weights="learnt")


# what the model shows


def test_statistics_are_variances_of_whole_classes_whatever_the_batches():
    model, (x, y) = network(), data(dtype=torch.float64)
    model = model.double()
    entering = model[0](x).detach()
    parts = [(x[i : i + 7], y[i : i + 7]) for i in range(0, 60, 7)]
    for source in ((x, y), parts):
        with torch.no_grad():
            found = survey(Teacher(model, None, True), Labelled(source, torch.device("cpu")), 1)
        for number in range(2):
            rows = entering[y == number].movedim(1, -1).flatten(0, -2)
            torch.testing.assert_close(found.moments[0].means[number], rows.mean(0))
            torch.testing.assert_close(found.moments[0].variances[number], rows.var(0, correction=0))
        assert len(found.moments) == 2
        torch.testing.assert_close(found.features.float(), model[:-1](x).detach().float())
        assert found.mean == pytest.approx(float(x.mean()))
        assert found.deviation == pytest.approx(float(x.std(correction=0)))


def test_moments_of_a_class_without_samples_are_zero():
    members = torch.tensor([[1, 1], [0, 0]])
    found = class_moments(torch.ones(2, 3), members)
    assert found.counts.tolist() == [2, 0]
    assert found.means.tolist() == [[1.0] * 3, [0.0] * 3]
    assert not found.variances.any()


@pytest.mark.parametrize("features", [None, "6", lambda model, x: model[:7](x)])
def test_features_by_default_by_path_or_by_callable(features):
    model, (x, y) = network(), data()
    view = Teacher(model, features, False).look(x, y, None)
    torch.testing.assert_close(view.features, model[:8](x))


# synthesis


@pytest.mark.parametrize("start", ["medoids", "noise"])
@pytest.mark.parametrize("weights", ["free", "uniform"])
def test_synthesis_lowers_its_loss_and_leaves_everything_alone(start, weights):
    model, (x, y) = network(), data()
    model.train()
    before = copy.deepcopy(model.state_dict())
    kept, state = x.clone(), torch.get_rng_state()
    generator = seeded()
    found = wasserstein(model, (x, y), 3, start=start, weights=weights, iterations=30, generator=generator)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(x, kept)
    assert model.training and all(
        torch.equal(before[name], value) for name, value in model.state_dict().items()
    )
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert found.loss == float(found.losses.min()) < float(found.losses[0])
    torch.testing.assert_close(found.targets, model.eval()(found.inputs).detach())
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1]
    torch.testing.assert_close(found.weights.reshape(2, 3).sum(1), torch.ones(2, dtype=torch.float64))
    total = found.terms["cross_entropy"] + found.terms["features"] + found.terms["statistics"]
    torch.testing.assert_close(total, found.losses, rtol=1e-6, atol=1e-6)
    if start == "medoids":
        assert len(set(found.indices.tolist())) == 6
        assert torch.equal(y[found.indices], found.labels)
    else:
        assert found.indices is None


def test_the_losses_are_those_of_the_formula():
    model, (x, y) = network().double(), data(dtype=torch.float64)
    found = wasserstein(
        model, (x, y), 4, iterations=0, features_weight=0.5, statistics_weight=2.0, generator=seeded()
    )
    z, labels = found.inputs, found.labels
    torch.testing.assert_close(z, x[found.indices])
    points = torch.cat(
        [
            wasserstein_barycenter(model[:8](x[y == c]).detach(), 4, generator=g).points
            for g in [seeded()]
            for c in range(2)
        ]
    )
    entropy = nn.functional.cross_entropy(model(z), labels)
    distance = (model[:8](z) - points).norm()
    statistics = 0.0
    for layer in (1, 4):
        real, made = model[:layer](x), model[:layer](z)
        for c in range(2):
            a = real[y == c].movedim(1, -1).flatten(0, -2)
            b = made[labels == c].movedim(1, -1).flatten(0, -2)
            statistics += (a.mean(0) - b.mean(0)).norm() / 2
            statistics += (a.var(0, correction=0) - b.var(0, correction=0)).norm() / 2
    expected = entropy + 0.5 * distance + 2 * statistics
    assert found.loss == pytest.approx(float(expected.detach()), rel=1e-10)


def test_a_model_without_normalisation_and_a_loader():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 6), nn.ReLU(), nn.Linear(6, 2))
    x, y = torch.randn(30, 3), torch.arange(30) % 2
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=8)
    options = {"statistics_weight": 0, "iterations": 5}
    ours = wasserstein(model, loader, 2, generator=seeded(), **options)
    whole = wasserstein(model, (x, y), 2, generator=seeded(), **options)
    torch.testing.assert_close(ours.inputs, whole.inputs)
    with pytest.raises(InputError, match="no batch normalisation"):
        wasserstein(model, loader, 2)


def test_an_augmented_run_returns_its_last_iterate():
    model, (x, y) = network(), data()

    def shift(z, generator):
        return z.roll(int(torch.randint(0, 3, (1,), generator=generator)), -1)

    runs = [wasserstein(model, (x, y), 2, iterations=6, augment=shift, generator=seeded()) for _ in range(2)]
    assert torch.equal(runs[0].inputs, runs[1].inputs) and runs[0].iteration == 6


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("start", ["medoids", "noise"])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, monkeypatch, start, given):
    model, (x, y) = network(), data()
    options = {"start": start, "iterations": 12, "checkpoint_every": 4}

    def run(path, generator=None):
        return wasserstein(model, (x, y), 2, path=path, generator=generator, **options)

    calls, plain = [], checkpoint.save

    def save(*args, **kwargs):
        plain(*args, **kwargs)
        calls.append(1)
        if len(calls) == 2:
            raise Interrupt

    place = tmp_path / "run.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(_descent.checkpoint, "save", save)
        with pytest.raises(Interrupt):
            run(place, seeded(3) if given else None)
    resumed = run(place, seeded(3) if given else None)
    whole = run(None, seeded(resumed.seed))
    assert torch.equal(whole.inputs, resumed.inputs) and torch.equal(whole.losses, resumed.losses)
    assert torch.equal(whole.targets, resumed.targets) and whole.iteration == resumed.iteration
    with pytest.raises(CheckpointError, match="loss"):
        wasserstein(model, (x, y), 2, path=place, statistics_weight=0.1, **options)
    with pytest.raises(CheckpointError, match="model"):
        wasserstein(network(1), (x, y), 2, path=place, **options)


def test_what_is_refused():
    model, (x, y) = network(), data()
    cases = [
        (InputError, {"data": x}, "labels are missing"),
        (InputError, {"data": [(x, None)]}, "labels are missing"),
        (InputError, {"data": iter([(x, y)])}, "more than once"),
        (InputError, {"data": []}, "no samples"),
        (InputError, {"data": (x, y.float())}, "class numbers"),
        (InputError, {"data": (x, y[:-1])}, "60 samples with 59 labels"),
        (InputError, {"data": (x, y + 1)}, "label 2 is out of range"),
        (InputError, {"data": (x, y * 0)}, "class 1 is empty"),
        (InputError, {"points_per_class": 31}, "class 0 has 30 samples"),
        (InputError, {"data": (x * 0, y)}, "different"),
        (NonFiniteError, {"data": (x / 0, y)}, "NaN or infinity"),
        (InputError, {"points_per_class": 0}, "points_per_class"),
        (InputError, {"weights": "learnt"}, "weights"),
        (InputError, {"start": "zeros"}, "start"),
        (InputError, {"statistics_weight": -1}, "statistics_weight"),
        (InputError, {"iterations": 1.5}, "iterations"),
        (InputError, {"features": "body"}, "no module 'body'"),
        (OutputError, {"features": lambda model, x: 3}, "features"),
        (OutputError, {"model": model[:5]}, "logits"),
        (UnsupportedModelError, {"model": lambda x: x}, "nn.Module"),
    ]
    for error, changes, message in cases:
        arguments = {"model": model, "data": (x, y), "points_per_class": 2, "iterations": 1} | changes
        if arguments["model"] is not model:
            arguments["features"] = "0"
        with pytest.raises(error, match=message):
            wasserstein(**arguments)


def test_medoids_refuse_data_in_another_order():
    x, y = data()

    class Shuffled:
        def __init__(self):
            self.passes = 0

        def __iter__(self):
            self.passes += 1
            order = torch.randperm(60, generator=seeded(self.passes))
            return iter([(x[order], y[order])])

    with pytest.raises(NonDeterministicDataError, match="fixed order"):
        wasserstein(network(), Shuffled(), 2)
    assert wasserstein(network(), Shuffled(), 2, start="noise", iterations=1).inputs.shape == (4, 1, 6, 6)
