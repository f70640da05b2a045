"""Quantities of operators, exact or estimated with an error: one quantity a module."""

from .alignment import alignment
from .diagonal import diagonal
from .effective_rank import effective_rank
from .eigsh import eigsh
from .frobenius_norm import frobenius_norm
from .inner import inner
from .one_sided import one_sided_product_trace
from .trace import trace
from .truncation_rank import truncation_rank

__all__ = [
    # scalars
    "trace",
    "frobenius_norm",
    "inner",
    "alignment",
    "effective_rank",
    "one_sided_product_trace",
    # vectors
    "diagonal",
    # spectra
    "eigsh",
    "truncation_rank",
]
