"""A kernel as the sum of the kernels of parts of its parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, ShapeError, ZeroKernelError
from .estimate import Estimate

__all__ = ["Partition"]


@dataclass(frozen=True, eq=False, repr=False)
class Partition:
    r"""Parts :math:`K = \sum_a K_a` of a kernel by parameters; see `ntkops.partition`.

    ``p["attn"]`` is the lazy kernel of a part.

    Attributes:
        names: Names of the L parts.
        parameters: The parameters of each part.
        inner: Exact :math:`G_{ab} = \langle K_a, K_b \rangle`, ``(*batch, L, L)``, float64.
    """

    names: tuple[str, ...]
    parameters: dict[str, tuple[str, ...]]
    inner: Estimate
    _traces: Tensor | None
    _kernel: Callable[[tuple[str, ...]], Any]

    def _of(self, value: Tensor) -> Estimate:
        return Estimate.of_exact(value, passes=self.inner.passes, seconds=self.inner.seconds)

    def __getitem__(self, name: str) -> Any:
        """Return the lazy kernel of a part.

        Raises:
            InputError: If there is no part of that name.
        """
        if name not in self.parameters:
            raise InputError(f"there is no part {name!r}: choose among {', '.join(map(repr, self.names))}")
        return self._kernel(self.parameters[name])

    @property
    def trace(self) -> Estimate:
        """Traces of the parts, ``(*batch, L)``; they sum to that of the kernel.

        Raises:
            ShapeError: If the kernel is not square.
        """
        if self._traces is None:
            raise ShapeError("the parts of a cross kernel have no trace")
        return self._of(self._traces)

    @property
    def norm(self) -> Estimate:
        """Frobenius norms of the parts, ``(*batch, L)``."""
        return self._of(self._squares().sqrt())

    @property
    def whole_norm(self) -> Estimate:
        """Frobenius norm of the kernel itself, ``(*batch)``: |K|² = 1ᵀ G 1."""
        return self._of(self._whole_square().sqrt())

    @property
    def alignment(self) -> Estimate:
        """Alignments of the parts with each other, ``(*batch, L, L)``, ones on the diagonal.

        Raises:
            ZeroKernelError: If the kernel of a part is zero.
        """
        root = self._nonzero(self._squares()).sqrt()
        # G_ab / (|K_a| |K_b|), divided twice: the product of two norms may leave the range where the ratio
        # does not
        return self._of(self.inner.value / root.unsqueeze(-1) / root.unsqueeze(-2))

    @property
    def whole_alignment(self) -> Estimate:
        """Alignments of the parts with the kernel itself, ``(*batch, L)``.

        Raises:
            ZeroKernelError: If the kernel of a part is zero.
        """
        root = self._nonzero(self._squares()).sqrt()
        # <K_a, K> = Σ_b G_ab and |K|² = 1ᵀ G 1
        return self._of(self.inner.value.sum(-1) / root / self._whole_square().sqrt().unsqueeze(-1))

    def _squares(self) -> Tensor:
        return self.inner.value.diagonal(dim1=-2, dim2=-1)

    def _whole_square(self) -> Tensor:
        return self.inner.value.sum((-2, -1)).clamp(min=0)  # parts of a cross kernel may cancel

    def _nonzero(self, squares: Tensor) -> Tensor:
        empty = (squares == 0).flatten(0, -2).any(0) if squares.dim() > 1 else squares == 0
        if bool(empty.any()):
            name = self.names[int(empty.nonzero()[0])]
            raise ZeroKernelError(f"the kernel of the part {name!r} is zero, and has no alignment")
        return squares

    def __repr__(self) -> str:
        """Show the parts with their shares of the trace, or of the squared norms for a cross kernel."""
        measure = self._squares() if self._traces is None else self._traces
        total = measure.sum(-1, keepdim=True)
        shares = torch.where(total > 0, measure / total, 0.0).reshape(-1, len(self.names)).mean(0)
        what = "the squared norms" if self._traces is None else "the trace"
        shown = ", ".join(
            f"{name} {share:.1%}" for name, share in zip(self.names, shares.tolist(), strict=True)
        )
        return f"Partition({shown} of {what}; {self.inner.passes} passes)"
