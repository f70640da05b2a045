"""A user's own network and data: from the words of a command line to a module and tensors."""

from __future__ import annotations

import copy
import difflib
import importlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import DeviceError, DtypeError, InputError, UnsupportedModelError

__all__ = ["brief", "load_data", "load_model", "parse_device", "parse_dtype", "place"]

_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model(source: str, seed: int = 0) -> nn.Module:
    """Import a module and call a function in it that returns a network.

    Args:
        source: ``"package.module:factory"``; the factory takes no arguments.
        seed: Seed of the random numbers that the factory may draw on the CPU. The global random state is put
            back afterwards.

    Returns:
        The network, as the factory left it: one with dropout should be in evaluation mode.

    Raises:
        InputError: If the module or the factory cannot be found, or raises.
        UnsupportedModelError: If the factory returns something else than a `torch.nn.Module`.
    """
    module_name, colon, name = source.partition(":")
    if not (colon and module_name and name):
        raise InputError(
            f"--model {source!r}: write package.module:factory, with a colon before the function"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        factory = _find_factory(module_name, name)
        try:
            model = factory()
        except Exception as error:
            raise InputError(
                f"--model {source}: the factory raised {brief(error)}; --traceback shows where"
            ) from error
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"--model {source}: the factory returned a {type(model).__name__}; it must return an nn.Module"
        )
    return model


def _find_factory(module_name: str, name: str) -> Any:
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # the module itself, or a package of its path, is missing; else something that it imports
        if error.name is not None and f"{module_name}.".startswith(f"{error.name}."):
            raise InputError(
                f"--model: there is no module {error.name!r}; start in the directory that holds it, or put "
                "that on PYTHONPATH"
            ) from error
        raise InputError(
            f"--model: importing {module_name} needs {error.name!r}, which is missing"
        ) from error
    except Exception as error:
        raise InputError(
            f"--model: importing {module_name} raised {brief(error)}; --traceback shows where"
        ) from error
    found = getattr(module, name, None)
    if found is None:
        close = difflib.get_close_matches(name, [entry for entry in vars(module) if entry[0] != "_"])
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise InputError(f"--model: module {module_name} has no {name!r}{hint}")
    if not callable(found):
        raise InputError(
            f"--model: {module_name}:{name} is a {type(found).__name__}; name a function without arguments "
            "that returns the network"
        )
    return found


def brief(error: Exception) -> str:
    """Return kind and first line of an exception."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def load_data(path: str | Path) -> tuple[Tensor, Tensor | None]:
    """Return the samples of an ``.npz`` file, and their labels where it has them.

    Args:
        path: File with an array ``x`` whose first axis is the samples, and optionally integer labels ``y``,
            one a sample. Pickled objects are not loaded.

    Returns:
        x, and y or None.

    Raises:
        InputError: If the file cannot be read as such.
    """
    try:
        with open(path, "rb") as file:
            x, y = _read_arrays(file, path)
    except FileNotFoundError as error:
        raise InputError(f"--data: there is no file {str(path)!r}") from error
    except OSError as error:
        raise InputError(f"--data: {path} cannot be read ({error.strerror or error})") from error
    if x.dim() == 0 or not len(x):
        raise InputError(
            f"--data: 'x' in {path} has shape {tuple(x.shape)}; its first axis must hold samples"
        )
    if y is not None and (y.shape != x.shape[:1] or y.is_floating_point() or y.is_complex()):
        raise InputError(
            f"--data: 'y' in {path} has shape {tuple(y.shape)} and dtype {y.dtype}; it must hold one integer "
            f"label for each of the {len(x)} samples, or be left out"
        )
    return x, None if y is None else y.long()


def _read_arrays(file: IO[bytes], path: str | Path) -> tuple[Tensor, Tensor | None]:
    try:
        arrays = np.load(file, allow_pickle=False)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise InputError(f"--data: {path} is not an .npz file; write one with numpy.savez") from error
    if not isinstance(arrays, np.lib.npyio.NpzFile):
        raise InputError(
            f"--data: {path} holds one bare array; write it with numpy.savez('data.npz', x=array)"
        )
    if "x" not in arrays.files:
        names = ", ".join(arrays.files) or "none"
        raise InputError(
            f"--data: {path} has no array 'x' (it has: {names}); save the samples under that name"
        )
    return _tensor(arrays, "x", path), _tensor(arrays, "y", path) if "y" in arrays.files else None


def _tensor(arrays: Mapping[str, Any], name: str, path: str | Path) -> Tensor:
    try:
        return torch.from_numpy(arrays[name])
    except (TypeError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(
            f"--data: {name!r} in {path} cannot become a tensor ({brief(error)}); save plain numbers"
        ) from error


def parse_dtype(name: str | None) -> torch.dtype | None:
    """Return the dtype of a name on the command line."""
    if name is None or name in _DTYPES:
        return None if name is None else _DTYPES[name]
    raise DtypeError(f"--dtype {name!r}: choose {', '.join(_DTYPES)}")


def parse_device(name: str) -> torch.device:
    """Return the device of a name on the command line, once a tensor has been put there.

    Args:
        name: "cpu", "cuda", "cuda:1", ...

    Returns:
        The device.

    Raises:
        DeviceError: If there is none of that name here.
    """
    try:
        device = torch.device(name)
        # a device may have a name and no driver: only a tensor on it tells
        torch.empty(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise DeviceError(f"--device {name!r} cannot be used here: {brief(error)}") from error
    return device


def place(
    model: nn.Module, x: Tensor, dtype: torch.dtype | None, device: torch.device
) -> tuple[nn.Module, Tensor]:
    """Bring a network and its samples to one device and, if asked, to one dtype.

    Args:
        model: The network; a copy is moved where anything changes.
        x: Samples. Integers (token ids) stay integers.
        dtype: Floating dtype for both, or None to leave both as they are.
        device: Device for both.

    Returns:
        Network and samples.

    Raises:
        DtypeError: If no dtype is asked for and the two differ.
    """
    tensors = [*model.parameters(), *model.buffers()]
    floating = {t.dtype for t in tensors if t.is_floating_point()}
    if dtype is None and x.is_floating_point() and floating and x.dtype not in floating:
        own = ", ".join(sorted(str(d).removeprefix("torch.") for d in floating))
        given = str(x.dtype).removeprefix("torch.")
        raise DtypeError(
            f"--data: 'x' is {given}, the network {own}; pass --dtype {own.split(', ')[0]} to cast both"
        )
    if any(t.device != device or (dtype and t.is_floating_point() and t.dtype != dtype) for t in tensors):
        model = copy.deepcopy(model).to(device=device, dtype=dtype)
    return model, x.to(device=device, dtype=dtype if x.is_floating_point() else None)
