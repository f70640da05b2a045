"""The small frozen results that users read: estimates, spectra, and what an engine did."""

from .check import Check, CheckReport
from .distillation import (
    Barycenter,
    ChainReport,
    ChainRun,
    ChainStep,
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
from .history import Comparison, History
from .partition import Partition
from .regression import (
    ErrorTerms,
    LeaveOneOut,
    OneStepRegret,
    ProjectionError,
    RidgePath,
    TruncationError,
)
from .solve import Solution, SolveInfo, TrajectoryInfo
from .spectra import Eigenpairs, EnergyGap, Redundancy, SpectralDensity, TruncationRank

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
