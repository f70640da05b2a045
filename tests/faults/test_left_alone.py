"""The fixture that wraps every test does find what a call has changed."""

import random

import pytest
import torch
from torch import nn

import ntkops
from tests.left_alone import _Guard


def _train(model, x):
    model.train()


def _write(model, x):
    with torch.no_grad():
        model[0].weight.add_(1e-7)


def _replace(model, x):
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def _buffer(model, x):
    model[1].running_mean[0] = 1.0


def _hook(model, x):
    model[0].register_forward_hook(lambda *given: None)


def _attribute(model, x):
    model[0].note = 1


def _freeze(model, x):
    model[0].bias.requires_grad_(False)


def _input(model, x):
    x[0] += 1


def _draw(model, x):
    torch.rand(1)


def _draw_in_python(model, x):
    random.random()


def _mode(model, x):
    torch.backends.mha.set_fastpath_enabled(not torch.backends.mha.get_fastpath_enabled())


CHANGES = [
    _train,
    _write,
    _replace,
    _buffer,
    _hook,
    _attribute,
    _freeze,
    _input,
    _draw,
    _draw_in_python,
    _mode,
]


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_found_also_after_an_exception(change, raises):
    def call(model, x):
        change(model, x)
        if raises:
            raise ValueError

    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).eval()
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        with pytest.raises(AssertionError):
            _Guard().wrap(call)(model, torch.ones(4, 3))
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def test_public_functions_and_products_are_wrapped():
    for function in (ntkops.ntk, ntkops.trace, ntkops.check_operator, ntkops.NTKOperator.matmul):
        assert hasattr(function, "__wrapped__")
