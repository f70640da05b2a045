"""The vector space in which estimators and solvers work.

Algorithms never call ``dot``, ``norm``, ``qr`` or ``randn`` on state vectors themselves. They ask
a `Space`, so that an operator whose vectors are spread over processes can supply another one and
every algorithm runs on it unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from .errors import DeviceError, InputError
from .shortage import memory_for

__all__ = ["Distribution", "Space", "rank_cutoff", "resolve_generator"]

Result = TypeVar("Result")
_ROUNDINGS = 1000  # units of rounding, at most; half as many again as were seen
_WIDE = 2**22  # entries of two blocks that are float64 at a time
Distribution = Literal["rademacher", "gaussian", "sphere"]


def resolve_generator(generator: torch.Generator | None) -> tuple[torch.Generator, int]:
    """Return a CPU generator and the seed that reproduces it.

    Args:
        generator: A CPU `torch.Generator`, or None for a fresh one with a seed drawn from the
            operating system. The global random state is neither read nor advanced.

    Returns:
        The generator and its initial seed.

    Raises:
        InputError: If it is neither.
        DeviceError: If the generator does not live on the CPU.
    """
    if generator is None:
        generator = torch.Generator()
        return generator, generator.seed()
    if not isinstance(generator, torch.Generator):
        raise InputError(f"generator={generator!r}: pass a torch.Generator, or None")
    if generator.device.type != "cpu":
        raise DeviceError(
            f"generator lives on {generator.device}, but probes are drawn on the CPU so that the same "
            "seed gives the same numbers on every device; pass torch.Generator() (a CPU generator)"
        )
    return generator, generator.initial_seed()


def rank_cutoff(size: int, dtype: torch.dtype) -> float:
    """Return the share of the largest of n eigenvalues or singular values below which they are rounding."""
    # n ε is the convention, and what rounding may do at worst. What it does has no such growth: kernels of an
    # exact rank left pivots of up to 625 ε (ranks 3 to 100, n to 20,000), eigenvalues are moved by ε and less
    # (operators/rounding.py). In float32 n ε would leave out eigenvalues of 1 % with 100,000 rows.
    return min(size, _ROUNDINGS) * torch.finfo(dtype).eps


class Space:
    """A finite-dimensional space of state vectors held by one process.

    Blocks of k vectors are columns: ``(*batch, n, k)``. Inner products and factorisations run in
    float64 whatever the dtype of the vectors, since their errors enter every result downstream.

    Args:
        size: Number n of entries of a vector.
        dtype: Dtype of the vectors.
        device: Device of the vectors.

    Example:
        >>> import torch
        >>> from ntkops.vectors import Space
        >>> space = Space(4, torch.float32, torch.device("cpu"))
        >>> probes = space.probes(2, torch.Generator().manual_seed(0))
        >>> probes.shape, space.inner(probes, probes).diagonal().tolist()
        (torch.Size([4, 2]), [4.0, 4.0])
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        self.size = int(size)
        self.dtype = dtype
        self.device = torch.device(device)

    # what is held where

    @property
    def length(self) -> int:
        """Number of entries of a vector that this process holds: all of them."""
        return self.size

    @property
    def start(self) -> int:
        """Position of the first of them in the whole vector."""
        return 0

    @property
    def part(self) -> tuple[int, int]:
        """Which of how many parts of a vector this process holds."""
        return 0, 1

    @property
    def is_spread(self) -> bool:
        """Whether other processes may hold parts of a vector."""
        return False

    def matches(self, other: Space) -> bool:
        """Return whether vectors of another space lie in the same parts as those of this one."""
        return self.size == other.size and other.part == (0, 1)

    def share(self, item: Any) -> list[Any]:
        """Return what every process gives, in their order."""
        return [item]

    def common(self, generator: torch.Generator) -> torch.Generator:
        """Return the generator, in the same state on every process."""
        return generator

    def cast(self, dtype: torch.dtype) -> Space:
        """Return the same space in another dtype."""
        return Space(self.size, dtype, self.device)

    def together(self, work: Callable[[], Result], what: str) -> Result:
        """Do work that may fail on some processes, so that all of them raise then.

        Args:
            work: Work of this process alone.
            what: What it is, for messages.

        Returns:
            Its result.
        """
        return work()

    # rows by their number in the whole vectors

    def take(self, block: Tensor, numbers: Tensor) -> Tensor:
        """Return some rows of vectors, the same on every process.

        Args:
            block: ``(*batch, length, k)``.
            numbers: ``(b,)`` their numbers, int64, below `size`.

        Returns:
            ``(*batch, b, k)``.
        """
        return block[..., numbers.to(block.device), :]

    def whole(self, block: Tensor) -> Tensor:
        """Return all rows of vectors on every process.

        Args:
            block: ``(*batch, length, k)``.

        Returns:
            ``(*batch, size, k)``.
        """
        return block

    # numbers

    def largest(self, value: float) -> float:
        """Return the largest of one number from each process."""
        return value

    def total(self, partial: Tensor) -> Tensor:
        """Return the sum over processes of numbers that each has made of its own entries."""
        return partial

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of the entries of vectors in float64.

        Args:
            values: ``(*batch, n)``: entries lie in the last axis.

        Returns:
            ``(*batch,)``, float64.
        """
        return self.total(values.double().sum(-1))

    def inner(self, left: Tensor, right: Tensor) -> Tensor:
        """Return all inner products ``leftᵀ right`` in float64.

        Args:
            left: ``(*batch, n, j)``.
            right: ``(*batch, n, k)``.

        Returns:
            ``(*batch, j, k)``, float64. Memory: long blocks are turned to float64 some rows at a time.
        """
        # In float64, because sums of n products lose about √n units: bases would not be orthogonal to what
        # float32 vectors can hold. Some rows at a time, so that no whole block is there twice.
        rows = max(1, _WIDE // max(left.shape[-1] + right.shape[-1], 1))
        total: Tensor | None = None
        with self._memory("inner products of", left.shape[-1] + right.shape[-1]):
            for one, other in zip(left.split(rows, dim=-2), right.split(rows, dim=-2), strict=True):
                product = one.double().mT @ other.double()
                total = product if total is None else total.add_(product)
        assert total is not None  # a block without rows has one part
        return total

    def sum_squares(self, block: Tensor) -> Tensor:
        """Return the squared length of each column in float64.

        Args:
            block: ``(*batch, n, k)``.

        Returns:
            ``(*batch, k)``, float64.
        """
        rows = max(1, _WIDE // max(block.shape[-1], 1))
        parts = [part.double().square().sum(-2) for part in block.split(rows, dim=-2)]
        return parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)

    def orthonormalize(self, block: Tensor) -> Tensor:
        """Return an orthonormal basis of the columns' span.

        A single block loses the directions that are rounding; the blocks of a batch keep min(n, k)
        columns each, completed by arbitrary orthonormal ones, so that the batch stays one tensor.

        Args:
            block: ``(n, k)`` or ``(*batch, n, k)``.

        Returns:
            ``(n, r)`` with r ≤ min(n, k), or ``(*batch, n, min(n, k))``, in the dtype of ``block``.
        """
        with self._memory("orthonormalising", block.shape[-1]):
            return self._orthonormalized(block)

    def _memory(self, what: str, columns: int) -> AbstractContextManager[None]:
        """Say what memory was needed for where it runs out."""
        return memory_for(
            f"{what} {columns} columns of {self.length} numbers",
            "take fewer columns (num_passes, rank, k), or fewer rows",
        )

    def _orthonormalized(self, block: Tensor) -> Tensor:
        if block.dim() > 2:
            scale = block.abs().amax(dim=(-2, -1), keepdim=True)
            # QR keeps dependent columns, completed by arbitrary ones; a rank for each member would leave no
            # tensor.
            scaled = (block / torch.where(scale > 0, scale, torch.ones_like(scale))).double()
            return torch.linalg.qr(scaled)[0].to(block.dtype)
        scale = block.abs().amax() if block.numel() else block.new_zeros(())
        if not bool(scale > 0):
            return block[:, :0]
        # By the SVD, whose singular values tell the rank: R of a QR without pivoting does not. Divided by the
        # largest entry, since squares of 1e-20 vanish in float32 and those of 1e20 overflow.
        basis, singular, _ = torch.linalg.svd((block / scale).double(), full_matrices=False)
        cutoff = singular[0] * rank_cutoff(max(block.shape), block.dtype)
        return basis[:, singular > cutoff].to(block.dtype)

    def probes(
        self, count: int, generator: torch.Generator, distribution: Distribution = "rademacher"
    ) -> Tensor:
        """Draw ``count`` isotropic random columns: E[v vᵀ] = I.

        They are drawn on the CPU and then moved, so that a seed means the same on every device.

        Args:
            count: Number k of columns.
            generator: CPU generator, advanced by the draw.
            distribution: "rademacher" (±1), "gaussian", or "sphere" (uniform on the sphere of
                radius √n).

        Returns:
            ``(n, count)`` in the space's dtype and on its device.
        """
        shape = (self.size, count)
        with self._memory("drawing", count):
            # (n, k) rows in the order of the whole vector, so that a rank that holds some of them draws the
            # same numbers
            if distribution == "rademacher":
                drawn = torch.randint(0, 2, shape, generator=generator).double().mul_(2).sub_(1)
            else:
                drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
                if distribution == "sphere":
                    drawn *= self.size**0.5 / torch.linalg.vector_norm(drawn, dim=0)
            return drawn.to(dtype=self.dtype, device=self.device)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is set anywhere (here: on this one process)."""
        return bool(flag)

    def __repr__(self) -> str:
        """Show size, dtype and device."""
        return f"Space(size={self.size}, dtype={self.dtype}, device={self.device})"
