"""Differentiation: four modes of multiplying with J and Jᵀ at one batch, and gradients of single samples.

forward   torch.func vjp, and jvp in forward mode;
double    torch.func vjp, and J as the transpose of u -> Jᵀu (no forward-mode formula needed);
classic   torch.autograd.grad, and J by differentiating it once more (checkpointing, old-style
          autograd functions and derivatives inside the model, which torch.func refuses);
reverse   Jᵀ alone, where neither forward mode nor double backward exists.

Where results are differentiated further the order is another one: torch's forward-mode formulas of linear
solves, and some more, are right, and their derivatives are not.

Blocks of k vectors are row-major: cotangents ``(k, B, O)``, tangents one ``(k, *shape)`` a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from ..errors import DifferentiationError
from ..model import Batch
from ..model.batch import cut

__all__ = [
    "MODES",
    "RECORDED_MODES",
    "Columns",
    "Differentiation",
    "LinearizedBatch",
    "Mode",
    "Parameters",
    "SampleMode",
    "linearize_batch",
    "sample_gradients",
]

Mode = Literal["forward", "double", "classic", "reverse"]
Columns = Literal["vmap", "loop"]
SampleMode = Literal["vmap", "rows", "loop"]
Function = Callable[[Sequence[Tensor], Batch], Tensor]
Parameters = tuple[Tensor, ...]

MODES: tuple[Mode, ...] = ("forward", "double", "classic", "reverse")
RECORDED_MODES: tuple[Mode, ...] = ("double", "classic", "forward", "reverse")


@dataclass(frozen=True)
class Differentiation:
    """How a model is differentiated: what it was found to allow.

    Attributes:
        mode: The first mode that works.
        reasons: Why a higher choice was left, one line each.
        columns: Whether several vectors go through one vmapped pass or through a loop; None as long as
            nobody has asked.
        pull_columns: The same for Jᵀ alone, where a loop may be faster.
        per_sample: Whether per-sample Jacobians come from vmap over samples and outputs, from vmap over
            samples for one output after the other ("rows"), or from a loop over samples; None as long as
            nobody has asked.
    """

    mode: Mode
    reasons: tuple[str, ...] = ()
    columns: Columns | None = None
    pull_columns: Columns | None = None
    per_sample: SampleMode | None = None


class LinearizedBatch(Protocol):
    """Products with J and Jᵀ at fixed parameters and one fixed batch."""

    def pull(self, cotangents: Tensor) -> Parameters:
        """Jᵀv for each row of ``(k, B, O)``: one ``(k, *shape)`` for each parameter."""
        ...

    def push(self, tangents: Parameters) -> Tensor:
        """J p for each row of the ``(k, *shape)`` blocks: ``(k, B, O)``."""
        ...


def linearize_batch(
    mode: Mode,
    function: Function,
    params: Parameters,
    batch: Batch,
    columns: Columns = "vmap",
    pull_columns: Columns | None = None,
) -> LinearizedBatch:
    """Return the products with J and Jᵀ of ``function`` at ``params`` on one batch, lazily set up.

    ``columns`` says how several vectors go through one product with J, ``pull_columns`` with Jᵀ.
    """
    if mode in ("classic", "reverse"):
        return _Classic(function, params, batch, columns, pull_columns, reverse_only=mode == "reverse")
    return _TorchFunc(function, params, batch, columns, pull_columns, forward_mode=mode == "forward")


class _TorchFunc:
    """Products by torch.func, at one batch and one set of parameters."""

    def __init__(
        self,
        function: Function,
        params: Parameters,
        batch: Batch,
        columns: Columns,
        pull_columns: Columns | None,
        forward_mode: bool,
    ) -> None:
        self._function, self._params, self._batch = function, params, batch
        self._columns, self._forward_mode = columns, forward_mode
        self._pull_columns = pull_columns or columns
        self._vjp: tuple[Tensor, Callable[[Tensor], Parameters]] | None = None
        self._transposed_vjp: Callable[[Parameters], tuple[Tensor]] | None = None

    def _evaluate(self, *params: Tensor) -> Tensor:
        return self._function(params, self._batch)

    def _reverse(self) -> tuple[Tensor, Callable[[Tensor], Parameters]]:
        """Return the output and u -> Jᵀu, made once."""
        if self._vjp is None:
            self._vjp = torch.func.vjp(self._evaluate, *self._params)[:2]
        return self._vjp

    def pull(self, cotangents: Tensor) -> Parameters:
        _, pull = self._reverse()
        if self._pull_columns == "vmap" and len(cotangents) > 1:
            return torch.func.vmap(pull)(cotangents)
        return _stack([pull(v) for v in cotangents])

    def push(self, tangents: Parameters) -> Tensor:
        push = self._push_forward if self._forward_mode else self._push_double()
        if self._columns == "vmap" and len(tangents[0]) > 1:
            return torch.func.vmap(push)(tangents)
        return torch.stack([push(column) for column in zip(*tangents, strict=True)])

    def _push_forward(self, tangent: Parameters) -> Tensor:
        return torch.func.jvp(self._evaluate, self._params, tuple(tangent))[1]

    def _push_double(self) -> Callable[[Parameters], Tensor]:
        """Return p -> J p by two reverse passes."""
        # u -> Jᵀu is linear, so that its own vjp is the same at every u, here 0: ⟨p, Jᵀu⟩ = ⟨J p, u⟩.
        if self._transposed_vjp is None:
            output, pull = self._reverse()
            self._transposed_vjp = torch.func.vjp(pull, torch.zeros_like(output))[1]
        transposed = self._transposed_vjp
        return lambda tangent: transposed(tuple(tangent))[0]


class _Classic:
    """Products by torch.autograd, for models that torch.func does not take and for recorded graphs."""

    def __init__(
        self,
        function: Function,
        params: Parameters,
        batch: Batch,
        columns: Columns,
        pull_columns: Columns | None,
        reverse_only: bool,
    ) -> None:
        # Under a recorded graph the views keep the way back to the caller's parameters open.
        self._recorded = torch.is_grad_enabled() and any(p.requires_grad for p in params)
        self._params = tuple(
            p.view_as(p) if self._recorded and p.requires_grad else p.detach().requires_grad_()
            for p in params
        )
        self._columns, self._reverse_only = columns, reverse_only
        self._pull_columns = pull_columns or columns
        with torch.enable_grad():
            self._output = function(self._params, batch)
        self._transposable: tuple[Tensor, list[Tensor | None]] | None = None

    def pull(self, cotangents: Tensor) -> Parameters:
        return self._gradients([self._output], self._params, [cotangents], self._pull_columns)

    def push(self, tangents: Parameters) -> Tensor:
        if self._reverse_only:
            raise DifferentiationError(
                "J p was asked for, but this model has neither forward-mode nor double-backward formulas "
                "(see engine_info.reasons): only Jᵀv exists; use method='rhutch' or 'reverse', or rewrite "
                "the operation that is named there"
            )
        point, gradients = self._transposed()
        # A gradient without a graph is the same for all u, hence zero, and adds nothing to J p.
        pairs = [
            (g, t) for g, t in zip(gradients, tangents, strict=True) if g is not None and g.requires_grad
        ]
        if not pairs:
            return self._output.new_zeros((len(tangents[0]), *self._output.shape))
        return self._gradients([g for g, _ in pairs], (point,), [t for _, t in pairs], self._columns)[0]

    def _transposed(self) -> tuple[Tensor, list[Tensor | None]]:
        """Return u and Jᵀu as a graph from u, made once."""
        # u -> Jᵀu once more, as a graph from u to the gradients: its derivative along p is J p.
        if self._transposable is None:
            point = torch.zeros_like(self._output).requires_grad_()
            gradients: Sequence[Tensor | None] = (None,) * len(self._params)
            if self._output.requires_grad:
                with torch.enable_grad():
                    gradients = torch.autograd.grad(
                        self._output, self._params, point, create_graph=True, allow_unused=True
                    )
            if _refuses(gradients):
                raise RuntimeError("a function of the model is differentiable once only")
            self._transposable = point, list(gradients)
        return self._transposable

    def _gradients(
        self, outputs: list[Tensor], inputs: Parameters, cotangents: list[Tensor], columns: Columns
    ) -> tuple[Tensor, ...]:
        """Return the gradients at ``inputs`` for each of the k rows, zeros where one is unused."""
        count = len(cotangents[0])
        if not any(output.requires_grad for output in outputs):  # this batch uses none of the parameters
            return tuple(x.new_zeros((count, *x.shape)) for x in inputs)

        def gradient(rows: list[Tensor], batched: bool) -> tuple[Tensor | None, ...]:
            with torch.enable_grad():
                return torch.autograd.grad(
                    outputs,
                    inputs,
                    rows,
                    retain_graph=True,  # for the next products at this point
                    create_graph=self._recorded,
                    allow_unused=True,
                    is_grads_batched=batched,
                )

        if columns == "vmap" and count > 1:
            return tuple(
                x.new_zeros((count, *x.shape)) if g is None else g
                for g, x in zip(gradient(cotangents, True), inputs, strict=True)
            )
        # Each in memory of its own: a view as complex numbers wants even places.
        rows = [gradient([c[i].clone() for c in cotangents], False) for i in range(count)]
        return _stack(
            [
                tuple(torch.zeros_like(x) if g is None else g for g, x in zip(row, inputs, strict=True))
                for row in rows
            ]
        )


def _refuses(gradients: Sequence[Tensor | None]) -> bool:
    """Whether a part of some gradients has no derivative: torch may leave it out in silence."""
    seen: set[Any] = set()
    waiting: list[Any] = [g.grad_fn for g in gradients if g is not None]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        if node.name() == "torch::autograd::Error":  # what `once_differentiable` leaves in its place
            return True
        seen.add(node)
        waiting.extend(parent for parent, _ in node.next_functions)
    return False


def _stack(rows: Sequence[Parameters]) -> Parameters:
    """Return rows of parameters side by side, ``(k, ...)`` for each parameter."""
    if len(rows) == 1:
        return tuple(block.unsqueeze(0) for block in rows[0])
    return tuple(torch.stack(blocks) for blocks in zip(*rows, strict=True))


def sample_gradients(
    samples: SampleMode,
    mode: Mode,
    function: Function,
    params: Parameters,
    batch: Batch,
    cotangents: Tensor,
    columns: Columns = "vmap",
) -> Parameters:
    r"""Return :math:`J_i^\top v_{ir}`, one ``(B, r, *shape)`` a parameter, for ``(B, r, O)`` cotangents.

    ``samples`` says how: "vmap" over samples and cotangents, vmap over samples for one of the cotangents
    after the other ("rows"), or a "loop" over batches of one sample, in which ``columns`` says whether the r
    cotangents go through vmap. Cost: r per-sample passes.
    """
    if samples != "loop" and mode in ("forward", "double"):
        if samples == "vmap" or cotangents.shape[1] == 1:
            return _vmapped(function, params, batch, cotangents)
        single = [_vmapped(function, params, batch, row) for row in cotangents.split(1, dim=1)]
        return tuple(torch.cat(blocks, dim=1) for blocks in zip(*single, strict=True))
    rows = []
    for index, tensors in enumerate(_single_samples(batch)):
        linearized = linearize_batch(mode, function, params, batch.replace(tensors), columns)
        rows.append(linearized.pull(cotangents[index].unsqueeze(1)))  # (r, 1, O)
    return tuple(torch.stack(blocks) for blocks in zip(*rows, strict=True))


def _single_samples(batch: Batch) -> list[tuple[Tensor, ...]]:
    """Return the tensors of each sample as a batch of one."""
    return [cut(batch, index, index + 1).tensors for index in range(batch.num_samples)]


def _vmapped(function: Function, params: Parameters, batch: Batch, cotangents: Tensor) -> Parameters:
    """Return per-sample gradients ``(B, r, ...)`` by one vmap over the samples."""
    axes = batch.layout.axes

    def single(leaves: tuple[Tensor, ...], vectors: Tensor) -> Parameters:  # (r, O)
        # vmap takes the sample axis away, and the model wants one: a batch of one sample.
        sample = batch.replace(leaves).map_samples(lambda leaf, axis: leaf.unsqueeze(axis))
        pull = torch.func.vjp(lambda *values: function(values, sample)[0], *params)[1]
        if len(vectors) == 1:
            return tuple(g.unsqueeze(0) for g in pull(vectors[0]))
        return torch.func.vmap(pull)(vectors)

    if batch.layout.coupled:  # one sample, and no axis along which another would lie
        return tuple(g.unsqueeze(0) for g in single(batch.tensors, cotangents[0]))
    return torch.func.vmap(single, in_dims=(axes, 0))(batch.tensors, cotangents)
