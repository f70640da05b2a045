"""What is drawn is what was given: positions, errors, scales, labels, and nothing else changes."""

from __future__ import annotations

import sys
from itertools import combinations

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

import ntkops
from ntkops import plotting
from ntkops.errors import EstimateError, NonFiniteError, NtkopsError, ShapeError
from ntkops.results import Eigenpairs, Estimate, TruncationRank


def axes() -> Axes:
    return Figure().subplots()


def estimate(value: float, stderr: float, passes: int, method: str = "hutchinson") -> Estimate:
    middle, error = torch.tensor(value).double(), torch.tensor(stderr).double()
    ends = (middle - 2 * error, middle + 2 * error)
    return Estimate(middle, error, ends, method, exact=False, passes=passes)


def eigenpairs(values: list[float], residuals: list[float]) -> Eigenpairs:
    count = len(values)
    return Eigenpairs(
        values=torch.tensor(values).double(),
        vectors=torch.eye(count),
        residuals=torch.tensor(residuals).double(),
        converged=True,
        passes=4,
        method="lanczos",
    )


def legend(ax: Axes) -> list[str]:
    found = ax.get_legend()
    return [] if found is None else [text.get_text() for text in found.get_texts()]


def bars(ax: Axes) -> np.ndarray:
    """Ends (low, high) of the error bars, sorted by position."""
    segments = [s for c in ax.collections for s in c.get_segments()]
    return np.array([sorted(segment[:, 1]) for segment in segments])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_spectrum_is_sorted_from_one_on_a_logarithmic_axis(dtype: torch.dtype) -> None:
    ax = plotting.plot_spectrum(torch.tensor([1.0, 1024.0, 32.0], dtype=dtype), axes())
    (line,) = ax.get_lines()
    assert line.get_xdata().tolist() == [1, 2, 3]
    assert line.get_ydata().tolist() == [1024.0, 32.0, 1.0]
    assert ax.get_yscale() == "log"
    assert ax.get_xlabel() and ax.get_ylabel()


def test_spectrum_within_one_decade_is_linear() -> None:
    assert plotting.plot_spectrum([3.0, 2.0, 1.0], axes()).get_yscale() == "linear"


def test_spectrum_says_what_a_logarithmic_axis_hides() -> None:
    ax = plotting.plot_spectrum([100.0, 1.0, 0.0, -1e-9], axes(), label="after")
    assert ax.get_lines()[0].get_ydata().tolist() == [100.0, 1.0]
    assert legend(ax) == ["after (2 not positive, not shown)"]


def test_spectrum_without_a_positive_eigenvalue_is_drawn_empty() -> None:
    ax = plotting.plot_spectrum([0.0, 0.0], axes())
    assert legend(ax) == ["eigenvalues (2 not positive, not shown)"]


def test_residuals_of_eigenpairs_are_error_bars_in_the_order_of_the_values() -> None:
    ax = plotting.plot_spectrum(eigenpairs([1.0, 100.0, 10.0], [0.5, 20.0, 0.0]), axes())
    assert np.allclose(bars(ax), [[80.0, 120.0], [0.5, 1.5]])


def test_a_bar_longer_than_its_eigenvalue_ends_above_zero() -> None:
    low, high = bars(plotting.plot_spectrum(eigenpairs([100.0, 1.0], [1.0, 5.0]), axes()))[1]
    assert 0 < low < 0.1 and high == 6.0


def test_relative_spectrum_shows_shares() -> None:
    ax = plotting.plot_spectrum(eigenpairs([6.0, 3.0, 1.0], [0.6, 0.0, 0.0]), axes(), relative=True)
    assert np.allclose(ax.get_lines()[0].get_ydata(), [0.6, 0.3, 0.1])
    assert np.allclose(bars(ax), [[0.54, 0.66]])
    assert "share" in ax.get_ylabel()


def test_spectra_on_the_same_axes_are_told_apart() -> None:
    ax = axes()
    for name in ("a", "b", "c"):
        plotting.plot_spectrum([4.0, 2.0, 1.0], ax, label=name)
    assert legend(ax) == ["a", "b", "c"]
    assert len({line.get_color() for line in ax.get_lines()}) == 3


def test_unlabelled_spectra_are_told_apart() -> None:
    ax = axes()
    plotting.plot_spectrum([4.0, 2.0], ax)
    plotting.plot_spectrum([3.0, 1.0], ax)
    assert len({line.get_color() for line in ax.get_lines()}) == 2


def test_own_style_wins() -> None:
    ax = plotting.plot_spectrum([2.0, 1.0], axes(), color="red", linestyle="--")
    assert ax.get_lines()[0].get_color() == "red"
    assert ax.get_lines()[0].get_linestyle() == "--"


def test_a_scale_that_decades_need_stays_when_a_flat_spectrum_follows() -> None:
    ax = plotting.plot_spectrum([1e6, 1.0], axes())
    assert plotting.plot_spectrum([2.0, 1.0], ax).get_yscale() == "log"


def test_class_spectra_have_one_line_each_and_a_mark_at_the_rank() -> None:
    spectra = torch.tensor([[1.0, 100.0, 10.0], [3.0, 2.0, 1.0]])
    ax = plotting.plot_class_spectra(spectra, axes(), labels=["cat", "dog"], ranks=[2, 3])
    assert legend(ax) == ["cat", "dog"]
    lines = [line for line in ax.get_lines() if len(line.get_xdata()) == 3]
    marks = [line for line in ax.get_lines() if len(line.get_xdata()) == 1]
    assert [line.get_ydata().tolist() for line in lines] == [[100.0, 10.0, 1.0], [3.0, 2.0, 1.0]]
    assert [(m.get_xdata()[0], m.get_ydata()[0]) for m in marks] == [(2, 10.0), (3, 1.0)]
    assert [mark.get_color() for mark in marks] == [line.get_color() for line in lines]


def test_truncation_ranks_are_drawn_as_they_come() -> None:
    values = torch.tensor([[4.0, 1.0, 0.0], [3.0, 2.0, 1.0]]).double()
    found = TruncationRank(
        rank=torch.tensor([1, 2]),
        captured=torch.tensor([0.8, 0.8]),
        epsilon=0.2,
        values=values,
        exact=True,
        converged=True,
        passes=3,
    )
    ax = plotting.plot_class_spectra(found, axes())
    marks = [line for line in ax.get_lines() if len(line.get_xdata()) == 1]
    assert [(m.get_xdata()[0], m.get_ydata()[0]) for m in marks] == [(1, 4.0), (2, 2.0)]
    assert ax.get_legend().get_title().get_text() == "class (only values > 0)"
    (group,) = plotting.plot_truncation_ranks({"K": found}, axes()).containers
    assert [bar.get_height() for bar in group] == [1, 2]


def test_many_classes_never_share_colour_and_dashes() -> None:
    ax = plotting.plot_class_spectra(torch.ones(20, 4), axes())
    assert len({(line.get_color(), line.get_linestyle()) for line in ax.get_lines()}) == 20


def test_colours_stay_apart_for_the_colour_blind() -> None:
    # How a protanope and a deuteranope see linear RGB, after Viénot, Brettel and Mollon (1999).
    ax = plotting.plot_class_spectra(torch.ones(7, 2), axes())
    colours = [np.array(to_rgb(line.get_color())) ** 2.2 for line in ax.get_lines()]
    views = [
        np.array([[0.11238, 0.88762, 0], [0.11238, 0.88762, 0], [0.00401, -0.00401, 1]]),
        np.array([[0.29275, 0.70725, 0], [0.29275, 0.70725, 0], [-0.02234, 0.02234, 1]]),
    ]
    for view in views:
        for one, other in combinations(colours, 2):
            seen = (np.clip(view @ one, 0, 1) ** (1 / 2.2), np.clip(view @ other, 0, 1) ** (1 / 2.2))
            assert np.linalg.norm(seen[0] - seen[1]) > 0.1


def test_truncation_ranks_stand_side_by_side() -> None:
    ranks = {"before": torch.tensor([1, 2, 3]), "after": torch.tensor([4, 5, 6])}
    ax = plotting.plot_truncation_ranks(ranks, axes(), labels=["x", "y", "z"], limit=9)
    heights = [[bar.get_height() for bar in group] for group in ax.containers]
    assert heights == [[1, 2, 3], [4, 5, 6]]
    edges = sorted((bar.get_x(), bar.get_x() + bar.get_width()) for group in ax.containers for bar in group)
    assert all(left[1] <= right[0] + 1e-9 for left, right in zip(edges[:-1], edges[1:], strict=True))
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["x", "y", "z"]
    assert ax.get_lines()[0].get_ydata()[0] == 9
    assert ax.get_ylim()[1] > 9  # room for the legend


def test_estimates_show_their_intervals() -> None:
    exact = Estimate.of_exact(torch.tensor(7.0), passes=3)
    ax = plotting.plot_estimates({"trace": estimate(10.0, 1.0, 8), "norm": exact}, axes())
    segments = [c.get_segments()[0][:, 0].tolist() for c in ax.collections]
    assert segments == [[8.0, 12.0], [7.0, 7.0]]
    ticks = [tick.get_text() for tick in ax.get_yticklabels()]
    assert ticks == ["trace\nhutchinson, 8 passes", "norm\nexact, 3 passes"]


def test_error_against_passes_draws_root_mean_squares_and_reported_errors() -> None:
    curve = [estimate(103.0, 3.0, 8), estimate(96.0, 4.0, 8), estimate(99.5, 1.0, 32)]
    ax = plotting.plot_error_against_passes({"hutch++": curve}, 100.0, axes())
    errors, reported = ax.get_lines()[:2]
    assert errors.get_xdata().tolist() == [8, 32]
    assert np.allclose(errors.get_ydata(), [0.05 / 2**0.5, 0.005])
    assert np.allclose(reported.get_ydata(), [0.05 / 2**0.5, 0.01])
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert legend(ax) == ["hutch++", "standard error as reported"]


def test_a_legend_covers_no_curve() -> None:
    late = [estimate(100.0 + 1600.0 / passes, 1.0, passes) for passes in (16, 32, 64, 128)]
    soon = [estimate(100.0 + 1.0 / passes, 0.1, passes) for passes in (1, 2, 4, 8)]
    ax = plotting.plot_error_against_passes({"a": late, "b": soon}, 100.0, axes())
    ax.figure.draw_without_rendering()
    box = ax.get_legend().get_window_extent()
    for line in ax.get_lines():
        places = line.get_transform().transform(np.column_stack(line.get_data()).astype(float))
        assert not box.count_contains(places)
        assert not line.get_path().transformed(line.get_transform()).intersects_bbox(box, filled=False)


def test_error_of_a_negative_quantity_and_of_none_at_all() -> None:
    curve = [estimate(-110.0, 1.0, 4), estimate(-100.0, 0.0, 8)]
    ax = plotting.plot_error_against_passes({"a": curve}, -100.0, axes(), predicted=False)
    assert np.allclose(ax.get_lines()[0].get_ydata(), [0.1])
    assert legend(ax) == ["a (exact with 8 passes)"]


def test_a_short_spectrum_leaves_the_ticks_of_a_long_one() -> None:
    ax = plotting.plot_spectrum(torch.logspace(0, -6, 80), axes())
    before = ax.xaxis.get_major_locator()
    plotting.plot_spectrum(torch.logspace(0, -3, 20), ax)
    assert ax.get_xscale() == "log" and ax.xaxis.get_major_locator() is before
    swapped = plotting.plot_spectrum(torch.logspace(0, -3, 20), axes())
    plotting.plot_spectrum(torch.logspace(0, -6, 80), swapped)
    assert swapped.get_xscale() == "log" and len(swapped.get_xticks()) < 20


def overlaps(ax: Axes) -> bool:
    """Whether two names under an axis lie on each other."""
    ax.figure.canvas.draw()
    boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
    return any(one.overlaps(other) for one, other in combinations(boxes, 2))


@pytest.mark.parametrize("count", [3, 10, 24, 100])
@pytest.mark.parametrize("named", [False, True])
def test_names_of_classes_never_overlap(count: int, named: bool) -> None:
    names = [f"class {c}" for c in range(count)] if named and count < 50 else None
    ax = plotting.plot_truncation_ranks({"before": range(1, count + 1)}, axes(), labels=names)
    assert not overlaps(ax)


def test_a_kernel_may_be_an_operator_or_a_partial_trace_with_named_classes() -> None:
    model, x = torch.nn.Linear(3, 2), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    K = ntkops.ntk(model, x)
    (image,) = plotting.plot_kernel(K, axes()).get_images()
    assert np.allclose(image.get_array(), K.to_dense().detach())
    traced = ntkops.partial_trace(K, over="samples")
    ax = plotting.plot_kernel(traced, axes(), labels=["cat", "dog"])
    assert np.allclose(ax.get_images()[0].get_array(), traced.value)
    assert [text.get_text() for text in (*ax.get_yticklabels(), *ax.get_xticklabels())] == ["cat", "dog"] * 2
    with pytest.raises(ShapeError, match="2 rows, but there are 3 labels"):
        plotting.plot_kernel(traced, labels=["a", "b", "c"])


def test_a_kernel_of_several_functions_shows_its_blocks() -> None:
    model, x = torch.nn.Linear(3, 1), torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
    J = ntkops.stack({"ends": ntkops.jacobian(model, x[:2]), "inside": ntkops.jacobian(model, x[2:])})
    ax = plotting.plot_kernel(J @ J.mT, axes())
    assert [line.get_xdata()[0] for line in ax.get_lines()[:1]] == [1.5]
    assert [line.get_ydata()[0] for line in ax.get_lines()[1:]] == [1.5]
    assert [text.get_text() for text in (*ax.get_yticklabels(), *ax.get_xticklabels())] == [
        "ends",
        "inside",
    ] * 2
    assert ax.get_yticks().tolist() == [0.5, 3.5]


def test_ticks_of_a_kernel_are_whole_numbers() -> None:
    ax = plotting.plot_kernel(torch.eye(16), axes())
    assert (ax.get_xticks() % 1 == 0).all()
    assert (ax.get_yticks() % 1 == 0).all()


def test_images_stand_in_rows_each_on_its_own_scale() -> None:
    grey, colours = torch.zeros(2, 1, 2, 2), torch.zeros(1, 3, 2, 2)
    grey[0, 0, 0, 1], colours[0, 2] = 5.0, 1.0
    ax = plotting.plot_images({"grey": grey, "blue": colours}, axes())
    page = np.asarray(ax.get_images()[0].get_array())
    assert page.shape == (5, 5, 3)
    assert page[0, 1].tolist() == [1, 1, 1]
    assert page[0, 0].tolist() == [0, 0, 0]
    assert page[3, 0].tolist() == [0, 0, 1]
    assert (page[2] == 1).all()  # between the rows
    assert (page[3:, 3:] == 1).all()  # there is no second one
    assert [text.get_text() for text in ax.get_yticklabels()] == ["grey", "blue"]


def test_kernel_has_a_colour_scale_that_shows_where_zero_is() -> None:
    ax = plotting.plot_kernel(torch.tensor([[3.0, -1.0], [-1.0, 2.0]]), axes())
    (image,) = ax.get_images()
    assert image.get_clim() == (-3.0, 3.0)
    assert image.get_array().tolist() == [[3.0, -1.0], [-1.0, 2.0]]
    (image,) = plotting.plot_kernel(torch.tensor([[3.0, 1.0], [1.0, 2.0]]), axes()).get_images()
    assert image.get_clim() == (0.0, 3.0)


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda: plotting.plot_spectrum(torch.ones(2, 2)), ShapeError, "plot_class_spectra"),
        (lambda: plotting.plot_spectrum([]), ShapeError, "list of eigenvalues"),
        (lambda: plotting.plot_spectrum([1.0, float("nan")]), NonFiniteError, r"position \(1,\)"),
        (lambda: plotting.plot_class_spectra([1.0]), ShapeError, r"\(C, k\)"),
        (lambda: plotting.plot_class_spectra([[1.0]], labels=["a", "b"]), ShapeError, "2 labels"),
        (lambda: plotting.plot_class_spectra([[1.0]], ranks=[1, 1]), ShapeError, "2 ranks"),
        (lambda: plotting.plot_truncation_ranks({"a": [1], "b": [1, 2]}), ShapeError, r"\[1, 2\] classes"),
        (lambda: plotting.plot_truncation_ranks({}), ShapeError, "each class"),
        (lambda: plotting.plot_estimates({}), ShapeError, "no estimate"),
        (
            lambda: plotting.plot_estimates({"a": Estimate.of_exact(torch.ones(2), passes=1)}),
            EstimateError,
            "scalar",
        ),
        (lambda: plotting.plot_error_against_passes({}, 1.0), ShapeError, "for each method"),
        (lambda: plotting.plot_error_against_passes({"a": []}, 1.0), ShapeError, "for each method"),
        (
            lambda: plotting.plot_error_against_passes({"a": [estimate(1.0, 1.0, 1)]}, 0.0),
            ShapeError,
            "not zero",
        ),
        (lambda: plotting.plot_kernel([1.0]), ShapeError, "matrix"),
        (lambda: plotting.plot_images({}), ShapeError, "no set"),
        (lambda: plotting.plot_images({"a": torch.ones(2, 2, 3, 3)}), ShapeError, "'a' has shape"),
        (
            lambda: plotting.plot_images({"a": torch.ones(1, 3, 3), "b": torch.ones(1, 4, 3)}),
            ShapeError,
            "unlike sizes",
        ),
    ],
)
def test_bad_input_is_refused_before_a_figure_is_made(draw, error: type[NtkopsError], message: str) -> None:
    from matplotlib import pyplot

    with pytest.raises(error, match=message):
        draw()
    assert pyplot.get_fignums() == []


def test_new_axes_are_made_and_no_style_changes() -> None:
    from matplotlib import pyplot

    before = dict(matplotlib.rcParams)
    ax = plotting.plot_spectrum([2.0, 1.0])
    assert dict(matplotlib.rcParams) == before
    assert isinstance(ax, Axes)
    pyplot.close(ax.figure)
    assert pyplot.get_fignums() == []


def test_without_matplotlib_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="pip install matplotlib") as caught:
        plotting.plot_spectrum([2.0, 1.0])
    assert isinstance(caught.value, NtkopsError)
