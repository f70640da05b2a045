"""Drawings of calibration."""

import pytest
import torch

from ntkops import errors
from ntkops.plotting import plot_calibration

figure = pytest.importorskip("matplotlib.figure")


def axes():
    return figure.Figure().subplots()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_shares_of_labels_inside_intervals():
    y, mean = normal(200, 2), normal(200, 2, seed=1)
    std = 0.5 + normal(200, 2, seed=2).square()
    ax = plot_calibration(y, mean, std, axes(), label="some")
    ideal, line = ax.get_lines()
    assert list(ideal.get_xdata()) == [0, 1]
    half = torch.distributions.Normal(0.0, 1.0)
    for level, share in zip(line.get_xdata(), line.get_ydata(), strict=True):
        z = half.icdf(torch.tensor((1 + level) / 2))
        assert share == pytest.approx(float(((y - mean).abs() <= z * std).double().mean()), abs=3e-3)
    off = abs(line.get_ydata() - line.get_xdata()).mean()
    assert ax.get_legend().get_texts()[0].get_text() == f"some ({off:.2f} off)"
    plot_calibration(y, mean, 2 * std, ax, label="wider")
    assert (ax.get_lines()[2].get_ydata() >= line.get_ydata()).all() and len(ax.get_lines()) == 3
    assert ax.get_lines()[2].get_color() != line.get_color()


def test_accuracy_against_confidence():
    logits = 3 * normal(90, 4)
    probabilities = logits.softmax(-1)
    classes = torch.multinomial(probabilities, 1, generator=torch.Generator().manual_seed(1)).squeeze(1)
    ax = plot_calibration(classes, probabilities, ax=axes(), bins=3)
    line = ax.get_lines()[1]
    confidence, chosen = probabilities.max(-1)
    for part, place in enumerate(confidence.argsort().chunk(3)):
        assert line.get_xdata()[part] == pytest.approx(float(confidence[place].mean()))
        right = (chosen == classes)[place].double().mean()
        assert line.get_ydata()[part] == pytest.approx(float(right))
    assert ax.get_legend() is None and ax.get_ylabel() == "accuracy"
    few = plot_calibration(classes[:2], probabilities[:2].float(), ax=axes(), bins=10)
    assert len(few.get_lines()[1].get_xdata()) == 2


def test_what_is_wrong_is_said():
    y = normal(6)
    with pytest.raises(errors.ShapeError, match="one shape"):
        plot_calibration(y, y, torch.ones(5), axes())
    with pytest.raises(errors.ShapeError, match="with entries"):
        plot_calibration(y[:0], y[:0], y[:0], axes())
    with pytest.raises(errors.InputError, match="noise"):
        plot_calibration(y, y, torch.zeros(6), axes())
    with pytest.raises(errors.NonFiniteError):
        plot_calibration(y, y, torch.full((6,), float("nan")), axes())
    even = torch.full((6, 2), 0.5)
    with pytest.raises(errors.ShapeError, match="std="):
        plot_calibration(y, y, ax=axes())
    with pytest.raises(errors.InputError, match="softmax"):
        plot_calibration(torch.zeros(6).long(), normal(6, 2), ax=axes())
    with pytest.raises(errors.OutOfRangeError, match="0 to 1"):
        plot_calibration(torch.full((6,), 2), even, ax=axes())
    with pytest.raises(errors.InputError, match="bins"):
        plot_calibration(torch.zeros(6).long(), even, ax=axes(), bins=0)
