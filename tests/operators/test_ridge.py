"""K plus a ridge: solves that meet their tolerance or raise, lazily and differentiably."""

import functools
import pickle

import pytest
import torch
from linear_operator.operators import DenseLinearOperator, DiagLinearOperator, IdentityLinearOperator

import ntkops
from ntkops.errors import (
    DenseMemoryError,
    DtypeError,
    InputError,
    NotConvergedError,
    NtkopsWarning,
    ShapeError,
    SingularKernelError,
)
from ntkops.operators import RidgeOperator
from tests.cases import BY_NAME
from tests.operators.test_contract import _concrete, _Square, _SquareBatch

CASE = BY_NAME["mlp"]
RIDGE = 0.1


@functools.cache
def point(dtype):
    """Return the network linearised, once for all tests: what is found out about it is kept there."""
    return ntkops.linearize(CASE.make().to(dtype))


def kernel(outputs="all", *, lazy=True, dtype=torch.float64, differentiable=False, count=6):
    x, options = CASE.data(count).to(dtype), {"outputs": outputs, "max_dense_bytes": 0 if lazy else "auto"}
    if differentiable:  # of tensors that the test may change
        return ntkops.ntk(CASE.make().to(dtype), x, differentiable=True, **options)
    return ntkops.ntk(point(dtype), x, **options)


def dense_of(outputs="all", dtype=torch.float64):
    return kernel(outputs, lazy=False, dtype=dtype).to_dense()


def identity_like(matrix):
    return torch.eye(matrix.shape[-1], dtype=matrix.dtype)


def columns(n, k, seed=0, dtype=torch.float64):
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def test_every_way_to_add_a_diagonal_gives_it():
    K = kernel()
    n = K.shape[-1]
    entries = torch.linspace(0.1, 1, n, dtype=torch.float64)
    identity = IdentityLinearOperator(n, dtype=torch.float64)
    dense = dense_of()
    for made, expected in (
        (K.add_jitter(RIDGE), RIDGE * torch.eye(n)),
        (K.add_diagonal(entries), torch.diag(entries)),
        (K + DiagLinearOperator(entries), torch.diag(entries)),
        (K + RIDGE * identity, RIDGE * torch.eye(n)),
        (K + identity, torch.eye(n)),
        (RidgeOperator(K, RIDGE), RIDGE * torch.eye(n)),
        (RidgeOperator(K, entries), torch.diag(entries)),
        (RidgeOperator(2 * K, RIDGE).add_jitter(1.0) - K, dense + (1 + RIDGE) * torch.eye(n) - dense),
    ):
        v = columns(n, 2)
        torch.testing.assert_close(made @ v, (dense + expected) @ v)
    for made in (K.add_jitter(RIDGE), K + RIDGE * identity, 3 * K.add_jitter(RIDGE), K.add_jitter(RIDGE).mT):
        assert isinstance(made, RidgeOperator)
    assert isinstance(K.add_jitter(RIDGE)[2:5, 2:5], RidgeOperator)
    assert isinstance(kernel("each").add_jitter(RIDGE)[1], RidgeOperator)


@pytest.mark.parametrize("method", ["auto", "cg", "refinement", "cholesky"])
@pytest.mark.parametrize("outputs", ["all", "each"])
def test_solves_meet_the_tolerance_and_say_so(method, outputs):
    A = kernel(outputs, lazy=method != "cholesky").add_jitter(RIDGE).with_solver(method=method)
    dense = dense_of(outputs)
    dense = dense + RIDGE * identity_like(dense)
    b = columns(A.shape[-1], 3).expand(*A.batch_shape, -1, -1).contiguous()
    x, info = A.solve_with_info(b)
    rest = (b - dense @ x).norm(dim=-2) / b.norm(dim=-2)
    assert info.converged and bool((rest <= 1e-6).all())
    torch.testing.assert_close(info.residuals, rest, rtol=1e-2, atol=1e-12)
    torch.testing.assert_close(A.solve(b), x)
    left = columns(2, A.shape[-1], 4)
    torch.testing.assert_close(A.solve(b, left), left @ x)
    torch.testing.assert_close(A.inv_quad(b), (b * x).sum((-2, -1)), rtol=1e-5, atol=1e-8)
    if not A.batch_shape:
        torch.testing.assert_close(A.solve(b[:, 0]), x[:, 0])
        torch.testing.assert_close(torch.linalg.solve(A, b), x)


@pytest.mark.parametrize("name", ["nystrom", "pivoted cholesky", "rpcholesky", None])
@pytest.mark.parametrize("outputs", ["all", "each"])
def test_every_preconditioner_gives_the_same_solution(name, outputs):
    A = kernel(outputs).add_jitter(RIDGE).with_solver(preconditioner=name, rank=4, tolerance=1e-10)
    dense = dense_of(outputs)
    b = columns(A.shape[-1], 2).expand(*A.batch_shape, -1, -1).contiguous()
    x, info = A.solve_with_info(b)
    torch.testing.assert_close(x, torch.linalg.solve(dense + RIDGE * identity_like(dense), b))
    assert info.preconditioner == name
    assert (info.preconditioner_products >= 4) == (name is not None)


def test_float32_is_refined_by_a_float64_twin():
    A = kernel(dtype=torch.float32).add_jitter(RIDGE)
    b = columns(A.shape[-1], 2, dtype=torch.float32)
    x, info = A.solve_with_info(b)
    assert x.dtype == torch.float64 and info.method == "refinement" and info.precise_products > 0
    twin = kernel(dtype=torch.float32).to(torch.float64)
    rest = b.double() - (twin @ x + A.ridge.double()[:, None] * x)
    assert bool((rest.norm(dim=0) <= 1e-6 * b.double().norm(dim=0)).all())
    assert A.solve(b).dtype == torch.float32
    torch.testing.assert_close(A.solve(b).double(), x, rtol=1e-5, atol=1e-5)


def test_what_fails_hands_over_the_partial_solution():
    A = kernel().add_jitter(1e-9).with_solver(method="cg", preconditioner=None, max_iterations=2)
    b = columns(A.shape[-1], 2)
    with pytest.raises(NotConvergedError, match="max_iterations") as caught:
        A.solve(b)
    assert caught.value.result.solution.shape == b.shape
    _, info = A.solve_with_info(b, raise_on_failure=False)
    assert not info.converged


def test_a_low_rank_kernel_with_its_ridge_is_solved():
    model = torch.nn.Linear(2, 1, bias=False).double()
    K = ntkops.ntk(model, columns(9, 2), max_dense_bytes=0)
    b = columns(9, 1)
    x, info = K.add_jitter(1e-6).solve_with_info(b)
    assert info.converged
    with pytest.raises(NotConvergedError):
        K.add_jitter(0.0).solve(b)
    with pytest.raises(SingularKernelError, match="add_jitter"):
        ntkops.ntk(model, columns(9, 2)).add_jitter(0.0).solve(b)


@pytest.mark.parametrize("outputs", ["all", "each"])
def test_log_determinants_are_exact_where_they_fit_and_have_an_error_elsewhere(outputs):
    dense = dense_of(outputs)
    exact = torch.logdet(dense + RIDGE * identity_like(dense))
    torch.testing.assert_close(kernel(outputs, lazy=False).add_jitter(RIDGE).logdet(), exact)
    fits = kernel(outputs, lazy=False).add_jitter(RIDGE).with_solver(method="cg")
    b = columns(fits.shape[-1], 1).expand(*fits.batch_shape, -1, -1)
    quadratic, determinant = fits.inv_quad_logdet(b, True)  # a determinant is exact beside any solver
    torch.testing.assert_close(determinant, exact)
    A = kernel(outputs).add_jitter(RIDGE)
    generator = torch.Generator().manual_seed(0)
    found = ntkops.logdet(A, num_passes=2000, method="slq", generator=generator)
    assert found.converged and found.value.shape == exact.shape and not found.exact
    assert bool(((found.interval[0] <= exact) & (exact <= found.interval[1])).all())
    for ask in (A.logdet, lambda: torch.logdet(A), lambda: A.inv_quad_logdet(b, True)):
        with pytest.raises(DenseMemoryError, match=r"ntkops\.logdet"):
            ask()
    torch.testing.assert_close(A.inv_quad(b), quadratic, rtol=1e-5, atol=1e-6)
    with pytest.warns(NtkopsWarning, match=r"ntkops\.logdet"):
        former = A.logdet_estimate(rtol=0.05)
    assert bool(((former.value - exact).abs() <= 0.05 * exact.abs()).all())


@pytest.mark.parametrize("limit", ["auto", 0])
def test_a_kernel_without_a_ridge_follows_the_same_rule(limit):
    model = torch.nn.Sequential(torch.nn.Linear(3, 30), torch.nn.Tanh(), torch.nn.Linear(30, 1)).double()
    K = ntkops.ntk(model, columns(6, 3), max_dense_bytes=limit)
    if limit == "auto":
        dense = K.to_dense()
        torch.testing.assert_close(K.logdet(), torch.logdet(dense))
        torch.testing.assert_close(ntkops.logdet(K).value, torch.logdet(dense))
        return
    for ask in (K.logdet, lambda: torch.logdet(K)):
        with pytest.raises(DenseMemoryError, match=r"ntkops\.logdet"):
            ask()


def gradients(lazy, quantity):
    K = kernel("all", lazy=lazy, differentiable=True)
    A = RidgeOperator(K.requires_grad_(True), RIDGE)
    if lazy:
        A = A.with_solver(method="cg", tolerance=1e-11)
    b = columns(A.shape[-1], 2).requires_grad_()
    parts = [part for part in A.representation() if part.requires_grad]
    value = quantity(A, b)
    first = torch.autograd.grad(value, [*parts, b], create_graph=True, materialize_grads=True)
    square = sum(g.square().sum() for g in first)
    second = torch.autograd.grad(square, [*parts, b], materialize_grads=True)
    return first, second


@pytest.mark.parametrize(
    "quantity", [lambda A, b: A.solve(b).pow(3).sum(), lambda A, b: A.inv_quad(b)], ids=["solve", "inv_quad"]
)
def test_gradients_of_iterated_solves_are_those_of_exact_ones_twice(quantity):
    for lazy, exact in zip(gradients(True, quantity), gradients(False, quantity), strict=True):
        for mine, expected in zip(lazy, exact, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-7)


def test_a_determinant_that_has_no_room_is_refused_with_its_gradient():
    K = kernel(differentiable=True).requires_grad_(True)
    with pytest.raises(DenseMemoryError, match=r"ntkops\.logdet"):
        RidgeOperator(K, RIDGE).logdet()


def test_options_go_along_and_preconditioners_are_kept():
    A = kernel().add_jitter(RIDGE).with_solver(method="cg", rank=3, seed=7)
    b = columns(A.shape[-1], 1)
    with ntkops.engines.count_passes() as first:
        A.solve(b)
    with ntkops.engines.count_passes() as second:
        info = A.solve_with_info(b).info
    assert second.total < first.total and (info.rank, info.seed) == (3, 7)
    for other in (A.mT, 2 * A, A[:4, :4], A.add_jitter(1.0), pickle.loads(pickle.dumps(A))):
        assert other._options.seed == 7
    torch.testing.assert_close(pickle.loads(pickle.dumps(A)).solve(b), A.solve(b))


def test_a_float64_twin_of_a_sum_is_made_as_well():
    K = kernel(dtype=torch.float32)
    A = RidgeOperator(K + 2 * K, RIDGE)
    b = columns(A.shape[-1], 1, dtype=torch.float32)
    assert A.solve_with_info(b).info.converged


def test_bad_input_is_told():
    K = kernel()
    A = K.add_jitter(RIDGE)
    for ridge in (-1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match="ridge="):
            RidgeOperator(K, ridge)
    with pytest.raises(ShapeError, match="square kernel"):
        RidgeOperator(K[:3], 0.1)
    with pytest.raises(ShapeError, match="diagonal needs"):
        RidgeOperator(K, torch.ones(3))
    with pytest.raises(InputError, match="unknown solver option 'tol'"):
        A.with_solver(tol=1e-3)
    with pytest.raises(InputError, match="method='lu'"):
        A.with_solver(method="lu")
    with pytest.raises(InputError, match="preconditioner='jacobi'"):
        A.with_solver(preconditioner="jacobi")
    with pytest.raises(ShapeError, match="12 rows"):
        A.solve(columns(11, 1))
    with pytest.raises(DtypeError, match="float32"):
        A.solve(columns(12, 1).float())
    for name, value in [
        ("tolerance", 2.0),
        ("tolerance", "x"),
        ("max_iterations", 0),
        ("max_iterations", 1.5),
    ]:
        with pytest.raises(InputError, match=f"{name}="):
            A.with_solver(**{name: value})
    for name, value in [("rank", 0), ("rank", 1.5), ("rank", "all"), ("seed", "a"), ("seed", True)]:
        with pytest.raises(InputError, match=f"{name}="):
            A.with_solver(**{name: value})


def test_a_dense_kernel_takes_part():
    dense = dense_of()
    A = RidgeOperator(DenseLinearOperator(dense), RIDGE).with_solver(method="cg")
    b = columns(len(dense), 2)
    torch.testing.assert_close(
        A.solve(b), torch.linalg.solve(dense + RIDGE * identity_like(dense), b), rtol=1e-4, atol=1e-4
    )


class _Ridge(_Square):
    def create_linear_op(self):
        return super().create_linear_op().add_jitter(RIDGE)

    def evaluate_linear_op(self, linear_op):
        inner = linear_op._linear_op
        dense = super().evaluate_linear_op(inner)
        return dense + torch.diag_embed(linear_op._diag_tensor._diagonal())


class _RidgeBatch(_SquareBatch):
    def create_linear_op(self):
        return super().create_linear_op().add_jitter(RIDGE)

    def evaluate_linear_op(self, linear_op):
        dense = super().evaluate_linear_op(linear_op._linear_op)
        return dense + torch.diag_embed(linear_op._diag_tensor._diagonal())


_Ridge.__test__ = _RidgeBatch.__test__ = False
for _case, _dtype in ((_Ridge, torch.float32), (_RidgeBatch, torch.float64)):
    _class = _concrete(_case, _dtype)
    globals()[_class.__name__] = _class
del _class, _case, _dtype, _Square, _SquareBatch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e8, 1e12, 1e16])
def test_whatever_inverts_is_right_or_refused(condition, dtype):
    """Solve, quadratic form, determinant and square root are checked in one way."""
    q = torch.linalg.qr(columns(30, 30))[0]
    matrix = (q * torch.logspace(0, -torch.tensor(condition).log10(), 30, dtype=torch.float64) @ q.mT).to(
        dtype
    )
    A = RidgeOperator(DenseLinearOperator((matrix + matrix.mT) / 2), 1e-20)
    exact, b = A.to_dense().double(), columns(30, 2, dtype=dtype)
    x = torch.linalg.solve(exact, b.double())
    values, vectors = torch.linalg.eigh(exact)
    work = {
        "solve": (lambda: A.solve(b), x),
        "solve_with_info": (lambda: A.solve_with_info(b)[0], x),
        "left": (lambda: A.solve(b, b.mT), b.mT.double() @ x),
        "inv_quad": (lambda: A.inv_quad(b), (b.double() * x).sum()),
        "logdet": (lambda: A.logdet(), values.log().sum()),
        "both": (lambda: A.inv_quad_logdet(b, True)[1], values.log().sum()),
        "sqrt": (
            lambda: A.sqrt_inv_matmul(b),
            vectors @ (values.rsqrt()[:, None] * (vectors.mT @ b.double())),
        ),
    }
    refused = set()
    for name, (made, expected) in work.items():
        try:
            found = made().double()
        except (SingularKernelError, NotConvergedError):
            refused.add(name)
            continue
        tolerance = 1e-5 if dtype == torch.float32 else 1e-4
        assert float((found - expected).norm() / expected.norm()) <= tolerance, name
    lost = condition * torch.finfo(dtype).eps > 1
    assert refused == (set(work) if lost else set()) or condition * torch.finfo(dtype).eps > 1e-5


def test_a_matrix_that_is_not_symmetric_is_not_solved():
    skew = torch.eye(5, dtype=torch.float64) + torch.diag(torch.ones(4, dtype=torch.float64), 1)
    A, b = RidgeOperator(DenseLinearOperator(skew), 0.1), columns(5, 1)
    for work in (A.solve, A.solve_with_info, A.inv_quad, lambda b: A.logdet(), A.sqrt_inv_matmul):
        with pytest.raises(InputError, match="not symmetric"):
            work(b)
    K = kernel(lazy=False)
    with pytest.raises(InputError, match="not symmetric"):
        K.cross(CASE.data(6).flip(0)).solve(columns(K.shape[-1], 1))
