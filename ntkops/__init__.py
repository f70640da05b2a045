"""Neural tangent kernels of PyTorch models as lazy linear operators."""

from . import functional, plotting
from .engines import Layerwise, count_passes
from .errors import NtkopsError, NtkopsWarning
from .estimators import (
    alignment,
    diagonal,
    effective_rank,
    eigsh,
    frobenius_norm,
    inner,
    one_sided_product_trace,
    trace,
    truncation_rank,
)
from .model import Linearization, linearize
from .operators import JacobianOperator, NTKOperator, jacobian, ntk
from .results import Eigenpairs, EngineInfo, Estimate, LayerInfo, TruncationRank

__version__ = "0.1.0"

__all__ = [
    # operators
    "jacobian",
    "ntk",
    "linearize",
    "Layerwise",
    "JacobianOperator",
    "NTKOperator",
    "Linearization",
    # estimators
    "trace",
    "frobenius_norm",
    "inner",
    "alignment",
    "effective_rank",
    "diagonal",
    "one_sided_product_trace",
    "eigsh",
    "truncation_rank",
    # the pure core
    "functional",
    # pictures
    "plotting",
    # results
    "Estimate",
    "Eigenpairs",
    "TruncationRank",
    "EngineInfo",
    "LayerInfo",
    "count_passes",
    # errors
    "NtkopsError",
    "NtkopsWarning",
]
