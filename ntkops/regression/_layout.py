"""How labels and kernels meet: one kernel for all targets, one for each, or one over samples and outputs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import DeviceError, DtypeError, InputError, NonFiniteError, ShapeError
from ..vectors import Space
from ._operands import read_array

__all__ = ["Layout", "read_labels"]

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
    if space is None or not values.dim():
        layout = _layout(values.shape, shape)
    else:  # by what all processes have: one that has nothing fits anything
        count = sum(space.share(values.shape[0]))
        layout = _layout(
            torch.Size((count, *values.shape[1:])), torch.Size((*shape[:-2], space.size, space.size))
        )
    if not bool(torch.isfinite(values).all()):
        where = (~torch.isfinite(values)).nonzero()[0].tolist()
        raise NonFiniteError(f"the label at position {tuple(where)} is NaN or infinite; drop that sample")
    return layout, values.clone()  # what is asked of the fit later is about these labels


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
