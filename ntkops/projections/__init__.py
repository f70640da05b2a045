"""Maps from all parameters to k numbers that keep inner products, never written down."""

from .base import Projection
from .composition import compose
from .cyclic import SJLT, CountSketch
from .dense import Gaussian, Haar, Rademacher
from .dimension import check_interpolation, jl_distortion, suggest_dim
from .hadamard import SRHT
from .kronecker import LayerKronecker
from .sampling import RowSample

__all__ = [
    # what they share
    "Projection",
    # sparse
    "CountSketch",
    "SJLT",
    "RowSample",
    # dense
    "Rademacher",
    "Gaussian",
    "Haar",
    # structured
    "SRHT",
    "LayerKronecker",
    # one after another
    "compose",
    # how many rows
    "jl_distortion",
    "suggest_dim",
    "check_interpolation",
]
