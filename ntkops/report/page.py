"""A report as one page for the browser, with its pictures inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

from .drawing import format_estimate, print_report
from .measures import KernelReport, Report
from .record import write_whole

__all__ = ["write_page"]

_WIDTH = 120  # columns of the tables

_CAPTIONS = {
    "spectrum.png": "Leading eigenvalues. What lies along the first eigenvectors is learned first; a steep "
    "curve means that few directions carry everything.",
    "class_spectra.png": "The spectrum of each output's own kernel, with a mark at its truncation rank.",
    "truncation_ranks.png": "How many eigenvalues hold 95 % of each output's trace.",
    "estimator_errors.png": "Errors of estimators against the exact trace, by the passes they made; dotted, "
    "the errors that they report themselves.",
}

_HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }}
pre {{ overflow-x: auto; font-size: 13px; line-height: 1.35 }}
img {{ max-width: 100%; height: auto }} figure {{ margin: 2rem 0 }} figcaption {{ color: #555 }}
dt {{ font-weight: 600; margin-top: .8rem }} dd {{ margin: 0 }}
</style></head><body>
"""


def write_page(report: Report, plots: Sequence[Path], record: dict[str, Any], path: Path) -> Path:
    """Write a page that needs no other file.

    Args:
        report: The report.
        plots: Its pictures.
        record: What ``report.json`` has: options, versions.
        path: Where the page goes.

    Returns:
        The path.
    """
    title = f"Neural tangent kernel of {report.title}"
    parts = [
        _HEAD.format(title=escape(title)),
        f"<h1>{escape(title)}</h1>",
        f"<pre>{escape(_tables(report))}</pre>",
    ]
    parts.append("<h2>What the numbers say</h2><dl>")
    parts += [f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in _readings(report)]
    parts.append("</dl>")
    for plot in plots:
        data = base64.b64encode(plot.read_bytes()).decode()
        caption = escape(_CAPTIONS[plot.name])
        parts.append(f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">')
        parts.append(f"<figcaption>{caption}</figcaption></figure>")
    settings = {**record["options"], **record["environment"]["versions"]}
    listed = "\n".join(f"{name}: {value}" for name, value in settings.items() if value is not None)
    parts.append(f"<h2>Settings</h2><pre>{escape(listed)}</pre></body></html>\n")
    text = "\n".join(parts)
    return write_whole(path, lambda file: file.write(text.encode()))


def _tables(report: Report) -> str:
    from rich.console import Console

    text = io.StringIO()
    print_report(report, Console(file=text, width=_WIDTH))
    return text.getvalue()


def _readings(report: Report) -> Iterator[tuple[str, str]]:
    """One sentence for each quantity, with the numbers of this report."""
    kernels = report.kernels
    n = kernels[0].size

    def each(value: Any) -> str:
        return ", ".join(f"{value(kernel)} {kernel.name}" for kernel in kernels)

    def sensitivity(kernel: KernelReport) -> str:
        return f"{float(kernel.trace) / n:.3g}"

    yield (
        "Trace",
        f"The mean squared length of an output's gradient is trace / {n} = {each(sensitivity)}: how far "
        "a step of unit size along its own gradient moves an output.",
    )
    ranked = [kernel for kernel in kernels if kernel.effective_rank is not None]
    if ranked:
        shown = ", ".join(f"{float(kernel.effective_rank):.3g} {kernel.name}" for kernel in ranked)  # type: ignore[arg-type]
        yield (
            "Effective rank",
            f"Gradient descent moves the {n} outputs as if along that many equal directions: {shown}.",
        )

    def limit(kernel: KernelReport) -> str:
        largest = float(kernel.leading.values[0])
        return f"{2 / largest:.3g}" if largest > 0 else "none"

    yield (
        "Largest eigenvalue",
        "Gradient descent on half the summed squared error of these samples is stable for learning rates "
        f"below 2 / eigenvalue: {each(limit)}.",
    )
    if report.alignment is not None:
        yield (
            "Alignment",
            f"The cosine of the first and the last kernel is {format_estimate(report.alignment)}: 1 means "
            "that training left the kernel's shape alone (lazy), and the lower, the more features were "
            "learned (rich).",
        )
    if any(kernel.classes is not None for kernel in kernels):
        yield (
            "Truncation rank",
            "How many eigenvalues of an output's own kernel hold 95 % of its trace: its tail, which the "
            "effective rank, ruled by the largest eigenvalues, does not see.",
        )
