"""How a product or a block of J is computed."""

from .autograd import AutogradEngine
from .budget import TensorStore, format_bytes, free_bytes, shared_store, tensor_bytes
from .choose import Ladder, climb
from .tally import Tally, count_passes, report_passes

__all__ = [
    # engines
    "AutogradEngine",
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
]
