"""Whether a tensor that is held by reference has changed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import StaleOperatorError

__all__ = ["Watch", "all_finite", "bits_of", "hold", "require_fresh", "same_bits", "tracked"]

_SAME_SIZE_INTEGER = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits_of(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor as integers of the same size, so that NaN equals NaN."""
    # A conjugate is a flag on the memory of what it conjugates, which has other bits.
    values = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return values.detach().contiguous().view(_SAME_SIZE_INTEGER[values.element_size()])


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors of one dtype agree bit for bit."""
    return torch.equal(bits_of(left), bits_of(right))


def all_finite(tensor: Tensor) -> bool:
    """Whether no entry is NaN or infinite: a finite sum says so in one pass, but it may overflow."""
    values = tensor.detach()
    return math.isfinite(values.sum()) or bool(torch.isfinite(values).all())


def tracked(tensor: Tensor) -> Tensor:
    """Return a tensor that has versions and can be differentiated: a copy of one made in inference mode."""
    if not tensor.is_inference():
        return tensor
    with torch.inference_mode(False):
        return tensor.clone()


@dataclass(frozen=True, eq=False)
class Watch:
    """A tensor held by reference, with the state in which it was met.

    Attributes:
        label: How messages call it.
        tensor: The tensor itself, or an alias that shares its version counter.
        version: Its version counter when it was met.
        pointer: The address of its data when it was met.
    """

    label: str
    tensor: Tensor
    version: int
    pointer: int

    @classmethod
    def of(cls, label: str, tensor: Tensor) -> Watch:
        """Start watching a tensor."""
        return cls(label, tensor, tensor._version, tensor.data_ptr())

    @property
    def changed(self) -> bool:
        """Whether the tensor was written to, or given other data, since it was met."""
        return self.tensor._version != self.version or self.tensor.data_ptr() != self.pointer


def hold(label: str, tensor: Tensor) -> tuple[Tensor, Watch | None]:
    """Return a detached alias of a tensor and its watch, or a copy and None where no change could be noticed.

    The alias shares the version counter. Tensors made in inference mode have none, hence the copy.
    """
    if tensor.is_inference():
        return tracked(tensor), None
    alias = tensor.detach()
    return alias, Watch.of(label, alias)


def require_fresh(watches: Iterable[Watch], what: str) -> None:
    """Raise if a watched tensor has changed; ``what`` are "parameters" or "inputs", for the message.

    Raises:
        StaleOperatorError: Naming every tensor that changed.
    """
    changed = [watch.label for watch in watches if watch.changed]
    if changed:
        raise StaleOperatorError(
            f"{what} held by reference were changed in place since the operator was made: "
            f"{', '.join(changed)}; build the operator again for the new values, or give it copies "
            "(.clone()) of what you mean to change"
        )
