"""Factors of Hessians in the outputs, against `torch.autograd.functional.hessian` of the summed loss."""

import math

import pytest
import torch
from torch.nn import functional as F

from ntkops.curvature import hessian_factor
from ntkops.errors import (
    DtypeError,
    InputError,
    NonFiniteError,
    NtkopsError,
    OutOfRangeError,
    ShapeError,
)


def huber(outputs, targets):
    return F.huber_loss(outputs, targets, delta=0.7, reduction="sum")


def poisson(outputs, targets):
    return F.poisson_nll_loss(outputs, targets, reduction="sum")


def mixed(outputs, targets):
    """Return a loss whose Hessian couples all outputs of a sample."""
    return (outputs.flatten() @ outputs.flatten()) ** 2 + torch.logsumexp((outputs - targets).flatten(), 0)


def focal(outputs, targets):
    """Return a loss of class numbers."""
    return -outputs.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def dense_hessian(loss, outputs):
    size = outputs.numel()
    found = torch.autograd.functional.hessian(lambda f: loss(f.reshape(outputs.shape)), outputs.reshape(-1))
    return found.reshape(size, size)


CASES = {
    "mse": ("mse", lambda f, y: F.mse_loss(f, y, reduction="sum"), False),
    "cross_entropy": (
        "cross_entropy",
        lambda f, y: F.cross_entropy(f.flatten(0, -2), y.flatten(0, -2), reduction="sum"),
        True,
    ),
    "huber": (huber, lambda f, y: sum(map(huber, f, y)), False),
    "poisson": (poisson, lambda f, y: sum(map(poisson, f, y)), False),
    "mixed": (mixed, lambda f, y: sum(map(mixed, f, y)), False),
}


@pytest.mark.parametrize("shape", [(5, 3), (4, 2, 3), (1, 2), (3, 2, 2, 2)])
@pytest.mark.parametrize("name", CASES)
def test_the_factor_is_that_of_the_hessian(name, shape):
    loss, whole, probabilities = CASES[name]
    torch.manual_seed(1)
    outputs, targets = 2 * torch.randn(shape).double(), torch.randn(shape).double()
    if probabilities:
        targets = targets.softmax(-1)
    expected = dense_hessian(lambda f: whole(f, targets), outputs)
    S = hessian_factor(outputs, loss, targets)
    torch.testing.assert_close((S @ S.mT).to_dense(), expected, rtol=1e-11, atol=1e-11)
    scaled = hessian_factor(outputs, loss, targets, scale=0.3).to_dense()
    torch.testing.assert_close(scaled @ scaled.T, 0.3 * expected, rtol=1e-11, atol=1e-11)
    single = hessian_factor(outputs.float(), loss, targets.float()).to_dense()
    assert single.dtype == torch.float32
    torch.testing.assert_close(
        single.double() @ single.double().T, expected, rtol=2e-5, atol=2e-6 * float(expected.abs().max())
    )


def test_targets_are_not_needed_where_the_hessian_has_none():
    f = torch.randn(4, 3).double()
    y = torch.tensor([0, 2, 1, 1])
    for loss, targets in (("cross_entropy", y), ("mse", f + 1)):
        torch.testing.assert_close(
            hessian_factor(f, loss).to_dense(), hessian_factor(f, loss, targets).to_dense(), rtol=0, atol=0
        )


def test_class_numbers_that_count_for_nothing():
    torch.manual_seed(0)
    f, y = torch.randn(3, 4, 5).double(), torch.randint(5, (3, 4))
    y[0, 2], y[2] = -100, -100
    expected = dense_hessian(lambda g: F.cross_entropy(g.movedim(-1, 1), y, reduction="sum"), f)
    S = hessian_factor(f, "cross_entropy", y)
    torch.testing.assert_close((S @ S.mT).to_dense(), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("gap", [30.0, 60.0, 2000.0])
def test_saturated_logits(dtype, gap):
    """H = diag(p) - p pᵀ relative to itself, by Python's own numbers; nothing divides by p."""
    f = torch.tensor([[gap, 0.0, 0.0], [0.0, -gap, gap]], dtype=dtype)
    S = hessian_factor(f, "cross_entropy").to_dense().double()
    assert bool(S.isfinite().all())
    small = math.exp(-gap)
    p = 1 / (1 + 2 * small)
    rest = 2 * small / (1 + 2 * small)
    tiny = small / (1 + 2 * small)
    if small > 1e-25:  # p² has not underflown in float32
        found = (S @ S.T)[:3, :3]
        expected = torch.tensor(
            [[p * rest, -p * tiny, -p * tiny], [-p * tiny, tiny * (1 - tiny), -tiny * tiny]]
        ).double()
        torch.testing.assert_close(found[:2, :2], expected[:, :2], rtol=1e-5, atol=0)
    assert float((S @ S.T).abs().max()) <= 1.01 * max(2 * small, 0)


@pytest.mark.parametrize("loss", ["cross_entropy", huber, mixed])
def test_products_slices_and_transposes_of_the_factor(loss):
    torch.manual_seed(0)
    f, y = torch.randn(4, 3).double(), torch.randn(4, 3).double()
    S = hessian_factor(f, loss, None if isinstance(loss, str) else y)
    dense = S.to_dense()
    v = torch.randn(12, 2).double()
    for found, expected in (
        (S @ v, dense @ v),
        (S.mT @ v, dense.T @ v),
        (S @ v[:, 0], dense @ v[:, 0]),
        (S @ torch.stack([v, 2 * v]), dense @ torch.stack([v, 2 * v])),
        (S.diagonal(), dense.diagonal()),
        (S[2:7].to_dense(), dense[2:7]),
        (S[:, torch.tensor([0, 5, 3])].to_dense(), dense[:, [0, 5, 3]]),
        (S[torch.tensor([1, 4]), torch.tensor([2, 4])], dense[[1, 4], [2, 4]]),
        ((S @ S.mT).to_dense(), dense @ dense.T),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(S.float().to_dense(), dense.float(), rtol=1e-5, atol=1e-6)


def test_class_numbers_in_a_loss_of_ones_own():
    torch.manual_seed(0)
    f, y = torch.randn(4, 3).double(), torch.tensor([0, 2, 1, 1])
    S, exact = hessian_factor(f, focal, y), hessian_factor(f, "cross_entropy", y)
    torch.testing.assert_close((S @ S.mT).to_dense(), (exact @ exact.mT).to_dense(), rtol=1e-10, atol=1e-12)


class Squares(torch.autograd.Function):
    """The sum of squares, without a forward mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(outputs):
        return outputs.square().sum()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient * ctx.saved_tensors[0]


def test_a_loss_without_a_forward_mode():
    f = torch.randn(4, 3).double()
    S = hessian_factor(f, lambda g, y: Squares.apply(g), torch.zeros(4))
    torch.testing.assert_close((S @ S.mT).to_dense(), 2 * torch.eye(12).double())


def test_a_loss_that_is_flat_has_no_curvature():
    S = hessian_factor(torch.randn(4, 3), lambda f, y: (f * y).sum(), torch.randn(4, 3))
    assert not S.to_dense().any()


def test_a_loss_that_is_not_convex_names_the_sample():
    outputs = torch.zeros(4, 2).double()
    targets = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, -0.5], [0.0, 2.0]]).double()
    with pytest.raises(InputError, match=r"sample 2.*-0\.5"):
        hessian_factor(outputs, lambda f, y: f[0] ** 2 + y[1] / 2 * f[1] ** 2, targets)
    # rounding is no concavity: a hand-written cross-entropy, whose Hessian is singular
    f = 3 * torch.randn(50, 8, generator=torch.Generator().manual_seed(0)).double()
    y = torch.zeros(50, dtype=torch.long)
    S = hessian_factor(f, lambda g, c: g.exp().sum().log() - g.gather(0, c.unsqueeze(0))[0], y)
    exact = hessian_factor(f, "cross_entropy", y)
    torch.testing.assert_close((S @ S.mT).to_dense(), (exact @ exact.mT).to_dense(), rtol=1e-9, atol=1e-12)


F4 = torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        ((F4, "hinge"), InputError, "'mse', 'cross_entropy'"),
        ((F4, huber), InputError, "targets"),
        ((F4, huber, torch.zeros(3, 3)), ShapeError, "4 samples"),
        ((F4, huber, torch.zeros(4, 5)), InputError, "fails on one sample"),
        ((F4, lambda f, y: f - y, torch.zeros(4, 3)), InputError, "single number"),
        ((F4, "mse", torch.zeros(4, 2)), ShapeError, "targets"),
        ((F4, "mse", torch.zeros(4, dtype=torch.long)), DtypeError, "cross_entropy"),
        ((F4, "mse", torch.full((4, 3), math.nan)), NonFiniteError, "NaN"),
        ((F4, "cross_entropy", torch.tensor([0, 1, 2, 3])), OutOfRangeError, "0 to 2"),
        ((F4, "cross_entropy", torch.zeros(4, 3)), InputError, "sum to 1"),
        ((F4, "cross_entropy", torch.zeros(4, 2).softmax(-1)), ShapeError, "last axis"),
        ((F4, "cross_entropy", torch.zeros(4, 1, dtype=torch.long)), ShapeError, "last"),
        ((torch.zeros(4, 1), "cross_entropy"), InputError, "binary_cross_entropy_with_logits"),
        ((torch.zeros(4), "cross_entropy"), InputError, "two classes"),
        ((F4.long(), "mse"), DtypeError, "floating"),
        ((torch.tensor([[0.0], [math.inf]]), "mse"), NonFiniteError, "sample 1"),
        ((torch.zeros(0, 3), "mse"), ShapeError, "entries"),
    ],
)
def test_what_is_refused(arguments, error, says):
    with pytest.raises(error, match=says):
        hessian_factor(*arguments)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf, "1"])
def test_scales_that_are_refused(scale):
    with pytest.raises(NtkopsError, match="scale"):
        hessian_factor(F4, "mse", scale=scale)
