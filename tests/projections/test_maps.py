"""Every projection is one fixed linear map, however it is cut, and its adjoint is its transpose."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ntkops import projections
from ntkops.errors import DeviceError, DtypeError, InputError, OutOfRangeError, ShapeError
from ntkops.projections import (
    SJLT,
    SRHT,
    CountSketch,
    Gaussian,
    Haar,
    LayerKronecker,
    Rademacher,
    RowSample,
    compose,
)
from ntkops.projections.base import Projection

from .maps import DIM, MAPS, SHAPES, SPARSE, K, dense, vectors

CUTS = st.lists(st.integers(0, DIM), max_size=6).map(lambda inner: sorted({0, DIM, *inner}))


@pytest.mark.parametrize("name", MAPS)
def test_adjoint_is_the_transpose(name: str) -> None:
    projection = MAPS[name](0)
    matrix = dense(projection)
    assert matrix.shape == projection.shape == (K, DIM)
    rows = projection.adjoint(torch.eye(K, dtype=torch.float64))
    torch.testing.assert_close(rows, matrix, rtol=1e-12, atol=1e-12)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        u, v = vectors(3, dtype=dtype), vectors(3, K, dtype, seed=6)
        left = (projection.apply(u) * v).sum(1)
        right = (u * projection.adjoint(v)).sum(1)
        scale = u.norm(dim=1) * v.norm(dim=1)
        assert float(((left - right) / scale).abs().max()) <= tolerance


@pytest.mark.parametrize("name", MAPS)
@settings(max_examples=20, deadline=None)
@given(cuts=CUTS)
def test_chunks_of_any_size_meet_the_same_map(name: str, cuts: list[int]) -> None:
    projection = MAPS[name](1)
    x, y = vectors(4), vectors(4, K, seed=6)
    whole, back = projection.apply(x), projection.adjoint(y)
    pairs = list(zip(cuts, cuts[1:], strict=False))
    parts = sum(projection.apply(x[:, a:b], a) for a, b in pairs)
    torch.testing.assert_close(parts, whole, rtol=1e-11, atol=1e-11)
    pulled = torch.cat([projection.adjoint(y, a, b) for a, b in pairs], dim=1)
    torch.testing.assert_close(pulled, back, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", SPARSE)
@settings(max_examples=20, deadline=None)
@given(cuts=CUTS, dtype=st.sampled_from([torch.float32, torch.float64]))
def test_sparse_maps_give_the_same_bits_for_any_chunks(
    name: str, cuts: list[int], dtype: torch.dtype
) -> None:
    projection = MAPS[name](1)
    x, y = vectors(4, dtype=dtype), vectors(4, K, dtype, seed=6)
    pairs = list(zip(cuts, cuts[1:], strict=False))
    state = projection.start(4, dtype)
    for a, b in pairs:
        projection.accumulate(state, x[:, a:b], a)
    assert torch.equal(projection.finish(state), projection.apply(x))
    pulled = torch.cat([projection.adjoint(y, a, b) for a, b in pairs], dim=1)
    assert torch.equal(pulled, projection.adjoint(y))


@pytest.mark.parametrize("name", SPARSE)
def test_sparse_maps_give_the_same_bits_for_any_batch_and_layout(name: str) -> None:
    projection = MAPS[name](1)
    x = vectors(6, dtype=torch.float32)
    whole = projection.apply(x)
    assert torch.equal(torch.stack([projection.apply(row) for row in x]), whole)
    assert torch.equal(projection.apply(x.mT.contiguous().mT), whole)
    assert torch.equal(projection.apply(x.reshape(2, 3, DIM)), whole.reshape(2, 3, K))
    assert torch.equal(projection.apply(x.double().float()), whole)


@pytest.mark.parametrize("name", ["CountSketch", "SJLT"])
def test_many_segments_and_groups_give_the_same_bits(name: str) -> None:
    dim, k = 150_000, 48
    projection = {"CountSketch": CountSketch, "SJLT": SJLT}[name](dim, k, 3)
    x = vectors(2, dim, torch.float32)
    state = projection.start(2, torch.float32)
    cuts = [0, 1, 47, 48, 49, 65_519, 65_536, 131_100, 149_999, dim]
    for a, b in zip(cuts, cuts[1:], strict=False):
        projection.accumulate(state, x[:, a:b], a)
    assert torch.equal(projection.finish(state), projection.apply(x))
    y = vectors(2, k, torch.float32)
    inner = (projection.apply(x).double() * y.double()).sum(1), (x.double() * projection.adjoint(y)).sum(1)
    torch.testing.assert_close(*inner, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("name", MAPS)
def test_float32_and_float64_meet_the_same_map(name: str) -> None:
    projection = MAPS[name](2)
    torch.testing.assert_close(
        dense(projection, torch.float32).double(), dense(projection), rtol=2e-6, atol=2e-6
    )
    for dtype in (torch.bfloat16, torch.float16):  # sums in float32, rounded once
        x = vectors(3, dtype=dtype)
        assert projection.apply(x).dtype == dtype
        assert torch.equal(projection.apply(x), projection.apply(x.float()).to(dtype))


@pytest.mark.parametrize("scale", [1e-20, 1e18])
@pytest.mark.parametrize("name", MAPS)
def test_float32_at_both_ends_of_its_range(name: str, scale: float) -> None:
    projection = MAPS[name](2)
    x = vectors(3, dtype=torch.float32)
    torch.testing.assert_close(
        projection.apply(scale * x).double() / scale, projection.apply(x).double(), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("name", MAPS)
def test_a_map_is_its_arguments(name: str) -> None:
    projection = MAPS[name](3)
    dense(projection)  # whatever it keeps
    text = pickle.dumps(projection)
    assert len(text) < 600
    again = pickle.loads(text)
    assert again == projection and hash(again) == hash(projection)
    assert torch.equal(dense(again), dense(projection))
    names = {**vars(projections), "Composition": type(projection)}
    assert eval(repr(projection), names) == projection
    assert MAPS[name](4) != projection
    assert not torch.allclose(dense(MAPS[name](4)), dense(projection))


def test_seeds_come_from_generators_and_leave_the_global_state_alone() -> None:
    state = torch.get_rng_state()
    one = SJLT(DIM, K, generator=torch.Generator().manual_seed(7))
    other = SJLT(DIM, K, generator=torch.Generator().manual_seed(7))
    assert one == other and isinstance(one.seed, int)
    assert SJLT(DIM, K) != SJLT(DIM, K)
    dense(one)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", MAPS)
def test_derivatives_are_those_of_the_matrix(name: str) -> None:
    """Of a chunk that lies in two parameters."""
    projection = MAPS[name](0)
    x = vectors(2)[:, 66:74].requires_grad_()
    y = vectors(2, K).requires_grad_()
    # Along random directions: an entry that is wrong is wrong along almost every one.
    assert torch.autograd.gradcheck(lambda t: projection.apply(t, 66), x, fast_mode=True)
    assert torch.autograd.gradcheck(lambda t: projection.adjoint(t, 66, 74), y, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda t: projection.apply(t, 66).square(), x, fast_mode=True)


@pytest.mark.parametrize("name", MAPS)
def test_empty_chunks_and_no_rows(name: str) -> None:
    projection = MAPS[name](0)
    x = vectors(3)
    assert torch.equal(projection.apply(x[:, :0], 17), torch.zeros(3, K, dtype=torch.float64))
    assert projection.adjoint(projection.apply(x), 5, 5).shape == (3, 0)
    assert projection.apply(x[:0]).shape == (0, K)


# structure of single maps


def test_columns_of_the_sparse_maps() -> None:
    counts = dense(CountSketch(DIM, K, 0))
    assert torch.equal(counts.abs().sum(0), torch.ones(DIM, dtype=torch.float64))
    sjlt = dense(SJLT(DIM, K, 0, nonzeros=5))
    assert (sjlt.count_nonzero(dim=0) == 5).all()
    torch.testing.assert_close(sjlt.norm(dim=0), torch.ones(DIM, dtype=torch.float64))
    full = dense(SJLT(DIM, K, 0, nonzeros=K))
    torch.testing.assert_close(full.abs(), torch.full((K, DIM), K**-0.5, dtype=torch.float64))
    sample = dense(RowSample(DIM, K, 0))
    assert (sample.count_nonzero(dim=1) == 1).all() and sample.count_nonzero() == K
    entries = dense(Rademacher(DIM, K, 0))
    torch.testing.assert_close(entries.abs(), torch.full((K, DIM), K**-0.5, dtype=torch.float64))


def test_two_entries_of_one_segment_never_meet() -> None:
    sketch = dense(CountSketch(DIM, K, 0))
    for start in range(0, DIM, K):
        part = sketch[:, start : start + K].abs()
        assert (part.sum(1) <= 1).all()


def test_haar_rows_are_orthogonal_and_sum_to_the_right_length() -> None:
    projection = Haar(20_000, 32, 0)
    eye = torch.eye(32, dtype=torch.float64)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        rows = projection.adjoint(eye.to(dtype)).double()
        torch.testing.assert_close(rows @ rows.mT * 32 / 20_000, eye, rtol=0, atol=tolerance)
    square = dense(Haar(9, 9, 0))
    torch.testing.assert_close(square.mT @ square, torch.eye(9, dtype=torch.float64))


def test_srht_keeps_everything_where_nothing_is_left_out() -> None:
    projection = SRHT(64, 64, 0)
    matrix = dense(projection)
    torch.testing.assert_close(matrix.mT @ matrix, torch.eye(64, dtype=torch.float64))
    assert SRHT(10**7, 512, 0).length == 4096 and SRHT(10**7, 5000, 0).length == 8192


def test_kronecker_factors_are_the_map() -> None:
    projection = LayerKronecker(SHAPES, 4, 3, 0)
    matrix = dense(projection)
    for index, start in enumerate(projection.starts[:-1]):
        left, right = projection.factors(index, torch.float64)
        assert (*left.shape, *right.shape) == (4, left.shape[1], 3, right.shape[1])
        assert left.shape[1] * right.shape[1] == projection.starts[index + 1] - start
        part = matrix[:, start : projection.starts[index + 1]]
        torch.testing.assert_close(torch.kron(left, right), part)


def test_composition_is_the_product() -> None:
    first, second, third = SJLT(DIM, 50, 0), Rademacher(50, 20, 1), Gaussian(20, K, 2)
    product = dense(third) @ dense(second) @ dense(first)
    torch.testing.assert_close(dense(compose(third, second, first)), product)
    assert compose(first) is first


# refusals

BAD = {
    "dim": (lambda: SJLT(0, 3, 0), InputError, "dim=0"),
    "k": (lambda: SJLT(5, 2.0, 0), InputError, r"k=2\.0"),
    "seed": (lambda: SJLT(5, 4, "a"), InputError, "seed='a'"),
    "swapped": (lambda: SJLT(512, 10_000), InputError, "k=10000 exceeds dim=512.*comes first"),
    "seed and generator": (lambda: SJLT(5, 4, 0, generator=torch.Generator()), InputError, "not both"),
    "nonzeros": (lambda: SJLT(50, 3, 0), InputError, "nonzeros=4: pass an integer from 1 to k = 3"),
    "Haar": (lambda: Haar(5, 6, 0), InputError, "k=6 exceeds dim=5"),
    "RowSample": (lambda: RowSample(5, 6, 0), InputError, "k=6 exceeds dim=5"),
    "no shapes": (lambda: LayerKronecker([], seed=0), InputError, "shapes is empty"),
    "rows": (lambda: LayerKronecker([(2, 2)], 0, 2, 0), InputError, "rows=0"),
    "factors": (lambda: LayerKronecker([(2, 2)], 2, 2, 0).factors(1), OutOfRangeError, "parameter 1"),
    "compose nothing": (lambda: compose(), InputError, "compose takes projections"),
    "compose": (lambda: compose(SJLT(9, 5, 0), SJLT(50, 8, 0)), InputError, "cannot follow one to 8"),
    "offset": (lambda: SJLT(50, 8, 0).apply(torch.ones(3, 40), 11), OutOfRangeError, "entries 11 to 51"),
    "range": (lambda: SJLT(50, 8, 0).adjoint(torch.ones(8), 20, 10), OutOfRangeError, "entries 20 to 10"),
    "width": (lambda: SJLT(50, 8, 0).adjoint(torch.ones(9)), ShapeError, "k = 8 entries"),
    "scalar": (lambda: SJLT(50, 8, 0).apply(torch.tensor(1.0)), ShapeError, "last axis"),
    "integers": (lambda: SJLT(50, 8, 0).apply(torch.ones(50, dtype=torch.int64)), DtypeError, "floating"),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals_name_the_culprit(name: str) -> None:
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", MAPS)
def test_the_map_is_the_same_on_another_device(name: str) -> None:
    projection = MAPS[name](0)
    x, y = vectors(4, dtype=torch.float32), vectors(4, K, torch.float32)
    there, back = projection.apply(x.cuda()).cpu(), projection.adjoint(y.cuda()).cpu()
    if name in SPARSE:
        assert torch.equal(there, projection.apply(x)) and torch.equal(back, projection.adjoint(y))
    torch.testing.assert_close(there, projection.apply(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(back, projection.adjoint(y), rtol=1e-4, atol=1e-4)
    with pytest.raises(DeviceError):
        SJLT(DIM, K, generator=torch.Generator("cuda"))


def test_every_public_map_is_a_projection() -> None:
    for name in MAPS:
        assert isinstance(MAPS[name](0), Projection)
