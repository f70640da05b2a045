"""Quantities of operators, exact or estimated with an error: one family a module."""

from .compare import compare
from .condition_number import condition_number
from .diagonal import diagonal
from .eigenvalues import eigsh
from .hessian_norm import hessian_norm
from .moments import alignment, effective_rank, frobenius_norm, inner, trace
from .one_sided import one_sided_product_trace
from .partial_trace import partial_trace
from .partition import partition
from .sketch import Sketch
from .spectral_density import spectral_density
from .spectral_sums import effective_dimension, logdet
from .truncation import data_redundancy, parameter_redundancy, truncation_rank

__all__ = [
    # scalars
    "trace",
    "frobenius_norm",
    "inner",
    "alignment",
    "effective_rank",
    "one_sided_product_trace",
    "hessian_norm",
    # networks side by side
    "compare",
    # one sketch for many scalars
    "Sketch",
    # vectors and matrices
    "diagonal",
    "partial_trace",
    "partition",
    # spectra
    "eigsh",
    "condition_number",
    "spectral_density",
    "truncation_rank",
    "data_redundancy",
    "parameter_redundancy",
    "logdet",
    "effective_dimension",
]
