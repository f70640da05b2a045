"""Tables and pictures of a report."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from .. import plotting
from ..errors import MissingDependencyError
from ..results import Eigenpairs, Estimate, TruncationRank
from ..results.estimate import format_estimate
from .measures import KernelReport, Report
from .record import write_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.table import Table


__all__ = [
    "draw_figures",
    "format_estimate",
    "print_report",
]


_LEADING = 5


def format_with_error(value: float, error: float) -> str:
    """Return ``value ± bound`` of an eigenvalue, to the second digit of the bound, at most seven digits.

    Example:
        >>> from ntkops.report.drawing import format_with_error
        >>> format_with_error(202661.0, 380.0), format_with_error(1 / 3, 1e-9)
        ('202660 ± 380', '0.3333333 ± 1e-09')
    """
    if not error > 0:
        return f"{value:.6g}"
    places = 1 - math.floor(math.log10(error))
    largest = 6 - math.floor(math.log10(abs(value))) if value else places
    if places > largest:
        return f"{value:#.7g}".rstrip(".") + f" ± {error:.1g}"
    if error > 1e-4 and abs(value) < 1e7:
        return f"{round(value, places):.{max(places, 0)}f} ± {round(error, places):.{max(places, 0)}f}"
    digits = max(0, places + math.floor(math.log10(abs(value)))) if value else 0
    return f"{value:.{digits}e} ± {error:.1e}"


def print_report(report: Report, console: Console) -> None:
    """Print the tables of a report.

    Args:
        report: The report.
        console: Where to.

    Raises:
        MissingDependencyError: If rich is missing.
    """
    try:
        from rich.text import Text
    except ImportError as error:
        raise MissingDependencyError("tables need rich, which is not installed: pip install rich") from error
    console.print(Text(f"Neural tangent kernel of {report.title}", style="bold"))
    console.print(_sizes(report.kernels[0]), markup=False, highlight=False)
    console.print(_kernel_table(report))
    if any(kernel.classes is not None for kernel in report.kernels):
        console.print(_class_table(report))
    for note in report.notes:
        console.print(Text("note: ", style="yellow").append(note, style="default"))


def _sizes(kernel: KernelReport) -> str:
    return (
        f"n = {kernel.size} ({kernel.num_samples} samples x {kernel.num_outputs} outputs), "
        f"P = {kernel.num_parameters}; {kernel.dtype} on {kernel.device}; "
        f"engine {kernel.engine.engine}, mode {kernel.engine.mode}"
    )


def _new_table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", title_style="italic")


def _kernel_table(report: Report) -> Table:
    from rich.text import Text

    kernels = report.kernels
    table = _new_table("")
    table.add_column("quantity")
    for kernel in kernels:
        table.add_column(Text(kernel.name), justify="right", no_wrap=True)
        table.add_column("method, passes", style="dim")

    def add(label: str, estimates: list[Estimate | None]) -> None:
        if any(estimate is not None for estimate in estimates):
            cells = [cell for e in estimates for cell in (_value(e), _provenance(e))]
            table.add_row(label, *map(Text, cells))

    add("trace", [kernel.trace for kernel in kernels])
    add("Frobenius norm", [kernel.frobenius_norm for kernel in kernels])
    add("effective rank", [kernel.effective_rank for kernel in kernels])
    for position in range(min(_LEADING, *(len(kernel.leading.values) for kernel in kernels))):
        cells = [cell for kernel in kernels for cell in _eigenvalue(kernel.leading, position)]
        table.add_row(f"eigenvalue {position + 1}", *map(Text, cells))
    if report.alignment is not None:
        table.add_section()
        blank = [""] * (2 * len(kernels) - 2)
        cells = [*blank, _value(report.alignment), _provenance(report.alignment)]
        table.add_row("alignment", *map(Text, cells))
    if report.accuracies:
        table.add_section()
        add("accuracy", [report.accuracies.get(kernel.name) for kernel in kernels])
    return table


def _value(estimate: Estimate | None) -> str:
    return "undefined" if estimate is None else format_estimate(estimate)


def _provenance(estimate: Estimate | None) -> str:
    return "" if estimate is None else _made(estimate)


def _eigenvalue(pairs: Eigenpairs, position: int) -> tuple[str, str]:
    value = format_with_error(float(pairs.values[position]), float(pairs.residuals[position]))
    if position:
        return value, ""
    return value, _made(pairs)


def _made(result: Estimate | Eigenpairs | TruncationRank) -> str:
    method = ("dense" if result.exact else "lanczos") if isinstance(result, TruncationRank) else result.method
    made = f"{method}, {result.passes}" if result.passes else method
    return made if result.converged else f"{made}, not converged"


def _class_table(report: Report) -> Table:
    from rich.text import Text

    shown = {kernel.name: kernel.classes for kernel in report.kernels if kernel.classes is not None}
    first = next(iter(shown.values()))
    size = report.kernels[0].num_samples
    table = _new_table(
        f"Truncation ranks: eigenvalues, of {size}, that hold {100 * (1 - first.epsilon):g} % of the trace"
    )
    table.add_column("output")
    for number in range(len(first.rank)):
        table.add_column(str(number), justify="right")
    table.add_column("method, passes", style="dim")
    for name, classes in shown.items():
        ranks = [str(rank) for rank in classes.rank.tolist()]
        table.add_row(Text(name), *ranks, _made(classes))
    return table


# -- the plots of a report, drawn with `ntkops.plotting` and written whole


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
            "plots need matplotlib, which is not installed: pip install matplotlib"
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
