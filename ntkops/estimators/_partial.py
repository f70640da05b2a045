"""Axes of the state that a partial trace sums over, and the samplers of its blocks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..errors import InputError, OutOfRangeError, ShapeError
from ..operators.capabilities import tile_slices
from ._request import Operand, require_finite
from ._statistics import Summary
from ._stratified import FrameMoments, extend_frames
from ._stratified_grams import Strata

__all__ = [
    "Over",
    "SampledBlocks",
    "SharedProbes",
    "StateAxes",
]


Over = str | int | Sequence[str | int]


@dataclass(frozen=True)
class StateAxes:
    """Axes of the state, the samples first, some of them traced.

    Attributes:
        sizes: Size of each axis; their product is the operator's size.
        traced: Positions of the axes that are summed over, ascending.
    """

    sizes: tuple[int, ...]
    traced: tuple[int, ...]

    @classmethod
    def resolve(
        cls,
        operator: LinearOperator | Tensor,
        over: Over,
        axes: Sequence[str] | None,
        shape: Sequence[int] | None,
    ) -> StateAxes:
        """Read the arguments of `ntkops.partial_trace`."""
        sizes = _sizes(operator, shape)
        own: dict[str, int] = getattr(operator, "axes", {})
        if axes is None and own and sizes[1:] == tuple(own.values()):  # named when the kernel was made
            axes = list(own)
        names = _names(axes, sizes)
        items: Sequence[Any] = (
            list(over) if isinstance(over, Sequence) and not isinstance(over, str) else [over]
        )
        found: set[int] = set()
        for item in items:
            if item == "outputs" and "outputs" not in names:
                found |= set(range(1, len(sizes)))
            else:
                found.add(_position(item, names, len(sizes)))
        if not found:
            raise InputError("over=() traces nothing: name at least one axis, such as 'outputs' or 'samples'")
        if len(found) == len(sizes):
            raise InputError(f"over={over!r} traces every axis: use ntkops.trace(operator)")
        return cls(sizes, tuple(sorted(found)))

    @property
    def kept(self) -> tuple[int, ...]:
        """Positions of the axes of the result."""
        return tuple(i for i in range(len(self.sizes)) if i not in self.traced)

    @property
    def over_samples(self) -> bool:
        """Whether samples are summed over."""
        return 0 in self.traced

    @property
    def size(self) -> int:
        """Rows of the result."""
        return self._count(self.kept)

    @property
    def terms(self) -> int:
        """Number of blocks that are added."""
        return self._count(self.traced)

    def _count(self, axes: Sequence[int]) -> int:
        return int(torch.tensor([self.sizes[i] for i in axes], dtype=torch.long).prod())

    def rows(self) -> Tensor:
        """Return the rows of the operator as ``(terms, size)``: traced index, then kept index."""
        grid = torch.arange(self._count(range(len(self.sizes)))).view(self.sizes)
        return grid.permute(*self.traced, *self.kept).reshape(self.terms, self.size)

    def of_outputs(self) -> StateAxes:
        """Return the axes of the outputs of one sample alone; there may be nothing traced among them."""
        return StateAxes(self.sizes[1:], tuple(i - 1 for i in self.traced if i))


def _sizes(operator: LinearOperator | Tensor, shape: Sequence[int] | None) -> tuple[int, ...]:
    length = operator.shape[-1]
    if shape is None:
        shape = _own_shape(operator)
        if shape is None:
            raise InputError(
                f"the axes of a {type(operator).__name__} are not known: pass shape=(samples, ...), sizes "
                f"whose product is {length}"
            )
    sizes = tuple(shape)
    if not all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes):
        raise InputError(f"shape={sizes}: pass positive integers, the number of samples first")
    if int(torch.tensor(sizes, dtype=torch.long).prod()) != length:
        raise ShapeError(f"shape={sizes} has {torch.Size(sizes).numel()} entries, the operator {length}")
    if len(sizes) < 2:
        raise InputError(f"shape={sizes} has a single axis: use ntkops.trace(operator)")
    return sizes


def _own_shape(operator: Any) -> tuple[int, ...] | None:
    """Return samples and output axes of a kernel of ours, or samples and outputs of a selection."""
    if not hasattr(operator, "output_shape"):
        return None
    samples, outputs = operator.num_samples, operator.num_outputs
    if operator._core.rows.inputs.lengths is not None and samples * outputs != operator.shape[-1]:
        raise InputError(
            "samples differ in length, so that rows are no grid of axes: sum over axes when the kernel is "
            "made, as in ntkops.ntk(..., axes=('time', 'class'), outputs={'class': 'trace'})"
        )
    if samples * outputs != operator.shape[-1]:
        return None
    whole = operator.output_shape.numel() == outputs
    inner = tuple(getattr(operator, "axes", {}).values()) or (
        tuple(operator.output_shape) if whole else (outputs,)
    )
    return (samples, *(inner or (1,)))


def _names(axes: Sequence[str] | None, sizes: tuple[int, ...]) -> tuple[str | None, ...]:
    if axes is None:
        return ("samples", *([None] * (len(sizes) - 1)))
    names = (axes,) if isinstance(axes, str) else tuple(axes)
    if len(names) != len(sizes) - 1 or not all(isinstance(name, str) for name in names):
        raise InputError(
            f"axes={axes!r}: name each of the {len(sizes) - 1} axes of the output of one sample, which has "
            f"shape {sizes[1:]}; the axis of the samples is called 'samples'"
        )
    if len({"samples", *names}) < len(sizes):
        raise InputError(f"axes={axes!r}: the names, and 'samples', must differ")
    return ("samples", *names)


def _position(item: Any, names: tuple[str | None, ...], count: int) -> int:
    if isinstance(item, str):
        if item not in names:
            known = ["samples", "outputs", *(name for name in names[1:] if name)]
            raise InputError(
                f"over={item!r}: choose among {', '.join(map(repr, known))}, or a position from 0 (samples) "
                f"to {count - 1}; other names are given in axes="
            )
        return names.index(item)
    if isinstance(item, bool) or not isinstance(item, int):
        raise InputError(f"over={item!r}: pass names or positions of axes")
    if not -count <= item < count:
        raise OutOfRangeError(f"over={item}: the state has {count} axes, the samples first")
    return item % count


# -- random blocks whose mean is a partial trace: from shared probes, or from probes sample by sample


_WIDTH = 64  # columns multiplied at a time
_ENTRIES = 2**22  # entries of the blocks that are made at a time


class SharedProbes:
    r"""One probe z on the traced axes, shared by every entry of the kept ones.

    :math:`D\,(z \otimes I)^\top K (z \otimes I)` is an unbiased estimate for z uniform on the sphere.
    The probes are columns of a uniformly distributed orthogonal matrix: all D of them leave no error.
    Where samples are kept and a kernel of ours gives per-sample gradients, a probe costs one per-sample pass
    for each output entry that is kept; else a product for each row of the result.
    """

    one_sided = False
    least = 1
    order = 1.0

    def __init__(self, operand: Operand, axes: StateAxes, generator: torch.Generator) -> None:
        self._operand, self._axes, self._generator = operand, axes, generator
        self._rows = axes.rows()
        self._probes = torch.empty((1, axes.terms, 0), dtype=torch.float64)
        shape = (*operand.batch_shape, axes.size, axes.size)
        self._mean = torch.zeros(shape, dtype=torch.float64)
        self._spread = torch.zeros_like(self._mean)
        self._by_samples = not axes.over_samples and Strata.of([operand]) is not None

    @property
    def unit(self) -> int:
        """Passes of one probe."""
        if self._by_samples:
            return self._axes.size // self._axes.sizes[0]
        return self._axes.size * self._operand.cost

    @property
    def size(self) -> int:
        """Probes with which nothing is left to chance."""
        return self._axes.terms

    @property
    def first(self) -> int:
        """Probes before the error is looked at for the first time."""
        return min(4, self.size)

    def grow(self, columns: int) -> None:
        """Go on to so many probes in all."""
        held = self._probes.shape[-1]
        fresh = min(columns, self.size) - held
        if fresh <= 0:
            return
        probes = extend_frames(self._probes, fresh, self._generator)
        self._probes = torch.cat([self._probes, probes], dim=-1)
        for number, probe in enumerate(probes[0].T, start=held + 1):
            block = self.size * (self._gram(probe) if self._by_samples else self._product(probe)).cpu()
            shift = block - self._mean  # running mean and squared deviations (Welford 1962)
            self._mean += shift / number
            self._spread += shift * (block - self._mean)

    def _gram(self, probe: Tensor) -> Tensor:
        inner = self._axes.of_outputs()
        rows = inner.rows() if inner.traced else torch.arange(inner.size)[None]  # (D, r)
        count, outputs = self._axes.sizes[0], rows.numel()
        # One cotangent for each kept entry k: z at the traced places (s, k), zeros elsewhere, (r, O).
        cotangents = torch.zeros((rows.shape[1], outputs), dtype=torch.float64)
        cotangents.scatter_(1, rows.T, probe.expand(rows.shape[1], -1))
        cotangents = cotangents.to(dtype=self._operand.dtype, device=self._operand.device)
        gram = self._operand.capabilities.sample_gram(cotangents.expand(count, -1, -1))
        assert gram is not None
        return require_finite(gram, "the partial trace").double().flatten(2).flatten(0, 1)

    def _product(self, probe: Tensor) -> Tensor:
        operand, rows = self._operand, self._rows
        weights = probe.to(dtype=operand.dtype, device=operand.device)
        parts = []
        for part in tile_slices(self._axes.size, _WIDTH):
            width = part.stop - part.start
            block = weights.new_zeros((operand.size, width))
            # columns z ⊗ e_k of the kept entries k of this part
            block[rows[:, part], torch.arange(width)] = weights.unsqueeze(-1)
            found = operand.multiply(block.expand(*operand.batch_shape, *block.shape)).double()
            parts.append(torch.einsum("t,...tkc->...kc", probe.to(found.device), found[..., rows, :]))
        return torch.cat(parts, dim=-1)

    def summary(self) -> Summary:
        """Return the entries as they stand."""
        count = self._probes.shape[-1]
        value = self._mean.flatten(-2)
        if count == self.size:
            return Summary(value, torch.zeros_like(value), count, exact=True)
        if count < 2:
            return Summary(value, torch.full_like(value, torch.inf), 0)
        # The probes are columns of an orthogonal matrix, drawn without replacement: Var = s² / m (1 - m / D).
        variance = self._spread / (count * (count - 1)) * (1 - count / self.size)
        return Summary(value, variance.clamp(min=0).sqrt().flatten(-2), count - 1)


class SampledBlocks:
    r"""The sum of the samples' own blocks :math:`K_{ii}`, each from a few random output combinations.

    In a frame V of m columns, :math:`W = V^\top K_{ii} V` gives the unbiased estimate
    :math:`x\,V W V^\top - y\,\mathrm{tr}(W)\,I` of the block. The error is the spread over the samples: at
    least the variance in expectation.
    """

    one_sided = False
    least = 1
    order = 1.0
    unit = 1

    def __init__(self, operand: Operand, axes: StateAxes, generator: torch.Generator) -> None:
        self._strata, self._axes = Strata.require([operand], "the partial trace"), axes
        self._generator = generator
        self._frames: list[Tensor] = []
        self._grams: list[Tensor] = []

    @property
    def size(self) -> int:
        """Columns with which nothing is left to chance."""
        return self._strata.outputs

    @property
    def first(self) -> int:
        """Columns before the error is looked at for the first time."""
        return min(2, self.size)

    def grow(self, columns: int) -> None:
        """Go on to so many columns in all, at most one for each output."""
        strata = self._strata
        held = sum(frames.shape[-1] for frames in self._frames)
        fresh = min(columns, self.size) - held
        if fresh <= 0:
            return
        start = torch.empty((strata.samples, strata.outputs, 0), dtype=torch.float64)
        frames = extend_frames(torch.cat([start, *self._frames], dim=-1), fresh, self._generator)
        self._frames.append(frames)
        self._grams.append(torch.cat([block.cpu() for _, block in strata.own(0, frames)]))

    def summary(self) -> Summary:
        """Return the entries as they stand."""
        count, size = self._strata.samples, self._axes.size
        frame = FrameMoments(self.size, tuple(frames.shape[-1] for frames in self._frames))
        mean, spread = (torch.zeros((size, size), dtype=torch.float64) for _ in range(2))
        step = max(1, _ENTRIES // self.size**2)
        for part in tile_slices(count, step):
            blocks = self._blocks(part, frame)
            seen, width = part.start, len(blocks)
            centre = blocks.mean(0)
            shift = centre - mean  # Chan, Golub, LeVeque 1979
            spread += (blocks - centre).square().sum(0) + shift.square() * (seen * width / (seen + width))
            mean += shift * (width / (seen + width))
        value = (count * mean).flatten()
        if len(self._frames) == 1 and frame.columns == self.size:
            return Summary(value, torch.zeros_like(value), count, exact=True)
        if count < 2:
            return Summary(value, torch.full_like(value, torch.inf), 0)
        return Summary(value, (spread * (count / (count - 1))).sqrt().flatten(), count - 1)

    def _blocks(self, part: slice, frame: FrameMoments) -> Tensor:
        """Return the reduced blocks of some samples, ``(n, r, r)``."""
        up, down = frame.matrix()
        whole = torch.zeros((part.stop - part.start, self.size, self.size), dtype=torch.float64)
        trace = whole.new_zeros(len(whole))
        for frames, gram in zip(self._frames, self._grams, strict=True):
            whole += up * (frames[part] @ gram[part] @ frames[part].mT)
            trace += gram[part].diagonal(dim1=-2, dim2=-1).sum(-1)
        # x V W Vᵀ - y tr(W) I, with x and y from the second moments of P (`FrameMoments.matrix`)
        whole.diagonal(dim1=-2, dim2=-1).sub_(down * trace.unsqueeze(-1))
        inner = self._axes.of_outputs()
        if not inner.traced:
            return whole
        rows = inner.rows()  # (R, r)
        return whole[:, rows[:, :, None], rows[:, None, :]].sum(1)
