"""The parts of a kernel by parameters: traces, norms and alignments from one sweep over its tiles."""

from __future__ import annotations

import fnmatch
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from ..arguments import checked
from ..engines import count_passes
from ..errors import InputError, TiedPartsWarning, UnsupportedOperationError
from ..model import Linearization
from ..operators.capabilities import capabilities
from ..operators.kernel import NTKOperator
from ..results import Estimate, Partition

__all__ = ["partition"]

_ENTRIES = 2**20  # of the blocks of all parts that are multiplied in float64 at a time


@checked
def partition(
    operator: NTKOperator, by: Literal["layer"] | Mapping[str, str | Sequence[str]] = "layer"
) -> Partition:
    r"""Split a kernel by its parameters, and compare the parts.

    .. math:: K = \sum_a K_a, \qquad G_{ab} = \langle K_a, K_b \rangle = \mathrm{tr}\, K_a^\top K_b

    One sweep over tiles, in which the gradients of all parts are made together, gives the traces and G, and G
    gives every norm, the alignments of parts with each other and with the whole, and |K|² = 1ᵀ G 1.

    Args:
        operator: A kernel of `ntkops.ntk`: square or cross, with or without a batch, or a slice of one.
        by: "layer" for a part for each module that holds parameters itself, under its path (a parameter of
            the outermost module is a part of its own); or names of parts with glob patterns of the names of
            their parameters, ``{"attn": "*.attn.*", "mlp": ["*.mlp.*", "head.*"]}``. Every selected
            parameter belongs to one part.

    Returns:
        `Partition`: ``names``, ``trace`` (L,), ``norm`` (L,), ``alignment`` (L, L), ``whole_alignment`` (L,),
        each an exact `Estimate` (in front of these shapes a batch's), and the lazy kernel of a part by its
        name. Cost: the passes of one kernel, which is never stored, and 2 L² n² operations. Memory: a tile of
        every part.

    Raises:
        InputError: If the operator is no kernel of `ntkops.ntk`, a pattern matches nothing, two parts claim
            one parameter, or none does.
        UnsupportedOperationError: If its samples lie on several ranks.
        NonFiniteError: If an entry is not finite.

    Warns:
        TiedPartsWarning: If a tied parameter is in two parts by its names: it belongs to the first.

    Example:
        >>> import torch, ntkops
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
        ... )
        >>> K = ntkops.ntk(model, torch.randn(5, 3))
        >>> p = ntkops.partition(K)
        >>> p.names, p.trace.value.shape, p.alignment.value.shape, p["2"].shape
        (('0', '2'), torch.Size([2]), torch.Size([2, 2]), torch.Size([10, 10]))
        >>> abs(float(p.trace.value.sum()) / float(ntkops.trace(K)) - 1) < 1e-5
        True
    """
    if not isinstance(operator, NTKOperator):
        raise InputError(
            f"partition splits a kernel of ntkops.ntk by its parameters, not a {type(operator).__name__}: "
            "take it of each part of a sum, and scale its numbers by hand"
        )
    if capabilities(operator).space.is_spread:
        raise UnsupportedOperationError(
            "the samples of this kernel lie on several ranks: make a kernel a part, ntkops.ntk(model, shard, "
            "params='*.attn.*', group=group), and take ntkops.trace of each"
        )
    parts = _parts(operator._core.engine.linearization, by)
    owners = {name: number for number, own in enumerate(parts.values()) for name in own}
    batch, count = operator.batch_shape, len(parts)
    square = operator.shape[-1] == operator.shape[-2]
    inner = torch.zeros((*batch, count, count), dtype=torch.float64)
    traces = torch.zeros((*batch, count), dtype=torch.float64)
    symmetric, start = operator._core.symmetric, time.perf_counter()
    with count_passes() as counter:
        for tile in operator.part_tiles(owners, count):
            # G from the upper triangle alone: a tile off the diagonal counts for both
            twice = symmetric and tile.cols.start != tile.rows.start
            inner += (2 if twice else 1) * _inner(tile.block)
            if square:
                traces += _trace(tile.block, tile.rows.start - tile.cols.start)
    result = Estimate.of_exact(inner, passes=counter.total, seconds=time.perf_counter() - start)
    return Partition(tuple(parts), parts, result, traces if square else None, operator.of_parameters)


def _inner(block: Tensor) -> Tensor:
    """Return ``(*batch, L, L)`` inner products of ``(L, *batch, r, c)``, summed in float64."""
    flat = block.movedim(0, -3).flatten(-2)  # (*batch, L, r c)
    total = flat.new_zeros((*flat.shape[:-1], flat.shape[-2]), dtype=torch.float64)
    for part in flat.split(max(1, _ENTRIES // flat[..., 0].numel()), dim=-1):
        wide = part.double()
        total += wide @ wide.mT
    return total.cpu()


def _trace(block: Tensor, below: int) -> Tensor:
    """Return the sums ``(*batch, L)`` of what a block has of the diagonal, ``below`` rows under its first."""
    found = block.diagonal(offset=below, dim1=-2, dim2=-1).double().sum(-1)  # (L, *batch)
    return found.movedim(0, -1).cpu()


def _parts(
    linearization: Linearization, by: str | Mapping[str, str | Sequence[str]]
) -> dict[str, tuple[str, ...]]:
    """Return the parameters of each part, in the model's order."""
    aliases = linearization.aliases()
    if isinstance(by, str):
        if by != "layer":
            raise InputError(f"by={by!r}: pass 'layer', or a dict of patterns, {{'attn': '*.attn.*'}}")
        claims = {
            name: list(dict.fromkeys(alias.rpartition(".")[0] or alias for alias in names))
            for name, names in aliases.items()
        }
        order = [claimed[0] for claimed in claims.values()]
    else:
        claims = _claims(by, aliases)
        order = list(by)
    for name, claimed in claims.items():
        if len(claimed) > 1:
            warnings.warn(
                f"the parameter {name!r} is tied, also named {', '.join(map(repr, aliases[name][1:]))}, and "
                f"in the parts {', '.join(map(repr, claimed))}: its whole kernel counts for {claimed[0]!r}",
                TiedPartsWarning,
                stacklevel=4,
            )
    return {
        part: tuple(name for name, claimed in claims.items() if claimed[0] == part)
        for part in dict.fromkeys(order)
        if any(claimed[0] == part for claimed in claims.values())
    }


def _claims(
    by: Mapping[str, str | Sequence[str]], aliases: Mapping[str, tuple[str, ...]]
) -> dict[str, list[str]]:
    """Return the parts that claim each parameter, the one that does so by its canonical name first."""
    found: dict[str, dict[str, list[str]]] = {name: {} for name in aliases}
    for part, given in by.items():
        patterns = [given] if isinstance(given, str) else given
        if not isinstance(part, str) or not isinstance(patterns, Sequence):
            raise InputError(f"by={{{part!r}: {given!r}}}: pass a pattern, or a list of patterns, for a name")
        for pattern in patterns:
            if not isinstance(pattern, str):
                raise InputError(f"by={{{part!r}: {given!r}}}: a pattern is a string such as '*.attn.*'")
            matched = [
                (name, alias)
                for name, names in aliases.items()
                for alias in names
                if alias == pattern or fnmatch.fnmatchcase(alias, pattern)
            ]
            if not matched:
                raise InputError(
                    f"by={{{part!r}: {pattern!r}}}: no selected parameter has such a name; there are "
                    f"{', '.join(map(repr, list(aliases)[:5]))}{', ...' if len(aliases) > 5 else ''}"
                )
            for name, alias in matched:
                parts = found[name].setdefault(alias, [])
                if part not in parts:
                    parts.append(part)
    for by_alias in found.values():
        for alias, parts in by_alias.items():
            if len(parts) > 1:
                raise InputError(
                    f"by=: the parts {', '.join(map(repr, parts))} both claim the parameter {alias!r}; every "
                    "parameter belongs to one part"
                )
        if not by_alias:
            left = [other for other, found_by in found.items() if not found_by]
            raise InputError(
                f"by=: no part claims the parameter{'s' * (len(left) > 1)} {', '.join(map(repr, left[:5]))}"
                f"{', ...' if len(left) > 5 else ''}; add a pattern, such as {{'rest': {left!r}}}"
            )
    return {
        name: list(dict.fromkeys(part for alias in aliases[name] for part in by_alias.get(alias, ())))
        for name, by_alias in found.items()
    }
