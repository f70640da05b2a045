"""What of a module is compared before what is known of it is taken over from the last time."""

import dataclasses
import enum
import threading

import pytest
import torch
from torch import nn

import ntkops
from ntkops.model.inspection import fingerprint


class Kind(enum.Enum):
    TANH = "tanh"
    SINE = "sine"


@dataclasses.dataclass
class Settings:
    kind: Kind
    scales: dict


class Fresh:
    """Gives a new dictionary whenever it is copied."""

    def __init__(self, value):
        self.value = value

    def __getstate__(self):
        return {"value": self.value}


class Configured(nn.Module):
    """Keeps what it is told in objects, as models of libraries do."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)
        self.settings = Settings(Kind.TANH, {"default": [1.0, 2.0]})
        self.again = self.settings
        self.several = {"first": Fresh(1), "second": Fresh(1)}
        self.order = [self.head]
        self.calls = 0

    def forward(self, x):
        Configured.passes += 1
        hidden = self.body(x)[0][:, -1] * self.settings.scales["default"][0]
        activation = torch.tanh if self.settings.kind is Kind.TANH else torch.sin
        return self.order[0](activation(hidden))


CHANGES = {
    "a number in a dictionary of an object": lambda m: m.settings.scales["default"].__setitem__(1, 3.0),
    "a member of an enumeration": lambda m: setattr(m.settings, "kind", Kind.SINE),
    "another object of the same content": lambda m: setattr(
        m, "again", Settings(Kind.TANH, {"default": [1.0, 2.0]})
    ),
    "what the second of two objects gives to be copied": lambda m: setattr(m.several["second"], "value", 2),
    "True for 1": lambda m: setattr(m.several["first"], "value", True),
    "a hook": lambda m: m.head.register_forward_hook(lambda *_: None),
    "a module in a list": lambda m: m.order.append(m.body),
    "a selected parameter": lambda m: m.head.bias.requires_grad_(False),
    "the mode": lambda m: m.eval(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_show(change):
    model = Configured()
    before = fingerprint(model)
    assert before is not None and before == fingerprint(model)
    CHANGES[change](model)
    assert fingerprint(model) != before


@pytest.mark.parametrize("opaque", [threading.Lock(), torch.ones(2), iter([1]), nn.Linear(1, 1)])
def test_what_cannot_be_compared_is_not_remembered(opaque):
    model = Configured()
    model.settings.scales["opaque"] = [opaque]
    assert fingerprint(model) is None


def test_a_module_with_objects_is_tried_once():
    model, x = Configured(), torch.randn(5, 3, 3, generator=torch.Generator().manual_seed(0))
    Configured.passes = 0
    ntkops.ntk(model, x)
    made = Configured.passes
    with torch.no_grad():
        model.head.weight.mul_(2.0)
    ntkops.ntk(model, x)
    assert Configured.passes == made
    model.settings.kind = Kind.SINE
    K = ntkops.ntk(model, x)
    assert Configured.passes == 2 * made
    weights = list(model.parameters())
    rows = [torch.autograd.grad(y, weights, retain_graph=True) for y in model(x).flatten()]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).double()
    torch.testing.assert_close(K.to_dense().double(), J @ J.T, rtol=1e-4, atol=1e-5)
