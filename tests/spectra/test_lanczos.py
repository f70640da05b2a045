"""Lanczos by itself: restarts, hidden copies, breakdowns, symmetry, going on."""

import pytest
import torch

import ntkops
from ntkops.errors import InputError, NotConvergedError, UnsupportedOperationError
from ntkops.spectra import Lanczos
from ntkops.vectors import Space
from tests.cases import BY_NAME
from tests.estimators.problems import OnlyProducts, generator, with_spectrum


def solver(matrix, block_size=1, seed=0):
    space = Space(len(matrix), matrix.dtype)
    return Lanczos(lambda block: matrix @ block, space, generator(seed), block_size=block_size)


@pytest.mark.parametrize("block_size", [1, 3])
def test_a_crowded_spectrum_takes_restarts_and_is_right(block_size):
    values = torch.linspace(0, 1, 400, dtype=torch.float64).flip(0)
    found = solver(with_spectrum(values), block_size)
    pairs = found.solve(4, tolerance=1e-8)
    assert pairs.converged and pairs.products > 3 * 4 + 8 * block_size + 60  # more than one basis holds
    torch.testing.assert_close(pairs.values, values[:4], rtol=0, atol=1e-12)
    assert found._vectors.shape[-1] <= 3 * 4 + 8 * block_size + 60


@pytest.mark.parametrize("block_size", [1, 3])
def test_what_is_reported_adds_up_to_the_products(block_size):
    matrix, seen = torch.diag(torch.arange(20.0, dtype=torch.float64)), []
    found = Lanczos(
        lambda block: matrix @ block,
        Space(20, torch.float64),
        generator(0),
        block_size=block_size,
        report=seen.append,
    )
    assert found.solve(2, tolerance=1e-9).products == sum(seen)
    assert max(seen) == block_size


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("where", [0, 3])
def test_copies_are_found_wherever_they_are(where, seed):
    values = torch.tensor([10.0, 9.0, 8.0, 7.0, 6.0, 5.0, *torch.linspace(0, 1, 194).flip(0).tolist()])
    values[where + 1] = values[where + 2] = values[where]
    values = values.double().sort(descending=True).values
    pairs = solver(with_spectrum(values, seed), seed=seed).solve(5, tolerance=1e-10)
    assert pairs.converged
    torch.testing.assert_close(pairs.values, values[:5], rtol=1e-10, atol=1e-10)
    gram = pairs.vectors.T @ pairs.vectors
    torch.testing.assert_close(gram, torch.eye(5, dtype=torch.float64), rtol=0, atol=1e-12)


def test_a_later_call_goes_on_from_what_there_is():
    values = 0.9 ** torch.arange(300, dtype=torch.float64)
    found = solver(with_spectrum(values))
    first = found.solve(5, tolerance=1e-9).products
    pairs = found.solve(20, tolerance=1e-9)
    torch.testing.assert_close(pairs.values, values[:20], rtol=1e-10, atol=1e-10)
    fresh = solver(with_spectrum(values)).solve(20, tolerance=1e-9).products
    assert first < pairs.products < first + fresh


@pytest.mark.parametrize("size", [1, 2, 5])
def test_the_whole_space_is_exact(size):
    values = torch.arange(size, 0, -1).double()
    pairs = solver(with_spectrum(values)).solve(size, tolerance=1e-14)
    assert pairs.converged
    torch.testing.assert_close(pairs.values, values, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scale", [1e-20, 1e18])
def test_scales_in_float32(scale):
    values = 0.7 ** torch.arange(200, dtype=torch.float64)
    pairs = solver((with_spectrum(values) * scale).float()).solve(4, tolerance=2e-5)
    assert pairs.converged
    torch.testing.assert_close(pairs.values / scale, values[:4], rtol=1e-5, atol=1e-6)


def test_what_is_not_symmetric_is_refused():
    skew = torch.randn(200, 200, generator=generator(0), dtype=torch.float64)
    with pytest.raises(UnsupportedOperationError, match="not symmetric"):
        solver(skew).solve(2, tolerance=1e-8)
    for operator in (skew, OnlyProducts(skew), skew[:20, :20]):
        with pytest.raises(UnsupportedOperationError, match="not symmetric"):
            ntkops.eigsh(operator, k=2)
    with pytest.raises(UnsupportedOperationError, match="not symmetric"):
        ntkops.truncation_rank(skew)


@pytest.mark.parametrize("lazy", [True, False])
def test_the_smallest_are_found_from_their_end(lazy):
    values = torch.tensor([5.0, 4.0, *torch.linspace(1, 2, 200).tolist(), -1.0, -3.0]).double()
    K = with_spectrum(values)
    pairs = ntkops.eigsh(OnlyProducts(K) if lazy else K, k=2, which="smallest", generator=generator(0))
    torch.testing.assert_close(
        pairs.values, torch.tensor([-3.0, -1.0], dtype=torch.float64), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(K @ pairs.vectors, pairs.vectors * pairs.values, rtol=0, atol=1e-7)
    with pytest.raises(InputError, match="largest"):
        ntkops.eigsh(K, which="middle")


def test_failure_can_be_raised_with_what_was_found():
    K = OnlyProducts(with_spectrum(torch.linspace(1, 2, 300)))
    with pytest.raises(NotConvergedError, match="raise max_products") as caught:
        ntkops.eigsh(K, k=4, max_products=12, raise_on_failure=True, generator=generator(0))
    assert caught.value.result.values.shape == (4,)


def test_nothing_dense_is_built_where_that_is_forbidden():
    case = BY_NAME["mlp"]
    K = ntkops.ntk(case.make(), case.data(10), max_dense_bytes=0)
    dense = ntkops.ntk(case.make(), case.data(10)).to_dense()
    for operator, shift in ((K, 0.0), (K.add_jitter(0.5), 0.5)):
        pairs = ntkops.eigsh(operator, k=3, generator=generator(0))
        assert pairs.method == "lanczos"
        expected = torch.linalg.eigvalsh(dense).flip(0)[:3] + shift
        torch.testing.assert_close(pairs.values, expected, rtol=1e-9, atol=1e-9)


def test_truncation_rank_without_a_cheap_trace_has_an_interval():
    values = 0.93 ** torch.arange(1500, dtype=torch.float64)
    share = values.cumsum(0) / values.sum()
    expected = int((share >= 0.95).long().argmax()) + 1
    K = OnlyProducts(torch.diag(values))  # directions are uniform, so that it stands for any rotation of it
    columns = K.columns
    inside = 0
    for seed in range(5):
        columns.clear()
        result = ntkops.truncation_rank(K, 0.05, generator=generator(seed))
        low, high = (int(end) for end in result.interval)
        assert low <= int(result) <= high and not result.exact and result.converged
        assert result.passes == sum(columns) < 400
        inside += low <= expected <= high
    assert inside >= 4


def test_truncation_rank_refuses_what_has_no_share():
    with pytest.raises(InputError, match="positive semidefinite"):
        ntkops.truncation_rank(with_spectrum(torch.tensor([2.0, 1.0, -1.5])))
