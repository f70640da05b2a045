"""Trajectories: outputs, weights and losses of a linearised network along its training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..errors import DtypeError, InputError, ShapeError
from ..operators.capabilities import capabilities
from ..regression._operands import read_kernel, require_finite
from ..regression._parameter_space import ParameterChange
from ..regression._rounding import precise_product
from ..regression._snapshots import require_same_snapshot
from ..results import TrajectoryInfo
from ._filters import Filter
from ._problem import Problem
from .ensemble import Gaussian, gaussian

__all__ = ["Trajectory"]


@dataclass(frozen=True, eq=False)
class Trajectory:
    r"""A linearised network along its training.

    Its outputs are :math:`f_0 + K a(t)`, its weights those at the start plus :math:`J^\top a(t)`.
    `ntkops.gradient_flow` and `ntkops.gradient_descent` return it.

    Attributes:
        times: ``(T,)`` times, or numbers of steps, float64.
        outputs: ``(T, N, ...)`` outputs of the training samples, in the shape of Y and the kernel's dtype.
        dual: ``(T, N, ...)`` a(t), float64. At t = ∞ without weight decay it is one whose weights Jᵀa are
            those of the limit; those of finite times may grow along the null space of K.
        losses: ``(T,)`` the loss on the training samples, without the decay's penalty, float64.
        bounds: ``(T,)`` |error of the outputs| at most, over all training samples together, rounding
            included.
        weight_bounds: ``(T,)`` |error of Δθ| at most; all kernels' together where there are several.
        info: How it was computed.
    """

    times: Tensor
    outputs: Tensor
    dual: Tensor
    losses: Tensor
    bounds: Tensor
    weight_bounds: Tensor
    info: TrajectoryInfo
    _problem: Problem = field(repr=False)
    _column_bounds: Tensor = field(repr=False)  # (T, *batch, k) of Δθ, one for each right-hand side
    _filters: Filter | None = field(repr=False)  # None where training is not linear
    _tolerance: float = field(repr=False)

    def __repr__(self) -> str:
        """Show times, samples, losses and how it was computed."""
        first, last = float(self.losses[0]), float(self.losses[-1])
        return (
            f"Trajectory({len(self.times)} times to {float(self.times[-1]):g}, outputs "
            f"{tuple(self.outputs.shape)}, loss {first:.3g} to {last:.3g}, {self.info})"
        )

    def predict(self, K_cross: LinearOperator | Tensor, *, offset: Tensor | None = None) -> Tensor:
        """Return outputs at new samples, offset + K_* a(t), at all times.

        Args:
            K_cross: Kernel between new samples (rows) and those of training (columns), ``K.cross(x_new)``.
            offset: ``(M, ...)`` outputs of the new samples at the start, where those of the training samples
                were given; "network" and constants are found again.

        Returns:
            ``(T, M, ...)`` in the dtype of the cross kernel. Cost: one product with a block of a column for
            each time and right-hand side; in float32 twice as many, so that large a(t) keep their digits.

        Raises:
            InputError: If an offset is missing or too many.
            ShapeError: If the cross kernel or the offset does not fit.
            DtypeError: If its dtype is not that of the kernel.
            StaleOperatorError: If it belongs to another snapshot of the network.
            NonFiniteError: If it holds NaN or infinity.
        """
        problem, layout = self._problem, self._problem.layout
        cross = self._read_cross(K_cross)
        start = self._offset_at(cross, offset)
        columns = self._columns()  # (T, *batch, n, k)
        count, width = len(columns), columns.shape[-1]
        wide = columns.movedim(0, -1).flatten(-2)  # (*batch, n, k T)
        found = precise_product(cross, wide)[0].unflatten(-1, (width, count)).movedim(-1, 0)
        values = torch.stack([layout.restore(part) for part in found])
        return (values if start is None else values + start).to(problem.dtype)

    def test_bound(self, diagonal: Tensor) -> Tensor:
        """Return bounds of the errors of `predict`: √k(x*, x*) times the bound of the weights.

        Args:
            diagonal: k(x*, x*), as ``ntkops.ntk(model, x_new, ...).diagonal()`` gives it: ``(M,)``, ``(C,
                M)`` for a kernel a class, ``(M·O,)`` for all outputs.

        Returns:
            ``(T, M, ...)``, float64, in the shape of the predictions.

        Raises:
            ShapeError: If it does not fit.
            InputError: If an entry is negative.
            NonFiniteError: If an entry is NaN or infinite.
        """
        problem, layout = self._problem, self._problem.layout
        entries = require_finite(torch.as_tensor(diagonal).detach().double(), "the diagonal")
        batch = tuple(problem.rhs.shape[:-2])
        if (
            entries.dim() != len(batch) + 1
            or tuple(entries.shape[:-1]) != batch
            or len(entries.reshape(-1)) % layout.group
        ):
            raise ShapeError(
                f"the diagonal has shape {tuple(entries.shape)}: pass that of the kernel of the new samples, "
                "ntkops.ntk(model, x_new, ...).diagonal(), made as the kernel of training was"
            )
        if bool((entries < 0).any()):
            raise InputError(f"a kernel's diagonal has no negative entries, this one has {entries.min():.3g}")
        roots = entries.sqrt().unsqueeze(-1)  # (*batch, M, 1)
        bounds = self._column_bounds.unsqueeze(-2)  # (T, *batch, 1, k)
        found = torch.where(roots == 0, 0.0, roots * bounds)
        return torch.stack([layout.restore(part) for part in found])

    def weights(self, t: float) -> dict[str, Tensor]:
        """Return the change of the parameters, Δθ = Jᵀ a(t).

        Args:
            t: One of the times.

        Returns:
            A tensor for each selected parameter by its name, as `ntkops.KernelRidge.weights` has them: behind
            a leading axis where outputs share no kernel, or targets share one, which are as many networks.
            Cost: one vjp a target.

        Raises:
            InputError: If it is none of the times.
            UnsupportedOperationError: If the kernel does not know its Jacobian, or is traced over outputs and
                has several targets.
        """
        columns = self._columns()[self._place(t)]
        return ParameterChange.of(self._problem.K, columns, self._problem.layout).named()

    def ensemble(self, prior: LinearOperator | Tensor, K_cross: LinearOperator | Tensor) -> Gaussian:
        r"""Return what an infinite ensemble predicts, whose members start from f₀ ~ N(0, Σ) and train alike.

        Training is linear in f₀: with :math:`B_t = K_* q_t(K)` the outputs at new samples are
        :math:`f_0^* + B_t (Y - f_0)`, Gaussian with mean :math:`B_t Y` and covariance
        :math:`[I, -B_t] \Sigma [I, -B_t]^\top`.

        Args:
            prior: Σ over the new samples, then those of training, ``(*batch, M + n, M + n)``: an
                `ntkops.nngp`, or J D Jᵀ for the NTK-GP, at ``torch.cat([x_new, x])``.
            K_cross: As for `predict`.

        Returns:
            `Gaussian`: mean at once, covariances lazily.

        Raises:
            InputError: If training did not start from zero, or not with the squared error.
            ShapeError: If the operators do not fit.
            DtypeError: If their dtypes differ.
            StaleOperatorError: If the cross kernel belongs to another snapshot.
            NonFiniteError: If one of them holds NaN or infinity.
        """
        if self._filters is None:
            raise InputError("an ensemble is Gaussian where training is linear: use loss='mse'")
        if self._problem.offset.kind != "zero":
            raise InputError("the members start from draws of the prior: train with offset=None")
        cross = self._read_cross(K_cross)
        sigma = read_kernel(prior, "the prior", self._problem.dtype)
        return gaussian(
            self._problem, self._filters, self.times, self.predict(cross), sigma, cross, self._tolerance
        )

    # parts

    def _columns(self) -> Tensor:
        """Return the dual as right-hand sides, ``(T, *batch, n, k)``."""
        return torch.stack([self._problem.layout.columns(part) for part in self.dual])

    def _place(self, t: float) -> int:
        if isinstance(t, bool) or not isinstance(t, int | float):
            raise InputError(f"t={t!r}: pass one of the times")
        for place, known in enumerate(self.times.tolist()):
            if known == t or math.isclose(known, t, rel_tol=1e-12):
                return place
        raise InputError(f"t={t!r} is none of the times of this trajectory: {self.times.tolist()}")

    def _read_cross(self, K_cross: Any) -> Any:
        problem = self._problem
        cross = read_kernel(K_cross, "the cross kernel", problem.dtype)
        if not capabilities(cross).space.is_spread:
            problem.layout.check_rows(cross.shape, problem.K.shape[-1])
        if cross.dtype != problem.dtype:
            raise DtypeError(
                f"training had a kernel of dtype {problem.dtype}, the cross kernel {cross.dtype}; cast one"
            )
        require_same_snapshot(problem.K, cross)
        return cross

    def _offset_at(self, cross: Any, given: Tensor | None) -> Tensor | None:
        problem, layout = self._problem, self._problem.layout
        samples = cross.shape[-2] // layout.group
        if problem.offset.kind != "given":
            if given is not None:
                raise InputError(
                    "predict was given outputs at the start, but training was not: pass offset=f_x there, too"
                )
            return problem.offset.at(cross, layout, samples)
        if given is None:
            raise InputError(
                "training was given the outputs at the start; give predict those at the new samples: "
                "offset=f_new"
            )
        values = torch.as_tensor(given).detach()
        if tuple(values.shape) != (samples, *layout.tail):
            raise ShapeError(f"the offset has shape {tuple(values.shape)}, due is {(samples, *layout.tail)}")
        return require_finite(values, "the offset").double()
