"""Sums and multiples of kernels: lazy, rebuilt as what they are, and with our solver under a ridge."""

import pickle

import pytest
import torch
from linear_operator.operators import ConstantDiagLinearOperator, DenseLinearOperator

import ntkops
from ntkops.errors import InputError, ShapeError, UnsupportedOperationError
from ntkops.operators import RidgeOperator, nystrom_ntk
from ntkops.operators.algebra import KernelMultiple, KernelSum
from ntkops.operators.capabilities import capabilities, dense_from_tiles
from tests.operators.test_contract import _concrete, _Square, _SquareBatch
from tests.operators.test_ridge import columns, dense_of, kernel

N = 12


def test_a_ridge_is_exact_in_the_dtype_of_the_kernel():
    entries = torch.linspace(0.1, 1, N, dtype=torch.float64)
    for K in (kernel(), 2 * kernel(), kernel() + kernel()):
        for made in (K.add_jitter(0.3), K.add_diagonal(0.3), RidgeOperator(K, 0.3)):
            assert made.ridge.dtype == torch.float64 and made.ridge.tolist() == [0.3] * N
        twice = K.add_jitter(0.3).add_jitter(0.1).ridge
        assert twice.tolist() == [0.3 + 0.1] * N
        assert torch.equal(K.add_diagonal(entries).add_diagonal(0.3).ridge, entries + 0.3)


def sums():
    """Ways to say a matrix, with factors (a, r) of K and of the identity."""
    K, eye = kernel(), torch.eye(N, dtype=torch.float64)
    ridge = ConstantDiagLinearOperator(torch.tensor([0.3], dtype=torch.float64), diag_shape=N)
    half = torch.tensor(0.5, dtype=torch.float64)
    return {
        "multiple": ((2 * K).add_jitter(0.3), 2, 0.3),
        "sum": ((K + kernel()).add_diagonal(torch.full((N,), 0.3).double()), 2, 0.3),
        "three": (K + kernel() + ridge, 2, 0.3),
        "scaled": (half * K + ridge, 0.5, 0.3),
        "quotient": (K / 4 + ridge, 0.25, 0.3),
        "nested": (3 * (half * K + 2 * kernel()) + ridge, 7.5, 0.3),
        "ridges": (2 * K.add_jitter(0.1) + K.add_jitter(0.1), 3, 0.3),
        "dense": ((K + DenseLinearOperator(eye)).add_jitter(0.3), 1, 1.3),
        "tensor": ((K + eye).add_jitter(0.3), 1, 1.3),
        "difference": ((3 * K - kernel()).add_jitter(0.3), 2, 0.3),
        "mixed": (K + K.add_jitter(0.3), 2, 0.3),
    }


@pytest.mark.parametrize("name", sums())
def test_every_way_to_write_it_has_our_solver(name):
    A, factor, ridge = sums()[name]
    expected = factor * dense_of() + ridge * torch.eye(N)
    assert isinstance(A, RidgeOperator)
    b = columns(N, 2)
    torch.testing.assert_close(A @ b, expected @ b)
    x, info = A.solve_with_info(b)
    assert info.converged and info.method == "conjugate gradient"
    assert bool(((b - expected @ x).norm(dim=0) <= 1e-6 * b.norm(dim=0)).all())
    again = A.representation_tree()(*A.representation())
    assert isinstance(again, RidgeOperator)
    torch.testing.assert_close(again.solve(b), x)
    torch.testing.assert_close(A.mT.solve(b), x)
    assert isinstance(A[2:7, 2:7], RidgeOperator) and isinstance(pickle.loads(pickle.dumps(A)), RidgeOperator)


@pytest.mark.parametrize("make", [lambda K: 2 * K, lambda K: K + 2 * K], ids=["multiple", "sum"])
@pytest.mark.parametrize("outputs", ["all", "each"])
def test_classes_survive_what_linear_operator_does_with_them(make, outputs):
    A, dense = make(kernel(outputs)), dense_of(outputs)
    factor = 2 if isinstance(A, KernelMultiple) else 3
    made = {
        "transpose": (A.mT, dense.mT),
        "rows": (A[..., 1:4, :], dense[..., 1:4, :]),
        "part": (A[..., [0, 2, 3], :], dense[..., [0, 2, 3], :]),
        "unsqueeze": (A.unsqueeze(0), dense.unsqueeze(0)),
        "expand": (A.expand(2, *A.shape), dense.expand(2, *dense.shape)),
        "repeat": (A.repeat(2, *[1] * (A.dim() - 1)) if A.batch_shape else A.repeat(2, 1, 1), None),
        "scaled": (1.0 * A, dense),
        "cast": (A.to(torch.float32).to(torch.float64), None),
        "detached": (A.detach(), dense),
        "rebuilt": (A.representation_tree()(*A.representation()), dense),
    }
    if A.batch_shape:
        made["member"] = (A[1], dense[1])
        made["total"] = (A.sum(0), dense.sum(0))
        made["permuted"] = (A.unsqueeze(0).permute(1, 0, 2, 3), dense.unsqueeze(1))
    for name, (found, expected) in made.items():
        assert isinstance(found, KernelSum | KernelMultiple), name
        if expected is not None:
            v = columns(found.shape[-1], 2).expand(*found.batch_shape, -1, -1)
            torch.testing.assert_close(found @ v, factor * expected @ v)


def test_constants_may_differ_along_a_batch():
    K, dense = kernel("each"), dense_of("each")
    constants = torch.tensor([0.5, 2.0], dtype=torch.float64)
    A = K * constants[:, None, None]
    v = columns(K.shape[-1], 2).expand(2, -1, -1)
    expected = constants[:, None, None] * dense
    for found, wanted in (
        (A, expected),
        (A[1], expected[1]),
        (A.repeat(2, 1, 1), expected.repeat(2, 1, 1)),
        (A.unsqueeze(1), expected.unsqueeze(1)),
        (A.mT, expected),
    ):
        assert isinstance(found, KernelMultiple)
        block = columns(found.shape[-1], 2).expand(*found.batch_shape, -1, -1)
        torch.testing.assert_close(found @ block, wanted @ block)
    x = A.add_jitter(0.1).solve(v)
    torch.testing.assert_close((expected + 0.1 * torch.eye(K.shape[-1])) @ x, v.clone(), rtol=1e-5, atol=1e-5)


def test_the_structure_sees_the_parts():
    K, dense = kernel(), dense_of()
    v = columns(N, 2)
    for A, factor in ((2 * K, 2), (K + 2 * K, 3), ((2 * K + K).add_jitter(0.0), 3)):
        found = capabilities(A)
        assert found.symmetric
        torch.testing.assert_close(found.diagonal(), factor * dense.diagonal())
        torch.testing.assert_close(dense_from_tiles(found, 5), factor * dense)
    left, right = capabilities(2 * K).factors()
    torch.testing.assert_close(left @ (right.mT @ v), 2 * dense @ v)
    torch.testing.assert_close(ntkops.trace(K + 2 * K).value, 3 * dense.trace())


def test_solves_without_a_ridge_are_exact_or_refused():
    K, b = kernel(lazy=False), columns(N, 1)
    A = K + 2 * (K + 0.1 * torch.eye(N, dtype=torch.float64))
    torch.testing.assert_close(A.solve(b), torch.linalg.solve(3 * dense_of() + 0.2 * torch.eye(N), b))
    with pytest.raises(ntkops.errors.DenseMemoryError):
        (2 * kernel()).solve(b)


def test_a_learned_constant_has_a_gradient():
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    b, dense = columns(N, 1), dense_of()

    def value(matrix):
        return matrix.inv_quad(b)

    for lazy in (True, False):
        A = (kernel(lazy=lazy) * scale).add_jitter(0.3)
        A = A.with_solver(tolerance=1e-11) if lazy else A
        (found,) = torch.autograd.grad(value(A), scale)
        x = torch.linalg.solve(0.7 * dense + 0.3 * torch.eye(N), b)
        torch.testing.assert_close(found, -(x.mT @ dense @ x).squeeze())


def test_a_sum_with_a_nystrom_kernel_keeps_the_solver():
    K = kernel()
    Q = nystrom_ntk(K, [0, 2])
    for A in (Q + K, K + Q, 2 * Q):
        assert isinstance(A.add_jitter(0.1), RidgeOperator)


def test_uneven_slices_of_a_ridge_move_rows_alone():
    A = (2 * kernel()).add_diagonal(torch.linspace(0.1, 1, N, dtype=torch.float64))
    dense = 2 * dense_of() + torch.diag(torch.linspace(0.1, 1, N, dtype=torch.float64))
    v = columns(N, 2)
    for rows, cols in (
        (slice(1, 9), slice(3, None, 2)),
        (slice(None), slice(2, 4)),
        (slice(3, 4), slice(2, 8)),
    ):
        wanted = dense[rows, cols]
        part = A[rows, cols]
        torch.testing.assert_close(part @ v[: wanted.shape[1]], wanted @ v[: wanted.shape[1]])
        torch.testing.assert_close(part.mT @ v[: wanted.shape[0]], wanted.mT @ v[: wanted.shape[0]])
    torch.testing.assert_close(A[torch.tensor([1, 2]), torch.tensor([1, 3])], dense[[1, 2], [1, 3]])


def test_bad_input_is_told():
    for K in (kernel(), 2 * kernel(), kernel() + kernel()):
        with pytest.raises(InputError, match="ridge="):
            K.add_jitter(-0.1)
        with pytest.raises(UnsupportedOperationError, match="add_jitter"):
            K + 1.0
        with pytest.raises(ShapeError, match="cannot add"):
            K + torch.eye(3, dtype=torch.float64)
        with pytest.raises(ShapeError, match="square"):
            K[:3].add_jitter(0.1)
        with pytest.raises(ntkops.errors.DtypeError, match="float32"):
            K.add_diagonal(torch.ones(N))
        with pytest.raises(ShapeError, match="diagonal needs"):
            K.add_diagonal(torch.ones(3, dtype=torch.float64))


class _Scaled(_Square):
    def create_linear_op(self):
        return 2 * super().create_linear_op()

    def evaluate_linear_op(self, linear_op):
        return linear_op._constant * super().evaluate_linear_op(linear_op.base_linear_op)


class _Summed(_SquareBatch):
    def create_linear_op(self):
        return super().create_linear_op() + super().create_linear_op()

    def evaluate_linear_op(self, linear_op):
        return sum(super(_Summed, self).evaluate_linear_op(part) for part in linear_op.linear_ops)


_Scaled.__test__ = _Summed.__test__ = False
for _case, _dtype in ((_Scaled, torch.float64), (_Summed, torch.float32)):
    _class = _concrete(_case, _dtype)
    _class.__module__ = __name__
    globals()[_class.__name__] = _class
del _class, _case, _dtype, _Square, _SquareBatch
