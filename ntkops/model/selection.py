"""Which parameters the kernel is of: names, patterns, predicates, values."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..errors import (
    DeviceError,
    DtypeError,
    ParameterSelectionError,
    ParameterShapeError,
    UnknownParameterError,
)

__all__ = ["Selector", "select_parameters"]

Selector = (
    str | nn.Module | Iterable[str | nn.Module] | Callable[[str, Tensor], bool] | Mapping[str, Tensor] | None
)


def select_parameters(named: Mapping[str, Tensor], selector: Selector) -> dict[str, Tensor]:
    """Return the selected parameters under their canonical names, in the order of the model.

    ``named`` holds aliases of tied ones, too: the first name of a tensor is its canonical one. The values are
    the model's own tensors, or those of a dict. What a selector may be is said in `linearize`.

    Raises:
        UnknownParameterError: If a name or pattern matches nothing, or a module is no part of the model.
        ParameterSelectionError: If nothing is selected, or two names of one parameter get two values.
        ParameterShapeError: If a value does not have its parameter's shape.
        DtypeError: If a value does not have its parameter's dtype.
        DeviceError: If a value does not live where its parameter does.
    """
    canonical: dict[int, str] = {}
    for name, tensor in named.items():
        canonical.setdefault(id(tensor), name)
    if isinstance(selector, Mapping):
        values = _values(named, canonical, selector)
    else:
        values = {canonical[id(named[name])]: named[name] for name in _names(named, selector)}
    if not values:
        raise ParameterSelectionError(_empty(named, selector))
    return {name: values[name] for name in canonical.values() if name in values}


def _names(named: Mapping[str, Tensor], selector: Selector) -> list[str]:
    """Return the names that a selector selects, in its order."""
    if selector is None:
        return [name for name, tensor in named.items() if tensor.requires_grad]
    if isinstance(selector, (str, nn.Module)):
        return _matches(named, selector)
    if callable(selector):
        return [name for name, tensor in named.items() if selector(name, tensor)]
    if isinstance(selector, Tensor) or not isinstance(selector, Iterable):
        raise ParameterSelectionError(
            f"params= is a {type(selector).__name__}; pass None, names, glob patterns, modules of the model, "
            "a predicate (name, parameter) -> bool, or a dict from names to tensors"
        )
    patterns = list(selector)
    for pattern in patterns:
        if not isinstance(pattern, (str, nn.Module)):
            raise ParameterSelectionError(
                f"params= holds a {type(pattern).__name__} where a name is due; pass names or patterns, as "
                "model.named_parameters() gives them, or modules of the model"
            )
    return [name for pattern in patterns for name in _matches(named, pattern)]


def _matches(named: Mapping[str, Tensor], pattern: str | nn.Module) -> list[str]:
    """Return the names that one name, pattern or module stands for: a name that exists is no pattern."""
    if isinstance(pattern, nn.Module):
        return _within(named, pattern)
    if pattern in named:
        return [pattern]
    matches = [name for name in named if fnmatch.fnmatchcase(name, pattern)]
    if not matches:
        raise _unknown(named, pattern)
    return matches


def _within(named: Mapping[str, Tensor], module: nn.Module) -> list[str]:
    """Return the names of a module's parameters, frozen ones included."""
    names = {id(tensor): name for name, tensor in reversed(list(named.items()))}  # the first of each
    wanted = list(module.parameters())
    strange = sum(id(tensor) not in names for tensor in wanted)
    if strange:
        raise UnknownParameterError(
            f"params= holds a {type(module).__name__} that is no part of the model ({strange} of its "
            f"{len(wanted)} parameters are not the model's); pass a submodule of this very model, as in "
            "params=model.head, not a copy of it"
        )
    if not wanted:
        raise ParameterSelectionError(f"params= holds a {type(module).__name__}, which has no parameters")
    return [names[id(tensor)] for tensor in wanted]


def _unknown(named: Mapping[str, Tensor], pattern: str) -> UnknownParameterError:
    """Return the error for a name that matches nothing, with what it may have been meant for."""
    inside = [name for name in named if name.startswith(f"{pattern}.")]
    if inside:
        hint = f"it is a module; for all of its {len(inside)} parameters pass '{pattern}.*'"
    else:
        close = difflib.get_close_matches(pattern, list(named), n=3, cutoff=0.4)
        shown = close or list(named)[:5]
        hint = f"did you mean {' or '.join(map(repr, shown))}?" if shown else "the model has no parameters"
    kind = "no parameter matches pattern" if any(c in pattern for c in "*?[") else "unknown parameter"
    return UnknownParameterError(f"{kind} {pattern!r}; {hint}")


def _empty(named: Mapping[str, Tensor], selector: Selector) -> str:
    """Say why nothing is selected."""
    if not named:
        return "the model has no parameters, so that its kernel is empty"
    if selector is None:
        return (
            f"no parameter is selected: none of the {len(named)} requires grad; name those you want, for all "
            "of them params='*'"
        )
    kind = "the predicate is true for" if callable(selector) else "params= names"
    return f"no parameter is selected: {kind} none of {len(named)}, such as {next(iter(named))!r}"


def _values(
    named: Mapping[str, Tensor], canonical: Mapping[int, str], given: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return the values that a dict gives, by canonical name, checked against the model's own."""
    values: dict[str, Tensor] = {}
    for name, value in given.items():
        if name not in named:
            raise _unknown(named, str(name))
        own = named[name]
        if not isinstance(value, Tensor):
            raise ParameterSelectionError(f"params[{name!r}] is a {type(value).__name__}, not a tensor")
        if value.shape != own.shape:
            raise ParameterShapeError(
                f"params[{name!r}]: expected shape {tuple(own.shape)}, got {tuple(value.shape)}"
            )
        if value.dtype != own.dtype:
            raise DtypeError(
                f"params[{name!r}] has dtype {value.dtype}, the model's parameter {own.dtype}; cast the "
                "value, or the model"
            )
        if value.device != own.device:
            raise DeviceError(
                f"params[{name!r}] lives on {value.device}, the model's parameter on {own.device}; move one "
                "of them"
            )
        first = canonical[id(own)]
        if values.get(first, value) is not value:
            raise ParameterSelectionError(
                f"params gives two values to one parameter: {name!r} is another name of {first!r} (tied "
                "weights); give it once"
            )
        values[first] = value
    return values
