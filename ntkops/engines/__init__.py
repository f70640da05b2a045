"""How a product or a block of J is computed."""

from .autograd import AutogradEngine
from .choice import Engine, EngineChoice, EngineName, build_engine
from .choose import find_differentiation
from .cost import KernelShape
from .differentiation import Differentiation
from .layerwise import LayerwiseEngine
from .memory import (
    TensorStore,
    format_bytes,
    free_bytes,
    set_memory_budget,
    shared_store,
    tensor_bytes,
)
from .options import Layerwise
from .passes import PassCounter, count_passes, report_passes, spare_passes

__all__ = [
    # engines
    "AutogradEngine",
    "LayerwiseEngine",
    "Engine",
    "EngineChoice",
    "EngineName",
    "Layerwise",
    "build_engine",
    # what they cost
    "KernelShape",
    # how a model is differentiated
    "Differentiation",
    "find_differentiation",
    # memory
    "TensorStore",
    "format_bytes",
    "free_bytes",
    "set_memory_budget",
    "shared_store",
    "tensor_bytes",
    # passes
    "PassCounter",
    "count_passes",
    "report_passes",
    "spare_passes",
]
