"""How a product or a block of J is computed."""

from .autograd import AutogradEngine
from .budget import TensorStore, format_bytes, free_bytes, shared_store, tensor_bytes
from .choose import Ladder, climb
from .cost import KernelShape
from .layerwise import LayerwiseEngine
from .options import Layerwise
from .select import Engine, EngineChoice, EngineName, build_engine
from .tally import Tally, count_passes, report_passes, spare_passes

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
    # the differentiation ladder
    "Ladder",
    "climb",
    # memory
    "TensorStore",
    "format_bytes",
    "free_bytes",
    "shared_store",
    "tensor_bytes",
    # passes
    "Tally",
    "count_passes",
    "report_passes",
    "spare_passes",
]
