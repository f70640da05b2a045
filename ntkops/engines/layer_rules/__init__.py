"""The table of layer rules: what each function's parameters contribute to a sample's gradient."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F

from ...model.record import Entry, describe_calls
from .attention import multi_head_attention
from .base import Activation, Kind, Layout, OneHot, Rule
from .broadcast import Add, Expand, Multiply, Subtract
from .convolution import Convolution, TransposedConvolution
from .embedding import Embedding
from .linear import AffineProduct, Linear, MatrixProduct
from .normalisation import BatchNorm, GroupNorm, InstanceNorm, LayerNorm, RMSNorm
from .recurrent import RECURRENT

__all__ = [
    # the table
    "RULES",
    # what rules are made of
    "Activation",
    "Kind",
    "Layout",
    "OneHot",
    "Rule",
]

_ALL: tuple[Rule, ...] = (
    Linear(),
    MatrixProduct(),
    AffineProduct(),
    Embedding(),
    Convolution(),
    TransposedConvolution(),
    LayerNorm(),
    RMSNorm(),
    GroupNorm(),
    InstanceNorm(),
    BatchNorm(),
    Add(),
    Subtract(),
    Multiply(),
    Expand(),
)


def _unless_run_again(expansion: Callable[..., Any]) -> Callable[..., Any]:
    """Leave a fused function alone in a checkpointed block.

    The block runs again in the backward pass, where nothing is replaced, and the results of another formula
    would be taken for what this one saved. Hooks on saved tensors are what such blocks are made of.

    Returns:
        The expansion, which returns NotImplemented there.
    """

    @wraps(expansion)
    def expanded(*args: Any, **named: Any) -> Any:
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
        return expansion(*args, **named) if hooks is None else NotImplemented

    return expanded


RULES: dict[str, Rule] = {rule.entry.name: rule for rule in _ALL}
_CATALOGUE: dict[Any, Entry] = {function: rule.entry for rule in _ALL for function in rule.functions}
_EXPANSIONS: dict[Any, Callable[..., Any]] = {
    function: _unless_run_again(expansion)
    for function, expansion in {F.multi_head_attention_forward: multi_head_attention, **RECURRENT}.items()
}
describe_calls(_CATALOGUE, _EXPANSIONS)
