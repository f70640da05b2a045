"""Partial traces: the kernel over some axes of the state, summed over the others."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..arguments import checked
from ..engines.memory import format_bytes
from ..engines.passes import SharedPasses
from ..errors import DenseMemoryError, UnsupportedOperationError
from ..operators.capabilities import capabilities, dense_bytes_allowed, dense_from_tiles, tile_count
from ..results import Estimate
from ._driver import run
from ._exact import ExactWork, length_of
from ._partial import Over, SampledBlocks, SharedProbes, StateAxes
from ._plans import Sampler
from ._request import Operand, Request, require_finite
from ._statistics import Summary
from ._stratified_grams import Strata

__all__ = ["partial_trace"]

_METHODS = ("exact", "hutchinson", "stratified")
_SMALL = 2**27  # bytes of a result that no limit forbids
_BLOCK_ROWS = 512  # rows of several samples' blocks that are made at once


@checked
def partial_trace(
    operator: LinearOperator | Tensor,
    over: Over = "outputs",
    *,
    axes: Sequence[str] | None = None,
    shape: Sequence[int] | None = None,
    rtol: float | None = None,
    num_passes: int | None = None,
    method: Literal["auto", "exact", "hutchinson", "stratified"] = "auto",
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Estimate:
    r"""Compute or estimate a partial trace: the kernel summed over some axes of the state.

    The rows of an operator are entries of a state with axes (samples, output axes...), in that order. With
    s an index over the traced axes and k, l over the kept ones,

    .. math:: T_{kl} = \sum_s K_{(s, k), (s, l)} .

    Over the outputs it is the kernel between samples, (N, N), that `ntkops.ntk` makes with
    outputs="trace"; over the samples it is the (C, C) kernel between outputs. A network with hidden states
    over time has outputs (T, H): with ``axes=("time", "hidden")``, ``over=("samples", "hidden")`` gives the
    (T, T) kernel between times and ``over=("samples", "time")`` the (H, H) kernel between hidden units.
    ``over="time"`` alone keeps the samples, and is (N·H, N·H).

    Exact: from per-sample gradients of the outputs, or recursions over time, block by block; over samples
    no pair of two samples is ever made. Estimates are unbiased. "hutchinson" draws one probe z on the
    traced axes that all kept entries share, :math:`E[D (z \otimes I)^\top K (z \otimes I)]`; the probes are
    orthogonal, and all D of them exact. "stratified", where samples are traced, draws output combinations
    sample by sample, so that no noise comes from pairs of samples. Source: paper, section 4 (which names
    it as future work), and Chen et al. 2024 (SIAM J. Sci. Comput. 46, A3427).

    Args:
        operator: Square ``(*batch, n, n)`` operator or tensor.
        over: What is summed over: "samples", "outputs" (all axes but the samples), a name of ``axes``, a
            position among the axes of the state (0 is the samples, 1 the first axis of a sample's output,
            -1 the last), or a tuple of these. At least one axis must be left.
        axes: Names of the axes of one sample's output, such as ``("time", "hidden")``.
        shape: Sizes of the axes of the state, the samples first, for an operator that is not a kernel of
            ours: ``(N, C)`` or ``(N, T, H)``; their product is n. For a kernel of ours over all outputs it
            is known; for one over chosen outputs it is (N, number of outputs).
        rtol: Relative tolerance in the Frobenius norm of the result. Default 1e-2 where ``num_passes`` is
            None too.
        num_passes: Passes to spend; with ``rtol`` a cap.
        method: "auto" (exact unless that is too expensive, else "stratified" where samples are traced and
            known, else "hutchinson"), "exact", "hutchinson" or "stratified".
        generator: CPU generator of the probes; None draws a seed from the operating system.
        progress: Show a bar of passes.

    Returns:
        `Estimate` with a value of shape ``(*batch, r, r)``, float64, r the product of the kept axes in their
        order, and a standard error and an interval for each entry. The norm of ``stderr`` is the error in
        the Frobenius norm. Passes: over outputs one for each output (exact), or one for each kept output
        entry and probe; over samples one for each output (exact), or one a column; for other operators r
        product columns a probe. Memory: the result and one tile.

    Raises:
        InputError: If an axis, a shape or an option is not understood, or the passes do not pay.
        OutOfRangeError: If a position does not exist.
        ShapeError: If the operator is not square, or the shape does not fit.
        DenseMemoryError: If the result is above ``max_dense_bytes``, and 128 MiB.
        UnsupportedOperationError: If "stratified" is asked where samples are kept, or of an operator that is
            no kernel over all outputs of its samples.
        DtypeError: If the operator is not of a real floating dtype.
        NonFiniteError: If an entry is not finite.

    Warns:
        NotConvergedWarning: If the passes were spent before the tolerance was met.

    Example:
        >>> import torch, ntkops
        >>> from ntkops.estimators.partial_trace import partial_trace
        >>> _ = torch.manual_seed(0)
        >>> K = ntkops.ntk(
        ...     torch.nn.GRU(2, 3, batch_first=True), torch.randn(5, 4, 2), output=0
        ... )
        >>> names = ("time", "hidden")
        >>> (
        ...     partial_trace(K, "outputs").value.shape,
        ...     partial_trace(K, "samples").value.shape,
        ... )
        (torch.Size([5, 5]), torch.Size([12, 12]))
        >>> partial_trace(K, ("samples", "hidden"), axes=names).value.shape
        torch.Size([4, 4])
        >>> partial_trace(torch.eye(6), over=0, shape=(2, 3)).value.diagonal().tolist()
        [2.0, 2.0, 2.0]
    """
    request = Request.check(
        _METHODS, method=method, rtol=rtol, num_passes=num_passes, generator=generator, progress=progress
    )
    operand = Operand(operator)
    operand.require_square("the partial trace")
    if operand.rows.is_spread:
        raise UnsupportedOperationError(
            "partial traces of a kernel whose samples lie on several ranks are not offered: for one trace an "
            "output take ntkops.trace of ntkops.ntk(model, shard, outputs='each', group=group)"
        )
    chosen = StateAxes.resolve(operator, over, axes, shape)
    if method == "stratified" and not chosen.over_samples:
        raise UnsupportedOperationError(
            f"method='stratified' is for partial traces over samples; over={over!r} keeps them: use "
            "'hutchinson', which takes one per-sample pass a probe there"
        )
    _require_room(operand, chosen)
    found = run(_Plan(operand, chosen), request)
    square = (chosen.size, chosen.size)
    low, high = found.interval
    return dataclasses.replace(
        found,
        value=found.value.unflatten(-1, square),
        stderr=found.stderr.unflatten(-1, square),
        interval=(low.unflatten(-1, square), high.unflatten(-1, square)),
    )


def _require_room(operand: Operand, axes: StateAxes) -> None:
    """Raise where the result itself is larger than what may be dense."""
    needed = operand.batch_shape.numel() * axes.size**2 * 8
    allowed = max(dense_bytes_allowed(operand.operator), _SMALL)
    if needed > allowed:
        raise DenseMemoryError(
            f"the partial trace has {axes.size} x {axes.size} entries, {format_bytes(needed)} in float64, "
            f"above max_dense_bytes={format_bytes(allowed)}; trace the samples, too, or raise it: what is "
            "traced over outputs alone is the lazy kernel of ntkops.ntk(model, x, outputs='trace')"
        )


class _Plan:
    """A partial trace as the driver sees it: a vector of the entries."""

    name = "the partial trace"
    bounds = (-torch.inf, torch.inf)
    vector = True

    def __init__(self, operand: Operand, axes: StateAxes) -> None:
        self._operand, self._axes, self.operands = operand, axes, [operand]
        self.space, self.size = operand.rows, axes.terms
        self.eps = operand.rounding
        # Blocks of coupled samples come from one graph of all of them.
        self._over_nodes = axes.over_samples and operand.capabilities.is_coupled
        self._traced = self._traced_kernel()

    def _traced_kernel(self) -> Any:
        """Return the lazy kernel of ours summed over the traced output axes, or None where there is none."""
        own: Any = self._operand.capabilities
        known = getattr(self._operand.operator, "num_samples", None) == self._axes.sizes[0]
        if not known or own.exact_cost("tiles") == 0:
            return None
        if self._over_nodes:
            return own.node_blocks(self._axes.rows()) if own.symmetric else None
        inner = self._axes.of_outputs()
        rows = inner.rows() if inner.traced else torch.arange(inner.size)[None]
        return own.output_traced(rows)

    def exact_cost(self) -> float:
        """Return the passes of the exact value."""
        if self._traced is None:
            return float(self._operand.capabilities.exact_cost("tiles"))
        # Over samples, the blocks within them: a pass for each output, as the diagonal takes.
        kind = "diagonal" if self._axes.over_samples else "tiles"
        return float(capabilities(self._traced).exact_cost(kind))

    def exact(self, work: ExactWork) -> Tensor:
        """Return the exact entries, ``(*batch, r²)``."""
        if self._traced is None:
            value = self._from_tiles(work)
        elif self._axes.over_samples and not self._over_nodes:
            value = self._over_samples(work)
        else:
            value = dense_from_tiles(self._traced).double()
        return require_finite(value, self.name).flatten(-2)

    def _over_samples(self, work: ExactWork) -> Tensor:
        samples, size = self._axes.sizes[0], self._axes.size
        total = torch.zeros((*self._operand.batch_shape, size, size), dtype=torch.float64)
        parts = capabilities(self._traced).sample_parts(max(1, _BLOCK_ROWS // size))
        with SharedPasses(samples) as passes:
            for part, kernel in work.shown(parts, samples, "sample", length_of):
                with passes.over(part.stop - part.start):
                    dense = dense_from_tiles(kernel)
                total += _own_blocks(dense, size)
        return total

    def _from_tiles(self, work: ExactWork) -> Tensor:
        axes, source = self._axes, self._operand.capabilities
        rows = axes.rows()
        term, kept = torch.empty(rows.numel(), dtype=torch.long), torch.empty(rows.numel(), dtype=torch.long)
        term[rows] = torch.arange(axes.terms)[:, None].expand_as(rows)
        kept[rows] = torch.arange(axes.size).expand_as(rows)
        batch = self._operand.batch_shape
        total = torch.zeros((axes.size**2, *batch), dtype=torch.float64)
        side = source.tile_size()
        count = tile_count(source, source, side)
        for tile in work.shown(source.tiles(side), count, "tile", lambda _: 1):
            block = tile.block.double().cpu().movedim((-2, -1), (0, 1))  # (r, c, *batch)
            # An entry (i, j) counts iff both rows have the same traced index, and is added at their kept
            # indices.
            row, column = (term[tile.rows][:, None] == term[tile.cols]).nonzero(as_tuple=True)
            one, other = kept[tile.rows][row], kept[tile.cols][column]
            total.index_add_(0, one * axes.size + other, block[row, column])
            if source.symmetric and tile.cols.start > tile.rows.start:
                total.index_add_(0, other * axes.size + one, block[row, column])
        return total.movedim(0, -1).reshape(*batch, axes.size, axes.size)

    def choices(self) -> tuple[str, ...]:
        """Return the methods of "auto" where exact is too expensive."""
        by_samples = self._axes.over_samples and Strata.of([self._operand]) is not None
        return ("stratified", "hutchinson") if by_samples else ("hutchinson",)

    def sampler(self, method: str, generator: torch.Generator) -> Sampler:
        """Return the source of probes."""
        if method == "stratified":
            return SampledBlocks(self._operand, self._axes, generator)
        return SharedProbes(self._operand, self._axes, generator)

    def summary(self, sampler: Sampler) -> Summary:
        """Return the estimate as it stands."""
        assert isinstance(sampler, SharedProbes | SampledBlocks)
        return sampler.summary()


def _own_blocks(dense: Tensor, size: int) -> Tensor:
    """Return the sum over some samples of their own blocks ``(*batch, r, r)``, float64, on the CPU."""
    own = dense.unflatten(-1, (-1, size)).unflatten(-3, (-1, size))  # (*batch, n, r, n, r)
    return own.diagonal(dim1=-4, dim2=-2).sum(-1, dtype=torch.float64).cpu()
