r"""The empirical neural tangent kernel as a kernel of gpytorch.

`NTKKernel` gives Gaussian processes whose covariance is K = J Jᵀ of a network: the linearised network with
independent Gaussian parameters. Everything that gpytorch asks of it stays lazy where gpytorch allows that,
and solves, log-determinants and their derivatives are ours: exact inside ``max_dense_bytes``, by conjugate
gradients with a checked residual above it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from linear_operator import settings as linear_operator_settings
from linear_operator.operators import LinearOperator
from torch import Tensor

from .engines import EngineChoice
from .errors import InputError, MissingDependencyError, ShapeError, UnsupportedOperationError
from .model import Linearization, linearize
from .operators import NTKOperator, ntk

try:
    from gpytorch import settings
    from gpytorch.kernels import Kernel
except ImportError as error:  # pragma: no cover - held by a test in a process without gpytorch
    raise MissingDependencyError(
        "ntkops.gp needs gpytorch, which is not installed: pip install 'ntkops[gp]'"
    ) from error

__all__ = ["NTKKernel"]


class NTKKernel(Kernel):
    r"""Covariance :math:`K(x, x') = J(x) J(x')^\top` of a network, for `gpytorch.models.ExactGP`.

    Called directly, as ``ExactGP.forward`` does, it returns a lazy `NTKOperator`; adding the likelihood's
    noise gives an operator whose ``solve``, ``inv_quad_logdet`` and derivatives are exact inside
    ``max_dense_bytes`` and end with a checked residual, or an error, above. Inside another kernel of gpytorch
    (`ScaleKernel`, sums, products) the solver is gpytorch's own choice: exact up to
    ``linear_operator.settings.max_cholesky_size`` rows (800), and loosely converged above without a word.
    There this kernel refuses to be evaluated.

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
        active_dims: Columns of the data that the kernel sees; None for all.

    Raises:
        InputError: If ``outputs`` needs ``num_outputs``.
        NtkopsError: The one that fits what is wrong with model or selection; see `ntkops.errors`.

    Example:
        >>> import torch
        >>> from ntkops.gp import NTKKernel
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
        >>> kernel = NTKKernel(model)
        >>> K = kernel(torch.randn(5, 2))
        >>> K.shape, len(list(kernel.parameters()))
        (torch.Size([5, 5]), 0)
    """

    has_lengthscale = False
    is_stationary = False

    def __init__(
        self,
        model: Any,
        *,
        outputs: Literal["trace", "each", "all"] | int = "trace",
        num_outputs: int | None = None,
        input_shape: Sequence[int] | None = None,
        params: Any = None,
        output: Any = None,
        engine: EngineChoice = "auto",
        batch_size: int | Literal["auto"] = "auto",
        chunk_size: int | Literal["auto"] = "auto",
        max_dense_bytes: int | Literal["auto"] = "auto",
        differentiable: bool = False,
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

    # evaluation

    def __call__(
        self, x1: Tensor, x2: Tensor | None = None, diag: bool = False, **params: Any
    ) -> LinearOperator | Tensor:
        """Return the covariance between two sets of samples, lazily.

        Args:
            x1: ``(n, d)``, or a batch of copies of one set.
            x2: ``(m, d)``; None for ``x1``.
            diag: Return only the pairs ``(x1_i, x2_i)``.
            **params: Nothing that this kernel takes.

        Returns:
            Lazy ``(*batch, n, m)`` (times the outputs for "all"), or ``(*batch, n)`` with ``diag``.

        Raises:
            ShapeError: If the data do not fit ``input_shape``, or a batch holds different data.
            UnsupportedOperationError: Inside another kernel above the size up to which gpytorch is exact.
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
        left, batch = self._samples(x1)
        same = x2 is None or x2 is x1 or x1.shape == x2.shape and torch.equal(x1, x2)
        right, right_batch = (left, batch) if x2 is None or same else self._samples(x2)
        if nested and same and not diag:
            _require_exact(len(left))
        K = self._kernel(left, None if same else right)
        shape = torch.broadcast_shapes(batch, right_batch, K.shape[:-2], self.batch_shape)
        if diag:
            diagonal: Tensor = K.diagonal()
            return diagonal.expand(*shape, diagonal.shape[-1])
        return K if shape == K.shape[:-2] else K.expand(*shape, *K.shape[-2:])

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
        batch = x.shape[:-2]
        if batch:
            x = _single(x)
        if self.input_shape is None:
            return x, batch
        if x.shape[-1] != self.input_shape.numel():
            raise ShapeError(
                f"input_shape={tuple(self.input_shape)} needs {self.input_shape.numel()} columns, the data "
                f"have {x.shape[-1]}"
            )
        return x.reshape(len(x), *self.input_shape), batch

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


def _single(x: Tensor) -> Tensor:
    """Return the one set of samples of which a batch holds copies."""
    first = x[(0,) * (x.dim() - 2)]
    expanded = all(
        stride == 0 or size == 1 for stride, size in zip(x.stride()[:-2], x.shape[:-2], strict=True)
    )
    if not expanded and not torch.equal(x, first.expand_as(x)):
        raise ShapeError(
            f"data of shape {tuple(x.shape)}: gpytorch reads all but the last two axes as a batch, and this "
            "batch holds different data. Flatten images to (n, d) and pass input_shape=; for several data "
            "sets make one kernel each"
        )
    return first


def _require_exact(rows: int) -> None:
    limit = linear_operator_settings.max_cholesky_size.value()
    if rows <= limit:
        return
    raise UnsupportedOperationError(
        f"inside another kernel gpytorch solves {rows} rows by loosely converged iterations and does not "
        f"say so (it is exact up to linear_operator.settings.max_cholesky_size, {limit}). Use NTKKernel "
        "directly, whose solves are checked, or raise that setting"
    )
