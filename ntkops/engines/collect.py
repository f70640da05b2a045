"""From a recorded forward pass and a few backward passes to the factors of every unit."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from ..model.record import Call, Recording
from ..shortage import is_out_of_memory
from .adjoint import first_line
from .attribution import CoverageChanged, RowCheck
from .cost import LayerShape, written_at_once
from .factors import Direct, Outer, in_parameter_order, outer_gradients
from .layer_factors import Factors
from .layer_rules import RULES, Activation, Layout, OneHot
from .passes import report_passes
from .units import Unit, Use, is_transposed

__all__ = ["Collector", "RowCheckMaker", "backward", "collect", "require_own_rows"]

Result = TypeVar("Result")


def backward(
    recording: Recording, cotangents: Tensor, calls: Sequence[int], batched: bool, last: bool
) -> list[Tensor | None]:
    """Return ``(K, *shape)`` gradients at the results of some calls, for cotangents ``(K, B, O)``."""
    edges = [recording.calls[number].edge for number in calls]
    if not edges or not recording.output.requires_grad:
        return [None] * len(edges)
    if not batched:
        assert len(cotangents) == 1
    found = torch.autograd.grad(
        [recording.output],
        edges,
        [cotangents if batched else cotangents[0]],
        retain_graph=not last,
        allow_unused=True,
        is_grads_batched=batched,
    )
    return list(found) if batched else [None if g is None else g.unsqueeze(0) for g in found]


RowCheckMaker = Callable[..., RowCheck]  # given the numbers of calls, their layouts, and s and w if known


def collect(
    recording: Recording,
    units: Sequence[Unit],
    layouts: Mapping[tuple[object, ...], Layout],
    cotangents: Tensor,
    dtype: torch.dtype,
    chunk: int,
    compact: bool = False,
    check: RowCheckMaker | None = None,
) -> Factors:
    """Return the factors of every unit for ``(C, B, O)`` cotangents; the graph of the recording is used up.

    ``chunk`` directions go through one batched backward pass, one after the other where it is 1. ``compact``
    writes gradients down at once that are smaller than their factors. ``check`` makes the check of rows, None
    for none. Cost: C backward passes, one more for the check; memory: that of the factors.

    Raises:
        CoverageChanged: If a rule fails, or a row belongs to another sample than it is held to belong to.
    """
    directions, count = cotangents.shape[:2]
    collector = Collector(recording, units, layouts, count, directions, dtype, compact)
    numbers = collector.numbers
    rows = None if check is None or not numbers else check(numbers, collector.layouts)
    for start in range(0, directions, chunk):
        part = cotangents[start : start + chunk]
        last = rows is None and start + chunk >= directions
        found = dict(zip(numbers, backward(recording, part, numbers, chunk > 1, last), strict=True))
        if rows is not None:
            rows.add(start, found)
        collector.add(start, len(part), found)
    if rows is not None:
        sent = rows.cotangents(cotangents)  # u_n = s_n Σ_c w_c y_cn, (1, B, O)

        def at_calls(multiple: float = 1.0) -> dict[int, Tensor | None]:
            report_passes(checks=1)
            return dict(
                zip(numbers, backward(recording, multiple * sent, numbers, False, False), strict=True)
            )

        require_own_rows(recording.calls, rows.differing(at_calls(), at_calls))
    return collector.finish()


def require_own_rows(calls: Sequence[Call], differing: Sequence[int]) -> None:
    """Give up the parameters of calls whose rows are not those of the samples that they were taken for."""
    if differing:
        why = "rows of its result belong to other samples, or to several"
        raise CoverageChanged(
            {
                place.index: f"{calls[number].rule}: {why}"
                for number in differing
                for place in calls[number].places.values()
            }
        )


class Collector:
    """Makes the factors of every unit from gradients at the results of calls, for B samples and C directions.

    Attributes:
        numbers: The calls at which gradients are wanted.
        layouts: Where their samples are.
    """

    def __init__(
        self,
        recording: Recording,
        units: Sequence[Unit],
        layouts: Mapping[tuple[object, ...], Layout],
        count: int,
        directions: int,
        dtype: torch.dtype,
        compact: bool = False,
    ) -> None:
        calls = recording.calls
        self.numbers = sorted({use.call for unit in units for use in unit.uses})
        self.layouts = {number: layouts[calls[number].signature] for number in self.numbers}
        self._units, self._count = units, count
        sizes = count, directions, dtype, compact
        self._makers = [_guarded(unit, _Maker, unit, calls, self.layouts, *sizes) for unit in units]

    def add(self, start: int, width: int, gradients: Mapping[int, Tensor | None]) -> None:
        """Take ``(K, *shape)`` gradients of ``width`` directions, from number ``start`` on."""
        for unit, maker in zip(self._units, self._makers, strict=True):
            _guarded(unit, maker.add, start, width, gradients)

    def finish(self) -> Factors:
        """Return the factors."""
        pairs = zip(self._units, self._makers, strict=True)
        made = [item for unit, maker in pairs for item in _guarded(unit, maker.finish)]
        outers = [item for item in made if isinstance(item, Outer)]
        return Factors(self._count, outers, [item for item in made if isinstance(item, Direct)])


def _guarded(unit: Unit, work: Callable[..., Result], *args: object) -> Result:
    """Do the work of a unit; a rule that fails loses it, and is no error of the user's."""
    try:
        return work(*args)
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        reason = f"a layer rule failed: {first_line(error)}"
        lost = {use.place.index for use in unit.uses} | ({unit.bias.index} if unit.bias else set())
        raise CoverageChanged(dict.fromkeys(lost, reason)) from error


class _Maker:
    """Fills the factors of one unit, direction by direction."""

    def __init__(
        self,
        unit: Unit,
        calls: Sequence[Call],
        layouts: Mapping[int, Layout],
        count: int,
        directions: int,
        dtype: torch.dtype,
        compact: bool,
    ) -> None:
        self._unit, self._calls, self._layouts = unit, calls, layouts
        self._count, self._directions, self._dtype = count, directions, dtype
        self._buffer: Tensor | None = None
        self._spans: list[tuple[int, int]] = []
        self._zeros = False
        self._activations = {use: self._activation(use) for use in unit.uses}
        self._written = compact and self._is_compact()
        self._shifts: Tensor | None = None  # gradients of the bias of a unit that is written down

    def _activation(self, use: Use) -> Activation | None:
        """Return what no direction changes; the gradient of a bias needs nothing but output gradients."""
        call = self._calls[use.call]
        if self._unit.kind == "direct" and use.role == "bias":
            return None
        found = RULES[call.rule].activation(call, self._layouts[use.call], self._count)
        return found if isinstance(found, OneHot) else found.to(self._dtype)

    def _is_compact(self) -> bool:
        """Whether the unit is one call with at least d_in positions."""
        if self._unit.kind != "outer" or len(self._unit.uses) > 1:
            return False
        (held,) = self._activations.values()
        if not isinstance(held, Tensor):
            return False
        groups, inputs, positions = held.shape[1:]  # (B, groups, d_in, S)
        return written_at_once(LayerShape(positions, inputs, self._size() // (groups * inputs), groups))

    def _write(self, start: int, use: Use, found: Tensor | None) -> None:
        """Write gradients down instead of their factors."""
        if self._buffer is None:
            held = self._activations[use]
            assert isinstance(held, Tensor)
            shape = (self._count, self._directions, self._size())
            self._buffer = torch.zeros(shape, dtype=self._dtype, device=held.device)
            if self._unit.bias is not None:
                # Entries of the bias: p / (groups d_in) = d_out for each group.
                height = self._size() // (held.shape[1] * held.shape[2]) * held.shape[1]
                self._shifts = self._buffer.new_zeros((*shape[:2], height))
        if found is None:
            return
        activation = self._activations[use]
        assert activation is not None
        piece = self._outer(use, found).to(self._dtype)
        some = slice(start, start + piece.shape[1])  # directions
        gradients = outer_gradients(piece, activation)
        self._buffer[:, some] = in_parameter_order(gradients, is_transposed(self._calls, use))
        if self._shifts is not None:
            self._shifts[:, some] = piece.sum(-1).flatten(2)

    def add(self, start: int, width: int, gradients: Mapping[int, Tensor | None]) -> None:
        """Take the gradients at all uses of some directions: side by side as positions, or added up."""
        outer = self._unit.kind == "outer"
        if self._written:
            self._write(start, self._unit.uses[0], gradients[self._unit.uses[0].call])
            return
        for position, use in enumerate(self._unit.uses):
            found = gradients[use.call]
            if found is None:
                self._skip(position, start, width)
                continue
            piece = self._outer(use, found) if outer else self._direct(use, found)  # (B, K, ...)
            if self._buffer is None and width == self._directions and len(self._unit.uses) == 1:
                self._buffer = piece.to(self._dtype)  # class-major in memory: who needs rows copies them
                return
            target = self._target(position, piece)[:, start : start + width]
            if outer or position == 0:
                target.copy_(piece)
            else:
                target.add_(piece)

    def _skip(self, position: int, start: int, width: int) -> None:
        """Note that some directions do not depend on a call: memory that stays unwritten must be zero."""
        if self._buffer is None:
            self._zeros = True
        elif self._unit.kind == "outer":
            first, last = self._spans[position]
            self._buffer[:, start : start + width, ..., first:last] = 0
        elif position == 0:
            self._buffer[:, start : start + width] = 0

    def _outer(self, use: Use, gradients: Tensor) -> Tensor:
        """Return ``(B, K, groups, d_out, S)`` output gradients of a use."""
        call = self._calls[use.call]
        return RULES[call.rule].gradient(call, self._layouts[use.call], self._count, gradients)

    def _positions(self, use: Use) -> int:
        """Return the number S of positions of a use."""
        activation = self._activations[use]
        assert activation is not None
        return activation.index.shape[1] if isinstance(activation, OneHot) else activation.shape[-1]

    def _target(self, position: int, piece: Tensor) -> Tensor:
        """Return the part of the memory of all directions that a use fills."""
        if self._buffer is None:
            lead = (self._count, self._directions)
            if self._unit.kind == "outer":
                # Σ over uses of Σ_s g_s a_sᵀ is one sum over all of their positions.
                sizes = [self._positions(use) for use in self._unit.uses]
                ends = torch.tensor(sizes).cumsum(0).tolist()
                self._spans = list(zip([0, *ends[:-1]], ends, strict=True))
                shape = (*lead, *piece.shape[2:4], ends[-1])
            else:
                shape = (*lead, self._size())
            make = torch.zeros if self._zeros else torch.empty
            self._buffer = make(shape, dtype=self._dtype, device=piece.device)
        if self._unit.kind != "outer":
            return self._buffer
        first, last = self._spans[position]
        return self._buffer[..., first:last]

    def _parameter(self) -> Tensor:
        """Return what stands for the parameter in the first use."""
        use = self._unit.uses[0]
        found = self._calls[use.call].arguments[use.role]
        assert isinstance(found, Tensor)
        return found

    def _size(self) -> int:
        """Return the number p of entries of the unit: its rows, each as long as one of the first use."""
        use = self._unit.uses[0]
        rows = use.place.stop - use.place.start
        return self._parameter().numel() // max(rows, 1) * (self._unit.stop - self._unit.start)

    def _direct(self, use: Use, gradients: Tensor) -> Tensor:
        """Return ``(B, K, p)`` gradients of a use, zero at rows of the unit that it does not see."""
        call, layout = self._calls[use.call], self._layouts[use.call]
        rule, activation = RULES[call.rule], self._activations[use]
        if rule.kind(use.role) == "direct":
            found = rule.direct(call, use.role, activation, layout, self._count, gradients)
        else:
            assert activation is not None
            factor = rule.gradient(call, layout, self._count, gradients).to(self._dtype)
            found = in_parameter_order(outer_gradients(factor, activation), is_transposed(self._calls, use))
        if (use.place.start, use.place.stop) == (self._unit.start, self._unit.stop):
            return found
        full = found.new_zeros((*found.shape[:2], self._size()))
        row = found.shape[2] // (use.place.stop - use.place.start)
        first = (use.place.start - self._unit.start) * row
        full[..., first : first + found.shape[2]] = found
        return full

    def finish(self) -> list[Outer | Direct]:
        """Return the factors, zeros where the output depends on no use."""
        unit, first = self._unit, self._unit.uses[0]
        if self._written:
            assert self._buffer is not None
            written: list[Outer | Direct] = [Direct(unit, self._buffer)]
            if self._shifts is not None and unit.bias is not None:
                bias = Unit(unit.bias.index, unit.bias.start, unit.bias.stop, "direct", unit.uses)
                written.append(Direct(bias, self._shifts))
            return written
        if unit.kind == "outer":
            activations = _join([self._activations[use] for use in unit.uses])
            if self._buffer is None:
                self._buffer = self._empty(activations)
            return [Outer(unit, is_transposed(self._calls, first), activations, self._buffer)]
        if self._buffer is None:
            parameter = self._parameter()
            self._buffer = torch.zeros(
                (self._count, self._directions, self._size()), dtype=self._dtype, device=parameter.device
            )
        return [Direct(unit, self._buffer)]

    def _empty(self, activations: Activation) -> Tensor:
        """Return zero gradients: the output does not depend on these calls."""
        entries = self._size()
        if isinstance(activations, OneHot):
            groups, outputs, positions = 1, entries // activations.size, activations.index.shape[1]
        else:
            groups, inputs, positions = activations.shape[1:]
            outputs = entries // (inputs * groups)
        shape = (self._count, self._directions, groups, outputs, positions)
        return torch.zeros(shape, dtype=self._dtype, device=self._parameter().device)


def _join(activations: Sequence[Activation | None]) -> Activation:
    """Join the activations of several uses along their positions."""
    first = activations[0]
    assert first is not None
    if len(activations) == 1:
        return first
    if isinstance(first, OneHot):
        return OneHot(torch.cat([a.index for a in activations if isinstance(a, OneHot)], dim=1), first.size)
    return torch.cat([a for a in activations if isinstance(a, Tensor)], dim=-1)
