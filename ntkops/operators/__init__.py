"""Lazy operators: the Jacobian and the kernel."""

from .jacobian import JacobianOperator, jacobian
from .kernel import NTKOperator, ntk
from .ridge import KernelPlusDiagonal

__all__ = [
    # operators
    "JacobianOperator",
    "NTKOperator",
    "KernelPlusDiagonal",
    # constructors
    "jacobian",
    "ntk",
]
