"""Rounding of kernels as a regression meets it: in solutions, in predictions, and behind failures."""

from __future__ import annotations

import functools
import warnings
from typing import NoReturn

import torch
from linear_operator.operators import (
    ConstantMulLinearOperator,
    DenseLinearOperator,
    DiagLinearOperator,
    LinearOperator,
    SumLinearOperator,
)
from torch import Tensor

from ..engines import tensor_bytes
from ..errors import (
    InputError,
    NotConvergedError,
    RoundingWarning,
    SingularKernelError,
    UnsupportedOperationError,
)
from ..operators._ridge_system import batch_position
from ..operators.capabilities import capabilities, multiply
from ..operators.products import ProductOperator
from ..operators.rounding import eigenvalue_rounding
from ..spectra import Lanczos
from ..vectors import Space
from ._operands import Kernel

__all__ = [
    "added_share",
    "is_stored",
    "largest_eigenvalue",
    "precise_product",
    "raise_by_name",
    "warn_of_rounding",
]

_ROUNDED = 1e-2  # of the length of predictions
_LARGE = 2**28  # bytes of a dense kernel above which one product does not make it
_WIDENED = 2**22  # entries of a stored float32 kernel that are in float64 at a time
_OPERANDS = {"predictions": "cross kernel", "weights": "Jacobian"}
_DOUBTFUL = 0.1  # relative bound of an error that is worth a warning: true ones are some ten times smaller
# Rounding of a lazy product as a share of eps |K| |α|. In 260 products of random networks (one to three
# layers, four activations, both engines, ridges of 1e-6 to .1) half were below .033, 95 % below .115, all
# below .26.
_SHARE = 0.2
_STEPS = 12
_PRODUCTS = 60  # that a diagnosis may take
_INDEFINITE = 10  # times the rounding, below which a negative eigenvalue is one


def warn_of_rounding(largest: Tensor, dual: Tensor, rhs: Tensor, ridge: float, dtype: torch.dtype) -> None:
    """Warn where what rounds in a kernel may move the fitted values by more than a tenth.

    With A = K + r and fitted values f = Y - r α, an error E of K moves f by r A⁻¹ E α, and r A⁻¹ ≤ 1: by
    |E| |α| at most.

    Args:
        largest: Largest eigenvalue of K, of the batch shape.
        dual: α, ``(*batch, n, k)``.
        rhs: Y, ``(*batch, n, k)``.
        ridge: r.
        dtype: Dtype in which K was computed.
    """
    rounding = eigenvalue_rounding(largest, dtype, dual.shape[-2])
    moved = rounding.unsqueeze(-1) * torch.linalg.vector_norm(dual, dim=-2)
    fitted = torch.linalg.vector_norm(rhs - ridge * dual, dim=-2)
    worst = float(torch.where(moved > 0, moved / fitted, 0.0).max()) if moved.numel() else 0.0
    if worst > _DOUBTFUL:
        warnings.warn(
            f"the rounding of this {dtype} kernel may move the fitted values by {worst:.2g} of their size: "
            f"it rounds eigenvalues by {float(rounding.max()):.2g}, and the ridge is {ridge:.2g}; raise the "
            "ridge, or compute the kernel in float64",
            RoundingWarning,
            stacklevel=5,
        )


def is_stored(K: Kernel) -> bool:
    """Whether entries of a kernel are stored, so that products in float64 do not compute them anew."""
    return not isinstance(K, ProductOperator) and not _holds_products(K)


def _holds_products(K: object) -> bool:
    parts = K._args if isinstance(K, LinearOperator) else ()
    return any(isinstance(part, ProductOperator) or _holds_products(part) for part in parts)


def largest_eigenvalue(K: Kernel) -> Tensor:
    """Return the largest eigenvalue from below, of the batch shape, by twelve products of a block of four."""
    block = torch.randn(K.shape[-1], 4, generator=torch.Generator().manual_seed(0), dtype=K.dtype)
    block = block.to(K.device).expand(*K.shape[:-2], *block.shape)
    for _ in range(_STEPS):
        block = block / block.abs().amax(-2, keepdim=True)  # first: squares of large numbers overflow
        block = multiply(K, block / torch.linalg.vector_norm(block, dim=-2, keepdim=True))
    return torch.linalg.vector_norm(block.double(), dim=-2).amax(-1)


def raise_by_name(K: Kernel, error: NotConvergedError) -> NoReturn:
    """Raise what is wrong with a kernel whose iteration has failed, or the failure itself.

    Raises:
        InputError: If K is not symmetric.
        SingularKernelError: If K has an eigenvalue below zero that is no rounding.
        NotConvergedError: Otherwise.
    """
    batch = K.shape[:-2]
    for number in range(batch.numel()):
        member = K[batch_position(number, batch)] if batch else K
        member = member.double() if isinstance(member, Tensor) else member.to(dtype=torch.float64)
        space = capabilities(member).space
        negative = functools.partial(_negative, member)  # the largest eigenvalue of -K is the least of K
        work = Lanczos(negative, space, torch.Generator().manual_seed(0))
        try:
            pairs = work.solve(1, tolerance=1e-6, max_products=min(_PRODUCTS, space.size))
        except UnsupportedOperationError as cause:
            raise InputError(
                "the kernel is not symmetric: uᵀ K v and vᵀ K u differ; a fit takes the kernel of one set of "
                "samples with itself, and cross kernels go to predict"
            ) from cause
        least, rounding = (
            -float(pairs.values[0]),
            float(eigenvalue_rounding(torch.tensor(work.scale), K.dtype, space.size)),
        )
        if least < -_INDEFINITE * rounding:
            raise SingularKernelError(
                f"the kernel is not positive semidefinite: it has an eigenvalue {least:.2g} or below, beside "
                f"one of {work.scale:.2g}; look at how it was made, or pass a ridge well above {-least:.2g}"
            ) from error
    raise error


def _negative(K: Kernel, block: Tensor) -> Tensor:
    return -multiply(K, block)


def precise_product(K: Kernel, block: Tensor) -> tuple[Tensor, Tensor]:
    """Return K V in float64 for V in float64, with what rounding may have added to it.

    Entries that are stored are multiplied in float64. Others round by eps |K| |V| in each product whatever
    the vectors are, and V is given to them as the sum of its leading and its trailing digits, so that no more
    than that is added.

    Args:
        K: ``(*batch, m, n)``.
        block: V, ``(*batch, n, k)``, float64.

    Returns:
        ``(*batch, m, k)``, and ``(*batch, k)`` lengths of the errors of its columns, both float64. Cost of a
        lazy float32 kernel: 2 k + 2 product columns.
    """
    with torch.no_grad():
        return _precise(K, block)


def added_share(K: Kernel, columns: Tensor, added: Tensor, what: str = "predictions") -> float:
    """Return the largest share that rounding may have in a column of a product; ``what``: its name.

    Warns:
        RoundingWarning: If it is above 1e-2.
    """
    lengths = capabilities(K).space.sum_squares(columns).sqrt()
    share = torch.where(added > 0, added / lengths, torch.zeros_like(added))
    worst = float(share.max()) if share.numel() else 0.0
    if worst > _ROUNDED:
        warnings.warn(
            f"rounding in products with this {K.dtype} {_OPERANDS[what]} may have added {worst:.2g} of their "
            f"length to the {what}: the coefficients are large beside them; raise the ridge, or compute "
            "the kernels in float64",
            RoundingWarning,
            stacklevel=3,
        )
    return worst


def _precise(K: Kernel, block: Tensor) -> tuple[Tensor, Tensor]:
    none = torch.zeros((*block.shape[:-2], block.shape[-1]), dtype=torch.float64, device=block.device)
    dense = _entries(K, block.shape[-1])
    if dense is not None:
        return _times(dense, block), none
    if isinstance(K, DiagLinearOperator):
        return K._diagonal().double().unsqueeze(-1) * block, none
    if isinstance(K, SumLinearOperator):
        found = [_precise(part, block) for part in K.linear_ops]
        return sum((v for v, _ in found[1:]), start=found[0][0]), sum((e for _, e in found), start=none)
    if isinstance(K, ConstantMulLinearOperator):
        value, error = _precise(K.base_linear_op, block)
        constant = K.expanded_constant.double()
        return constant * value, constant.abs().reshape(*constant.shape[:-2], 1) * error
    if K.dtype == torch.float64:
        return multiply(K, block), none
    spread = capabilities(K).space.is_spread
    space = capabilities(K).domain if spread else Space(block.shape[-2], K.dtype, block.device)
    high = block.to(K.dtype)
    flat = torch.full((space.length, 1), space.size**-0.5, dtype=K.dtype, device=block.device)
    drawn = space.probes(1, torch.Generator().manual_seed(0), "gaussian").to(flat)
    sizes = torch.cat([flat, drawn], dim=-1).expand(*block.shape[:-2], -1, 2)
    made = multiply(K, torch.cat([high, (block - high.double()).to(K.dtype), sizes], dim=-1)).double()
    width = block.shape[-1]
    value = made[..., :width] + made[..., width : 2 * width]
    # |K|: of one direction that all entries add up in, and of all (|K z|² has the mean |K|_F²).
    norm = capabilities(K).space.sum_squares(made[..., 2 * width :]).sqrt().amax(-1, keepdim=True)
    return value, _SHARE * torch.finfo(K.dtype).eps * norm * space.sum_squares(block).sqrt()


def _entries(K: Kernel, columns: int) -> Tensor | None:
    """Return the dense matrix where it is stored, or cheaper than products."""
    if isinstance(K, Tensor):
        return K
    if isinstance(K, DenseLinearOperator):
        return K.tensor
    if not isinstance(K, ProductOperator) or capabilities(K).space.is_spread:
        return None
    K._check_fresh()
    if tensor_bytes(K.shape, K.dtype) > _LARGE:  # not made for one product, though a limit may allow it
        return K._stored_dense()
    return K._dense_if_cheaper(columns)


def _times(dense: Tensor, block: Tensor) -> Tensor:
    """Return a stored matrix times a float64 block, some of its rows in float64 at a time."""
    if dense.dtype == torch.float64:
        return dense @ block
    rows = max(1, _WIDENED // max(1, dense.shape[:-2].numel() * dense.shape[-1]))
    return torch.cat([part.double() @ block for part in dense.split(rows, dim=-2)], dim=-2)
