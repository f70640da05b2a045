"""Looking inside a forward pass: the only place with hooks and dispatch modes.

All of them act on the private copy of the model, and are gone when the call is over.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import ModelMutationError, NtkopsError, UnsupportedModelError

__all__ = [
    "Guard",
    "first_random_module",
    "foreign_use",
    "graph_leaves",
    "inputs_of",
    "outputs_of",
    "storage_key",
]


@contextmanager
def outputs_of(module: nn.Module, pick: Callable[[Any], Any]) -> Iterator[list[Any]]:
    """Yield a list of what ``pick`` takes of the outputs of a module, which grows with every call."""
    collected: list[Any] = []

    def collect(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
        # At once, and a copy of tensors: a later layer may overwrite them.
        picked = pick(output)
        collected.append(picked.clone() if isinstance(picked, Tensor) else picked)

    handle = module.register_forward_hook(collect)
    try:
        yield collected
    finally:
        handle.remove()


@contextmanager
def inputs_of(module: nn.Module, pick: Callable[[Any], Any]) -> Iterator[list[Any]]:
    """Yield a list of what ``pick`` takes of a module's first positional inputs, before each of its calls."""
    collected: list[Any] = []

    def collect(_: nn.Module, args: tuple[Any, ...]) -> None:
        collected.append(pick(args[0]))

    handle = module.register_forward_pre_hook(collect)
    try:
        yield collected
    finally:
        handle.remove()


def storage_key(tensor: Tensor) -> int | None:
    """Return the address of a tensor's storage, None where it has none."""
    try:
        return tensor.untyped_storage().data_ptr() or None
    except (RuntimeError, NotImplementedError):
        return None


_GUARD_LOCK = threading.RLock()


@functools.cache
def _described(operation: Any) -> tuple[frozenset[str], tuple[str, ...], bool, bool]:
    """Return which arguments an operation writes to, the names of all, and what is special about it.

    That is whether it may write running statistics, and whether it is a convolution.
    """
    arguments = operation._schema.arguments  # which say of every operation of torch what it writes to
    written = frozenset(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)
    names = tuple(a.name for a in arguments)
    return written, names, "running_mean" in names, "convolution" in operation.__name__


class Guard(TorchDispatchMode):
    """Refuse, before it happens, any write to a tensor that is not the forward pass's own.

    Args:
        held: What the call is given (parameters, buffers, inputs), by storage address: not to be written.
        foreign: Tensors of the user's model that the call is not given: not to be used at all.

    Attributes:
        read: Labels of what was read of the tensors held.
        bytes: Bytes of all that was computed.
        lowest: The coarsest floating dtype of it.
        is_complex: Whether a part of it is complex.
        convolves: Whether a convolution is among the operations.
        refusal: The first refusal, kept because a model may swallow exceptions.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Leave torch's compiler, which takes seconds to load, alone: nothing here is compiled."""
        return False

    def __init__(self, held: dict[int, str], foreign: dict[int, str]) -> None:
        super().__init__()
        self._held = held
        self._foreign = foreign
        self.read: set[str] = set()
        self.bytes, self.lowest, self.is_complex, self.convolves = 0, torch.float64, False, False
        self.refusal: NtkopsError | None = None

    def seen(self, samples: int) -> tuple[int, torch.dtype, bool, bool]:
        """Return bytes for each of some samples, the coarsest dtype, and the two flags."""
        return max(1, self.bytes // samples), self.lowest, self.is_complex, self.convolves

    def hold(self, named: Iterable[tuple[str, Tensor]]) -> None:
        """Refuse writes to further tensors."""
        for label, tensor in named:
            key = storage_key(tensor)
            if key is not None:
                self._held[key] = label

    def __enter__(self) -> Self:
        """Take effect; one thread at a time, since torch keeps flags of dispatch modes for all threads."""
        _GUARD_LOCK.acquire()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        """End, and let the next thread in."""
        try:
            super().__exit__(*exception)
        finally:
            _GUARD_LOCK.release()

    def __torch_dispatch__(
        self, operation: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Look at the arguments, then run the operation."""
        kwargs = kwargs or {}
        written, names, has_statistics, convolves = _described(operation)
        for name, value in (*zip(names, args, strict=False), *kwargs.items()):
            if isinstance(value, (Tensor, list, tuple)):
                self._look(operation, value, name in written)
        if has_statistics:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            # Running statistics are written without the schema saying so.
            if given.get("running_mean") is not None and given.get("training", given.get("train")) is True:
                self._look(operation, given["running_mean"], True)
        result = operation(*args, **kwargs)
        self.convolves |= convolves
        # What is new takes memory in proportion to the samples: the measure of what a pass holds of one of
        # them.
        for part in result if isinstance(result, (list, tuple)) else (result,):
            if not isinstance(part, Tensor):
                continue
            self.is_complex |= part.is_complex()
            if part.is_floating_point() and part.layout == torch.strided:
                self.bytes += part.nbytes if part._base is None else 0
                if part.dtype.itemsize < self.lowest.itemsize or part.dtype == torch.bfloat16:
                    self.lowest = part.dtype
        return result

    def _look(self, operation: Any, value: Any, is_written: bool) -> None:
        """Note what is read of the tensors held, and refuse what must not be written to, or used."""
        tensors = value if isinstance(value, (list, tuple)) else (value,)
        for tensor in tensors:
            if not isinstance(tensor, Tensor):
                continue
            key = storage_key(tensor)
            if key is None:
                continue
            if key in self._held:
                self.read.add(self._held[key])
            if key in self._foreign:
                self._refuse(foreign_use(self._foreign[key]))
            if is_written and key in self._held:
                self._refuse(
                    ModelMutationError(
                        f"the forward pass changes {self._held[key]} in place (by {operation._schema.name}), "
                        "so that two products would see different models; call model.eval(), or write that "
                        "step out of place"
                    )
                )

    def _refuse(self, refusal: NtkopsError) -> None:
        """Raise, and keep the first refusal."""
        self.refusal = self.refusal or refusal
        raise refusal


def foreign_use(label: str) -> UnsupportedModelError:
    """Return the error for a use of the original model's tensor inside the private forward pass."""
    return UnsupportedModelError(
        f"the forward pass uses {label} of the original model directly (through a closure, a hook or the "
        "output callable) and not as its own attribute, so that its derivative would be lost and later "
        "changes would go unnoticed; select the output by module path (output='head') or wrap model and "
        "callable into one nn.Module"
    )


def graph_leaves(output: Tensor) -> tuple[list[Tensor], set[str]]:
    """Return the leaf tensors that an output's autograd graph ends in, and the names of its nodes."""
    leaves: list[Tensor] = []
    names: set[str] = set()
    seen = set()
    waiting: list[Any] = [output.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        names.add(node.name())
        if "AccumulateGrad" in node.name():
            leaves.append(node.variable)
        waiting.extend(parent for parent, _ in node.next_functions)
    return leaves, names


def first_random_module(root: nn.Module, forward: Callable[[], Any]) -> str | None:
    """Return the path of the first module whose outputs differ in two passes although its inputs agree.

    None if no single module is to blame. The private copy has its tensors in place.
    """
    runs: list[list[tuple[str, Any, Any]]] = []
    for _ in range(2):
        calls: list[tuple[str, Any, Any]] = []
        with ExitStack() as stack:
            for path, module in root.named_modules():
                if not any(module.children()):
                    stack.callback(_recorder(module, path, calls).remove)
            with torch.no_grad():
                forward()
        runs.append(calls)
    for (path, before, after), (_, before_again, after_again) in zip(*runs, strict=False):
        if _same(before, before_again) and not _same(after, after_again):
            return path
    return None


def _recorder(
    module: nn.Module, path: str, calls: list[tuple[str, Any, Any]]
) -> torch.utils.hooks.RemovableHandle:
    """Write down inputs and outputs of a module, call by call."""

    def record(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        calls.append((path, _copies(args), _copies(output)))

    return module.register_forward_hook(record)


def _copies(tree: Any) -> list[Tensor]:
    """Return copies of all tensors in a nesting."""
    return [leaf.detach().clone() for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Whether all tensors agree, one by one."""
    return len(left) == len(right) and all(map(torch.equal, left, right))
