"""The trial of values: a few samples through the private copy, before anything is built on it.

It looks for what no inspection of modules can see: hidden randomness, writes in place, coupled samples,
uses of the original model, and modules that are called again in the backward pass. Two passes are enough
for nearly every model: one over a few samples, and one over some of them in another order. Both are
recorded, so that layer rules are tried on the graphs that are there already. Whatever is out of the
ordinary in them is no verdict: then a search follows, pass by pass, which names the culprit or finds that
there is none.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from ..errors import (
    CoupledSamplesError,
    InputError,
    ModelMutationError,
    NonFiniteError,
    NtkopsError,
    NtkopsWarning,
    StochasticModelError,
    UnsupportedModelError,
)
from ..shortage import is_out_of_memory
from .batch import Batch, take
from .capture import Guard, first_random_module, foreign_use, graph_leaves, storage_key
from .context import untouched_randomness
from .coupling import SampleAxis, first_line, is_fault_of_model
from .output import require_state, sample_rows, samples_first
from .record import Recorder, Recording, Recordings
from .verdict import StateFacts
from .watch import Watch, same_bits

if TYPE_CHECKING:
    from .pure import PureFunction

__all__ = ["MOST_TRIED", "differing_rows", "examine"]

MOST_TRIED = 4  # samples of the trial run
_SEARCHED = 64  # samples among which differing ones are looked for
_REPEATS = 4  # further passes when random numbers were drawn
_COPIED = 1 << 28  # bytes of parameters up to which a pass is given copies of them
# Which samples the second pass takes: another number of them, turned round.
_ORDERS = {1: (0,), 2: (1, 0, 1), 3: (2, 0), 4: (3, 0)}  # one: coupled samples
_OTHER_ORDER = {count: torch.tensor(order) for count, order in _ORDERS.items()}


def examine(linearization: PureFunction, batch: Batch, rows: Tensor) -> tuple[StateFacts, Recordings | None]:
    """Return what a few samples show of a model, and the two recorded passes if they were enough.

    ``rows``, ``(m,)``, are the samples that are tried, from `differing_rows`. Cost: two forward passes over
    at most four samples; some ten, and a backward pass, where they were not.

    Raises:
        OutputError: If the state is not a floating tensor with one row per sample.
        NonFiniteError: If it is NaN.
        ModelMutationError: If the forward pass writes to parameters, buffers or inputs.
        StochasticModelError: If two passes differ.
        UnsupportedModelError: If the original model is used behind our back, reentrant checkpointing, or a
            model for one number of samples only.
        CoupledSamplesError: If a sample's output depends on other samples, or on its place among them.
    """
    sample = take(batch, rows).map(Tensor.detach)
    with untouched_randomness(linearization.device) as moved, linearization.safe_context():
        trial = _Trial(linearization, sample, rows, batch)
        recordings = trial.two_passes()
        # Random numbers were drawn: whether to an effect, further passes tell.
        if recordings is None or moved():
            recordings = None
            trial.search()
    shape = trial.output_shape
    shapes = {tuple(tensor.shape for tensor in take(sample, torch.tensor([0])).tensors): shape}
    facts = StateFacts(sample, len(rows), shapes, trial.watches, *trial.seen)
    return facts, recordings


def differing_rows(batch: Batch) -> Tensor:
    """Return up to four positions of samples no two of which agree, in order; the first if all agree."""
    count = batch.num_samples
    # Spread over the samples: what is put first is often innocent, sorted or of full length.
    places = [0, count - 1, count // 3, 2 * count // 3, *range(min(count, _SEARCHED))]
    chosen: list[int] = []
    columns = [tensor.detach().movedim(axis, 0) for tensor, axis in batch.placed if axis is not None]
    for row in dict.fromkeys(places):
        if not any(all(torch.equal(column[row], column[other]) for column in columns) for other in chosen):
            chosen.append(row)
        if len(chosen) == MOST_TRIED:
            break
    return torch.tensor(sorted(chosen))


class _Unusual(Exception):
    """Something that two passes do not decide."""


class _Trial:
    """One model on one small batch."""

    def __init__(self, linearization: PureFunction, sample: Batch, rows: Tensor, whole: Batch) -> None:
        self.lin = linearization
        self.sample, self.whole = sample, whole
        self.rows = rows
        self._read: set[str] = set()
        self.axis = linearization.state_dim
        # Live parameters stay out of the trial, so that a use of the user's own tensors shows.
        self.params = tuple(
            p.detach().clone() if linearization.differentiable else p for p in linearization.parameters
        )
        self.samples = SampleAxis(linearization, sample, self.params, self.state)
        self.watches: tuple[Watch, ...] = ()
        self.seen = 1, linearization.dtype, False, False  # what a guard has seen, see `StateFacts`
        self.output_shape = torch.Size()

    # -- two passes

    def two_passes(self) -> Recordings | None:
        """Try the model on the samples, and on some of them in another order; None for no verdict."""
        try:
            first, state = self._first_pass()
            second = self._second_pass(state.detach())
        except ModelMutationError:
            raise  # another call would find what this one has left behind
        except Exception:
            return None  # the search runs into it again, and says what it is
        finally:
            self._read.clear()
        return first, second

    def _first_pass(self) -> tuple[Recording, Tensor]:
        """Record a pass over all samples, every write to what it is given refused."""
        held = self._held()
        guard, recorder = Guard(held, self._foreign(held)), Recorder(self.params)
        # As products see them: with graphs, which reentrant checkpointing needs to be seen.
        batch = self._several().map(lambda t: t.clone().requires_grad_() if t.is_floating_point() else t)
        guard.hold(zip(batch.layout.labels, batch.tensors, strict=True))
        before = [tensor.clone() for tensor in (*self.lin.buffers.values(), *batch.tensors)]
        with torch.enable_grad():
            with recorder:
                state, reassigned = self._run_under(guard, batch, recorder.leaves)
            state = require_state(state, batch.num_samples, self.axis, self.lin.output_name)
            recording = recorder.recording(sample_rows(state, self.axis, self.params[0].dtype))
        after = (*self.lin.buffers.values(), *batch.tensors)
        moved = [new for old, new in zip(before, after, strict=True) if not same_bits(old, new)]
        for old, new in zip(before, after, strict=True):
            if any(new is other for other in moved):  # by a write that torch does not see
                new.detach().copy_(old)
        if reassigned or moved or recorder.runs_again or bool(state.isnan().any()):
            raise _Unusual
        self.lin.call.differentiates |= recorder.differentiates
        self.watches = self._outside(state, recorder.leaves, batch)
        self.seen = guard.seen(batch.num_samples)
        self.output_shape = samples_first(state, self.axis).shape[1:]
        return recording, state

    def _several(self) -> Batch:
        """Return the samples, one of them twice: alone it does not show where samples lie."""
        if self.axis is None or self.sample.num_samples > 1:
            return self.sample
        return take(self.sample, torch.tensor([0, 0]))

    def _copied(self) -> tuple[Tensor, ...]:
        """Return the parameters in memory of their own, as far as they are small."""
        # A view of a parameter that an earlier pass has kept shares its memory, and not that of a copy.
        is_small = sum(p.nbytes for p in self.params) <= _COPIED
        return tuple(p.clone() for p in self.params) if is_small else self.params

    def _outside(self, state: Tensor, leaves: Sequence[Tensor], batch: Batch) -> tuple[Watch, ...]:
        """Return watches of the tensors outside the model that a state depends on."""
        found, nodes = graph_leaves(state)
        of_parameters = {storage_key(leaf) for leaf in leaves}
        own = of_parameters | {storage_key(tensor) for tensor in batch.tensors}
        outside = [leaf for leaf in found if storage_key(leaf) not in own]
        foreign = {id(tensor) for _, tensor in self.lin.origins()}
        # No gradient reaches a parameter; or a block runs again in a way that only backward() knows.
        is_empty = not any(storage_key(leaf) in of_parameters for leaf in found)
        if is_empty or any("CheckpointFunctionBackward" in name for name in nodes):
            raise _Unusual
        if any(id(leaf) in foreign for leaf in outside):
            raise _Unusual
        return tuple(
            Watch.of("a tensor outside the model", leaf) for leaf in outside if not leaf.is_inference()
        )

    def _second_pass(self, state: Tensor) -> Recording:
        """Record a pass over other samples of the same, and compare their outputs."""
        several = self._several()
        order = _OTHER_ORDER[several.num_samples]
        params = self._copied()
        guard, recorder = Guard(self._held(params), {}), Recorder(params)
        with guard, torch.enable_grad():
            batch = take(several, order)
            guard.hold(zip(batch.layout.labels, batch.tensors, strict=True))
            with recorder:
                other = self.lin.raw_state(recorder.leaves, batch)
            other = require_state(other, batch.num_samples, self.axis, self.lin.output_name)
            recording = recorder.recording(
                sample_rows(other, self.axis, self.params[0].dtype)
            ).without_graph()
        # Outputs of the first pass, at the samples of the second: a sample has one output, wherever it
        # stands.
        expected = state if self.axis is None else state.index_select(self.axis, order.to(state.device))
        self._require_read(guard.read)
        if not self.samples.close(expected, other.detach()):
            raise _Unusual
        return recording.without_graph()

    # -- the search

    def search(self) -> None:
        """Look for what is wrong, one thing after the other."""
        self._read.clear()
        with torch.no_grad():
            state = self.first_state()
            self.require_numbers(state)
            self.require_repeatable(state)
        self.watches = self.require_derivative()
        with torch.no_grad():
            try:
                if self.axis is not None:
                    self.samples.require_independent(state)
                    self.samples.require_any_order(state)
            except CoupledSamplesError as error:
                if self.lin.call.draws:  # passes differ by what was drawn, and not by the samples
                    raise self._stochastic() from error
                raise
        self.output_shape = samples_first(state, self.axis).shape[1:]

    def state(self, batch: Batch, params: Sequence[Tensor] | None = None) -> Tensor:
        """Run one pass, with a graph only for the parameters given."""
        state = self.lin.raw_state(self.params if params is None else params, batch)
        state = require_state(state, batch.num_samples, self.axis, self.lin.output_name)
        return state.detach() if params is None else state

    # -- writes

    def first_state(self) -> Tensor:
        """Run the first pass; a model that differentiates inside needs gradient mode for it."""
        try:
            return self.guarded()
        except NtkopsError:
            raise
        except Exception as error:
            self.lin.call.differentiates = True
            try:
                return self.guarded().detach()
            except NtkopsError:
                raise
            except Exception:
                self.lin.call.differentiates = False
            if is_fault_of_model(error):
                self._refuse_number(error)
            if isinstance(error, (RuntimeError, IndexError)) and not is_out_of_memory(error):
                self._refuse_call(error)
            error.add_note(self._call_note())
            raise

    def _refuse_number(self, error: Exception) -> None:
        """Raise if it is the number of samples that the model does not take."""
        whole = self.whole.map(Tensor.detach)
        try:
            if whole.num_samples == self.sample.num_samples:
                return
            self.lin.raw_state(self.params, whole)
        except Exception:
            return
        raise UnsupportedModelError(
            f"the model works on {whole.num_samples} samples and not on {self.sample.num_samples} of them "
            f"({type(error).__name__}: {first_line(error)}), so that samples cannot be taken apart. If rows "
            "are the nodes of one graph they are coupled: pass batch_dim=None. If an input has time first, "
            "transpose it, or say so in batch_dim={...}; None there is what all samples share. Else let "
            "shapes follow the batch (of an exported module: dynamic_shapes= with a Dim for the samples)"
        ) from error

    def _refuse_call(self, error: Exception) -> NoReturn:
        """Say what the model was given, where torch's own words are about matrices inside of it."""
        shapes = ", ".join(
            f"{label} of shape {tuple(tensor.shape)}, {str(tensor.dtype).removeprefix('torch.')}"
            for label, tensor in zip(self.sample.layout.labels, self.sample.tensors, strict=True)
        )
        refusal = InputError(
            f"the model cannot be called with these samples ({shapes}, on the first few of them): "
            f"{type(error).__name__}: {first_line(error)}; pass samples of the shape, dtype and values that "
            "its first layer takes"
        )
        refusal.add_note(self._call_note())
        raise refusal from error

    def guarded(self) -> Tensor:
        """Run the forward pass with every write to what it is given refused before it happens."""
        held = self._held()
        guard = Guard(held, self._foreign(held))
        # Writes that bypass torch (through NumPy, say) show afterwards only.
        small = [(f"buffer {name!r}", tensor) for name, tensor in self.lin.buffers.items()]
        small += zip(self.sample.layout.labels, self.sample.tensors, strict=True)
        before = [tensor.clone() for _, tensor in small]
        state, reassigned = self._run_under(guard, self.sample, self.params)
        self.seen = guard.seen(self.sample.num_samples)
        if reassigned:
            raise ModelMutationError(
                f"the forward pass assigns new tensors to {', '.join(map(repr, reassigned))}, so that two "
                "products would see different models; call model.eval(), or keep that state outside the "
                "forward pass"
            )
        for (label, tensor), old in zip(small, before, strict=True):
            if not same_bits(old, tensor):
                tensor.copy_(old)
                raise ModelMutationError(
                    f"the forward pass changes {label} in place; call model.eval(), or write that step out "
                    "of place"
                )
        return require_state(state, self.sample.num_samples, self.axis, self.lin.output_name)

    def _run_under(self, guard: Guard, batch: Batch, params: Sequence[Tensor]) -> tuple[Any, list[str]]:
        """Return the raw state, and the slots that were given other tensors."""
        tensors = (*params, *self.lin.constants)
        reassigned: list[str] = []

        def read(root: Any, forward: Any) -> Any:
            state = self.lin.selector.read(root, forward)
            reassigned.extend(self.lin.call.reassigned(root, tensors))
            return state

        try:
            with guard:
                state = self.lin.raw_state(params, batch, read)
        except NtkopsError:
            raise
        except Exception:
            if guard.refusal is not None:
                raise guard.refusal from None
            raise
        if guard.refusal is not None:
            raise guard.refusal
        self._read |= guard.read
        return state, reassigned

    def _held(self, params: Sequence[Tensor] | None = None) -> dict[int, str]:
        """Return what a pass is given, by the address of its storage, each with a label."""
        lin = self.lin
        tensors = (*(self.params if params is None else params), *lin.constants)
        labels = [f"parameter {name!r}" for name in (*lin.names, *lin.frozen_names)]
        labels += [f"buffer {name!r}" for name in lin.buffer_names]
        named = [*zip(labels, tensors, strict=True), *lin.call.others]
        named += zip(self.sample.layout.labels, self.sample.tensors, strict=True)
        return {key: label for label, tensor in named if (key := storage_key(tensor)) is not None}

    def _foreign(self, held: dict[int, str]) -> dict[int, str]:
        """Return the tensors of the user's model that a pass is not given, likewise."""
        foreign = {}
        for label, tensor in self.lin.origins():
            key = storage_key(tensor)
            if key is not None and key not in held:
                foreign[key] = label
        return foreign

    def _call_note(self) -> str:
        """Say how the model was called."""
        inputs = self.sample.inputs
        if isinstance(inputs, dict):
            how = f"with the keywords {', '.join(map(str, inputs))}"
        else:
            how = f"with {len(inputs) if isinstance(inputs, tuple) else 1} positional input(s)"
        return (
            f"ntkops called the model {how}. A tuple is passed on as positional inputs and a dict as "
            "keywords; if the data also hold labels, leave them out."
        )

    def require_numbers(self, state: Tensor) -> None:
        """Raise if the output is not a number; infinities may be masked scores."""
        if bool(state.isnan().any()):
            rows = samples_first(state.isnan(), self.axis).flatten(1)
            first = int(rows.any(0 if self.axis is None else 1).nonzero()[0])
            row = first // math.prod(state.shape[1:]) if self.axis is None else int(self.rows[first])
            raise NonFiniteError(
                f"{self.lin.output_name} is NaN for input row {row} although parameters and inputs are "
                "finite; look for a division by zero, or a logarithm or root of a negative number, in the "
                "model"
            )

    # -- randomness

    def require_repeatable(self, state: Tensor) -> None:
        """Raise if further passes differ from the first one, or no longer read what it read."""
        params = self._copied()
        guard = Guard(self._held(params), {})
        with untouched_randomness(self.lin.device) as moved, guard:
            again = [self.state(self.sample, params).detach()]
            draws = moved()
        if draws:
            again += [self.state(self.sample) for _ in range(_REPEATS)]  # each with numbers of its own
            self.lin.call.draws = True  # from now on, calls leave the global state as they find it
        else:
            self._require_read(guard.read)
        if all(self.samples.close(state, other) for other in again):
            return
        raise self._stochastic()

    def _stochastic(self) -> StochasticModelError:
        """Return the error for passes that differ."""
        return StochasticModelError(
            f"two passes over the same samples differ{self._random_module()}: the forward pass draws random "
            "numbers (functional dropout, drop path, sampling) or keeps a state; call model.eval(), and "
            "give F.dropout training=self.training"
        )

    def _require_read(self, read: set[str]) -> None:
        """Raise if a parameter or sample is read by the first pass alone."""
        needed = {f"parameter {name!r}" for name in self.lin.names} | set(self.sample.layout.labels)
        lost = sorted((self._read - read) & needed)
        if lost:
            raise ModelMutationError(
                f"the forward pass reads {', '.join(lost[:3])} in its first call only, and keeps something "
                "made of it for the next ones, so that the derivative would be lost; switch that cache off, "
                "or empty it where forward begins"
            )

    def _random_module(self) -> str:
        """Name the first module that is random, in a pass more; nothing for a function."""
        path: list[str | None] = []

        def search(root: Any, forward: Any) -> None:
            path.append(first_random_module(root, forward) if root is not None else None)

        self.lin.call.run((*self.params, *self.lin.constants), self.sample.inputs, search)
        return f" (first at module {path[0]!r})" if path[0] else ""

    # -- derivatives

    def require_derivative(self) -> tuple[Watch, ...]:
        """Look at the autograd graph of one pass."""
        leaves = tuple(p.detach().requires_grad_() for p in self.params)
        batch = self.sample.map(lambda t: t.clone().requires_grad_() if t.is_floating_point() else t)
        state = self._differentiable_state(batch, leaves)
        found, nodes = graph_leaves(state)
        if any("CheckpointFunctionBackward" in name for name in nodes):
            raise UnsupportedModelError(
                "the forward pass uses reentrant activation checkpointing, through which only backward() "
                "works; pass use_reentrant=False to torch.utils.checkpoint.checkpoint, or switch "
                "checkpointing off"
            )
        given = {id(tensor) for tensor in (*leaves, *batch.tensors)}
        outside = [leaf for leaf in found if id(leaf) not in given]
        labels = {id(tensor): label for label, tensor in self.lin.origins()}
        for leaf in outside:
            if id(leaf) in labels:
                raise foreign_use(labels[id(leaf)])
        reached = {id(leaf) for leaf in found}
        if not any(id(leaf) in reached for leaf in leaves):
            warnings.warn(
                f"{self.lin.output_name} does not depend on the selected parameters "
                f"({', '.join(self.lin.names[:3])}{', ...' if len(self.lin.names) > 3 else ''}): the kernel "
                "is zero; look for torch.no_grad() or .detach() in the model, or select others",
                NtkopsWarning,
                stacklevel=4,
            )
        return tuple(
            Watch.of("a tensor outside the model", leaf) for leaf in outside if not leaf.is_inference()
        )

    def _differentiable_state(self, batch: Batch, leaves: Sequence[Tensor]) -> Tensor:
        """Run one pass with a graph, and find out whether its backward pass calls modules again."""
        call = self.lin.call
        with torch.enable_grad():
            state = self.state(batch, leaves)
            if call.replicate or self._backward_works(state, leaves):
                return state
            call.replicate = True
            retried = self.state(batch, leaves)
            if not self._backward_works(retried, leaves):
                call.replicate = False  # not the cause: what works is found when it is differentiated
            return self.state(batch, leaves)

    def _backward_works(self, state: Tensor, leaves: Sequence[Tensor]) -> bool:
        """Whether a backward pass finds the tensors that it needs, and not placeholders."""
        if not state.requires_grad:
            return True
        try:
            gradients = torch.autograd.grad(state.sum(), leaves, retain_graph=True, allow_unused=True)
        except Exception:
            return False
        return not any(gradient is not None and gradient.is_meta for gradient in gradients)
