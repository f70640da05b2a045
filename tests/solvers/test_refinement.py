import pytest
import torch

from ntkops.errors import DtypeError, NotConvergedError
from ntkops.solvers import conjugate_gradient, nystrom_preconditioner, refinement
from ntkops.vectors import Space
from tests.solvers.systems import Counted, block, decaying, generator, relative_residuals, with_spectrum

N = 100
SPACE, NARROW = Space(N, torch.float64), Space(N, torch.float32)


def products(matrix):
    single = matrix.float()
    return Counted(matrix), Counted(single)


@pytest.mark.parametrize("seed", range(3))
def test_float32_products_reach_float64_accuracy(seed):
    A, b = decaying(N, -3, seed), block(N, 4, seed)
    precise, coarse = products(A)
    x, info = refinement(precise, coarse, b, SPACE, tolerance=1e-12)
    assert x.dtype == torch.float64 and info.converged
    assert bool((relative_residuals(A, x, b) <= 1e-12).all())
    assert (info.products, info.precise_products) == (precise.columns + coarse.columns, precise.columns)
    torch.testing.assert_close(info.residuals, relative_residuals(A, x, b), rtol=1e-2, atol=1e-15)


def test_it_takes_few_precise_products_and_hardly_more_than_float64_alone():
    # A spectrum that crosses the ridge, as kernels have it. Of n well spread eigenvalues float64 finds the
    # solution in n steps, which no float32 iteration does.
    n, rank = 200, 30
    kernel = with_spectrum(1 / torch.arange(1, n + 1, dtype=torch.float64) ** 2)
    A, b, space, single = (
        kernel + 1e-4 * torch.eye(n),
        block(n, 1),
        Space(n, SPACE.dtype),
        Space(n, NARROW.dtype),
    )
    precise, coarse = products(A)
    wide = nystrom_preconditioner(lambda V: kernel @ V, 1e-4, space, rank, generator=generator())
    alone = conjugate_gradient(lambda V: A @ V, b, space, preconditioner=wide).info.products
    narrow = nystrom_preconditioner(lambda V: kernel.float() @ V, 1e-4, single, rank, generator=generator())
    _, info = refinement(precise, coarse, b, space, preconditioner=narrow)
    assert info.precise_products <= 4
    assert info.products <= alone + 12
    with pytest.raises(NotConvergedError):  # float32 alone cannot
        conjugate_gradient(lambda V: A.float() @ V, b.float(), single, preconditioner=narrow, tolerance=1e-7)


def test_what_float32_cannot_help_with_is_said():
    A, b = decaying(N, -12), block(N, 2)
    with pytest.raises(NotConvergedError, match="stagnated|indefinite|max_iterations") as caught:
        refinement(*products(A), b, SPACE, tolerance=1e-8)
    x, info = caught.value.result
    torch.testing.assert_close(info.residuals, relative_residuals(A, x, b), rtol=1e-2, atol=1e-12)


def test_columns_end_one_by_one_and_zero_ones_at_once():
    A = decaying(N, -3)
    vectors = torch.linalg.eigh(A).eigenvectors
    b = torch.cat([torch.zeros(N, 1), vectors[:, -1:], block(N, 1) * 1e12], dim=1)
    precise, coarse = products(A)
    x, info = refinement(precise, coarse, b, SPACE, tolerance=1e-10)
    assert float(x[:, 0].abs().max()) == 0 and info.converged
    assert bool((relative_residuals(A, x[:, 1:], b[:, 1:]) <= 1e-10).all())
    assert coarse.widths[-1] == 1


def test_a_batch_and_a_vector():
    A = torch.stack([decaying(N, -3), decaying(N, -3, 1)])
    b = torch.stack([block(N, 2), block(N, 2, 3)])
    x, info = refinement(lambda V: A @ V, lambda V: A.float() @ V, b, SPACE, tolerance=1e-10)
    assert bool((relative_residuals(A, x, b) <= 1e-10).all())
    alone, _ = refinement(lambda V: A[0] @ V, lambda V: A[0].float() @ V, b[0, :, 0], SPACE)
    assert alone.shape == (N,)


def test_the_right_hand_side_is_precise():
    A = decaying(N, -3)
    with pytest.raises(DtypeError, match="float32"):
        refinement(*products(A), block(N, 2, dtype=torch.float32), SPACE)
