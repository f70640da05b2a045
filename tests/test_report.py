"""The report: its numbers against dense float64 references, its command line from end to end."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import IO

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import ntkops
from ntkops import __main__ as command_line
from ntkops import report
from ntkops.errors import DeviceError, DtypeError, InputError, UnsupportedModelError
from ntkops.report.drawing import format_with_error
from ntkops.report.loading import parse_device, parse_dtype, place
from ntkops.report.measures import number_of_steps
from ntkops.report.record import prepare_directory, write_whole
from ntkops.results import Estimate

PNG = b"\x89PNG\r\n\x1a\n"

FACTORIES = """
import torch
from torch import nn

def make():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).eval()

def make_double():
    return make().double()

def with_dropout():
    return nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 3))

class Split(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 2)
    def forward(self, x):
        hidden = torch.tanh(self.body(x))
        return {"hidden": hidden, "logits": self.head(hidden)}

def split():
    return Split().eval()

def tokens():
    return nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 2)).eval()

def frozen_at_zero():
    model = nn.Linear(4, 3, bias=False)
    return nn.Sequential(model, nn.Linear(3, 1, bias=False)).eval()

def wide():
    return nn.Linear(4, 40).eval()

def tired():
    raise KeyboardInterrupt

def broken():
    raise RuntimeError("no weights here")

def number():
    return 3

not_callable = 3
"""


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a module of factories and data, in which the command line starts."""
    (tmp_path / "factories.py").write_text(FACTORIES)
    (tmp_path / "failing.py").write_text("import no_such_package_anywhere")
    (tmp_path / "crashing.py").write_text("1 / 0")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(9, 4, generator=generator).numpy()
    np.savez(tmp_path / "data.npz", x=x, y=np.arange(9) % 3)
    np.savez(tmp_path / "double.npz", x=x.astype(np.float64))
    np.savez(tmp_path / "tokens.npz", x=np.arange(18).reshape(6, 3) % 7)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("factories", "failing", "crashing"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    return tmp_path


def global_state() -> tuple[Tensor, bool]:
    return torch.random.get_rng_state(), torch.is_grad_enabled()


def same_state(before: tuple[Tensor, bool]) -> bool:
    return torch.equal(before[0], torch.random.get_rng_state()) and before[1] == torch.is_grad_enabled()


# digits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_digits_are_split_shuffled_and_scaled(dtype: torch.dtype) -> None:
    digits = report.load_digits(torch.Generator().manual_seed(3), dtype)
    assert digits.x.shape == (1400, 64) and digits.x_test.shape == (397, 64)
    assert digits.x.dtype == digits.x_test.dtype == dtype
    assert float(digits.x.min()) >= 0 and float(digits.x.max()) == 1.0
    assert sorted(set(digits.y.tolist())) == list(range(10)) == sorted(set(digits.y_test.tolist()))
    whole = torch.cat([digits.x, digits.x_test])
    other = report.load_digits(torch.Generator().manual_seed(4), dtype)
    assert not torch.equal(whole, torch.cat([other.x, other.x_test]))
    assert torch.allclose(whole.sum(), torch.cat([other.x, other.x_test]).sum())


def test_training_is_seeded_learns_and_changes_nothing_outside() -> None:
    before = global_state()

    def run() -> tuple[nn.Module, nn.Module, report.Digits]:
        generator = torch.Generator().manual_seed(0)
        digits = report.load_digits(generator)
        untrained = report.classifier(generator, width=32)
        copies = [p.clone() for p in untrained.parameters()]
        trained = report.train(untrained, digits, 3, generator)
        assert all(torch.equal(p, q) for p, q in zip(untrained.parameters(), copies, strict=True))
        return untrained, trained, digits

    untrained, first, digits = run()
    _, second, _ = run()
    assert same_state(before)
    assert all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))
    assert not first.training and not untrained.training
    with torch.no_grad():
        rates = [(m(digits.x_test).argmax(1) == digits.y_test).float().mean() for m in (untrained, first)]
    assert rates[0] < 0.4 and rates[1] > 0.8


def test_initial_weights_have_the_usual_bounds() -> None:
    model = report.classifier(torch.Generator().manual_seed(0), width=100)
    for layer, bound in ((model[0], 64**-0.5), (model[2], 0.1)):
        for tensor in (layer.weight, layer.bias):
            assert 0.8 * bound < float(tensor.detach().abs().max()) <= bound


def test_training_without_an_epoch_is_refused() -> None:
    generator = torch.Generator().manual_seed(0)
    model = report.classifier(generator)
    with pytest.raises(InputError, match="at least one epoch"):
        report.train(model, report.load_digits(generator), 0, generator)


# a user's own


def test_factory_draws_seeded_numbers_and_the_global_state_stays(workplace: Path) -> None:
    before = global_state()
    first, again, other = (report.load_model("factories:make", seed) for seed in (1, 1, 2))
    assert same_state(before)
    assert torch.equal(first[0].weight, again[0].weight)
    assert not torch.equal(first[0].weight, other[0].weight)


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("factories.make", InputError, "package.module:factory"),
        ("factories:", InputError, "package.module:factory"),
        ("nowhere:make", InputError, "no module 'nowhere'"),
        ("factories.inner:make", InputError, "'factories.inner'"),
        ("failing:make", InputError, "needs 'no_such_package_anywhere'"),
        ("crashing:make", InputError, "raised ZeroDivisionError"),
        ("factories:mak", InputError, "did you mean make"),
        ("factories:not_callable", InputError, "is a int"),
        ("factories:broken", InputError, "RuntimeError: no weights here"),
        ("factories:number", UnsupportedModelError, "returned a int"),
    ],
)
def test_bad_factories_are_named(workplace: Path, source: str, error: type[Exception], message: str) -> None:
    before = global_state()
    with pytest.raises(error, match=message):
        report.load_model(source)
    assert same_state(before)


def test_data_are_read_as_they_are(workplace: Path) -> None:
    x, y = report.load_data("data.npz")
    assert x.shape == (9, 4) and x.dtype == torch.float32
    assert y is not None and y.tolist() == [0, 1, 2] * 3
    assert report.load_data("double.npz")[0].dtype == torch.float64
    assert report.load_data("double.npz")[1] is None


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"features": np.ones(3)}, r"no array 'x' \(it has: features\)"),
        ({"x": np.ones(())}, "must hold samples"),
        ({"x": np.ones((0, 4))}, "must hold samples"),
        ({"x": np.array(["a", "b"])}, "cannot become a tensor"),
        ({"x": np.array([{}, {}], dtype=object)}, "cannot become a tensor"),
        ({"x": np.ones((3, 2)), "y": np.ones(3)}, "one integer label"),
        ({"x": np.ones((3, 2)), "y": np.ones(4, int)}, "each of the 3 samples"),
        ({"x": np.ones((3, 2)), "y": np.ones((3, 2), int)}, "one integer label"),
    ],
)
def test_bad_arrays_are_named(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(InputError, match=message):
        report.load_data(tmp_path / "data.npz")


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file"):
        report.load_data(tmp_path / "missing.npz")
    with pytest.raises(InputError, match="cannot be read"):
        report.load_data(tmp_path)
    for name, content in (("empty.npz", b""), ("text.npz", b"hello"), ("cut.npz", b"PK\x03\x04abc")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match="is not an .npz file"):
            report.load_data(tmp_path / name)
    np.save(tmp_path / "bare.npy", np.ones(3))
    with pytest.raises(InputError, match="one bare array"):
        report.load_data(tmp_path / "bare.npy")


def test_dtype_casts_both_on_a_copy_or_neither() -> None:
    model, x = nn.Linear(2, 1), torch.ones(3, 2, dtype=torch.float64)
    with pytest.raises(DtypeError, match="--dtype float32"):
        place(model, x, None, torch.device("cpu"))
    cast, samples = place(model, x, torch.float64, torch.device("cpu"))
    assert cast.weight.dtype == samples.dtype == torch.float64
    assert model.weight.dtype == torch.float32
    tokens = torch.ones(3, 2, dtype=torch.int64)
    assert place(model, tokens, torch.float64, torch.device("cpu"))[1].dtype == torch.int64
    assert place(model, tokens, None, torch.device("cpu"))[0] is model


def test_unknown_dtypes_and_devices_are_refused() -> None:
    assert parse_dtype(None) is None and parse_dtype("float64") is torch.float64
    with pytest.raises(DtypeError, match="float64, float32, bfloat16"):
        parse_dtype("double")
    assert parse_device("cpu") == torch.device("cpu")
    for name in ("nonsense", "cuda:99"):
        with pytest.raises(DeviceError, match=name):
            parse_device(name)


# the numbers, against dense float64 references


SETTINGS = report.Settings(rtol=0.1, leading=5, repeats=2, passes=(8, 32), seed=1)
_BUILT: dict[tuple[torch.dtype, str], tuple[report.Subject, report.Report]] = {}


def small_report(dtype: torch.dtype, engine: str = "auto") -> tuple[report.Subject, report.Report]:
    """A report on 16 digits and 8 hidden units: n = 160, P = 610."""
    if (dtype, engine) not in _BUILT:
        subject = report.digits_subject(16, epochs=2, width=8, seed=1, dtype=dtype)
        settings = dataclasses.replace(SETTINGS, engine=engine)
        _BUILT[dtype, engine] = subject, report.build(subject, settings)
    return _BUILT[dtype, engine]


def reference_jacobian(subject: report.Subject, name: str) -> Tensor:
    """Return J, (N, O, P) in float64, written down by hand for 64 - width - 10 with ReLU."""
    first, bias, head, _ = (p.double() for p in subject.linearizations[name].parameters)
    x = subject.x.double()
    before = x @ first.mT + bias  # (N, H)
    hidden, slope = before.relu(), (before > 0).double()
    count, outputs = len(x), len(head)
    by_bias = head.unsqueeze(0) * slope.unsqueeze(1)  # (N, O, H)
    by_first = by_bias.unsqueeze(-1) * x[:, None, None]  # (N, O, H, 64)
    unit = torch.eye(outputs, dtype=torch.float64)
    by_head = unit[None, :, :, None] * hidden[:, None, None]  # (N, O, O, H)
    parts = (by_first.flatten(2), by_bias, by_head.flatten(2), unit.expand(count, -1, -1))
    return torch.cat(parts, dim=-1)


def assert_agrees(estimate: Estimate | None, reference: Tensor, dtype: torch.dtype) -> None:
    """The printed interval holds the reference, which is within rounding of the value if exact."""
    assert estimate is not None
    rounding = {torch.float32: 1e-4, torch.float64: 1e-10}[dtype] * float(reference.abs())
    assert abs(float(estimate) - float(reference)) <= 4 * float(estimate.stderr) + rounding
    value, *ends = (float(number) for number in re.findall(r"[-+.e\d]+", report.format_estimate(estimate)))
    assert estimate.exact != bool(ends)
    if estimate.exact:
        assert abs(value - float(reference)) <= 5e-6 * float(reference.abs()) + rounding
    else:
        assert ends[0] <= value <= ends[1] and ends[0] <= float(reference) <= ends[1]


@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_agree_with_dense_references_to_the_printed_errors(dtype: torch.dtype, engine: str) -> None:
    subject, result = small_report(dtype, engine)
    assert [kernel.name for kernel in result.kernels] == ["before training", "after training"]
    estimates, dense = [], []
    for kernel in result.kernels:
        J = reference_jacobian(subject, kernel.name).flatten(0, 1)
        K = J @ J.mT
        dense.append(K)
        assert (kernel.size, kernel.num_samples, kernel.num_outputs) == (160, 16, 10)
        assert kernel.num_parameters == J.shape[1]
        assert_agrees(kernel.trace, K.trace(), dtype)
        assert_agrees(kernel.frobenius_norm, K.norm(), dtype)
        assert_agrees(kernel.effective_rank, K.trace() ** 2 / K.norm() ** 2, dtype)
        estimates += [kernel.trace, kernel.frobenius_norm, kernel.effective_rank]
        values = torch.linalg.eigvalsh(K).flip(0)[:5]
        rounding = {torch.float32: 1e-4, torch.float64: 1e-10}[dtype]
        assert bool(
            ((kernel.leading.values - values).abs() <= kernel.leading.residuals + rounding * values).all()
        )
    first, last = dense
    assert_agrees(result.alignment, (first * last).sum() / (first.norm() * last.norm()), dtype)
    # Layer structure makes everything exact here; automatic differentiation leaves estimates to look at.
    kinds = {e.exact for e in estimates if e is not None}
    assert kinds == ({True} if engine == "auto" else {True, False})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_class_spectra_and_truncation_ranks_agree_with_dense_references(dtype: torch.dtype) -> None:
    subject, result = small_report(dtype)
    for kernel in result.kernels:
        J = reference_jacobian(subject, kernel.name).movedim(1, 0)  # (O, N, P)
        values = torch.linalg.eigvalsh(J @ J.mT).flip(-1)  # (O, N)
        share = values.cumsum(-1) / values.sum(-1, keepdim=True)
        ranks = (share < 0.95).sum(-1) + 1
        assert kernel.classes is not None
        assert kernel.classes.rank.tolist() == ranks.tolist()
        tolerance = {torch.float32: 1e-5, torch.float64: 1e-11}[dtype] * float(values.max())
        assert torch.allclose(kernel.classes.values, values, rtol=0, atol=tolerance)


def test_without_dense_memory_ranks_come_from_lanczos_and_stay_the_same(tmp_path: Path) -> None:
    subject, result = small_report(torch.float64)
    settings = dataclasses.replace(SETTINGS, max_dense_bytes=0, repeats=0)
    lazy = report.build(subject, settings)
    for kernel, other in zip(lazy.kernels, result.kernels, strict=True):
        assert kernel.classes is not None and other.classes is not None
        assert not kernel.classes.exact and kernel.classes.converged and not kernel.engine.dense
        assert kernel.classes.rank.tolist() == other.classes.rank.tolist()
    names = [path.name for path in report.draw_figures(lazy, tmp_path)]
    assert names == ["spectrum.png", "class_spectra.png", "truncation_ranks.png"]


def test_convergence_holds_every_method_at_every_budget_against_the_exact_trace() -> None:
    subject, result = small_report(torch.float64)
    curves = result.convergence
    assert curves is not None and curves.kernel == "after training"
    J = reference_jacobian(subject, "after training")
    assert_agrees(curves.reference, J.square().sum(), torch.float64)
    assert list(curves.estimates) == ["hutchinson", "hutch++", "rhutch", "fhutch"]
    for estimates in curves.estimates.values():
        assert len(estimates) == 4
        assert len({float(e) for e in estimates}) == 4  # every repetition has probes of its own
        assert all(not e.exact and e.passes > 0 for e in estimates)
        for estimate in estimates[2:]:
            assert abs(float(estimate) - float(curves.reference)) < 5 * float(estimate.stderr)


def test_a_report_is_reproducible_and_leaves_the_global_state_alone() -> None:
    before = global_state(), torch.get_num_threads()

    def numbers() -> dict:
        subject = report.digits_subject(20, epochs=1, width=8, seed=5)
        record = report.as_record(report.build(subject, report.Settings(rtol=0.3, repeats=1, passes=(8,))))
        return without_seconds(record)

    assert numbers() == numbers()
    assert same_state(before[0]) and torch.get_num_threads() == before[1]


def without_seconds(record: object) -> object:
    if isinstance(record, dict):
        return {key: without_seconds(value) for key, value in record.items() if key != "seconds"}
    return [without_seconds(entry) for entry in record] if isinstance(record, list) else record


def test_accuracy_counts_hits_and_has_the_binomial_error() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scores = nn.Parameter(torch.tensor([0.0, 1.0, 0.5]))

        def forward(self, x: Tensor) -> Tensor:
            return self.scores + 0 * x

    labels = torch.tensor([1] * 30 + [0] * 50 + [2] * 20)
    found = report.accuracy(ntkops.linearize(Constant()), torch.randn(100, 1), labels, "samples")
    assert float(found) == 0.3
    assert abs(float(found.stderr) - 0.3 * (0.7 / 0.3 / 100) ** 0.5) < 1e-9
    low, high = found.interval
    assert abs(float(low) - 0.2189) < 1e-4 and abs(float(high) - 0.3958) < 1e-4  # Wilson's
    assert found.method == "100 samples" and not found.exact


def test_announced_steps_are_counted_beforehand() -> None:
    steps: list[str] = []
    settings = report.Settings(rtol=0.3, repeats=1, passes=(8,))
    subject = report.digits_subject(12, epochs=2, width=4, announce=steps.append)
    report.build(subject, settings, steps.append)
    assert len(steps) == 2 + number_of_steps(settings, kernels=2)


# a user's network as a library


def test_users_network_is_reported_as_it_is(workplace: Path) -> None:
    subject = report.user_subject("factories:make", "data.npz", seed=2)
    model, (x, labels) = report.load_model("factories:make", 2), report.load_data("data.npz")
    assert labels is not None
    hits = float((model(x).argmax(1) == labels).double().mean())
    assert float(subject.accuracies["model"]) == hits
    result = report.build(subject, report.Settings(repeats=0))
    (kernel,) = result.kernels
    outputs, weights = model(x).flatten().unbind(), list(model.parameters())
    rows = [torch.autograd.grad(y, weights, retain_graph=True) for y in outputs]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double()
    assert kernel.size == 27 and result.alignment is None and result.convergence is None
    assert_agrees(kernel.trace, J.square().sum(), torch.float32)
    assert_agrees(kernel.frobenius_norm, (J @ J.mT).norm(), torch.float32)


def test_selection_and_output_reach_the_kernel(workplace: Path) -> None:
    def sizes(**choice: object) -> tuple[int, int]:
        subject = report.user_subject("factories:split", "data.npz", **choice)
        (kernel,) = report.build(subject, report.Settings(repeats=0)).kernels
        return kernel.num_outputs, kernel.num_parameters

    assert sizes(output="logits") == (2, 37)
    assert sizes(output="hidden") == (5, 37)
    assert sizes(output="logits", params=["head.*"]) == (2, 12)
    assert sizes(output="body") == (5, 37)


def test_subset_is_random_seeded_and_in_order(workplace: Path) -> None:
    whole = report.load_data("data.npz")[0]
    first, again, other = (
        report.user_subject("factories:make", "data.npz", samples=5, seed=seed).x for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    rows = [int((whole == row).all(1).nonzero()) for row in first]
    assert rows == sorted(set(rows)) and len(rows) == 5


def test_what_is_left_out_is_said(workplace: Path) -> None:
    np.savez("labels.npz", x=np.ones((4, 4), np.float32), y=np.array([0, 1, 5, 1]))
    subject = report.user_subject("factories:make", "labels.npz")
    assert not subject.accuracies
    assert subject.notes == ("no accuracy: labels from 0 to 5 do not number the 3 outputs",)
    wide = report.build(report.user_subject("factories:wide", "data.npz"), report.Settings(repeats=0))
    assert wide.kernels[0].classes is None
    assert any("40 outputs" in note for note in wide.notes)


def test_a_kernel_that_is_zero_has_no_ratios_and_says_so() -> None:
    dead = nn.Sequential(nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 2, bias=False))
    with torch.no_grad():
        for parameter in dead.parameters():
            parameter.zero_()
        dead[0].bias.fill_(-1.0)
    subject = report.Subject("a dead network", {"model": ntkops.linearize(dead)}, torch.zeros(4, 3))
    result = report.build(subject, report.Settings(repeats=1, passes=(8,)))
    (kernel,) = result.kernels
    assert float(kernel.trace) == 0 and kernel.effective_rank is None and kernel.classes is None
    assert result.convergence is None
    assert any(note.startswith("no effective rank") for note in result.notes)
    json.dumps(report.as_record(result), allow_nan=False)


# files


def test_files_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")

    def fail(file: IO[bytes]) -> None:
        file.write(b"half of it")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_whole(path, fail)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.json"]
    write_whole(path, lambda file: file.write(b"new"))
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_json_is_strict_and_keeps_every_digit(tmp_path: Path) -> None:
    record = {
        "a": [0.1 + 0.2, 1e-300, -3],
        "b": [],
        "c": {"d": [[1.5], [2.5e10]]},
        "e": "x [ 1 ] y",
        "f": None,
    }
    path = report.write_json(tmp_path / "a.json", record)
    assert json.loads(path.read_text()) == record
    assert '"a": [0.30000000000000004, 1e-300, -3]' in path.read_text()
    with pytest.raises(ValueError, match="JSON"):
        report.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == record


def test_directories_are_made_and_never_wiped(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    assert prepare_directory(tmp_path / "a/b").is_dir()
    prepare_directory(tmp_path)
    assert (tmp_path / "mine.txt").read_text() == "keep"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "mine.txt"]
    with pytest.raises(InputError, match="--out"):
        prepare_directory(tmp_path / "mine.txt")
    with pytest.raises(InputError, match="--out"):
        prepare_directory(tmp_path / "mine.txt/below")


# printing


@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (1234.5678, 0.25, "1234.57 ± 0.25"),
        (1234.5678, 0.0, "1234.57"),
        (202661.0, 380.0, "202660 ± 380"),
        (0.97453, 0.00021, "0.97453 ± 0.00021"),
        (45300.9, 0.006, "45300.90 ± 0.006"),
        (2233.7741, 3e-4, "2233.774 ± 0.0003"),
        (-1.5, 0.3, "-1.50 ± 0.30"),
        (1.23456e9, 4.5e6, "1.2346e+09 ± 4.5e+06"),
        (1.23456e-9, 4.5e-11, "1.235e-09 ± 4.5e-11"),
        (0.0, 1.0, "0.0 ± 1.0"),
        (0.01, 5.0, "0.0 ± 5.0"),
    ],
)
def test_errors_decide_the_digits(value: float, error: float, text: str) -> None:
    assert format_with_error(value, error) == text


def test_tables_show_every_number_and_no_markup() -> None:
    from rich.console import Console

    _, result = small_report(torch.float32)
    result = dataclasses.replace(result, title="net[bold]", notes=["see rnn[0]"])
    console = Console(width=100, record=True, file=io.StringIO())
    report.print_report(result, console)
    text = console.export_text()
    assert "net[bold]" in text and "note: see rnn[0]" in text
    for kernel in result.kernels:
        for estimate in (kernel.trace, kernel.frobenius_norm, kernel.effective_rank):
            assert estimate is not None
            assert f"{report.format_estimate(estimate)}   {estimate.method}, {estimate.passes}" in text
        assert kernel.classes is not None
        ranks = r"\s+".join(str(rank) for rank in kernel.classes.rank.tolist())
        assert re.search(rf"{kernel.name}\s+{ranks}\s", text)
    assert max(map(len, text.splitlines())) <= 100


# the command line


def run(*words: str) -> int:
    return command_line.main(["report", *words])


@pytest.mark.long
def test_digits_from_end_to_end(tmp_path: Path) -> None:
    out = tmp_path / "made" / "here"
    words = ["--samples", "24", "--epochs", "2", "--repeats", "1", "--seed", "3", "--out", str(out)]
    done = subprocess.run(
        [sys.executable, "-m", "ntkops", "report", *words],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # the bar is for terminals
    record = json.loads((out / "report.json").read_text())
    assert sorted(p.name for p in out.iterdir()) == sorted([*record["plots"], "report.json", "report.html"])
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == len(record["plots"]) and not re.search(
        r"(src|href)=\"[^d]", page
    )
    for word in ("Alignment", "Effective rank", "samples: 24", "trace"):
        assert word in page
    assert len(record["plots"]) == 4
    assert all((out / name).read_bytes().startswith(PNG) for name in record["plots"])
    # Some builds are 2.8.0 to the package index and 2.8.0+cu128 to themselves.
    version = record["environment"]["versions"]["torch"]
    assert version.split("+")[0] == str(torch.__version__).split("+")[0]
    assert record["options"]["seed"] == 3 and record["options"]["samples"] == 24
    assert 10**8 < record["peak_memory_bytes"] < 10**10
    assert 0 < record["seconds"]["kernels"] < record["seconds"]["after_imports"]
    before, after = record["kernels"]
    assert (before["n"], before["num_parameters"]) == (240, 9610)
    assert record["accuracy"]["before training"]["value"] < record["accuracy"]["after training"]["value"]
    subject = report.digits_subject(24, epochs=2, seed=3)
    for kernel in (before, after):
        J = reference_jacobian(subject, kernel["name"]).flatten(0, 1)
        trace = float(J.square().sum())
        assert kernel["trace"]["exact"] and abs(kernel["trace"]["value"] / trace - 1) < 1e-4
        assert f"{trace:.5g}"[:4] in done.stdout


def test_users_network_from_end_to_end(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (workplace / "report").mkdir()
    (workplace / "report" / "mine.txt").write_text("keep")
    words = ["--model", "factories:split", "--data", "data.npz", "--output", "logits", "--params", "head.*"]
    assert run(*words, "--params", "body.bias", "--repeats", "0", "--dtype", "float64") == 0
    captured = capsys.readouterr()
    assert "factories:split" in captured.out and "P = 17" in captured.out and captured.err == ""
    record = json.loads((workplace / "report" / "report.json").read_text())
    assert (workplace / "report" / "mine.txt").read_text() == "keep"
    (kernel,) = record["kernels"]
    assert (kernel["n"], kernel["num_parameters"], kernel["dtype"]) == (18, 17, "float64")
    assert record["convergence"] is None and record["alignment"] is None
    assert "estimator_errors.png" not in record["plots"]


def test_token_inputs_stay_integers(workplace: Path) -> None:
    assert (
        run("--model", "factories:tokens", "--data", "tokens.npz", "--repeats", "0", "--dtype", "float64")
        == 0
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "nowhere:make", "--data", "data.npz"], "no module 'nowhere'"),
        (["--model", "factories:make"], "--model needs --data"),
        (["--data", "data.npz"], "--data needs --model"),
        (["--model", "factories:make", "--data", "none.npz"], "there is no file 'none.npz'"),
        (["--model", "factories:make", "--data", "double.npz"], "pass --dtype float32"),
        (["--model", "factories:with_dropout", "--data", "data.npz"], "call model.eval()"),
        (["--model", "factories:make", "--data", "data.npz", "--params", "nope.*"], "'nope.*'"),
        (["--model", "factories:split", "--data", "data.npz"], "output='hidden'"),
        (["--model", "factories:split", "--data", "data.npz", "--output", "logit"], "'logits'"),
        (["--model", "factories:make", "--data", "data.npz", "--samples", "10"], "has 9 samples"),
        (
            ["--model", "factories:make", "--data", "tokens.npz"],
            "cannot be called with these samples",
        ),
        (["--samples", "0"], "1 to 1400"),
        (["--samples", "1401"], "1 to 1400"),
        (["--epochs", "0"], "at least one epoch"),
        (["--epochs", "3", "--model", "factories:make", "--data", "data.npz"], "--epochs is of the training"),
        (["--rtol", "0"], "--rtol 0.0"),
        (["--repeats", "-1"], "--repeats -1"),
        (["--seed", "-1"], "--seed -1"),
        (["--threads", "0"], "--threads 0"),
        (["--dtype", "int8"], "--dtype 'int8'"),
        (["--device", "cuda:99"], "--device 'cuda:99'"),
        (["--out", "data.npz"], "--out"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_two(
    workplace: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    before = global_state()
    assert run(*words) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("ntkops: error: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert same_state(before)
    assert not list(workplace.glob("report/*"))


def test_traceback_on_request(workplace: Path) -> None:
    with pytest.raises(InputError, match="no weights here") as caught:
        run("--model", "factories:broken", "--data", "data.npz", "--traceback")
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_interruption_has_its_own_exit_code(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--model", "factories:tired", "--data", "data.npz") == 130
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "ntkops: interrupted\n"
    assert not list(workplace.glob("report/*"))


def test_help_explains_a_users_own_network(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run("--help")
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for part in ("package.module:factory", "numpy.savez", "model.eval()", "exit codes"):
        assert part in text


def test_a_command_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command_line.main([])
    assert caught.value.code == 2
    assert "command" in capsys.readouterr().err


def test_missing_packages_are_named_before_any_work(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("sklearn", "rich"):
        monkeypatch.setitem(sys.modules, name, None)
    assert run() == 2
    assert "needs rich, scikit-learn" in capsys.readouterr().err
    assert not (workplace / "report").exists()
