"""What an operator says to a wrong vector, index or option."""

import copy
import pickle

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

import ntkops
from ntkops.errors import DtypeError, InputError, OutOfRangeError, ShapeError, SingularKernelError
from tests.cases import BY_NAME

CASE = BY_NAME["mlp"]


@pytest.fixture
def kernel():
    return ntkops.ntk(CASE.make(), CASE.data(5), max_dense_bytes=0)


def test_a_vector_of_wrong_length_is_told_what_was_expected(kernel):
    with pytest.raises(
        ShapeError, match=r"expected 10 rows \(5 samples x 2 outputs\), got \(5,\); there is one"
    ):
        kernel @ torch.ones(5, dtype=torch.float64)
    with pytest.raises(ShapeError, match=r"sample-major: pass v\.reshape\(-1\)"):
        kernel @ torch.ones(5, 2, dtype=torch.float64)
    with pytest.raises(ShapeError, match="transposed"):
        kernel @ torch.ones(3, 10, dtype=torch.float64)
    with pytest.raises(ShapeError, match="parameters"):
        ntkops.jacobian(CASE.make(), CASE.data(5)) @ torch.ones(3, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_a_vector_of_another_dtype_is_refused(kernel, dtype):
    with pytest.raises(DtypeError, match=f"float64, the vector {dtype}"):
        kernel @ torch.ones(10, dtype=dtype)


def test_indices_out_of_range_are_refused(kernel):
    for attempt in (
        lambda: kernel[10],
        lambda: kernel[-11],
        lambda: kernel[:, 10],
        lambda: kernel[[0, 12]],
        lambda: kernel.submatrix([0], [99]),
        lambda: kernel[5:5],
        lambda: kernel[0, 0, 0],
    ):
        with pytest.raises(OutOfRangeError):
            attempt()
    assert issubclass(OutOfRangeError, IndexError)


def test_outputs_are_checked():
    model, x = CASE.make(), CASE.data(5)
    with pytest.raises(InputError, match="two readings"):
        ntkops.ntk(model, x, outputs="sum")
    with pytest.raises(InputError, match="choose 'all'"):
        ntkops.ntk(model, x, outputs="both")
    with pytest.raises(InputError, match="choose 'all'"):
        ntkops.ntk(model, x, outputs=[])
    with pytest.raises(OutOfRangeError, match="output 2 does not exist"):
        ntkops.ntk(model, x, outputs=[0, 2])


def test_chosen_outputs_match_the_whole_kernel():
    model, x = CASE.make(), CASE.data(5)
    whole = ntkops.ntk(model, x).to_dense().reshape(5, 2, 5, 2)
    torch.testing.assert_close(ntkops.ntk(model, x, outputs=1).to_dense(), whole[:, 1, :, 1])
    torch.testing.assert_close(ntkops.ntk(model, x, outputs=-1).to_dense(), whole[:, 1, :, 1])
    torch.testing.assert_close(
        ntkops.ntk(model, x, outputs=[1, 0]).to_dense(), whole[:, [1, 0]][..., [1, 0]].reshape(10, 10)
    )


def test_a_singular_kernel_has_no_silent_jitter():
    model = torch.nn.Linear(2, 1, bias=False).double()
    K = ntkops.ntk(model, torch.randn(5, 2, dtype=torch.float64))
    with pytest.raises(SingularKernelError, match="add_jitter"):
        K.solve(torch.ones(5, dtype=torch.float64))
    with pytest.raises(SingularKernelError):
        K.logdet()


def test_solves_are_exact_above_the_size_where_linear_operator_iterates():
    model = torch.nn.Sequential(torch.nn.Linear(2, 40), torch.nn.Tanh(), torch.nn.Linear(40, 1)).double()
    x = torch.randn(900, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    K = ntkops.ntk(model, x).add_jitter(1e-3)
    b = torch.randn(900, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    solution = K.solve(b)
    assert (K @ solution - b).norm() < 1e-8 * b.norm()
    torch.testing.assert_close(K.logdet(), torch.logdet(K.to_dense()))
    lazy = ntkops.ntk(model, x, max_dense_bytes=0).add_jitter(1e-3)
    with pytest.raises(ntkops.errors.DenseMemoryError):
        lazy.with_solver(method="cholesky").solve(b)


def test_scipy_gets_the_same_products(kernel):
    dense = ntkops.ntk(CASE.make(), CASE.data(5)).to_dense().numpy()
    exported = kernel.to_scipy()
    assert exported.shape == (10, 10) and exported.dtype == np.float64
    values = scipy.sparse.linalg.eigsh(exported, k=3, return_eigenvectors=False)
    np.testing.assert_allclose(np.sort(values), np.linalg.eigvalsh(dense)[-3:], rtol=1e-10)
    J = ntkops.jacobian(CASE.make(), CASE.data(5))
    singular = scipy.sparse.linalg.svds(J.to_scipy(), k=2, return_singular_vectors=False)
    np.testing.assert_allclose(np.sort(singular) ** 2, np.linalg.eigvalsh(dense)[-2:], rtol=1e-8)
    with pytest.raises(ShapeError, match="index its batch"):
        ntkops.ntk(CASE.make(), CASE.data(5), outputs="each").to_scipy()


def test_copies_and_pickles_multiply_alike_and_leave_caches_behind():
    K = ntkops.ntk(CASE.make(), CASE.data(5))
    v = torch.ones(10, dtype=torch.float64)
    size = len(pickle.dumps(K))
    expected = K.to_dense() @ v
    assert len(pickle.dumps(K)) == size
    for other in (pickle.loads(pickle.dumps(K)), copy.deepcopy(K)):
        torch.testing.assert_close(other @ v, expected)
        assert not other.engine_info.dense


def test_casting_gives_a_new_operator_and_leaves_everything_else():
    model, x = CASE.make(), CASE.data(5)
    K = ntkops.ntk(model, x)
    for single in (K.to(torch.float32), K.float()):
        assert single.dtype == torch.float32 and K.dtype == torch.float64
        torch.testing.assert_close(single.to_dense().double(), K.to_dense(), rtol=1e-5, atol=1e-5)
    assert next(model.parameters()).dtype == torch.float64 and x.dtype == torch.float64
    assert K.to(torch.float64) is K
    tokens = BY_NAME["tied"]
    torch.testing.assert_close(
        ntkops.ntk(tokens.make(), tokens.data()).float().to_dense().double(),
        ntkops.ntk(tokens.make(), tokens.data()).to_dense(),
        rtol=1e-4,
        atol=1e-4,
    )


def test_j_times_its_transpose_is_the_fused_kernel():
    J = ntkops.jacobian(CASE.make(), CASE.data(5))
    K = J @ J.mT
    assert isinstance(K, ntkops.NTKOperator) and K.mT is K
    v = torch.ones(10, 2, dtype=torch.float64)
    torch.testing.assert_close(K @ v, J @ (J.mT @ v))
    other = ntkops.jacobian(CASE.make(), CASE.data(4))
    assert not isinstance(J @ other.mT, ntkops.NTKOperator)  # another snapshot: a plain lazy product
    torch.testing.assert_close(
        (J @ other.mT) @ torch.ones(8, 1, dtype=torch.float64),
        J @ (other.mT @ torch.ones(8, 1, dtype=torch.float64)),
    )


def test_factors_multiply_to_the_kernel_also_when_traced():
    model, x = CASE.make(), CASE.data(5)
    for outputs in ("all", "each", "trace", 1):
        K = ntkops.ntk(model, x, outputs=outputs)
        v = torch.ones(*K.batch_shape, K.shape[-1], 2, dtype=torch.float64)
        torch.testing.assert_close(K.left @ (K.right.mT @ v), K @ v)


def test_cross_kernels_check_the_new_samples():
    model, x = CASE.make(), CASE.data(5)
    K = ntkops.ntk(model, x)
    assert K.cross(CASE.data(2)).shape == (4, 10)
    with pytest.raises(ntkops.NtkopsError):
        K.cross(CASE.data(2, dtype=torch.float32))
    with pytest.raises(ShapeError, match="before slicing"):
        K[[0, 3]].mT.cross(CASE.data(2))


def test_what_cannot_meet_the_operator_is_told(kernel):
    for other in (np.ones(10), [1.0] * 10):
        with pytest.raises(DtypeError, match="multiplies tensors and operators"):
            kernel @ other
    with pytest.raises(ShapeError, match="cannot add shapes"):
        kernel + ntkops.ntk(CASE.make(), CASE.data(3))
    with pytest.raises(DtypeError, match="the diagonal torch.float32"):
        kernel.add_diagonal(torch.ones(10))
