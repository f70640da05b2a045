import pytest
import torch

from ntkops.errors import InputError, NonFiniteError, ShapeError
from ntkops.solvers import pivoted_cholesky, rpcholesky
from tests.solvers.systems import generator, with_spectrum

N = 60
K = with_spectrum(0.7 ** torch.arange(N, dtype=torch.float64))


def columns(chosen):
    return K[:, chosen]


def reference(pivots):
    """K[:, S] K[S, S]⁻¹ K[S, :], which every Cholesky factor with these pivots gives."""
    return K[:, pivots] @ torch.linalg.solve(K[pivots][:, pivots], K[pivots])


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_a_factor_is_the_nystrom_approximation_of_its_pivots(block_size):
    found = [
        pivoted_cholesky(columns, K.diagonal(), 12),
        rpcholesky(columns, K.diagonal(), 12, block_size=block_size, generator=generator()),
    ]
    for factor in found:
        F = factor.factor
        assert factor.rank == 12 and len(set(factor.pivots.tolist())) == 12
        torch.testing.assert_close(F @ F.mT, reference(factor.pivots), rtol=0, atol=1e-9)
        torch.testing.assert_close(
            factor.residual, (K - F @ F.mT).diagonal().clamp(min=0), rtol=0, atol=1e-12
        )


def test_greedy_pivots_are_where_most_remains():
    found = pivoted_cholesky(columns, K.diagonal(), 5)
    rest = K.clone()
    for pivot in found.pivots.tolist():
        assert pivot == int(rest.diagonal().argmax())
        rest = rest - torch.outer(rest[:, pivot], rest[:, pivot]) / rest[pivot, pivot]
    assert found.products == 5 and found.seed is None


def test_blocks_have_the_law_of_single_pivots():
    # Two clusters of duplicates: a block that took proposals unseen would take copies.
    base = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    spread = torch.tensor([0] * 6 + [1] * 6)
    kernel = base[spread][:, spread]
    first, counts = torch.zeros(2), 400
    for seed in range(counts):
        found = rpcholesky(
            lambda i: kernel[:, i], kernel.diagonal(), 4, block_size=4, generator=generator(seed)
        )
        assert found.rank == 2  # one of each cluster, and nothing is left
        first[spread[found.pivots[0]]] += 1
    share = float(first[0]) / counts  # 0.75 in expectation, standard error 0.022
    assert abs(share - 0.75) < 0.07


def test_entries_save_the_columns_of_rejected_proposals():
    found = rpcholesky(
        columns,
        K.diagonal(),
        12,
        block_size=8,
        entries=lambda i: K[i][:, i],
        generator=generator(),
    )
    assert found.products == found.rank == 12
    without = rpcholesky(columns, K.diagonal(), 12, block_size=8, generator=generator())
    assert torch.equal(found.pivots, without.pivots) and without.products >= 12


def test_it_stops_at_the_numerical_rank_or_the_tolerance():
    low = with_spectrum(torch.cat([torch.ones(5), torch.zeros(N - 5)]).double())
    for dtype in (torch.float32, torch.float64):
        kernel = low.to(dtype)
        for found in (
            pivoted_cholesky(lambda i, k=kernel: k[:, i], kernel.diagonal(), 20),
            rpcholesky(lambda i, k=kernel: k[:, i], kernel.diagonal(), 20, generator=generator()),
        ):
            assert found.rank == 5
    found = pivoted_cholesky(columns, K.diagonal(), N, tolerance=1e-3)
    assert found.rank < 40 and float(found.residual.sum()) <= 1e-3 * found.trace


def test_many_rows_are_no_rounding():
    """Rounding of what remains does not grow with n: a rank stops no earlier with many rows in float32."""
    features = torch.randn(30_000, 25, generator=generator()) * torch.logspace(0, -2, 25)
    diagonal = features.square().sum(-1)
    for found in (
        pivoted_cholesky(lambda i: features @ features[i].mT, diagonal, 20),
        rpcholesky(lambda i: features @ features[i].mT, diagonal, 20, block_size=5, generator=generator()),
    ):
        assert found.rank == 20


def test_rows_below_rounding_are_not_proposed():
    diagonal = torch.full((400,), 4e-5)  # below 400 units of rounding of the largest, together far above
    diagonal[0], diagonal[1] = 1.0, 1e-4
    kernel = torch.diag(diagonal)
    found = rpcholesky(lambda i: kernel[:, i], diagonal, 10, block_size=5, generator=generator())
    assert sorted(found.pivots.tolist()) == [0, 1] and found.products <= 10


def test_one_outlier_draws_one_pivot():
    kernel = torch.eye(N, dtype=torch.float64)
    kernel[0, 0] = 1e6
    found = rpcholesky(lambda i: kernel[:, i], kernel.diagonal(), 10, block_size=5, generator=generator())
    assert found.rank == 10 and int(found.pivots[0]) == 0


def test_seeds_repeat_and_the_global_state_stays():
    before = torch.get_rng_state()
    one, two = (rpcholesky(columns, K.diagonal(), 9, block_size=3, generator=generator(4)) for _ in range(2))
    assert torch.equal(one.pivots, two.pivots) and one.seed == 4
    assert torch.equal(before, torch.get_rng_state())


def test_bad_input_is_told():
    diagonal = K.diagonal().clone()
    for rank in (0, N + 1, 2.0):
        with pytest.raises(InputError, match="rank"):
            pivoted_cholesky(columns, diagonal, rank)
    with pytest.raises(InputError, match="block_size"):
        rpcholesky(columns, diagonal, 3, block_size=0)
    with pytest.raises(InputError, match="tolerance"):
        pivoted_cholesky(columns, diagonal, 3, tolerance=1.0)
    with pytest.raises(ShapeError, match="diagonal"):
        pivoted_cholesky(columns, K, 3)
    with pytest.raises(ShapeError, match="columns gave"):
        pivoted_cholesky(lambda i: K[:-1, i], diagonal, 3)
    with pytest.raises(NonFiniteError, match="a column"):
        pivoted_cholesky(lambda i: K[:, i] * float("nan"), diagonal, 3)
    diagonal[7] = -1
    with pytest.raises(InputError, match="negative in row 7"):
        pivoted_cholesky(columns, diagonal, 3)
    diagonal[7] = float("inf")
    with pytest.raises(NonFiniteError, match="row 7"):
        pivoted_cholesky(columns, diagonal, 3)
