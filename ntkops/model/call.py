"""The one safe call of a model with other parameters than its own.

The user's module is never run and never swapped: a private copy of its structure is, and that copy
shares no mutable part with it. The copy holds no parameters between calls. Its slots, one for each
(module instance, attribute), are filled for the time of one call, every alias of one parameter with
the same tensor, so that tied weights and submodules reached by two paths are right.
"""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import sys
import threading
import types
import warnings
import weakref
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..errors import UnsupportedModelError
from .context import untouched_randomness
from .corrections import embedding, prelu

__all__ = ["FunctionCall", "ModuleCall", "Reader", "tensors_within", "uncompiled"]


Reader = Callable[[nn.Module | None, Callable[[], Any]], Any]
Slot = tuple[nn.Module, str, str, int]

_OPAQUE = (
    type,
    types.ModuleType,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.CodeType,
    types.FrameType,
    weakref.ReferenceType,
    str,
    bytes,
    int,
    float,
    complex,
    torch.dtype,
    torch.device,
)


_CONTAINERS = (dict, OrderedDict, defaultdict, list, set)
_OWN_OF_MODULES = frozenset(vars(nn.Module())) | {"_flat_weights", "_flat_weight_refs"}


def tensors_within(root: object) -> list[Tensor]:
    """Return every tensor that a deep copy of an object would meet, each once.

    Classes, functions and their closures are passed over, as a deep copy does not enter them either; so are
    the tensors without data that exported graphs keep beside their operations.
    """
    found: list[Tensor] = []
    seen: dict[int, object] = {}  # keeps what it has seen alive, so that no address is met twice
    passed: dict[type, bool] = {}  # kinds of objects that are met here, and whether they are passed over
    waiting: list[object] = [root]
    while waiting:
        item = waiting.pop()
        kind = type(item)
        if kind not in passed:
            # A fake tensor by name: its module is not imported unless needed.
            passed[kind] = issubclass(kind, _OPAQUE) or kind.__name__ == "FakeTensor"
        if passed[kind] or id(item) in seen:
            continue
        seen[id(item)] = item
        if isinstance(item, Tensor):
            found.append(item)
        elif kind is types.MethodType:
            waiting.append(item.__self__)  # type: ignore[attr-defined]
        else:
            waiting.extend(gc.get_referents(item))
    return found


# They never run on the private copy, and some cannot be pickled.
_STATE_DICT_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def _copy_structure(model: nn.Module, tensors: Sequence[Tensor]) -> nn.Module:
    """Copy a module deeply except for its tensors, without calling anything of the original."""
    # What the memo holds is taken for its own copy: tensors stay, and are replaced by placeholders
    # afterwards.
    memo: dict[int, Any] = {id(tensor): tensor for tensor in tensors}
    # Most of what modules have are empty dictionaries of hooks, over which a deep copy takes its time.
    for module in model.modules():
        for value in vars(module).values():
            if type(value) in (dict, OrderedDict) and not value:
                memo[id(value)] = type(value)()
    recurrent = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    # RNNBase.__getstate__ may rebuild, and on CUDA move, the weights of the module that is copied.
    for module in recurrent:
        memo[id(module)] = module.__class__.__new__(module.__class__)
    for module in recurrent:
        state = {key: value for key, value in vars(module).items() if key != "_flat_weight_refs"}
        vars(memo[id(module)]).update(copy.deepcopy(state, memo))
    with warnings.catch_warnings():
        if any(isinstance(module, torch.fx.GraphModule) for module in model.modules()):
            warnings.simplefilter("ignore", FutureWarning)  # of how torch itself describes exported graphs
        return copy.deepcopy(model, memo)


def _culprit(model: nn.Module, tensors: Sequence[Tensor]) -> str:
    """Name the attribute that refuses to be copied."""
    for path, module in model.named_modules():
        for key, value in vars(module).items():
            if key in ("_modules", "_parameters", "_buffers"):
                continue
            try:
                copy.deepcopy(value, {id(tensor): tensor for tensor in tensors} | {id(module): module})
            except Exception:
                name = f"{path}.{key}" if path else key
                return f"its attribute {name!r} of type {type(value).__name__}"
    return "one of its attributes"


def _private_copy(model: nn.Module, tensors: Sequence[Tensor]) -> nn.Module:
    """Return a copy of a module's structure whose calls are safe, with the tensors of the original."""
    try:
        private = _copy_structure(model, tensors)
    except Exception as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be copied, since {_culprit(model, tensors)} refuses ({error}); "
            "delete that attribute, or pass a function (params, inputs) -> output and a dict of its "
            "parameters"
        ) from error
    for module in list(private.modules()):
        vars(module)["_compiled_call_impl"] = None
        for hooks in _STATE_DICT_HOOKS:
            vars(module)[hooks] = OrderedDict()
        for name, child in module._modules.items():
            module._modules[name] = None if child is None else uncompiled(child)
        _neutralise(module)
    return private


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module inside a `torch.compile` wrapper."""
    if "torch._dynamo" in sys.modules:
        while isinstance(module, torch._dynamo.OptimizedModule):
            module = module._orig_mod
    return module


def _neutralise(module: nn.Module) -> None:
    """Give modules of the private copy one derivative in both modes, also in a checkpointed block.

    Such a block runs again where no `Corrected` is held.
    """
    if isinstance(module, nn.PReLU) and _has_own_forward(module, nn.PReLU):
        vars(module)["forward"] = functools.partial(_prelu, module)
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        module.sparse = module.scale_grad_by_freq = False
    if isinstance(module, nn.Embedding) and _has_own_forward(module, nn.Embedding):
        vars(module)["forward"] = functools.partial(_embed, module)


def _keep_no_statistics(root: nn.Module) -> None:
    """Let batch statistics of a private copy be used, and not averaged: what is written is never read."""
    for module in root.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            module.track_running_stats = False


def _has_own_forward(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module computes as its class in torch does."""
    return type(module).forward is kind.forward and "forward" not in vars(module)


def _embed(module: nn.Embedding, tokens: Tensor) -> Tensor:
    """Look up with constants at the padding row."""
    return embedding(tokens, module.weight, module.padding_idx)


def _prelu(module: nn.PReLU, input: Tensor) -> Tensor:
    """Have one slope at zero."""
    return prelu(input, module.weight)


# torch refuses to pickle modules whose class a parametrisation made at run time.


def _parametrized_tensor(name: str) -> property:
    """Return what reads a parametrised tensor, as torch defines it on the class that it makes."""

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


def _pickle_parametrized(item: object) -> bytes:
    """Return the pickle of an object that holds parametrised modules."""
    target = io.BytesIO()
    _Pickler(target, protocol=pickle.HIGHEST_PROTOCOL).dump(item)
    return target.getvalue()


@dataclass
class CallFacts:
    """What a trial finds out about calls.

    Attributes:
        replicate: Whether calls need a copy each, since their graph calls the modules again.
        draws: Whether the forward pass draws global random numbers (without effect on the output).
        differentiates: Whether the forward pass differentiates, and so needs gradient mode.
    """

    replicate: bool = False
    draws: bool = False
    differentiates: bool = False


def _fact(name: str) -> Any:
    """Return a property that is kept with the facts, which may outlive the call."""
    return property(
        lambda self: getattr(self.facts, name), lambda self, value: setattr(self.facts, name, value)
    )


class _Call:
    """What calls of modules and of functions share.

    Attributes:
        others: Tensors that the model holds outside parameters and buffers, each with a label.
        facts: What is known of calls, apart from what is called: it may be remembered longer.
    """

    others: tuple[tuple[str, Tensor], ...] = ()
    replicate, draws, differentiates = _fact("replicate"), _fact("draws"), _fact("differentiates")

    def __init__(self) -> None:
        self.facts = CallFacts()

    def run(self, tensors: Sequence[Tensor], inputs: Any, reader: Reader) -> Any:
        """Return what a reader returns, which is called as ``reader(root, forward)`` and calls ``forward()``.

        ``tensors`` stand in for those of the model, in the order of construction; inputs are a tensor or
        tuple (positional), or a dict (keywords).
        """
        if not (self.draws or self.differentiates):
            return self._run(tensors, inputs, reader)
        with ExitStack() as stack:
            if self.draws:
                stack.enter_context(untouched_randomness(tensors[0].device))
            if self.differentiates:
                stack.enter_context(torch.enable_grad())
            return self._run(tensors, inputs, reader)

    def _run(self, tensors: Sequence[Tensor], inputs: Any, reader: Reader) -> Any:
        """Do the same in the settings that are there."""
        raise NotImplementedError

    def reassigned(self, root: nn.Module | None, tensors: Sequence[Tensor]) -> list[str]:
        """Name the slots that hold other tensors than they were given; to be asked inside a call."""
        return []

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return itself: every call leaves it as it was."""
        return self


class ModuleCall(_Call):
    """A private copy of a module, ``root``, that is called with tensors handed to it.

    The user's module is read, never kept. ``tensors`` are all of its parameters and buffers, each once, in
    the order in which calls hand their stand-ins; ``coupled`` says that batch statistics are consented to.
    """

    def __init__(self, model: nn.Module, tensors: Sequence[Tensor], coupled: bool = False) -> None:
        super().__init__()
        positions = {id(tensor): position for position, tensor in enumerate(tensors)}
        within = tensors_within(model)
        self.root = _private_copy(model, within)
        if coupled:
            _keep_no_statistics(self.root)
        self._slots: list[Slot] = []
        for module in self.root.modules():
            for kind in ("_parameters", "_buffers"):
                for key, tensor in getattr(module, kind).items():
                    if tensor is not None:
                        self._slots.append((module, kind, key, positions[id(tensor)]))
        placeholders = self._empty_slots()
        self._prepare()
        if any(id(tensor) not in positions for tensor in within):
            others = [t for t in tensors_within(self.root) if id(t) not in placeholders]
            self.others = _label(self.root, others)

    def _empty_slots(self) -> set[int]:
        """Fill the slots with placeholders without data, so that a use outside a call cannot pass unseen."""
        placeholders: dict[int, Tensor] = {}
        for module, kind, key, position in self._slots:
            held = getattr(module, kind)
            if position not in placeholders:
                empty = torch.empty(held[key].shape, dtype=held[key].dtype, device="meta")
                placeholders[position] = nn.Parameter(empty, False) if kind == "_parameters" else empty
            held[key] = placeholders[position]
        return {id(placeholder) for placeholder in placeholders.values()}

    def _prepare(self) -> None:
        """Note what a call fills, and what the private modules hold between calls."""
        self._lock = threading.RLock()
        modules = list(self.root.modules())
        self._targets = [(getattr(module, kind), key, at) for module, kind, key, at in self._slots]
        self._recurrent = [module for module in modules if isinstance(module, nn.RNNBase)]
        for module in self._recurrent:
            vars(module)["_flat_weights"] = []
            # Without references torch never rebuilds or flattens the list that calls put there.
            vars(module)["_flat_weight_refs"] = [None] * len(module._flat_weights_names)
        parts: list[dict[str, Any]] = [vars(module) for module in modules]
        parts += [
            vars(module)[kind] for module in modules for kind in ("_parameters", "_buffers", "_modules")
        ]
        self._resting = [(part, dict(part)) for part in parts]
        self._resting_containers = [(part, part.copy()) for part in _containers(modules)]

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the lock and what is made from the rest."""
        made = ("_lock", "_targets", "_recurrent", "_resting", "_resting_containers")
        state = {key: value for key, value in vars(self).items() if key not in made}
        if any(map(parametrize.is_parametrized, self.root.modules())):
            return {"pickled": _pickle_parametrized(state)}
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Make the lock and the lists of slots anew."""
        vars(self).update(pickle.loads(state["pickled"]) if "pickled" in state else state)
        self._prepare()

    def _replica(self) -> ModuleCall:
        """Return a call of modules of its own, which are left as the forward pass leaves them."""
        replica = self.__class__.__new__(self.__class__)
        memo = {id(tensor): tensor for tensor in tensors_within(self.root)}
        root, slots = copy.deepcopy((self.root, self._slots), memo)
        vars(replica).update(vars(self), root=root, _slots=slots)
        replica._prepare()
        return replica

    def _run(self, tensors: Sequence[Tensor], inputs: Any, reader: Reader) -> Any:
        if self.replicate:
            # The graph calls the modules again in its backward pass, so the tensors must stay in place.
            return self._replica()._run_held(tensors, inputs, reader)
        with self._lock:
            try:
                return self._run_held(tensors, inputs, reader)
            finally:
                self._rest()

    def _run_held(self, tensors: Sequence[Tensor], inputs: Any, reader: Reader) -> Any:
        """Fill the slots and call the reader; whoever calls this holds the lock, or the only reference."""
        args = inputs if isinstance(inputs, tuple) else () if isinstance(inputs, dict) else (inputs,)
        kwargs = inputs if isinstance(inputs, dict) else {}
        for held, key, position in self._targets:
            held[key] = tensors[position]
        # What torch hands to its fused functions is this list, and not the attributes.
        for module in self._recurrent:
            names = module._flat_weights_names
            vars(module)["_flat_weights"] = [getattr(module, name, None) for name in names]
        return reader(self.root, lambda: self.root(*args, **kwargs))

    def _rest(self) -> None:
        """Undo everything that the call did to the private modules, so that calls are independent."""
        for part, resting in self._resting:
            if resting:
                part.update(resting)
            if len(part) != len(resting):
                for key in part.keys() - resting.keys():
                    del part[key]
        for container, contents in self._resting_containers:
            if container or contents:  # most are empty lists and dictionaries
                container.clear()
                container.extend(contents) if isinstance(container, list) else container.update(contents)

    def reassigned(self, root: nn.Module | None, tensors: Sequence[Tensor]) -> list[str]:
        """Name the slots that hold other tensors than they were given; to be asked inside a call."""
        if root is None:
            return []
        paths = {id(module): path for path, module in self.root.named_modules()}
        named = [(paths[id(module)], kind, key, position) for module, kind, key, position in self._slots]
        return [
            f"{path}.{key}".lstrip(".")
            for path, kind, key, position in named
            if getattr(root.get_submodule(path), kind).get(key) is not tensors[position]
        ]


def _containers(modules: Sequence[nn.Module]) -> list[Any]:
    """Return the lists, dictionaries and sets in which modules may keep something for the next call."""
    found: dict[int, Any] = {}
    waiting = [
        value for module in modules for key, value in vars(module).items() if key not in _OWN_OF_MODULES
    ]
    while waiting:
        value = waiting.pop()
        if id(value) in found:
            continue
        if type(value) in _CONTAINERS:
            found[id(value)] = value
        if type(value) in (*_CONTAINERS, tuple):
            waiting.extend(value.values() if isinstance(value, dict) else value)
    return list(found.values())


def _label(root: nn.Module, tensors: Sequence[Tensor]) -> tuple[tuple[str, Tensor], ...]:
    """Name tensors outside parameters and buffers by the module attribute in which they are found."""
    labels: dict[int, str] = {}
    wanted = {id(tensor) for tensor in tensors}
    if wanted:
        for path, module in root.named_modules():
            for key, value in vars(module).items():
                if key in ("_modules", "_parameters", "_buffers", "_flat_weights"):
                    continue
                for tensor in tensors_within(value):
                    if id(tensor) in wanted:
                        labels.setdefault(id(tensor), f"{path}.{key}".lstrip("."))
    return tuple((labels.get(id(tensor), "a tensor of the module"), tensor) for tensor in tensors)


class FunctionCall(_Call):
    """A plain function ``(params, inputs) -> output`` called with tensors handed to it."""

    def __init__(self, function: Callable[..., Any], keys: Sequence[tuple[str, int]]) -> None:
        super().__init__()
        self.function = function
        self.keys = tuple(keys)  # of its dictionary, with the positions of their tensors: tied ones share one

    def _run(self, tensors: Sequence[Tensor], inputs: Any, reader: Reader) -> Any:
        params = {key: tensors[position] for key, position in self.keys}
        return reader(None, lambda: self.function(params, inputs))
