"""Drawings of regressions."""

import pytest
import torch

from ntkops import errors
from ntkops.plotting import plot_label_energy, plot_ridge_path
from ntkops.regression import KernelRidge, error_terms
from ntkops.results import RidgePath
from tests.regression.problems import gram, labels

figure = pytest.importorskip("matplotlib.figure")


def axes():
    return figure.Figure().subplots()


def test_a_path_of_ridges():
    fitted = KernelRidge([0.0, 1e-3, 1e-1, 10.0]).fit(gram(5), labels(12))
    ax = plot_ridge_path(fitted.ridge_path_, axes(), label="digits")
    line, best = ax.get_lines()
    assert list(line.get_xdata()) == pytest.approx([1e-3, 1e-1, 10.0])
    assert list(best.get_xdata()) == pytest.approx([fitted.ridge_ / fitted.scale_])
    assert "1 singular" in ax.get_legend().get_texts()[0].get_text()
    assert "relative" in ax.get_xlabel()


def test_a_path_without_errors():
    path = RidgePath(torch.ones(2), torch.full((2,), float("inf")), 1.0, 0)
    with pytest.raises(errors.InputError, match="nothing to draw"):
        plot_ridge_path(path, axes())


def test_label_energy():
    terms = error_terms(gram(20), labels(12, 2), 0.1)
    ax = plot_label_energy(terms, axes(), labels=["a", "b"])
    assert [float(line.get_ydata()[-1]) for line in ax.get_lines()] == pytest.approx([1.0, 1.0])
    batch = error_terms(torch.stack([gram(20), gram(20, seed=1)]), labels(12, 2), 0.1)
    assert len(plot_label_energy(batch, axes()).get_lines()) == 2
    with pytest.raises(errors.ShapeError, match="labels"):
        plot_label_energy(terms, axes(), labels=["a"])
