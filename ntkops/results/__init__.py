"""The small frozen results that users read: estimates, spectra, and what an engine did."""

from .engine import EngineInfo, LayerInfo
from .estimate import Estimate
from .passes import PassCount
from .spectra import Eigenpairs, TruncationRank

__all__ = [
    # estimates
    "Estimate",
    # spectra
    "Eigenpairs",
    "TruncationRank",
    # engines
    "EngineInfo",
    "LayerInfo",
    "PassCount",
]
