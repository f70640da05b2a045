"""Neural tangent kernels of PyTorch models as lazy linear operators."""

import warnings as _warnings

with _warnings.catch_warnings():
    # linear_operator 0.6 compiles two helpers when it is first imported, which newer torch remarks on.
    _warnings.filterwarnings("ignore", message=r"`torch\.jit\.script` is deprecated")
    import linear_operator as _linear_operator  # noqa: F401

from . import distill, functional, plotting, projections, regression, solvers
from .check import check_operator
from .constructors import ntk, projected_ntk
from .curvature import GGNOperator, ggn
from .distributed import ShardedKernelOperator
from .dynamics import Gaussian, Trajectory, gradient_descent, gradient_flow, max_learning_rate
from .engines import Layerwise, count_passes, set_memory_budget
from .errors import NtkopsError, NtkopsWarning
from .estimators import (
    Sketch,
    alignment,
    compare,
    condition_number,
    data_redundancy,
    diagonal,
    effective_dimension,
    effective_rank,
    eigsh,
    frobenius_norm,
    hessian_norm,
    inner,
    logdet,
    one_sided_product_trace,
    parameter_redundancy,
    partial_trace,
    partition,
    spectral_density,
    trace,
    truncation_rank,
)
from .model import Batches, Entries, Linearization, linearize
from .operators import (
    BlockKernelOperator,
    JacobianOperator,
    NTKOperator,
    SampleKernelOperator,
    balance,
    energy_gap,
    jacobian,
    nngp,
    nystrom_ntk,
    sandwich,
    stack,
)
from .regression import GradientFeatures, KernelRidge, LinearizedLaplace, gradient_features, influence
from .results import (
    CheckReport,
    Comparison,
    Eigenpairs,
    EngineInfo,
    Estimate,
    History,
    LayerInfo,
    Partition,
    SolveInfo,
    SpectralDensity,
    TruncationRank,
)
from .track import track

__version__ = "0.2.0.dev0"

__all__ = [
    # operators
    "jacobian",
    "ntk",
    "projected_ntk",
    "nystrom_ntk",
    "sandwich",
    "stack",
    "balance",
    "nngp",
    "linearize",
    "Batches",
    "Entries",
    "Layerwise",
    "set_memory_budget",
    "JacobianOperator",
    "NTKOperator",
    "SampleKernelOperator",
    "BlockKernelOperator",
    "ShardedKernelOperator",
    "Linearization",
    # estimators
    "trace",
    "frobenius_norm",
    "inner",
    "alignment",
    "effective_rank",
    "partial_trace",
    "partition",
    "diagonal",
    "one_sided_product_trace",
    "hessian_norm",
    "compare",
    "Sketch",
    # spectra
    "eigsh",
    "condition_number",
    "spectral_density",
    "truncation_rank",
    "data_redundancy",
    "parameter_redundancy",
    "logdet",
    "effective_dimension",
    "energy_gap",
    # uncertainty
    "LinearizedLaplace",
    # regression
    "KernelRidge",
    # curvature
    "ggn",
    "GGNOperator",
    # attribution
    "gradient_features",
    "influence",
    "GradientFeatures",
    # along training
    "gradient_flow",
    "gradient_descent",
    "max_learning_rate",
    "Trajectory",
    "Gaussian",
    "track",
    # checks
    "check_operator",
    # rooms
    "distill",
    "functional",
    "plotting",
    "projections",
    "regression",
    "solvers",
    # results
    "Estimate",
    "Partition",
    "Eigenpairs",
    "SpectralDensity",
    "TruncationRank",
    "SolveInfo",
    "History",
    "Comparison",
    "CheckReport",
    "EngineInfo",
    "LayerInfo",
    "count_passes",
    # errors
    "NtkopsError",
    "NtkopsWarning",
]
