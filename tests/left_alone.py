"""Proof that every public call leaves models, inputs, modes and the random state bit for bit as they were.

The fixture wraps the functions of ntkops and the products of its operators for the time of a test. What is
called outermost, by the main thread, is checked: it and every model that the test has shown so far.
"""

from __future__ import annotations

import functools
import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import ntkops
from tests.model.zoo import left_alone, unchanged

__all__ = ["every_call_leaves_all_alone"]

_METHODS = ("matmul", "to_dense", "diagonal", "cross", "submatrix")


class _Guard:
    """Checks calls, outermost ones alone."""

    def __init__(self) -> None:
        self._seen: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._inside = False

    def wrap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def guarded(*args: Any, **named: Any) -> Any:
            if self._inside or threading.current_thread() is not threading.main_thread():
                return function(*args, **named)
            leaves = tree_leaves((args, named))
            self._seen.update(leaf for leaf in leaves if isinstance(leaf, nn.Module) and _is_plain(leaf))
            given = [leaf for leaf in leaves if type(leaf) in (Tensor, nn.Parameter) and _has_values(leaf)]
            self._inside = True
            try:
                with left_alone(), unchanged(_NOTHING, *given), ExitStack() as stack:
                    for model in self._seen:
                        stack.enter_context(unchanged(model))
                    return function(*args, **named)
            finally:
                self._inside = False

        return guarded


_NOTHING = nn.Module()


def _has_values(tensor: Tensor) -> bool:
    return not tensor.is_meta and tensor.layout == torch.strided


def _is_plain(model: nn.Module) -> bool:
    if isinstance(model, torch.jit.ScriptModule):
        return False
    tensors = [*model.parameters(), *model.buffers()]
    lazy = any(isinstance(t, nn.parameter.UninitializedTensorMixin) for t in tensors)
    return not lazy and all(_has_values(tensor) for tensor in tensors)


@pytest.fixture(autouse=True)
def every_call_leaves_all_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Check every outermost public call of a test."""
    guard = _Guard()
    for name in ntkops.__all__:
        if inspect.isfunction(getattr(ntkops, name)):
            monkeypatch.setattr(ntkops, name, guard.wrap(getattr(ntkops, name)))
    for kind in (ntkops.NTKOperator, ntkops.JacobianOperator):
        for method in _METHODS:
            if hasattr(kind, method):
                monkeypatch.setattr(kind, method, guard.wrap(getattr(kind, method)))
    yield
