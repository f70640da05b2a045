"""Quantities of kernels along training: one table, resumable.

`track` is what users call. A `Tracker` turns the weights of a checkpoint into a row of a `History`;
`quantities` says what is computed, `weights` where checkpoints come from, `places` how a linearised model is
taken to their values, `ledger` how the table is kept in a file.
"""

from .run import track
from .tracker import Tracker

__all__ = [
    # the function
    "track",
    # inside a training loop
    "Tracker",
]
