"""Plots of losses and outputs: what is drawn, and what is refused."""

import math

import pytest
import torch

import ntkops
from ntkops.errors import NonFiniteError, ShapeError

from .reference import spectrum

pytest.importorskip("matplotlib")


@pytest.fixture
def ax():
    from matplotlib.figure import Figure

    return Figure().subplots()


@pytest.fixture(scope="module")
def path():
    K = spectrum(torch.logspace(0, -3, 20, dtype=torch.float64))
    Y = torch.randn(20, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return ntkops.gradient_flow(K, Y, [0.0, 1.0, 1e2, 1e4, math.inf])


def test_losses_are_lines_and_limits_dotted(ax, path):
    ntkops.plotting.plot_losses(path.times, path.losses, ax, label="training")
    ntkops.plotting.plot_losses([0, 1, 100], [1.0, 0.9, 0.8], ax, label="test")
    first, limit, second = ax.get_lines()
    assert first.get_ydata().tolist() == path.losses[:4].tolist()
    assert limit.get_linestyle() == ":" and limit.get_color() == first.get_color() != second.get_color()
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["training", "test"]


def test_outputs_have_the_band_of_their_bounds(ax, path):
    ntkops.plotting.plot_outputs(path.times, path.outputs[:, 3], 0.1 + path.bounds, ax, labels="ab")
    lines = [line for line in ax.get_lines() if line.get_linestyle() == "-"]
    assert [line.get_label() for line in lines] == ["a", "b"]
    for column, band in enumerate(ax.collections):
        low = path.outputs[1, 3, column] - 0.1 - path.bounds[1]
        assert any(abs(y - float(low)) < 1e-12 for y in band.get_paths()[0].vertices[:, 1])
    unbounded = torch.full((5,), math.inf)
    ntkops.plotting.plot_outputs(path.times, path.outputs[:, 3], unbounded, ax)


def test_what_does_not_fit_is_refused(ax, path):
    with pytest.raises(ShapeError, match="one for each"):
        ntkops.plotting.plot_losses(path.times, path.losses[:2], ax)
    with pytest.raises(ShapeError, match="those of one sample"):
        ntkops.plotting.plot_outputs(path.times, path.outputs, None, ax)
    with pytest.raises(ShapeError, match="bounds"):
        ntkops.plotting.plot_outputs(path.times, path.outputs[:, 0], path.bounds[:2], ax)
    with pytest.raises(ShapeError, match="labels"):
        ntkops.plotting.plot_outputs(path.times, path.outputs[:, 0], None, ax, labels=["one"])
    with pytest.raises(ShapeError, match="finite"):
        ntkops.plotting.plot_losses([math.inf], [1.0], ax)
    with pytest.raises(NonFiniteError):
        ntkops.plotting.plot_losses([0.0, 1.0], [1.0, math.nan], ax)
