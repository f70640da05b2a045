"""A model at fixed parameters, as a pure function of its selected parameters and its inputs."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from ..errors import DtypeError, OutputError, ShapeError, UnsupportedModelError
from .batch import Batch, BatchDim, are_coupled, cut
from .call import FunctionCall, ModuleCall, Reader
from .context import full_precision, one_at_a_time, safe_context
from .corrections import CORRECTED, Corrected
from .coupling import first_line, is_fault_of_model, require_own_rows
from .inputs import Inputs, read_inputs
from .lengths import real_rows, require_neutral_padding, sample_lengths
from .output import OutputSelector, require_state, sample_rows, samples_first
from .record import Recordings
from .stream import Stream
from .trial import MOST_TRIED, differing_rows, examine
from .verdict import StateFacts, Verdict
from .watch import Watch, require_fresh, tracked

__all__ = ["Linearization"]

_COMPUTED = ("shapes", "sizes", "num_parameters", "dtype", "device", "state_dim")  # and kept

_HEAD = 64  # samples among which the trial run finds differing ones, as many as it looks at in a batch
_COMPARED = 8  # samples of a batch whose outputs are computed again: the cost stays small beside the batch


@dataclass(frozen=True, eq=False)
class _Held:
    """Some parameters, or entries of them, that stay free while the others are held.

    Attributes:
        parent: The function of all of them.
        free: Numbers of the parameters that stay free.
        values: Values of all.
        index: For each free one the positions that are, or None for all.
    """

    parent: Linearization
    free: tuple[int, ...]
    values: tuple[Tensor, ...]
    index: tuple[Tensor | None, ...]

    def parts(self) -> tuple[Tensor, ...]:
        """Return the values of what is free."""
        free = (self.values[i] for i in self.free)
        return tuple(
            value if index is None else value.flatten()[index]
            for value, index in zip(free, self.index, strict=True)
        )

    def fill(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Return all parameters of the parent, given what is free."""
        # Out of place, so that derivatives reach `parts`.
        values = list(self.values)
        for position, index, part in zip(self.free, self.index, parts, strict=True):
            own = values[position]
            values[position] = (
                part if index is None else own.flatten().index_put((index,), part).view(own.shape)
            )
        return values

    def whole(self, parts: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return all parameters of the call, given what is free."""
        return self.parent.whole(self.fill(parts))

    def of(self, parent: Linearization) -> _Held:
        """Return the same of a parent of another dtype, or on another device."""
        # Parameters that were those of the parent stay so, and share its memory.
        same = all(a is b for a, b in zip(self.values, self.parent.parameters, strict=True))
        moved = tuple(tracked(value.to(device=parent.device, dtype=parent.dtype)) for value in self.values)
        index = tuple(None if i is None else i.to(parent.device) for i in self.index)
        return _Held(parent, self.free, parent.parameters if same else moved, index)


class Linearization:
    r"""A model at fixed parameters: the pure function whose Jacobian all operators are made of.

    .. math:: f(\theta, x) \in \mathbb{R}^{B \times O}, \qquad \theta = \text{the selected parameters}

    Immutable, picklable, and independent of the user's model, which is never run, swapped or changed.
    Made by `linearize`.

    Attributes:
        names: Canonical names of the selected parameters, in the model's order.
        parameters: Their values: detached copies, or the live tensors if ``differentiable``.
        batch_dim: The sample axis of inputs and output, or those of single inputs; None for coupled samples.
        differentiable: Whether parameters and inputs keep their autograd graph.
        is_recurrent: Whether the model has recurrent layers.
        verdict: What is known of the model.
    """

    def __init__(
        self,
        call: ModuleCall | FunctionCall,
        selector: OutputSelector,
        parameters: Mapping[str, Tensor],
        frozen: Mapping[str, Tensor],
        buffers: Mapping[str, Tensor],
        *,
        batch_dim: BatchDim,
        differentiable: bool,
        watches: tuple[Watch, ...] = (),
        origins: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.call = call
        self.selector = selector
        self.names = tuple(parameters)
        self.parameters = tuple(parameters.values())
        self.frozen_names = tuple(frozen)
        self.buffer_names = tuple(buffers)
        self.constants = (*frozen.values(), *buffers.values())
        self.batch_dim = batch_dim
        self.differentiable = differentiable
        self.verdict = Verdict()
        self._held: _Held | None = None
        self._watches = watches
        # Weak: to recognise the user's tensors in the trial run, without keeping them alive.
        self._origins = tuple((label, weakref.ref(tensor)) for label, tensor in (origins or {}).items())
        modules = list(call.root.modules()) if isinstance(call, ModuleCall) else []
        self.is_recurrent = any(isinstance(module, nn.RNNBase) for module in modules)
        # One call shows nothing of a forward pass that may branch, as code that is not torch's own may.
        self._has_corrected = not modules or any(
            isinstance(module, CORRECTED) or not type(module).__module__.startswith("torch.nn.")
            for module in modules
        )
        self._is_corrected = True  # until a call has shown that nothing needs correction
        self._fused_recurrent = any(isinstance(module, (nn.LSTM, nn.RNN)) for module in modules)

    # -- sizes

    @cached_property
    def state_dim(self) -> int | None:
        """The sample axis of the output; None where samples are coupled, so that all of it is one sample."""
        if isinstance(self.batch_dim, int):
            return self.batch_dim
        return None if are_coupled(self.batch_dim) else 0

    @cached_property
    def shapes(self) -> tuple[torch.Size, ...]:
        """Shapes of the selected parameters."""
        return tuple(tensor.shape for tensor in self.parameters)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of entries of the selected parameters."""
        return tuple(tensor.numel() for tensor in self.parameters)

    @cached_property
    def num_parameters(self) -> int:
        """Number P of selected entries."""
        return sum(self.sizes)

    @cached_property
    def dtype(self) -> torch.dtype:
        """Dtype of the selected parameters, and of all products."""
        return self.parameters[0].dtype

    @cached_property
    def device(self) -> torch.device:
        """Device of the selected parameters, and of all products."""
        return self.parameters[0].device

    @property
    def activation_bytes(self) -> int:
        """Bytes of what a forward pass over one sample computes, of the largest kind of sample."""
        return max((facts.activation_bytes for facts in self.verdict.states), default=1)

    @property
    def lowest_dtype(self) -> torch.dtype:
        """The coarsest floating dtype in which the model computes, as far as is known."""
        dtypes = [self.dtype, *(facts.lowest_dtype for facts in self.verdict.states)]
        return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)

    @property
    def convolves(self) -> bool:
        """Whether the model has convolutions."""
        return any(facts.convolves for facts in self.verdict.states)

    @property
    def is_complex(self) -> bool:
        """Whether the model computes with complex numbers."""
        return any(facts.is_complex for facts in self.verdict.states)

    def aliases(self) -> dict[str, tuple[str, ...]]:
        """Return all names of each selected parameter, its canonical one first: tied ones have several."""
        found: dict[str, list[str]] = {name: [name] for name in self.names}
        if isinstance(self.call, ModuleCall):
            # Tied parameters share their placeholder in the private copy.
            first: dict[int, str] = {}
            for name, parameter in self.call.root.named_parameters(remove_duplicate=False):
                own = first.setdefault(id(parameter), name)
                if own in found and name != own:
                    found[own].append(name)
        else:
            own_names = dict(reversed([(position, key) for key, position in self.call.keys]))
            for key, position in self.call.keys:
                if own_names[position] in found and key != own_names[position]:
                    found[own_names[position]].append(key)
        return {name: tuple(names) for name, names in found.items()}

    # -- what the trial run needs to know

    @property
    def output_name(self) -> str:
        """How messages call the state."""
        return "the output" if self.selector.output is None else f"the output {self.selector.output!r}"

    @property
    def frozen(self) -> dict[str, Tensor]:
        """The parameters that are not selected, by name."""
        return dict(zip(self.frozen_names, self.constants, strict=False))

    @property
    def buffers(self) -> dict[str, Tensor]:
        """The buffers, by name."""
        return dict(zip(self.buffer_names, self.constants[len(self.frozen_names) :], strict=True))

    def origins(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the user's tensors that are still alive, each with a label."""
        for label, reference in self._origins:
            tensor = reference()
            if tensor is not None:
                yield label, tensor

    def raw_state(
        self,
        params: Sequence[Tensor],
        batch: Batch,
        reader: Reader | None = None,
        constants: Sequence[Tensor] | None = None,
    ) -> Any:
        """Call the model once and return the selected state as it is, or what a reader returns."""
        # Parameters, then those that are not selected, then buffers: the order in which the call was made.
        values = (*params, *(self.constants if constants is None else constants))
        read = reader or self.selector.read
        if not self._is_corrected:
            return self.call.run(values, batch.inputs, read)
        with Corrected(recorded=self.differentiable) as corrections:
            state = self.call.run(values, batch.inputs, read)
        self._is_corrected = corrections.needed or self._has_corrected or self.differentiable
        return state

    # -- the function

    def function(self, params: Sequence[Tensor], batch: Batch) -> Tensor:
        """Evaluate the model, purely in parameters and batch.

        It works under every torch.func transform and under plain autograd, in any gradient mode. Hold
        `safe_context` around it and around the backward pass.

        Args:
            params: One tensor for each of ``names``, of its shape.
            batch: From `Inputs.batches`, possibly with replaced tensors.

        Returns:
            ``(B, O)``, samples first and the output of each flattened, in the dtype of ``params``.

        Raises:
            ShapeError: If the number of parameters is wrong.
            OutputError: If this batch gives another number of samples or outputs than the first.
            UnsupportedModelError: If the model itself fails on this batch.
        """
        if len(params) != len(self.names):
            raise ShapeError(f"{len(params)} parameter tensors given, {len(self.names)} are selected")
        whole = self.whole(params)
        try:
            state = self.raw_state(whole, batch)
        except Exception as error:
            self._require_call(batch, error)
            raise
        axis = self.state_dim
        if not isinstance(state, Tensor) or (axis is not None and state.dim() <= axis):
            raise OutputError(
                f"{self.output_name} has no sample axis on this batch, though it has on the first"
            )
        rows = self.rows_of(state, batch, params[0].dtype)
        expected = (batch.num_samples, rows.shape[1] if batch.num_outputs is None else batch.num_outputs)
        if tuple(rows.shape) != expected:
            raise OutputError(
                f"{self.output_name} has shape {tuple(state.shape)} on a batch of {batch.num_samples} "
                f"samples, where {expected[1]} outputs per sample are due as on the first batch; pad all "
                "batches to one length"
            )
        return rows

    def rows_of(self, state: Tensor, batch: Batch, dtype: torch.dtype) -> Tensor:
        """Return a state as ``(B, O)``, that of real positions where samples differ in length."""
        rows = sample_rows(state, self.state_dim, dtype)
        return rows if batch.inner is None else real_rows(rows, batch)

    def whole(self, params: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return all parameters of the call, given those that are free."""
        return params if self._held is None else self._held.whole(params)

    def restricted(self, free: Sequence[int], params: Sequence[Tensor]) -> Linearization:
        """Return the same function of the parameters of some numbers, the others held where they are."""
        return self._holding(_Held(self, tuple(free), tuple(params), (None,) * len(free)))

    def of_entries(self, index: Sequence[Tensor]) -> Linearization:
        """Return the same function of the entries at ``index`` of each flattened parameter alone."""
        every = tuple(range(len(self.names)))
        return self._holding(_Held(self, every, self.parameters, tuple(index)))

    def _holding(self, held: _Held) -> Linearization:
        """Return a copy of which some parameters are free; what is known of all of them by number is not."""
        part = copy.copy(self)
        for name in _COMPUTED:
            vars(part).pop(name, None)
        part.names = tuple(self.names[i] for i in held.free)
        part.parameters = held.parts()
        part._held = held
        part.verdict = self.verdict.restricted()
        return part

    def require_independent(
        self,
        inputs: Inputs,
        start: int,
        params: Sequence[Tensor],
        batch: Batch,
        rows: Tensor | None = None,
        alone: bool = False,
    ) -> None:
        """Raise if some random samples of a batch, at most half of it, have other outputs among themselves.

        Samples that are coupled, and that the trial did not see, would make a kernel depend on how it is cut
        into batches. Each batch is looked at once; ``start`` is its first sample in the view, and ``rows``
        its output, for which a forward pass is made where it is not known. ``alone`` compares every sample by
        itself, where there is a reason to.

        Raises:
            CoupledSamplesError: Naming the sample.
        """
        count = batch.num_samples
        if self.state_dim is None:  # coupled by consent
            return
        # With held parameters the function is that of all of them, whose outputs are looked at once for all
        # parts.
        base, whole = self, params
        while (held := base._held) is not None:
            base, whole = held.parent, held.fill(whole)
        if alone:
            for chosen in torch.arange(count).split(1):
                require_own_rows(base, start, whole, batch, rows, chosen)
            return
        seen = self.seen(inputs, start, start + count, "independent", 1, params)
        if count == 1 or (seen is not None and bool(seen.all())):
            return
        # Random ones, since models that sort or pack may leave regular choices alone; the same in every
        # process.
        generator = torch.Generator().manual_seed(start + count)
        some = torch.randperm(count, generator=generator)[: min(count // 2, _COMPARED)].sort().values
        require_own_rows(base, start, whole, batch, rows, some)
        if seen is not None:
            seen.fill_(True)

    def seen(
        self, inputs: Inputs, start: int, stop: int, key: Hashable, size: int, params: Sequence[Tensor]
    ) -> Tensor | None:
        """Return which directions of some samples have been looked at, see `Verdict.seen`.

        None with parameters other than those of the snapshot, of which nothing is known.
        """
        if not all(a is b for a, b in zip(params, self.parameters, strict=True)):
            return None
        versions = [p._version for p in self.parameters]
        return self.verdict.seen(inputs, start, stop, key, size, versions)

    def _require_call(self, batch: Batch, error: Exception) -> None:
        """Raise if it is the model itself that fails on a batch, whoever differentiates it."""
        # Within a transform an error may be torch's: the call is made again, outside of all of them.
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor
        if not is_fault_of_model(error) or any(map(wrapped, batch.tensors)):
            return
        try:
            with temporarily_clear_interpreter_stack(), torch.no_grad():
                self.raw_state([p.detach() for p in self.whole(self.parameters)], batch)
        except Exception as again:
            if type(again) is type(error):
                raise UnsupportedModelError(
                    f"the model fails on a batch of {batch.num_samples} samples ({type(again).__name__}: "
                    f"{first_line(again)}), though it worked on the first few; let its shapes follow the "
                    "batch and its inputs be in their range, or pass batch_size= a number of samples that it "
                    "takes"
                ) from error

    def inputs(self, x: Any) -> Inputs:
        """Take inputs, look at them, and try the model on a few samples.

        The trial takes two forward passes on at most four samples, more where they do not decide, and none
        for inputs of a kind that was tried; a re-iterable of batches is read once in full. Nothing is copied:
        tensors are held by reference.

        Args:
            x: A tensor, a tuple (positional inputs), a mapping (keyword inputs), or a re-iterable of
                batches of these, such as a DataLoader. Every tensor in it carries the samples where
                ``batch_dim`` says; other leaves and tensors without axes go to the model as they are.

        Returns:
            A view of the N samples.

        Raises:
            InputError: Empty, ragged, one-shot or unknown inputs.
            NonDeterministicDataError: Two passes over a re-iterable differ.
            NonFiniteError: NaN or infinity in a sample.
            DtypeError: A floating dtype that the model does not have.
            DeviceError: Another device than the model's.
            OutputError: No floating output with one row per sample.
            CoupledSamplesError: The output of a sample depends on other samples.
            StochasticModelError: Two passes of the model differ.
            ModelMutationError: The forward pass writes to parameters, buffers or inputs.
            UnsupportedModelError: The forward pass uses tensors of the original model directly.
        """
        if isinstance(x, Inputs):
            return x
        if self._held is not None:  # the trial is of all parameters
            known = self._held.parent.inputs(x)
            known.hand_over_recordings()
            self.verdict.states = self._held.parent.verdict.states
            return known
        with torch.inference_mode(False):
            source, watches = read_inputs(
                x, self.batch_dim, self._dtypes(), self.device, live=self.differentiable
            )
            head = next(source.batches(_HEAD)) if isinstance(source, Stream) else source
            facts, shape, recordings = self._tried(head)
            lengths = None
            if isinstance(source, Stream):
                source, shape, lengths = self._measured(source)
            else:
                source = Batch(source.tensors, source.layout, shape.numel())
        return Inputs(
            source,
            shape,
            lengths=lengths,
            watches=(*watches, *facts.watches),
            live=self.differentiable,
            recordings=recordings,
        )

    def _measured(self, stream: Stream) -> tuple[Stream, torch.Size, Tensor | None]:
        """Return batches that know their outputs, the shape of one sample's, and the lengths of all."""
        found = {
            kind: self.output_shape(example.map(lambda tensor: tensor.to(self.device)))
            for kind, example in stream.examples.items()
        }
        shapes = [found[kind] for kind in stream.kinds]
        unlike = sample_lengths(stream, shapes)
        lengths, shape = (None, shapes[0]) if unlike is None else unlike
        inner = None if lengths is None else shape[1:].numel()
        stream = stream.expecting(shape.numel(), inner)
        require_neutral_padding(self, stream, shapes)
        return stream, shape, lengths

    def output_shape(self, batch: Batch) -> torch.Size:
        """Return the shape of the output of one of these samples; one forward pass where it is not known."""
        return self._tried(batch)[1]

    def _tried(self, head: Batch) -> tuple[StateFacts, torch.Size, Recordings | None]:
        """Return what is known of inputs like these, the output's shape, and the passes made to know it."""
        facts = self.verdict.facts(head)
        # Tried on fewer differing samples than these have: equal ones show neither their axis nor coupling.
        if facts is None or facts.tried < MOST_TRIED and facts.tried < len(differing_rows(head)):
            facts, recordings = examine(self, head, differing_rows(head))
            self.verdict.learn(facts)
            return facts, next(iter(facts.output_shapes.values())), recordings
        one = cut(head, 0, 1)
        shapes = tuple(tensor.shape for tensor in one.tensors)
        if shapes not in facts.output_shapes:
            try:
                with torch.no_grad(), self.safe_context():
                    values = tuple(p.detach() for p in self.parameters)
                    state = self.raw_state(values, one.map(lambda t: t.detach().clone()))
                state = require_state(state, 1, self.state_dim, self.output_name)
            except Exception:  # the trial says what it is
                found, recordings = examine(self, head, differing_rows(head))
                facts.output_shapes.update(found.output_shapes)
                return facts, facts.output_shapes[shapes], recordings
            facts.output_shapes[shapes] = samples_first(state, self.state_dim).shape[1:]
        return facts, facts.output_shapes[shapes], None

    def _dtypes(self) -> list[torch.dtype]:
        """Return the floating dtypes of the model, that of the selected parameters first."""
        tensors = itertools.chain(self.parameters, self.frozen.values())
        return list(dict.fromkeys(t.dtype for t in tensors if t.is_floating_point()))

    # -- the snapshot

    def check_fresh(self) -> None:
        """Raise `StaleOperatorError` if a tensor held by reference was changed in place."""
        require_fresh(self._watches, "parameters")

    def safe_context(self) -> AbstractContextManager[None]:
        """Return the context to hold around every product, forward and backward; one thread at a time."""
        low = self.dtype != torch.float64
        return one_at_a_time(
            safe_context(
                self.device,
                math_attention=True,  # which jvp and double backward need
                no_mkldnn=self._fused_recurrent and low and self.device.type == "cpu",
                no_cudnn=self.is_recurrent,
            )
        )

    def full_precision(self) -> AbstractContextManager[None]:
        """Return the context to hold around products of what the model gave; one thread at a time."""
        return one_at_a_time(full_precision(self.device))

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Linearization:
        """Return the same model with floating tensors cast to ``dtype``, all of them on ``device``.

        Parameters and buffers are cast; integers stay integers. No check is repeated.

        Raises:
            DtypeError: If ``dtype`` is not a floating dtype.
        """
        if dtype is not None and not dtype.is_floating_point:
            raise DtypeError(f"cannot cast a model to {dtype}; pass a floating dtype")

        if self._held is not None:
            parent = self._held.parent.to(dtype, device)
            return self if parent is self._held.parent else parent._holding(self._held.of(parent))

        def change(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {
                name: tracked(tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None))
                for name, tensor in tensors.items()
            }

        parameters, frozen = change(dict(zip(self.names, self.parameters, strict=True))), change(self.frozen)
        buffers = change(self.buffers)
        kept = {id(tensor) for tensor in (*parameters.values(), *frozen.values(), *buffers.values())}
        if kept == {id(tensor) for tensor in (*self.parameters, *self.constants)}:
            return self
        others = {id(tensor) for _, tensor in self.call.others}
        moved = Linearization(
            self.call,
            self.selector,
            parameters,
            frozen,
            buffers,
            batch_dim=self.batch_dim,
            differentiable=self.differentiable,
            watches=tuple(watch for watch in self._watches if id(watch.tensor) in kept | others),
            origins=dict(self.origins()),
        )
        moved.verdict.coverage = self.verdict.coverage
        return moved

    def __getstate__(self) -> dict[str, Any]:
        """Leave out references to the user's tensors, and versions: they are this process's."""
        kept = {name: value for name, value in vars(self).items() if name not in _COMPUTED}
        return dict(kept, _origins=(), _watches=tuple((w.label, w.tensor) for w in self._watches))

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Watch the new tensors as the old ones were."""
        state["parameters"] = tuple(map(tracked, state["parameters"]))
        state["constants"] = tuple(map(tracked, state["constants"]))
        state["_watches"] = tuple(Watch.of(label, tensor) for label, tensor in state["_watches"])
        vars(self).update(state)

    def __copy__(self) -> Linearization:
        """Return another one with the same tensors, and what is known of the model."""
        other = Linearization.__new__(type(self))
        vars(other).update(vars(self))
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Linearization:
        """Return itself: nothing in it is ever changed."""
        return self

    def __repr__(self) -> str:
        """Show the number of parameters, dtype and device."""
        return (
            f"Linearization({len(self.names)} parameter tensors, P={self.num_parameters}, "
            f"{str(self.dtype).removeprefix('torch.')}, {self.device})"
        )
