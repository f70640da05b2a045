"""What stays of a report: files written whole or not at all, and what the numbers were made with."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch

from ..errors import InputError
from ..results import Eigenpairs, Estimate, TruncationRank
from .measures import Convergence, KernelReport, Report

__all__ = ["as_record", "environment", "peak_memory_bytes", "prepare_directory", "write_json", "write_whole"]

_PACKAGES = ("torch", "linear-operator", "numpy", "scipy", "scikit-learn", "matplotlib", "rich")
_NUMBERS = re.compile(r"\[\n([-+.,eE\d\s]*)\]")


def as_record(report: Report) -> dict[str, Any]:
    """Return all numbers of a report as plain values, ready for JSON."""
    return {
        "title": report.title,
        "settings": dataclasses.asdict(report.settings),
        "kernels": [_kernel(kernel) for kernel in report.kernels],
        "alignment": _estimate(report.alignment),
        "accuracy": {name: estimate.to_dict() for name, estimate in report.accuracies.items()},
        "convergence": _convergence(report.convergence),
        "notes": list(report.notes),
    }


def _estimate(estimate: Estimate | None) -> dict[str, Any] | None:
    return None if estimate is None else estimate.to_dict()


def _kernel(kernel: KernelReport) -> dict[str, Any]:
    return {
        "name": kernel.name,
        "n": kernel.size,
        "num_samples": kernel.num_samples,
        "num_outputs": kernel.num_outputs,
        "num_parameters": kernel.num_parameters,
        "dtype": kernel.dtype,
        "device": kernel.device,
        "engine": dataclasses.asdict(kernel.engine),
        "trace": _estimate(kernel.trace),
        "frobenius_norm": _estimate(kernel.frobenius_norm),
        "effective_rank": _estimate(kernel.effective_rank),
        "leading": _eigenpairs(kernel.leading),
        "classes": _classes(kernel.classes),
    }


def _eigenpairs(pairs: Eigenpairs) -> dict[str, Any]:
    """Return everything but the vectors, which are too long for a report."""
    return {
        "values": pairs.values.tolist(),
        "residuals": pairs.residuals.tolist(),
        "converged": pairs.converged,
        "passes": pairs.passes,
        "method": pairs.method,
        "seed": pairs.seed,
        "seconds": pairs.seconds,
    }


def _classes(classes: TruncationRank | None) -> dict[str, Any] | None:
    if classes is None:
        return None
    return {
        "truncation_ranks": classes.rank.tolist(),
        "epsilon": classes.epsilon,
        "captured": classes.captured.tolist(),
        "eigenvalues": classes.values.tolist(),
        "exact": classes.exact,
        "converged": classes.converged,
        "passes": classes.passes,
        "seed": classes.seed,
        "seconds": classes.seconds,
    }


def _convergence(convergence: Convergence | None) -> dict[str, Any] | None:
    if convergence is None:
        return None
    return {
        "kernel": convergence.kernel,
        "quantity": "trace",
        "reference": convergence.reference.to_dict(),
        "repeats": convergence.repeats,
        "estimates": {
            method: [estimate.to_dict() for estimate in estimates]
            for method, estimates in convergence.estimates.items()
        },
    }


def environment() -> dict[str, Any]:
    """Return versions, platform and threads, for the record."""
    from .. import __version__

    versions: dict[str, str | None] = {"ntkops": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch_threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
    }


def peak_memory_bytes() -> int | None:
    """Return the largest resident memory of this process so far; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    # kibibytes on Linux, bytes on macOS
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def prepare_directory(path: str | Path) -> Path:
    """Return a directory that exists and can be written to; what is in it stays.

    Args:
        path: The directory, made with its parents if it is missing.

    Returns:
        The directory.

    Raises:
        InputError: If it cannot be made or written to.
    """
    directory = Path(path)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise InputError(
            f"--out: cannot write into {str(directory)!r} ({error.strerror or error}); name another directory"
        ) from error
    return directory


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> Path:
    """Write a file beside its place and move it there, so that no reader ever sees half of it.

    Args:
        path: Where the file goes; one that is there is replaced.
        write: Called with the open binary file.

    Returns:
        The path.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return path


def write_json(path: Path, record: Mapping[str, Any]) -> Path:
    """Write a record as indented JSON that every reader accepts: no NaN, no infinity."""
    text = json.dumps(record, indent=2, allow_nan=False) + "\n"
    text = _NUMBERS.sub(lambda found: f"[{' '.join(found[1].split())}]", text)  # a list of numbers, a line
    return write_whole(path, lambda file: file.write(text.encode()))
