"""The layerwise engine: exact blocks and products from activations and output gradients."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, Self, TypeVar

import torch
from torch import Tensor

from ..errors import BackwardLimitError
from ..model import Inputs, Linearization
from ..results import LayerInfo
from .attribution import CoverageChanged
from .autograd import AutogradEngine
from .base import Engine, Linearized, Work, is_recorded, require_finite_product
from .cost import KernelShape, layerwise_kernel_passes, tile_repeats
from .coverage import Coverage, LayerSizes
from .differentiation import Differentiation, Parameters
from .factor_cache import FactorCache
from .hidden_states import states_diagonal_passes, states_kernel_passes, verified_states
from .layer_factors import Factors
from .layer_table import describe_layers, measure_layers
from .memory import format_bytes, if_it_fits
from .options import Layerwise
from .products import CachedFactors
from .source import LayerSource
from .tiles import Source, sample_slices
from .verify import try_rules

__all__ = ["LayerwiseEngine"]

logger = logging.getLogger(__name__)

_LARGE_FACTORS = 2**24  # entries of factors that a small kernel replaces where it can
_BLOCK_ENTRIES = 2**23  # of what lies in between, for a block of columns

Auto = Literal["auto"]
Result = TypeVar("Result")


class LayerwiseEngine(Engine):
    r"""Exact kernels, diagonals, Gram matrices and products from the structure of layers.

    For each covered parameter the gradient of sample n in direction c is
    :math:`\sum_s g_{ncs} a_{ns}^\top` with activations a and output gradients g, taken from one forward
    pass and C backward passes; kernels follow from these without ever writing down N·O × P. Parameters
    that no rule covers go to automatic differentiation, and the two parts add up. Where gradients of the
    result are recorded, everything goes to automatic differentiation.

    Args:
        linearization: The pure function and its snapshot.
        first: A few samples, on which it is found out how the model is differentiated.
        coverage: Which parameters are covered, and how.
        batch_size: Samples per pass, or "auto".
        chunk_size: Columns per pass, or "auto".
        options: What the user decided, None for nothing.

    Example:
        >>> import torch
        >>> from ntkops.engines.layerwise import LayerwiseEngine
        >>> from ntkops.model import linearize
        >>> _ = torch.manual_seed(0)
        >>> linearization = linearize(torch.nn.Linear(3, 2))
        >>> inputs = linearization.inputs(torch.randn(5, 3))
        >>> engine = LayerwiseEngine.build(linearization, inputs)
        >>> engine.covered
        ('weight', 'bias')
        >>> every = torch.arange(2).view(1, 1, 2)
        >>> engine.kernel(linearization.parameters, inputs, inputs, every, every).shape
        torch.Size([1, 10, 10])
    """

    name = "layerwise"

    def __init__(
        self,
        linearization: Linearization,
        first: Inputs | None,
        coverage: Coverage,
        *,
        batch_size: int | Auto = "auto",
        chunk_size: int | Auto = "auto",
        options: Layerwise | None = None,
    ) -> None:
        super().__init__(linearization, first, batch_size=batch_size, chunk_size=chunk_size)
        self.fallback = AutogradEngine(
            linearization, first, batch_size=batch_size, chunk_size=chunk_size, like=self
        )
        self._start(coverage, options)

    def _start(self, coverage: Coverage, options: Layerwise | None) -> None:
        """Make what a copy in another process makes anew."""
        self._cache = FactorCache(self.identity)
        self._source = LayerSource(self.fallback, coverage, options)
        self._measured: list[LayerSizes] | None = None

    @classmethod
    def build(
        cls,
        linearization: Linearization,
        inputs: Inputs,
        *,
        batch_size: int | Auto = "auto",
        chunk_size: int | Auto = "auto",
        options: Layerwise | None = None,
    ) -> Self:
        """Return the engine for some inputs; what its rules cover is found, and checked, once for a model."""
        verdict = linearization.verdict
        found = verdict.coverage
        if not isinstance(found, Coverage):
            found = try_rules(linearization, inputs)
        inputs.hand_over_recordings()  # of a kind of input that needs no trial of rules
        sizes = {"batch_size": batch_size, "chunk_size": chunk_size}
        engine = cls(linearization, inputs.head(2), found, options=options, **sizes)
        if found is not verdict.coverage:
            with linearization.full_precision():
                found = replace(found, states=verified_states(engine._source, inputs))
            engine._source.coverage = verdict.coverage = found
        return engine

    def to(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Self:
        """Return the same engine for another dtype or device; no rule is tried again."""
        moved = self.linearization.to(dtype=dtype, device=device)
        first = None if self._first is None else self._first.to(dtype=dtype, device=device)
        sizes = {"batch_size": self._batch_size, "chunk_size": self._chunk_size}
        return type(self)(moved, first, self._coverage, options=self.options, **sizes)

    def __getstate__(self) -> dict[str, object]:
        """Leave identity, memory and caches behind: they are this process's."""
        state = super().__getstate__()
        del state["_cache"], state["_measured"], state["_source"]
        return {**state, "coverage": self._coverage, "options": self.options}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take a fresh identity, so that no cache of another engine is read."""
        coverage, options = state.pop("coverage"), state.pop("options")
        super().__setstate__(state)
        self._start(coverage, options)  # type: ignore[arg-type]

    def free(self) -> int:
        """Drop everything cached for this engine and return the bytes set free."""
        with self.linearization.full_precision():  # no other thread is using the workspace
            self._source.workspace.clear()
            return self._cache.clear() + self.fallback.free()

    # what it is and what it costs

    @property
    def _coverage(self) -> Coverage:
        """Which parameters are covered, and how: the source holds it, and may lose some."""
        return self._source.coverage

    @property
    def options(self) -> Layerwise:
        """What the user decided."""
        return self._source.options

    def differentiated(self, *, columns: bool = False, per_sample: bool = False) -> Differentiation:
        """Return what the model allows, with a line for every parameter that is not covered."""
        names = self.linearization.names
        reasons = tuple(
            f"layerwise: {names[i]!r} by automatic differentiation: {reason}"
            for i, reason in sorted(self._coverage.reasons.items())
        )
        found = super().differentiated(columns=columns, per_sample=per_sample)
        return replace(found, reasons=(*found.reasons, *reasons))

    @property
    def covered(self) -> tuple[str, ...]:
        """Names of the parameters that the layer rules cover."""
        return tuple(self.linearization.names[i] for i in sorted(self._coverage.covered))

    def kernel_passes(self, inputs: Inputs, wanted: KernelShape, distinct: int) -> float:
        """Return what a dense kernel costs, in passes over the samples of its rows."""
        if not self._coverage.covered:
            return self.fallback.kernel_passes(inputs, wanted, distinct)
        over_time = states_kernel_passes(self._source, inputs, wanted)
        if over_time is not None:
            return over_time
        # Behind a readout the kernel of its directions is made, and the outputs' from it.
        distinct, wanted = self._coverage.backwards(distinct), self._coverage.reduced(wanted)
        shapes = [layer.shape for layer in self._measure(inputs) if layer.shape is not None]
        covered = layerwise_kernel_passes(wanted, distinct, shapes, self.options.kernel)
        if inputs.is_coupled:  # one sample, whose directions go in groups where they do not fit together
            covered += (self._source.groups(inputs, distinct) - 1) * distinct
        if not self._source.uncovered:
            return covered
        # K is a sum over parameters: of the rest, the share of its entries in a kernel by differentiation.
        share = sum(self.linearization.sizes[i] for i in self._source.uncovered) / self.num_parameters
        return covered + share * self.fallback.kernel_passes(inputs, wanted, distinct)

    def kernel_repeats(self, inputs: Inputs, wanted: KernelShape, distinct: int) -> float:
        """Return how many times each backward pass of a dense kernel is made, where pairs of tiles meet."""
        if not self._coverage.covered:
            return tile_repeats(self.fallback.tile, wanted, distinct)
        distinct, wanted = self._coverage.backwards(distinct), self._coverage.reduced(wanted)
        if self.over_time or self._source.may_sweep(inputs, distinct):
            return 1.0
        return tile_repeats(self._source.tile, wanted, distinct)

    def layers(self, inputs: Inputs, wanted: KernelShape, distinct: int) -> tuple[LayerInfo, ...]:
        """Return how each parameter is computed in a kernel, in the parameters' order."""
        measured = self._measure(inputs) if self._coverage.covered else []
        tile = max(1, self._source.tile(distinct))
        shown = replace(wanted, left=min(wanted.left, tile), right=min(wanted.right, tile))
        return describe_layers(self._source, measured, shown, wanted, inputs.num_outputs)

    def _measure(self, inputs: Inputs) -> list[LayerSizes]:
        """Return the layers' sizes, seen on one sample, once for samples of one shape."""
        known = self.linearization.verdict.layers
        # Looking may show that a parameter is not covered: then without it, from the beginning.
        while self._measured is None and self._coverage.covered:
            key = self._coverage.covered, inputs.sample_shapes
            try:
                self._measured = known.get(key) or measure_layers(self._source, inputs)
                if inputs.sample_shapes is not None:
                    known[key] = self._measured
            except CoverageChanged as change:
                self._demote(change)
        return self._measured or []

    @property
    def over_time(self) -> bool:
        """Whether the output is all hidden states of a recurrent layer, whose kernels have their own way."""
        return self._coverage.states is not None

    def allows(self, distinct: int) -> bool:
        """Return whether the user allows as many backward passes as so many outputs take."""
        if not self._coverage.covered or self._coverage.states is not None:
            return True
        return self._coverage.backwards(distinct) <= self.options.max_backwards

    def diagonal_passes(self, inputs: Inputs, distinct: int) -> float:
        """Return what the diagonal costs, in passes over the samples."""
        over_time = states_diagonal_passes(self._source, inputs, distinct)
        if over_time is not None:
            return over_time
        return float(distinct if self._source.uncovered else self._coverage.backwards(distinct))

    # blocks and rows

    def _delegates(self, params: Parameters, *others: Tensor | Inputs) -> bool:
        """Whether automatic differentiation does all of it: nothing is covered, or graphs are recorded."""
        if not self._coverage.covered:
            return True
        live = self.linearization.differentiable
        return is_recorded(params, others, live)

    def _require_few(self, what: str, *outputs: Tensor) -> None:
        """Refuse more backward passes than the user allows, before any work."""
        if self.allows(max(numbers.numel() for numbers in outputs)):
            return  # even if all are distinct
        distinct = max(torch.unique(numbers).numel() for numbers in outputs)
        if not self.allows(distinct):
            passes, limit = self._coverage.backwards(distinct), self.options.max_backwards
            raise BackwardLimitError(
                f"{what} for {distinct} outputs takes {passes} backward passes, more than "
                f"max_backwards={limit}: choose fewer outputs (outputs=[...]), estimate (ntkops.trace, "
                "ntkops.frobenius_norm with method='hutchinson'), or pass "
                f"engine=ntkops.Layerwise(max_backwards={passes})"
            )

    def _rest(self, params: Parameters) -> tuple[AutogradEngine, Parameters] | None:
        """Return the engine for the parameters that are not covered, and these."""
        rest = self._source.uncovered
        return self.fallback.restricted(rest, params) if rest else None

    def _summed(
        self, params: Parameters, watched: Sequence[Tensor | Inputs], work: Work, by_parameter: bool = False
    ) -> Tensor:
        """Run work on the rules for what is covered, on differentiation for the rest, and add them."""
        # Coverage only shrinks: the loop ends with a set of parameters that holds, or with none.
        while not self._delegates(params, *watched):
            with torch.no_grad(), self.linearization.full_precision():
                try:
                    result = work(self._source, params)
                except CoverageChanged as change:
                    self._demote(change)
                    continue
                rest = self._rest(params)
                if rest is None:
                    return result
                add = self._source.scattered if by_parameter else Tensor.add_
                return add(result, work(*rest))
        with self.linearization.full_precision():
            return work(self.fallback, params)

    def _demote(self, change: CoverageChanged) -> None:
        """Leave parameters to automatic differentiation for good, aloud.

        What was made with their factors is made again: a sum in which a parameter counts as covered for some
        samples and as uncovered for others would hold it twice, or not at all.
        """
        coverage = self._coverage
        for index in change.lost.keys() & coverage.covered:
            name = self.linearization.names[index]
            logger.warning("parameter %r goes to automatic differentiation: %s", name, change.lost[index])
            coverage = coverage.without(index, change.lost[index])
        if not change.lost:  # the linear layer with which the model ended: one backward pass an output
            logger.warning("%s", change)
            coverage = coverage.without_readout()
        self._source.coverage = self.linearization.verdict.coverage = replace(coverage, states=None)
        self._measured = None
        self.free()

    def linear_image(
        self,
        params: Parameters,
        inputs: Inputs,
        outputs: Tensor,
        of_factors: Callable[[Factors], Tensor],
        of_rows: Callable[[Tensor, Sequence[int]], Tensor],
    ) -> Tensor:
        """Return a linear image ``(N, r, k)`` of rows of J that need not be written down, as factors have it.

        ``of_factors`` gives it ``(B, r, k)`` of the factors of B samples, ``of_rows`` of rows ``(B, r, p)``
        of the parameters whose numbers follow. Cost: one forward and r backward passes.
        """
        fitting = self._source.tile(len(outputs)) if self._coverage.covered else 0
        size = max(1, fitting or self.tile_samples(len(outputs)))
        tiles = []
        for _, _, part in sample_slices(inputs, size):

            def work(source: Source, chosen: Parameters, part: Inputs = part) -> Tensor:
                factors = source.of_outputs(chosen, part, outputs)
                # A linear image of a sum over parameters is the sum of the images.
                if source is self._source:
                    return of_factors(factors)
                everything = source is self.fallback
                numbers = range(len(params)) if everything else self._source.uncovered
                return of_rows(source.written_down(factors), numbers)

            tiles.append(self._summed(params, (part,), work))
        return tiles[0] if len(tiles) == 1 else torch.cat(tiles)

    # products

    def linearized(
        self, params: Parameters, left: Inputs, right: Inputs, operand: Tensor, columns: float
    ) -> Linearized:
        """Return products from kept factors where these exist or pay, else by automatic differentiation."""
        otherwise = self.fallback.linearized(params, left, right, operand)
        ready = self._ready(params, left, right, columns, operand)
        return otherwise if ready is None else _Products(self, params, (left, right), ready, otherwise)

    def cache_passes(self, inputs: Inputs) -> float:
        """Return the most backward passes that factors for products with some samples may take, once."""
        return self.diagonal_passes(inputs, inputs.num_outputs)

    def large_factor_passes(self, inputs: Inputs) -> float:
        """Return in how many backward passes large factors for products would be made; 0 where none are."""
        cover, directions = self._coverage, inputs.num_outputs
        if not cover.covered or cover.readout is not None:
            return 0.0
        # Small ones cost little, and a readout has few: a kernel in their place would save nothing.
        entries = inputs.num_samples * cover.product_entries(directions, self.options.product)
        return float(directions) if entries > _LARGE_FACTORS else 0.0

    def may_cache(self, inputs: Inputs, limit: int) -> bool:
        """Return whether factors of some samples fit, and take at most so many backward passes."""
        if not self._coverage.covered or self._cache.closed:
            return False
        backwards = self._coverage.backwards(inputs.num_outputs)
        allowed = min(limit, self.options.max_backwards)
        return backwards <= allowed and self._cache.fits(self._source, inputs)

    def settle(self, params: Parameters, inputs: Inputs) -> None:
        """Make the factors for products with some samples now, where they fit: a product later makes none."""
        self._ready(params, inputs, inputs, float(inputs.num_outputs), params[0])

    def _ready(
        self, params: Parameters, left: Inputs, right: Inputs, columns: float, operand: Tensor
    ) -> tuple[CachedFactors, CachedFactors] | None:
        """Return cached factors of both sides, or None where automatic differentiation is to be used."""
        while not self._delegates(params, operand, left, right):
            try:
                with torch.no_grad():
                    return self._cached(params, left, right, columns)
            except CoverageChanged as change:
                self._demote(change)
        return None

    def _cached(
        self, params: Parameters, left: Inputs, right: Inputs, columns: float
    ) -> tuple[CachedFactors, CachedFactors] | None:
        """Return the factors of both sides; None where one does not pay, or the two do not fit together."""

        def get(inputs: Inputs) -> CachedFactors | None:
            return self._from_factors(lambda: self._cache.get(self._source, params, inputs, columns))

        one = get(left)
        if one is None or left is right:
            return None if one is None else (one, one)
        other = get(right)
        # Sides that were made ready in different ways (sequences of other lengths) do not fit together.
        return None if other is None or one.spans_key != other.spans_key else (one, other)

    def _from_factors(self, work: Callable[[], Result]) -> Result | None:
        """Return work with cached factors; None, from now on, where memory does not suffice for it."""
        if self._cache.closed:
            return None
        with self.linearization.full_precision():
            found = if_it_fits(work)
        if isinstance(found, tuple):
            return found[0]
        freed = self._cache.close()
        logger.warning(
            "out of memory on %s with factors for products (%s): going on by automatic differentiation; "
            "%s of factors were dropped",
            self.linearization.device,
            found,
            format_bytes(freed),
        )
        return None


class _Products:
    """Products from kept factors, and by differentiation of what no rule covers."""

    def __init__(
        self,
        engine: LayerwiseEngine,
        params: Parameters,
        sides: tuple[Inputs, Inputs],
        ready: tuple[CachedFactors, CachedFactors],
        otherwise: Linearized,
    ) -> None:
        self._engine, self._params, self._otherwise = engine, params, otherwise
        (self._left, self._right), (self._rows, self._columns) = sides, ready

    def pull(self, vectors: Tensor) -> Tensor:
        """Return J(right)ᵀ v, ``(k, P)``."""
        engine, right = self._engine, self._right

        def add(result: Tensor, rest: AutogradEngine, params: Parameters) -> None:
            engine._source.scattered(result, rest.vjp(params, right, vectors))

        found = self._made(
            "Jᵀv", vectors, lambda some: self._columns.pull(some, engine.num_parameters), add, vjp=1
        )
        return self._otherwise.pull(vectors) if found is None else found

    def push(self, tangents: Tensor) -> Tensor:
        """Return J(left) p, ``(k, N₁, O)``."""

        def add(result: Tensor, rest: AutogradEngine, params: Parameters) -> None:
            result += rest.jvp(params, self._left, self._engine._source.gathered(tangents))

        found = self._made("J p", tangents, self._rows.push, add, jvp=1)
        return self._otherwise.push(tangents) if found is None else found

    def through(self, vectors: Tensor) -> Tensor:
        """Return J(left) J(right)ᵀ v, ``(k, N₁, O)``."""

        def add(result: Tensor, rest: AutogradEngine, params: Parameters) -> None:
            result += rest.product(params, self._left, self._right, vectors)

        found = self._made(
            "K v", vectors, lambda some: self._rows.through(self._columns, some), add, vjp=1, jvp=1
        )
        return self._otherwise.through(vectors) if found is None else found

    def _made(
        self,
        what: str,
        block: Tensor,
        work: Callable[[Tensor], Tensor],
        add: Callable[[Tensor, AutogradEngine, Parameters], None],
        **passes: int,
    ) -> Tensor | None:
        """Return work with factors and add the rest; None where memory does not suffice for factors."""
        engine = self._engine
        with torch.no_grad():
            result = engine._from_factors(lambda: self._in_blocks(block, work))
            if result is None:
                return None
            rest = engine._rest(self._params)
            if rest is None:  # else the products of the rest, which are as many, are counted
                engine.report(**{kind: number * len(block) for kind, number in passes.items()})
            else:
                add(result, *rest)
        require_finite_product(result, what, engine.linearization, block)
        return result

    def _in_blocks(self, block: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
        """Return work on some columns after the others: what lies in between grows with their number."""
        entries = max(self._rows.column_entries, self._columns.column_entries)
        step = max(1, _BLOCK_ENTRIES // max(1, entries))
        if self._engine._chunk_size != "auto":
            step = min(step, self._engine._chunk_size)
        if len(block) <= step:
            return work(block)
        result: Tensor | None = None
        for start in range(0, len(block), step):
            found = work(block[start : start + step])
            if result is None:
                result = found.new_empty((len(block), *found.shape[1:]))
            result[start : start + step] = found
        assert result is not None
        return result
