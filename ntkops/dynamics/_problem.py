"""What is trained on what: kernel, targets and offset, checked before any work."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import DtypeError, InputError, OutOfRangeError, ShapeError
from ..operators.capabilities import capabilities, multiply
from ..regression._operands import (
    Kernel,
    Layout,
    is_spread,
    may_be_dense,
    read_kernel,
    read_labels,
    require_finite,
)
from ..regression._rounding import is_stored
from ..regression._snapshots import network_labels
from ..vectors import Space
from ._filters import Filter

__all__ = [
    "Offset",
    "Problem",
    "check_positive",
    "check_tolerance",
    "one_hot",
    "read_offset",
    "read_problem",
    "read_times",
]


@dataclass(frozen=True, eq=False)
class Offset:
    """What training starts from.

    Attributes:
        kind: "zero", "network", "constant" (the same for every sample) or "given" (outputs of the samples).
        values: A constant, or None.
    """

    kind: str
    values: Any = None

    def at(self, K: Kernel, layout: Layout, samples: int) -> Tensor | None:
        """Return the offset at the rows of a kernel, ``(N, *tail)`` in float64; None for zero."""
        if self.kind == "zero":
            return None
        shape = (samples, *layout.tail)
        values = network_labels(K, layout, shape) if self.kind == "network" else self.values.expand(shape)
        return require_finite(values, "the offset").double()


@dataclass(frozen=True, eq=False)
class Problem:
    """Training of f = offset + K a towards labels.

    Attributes:
        K: ``(*batch, n, n)``.
        layout: How labels and right-hand sides belong together.
        offset: What training starts from.
        start: ``(N, *tail)`` outputs at the start, float64; None for zero.
        targets: ``(N, *tail)`` labels, float64.
        rhs: ``(*batch, n, k)`` targets minus start, float64.
        space: The space of the rows.
        shift: What weight decay adds to the eigenvalues of K.
        cache: What was made of K, for whoever trains on it again.
    """

    K: Kernel
    layout: Layout
    offset: Offset
    start: Tensor | None
    targets: Tensor
    rhs: Tensor
    space: Space
    shift: float = 0.0
    cache: dict[str, Any] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the kernel."""
        return self.K.dtype

    @property
    def count(self) -> int:
        """Number of labels in all, which a mean is taken over."""
        return self.space.size * self.rhs.shape[:-2].numel() * self.rhs.shape[-1]

    @property
    def is_dense(self) -> bool:
        """Whether a dense kernel may be made here."""
        return not is_spread(self.K) and may_be_dense(self.K)

    def span(self, filters: Filter) -> Tensor:
        """Return what eigenvalues of K are multiplied by in the course of training, ``(T,)``."""
        return filters.span().clamp(max=1.4 / self.shift) if self.shift > 0 else filters.span()

    def output_bound(self, residual: Tensor, dual: Tensor) -> Tensor:
        """Return a bound of the errors of Y - p(A) r - shift q(A) r, from those of p(A) r and q(A) r."""
        # f = Y - (r - K a) and r - K a = p(A) r + shift q(A) r, since 1 - x q = p for x = λ + shift
        return residual + self.shift * dual if self.shift > 0 else residual

    # products

    def multiply(self, block: Tensor) -> Tensor:
        """Return K V in float64 for ``(*batch, n, k)`` in float64: in float64 where entries are stored."""
        # Stored entries can be read in any dtype, and their products then round in float64; a lazy product is
        # made in the kernel's.
        if is_stored(self.K):
            return multiply(self._stored(), block)
        return multiply(self.K, block.to(self.dtype)).double()

    def _stored(self) -> Kernel:
        if self.K.dtype == torch.float64:
            return self.K
        if "stored" not in self.cache:
            double = self.K.double() if isinstance(self.K, Tensor) else self.K.to(dtype=torch.float64)
            self.cache["stored"] = double
        found: Kernel = self.cache["stored"]
        return found

    def multiply_columns(self, block: Tensor, used: Tensor) -> Tensor:
        """Return K V for some of p columns ``(n, ·)`` that lie side by side as in `flat`."""
        if not self.rhs.shape[:-2]:
            return self.multiply(block)
        # (n, p): a member of a batch has a kernel of its own, so that its column stays in its place, and idle
        # ones are zero
        full = block.new_zeros((block.shape[0], len(used)))
        full[:, used] = block
        return self.flat(self.multiply(full.mT.unsqueeze(-1)))[:, used]

    # shapes: right-hand sides (*batch, n, k), with batch or k of one, beside columns (n, p)

    def flat(self, block: Tensor) -> Tensor:
        """Return ``(n, p)`` from ``(*batch, n, k)``."""
        return block.squeeze(-1).mT if self.rhs.dim() == 3 else block

    def blocks(self, columns: Tensor) -> Tensor:
        """Return ``(..., *batch, n, k)`` from ``(..., n, p)``."""
        return columns.mT.unsqueeze(-1) if self.rhs.dim() == 3 else columns

    def numbers(self, values: Tensor) -> Tensor:
        """Return ``(..., *batch, k)`` from ``(..., p)``."""
        return values.unsqueeze(-1) if self.rhs.dim() == 3 else values

    def lengths(self, block: Tensor) -> Tensor:
        """Return lengths of columns ``(*batch, k)``."""
        return self.space.sum_squares(block).sqrt()

    def norm(self, block: Tensor) -> float:
        """Return the length of all columns together."""
        return float(self.lengths(block).square().sum().sqrt())


def read_problem(K: Any, Y: Any, offset: Any, *, classes: bool = False) -> Problem:
    """Check kernel, labels and offset."""
    K = read_kernel(K)
    space = capabilities(K).space
    if not space.matches(capabilities(K).domain):
        raise ShapeError(
            f"training takes the square kernel of the training samples, this one is {tuple(K.shape)}; cross "
            "kernels go to predict"
        )
    if classes:
        Y = one_hot(Y, K, offset)
    layout, labels = read_labels(Y, K.shape, K.dtype, K.device, space if is_spread(K) else None)
    origin = read_offset(offset, tuple(labels.shape), K)
    start = origin.values if origin.kind == "given" else origin.at(K, layout, labels.shape[0])
    targets = labels.double()
    rhs = layout.columns(targets if start is None else targets - start)
    return Problem(K, layout, origin, start, targets, rhs, space)


def read_offset(offset: Any, shape: tuple[int, ...], K: Kernel) -> Offset:
    """Return what training starts from."""
    if offset is None:
        return Offset("zero")
    if isinstance(offset, str):
        if offset != "network":
            raise InputError(f"offset={offset!r}: None, 'network', a number or a tensor")
        return Offset("network")
    if isinstance(offset, Tensor) and offset.dtype != K.dtype:
        raise DtypeError(f"the kernel has dtype {K.dtype}, the offset {offset.dtype}; cast one of them")
    try:
        values = torch.as_tensor(offset, dtype=K.dtype, device=K.device).detach()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"offset={offset!r}: None, 'network', a number or a tensor") from error
    require_finite(values, "the offset")
    if tuple(values.shape) == shape:
        return Offset("given", values.double())
    if values.dim() < len(shape):
        try:
            values.expand(shape[1:])
        except RuntimeError:
            pass
        else:
            return Offset("constant", values.double())
    raise ShapeError(
        f"offset of shape {tuple(values.shape)} fits neither the labels {shape} nor those of one sample"
    )


def one_hot(Y: Any, K: Kernel, offset: Any) -> Tensor:
    """Return probabilities of classes from class numbers, or check the probabilities given."""
    if not isinstance(Y, Tensor):
        raise InputError(f"Y: expected a tensor of class numbers or probabilities, got {type(Y).__name__}")
    if Y.dtype.is_floating_point:
        sums = Y.sum(-1) if Y.dim() > 1 else Y
        eps = 1e3 * torch.finfo(Y.dtype).eps
        if Y.dim() < 2 or bool((-eps > Y).any()) or bool((sums - 1).abs().gt(eps).any()):
            raise InputError(
                "loss='cross_entropy' takes class numbers (N,), or probabilities (N, C) that are not "
                "negative and sum to 1"
            )
        return Y
    if Y.dim() != 1:
        raise InputError(f"class numbers need shape (N,), got {tuple(Y.shape)}")
    samples = sum(capabilities(K).space.share(len(Y)))
    if len(K.shape) == 3:
        classes = K.shape[0]
    elif capabilities(K).space.size % samples == 0 and capabilities(K).space.size > samples:
        classes = capabilities(K).space.size // samples
    elif isinstance(offset, Tensor) and offset.dim():
        classes = offset.shape[-1]
    else:
        raise InputError(
            f"{samples} class numbers beside a kernel of {capabilities(K).space.size} rows do not tell "
            "how many classes there are: pass probabilities, torch.nn.functional.one_hot(Y).to(K.dtype), or "
            "a kernel over all outputs"
        )
    if len(Y) and not 0 <= int(Y.min()) <= int(Y.max()) < classes:
        raise OutOfRangeError(f"classes go from 0 to {classes - 1}, the labels from {Y.min()} to {Y.max()}")
    return torch.nn.functional.one_hot(Y.long(), classes).to(K.dtype)


def read_times(given: Any, what: str, *, whole: bool, device: Any) -> Tensor:
    """Return times, or numbers of steps, as a float64 vector."""
    single = isinstance(given, int | float) and not isinstance(given, bool)
    numbers = [given] if single else given
    if not isinstance(numbers, Sequence | Tensor) and not hasattr(numbers, "__array__"):
        raise InputError(f"{what}={given!r}: pass numbers, from the first to the last")
    try:
        times = torch.as_tensor(numbers, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{what}={given!r}: pass numbers, from the first to the last") from error
    if times.dim() != 1 or not len(times):
        raise InputError(f"{what}: pass a list with one number or more, got shape {tuple(times.shape)}")
    if bool(times.isnan().any()) or bool((times < 0).any()):
        raise InputError(f"{what}={given!r}: they are 0 or more, and none is NaN")
    if bool((times.diff() <= 0).any()):
        raise InputError(f"{what}={given!r}: each has to be greater than the one before")
    if whole and not bool((times == times.floor()).all() and times.isfinite().all()):
        raise InputError(f"{what}={given!r}: pass whole numbers; t = ∞ is for gradient_flow")
    return times.to(device or "cpu")


def check_positive(value: float, name: str, *, zero: bool = False) -> None:
    """Raise unless a number is positive and finite, or zero where that is allowed."""
    if not math.isfinite(value) or value < 0 or value == 0 and not zero:
        raise InputError(f"{name}={value!r}: pass a finite number, {'0 or more' if zero else 'more than 0'}")


def check_tolerance(tol: float, max_products: int | None) -> None:
    """Raise unless a tolerance and a limit of products mean something."""
    if not 0 < tol < 1:
        raise InputError(f"tol={tol!r}: pass a relative error between 0 and 1")
    if max_products is not None and max_products < 1:
        raise InputError(f"max_products={max_products!r}: pass a positive number of products, or None")
