"""The distilled chain: its runs are those that one would write by hand, and its accounts add up."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import ntkops
from ntkops.distill import chain, select, synthesize
from ntkops.errors import InputError, InterpolationWarning
from ntkops.projections import SJLT
from ntkops.regression import KernelRidge, metrics


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 20), nn.Tanh(), nn.Linear(20, 3)).double()


def samples(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def distil(K, Y):
    return synthesize(K, 9, "krylov", Y=Y, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def report():
    x, x_new = samples(60, 1), samples(40, 2)
    with torch.no_grad():
        labels = network()(x_new).argmax(-1)
    return chain(
        network(), x, x_new, labels, data=lambda: x[:30], projection=90, gradients=distil, ridge=1e-6
    )


def test_stages_are_those_written_by_hand(report) -> None:
    model, x, x_new = network(), samples(60, 1), samples(40, 2)
    with torch.no_grad():
        logits, truth = model(x), model(x_new)
    full = ntkops.ntk(model, x, outputs="each")
    expected = KernelRidge(1e-6).fit(full, logits).predict(full.cross(x_new))
    assert report.full.mean_squared_error == pytest.approx(
        metrics.mean_squared_error(expected, truth), rel=1e-6
    )
    some = ntkops.ntk(model, x[:30], outputs="each")
    seen = ntkops.projected_ntk(some, 90, generator=torch.Generator().manual_seed(0))
    found = distil(seen, logits[:30]).fit(seen, logits[:30], ridge=1e-6)
    error = metrics.mean_squared_error(found.predict(seen.cross(x_new)), truth)
    assert report.distilled.mean_squared_error == pytest.approx(error, rel=1e-6)
    assert report.distilled.stages == ("data", "projection", "gradients")
    assert report.full.accuracy == report.full.fidelity


def test_sizes_and_reductions(report) -> None:
    assert [run.num_points for run in report.stages] == [60, 30, 30, 30]
    parameters = sum(p.numel() for p in network().parameters())
    assert [run.num_features for run in report.stages] == [parameters, parameters, 90, 90]
    assert [run.num_gradients for run in report.stages] == [60, 30, 30, 9]
    assert {name: run.stages for name, run in report.ablations.items()} == {
        "data": ("projection", "gradients"),
        "projection": ("data", "gradients"),
        "gradients": ("data", "projection"),
    }
    assert report.ablations["gradients"] is report.stages[2]
    saved = report.reduction()
    assert saved["jacobian_rows"] == 2
    assert saved["kernel_bytes"] == 4
    assert saved["gradient_bytes"] == pytest.approx(60 * parameters / (9 * 90))
    assert saved["solve_flops"] == pytest.approx((60 / 9) ** 3)
    assert "data + projection + gradients" in str(report.distilled)


def test_a_report_is_plain_numbers_for_json(report) -> None:
    found = json.loads(json.dumps(report.to_dict()))
    assert [row["stages"] for row in found["stages"]] == [list(run.stages) for run in report.stages]
    parameters = sum(p.numel() for p in network().parameters())
    assert found["stages"][0]["kernel_flops"] == 60**2 * parameters * 3
    assert report.reduction()["kernel_flops"] == pytest.approx(4 * parameters / 90)
    for row, run in zip(found["stages"], report.stages, strict=True):
        last = next(step for step in row["steps"] if step["name"] == "prediction")
        assert row["prediction_passes"] == last["passes"] > 0
        assert row["prediction_seconds"] == last["seconds"] > 0
        assert row["passes"] == run.passes == sum(step["passes"] for step in row["steps"])
    assert sorted(found["ablations"]) == ["data", "gradients", "projection"]


def test_every_run_pays_for_its_gradients(report) -> None:
    for run in report.stages:
        steps = [step.name for step in run.steps]
        assert steps.count("kernel") == steps.count("prediction") == 1
        assert ("data" in steps) == ("data" in run.stages)
        assert run.passes > 0 and run.seconds > 0
        kernel = next(step for step in run.steps if step.name == "kernel")
        assert kernel.passes.total > 0
    # Gradients are distilled from kernels that are there: no further pass.
    last = {step.name: step.passes for step in report.distilled.steps}
    assert last["gradients"].per_sample + last["gradients"].vjp == 0


def test_it_runs_without_a_dense_kernel() -> None:
    x, x_new = samples(12, 1), samples(8, 2)
    lazy = chain(network(), x, x_new, gradients=distil, ridge=1e-2, max_dense_bytes=0)
    dense = chain(network(), x, x_new, gradients=distil, ridge=1e-2)
    assert lazy.distilled.mean_squared_error == pytest.approx(dense.distilled.mean_squared_error, rel=1e-4)
    assert lazy.full.mean_squared_error == pytest.approx(dense.full.mean_squared_error, rel=1e-3)
    assert lazy.distilled.accuracy is None


def test_stages_may_be_left_out_and_fits_chosen() -> None:
    x, x_new = samples(20, 1), samples(10, 2)
    one = chain(
        network(), x, x_new, gradients=lambda K, Y: select(K, 5, "greedy"), fit="sketch", ablate=False
    )
    assert [run.stages for run in one.stages] == [(), ("gradients",)] and not one.ablations
    several = chain(network(), x, x_new, data=x[:10], projection=SJLT(dim=163, k=64, seed=3), ablate=False)
    assert [run.num_features for run in several.stages] == [163, 163, 64]


def test_k_near_m_is_warned_of() -> None:
    with pytest.warns(InterpolationWarning):
        chain(network(), samples(20, 1), samples(5, 2), projection=20, ablate=False)


@pytest.fixture(scope="module")
def repeated():
    """Three seeds of a chain whose points are given, and whose projection and gradients are drawn."""
    x, x_new, draws = samples(60, 1), samples(40, 2), torch.Generator().manual_seed(5)

    def drawn(K, Y):
        return select(K, 9, "random", generator=draws)

    return chain(network(), x, x_new, data=x[:30], projection=90, gradients=drawn, ridge=1e-4, seeds=3)


def test_seeds_draw_anew_what_is_drawn(repeated, report) -> None:
    seeds = [repeated, *repeated.repeats]
    assert len(seeds) == 3 and not any(one.repeats for one in repeated.repeats)
    for name, runs in repeated.runs().items():
        errors = {run.mean_squared_error for run in runs}
        drawn = name not in ("nothing distilled", "data")
        assert len(errors) == (3 if drawn else 1), name
        assert drawn or runs[0] is runs[1] is runs[2]  # made once
    alone = chain(
        network(), samples(60, 1), samples(40, 2), data=samples(60, 1)[:30], projection=90, ablate=False
    )
    for first, other in zip(seeds[0].stages[:3], alone.stages, strict=True):
        assert first.mean_squared_error == other.mean_squared_error  # the first seed is what one is
    assert [len(runs) for runs in report.runs().values()] == [1] * 7


def test_a_report_of_several_seeds_has_means_and_ranges(repeated) -> None:
    runs = repeated.runs()["data + projection + gradients"]
    values = [run.fidelity for run in runs]
    shown = f"{sum(values) / 3:.3f} ({min(values):.3f} to {max(values):.3f})"
    assert min(values) < max(values)
    for text in (str(repeated), repeated._repr_html_()):
        assert shown in text and "mean of 3 seeds (range)" in text
    found = json.loads(json.dumps(repeated.to_dict()))
    entry = found["summary"]["data + projection + gradients"]
    assert entry["fidelity"]["mean"] == pytest.approx(sum(values) / 3)
    assert entry["fidelity"]["std"] == pytest.approx(float(torch.tensor(values).double().std()))
    assert "accuracy" not in entry  # there are no labels
    assert found["summary"]["nothing distilled"]["mean_squared_error"]["std"] == 0
    assert [len(one["stages"]) for one in found["repeats"]] == [4, 4]


def test_a_single_seed_has_no_ranges(report) -> None:
    assert "seeds" not in str(report) and " to " not in str(report)
    assert sorted(report.to_dict()) == ["ablations", "stages"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "needs a stage"),
        ({"projection": 40, "seeds": 0}, "positive number of repetitions"),
        ({"projection": 0}, "positive number of features"),
        ({"projection": "gaussian"}, "positive number of features"),
        ({"gradients": "pca"}, "pass a function, or None"),
        ({"projection": 40, "fit": "exact"}, "choose 'nystrom'"),
        ({"gradients": lambda K, Y: K}, "due is a Distilled"),
    ],
)
def test_messages(arguments, message) -> None:
    with pytest.raises(InputError, match=message):
        chain(network(), samples(12, 1), samples(4, 2), **arguments)


def test_a_projected_baseline_asks_for_no_kernel_of_all_parameters(tmp_path) -> None:
    x, x_new = samples(60, 1), samples(20, 2)
    options = {"data": x[:30], "projection": 24, "gradients": distil, "ridge": 1e-2}
    found = chain(network(), x, x_new, baseline="projected", memmap=tmp_path, **options)
    assert [run.stages for run in found.stages] == [
        ("projection",),
        ("data", "projection"),
        ("data", "projection", "gradients"),
    ]
    assert sorted(found.ablations) == ["data", "gradients"]
    assert {run.num_features for run in (*found.stages, *found.ablations.values())} == {24}
    # Runs that share their features pay for them each.
    shared = [run.steps for run in (found.full, found.ablations["data"])]
    assert shared[0][0] == shared[1][0] and shared[0][0].passes.per_sample > 0
    plain = chain(network(), x, x_new, **options)
    for one, other in ((found.distilled, plain.distilled), (found.full, plain.ablations["data"])):
        assert one.num_points == other.num_points
    assert found.distilled.mean_squared_error == pytest.approx(plain.distilled.mean_squared_error, rel=1e-9)


def test_a_projected_baseline_needs_a_projection() -> None:
    with pytest.raises(InputError, match="'projected' with a projection"):
        chain(network(), samples(12, 1), samples(4, 2), gradients=distil, baseline="projected")
