"""What can be refused by looking at a model, before anything is computed."""

from __future__ import annotations

import copyreg
import enum
import itertools
import sys
import types
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.parameter import is_lazy

from ..errors import (
    CoupledSamplesError,
    DeviceError,
    DtypeError,
    ModelMutationError,
    NonFiniteError,
    NtkopsError,
    ParameterSelectionError,
    StochasticModelError,
    UnsupportedModelError,
)
from .watch import all_finite

__all__ = [
    "fingerprint",
    "require_finite",
    "require_mode",
    "require_selected",
    "require_supported",
    "require_tensors",
]

_PLAIN = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size, type)

_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _where(path: str) -> str:
    """Say where in the model a module is."""
    return repr(path) if path else "the top level"


def require_supported(model: nn.Module) -> None:
    """Raise `UnsupportedModelError` for kinds of modules whose structure cannot be copied or called."""
    for path, module in model.named_modules():
        kind, at = type(module).__name__, _where(path)
        if isinstance(module, torch.jit.ScriptModule):
            raise UnsupportedModelError(
                f"{kind} at {at} is TorchScript, whose parameters cannot be replaced; pass the eager module "
                "that it was made from"
            )
        if _is_quantised(module) and not any(True for _ in model.parameters()):
            raise UnsupportedModelError(
                f"{kind} at {at} is quantised, and the model has no parameters beside such modules; pass the "
                "floating-point model that it was made from"
            )
        if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            raise UnsupportedModelError(f"{kind} at {at} wraps the model; pass its .module")
        if kind == "FullyShardedDataParallel" or _is_sharded(module):
            raise UnsupportedModelError(
                f"{kind} at {at} is sharded by FSDP, so that no process holds its parameters; pass a copy of "
                "the model from before the sharding, loaded with the full state dict"
            )


def _is_sharded(module: nn.Module) -> bool:
    tensor = sys.modules.get("torch.distributed.tensor")
    return tensor is not None and any(
        isinstance(parameter, tensor.DTensor) for parameter in module._parameters.values()
    )


def _dropout(module: nn.Module) -> str | None:
    """Say how an active module draws random numbers, None if it does not."""
    if not module.training:
        return None
    if isinstance(module, _DropoutNd) and module.p > 0:
        return f"p={module.p}"
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and module.dropout > 0:
        inert = isinstance(module, nn.RNNBase) and module.num_layers == 1  # it acts between layers alone
        return None if inert else f"dropout={module.dropout}"
    if isinstance(module, nn.RReLU) and module.lower != module.upper:
        return f"random slope in [{module.lower:.3g}, {module.upper:.3g}]"
    return None


def _batch_statistics(module: nn.Module) -> str | None:
    """Say why a module normalises by its batch, None if it does not."""
    if not isinstance(module, _BatchNorm):
        return None
    if module.training:
        return "training mode"
    return "no running statistics" if module.running_mean is None else None


def _power_iteration(module: nn.Module) -> str | None:
    """Say why a spectral norm takes a step of its iteration, None if there is none, or it stands still."""
    if not module.training:
        return None
    hooks = module._forward_pre_hooks.values()
    spectral = type(module).__name__ == "_SpectralNorm" or any(
        type(hook).__name__ == "SpectralNorm" for hook in hooks
    )
    return "training mode" if spectral else None


def _renormalising(module: nn.Module) -> str | None:
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
        return f"max_norm={module.max_norm}"
    return None


def _is_quantised(module: nn.Module) -> bool:
    return ".ao.nn.quantized" in type(module).__module__


def _batch_range(module: nn.Module) -> str | None:
    return "dynamic quantisation" if _is_quantised(module) and ".dynamic" in type(module).__module__ else None


_Rule = tuple[Callable[[nn.Module], str | None], type[NtkopsError], str, str]
_RULES: tuple[_Rule, ...] = (
    (
        _dropout,
        StochasticModelError,
        "random numbers are drawn by",
        "J and Jᵀ would see different ones; call model.eval() first, or set the probability to 0",
    ),
    (
        _batch_statistics,
        CoupledSamplesError,
        "batch statistics are used by",
        "they couple the samples; call model.eval() first (with track_running_stats=True), use another "
        "normalisation, or consent with batch_dim=None",
    ),
    (
        _batch_range,
        CoupledSamplesError,
        "activations are rounded to the range of the whole batch by",
        "they couple the samples, and rounding has no derivative; pass the model before quantize_dynamic",
    ),
    (
        _power_iteration,
        ModelMutationError,
        "a power iteration changes the buffers of",
        "every product would see another model; call model.eval() first",
    ),
    (
        _renormalising,
        ModelMutationError,
        "embedding rows are renormalised in place by",
        "the forward pass changes its weight; renormalise once (weight.copy_(torch.renorm(weight, "
        "norm_type, 0, max_norm)) under torch.no_grad()) and set max_norm=None",
    ),
)


def require_mode(model: nn.Module, coupled: bool = False) -> None:
    """Raise if a module, as it stands, is random, couples samples without consent, or changes itself.

    Raises:
        StochasticModelError: Active dropout and the like.
        CoupledSamplesError: Batch normalisation with batch statistics.
        ModelMutationError: Spectral norm in training mode, embeddings with ``max_norm``.
    """
    modules = list(model.named_modules())
    for rule, error, what, way_out in _RULES:
        if coupled and rule is _batch_statistics:
            continue
        found = [
            f"{type(module).__name__} at {_where(path)} ({state})"
            for path, module in modules
            if (state := rule(module)) is not None
        ]
        if found:
            shown = ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")
            raise error(f"{what} {shown}: {way_out}")


def require_tensors(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """Raise if parameters or buffers, each with its label, have no data, or live on several devices.

    Raises:
        UnsupportedModelError: For a lazy or meta tensor.
        DeviceError: For a model that is spread over devices.
    """
    first: tuple[str, torch.device] | None = None
    for label, tensor in tensors:
        if is_lazy(tensor):
            raise UnsupportedModelError(
                f"{label} is not initialised yet (a lazy module); call the model once on a batch"
            )
        if tensor.is_meta:
            raise UnsupportedModelError(
                f"{label} has no data (meta device); load its values, as in "
                "model.to_empty(device='cpu') followed by load_state_dict"
            )
        if tensor.dim() == 0 and tensor.device.type == "cpu":
            continue  # scalars on the CPU go with tensors on any device
        first = first or (label, tensor.device)
        if tensor.device != first[1]:
            raise DeviceError(
                f"the model is spread over devices: {first[0]} lives on {first[1]}, {label} on "
                f"{tensor.device}; move all of it to one device with model.to(device)"
            )


def require_selected(selected: Mapping[str, Tensor]) -> None:
    """Raise if selected parameters cannot be differentiated, differ in dtype, or have no entries at all.

    Raises:
        UnsupportedModelError: For complex, integer and sparse parameters.
        DtypeError: For several dtypes.
        ParameterSelectionError: If none has an entry.
    """
    names = list(selected)
    if not any(tensor.numel() for tensor in selected.values()):
        shown = ", ".join(f"{name!r} {tuple(tensor.shape)}" for name, tensor in list(selected.items())[:5])
        raise ParameterSelectionError(
            f"the selected parameters have no entries ({shown}), so that their kernel is empty; select others"
        )
    for name, tensor in selected.items():
        if tensor.is_complex():
            raise UnsupportedModelError(
                f"parameter {name!r} has dtype {tensor.dtype}; complex parameters are not supported: store "
                "real and imaginary parts (torch.view_as_real), or leave it out of params="
            )
        if tensor.dtype not in _FLOATING:
            raise UnsupportedModelError(
                f"parameter {name!r} has dtype {tensor.dtype} (quantised, or a counter), which has no "
                "derivative; leave it out of params="
            )
        if tensor.layout != torch.strided:
            raise UnsupportedModelError(f"parameter {name!r} is {tensor.layout}; convert it with to_dense()")
        if tensor.dtype != selected[names[0]].dtype:
            raise DtypeError(
                f"selected parameters differ in dtype: {names[0]!r} is {selected[names[0]].dtype}, {name!r} "
                f"{tensor.dtype}; select those of one dtype, or cast the model with model.to(dtype)"
            )


class _Opaque(Exception):
    """A value of which it cannot be told whether it has changed."""


def fingerprint(model: nn.Module) -> tuple[object, ...] | None:
    """Return all of a module but the values of its tensors; None where an attribute is opaque."""
    # Modules and tensors are met here by their names: a reference to one of them is the same in the next
    # model of this kind, whatever its address.
    named = (model.named_modules(), model.named_parameters(), model.named_buffers())
    met: dict[int, tuple[object, object]] = {
        id(value): (name, value) for name, value in itertools.chain[tuple[str, Any]](*named)
    }
    found: list[object] = []
    try:
        for path, module in model.named_modules():
            found.append((path, type(module)))
            for key, value in vars(module).items():
                if key in ("_parameters", "_buffers"):
                    for name, tensor in value.items():
                        if tensor is not None:
                            flags = tensor.device, tensor.requires_grad
                            found.append((name, tensor.shape, tensor.dtype, *flags))
                elif key != "_modules" and (value or not isinstance(value, (dict, set, list))):
                    found.append((key, _contents(value, met)))
    except _Opaque:
        return None
    return tuple(found)


def _contents(value: Any, met: dict[int, tuple[object, object]]) -> object:
    """Return what a deep copy of a value would copy; what was met before, and is kept so, by its name."""
    if isinstance(value, (*_PLAIN, enum.Enum, types.FunctionType, types.BuiltinFunctionType)):
        return type(value), value
    if id(value) in met:
        return "met", met[id(value)][0]
    met[id(value)] = len(met), value
    if type(value) in (list, tuple):
        return type(value), tuple(_contents(part, met) for part in value)
    if type(value) in (set, frozenset):
        return type(value), frozenset(_contents(part, met) for part in value)
    if type(value) in (dict, OrderedDict):
        return type(value), tuple((_contents(k, met), _contents(v, met)) for k, v in value.items())
    if isinstance(value, types.MethodType):
        return value.__func__, _contents(value.__self__, met)
    if isinstance(value, weakref.ReferenceType):
        return type(value), _contents(value(), met)
    if isinstance(value, (Tensor, nn.Module)):  # one that is no part of the model, and may change unseen
        raise _Opaque
    try:
        make, given, *state = value.__reduce_ex__(4)
    except Exception as error:
        raise _Opaque from error
    # Else there is more to it than its attributes.
    if make is not copyreg.__newobj__ or given != (type(value),) or any(state[1:]):  # type: ignore[attr-defined]
        raise _Opaque
    return type(value), _contents(state[0] if state else None, met)


def function_fingerprint(
    function: object, seen: tuple[types.CodeType, ...] = ()
) -> tuple[object, ...] | None:
    """Return what a function is made of: its code, and what it reads beside its arguments.

    None where that is opaque: then nothing of it can be known in advance.
    """
    if not isinstance(function, types.FunctionType):
        return None
    code = function.__code__
    if code in seen:  # it calls itself, or two functions each other
        return (code,)
    found: list[object] = [code]
    values: list[tuple[str, object]] = [("defaults", function.__defaults__ or ())]
    values += sorted((function.__kwdefaults__ or {}).items())
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            values.append((name, cell.cell_contents))
        except ValueError:  # not filled yet
            return None
    if not function.__module__.startswith("torch."):  # whose functions read nothing that changes
        names = sorted(_names_in(code))
        values += [(name, function.__globals__[name]) for name in names if name in function.__globals__]
    for name, value in values:
        part = _made_of(value, (*seen, code))
        if part is None:
            return None
        found.append((name, part))
    return tuple(found)


def _names_in(code: types.CodeType) -> set[str]:
    """Return the names that some code, and the functions made in it, may read."""
    inner = (part for part in code.co_consts if isinstance(part, types.CodeType))
    return set(code.co_names).union(*map(_names_in, inner))


def _made_of(value: object, seen: tuple[types.CodeType, ...]) -> object | None:
    """Return what tells one value that a function reads from another, None where nothing does."""
    if isinstance(value, nn.Module):
        return fingerprint(value)
    if isinstance(value, types.FunctionType):
        plain = value.__module__.startswith("torch.") and not value.__closure__
        return value if plain else function_fingerprint(value, seen)
    if isinstance(value, (*_PLAIN, types.BuiltinFunctionType, types.ModuleType)):
        return (type(value), value)
    if isinstance(value, Tensor):  # what the output depends on is watched, and tried again
        return (id(value), value.shape, value.dtype, value.device)
    if isinstance(value, (tuple, list)):
        parts = tuple(_made_of(part, seen) for part in value)
        return None if None in parts else (type(value), parts)
    return None


def require_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise if a parameter holds NaN or infinity.

    Raises:
        NonFiniteError: Naming the parameter and how many of its entries.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in _FLOATING or tensor.layout != torch.strided:
            continue
        values = tensor.detach()
        if not all_finite(values):
            nan, infinite = int(torch.isnan(values).sum()), int(torch.isinf(values).sum())
            counts = " and ".join(f"{n} {kind}" for n, kind in ((nan, "NaN"), (infinite, "infinite")) if n)
            raise NonFiniteError(
                f"parameter {name!r} has {counts} of {tensor.numel()} entries; training diverged or the "
                "checkpoint is damaged: load sound values"
            )
