"""Predictions from directional derivatives: no gradient of a new sample, and no training sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..distributed.kernel import ShardedJacobianOperator
from ..errors import DifferentiationError, UnsupportedOperationError
from ..operators import JacobianOperator
from ..operators.products import Core
from ._operands import Layout
from ._parameter_space import ParameterChange

__all__ = ["Offset", "Predictor"]

Offset = Callable[[Any, Layout, int, Any], Tensor | None]


class Predictor:
    r"""What a fit says at new samples: offset + :math:`J_* \Delta\theta`, one jvp for each copy of Δθ.

    `ntkops.KernelRidge.predictor` and that of a distilled fit make it. It holds the network's snapshot and
    Δθ, and none of the training samples. The network was tried when the kernel was made; a call looks at the
    samples, and takes jvps.

    Args:
        change: Δθ.
        layout: How rows and targets belong together.
        offset: Given an operator over new samples, the layout, their number, and what a user passed: what is
            added, or None.

    Raises:
        UnsupportedOperationError: If there is no one function to evaluate at new samples: the kernel is of
            several, its rows are an uneven selection of samples and outputs, or they lie on several ranks.
        DifferentiationError: If the network has no directional derivatives.

    Example:
        >>> import torch, ntkops
        >>> _ = torch.manual_seed(0)
        >>> network = torch.nn.Sequential(
        ...     torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2)
        ... ).double()
        >>> x, x_new = torch.randn(20, 3).double(), torch.randn(5, 3).double()
        >>> K = ntkops.ntk(network, x)
        >>> fitted = ntkops.KernelRidge(1e-4).fit(K, torch.sin(x[:, :2]))
        >>> predict = fitted.predictor()
        >>> bool(torch.allclose(predict(x_new), fitted.predict(K.cross(x_new))))
        True
        >>> predict.num_jvps
        1
    """

    def __init__(self, change: ParameterChange, layout: Layout, offset: Offset) -> None:
        rows = change.rows
        if isinstance(rows, ShardedJacobianOperator):
            raise UnsupportedOperationError(
                "the rows of the fit lie on several ranks: predict with K.cross(x_new), or take weights(), "
                "which all of them have"
            )
        if not isinstance(rows, JacobianOperator):
            raise UnsupportedOperationError(
                "the kernel is of several functions, of which none is the one to predict: take weights(), "
                "and multiply ntkops.jacobian(function, x_new) with them"
            )
        axis = rows._state_axes()[0]
        if axis.pick is not None:
            raise UnsupportedOperationError(
                "the rows of the fit are an uneven selection of samples and outputs, so that new samples "
                "have no rows like them: fit whole samples"
            )
        rows = rows.with_engine("autograd")  # layers' factors of new samples would serve one product
        self._engine = rows._core.engine
        how = self._engine.differentiation
        if how.mode == "reverse":
            raise DifferentiationError(
                "the network has gradients, and no directional derivatives: "
                + "; ".join(how.reasons)
                + ". Predict with K.cross(x_new)"
            )
        self._params, self._outputs = rows._args, axis.outputs_alone
        self._columns = rows._core.columns
        self._weights = change.columns.to(rows.dtype)
        self._layout, self._offset = layout, offset

    @property
    def num_jvps(self) -> int:
        """Directional derivatives of one prediction: the number of copies of the parameters in Δθ."""
        return self._weights.numel() // self._engine.num_parameters

    def __call__(self, x: Any, *, offset: Tensor | None = None) -> Tensor:
        """Return f(x*) at new samples.

        Args:
            x: M samples, as the kernel took them.
            offset: Outputs f(x*) at the new samples, where `fit` was given those at the old.

        Returns:
            ``(M, ...)``: the shape of Y with M new samples in front, in the dtype of the kernel: what
            `predict` says to rounding.

        Raises:
            InputError: If an offset is missing or too many, or the samples are not such.
            ShapeError: If the outputs of the samples have another shape than those of the fit.
            DtypeError: If the samples or the offset have another dtype.
            NonFiniteError: If one of them holds NaN or infinity.
            StaleOperatorError: If something of the network that is held by reference has changed.
        """
        rows = self._outputs.over(self._engine.linearization.inputs(x))
        jacobian = JacobianOperator(*self._params, core=Core(self._engine, rows, self._columns, limit=0))
        with torch.no_grad():
            values = self._layout.restore(jacobian @ self._weights)
        base = self._offset(jacobian, self._layout, len(values), offset)
        return values if base is None else (values.double() + base.double()).to(values.dtype)

    def __repr__(self) -> str:
        """Show what a prediction costs and what it is made of."""
        shape = (*self._layout.tail,)
        return (
            f"Predictor(targets {shape}, {self.num_jvps} jvp{'s' * (self.num_jvps > 1)} a sample, "
            f"{self._engine.num_parameters} parameters, {self._weights.dtype})"
        )
