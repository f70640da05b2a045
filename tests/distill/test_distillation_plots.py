"""Drawings of distillation show the numbers that they were given."""

from __future__ import annotations

import dataclasses

import matplotlib.pyplot
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ntkops import distill, plotting
from ntkops.errors import InputError, NonFiniteError, ShapeError
from ntkops.results import ChainReport, ChainRun, ChainStep, Containment, LocalGlobalTrial, PassCount
from tests.distill.clustered import clustered
from tests.estimators.problems import generator


def axes() -> Axes:
    return Figure().subplots()


def legend(ax: Axes) -> list[str]:
    found = ax.get_legend()
    return [] if found is None else [text.get_text() for text in found.get_texts()]


@pytest.fixture(scope="module")
def maps() -> Containment:
    problem = clustered(spread=2.0)
    return distill.containment(problem.kernels[0], problem.clusters)


def test_local_containment_is_the_mean_within_the_range(maps: Containment) -> None:
    ax = plotting.plot_local_containment(maps, axes())
    line = ax.get_lines()[0]
    assert line.get_xdata().tolist() == list(range(1, len(maps.values) + 1))
    assert np.allclose(line.get_ydata(), maps.cumulative.mean(0))
    (band,) = ax.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() == pytest.approx(float(maps.cumulative.min()))
    assert legend(ax)[0] == "mean of 4 clusters"


def test_cluster_variance_is_an_image_with_cells_at_whole_numbers(maps: Containment) -> None:
    ax = plotting.plot_cluster_variance(maps, axes())
    (image,) = ax.get_images()
    assert np.allclose(image.get_array(), maps.variance)
    assert image.get_extent()[:2] == [0.5, len(maps.values) + 0.5]
    assert [label.get_text() for label in ax.get_yticklabels()] == [f"{h} (10)" for h in range(4)]


def test_coverage_gap_tells_the_weighted_from_the_plain_mean(maps: Containment) -> None:
    ax = plotting.plot_coverage_gap(maps, axes())
    together, most, mean = (np.asarray(line.get_ydata()) for line in ax.get_lines())
    assert np.allclose(together, maps.union)
    assert np.allclose(most, maps.alignment.amax(0))
    assert np.allclose(mean, maps.alignment.mean(0))
    weighted = float((maps.values * (1 - maps.union)).sum() / maps.values.sum())
    plain = float((1 - maps.union).mean())
    assert legend(ax)[-1] == f"gap: {weighted:.1%} of the variance\n(mean over eigenvectors {plain:.1%})"


def test_properties_stand_beside_random_ones_and_their_bounds() -> None:
    problem = clustered()
    found = distill.local_global_properties(
        problem.kernels, problem.clusters, num_random=3, generator=generator(0)
    )
    ax = plotting.plot_properties(found, axes())
    drawn = {line.get_label(): np.asarray(line.get_xdata()) for line in ax.get_lines()}
    assert np.allclose(drawn["this partition"], found.local_containment)
    assert len(drawn["3 random partitions"]) == 12
    assert drawn["least possible on any partition"][0] == pytest.approx(found.pooled_bound)
    assert len(ax.get_yticks()) == 5


def test_properties_without_a_baseline() -> None:
    problem = clustered()
    ax = plotting.plot_properties(distill.local_global_properties(problem.kernels, problem.clusters), axes())
    assert legend(ax) == ["this partition", "least possible on any partition"]


def test_curves_by_size_are_sorted() -> None:
    ax = plotting.plot_by_size(
        {"a": ([10, 1], [0.9, 0.2]), "b": ([5], torch.tensor([0.5]))}, axes(), full=1.0
    )
    first, second, line = ax.get_lines()
    assert first.get_xdata().tolist() == [1, 10]
    assert first.get_ydata().tolist() == [0.2, 0.9]
    assert second.get_marker() != first.get_marker()
    assert line.get_ydata()[0] == 1.0
    assert ax.get_xscale() == "log"


def trial(size: int, fidelity: float | None, gaps: int = 0, clusters: int = 5) -> LocalGlobalTrial:
    return LocalGlobalTrial(clusters, 0.5, 0.9, size, size - gaps, gaps, fidelity, 0.1)


def test_grid_shows_every_setting_and_the_frontier() -> None:
    trials = [trial(10, 0.8), trial(5, 0.5, gaps=1), trial(20, 0.7, clusters=10), trial(30, 0.9)]
    ax = plotting.plot_local_global_grid(trials, axes())
    places = np.concatenate([c.get_offsets() for c in ax.collections])
    assert sorted(places[:, 0].tolist()) == [5, 10, 20, 30]
    (step,) = ax.get_lines()
    assert step.get_xdata().tolist() == [5, 10, 30]
    assert step.get_ydata().tolist() == [0.5, 0.8, 0.9]
    assert legend(ax) == ["H = 5", "H = 10", "frontier"]


def test_frontier_of_errors_goes_down() -> None:
    trials = [
        LocalGlobalTrial(5, 0.5, 0.9, size, size, 0, None, error)
        for size, error in ((5, 1.0), (10, 2.0), (20, 0.01))
    ]
    (step,) = plotting.plot_local_global_grid(trials, axes(), quantity="mean_squared_error").get_lines()
    assert step.get_xdata().tolist() == [5, 20]
    with pytest.raises(InputError, match="no setting has a fidelity"):
        plotting.plot_local_global_grid(trials, axes())


def test_bad_input_is_named() -> None:
    with pytest.raises(InputError, match="no method"):
        plotting.plot_by_size({}, axes())
    with pytest.raises(ShapeError, match="pca"):
        plotting.plot_by_size({"pca": ([1, 2], [0.5])}, axes())
    with pytest.raises(NonFiniteError, match="pca"):
        plotting.plot_by_size({"pca": ([1], [float("nan")])}, axes())
    with pytest.raises(InputError, match="quantity='accuracy'"):
        plotting.plot_local_global_grid([trial(5, 0.5)], axes(), quantity="accuracy")
    assert not matplotlib.pyplot.get_fignums()


def chain_run(*stages: str, rows: int, fidelity: float | None, seconds: float) -> ChainRun:
    step = ChainStep("kernel", PassCount(vjp=rows), seconds)
    return ChainRun(stages, rows // 3, 50, rows // 3, 3, fidelity, None, 0.5, rows, 8, 8, 8.0, (step,))


def chain_report() -> ChainReport:
    full = chain_run(rows=300, fidelity=0.99, seconds=9.0)
    seeds = []
    for fidelity in (0.9, 0.94, 0.95):
        distilled = chain_run("data", rows=30, fidelity=fidelity, seconds=10 * fidelity)
        both = chain_run("data", "gradients", rows=30, fidelity=fidelity - 0.1, seconds=2.0)
        without = chain_run("gradients", rows=300, fidelity=0.97, seconds=8.0)
        seeds.append(ChainReport((full, distilled, both), {"data": without, "gradients": distilled}))
    return dataclasses.replace(seeds[0], repeats=tuple(seeds[1:]))


def test_a_chain_is_cost_against_fidelity_with_bars_over_seeds() -> None:
    ax = plotting.plot_chain(chain_report(), axes(), cost="jacobian_rows")
    assert legend(ax) == ["nothing distilled", "data", "data + gradients", "without data"]
    marks = [container.lines[0] for container in ax.containers]
    places = [(line.get_xdata()[0], line.get_ydata()[0]) for line in marks]
    assert np.allclose(places, [(300, 0.99), (30, 0.93), (30, 0.83), (300, 0.97)])
    assert [line.get_markerfacecolor() == "white" for line in marks] == [False, False, False, True]
    bars = ax.containers[1].lines[2][1].get_segments()[0]
    assert np.allclose(bars[:, 1], [0.9, 0.95])
    (path,) = [line for line in ax.get_lines() if line.get_label() == "_stages"]
    assert np.allclose(path.get_ydata(), [0.99, 0.93, 0.83])
    assert ax.get_xscale() == "log"


def test_a_chain_of_one_seed_has_no_bars() -> None:
    one = dataclasses.replace(chain_report(), repeats=())
    ax = plotting.plot_chain(one, axes(), quantity="mean_squared_error", color="k")
    assert not any(container.has_xerr or container.has_yerr for container in ax.containers)
    assert ax.get_ylabel() == "mean squared error" and ax.get_xlabel().startswith("seconds")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"cost": "euros"}, "choose one of 'seconds'"),
        ({"quantity": "loss"}, "choose one of 'fidelity'"),
        ({"quantity": "accuracy"}, "no accuracy"),
    ],
)
def test_a_chain_cannot_be_drawn_by_what_it_has_not(options, message) -> None:
    with pytest.raises(InputError, match=message):
        plotting.plot_chain(chain_report(), axes(), **options)
