"""Where the values of a checkpoint come from: a state dict, a module, a file."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import CheckpointError, InputError

__all__ = ["Weights", "live_values", "read_weights"]

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
