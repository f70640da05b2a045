"""What every projection is: a fixed linear map that can be applied to any chunk of the parameters."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from ..errors import DtypeError, InputError, OutOfRangeError, ShapeError
from ..vectors import resolve_generator

__all__ = ["Projection"]


class Projection(ABC):
    r"""A fixed linear map :math:`P: \mathbb{R}^{\mathrm{dim}} \to \mathbb{R}^k` that is never written down.

    Column p of the map is a function of the seed and of p alone. Chunks of parameters can therefore come
    in any sizes, from any device, for any number of vectors at once, and still meet the same map. All
    random ones satisfy :math:`E[P^\top P] = I`, so that inner products are right on average.

    Vectors are rows here, ``(..., dim)``: gradients come that way, and each is contiguous.

    Args:
        dim: Number of entries of a vector that is projected.
        k: Number of entries of its image, at most dim.
        seed: Integer that fixes the map; None draws one.
        generator: CPU generator from which the seed is drawn; None for a fresh one.
    """

    _may_be_tall = False

    def __init__(
        self, dim: int, k: int, seed: int | None = None, *, generator: torch.Generator | None = None
    ) -> None:
        for name, size in (("dim", dim), ("k", k)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise InputError(f"{name}={size!r}: pass a positive integer")
        if k > dim and not self._may_be_tall:
            raise InputError(
                f"k={k} exceeds dim={dim}: a projection takes vectors of dim entries to k, no more; "
                "dim, the number of parameters' entries, comes first"
            )
        self.dim = dim
        self.k = k
        self.seed = _resolve_seed(seed, generator)

    @property
    def shape(self) -> torch.Size:
        """Shape (k, dim) of the map as a matrix."""
        return torch.Size((self.k, self.dim))

    # the map

    def apply(self, block: Tensor, offset: int = 0) -> Tensor:
        """Return P[:, offset : offset + p] x for each row x.

        Args:
            block: ``(..., p)``: entries offset, ..., offset + p - 1 of each vector.
            offset: Position of the first entry among all parameters.

        Returns:
            ``(..., k)`` in the dtype of ``block``. The images of chunks add up to that of the whole, up to
            rounding; `accumulate` adds them without a difference. Differentiable in ``block``.

        Raises:
            ShapeError: If ``block`` has no axis.
            DtypeError: If it is not of a real floating dtype.
            OutOfRangeError: If the chunk does not lie within the parameters.
        """
        self._check(block)
        self._check_range(offset, offset + block.shape[-1])
        if torch.is_grad_enabled() and block.requires_grad:
            # The map is linear: its derivative is its adjoint, and nothing of the map is kept for the
            # backward pass.
            result: Tensor = _Apply.apply(block, self, offset)
            return result
        return self._image(block, offset)

    def _image(self, block: Tensor, offset: int) -> Tensor:
        rows = block.reshape(block.shape[:-1].numel(), block.shape[-1])
        state = self.start(len(rows), block.dtype, block.device)
        self.accumulate(state, rows, offset)
        return self.finish(state).to(block.dtype).reshape(*block.shape[:-1], self.k)

    def adjoint(self, block: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Return entries start, ..., stop - 1 of Pᵀ y for each row y.

        Args:
            block: ``(..., k)``.
            start: First entry.
            stop: The entry after the last; None for ``dim``.

        Returns:
            ``(..., stop - start)`` in the dtype of ``block``; the same bits however the range is cut for
            the sparse maps. Differentiable in ``block``.

        Raises:
            ShapeError: If ``block`` does not have k entries a row.
            DtypeError: If it is not of a real floating dtype.
            OutOfRangeError: If the range does not lie within the parameters.
        """
        self._check(block)
        stop = self.dim if stop is None else stop
        self._check_range(start, stop)
        if block.shape[-1] != self.k:
            raise ShapeError(f"adjoint takes rows of k = {self.k} entries, got {tuple(block.shape)}")
        if torch.is_grad_enabled() and block.requires_grad:
            result: Tensor = _Adjoint.apply(block, self, start, stop)
            return result
        return self._preimage(block, start, stop)

    def _preimage(self, block: Tensor, start: int, stop: int) -> Tensor:
        rows = block.reshape(block.shape[:-1].numel(), self.k).to(_working(block.dtype))
        found = self._pull(rows, start, stop)
        return found.to(block.dtype).reshape(*block.shape[:-1], stop - start)

    # the map in three steps, for vectors that come in chunks

    def start(self, rows: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """Return the state from which the images of ``rows`` vectors are accumulated: zeros."""
        return torch.zeros((rows, *self._state_shape()), dtype=_working(dtype), device=device)

    def accumulate(self, state: Tensor, block: Tensor, offset: int) -> None:
        """Add the part of a chunk to the state, in place.

        Chunks that come in the order of their offsets give the same bits however the parameters are cut,
        for `CountSketch`, `SJLT` and `RowSample`: each entry of their state is a running sum in the order
        of the parameters.

        Args:
            state: From `start`.
            block: ``(rows, p)``, detached.
            offset: Position of the first entry among all parameters.
        """
        if block.numel():
            self._add(state, block.detach().to(state.dtype), offset)

    def finish(self, state: Tensor) -> Tensor:
        """Return the images ``(rows, k)`` that a state holds, in the dtype of the state."""
        return self._read(state)

    def _state_shape(self) -> tuple[int, ...]:
        return (self.k,)

    @abstractmethod
    def _add(self, state: Tensor, block: Tensor, offset: int) -> None:
        """Add P[:, offset : offset + p] x for each row x of ``(rows, p)``, in place."""

    @abstractmethod
    def _read(self, state: Tensor) -> Tensor:
        """Return ``(rows, k)``."""

    @abstractmethod
    def _pull(self, block: Tensor, start: int, stop: int) -> Tensor:
        """Return ``(rows, stop - start)`` of Pᵀ y for each row y of ``(rows, k)``."""

    # checks

    def _check(self, block: Tensor) -> None:
        if not isinstance(block, Tensor) or block.dim() < 1:
            raise ShapeError("a projection takes a tensor (..., entries) whose last axis is that of a vector")
        if not block.dtype.is_floating_point:
            raise DtypeError(f"a projection takes a real floating dtype, got {block.dtype}; cast it first")

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.dim:
            raise OutOfRangeError(
                f"entries {start} to {stop} do not lie within the {self.dim} that this projection takes; it "
                "has to be made for the number of selected parameters' entries"
            )

    # identity

    def _arguments(self) -> dict[str, Any]:
        """Return the constructor's arguments: all that the map is made of."""
        return {"dim": self.dim, "k": self.k, "seed": self.seed}

    @property
    def key(self) -> tuple[object, ...]:
        """What tells this map from others: equal keys, equal maps."""
        return (type(self).__name__, *((name, _frozen(value)) for name, value in self._arguments().items()))

    def __eq__(self, other: object) -> bool:
        """Whether the other one is the same map."""
        return isinstance(other, Projection) and self.key == other.key

    def __hash__(self) -> int:
        """Hash of `key`."""
        return hash(self.key)

    def __getstate__(self) -> dict[str, Any]:
        """Keep the constructor's arguments alone: a few bytes."""
        return self._arguments()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Build the same map again."""
        type(self).__init__(self, **state)

    def __repr__(self) -> str:
        """Show what builds the same map."""
        arguments = ", ".join(f"{name}={value!r}" for name, value in self._arguments().items())
        return f"{type(self).__name__}({arguments})"


def _frozen(value: Any) -> object:
    return value.key if isinstance(value, Projection) else value


def _working(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums: float32 for the half precisions."""
    # bfloat16 has eight bits: a sum of ones would stop at 256
    return dtype if dtype.itemsize >= 4 else torch.float32


def _resolve_seed(seed: int | None, generator: torch.Generator | None) -> int:
    if seed is not None and generator is not None:
        raise InputError("pass seed or generator, not both")
    if seed is None:
        # the seed is drawn, not the map: a pickle, a file and another process make the same one of it
        source, _ = resolve_generator(generator)
        return int(torch.randint(2**62, (), generator=source))
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise InputError(f"seed={seed!r}: pass an integer")
    return seed


class _Apply(torch.autograd.Function):
    """x -> P x, whose derivative is the adjoint; itself differentiable again."""

    @staticmethod
    def forward(ctx: Any, block: Tensor, projection: Projection, offset: int) -> Tensor:
        ctx.place = projection, offset, offset + block.shape[-1]
        return projection._image(block.detach(), offset)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        projection, start, stop = ctx.place
        return projection.adjoint(gradients[0], start, stop), None, None


class _Adjoint(torch.autograd.Function):
    """y -> Pᵀ y, whose derivative is the map."""

    @staticmethod
    def forward(ctx: Any, block: Tensor, projection: Projection, start: int, stop: int) -> Tensor:
        ctx.place = projection, start
        return projection._preimage(block.detach(), start, stop)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        projection, start = ctx.place
        return projection.apply(gradients[0], start), None, None, None
