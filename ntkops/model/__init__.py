"""From a PyTorch model to a pure function of its selected parameters and its inputs."""

from __future__ import annotations

from .accepted import (
    ArrayLike,
    GroupLike,
    InputsLike,
    LossLike,
    ModelLike,
    OffsetLike,
    OutputLike,
    ParamsLike,
    Pytree,
)
from .batch import Batch, BatchDim
from .build import linearize
from .entries import Entries
from .inputs import Inputs
from .linearization import Linearization
from .slices import Batches, Sliceable

__all__ = [
    "ArrayLike",
    "Batch",
    "BatchDim",
    "Batches",
    "Entries",
    "GroupLike",
    "Inputs",
    "InputsLike",
    "Linearization",
    "LossLike",
    "ModelLike",
    "OffsetLike",
    "OutputLike",
    "ParamsLike",
    "Pytree",
    "Sliceable",
    "linearize",
]
