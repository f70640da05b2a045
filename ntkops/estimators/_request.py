"""What is common to all estimators: the request, its checks, and the counting of products."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..errors import DeviceError, DtypeError, InputError, ShapeError
from ..operators.counting import column_space, multiply, product_cost
from ..operators.structure import Structure, structure
from ..vectors import Space, resolve_generator

__all__ = ["Operand", "Request", "require_same_shape"]

_DEFAULT_RTOL = 1e-2


@dataclass
class Request:
    """A checked request for one estimate.

    Attributes:
        rtol: Relative tolerance, or None when only a number of passes was given.
        num_passes: Cap on passes, or None.
        method: Name of the method, one of ``methods`` or "auto".
        generator: CPU generator of the probes.
        seed: What reproduces them.
        progress: Whether to show a bar.
    """

    rtol: float | None
    num_passes: int | None
    method: str
    generator: torch.Generator
    seed: int
    progress: bool
    started: float = field(default_factory=time.perf_counter)

    @classmethod
    def check(
        cls,
        rtol: float | None,
        num_passes: int | None,
        method: str,
        methods: Sequence[str],
        generator: torch.Generator | None,
        progress: bool,
    ) -> Request:
        """Check the arguments that all estimators take.

        Args:
            rtol: Relative tolerance or None.
            num_passes: Cap on passes or None.
            method: The method asked for.
            methods: The methods there are.
            generator: CPU generator or None.
            progress: Whether to show a bar.

        Returns:
            The request.

        Raises:
            InputError: If one of them is not understood.
        """
        if method not in ("auto", *methods):
            raise InputError(f"method={method!r}: choose 'auto' or one of {', '.join(map(repr, methods))}")
        if rtol is not None and not 0 < rtol < 1:
            raise InputError(f"rtol={rtol!r}: a relative tolerance lies between 0 and 1")
        if num_passes is not None and (
            not isinstance(num_passes, int) or isinstance(num_passes, bool) or num_passes < 1
        ):
            raise InputError(f"num_passes={num_passes!r}: pass a positive number of passes")
        if rtol is None and num_passes is None:
            rtol = _DEFAULT_RTOL
        generator, seed = resolve_generator(generator)
        return cls(rtol, num_passes, method, generator, seed, progress)

    @property
    def seconds(self) -> float:
        """Wall-clock time since the request was made."""
        return time.perf_counter() - self.started


class Operand:
    """An operator or tensor as estimators see it: products that are counted, and its structure.

    Args:
        operator: ``(*batch, m, n)``.
    """

    def __init__(self, operator: LinearOperator | Tensor) -> None:
        self.structure: Structure = structure(operator)
        self.operator = operator
        self.shape, self.dtype = self.structure.shape, self.structure.dtype
        self.device = self.structure.device

    @property
    def batch_shape(self) -> torch.Size:
        """Shape of the batch."""
        return self.shape[:-2]

    @property
    def size(self) -> int:
        """Number of columns n."""
        return self.shape[-1]

    @property
    def space(self) -> Space:
        """The space of the columns, in which probes are drawn."""
        return column_space(self.operator)

    @property
    def passes_per_column(self) -> int:
        """Passes that one product column takes, an estimate for planning."""
        return max(1, product_cost(self.operator))

    def multiply(self, block: Tensor) -> Tensor:
        """Return K V for ``(n, k)`` or ``(*batch, n, k)``, checked to be finite.

        Raises:
            NonFiniteError: If the product holds NaN or infinity.
        """
        return multiply(self.operator, block)

    def require_square(self, quantity: str) -> None:
        """Raise if the operator is not square.

        Raises:
            ShapeError: Naming the quantity that needs it.
        """
        if self.shape[-1] != self.shape[-2]:
            raise ShapeError(f"{quantity} needs a square operator, this one is {tuple(self.shape)}")


def require_same_shape(first: Operand, second: Operand) -> None:
    """Raise if two operators cannot be compared entry by entry.

    Raises:
        ShapeError: If their shapes differ.
        DtypeError: If their dtypes differ.
        DeviceError: If they live on different devices.
    """
    if first.shape != second.shape:
        raise ShapeError(f"the operators have shapes {tuple(first.shape)} and {tuple(second.shape)}")
    if first.dtype != second.dtype:
        raise DtypeError(
            f"the operators have dtypes {first.dtype} and {second.dtype}; cast one with .to(dtype)"
        )
    if first.device != second.device:
        raise DeviceError(
            f"the operators live on {first.device} and {second.device}; move one with .to(device)"
        )
