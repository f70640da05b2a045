"""Kernels, labels and ridges as given."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..errors import (
    DenseMemoryError,
    DeviceError,
    DtypeError,
    InputError,
    NonFiniteError,
    ShapeError,
    ZeroKernelError,
)
from ..estimators import diagonal
from ..operators.capabilities import capabilities, dense_bytes_allowed, fits_dense, taken_columns
from ..vectors import Space

__all__ = [
    "Kernel",
    "Layout",
    "check_cutoff",
    "dense_of",
    "dense_rows",
    "is_spread",
    "may_be_dense",
    "mean_diagonal",
    "read_array",
    "read_kernel",
    "read_labels",
    "read_ridges",
    "to_float64",
]


_GRID = tuple(10.0 ** (exponent / 2) for exponent in range(-20, 5))  # 1e-10 ... 1e2


def read_ridges(given: Any, criteria: tuple[str, ...] = ("loo",)) -> tuple[float, ...]:
    """Return the ridges that a user named: one, several, or the grid for a criterion.

    Raises:
        InputError: If one of them is not a finite number ≥ 0, or there is none.
    """
    if isinstance(given, str):
        if given not in criteria:
            names = " or ".join(map(repr, criteria))
            raise InputError(f"ridge={given!r}: a number, a list of numbers, or {names}")
        return _GRID
    ridges = [given] if isinstance(given, int | float) else list(given)
    if not ridges:
        raise InputError("ridge=[]: name at least one ridge")
    for ridge in ridges:
        number = isinstance(ridge, int | float) and not isinstance(ridge, bool) and math.isfinite(ridge)
        if not number or ridge < 0:
            raise InputError(
                f"ridge={ridge!r}: a ridge is a finite number, 0 or more; with relative=True 1e-4 means "
                "1e-4 times the mean diagonal of the kernel"
            )
    return tuple(float(ridge) for ridge in ridges)


def check_cutoff(cutoff: Any, size: int) -> None:
    """Check a spectral cut-off of a kernel with ``size`` rows.

    Raises:
        InputError: If it is neither None, a number of eigenpairs, nor a share of the trace.
    """
    if cutoff is None:
        return
    if isinstance(cutoff, int) and not isinstance(cutoff, bool) and 1 <= cutoff <= size:
        return
    if isinstance(cutoff, float) and 0 < cutoff < 1:
        return
    raise InputError(
        f"cutoff={cutoff!r}: a number of eigenpairs from 1 to {size}, or the share of the trace to lose, a "
        "float between 0 and 1"
    )


# -- kernels as the regression sees them: checked, multiplied, and dense only where that is allowed


Kernel: TypeAlias = LinearOperator | Tensor


def read_kernel(K: Any, what: str = "the kernel", dtype: torch.dtype | None = None) -> Kernel:
    """Return an operator or a tensor, its entries checked where they are stored.

    Args:
        K: An operator, a tensor, or an array or list of numbers.
        what: Its name in messages.
        dtype: Dtype that arrays and lists are cast to; None for their own.

    Raises:
        InputError: If it is neither an operator, a tensor nor a dense array of real numbers.
        ShapeError: If it is not a matrix with entries.
        DtypeError: If it is neither float32 nor float64 (or bfloat16 of an operator).
        NonFiniteError: If a stored entry is NaN or infinite.
    """
    if not isinstance(K, LinearOperator | Tensor):
        K = read_array(K, what, dtype)
        K = K if K.dtype.is_floating_point else K.double()
    if K.dim() < 2:
        raise ShapeError(
            f"{what} needs shape (*batch, n, m), got {tuple(K.shape)}. Reshape your data: one row for each "
            "sample, one column for each that the fit has seen"
        )
    if 0 in (*K.shape[:-2], capabilities(K).space.size, capabilities(K).domain.size):
        raise ShapeError(
            f"{what} needs entries: {K.shape[-1]} feature(s) (shape={tuple(K.shape)}) while a minimum of 1 "
            "is required."
        )
    if not K.dtype.is_floating_point:
        raise DtypeError(f"{what} has dtype {K.dtype}; cast it to a floating dtype")
    if isinstance(K, Tensor):
        require_finite(K, what)
        return K.detach()
    return K


def read_array(given: Any, what: str, dtype: torch.dtype | None = None) -> Tensor:
    """Return what is no tensor as one: arrays, lists and what turns into arrays, integers as float64.

    Args:
        given: What a user passed.
        what: Its name in messages.
        dtype: Dtype to cast floating numbers to, as scikit-learn does; None for that of the array.

    Raises:
        InputError: If it is sparse, complex, or nothing that turns into an array.
        DtypeError: If it holds strings or objects that are no numbers.
        ShapeError: If its rows are of unlike length.
    """
    if hasattr(given, "tocsr"):
        raise InputError(f"{what}: sparse input is not supported; pass its dense array, .toarray()")
    if not hasattr(given, "__array__") and not isinstance(given, list | tuple):
        raise InputError(
            f"{what}: expected a LinearOperator, a torch.Tensor or an array, got {type(given).__name__}"
        )
    try:
        array = np.asarray(given)
    except ValueError as error:  # rows of unlike length
        raise ShapeError(f"{what} is no array: {error}") from error
    if array.dtype.kind == "c":
        raise InputError(f"{what}: Complex data not supported, got {array.dtype}")
    if array.dtype.kind not in "fiub":
        try:
            array = array.astype(np.float64)
        except (TypeError, ValueError) as error:
            raise DtypeError(
                f"{what} has dtype {array.dtype} and holds what is no number: {error}"
            ) from error
    tensor = torch.from_numpy(np.array(array))  # a copy: an array may be read-only, a tensor may not
    return tensor if dtype is None or not tensor.dtype.is_floating_point else tensor.to(dtype)


def require_finite(values: Tensor, what: str) -> Tensor:
    """Return the values.

    Raises:
        NonFiniteError: If one of them is NaN or infinite, naming the first.
    """
    if not bool(torch.isfinite(values).all()):
        where = tuple((~torch.isfinite(values)).nonzero()[0].tolist())
        raise NonFiniteError(
            f"{what} is NaN or infinite at {where}: the network's gradients overflow {values.dtype} "
            "there, or "
            "the input is not finite; compute it in float64 or drop that sample"
        )
    return values


def mean_diagonal(K: Kernel) -> float:
    """Return the mean of the diagonal over rows and classes, exact.

    Raises:
        InputError: If an entry is negative, so that no kernel is positive semidefinite with it.
        ZeroKernelError: If it is not positive, so that nothing is relative to it.
    """
    entries = K.diagonal(dim1=-2, dim2=-1) if isinstance(K, Tensor) else diagonal(K, method="exact").value
    space = capabilities(K).space
    entries = require_finite(entries.double(), "the diagonal of the kernel")
    if space.any(bool((entries < 0).any())):
        raise InputError(
            f"the kernel is not positive semidefinite: its diagonal has an entry {float(entries.min()):.3g}"
        )
    mean = float(space.sum(entries).mean()) / space.size
    if not mean > 0:
        raise ZeroKernelError(
            f"the mean diagonal of the kernel is {mean:.3g}, so that no ridge is relative to it: "
            "check that the "
            "selected parameters reach the output, or pass relative=False"
        )
    return mean


def is_spread(K: Kernel) -> bool:
    """Whether the rows of a kernel lie on several processes."""
    return capabilities(K).space.is_spread


def may_be_dense(K: Kernel) -> bool:
    """Whether the dense matrix may be made: no part's limit of bytes or of backward passes forbids it."""
    return fits_dense(K)


def to_float64(K: Kernel, method: str) -> Tensor:
    """Return the dense matrix in float64, as factorisations want it.

    Raises:
        DenseMemoryError: If the operator's limit forbids it; the message names the lazy ways.
        BackwardLimitError: If that of its engine does.
    """
    if isinstance(K, Tensor):
        return K.double()
    if K.shape.numel() * K.dtype.itemsize > dense_bytes_allowed(K):
        raise DenseMemoryError(
            f"method={method!r} needs the dense {'x'.join(map(str, K.shape))} kernel, which its "
            "max_dense_bytes forbids; raise it, or take method='cg', 'lsmr' or 'nystrom'"
        )
    return require_finite(dense_of(K), "the kernel").double()


def dense_of(K: LinearOperator) -> Tensor:
    """Return the dense matrix of an operator, without a graph."""
    with torch.no_grad():
        return K.to_dense()


def dense_rows(K: Kernel, start: int, stop: int) -> Tensor:
    """Return rows of a cross kernel, ``(*batch, stop - start, n)``, in float64.

    Where a dense block is forbidden they are made as columns of the transpose.
    """
    if isinstance(K, Tensor):
        return K[..., start:stop, :].double()
    with torch.no_grad():
        if may_be_dense(K):
            block = K[..., start:stop, :].to_dense()
        else:
            block = taken_columns(K.mT, torch.arange(start, stop)).mT
    return require_finite(block, "the cross kernel").double()


# -- how labels and kernels meet: one kernel for all targets, one for each, or one over samples and outputs


_FLOATS = "float32 or float64"


@dataclass(frozen=True)
class Layout:
    """Where the entries of labels ``(N, ...)`` stand in the right-hand sides of a kernel.

    Attributes:
        kind: "shared": K is ``(N, N)`` and every target is a column. "each": K is ``(C, N, N)``, class c
            has its own kernel. "flat": K is ``(N·O, N·O)`` and the labels are one column, sample-major.
        tail: Shape of the labels of one sample; ``()`` for one number a sample.
    """

    kind: Literal["shared", "each", "flat"]
    tail: tuple[int, ...]

    @property
    def group(self) -> int:
        """Rows of the kernel that belong to one sample."""
        return math.prod(self.tail) if self.kind == "flat" else 1

    def columns(self, labels: Tensor) -> Tensor:
        """Return labels ``(N, *tail)`` as right-hand sides ``(*batch, n, k)``."""
        if self.kind == "each":
            return labels.reshape(len(labels), math.prod(self.tail)).mT.unsqueeze(-1)
        if self.kind == "flat":
            return labels.reshape(-1, 1)
        return labels.reshape(len(labels), math.prod(self.tail))

    def restore(self, columns: Tensor) -> Tensor:
        """Return right-hand sides ``(*batch, n, k)`` as labels ``(N, *tail)``."""
        return self.restore_rows(columns.squeeze(-1)) if self.kind == "each" else self._reshape(columns)

    def restore_rows(self, rows: Tensor) -> Tensor:
        """Return one number for each row of the kernels, ``(*batch, n)``, sample by sample."""
        if self.kind == "each":
            return rows.mT.reshape(rows.shape[-1], *self.tail)  # also for a process that has no rows
        return self._reshape(rows) if self.kind == "flat" else rows

    def _reshape(self, values: Tensor) -> Tensor:
        samples = values.shape[0] // self.group
        return values.reshape(samples, *self.tail)

    def check_rows(self, shape: torch.Size, columns: int) -> None:
        """Raise unless ``(*batch, m, n)`` is the shape of a cross kernel of this layout.

        Raises:
            ShapeError: If it is not.
        """
        batch = (math.prod(self.tail),) if self.kind == "each" else ()
        fits = tuple(shape[:-2]) == batch and shape[-1] == columns and shape[-2] % self.group == 0
        if len(shape) < 2 or not fits:
            due = (*batch, f"M*{self.group}" if self.kind == "flat" else "M", columns)
            raise ShapeError(
                f"the cross kernel has shape {tuple(shape)}, due is ({', '.join(map(str, due))}): "
                "rows are the "
                "new samples, columns those of the fit, as K.cross(x_new) returns it (X has "
                f"{shape[-1] if shape else 0} features, but KernelRidge is expecting {columns} features as "
                "input)"
            )


def read_labels(
    labels: Any, shape: torch.Size, dtype: torch.dtype, device: Any, space: Space | None = None
) -> tuple[Layout, Tensor]:
    """Check labels against the kernel that they are to be fitted with.

    Args:
        labels: ``(N,)`` or ``(N, ...)``: a tensor in the kernel's dtype, or an array or list of numbers.
        shape: Shape of the kernel, ``(*batch, n, n)``.
        dtype: Dtype of the kernel.
        device: Device of the kernel.
        space: The space of its rows, where they lie on several processes.

    Returns:
        The layout, and a copy of the labels as a tensor.

    Raises:
        InputError: If they are missing, or integers: classes are no numbers to regress on.
        DtypeError: If their dtype is not the kernel's.
        DeviceError: If they live elsewhere.
        ShapeError: If they do not fit the kernel.
        NonFiniteError: If one of them is NaN or infinite.
    """
    if space is None:
        values = _read_values(labels, dtype, device)
        layout = _layout(values.shape, shape)
        _require_numbers(values)
    else:  # by what all processes have: one that has nothing fits anything
        values = space.together(lambda: _read_values(labels, dtype, device), "reading labels")
        shapes = space.share(tuple(values.shape))
        if len({found[1:] for found in shapes}) > 1 or () in shapes:
            raise ShapeError(f"the labels of ranks have shapes {shapes}: all axes but the first are alike")
        count = sum(found[0] for found in shapes)
        whole = torch.Size((*shape[:-2], space.size, space.size))
        layout = _layout(torch.Size((count, *values.shape[1:])), whole)
        space.together(lambda: _require_numbers(values), "reading labels")
    return layout, values.clone()  # what is asked of the fit later is about these labels


def _read_values(labels: Any, dtype: torch.dtype, device: Any) -> Tensor:
    """Return labels as a tensor of the kernel's dtype; see `read_labels`."""
    if labels is None:
        raise InputError("a regression requires y to be passed, but the target y is None: pass the labels")
    values = labels.detach() if isinstance(labels, Tensor) else read_array(labels, "the labels", dtype)
    if values.dtype.is_complex:
        raise InputError(f"the labels: Complex data not supported, got {values.dtype}; pass .real")
    if not values.dtype.is_floating_point:
        raise InputError(
            f"the labels have dtype {values.dtype}: a regression on class numbers would call class 2 twice "
            "class 1. Pass one-hot targets, torch.nn.functional.one_hot(labels).to(K.dtype), or the "
            "network's own outputs"
        )
    if values.dtype != dtype:
        raise DtypeError(f"the kernel has dtype {dtype}, the labels {values.dtype}; cast one of them")
    if device is not None and values.device != torch.device(device):
        raise DeviceError(f"the kernel lives on {device}, the labels on {values.device}; move one of them")
    return values


def _require_numbers(values: Tensor) -> None:
    if not bool(torch.isfinite(values).all()):
        where = (~torch.isfinite(values)).nonzero()[0].tolist()
        raise NonFiniteError(f"the label at position {tuple(where)} is NaN or infinite; drop that sample")


def _layout(labels: torch.Size, kernel: torch.Size) -> Layout:
    size, batch = kernel[-1], tuple(kernel[:-2])
    if not labels:
        raise ShapeError("labels need one row for each sample, got a single number")
    tail = tuple(labels[1:])
    if batch:
        if len(batch) == 1 and tuple(labels) in ((size, batch[0]), (size,) * (batch[0] == 1)):
            return Layout("each", tail)
        raise ShapeError(
            f"a batch of kernels {tuple(kernel)} needs one column of labels for each, shape "
            f"({size}, {batch[0] if len(batch) == 1 else 'C'}) with one batch axis; got {tuple(labels)}"
        )
    if labels[0] == size:
        return Layout("shared", tail)
    if labels.numel() == size:
        return Layout("flat", tail)
    raise ShapeError(
        f"{labels[0]} rows of labels, shape {tuple(labels)}, do not fit a kernel of {size} rows: give "
        "one row "
        f"for each sample, (N,) or (N, C) for K (N, N), (N, O) with N*O = {size} for a kernel over "
        "all outputs"
    )
