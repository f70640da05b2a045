"""From a PyTorch model to a pure function of its selected parameters and its inputs."""

from __future__ import annotations

from .batches import Batch
from .build import linearize
from .inputs import Inputs
from .linearization import Linearization

__all__ = ["Batch", "Inputs", "Linearization", "linearize"]
