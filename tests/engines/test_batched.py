"""Several backward passes in one batched pass: tried by the first work that has several, and compared."""

import pytest
import torch
from torch import nn

import ntkops


class _Plain(torch.autograd.Function):
    """Backwards it writes into a tensor that no batching rule knows of."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return torch.zeros(grad.shape, dtype=grad.dtype).add_(grad)


class _Wrong(torch.autograd.Function):
    """Backwards it tells one vector from several, and is right for one alone."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        functorch = torch._C._functorch
        several = functorch.is_batchedtensor(grad) or functorch.is_legacy_batchedtensor(grad)
        return grad * (1.5 if several else 1.0)


class Model(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.body, self.head, self.function = nn.Linear(3, 4), nn.Linear(4, 3), function

    def forward(self, x):
        hidden = torch.tanh(self.body(x))
        return self.head(hidden if self.function is None else self.function.apply(hidden))


@pytest.mark.parametrize("function", [None, _Plain, _Wrong])
def test_what_does_not_batch_goes_one_after_the_other(function):
    torch.manual_seed(0)
    model, x = Model(function).double(), torch.randn(5, 3).double()
    weights = list(model.parameters())
    rows = [torch.autograd.grad(y, weights, retain_graph=True) for y in model(x).flatten()]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    linearization = ntkops.linearize(model)
    K = ntkops.ntk(linearization, x)
    torch.testing.assert_close(K.to_dense(), J @ J.T)
    assert set(linearization.verdict.batched.values()) == {function is None}
    assert set(K.engine_info.covered) == set(dict(model.named_parameters()))
    K.free()
    torch.testing.assert_close(K.to_dense(), J @ J.T)


def test_nothing_is_tried_where_one_direction_is_wanted():
    model, x = nn.Linear(3, 1), torch.randn(5, 3)
    linearization = ntkops.linearize(model)
    ntkops.ntk(linearization, x).to_dense()
    assert not linearization.verdict.batched
