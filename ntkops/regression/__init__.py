"""Kernel ridge regression with tangent kernels, the one-step view, and what errors are made of."""

from . import metrics
from ._posterior import PosteriorCovariance
from .error_terms import error_terms, truncation_error
from .gradient_features import GradientFeatures, gradient_features
from .influence import influence
from .kernel_ridge import KernelRidge
from .laplace import LinearizedLaplace
from .leave_out import GroupLeaveOut
from .one_step import one_step_regret
from .predictor import Predictor
from .projection_error import projection_error
from .tangent_projector import (
    TangentProjector,
    optimal_residual,
    projection_residual,
    tangent_projector,
)

__all__ = [
    "GradientFeatures",
    "gradient_features",
    # regression
    "KernelRidge",
    "LinearizedLaplace",
    "PosteriorCovariance",
    "Predictor",
    "GroupLeaveOut",
    # attribution
    "influence",
    # one step in the span of gradients
    "TangentProjector",
    "tangent_projector",
    "projection_residual",
    "optimal_residual",
    "one_step_regret",
    # where errors come from
    "error_terms",
    "truncation_error",
    "projection_error",
    # numbers
    "metrics",
]
