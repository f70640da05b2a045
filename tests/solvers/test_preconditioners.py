import pytest
import torch

from ntkops.errors import InputError, NonFiniteError, ShapeError
from ntkops.solvers import (
    conjugate_gradient,
    factor_preconditioner,
    nystrom_factor,
    nystrom_preconditioner,
    pivoted_cholesky,
    rpcholesky,
)
from ntkops.vectors import Space
from tests.solvers.systems import Counted, block, generator, relative_residuals, with_spectrum

N, RANK, RIDGE = 120, 30, 1e-5
VALUES = 1.0 / torch.arange(1, N + 1, dtype=torch.float64) ** 3
K = with_spectrum(VALUES)
SPACE = Space(N, torch.float64)


def factors(kernel, space):
    def columns(chosen):
        return kernel[:, chosen]

    return {
        "nystrom": nystrom_factor(lambda V: kernel @ V, space, RANK, generator=generator())[0],
        "pivoted cholesky": pivoted_cholesky(columns, kernel.diagonal(), RANK).factor,
        "rpcholesky": rpcholesky(
            columns, kernel.diagonal(), RANK, block_size=7, generator=generator()
        ).factor,
    }


@pytest.mark.parametrize("name", ["nystrom", "pivoted cholesky", "rpcholesky"])
def test_a_factor_is_below_the_kernel_and_near_the_best_of_its_rank(name):
    F = factors(K, SPACE)[name]
    rest = K - F @ F.mT
    values = torch.linalg.eigvalsh(rest)
    assert float(values.min()) > -1e-12
    assert float(rest.trace()) < 8 * float(VALUES[RANK:].sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["nystrom", "pivoted cholesky", "rpcholesky"])
def test_a_preconditioner_is_the_formula_and_positive(name, dtype):
    space = Space(N, dtype)
    F = factors(K.to(dtype), space)[name]
    M = factor_preconditioner(F, RIDGE, space)
    dense = M(torch.eye(N, dtype=dtype)).double()
    U, S, _ = torch.linalg.svd(F.double(), full_matrices=False)
    kept = S / S[0] > N * torch.finfo(dtype).eps
    U, values = U[:, kept], S[kept].square()
    weights = (values[-1] + RIDGE) / (values + RIDGE) - 1
    torch.testing.assert_close(
        dense, torch.eye(N) + (U * weights) @ U.mT, rtol=0, atol=2e-5 if dtype == torch.float32 else 1e-9
    )
    assert float(torch.linalg.eigvalsh((dense + dense.mT) / 2).min()) > 0


@pytest.mark.parametrize("name", ["nystrom", "pivoted cholesky", "rpcholesky"])
def test_it_saves_most_of_the_products(name):
    b = block(N, 2)
    plain = conjugate_gradient(lambda V: K @ V + RIDGE * V, b, SPACE).info.products
    M = factor_preconditioner(factors(K, SPACE)[name], RIDGE, SPACE)
    x, info = conjugate_gradient(lambda V: K @ V + RIDGE * V, b, SPACE, preconditioner=M)
    assert info.products < plain / 4
    assert bool((relative_residuals(K + RIDGE * torch.eye(N), x, b) <= 1e-6).all())


@pytest.mark.parametrize("varying", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_known_columns_are_inverted_exactly(dtype, varying):
    space, kernel = Space(N, dtype), K.to(dtype)
    D = torch.logspace(-5, -3, N, dtype=torch.float64) if varying else torch.tensor(1e-4).double()
    A = K + torch.diag(D.expand(N))
    M = nystrom_preconditioner(lambda V: kernel @ V, D, space, RANK, generator=generator())
    omega = space.orthonormalize(space.probes(RANK, generator(), "gaussian")).double()
    level = float(M.values[-1]) + (1.0 if varying else 1e-4)
    torch.testing.assert_close(
        M((A @ omega).to(dtype)).double() / level,
        omega,
        rtol=0,
        atol=1e-6 if dtype == torch.float64 else 0.05,
    )
    dense = M(torch.eye(N, dtype=dtype)).double()
    torch.testing.assert_close(
        dense, dense.mT, rtol=0, atol=float(dense.abs().max()) * 1e3 * torch.finfo(dtype).eps
    )
    assert float(torch.linalg.eigvalsh((dense + dense.mT) / 2).min()) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_known_columns_save_products_where_the_spectrum_decays_slowly(dtype):
    n, ridge, rank = 400, 1e-4, 80
    space, b = Space(n, torch.float64), block(n, 1)
    kernel = with_spectrum(1 / torch.arange(1, n + 1, dtype=torch.float64))
    A = kernel + ridge * torch.eye(n)
    F, _ = nystrom_factor(lambda V: kernel @ V, space, rank, generator=generator())
    known = nystrom_preconditioner(
        lambda V: kernel.to(dtype) @ V, ridge, Space(n, dtype), rank, generator=generator()
    )
    with_known = conjugate_gradient(
        lambda V: A @ V, b, space, preconditioner=lambda V: known(V.to(dtype)).double()
    )
    without = conjugate_gradient(
        lambda V: A @ V, b, space, preconditioner=factor_preconditioner(F, ridge, space)
    )
    assert with_known.info.products < 0.95 * without.info.products


def test_pivots_are_known_columns_too():
    found = pivoted_cholesky(lambda i: K[:, i], K.diagonal(), RANK)
    M = factor_preconditioner(found, 1e-4, SPACE)
    unit = torch.eye(N, dtype=torch.float64)[:, found.pivots]
    torch.testing.assert_close(
        M((K + 1e-4 * torch.eye(N)) @ unit), (M.values[-1] + 1e-4) * unit, rtol=0, atol=1e-9
    )


def test_an_exact_factor_leaves_two_steps():
    F = torch.linalg.cholesky(K + 1e-14 * torch.eye(N))[:, :10]
    low = F @ F.mT
    M = factor_preconditioner(F, RIDGE, SPACE)
    _, info = conjugate_gradient(lambda V: low @ V + RIDGE * V, block(N, 3), SPACE, preconditioner=M)
    assert info.iterations <= 3


def test_a_diagonal_that_varies_is_scaled_away():
    entries = torch.logspace(-6, 0, N, dtype=torch.float64)
    A, b = K + torch.diag(entries), block(N, 2)
    plain = conjugate_gradient(lambda V: A @ V, b, SPACE, max_iterations=5000, raise_on_failure=False).info
    M = nystrom_preconditioner(lambda V: K @ V, entries, SPACE, RANK, generator=generator())
    x, info = conjugate_gradient(lambda V: A @ V, b, SPACE, preconditioner=M)
    assert info.products < plain.products / 2
    assert bool((relative_residuals(A, x, b) <= 1e-6).all())


@pytest.mark.parametrize("scale", [1e-20, 1e18])
def test_scales_do_not_matter_in_float32(scale):
    space = Space(N, torch.float32)
    kernel, b = (K * scale).float(), block(N, 2, dtype=torch.float32)
    ridge = 1e-3 * scale
    M = nystrom_preconditioner(lambda V: kernel @ V, ridge, space, RANK, generator=generator())
    x, info = conjugate_gradient(lambda V: kernel @ V + ridge * V, b, space, preconditioner=M, tolerance=1e-4)
    assert info.converged and info.iterations < 20 and info.preconditioner == "nystrom"


def test_nystrom_takes_one_block_and_reports_it():
    product = Counted(K)
    M = nystrom_preconditioner(product, RIDGE, SPACE, RANK, generator=generator(5))
    assert product.widths == [RANK] and (M.products, M.rank, M.seed) == (RANK, RANK, 5)
    other = nystrom_preconditioner(lambda V: K @ V, RIDGE, SPACE, RANK, generator=generator(5))
    b = block(N, 2)
    assert torch.equal(M(b), other(b))


def test_nystrom_of_a_kernel_of_low_rank_is_exact_and_says_its_rank():
    low = with_spectrum(torch.cat([torch.ones(6), torch.zeros(N - 6)]).double())
    F, _ = nystrom_factor(lambda V: low @ V, SPACE, 20, generator=generator())
    torch.testing.assert_close(F @ F.mT, low, rtol=0, atol=1e-10)
    zero, _ = nystrom_factor(lambda V: 0 * V, SPACE, 20, generator=generator())
    assert zero.shape[-1] == 0
    M = factor_preconditioner(zero, RIDGE, SPACE)
    b = block(N, 2)
    torch.testing.assert_close(M(b), b)


def test_a_batch_has_a_preconditioner_for_each_member():
    kernels = torch.stack([K, with_spectrum(2 * VALUES, 3)])
    ridges = torch.tensor([[1e-5], [1e-4]], dtype=torch.float64)
    M = nystrom_preconditioner(
        lambda V: kernels @ V, ridges, SPACE, RANK, batch_shape=(2,), generator=generator()
    )
    b = torch.stack([block(N, 2), block(N, 2, 4)])
    A = kernels + ridges[..., None] * torch.eye(N)
    x, info = conjugate_gradient(lambda V: A @ V, b, SPACE, preconditioner=M)
    assert info.iterations < 40 and bool((relative_residuals(A, x, b) <= 1e-6).all())


def test_bad_input_is_told():
    F = torch.ones(N, 2, dtype=torch.float64)
    with pytest.raises(InputError, match="positive, finite ridge"):
        factor_preconditioner(F, 0.0, SPACE)
    with pytest.raises(ShapeError, match="the factor needs"):
        factor_preconditioner(F[:-1], 1.0, SPACE)
    with pytest.raises(ShapeError, match="the diagonal needs"):
        factor_preconditioner(F, torch.ones(3), SPACE)
    with pytest.raises(ShapeError, match="the sketch needs"):
        factor_preconditioner(F, 1.0, SPACE, sketch=F[:-1])
    with pytest.raises(NonFiniteError, match="factor"):
        factor_preconditioner(F * float("nan"), 1.0, SPACE)
    for rank in (0, N + 1, 1.5, True):
        with pytest.raises(InputError, match="rank"):
            nystrom_preconditioner(lambda V: V, 1.0, SPACE, rank)
