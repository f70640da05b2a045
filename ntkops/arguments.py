"""The types of arguments, checked against the annotations of public functions before any work.

What an annotation says of types is decided here, once for all functions: that a flag is True or False, that a
number is no string, that a generator is one. Which values are allowed is for each function to say.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import numbers
import os
import types
import typing
from collections.abc import Callable
from typing import Any, ParamSpec, TypeAlias, TypeVar

import numpy.typing
import torch

from .errors import InputError

__all__ = ["ArrayLike", "check_arguments", "checked"]

ArrayLike: TypeAlias = torch.Tensor | numpy.typing.ArrayLike
"""Numbers: a tensor, an array, a list, or a single number; what NumPy turns into an array."""

P = ParamSpec("P")
R = TypeVar("R")
_MANY = (collections.abc.Sequence, collections.abc.Iterable, tuple, list)
_NAMES = {
    bool: "True or False",
    int: "an integer",
    float: "a number",
    str: "a string",
    type(None): "None",
    torch.Generator: "a torch.Generator",
    torch.Tensor: "a tensor",
    torch.Size: "a shape",
    torch.dtype: "a torch.dtype",
    torch.device: "a torch.device",
    os.PathLike: "a path",
}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Check the types of a function's arguments at every call.

    Args:
        function: A public function with annotations.

    Returns:
        The same function, which raises `InputError` for an argument of a wrong type.
    """

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given = _signature(function).bind(*args, **kwargs).arguments  # raises what the call would
        check_arguments(function, given)
        return function(*args, **kwargs)

    return call


def check_arguments(function: Callable[..., Any], given: dict[str, Any]) -> None:
    """Raise where a value is of another type than a function's annotation says.

    Args:
        function: A function with annotations.
        given: Values by the names of its parameters; those of ``*args`` and ``**kwargs`` are not looked at.

    Raises:
        InputError: Naming the first of them.
    """
    hints = _hints(function)
    for name, value in given.items():
        if name in hints and not _fits(value, hints[name]):
            raise InputError(f"{name}={_shown(value)}: pass {_described(hints[name])}")


@functools.cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


@functools.cache
def _hints(function: Callable[..., Any]) -> dict[str, Any]:
    """Return annotations by name; one that names what exists for type checkers alone is left out."""
    found = {}
    for parameter in _signature(function).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        try:
            named = {parameter.name: parameter.annotation}
            holder = types.SimpleNamespace(__annotations__=named)
            found.update(typing.get_type_hints(holder, function.__globals__))
        except NameError:
            continue
    return found


def _fits(value: Any, hint: Any) -> bool:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, one) for one in inside)
    if origin is typing.Literal:
        return any(_fits(value, type(one)) for one in inside)
    if hint is bool:
        return isinstance(value, bool)
    if hint in (int, float):
        kind = numbers.Integral if hint is int else numbers.Real
        return isinstance(value, kind) and not isinstance(value, bool)
    if hint is torch.Tensor:  # and what can be made one
        if isinstance(value, bool | str):
            return False
        return isinstance(value, numbers.Number | list | tuple | range) or any(
            hasattr(value, name) for name in ("to_dense", "__array__", "__dlpack__")
        )
    if origin in _MANY:
        if isinstance(value, str | bytes) or not isinstance(value, collections.abc.Iterable):
            return False
        plain = inside and inside[0] in (int, float, str) and isinstance(value, list | tuple)
        return not plain or all(_fits(item, inside[0]) for item in value)
    if origin in (collections.abc.Mapping, dict):
        return isinstance(value, collections.abc.Mapping)
    if origin is collections.abc.Callable:
        return callable(value)
    if hint in _NAMES or origin is os.PathLike or dataclasses.is_dataclass(hint):
        return isinstance(value, origin or hint)
    return True  # whether it is a model, samples or an operator is told better where they are read


def _described(hint: Any) -> str:
    origin, inside = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return ", or ".join(dict.fromkeys(_described(one) for one in inside))
    if origin is typing.Literal:
        return " or ".join(map(repr, inside))
    if origin in _MANY:
        return "a list"
    if origin in (collections.abc.Mapping, dict):
        return "a mapping"
    if origin is collections.abc.Callable:
        return "a function"
    return _NAMES.get(origin or hint, f"a {getattr(hint, '__name__', hint)}")


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"
