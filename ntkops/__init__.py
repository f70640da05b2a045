"""Neural tangent kernels of PyTorch models as lazy linear operators."""

import warnings as _warnings

with _warnings.catch_warnings():
    # linear_operator 0.6 compiles two helpers when it is first imported, which newer torch remarks on.
    _warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated")
    import linear_operator as _linear_operator  # noqa: F401

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
