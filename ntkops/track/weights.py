"""Where weights come from, and a model at them."""

from __future__ import annotations

import difflib
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import CheckpointError, DtypeError, InputError, ParameterShapeError, UnknownParameterError
from ..model import Linearization
from ..model.call import ModuleCall
from ..model.inspection import require_finite
from ..model.watch import Watch

__all__ = [
    "Places",
    "Weights",
    "live_values",
    "read_weights",
    "stored_values",
]


Weights = Mapping[str, Tensor] | nn.Module | str | os.PathLike[str]

_TORCH_FILES = (b"PK\x03\x04", b"\x80\x02")


def read_weights(source: Any) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint by name.

    Args:
        source: A state dict, a module, or the path of a safetensors file or of a file of torch.save.

    Returns:
        The tensors; of files, on the CPU. What is no tensor in a state dict (extra state) is left out.

    Raises:
        CheckpointError: If a file cannot be read without executing code, or is damaged.
        InputError: If the source is something else, or holds no tensors by name.
    """
    if isinstance(source, nn.Module):
        return live_values(source)
    if isinstance(source, Mapping):
        return _named_tensors(source, "the checkpoint")
    if isinstance(source, str | os.PathLike):
        return _named_tensors(_read_file(Path(source)), str(source))
    raise InputError(
        f"a checkpoint is a {type(source).__name__}; pass a state dict, a module, or the path of a "
        "safetensors file or of a torch file that holds a state dict"
    )


def live_values(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a module as they are now, under all of their names."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return {**dict(model.named_buffers(remove_duplicate=False)), **parameters}


def _read_file(path: Path) -> Any:
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as error:
        raise CheckpointError(f"the checkpoint {path} cannot be read ({error.strerror or error})") from error
    try:
        # a zip archive, or the pickle of older files: both are read with weights_only, which executes nothing
        if start.startswith(_TORCH_FILES):
            return torch.load(path, map_location="cpu", weights_only=True)
        return load_file(path, device="cpu")
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} holds more than tensors, and reading it could execute code; it was not read. Save the "
            "state dict alone: torch.save(model.state_dict(), path), or safetensors.torch.save_file"
        ) from error
    except (SafetensorError, RuntimeError, OSError, ValueError, EOFError) as error:
        raise CheckpointError(
            f"{path} is neither a whole safetensors file nor a whole torch file ({_first_line(error)})"
        ) from error


def _named_tensors(found: Any, what: str) -> dict[str, Tensor]:
    if not isinstance(found, Mapping):
        raise InputError(f"{what} holds a {type(found).__name__}, not a state dict (names to tensors)")
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors or not all(isinstance(name, str) for name in tensors):
        inside = [str(key) for key, value in found.items() if isinstance(value, Mapping)]
        hint = f"; it has state dicts inside: pass one of {', '.join(inside)}" if inside else ""
        raise InputError(f"{what} holds no tensors by name{hint}")
    return tensors


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


# -- taking a linearised model to the values of a checkpoint; the user's model is only read


_PREFIXES = ("_orig_mod.", "module.")  # of compiled models, and of data-parallel ones


class Places:
    """The names under which a checkpoint gives values to a linearised model.

    Args:
        base: The model, its selection and its output; parameters and buffers that a checkpoint leaves out
            keep the values that they have here.
    """

    def __init__(self, base: Linearization) -> None:
        self.base = base
        self._canonical = _canonical_names(base)
        self._own = {
            **dict(zip(base.names, base.parameters, strict=True)),
            **base.frozen,
            **base.buffers,
        }

    def at(self, values: Mapping[str, Tensor], what: str = "the checkpoint") -> Linearization:
        """Return the model at the values of a checkpoint, which are copied.

        Args:
            values: Every selected parameter, by any of its names; other parameters and buffers may be left
                out.
            what: How messages call the checkpoint.

        Returns:
            A linearised model like the base.

        Raises:
            UnknownParameterError: If a name is not one of the model's.
            InputError: If a selected parameter is missing, or a tied one has two values.
            ParameterShapeError: If a shape differs.
            DtypeError: If a dtype differs.
            NonFiniteError: If a parameter holds NaN or infinity.
        """
        given = self._resolve(values, what)
        missing = [name for name in self.base.names if name not in given]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise InputError(
                f"{what} has no value for {missing[0]!r}{more}; it must give every selected parameter"
            )
        if any(name not in given for name in self._own):
            self.base.check_fresh()
        device = self.base.device
        copies = {name: value.detach().to(device, copy=True) for name, value in given.items()}
        filled = {name: copies.get(name, own) for name, own in self._own.items()}
        base = self.base
        require_finite({name: filled[name] for name in (*base.names, *base.frozen_names)})
        others = [(label, tensor) for label, tensor in base.call.others if not tensor.is_inference()]
        return Linearization(
            base.call,
            base.selector,
            {name: filled[name] for name in base.names},
            {name: filled[name] for name in base.frozen_names},
            {name: filled[name] for name in base.buffer_names},
            batch_dim=base.batch_dim,
            differentiable=False,
            watches=tuple(Watch.of(f"attribute {label!r}", tensor) for label, tensor in others),
        )

    def _resolve(self, values: Mapping[str, Tensor], what: str) -> dict[str, Tensor]:
        """Return values by canonical name, checked."""
        given: dict[str, Tensor] = {}
        for name, value in self._stripped(values).items():
            if name not in self._canonical:
                raise self._unknown(name, what)
            own = self._own[first := self._canonical[name]]
            if value.shape != own.shape:
                raise ParameterShapeError(
                    f"{what}, {name!r}: expected shape {tuple(own.shape)}, got {tuple(value.shape)}"
                )
            if value.dtype != own.dtype:
                raise DtypeError(
                    f"{what}, {name!r}: it has dtype {value.dtype}, the model {own.dtype}; cast one of them"
                )
            # state dicts name tied tensors twice; the same values twice are no contradiction
            known = given.get(first)
            if known is not None and known is not value and not torch.equal(known, value):
                raise InputError(
                    f"{what} gives two values to one tensor: {name!r} is another name of "
                    f"{first!r} (tied weights)"
                )
            given[first] = value
        return given

    def _stripped(self, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return values without a prefix that a wrapper of the model put before every name."""
        for prefix in _PREFIXES:
            # all or none: a module of the model may be called "module" itself
            if all(name.startswith(prefix) and name not in self._canonical for name in values):
                values = {name.removeprefix(prefix): value for name, value in values.items()}
        return values

    def _unknown(self, name: str, what: str) -> UnknownParameterError:
        close = difflib.get_close_matches(name, list(self._canonical), n=3, cutoff=0.4)
        shown = close or list(self._canonical)[:5]
        return UnknownParameterError(
            f"{what} has {name!r}, which the model has not; did you mean {' or '.join(map(repr, shown))}?"
        )


def _canonical_names(base: Linearization) -> dict[str, str]:
    """Return every name of each tensor with its first name; tied tensors have several."""
    call = base.call
    if not isinstance(call, ModuleCall):
        return {key: base.names[position] for key, position in call.keys}
    found: dict[str, str] = {}
    first: dict[int, str] = {}
    root: nn.Module = call.root
    for named in (root.named_parameters, root.named_buffers):
        for name, placeholder in named(remove_duplicate=False):
            found[name] = first.setdefault(id(placeholder), name)
    return found


def stored_values(places: Places, linearization: Linearization) -> dict[str, Tensor]:
    """Return what must be kept of a linearised model to make it again from the base."""
    base = places.base
    kept = dict(zip(linearization.names, linearization.parameters, strict=True))
    for own, values in ((base.frozen, linearization.frozen), (base.buffers, linearization.buffers)):
        # what training leaves alone is in the base already
        kept |= {name: value for name, value in values.items() if not torch.equal(value, own[name])}
    return kept
