"""The context of every call: global settings and random state under which products of J are right, put back.

Most of these settings belong to the whole process. Threads that enter and leave at different times
would restore each other's values, so each setting is a counted switch: the first to enter saves,
the last to leave restores.
"""

from __future__ import annotations

import functools
import os
import random
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "disturb_randomness",
    "full_precision",
    "one_at_a_time",
    "safe_context",
    "untouched_randomness",
]


class _Switch:
    """A process-wide setting that is held at ``target(read())`` while anybody needs it."""

    def __init__(
        self, read: Callable[[], Any], write: Callable[[Any], Any], target: Callable[[Any], Any]
    ) -> None:
        self._read, self._write, self._target = read, write, target
        self._lock = threading.Lock()
        self._depth = 0
        self._saved: Any = None
        self._changed = False

    def __enter__(self) -> None:
        with self._lock:
            if self._depth == 0:  # whoever comes while it is held finds what it wants
                self._saved = self._read()
                wanted = self._target(self._saved)
                self._changed = wanted != self._saved
                if self._changed:
                    self._write(wanted)
            self._depth += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0 and self._changed:
                self._write(self._saved)


def _always(value: Any) -> Callable[[Any], Any]:
    """Return the target of a setting that is held at one value, whatever it was."""
    return lambda _: value


def _read_attention() -> tuple[bool, ...]:
    cuda = torch.backends.cuda
    return (
        cuda.math_sdp_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )


def _write_attention(enabled: tuple[bool, ...]) -> None:
    cuda = torch.backends.cuda
    cuda.enable_math_sdp(enabled[0])
    cuda.enable_flash_sdp(enabled[1])
    cuda.enable_mem_efficient_sdp(enabled[2])
    cuda.enable_cudnn_sdp(enabled[3])


def _set_cudnn(enabled: bool) -> None:
    torch.backends.cudnn.enabled = enabled


def _tuned(*names: tuple[str, str]) -> list[Any]:
    """Return those settings of float32 precision that this version of torch has (from 2.9 on)."""
    found = [getattr(getattr(torch.backends, backend), operation, None) for backend, operation in names]
    return [setting for setting in found if hasattr(setting, "fp32_precision")]


_MATMUL_SETTINGS = _tuned(("cuda", "matmul"), ("mkldnn", "matmul"), ("mkldnn", "conv"), ("mkldnn", "rnn"))
_CUDNN_SETTINGS = _tuned(("cudnn", "conv"), ("cudnn", "rnn"))


def _unless_mixed(read: Callable[[], Any]) -> Any:
    """Read an older setting; torch refuses that once the newer ones were used, and then it says None."""
    try:
        return read()
    except RuntimeError:
        return None


def _precisions(settings: list[Any]) -> tuple[str, ...]:
    """Return what settings are."""
    return tuple(setting.fp32_precision for setting in settings)


def _write_precisions(settings: list[Any], wanted: tuple[str, ...]) -> None:
    """Set those settings that are not as wanted."""
    for setting, value in zip(settings, wanted, strict=True):
        if setting.fp32_precision != value:
            setting.fp32_precision = value


def _full(precisions: tuple[str, ...]) -> tuple[str, ...]:
    """Return settings under which float32 is not rounded; "none", which asks a more general one, stays."""
    return tuple("ieee" if value in ("tf32", "bf16") else value for value in precisions)


def _read_matmul() -> tuple[Any, ...]:
    return (_unless_mixed(torch.get_float32_matmul_precision), _precisions(_MATMUL_SETTINGS))


def _write_matmul(wanted: tuple[Any, ...]) -> None:
    if wanted[0] is not None:
        torch.set_float32_matmul_precision(wanted[0])
    _write_precisions(_MATMUL_SETTINGS, wanted[1])


def _read_convolution() -> tuple[Any, ...]:
    return (_unless_mixed(lambda: torch.backends.cudnn.allow_tf32), _precisions(_CUDNN_SETTINGS))


def _write_convolution(wanted: tuple[Any, ...]) -> None:
    if wanted[0] is not None:
        torch.backends.cudnn.allow_tf32 = wanted[0]
    _write_precisions(_CUDNN_SETTINGS, wanted[1])


# The fused attention kernels have neither forward-mode nor double-backward formulas.
_MATH_ATTENTION = _Switch(_read_attention, _write_attention, _always((True, False, False, False)))
# The encoder layer's fast path has no derivative at all and is taken in eval mode without grad.
_NO_FAST_PATH = _Switch(
    torch.backends.mha.get_fastpath_enabled, torch.backends.mha.set_fastpath_enabled, _always(False)
)
# oneDNN's fused LSTM and RNN have no forward-mode formula.
_NO_MKLDNN = _Switch(torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled, _always(False))
# cuDNN's recurrent kernels have neither forward mode nor double backward, and want flattened weights.
_NO_CUDNN = _Switch(lambda: torch.backends.cudnn.enabled, _set_cudnn, _always(False))
# Anything but full precision lets products round to TF32 (CUDA) or bfloat16 (CPU).
_FULL_MATMUL = _Switch(_read_matmul, _write_matmul, lambda now: (now[0] and "highest", _full(now[1])))
_FULL_CONVOLUTION = _Switch(
    _read_convolution, _write_convolution, lambda now: (now[0] and False, _full(now[1]))
)


_COMPUTING = threading.RLock()  # reentrant: a product is made inside the context of another piece of work


def _renew_lock() -> None:
    """Give a forked child a lock of its own."""
    global _COMPUTING
    _COMPUTING = threading.RLock()  # a forked child has not the thread that may hold it


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


@contextmanager
def one_at_a_time(settings: AbstractContextManager[None]) -> Iterator[None]:
    """Hold settings while no other thread computes with a model.

    The level of torch's forward mode belongs to the whole process: products in two threads would end each
    other's, or differentiate along each other's tangents.
    """
    with _COMPUTING, settings:
        yield


def _leave_inference(stack: ExitStack) -> None:
    """Turn inference mode, in which no derivative exists and no tensor has a version, into no_grad."""
    if torch.is_inference_mode_enabled():
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Hold autocast, TF32 and reduced CPU precision off, for products of tensors without a model."""
    with ExitStack() as stack:
        now = _read_matmul()
        if now != (now[0] and "highest", _full(now[1])):  # else there is nothing to hold, and it is cheap
            stack.enter_context(_FULL_MATMUL)
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        _leave_inference(stack)
        yield


@contextmanager
def safe_context(
    device: torch.device, *, math_attention: bool, no_mkldnn: bool = False, no_cudnn: bool = False
) -> Iterator[None]:
    """Hold the settings under which products with J and Jᵀ are exact, and restore them afterwards.

    Gradient mode is left as it is; inference mode, in which no derivative exists, becomes no_grad.
    Attention's plain formula is for jvp and double backward, oneDNN is off for fused LSTM and RNN in low
    precision, cuDNN for recurrent modules on CUDA.
    """
    with ExitStack() as stack:
        stack.enter_context(_NO_FAST_PATH)
        stack.enter_context(_FULL_MATMUL)
        if math_attention:
            stack.enter_context(_MATH_ATTENTION)
        if no_mkldnn:
            stack.enter_context(_NO_MKLDNN)
        if device.type == "cuda":
            stack.enter_context(_FULL_CONVOLUTION)
            if no_cudnn:
                stack.enter_context(_NO_CUDNN)
        if torch.is_autocast_enabled(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        _leave_inference(stack)
        yield


def _states(device: torch.device | None) -> list[tuple[Any, Callable[[Any], None]]]:
    """Return every global random state, each with what sets it."""
    states: list[tuple[Any, Callable[[Any], None]]] = [
        (torch.get_rng_state(), torch.set_rng_state),
        (random.getstate(), random.setstate),
    ]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        states.append((numpy.random.get_state(), numpy.random.set_state))
    if device is not None and device.type == "cuda":
        states.append(
            (torch.cuda.get_rng_state(device), functools.partial(torch.cuda.set_rng_state, device=device))
        )
    return states


@contextmanager
def untouched_randomness(device: torch.device | None = None) -> Iterator[Callable[[], bool]]:
    """Restore random states of torch (a CUDA device, too), Python and NumPy, also after an exception.

    Yields:
        Tells whether one of them has moved since the block was entered.
    """
    states = _states(device)

    def moved() -> bool:
        pairs = zip(states, _states(device), strict=False)  # NumPy may have been imported since
        return any(not _equal(old, new) for (old, _), (new, _) in pairs)

    try:
        yield moved
    finally:
        for state, put_back in states:
            put_back(state)


def disturb_randomness(seed: int) -> None:
    """Put all global generators into another state; only for use inside `untouched_randomness`."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed)


def _equal(left: Any, right: Any) -> bool:
    """Whether two random states are the same, as torch, Python and NumPy have them."""
    if isinstance(left, Tensor):
        return torch.equal(left, right)
    if isinstance(left, tuple):
        try:
            return bool(left == right)  # Python's own: hundreds of numbers
        except ValueError:  # NumPy's holds an array
            return all(map(_equal, left, right))
    return bool(left.tobytes() == right.tobytes()) if hasattr(left, "tobytes") else bool(left == right)
