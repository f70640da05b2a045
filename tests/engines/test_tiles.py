"""The one walk over tiles: any workspace, any choice of outputs, recorded or not, against plain autograd."""

import functools

import pytest
import torch
from torch.autograd import forward_ad

from ntkops.engines import AutogradEngine, LayerwiseEngine
from ntkops.errors import NonFiniteError
from ntkops.model import linearize
from tests.pairs import pairs

KINDS = {
    "all": torch.arange(3).view(1, 1, 3),
    "trace": torch.arange(3).view(1, 3, 1),
    "each": torch.arange(3).view(3, 1, 1),
    "repeated": torch.tensor([[[2, 0]], [[2, 0]], [[1, 1]]]),
    "sums of pairs": torch.tensor([[[2, 0], [0, 1]]]),
}
ROWS = [1, 4, 1000]  # gradients for which the workspace has room


def _setting(kind, rows):
    model, engine, *data = _built(kind)
    engine.keep_workspace(rows * 8 * engine.num_parameters)
    return model, engine, *data


@functools.cache
def _built(kind):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3)).double()
    linearization = linearize(model)
    left, right = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    sides = linearization.inputs(left), linearization.inputs(right)
    return model, kind.build(linearization, sides[0]), sides, (left, right)


def _jacobian(model, params, x):
    """Return ``(N, O, P)`` row by row, with its graph."""
    names = [name for name, _ in model.named_parameters()]
    values = torch.func.functional_call(model, dict(zip(names, params, strict=True)), (x,))
    rows = [torch.autograd.grad(value, params, create_graph=True) for value in values.flatten()]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows]).view(*values.shape, -1)


def _expected(one, other, numbers):
    a, b = one[:, numbers], other[:, numbers]  # (N, M, R, r, P)
    found = torch.einsum("imrap,jmrbp->miajb", a, b)
    return found.flatten(3).flatten(1, 2)


@pytest.mark.parametrize(
    "outputs, engine, rows",
    pairs(KINDS, [AutogradEngine, LayerwiseEngine], ROWS),
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_kernels_and_diagonals(engine, outputs, rows):
    numbers = KINDS[outputs]
    model, engine, (left, right), (x, y) = _setting(engine, rows)
    params = [p.detach().requires_grad_() for p in model.parameters()]
    one, other = (_jacobian(model, params, z).detach() for z in (x, y))
    given = engine.linearization.parameters
    with torch.no_grad():
        square = engine.kernel(given, left, left, numbers, numbers)
        cross = engine.kernel(given, left, right, numbers, numbers)
        lengths = engine.diagonal(given, left, numbers)
        gram = engine.sample_gram(given, left, x[:, :2, None].expand(-1, -1, 3))
    torch.testing.assert_close(square, _expected(one, one, numbers))
    torch.testing.assert_close(cross, _expected(one, other, numbers))
    torch.testing.assert_close(lengths, _expected(one, one, numbers).diagonal(dim1=1, dim2=2))
    assert torch.equal(square, square.mT)
    combined = torch.einsum("nr,nop->nrp", x[:, :2], one)
    torch.testing.assert_close(gram, torch.einsum("irp,jsp->irjs", combined, combined))


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("outputs", KINDS)
def test_recorded_kernels_have_derivatives(outputs, rows):
    numbers = KINDS[outputs]
    model, engine, (left, right), (x, y) = _setting(AutogradEngine, rows)
    params = [p.detach().requires_grad_() for p in model.parameters()]
    one, other = (_jacobian(model, params, z) for z in (x, y))

    def gradients(value):
        return torch.autograd.grad(value, params, retain_graph=True, materialize_grads=True)

    for sides, blocks in (((left, left), (one, one)), ((left, right), (one, other))):
        expected = _expected(*blocks, numbers)
        weight = torch.randn(expected.shape, dtype=torch.float64)
        found = engine.kernel(tuple(params), *sides, numbers, numbers)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(gradients((found * weight).sum()), gradients((expected * weight).sum()))
    lengths = engine.diagonal(tuple(params), left, numbers)
    squares = _expected(one, one, numbers).diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(gradients(lengths.sum()), gradients(squares.sum()))


@pytest.mark.parametrize("rows", ROWS)
def test_kernels_under_forward_mode(rows):
    numbers = KINDS["all"]
    model, engine, (left, right), (x, y) = _setting(AutogradEngine, rows)
    params = tuple(p.detach() for p in model.parameters())
    moves = tuple(torch.randn_like(p) for p in params)

    def kernel(*values):
        return engine.kernel(values, left, right, numbers, numbers)

    def plain(*values):
        leaves = [v.clone().requires_grad_() for v in values]
        return _expected(_jacobian(model, leaves, x), _jacobian(model, leaves, y), numbers)

    step = 1e-5
    ends = [plain(*(p + s * step * m for p, m in zip(params, moves, strict=True))) for s in (1, -1)]
    slope = (ends[0] - ends[1]).detach() / (2 * step)
    torch.testing.assert_close(torch.func.jvp(kernel, params, moves)[1], slope, rtol=1e-6, atol=1e-8)
    with forward_ad.dual_level():
        duals = tuple(forward_ad.make_dual(p, m) for p, m in zip(params, moves, strict=True))
        found = forward_ad.unpack_dual(kernel(*duals)).tangent
    torch.testing.assert_close(found, slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("engine", [AutogradEngine, LayerwiseEngine])
def test_kernels_that_overflow_raise(engine):
    linearization = linearize(torch.nn.Linear(2, 1))
    inputs = linearization.inputs(torch.full((2, 2), 1e25))
    engine, numbers = engine.build(linearization, inputs), torch.zeros(1, 1, 1, dtype=torch.long)
    with pytest.raises(NonFiniteError, match="kernel is not finite"):
        engine.kernel(linearization.parameters, inputs, inputs, numbers, numbers)
