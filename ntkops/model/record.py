"""Recording a forward pass at function level: who uses a parameter, with what, and where it goes.

Every function call that is handed a selected parameter is looked up in a catalogue. A call found there
gets a fresh leaf in the parameter's place, so that the parameter itself is left in the autograd graph of
the output only by uses that nobody understood. That is what decides who is covered: not a list of
modules, and not a count that could miss a use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node, get_gradient_edge
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch

from .batch import Batch

__all__ = ["Call", "Entry", "Place", "Recorder", "Recording", "Recordings", "describe_calls", "record"]

Function = Callable[[Sequence[Tensor], Batch], Tensor]


@dataclass(frozen=True)
class Place:
    """What a tensor is a view of.

    Attributes:
        index: Number of the selected parameter.
        transposed: Whether it is the transpose of a matrix.
        start: First row of the parameter that it shows.
        stop: The row after the last.
    """

    index: int
    transposed: bool
    start: int
    stop: int


@dataclass(frozen=True)
class Entry:
    """How a function takes its arguments.

    Attributes:
        name: Name of the rule.
        arguments: Names of the arguments, in order.
        roles: Those in which a parameter is understood.
    """

    name: str
    arguments: tuple[str, ...]
    roles: tuple[str, ...]


@dataclass(eq=False)
class Call:
    """One understood use of parameters.

    Attributes:
        rule: Name of the rule.
        arguments: The arguments by name; tensors are detached.
        places: The parameter in each role.
        leaves: What stands in the graph for the parameter in each role.
        edge: Where the gradient of the result is found in the graph; None once that is gone.
        shape: Shape of the result.
    """

    rule: str
    arguments: dict[str, Any]
    places: dict[str, Place]
    leaves: dict[str, Tensor]
    edge: Any
    shape: torch.Size

    @property
    def signature(self) -> tuple[object, ...]:
        """What stays the same from batch to batch."""
        return (self.rule, tuple(self.places.items()), len(self.shape))


@dataclass(eq=False)
class Recording:
    """A forward pass and its understood uses of parameters.

    Attributes:
        output: ``(B, O)`` with its autograd graph.
        calls: The understood uses that the output may depend on, in order.
        uncovered: Numbers of parameters that the output also depends on in other ways, and which.
    """

    output: Tensor
    calls: list[Call]
    uncovered: dict[int, str]

    def without_graph(self) -> Recording:
        """Return what can be told without gradients; the graph and the parameters are not held."""
        calls = []
        for call in self.calls:
            kept = {name: value for name, value in call.arguments.items() if name not in call.places}
            calls.append(replace(call, arguments=kept, leaves={}, edge=None))
        return Recording(self.output.detach(), calls, self.uncovered)


_CATALOGUE: dict[Any, Entry] = {}
_EXPANSIONS: dict[Any, Callable[..., Any]] = {}


def describe_calls(catalogue: Mapping[Any, Entry], expansions: Mapping[Any, Callable[..., Any]]) -> None:
    """Say which functions are understood, and how each takes its arguments.

    The rules that understand them stand above; they say so when they are loaded. Expansions are fused
    functions in terms of simple ones; one may return NotImplemented for arguments that it does not handle.
    """
    _CATALOGUE.update(catalogue)
    _EXPANSIONS.update(expansions)


def record(function: Function, params: Sequence[Tensor], batch: Batch) -> Recording:
    """Return the record of a forward pass in plain autograd; graphs of the parameters are not used."""
    recorder = Recorder(params)
    with torch.enable_grad():
        with recorder:
            output = function(recorder.leaves, batch)
        return recorder.recording(output)


@dataclass(eq=False)
class _Traced:
    """A call with what is needed to decide whether it stands for all of its effect."""

    call: Call
    interior: set[Node]  # nodes of the graph that belong to the call
    frontier: list[Node]  # nodes of its other arguments
    versions: list[tuple[Tensor, int]]


class Recorder(TorchFunctionMode):
    """Sees every function that is handed a parameter, and gives it a fresh leaf where it is understood.

    Attributes:
        leaves: What the function to be recorded is to be called with.
        differentiates: Whether the forward pass differentiates, and so needs gradient mode.
        runs_again: Whether a block runs again in the backward pass.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        super().__init__()
        self.leaves = tuple(p.detach().requires_grad_() for p in params)
        self.differentiates = self.runs_again = False
        # A parameter without entries has no gradient that a rule would have to know.
        filled = [(index, leaf) for index, leaf in enumerate(self.leaves) if leaf.numel()]
        self._numbers = {id(leaf): index for index, leaf in filled}
        # The tensors are kept, so that no identity is met twice.
        self._tracked: dict[int, tuple[Tensor, Place]] = {
            id(leaf): (leaf, Place(index, False, 0, leaf.shape[0] if leaf.dim() else 1))
            for index, leaf in filled
        }
        self._traced: list[_Traced] = []
        self._aliases: dict[int, int] = {}  # a leaf of a call: the number of the last one that has it
        # The leaf that stands for a parameter, or a view of one, in calls.
        self._fresh: dict[int, Tensor] = {}
        self._names: dict[int, set[str]] = {}
        self._ranges: dict[int, Tensor] = {}  # what `torch.arange` made in the model, kept as above

    def recording(self, output: Tensor) -> Recording:
        """Return what was seen up to an output ``(B, O)``."""
        uncovered = self.uncovered(output) if output.requires_grad else {}
        calls = [traced.call for traced in self._traced]
        return Recording(output, calls, uncovered)

    def _found(self, values: Any) -> Iterator[Place]:
        """Yield what arguments, at any depth of lists, show of parameters."""
        for value in values:
            if isinstance(value, Tensor):
                entry = self._tracked.get(id(value))
                if entry is not None:
                    yield entry[1]
            elif isinstance(value, (list, tuple)):
                yield from self._found(value)

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at the arguments, then call the function or what stands in for it."""
        kwargs = kwargs or {}
        # Hooks on saved tensors are what blocks that run again are made of.
        if not self.runs_again:
            self.runs_again = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
        self.differentiates |= function in _DERIVATIVES
        places = list(self._found((*args, *kwargs.values())))
        if not places:
            result = function(*args, **kwargs)
            if function is torch.arange or (function in _RESHAPES and args and id(args[0]) in self._ranges):
                self._ranges[id(result)] = result
            return result
        if function in _VIEWS:
            return self._view(function, args, kwargs)
        # Positions that the model counts itself, not samples that happen to be counted.
        counted = bool(args) and id(args[0]) in self._ranges and not self.runs_again
        if function is torch.nn.functional.embedding and counted:
            with self:
                rows = _consecutive_rows(*args, **kwargs)
            if rows is not None:
                return rows
        entry = _CATALOGUE.get(function)
        if entry is not None and len(args) <= len(entry.arguments):
            return self._run(entry, function, args, kwargs)
        expansion = _EXPANSIONS.get(function)
        if expansion is not None:
            with self:
                result = expansion(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = function(*args, **kwargs)
        if _is_recorded(result):
            for place in places:
                self._names.setdefault(place.index, set()).add(getattr(function, "__name__", str(function)))
        return result

    def _view(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take a view of a parameter, and note what it shows."""
        result = function(*args, **kwargs)
        source = self._tracked.get(id(args[0])) if args else None
        if source is not None:
            parts = result if isinstance(result, (tuple, list)) else (result,)
            for part in parts:
                place = _place_of(part, *source) if isinstance(part, Tensor) else None
                if place is not None:
                    self._tracked[id(part)] = (part, place)
        return result

    def _run(self, entry: Entry, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call an understood function with leaves in the place of parameters, and write the call down."""
        given = {**dict(zip(entry.arguments, args, strict=False)), **kwargs}
        places: dict[str, Place] = {}
        frontier: list[Node] = []
        versions: list[tuple[Tensor, int]] = []
        for name, value in given.items():
            if not isinstance(value, Tensor):
                continue
            tracked = self._tracked.get(id(value))
            if tracked is not None and name in entry.roles:
                places[name] = tracked[1]
            else:
                versions.append((value, value._version))
                if value.requires_grad:
                    frontier.append(get_gradient_edge(value).node)
        if not places:
            return function(*args, **kwargs)
        # Nothing is computed, so that whoever watches operations need not be told.
        is_plain = all(type(v) in (Tensor, Parameter) for v in given.values() if isinstance(v, Tensor))
        with no_dispatch() if is_plain else nullcontext():
            aliases = {name: self._alias(given[name]) for name in places}
            detached = {k: v.detach() if isinstance(v, Tensor) else v for k, v in given.items()}
        names = entry.arguments[: len(args)]
        result = function(
            *(aliases.get(name, value) for name, value in zip(names, args, strict=True)),
            **{name: aliases.get(name, value) for name, value in kwargs.items()},
        )
        if not isinstance(result, Tensor) or not result.requires_grad:
            return result
        # Values of the arguments alone: rules read them, and differentiate nothing.
        call = Call(entry.name, detached, places, aliases, get_gradient_edge(result), result.shape)
        number = len(self._traced)
        self._aliases.update({id(alias): number for alias in aliases.values()})
        self._tracked.update({id(alias): (alias, places[name]) for name, alias in aliases.items()})
        interior, reached = _interior(call.edge.node, set(frontier))
        self._traced.append(_Traced(call, interior, reached, versions))
        return result

    def _alias(self, tensor: Tensor) -> Tensor:
        """Return a leaf that stands for a tensor, the same one every time."""
        if id(tensor) not in self._fresh:
            leaf = tensor.detach().requires_grad_()
            self._fresh[id(tensor)] = self._fresh[id(leaf)] = leaf
        return self._fresh[id(tensor)]

    def uncovered(self, output: Tensor) -> dict[int, str]:
        """Walk the graph of the output and return the parameters that it reaches past the calls."""
        # From the result of a call on to its other arguments: what lies between is known. A node inside that
        # is reached past the result belongs to a derivative of it.
        heads = {traced.call.edge.node: traced for traced in self._traced}
        owner = {node: traced for traced in self._traced for node in traced.interior}
        lost: dict[int, str] = {}
        seen: set[Node] = set()
        waiting: list[Node | None] = [output.grad_fn]
        while waiting:
            node = waiting.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            traced = heads.get(node)
            if traced is not None:
                waiting.extend(traced.frontier)
                for value, version in traced.versions:
                    if value._version != version:
                        self._lose(lost, traced.call, "an argument of it is overwritten later")
                continue
            inside = owner.get(node)
            if inside is not None:
                self._lose(lost, inside.call, "its derivative is itself differentiated")
            self._arrive(node, lost)
            waiting.extend(parent for parent, _ in node.next_functions)
        return lost

    def _arrive(self, node: Node, lost: dict[int, str]) -> None:
        """Note a leaf at which the walk has arrived: a parameter itself, or what stands for it in a call."""
        variable = getattr(node, "variable", None)
        if variable is None:
            return
        if id(variable) in self._numbers:
            index = self._numbers[id(variable)]
            names = sorted(self._names.get(index, ())) or ["a use that is not a torch function"]
            lost.setdefault(index, f"no rule for {', '.join(names)}")
        elif id(variable) in self._aliases:
            call = self._traced[self._aliases[id(variable)]].call
            self._lose(lost, call, "its derivative is itself differentiated")

    def _lose(self, lost: dict[int, str], call: Call, reason: str) -> None:
        """Leave the parameters of a call uncovered."""
        for place in call.places.values():
            lost.setdefault(place.index, f"{call.rule}: {reason}")


def _is_recorded(result: Any) -> bool:
    """Whether a result, or a part of it, has a graph."""
    if isinstance(result, (tuple, list)):
        return any(_is_recorded(part) for part in result)
    return isinstance(result, Tensor) and result.requires_grad


def _interior(head: Node, frontier: set[Node]) -> tuple[set[Node], list[Node]]:
    """Return the nodes between a call's result and its arguments, and those arguments reached."""
    interior: set[Node] = set()
    reached: list[Node] = []
    waiting: list[Node | None] = [head]
    while waiting:
        node = waiting.pop()
        if node is None or node in interior:
            continue
        if node in frontier:
            reached.append(node)
            continue
        interior.add(node)
        waiting.extend(parent for parent, _ in node.next_functions)
    return interior, reached


def _consecutive_rows(
    index: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor | None:
    """Return a look-up of rows a, a + 1, ..., b as the view that it is, None for any other.

    Positions are looked up so, once for all samples: the look-up has no sample axis, what it is added to has.
    """
    plain = padding_idx is None and max_norm is None and not scale_grad_by_freq and not sparse
    if not plain or index.dim() > 2 or index.numel() < 2 or index.numel() != index.shape[-1]:
        return None
    first, count = int(index.flatten()[0]), index.numel()
    if not torch.equal(index.flatten(), torch.arange(first, first + count).to(index)):
        return None
    rows = weight[first : first + count]
    return rows[None] if index.dim() == 2 else rows


def _place_of(part: Tensor, source: Tensor, place: Place) -> Place | None:
    """Return what a view of a tracked tensor shows, or None if it is not a transpose or a range of rows."""
    if part.dim() == source.dim() + 1 and part.shape[0] == 1:
        part = part[0]  # an axis for the samples, along which it will be repeated
    if part.dim() != source.dim() or part.dtype != source.dtype or part.device != source.device:
        return None
    if part.untyped_storage().data_ptr() != source.untyped_storage().data_ptr():
        return None  # rows that are picked by number are a copy
    # By strides alone: the same tensor; rows and columns exchanged; or rows from a multiple of the row's
    # stride on.
    offset = part.storage_offset() - source.storage_offset()
    if part.shape == source.shape and part.stride() == source.stride() and offset == 0:
        return place
    if part.dim() == 2 and part.shape == source.shape[::-1] and part.stride() == source.stride()[::-1]:
        return replace(place, transposed=not place.transposed) if offset == 0 else None
    if place.transposed or part.stride() != source.stride() or part.shape[1:] != source.shape[1:]:
        return None
    if part.dim() == 0 or source.stride(0) == 0 or part.numel() == 0:
        return None
    first, remainder = divmod(int(offset), int(source.stride(0)))
    if remainder or first < 0 or first + part.shape[0] > source.shape[0]:
        return None
    return replace(place, start=place.start + first, stop=place.start + first + part.shape[0])


_VIEWS = {
    torch.Tensor.T.__get__,  # type: ignore[attr-defined]
    torch.Tensor.mT.__get__,  # type: ignore[attr-defined]
    torch.Tensor.t,
    torch.t,
    torch.Tensor.transpose,
    torch.transpose,
    torch.Tensor.chunk,
    torch.chunk,
    torch.Tensor.split,
    torch.split,
    torch.Tensor.__getitem__,
    torch.Tensor.narrow,
    torch.narrow,
    torch.Tensor.unbind,
    torch.unbind,
}
_RESHAPES = {torch.Tensor.unsqueeze, torch.unsqueeze, torch.Tensor.__getitem__, torch.Tensor.view}
_DERIVATIVES = {torch.autograd.grad, torch.autograd.backward, torch.Tensor.backward}


Recordings = tuple[Recording, Recording]  # of the two passes of a trial
