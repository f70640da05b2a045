"""What is decided by leading eigenvalues and the trace: truncation ranks and redundancies."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import InputError, ZeroKernelError
from ..operators.structure import fits_dense
from ..spectra import RitzPairs
from ._intervals import extremal_quantile
from ._moments import Mean, summarize
from ._request import Operand, require_finite
from ._two_sided import column_dots, project_out

__all__ = ["FIRST", "Trace", "check_options", "clamped", "dense_pays", "require_nonzero", "traces"]

FIRST = 16  # eigenvalues asked for before the captured share is looked at
_DENSE = 1024  # rows up to which all eigenvalues are computed where tiles are cheap
_PROBES = 32  # for the rest of the trace, where its exact value is too dear


def check_options(epsilon: float, tol: float | None, method: str, max_products: int | None) -> None:
    """Raise where an option is out of range.

    Raises:
        InputError: Naming it.
    """
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 < epsilon < 1:
        raise InputError(f"epsilon={epsilon!r}: the share of the trace that may be lost lies between 0 and 1")
    if method not in ("auto", "dense", "lanczos"):
        raise InputError(f"method={method!r}: choose 'auto', 'dense' or 'lanczos'")
    if tol is not None and not 0 < tol < math.inf:
        raise InputError(f"tol={tol!r}: pass a positive tolerance")
    if max_products is not None and (not isinstance(max_products, int) or max_products < 1):
        raise InputError(f"max_products={max_products!r}: pass a positive integer")


def dense_pays(operand: Operand) -> bool:
    """Whether all eigenvalues of the dense matrix cost less than leading ones by products."""
    if operand.size > _DENSE or not fits_dense(operand.operator):
        return False
    return operand.structure.exact_cost("tiles") <= 2 * operand.size * max(operand.cost, 1)


def clamped(values: Tensor) -> Tensor:
    """Return all eigenvalues ``(*batch, n)``, largest first, with negative ones of rounding size as zero.

    Raises:
        InputError: If negative eigenvalues are more than rounding.
        ZeroKernelError: If a kernel is zero.
    """
    if bool((values[..., -1] < -1e-3 * values[..., 0].abs()).any()):
        raise InputError(
            f"the operator is not positive semidefinite: its eigenvalues reach down to "
            f"{float(values.min()):.2g}, the largest is {float(values.max()):.2g}; a share of the trace has "
            "no meaning then"
        )
    values = values.clamp(min=0)
    require_nonzero(values.sum(-1))
    return values


def require_nonzero(total: Tensor) -> None:
    """Raise where a trace is zero.

    Raises:
        ZeroKernelError: If one is.
    """
    if bool((total <= 0).any()):
        raise ZeroKernelError(
            "a share of the trace is undefined: a kernel has no positive trace; does the output depend on "
            "the selected parameters?"
        )


def traces(operand: Operand) -> Tensor | None:
    """Return the exact trace of each member of a batch, ``(b,)``, or None where that is too dear."""
    if operand.structure.exact_cost("diagonal") > _PROBES * operand.cost * 32:
        return None
    found = require_finite(operand.rows.sum(operand.structure.diagonal()), "the trace").cpu().reshape(-1)
    require_nonzero(found)
    return found


class Trace:
    """The trace of one operator, exact, or by probes for what lies outside the eigenvectors found so far.

    Args:
        operand: One square operator.
        exact: Its exact trace, or None.
        generator: Draws the probes.
    """

    def __init__(self, operand: Operand, exact: Tensor | None, generator: torch.Generator) -> None:
        self._exact = exact
        self._space = operand.rows
        if exact is None:
            self._probes = self._space.probes(_PROBES, generator)
            self._products = operand.multiply(self._probes)

    def ends(self, pairs: RitzPairs) -> tuple[Tensor, Tensor, Tensor]:
        """Return low end, value and high end of the 95 % interval."""
        if self._exact is not None:
            return self._exact, self._exact, self._exact
        known = pairs.values.clamp(min=0).cpu().sum()
        moments = [Mean(self._samples(pairs).clamp(min=0), known)]
        summary = summarize(moments, lambda values: values[..., 0])
        width = extremal_quantile(0.05, summary.freedom + 1) * summary.stderr
        return (summary.value - width).clamp(min=known), summary.value, summary.value + width

    def _samples(self, pairs: RitzPairs) -> Tensor:
        """Return vᵀ (I - QQᵀ) K (I - QQᵀ) v, with K Q = Q Λ up to the residuals."""
        outside = project_out(self._space, pairs.vectors, self._probes)
        products = project_out(self._space, pairs.vectors, self._products)
        return column_dots(self._space, outside, products).cpu()
