"""Operators in expressions: what they meet is looked at first, and the result is that of dense matrices."""

import functools

import numpy as np
import pytest
import torch
from linear_operator.operators import DenseLinearOperator, LinearOperator

import ntkops
from ntkops.errors import (
    DenseMemoryError,
    DtypeError,
    InputError,
    NonFiniteError,
    OutOfRangeError,
    ShapeError,
    UnsupportedOperationError,
)
from ntkops.operators import ProjectionOperator
from ntkops.projections import SJLT, Gaussian

KINDS = {
    "kernel": lambda K: K,
    "Jacobian": lambda K: K.left,
    "transpose": lambda K: K.left.mT,
    "projected": lambda K: ntkops.projected_ntk(K, Gaussian(K.num_parameters, 9, 0)),
    "features": lambda K: ntkops.projected_ntk(K, Gaussian(K.num_parameters, 9, 0)).left,
    "Nyström": lambda K: ntkops.nystrom_ntk(K, [0, 2]),
    "sum": lambda K: K + 2 * K.cross(SAMPLES.to(K.dtype)).mT,
    "multiple": lambda K: 2 * K,
    "ridge": lambda K: K.add_jitter(0.1),
    "cross": lambda K: K.cross(SAMPLES[:2].to(K.dtype)),
    "joined": lambda K: torch.cat((K, K.left @ K.left.mT), dim=-1),
    "projection": lambda K: ProjectionOperator(SJLT(12, 7, 0), K.dtype),
}
SAMPLES = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ONLY_SYMMETRIC = ("kernel", "projected", "Nyström", "multiple", "ridge")


@functools.cache
def point(dtype):
    """Return a network linearised, once for all tests: what is found out about it is kept there."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).to(dtype)
    return ntkops.linearize(model)


def kernel(dtype=torch.float64, **options):
    return ntkops.ntk(point(dtype), SAMPLES.to(dtype), **options)


@pytest.fixture(params=KINDS)
def pair(request):
    A = KINDS[request.param](kernel())
    return A, A.to_dense().clone()


def same(found, expected):
    found = found.to_dense() if isinstance(found, LinearOperator) else found
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# indices


def test_masks_select_as_in_torch_and_need_the_length_of_their_axis(pair):
    A, dense = pair
    n, m = dense.shape
    rows, cols = torch.arange(n) % 3 != 1, torch.arange(m) % 2 == 0
    for index in (
        rows,
        rows.tolist(),
        rows.numpy(),
        (rows, slice(None)),
        (..., cols),
        (slice(1, None), cols),
        (slice(None, None, 2), slice(1, -1)),
        (..., torch.tensor([0, -1, 2])),
        (2, cols),
        (rows.nonzero().flatten(), 1),
        (rows[:, None] & cols,),
        ([0, 1], [1, -1]),
        (-1, np.int64(0)),
    ):
        expected = dense[tuple(torch.as_tensor(i) if isinstance(i, list | np.ndarray) else i for i in index)
                         if isinstance(index, tuple) else torch.as_tensor(index)]  # fmt: skip
        same(A[index], expected)
    for index in (
        torch.tensor([True] * 3),
        [True, False, True],
        (..., torch.ones(m + 1, dtype=torch.bool)),
        (slice(None), torch.ones(0, dtype=torch.bool)),
        torch.ones(n, m + 1, dtype=torch.bool),
        torch.ones(n, m, 1, dtype=torch.bool),
        (rows, cols, cols),
        torch.tensor([n]),
        (..., torch.tensor([0, -m - 1])),
        (0, m),
        1.0,
        None,
    ):
        with pytest.raises(OutOfRangeError):
            A[index]


def test_masks_of_batches():
    K = kernel(outputs="each")
    dense = K.to_dense()
    same(K[torch.tensor([False, True])], dense[[False, True]])
    same(K[1, torch.tensor([True, False, False, True])], dense[1, [0, 3]])
    for index in (torch.ones(3, dtype=torch.bool), torch.tensor([2]), torch.ones(2, 3, dtype=torch.bool)):
        with pytest.raises(OutOfRangeError):
            K[index]


# arithmetic


def test_numbers_of_every_kind_scale(pair):
    A, dense = pair
    for number in (
        2,
        -0.5,
        np.float64(3),
        np.float32(0.5),
        np.int64(4),
        torch.tensor(2),
        torch.tensor([1.5]),
    ):
        same(A * number, dense * float(number))
        same(number * A, dense * float(number))
        same(A / number, dense / float(number))
    same(A * torch.tensor(2.0, dtype=torch.float32), 2 * dense)
    same(-A, -dense)
    same(+A, dense)
    same(0 + A, dense)
    same(A - 0, dense)
    same(0 - A, -dense)
    same(A - A, torch.zeros_like(dense))
    same(torch.ones_like(dense) - A, 1 - dense)


def test_what_cannot_be_combined_is_told(pair):
    A, dense = pair
    refusals = {
        DtypeError: [
            lambda: A * "a",
            lambda: "a" * A,
            lambda: A * None,
            lambda: A * [1.0],
            lambda: A * 1j,
            lambda: A * torch.tensor(1j),
            lambda: A / "a",
            lambda: A + "a",
            lambda: A - None,
            lambda: A + dense.numpy(),
            lambda: dense.numpy() + A,
            lambda: dense.numpy() @ A,
            lambda: A @ "a",
            lambda: A + A.float(),
            lambda: A - A.float(),
            lambda: A.float() + A,
            lambda: A * A.float(),
            lambda: A + dense.float(),
            lambda: A * dense.float(),
            lambda: A @ A.float().mT,
            lambda: dense.float() @ A.mT,
            lambda: torch.cat((A, A.float())),
        ],
        ShapeError: [
            lambda: A + dense[:, 1:],
            lambda: A * dense[:, 1:],
            lambda: A * dense[0],
            lambda: A @ A.mT[1:],
            lambda: A @ dense[0, 1:],
            lambda: dense[:, 1:] @ A.mT,
            lambda: torch.cat((A, A[:, 1:])),
        ],
        UnsupportedOperationError: [
            lambda: A + 1.0,
            lambda: 1 - A,
            lambda: A + torch.tensor(1.0),
            lambda: A / A,
            lambda: 1 / A,
            lambda: A**2,
            lambda: np.asarray(A),
            lambda: torch.vstack((A, A)),
        ],
        InputError: [lambda: A / 0, lambda: torch.cat((A, A), dim=2), lambda: A.norm("frobenius")],
        NonFiniteError: [lambda: A * float("nan"), lambda: A * float("inf"), lambda: A / np.float32("nan")],
    }
    for error, attempts in refusals.items():
        for attempt in attempts:
            with pytest.raises(error):
                attempt()


def test_entries_multiply_inside_the_budget_and_are_refused_above_it():
    K, other = kernel(), 2 * kernel()
    same(K * other, K.to_dense() * other.to_dense())
    lazy = kernel(max_dense_bytes=0)
    for A, B in ((lazy, other), (other, lazy), (lazy, lazy.left @ lazy.left.mT), (2 * lazy, other)):
        with pytest.raises(DenseMemoryError, match="entry by entry, has no lazy form"):
            A * B


# joining


@pytest.mark.parametrize("make", ["kernel", "Jacobian", "sum", "cross"])
def test_cat_is_lazy_and_that_of_dense_matrices(make):
    A = KINDS[make](kernel(max_dense_bytes=0))
    dense = KINDS[make](kernel()).to_dense()
    parts, plain = (A, DenseLinearOperator(dense), 2 * A, dense), (dense, dense, 2 * dense, dense)
    for dim in (0, -1):
        found, expected = torch.cat(parts, dim=dim), torch.cat(plain, dim=dim)
        assert isinstance(found, LinearOperator) and found.shape == expected.shape
        for side, matrix in ((found, expected), (found.mT, expected.mT)):
            v = torch.randn(matrix.shape[1], 2, dtype=torch.float64)
            same(side @ v, matrix @ v)
            same(side @ v[:, 0], matrix @ v[:, 0])
        n, m = expected.shape
        for rows, cols in (
            (slice(1, n - 1), slice(None)),
            (slice(None, None, 3), slice(2, m, 2)),
            (torch.tensor([n - 1, 0, 1]), slice(0, m)),
            (slice(0, dense.shape[0]), slice(0, dense.shape[1])),
        ):
            part = found[rows, cols]
            v = torch.randn(part.shape[1], 1, dtype=torch.float64)
            same(part @ v, expected[rows, cols] @ v)
        single = found.to(torch.float32)
        assert single.dtype == torch.float32
        product = single @ torch.eye(m)
        torch.testing.assert_close(product, expected.float(), rtol=1e-4, atol=1e-5)
    assert torch.cat((A,)) is A
    assert torch.cat(parts, 1).shape == torch.cat(plain, 1).shape
    assert torch.cat(parts, -2).shape == torch.cat(plain, -2).shape


def test_joined_kernels_solve_and_count_their_passes():
    K = kernel()
    dense = K.to_dense()
    whole = torch.cat((K[:3], K[3:])).add_jitter(0.1)
    b = torch.randn(8, 1, dtype=torch.float64)
    same(whole.solve(b), torch.linalg.solve(dense + 0.1 * torch.eye(8, dtype=torch.float64), b))
    lazy = kernel(max_dense_bytes=0)
    with ntkops.count_passes() as tally:
        estimate = ntkops.trace(torch.cat((lazy[:3], lazy[3:])), num_passes=64, method="hutchinson")
    assert estimate.passes == tally.total <= 64
    with pytest.raises(UnsupportedOperationError, match="not along their batch"):
        torch.cat((kernel(outputs="each"),) * 2)


# exact numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [*ONLY_SYMMETRIC, "sum"])
def test_trace_and_norms_are_exact_tensors(kind, dtype):
    A = KINDS[kind](kernel(dtype))
    dense = A.to_dense().double()
    tolerance = {"rtol": 1e-5 if dtype == torch.float32 else 1e-12, "atol": 0.0}
    for found in (A.trace(), torch.trace(A)):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), dense.trace(), **tolerance)
    for found in (A.norm(), torch.norm(A), torch.linalg.norm(A), torch.linalg.matrix_norm(A)):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), dense.norm(), **tolerance)
    torch.testing.assert_close(
        torch.linalg.norm(A, 2).double(), torch.linalg.matrix_norm(dense, 2), **tolerance
    )


def test_where_exact_is_dear_the_estimators_are_named():
    lazy = kernel(max_dense_bytes=0)
    torch.testing.assert_close(lazy.trace(), kernel().to_dense().trace())  # a pass for each output
    for attempt in (lambda: lazy.norm(), lambda: torch.norm(2 * lazy)):
        with pytest.raises(DenseMemoryError, match=r"ntkops\.frobenius_norm"):
            attempt()
    with pytest.raises(ShapeError, match="no trace"):
        lazy.left.trace()
    with pytest.raises(ntkops.errors.BackwardLimitError, match=r"ntkops\.trace"):
        wide = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 70))
        ntkops.ntk(wide, SAMPLES.float(), engine=ntkops.Layerwise(max_backwards=4), max_dense_bytes=0).trace()


# products


@pytest.mark.parametrize("dense_first", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_vectors_that_are_not_finite_are_refused_with_and_without_a_dense_block(pair, value, dense_first):
    A, dense = pair
    if dense_first:
        A.to_dense()
    v = torch.ones(dense.shape[1], 3, dtype=torch.float64)
    v[1, 2] = value
    for _ in range(4):
        same(A @ v[:, :2], dense @ v[:, :2])
        if not isinstance(A, ProjectionOperator):
            with pytest.raises(NonFiniteError):
                A @ v
            with pytest.raises(NonFiniteError):
                A @ v[:, 2]


def test_scipy_multiplies_complex_vectors():
    K = kernel()
    for A in (K, K.left, 2 * K, K.add_jitter(0.1)):
        dense, exported = A.to_dense().numpy(), A.to_scipy()
        rng = np.random.default_rng(0)
        v = rng.standard_normal((dense.shape[1], 2)) + 1j * rng.standard_normal((dense.shape[1], 2))
        np.testing.assert_allclose(exported @ v, dense @ v, rtol=1e-10)
        np.testing.assert_allclose(exported @ v[:, 0], dense @ v[:, 0], rtol=1e-10)
        np.testing.assert_allclose(exported.H @ (exported @ v), dense.T @ (dense @ v), rtol=1e-10)
        np.testing.assert_allclose(exported @ np.ones(dense.shape[1], dtype=int), dense.sum(1), rtol=1e-10)
        with pytest.raises(DtypeError):
            exported @ np.array(["a"] * dense.shape[1])


# casts


def raised(work):
    try:
        work()
    except Exception as error:
        return type(error), str(error).splitlines()[0]
    return None


def test_to_reads_its_arguments_as_torch_does(pair):
    A, dense = pair
    arguments = [
        (("nonsense",), {}),
        ((), {}),
        ((3.5,), {}),
        ((), {"dtyp": torch.float32}),
        ((), {"dtype": "float32"}),
        (("cpu", "cpu"), {}),
    ]
    if not torch.cuda.is_available():
        arguments += [(("cuda",), {}), (("cuda:0",), {}), ((torch.device("cuda"),), {})]
    for args, named in arguments:
        expected = raised(lambda args=args, named=named: torch.ones(2).to(*args, **named))
        found = raised(lambda args=args, named=named: A.to(*args, **named))
        assert found == expected, (args, named)
    for args, named, dtype in (
        ((torch.float32,), {}, torch.float32),
        (("cpu", torch.float32), {}, torch.float32),
        (("cpu",), {"dtype": torch.float32, "non_blocking": True}, torch.float32),
        ((torch.ones(2, dtype=torch.float32),), {}, torch.float32),
        (("cpu",), {}, torch.float64),
        ((), {"device": "cpu"}, torch.float64),
    ):
        assert A.to(*args, **named).dtype == dtype
    assert A.to("cpu") is A and A.to(torch.float64) is A
    single = A.float()
    assert single.dtype == torch.float32 and single.double().dtype == torch.float64
    torch.testing.assert_close(single.to_dense(), dense.float(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", ["kernel", "Jacobian", "projected", "projection"])
def test_to_another_device(kind):
    assert KINDS[kind](kernel()).to("meta").device == torch.device("meta")


# projections by their size


def test_a_number_of_features_draws_a_projection():
    K = kernel()
    one, two = (ntkops.projected_ntk(K, 8, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert one.projection == two.projection and one.features().shape == (8, 8)
    assert isinstance(one.projection, SJLT) and ntkops.projected_ntk(K, 2).projection.k == 2
    again = ntkops.projected_ntk(K, SJLT(K.num_parameters, 8, one.projection.seed))
    same(one, again.to_dense())
    for wrong in (0, -1, K.num_parameters + 1, True, 8.0, "8", None):
        with pytest.raises(InputError):
            ntkops.projected_ntk(K, wrong)
    with pytest.raises(InputError, match="this one is fixed"):
        ntkops.projected_ntk(K, one.projection, generator=torch.Generator())
