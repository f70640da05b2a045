"""The trial run: a few samples through the private copy, before anything is built on it.

It looks for what no inspection of modules can see: hidden randomness, writes in place, coupled
samples, uses of the original model, and modules that are called again in the backward pass.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from ..errors import (
    InputError,
    ModelMutationError,
    NonFiniteError,
    NtkopsError,
    NtkopsWarning,
    StochasticModelError,
    UnsupportedModelError,
)
from .batch import Batch, take
from .capture import Guard, first_random_module, foreign_use, graph_leaves, storage_key
from .context import disturb_randomness, random_state_moved, untouched_randomness
from .coupling import SampleAxis, first_line
from .output import require_state
from .watch import Watch, same_bits

if TYPE_CHECKING:
    from .linearization import Linearization

__all__ = ["examine"]

_PROBED = 4  # samples of the trial run
_SEARCHED = 64  # samples among which differing ones are looked for
_REPEATS = 4  # further passes when random numbers were drawn
_COPIED = 1 << 28  # bytes of parameters up to which a pass is given copies of them


def examine(linearization: Linearization, head: Batch) -> tuple[torch.Size, tuple[Watch, ...]]:
    """Run a model on a few samples and raise if products with it could be wrong.

    Args:
        linearization: The model.
        head: Its first samples.

    Returns:
        The output's shape per sample, and watches of tensors outside the model that the output depends on.

    Raises:
        OutputError: If the state is not a floating tensor with one row per sample.
        NonFiniteError: If it is NaN.
        ModelMutationError: If the forward pass writes to parameters, buffers or inputs.
        StochasticModelError: If two passes differ.
        UnsupportedModelError: If the original model is used behind our back, reentrant checkpointing, or a
            model for one number of samples only.
        CoupledSamplesError: If a sample's output depends on other samples, or on its place among them.
    """
    rows = _differing_rows(head)
    sample = take(head, rows).map(Tensor.detach)
    with untouched_randomness(linearization.device), linearization.safe_context():
        trial = _Trial(linearization, sample, rows)
        with torch.no_grad():
            state = trial.first_state()
            trial.require_numbers(state)
            trial.require_repeatable(state)
        watches = trial.require_derivative()
        with torch.no_grad():
            trial.samples.require_independent(state)
    shape = state.movedim(linearization.batch_dim, 0).shape[1:]
    return shape, watches


def _differing_rows(head: Batch) -> Tensor:
    """Return up to four positions, each sample differing from the one before; the first if all agree."""
    chosen = [0]
    columns = [tensor.detach().movedim(head.batch_dim, 0) for tensor in head.tensors]
    for row in range(1, min(head.num_samples, _SEARCHED)):
        if not all(torch.equal(column[row], column[chosen[-1]]) for column in columns):
            chosen.append(row)
        if len(chosen) == _PROBED:
            break
    return torch.tensor(chosen)


class _Trial:
    """One model on one small batch."""

    def __init__(self, linearization: Linearization, sample: Batch, rows: Tensor) -> None:
        self.lin = linearization
        self.sample = sample
        self.rows = rows
        self._draws = 0
        self._read: set[str] = set()
        self.axis = linearization.batch_dim
        # Live parameters stay out of the trial, so that a use of the user's own tensors shows.
        self.params = tuple(
            p.detach().clone() if linearization.differentiable else p for p in linearization.parameters
        )
        self.samples = SampleAxis(linearization, sample, self.params, self.state)

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
            if isinstance(error, (RuntimeError, IndexError)) and "allocate" not in str(error):
                self._refuse_call(error)
            error.add_note(self._call_note())
            raise

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
        state, reassigned = self._run_under(guard)
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

    def _run_under(self, guard: Guard) -> tuple[Any, list[str]]:
        """Return the raw state, and the slots that were given other tensors."""
        tensors = (*self.params, *self.lin.constants)
        reassigned: list[str] = []

        def read(root: Any, forward: Any) -> Any:
            state = self.lin.selector.read(root, forward)
            reassigned.extend(self.lin.call.reassigned(root, tensors))
            return state

        try:
            with guard:
                state = self.lin.call.run(tensors, self.sample.inputs, read)
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
        lin = self.lin
        tensors = (*(self.params if params is None else params), *lin.constants)
        labels = [f"parameter {name!r}" for name in (*lin.names, *lin.frozen_names)]
        labels += [f"buffer {name!r}" for name in lin.buffer_names]
        named = [*zip(labels, tensors, strict=True), *lin.call.others]
        named += zip(self.sample.layout.labels, self.sample.tensors, strict=True)
        return {key: label for label, tensor in named if (key := storage_key(tensor)) is not None}

    def _foreign(self, held: dict[int, str]) -> dict[int, str]:
        foreign = {}
        for label, tensor in self.lin.origins():
            key = storage_key(tensor)
            if key is not None and key not in held:
                foreign[key] = label
        return foreign

    def _call_note(self) -> str:
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
            rows = state.isnan().movedim(self.axis, 0).reshape(self.sample.num_samples, -1).any(1)
            row = int(self.rows[int(rows.nonzero()[0, 0])])
            raise NonFiniteError(
                f"{self.lin.output_name} is NaN for input row {row} although parameters and inputs are "
                "finite; look for a division by zero, or a logarithm or root of a negative number, in the "
                "model"
            )

    # -- randomness

    def require_repeatable(self, state: Tensor) -> None:
        """Raise if further passes differ from the first one, or no longer read what it read."""
        # A view of a parameter that was kept shares its memory, and not that of a copy.
        is_small = sum(p.nbytes for p in self.params) <= _COPIED
        params = tuple(p.clone() for p in self.params) if is_small else self.params
        guard = Guard(self._held(params), {})
        with random_state_moved(self.lin.device) as moved, guard:
            again = [self.state(self.sample, params).detach()]
        if moved[0]:
            self.lin.call.draws = True
            again += [self._other_draw() for _ in range(_REPEATS)]
        else:
            self._require_read(guard.read)
        if all(self.samples.close(state, other) for other in again):
            return
        raise StochasticModelError(
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

    def _other_draw(self) -> Tensor:
        self._draws += 1
        disturb_randomness(self._draws)  # the call restores the state that it finds
        return self.state(self.sample)

    def _random_module(self) -> str:
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
        if not state.requires_grad:
            return True
        try:
            gradients = torch.autograd.grad(state.sum(), leaves, retain_graph=True, allow_unused=True)
        except Exception:
            return False
        return not any(gradient is not None and gradient.is_meta for gradient in gradients)
