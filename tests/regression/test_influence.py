"""Scores of training samples against dense references; TRAK's, by its formula, without the library."""

import sys

import pytest
import torch
from torch.func import functional_call, grad

import ntkops
from ntkops import errors
from ntkops.regression import KernelRidge
from tests.regression.problems import labels, network, samples

CLASSES, NETWORK = torch.arange(30) % 3, network()


@pytest.fixture(scope="module")
def features():
    return labels(30, 6, seed=1), labels(5, 6, seed=2)


def reference(F, F_test, ridge):
    inverse = torch.linalg.inv(F.mT @ F + ridge * torch.eye(F.shape[1], dtype=F.dtype))
    return F_test @ inverse @ F.mT


def test_one_checkpoint(features):
    F, F_test = features
    weights = labels(30, seed=3).abs()
    absolute = ntkops.influence(F, F_test, ridge=0.3, relative=False, weights=weights)
    torch.testing.assert_close(absolute, reference(F, F_test, 0.3) * weights)
    scale = float(F.square().sum()) / 30
    torch.testing.assert_close(ntkops.influence(F, F_test, ridge=0.3), reference(F, F_test, 0.3 * scale))
    torch.testing.assert_close(ntkops.influence(F, F_test, ridge=0, relative=False), reference(F, F_test, 0))


def test_it_takes_labels_to_predictions(features):
    F, F_test = features
    Y = labels(30, 2)
    fitted = KernelRidge(1e-3).fit(F @ F.T, Y)
    scores = ntkops.influence(F, F_test, ridge=1e-3)
    torch.testing.assert_close(scores @ Y, fitted.predict(F_test @ F.T))


def test_checkpoints_are_averaged(features):
    F, F_test = features
    more, more_test = labels(30, 4, seed=11), labels(5, 4, seed=12)
    weights = [labels(30, seed=3).abs(), labels(30, seed=4).abs()]
    mean = (reference(F, F_test, 0.1) + reference(more, more_test, 0.1)) / 2
    found = ntkops.influence([F, more], [F_test, more_test], ridge=0.1, relative=False, weights=weights)
    torch.testing.assert_close(found, mean * (weights[0] + weights[1]) / 2)


@pytest.mark.parametrize("rows", [1, 7])
def test_tiles_do_not_matter(features, monkeypatch, rows):
    F, F_test = features
    expected = ntkops.influence(F, F_test)
    module = sys.modules["ntkops.regression.influence"]
    monkeypatch.setattr(module, "_TILE_BYTES", rows * 8 * 6)
    torch.testing.assert_close(ntkops.influence(F, F_test), expected, rtol=1e-12, atol=1e-14)


def test_float32_and_half_precision(features):
    F, F_test = features
    expected = ntkops.influence(F, F_test)
    single = ntkops.influence(F.float(), F_test.float())
    assert single.dtype == torch.float32 and (single - expected).norm() < 1e-6 * expected.norm()
    half = ntkops.influence(F.bfloat16(), F_test.bfloat16())
    rounded = ntkops.influence(F.bfloat16().double(), F_test.bfloat16().double())
    assert half.dtype == torch.float32 and (half - rounded).norm() < 1e-6 * rounded.norm()


def test_one_feature_far_larger_than_the_others():
    F, F_test = labels(30, 6, seed=1), labels(5, 6, seed=2)
    F[:, 0], F_test[:, 0] = 1e6 * F[:, 0], 1e6 * F_test[:, 0]
    scaled = F.clone()  # the scores without a ridge do not depend on the units of a feature
    scaled[:, 0] /= 1e6
    other = F_test.clone()
    other[:, 0] /= 1e6
    found = ntkops.influence(F, F_test, ridge=0, relative=False)
    torch.testing.assert_close(found, reference(scaled, other, 0), rtol=1e-3, atol=1e-4)


# TRAK


def margin(params, inputs):
    """log p / (1 - p) of the label, (N, 1)."""
    images, y = inputs
    logits = functional_call(NETWORK, params, (images,))
    own = logits.gather(1, y[:, None])
    return own - logits.scatter(1, y[:, None], -torch.inf).logsumexp(1, keepdim=True)


def trak(checkpoints, x, y, x_test, y_test, matrices):
    """TRAK's scores by its formula: mean of φ (ΦᵀΦ)⁻¹ Φᵀ over checkpoints, times the mean of 1 - p."""

    def own_margin(params, image, label):
        logits = functional_call(NETWORK, params, (image[None],))[0]
        return logits[label] - torch.cat([logits[:label], logits[label + 1 :]]).logsumexp(0)

    scores, factors = 0, 0
    for params, matrix in zip(checkpoints, matrices, strict=True):
        projected = []
        for images, truth in ((x, y), (x_test, y_test)):
            rows = []
            for image, label in zip(images, truth.tolist(), strict=True):
                gradient = grad(own_margin)(params, image, label)
                rows.append(torch.cat([g.flatten() for g in gradient.values()]))
            projected.append(torch.stack(rows) @ matrix.T)
        phi, phi_test = projected
        scores = scores + phi_test @ torch.linalg.inv(phi.T @ phi) @ phi.T
        p = functional_call(NETWORK, params, (x,)).softmax(1).gather(1, y[:, None])[:, 0]
        factors = factors + (1 - p)
    return scores / len(checkpoints) * (factors / len(checkpoints))


def test_the_scores_of_trak(tmp_path):
    x, x_test = samples(30), samples(4, seed=2)
    y, y_test = CLASSES, torch.tensor([2, 0, 1, 1])
    checkpoints = [
        {name: p.detach() for name, p in network(seed=seed).named_parameters()} for seed in range(3)
    ]
    P = sum(p.numel() for p in checkpoints[0].values())
    matrices = [samples(8, inputs=P, seed=20 + seed) for seed in range(3)]
    trained, tested, weights = [], [], []
    for number, (params, matrix) in enumerate(zip(checkpoints, matrices, strict=True)):
        for found, inputs, name in ((trained, (x, y), "train"), (tested, (x_test, y_test), "test")):
            place = tmp_path / f"{name}{number}"
            found.append(ntkops.gradient_features(margin, inputs, matrix, place, params=params, tile_size=7))
        p = functional_call(NETWORK, params, (x,)).softmax(1).gather(1, y[:, None])[:, 0]
        weights.append(1 - p)
    found = ntkops.influence(trained, tested, ridge=0, relative=False, weights=weights)
    expected = trak(checkpoints, x, y, x_test, y_test, matrices)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)


# what does not fit


def test_features_of_different_networks_are_refused(tmp_path):
    x, x_test = samples(12), samples(4, seed=2)
    one, two = network(outputs=1), network(outputs=1, seed=1)
    F = ntkops.gradient_features(one, x, 5, tmp_path / "a")
    other = ntkops.gradient_features(two, x_test, 5, tmp_path / "b")
    with pytest.raises(errors.CheckpointError, match="parameters"):
        ntkops.influence(F, other)
    P = sum(p.numel() for p in one.parameters())
    seen = ntkops.projections.SJLT(P, 5, seed=1)
    with pytest.raises(errors.CheckpointError, match="projection"):
        ntkops.influence(F, ntkops.gradient_features(one, x_test, seen, tmp_path / "c"))
    good = ntkops.gradient_features(one, x_test, 5, tmp_path / "d")
    assert ntkops.influence(F, good).shape == (4, 12)
    assert torch.equal(ntkops.influence(F[:], good[:]), ntkops.influence(F, good))


@pytest.mark.parametrize(
    "change, error, match",
    [
        ({"F": None}, errors.InputError, "gradient_features"),
        ({"F": []}, errors.InputError, "one checkpoint"),
        ({"F": [labels(30, 6), labels(30, 6)]}, errors.InputError, "2 checkpoints, F_test 1"),
        ({"F": labels(30)}, errors.ShapeError, r"\(n, k\)"),
        ({"F": labels(30, 5)}, errors.ShapeError, "project both alike"),
        ({"F": labels(0, 6)}, errors.ShapeError, "with entries"),
        ({"F": labels(30, 6).float()}, errors.DtypeError, "cast one"),
        ({"F": torch.ones(30, 6, dtype=torch.long)}, errors.DtypeError, "floating"),
        ({"F": torch.full((30, 6), torch.nan).double()}, errors.NonFiniteError, "F is NaN"),
        ({"F_test": torch.full((5, 6), torch.inf).double()}, errors.NonFiniteError, "F_test is NaN"),
        ({"F": torch.zeros(30, 6).double()}, errors.ZeroKernelError, "relative=False"),
        ({"ridge": -1.0}, errors.InputError, "ridge"),
        ({"ridge": float("nan")}, errors.InputError, "ridge"),
        ({"ridge": "loo"}, errors.InputError, "ridge"),
        ({"weights": labels(5)}, errors.ShapeError, "one a row of F"),
        ({"weights": labels(30, 1)}, errors.ShapeError, "one a row of F"),
        ({"weights": [labels(30), labels(30)]}, errors.InputError, "2 vectors"),
        ({"weights": "1 - p"}, errors.InputError, "weights"),
        ({"weights": torch.ones(30, dtype=torch.complex64)}, errors.InputError, "complex"),
        ({"weights": torch.full((30,), torch.nan)}, errors.NonFiniteError, "weights"),
        ({"max_dense_bytes": 0}, errors.DenseMemoryError, "in parts"),
        ({"max_dense_bytes": 30 * 5 * 8 - 1}, errors.DenseMemoryError, "1.2 KiB"),
        ({"max_dense_bytes": -1}, errors.ShapeError, "max_dense_bytes"),
        ({"F": labels(4, 6), "ridge": 0.0}, errors.SingularKernelError, "ridge"),
    ],
)
def test_bad_arguments(features, change, error, match):
    F, F_test = features
    with pytest.raises(error, match=match):
        ntkops.influence(**{"F": F, "F_test": F_test, **change})


def test_other_numbers_of_rows_between_checkpoints(features):
    F, F_test = features
    with pytest.raises(errors.ShapeError, match="checkpoint 1"):
        ntkops.influence([F, F[:20]], [F_test, F_test])
    fits = ntkops.influence(F, F_test, max_dense_bytes=30 * 5 * 8)
    assert fits.shape == (5, 30)
