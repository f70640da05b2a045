"""Every operator and result shows itself in a few words: what it is, of which shape, made of what."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import ntkops
from ntkops import distill

torch.manual_seed(0)
MODEL = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
X = torch.randn(50, 4)
K, J = ntkops.ntk(MODEL, X), ntkops.jacobian(MODEL, X)


@pytest.mark.parametrize(
    ("operator", "words"),
    [
        (K, ("NTKOperator(150x150", "51 parameters")),
        (2 * K, ("KernelMultiple(150x150", "NTKOperator", "2", "torch.float32")),
        (K + K, ("KernelSum(150x150", "NTKOperator, NTKOperator")),
        (K.add_jitter(0.1), ("RidgeOperator(150x150", "NTKOperator", "cpu")),
        (ntkops.sandwich(J, torch.rand(51)), ("Sandwich(150x150", "JacobianOperator")),
        (torch.cat([K, K]), ("JoinedOperator(300x150", "NTKOperator")),
        (ntkops.nystrom_ntk(K, "rpcholesky", num_inducing=5), ("NystromOperator(150x150",)),
        (ntkops.ntk(MODEL, X, outputs="each"), ("NTKOperator(3x50x50",)),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, tuple) else "",
)
def test_operators_say_their_shape_and_parts(operator, words):
    shown = repr(operator)
    assert all(word in shown for word in words), shown
    assert len(shown) < 200 and "object at" not in shown


def test_results_are_short_and_readable():
    assert len(repr(ntkops.diagonal(K))) < 100
    info = repr(K.engine_info)
    assert info.startswith("EngineInfo: 'layerwise'") and "\n  0.weight: linear; kernel by" in info
    report = repr(ntkops.check_operator(K))
    assert "passed" in report.splitlines()[0] and "\n  symmetry: passed" in report
    assert max(map(len, [*info.splitlines(), *report.splitlines()])) < 200


class Cells(HTMLParser):
    """The texts of a page's cells; raises where a tag is not closed in its place."""

    def __init__(self, page):
        super().__init__()
        self.open, self.cells = [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th", "caption"):
            self.cells.append(data)


FIT = ntkops.KernelRidge(1e-2).fit(K, torch.randn(50, 3))
TRACKED = ntkops.track(MODEL, X, [MODEL.state_dict()], ("trace",))


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        (K, ("NTKOperator", "150 x 150", "51")),
        (2 * K, ("KernelMultiple", "torch.float32")),
        (K.add_jitter(0.1), ("RidgeOperator", "150 x 150")),
        (ntkops.trace(K), ("Estimate", "exact")),
        (ntkops.trace(K, method="rhutch", num_passes=9), ("95 % interval", "rhutch", "9")),
        (ntkops.diagonal(K), ("Estimate",)),
        (K.engine_info, ("0.weight", "linear", "no shared weights")),
        (FIT, ("KernelRidge", "ridge", "0.01")),
        (TRACKED, ("step", "trace")),
        (ntkops.compare({"a<b": MODEL, "c": MODEL}, X, ("trace",)), ("a<b", "trace")),
        (distill.select(K, 5), ("Distilled", "selection")),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, tuple) else "",
)
def test_notebooks_show_a_table_with_everything_escaped(shown, words):
    page = shown._repr_html_()
    cells = Cells(page).cells
    assert all(any(word in cell for cell in cells) for word in words), cells
    assert len(page) < 4000
