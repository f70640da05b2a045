r"""The empirical neural tangent kernel as a kernel of gpytorch.

`NTKKernel` gives Gaussian processes whose covariance is K = J Jᵀ of a network: the linearised network with
independent Gaussian parameters. Everything that gpytorch asks of it stays lazy where gpytorch allows that,
and solves, log-determinants and their derivatives are ours: exact inside ``max_dense_bytes``, by conjugate
gradients with a checked residual above it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from linear_operator import settings as linear_operator_settings
from linear_operator.operators import LinearOperator, to_linear_operator
from torch import Tensor

from .arguments import checked
from .constructors import ntk
from .engines import EngineChoice, format_bytes
from .errors import (
    DenseMemoryError,
    InputError,
    MissingDependencyError,
    ShapeError,
    UnsupportedOperationError,
)
from .model import Linearization, linearize
from .operators import NTKOperator

try:
    from gpytorch import settings
    from gpytorch.constraints import Interval, Positive
    from gpytorch.kernels import AdditiveKernel, Kernel
    from gpytorch.lazy import LazyEvaluatedKernelTensor
except ImportError as error:  # pragma: no cover - held by a test in a process without gpytorch
    raise MissingDependencyError(
        "ntkops.gp needs gpytorch, which is not installed: pip install 'gpytorch>=1.14'"
    ) from error

if TYPE_CHECKING:
    from .model.accepted import ModelLike, OutputLike, ParamsLike

__all__ = ["NTKKernel", "NTKSumKernel"]


class NTKKernel(Kernel):
    r"""Covariance :math:`K(x, x') = J(x) J(x')^\top` of a network, for `gpytorch.models.ExactGP`.

    Called directly, as ``ExactGP.forward`` does, it returns a lazy `NTKOperator`; adding the likelihood's
    noise gives an operator whose ``solve``, ``inv_quad_logdet`` and derivatives are exact inside
    ``max_dense_bytes`` and end with a checked residual, or an error, above. That holds for a multiple, by
    ``outputscale=``, and for a sum that begins with this kernel, ``NTKKernel(...) + other``, as well. Inside
    another kernel of gpytorch (`ScaleKernel`, products, ``other + NTKKernel(...)``) the solver is gpytorch's
    own choice: exact up to ``linear_operator.settings.max_cholesky_size`` rows (800), and loosely converged
    above without a word. There this kernel refuses to be evaluated.

    Args:
        model: `torch.nn.Module`, function ``(params, inputs) -> output``, or `Linearization`. It is not
            registered as a submodule: ``kernel.double()`` and ``kernel.parameters()`` leave it alone.
        outputs: "trace" for the kernel summed over outputs, ``(n, n)``; "each" for a batch of kernels, one
            Gaussian process for each output, ``(C, n, n)``; "all" for the joint kernel of all outputs,
            ``(n·C, n·C)``, sample-major as `MultitaskMultivariateNormal` has it; a number for one output.
        num_outputs: Number C of outputs; needed for "each" and "all", where gpytorch asks for shapes before
            it has data.
        input_shape: Shape of one sample as the model takes it. gpytorch reads every axis but the last two as
            a batch, so that images go in flattened, ``(n, d)``, and are reshaped to this. None leaves them.
        params: Which parameters; see `ntkops.ntk`.
        output: What the state is; see `ntkops.ntk`.
        engine: See `ntkops.ntk`.
        batch_size: See `ntkops.ntk`.
        chunk_size: See `ntkops.ntk`.
        max_dense_bytes: See `ntkops.ntk`.
        differentiable: Follow the live parameters, so that the marginal likelihood can be differentiated in
            them (`network_parameters`); False takes a snapshot.
        outputscale: First value of a positive factor of the kernel that is learned, the parameter
            ``raw_outputscale`` as in gpytorch's `ScaleKernel`, one for each kernel of a batch; None for none.
        outputscale_constraint: Its constraint; default `gpytorch.constraints.Positive`.
        active_dims: Columns of the data that the kernel sees; None for all.

    Raises:
        InputError: If ``outputs`` needs ``num_outputs``, or the scale is not positive.
        NtkopsError: The one that fits what is wrong with model or selection; see `ntkops.errors`.

    Example:
        >>> import torch
        >>> from ntkops.gp import NTKKernel
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
        ... )
        >>> kernel = NTKKernel(model)
        >>> K = kernel(torch.randn(5, 2))
        >>> K.shape, len(list(kernel.parameters()))
        (torch.Size([5, 5]), 0)
    """

    has_lengthscale = False
    is_stationary = False

    @checked
    def __init__(
        self,
        model: ModelLike,
        *,
        outputs: Literal["trace", "each", "all"] | int = "trace",
        num_outputs: int | None = None,
        input_shape: Sequence[int] | None = None,
        params: ParamsLike = None,
        output: OutputLike = None,
        engine: EngineChoice = "auto",
        batch_size: int | Literal["auto"] = "auto",
        chunk_size: int | Literal["auto"] = "auto",
        max_dense_bytes: int | Literal["auto"] = "auto",
        differentiable: bool = False,
        outputscale: float | None = None,
        outputscale_constraint: Interval | None = None,
        active_dims: tuple[int, ...] | None = None,
    ) -> None:
        if outputs in ("each", "all") and num_outputs is None:
            raise InputError(
                f"outputs={outputs!r} needs num_outputs=, the number of outputs of the model: gpytorch asks "
                "for shapes before it has data"
            )
        batch = torch.Size([num_outputs]) if outputs == "each" and num_outputs else torch.Size()
        super().__init__(batch_shape=batch, active_dims=active_dims)
        self.outputs, self.num_outputs = outputs, num_outputs
        self.input_shape = None if input_shape is None else torch.Size(input_shape)
        self.differentiable = differentiable
        self._classes: Tensor | None = None  # which of the C kernels are left after indexing
        self._options: dict[str, Any] = {
            "engine": engine,
            "batch_size": batch_size,
            "chunk_size": chunk_size,
            "max_dense_bytes": max_dense_bytes,
        }
        # A tuple hides the network from nn.Module, which would cast and register it.
        self._network = (_Network(model, params, output, differentiable),)
        self._has_scale = outputscale is not None
        if outputscale is not None:
            self._register_scale(outputscale, outputscale_constraint)

    # the scale

    def _register_scale(self, value: float, constraint: Interval | None) -> None:
        if not (isinstance(value, int | float) and 0 < value < float("inf")):
            raise InputError(f"outputscale={value!r}: pass a positive number, or None for no scale")
        self.register_parameter("raw_outputscale", torch.nn.Parameter(torch.zeros(self.batch_shape)))
        self.register_constraint("raw_outputscale", Positive() if constraint is None else constraint)
        self.initialize(outputscale=torch.full(self.batch_shape, float(value)))

    @property
    def outputscale(self) -> Tensor | None:
        """The factor of the kernel, of its batch shape; None where there is none. It can be set."""
        if not self._has_scale:
            return None
        scale: Tensor = self.raw_outputscale_constraint.transform(self.raw_outputscale)
        return scale if self._classes is None else scale[self._classes]

    @outputscale.setter
    def outputscale(self, value: float | Tensor) -> None:
        if not self._has_scale:
            raise InputError("this kernel has no scale: make it with outputscale=")
        raw = self.raw_outputscale
        values = torch.as_tensor(value, dtype=raw.dtype, device=raw.device)
        if self._classes is not None:  # the scales of a batch belong to all of its kernels
            whole = self.raw_outputscale_constraint.transform(raw).detach().clone()
            whole[self._classes] = values
            values = whole
        self.initialize(raw_outputscale=self.raw_outputscale_constraint.inverse_transform(values))

    def _scaled(self, K: LinearOperator) -> LinearOperator:
        scale = self.outputscale
        if scale is None:
            return K
        return K.mul(scale.to(dtype=K.dtype, device=K.device)[..., None, None])

    def __add__(self, other: Kernel) -> Kernel:
        """Return the sum of this kernel and another, whose solves are ours too."""
        return NTKSumKernel(self, *(other.kernels if isinstance(other, AdditiveKernel) else [other]))

    # evaluation

    def __call__(
        self, x1: Tensor, x2: Tensor | None = None, diag: bool = False, **params: Any
    ) -> LinearOperator | Tensor:
        """Return the covariance between two sets of samples, lazily.

        Args:
            x1: ``(n, d)``, or a batch of sets, ``(*batch, n, d)``.
            x2: ``(m, d)``, or a batch; None for ``x1``.
            diag: Return only the pairs ``(x1_i, x2_i)``.
            **params: Nothing that this kernel takes.

        Returns:
            Lazy ``(*batch, n, m)`` (times the outputs for "all"), or ``(*batch, n)`` with ``diag``. A batch
            of different sets is dense, inside ``max_dense_bytes``: samples that occur in several sets are
            differentiated once, where no derivative flows to them.

        Raises:
            ShapeError: If the data do not fit ``input_shape``, or batches do not broadcast.
            DenseMemoryError: If a batch of different sets is larger than ``max_dense_bytes``.
            UnsupportedOperationError: Inside another kernel, or for a batch of different sets, above the size
                up to which gpytorch is exact.
        """
        params.pop("last_dim_is_batch", None)
        if self.active_dims is not None:
            x1 = x1.index_select(-1, self.active_dims)
            x2 = None if x2 is None else x2.index_select(-1, self.active_dims)
        nested = settings.lazily_evaluate_kernels.off()
        return self._evaluate(x1, x2, diag, nested)

    def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **params: Any) -> LinearOperator | Tensor:
        """Return the covariance for another kernel that wraps this one; see `__call__`."""
        if params.get("last_dim_is_batch"):
            raise UnsupportedOperationError("a network does not split over its input dimensions")
        return self._evaluate(x1, x2, diag, nested=True)

    def _evaluate(self, x1: Tensor, x2: Tensor | None, diag: bool, nested: bool) -> LinearOperator | Tensor:
        same = x2 is None or x2 is x1 or x1.shape == x2.shape and torch.equal(x1, x2)
        other = None if x2 is None or same else x2
        if not (_holds_copies(x1) and (other is None or _holds_copies(other))):
            return self._of_sets(x1, other, diag)
        left, batch = self._samples(x1)
        right, right_batch = (left, batch) if other is None else self._samples(other)
        if nested and same and not diag:
            _require_exact(len(left))
        K = self._kernel(left, None if same else right)
        shape = torch.broadcast_shapes(batch, right_batch, K.shape[:-2], self.batch_shape)
        if diag:
            diagonal: Tensor = self._scaled(K).diagonal()
            return diagonal.expand(*shape, diagonal.shape[-1])
        return self._scaled(K if shape == K.shape[:-2] else K.expand(*shape, *K.shape[-2:]))

    def _of_sets(self, x1: Tensor, x2: Tensor | None, diag: bool) -> LinearOperator | Tensor:
        """Return the covariances of a batch of different sets, as dense blocks."""
        batch = _broadcast(x1.shape[:-2], x1.shape[:-2] if x2 is None else x2.shape[:-2])
        left = x1.expand(*batch, *x1.shape[-2:]).flatten(0, -3)  # (B, n, d)
        right = None if x2 is None else x2.expand(*batch, *x2.shape[-2:]).flatten(0, -3)
        if diag:
            pairs = self._kernel(
                self._shaped(left.flatten(0, 1)), None if right is None else self._shaped(right.flatten(0, 1))
            )
            found = pairs.diagonal().unflatten(-1, (len(left), -1)).movedim(-2, 0)  # (B, *own, n)
            diagonal: Tensor = self._over(found.unsqueeze(-1), batch).squeeze(-1)
            scale = self.outputscale
            return diagonal if scale is None else diagonal * scale[..., None].to(diagonal)
        _require_exact(left.shape[1])
        live = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (left, right))
        blocks = self._live_blocks(left, right) if live else self._blocks(left, right)
        return self._scaled(to_linear_operator(self._over(blocks, batch)))

    def _live_blocks(self, left: Tensor, right: Tensor | None) -> Tensor:
        """Return one block a set, ``(B, *own, n, m)``: equal samples have derivatives of their own."""
        rights = [None] * len(left) if right is None else [self._shaped(one) for one in right]
        return torch.stack(
            [
                self._kernel(self._shaped(one), other).to_dense()
                for one, other in zip(left, rights, strict=True)
            ]
        )

    def _blocks(self, left: Tensor, right: Tensor | None) -> Tensor:
        """Return the same from one kernel over the distinct samples of all sets."""
        # Sets of cross-validation, and of batched acquisition, share most samples: each is differentiated
        # once.
        rows, row_numbers = torch.unique(left.flatten(0, 1), dim=0, return_inverse=True)
        cols, col_numbers = rows, row_numbers
        if right is not None:
            cols, col_numbers = torch.unique(right.flatten(0, 1), dim=0, return_inverse=True)
        K = self._kernel(self._shaped(rows), None if right is None else self._shaped(cols))
        needed = len(left) * math.prod(K.shape[:-2]) * left.shape[1] * (len(col_numbers) // len(left))
        needed *= self.num_outputs_per_input(left, left) ** 2 * K.dtype.itemsize
        if needed > K.max_dense_bytes:
            raise DenseMemoryError(
                f"the kernels of {len(left)} different sets need {format_bytes(needed)}, above "
                f"max_dense_bytes={format_bytes(K.max_dense_bytes)}: pass fewer sets at a time, or raise it"
            )
        dense = K.to_dense()  # (*own, U·O, V·O)
        width = self.num_outputs_per_input(left, left)
        numbers = [
            (at.reshape(len(left), -1, 1) * width + torch.arange(width, device=at.device)).flatten(1)
            for at in (row_numbers, col_numbers)
        ]
        found = dense[..., numbers[0].unsqueeze(-1), numbers[1].unsqueeze(-2)]  # (*own, B, nO, mO)
        return found.movedim(-3, 0)

    def _over(self, blocks: Tensor, batch: torch.Size) -> Tensor:
        """Return ``(*shape, n, m)`` from ``(B, *own, n, m)``, the batch of sets beside the kernel's own."""
        own = blocks.shape[1:-2]
        split = blocks.unflatten(0, batch)
        if not own:
            return split
        if batch[-1] == 1:
            return split.squeeze(-4)
        if batch[-1] != own[0]:
            raise ShapeError(
                f"a batch of sets {tuple(batch)} does not broadcast with the kernel's own {tuple(own)}: add "
                "an axis of one before the samples, x.unsqueeze(-3)"
            )
        return split.diagonal(dim1=-4, dim2=-3).movedim(-1, -3)

    def _kernel(self, left: Tensor, right: Tensor | None) -> NTKOperator:
        live = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (left, right))
        linearization = self._network[0].linearization(live)
        K = ntk(linearization, left, right, outputs=self.outputs, **self._options)
        if self.num_outputs is not None and K.output_shape.numel() != self.num_outputs:
            raise ShapeError(
                f"the model has {K.output_shape.numel()} outputs a sample, num_outputs={self.num_outputs}"
            )
        return K if self._classes is None else K[self._classes]

    def _samples(self, x: Tensor) -> tuple[Tensor, torch.Size]:
        """Return ``(n, *input_shape)`` and the batch shape of which it was one of the copies."""
        x = x.unsqueeze(-1) if x.dim() == 1 else x
        return self._shaped(x[(0,) * (x.dim() - 2)]), x.shape[:-2]

    def _shaped(self, x: Tensor) -> Tensor:
        """Return samples ``(n, d)`` as the model takes them."""
        if self.input_shape is None:
            return x
        if x.shape[-1] != self.input_shape.numel():
            raise ShapeError(
                f"input_shape={tuple(self.input_shape)} needs {self.input_shape.numel()} columns, the data "
                f"have {x.shape[-1]}"
            )
        return x.reshape(len(x), *self.input_shape)

    # what gpytorch asks of a kernel

    def num_outputs_per_input(self, x1: Tensor, x2: Tensor) -> int:
        """Return how many rows a sample has: C for ``outputs="all"``, else 1."""
        return int(self.num_outputs or 1) if self.outputs == "all" else 1

    def __getitem__(self, index: Any) -> NTKKernel:
        """Return the kernels of some outputs of a batch, with the same network.

        Args:
            index: Number, slice, list or tensor of positions in the batch of outputs.

        Returns:
            A kernel whose batch is what the index leaves.

        Raises:
            ShapeError: If there is no batch, or more than one index.
        """
        positions = index[0] if isinstance(index, tuple) and len(index) == 1 else index
        if isinstance(positions, tuple) or not self.batch_shape:
            raise ShapeError(
                f"a kernel with batch shape {tuple(self.batch_shape)} takes no index {index!r}; "
                "outputs='each' makes a batch of one kernel for each output"
            )
        before = torch.arange(self.batch_shape[0]) if self._classes is None else self._classes
        chosen = before[positions]
        kernel = self._twin()  # shares the network, which gpytorch would copy
        kernel._classes = chosen
        kernel.batch_shape = chosen.shape
        return kernel

    def network_parameters(self) -> Iterator[torch.nn.Parameter | Tensor]:
        """Yield the network's selected parameters, for an optimiser.

        Yields:
            Live parameters.

        Raises:
            UnsupportedOperationError: If the kernel holds a snapshot.
        """
        if not self.differentiable:
            raise UnsupportedOperationError(
                "this kernel holds a snapshot of the network: make it with differentiable=True to train the "
                "network through the marginal likelihood"
            )
        yield from self._network[0].linearization(live=False).parameters

    def __deepcopy__(self, memo: dict[int, Any]) -> NTKKernel:
        """Copy the kernel; the network, which it does not own, is shared."""
        twin = memo[id(self)] = self._twin()
        for key, value in self.__dict__.items():
            twin.__dict__[key] = value if key == "_network" else copy.deepcopy(value, memo)
        return twin

    def _twin(self) -> NTKKernel:
        twin = self.__class__.__new__(self.__class__)
        twin.__dict__.update(self.__dict__)
        return twin


class NTKSumKernel(AdditiveKernel):
    """The sum of an `NTKKernel` and others, as ``NTKKernel(...) + other`` makes it.

    It is evaluated at once, to a lazy sum that begins with our operator, so that the solves of a Gaussian
    process are those of `NTKKernel`.

    Example:
        >>> import torch
        >>> from gpytorch.kernels import RBFKernel
        >>> from ntkops.gp import NTKKernel
        >>> kernel = NTKKernel(torch.nn.Linear(2, 1)) + RBFKernel()
        >>> type(kernel(torch.randn(5, 2)).add_jitter(0.1)).__name__
        'RidgeOperator'
    """

    def __call__(
        self, x1: Tensor, x2: Tensor | None = None, diag: bool = False, **params: Any
    ) -> LinearOperator | Tensor:
        """Return the sum of the covariances between two sets of samples; see `NTKKernel`."""
        if settings.lazily_evaluate_kernels.off():  # inside another kernel: its parts refuse by themselves
            return super().__call__(x1, x2, diag=diag, **params)
        first, *others = (part(x1, x2, diag=diag, **params) for part in self.kernels)
        for term in others:
            first = first + (term if diag else _evaluated(term))
        return first

    def __add__(self, other: Kernel) -> Kernel:
        """Return the sum of this kernel and another."""
        return NTKSumKernel(*self.kernels, *(other.kernels if isinstance(other, AdditiveKernel) else [other]))


def _evaluated(covariance: LinearOperator | Tensor) -> LinearOperator:
    if isinstance(covariance, LazyEvaluatedKernelTensor):
        return to_linear_operator(covariance.evaluate_kernel())
    return to_linear_operator(covariance)


class _Network:
    """The network of a kernel: a snapshot, or live parameters, and live samples on request."""

    def __init__(self, model: Any, params: Any, output: Any, differentiable: bool) -> None:
        self._model, self._params, self._output = model, params, output
        self._differentiable = differentiable
        self._snapshot: Linearization = linearize(model, params, output, differentiable=differentiable)
        self._with_live_samples: Linearization | None = None

    def linearization(self, live: bool) -> Linearization:
        """Return the network; with ``live`` derivatives flow to the samples."""
        if self._differentiable:
            return linearize(self._model, self._params, self._output, differentiable=True)
        if not live:
            return self._snapshot
        if self._with_live_samples is None:
            frozen = dict(zip(self._snapshot.names, self._snapshot.parameters, strict=True))
            self._with_live_samples = linearize(self._model, frozen, self._output, differentiable=True)
        return self._with_live_samples


def _holds_copies(x: Tensor) -> bool:
    """Whether a batch holds one set of samples again and again, whose derivatives are those of the one."""
    expanded = all(
        stride == 0 or size == 1 for stride, size in zip(x.stride()[:-2], x.shape[:-2], strict=True)
    )
    return expanded or not x.requires_grad and torch.equal(x, x[(0,) * (x.dim() - 2)].expand_as(x))


def _broadcast(first: torch.Size, second: torch.Size) -> torch.Size:
    """Return the shape of two batches together."""
    try:
        return torch.broadcast_shapes(first, second)
    except RuntimeError as error:
        raise ShapeError(f"batches of sets {tuple(first)} and {tuple(second)} do not broadcast") from error


def _require_exact(rows: int) -> None:
    limit = linear_operator_settings.max_cholesky_size.value()
    if rows <= limit:
        return
    raise UnsupportedOperationError(
        f"inside another kernel, or for a batch of different sets, gpytorch solves {rows} rows by loosely "
        f"converged iterations and does not say so (it is exact up to linear_operator.settings."
        f"max_cholesky_size, {limit}). Use NTKKernel directly, whose solves are checked, or raise that "
        "setting"
    )
