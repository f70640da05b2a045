"""The check at construction: a wrong rule in a small part of the gradient is found, rounding is not one."""

import logging

import pytest
import torch
from torch import nn

import ntkops
from ntkops.engines import verify
from ntkops.engines.layer_rules import RULES

DTYPES = (torch.float32, torch.float64)
SCALE = "norm.weight"


class Overshadowed(nn.Module):
    """A norm whose gradients are a hundred-thousandth of the whole, and a layer that has all the rest."""

    def __init__(self, features=4):
        super().__init__()
        self.first, self.norm, self.large = nn.Linear(3, features), nn.LayerNorm(features), nn.Linear(3, 2)

    def forward(self, x):
        quiet = torch.tanh(self.norm(self.first(x))).sum(1, keepdim=True)
        return 1e5 * self.large(x) + quiet


def built(dtype, **options):
    torch.manual_seed(2)
    return Overshadowed(**options).to(dtype), torch.randn(5, 3, dtype=dtype)


def share(model, x, name):
    """How much of the whole gradient a parameter has."""
    J = ntkops.jacobian(model, x, engine="autograd").to_dense().double()
    names = [found for found, _ in model.named_parameters()]
    sizes = [p.numel() for p in model.parameters()]
    return float(J.split(sizes, 1)[names.index(name)].norm() / J.norm())


def make_wrong(monkeypatch, rule, role, error):
    """Let a rule give (1 + error) times the gradient of one role."""
    kind, right = type(RULES[rule]), type(RULES[rule]).direct

    def wrong(self, call, asked, *rest):
        return right(self, call, asked, *rest) * (1 + error * (asked == role))

    monkeypatch.setattr(kind, "direct", wrong)


# Within the rounding of the whole gradient, and far beyond it.
@pytest.mark.parametrize(
    ("dtype", "error"),
    [(torch.float32, 1.0), (torch.float32, 0.1), (torch.float64, 1.0), (torch.float64, 1e-3),
     (torch.float64, 1e-9)],
)  # fmt: skip
def test_a_wrong_rule_in_a_small_part_is_found(monkeypatch, caplog, dtype, error):
    model, x = built(dtype)
    assert 1e-6 < share(model, x, SCALE) < 1e-4
    make_wrong(monkeypatch, "layer_norm", "weight", error)
    with caplog.at_level(logging.WARNING, verify.__name__):
        K = ntkops.ntk(model, x, engine="layerwise")
    assert SCALE not in K.engine_info.covered
    assert f"{SCALE!r} goes to automatic differentiation" in caplog.text
    assert "differ by" in " ".join(K.engine_info.reasons)
    assert len(K.engine_info.covered) == len(list(model.parameters())) - 1
    start = sum(p.numel() for p in model.first.parameters())
    found = (K.left.mT @ torch.ones(K.shape[0], dtype=dtype))[start : start + 4]
    expected = ntkops.jacobian(model, x, params=SCALE, engine="autograd").to_dense().sum(0)
    torch.testing.assert_close(found, expected, rtol=1e3 * torch.finfo(dtype).eps, atol=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(5))
def test_rounding_is_no_wrong_rule(caplog, dtype, seed):
    """Behind a norm of one feature the gradient of what it reads is rounding alone."""
    torch.manual_seed(seed)
    first, second = nn.Linear(3, 1), nn.Linear(1, 2)
    model = nn.Sequential(first, nn.LayerNorm(1), nn.Linear(1, 1), nn.LayerNorm(1), second).to(dtype)
    with caplog.at_level(logging.WARNING, verify.__name__):
        K = ntkops.ntk(model, torch.randn(3, 3, dtype=dtype), engine="layerwise")
    assert len(K.engine_info.covered) == len(list(model.parameters())), caplog.text


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_wrong_rule_behind_a_norm_of_one_feature_is_found(monkeypatch, dtype):
    """The second look is taken there, and still finds what is wrong elsewhere."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 1), nn.LayerNorm(1), nn.Linear(1, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    model = model.to(dtype)
    make_wrong(monkeypatch, "layer_norm", "bias", 0.01)
    K = ntkops.ntk(model, torch.randn(3, 3, dtype=dtype), engine="layerwise")
    assert "3.bias" not in K.engine_info.covered
    assert "4.weight" in K.engine_info.covered


class Cancelling(nn.Module):
    """A layer, and a large multiple of zero: a product minus the same one by way of another basis."""

    def __init__(self, large):
        super().__init__()
        self.layer, self.large = nn.Linear(6, 3), large
        self.register_buffer("basis", torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64)).Q)

    def forward(self, x):
        there = (x @ self.basis) @ (self.basis.T @ self.layer.weight.T)
        return self.layer(x) + self.large * (x @ self.layer.weight.T - there)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(5))
def test_rounding_that_parts_forward_from_reverse_mode_is_called_so(dtype, seed):
    torch.manual_seed(seed)
    model, x = Cancelling(1e5).to(dtype), torch.randn(4, 6, dtype=dtype)
    with pytest.raises(ntkops.errors.DifferentiationError, match="rounding alone parts them") as caught:
        _ = ntkops.ntk(model, x).engine_info
    assert ("model.double()" in str(caught.value)) is (dtype == torch.float32)


def test_the_way_out_of_rounding():
    model, x = Cancelling(1e5).float(), torch.randn(4, 6)
    with pytest.raises(ntkops.errors.DifferentiationError, match=r"use model\.double\(\)"):
        _ = ntkops.ntk(model, x).engine_info
    model = Cancelling(300.0).double()
    K = ntkops.ntk(model, x.double())
    torch.testing.assert_close(
        K.to_dense(), ntkops.ntk(model.layer, x.double()).to_dense(), rtol=1e-9, atol=1e-9
    )


class Hidden(nn.Module):
    """A small share of the output under torch.no_grad."""

    def __init__(self, share):
        super().__init__()
        self.layer, self.share = nn.Linear(3, 2), share

    def forward(self, x):
        y = self.layer(x)
        with torch.no_grad():
            hidden = torch.sin(y)
        return torch.tanh(y) + self.share * hidden


@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.float32, 1e-3), (torch.float64, 1e-3), (torch.float64, 1e-11)]
)
def test_a_small_part_without_gradient_is_not_taken_for_rounding(dtype, share):
    with pytest.raises(ntkops.errors.DifferentiationError, match="torch.no_grad"):
        _ = ntkops.ntk(Hidden(share).to(dtype), torch.randn(4, 3, dtype=dtype)).engine_info


@pytest.mark.parametrize("seed", range(3))
def test_a_gradient_of_rounding_alone_is_refused_with_the_reason(seed):
    """The scale of a norm of one feature: x minus its mean is zero, but for rounding."""
    torch.manual_seed(seed)
    norm = nn.LayerNorm(1, bias=False).double()
    x = torch.randn(64, 1, dtype=torch.float64)
    try:
        K = ntkops.ntk(norm, x)
    except ntkops.errors.DifferentiationError as error:
        assert "rounding alone" in str(error)
    else:
        assert float(K.to_dense().norm()) < 1e-20
