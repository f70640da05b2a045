"""Lazy operators: the Jacobian and the kernel."""

from . import foreign, product_tiles  # noqa: F401  # which enter their kinds into the table of capabilities
from .energy_gap import energy_gap
from .gradient_features import GradientFeatures, gradient_features
from .jacobian import JacobianOperator, jacobian
from .kernel import NTKOperator, ntk
from .nngp import nngp
from .nystrom import NystromOperator, nystrom_ntk
from .projected import FeatureOperator, ProjectedNTKOperator, ProjectionOperator, projected_ntk
from .ridge import RidgeOperator
from .sample_kernel import SampleKernelOperator
from .sandwich import Sandwich, sandwich
from .sharded import ShardedKernelOperator
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
    "ShardedKernelOperator",
    # constructors
    "jacobian",
    "ntk",
    "nystrom_ntk",
    "projected_ntk",
    "sandwich",
    "stack",
    "balance",
    "nngp",
    # in files
    "GradientFeatures",
    "gradient_features",
    # what an approximation leaves out
    "energy_gap",
]
