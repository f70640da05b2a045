"""The general engine: products and blocks of J by automatic differentiation, for any model."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor

from ..model import Batch, Inputs, Linearization
from ..results import PassCount
from .blocks import dense_kernel, kernel_diagonal
from .checks import require_finite_product
from .choose import find_differentiation
from .cost import KernelShape, autograd_kernel_passes
from .differentiation import Differentiation, LinearizedBatch, Parameters, linearize_batch, sample_gradients
from .halves import AutogradHalves
from .memory import EngineSizes, parts, retry, shared_store
from .passes import PassCounter, report_passes

__all__ = ["AutogradEngine"]

Auto = Literal["auto"]

Result = TypeVar("Result")
_Kept = list[LinearizedBatch]  # the linearised samples, where one pass holds all of them; else empty
_identities = itertools.count()


class AutogradEngine(EngineSizes):
    """J and Jᵀ by vjp and jvp, exact blocks by per-sample gradients.

    The engine holds no parameters and no data: both come with each call, so that one engine serves
    a kernel, its slices, its cross kernels and its Jacobians, at detached and at live parameters.

    Args:
        linearization: The pure function and its snapshot.
        first: A few samples, on which it is found out how the model is differentiated; None where that is
        known. batch_size: Samples per pass, or "auto" for as many as the memory holds. chunk_size: Columns
        per pass, or "auto".

    Raises:
        InputError: If a size is neither "auto" nor a positive integer.
    """

    name = "autograd"

    def __init__(
        self,
        linearization: Linearization,
        first: Inputs | None,
        *,
        batch_size: int | Auto = "auto",
        chunk_size: int | Auto = "auto",
    ) -> None:
        super().__init__(linearization, batch_size, chunk_size)
        self._first = first
        self._counter = PassCounter()
        self.identity = next(_identities)

    @classmethod
    def build(
        cls,
        linearization: Linearization,
        inputs: Inputs,
        *,
        batch_size: int | Auto = "auto",
        chunk_size: int | Auto = "auto",
    ) -> AutogradEngine:
        """Return the engine for some inputs, the model differentiated once on a few of them."""
        inputs.hand_over_recordings()  # nobody needs them
        engine = cls(linearization, inputs.head(2), batch_size=batch_size, chunk_size=chunk_size)
        assert engine.differentiation is not None  # a model that cannot be differentiated is refused here
        return engine

    @property
    def differentiation(self) -> Differentiation:
        """How the model is differentiated: found once for a linearisation, when something is."""
        verdict = self.linearization.verdict
        if not isinstance(verdict.differentiation, Differentiation):
            assert self._first is not None
            verdict.differentiation = find_differentiation(self.linearization, self._first)
        return verdict.differentiation

    def to(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> AutogradEngine:
        """Return the same engine for another dtype or device."""
        moved = self.linearization.to(dtype=dtype, device=device)
        first = None if self._first is None else self._first.to(dtype=dtype, device=device)
        return AutogradEngine(moved, first, batch_size=self._batch_size, chunk_size=self._chunk_size)

    def restricted(self, free: Sequence[int], params: Parameters) -> tuple[AutogradEngine, Parameters]:
        """Return the engine for some parameters, the others held where they are, and those."""
        found = self.differentiation  # with all of them, and known from now on
        assert found is not None
        part = self.linearization.restricted(free, params)
        engine = AutogradEngine(part, None, batch_size=self._batch_size, chunk_size=self._chunk_size)
        engine._counter, engine._limits = self._counter, self._limits
        return engine, part.parameters

    def __getstate__(self) -> dict[str, object]:
        """Leave the identity behind: it keys the caches of this process."""
        state = dict(self.__dict__)
        del state["identity"]
        return state

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take a fresh identity, so that no cache of another engine is read."""
        self.__dict__.update(state)
        self.identity = next(_identities)

    def free(self) -> int:
        """Drop everything cached for this engine and return the bytes set free."""
        return shared_store.release(self.identity)

    # what it costs

    @property
    def passes(self) -> PassCount:
        """Passes made so far."""
        return self._counter.count

    def _report(self, *, vjp: int = 0, jvp: int = 0, per_sample: int = 0) -> None:
        self._counter.add(vjp=vjp, jvp=jvp, per_sample=per_sample)
        report_passes(vjp=vjp, jvp=jvp, per_sample=per_sample)

    @property
    def num_parameters(self) -> int:
        """Number P of selected parameters' entries."""
        return self.linearization.num_parameters

    # products

    def _linearize(self, params: Parameters, batch: Batch) -> LinearizedBatch:
        how = self.differentiation
        function = self.linearization.function
        return linearize_batch(how.mode, function, params, batch, how.columns, how.pull_columns)

    def _each(
        self,
        params: Parameters,
        inputs: Inputs,
        kept: _Kept,
        work: Callable[[int, int, LinearizedBatch], Result],
    ) -> Iterator[Result]:
        """Yield work on the linearised samples, batch by batch; all of them in one batch are kept."""
        if kept:
            share = self.sample_share(inputs)
            done = retry(share, inputs.num_samples, lambda: work(0, inputs.num_samples, kept[0]))
            if done is not None:
                yield done[0]
                return
            kept.clear()

        def part(start: int, stop: int, batch: Batch) -> Result:
            if stop - start < inputs.num_samples:
                self.linearization.require_independent(inputs, start, params, batch)
            point = self._linearize(params, batch)
            result = work(start, stop, point)
            if stop - start == inputs.num_samples:
                kept.append(point)
            return result

        for _, _, result in self.over_samples(inputs, part):
            yield result

    def _in_columns(self, block: Tensor, work: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Return the work on every chunk of columns."""
        found = parts(len(block), self.column_share(), lambda start, stop: work(block[start:stop]))
        return [part for _, _, part in found]

    def vjp(self, params: Parameters, inputs: Inputs, vectors: Tensor) -> Tensor:
        """Return Jᵀv, flat, for each row of ``vectors``.

        Args:
            params: The selected parameters, snapshot or live.
            inputs: N samples.
            vectors: ``(k, N, O)``.

        Returns:
            ``(k, P)``. Cost: k vjp passes.
        """
        return self.halves(params, inputs, inputs).pull(vectors)

    def jvp(self, params: Parameters, inputs: Inputs, tangents: Tensor) -> Tensor:
        """Return J p for each row of ``tangents``.

        Args:
            params: The selected parameters, snapshot or live.
            inputs: N samples.
            tangents: ``(k, P)``.

        Returns:
            ``(k, N, O)``. Cost: k jvp passes.
        """
        return self.halves(params, inputs, inputs).push(tangents)

    def product(self, params: Parameters, left: Inputs, right: Inputs, vectors: Tensor) -> Tensor:
        """Return J(left) J(right)ᵀ v for each row of ``vectors``, without flattening in between.

        Args:
            params: The selected parameters, snapshot or live.
            left: N₁ samples.
            right: N₂ samples; the same object as ``left`` shares the forward pass.
            vectors: ``(k, N₂, O)``.

        Returns:
            ``(k, N₁, O)``. Cost: k vjp and k jvp passes.
        """
        with self.linearization.safe_context():
            sides = self.halves(params, left, right)
            parts = self._in_columns(vectors, lambda chunk: sides.through(chunk))
        self._report(vjp=len(vectors), jvp=len(vectors))
        result = torch.cat(parts) if parts else vectors.new_zeros((0, left.num_samples, left.num_outputs))
        require_finite_product(result, "K v", self.linearization, vectors)
        return result

    def halves(self, params: Parameters, left: Inputs, right: Inputs) -> AutogradHalves:
        """Return the two halves of products J(left) J(right)ᵀ v, which share the forward pass.

        Args:
            params: The selected parameters, snapshot or live.
            left: N₁ samples.
            right: N₂ samples; the same object as ``left`` shares the forward pass.
        """
        return AutogradHalves(self, params, left, right)

    def _pull(self, params: Parameters, inputs: Inputs, kept: _Kept, vectors: Tensor) -> Parameters:
        total: Parameters | None = None
        for part in self._each(params, inputs, kept, lambda a, b, point: point.pull(vectors[:, a:b])):
            total = part if total is None else tuple(a + b for a, b in zip(total, part, strict=True))
        assert total is not None  # inputs are never empty
        return total

    def _push(self, params: Parameters, inputs: Inputs, kept: _Kept, tangents: Parameters) -> Tensor:
        parts = list(self._each(params, inputs, kept, lambda a, b, point: point.push(tangents)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def _split(self, tangents: Tensor) -> Parameters:
        sizes, shapes = self.linearization.sizes, self.linearization.shapes
        pieces = tangents.split(list(sizes), dim=1)
        if self.linearization.is_complex:  # a view as complex numbers wants even places in memory
            pieces = tuple(piece.clone() for piece in pieces)
        return tuple(
            piece.reshape(len(tangents), *shape) for piece, shape in zip(pieces, shapes, strict=True)
        )

    # per-sample gradients and what is made of them

    def jacobian_tile(self, params: Parameters, inputs: Inputs, outputs: Tensor) -> Tensor:
        """Return the rows of J of every sample for some outputs.

        Args:
            params: The selected parameters, snapshot or live.
            inputs: B samples; the caller keeps B·r·P within `workspace_bytes`.
            outputs: ``(r,)`` output numbers.

        Returns:
            ``(B, r, P)``. Cost: r per-sample passes over these samples.
        """
        device, dtype = self.linearization.device, self.linearization.dtype
        unit = torch.zeros((len(outputs), inputs.num_outputs), dtype=dtype, device=device)
        unit[torch.arange(len(outputs)), outputs] = 1
        return self._sample_tile(params, inputs, unit.expand(inputs.num_samples, -1, -1))

    def _sample_tile(self, params: Parameters, inputs: Inputs, cotangents: Tensor) -> Tensor:
        def part(start: int, stop: int, batch: Batch) -> Tensor:
            self.linearization.require_independent(inputs, start, params, batch)
            gradients = sample_gradients(
                self.differentiation.per_sample,
                self.differentiation.mode,
                self.linearization.function,
                params,
                batch,
                cotangents[start:stop],
                self.differentiation.columns,
            )
            return torch.cat([g.flatten(2) for g in gradients], dim=-1)

        with self.linearization.safe_context():
            parts = [found for _, _, found in self.over_samples(inputs, part)]
        tile = parts[0] if len(parts) == 1 else torch.cat(parts)
        require_finite_product(tile, "Jᵀv of single samples", self.linearization, cotangents)
        return tile

    def count_rows(self, rows: int, inputs: Inputs) -> None:
        """Report ``rows`` gradients of single samples as passes over all of ``inputs``."""
        self._report(per_sample=math.ceil(rows / inputs.num_samples))

    def kernel(
        self,
        params: Parameters,
        left: Inputs,
        right: Inputs,
        left_outputs: Tensor,
        right_outputs: Tensor,
    ) -> Tensor:
        """Return dense kernels Σ_r J(left)_{o_r} J(right)_{o_r}ᵀ tile by tile.

        Args:
            params: The selected parameters, snapshot or live.
            left: N₁ samples.
            right: N₂ samples; the same object as ``left`` lets symmetry halve the work.
            left_outputs: ``(M, R, r₁)`` output numbers: M kernels, R terms, r₁ outputs a sample.
            right_outputs: ``(M, R, r₂)``.

        Returns:
            ``(M, N₁·r₁, N₂·r₂)``. Cost: one per-sample pass an output on each side, more where the
            workspace holds only a part of the rows; memory: the result and two tiles.
        """
        with self.linearization.full_precision():
            return dense_kernel(self, params, left, right, left_outputs, right_outputs)

    def kernel_passes(self, inputs: Inputs, wanted: KernelShape, distinct: int) -> float:
        """Return what a dense kernel costs, in passes over the samples of its rows.

        Args:
            inputs: Samples of the rows.
            wanted: The kernel.
            distinct: Number of distinct outputs in it.
        """
        return autograd_kernel_passes(wanted, distinct)

    def diagonal(self, params: Parameters, inputs: Inputs, outputs: Tensor) -> Tensor:
        """Return kernel diagonals Σ_r |∇f_{i,o_r}|².

        Args:
            params: The selected parameters, snapshot or live.
            inputs: N samples.
            outputs: ``(M, R, r)`` output numbers.

        Returns:
            ``(M, N·r)``. Cost: one per-sample pass for each distinct output.
        """
        with self.linearization.full_precision():
            return kernel_diagonal(self, params, inputs, outputs)

    def sample_gram(self, params: Parameters, inputs: Inputs, cotangents: Tensor) -> Tensor:
        r"""Return the Gram matrix of per-sample gradients, :math:`W_{ir,js} = g_{ir}^\top g_{js}`.

        Args:
            params: The selected parameters, snapshot or live.
            inputs: N samples.
            cotangents: ``(N, r, O)``: r output combinations for each sample.

        Returns:
            ``(N, r, N, r)``. Cost: r per-sample passes, more where tiles do not fit at once.
        """
        from .blocks import gradient_gram

        with self.linearization.full_precision():
            return gradient_gram(self, params, inputs, cotangents)
