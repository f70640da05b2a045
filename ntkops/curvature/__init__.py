"""Curvature of losses, in the outputs and in the parameters."""

from .ggn import GGNOperator, ggn
from .losses import hessian_factor

__all__ = ["GGNOperator", "ggn", "hessian_factor"]
