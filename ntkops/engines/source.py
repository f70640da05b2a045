"""Where factors come from: forward and backward passes over batches of samples."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model import Batch, Inputs
from ..model.record import Recording, record
from ..shortage import is_out_of_memory
from .attribution import CoverageChanged, RowCheck, limit_of, unattributable
from .collect import RowCheckMaker, collect
from .coverage import Coverage
from .differentiation import Parameters
from .factors import unit_cotangents
from .layer_factors import Factors, joined
from .layer_rules import Layout
from .memory import EngineSizes, Share
from .options import Layerwise
from .stages import Sweep, largest_stage, plan_stages, walk
from .summation import Workspace
from .units import Unit, plan_units

__all__ = ["LayerSource"]

_PASSING_BYTES = 2**22  # of one pass whose factors are used once: more is no faster, and not flat
_LEAST_SAMPLES = 16  # below which a pass costs as much as for these
_STAGE_BYTES = 2**25  # of output gradients in one stage, where there are cuts
_SWEEP_WORKSPACES = 8  # each 1/16 of the free memory, and 256 MiB at most: half of it, and 2 GiB at most


@dataclass(frozen=True)
class Known:
    """Directions out of some that have a name.

    Attributes:
        name: What they are.
        numbers: Which of them.
        count: How many there are.
    """

    name: Hashable
    numbers: Tensor
    count: int


@dataclass(frozen=True, eq=False)
class _Recorded:
    """A forward pass over ``count`` samples, and what is made of it."""

    recording: Recording
    units: list[Unit]
    count: int


class LayerSource:
    """Makes the factors of the covered parameters, as much at a time as fits, and counts the passes."""

    def __init__(self, sizes: EngineSizes, coverage: Coverage, options: Layerwise | None = None) -> None:
        self.sizes = sizes
        self.options = options or Layerwise()
        self.coverage = coverage
        self.linearization = sizes.linearization
        self.dtype: torch.dtype = self.linearization.dtype
        self.device: torch.device = self.linearization.device
        self.workspace = Workspace()
        self._whole: set[tuple[frozenset[int], int]] = set()  # sweeps that were found not to fit
        self._generator = torch.Generator().manual_seed(20)
        self._fixed = torch.empty(0, dtype=self.dtype, device=self.device)
        entries, shapes = self.linearization.sizes, self.linearization.shapes
        self.starts: tuple[int, ...] = (0, *itertools.accumulate(entries))
        # Start in the flat vector and entries of one row of each parameter.
        self.rows: dict[int, tuple[int, int]] = {
            i: (self.starts[i], size // (shape[0] if len(shape) else 1) if size else 0)
            for i, (size, shape) in enumerate(zip(entries, shapes, strict=True))
        }

    @property
    def uncovered(self) -> tuple[int, ...]:
        """Numbers of the parameters that are left to automatic differentiation."""
        count = len(self.linearization.names)
        return tuple(i for i in range(count) if i not in self.coverage.covered)

    def count_rows(self, rows: int, inputs: Inputs) -> None:
        """Report gradients of single samples as passes over all samples."""
        self.sizes.count_rows(rows, inputs)

    def _sample_bytes(self, directions: int) -> int:
        """Return the bytes of one sample's factors, and of one layer's gradients."""
        cover = self.coverage
        # Two tiles meet: factors and activations of both, and the gradient of one layer, written down.
        entries = directions * (2 * cover.kept_entries + cover.layer_entries) + 2 * cover.sample_entries
        return max(1, entries * self.dtype.itemsize)

    def tile(self, directions: int) -> int:
        """Return how many samples' factors, and one layer's gradients, fit into the workspace."""
        return 2 * self.sizes.workspace_bytes() // self._sample_bytes(directions)  # a workspace for each tile

    def groups(self, inputs: Inputs, directions: int) -> int:
        """Return in how many groups the factors of one sample are made, for its kernel with itself."""
        if self.may_sweep(inputs, directions):
            return 1
        return -(-self._sample_bytes(directions) // (2 * self.sizes.workspace_bytes()))

    def tile_share(self, directions: int) -> Share:
        """Return `tile` samples at a time, and less where memory runs out."""
        return self.sizes.tile_share(directions, lambda: max(1, self.tile(directions)))

    def passing_share(self, directions: int) -> Share:
        """Return how many samples go through at a time where no factor is needed twice: fewer than `tile`.

        Memory is then the same for any number of samples, and a few megabytes.
        """

        def size() -> int:
            least = max(_LEAST_SAMPLES, _PASSING_BYTES // self._sample_bytes(directions))
            return max(1, min(self.tile(directions), least))

        return self.sizes.tile_share(directions, size)

    def of_outputs(
        self, params: Parameters, inputs: Inputs, outputs: Tensor, compact: bool = False
    ) -> Factors:
        """Return the factors of all samples for single outputs, ``(r,)`` numbers."""
        cotangents, known = self._directions(params, inputs, outputs)
        return self.of(params, inputs, cotangents, compact, known)

    def _directions(self, params: Parameters, inputs: Inputs, outputs: Tensor) -> tuple[Tensor, Known]:
        """Return cotangents ``(C, N, O)`` for some numbers, and what they are called."""
        sent = unit_cotangents(outputs, inputs, self.dtype, self.device)
        return sent, Known("outputs", outputs, inputs.num_outputs)

    def sweep(self, params: Parameters, inputs: Inputs, outputs: Tensor, rows: int) -> Sweep | None:
        """Return the factors of all samples for ``(r,)`` numbers by stages; None where tiles are better.

        That is where the samples or their number of a pass are given, where factors are so few that one tile
        is as good, and where the graph of all samples and the gradients of one stage do not fit.
        """
        if not self.may_sweep(inputs, len(outputs)):
            return None
        cotangents, known = self._directions(params, inputs, outputs)
        with self.linearization.safe_context():
            (_, _, batch), *_ = inputs.batches(inputs.num_samples)
            made = self._recorded(params, inputs, 0, batch)
            # As long for the other side of a cross kernel, whose ``rows`` may be more.
            entries = _STAGE_BYTES // self.dtype.itemsize * inputs.num_samples // rows
            stages = plan_stages(made.recording, made.units, entries)
            # C directions, and the combination of them that the check of rows sends along.
            held = largest_stage(made.recording, stages) * (len(outputs) + 1) * self.dtype.itemsize
        # One stage holds the gradients of all layers, as a tile does; what does not fit is not recorded
        # again.
        if len(stages) < 2 or held + self._graph_bytes(inputs.num_samples) > self._sweep_bytes():
            self._whole.add((self.coverage.covered, inputs.num_samples * len(outputs)))
            return None
        check, done = self._row_check(made, cotangents, known, params, inputs, 0)
        # Whether several passes may go as one is tried by `_collect`, with a way back.
        batched = self.linearization.verdict.batched.get(self.coverage.covered, False)
        chunk = self.coverage.chunk(len(outputs), inputs.num_samples) if batched else 1
        sent = cotangents.to(made.recording.output)
        found = walk(made.recording, stages, self.coverage.layouts, sent, self.dtype, chunk, check)
        return Sweep.of(stages, self._guarded(found, done))

    def may_sweep(self, inputs: Inputs, directions: int) -> bool:
        """Whether all samples may go through one backward pass, by what is known before it is recorded."""
        count = inputs.num_samples
        factors = count * directions * self.coverage.direction_entries * self.dtype.itemsize
        if factors <= 2 * _STAGE_BYTES or not inputs.is_one_batch:  # one tile is as good; several graphs
            return False
        fits = self._graph_bytes(count) <= self._sweep_bytes() and self.sizes.may_hold(count)
        return fits and (self.coverage.covered, count * directions) not in self._whole

    def _graph_bytes(self, count: int) -> int:
        """Bytes of the graph of one forward pass over so many samples."""
        return count * self.linearization.activation_bytes

    def _sweep_bytes(self) -> int:
        """Bytes that the graph of all samples and the gradients of a stage may take."""
        return _SWEEP_WORKSPACES * self.sizes.workspace_bytes()

    def _guarded(self, stages: Iterator[Factors], done: Callable[[], None]) -> Iterator[Factors]:
        """Yield the stages, each made in the context that derivatives want."""
        while True:
            with self.linearization.safe_context():
                stage = next(stages, None)
            if stage is None:
                break
            yield stage
        done()

    def of(
        self,
        params: Parameters,
        inputs: Inputs,
        cotangents: Tensor,
        compact: bool = False,
        known: Known | None = None,
    ) -> Factors:
        """Return the factors of all samples for ``(C, N, O)`` cotangents.

        ``compact`` writes gradients down that are smaller than their factors; ``known`` says which
        directions these are among some that have a name.

        Raises:
            CoverageChanged: If a batch uses covered parameters in another way than at construction.
        """
        with self.linearization.safe_context():
            found = self.sizes.over_samples(
                inputs,
                lambda start, stop, batch: self._collect(
                    params, inputs, start, batch, cotangents[:, start:stop], known, compact
                ),
            )
            parts = [part for _, _, part in found]
        return parts[0] if len(parts) == 1 else joined(parts)

    def _collect(
        self,
        params: Parameters,
        inputs: Inputs,
        start: int,
        batch: Batch,
        cotangents: Tensor,
        known: Known | None,
        compact: bool,
    ) -> Factors:
        """Return the factors of one batch for ``(C, B, O)`` cotangents, its rows checked."""
        made = self._recorded(params, inputs, start, batch)
        recording, layouts, covered = made.recording, self.coverage.layouts, self.coverage.covered
        several = self.linearization.verdict.batched
        chunk = self.coverage.chunk(len(cotangents), cotangents.shape[1]) if several.get(covered, True) else 1
        cotangents = cotangents.to(recording.output)
        # Whether several directions may go as one is tried once for these parameters, by the check of rows.
        is_tried = chunk == 1 or covered in several or not made.units
        check, done = self._row_check(made, cotangents, known, params, inputs, start, anew=not is_tried)

        def collected(chunk: int = chunk) -> Factors:
            return collect(recording, made.units, layouts, cotangents, self.dtype, chunk, compact, check)

        output = recording.output.detach()
        try:
            together = None if is_tried else _batched(collected)
            found = together or collected(chunk if is_tried else 1)
            if not is_tried:
                several[covered] = together is not None
        except CoverageChanged:
            # Rows of several samples are a reason to look whether the outputs themselves are coupled: then it
            # is the model that is refused, and not a layer that goes another way.
            self.linearization.require_independent(inputs, start, params, batch, output, alone=True)
            raise
        done()
        return found

    def _recorded(self, params: Parameters, inputs: Inputs, start: int, batch: Batch) -> _Recorded:
        """Return a forward pass over some samples, whose uses of parameters are those of the coverage."""
        recording = record(self.linearization.function, params, batch)
        self.linearization.require_independent(inputs, start, params, batch, recording.output)
        layouts, covered = self.coverage.layouts, self.coverage.covered
        # Uses that no rule knows, and calls that are not made as the first samples made them.
        lost = dict(recording.uncovered)
        for number, reason in unattributable(recording.calls, layouts, batch.num_samples).items():
            lost.update({place.index: reason for place in recording.calls[number].places.values()})
        lost = {index: reason for index, reason in lost.items() if index in covered}
        if lost:
            raise CoverageChanged(lost)
        return _Recorded(recording, plan_units(recording.calls, covered), batch.num_samples)

    def _row_check(
        self,
        made: _Recorded,
        cotangents: Tensor,
        known: Known | None,
        params: Parameters,
        inputs: Inputs,
        start: int,
        anew: bool = False,
    ) -> tuple[RowCheckMaker | None, Callable[[], None]]:
        """Return what makes the check of rows, None where they are known, and what to do once they are.

        ``anew`` checks known rows too: they tell whether several passes may go as one.
        """

        def check(
            numbers: Sequence[int], layout: Mapping[int, Layout], factors: tuple[Tensor, Tensor] | None = None
        ) -> RowCheck:
            limit = limit_of(self.linearization.lowest_dtype)
            return RowCheck(numbers, layout, cotangents, limit, self._normal, self._vector, factors)

        # What holds for all outputs holds for every combination of them.
        named = known is not None
        known = known or Known("outputs", torch.arange(inputs.num_outputs), inputs.num_outputs)
        key = known.name, self.coverage.covered
        seen = self.linearization.seen(inputs, start, start + made.count, key, known.count, params)
        # One sample has no rows of others.
        is_known = made.count == 1 or (seen is not None and bool(seen[known.numbers].all()))

        def done() -> None:
            if seen is not None and named:
                seen[known.numbers] = True

        return None if is_known and not anew else check, done

    def _normal(self, count: int) -> Tensor:
        """Return fresh normal numbers in float64."""
        found = torch.randn(count, generator=self._generator, dtype=torch.float64)
        return found.to(self.device)

    def _vector(self, count: int) -> Tensor:
        """Return a fixed random vector in the working dtype."""
        missing = count - len(self._fixed)
        if missing > 0:  # what is there stays: both sides of a comparison are read with the same numbers
            self._fixed = torch.cat([self._fixed, self._normal(missing).to(self.dtype)])
        return self._fixed[:count]

    def written_down(self, factors: Factors) -> Tensor:
        """Return ``(B, C, P)`` gradients, zero where a parameter is not covered."""
        shape = (factors.count, factors.directions, self.linearization.num_parameters)
        tile = torch.zeros(shape, dtype=self.dtype, device=self.device)
        factors.write(tile, self.rows)
        return tile

    def divided(self, factors: Factors, owners: Mapping[str, int], count: int) -> list[Factors]:
        """Return the factors of each part, given the part of each parameter by name."""
        return factors.divided([owners[name] for name in self.linearization.names], count)

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


def _batched(work: Callable[[], Factors]) -> Factors | None:
    """Return factors from batched passes, None where these fail, differ, or are a loop in disguise."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = work()
        except (CoverageChanged, RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            if is_out_of_memory(error):
                raise
            return None
    return None if any("performance drop" in str(warning.message) for warning in caught) else found
