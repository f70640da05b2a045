"""Lazy operators: the Jacobian and the kernel."""

import importlib
import warnings
from typing import Any

from . import foreign, product_tiles  # noqa: F401  # which enter their kinds into the table of capabilities
from .energy_gap import energy_gap
from .jacobian import JacobianOperator, jacobian
from .kernel import NTKOperator
from .nngp import nngp
from .nystrom import NystromOperator, nystrom_ntk
from .output_choice import OutputChoice
from .projected import FeatureOperator, ProjectedNTKOperator, ProjectionOperator
from .projection import ProjectionLike
from .ridge import RidgeOperator
from .sample_kernel import SampleKernelOperator
from .sandwich import Sandwich, sandwich
from .stacked import BlockKernelOperator, balance, stack

__all__ = [
    # operators
    "JacobianOperator",
    "NTKOperator",
    "NystromOperator",
    "RidgeOperator",
    "SampleKernelOperator",
    "Sandwich",
    "BlockKernelOperator",
    "ProjectedNTKOperator",
    "FeatureOperator",
    "ProjectionOperator",
    # constructors
    "jacobian",
    "nystrom_ntk",
    "sandwich",
    "stack",
    "balance",
    "nngp",
    # what may be passed
    "OutputChoice",
    "ProjectionLike",
    # what an approximation leaves out
    "energy_gap",
]


def __getattr__(name: str) -> Any:
    """Return what stood here before, with a warning: kernels are made in `ntkops` itself."""
    if name not in ("ntk", "projected_ntk", "GradientFeatures", "gradient_features"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"use ntkops.{name}: ntkops.operators.{name} goes in 0.4", DeprecationWarning, stacklevel=2)
    return getattr(importlib.import_module("ntkops"), name)
