"""The ``report`` command: its options, and the way from them to tables, plots and JSON."""

from __future__ import annotations

import argparse
import importlib.util
import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..engines.memory import format_bytes
from ..errors import InputError, MissingDependencyError, NtkopsWarning
from .drawing import draw_figures, print_report
from .loading import parse_device, parse_dtype
from .measures import Report, Settings, build, number_of_steps
from .page import write_page
from .record import as_record, environment, peak_memory_bytes, prepare_directory, write_json
from .subjects import Subject, digits_subject, limited_threads, user_subject

__all__ = ["add_command"]

_logger = logging.getLogger(__name__)

_SAMPLES = 300  # of the digits: the whole kernel, n = 3000, is then too large to be dense here
_EPOCHS = 30  # of training on digits
_WIDTH = 100  # columns of the tables where there is no terminal to ask

_DESCRIPTION = """\
Report on the neural tangent kernel of a network: trace, Frobenius norm, effective rank, leading
eigenvalues, spectra and truncation ranks of single outputs, each with its error, its method and the
passes that it took.

Without --model, a small classifier is trained on scikit-learn's handwritten digits, and its kernels
before and after training are compared. With --model and --data the kernel of your own network is
reported as it is: nothing is trained.
"""

_EPILOG = """\
your own network:
  --model package.module:factory    factory() takes no arguments and returns a torch.nn.Module. Dropout and
                                    batch normalisation must be in evaluation mode: return model.eval().
  --data file.npz                   numpy.savez("file.npz", x=x) or numpy.savez("file.npz", x=x, y=y): x
                                    holds samples along its first axis and goes to the network as its
                                    only argument; y, one integer label a sample, serves the accuracy.

example:
  ntkops report --model mynet:make --data samples.npz --params 'head.*' --samples 200

exit codes: 0 done, 2 wrong input (one line says what), 130 interrupted
"""


def add_command(commands: Any) -> None:
    """Add the command to an argument parser.

    Args:
        commands: What `argparse.ArgumentParser.add_subparsers` returned.
    """
    parser = commands.add_parser(
        "report",
        help="report on a kernel: tables, plots and JSON",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    own = parser.add_argument_group("your own network")
    own.add_argument("--model", metavar="MODULE:FACTORY", help="function that returns the network")
    own.add_argument("--data", metavar="FILE.npz", help="samples x, and optionally labels y")
    what = parser.add_argument_group("what is reported")
    what.add_argument(
        "--params",
        metavar="GLOB",
        action="append",
        help="parameters of the kernel, such as 'head.*'; may be repeated; default: all that require grad",
    )
    what.add_argument(
        "--output",
        metavar="KEY",
        help="what the state is: a key or position in the network's output, or the path of a module",
    )
    what.add_argument(
        "--samples",
        metavar="N",
        type=int,
        help=f"number of samples; default: {_SAMPLES} digits, or all of FILE.npz",
    )
    how = parser.add_argument_group("how")
    how.add_argument("--dtype", help="float64, float32 or bfloat16; default: that of network and data")
    how.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...; default: cpu")
    how.add_argument("--seed", type=int, default=0, help="of training, subsets and random probes; default: 0")
    how.add_argument(
        "--rtol", type=float, default=Settings.rtol, help="relative error of estimates; default: %(default)s"
    )
    how.add_argument(
        "--engine",
        choices=("auto", "autograd", "layerwise"),
        default=Settings.engine,
        help="how kernels are computed; default: %(default)s",
    )
    how.add_argument(
        "--repeats",
        type=int,
        default=Settings.repeats,
        help="repetitions in the plot of errors against passes, 0 for no such plot; default: %(default)s",
    )
    how.add_argument(
        "--threads", type=int, help="of torch on the CPU; default: 1 for the digits, else torch's own choice"
    )
    how.add_argument("--epochs", type=int, help=f"of training on digits; default: {_EPOCHS}")
    out = parser.add_argument_group("results")
    out.add_argument(
        "--out",
        metavar="DIR",
        default="report",
        help="directory for report.html, report.json, plots, made if missing; others stay; default: report",
    )
    out.add_argument("--traceback", action="store_true", help="show where an error came from")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    started = time.perf_counter()
    settings = _settings(options)
    if options.epochs is None and options.model is None:
        options.epochs = _EPOCHS
    if options.threads is None and options.model is None:
        options.threads = 1  # its matrices are small: on several threads they take longer
    _require_packages(digits=options.model is None)
    directory = prepare_directory(options.out)
    epochs = options.epochs if options.model is None else 0
    steps = epochs + number_of_steps(settings, kernels=1 if options.model else 2) + 1
    with _steps(steps) as announce, limited_threads(options.threads):
        with _own_warnings() as issued:
            report = build(_subject(options, announce), settings, announce)
        announce("plots")
        plots = draw_figures(report, directory)
    report.notes.extend(issued)
    record = {
        **as_record(report),
        "plots": [path.name for path in plots],
        "options": {key: value for key, value in vars(options).items() if key != "run"},
        "environment": environment(),
        "seconds": {"kernels": report.seconds, "after_imports": time.perf_counter() - started},
        "peak_memory_bytes": peak_memory_bytes(),
    }
    path = write_json(directory / "report.json", record)
    page = write_page(report, plots, record, directory / "report.html")
    _show(report, [page, path, *plots], record)


def _settings(options: argparse.Namespace) -> Settings:
    """Return the settings of the options, once their ranges are checked."""
    if (options.model is None) != (options.data is None):
        given, missing = ("--model", "--data") if options.data is None else ("--data", "--model")
        raise InputError(f"{given} needs {missing} too; without both, the report is about digits")
    if options.epochs is not None and options.model is not None:
        raise InputError("--epochs is of the training on digits: a network of --model is reported as it is")
    if not 0 < options.rtol < 1:
        raise InputError(f"--rtol {options.rtol}: a relative error lies between 0 and 1")
    if options.repeats < 0:
        raise InputError(f"--repeats {options.repeats}: it is a number of repetitions, 0 for no plot")
    if options.threads is not None and options.threads < 1:
        raise InputError(f"--threads {options.threads}: at least one is needed")
    if not 0 <= options.seed < 2**32:
        raise InputError(f"--seed {options.seed}: a seed lies between 0 and {2**32 - 1}")
    return Settings(rtol=options.rtol, repeats=options.repeats, seed=options.seed, engine=options.engine)


def _require_packages(*, digits: bool) -> None:
    """Raise before any work if a package of the extra is missing."""
    needed = {"matplotlib": "matplotlib", "rich": "rich"} | ({"sklearn": "scikit-learn"} if digits else {})
    missing = [name for module, name in needed.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise MissingDependencyError(
            f"the report needs {', '.join(missing)}, not installed here: pip install {' '.join(missing)}"
        )


def _subject(options: argparse.Namespace, announce: Callable[[str], None]) -> Subject:
    output = int(options.output) if _is_integer(options.output) else options.output
    dtype, device = parse_dtype(options.dtype), parse_device(options.device)
    if options.model is None:
        return digits_subject(
            _SAMPLES if options.samples is None else options.samples,
            epochs=options.epochs,
            seed=options.seed,
            params=options.params,
            output=output,
            dtype=dtype or torch.float32,
            device=device,
            announce=announce,
        )
    return user_subject(
        options.model,
        options.data,
        samples=options.samples,
        seed=options.seed,
        params=options.params,
        output=output,
        dtype=dtype,
        device=device,
    )


def _is_integer(text: str | None) -> bool:
    return text is not None and text.removeprefix("-").isdecimal()


@contextmanager
def _steps(total: int) -> Iterator[Callable[[str], None]]:
    """Yield a function that announces the next step: in the log, and as a bar on a terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (BarColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("start", total=total)

        def announce(step: str) -> None:
            _logger.info("%s", step)
            progress.update(task, advance=1, description=step)

        yield announce


@contextmanager
def _own_warnings() -> Iterator[list[str]]:
    """Collect the warnings of this library, for the notes; those of others go where they always go."""
    issued: list[str] = []
    with warnings.catch_warnings():
        # each once: `issued` drops repetitions, and the registry of earlier calls must not
        warnings.simplefilter("always", NtkopsWarning)
        show = warnings.showwarning

        def collect(message: Any, category: type[Warning], *rest: Any, **kwargs: Any) -> None:
            if not issubclass(category, NtkopsWarning):
                show(message, category, *rest, **kwargs)
            elif str(message) not in issued:
                issued.append(str(message))

        warnings.showwarning = collect
        yield issued


def _show(report: Report, paths: list[Path], record: dict[str, Any]) -> None:
    from rich.console import Console

    console = Console(width=None if Console().is_terminal else _WIDTH)
    print_report(report, console)
    peak = record["peak_memory_bytes"]
    memory = "" if peak is None else f", {format_bytes(peak)} at most"
    names = ", ".join(path.name for path in paths)
    console.print(
        f"{record['seconds']['after_imports']:.1f} s after imports{memory}; {paths[0].parent}: {names}",
        markup=False,
        highlight=False,
    )
