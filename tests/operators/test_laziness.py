"""Nothing densifies unasked: compositions run with max_dense_bytes=0 and their passes are counted."""

import linear_operator
import pytest
import torch
from linear_operator.operators import (
    BlockDiagLinearOperator,
    CatLinearOperator,
    DenseLinearOperator,
    KroneckerProductLinearOperator,
    RootLinearOperator,
)

import ntkops
from ntkops.errors import DenseMemoryError, UnsupportedOperationError
from tests.cases import BY_NAME

CASE = BY_NAME["mlp"]


@pytest.fixture
def pair():
    """A lazy kernel that may hold nothing dense, and the same kernel dense."""
    model, x = CASE.make(), CASE.data(6)
    # Automatic differentiation: every product is a pass, so that products can be counted.
    return ntkops.ntk(model, x, engine="autograd", max_dense_bytes=0), ntkops.ntk(model, x).to_dense()


def block(rows, columns=2):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


COMPOSITIONS = {
    "sum": (lambda K: K + K, lambda D: D + D, 2),
    "difference": (lambda K: K - 0.5 * K, lambda D: 0.5 * D, 2),
    "scaling": (lambda K: 3.0 * K / 2.0, lambda D: 1.5 * D, 1),
    "jitter": (lambda K: K.add_jitter(0.3), lambda D: D + 0.3 * torch.eye(len(D), dtype=D.dtype), 1),
    "diagonal": (
        lambda K: K.add_diagonal(torch.arange(12, dtype=torch.float64)),
        lambda D: D + torch.diag(torch.arange(12, dtype=torch.float64)),
        1,
    ),
    "product": (lambda K: K @ K, lambda D: D @ D, 2),
    "transpose": (lambda K: K.mT, lambda D: D.T, 1),
    "rows": (lambda K: K[3:9], lambda D: D[3:9], 1),
    "block": (lambda K: K[2:11, 4:9], lambda D: D[2:11, 4:9], 1),
    "index": (lambda K: K[[5, 0, 5]], lambda D: D[[5, 0, 5]], 1),
    "grid": (lambda K: K.submatrix([1, 7], [0, 2, 11]), lambda D: D[[1, 7]][:, [0, 2, 11]], 1),
    "concatenation": (lambda K: CatLinearOperator(K, K, dim=-2), lambda D: torch.cat([D, D]), 2),
    "plus dense": (lambda K: K + torch.ones(12, 12, dtype=torch.float64), lambda D: D + 1, 1),
    "plus root": (
        lambda K: K + RootLinearOperator(torch.ones(12, 1, dtype=torch.float64)),
        lambda D: D + 1,
        1,
    ),
    "low rank": (lambda K: K.add_low_rank(torch.ones(12, 1, dtype=torch.float64)), lambda D: D + 1, 1),
}


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_compositions_stay_lazy_and_make_only_the_products_they_need(pair, name):
    K, dense = pair
    lazy, reference, kernels = COMPOSITIONS[name]
    with ntkops.count_passes() as tally:
        operator = lazy(K)
    assert tally.total == 0
    expected = reference(dense)
    v = block(expected.shape[-1])
    with ntkops.count_passes() as tally:
        product = operator @ v
    torch.testing.assert_close(product, expected @ v)
    assert tally.count == ntkops.results.PassCount(vjp=2 * kernels, jvp=2 * kernels)


def test_kronecker_products_stay_lazy(pair):
    K, dense = pair
    small = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    v = block(24)
    product = KroneckerProductLinearOperator(linear_operator.to_linear_operator(small), K) @ v
    torch.testing.assert_close(product, torch.kron(small, dense) @ v)


def test_block_diagonals_of_a_batch_stay_lazy():
    model, x = CASE.make(), CASE.data(6)
    each = ntkops.ntk(model, x, outputs="each", max_dense_bytes=0)
    dense = torch.block_diag(*ntkops.ntk(model, x, outputs="each").to_dense())
    v = block(12)
    torch.testing.assert_close(BlockDiagLinearOperator(each) @ v, dense @ v)
    expanded = each[0].expand(3, 6, 6)
    torch.testing.assert_close(expanded @ block(6), each[0] @ block(6).expand(3, 6, 2))


def test_a_row_costs_one_product(pair):
    K, dense = pair
    with ntkops.count_passes() as tally:
        row = K[7]
    torch.testing.assert_close(row, dense[7])
    assert tally.total == 2


@pytest.mark.parametrize(
    "densify",
    [
        lambda K: K.to_dense(),
        lambda K: K.materialize(),
        lambda K: torch.linalg.eigvalsh(K),
        lambda K: torch.linalg.eigh(K),
        lambda K: K.svd(),
        lambda K: K.solve(block(12)),
        lambda K: K.inv_quad(block(12)),
        lambda K: K.root_decomposition(),
        lambda K: K.root_inv_decomposition(),
        lambda K: K.root_decomposition("pivoted_cholesky"),
        lambda K: K.diagonalization(),
        lambda K: K.sqrt_inv_matmul(block(12)),
        lambda K: K * K,
        lambda K: K.numpy(),
        lambda K: (K + K).to_dense(),
    ],
)
def test_what_needs_the_dense_matrix_is_refused(pair, densify):
    K, _ = pair
    with pytest.raises(DenseMemoryError, match="max_dense_bytes"), ntkops.count_passes() as tally:
        densify(K)
    assert tally.total == 0


def test_the_limit_is_in_bytes_of_the_result():
    model, x = CASE.make(), CASE.data(6)
    size = 12 * 12 * 8
    assert ntkops.ntk(model, x, max_dense_bytes=size).to_dense().shape == (12, 12)
    with pytest.raises(DenseMemoryError, match=r"1\.1 KiB, above max_dense_bytes=1\.1 KiB"):
        ntkops.ntk(model, x, max_dense_bytes=size - 1).to_dense()
    with pytest.raises(ntkops.NtkopsError, match="max_dense_bytes=-1"):
        ntkops.ntk(model, x, max_dense_bytes=-1)


def test_pivoted_cholesky_costs_a_diagonal_and_a_column_a_step(pair):
    K, dense = pair
    with ntkops.count_passes() as tally:
        factor = K.pivoted_cholesky(4)
    assert tally.count.vjp <= 5 and tally.count.per_sample <= 2
    expected = DenseLinearOperator(dense).pivoted_cholesky(4)
    torch.testing.assert_close(factor @ factor.T, expected @ expected.T)


def test_a_number_is_not_added_to_every_entry(pair):
    K, _ = pair
    for attempt in (lambda: K + 0.1, lambda: 0.1 + K, lambda: K - 0.1, lambda: K + torch.tensor(0.1)):
        with pytest.raises(UnsupportedOperationError, match="add_jitter"):
            attempt()
    assert (K + 0) is K
    with pytest.raises(UnsupportedOperationError, match="to_scipy"):
        import numpy as np

        np.asarray(K)


def test_a_dense_block_is_built_once_it_is_cheaper_and_shown():
    model, x = CASE.make(), CASE.data(6)
    K = ntkops.ntk(model, x, engine="autograd")
    lazy = ntkops.ntk(model, x, max_dense_bytes=0)
    assert not K.engine_info.dense
    for seed in range(20):
        v = torch.randn(12, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        torch.testing.assert_close(K @ v, lazy @ v)
    assert K.engine_info.dense and not lazy.engine_info.dense
    with ntkops.count_passes() as tally:
        K @ v
    assert tally.total == 0
    assert K.free() == 12 * 12 * 8
    assert not K.engine_info.dense


def test_a_dense_result_changed_by_the_user_is_not_used_again():
    model, x = CASE.make(), CASE.data(6)
    K = ntkops.ntk(model, x)
    expected = K.to_dense().clone()
    K.to_dense().zero_()
    torch.testing.assert_close(K.to_dense(), expected)
    torch.testing.assert_close(K @ torch.ones(12, dtype=torch.float64), expected.sum(1))


def test_layer_structure_answers_products_from_one_set_of_passes():
    model, x = CASE.make(), CASE.data(6)
    K = ntkops.ntk(model, x, engine="layerwise", max_dense_bytes=0)
    reference = ntkops.ntk(model, x, engine="autograd", max_dense_bytes=0)
    v = block(12)
    with ntkops.count_passes() as first:
        product = K @ v
    with ntkops.count_passes() as second:
        again = K @ v
    torch.testing.assert_close(product, reference @ v)
    torch.testing.assert_close(again, product)
    assert first.count.per_sample > 0  # activations and output gradients, once
    assert second.count.per_sample == 0
    assert K.engine_info.engine == "layerwise" and len(K.engine_info.covered) == 4


def test_a_ridge_is_solved_without_the_dense_matrix(pair):
    K, _ = pair
    dense = torch.cat([K @ column.unsqueeze(-1) for column in torch.eye(12, dtype=K.dtype)], dim=-1)
    shifted = dense + torch.eye(12, dtype=K.dtype)
    ridge = K.add_jitter(1.0)
    b = block(12)
    torch.testing.assert_close(ridge.solve(b), torch.linalg.solve(shifted, b), rtol=1e-5, atol=1e-6)
    found = ntkops.logdet(ridge, num_passes=2000, method="slq", generator=torch.Generator().manual_seed(0))
    assert found.interval[0] <= torch.logdet(shifted).double() <= found.interval[1]
    with pytest.raises(DenseMemoryError):
        ridge.to_dense()
