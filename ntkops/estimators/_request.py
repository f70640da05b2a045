"""What an estimator is asked, checked before any work is done, and the operators it is asked about."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..engines import spare_passes
from ..errors import (
    DeviceError,
    DtypeError,
    InputError,
    NonFiniteError,
    ShapeError,
    UnsupportedOperationError,
)
from ..operators.capabilities import capabilities, multiply
from ..operators.sandwich import smaller_side
from ..vectors import Space, resolve_generator

__all__ = ["Operand", "Request", "factors_of", "operands", "require_finite", "spectral_operand"]

DEFAULT_RTOL = 1e-2


@dataclass(frozen=True)
class Request:
    """A checked request for one estimate.

    Attributes:
        method: "auto" or the name of a method.
        rtol: Relative tolerance, or None when only a number of passes was given.
        num_passes: Most passes that may be spent, or None.
        generator: CPU generator of the probes.
        seed: What reproduces them.
        progress: Whether to show a bar.
    """

    method: str
    rtol: float | None
    num_passes: int | None
    generator: torch.Generator
    seed: int
    progress: bool

    @classmethod
    def check(
        cls,
        methods: Sequence[str],
        *,
        method: str,
        rtol: float | None,
        num_passes: int | None,
        generator: torch.Generator | None,
        progress: bool,
    ) -> Request:
        """Check the arguments that all estimators take."""
        if method not in ("auto", *methods):
            raise InputError(f"method={method!r}: choose 'auto' or one of {', '.join(map(repr, methods))}")
        if rtol is not None and not (_is_number(rtol) and 0 < rtol < 1):
            raise InputError(f"rtol={rtol!r}: a relative tolerance is a number between 0 and 1")
        if num_passes is not None and not (_is_integer(num_passes) and num_passes > 0):
            raise InputError(f"num_passes={num_passes!r}: pass a positive integer")
        if rtol is None and num_passes is None:
            rtol = DEFAULT_RTOL
        generator, seed = checked_generator(generator)
        return cls(method, rtol, num_passes, generator, seed, bool(progress))

    def shared(self, space: Space) -> Request:
        """Return the request with the generator of the first of the processes that share a space."""
        generator = space.common(self.generator)
        return replace(self, generator=generator, seed=generator.initial_seed())

    def capped(self) -> AbstractContextManager[None]:
        """Return what keeps caches from being made, if there is a cap."""
        # Rows that are spread over processes would else be given other probes than those of one process.
        return nullcontext() if self.num_passes is None else spare_passes(0)

    def allows(self, passes: float) -> bool:
        """Whether so many passes in all stay below the cap."""
        return self.num_passes is None or passes <= self.num_passes


def checked_generator(
    generator: torch.Generator | None, space: Space | None = None
) -> tuple[torch.Generator, int]:
    """Return a CPU generator and its seed."""
    if generator is not None and not isinstance(generator, torch.Generator):
        raise InputError(
            f"generator={generator!r}: pass None or a torch.Generator, such as "
            "torch.Generator().manual_seed(0)"
        )
    found, seed = resolve_generator(generator)
    if space is None:
        return found, seed
    found = space.common(found)
    return found, found.initial_seed()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


class Operand:
    """An operator or a dense tensor as estimators see it: counted products, and its `Capabilities`.

    Args:
        operator: ``(*batch, n, m)``.

    Raises:
        InputError: If it is neither a LinearOperator nor a tensor.
        ShapeError: If it is not a matrix, or is empty.
        DtypeError: If it is not of a real floating dtype.
    """

    def __init__(self, operator: LinearOperator | Tensor) -> None:
        if not isinstance(operator, LinearOperator | Tensor):
            raise InputError(f"expected a LinearOperator or a torch.Tensor, got {type(operator).__name__}")
        self.operator = operator
        if operator.dim() >= 2:
            self.capabilities = capabilities(operator)
            self.rows: Space = self.capabilities.space  # of the rows
            self.columns: Space = self.capabilities.domain  # of the vectors that it multiplies
        if operator.dim() < 2 or 0 in (*operator.shape[:-2], self.rows.size, self.columns.size):
            raise ShapeError(
                f"expected a matrix (*batch, n, m) with entries, got shape {tuple(operator.shape)}"
            )
        if not operator.dtype.is_floating_point:
            raise DtypeError(f"expected a real floating dtype, got {operator.dtype}; cast the operator first")
        self.shape: torch.Size = operator.shape
        self.batch_shape: torch.Size = operator.shape[:-2]
        self.size: int = self.columns.size  # of a vector that it multiplies
        self.dtype: torch.dtype = operator.dtype
        self.device = self.capabilities.device
        # Sums of n terms of one sign, added in about √n blocks, are off by a walk of √n steps: n^(1/4) units.
        # Some 5 of them were seen at n = 200, for batched products with one column.
        self.rounding: float = torch.finfo(self.dtype).eps * max(1.0, self.size**0.25)

    @cached_property
    def cost(self) -> int:
        """Passes of a product with one column."""
        return int(self.capabilities.product_cost())

    @cached_property
    def cache_cost(self) -> float:
        """The most passes that caches may take once."""
        return float(self.capabilities.cache_cost())

    def multiply(self, block: Tensor) -> Tensor:
        """Return K V for ``(*batch, m, k)``, counted and finite."""
        return multiply(self.operator, block)

    def pull(self, block: Tensor) -> Tensor:
        """Return Kᵀ U for ``(*batch, n, k)``, counted and finite."""
        return multiply(self.operator.mT, block)

    @property
    def is_square(self) -> bool:
        """Whether the operator is square."""
        return self.rows.matches(self.columns)

    def require_square(self, quantity: str) -> None:
        """Raise if the operator is not square."""
        if not self.is_square:
            raise ShapeError(f"{quantity} needs a square operator, this one is {tuple(self.shape)}")


def operands(*operators: LinearOperator | Tensor) -> list[Operand]:
    """Return the operands of a quantity, which must be comparable entry by entry."""
    found = [Operand(operator) for operator in operators]
    first = found[0]
    for other in found[1:]:
        if first.shape != other.shape or not first.rows.matches(other.rows):
            shapes = sorted((tuple(first.shape), tuple(other.shape)), key=len)
            way = ""
            if len(shapes[0]) < len(shapes[1]) and shapes[1][-2:] == shapes[0]:
                way = f"; a batch of kernels takes one for each, such as one.expand{shapes[1]}"
            raise ShapeError(f"the operators have shapes {tuple(first.shape)} and {tuple(other.shape)}{way}")
        if first.dtype != other.dtype:
            raise DtypeError(
                f"the operators have dtypes {first.dtype} and {other.dtype}; use .to(dtype) on one"
            )
        if first.device != other.device:
            raise DeviceError(
                f"the operators live on {first.device} and {other.device}; use .to(device) on one"
            )
    return found


def factors_of(operand: Operand) -> tuple[Operand, Operand]:
    """Return L and R with K = L Rᵀ; one and the same object where K is symmetric."""
    found = operand.capabilities.factors()
    if found is None:
        raise UnsupportedOperationError(
            f"one-sided estimators need the factors of K = L Rᵀ, and {type(operand.operator).__name__} has "
            "none; use method='hutch++' or 'hutchinson', or estimate the terms of a sum one by one"
        )
    left = Operand(found[0])
    return left, left if operand.capabilities.symmetric or found[1] is found[0] else Operand(found[1])


def spectral_operand(operator: LinearOperator | Tensor, method: str) -> list[Operand]:
    """Return the operand of a quantity that zero eigenvalues do not change: LᵀL where L Lᵀ is larger.

    A kernel of samples stays, which has methods of its own; and so does what is to be sampled in a way that
    has a name, since that is a way on this side.
    """
    (found,) = operands(operator)
    stays = found.capabilities.of_samples or method not in ("auto", "exact")
    other = None if stays else smaller_side(operator)
    return [found] if other is None else operands(other)


def require_finite(values: Tensor, what: str) -> Tensor:
    """Return the values."""
    if not bool(torch.isfinite(values).all()):
        raise NonFiniteError(f"{what} is not finite: the operator has entries that are NaN or infinite")
    return values
