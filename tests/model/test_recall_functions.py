"""What is known of a function is remembered: in a loop over parameters it is tried once."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import ntkops
from ntkops.errors import StochasticModelError

from ..laws.reference import close, jacobian, normal


class Counted:
    calls = 0


def values(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def made(net: nn.Module, scale: float = 1.0):
    """A closure that is made anew in every step."""

    def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
        Counted.calls += 1
        return scale * functional_call(net, p, (x,))

    return loss


def calls_of(work) -> int:
    before = Counted.calls
    work()
    return Counted.calls - before


def test_a_function_is_tried_once():
    net, x = nn.Linear(3, 2).double(), normal(5, 3, seed=1)
    first = calls_of(lambda: ntkops.jacobian(made(net), x, params=values(net)))
    with torch.no_grad():
        net.weight.add_(1.0)
    again = calls_of(lambda: ntkops.jacobian(made(net), x, params=values(net)))
    assert first > 0 and again == 0
    assert calls_of(lambda: ntkops.jacobian(made(net, 2.0), x, params=values(net))) > 0
    close(ntkops.jacobian(made(net, 2.0), x, params=values(net)).to_dense(), 2 * jacobian(net, x), 1e-12)


def test_what_a_function_reads_is_looked_at():
    net, x = (
        nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5), nn.Linear(4, 1)).double().eval(),
        normal(5, 3, seed=1),
    )
    ntkops.jacobian(made(net), x, params=values(net))
    net.train()
    with pytest.raises(StochasticModelError):
        ntkops.jacobian(made(net), x, params=values(net))


def test_an_opaque_function_is_tried_every_time():
    class Holder:
        net = nn.Linear(3, 2).double()

    holder, x = Holder(), normal(5, 3, seed=1)

    def loss(p, x):
        Counted.calls += 1
        return functional_call(holder.net, p, (x,))

    for _ in range(2):
        assert calls_of(lambda: ntkops.jacobian(loss, x, params=values(holder.net))) > 0


def test_nothing_is_kept_alive():
    net, x = nn.Linear(3, 2).double(), normal(5, 3, seed=1)
    J = ntkops.jacobian(made(net), x, params=values(net))
    watch = weakref.ref(net)
    del J, net
    gc.collect()
    assert watch() is None


def test_derivatives_inside():
    net, x = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)).double(), normal(5, 2, seed=1)

    def slope(p, x):
        return vmap(grad(lambda z: functional_call(net, p, (z[None],))[0, 0]))(x)

    dense = [ntkops.jacobian(slope, x, params=values(net), engine="autograd").to_dense() for _ in range(2)]
    close(dense[1], dense[0], 1e-15)
