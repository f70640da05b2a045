"""The small frozen results that users read: estimates, spectra, and what an engine did."""

from .chain import ChainReport, ChainRun, ChainStep
from .check import Check, CheckReport
from .comparison import Comparison
from .distillation import (
    Barycenter,
    Containment,
    DistillationInfo,
    InducingPoints,
    LocalGlobalProperties,
    LocalGlobalTrial,
    SelectedInputs,
    SyntheticData,
    VarianceTransfer,
)
from .engine import EngineInfo, LayerInfo
from .estimate import Estimate, PassCount
from .history import History
from .partition import Partition
from .regression import (
    ErrorTerms,
    LeaveOneOut,
    OneStepRegret,
    ProjectionError,
    RidgePath,
    TruncationError,
)
from .solve import Solution, SolveInfo
from .spectra import Eigenpairs, EnergyGap, Redundancy, SpectralDensity, TruncationRank
from .trajectory import TrajectoryInfo

__all__ = [
    # estimates
    "Estimate",
    "Partition",
    # spectra
    "Eigenpairs",
    "SpectralDensity",
    "TruncationRank",
    "Redundancy",
    # approximations
    "EnergyGap",
    # solvers
    "Solution",
    "SolveInfo",
    # regression
    "LeaveOneOut",
    "RidgePath",
    "ErrorTerms",
    "TruncationError",
    "ProjectionError",
    "OneStepRegret",
    # distillation
    "DistillationInfo",
    "SelectedInputs",
    "ChainReport",
    "ChainRun",
    "ChainStep",
    "LocalGlobalProperties",
    "Containment",
    "LocalGlobalTrial",
    "VarianceTransfer",
    # synthesised samples
    "Barycenter",
    "SyntheticData",
    "InducingPoints",
    # along training
    "History",
    # networks side by side
    "Comparison",
    "TrajectoryInfo",
    # checks
    "Check",
    "CheckReport",
    # engines
    "EngineInfo",
    "LayerInfo",
    "PassCount",
]
