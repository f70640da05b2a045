"""Linear systems from products alone."""

from ._outcome import products_are_steady, steady_products
from .conjugate_gradient import conjugate_gradient
from .iteration import ConjugateGradient, Preconditioner
from .lsmr import lsmr
from .pivoted_cholesky import PivotedFactor, pivoted_cholesky, rpcholesky
from .preconditioners import (
    FactorPreconditioner,
    factor_preconditioner,
    nystrom_factor,
    nystrom_preconditioner,
)
from .refinement import refinement

__all__ = [
    # solvers
    "ConjugateGradient",
    "conjugate_gradient",
    "refinement",
    "lsmr",
    # preconditioners
    "Preconditioner",
    "FactorPreconditioner",
    "factor_preconditioner",
    "nystrom_factor",
    "nystrom_preconditioner",
    # how operators multiply meanwhile
    "products_are_steady",
    "steady_products",
    # partial Cholesky factors
    "PivotedFactor",
    "pivoted_cholesky",
    "rpcholesky",
]
