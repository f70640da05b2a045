"""Neural tangent kernels of PyTorch models as lazy linear operators."""

from . import functional
from .engines import count_passes
from .errors import NtkopsError, NtkopsWarning
from .model import Linearization, linearize
from .operators import JacobianOperator, NTKOperator, jacobian, ntk
from .results import EngineInfo, Estimate

__version__ = "0.1.0"

__all__ = [
    # operators
    "jacobian",
    "ntk",
    "linearize",
    "JacobianOperator",
    "NTKOperator",
    "Linearization",
    # the pure core
    "functional",
    # results
    "Estimate",
    "EngineInfo",
    "count_passes",
    # errors
    "NtkopsError",
    "NtkopsWarning",
]
