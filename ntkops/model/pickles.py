"""Pickling modules whose class was made at run time by a parametrisation, which torch refuses."""

from __future__ import annotations

import io
import pickle
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

__all__ = ["pickle_parametrized"]


def _parametrized_tensor(name: str) -> property:
    def read(module: Any) -> Tensor:
        return module.parametrizations[name]()

    return property(read)


def _rebuild(base: type[nn.Module], names: tuple[str, ...]) -> nn.Module:
    """Return an empty module of the class that a parametrisation would make of ``base``."""
    attributes = {name: _parametrized_tensor(name) for name in names}
    made: Any = type(f"Parametrized{base.__name__}", (base,), attributes)
    return object.__new__(made)


class _Pickler(pickle.Pickler):
    """Takes parametrised modules apart into their original class and their contents."""

    def reducer_override(self, item: Any) -> Any:
        """Reduce parametrised modules; leave everything else to the usual ways."""
        if not isinstance(item, nn.Module) or not parametrize.is_parametrized(item):
            return NotImplemented
        state = {key: value for key, value in vars(item).items() if key != "_flat_weight_refs"}
        names = tuple(dict(item.parametrizations.items()))  # type: ignore[union-attr, operator]
        return _rebuild, (parametrize.type_before_parametrizations(item), names), state


def pickle_parametrized(item: object) -> bytes:
    """Return the pickle of an object that holds parametrised modules."""
    target = io.BytesIO()
    _Pickler(target, protocol=pickle.HIGHEST_PROTOCOL).dump(item)
    return target.getvalue()
