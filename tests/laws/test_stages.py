"""A backward pass in stages gives what it gives as a whole: one stage, some, or one for each layer.

The reference is J in float64 by plain backward passes. The networks are hard to cut: a weight with uses in
several stages, skips past many layers, branches that are scaled by zero, a table whose head shares it,
outputs that read one position, samples that are sorted, packed or routed on the way.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ntkops
from ntkops.engines import source as sources
from ntkops.engines.stages import largest_stage, plan_stages
from ntkops.engines.units import plan_units
from ntkops.errors import CoupledSamplesError
from ntkops.model import linearize
from ntkops.model.record import record

from .reference import close, jacobian, kernel, normal
from .test_attribution import COUPLED, STORIES, reference

TOLERANCES = {torch.float64: 1e-12, torch.float32: 3e-6}


class Tied(nn.Module):
    """A block whose weight is used three times, far apart, and a table that is the head as well."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.other, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.table(tokens)
        for _ in range(3):
            h = h + torch.tanh(self.inner(self.norm(h)))
            h = h + self.other(torch.tanh(h))
        return h[:, -1] @ self.table.weight.T


class Skips(nn.Module):
    """Every layer reads all those before it: nothing separates them but the first and the last."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3 * (i + 1), 3) for i in range(3))
        self.first, self.head = (
            nn.Linear(3, 3),
            nn.Sequential(nn.Tanh(), nn.Linear(12, 4), nn.Tanh(), nn.Linear(4, 2)),
        )

    def forward(self, x: Tensor) -> Tensor:
        found = [self.first(x)]
        for layer in self.layers:
            found.append(torch.tanh(layer(torch.cat(found, -1))))
        return self.head(torch.cat(found, -1))


class Branches(nn.Module):
    """Convolutions on branches, every other one of which is scaled by zero."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
            for _ in range(3)
        )
        self.scales = nn.Parameter(torch.tensor([1.0, 0.0, 0.5]))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.stem(x))
        for number, block in enumerate(self.blocks):
            h = torch.relu(h + self.scales[number] * block(h))
        return self.head(h.mean((2, 3)))


class Places(nn.Module):
    """Tokens and positions, the latter looked up once for all samples; one position is read."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(6, 4), nn.Embedding(9, 4)
        self.mixes = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.tokens(tokens) + self.places(torch.arange(1, 1 + tokens.shape[1])[None])
        for mix in self.mixes:
            h = h + torch.tanh(mix(h.cumsum(1)))
        return self.head(h[:, -1])


def _tokens(words: int) -> Tensor:
    return torch.randint(words, (5, 4), generator=torch.Generator().manual_seed(1))


CASES = {
    "tied": (Tied, _tokens(7)),
    "skips": (Skips, normal(5, 3, seed=1)),
    "branches": (Branches, normal(5, 2, 5, 5, seed=1)),
    "places": (Places, _tokens(6)),
}


def _made(name: str, dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    build, x = CASES[name]
    return build().to(dtype), x.to(dtype) if x.is_floating_point() else x


@pytest.mark.parametrize(("dtype", "size"), [(torch.float64, 0), (torch.float32, 200)])
@pytest.mark.parametrize("name", CASES)
def test_kernels_of_every_kind_do_not_depend_on_stages(name, dtype, size, monkeypatch):
    monkeypatch.setattr(sources, "_STAGE_BYTES", size)
    model, x = _made(name, dtype)
    J = jacobian(model.double(), x.double() if x.is_floating_point() else x)
    model.to(dtype)
    width = len(J) // len(x)
    linearization = ntkops.linearize(model)
    for outputs in ("all", "each", "trace", [1, 0]):
        routes = ("auto", "gram", "gradient") if outputs == "all" else ("auto",)
        for route in routes:
            found = ntkops.ntk(linearization, x, outputs=outputs, engine=ntkops.Layerwise(route)).to_dense()
            close(found, kernel(J, J, width, outputs), TOLERANCES[dtype], f"{outputs} {route}")
    few = width * 3
    cross = ntkops.ntk(linearization, x[:3], x).to_dense()
    close(cross, kernel(J[:few], J, width), TOLERANCES[dtype], "cross")


@pytest.mark.parametrize("name", CASES)
def test_every_unit_is_in_one_stage_and_stages_hold_less_than_all(name):
    model, x = _made(name, torch.float64)
    linearization = linearize(model)
    (_, _, batch), *_ = linearization.inputs(x).batches(len(x))
    recording = record(linearization.function, linearization.parameters, batch)
    units = plan_units(recording.calls, frozenset(range(len(linearization.names))))
    whole, fine = plan_stages(recording, units, 10**9), plan_stages(recording, units, 0)
    assert len(whole) == 1 < len(fine)
    assert sorted(map(id, units)) == sorted(id(unit) for stage in fine for unit in stage.units)
    assert sorted(number for stage in fine for number in stage.calls) == sorted(whole[0].calls)
    assert largest_stage(recording, fine) <= largest_stage(recording, whole)


@pytest.mark.parametrize("name", STORIES)
def test_rows_of_other_samples_are_seen_in_every_stage(name, monkeypatch):
    monkeypatch.setattr(sources, "_STAGE_BYTES", 0)
    story, dtype = STORIES[name], torch.float64
    J = reference(name, dtype)
    K = ntkops.ntk(story.make(dtype), story.samples(dtype))
    close(K.to_dense(), kernel(J, J, len(J) // K.num_samples), 1e-9)


@pytest.mark.parametrize("name", COUPLED)
def test_coupled_samples_have_no_kernel_in_stages_either(name, monkeypatch):
    monkeypatch.setattr(sources, "_STAGE_BYTES", 0)
    story = COUPLED[name]
    with pytest.raises(CoupledSamplesError):
        ntkops.ntk(story.make(torch.float64), story.samples(torch.float64)).to_dense()
