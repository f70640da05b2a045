"""The smaller benchmarks run at small sizes, and measure what they say."""

from __future__ import annotations

import json

import pytest
import torch


def test_auto_finds_the_best_method_and_says_what_it_left_out(load, tmp_path):
    auto, out = load("auto_methods"), tmp_path / "auto.json"
    options = ["--quick", "--parts", "mlp, n=640", "--tolerances", "0.1", "--out", str(out)]
    auto.main(options)
    result = json.loads(out.read_text())
    assert [entry["state"] for entry in result["entries"]] == ["untrained"] * 4 + ["trained"] * 4
    for entry in result["entries"]:
        assert entry["best"] in entry["seconds"] and {"auto", "exact"} <= set(entry["seconds"])
    assert "| mlp, n=640, trained | trace | 0.1 |" in auto.BENCHMARK.markdown(result)
    late = auto.BENCHMARK.run(["--quick", "--parts", "mlp, n=640", "--seconds", "-1"])
    assert len(late["left_out"]) == 2 * 4 * 3 and not late["entries"]


def test_coverage_is_counted_for_every_quantity(load):
    coverage = load("coverage")
    result = coverage.BENCHMARK.run(["--quick", "--parts", "spike"])
    quantities = {"trace", "norm", "effective rank", "alignment", "inner"}
    assert {entry["quantity"] for entry in result["entries"]} == quantities
    assert all(0 <= entry["covered"] <= entry["repetitions"] for entry in result["entries"])
    assert {"sketch", "rhutch", "xtrace"} <= {entry["method"] for entry in result["entries"]}
    assert not coverage.failures(result["entries"])
    assert "| trace | sketch | passes |" in coverage.BENCHMARK.markdown(result)


@pytest.mark.long
def test_coverage_on_networks_and_of_sums_is_counted(load):
    coverage = load("coverage")
    arguments = ["--quick", "--repetitions", "1", "--parts", *coverage.OTHERS]
    entries = coverage.measure(coverage.BENCHMARK.options(arguments))["entries"]
    quantities = {entry["quantity"] for entry in entries}
    assert {"partial trace over outputs", "partial trace over samples", "log-determinant"} <= quantities
    assert {entry["spectrum"] for entry in entries} >= {"trained MLP", "trained GRU", "spike"}


def test_an_interval_that_misses_fails(load):
    coverage = load("coverage")

    def wrong(operator, **options):
        return coverage.ntkops.trace(operator) * 2.0

    entry = coverage.measure_runs(wrong, [torch.eye(3)], 3.0, 20)
    assert entry["covered"] == 0 and coverage.failures([entry])
    (verdict,) = coverage.judge({"entries": [entry]})
    assert verdict["found"] == 1 and not verdict["held"]


def test_trajectories_hold_what_does_not_hang_on_size(load):
    dynamics = load("dynamics")
    bounds = [dynamics.violations(5, dtype) for dtype in (torch.float64, torch.float32)]
    rows, beside = dynamics.large(120), [dynamics.against_eigenbasis(120, 1e2, 1)]
    claims = dynamics.judge({"bounds": bounds, "large": rows, "eigenbasis": beside})
    held = {(one["what"], one["held"]) for one in claims}
    assert {("bounds violated", True), ("products of a flow to τ λmax = 10⁴", True)} <= held
    for row in rows:
        assert row["converged"] == (row["dtype"] == "float64")
        assert row["dtype"] == "float64" or row["rounding"] >= 1e4 * 2.0**-23
    assert all(row["error"] <= row["bound"] for row in beside)


@pytest.mark.long
def test_jobs_are_measured_at_small_sizes(load, tmp_path):
    jobs, out = load("jobs"), tmp_path / "made" / "jobs.json"
    jobs.main(["--quick", "--parts", "partition", "pinn_60", "--repetitions", "1", "--out", str(out)])
    result = json.loads(out.read_text(encoding="utf-8"))
    assert [entry["job"] for entry in result["jobs"]] == ["partition", "pinn_60"]
    for entry in result["jobs"]:
        cpu = entry["ratio"]["cpu"]
        assert 0 < cpu["min"] <= cpu["median"] <= cpu["max"]


def test_two_ways_that_differ_are_refused(load, monkeypatch):
    jobs = load("jobs")
    wrong = jobs.Job("wrong", 1.0, lambda quick: (lambda: torch.ones(2), lambda: torch.zeros(2) + 1.1), 1e-6)
    monkeypatch.setitem(jobs.JOBS, "wrong", wrong)
    with pytest.raises(RuntimeError, match="wrong: ours differs by"):
        jobs.measure_job("wrong", quick=True, repetitions=1)


def test_real_networks_are_measured_and_right(load):
    real, names = load("real_networks"), ["resnet18", "gpt_lora", "gru_cell"]
    result = real.BENCHMARK.run(["--quick", "--parts", *names])
    assert [entry["model"] for entry in result["entries"]] == names
    for entry in result["entries"]:
        assert entry["error"] < 1e-5 and entry["agreement"] < 1e-5, entry["model"]
        assert entry["dense"]["seconds"] > 0 < entry["torch.func trace"]["seconds"]
    late = real.BENCHMARK.run(["--quick", "--parts", "cell", "--seconds", "-1"])
    assert late["left_out"] == ["cell float32"]
    assert "LoRA" in real.BENCHMARK.markdown(result)


def test_regressions_are_measured_against_float64(load):
    regression = load("regression")
    fitted = [row for row in regression.duals(40) if row["refused"] is None]
    assert fitted and all(row["residual"] <= 2e-6 for row in fitted)
    assert max(row["rounded_dual"] for row in fitted) > 10 * max(row["predictions"] for row in fitted)
    assert {row["outcome"] for row in regression.near_duplicates(12)} <= {"silent", "warned", "refused"}
    assert regression.lazy_products(4)["covered"] >= 0.75
    assert 0 < regression.eigenvalues(10)["largest"] < 2


@pytest.mark.parametrize("inputs", ["plain", "standardised", "normalised"])
def test_columns_of_solvers_are_counted_for_every_way(load, inputs):
    pytest.importorskip("sklearn")
    solvers = load("solvers")
    rows = solvers.columns_of(inputs, 0, 120, 24)
    assert len(rows) == 8
    for row in rows:
        assert row["converged"] and row["residual"] <= solvers.TOLERANCE
        assert (row["precise"] > 0) == (row["dtype"] == "float32")
        if row["preconditioner"] is not None:
            assert row["preconditioner_columns"] == 24
    columns = {(row["dtype"], row["preconditioner"]): row["columns"] for row in rows}
    assert columns["float64", "nystrom"] < columns["float64", None]


def test_the_large_solve_is_lazy(load):
    solvers = load("solvers")
    found = solvers.large_solve(300)
    assert found["converged"] and found["residual"] <= solvers.TOLERANCE
    assert found["peak_megabytes"] >= found["start_megabytes"] > 0
