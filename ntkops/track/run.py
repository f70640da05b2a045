"""The function that users call."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor
from tqdm import tqdm

from ..arguments import check_arguments
from ..engines import EngineChoice
from ..errors import DtypeError, InputError, NonFiniteError
from ..estimators._request import checked_generator
from ..model import BatchDim
from ..operators.output_choice import OutputChoice
from ..results import History
from .quantities import BUILT_IN, KernelOptions, Options, Quantity, own_quantity
from .tracker import Tracker, known_name
from .weights import Weights

if TYPE_CHECKING:
    from ..model.accepted import InputsLike, ModelLike, OutputLike, ParamsLike

__all__ = ["track"]

Chosen = str | Callable[..., Any]
Quantities = Chosen | Sequence[Chosen] | Mapping[str, Callable[..., Any]]
Checkpoints = Iterable[Weights] | Mapping[int, Weights] | Mapping[float, Weights]
_DEFAULT = ("trace", "effective_rank", "alignment", "parameter_distance")
_SEEDS = 2**62


@overload
def track(
    model: ModelLike, x: InputsLike, checkpoints: None = None, quantities: Quantities = ..., **options: Any
) -> Tracker: ...


@overload
def track(
    model: ModelLike, x: InputsLike, checkpoints: Checkpoints, quantities: Quantities = ..., **options: Any
) -> History: ...


def track(  # type: ignore[misc]  # the overloads do not repeat the options
    model: ModelLike,
    x: InputsLike,
    checkpoints: Checkpoints | None = None,
    quantities: Quantities = _DEFAULT,
    *,
    targets: Tensor | None = None,
    steps: Sequence[int | float] | None = None,
    rtol: float | None = None,
    num_passes: int | None = None,
    method: str = "auto",
    generator: torch.Generator | None = None,
    num_eigenvalues: int = 5,
    path: str | os.PathLike[str] | None = None,
    progress: bool = False,
    outputs: OutputChoice = "all",
    params: ParamsLike = None,
    output: OutputLike = None,
    engine: EngineChoice = "auto",
    batch_size: int | Literal["auto"] = "auto",
    chunk_size: int | Literal["auto"] = "auto",
    max_dense_bytes: int | Literal["auto"] = "auto",
    batch_dim: BatchDim = 0,
) -> History | Tracker:
    r"""Compute quantities of the kernel along training, from checkpoints or inside a training loop.

    Quantities by name: "trace", "frobenius_norm", "effective_rank", "alignment" (with the kernel of the first
    checkpoint, :math:`\cos(K, K_0)`), "kernel_distance" (one minus that), "kernel_velocity" (one minus the
    same with the kernel of the row before), "target_alignment" (:math:`\cos(K, Y Y^\top)`),
    "top_eigenvalues", "parameter_distance" (:math:`|\theta - \theta_0|`), and "linearization_error",
    :math:`|f - f_{\mathrm{lin}}| / |f - f_0|` with
    :math:`f_{\mathrm{lin}} = f_0 + J_0 (\theta - \theta_0)`: near 0 training is lazy, of order 1 it is not.
    It is NaN where nothing moved, and its error is the rounding of the outputs beside their change.

    The same probes serve every checkpoint, so that differences along training are not noise of the probes.
    The model is read, never run or changed.

    Args:
        model: As for `ntkops.ntk`. It gives the structure, the mode, and the values that checkpoints leave
            out; make it with ``model.eval()`` where that matters.
        x: The samples, as for `ntkops.ntk`.
        checkpoints: State dicts, modules, or paths of safetensors files or of torch files with a state dict
            (loaded with ``weights_only=True``), in the order of training; or a mapping from steps to these.
            None for a `Tracker`: ``tracker.record(step)`` in the training loop adds a row.
        quantities: A name, several, or callables ``(K) -> number, tensor or Estimate``, known by their names;
            or a mapping from names to callables.
        targets: Y of "target_alignment": ``(N, O)``, or with ``outputs="trace"`` any ``(N, C)``; floating.
        steps: One number for each checkpoint; None counts from 0.
        rtol: As for `ntkops.trace`.
        num_passes: As for `ntkops.trace`, for each estimate.
        method: As for `ntkops.trace`; one that all chosen quantities have.
        generator: CPU generator from which the seed of the probes is drawn; None draws one from the operating
            system. The result records the seed.
        num_eigenvalues: Number of eigenvalues in "top_eigenvalues", at most the size of the kernel.
        path: File for the table, written atomically after every row. Where it exists, its rows are kept and
            only new steps are computed, with the chunk sizes and the number of threads of the first run, and
            so with the same bits. It is refused if model structure, data or options differ, and a row if
            its parameters do. Callables are told apart by their names only.
        progress: Show a bar of checkpoints.
        outputs: As for `ntkops.ntk`; "each" gives one value for each output.
        params: As for `ntkops.ntk`.
        output: As for `ntkops.ntk`.
        engine: As for `ntkops.ntk`.
        batch_size: As for `ntkops.ntk`.
        chunk_size: As for `ntkops.ntk`.
        max_dense_bytes: As for `ntkops.ntk`.
        batch_dim: As for `ntkops.ntk`.

    Returns:
        `History` with one row for each checkpoint, or a `Tracker` where there are none. Memory: the first
        checkpoint's selected parameters and those of one more.

    Raises:
        InputError: If an option is not understood, or a checkpoint does not fit the model.
        DtypeError: If targets are not floating.
        NonFiniteError: If targets, parameters or products are not finite.
        CheckpointError: If a file is damaged, foreign, holds code, or belongs to another computation.
        NtkopsError: What `ntkops.ntk` and the estimators raise.

    Example:
        >>> import torch, ntkops
        >>> from ntkops.track import track
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
        ... )
        >>> x = torch.randn(6, 3)
        >>> tracker = track(
        ...     model, x, quantities=["trace", "alignment", "parameter_distance"]
        ... )
        >>> for step in range(2):
        ...     row = tracker.record(step)
        ...     with torch.no_grad():
        ...         for parameter in model.parameters():
        ...             _ = parameter.mul_(1.1)
        >>> moved = tracker.history["parameter_distance"]
        >>> tracker.history.steps, float(moved[0])
        ((0, 1), 0.0)
        >>> traces = tracker.history["trace"]
        >>> bool(traces[1] > traces[0])
        True
    """
    check_arguments(track, dict(locals()))
    chosen = _chosen(quantities)
    _check_targets(targets, "target_alignment" in chosen)
    if not isinstance(num_eigenvalues, int) or isinstance(num_eigenvalues, bool) or num_eigenvalues < 1:
        raise InputError(f"num_eigenvalues={num_eigenvalues!r}: pass a positive integer")
    pairs = None if checkpoints is None else _numbered(checkpoints, steps)
    if checkpoints is None and steps is not None:
        raise InputError("steps= belongs to checkpoints=; inside a training loop pass record(step)")
    generator_, _ = checked_generator(generator)
    # drawn once: every checkpoint meets the same probes, so that differences between rows are not theirs
    seed = int(torch.randint(_SEEDS, (), generator=generator_))
    tracker = Tracker(
        model,
        x,
        chosen,
        options=Options(seed, rtol, num_passes, method, _kept(targets), num_eigenvalues),
        kernel=KernelOptions(outputs, engine, batch_size, chunk_size, max_dense_bytes),
        params=params,
        output=output,
        batch_dim=batch_dim,
        path=path,
        seeded=generator is not None,
    )
    if pairs is None:
        return tracker
    total = len(checkpoints) if isinstance(checkpoints, Sized) else None
    for step, weights in tqdm(pairs, desc="track", unit="checkpoint", total=total, disable=not progress):
        tracker.record(step, weights)
    return tracker.history


def _chosen(
    quantities: Quantities,
) -> dict[str, Quantity]:
    """Return the quantities by name, in order."""
    if isinstance(quantities, Mapping):
        named: list[tuple[str, Chosen]] = list(quantities.items())
    else:
        several = [quantities] if isinstance(quantities, str) or callable(quantities) else list(quantities)
        named = [(known_name(one), one) for one in several]
    found: dict[str, Quantity] = {}
    for name, one in named:
        if not isinstance(name, str) or not (isinstance(one, str) or callable(one)):
            raise InputError(
                f"quantities holds a {type(one).__name__}; pass names or callables (K) -> number"
            )
        if name in found:
            raise InputError(f"two quantities are called {name!r}; pass a mapping with a name for each")
        if isinstance(one, str) and one not in BUILT_IN:
            close = difflib.get_close_matches(one, BUILT_IN, n=2) or list(BUILT_IN)
            raise InputError(f"there is no quantity {one!r}; did you mean {' or '.join(map(repr, close))}?")
        found[name] = BUILT_IN[one] if isinstance(one, str) else own_quantity(name, one)
    if not found:
        raise InputError("no quantity is asked for; name at least one")
    return found


def _check_targets(targets: Tensor | None, needed: bool) -> None:
    if needed and targets is None:
        raise InputError("target_alignment needs targets=: a tensor of the outputs that are wanted, (N, O)")
    if targets is None:
        return
    if not needed:
        raise InputError("targets= is for the quantity 'target_alignment', which is not asked for")
    if not isinstance(targets, Tensor) or not targets.is_floating_point():
        kind = targets.dtype if isinstance(targets, Tensor) else type(targets).__name__
        raise DtypeError(
            f"targets are {kind}; pass a floating tensor, for labels "
            "torch.nn.functional.one_hot(labels, num_classes).to(dtype)"
        )
    if not bool(torch.isfinite(targets).all()):
        raise NonFiniteError("targets hold NaN or infinity")
    if not bool(targets.any()):
        raise InputError("targets are all zero, so that no alignment with them is defined")


def _kept(targets: Tensor | None) -> Tensor | None:
    return None if targets is None else targets.detach().clone()


def _numbered(checkpoints: Any, steps: Sequence[int | float] | None) -> Iterator[tuple[Any, Any]]:
    """Return pairs of a step and a checkpoint."""
    if isinstance(checkpoints, str | os.PathLike | Tensor | torch.nn.Module) or not isinstance(
        checkpoints, Iterable
    ):
        raise InputError(
            f"checkpoints is a {type(checkpoints).__name__}; pass a list of state dicts or paths, or a "
            "mapping from steps to these"
        )
    if isinstance(checkpoints, Mapping):
        if any(isinstance(key, str) for key in checkpoints):
            raise InputError("checkpoints is one state dict; pass a list of them, or a mapping from steps")
        if steps is not None:
            raise InputError("steps= are given twice: the mapping of checkpoints has them already")
        return iter(checkpoints.items())
    if steps is None:
        return iter(enumerate(checkpoints))
    if len(set(steps)) != len(steps):
        raise InputError("steps= holds a number twice; every row needs its own")
    if isinstance(checkpoints, Sized) and len(checkpoints) != len(steps):
        raise InputError(f"{len(checkpoints)} checkpoints, but {len(steps)} steps; give one for each")
    return zip(steps, checkpoints, strict=True)
