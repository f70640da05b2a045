"""A backward pass cut into stages, each of which ends at one tensor through which all gradient passes.

With the gradients of one stage in memory at a time, all samples and all directions of a large network fit at
once: nothing is made twice, as it is where pairs of tiles meet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from ..model.record import Recording
from .attribution import CoverageChanged
from .collect import Collector, RowCheckMaker
from .layer_factors import Factors
from .layer_rules import Layout
from .units import Unit

__all__ = ["Stage", "Sweep", "largest_stage", "plan_stages", "walk"]


@dataclass(frozen=True)
class Stage:
    """A part of the backward pass, and the units whose gradients are complete with it.

    Every unit is in exactly one stage, with all of its uses: the gradients at later calls wait for the
    earliest one, so that no product between two uses of a parameter is lost.

    Attributes:
        calls: Numbers of the calls whose gradients are found in it.
        units: What is complete after it.
        below: Where the gradient goes on; None in the last stage.
    """

    calls: tuple[int, ...]
    units: tuple[Unit, ...]
    below: GradientEdge | None


@dataclass(frozen=True, eq=False)
class Sweep:
    """Factors stage by stage.

    Attributes:
        units: Parameter and rows of the units of each stage: what two sides must have in common.
        stages: The factors, each valid until the next is asked for.
    """

    units: tuple[tuple[tuple[int, int, int], ...], ...]
    stages: Iterator[Factors]

    @classmethod
    def of(cls, plan: Sequence[Stage], stages: Iterator[Factors]) -> Sweep:
        """Return the factors with the units of a plan."""
        units = tuple(tuple((u.index, u.start, u.stop) for u in stage.units) for stage in plan)
        return cls(units, stages)


def plan_stages(recording: Recording, units: Sequence[Unit], entries: int) -> list[Stage]:
    """Return the stages of a backward pass, from the output down, each of so many ``entries`` at least.

    A cut lies where only one tensor has uses after it that calls before it lead to; where there is none,
    there is one stage. Entries are those of output gradients, for one direction.
    """
    numbers = sorted({use.call for unit in units for use in unit.uses})
    edges = {number: recording.calls[number].edge for number in numbers}
    if not numbers or not recording.output.requires_grad:
        return []
    # Nodes are numbered as they are made: what the backward pass reaches first has the largest number.
    order = {number: edges[number].node._sequence_nr() for number in numbers}
    root = get_gradient_edge(recording.output)
    parts: list[list[int]] = [[]]
    below: list[GradientEdge | None] = []
    held, waiting = 0, sorted(numbers, key=lambda number: -order[number])
    for threshold, edge in _cuts(root.node, {edge.node for edge in edges.values()}):
        while waiting and order[waiting[0]] >= threshold:
            held += recording.calls[waiting[0]].shape.numel()
            parts[-1].append(waiting.pop(0))
        if held >= entries and waiting:
            parts.append([])
            below.append(edge)
            held = 0
    parts[-1].extend(waiting)
    below.append(None)
    stage_of = {number: position for position, part in enumerate(parts) for number in part}
    # A unit is complete with the stage of its earliest call, which is the last one to be reached.
    last = [max(stage_of[use.call] for use in unit.uses) for unit in units]
    return [
        Stage(tuple(part), tuple(u for u, at in zip(units, last, strict=True) if at == position), edge)
        for position, (part, edge) in enumerate(zip(parts, below, strict=True))
    ]


def _cuts(root: Node, targets: set[Node]) -> list[tuple[int, GradientEdge]]:
    """Return, from the output down, where one edge has all the gradient that passes.

    Nodes are numbered as they are made, arguments before results. Nothing counts that leads to no target:
    leaves, and what is computed of parameters alone.

    Returns:
        Pairs (s, edge): gradient comes from nodes >= s to targets < s through that edge only.
    """
    useful, edges = _ways(root, targets)
    # Of each tensor, a node and which of its results, the numbers of its node and of its latest use.
    spans: dict[tuple[Node, int], list[int]] = {}
    for parent, child, position in edges:
        if child in useful:
            low, high = child._sequence_nr(), parent._sequence_nr()
            if low >= high:  # made by a thread with numbers of its own
                return []
            span = spans.setdefault((child, position), [low, high])
            span[1] = max(span[1], high)
    # An edge crosses every threshold s with low < s <= high.
    opened: dict[int, list[tuple[Node, int]]] = {}
    for key, (_, high) in spans.items():
        opened.setdefault(high, []).append(key)
    crossing: set[tuple[Node, int]] = set()
    found = []
    for threshold in sorted({node._sequence_nr() for node in useful}, reverse=True):
        crossing.update(opened.get(threshold, ()))
        crossing = {key for key in crossing if spans[key][0] < threshold}
        if len(crossing) == 1:
            ((node, position),) = crossing
            found.append((threshold, GradientEdge(node, position)))
    return found


def _ways(root: Node, targets: set[Node]) -> tuple[set[Node], list[tuple[Node, Node, int]]]:
    """Return the nodes from which a target is reached, and all edges between nodes of the graph."""
    edges: list[tuple[Node, Node, int]] = []
    parents: dict[Node, list[Node]] = {}
    seen, waiting = {root}, [root]
    while waiting:
        node = waiting.pop()
        for child, position in node.next_functions:
            if child is None:
                continue
            edges.append((node, child, position))
            parents.setdefault(child, []).append(node)
            if child not in seen:
                seen.add(child)
                waiting.append(child)
    useful: set[Node] = set()
    upward = [node for node in targets if node in seen]
    while upward:
        node = upward.pop()
        if node not in useful:
            useful.add(node)
            upward.extend(parents.get(node, ()))
    return useful, edges


def largest_stage(recording: Recording, stages: Sequence[Stage]) -> int:
    """Return the entries of output gradients that are held at most, for one direction."""
    # The gradient at a call waits from the stage in which it is found to that in which its unit is complete.
    sizes = [call.shape.numel() for call in recording.calls]
    at = {number: position for position, stage in enumerate(stages) for number in stage.calls}
    held = [0] * len(stages)
    for position, stage in enumerate(stages):
        for number in {use.call for unit in stage.units for use in unit.uses}:
            for between in range(at[number], position + 1):
                held[between] += sizes[number]
    return max(held, default=0)


class NotInStages(CoverageChanged):
    """Rows differ in one stage; whether by rounding alone is told on a backward pass as a whole."""


def walk(
    recording: Recording,
    stages: Sequence[Stage],
    layouts: Mapping[tuple[object, ...], Layout],
    cotangents: Tensor,
    dtype: torch.dtype,
    chunk: int,
    check: RowCheckMaker | None,
) -> Iterator[Factors]:
    """Yield the factors of one stage after the other; each is valid until the next is asked for.

    Rows are compared before a stage is yielded: the combination that the check sends travels along as one
    direction more. The graph of the recording, and its calls, are used up; ``chunk`` and ``check`` are those
    of `collect`.

    Raises:
        NotInStages: If rows of a stage are others than they must be.
        CoverageChanged: If a rule fails.
    """
    directions, count = cotangents.shape[:2]  # (C, B, O)
    starts = range(0, directions, chunk)
    edge: GradientEdge | None = get_gradient_edge(recording.output)  # where gradient enters the next stage
    sent: list[Tensor | None] = [cotangents[start : start + chunk] for start in starts]
    extra: Tensor | None = None
    factors: tuple[Tensor, Tensor] | None = None
    waiting: dict[int, list[Tensor | None]] = {}  # gradients at calls whose unit has an earlier one
    for position, stage in enumerate(stages):
        collector = Collector(recording, stage.units, layouts, count, directions, dtype)
        wanted = set(collector.numbers)
        rows = None
        if check is not None:
            here = {n: layouts[recording.calls[n].signature] for n in stage.calls}
            rows = check(stage.calls, here, factors)
            if factors is None:
                factors, extra = rows.factors, rows.cotangents(cotangents)
        assert edge is not None
        for step, start in enumerate(starts):
            last = rows is None and step + 1 == len(sent)
            found, sent[step] = _differentiated(recording, stage, edge, sent[step], chunk > 1, last)
            if rows is not None:
                rows.add(start, found)
            for number in stage.calls:
                if number not in wanted:
                    waiting.setdefault(number, []).append(found[number])
            at_calls = {n: found[n] if n in found else waiting[n][step] for n in wanted}
            collector.add(start, min(chunk, directions - start), at_calls)
            del found, at_calls
        if rows is not None:
            found, extra = _differentiated(recording, stage, edge, extra, False, True)
            # What a multiple of the combination would show is lost with the stages before.
            if rows.suspects(found):
                raise NotInStages({}, "rows of a stage belong to other samples, or to several")
            del found
        for number in wanted:
            waiting.pop(number, None)
        yield collector.finish()
        del collector, rows
        edge = stage.below
        # Arguments that no later stage reads are set free while the pass goes on.
        left = {use.call for later in stages[position + 1 :] for unit in later.units for use in unit.uses}
        for number in wanted - left:
            recording.calls[number].arguments.clear()


def _differentiated(
    recording: Recording, stage: Stage, edge: GradientEdge, sent: Tensor | None, batched: bool, last: bool
) -> tuple[dict[int, Tensor | None], Tensor | None]:
    """Return gradients ``(K, *shape)`` at the calls of a stage, and what goes on to the next."""
    if sent is None:  # nothing before depends on these directions
        return dict.fromkeys(stage.calls), None
    edges = [recording.calls[number].edge for number in stage.calls]
    if stage.below is not None:
        edges.append(stage.below)
    found = torch.autograd.grad(
        [edge],
        edges,
        [sent if batched else sent[0]],
        retain_graph=not last,
        allow_unused=True,
        is_grads_batched=batched,
    )
    given = list(found) if batched else [None if g is None else g.unsqueeze(0) for g in found]
    onward = given.pop() if stage.below is not None else None
    return dict(zip(stage.calls, given, strict=True)), onward
