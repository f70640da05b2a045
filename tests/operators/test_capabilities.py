"""What every operator can do agrees with its dense matrix, lazily and at the stated cost."""

from __future__ import annotations

import functools

import pytest
import torch
from linear_operator.operators import (
    BlockDiagLinearOperator,
    DenseLinearOperator,
    DiagLinearOperator,
    IdentityLinearOperator,
    LinearOperator,
    MatmulLinearOperator,
    RootLinearOperator,
)
from torch import Tensor

import ntkops
from ntkops.engines import count_passes
from ntkops.errors import NonFiniteError, ShapeError
from ntkops.operators.capabilities import (
    Capabilities,
    Tile,
    capabilities,
    dense_from_tiles,
    multiply,
    paired_tiles,
    tile_slices,
)
from ntkops.vectors import Space


class Lazy(LinearOperator):
    """A matrix that can only be multiplied; it refuses to become dense."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(matrix)
        self.matrix = matrix

    def _size(self) -> torch.Size:
        return self.matrix.shape

    def _matmul(self, rhs: Tensor) -> Tensor:
        return self.matrix @ rhs

    def _transpose_nonbatch(self) -> Lazy:
        return Lazy(self.matrix.mT)

    def to_dense(self) -> Tensor:
        raise AssertionError("made dense")

    def _diagonal(self) -> Tensor:
        raise AssertionError("diagonal not by products")


def matrix(*shape: int, symmetric: bool = True, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    draw = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return ((draw + draw.mT) / 2 if symmetric else draw).to(dtype)


def kernel(outputs: object = "all", count: int = 5, **options: object) -> ntkops.NTKOperator:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
        x = torch.randn(count, 3).double()
    return ntkops.ntk(model, x, outputs=outputs, engine="autograd", **options)


def kernel_reference(outputs: object = "all", count: int = 5) -> Tensor:
    return kernel(outputs, count).to_dense().clone()


@functools.cache
def operators() -> dict[str, tuple[LinearOperator | Tensor, Tensor]]:
    """Return operators of every kind with their dense matrices."""
    square, other, rectangle = (
        matrix(7, 7),
        matrix(7, 7, symmetric=False, seed=1),
        matrix(6, 4, symmetric=False),
    )
    batch, diagonal = matrix(3, 4, 4), torch.linspace(-1, 2, 7, dtype=torch.float64)
    eye = torch.eye(7, dtype=torch.float64)
    constants = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    ours = kernel_reference()
    each = kernel_reference("each")
    return {
        "tensor": (square, square),
        "dense": (DenseLinearOperator(square), square),
        "not symmetric": (other, other),
        "rectangle": (rectangle, rectangle),
        "lazy": (Lazy(square), square),
        "lazy wide": (Lazy(rectangle.mT), rectangle.mT),
        "lazy tall": (Lazy(rectangle), rectangle),
        "lazy batch": (Lazy(batch), batch),
        "diagonal": (DiagLinearOperator(diagonal), torch.diag(diagonal)),
        "identity": (IdentityLinearOperator(7, dtype=torch.float64), eye),
        "added diagonal": (Lazy(square).add_diagonal(diagonal), square + torch.diag(diagonal)),
        "jitter": (DenseLinearOperator(square).add_jitter(0.5), square + 0.5 * eye),
        "sum": (DenseLinearOperator(square) + Lazy(square), 2 * square),
        "mixed sum": (DenseLinearOperator(square) + DenseLinearOperator(other), square + other),
        "multiple": (-2.5 * Lazy(square), -2.5 * square),
        "multiples": (
            constants.reshape(3, 1, 1) * DenseLinearOperator(batch),
            constants.reshape(3, 1, 1) * batch,
        ),
        "difference": (DenseLinearOperator(square) - 2 * Lazy(square), -square),
        "block diagonal": (
            BlockDiagLinearOperator(DenseLinearOperator(batch)),
            torch.block_diag(*batch),
        ),
        "root": (RootLinearOperator(Lazy(rectangle)), rectangle @ rectangle.mT),
        "product": (MatmulLinearOperator(Lazy(square), Lazy(other)), square @ other),
        "ours": (kernel(max_dense_bytes=0), ours),
        "ours each": (kernel("each", max_dense_bytes=0), each),
        "ours + ridge": (
            kernel(max_dense_bytes=0).add_jitter(0.3),
            ours + 0.3 * torch.eye(10, dtype=torch.float64),
        ),
        "ours scaled": (3.0 * kernel(max_dense_bytes=0), 3.0 * ours),
        "ours + not symmetric": (
            kernel(max_dense_bytes=0) + matrix(10, 10, symmetric=False),
            ours + matrix(10, 10, symmetric=False),
        ),
        "ours in blocks": (
            BlockDiagLinearOperator(kernel("each", max_dense_bytes=0)),
            torch.block_diag(*each),
        ),
        "Jacobian": (kernel(max_dense_bytes=0).left, kernel().left.to_dense()),
    }


NAMES = list(operators())


# Each size of a tile once, and each way to walk with sizes that divide the axes and that do not.
WALKS = ((None, False), (None, True), (1, False), (3, True), (4, False), (100, True))


@pytest.mark.parametrize("name", NAMES)
def test_tiles_cover_the_operator_row_after_row(name: str) -> None:
    operator, dense = operators()[name]
    found = capabilities(operator)
    assert isinstance(found, Capabilities)
    assert found.shape == dense.shape and found.dtype == dense.dtype
    for size, whole in WALKS:
        step = size or found.tile_size()
        corners = [
            (rows, cols)
            for rows in tile_slices(dense.shape[-2], step)
            for cols in tile_slices(dense.shape[-1], step)
            if whole or not found.symmetric or cols.start >= rows.start
        ]
        tiles = list(found.all_tiles(size) if whole else found.tiles(size))
        assert [(tile.rows, tile.cols) for tile in tiles] == corners
        for tile in tiles:
            torch.testing.assert_close(tile.block, dense[..., tile.rows, tile.cols], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dense_from_tiles(found, 3), dense, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_diagonal_is_exact_where_there_is_one(name: str) -> None:
    operator, dense = operators()[name]
    found = capabilities(operator)
    if dense.shape[-1] != dense.shape[-2]:
        if not isinstance(operator, ntkops.JacobianOperator):
            with pytest.raises(ShapeError, match="square"):
                found.diagonal()
        return
    torch.testing.assert_close(found.diagonal(), dense.diagonal(dim1=-2, dim2=-1), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_factors_multiply_to_the_operator(name: str) -> None:
    operator, dense = operators()[name]
    found = capabilities(operator)
    factors = found.factors()
    if factors is None:
        assert name not in ("ours", "ours each", "ours scaled", "root", "product")
        return
    left, right = (dense_from_tiles(factor) for factor in factors)
    torch.testing.assert_close(left @ right.mT, dense, rtol=1e-12, atol=1e-12)
    if found.symmetric:
        torch.testing.assert_close(left, right, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_products_are_right_and_cost_what_was_said(name: str) -> None:
    operator, dense = operators()[name]
    block = matrix(dense.shape[-1], 3, symmetric=False, seed=5).expand(*dense.shape[:-2], -1, -1)
    with count_passes() as tally:
        result = multiply(operator, block)
    torch.testing.assert_close(result, dense @ block, rtol=1e-12, atol=1e-12)
    assert tally.total == 3 * capabilities(operator).product_cost()
    assert not result.requires_grad


@pytest.mark.parametrize("name", ["tensor", "dense", "diagonal", "identity", "jitter", "block diagonal"])
def test_what_is_stored_costs_nothing(name: str) -> None:
    found = capabilities(operators()[name][0])
    with count_passes() as tally:
        list(found.tiles())
        found.diagonal()
    assert tally.total == 0 == found.exact_cost("diagonal") == found.exact_cost("tiles")


@pytest.mark.parametrize(
    "name", ["lazy", "lazy wide", "lazy tall", "lazy batch", "added diagonal", "product"]
)
def test_identity_columns_are_counted(name: str) -> None:
    found = capabilities(operators()[name][0])
    with count_passes() as tally:
        list(found.tiles())
    assert tally.total == found.exact_cost("tiles") == tally.count.products > 0


def test_a_tall_operator_is_tiled_from_its_few_columns() -> None:
    found = capabilities(Lazy(matrix(9, 2, symmetric=False)))
    assert found.exact_cost("tiles") == 2
    with count_passes() as tally:
        blocks = [tile.block for tile in found.tiles(4)]
    assert tally.total == 2 and len(blocks) == 3


def test_symmetry_is_measured_for_tensors_and_never_assumed_of_others() -> None:
    assert capabilities(matrix(5, 5)).symmetric
    assert capabilities(matrix(5, 5, dtype=torch.float32)).symmetric
    assert not capabilities(matrix(5, 5, symmetric=False)).symmetric
    assert not capabilities(matrix(5, 4, symmetric=False)).symmetric
    assert not capabilities(Lazy(matrix(5, 5))).symmetric
    assert capabilities(RootLinearOperator(Lazy(matrix(5, 2, symmetric=False)))).symmetric
    assert capabilities(torch.zeros(3, 3)).symmetric
    assert not capabilities(torch.full((3, 3), torch.nan)).symmetric


def test_ours_is_asked_and_never_made_dense() -> None:
    K = kernel(max_dense_bytes=0)
    dense = kernel_reference()
    ridge = (2.0 * K).add_jitter(0.1)
    expected = 2 * dense + 0.1 * torch.eye(10, dtype=torch.float64)
    torch.testing.assert_close(dense_from_tiles(capabilities(ridge), 3), expected, rtol=1e-12, atol=1e-12)
    with count_passes() as tally:
        capabilities(ridge).diagonal()
    assert tally.count.per_sample == tally.total == capabilities(K).exact_cost("diagonal")


@pytest.mark.parametrize(
    "names", [("ours", "ours"), ("ours", "ours + not symmetric"), ("mixed sum", "tensor")]
)
@pytest.mark.parametrize("size", [None, 3])
def test_pairs_of_tiles_meet(names: tuple[str, str], size: int | None) -> None:
    (first, left), (second, right) = (operators()[name] for name in names)
    total = torch.zeros((), dtype=torch.float64)
    a, b = capabilities(first), capabilities(second)
    if size is not None:
        a, b = _Cut(a, size), _Cut(b, size)
    for one, other, mirrored in paired_tiles(a, b):
        assert (one.rows, one.cols) == (other.rows, other.cols)
        total += (2 if mirrored else 1) * (one.block * other.block).sum()
    torch.testing.assert_close(total, (left * right).sum(), rtol=1e-12, atol=1e-12)


class _Cut(Capabilities):
    """An operator with tiles of another size."""

    def __init__(self, base: Capabilities, size: int) -> None:
        self._base, self._size = base, size
        self.symmetric, self.shape = base.symmetric, base.shape

    def tile_size(self) -> int:
        return self._size

    def tiles(self, size: int | None = None) -> list[Tile]:
        return list(self._base.tiles(size or self._size))


def test_spaces_have_the_size_of_the_vectors() -> None:
    tall = Lazy(matrix(6, 4, symmetric=False))
    assert (capabilities(tall).space.size, capabilities(tall).domain.size) == (6, 4)
    K = kernel()
    assert (
        capabilities(K.add_jitter(1.0)).space.size == capabilities(2.0 * K).space.size == K.space.size == 10
    )


def test_the_space_of_a_part_is_the_space_of_the_sum() -> None:
    special = Space(7, torch.float64)
    part = Lazy(matrix(7, 7))
    part.space = special
    assert capabilities(part.add_jitter(1.0)).space is special
    assert capabilities(2.0 * part).space is special


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_product_that_is_not_finite_is_named(dtype: torch.dtype) -> None:
    broken = matrix(4, 4, dtype=dtype)
    broken[1, 2] = torch.nan
    for operator in (broken, DenseLinearOperator(broken), Lazy(broken), Lazy(broken).add_jitter(1.0)):
        with pytest.raises(NonFiniteError, match="NaN"):
            multiply(operator, torch.ones(4, 2, dtype=dtype))
    huge = torch.full((2, 2), torch.finfo(dtype).max, dtype=dtype)
    with pytest.raises(NonFiniteError, match="overflow"):
        multiply(huge, torch.ones(2, 1, dtype=dtype))
