"""Where factors come from: forward and backward passes over batches of samples."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..model import Batch, Inputs
from .autograd import AutogradEngine
from .collecting import collect
from .coverage import Coverage, CoverageChanged, record_batch
from .differentiation import Parameters
from .factors import Direct, Factors, Outer, in_parameter_order, join_samples, outer_gradients
from .memory import Share
from .options import Layerwise
from .products import unit_spans
from .summation import Workspace
from .units import plan_units

__all__ = ["FactorSource"]

_PASSING_BYTES = 2**22  # of one pass whose factors are used once: more is no faster, and not flat
_LEAST_SAMPLES = 16  # below which a pass costs as much as for these


class FactorSource:
    """Makes the factors of the covered parameters, and counts the passes.

    Args:
        autograd: The engine whose settings, budget and tally are used.
        coverage: What is covered.
        options: What the user decided.
    """

    def __init__(
        self, autograd: AutogradEngine, coverage: Coverage, options: Layerwise | None = None
    ) -> None:
        self._autograd = autograd
        self.options = options or Layerwise()
        self.coverage = coverage
        self.linearization = autograd.linearization
        self.dtype: torch.dtype = self.linearization.dtype
        self.device: torch.device = self.linearization.device
        self.workspace = Workspace()
        sizes, shapes = self.linearization.sizes, self.linearization.shapes
        self.starts: tuple[int, ...] = (0, *itertools.accumulate(sizes))
        # Start in the flat vector and entries of one row of each parameter.
        self.rows: dict[int, tuple[int, int]] = {
            i: (self.starts[i], size // (shape[0] if len(shape) else 1) if size else 0)
            for i, (size, shape) in enumerate(zip(sizes, shapes, strict=True))
        }

    @property
    def uncovered(self) -> tuple[int, ...]:
        """Numbers of the parameters that are left to automatic differentiation."""
        count = len(self.linearization.names)
        return tuple(i for i in range(count) if i not in self.coverage.covered)

    def count_rows(self, rows: int, inputs: Inputs) -> None:
        """Report gradients of single samples as passes over all samples."""
        self._autograd.count_rows(rows, inputs)

    def batch_size(self, inputs: Inputs) -> int:
        """Samples that go through one pass."""
        return self._autograd.batch_size(inputs)

    def workspace_bytes(self) -> int:
        """Bytes for one tile of factors."""
        return self._autograd.workspace_bytes()

    def tile(self, directions: int) -> int:
        """Return how many samples' factors, and one layer's gradients, fit into the workspace."""
        cover = self.coverage
        entries = directions * (2 * cover.kept_entries + cover.layer_entries) + 2 * cover.sample_entries
        budget = 2 * self._autograd.workspace_bytes()
        return budget // max(1, entries * self.dtype.itemsize)

    def passing_tile(self, directions: int) -> int:
        """Return how many samples go through at once where no factor is needed twice: fewer than `tile`.

        Memory is then the same for any number of samples, and a few megabytes.
        """
        cover = self.coverage
        entries = directions * (2 * cover.kept_entries + cover.layer_entries) + 2 * cover.sample_entries
        sample = max(1, entries * self.dtype.itemsize)
        return max(1, min(self.tile(directions), max(_LEAST_SAMPLES, _PASSING_BYTES // sample)))

    def tile_share(self, directions: int, *, passing: bool = False) -> Share:
        """Return `tile` samples at a time, or `passing_tile`, and less where memory runs out."""
        size = self.passing_tile if passing else self.tile
        return self._autograd.tile_share(directions, lambda: max(1, size(directions)))

    def of_outputs(
        self, params: Parameters, inputs: Inputs, outputs: Tensor, compact: bool = False
    ) -> Factors:
        """Return the factors of all samples for single outputs, ``(r,)`` numbers."""
        unit = torch.zeros((len(outputs), 1, inputs.num_outputs), dtype=self.dtype, device=self.device)
        unit[torch.arange(len(outputs)), 0, outputs] = 1
        return self.of(params, inputs, unit.expand(-1, inputs.num_samples, -1), compact)

    def of(self, params: Parameters, inputs: Inputs, cotangents: Tensor, compact: bool = False) -> Factors:
        """Return the factors of all samples for ``(C, N, O)`` cotangents.

        Args:
            params: The selected parameters.
            inputs: N samples.
            cotangents: C directions for each of them.
            compact: Whether gradients that are smaller than their factors are written down instead.

        Returns:
            The factors.

        Raises:
            CoverageChanged: If a batch uses covered parameters in another way than at construction.
        """
        with self.linearization.safe_context():
            found = self._autograd.over_samples(
                inputs,
                lambda start, stop, batch: self._collect(params, batch, cotangents[:, start:stop], compact),
            )
            parts = [part for _, _, part in found]
        return parts[0] if len(parts) == 1 else _concatenate(parts)

    def _collect(self, params: Parameters, batch: Batch, cotangents: Tensor, compact: bool) -> Factors:
        recording = record_batch(self.linearization, params, batch)
        layouts, covered = self.coverage.layouts, self.coverage.covered
        unknown = [call for call in recording.calls if call.signature not in layouts]
        lost = {place.index for call in unknown for place in call.places.values()}
        self._require_known((lost | recording.uncovered.keys()) & covered)
        units = plan_units(recording.calls, covered)
        chunk = self.coverage.chunk(len(cotangents), cotangents.shape[1])
        cotangents = cotangents.to(recording.output)
        return collect(recording, units, layouts, cotangents, self.dtype, chunk, compact=compact)

    def _require_known(self, lost: set[int]) -> None:
        if lost:
            names = ", ".join(repr(self.linearization.names[i]) for i in sorted(lost))
            raise CoverageChanged(
                f"a batch uses {names} in another way than the first samples did: the forward pass depends "
                "on values; use engine='autograd'"
            )

    def written_down(self, factors: Factors) -> Tensor:
        """Return ``(B, C, P)`` gradients, zero where a parameter is not covered."""
        layers: list[Outer | Direct] = [*factors.outers, *factors.directs]
        directions = layers[0].gradients.shape[1] if layers else 0
        shape = (factors.count, directions, self.linearization.num_parameters)
        tile = torch.zeros(shape, dtype=self.dtype, device=self.device)
        for layer in layers:
            weight, bias = unit_spans(layer.unit, self.rows)
            if isinstance(layer, Direct):
                tile[..., weight.start : weight.stop] += layer.gradients
                continue
            gradients = outer_gradients(layer.gradients, layer.activations)
            tile[..., weight.start : weight.stop] += in_parameter_order(gradients, layer.transposed)
            if bias is not None:
                tile[..., bias.start : bias.stop] += layer.gradients.sum(-1).flatten(2)
        return tile

    def scattered(self, target: Tensor, rest: Tensor) -> Tensor:
        """Add ``(..., P')`` of the parameters that are not covered to where they belong in ``(..., P)``."""
        offset = 0
        for index in self.uncovered:
            size = self.linearization.sizes[index]
            start = self.starts[index]
            target[..., start : start + size] += rest[..., offset : offset + size]
            offset += size
        return target

    def gathered(self, vectors: Tensor) -> Tensor:
        """Take the parameters that are not covered out of ``(k, P)``."""
        starts = self.starts
        return torch.cat([vectors[:, starts[i] : starts[i + 1]] for i in self.uncovered], dim=1)


def _concatenate(parts: list[Factors]) -> Factors:
    """Join the factors of several batches of samples."""
    outers = [
        Outer(
            layers[0].unit,
            layers[0].transposed,
            join_samples([layer.activations for layer in layers]),
            torch.cat([layer.gradients for layer in layers]),
        )
        for layers in zip(*(part.outers for part in parts), strict=True)
    ]
    directs = [
        Direct(pieces[0].unit, torch.cat([piece.gradients for piece in pieces]))
        for pieces in zip(*(part.directs for part in parts), strict=True)
    ]
    return Factors(sum(part.count for part in parts), outers, directs)
