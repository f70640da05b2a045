"""Kernel ridge regression with tangent kernels, lazy or dense."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..arguments import check_arguments
from ..engines import count_passes
from ..errors import DtypeError, InputError, ShapeError, StaleOperatorError, UnsupportedOperationError
from ..estimators import logdet
from ..model.watch import Watch
from ..operators.capabilities import capabilities
from ..results import Estimate, LeaveOneOut, RidgePath, SolveInfo
from ._evidence import Evidence, log_evidence, read_positive, require_energy
from ._fits import Fit
from ._operands import (
    Layout,
    check_cutoff,
    is_spread,
    mean_diagonal,
    read_kernel,
    read_labels,
    read_ridges,
    require_finite,
)
from ._parameter_space import parameter_change
from ._parameters import Parameters, not_fitted
from ._posterior import (
    PosteriorCovariance,
    posterior_variance,
    prior_variances,
    read_cross,
    read_prior,
    require_choice,
    rounding_share,
)
from ._rounding import added_share
from ._routes import IterativeFit, Problem, choose, solve
from ._snapshots import has_unlike_lengths, network_labels
from ._weighted import WeightedFit, read_weights, weighted
from .leave_out import GroupLeaveOut, leave_out
from .metrics import accuracy, r2_score
from .predictor import Offset, Predictor

if TYPE_CHECKING:
    from ..model.accepted import ArrayLike, OffsetLike

__all__ = ["KernelRidge"]

_TOP = 100.0  # largest ridge that its evidence is asked for, relative to the mean diagonal

Method = Literal["auto", "cg", "eigh", "cholesky", "lsmr", "nystrom", "features"]


class KernelRidge(Parameters):
    r"""Kernel ridge regression, :math:`f(x_*) = K_{*X} (K_{XX} + r I)^{-1} Y`.

    With the network's own outputs as labels it is the kernel's picture of the network; with labels minus
    outputs and ``offset`` it is the network linearised at its parameters and trained to the end with weight
    decay. Labels are numbers, never class indices.

    Shapes:
        * K ``(N, N)`` with Y ``(N,)`` or ``(N, ...)``: one kernel shared by all targets.
        * K ``(C, N, N)`` with Y ``(N, C)``: one kernel for each target (``outputs="each"``).
        * K ``(N·O, N·O)`` with Y ``(N, ...)`` of N·O entries: samples and outputs flattened sample-major, as
          ``outputs="all"`` has them.

    Dense factorisations run in float64 whatever the kernel's dtype, and so do products with stored kernels;
    predictions have the kernel's dtype. A ridge that is lost in the kernel's rounding is refused.

    Args:
        ridge: r ≥ 0; several of them, or "loo" for a grid from 1e-10 to 100, from which the closed-form
            leave-one-out error over all targets chooses one; or "evidence" for the ridge between the least
            that means something and 100 whose `log_marginal_likelihood` is the largest, over all targets
            and classes with one scale.
        relative: Whether ridges are multiples of the mean diagonal of K, over all classes; False for
            absolute ones.
        method: "cholesky"; "eigh" (several ridges, cut-offs); "features" (K = F Fᵀ with known F, by its
            singular values: cheap when F has fewer columns than rows); "nystrom" (all labels, coefficients
            on the ``inducing`` samples alone); "cg" (products with K alone); "lsmr" (products with J and Jᵀ,
            for small ridges); or "auto": features where they are few, a factorisation up to 5000 rows,
            else "cg".
        offset: What the regression is added to: None; "network", the network's outputs at the kernel's rows;
            or a number or tensor that broadcasts to the labels of one sample. Outputs of your own go to `fit`
            and `predict`.
        cutoff: Spectral cut-off: the number r of leading eigenpairs, or the share ε of the trace to lose.
            :math:`\alpha = U_r (S_r + r I)^{-1} U_r^\top Y`, and the whole kernel at new samples.
        inducing: For "nystrom": a number of samples to draw, or their positions. For other inducing inputs
            and rules fit ``ntkops.operators.nystrom_ntk(K, ...)`` and predict from its `cross`.
        tol: Largest true relative residual of any column: "cg" and "lsmr" go on until it is met, the
            others warn where rounding does not allow it.
        max_products: Most product columns of an iteration; None for the solver's own limit.
        generator: CPU generator of random choices; None draws a seed from the operating system.

    Attributes:
        dual_coef_: α in the shape of Y, float64 whatever the kernel's dtype: rounded to float32 it would lose
            up to the condition number times 6e-8.
        ridge_: The absolute ridge r in use, a float.
        scale_: The mean diagonal that ridges are multiples of; 1 for absolute ones.
        noise_scale_: Standard deviation of the labels' noise, s √r, with the s of `log_marginal_likelihood`.
        ridge_path_: `RidgePath` of the ridges that were compared; None where one was given.
        method_: The method in use.
        solve_info_: `SolveInfo`, with the true relative residual of every column of ``dual_coef_``.
        n_features_in_: Rows n of a kernel.

    Raises:
        InputError: In `fit`, if an option is not understood, or labels are integers.

    Cost: one dense n × n kernel and n³/3 operations for "cholesky", some 10 n³ for "eigh", n k² for
    "features", n m² for "nystrom"; for "cg" and "lsmr" a product a step, one column for each target.

    References:
        Distilled NTK paper, equations (16) to (19); Rasmussen and Williams, Gaussian Processes for Machine
        Learning (2006), equations (2.25), (2.26) and (5.12).

    Example:
        >>> import torch, ntkops
        >>> from ntkops.regression import KernelRidge
        >>> _ = torch.manual_seed(0)
        >>> layers = torch.nn.Linear(3, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2)
        >>> network = torch.nn.Sequential(*layers).double()
        >>> x, x_new = torch.randn(20, 3).double(), torch.randn(5, 3).double()
        >>> K = ntkops.ntk(network, x)
        >>> fitted = KernelRidge(1e-8).fit(K, network(x).detach())
        >>> predictions = fitted.predict(K.cross(x_new))
        >>> predictions.shape, fitted.method_, fitted.solve_info_.converged
        (torch.Size([5, 2]), 'cholesky', True)
        >>> bool((fitted.predict(K) - network(x)).abs().max() < 1e-5)
        True
    """

    dual_coef_: Tensor
    ridge_: float
    scale_: float
    ridge_path_: RidgePath | None
    method_: str
    _watch: Watch | None = None
    solve_info_: SolveInfo
    n_features_in_: int

    def __init__(
        self,
        ridge: float | Sequence[float] | Literal["loo", "evidence"] = 1e-4,
        relative: bool = True,
        method: Method = "auto",
        offset: OffsetLike = None,
        *,
        cutoff: int | float | None = None,
        inducing: int | Tensor | None = None,
        tol: float = 1e-6,
        max_products: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.ridge = ridge
        self.relative = relative
        self.method = method
        self.offset = offset
        self.cutoff = cutoff
        self.inducing = inducing
        self.tol = tol
        self.max_products = max_products
        self.generator = generator

    # fitting

    def fit(
        self,
        K: LinearOperator | Tensor,
        Y: Tensor,
        *,
        offset: Tensor | None = None,
        sample_weight: ArrayLike | None = None,
    ) -> Self:
        """Solve (K + r) α = Y - offset, or (K + r / w) α = Y - offset.

        Args:
            K: Square kernel of the training samples: an operator, a tensor or an array.
            Y: Labels in the kernel's dtype, one row for each sample; see the shapes above. Arrays and lists
                of other floating dtypes are cast.
            offset: Outputs f(X) to which the regression is added, in the shape of Y; overrides the
                constructor's, and asks `predict` for the outputs at the new samples.
            sample_weight: ``(N,)`` positive weights w of the samples' squared errors: sample i has the ridge
                r / w_i, so that a weight of 2 is the sample twice. Those of `ntkops.distill.select_inputs`
                have the mean 1. Errors that choose a ridge, and ``solve_info_``, are weighted; ridges stay
                relative to the diagonal of K.

        Returns:
            The regression itself.

        Raises:
            InputError: If an option is not understood, labels are missing or integers, or the kernel is not
                symmetric.
            ShapeError: If kernel, labels and offset do not fit.
            DtypeError: If dtypes of tensors differ, or an array holds what is no number.
            NonFiniteError: If one of them holds NaN or infinity.
            ZeroKernelError: If ridges are relative to a kernel of zeros.
            SingularKernelError: If the kernel is not positive semidefinite, or the smallest eigenvalue of
                K + r is below the rounding of K: with the smallest ridge that means something.
            DenseMemoryError: If the method needs a dense kernel that the operator refuses.
            NotConvergedError: If an iteration ended above ``tol``; it carries the partial result.

        Warns:
            NotConvergedWarning: If rounding kept a factorisation above ``tol``.
            RoundingWarning: If rounding of the kernel may move the fitted values by more than a tenth.
        """
        check_arguments(type(self).__init__, self.get_params())
        if not 0 < self.tol < 1:
            raise InputError(f"tol={self.tol!r}: pass a relative residual between 0 and 1")
        if self.max_products is not None and self.max_products < 1:
            raise InputError(
                f"max_products={self.max_products!r}: pass a positive number of products, or None"
            )
        K = read_kernel(K)
        space = capabilities(K).space
        if not space.matches(capabilities(K).domain):
            raise ShapeError(
                f"fit takes the square kernel of the training samples, this one is {tuple(K.shape)}; "
                "cross kernels "
                "go to predict"
            )
        ridges = read_ridges(self.ridge, ("loo", "evidence"))
        by_evidence = isinstance(self.ridge, str) and self.ridge == "evidence"
        check_cutoff(self.cutoff, space.size)
        if by_evidence and self.cutoff is not None:
            raise InputError("ridge='evidence': a spectral cut-off is no Gaussian process; leave cutoff= out")
        layout, labels = read_labels(Y, K.shape, K.dtype, K.device, space if is_spread(K) else None)
        if layout.kind == "flat" and has_unlike_lengths(K):
            raise ShapeError(
                f"samples differ in length, so that labels of shape {tuple(labels.shape)} cannot be theirs: "
                f"they have one row for each of the {space.size} rows of the kernel, as K.offsets counts them"
            )
        base = self._offset_at(K, layout, labels.shape[0], offset, fitting=True)
        residual = labels if base is None else labels - base
        mean = mean_diagonal(K) if self.relative or by_evidence else 1.0
        scale = mean if self.relative else 1.0
        if by_evidence:
            require_energy(residual)
            ridges = (_TOP * mean / scale,)
        problem = Problem(
            K=K,
            rhs=layout.columns(residual.double()),
            scale=scale if self.relative else None,
            group=layout.group,
            ridges=tuple(ridge * scale for ridge in ridges),
            cutoff=self.cutoff,
            inducing=self.inducing,
            tol=self.tol,
            max_products=self.max_products,
            generator=self.generator,
            criterion="evidence" if by_evidence else "loo",
        )
        roots = None if sample_weight is None else read_weights(sample_weight, layout, K, len(labels))
        problem = problem if roots is None else weighted(problem, roots)
        method = choose(self.method, problem)
        solved = solve(method, problem)
        fit: Fit = solved.fit if roots is None else WeightedFit(solved.fit, roots)
        self._K, self._layout, self._labels, self._fit = K, layout, labels, fit
        self._watch = Watch.of("K", K) if isinstance(K, Tensor) and not K.is_inference() else None
        # The regression that was solved: on S K S where samples are weighted, with the ridge of each in it.
        self._problem, self._solved = problem, solved.fit
        self._evidence: Evidence | None = None
        self._log_weights = 0.0 if roots is None else float(roots.log().sum())
        self._explicit_offset = offset is not None
        self.method_, self.ridge_, self.scale_ = method, solved.ridge, scale
        self.ridge_path_ = None
        if solved.path is not None:
            ridges_, values = solved.path
            shift = self._shift() if by_evidence else 0.0
            self.ridge_path_ = self._path(ridges_, values + shift, scale, problem.criterion)
        self.solve_info_ = fit.info
        self._added = [0.0]  # predict changes no attribute, as scikit-learn has it
        self.n_features_in_ = K.shape[-1]
        self.dual_coef_ = layout.restore(fit.dual)
        return self

    @staticmethod
    def _path(
        ridges: Tensor, values: Tensor, scale: float, criterion: Literal["loo", "evidence"]
    ) -> RidgePath:
        best = values.argmin() if criterion == "loo" else values.argmax()
        return RidgePath(ridges, values, scale, int(best), criterion)

    # the offset

    def _offset_at(
        self, K: LinearOperator | Tensor, layout: Layout, samples: int, given: Any, *, fitting: bool
    ) -> Tensor | None:
        """Return the offset at the rows of a kernel, in the shape of the labels, or None."""
        if given is None and not fitting and self._explicit_offset:
            raise InputError(
                "fit was given the network's outputs; give predict those at the new samples: offset=f_new"
            )
        if given is not None and not fitting and not self._explicit_offset:
            raise InputError(
                "predict was given outputs to add, but fit subtracted none: pass fit(K, Y, offset=f_x)"
            )
        shape = (samples, *layout.tail)
        if given is not None:
            values = torch.as_tensor(given).detach()
            if tuple(values.shape) != shape:
                raise ShapeError(f"the offset has shape {tuple(values.shape)}, the labels need {shape}")
        elif self.offset is None:
            return None
        elif isinstance(self.offset, str):
            if self.offset != "network":
                raise InputError(f"offset={self.offset!r}: None, 'network', a number or a tensor")
            values = network_labels(K, layout, shape)
        else:
            values = torch.as_tensor(self.offset, dtype=K.dtype, device=K.device)
            try:
                values = values.expand(shape)
            except RuntimeError as error:
                raise ShapeError(
                    f"offset of shape {tuple(values.shape)} does not broadcast to labels of shape {shape}"
                ) from error
        if values.dtype != K.dtype:
            raise DtypeError(f"the kernel has dtype {K.dtype}, the offset {values.dtype}; cast one of them")
        return require_finite(values, "the offset")

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
        r"""Return f(x*) = offset + K_* α, and what the Gaussian process leaves open about it.

        The process is :math:`y \sim N(\text{offset}, s^2 (K + r I))`. Given the labels the noiseless function
        has the covariance :math:`s^2 (K_{**} - K_* (K + r I)^{-1} K_*^\top)`, with the scale of
        `log_marginal_likelihood`, so that deviations have the unit of Y whatever that of K is. New labels
        have the variance ``std**2 + fit.noise_scale_**2``.

        Args:
            K_cross: Kernel between new samples (rows) and those of the fit (columns), ``K.cross(x_new)``.
                Of an operator only products are taken: of a lazy float32 one 2 for each target, and 2 more.
            offset: Outputs f(x*) at the new samples, where `fit` was given those at the old.
            prior: Kernel of the new samples with themselves, ``ntkops.ntk(model, x_new)`` with the options
                of K, for ``return_std`` and ``return_cov``.
            return_std: Return standard deviations too. Cost: dense rows of the cross kernel in blocks of
                256, or products where that is forbidden, and n² operations for each.
            return_cov: Return the joint covariance too, as a lazy operator; ``.to_dense()`` where its
                ``max_dense_bytes`` allow it.

        Returns:
            ``(M, ...)``: the shape of Y with M new samples in front, the dtype of the cross kernel; an array
            for an array, as in scikit-learn. With ``return_std`` also deviations of that shape; with
            ``return_cov`` a `PosteriorCovariance` ``(M, M)`` that all targets share, ``(C, M, M)`` for one
            kernel a class, ``(M·O, M·O)`` for one over all outputs.

        Raises:
            NotFittedError: If nothing is fitted.
            InputError: If an offset or the prior is missing or too many, both kinds of uncertainty are
                asked for, or the prior is that of other samples.
            ShapeError: If the cross kernel or the prior does not fit.
            DtypeError: If their dtype is not that of the fit.
            StaleOperatorError: If one belongs to another snapshot of the network.
            NonFiniteError: If one holds NaN or infinity.
            UnsupportedOperationError: For uncertainties with a spectral cut-off, or over several ranks.

        Warns:
            RoundingWarning: If ``rounding_`` is above 1e-2.
        """
        require_choice(prior, return_std, return_cov)
        is_array = not isinstance(K_cross, LinearOperator | Tensor)
        K_cross = self._read_cross(K_cross)
        columns, added = self._fit.predict(K_cross)
        values = self._layout.restore(columns)
        base = self._offset_at(K_cross, self._layout, len(values), offset, fitting=False)
        values = values if base is None else values + base.double()
        self._added[0] = added_share(K_cross, columns, added)
        predictions: Any = values.to(K_cross.dtype)
        found = predictions.numpy() if is_array else predictions
        if prior is None:
            return found
        self._require_process("the uncertainty of predictions")
        self._read_again("the uncertainty of predictions")
        K_new = read_prior(prior, self._K, K_cross)
        scale = math.sqrt(self._scale_squared())
        if return_cov:
            share = self._rounding()
            return found, PosteriorCovariance(
                K_new, K_cross, K_cross, fit=self._fit, factor=scale**2, share=share
            )
        rows = posterior_variance(self._fit, K_cross, prior_variances(K_new), self._rounding())
        deviations = scale * self._layout.restore_rows(rows.sqrt())
        deviations = deviations.reshape(*deviations.shape, *(1,) * (values.dim() - deviations.dim()))
        spread: Any = deviations.expand(values.shape).to(K_cross.dtype)
        return found, spread.numpy() if is_array else spread

    @property
    def rounding_(self) -> float:
        """What rounding may have added in the last `predict`, relative to the length of a target.

        A bound that holds in 95 % of cases, of the worst target; 0 where entries of the cross kernel are
        stored, or its products run in float64.

        Raises:
            NotFittedError: If nothing is fitted.
        """
        self._require_fit()
        return self._added[0]

    def _read_cross(self, K_cross: Any) -> LinearOperator | Tensor:
        self._require_fit()
        return read_cross(K_cross, self._K, self._layout)

    def _require_fit(self) -> None:
        if not hasattr(self, "dual_coef_"):
            raise not_fitted("this KernelRidge is not fitted yet: call fit(K, Y) first")

    def __getstate__(self) -> dict[str, Any]:
        """Leave out what is known of a tensor's state in this process."""
        return {**self.__dict__, "_watch": None}

    def _require_unchanged(self, what: str) -> None:
        """Raise where the kernel is read again, and was written to since the fit."""
        if self._watch is not None and self._watch.changed:
            raise StaleOperatorError(
                f"{what} reads the kernel that was fitted, and K was changed in place since: fit again, or "
                "give fit a copy"
            )

    def _read_again(self, what: str) -> None:
        """Raise in the same case where products with the kernel are what the fit is made of."""
        if isinstance(self._solved, IterativeFit):
            self._require_unchanged(what)

    def _require_here(self, what: str) -> None:
        if is_spread(self._K):
            raise UnsupportedOperationError(
                f"{what} takes rows of the kernel one by one, and those of this fit lie on several ranks: "
                "use a kernel of one process"
            )

    def variance(self, K_cross: LinearOperator | Tensor, K_diag: Tensor) -> Tensor:
        r"""Return the posterior variance of the noiseless function.

        It is :math:`k_{**} - k_*^\top (K + r I)^{-1} k_*`: the Gaussian process with this kernel and noise
        of variance r. It does not depend on the labels, and has the unit of K; for deviations in the unit of
        the labels see `predict`. With a cut-off only the kept directions explain
        variance; "nystrom" gives the variance of its features plus the prior variance that they miss.

        Args:
            K_cross: As for `predict`. Dense in blocks of 256 rows, or taken by products where that is
                forbidden.
            K_diag: Prior variances K(x*, x*): ``(M,)``, ``(C, M)`` for a batch, ``(M·O,)`` for all outputs,
                as ``ntkops.ntk(model, x_new, ...).diagonal()`` returns them.

        Returns:
            ``(M,)`` for a shared kernel, ``(M, C)`` for one a class, ``(M, ...)`` as the labels for all
            outputs; the kernel's dtype, 0 where rounding would make it negative.

        Raises:
            NotFittedError: If nothing is fitted.
            InputError: If a variance is negative beyond rounding: the diagonal does not
                belong to these samples.
            ShapeError: If the arguments do not fit.
            DtypeError: If their dtype is not that of the fit.
            StaleOperatorError: If the cross kernel belongs to another snapshot of the network.
        """
        K_cross = self._read_cross(K_cross)
        prior = torch.as_tensor(K_diag).detach()
        if tuple(prior.shape) != tuple(K_cross.shape[:-1]):
            raise ShapeError(
                f"K_diag has shape {tuple(prior.shape)}, one entry for each row of the cross kernel is due: "
                f"{tuple(K_cross.shape[:-1])}"
            )
        require_finite(prior, "K_diag")
        self._require_here("the variance")
        self._read_again("the variance")
        values = posterior_variance(self._fit, K_cross, prior.double(), self._rounding())
        return self._layout.restore_rows(values).to(K_cross.dtype)

    def _rounding(self) -> float:
        """Return the share of a prior variance by which rounding in K can move the posterior one."""
        scale = self._prior_scale() if self.ridge_ > 0 else 0.0
        return rounding_share(self.n_features_in_, self._K.dtype, scale, self.ridge_, self.tol)

    def _prior_scale(self) -> float:
        return self.scale_ if self.relative else mean_diagonal(self._K)

    # the evidence

    def _require_process(self, what: str) -> None:
        self._require_here(what)
        if self._problem.cutoff is not None:
            raise UnsupportedOperationError(
                f"{what} is that of a Gaussian process, and a regression with a spectral cut-off is none: "
                "fit without cutoff=, or see `variance`"
            )

    def _scale_squared(self) -> float:
        return self._solved.energy() / self._problem.rhs.numel()

    @property
    def noise_scale_(self) -> float:
        """Standard deviation of the labels' noise in the process of `log_marginal_likelihood`: s √r.

        Raises:
            NotFittedError: If nothing is fitted.
            UnsupportedOperationError: With a spectral cut-off, or over several ranks.
        """
        self._require_fit()
        self._require_process("the scale of the noise")
        return math.sqrt(self._scale_squared() * self.ridge_)

    def log_marginal_likelihood(self, ridge: float | Tensor | None = None) -> Estimate:
        r"""Return the log evidence of a ridge, with the scale that explains the labels best.

        Labels minus offset, :math:`\tilde y`, are :math:`N(0, s^2 (K + r I))`, with one scale for all
        targets and classes, :math:`s^2 = \tilde y^\top (K + r I)^{-1} \tilde y / n`:

        .. math:: -\tfrac12 \left(n \log s^2 + \log|K + r I| + n + n \log 2\pi\right).

        n counts all labels, and a kernel that several targets share counts as often. In another unit of Y it
        shifts by a constant, so that the best ridge stays where it is.

        Args:
            ridge: Absolute, as ``ridge_``, a number or a tensor ``()``; None for ``ridge_``.

        Returns:
            `Estimate`, exact where the fit is dense, then differentiable in the ridge to any order: from one
            eigendecomposition, made at the first call and kept. For "cg" and "lsmr" `ntkops.logdet` gives
            the determinant, exactly or with its interval, which holds the error of the solve as well.

        Raises:
            NotFittedError: If nothing is fitted.
            InputError: If the ridge is no positive number, or all labels equal the offset.
            SingularKernelError: If it is lost in the rounding of the kernel.
            UnsupportedOperationError: With a spectral cut-off, over several ranks, or where an estimate is to
                be differentiated.

        References:
            Rasmussen and Williams (2006), equation (5.8), with the scale profiled out.

        Example:
            >>> import torch
            >>> from ntkops.regression import KernelRidge
            >>> x = torch.linspace(0, 1, 20, dtype=torch.float64)
            >>> K = torch.exp(-8 * (x[:, None] - x).square())
            >>> noise = torch.randn(20, generator=torch.Generator().manual_seed(0)).double()
            >>> fit = KernelRidge("evidence").fit(K, torch.sin(6 * x) + 0.1 * noise)
            >>> round(fit.noise_scale_, 2)
            0.1
            >>> r = torch.tensor(fit.ridge_, dtype=torch.float64, requires_grad=True)
            >>> (slope,) = torch.autograd.grad(fit.log_marginal_likelihood(r).value, r)
            >>> bool(abs(slope * r) < 1e-4)
            True
        """
        started = time.perf_counter()
        self._require_fit()
        self._require_process("the marginal likelihood")
        require_energy(self._problem.rhs)
        given = read_positive(self.ridge_ if ridge is None else ridge, "ridge").to(self._K.device)
        with count_passes() as counter:
            if self._evidence is None:
                self._require_unchanged("the marginal likelihood")
                self._evidence = self._solved.evidence(self._problem.K)
            if self._evidence is None:
                return self._estimated_likelihood(given)
            self._evidence.require_resolved(given)
            value = self._evidence(given) + self._shift()
        return Estimate.of_exact(value, passes=counter.total, seconds=time.perf_counter() - started)

    def _shift(self) -> float:
        """Return what weights add to the log evidence on S K S: log|K + r W⁻¹| = log|S K S + r| - log|W|."""
        rhs = self._problem.rhs
        return self._log_weights * rhs.numel() / rhs.shape[-2]

    def _estimated_likelihood(self, ridge: Tensor) -> Estimate:
        if ridge.requires_grad:
            raise UnsupportedOperationError(
                f"method={self.method_!r} knows no eigenvalues, and an estimate of the determinant has no "
                "gradient: fit with method='eigh' or 'features', or pass a number"
            )
        number, problem, fit = float(ridge), self._problem, self._solved
        if number != self.ridge_:
            fit = solve(self.method_, dataclasses.replace(problem, ridges=(number,))).fit
        assert isinstance(fit, IterativeFit)
        count, targets = problem.rhs.numel(), problem.rhs.shape[-1]
        energy = torch.tensor(fit.energy(), dtype=torch.float64)
        rest = log_evidence(energy, torch.zeros_like(energy), count)
        # Half a nat of the result: evidence is not read more finely than that.
        found = logdet(problem.K, number, atol=1 / targets, generator=problem.generator)
        low, high = (end.sum() for end in found.interval)  # one number for all classes
        error = found.stderr.square().sum().sqrt()
        whole = dataclasses.replace(found, value=found.value.sum(), stderr=error, interval=(low, high))
        likelihood = whole * (-targets / 2) + rest + self._shift()
        # The residual that the solve has left moves n log s² by this much at most.
        room = count / 2 * math.log1p(fit.energy_error(number) / float(energy))
        low, high = likelihood.interval
        return dataclasses.replace(likelihood, interval=(low - room, high + room), exact=False)

    # leave-one-out

    def leave_one_out(self) -> LeaveOneOut:
        r"""Return what each training sample would get from all others, without fitting again.

        The closed form :math:`y_i - f_{-i}(x_i) = \alpha_i / [(K + r)^{-1}]_{ii}`; of a kernel over samples
        and outputs all outputs of a sample leave together. The ridge stays as it is, and so do the
        eigenvectors of a cut-off and the features of "features" and "nystrom". For "cg" it solves for all n
        columns of the identity.

        Returns:
            `LeaveOneOut` with residuals and predictions in the shape of Y.

        Raises:
            NotFittedError: If nothing is fitted.
            SingularKernelError: If a sample determines its own fit alone.
        """
        self._require_fit()
        self._require_here("leave-one-out")
        self._read_again("leave-one-out")
        residuals = self._layout.restore(self._fit.left_out(self._layout.group))
        return LeaveOneOut(
            residuals=residuals.to(self._K.dtype),
            predictions=(self._labels.double() - residuals).to(self._K.dtype),
            mean_squared_error=float(residuals.square().mean()),
        )

    # what samples do, and what the parameters do: see leave_out.py, predictor.py

    def leave_out(self, groups: Iterable[ArrayLike]) -> GroupLeaveOut:
        r"""Return what the regression would be without each of some groups of samples, without fitting again.

        With A = K + r, :math:`\alpha_{-S} = \alpha - A^{-1}_{:S} (A^{-1}_{SS})^{-1} \alpha_S`: the exact
        refit at the same absolute ridge. The eigenvectors of a cut-off and the inducing samples of "nystrom"
        stay as they are.

        Args:
            groups: Groups of samples, each a vector of positions or a mask ``(N,)``. They may overlap; of a
                kernel over samples and outputs all outputs of a sample leave together.

        Returns:
            `GroupLeaveOut`: coefficients, residuals at the samples left out, and `predict`. Cost for a group
            of s rows: s columns of A⁻¹ (n² s flops; for "cg" a solve), and s³. Memory: Y for each group.

        Raises:
            NotFittedError: If nothing is fitted.
            InputError: If a group is empty, holds a sample twice or all of them, or is no vector.
            OutOfRangeError: If a sample does not exist.
            SingularKernelError: If a group determines its own fit alone.
            NotConvergedError: If a solve of "cg" or "lsmr" ended above ``tol``.
            UnsupportedOperationError: If the rows lie on several processes.

        Warns:
            RoundingWarning: If rounding may have added more than 1e-2 to the residuals of a group.

        Example:
            >>> import torch
            >>> from ntkops import KernelRidge
            >>> F = torch.randn(8, 3, generator=torch.Generator().manual_seed(0)).double()
            >>> K, Y = F @ F.T, F[:, 0]
            >>> left = KernelRidge(0.1, relative=False).fit(K, Y).leave_out([[0, 5], [2]])
            >>> rest = [1, 2, 3, 4, 6, 7]
            >>> again = KernelRidge(0.1, relative=False).fit(K[rest][:, rest], Y[rest])
            >>> bool(torch.allclose(left.predict(K)[0], again.predict(K[:, rest])))
            True
        """
        self._require_fit()
        self._require_here("leaving groups out")
        self._read_again("leaving groups out")
        read = copy.copy(self)._read_cross
        return leave_out(self._fit, self._layout, groups, self._K.dtype, read, self._later_offset())

    def weights(self) -> dict[str, Tensor]:
        r"""Return the change of the parameters that the fit means, :math:`\Delta\theta = J^\top \alpha`.

        The network linearised at its parameters predicts :math:`J_* \Delta\theta = K_* \alpha`. Seen through
        a projection it is :math:`P^\top P J^\top \alpha`, with inducing points
        :math:`J_Z^\top K_{ZZ}^+ K_{ZX} \alpha`, under a metric M of the parameters :math:`M J^\top \alpha`.

        Returns:
            A tensor for each selected parameter by its name, in the kernel's dtype: of the parameter's shape
            for one target; behind a leading axis of the classes for ``outputs="each"``, of the targets where
            several share a kernel, or of the outputs that a kernel is traced over. Cost: one vjp a target; in
            float32 two, as α has more digits than it holds, and two more; none where features were fitted.
            Over a process group every rank gets them.

        Raises:
            NotFittedError: If nothing is fitted.
            UnsupportedOperationError: If the kernel does not know its Jacobian (a dense one), or is traced
                over outputs and has several targets.

        Warns:
            RoundingWarning: If rounding may have added more than 1e-2 of their length.

        Example:
            >>> import torch, ntkops
            >>> _ = torch.manual_seed(0)
            >>> network, x = torch.nn.Linear(3, 1).double(), torch.randn(20, 3).double()
            >>> fitted = ntkops.KernelRidge(1e-12).fit(ntkops.ntk(network, x), x @ torch.ones(3, 1).double())
            >>> {name: tuple(w.shape) for name, w in fitted.weights().items()}
            {'weight': (1, 3), 'bias': (1,)}
            >>> bool((fitted.weights()["weight"] - 1).abs().max() < 1e-6)
            True
        """
        self._require_fit()
        return parameter_change(self._K, self._fit, self._layout).named()

    def predictor(self) -> Predictor:
        """Return a function of new samples that predicts from directional derivatives along `weights`.

        Returns:
            `Predictor`: ``predict(x_new)`` is ``(M, ...)`` as `predict` has it, to rounding. Cost of a call:
            one jvp over the M samples for all outputs or a single one, C for C classes or targets; and the
            network's outputs for ``offset="network"``. It holds no training sample.

        Raises:
            NotFittedError: If nothing is fitted.
            UnsupportedOperationError: As for `weights`; and if the kernel is of several functions, or of an
                uneven selection of samples and outputs.
            DifferentiationError: If the network has no directional derivatives.

        Example:
            >>> import torch, ntkops
            >>> _ = torch.manual_seed(0)
            >>> model, x = torch.nn.Linear(3, 2).double(), torch.randn(6, 3).double()
            >>> K = ntkops.ntk(model, x)
            >>> fit = ntkops.KernelRidge(1e-2).fit(K, torch.randn(6, 2).double())
            >>> x_new = torch.randn(4, 3).double()
            >>> torch.allclose(fit.predictor()(x_new), fit.predict(K.cross(x_new)))
            True
        """
        self._require_fit()
        change = parameter_change(self._K, self._fit, self._layout)
        return Predictor(change, self._layout, self._later_offset())

    def _later_offset(self) -> Offset:
        """Return the offset at new samples, whatever is fitted later; it holds no training sample."""
        bare = type(self)(offset=self.offset)
        bare._explicit_offset = self._explicit_offset
        return functools.partial(bare._offset_at, fitting=False)

    # scikit-learn's score

    def score(self, K_cross: LinearOperator | Tensor, y: Tensor, *, offset: Tensor | None = None) -> float:
        """Return how good the predictions are: accuracy for class numbers, R² for numbers.

        Args:
            K_cross: As for `predict`.
            y: ``(M,)`` integer classes, compared with the largest prediction; or targets in the shape of the
                predictions, for the coefficient of determination, averaged over targets.
            offset: As for `predict`.

        Returns:
            A number up to 1.

        Raises:
            ShapeError: If y does not fit the predictions.
        """
        self._require_here("the score")
        predictions = torch.as_tensor(self.predict(K_cross, offset=offset))
        truth = y.detach() if isinstance(y, Tensor) else torch.as_tensor(y)
        if not truth.dtype.is_floating_point:
            return accuracy(predictions, truth)
        return r2_score(predictions, truth)
