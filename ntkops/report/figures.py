"""The plots of a report, drawn with `ntkops.plotting` and written whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .. import plotting
from ..errors import MissingDependencyError
from .measures import Report
from .record import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["draw_figures"]


def draw_figures(report: Report, directory: Path) -> list[Path]:
    """Write the plots that a report has numbers for.

    Args:
        report: The report.
        directory: An existing directory.

    Returns:
        Paths of the PNG files: the spectrum; the spectra and truncation ranks of the classes; the error of
        estimators against passes.

    Raises:
        MissingDependencyError: If matplotlib is missing.
    """
    drawings: dict[str, Callable[[Report], Figure]] = {"spectrum.png": _spectrum}
    if any(kernel.classes is not None for kernel in report.kernels):
        drawings |= {"class_spectra.png": _class_spectra, "truncation_ranks.png": _truncation_ranks}
    if report.convergence is not None:
        drawings["estimator_errors.png"] = _convergence
    paths = []
    for name, draw in drawings.items():
        save = partial(draw(report).savefig, format="png", dpi=150)
        paths.append(write_whole(directory / name, save))
    return paths


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(
            "plots need matplotlib, which is not installed: pip install 'ntkops[demo]'"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def _spectrum(report: Report) -> Figure:
    figure = _figure(6.4, 4.4)
    ax = figure.subplots()
    for kernel in report.kernels:
        plotting.plot_spectrum(kernel.leading, ax, label=kernel.name)
    first = report.kernels[0]
    ax.set_title(f"Leading eigenvalues of K, n = {first.size}, P = {first.num_parameters}")
    return figure


def _class_spectra(report: Report) -> Figure:
    shown = [kernel for kernel in report.kernels if kernel.classes is not None]
    figure = _figure(5.6 * len(shown), 4.6)
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for kernel, ax in zip(shown, panels, strict=True):
        assert kernel.classes is not None
        plotting.plot_class_spectra(kernel.classes, ax)
        ax.set_title(f"{kernel.name}; marks hold {100 * (1 - kernel.classes.epsilon):g} % of the trace")
        if ax is not panels[0]:
            ax.set_ylabel("")
            ax.get_legend().remove()  # the same lines in every panel
    return figure


def _truncation_ranks(report: Report) -> Figure:
    shown = {kernel.name: kernel.classes for kernel in report.kernels if kernel.classes is not None}
    classes = next(iter(shown.values()))
    figure = _figure(6.4, 4.0)
    ax = plotting.plot_truncation_ranks(shown, figure.subplots())
    share, samples = 100 * (1 - classes.epsilon), report.kernels[0].num_samples
    ax.set_title(f"Eigenvalues, of {samples}, that hold {share:g} % of the trace")
    return figure


def _convergence(report: Report) -> Figure:
    assert report.convergence is not None
    curves = report.convergence
    figure = _figure(6.4, 4.4)
    ax = plotting.plot_error_against_passes(curves.estimates, curves.reference, figure.subplots())
    ax.set_title(f"Estimating the trace of K {curves.kernel}, {curves.repeats} seeds each")
    return figure
