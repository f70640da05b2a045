"""The layerwise engine: exact blocks and products from activations and output gradients."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..model import Inputs
from ..results import LayerInfo
from .attribution import CoverageChanged
from .autograd import AutogradEngine
from .checks import require_finite_product
from .cost import KernelShape, autograd_kernel_passes, layerwise_kernel_passes
from .differentiation import Parameters
from .factors import Factors
from .gathering import FactorSource
from .layer_blocks import layer_gram
from .layer_table import MeasuredLayer, describe_layers, measure_layers
from .layerwise_core import LayerwiseCore, Result
from .memory import format_bytes, if_it_fits
from .products import CachedFactors
from .recurrent import states_diagonal_passes, states_kernel_passes
from .tail_blocks import tail_diagonal, tail_kernel
from .tiling import sample_slices

__all__ = ["LayerwiseEngine"]

logger = logging.getLogger(__name__)


class LayerwiseEngine(LayerwiseCore):
    r"""Exact kernels, diagonals, Gram matrices and products from the structure of layers.

    For each covered parameter the gradient of sample n in direction c is
    :math:`\sum_s g_{ncs} a_{ns}^\top` with activations a and output gradients g, taken from one forward
    pass and C backward passes; kernels follow from these without ever writing down N·O × P. Parameters
    that no rule covers go to automatic differentiation, and the two parts add up. Where gradients of the
    result are recorded, everything goes to automatic differentiation.

    Args:
        linearization: The pure function and its snapshot.
        differentiation: What the model allows.
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

    # kernels and rows

    def kernel(
        self,
        params: Parameters,
        left: Inputs,
        right: Inputs,
        left_outputs: Tensor,
        right_outputs: Tensor,
    ) -> Tensor:
        """Return dense kernels Σ_r J(left)_{o_r} J(right)_{o_r}ᵀ layer by layer.

        Args:
            params: The selected parameters, snapshot or live.
            left: N₁ samples.
            right: N₂ samples; the same object as ``left`` lets symmetry halve the work.
            left_outputs: ``(M, R, r₁)`` output numbers: M kernels, R terms, r₁ outputs a sample.
            right_outputs: ``(M, R, r₂)``.

        Returns:
            ``(M, N₁·r₁, N₂·r₂)``. Cost: one forward and one backward pass an output on each side, more
            where the workspace holds the factors of only a part of the samples; memory: the result and
            two tiles of factors.

        Raises:
            BackwardLimitError: If the outputs take more backward passes than ``max_backwards``.
        """
        self._require_few("the kernel", left_outputs, right_outputs)
        result = self._combined(
            params,
            (left, right),
            lambda source: tail_kernel(source, params, left, right, left_outputs, right_outputs),
            lambda engine, chosen: engine.kernel(chosen, left, right, left_outputs, right_outputs),
            torch.Tensor.add_,
        )
        require_finite_product(result, "the kernel", self.linearization, left_outputs)
        return result

    def kernel_passes(self, inputs: Inputs, wanted: KernelShape, distinct: int) -> float:
        """Return what a dense kernel costs, in passes over the samples of its rows.

        Args:
            inputs: Samples of the rows.
            wanted: The kernel.
            distinct: Number of distinct outputs in it.
        """
        if not self._coverage.covered:
            return autograd_kernel_passes(wanted, distinct)
        over_time = states_kernel_passes(self._source, inputs, wanted)
        if over_time is not None:
            return over_time
        distinct, wanted = self._coverage.backwards(distinct), self._coverage.reduced(wanted)
        shapes = [layer.shape for layer in self._measure(inputs) if layer.shape is not None]
        covered = layerwise_kernel_passes(wanted, distinct, shapes, self.options.kernel)
        if not self._source.uncovered:
            return covered
        share = sum(self.linearization.sizes[i] for i in self._source.uncovered) / self.num_parameters
        return covered + share * autograd_kernel_passes(wanted, distinct)

    def layers(self, inputs: Inputs, wanted: KernelShape, distinct: int) -> tuple[LayerInfo, ...]:
        """Return how each parameter is computed, in the parameters' order.

        Args:
            inputs: Samples of the rows.
            wanted: The kernel in question.
            distinct: Number of distinct outputs in it.
        """
        measured = self._measure(inputs) if self._coverage.covered else []
        tile = max(1, self._source.tile(distinct))
        shown = replace(wanted, left=min(wanted.left, tile), right=min(wanted.right, tile))
        return describe_layers(self._source, measured, shown, wanted, inputs.num_outputs)

    def _measure(self, inputs: Inputs) -> list[MeasuredLayer]:
        """Return the layers' sizes, seen on one sample."""
        while self._measured is None and self._coverage.covered:
            try:
                self._measured = measure_layers(self._source, inputs)
            except CoverageChanged as change:
                self._demote(change)
        return self._measured or []

    @property
    def over_time(self) -> bool:
        """Whether the output is all hidden states of a recurrent layer, whose kernels have their own way."""
        return self._coverage.states is not None

    def diagonal_passes(self, inputs: Inputs, distinct: int) -> float:
        """Return what the diagonal costs, in passes over the samples.

        Args:
            inputs: N samples.
            distinct: Number of distinct outputs in it.
        """
        over_time = states_diagonal_passes(self._source, inputs, distinct)
        if over_time is not None:
            return over_time
        return float(distinct if self._source.uncovered else self._coverage.backwards(distinct))

    def diagonal(self, params: Parameters, inputs: Inputs, outputs: Tensor) -> Tensor:
        """Return kernel diagonals Σ_r |∇f_{i,o_r}|².

        Args:
            params: The selected parameters, snapshot or live.
            inputs: N samples.
            outputs: ``(M, R, r)`` output numbers.

        Returns:
            ``(M, N·r)``. Cost: one forward pass and a backward pass for each distinct output, or column of
            the linear layer that ends the model, whichever are fewer; memory does not grow with N.

        Raises:
            BackwardLimitError: If these are more than ``max_backwards``.
        """
        self._require_few("the diagonal", outputs)
        result = self._combined(
            params,
            (inputs,),
            lambda source: tail_diagonal(source, params, inputs, outputs),
            lambda engine, chosen: engine.diagonal(chosen, inputs, outputs),
            torch.Tensor.add_,
        )
        require_finite_product(result, "the diagonal", self.linearization, outputs)
        return result

    def sample_gram(self, params: Parameters, inputs: Inputs, cotangents: Tensor) -> Tensor:
        r"""Return the Gram matrix of per-sample gradients, :math:`W_{ir,js} = g_{ir}^\top g_{js}`.

        Args:
            params: The selected parameters, snapshot or live.
            inputs: N samples.
            cotangents: ``(N, r, O)``: r output combinations for each sample.

        Returns:
            ``(N, r, N, r)``. Cost: one forward and r backward passes, more where tiles do not fit at once.
        """
        result = self._combined(
            params,
            (inputs, cotangents),
            lambda source: layer_gram(source, params, inputs, cotangents),
            lambda engine, chosen: engine.sample_gram(chosen, inputs, cotangents),
            torch.Tensor.add_,
        )
        require_finite_product(result, "the Gram matrix", self.linearization, cotangents)
        return result

    def jacobian_tile(self, params: Parameters, inputs: Inputs, outputs: Tensor) -> Tensor:
        """Return the rows of J of every sample for some outputs.

        Args:
            params: The selected parameters, snapshot or live.
            inputs: B samples; the caller keeps B·r·P within `workspace_bytes`.
            outputs: ``(r,)`` output numbers.

        Returns:
            ``(B, r, P)``. Cost: one forward and r backward passes over these samples.
        """
        result = self._combined(
            params,
            (inputs,),
            lambda source: source.written_down(source.of_outputs(params, inputs, outputs)),
            lambda engine, chosen: engine.jacobian_tile(chosen, inputs, outputs),
            self._source.scattered,
        )
        require_finite_product(result, "Jᵀv of single samples", self.linearization, outputs)
        return result

    def linear_image(
        self,
        params: Parameters,
        inputs: Inputs,
        outputs: Tensor,
        of_factors: Callable[[Factors], Tensor],
        of_rows: Callable[[Tensor, Sequence[int]], Tensor],
    ) -> Tensor:
        """Return a linear image of the rows of J that layers' factors have without being written down.

        Args:
            params: The selected parameters, snapshot or live.
            inputs: N samples.
            outputs: ``(r,)`` output numbers.
            of_factors: Image ``(B, r, k)`` of the factors of B samples.
            of_rows: Image of rows ``(B, r, p)`` of the parameters whose numbers follow.

        Returns:
            ``(N, r, k)``. Cost: one forward and r backward passes.
        """
        fitting = self._source.tile(len(outputs)) if self._coverage.covered else 0
        size = max(1, fitting or self.tile_samples(len(outputs)))
        tiles = []
        for _, _, part in sample_slices(inputs, size):

            def by_rows(engine: AutogradEngine, chosen: Parameters, part: Inputs = part) -> Tensor:
                whole = engine is self._autograd
                numbers = range(len(params)) if whole else self._source.uncovered
                return of_rows(engine.jacobian_tile(chosen, part, outputs), numbers)

            def by_layers(source: FactorSource, part: Inputs = part) -> Tensor:
                return of_factors(source.of_outputs(params, part, outputs))

            tiles.append(self._combined(params, (part,), by_layers, by_rows, torch.Tensor.add_))
        return tiles[0] if len(tiles) == 1 else torch.cat(tiles)

    # products

    def vjp(self, params: Parameters, inputs: Inputs, vectors: Tensor) -> Tensor:
        """Return Jᵀv, flat, for each row of ``vectors``.

        Args:
            params: The selected parameters, snapshot or live.
            inputs: N samples.
            vectors: ``(k, N, O)``.

        Returns:
            ``(k, P)``. Cost: from cached factors where these exist or pay, else k vjp passes.
        """
        ready = self._ready(params, inputs, inputs, len(vectors) / 2, vectors)
        if ready is None:
            return self._autograd.vjp(params, inputs, vectors)
        with torch.no_grad():
            found = self._from_factors(lambda: ready[0].pull(vectors, self.num_parameters))
            if found is None:
                return self._autograd.vjp(params, inputs, vectors)
            result, rest = found, self._rest(params)
            if rest is None:
                self._autograd._report(vjp=len(vectors))
            else:
                self._source.scattered(result, rest[0].vjp(rest[1], inputs, vectors))
        require_finite_product(result, "Jᵀv", self.linearization, vectors)
        return result

    def jvp(self, params: Parameters, inputs: Inputs, tangents: Tensor) -> Tensor:
        """Return J p for each row of ``tangents``.

        Args:
            params: The selected parameters, snapshot or live.
            inputs: N samples.
            tangents: ``(k, P)``.

        Returns:
            ``(k, N, O)``. Cost: from cached factors where these exist or pay, else k jvp passes.
        """
        ready = self._ready(params, inputs, inputs, len(tangents) / 2, tangents)
        if ready is None:
            return self._autograd.jvp(params, inputs, tangents)
        with torch.no_grad():
            found = self._from_factors(lambda: ready[0].push(tangents))
            if found is None:
                return self._autograd.jvp(params, inputs, tangents)
            result, rest = found, self._rest(params)
            if rest is None:
                self._autograd._report(jvp=len(tangents))
            else:
                result += rest[0].jvp(rest[1], inputs, self._source.gathered(tangents))
        require_finite_product(result, "J p", self.linearization, tangents)
        return result

    def product(self, params: Parameters, left: Inputs, right: Inputs, vectors: Tensor) -> Tensor:
        """Return J(left) J(right)ᵀ v for each row of ``vectors``.

        Args:
            params: The selected parameters, snapshot or live.
            left: N₁ samples.
            right: N₂ samples; the same object as ``left`` shares all factors.
            vectors: ``(k, N₂, O)``.

        Returns:
            ``(k, N₁, O)``. Cost: from cached factors where these exist or pay, else k vjp and k jvp passes.
        """
        ready = self._ready(params, left, right, len(vectors), vectors)
        if ready is None:
            return self._autograd.product(params, left, right, vectors)
        with torch.no_grad():
            found = self._from_factors(lambda: ready[0].through(ready[1], vectors))
            if found is None:
                return self._autograd.product(params, left, right, vectors)
            result, rest = found, self._rest(params)
            if rest is None:
                self._autograd._report(vjp=len(vectors), jvp=len(vectors))
            else:
                result += rest[0].product(rest[1], left, right, vectors)
        require_finite_product(result, "K v", self.linearization, vectors)
        return result

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
