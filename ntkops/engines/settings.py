"""What an engine says about its sizes and costs, where it shares them with an autograd engine."""

from __future__ import annotations

from ..model import Inputs, Linearization
from ..results import PassCount
from .autograd import AutogradEngine

__all__ = ["EngineSettings"]


class EngineSettings:
    """Sizes, memory and passes of the autograd engine inside."""

    _autograd: AutogradEngine

    @property
    def linearization(self) -> Linearization:
        """The pure function and its snapshot."""
        return self._autograd.linearization

    @property
    def passes(self) -> PassCount:
        """Passes made so far."""
        return self._autograd.passes

    @property
    def num_parameters(self) -> int:
        """Number P of selected parameters' entries."""
        return self._autograd.num_parameters

    def chunk_size(self) -> int:
        """Columns that go through one pass."""
        return self._autograd.chunk_size()

    def batch_size(self, inputs: Inputs) -> int:
        """Samples that go through one pass."""
        return self._autograd.batch_size(inputs)

    def workspace_bytes(self) -> int:
        """Bytes for one tile of per-sample gradients."""
        return self._autograd.workspace_bytes()

    def tile_samples(self, rows: int) -> int:
        """Return how many samples with ``rows`` whole gradients each fit into the workspace."""
        return self._autograd.tile_samples(rows)

    def count_rows(self, rows: int, inputs: Inputs) -> None:
        """Report ``rows`` gradients of single samples as passes over all of ``inputs``."""
        self._autograd.count_rows(rows, inputs)
