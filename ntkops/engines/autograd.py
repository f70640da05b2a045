"""The general engine: products and blocks of J by automatic differentiation, for any model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from ..model import Batch, Inputs, Linearization
from .base import Engine, Work, is_recorded, require_finite_product
from .cost import KernelShape, autograd_kernel_passes, tile_repeats
from .differentiation import LinearizedBatch, Parameters, linearize_batch, sample_gradients
from .factors import Direct, unit_cotangents
from .layer_factors import Factors
from .memory import Share, parts, retry
from .options import Layerwise
from .summation import Workspace
from .units import Unit

__all__ = ["AutogradEngine"]

Auto = Literal["auto"]

Result = TypeVar("Result")
_Kept = list[LinearizedBatch]  # the linearised samples, where one pass holds all of them; else empty
_EVERYTHING = Unit(-1, 0, 1, "direct", ())  # all parameters in one piece


class AutogradEngine(Engine):
    """J and Jᵀ by vjp and jvp, exact blocks from per-sample gradients that are written down."""

    name = "autograd"

    def __init__(
        self,
        linearization: Linearization,
        first: Inputs | None,
        *,
        batch_size: int | Auto = "auto",
        chunk_size: int | Auto = "auto",
        like: Engine | None = None,
    ) -> None:
        super().__init__(linearization, first, batch_size=batch_size, chunk_size=chunk_size, like=like)
        self.workspace, self.options = Workspace(), Layerwise()  # nothing is decided about layers

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

    def __getstate__(self) -> dict[str, object]:
        """Leave the memory behind, too."""
        return {**super().__getstate__(), "workspace": Workspace()}

    def free(self) -> int:
        """Drop everything cached for this engine and return the bytes set free."""
        with self.linearization.full_precision():  # no other thread is using the workspace
            self.workspace.clear()
            return super().free()

    def to(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> AutogradEngine:
        """Return the same engine for another dtype or device."""
        moved = self.linearization.to(dtype=dtype, device=device)
        first = None if self._first is None else self._first.to(dtype=dtype, device=device)
        return AutogradEngine(moved, first, batch_size=self._batch_size, chunk_size=self._chunk_size)

    def restricted(self, free: Sequence[int], params: Parameters) -> tuple[AutogradEngine, Parameters]:
        """Return the engine for some parameters, the others held where they are, and those."""
        part = self.linearization.restricted(free, params)
        sizes = {"batch_size": self._batch_size, "chunk_size": self._chunk_size}
        engine = AutogradEngine(part, None, like=self, **sizes)
        engine._whole = self
        return engine, part.parameters

    # what it costs

    def kernel_passes(self, inputs: Inputs, wanted: KernelShape, distinct: int) -> float:
        """Return what a dense kernel costs, in passes over the samples of its rows."""
        if not inputs.is_coupled:
            return autograd_kernel_passes(wanted, distinct)
        made = autograd_kernel_passes(wanted, distinct, inputs.output_shape[0])
        return made + (self.groups(distinct) - 1) * distinct

    def kernel_repeats(self, inputs: Inputs, wanted: KernelShape, distinct: int) -> float:
        """Return how many times each backward pass of a dense kernel is made, where pairs of tiles meet."""
        return tile_repeats(self.tile, wanted, distinct)

    def diagonal_passes(self, inputs: Inputs, distinct: int) -> float:
        """Return what the diagonal costs: a pass over the samples for each output."""
        return float(distinct)

    # factors: per-sample gradients of all parameters in one piece

    def of(self, params: Parameters, inputs: Inputs, cotangents: Tensor, compact: bool = False) -> Factors:
        """Return the gradients of N samples for ``(C, N, O)`` cotangents. Cost: C per-sample passes."""
        how = self.differentiated(per_sample=True)
        # Sample by sample, the cotangents of one of them are columns of Jᵀ of that sample.
        if how.per_sample == "loop" and len(cotangents) > 1:
            how = self.differentiated(columns=True)
        assert how.per_sample is not None
        choice = how.per_sample, how.mode

        def part(start: int, stop: int, batch: Batch) -> Tensor:
            self.linearization.require_independent(inputs, start, params, batch)
            sent = cotangents[:, start:stop].transpose(0, 1)  # (B, C, O)
            function = self.linearization.function
            columns = how.columns or "loop"
            gradients = sample_gradients(*choice, function, params, batch, sent, columns)  # (B, C, *shape)
            return torch.cat([g.reshape(*g.shape[:2], g.shape[2:].numel()) for g in gradients], dim=-1)

        with self.linearization.safe_context():
            found = [made for _, _, made in self.over_samples(inputs, part)]
        tile = found[0] if len(found) == 1 else torch.cat(found)
        require_finite_product(tile, "Jᵀv of single samples", self.linearization, cotangents)
        return Factors(len(tile), [], [Direct(_EVERYTHING, tile)])

    def of_outputs(
        self, params: Parameters, inputs: Inputs, outputs: Tensor, compact: bool = False
    ) -> Factors:
        """Return the gradients of N samples for single outputs, ``(C,)`` numbers.

        Cost: C per-sample passes, or P jvps of the samples where these are fewer.
        """
        if self._takes_columns(params, inputs, len(outputs)):
            return self._by_columns(params, inputs, outputs)
        dtype, device = self.linearization.dtype, self.linearization.device
        return self.of(params, inputs, unit_cotangents(outputs, inputs, dtype, device))

    def _takes_columns(self, params: Parameters, inputs: Inputs, directions: int) -> bool:
        """Whether J is made column by column, by a jvp of all samples for each entry of the parameters."""
        # A jvp takes no more than a backward pass, and is not made sample by sample.
        if self.num_parameters > directions:
            return False
        if is_recorded(params, (inputs,), self.linearization.differentiable):
            return False  # formulas of jvps need not be differentiable themselves
        how = self.differentiated(columns=True)
        return how.mode == "forward" and how.columns == "vmap"

    def _by_columns(self, params: Parameters, inputs: Inputs, outputs: Tensor) -> Factors:
        """Return the gradients of N samples for single outputs. Cost: P jvps."""
        entries, like = self.num_parameters, torch.empty(0, dtype=self.linearization.dtype)
        like = like.to(self.linearization.device)

        def part(start: int, stop: int, batch: Batch) -> Tensor:
            self.linearization.require_independent(inputs, start, params, batch)
            point = self._linearize(params, batch, True)
            made = like.new_empty((stop - start, len(outputs), entries))

            def push(first: int, last: int) -> None:
                # J e_p is column p of J, for all samples and outputs: (p, B, C) -> (B, C, p).
                units = like.new_zeros((last - first, entries))
                units[:, first:last].fill_diagonal_(1)
                made[:, :, first:last] = point.push(self._split(units))[..., outputs].permute(1, 2, 0)

            for _ in parts(entries, self._unit_share(stop - start), push):
                pass
            return made

        with torch.no_grad(), self.linearization.safe_context():
            found = [made for _, _, made in self.over_samples(inputs, part)]
        tile = found[0] if len(found) == 1 else torch.cat(found)
        require_finite_product(tile, "J p", self.linearization, outputs)
        return Factors(len(tile), [], [Direct(_EVERYTHING, tile)])

    def _unit_share(self, count: int) -> Share:
        """Return how many columns of J go through one pass over ``count`` samples."""
        share = self.column_share()
        if share.chosen:
            return share
        # The tangents of what a pass computes, in the workspace: small models spend their time on calls.
        held = max(1, count * self.linearization.activation_bytes + self._parameter_bytes())
        return replace(share, read=lambda: self._within("columns", max(1, self.workspace_bytes() // held)))

    def sweep(self, params: Parameters, inputs: Inputs, outputs: Tensor, rows: int) -> None:
        """Return None: there are no stages."""

    def written_down(self, factors: Factors) -> Tensor:
        """Return ``(B, C, P)`` gradients, which these are."""
        return factors.directs[0].gradients

    def divided(self, factors: Factors, owners: Mapping[str, int], count: int) -> list[Factors]:
        """Return the gradients of each part, given the part of each parameter by name."""
        pieces = factors.directs[0].gradients.split(list(self.linearization.sizes), dim=2)
        found: list[list[Tensor]] = [[] for _ in range(count)]
        for name, piece in zip(self.linearization.names, pieces, strict=True):
            found[owners[name]].append(piece)
        return [
            Factors(
                factors.count,
                [],
                [Direct(_EVERYTHING, own[0] if len(own) == 1 else torch.cat(own, dim=2))] if own else [],
            )
            for own in found
        ]

    def tile(self, directions: int) -> int:
        """Return how many samples' gradients fit into the workspace."""
        return self.workspace_bytes() // max(1, directions * self._parameter_bytes())

    def groups(self, directions: int) -> int:
        """Return in how many groups the gradients of one sample are taken, for its kernel with itself."""
        return -(-directions * self._parameter_bytes() // self.workspace_bytes())

    def passing_share(self, directions: int) -> Share:
        """Return `tile` samples at a time."""
        return self.tile_share(directions)

    def _summed(
        self,
        params: Parameters,
        watched: Sequence[Tensor | Inputs],
        work: Work,
        by_parameter: bool = False,
    ) -> Tensor:
        with self.linearization.full_precision():
            return work(self, params)

    # products

    def linearized(
        self, params: Parameters, left: Inputs, right: Inputs, operand: Tensor, columns: float = 0.0
    ) -> _Products:
        """Return products with J(left) and J(right)ᵀ, which share the forward pass of the same samples."""
        return _Products(self, params, left, right)

    def _linearize(self, params: Parameters, batch: Batch, several: bool) -> LinearizedBatch:
        """Return products with J and Jᵀ of one batch; ``several``: of more than one column at a time."""
        how = self.differentiated(columns=several)
        function = self.linearization.function
        return linearize_batch(how.mode, function, params, batch, how.columns or "loop", how.pull_columns)

    def _each(
        self,
        params: Parameters,
        inputs: Inputs,
        kept: _Kept,
        several: bool,
        work: Callable[[int, int, LinearizedBatch], Result],
    ) -> Iterator[Result]:
        """Yield work on the linearised samples, batch by batch; all of them in one batch are kept."""
        if kept:
            # Memory may suffice for the forward pass and not for what is made of it: then smaller batches.
            share = self.sample_share(inputs)
            done = retry(share, inputs.num_samples, lambda: work(0, inputs.num_samples, kept[0]))
            if done is not None:
                yield done[0]
                return
            kept.clear()

        def part(start: int, stop: int, batch: Batch) -> Result:
            if stop - start < inputs.num_samples:  # a part, which must not depend on the others
                self.linearization.require_independent(inputs, start, params, batch)
            point = self._linearize(params, batch, several)
            result = work(start, stop, point)
            if stop - start == inputs.num_samples:
                kept.append(point)
            return result

        for _, _, result in self.over_samples(inputs, part):
            yield result

    def _split(self, tangents: Tensor) -> Parameters:
        """Return ``(k, P)`` as one ``(k, *shape)`` a parameter."""
        sizes, shapes = self.linearization.sizes, self.linearization.shapes
        pieces = tangents.split(list(sizes), dim=1)
        if self.linearization.is_complex:  # a view as complex numbers wants even places in memory
            pieces = tuple(piece.clone() for piece in pieces)
        return tuple(
            piece.reshape(len(tangents), *shape) for piece, shape in zip(pieces, shapes, strict=True)
        )


class _Products:
    """Products with J of some samples and Jᵀ of others, in chunks of columns."""

    def __init__(self, engine: AutogradEngine, params: Parameters, left: Inputs, right: Inputs) -> None:
        self._engine, self._params, self._left, self._right = engine, params, left, right
        self._several = False  # columns at a time: for one it need not be known whether they go together
        self._kept_right: _Kept = []
        self._kept_left: _Kept = self._kept_right if left is right else []

    def pull(self, vectors: Tensor) -> Tensor:
        """Return J(right)ᵀ v, ``(k, P)``. Cost: k vjp passes."""
        empty = vectors.new_zeros((0, self._engine.num_parameters))
        return self._in_columns("Jᵀv", vectors, empty, lambda chunk: _flatten(self._pull(chunk)), vjp=1)

    def push(self, tangents: Tensor) -> Tensor:
        """Return J(left) p, ``(k, N₁, O)``. Cost: k jvp passes."""
        empty = tangents.new_zeros((0, self._left.num_samples, self._left.num_outputs))
        split = self._engine._split
        return self._in_columns("J p", tangents, empty, lambda chunk: self._push(split(chunk)), jvp=1)

    def through(self, vectors: Tensor) -> Tensor:
        """Return J(left) J(right)ᵀ v, ``(k, N₁, O)``. Cost: k vjp and k jvp passes."""
        empty = vectors.new_zeros((0, self._left.num_samples, self._left.num_outputs))
        return self._in_columns(
            "K v", vectors, empty, lambda chunk: self._push(self._pull(chunk)), vjp=1, jvp=1
        )

    def _in_columns(
        self, what: str, block: Tensor, empty: Tensor, work: Callable[[Tensor], Tensor], **passes: int
    ) -> Tensor:
        """Return the work on all columns, in chunks, counted and checked."""
        engine = self._engine
        self._several |= len(block) > 1 and engine.chunk_size() > 1
        with engine.linearization.safe_context():
            found = parts(len(block), engine.column_share(), lambda start, stop: work(block[start:stop]))
            pieces = [piece for _, _, piece in found]
        engine.report(**{kind: number * len(block) for kind, number in passes.items()})
        result = torch.cat(pieces) if pieces else empty
        require_finite_product(result, what, engine.linearization, block)
        return result

    def _pull(self, vectors: Tensor) -> Parameters:
        """Return Jᵀv by parameter, ``(k, *shape)``: Σ over batches of J_bᵀ v_b."""

        def work(start: int, stop: int, point: LinearizedBatch) -> Parameters:
            return point.pull(vectors[:, start:stop])

        total: Parameters | None = None
        for part in self._engine._each(self._params, self._right, self._kept_right, self._several, work):
            total = part if total is None else tuple(a + b for a, b in zip(total, part, strict=True))
        assert total is not None  # inputs are never empty
        return total

    def _push(self, tangents: Parameters) -> Tensor:
        """Return J p, ``(k, N, O)``: the rows of one batch below those of another."""

        def work(start: int, stop: int, point: LinearizedBatch) -> Tensor:
            return point.push(tangents)

        found = list(self._engine._each(self._params, self._left, self._kept_left, self._several, work))
        return found[0] if len(found) == 1 else torch.cat(found, dim=1)


def _flatten(blocks: Parameters) -> Tensor:
    """Return one ``(k, *shape)`` a parameter as ``(k, P)``."""
    return torch.cat([block.reshape(len(block), block.shape[1:].numel()) for block in blocks], dim=1)
