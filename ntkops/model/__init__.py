"""From a PyTorch model to a pure function of its selected parameters and its inputs."""

from __future__ import annotations

from .accepted import InputsLike, ModelLike, OutputLike, ParamsLike
from .batch import Batch, BatchDim
from .build import linearize
from .entries import Entries
from .inputs import Inputs
from .linearization import Linearization
from .slices import Batches

__all__ = [
    "Batch",
    "BatchDim",
    "Batches",
    "Entries",
    "Inputs",
    "InputsLike",
    "Linearization",
    "ModelLike",
    "OutputLike",
    "ParamsLike",
    "linearize",
]
