"""What the Jacobian and the kernel share: one thin `LinearOperator` over two axes and an engine.

The selected parameters are the operator's positional tensors, so that linear_operator can
differentiate, cast and rebuild it. Everything else travels in one opaque `Core`: the engine and the
two axes. Slices, transposes and batch methods replace an axis and share the rest.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Self

import torch
from torch import Tensor

from ..engines import EngineChoice, KernelShape, build_engine
from ..model.watch import tracked
from ..results import EngineInfo
from .axes import Axis, ParameterAxis, StateAxis
from .indexing import IndexedOperator

__all__ = ["EngineOperator"]


class EngineOperator(IndexedOperator):
    """An operator whose products an engine computes; see `JacobianOperator` and `NTKOperator`.

    Args:
        *params: The selected parameters.
        core: Engine and axes.
    """

    @property
    def engine_info(self) -> EngineInfo:
        """How products are computed: engine, mode of differentiation, layers, chunk sizes, passes so far.

        Cost: for the layerwise engine one forward and one backward pass over one sample, once.
        """
        engine = self._core.engine
        axis, _ = self._state_axes()
        # First: it may find that the layerwise way has to be left.
        layers = engine.layers(axis.inputs, self._kernel_shape(), self._num_distinct())
        how = engine.differentiated(per_sample=True)
        assert how.per_sample is not None
        return EngineInfo(
            engine=engine.name,
            mode=how.mode,
            per_sample=how.per_sample,
            reasons=how.reasons,
            dense=self._stored_dense() is not None,
            batch_size=min(engine.batch_size(axis.inputs), axis.inputs.num_samples),
            chunk_size=engine.chunk_size(),
            max_dense_bytes=self._core.max_dense_bytes,
            passes=engine.passes,
            covered=engine.covered,
            layers=layers,
        )

    @property
    def pushes(self) -> bool:
        """Whether products with J exist. Asking finds the mode of differentiation, once for a model."""
        return self._core.engine.differentiation.mode != "reverse"

    def _state_axes(self) -> tuple[StateAxis, StateAxis]:
        """Rows and columns of the kernel in question; for J and Jᵀ that of their own samples."""
        axes = [axis for axis in (self._core.rows, self._core.columns) if isinstance(axis, StateAxis)]
        return axes[0], axes[-1]

    def _kernel_shape(self) -> KernelShape:
        """Return the sizes by which an engine estimates what a dense kernel costs."""
        rows, columns = self._state_axes()
        return KernelShape(
            left=rows.inputs.num_samples,
            right=columns.inputs.num_samples,
            rows=rows.outputs.shape[-1],
            columns=columns.outputs.shape[-1],
            terms=rows.terms,
            kernels=rows.batch_shape.numel(),
            symmetric=rows is columns,
        )

    def _num_distinct(self) -> int:
        """Return how many outputs occur: each is one backward pass, whatever terms and members it is in."""
        return max(axis.num_distinct for axis in self._state_axes())

    def free(self) -> int:
        """Drop every tensor cached for this operator's engine.

        Returns:
            Bytes set free. Later products recompute what they need.
        """
        self.__dict__.pop("_memoize_cache", None)
        return self._core.engine.free()

    def with_engine(
        self,
        engine: EngineChoice = "auto",
        *,
        batch_size: int | Literal["auto"] = "auto",
        chunk_size: int | Literal["auto"] = "auto",
    ) -> Self:
        """Return the same operator, computed in another way.

        Args:
            engine: "auto", "autograd", "layerwise" or a `Layerwise`; see `ntkops.ntk`.
            batch_size: Samples per pass, or "auto".
            chunk_size: Columns per pass, or "auto".

        Returns:
            An operator over the same snapshot and samples. Up to rounding its products are the same.

        Raises:
            InputError: If ``engine`` or a size is not understood.
        """
        built = build_engine(
            self._core.engine.linearization,
            self._state_axes()[0].inputs,
            engine,
            batch_size=batch_size,
            chunk_size=chunk_size,
        )
        return self._rebuild(dataclasses.replace(self._core, engine=built))

    # dense parts with their graph

    is_recordable = True

    def recorded_tile(self, rows: slice, cols: slice) -> Tensor:
        """Return a dense block ``(*batch, r, c)`` with its graph."""
        part = self.submatrix(rows, cols)
        part._check_fresh()
        return part._dense_values(part._args)

    def recorded_diagonal(self, rows: slice) -> Tensor:
        """Return a part of the diagonal ``(*batch, r)`` with its graph."""
        return self.submatrix(rows, rows).diagonal()

    # casting and gradients

    def _moved(self, dtype: torch.dtype, device: torch.device) -> Self:
        """Return the operator with snapshot and samples in another dtype or place."""
        # Integer inputs stay integers, the user's model and inputs stay where they are, and nothing is
        # checked again.
        moved: dict[int, Any] = {}

        def move(axis: Axis) -> Axis:
            if isinstance(axis, ParameterAxis):
                return axis
            if id(axis.inputs) not in moved:  # shared inputs stay shared
                moved[id(axis.inputs)] = axis.inputs.to(dtype=dtype, device=device)
            return axis.of(moved[id(axis.inputs)])

        core = dataclasses.replace(
            self._core.map_axes(move), engine=self._core.engine.to(dtype=dtype, device=device)
        )
        return self._rebuild(core, [tracked(arg.to(dtype=dtype, device=device)) for arg in self._args])

    def _set_requires_grad(self, val: bool) -> None:
        """Let this operator's parameters require grad, or not."""
        # New leaves over the same storage: the snapshot that other operators share stays as it is.
        self._args = tuple(arg.detach().requires_grad_(val) for arg in self._args)

    def detach_(self) -> Self:
        """Detach this operator from the graph in place; the tensors that it shares are left alone."""
        self._set_requires_grad(False)
        return self
