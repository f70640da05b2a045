"""Spectra from products alone: eigenpairs, quadrature rules of spectral measures, traces of functions."""

from .intervals import guarded_freedom, scaled_chi_square, scaled_chi_squares
from .jacobi import Jacobi
from .lanczos import Lanczos, RitzPairs
from .quadrature import FunctionTrace, function_trace

__all__ = [
    # eigenpairs
    "Lanczos",
    "RitzPairs",
    # quadrature
    "Jacobi",
    "FunctionTrace",
    "function_trace",
    # intervals
    "guarded_freedom",
    "scaled_chi_square",
    "scaled_chi_squares",
]
