"""Laplace's approximation of a network that is linearised at its weights, on the side of its outputs."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Iterator, Sized
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import torch
from linear_operator.operators import LinearOperator, to_linear_operator
from torch import Tensor

from ..arguments import check_arguments
from ..curvature.losses import Loss, loss_with_targets, read_loss, require_outputs
from ..engines import count_passes
from ..errors import DtypeError, InputError, ShapeError, SingularKernelError, UnsupportedOperationError
from ..estimators import logdet
from ..operators import NTKOperator
from ..operators.capabilities import capabilities, multiply
from ..operators.sandwich import Sandwich, sandwich
from ..results import Estimate, SolveInfo
from ._evidence import Evidence, read_positive
from ._mode import Likelihood, differentiable_evidence, find_mode
from ._operands import Layout, is_spread, may_be_dense, read_kernel
from ._parameters import Parameters, not_fitted
from ._posterior import (
    PosteriorCovariance,
    posterior_variance,
    prior_variances,
    read_cross,
    read_prior,
    require_choice,
)
from ._snapshots import network_labels, network_outputs, row_axis
from .kernel_ridge import KernelRidge

if TYPE_CHECKING:
    from ..model.accepted import ArrayLike, LossLike

__all__ = ["LinearizedLaplace"]


class LinearizedLaplace(Parameters):
    r"""The Laplace approximation of a linearised network, from its kernel alone.

    Weights have the prior :math:`N(\mu, \delta^{-1} I)`, and outputs the likelihood :math:`e^{-\ell}`. With S
    Sᵀ the Hessian of :math:`\ell` in the outputs, which is block diagonal, the network linearised at its
    weights has the posterior covariance

    .. math:: \tfrac{1}{\delta} K_{**} - C (I + A / \delta)^{-1} C^\top, \qquad
              C = \tfrac{1}{\delta} K_* S, \quad A = S^\top K S,

    at new samples. It is that of the generalised Gauss-Newton matrix :math:`J^\top S S^\top J + \delta I` in
    the parameters, without a matrix of P x P. No Hessian is inverted, so that saturated classes are as good
    as any.

    Args:
        prior_precision: δ > 0. For one precision a parameter take K = J D Jᵀ, with D the variances:
            ``ntkops.sandwich(J, variances)``.
        loss: "cross_entropy" of classes on the last axis; "mse" for labels with normal noise of deviation
            ``noise_scale``; or the negative log-likelihood of one sample, ``(outputs, targets) -> ()``,
            convex in the outputs.
        noise_scale: σ > 0, for "mse".
        prior_mean: μ, which the evidence depends on and covariances do not: "zero"; or "network" for the
            weights of the network, as `KernelRidge` with an offset has it.

    Attributes:
        log_likelihood_: log p(Y | f) at the network's outputs.
        method_: How A + δ was solved: a method of `KernelRidge`.
        solve_info_: `SolveInfo` of `KernelRidge` on A.
        n_features_in_: Rows n of the kernel.

    Cost: of `fit` a `KernelRidge` with one target on the kernel A of n = N·O rows. Where P is below n its
    features are used, P x P.

    References:
        Immer, Korzepa, Bauer, Improving predictions of Bayesian neural nets via local linearization (2021);
        Immer et al., Scalable marginal likelihood estimation for model selection in deep learning (2021).

    Example:
        >>> import torch, ntkops
        >>> _ = torch.manual_seed(0)
        >>> layers = torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3)
        >>> model = torch.nn.Sequential(*layers).double()
        >>> x, x_new = torch.randn(20, 2).double(), 5 * torch.randn(4, 2).double()
        >>> K = ntkops.ntk(model, x)
        >>> post = ntkops.LinearizedLaplace().fit(K, x.argmax(-1))
        >>> new = ntkops.ntk(model, x_new)
        >>> logits, std = post.predict(K.cross(x_new), prior=new, return_std=True)
        >>> bool(torch.equal(logits, model(x_new))), std.shape
        (True, torch.Size([4, 3]))
        >>> delta = torch.tensor(1.0, requires_grad=True)
        >>> post.log_marginal_likelihood(delta).value.backward()
        >>> bool(delta.grad.isfinite())
        True
    """

    log_likelihood_: float
    method_: str
    solve_info_: SolveInfo
    n_features_in_: int

    def __init__(
        self,
        prior_precision: float = 1.0,
        loss: LossLike = "cross_entropy",
        *,
        noise_scale: float = 1.0,
        prior_mean: Literal["zero", "network"] = "zero",
    ) -> None:
        self.prior_precision = prior_precision
        self.loss = loss
        self.noise_scale = noise_scale
        self.prior_mean = prior_mean

    # fitting

    def fit(
        self, K: LinearOperator | Tensor, Y: ArrayLike, *, offset: Tensor | Literal["network"] = "network"
    ) -> Self:
        """Take the curvature of the likelihood at the outputs of a network.

        Args:
            K: Square kernel over samples and outputs, ``(N·O, N·O)``, ``ntkops.ntk(model, x)``: Hessians
                couple the outputs of a sample.
            Y: Labels: class numbers ``(N,)`` or probabilities ``(N, C)`` for "cross_entropy", numbers in the
                shape of the outputs for "mse", whatever a loss of your own takes.
            offset: Outputs f(X) of the network, ``(N, ...)``; "network" evaluates it at the kernel's rows.

        Returns:
            The approximation itself.

        Raises:
            InputError: If an option is not understood, targets are missing, or the loss is not convex in the
                outputs of a sample.
            ShapeError: If kernel, labels and outputs do not fit.
            DtypeError: If dtypes do not fit.
            NonFiniteError: If one of them holds NaN or infinity.
            OutOfRangeError: If a class does not exist.
            SingularKernelError: If the prior precision is lost in the rounding of A.
            DenseMemoryError: If a method needs a dense kernel that the operator refuses.
            NotConvergedError: If conjugate gradients end above their tolerance.
            UnsupportedOperationError: If the kernel is traced over outputs, or its rows lie on several ranks.
        """
        check_arguments(type(self).__init__, self.get_params())
        precision = float(read_positive(self.prior_precision, "prior_precision"))
        noise = float(read_positive(self.noise_scale, "noise_scale"))
        if self.prior_mean not in ("zero", "network"):
            raise InputError(f"prior_mean={self.prior_mean!r}: 'zero' or 'network'")
        kind = read_loss(self.loss)
        K = read_kernel(K)
        if is_spread(K):
            raise UnsupportedOperationError("the rows of the kernel lie on several ranks: take one process")
        if K.dim() != 2 or not capabilities(K).space.matches(capabilities(K).domain):
            raise ShapeError(
                f"fit takes one square kernel over samples and outputs, this one is {tuple(K.shape)}: "
                "ntkops.ntk(model, x) with outputs='all', since Hessians couple the outputs of a sample"
            )
        if kind == "cross_entropy":
            _require_classes_last(K)
        outputs = self._outputs(K, Y, offset)
        if outputs.dtype != K.dtype:
            raise DtypeError(f"the kernel has dtype {K.dtype}, the outputs {outputs.dtype}; cast one of them")
        if Y is None:
            raise InputError("the curvature is that of a likelihood, and Y is None: pass the labels")
        loss = loss_with_targets(self.loss, outputs, Y, needed=True)
        self._scale = 0.5 / noise**2 if kind == "mse" else 1.0
        constant = outputs.numel() * math.log(noise * math.sqrt(2 * math.pi)) if kind == "mse" else 0.0
        self._factor = loss.hessian_factor(outputs, self._scale)
        # A + δ is a kernel with a ridge, and C its cross kernel: all routes of the regression are ours.
        self._A = sandwich(self._factor.mT, K)
        self._inner = KernelRidge(precision, relative=False)
        with _as_precision():
            self._inner.fit(self._A, torch.zeros(K.shape[-1], dtype=K.dtype, device=K.device))
        self._K, self._loss, self._precision = K, loss, precision
        self._center = self.prior_mean
        self._constant = constant
        self._layout = Layout("flat", tuple(outputs.shape[1:]))
        self._outputs_, self._is_network = outputs, isinstance(offset, str)
        self._evidence: Evidence | None = None
        self.log_likelihood_ = -self._scale * _total(loss, outputs) - constant
        self.method_, self.solve_info_ = self._inner.method_, self._inner.solve_info_
        self.n_features_in_ = K.shape[-1]
        return self

    @staticmethod
    def _outputs(K: Any, Y: Any, offset: Any) -> Tensor:
        """Return the outputs at the rows of the kernel, ``(N, *tail)``."""
        if offset is None:
            raise InputError(
                "the approximation expands around the outputs of a network: offset='network', or the outputs "
                "f(X); for a process around zero see KernelRidge"
            )
        if isinstance(offset, str):
            if offset != "network":
                raise InputError(f"offset={offset!r}: 'network', or the outputs f(X)")
            return require_outputs(_network_outputs(K, Y))
        outputs = require_outputs(torch.as_tensor(offset)).clone()  # the evidence is asked for later
        if outputs.numel() != K.shape[-1]:
            raise ShapeError(
                f"outputs of shape {tuple(outputs.shape)} beside a kernel of {K.shape[-1]} rows: one row for "
                "each output of each sample is needed, ntkops.ntk(model, x) with outputs='all'"
            )
        return outputs

    # predicting

    @overload
    def predict(
        self,
        K_cross: LinearOperator | Tensor,
        *,
        offset: Tensor | None = None,
        prior: None = None,
        return_std: Literal[False] = False,
        return_cov: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def predict(
        self,
        K_cross: LinearOperator | Tensor,
        *,
        offset: Tensor | None = None,
        prior: LinearOperator | Tensor,
        return_std: Literal[True],
        return_cov: Literal[False] = False,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def predict(
        self,
        K_cross: LinearOperator | Tensor,
        *,
        offset: Tensor | None = None,
        prior: LinearOperator | Tensor,
        return_std: Literal[False] = False,
        return_cov: Literal[True],
    ) -> tuple[Tensor, PosteriorCovariance]: ...

    def predict(
        self,
        K_cross: LinearOperator | Tensor,
        *,
        offset: Tensor | None = None,
        prior: LinearOperator | Tensor | None = None,
        return_std: bool = False,
        return_cov: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor | PosteriorCovariance]:
        """Return the network's outputs at new samples, and what the posterior leaves open about them.

        Args:
            K_cross: Kernel between new samples (rows) and those of the fit, ``K.cross(x_new)``.
            offset: ``(M, ...)`` outputs f(x*), where `fit` was given f(X); "network" is evaluated again.
            prior: Kernel of the new samples with themselves, ``ntkops.ntk(model, x_new)``, for
                ``return_std`` and ``return_cov``.
            return_std: Return standard deviations of the outputs too.
            return_cov: Return their joint covariance too, as a lazy operator.

        Returns:
            ``(M, ...)`` outputs; with ``return_std`` also deviations of that shape; with ``return_cov`` a
            `PosteriorCovariance` ``(M·O, M·O)``, sample-major. For "mse" a new label has the variance
            ``std**2 + noise_scale**2``. Cost: as for `KernelRidge.predict`, with K_* S for K_*.

        Raises:
            NotFittedError: If nothing is fitted.
            InputError: If the outputs or the prior are missing or too many, or the prior is that of other
                samples.
            ShapeError: If the cross kernel or the prior does not fit.
            DtypeError: If their dtype is not that of the fit.
            StaleOperatorError: If one belongs to another snapshot of the network.
            NonFiniteError: If one holds NaN or infinity.
        """
        self._require_fit()
        require_choice(prior, return_std, return_cov)
        K_cross = read_cross(K_cross, self._K, self._layout)
        shape = (K_cross.shape[-2] // self._layout.group, *self._layout.tail)
        mean = self._outputs_at(K_cross, shape, offset)
        if prior is None:
            return mean
        K_new = read_prior(prior, self._K, K_cross)
        C = Sandwich(to_linear_operator(K_cross), self._factor)
        share = 1e-6 + 10 * self._inner.tol + self._rounding()
        fit = self._inner._fit
        if return_cov:
            factor = 1 / self._precision
            return mean, PosteriorCovariance(K_new, C, C, fit=fit, factor=factor, share=share)
        variances = posterior_variance(fit, C, prior_variances(K_new), share) / self._precision
        return mean, self._layout.restore_rows(variances.sqrt()).to(mean.dtype)

    def _rounding(self) -> float:
        """Return the share of a prior variance by which rounding in A can move the posterior one."""
        # As for a regression: an error E of A moves kᵀ (A + δ)⁻¹ k by |E| k(x*, x*) / (4 δ) at most.
        eps = torch.finfo(self._K.dtype).eps
        trace = float(prior_variances(self._A).sum())
        return eps * trace / (4 * self._precision)

    def _outputs_at(self, K_cross: LinearOperator | Tensor, shape: tuple[int, ...], given: Any) -> Tensor:
        if self._is_network and given is None:
            return network_labels(K_cross, self._layout, shape)
        if self._is_network:
            raise InputError(
                "predict was given outputs, but fit evaluated the network: pass them to fit, too"
            )
        if given is None:
            raise InputError(
                "fit was given the network's outputs; give predict those at the new samples: offset=f_new"
            )
        values = require_outputs(torch.as_tensor(given))
        if tuple(values.shape) != shape:
            raise ShapeError(f"the outputs have shape {tuple(values.shape)}, due is {shape}")
        if values.dtype != self._K.dtype:
            raise DtypeError(f"the kernel has dtype {self._K.dtype}, the outputs {values.dtype}; cast one")
        return values

    def _require_fit(self) -> None:
        if not hasattr(self, "n_features_in_"):
            raise not_fitted("this LinearizedLaplace is not fitted yet: call fit(K, Y) first")

    # the evidence

    def log_marginal_likelihood(
        self,
        prior_precision: float | Tensor | None = None,
        at: Literal["plug-in", "mode"] = "plug-in",
    ) -> Estimate:
        r"""Return Laplace's approximation of log p(Y), for any prior precision.

        .. math:: \log p(Y | f) - \tfrac{\delta}{2} |\theta - \mu|^2 - \tfrac12 \log|I + A / \delta|

        at the network's own weights ("plug-in", the value of laplace-torch), or at the mode of the linearised
        network under this prior, with A there ("mode"). Where the network was trained to the end with weight
        decay δ the two agree. For "mse" the mode is exact, and no plug-in exceeds it. With ``prior_mean=
        "network"`` the plug-in has no second term and grows with δ: choose δ by the mode then.

        Args:
            prior_precision: δ, a number or a tensor ``()``; None for that of the fit.
            at: "plug-in" or "mode".

        Returns:
            `Estimate`, exact where eigenvalues of A are at hand, from one eigendecomposition that is kept;
            then differentiable in δ, at the mode up to third order. Else `ntkops.logdet` has the determinant,
            exactly or with its interval. Cost at the mode: a factorisation of A for each of some ten Newton
            steps, by conjugate gradients above 5000 rows.

        Raises:
            NotFittedError: If nothing is fitted.
            InputError: If an option is not understood.
            SingularKernelError: If δ is lost in the rounding of A.
            UnsupportedOperationError: If the weights are needed and the kernel is not that of one network;
                or an estimate is to be differentiated.
            NotConvergedError: If the mode is not reached.
        """
        started = time.perf_counter()
        self._require_fit()
        if at not in ("plug-in", "mode"):
            raise InputError(f"at={at!r}: 'plug-in' or 'mode'")
        given = self._precision if prior_precision is None else prior_precision
        delta = read_positive(given, "prior_precision").to(self._K.device)
        with count_passes() as counter:
            found = self._at_mode(delta) if at == "mode" else self._plug_in(delta)
        seconds = time.perf_counter() - started
        if isinstance(found, Estimate):
            return dataclasses.replace(found, passes=counter.total, seconds=seconds)
        return Estimate.of_exact(found, passes=counter.total, seconds=seconds)

    def _plug_in(self, delta: Tensor) -> Tensor | Estimate:
        scatter = 0.0 if self._center == "network" else float(self._weights()[1].double().square().sum())
        if self._evidence is None:
            with _as_precision():
                self._evidence = self._inner._fit.evidence(self._A)
        outside = self.log_likelihood_ - scatter / 2 * delta
        return self._with_determinant(outside, self._A, self._evidence, delta)

    def _at_mode(self, delta: Tensor) -> Tensor | Estimate:
        start = self._outputs_.double().flatten()
        if self._center == "zero":  # the prior is around θ = 0, where the linearised outputs are f - J θ
            J, weights = self._weights()
            start = start - multiply(J, weights.unsqueeze(-1)).squeeze(-1).double()
        likelihood = Likelihood(self._loss, self._scale, tuple(self._outputs_.shape))
        with _as_precision():
            mode = find_mode(self._K, likelihood, start, float(delta.detach()))
        if delta.requires_grad:
            if not may_be_dense(self._K):
                raise UnsupportedOperationError(_NO_GRADIENT)
            return differentiable_evidence(self._K, likelihood, start, mode.dual, delta) - self._constant
        factor = likelihood.loss.hessian_factor(mode.outputs.reshape(likelihood.shape), self._scale)
        A = sandwich(factor.to(dtype=self._K.dtype).mT, self._K)
        inner = KernelRidge(float(delta), relative=False)
        with _as_precision():
            inner.fit(A, torch.zeros(A.shape[-1], dtype=A.dtype, device=A.device))
            evidence = inner._fit.evidence(A)
        return self._with_determinant(-mode.value - self._constant, A, evidence, delta)

    def _with_determinant(
        self, rest: Tensor, A: LinearOperator, evidence: Evidence | None, delta: Tensor
    ) -> Tensor | Estimate:
        """Return rest - ½ log|I + A/δ|, from the eigenvalues of A or by an estimate."""
        if evidence is not None:
            with _as_precision():
                evidence.require_resolved(delta)
            return rest - torch.log1p(evidence.values.clamp(min=0) / delta).sum() / 2
        if delta.requires_grad:
            raise UnsupportedOperationError(_NO_GRADIENT)
        # Half a nat: evidence is not read more finely than that.
        return logdet(A, float(delta), atol=1.0) * -0.5 + (rest + A.shape[-1] / 2 * delta.log())

    def _weights(self) -> tuple[LinearOperator, Tensor]:
        """Return J and the weights θ, ``(P,)``, of the kernel's network."""
        K = self._K
        if not isinstance(K, NTKOperator):
            raise UnsupportedOperationError(
                f"a prior around zero needs the weights, and a {type(K).__name__} does not name those of one "
                "network, nor does J D Jᵀ, a precision for each weight: take prior_mean='network' and "
                "at='mode', or fit the kernel that ntkops.ntk(model, x) returns, with one precision for all "
                "weights"
            )
        weights = torch.cat([part.detach().flatten() for part in K._args])
        return K.left, weights


_NO_GRADIENT = (
    "eigenvalues of A are out of reach here, and an estimate of the determinant has no gradient: fit a "
    "kernel that may be dense, or pass a number"
)


def _total(loss: Loss, outputs: Tensor) -> float:
    wide = outputs.double()
    return float(loss.value(wide)) * loss.terms(wide)


def _require_classes_last(K: LinearOperator | Tensor) -> None:
    """Raise where the rows of a kernel say that their classes are not on the last axis.

    Raises:
        InputError: If an axis before the last one is called "class".
    """
    axis = row_axis(K)
    names = [] if axis is None else [name for name, _ in axis.labels]
    if "class" in names[:-1]:
        raise InputError(
            f"loss='cross_entropy' takes the classes from the last axis of the outputs, and the axes of this "
            f"kernel are {tuple(names)}: put it last when the kernel is made, as in ntkops.ntk(model, x, "
            f"output=lambda f: f.movedim({names.index('class') + 1}, -1))"
        )


def _network_outputs(K: LinearOperator | Tensor, Y: Any) -> Tensor:
    """Return what the network says at the rows of a kernel, ``(N, *tail)``."""
    rows = network_outputs(K)
    axis = row_axis(K)
    assert axis is not None
    inputs = axis.inputs
    if axis.pick is None and len(rows) == inputs.num_rows:  # samples; nodes; or positions, of unlike length
        alone = not inputs.is_coupled and inputs.lengths is None
        return rows.reshape(-1, *inputs.output_shape[0 if alone else 1 :])
    # Some outputs, or some samples: the labels say how many samples there are.
    count = len(Y) if isinstance(Y, Sized) and len(Y) else 1
    if len(rows) % count:
        raise ShapeError(f"{count} labels do not fit the {len(rows)} rows of the kernel")
    return rows if len(rows) == count else rows.reshape(count, -1)


@contextlib.contextmanager
def _as_precision() -> Iterator[None]:
    """Say of a ridge that is lost in rounding that it is the prior precision."""
    try:
        yield
    except SingularKernelError as error:
        raise SingularKernelError(
            f"the prior precision is the ridge of A = Sᵀ K S, the curvature in the outputs: {error}"
        ) from error
