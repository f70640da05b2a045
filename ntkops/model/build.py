"""From what the user passes to a `Linearization`: checks first, then the snapshot."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..arguments import checked
from ..errors import ParameterSelectionError, UnsupportedModelError, UnsupportedOperationError
from .accepted import ModelLike, OutputLike, ParamsLike
from .batch import BatchDim, are_coupled, require_batch_dim
from .call import CallFacts, FunctionCall, ModuleCall, uncompiled
from .entries import Entries
from .inspection import (
    fingerprint,
    function_fingerprint,
    require_finite,
    require_mode,
    require_selected,
    require_supported,
    require_tensors,
)
from .linearization import Linearization
from .output import OutputSelector
from .selection import Selector, select_parameters
from .verdict import Verdict
from .watch import Watch, hold

__all__ = ["linearize"]


@checked
def linearize(
    model: ModelLike,
    params: ParamsLike = None,
    output: OutputLike = None,
    *,
    batch_dim: BatchDim = 0,
    differentiable: bool = False,
) -> Linearization:
    r"""Fix a model at its parameters, as the pure function :math:`f(\theta, x)` that kernels are made of.

    The result is a value: selected parameters and buffers are copied, and the others too if any of them
    requires grad. If none does they are held by reference, and a product after a change in place raises
    `StaleOperatorError` (a write through ``.data`` is invisible to torch, and to us).

    The model itself is never run, swapped or changed. A private copy of its structure (modules and hooks,
    no tensors) is called instead; a hook that writes to a list outside the model does so here too.

    J is what ``backward()`` gives: what is detached has no derivative, nor has the padding row of an
    embedding (``padding_idx``). ``scale_grad_by_freq`` is the one exception: it divides by the counts of
    tokens in the whole batch, so that a row of J would depend on the other samples, and is without effect.

    Args:
        model: An `torch.nn.Module` (a compiled one is unwrapped), or a function ``(params, inputs) ->
            output`` of a dict of tensors and one batch as it was passed.
        params: The selected parameters: None for all that require grad; a name, a glob pattern, a module of
            the model for all of its parameters, or several of these; a predicate ``(name, parameter) ->
            bool``; a dict of values at which to linearise; or `Entries` for single weights.
            A tied parameter is selected once, by any of its names. For a function: the dict of all its
            parameters.
        output: The state: None where the model returns a tensor; a key or position; a callable on the raw
            output; or the path of a module whose output is captured (``"rnn[0]"`` for a part of it,
            ``"block@1"`` for its second call).
        batch_dim: The axis of inputs and output on which the samples lie. None says that they are coupled, as
            the nodes of a graph are: all inputs are one sample, and the first axis of the output counts its
            nodes. A dict by keyword, or a tuple by position, gives each input an axis of its own, None to
            what all samples share; the output then has its samples first.
        differentiable: Keep parameters and inputs live, so that derivatives of results flow to them.

    Returns:
        The linearisation, accepted wherever a model is.

    Raises:
        UnsupportedOperationError: Other choices for a model that is linearised already.
        InputError: A ``batch_dim`` that is neither an axis, None, nor these by input.
        UnsupportedModelError: TorchScript, DataParallel, FSDP, parameters without data, complex or integer
            ones, or a module that cannot be copied.
        UnknownParameterError: A name or pattern that matches nothing.
        ParameterSelectionError: An empty or ambiguous selection.
        ParameterShapeError: A value of another shape than its parameter's.
        DtypeError: Selected parameters of several dtypes.
        DeviceError: A model that is spread over devices.
        NonFiniteError: NaN or infinity in a parameter.
        StochasticModelError: Active dropout.
        CoupledSamplesError: Batch normalisation with batch statistics.
        ModelMutationError: Modules that change their own parameters or buffers.

    Cost: one copy of the selected parameters and buffers; one look at all parameters.

    Example:
        >>> import torch, ntkops.model
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))
        >>> lin = ntkops.model.linearize(net, params="2.*")
        >>> lin.names, lin.num_parameters
        (('2.weight', '2.bias'), 10)
        >>> lin.inputs(torch.randn(5, 3))
        Inputs(num_samples=5, output_shape=(2,), memory)
    """
    if isinstance(model, Linearization):
        if params is not None or output is not None or batch_dim != 0 or differentiable:
            raise UnsupportedOperationError(
                "this model is linearised already, and its parameters and output are chosen; pass the model "
                "itself to choose others"
            )
        return model
    if type(batch_dim) is not int or batch_dim < 0:  # anything but an axis, which needs no look
        require_batch_dim(batch_dim)
    with torch.inference_mode(False):
        if isinstance(params, Entries):
            return _of_entries(model, params, output, batch_dim, differentiable)
        if isinstance(model, nn.Module):
            return _of_module(uncompiled(model), params, output, batch_dim, differentiable)
        return _of_function(model, params, output, batch_dim, differentiable)


def _of_entries(
    model: Any, entries: Entries, output: OutputLike, batch_dim: BatchDim, differentiable: bool
) -> Linearization:
    """Linearise a module at all parameters that have an entry, and leave these entries free."""
    if not isinstance(model, nn.Module):
        raise ParameterSelectionError(
            "params=Entries(...) selects entries of a module's parameters; the parameters of a plain "
            "function are the dict that it is given: let the function put its entries into place"
        )
    model = uncompiled(model)
    require_supported(model)
    selected, index = entries.resolve(dict(model.named_parameters(remove_duplicate=False)))
    whole = _of_module(model, list(selected), output, batch_dim, differentiable)
    return whole.of_entries(list(index.values()))


def _of_module(
    model: nn.Module, params: Selector, output: OutputLike, batch_dim: BatchDim, differentiable: bool
) -> Linearization:
    """Look at a module, and copy what has to be copied."""
    require_supported(model)
    parameters: dict[str, Tensor] = dict(model.named_parameters())
    # A parameter that is registered as a buffer, too, is one tensor: it goes with the parameters.
    buffers = dict(model.named_buffers())
    own = {id(tensor) for tensor in parameters.values()}
    buffers = {name: tensor for name, tensor in buffers.items() if id(tensor) not in own}
    origins = {f"parameter {name!r}": tensor for name, tensor in parameters.items()}
    origins |= {f"buffer {name!r}": tensor for name, tensor in buffers.items()}
    require_tensors(origins.items())
    selected = select_parameters(dict(model.named_parameters(remove_duplicate=False)), params)
    require_selected(selected)
    coupled = not isinstance(batch_dim, int) and are_coupled(batch_dim)
    require_mode(model, coupled)
    frozen = {name: tensor for name, tensor in parameters.items() if name not in selected}
    require_finite({**frozen, **selected})
    originals = [*(parameters[name] for name in selected), *frozen.values(), *buffers.values()]
    call = ModuleCall(model, originals, coupled)
    kept, watches = _keep(frozen)
    others = [(label, tensor) for label, tensor in call.others if not tensor.is_inference()]
    linearization = Linearization(
        call,
        OutputSelector(output, call.root),
        _live(selected) if differentiable else _copies(selected),
        kept,
        _copies(buffers),
        batch_dim=batch_dim,
        differentiable=differentiable,
        watches=(*watches, *(Watch.of(f"attribute {label!r}", tensor) for label, tensor in others)),
        origins=origins,
    )
    if not others and (output is None or isinstance(output, (str, int))):
        choices = (tuple(selected), output, repr(batch_dim), differentiable)
        _recall(linearization, model, fingerprint(model), choices)
    return linearization


def _recall(linearization: Linearization, model: object, look: Hashable, choices: Hashable) -> None:
    """Take over what is known of a model from the last time, if nothing but its values has changed.

    A loop over checkpoints then tries a model once. What depends on data is checked on every batch all the
    same; what is taken on trust is that a forward pass without randomness and side effects still has none.
    """
    if look is None:
        return
    known = _KNOWN.setdefault(model, {})
    before = known.get((look, choices))
    if before is not None and not before[1].draws:  # random numbers without effect are looked at again
        verdict, facts = before
        linearization.verdict = verdict.copied()
        linearization.call.replicate, linearization.call.differentiates = (
            facts.replicate,
            facts.differentiates,
        )
    known.pop((look, choices), None)
    known[look, choices] = linearization.verdict, linearization.call.facts
    while len(known) > _CHOICES:
        known.pop(next(iter(known)))


Known = dict[Hashable, tuple[Verdict, CallFacts]]
# By module, or by the code of a function: closures that are made anew in every step are the same function.
_KNOWN: weakref.WeakKeyDictionary[object, Known] = weakref.WeakKeyDictionary()
_CHOICES = 8  # of parameters and outputs of one module that are remembered


def _of_function(
    model: Any, params: Any, output: OutputLike, batch_dim: BatchDim, differentiable: bool
) -> Linearization:
    """Look at a function and the dict of its parameters; equal tensors under two keys are one parameter."""
    if not callable(model) or isinstance(model, type):
        raise UnsupportedModelError(
            "the model is a "
            f"{type(model).__name__}{' and not an instance' if isinstance(model, type) else ''}; pass a "
            "torch.nn.Module or a function (params, inputs) -> output"
        )
    if isinstance(model, torch.export.ExportedProgram):
        raise UnsupportedModelError("the model is an ExportedProgram; pass its .module()")
    if isinstance(model, torch.jit.ScriptFunction):
        raise UnsupportedModelError(
            "the model is a TorchScript function; pass the Python function it was made from"
        )
    if not isinstance(params, Mapping) or not params:
        raise ParameterSelectionError(
            "the model is a plain function (params, inputs) -> output, which has no parameters of its own; "
            "pass params= a dict of tensors, as in dict(module.named_parameters())"
        )
    for name, value in params.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise ParameterSelectionError(
                f"params[{name!r}] is a {type(value).__name__}; the dict of a function's parameters maps "
                "strings to tensors (flatten nested dicts, and close over everything else)"
            )
    first: dict[int, str] = {}
    for name, value in params.items():
        first.setdefault(id(value), name)
    selected = {name: params[name] for name in first.values()}
    origins = {f"parameter {name!r}": tensor for name, tensor in selected.items()}
    require_tensors(origins.items())
    require_selected(selected)
    require_finite(selected)
    positions = {name: position for position, name in enumerate(selected)}
    linearization = Linearization(
        FunctionCall(model, [(name, positions[first[id(value)]]) for name, value in params.items()]),
        OutputSelector(output, None),
        _live(selected) if differentiable else _copies(selected),
        {},
        {},
        batch_dim=batch_dim,
        differentiable=differentiable,
        origins=origins,
    )
    if output is None or isinstance(output, (str, int)):
        kinds = tuple((key, positions[first[id(value)]]) for key, value in params.items())
        sizes = tuple((value.shape, value.dtype, value.device) for value in selected.values())
        choices = (kinds, sizes, output, repr(batch_dim), differentiable)
        _recall(linearization, getattr(model, "__code__", None), function_fingerprint(model), choices)
    return linearization


def _live(selected: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors themselves, to which derivatives flow."""
    for name, tensor in selected.items():
        if tensor.is_inference():
            raise UnsupportedModelError(
                f"parameter {name!r} was made in inference mode, so that no derivative can flow to it; make "
                "the model outside (or pass copy.deepcopy(model)), or leave out differentiable=True"
            )
    return selected


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return detached copies."""
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _keep(frozen: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[Watch, ...]]:
    """Copy unselected parameters if any of them may be trained, else hold them by reference."""
    if any(tensor.requires_grad for tensor in frozen.values()):
        return _copies(frozen), ()
    kept: dict[str, Tensor] = {}
    watches = []
    for name, tensor in frozen.items():
        kept[name], watch = hold(f"parameter {name!r}", tensor)
        if watch is not None:
            watches.append(watch)
    return kept, tuple(watches)
