"""What of a model's output is the state: the selector, and the demands on what it selects."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OutputError
from .capture import outputs_of

__all__ = ["OutputSelector", "require_state", "sample_rows", "samples_first"]

_PATH = re.compile(r"(?P<path>.+?)(?:@(?P<call>\d+))?(?:\[(?P<item>[^\[\]]+)\])?")


def describe(value: Any) -> str:
    """Say in a few words what a value is."""
    if isinstance(value, Tensor):
        return f"tensor of shape {tuple(value.shape)}"
    return type(value).__name__


def _entries(raw: Any) -> dict[str | int, Any]:
    """Return the parts of a structured output under the names by which they can be selected."""
    if isinstance(raw, Mapping):
        return {key: raw[key] for key in raw}
    if isinstance(raw, (tuple, list)):
        named = dict(zip(getattr(raw, "_fields", ()), raw, strict=False))
        return {**named, **dict(enumerate(raw))}
    if dataclasses.is_dataclass(raw) and not isinstance(raw, type):
        return {entry.name: getattr(raw, entry.name) for entry in dataclasses.fields(raw)}
    return {}


def _listing(entries: dict[str | int, Any]) -> str:
    """Say what the parts of a structured output are."""
    return ", ".join(f"{key!r} ({describe(value)})" for key, value in entries.items())


def _item(raw: Any, key: str | int, where: str) -> Any:
    """Select one part of a structured output."""
    entries = _entries(raw)
    if key in entries:
        return entries[key]
    # A position, from the end where it is negative; of a mapping by the order of its keys.
    if isinstance(key, int) and isinstance(raw, (tuple, list, Mapping)):
        parts = list(raw.values()) if isinstance(raw, Mapping) else raw
        if -len(parts) <= key < len(parts):
            return parts[key]
    if not entries:
        raise OutputError(
            f"{where} returned a {describe(raw)}, which has no part {key!r}; output= selects parts of a dict "
            "or tuple, outputs= the columns of a tensor"
        )
    raise OutputError(f"{where} returned a {type(raw).__name__} without {key!r}; it has {_listing(entries)}")


class OutputSelector:
    """Takes the state out of a forward pass.

    ``output`` is None (the model returns a tensor), a key or position of a structured output, a callable on
    the raw output, or the path of a module of ``root`` whose output is captured: ``"rnn[0]"`` for an entry of
    a structured one, ``"block@1"`` for the second call. A plain function has no root, and no paths.
    """

    def __init__(self, output: str | int | Callable[[Any], Any] | None, root: nn.Module | None) -> None:
        self.output = output
        self.path: str | None = None
        self._call: int | None = None
        self._entry: str | int | None = None
        self._paths: tuple[str, ...] = ()
        if isinstance(output, str) and root is not None:
            self._parse(output, dict(root.named_modules(remove_duplicate=False)))

    def _parse(self, output: str, modules: dict[str, nn.Module]) -> None:
        """Read a path, a call and an entry; what names no module is left to be a key of the output."""
        self._paths = tuple(path for path in modules if path)
        if output in self._paths:
            self.path = output
            return
        parts = _PATH.fullmatch(output)
        if parts is None or parts["path"] not in self._paths:
            return
        self.path = parts["path"]
        self._call = None if parts["call"] is None else int(parts["call"])
        if parts["item"] is not None:
            item = parts["item"].strip("'\"")
            self._entry = int(item) if re.fullmatch(r"-?\d+", item) else item

    def read(self, root: nn.Module | None, forward: Callable[[], Any]) -> Any:
        """Run the forward pass and return the state in it."""
        if self.path is None or root is None:
            return self._select(forward())
        with outputs_of(root.get_submodule(self.path), self._pick) as collected:
            raw = forward()
        # Both a key and a path: the model's own word first.
        if isinstance(raw, Mapping) and self.output in raw:
            return raw[self.output]
        return self._one(collected)

    def _pick(self, output: Any) -> Any:
        """Return the entry that is wanted of what the module returns."""
        return output if self._entry is None else _item(output, self._entry, f"module {self.path!r}")

    def _one(self, collected: list[Any]) -> Any:
        """Return what the module has returned in the call that is wanted."""
        if not collected:
            raise OutputError(
                f"module {self.path!r} was not called in the forward pass (some layers, such as the out_proj "
                "of nn.MultiheadAttention, are used without a call); select the module around it"
            )
        if self._call is None and len(collected) > 1:
            raise OutputError(
                f"module {self.path!r} was called {len(collected)} times; say which call, from "
                f"'{self.path}@0' to '{self.path}@{len(collected) - 1}'"
            )
        if self._call is not None and self._call >= len(collected):
            raise OutputError(
                f"output={self.output!r} asks for call {self._call} of module {self.path!r}, which was "
                f"called {len(collected)} time(s), counted from 0"
            )
        picked = collected[self._call or 0]
        if not isinstance(picked, Tensor):
            entries = _entries(picked)
            hint = next(iter(entries), 0)
            raise OutputError(
                f"module {self.path!r} returned a {type(picked).__name__} with "
                f"{_listing(entries) or 'no parts'}; select one, as in output='{self.output}[{hint}]'"
            )
        return picked

    def _select(self, raw: Any) -> Any:
        """Return the state in what the model returns."""
        if self.output is None:
            return self._tensor(raw)
        if isinstance(self.output, int):
            return _item(raw, self.output, "the model")
        if isinstance(self.output, str):
            entries = _entries(raw)
            if self.output in entries:
                return entries[self.output]
            raise self._unknown(raw, entries)
        return self.output(raw)

    def _tensor(self, raw: Any) -> Tensor:
        """Return the output of a model that returns a tensor."""
        if isinstance(raw, Tensor):
            return raw
        entries = _entries(raw)
        if not entries:
            raise OutputError(
                f"the model returned a {type(raw).__name__}, not a tensor; pass output= a callable that "
                "takes the tensor out of it"
            )
        floating = [k for k, v in entries.items() if isinstance(v, Tensor) and v.is_floating_point()]
        choice = (floating or list(entries))[0]
        raise OutputError(
            f"the model returned a {type(raw).__name__} with {_listing(entries)}; pass output={choice!r} or "
            "another of these"
        )

    def _unknown(self, raw: Any, entries: dict[str | int, Any]) -> OutputError:
        """Return the error for what is neither a key nor a path, with what comes close."""
        names = [*(str(key) for key in entries), *self._paths]
        close = difflib.get_close_matches(str(self.output), names, n=3, cutoff=0.4)
        returned = f"a {type(raw).__name__} with {_listing(entries)}" if entries else f"a {describe(raw)}"
        hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
        return OutputError(
            f"output={self.output!r} is neither a key of the output (the model returned {returned}) nor the "
            f"path of a module{hint}"
        )


def require_state(state: Any, num_samples: int, axis: int | None, name: str) -> Tensor:
    """Return the state if it is a floating tensor with one row per sample; without an axis it is one sample.

    Raises:
        OutputError: Saying what it is instead.
    """
    if not isinstance(state, Tensor):
        raise OutputError(f"{name} is a {type(state).__name__}, not a tensor; let output= select a tensor")
    if state.layout != torch.strided or state.is_nested:
        raise OutputError(f"{name} is a {state.layout} tensor; return a dense one (to_dense, or padded)")
    if state.is_complex():
        raise OutputError(
            f"{name} has dtype {state.dtype}; complex outputs are not differentiated here: return "
            "torch.view_as_real(output), or its absolute value"
        )
    if not state.is_floating_point():
        raise OutputError(
            f"{name} has dtype {state.dtype}, through which no derivative flows; select the floating-point "
            "scores, not the prediction"
        )
    if axis is not None and (state.dim() <= axis or state.shape[axis] != num_samples):
        raise OutputError(
            f"{name} of shape {tuple(state.shape)} has no sample axis of {num_samples} at dimension "
            f"{axis}; return one row per sample (reduction='none' for a loss), or say batch_dim="
        )
    if num_samples and not state.numel():
        raise OutputError(
            f"{name} of shape {tuple(state.shape)} has no entries, and a kernel of no outputs has no rows; "
            "return at least one number per sample"
        )
    return state


def samples_first(state: Tensor, axis: int | None) -> Tensor:
    """Return a state as ``(B, *output)``; what has no sample axis is one sample, of one axis or more."""
    return state.reshape(1, *(state.shape or (1,))) if axis is None else state.movedim(axis, 0)


def sample_rows(state: Tensor, axis: int | None, dtype: torch.dtype) -> Tensor:
    """Return a state as ``(B, O)``, one row per sample, in the dtype of the parameters and of products."""
    first = samples_first(state, axis)  # (B, *output)
    return first.reshape(first.shape[0], first[:1].numel()).to(dtype)  # -1 is open where there is no sample
