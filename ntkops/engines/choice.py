"""Which engine computes an operator's products and blocks."""

from __future__ import annotations

from typing import Literal, TypeAlias, get_args

from ..errors import InputError
from ..model import Inputs, Linearization
from .autograd import AutogradEngine
from .base import Engine
from .layerwise import LayerwiseEngine
from .options import Layerwise

__all__ = ["Engine", "EngineChoice", "EngineName", "build_engine"]

EngineName: TypeAlias = Literal["auto", "autograd", "layerwise"]

EngineChoice: TypeAlias = EngineName | Layerwise
"""How products are computed: "layerwise" by layer structure, "autograd" for any model, "auto" for layerwise
where it covers anything; or a `Layerwise` with choices of one's own."""


def build_engine(
    linearization: Linearization,
    inputs: Inputs,
    engine: EngineChoice = "auto",
    *,
    batch_size: int | Literal["auto"] = "auto",
    chunk_size: int | Literal["auto"] = "auto",
) -> Engine:
    """Return the engine asked for, what the model allows found on the first samples.

    Args:
        linearization: The pure function and its snapshot.
        inputs: The samples.
        engine: "autograd"; "layerwise" for every parameter that its rules cover and autograd for the
            rest, or `Layerwise` for the same with choices of one's own; "auto" for layerwise where it
            covers anything.
        batch_size: Samples per pass, or "auto".
        chunk_size: Columns per pass, or "auto".

    Returns:
        The engine.

    Raises:
        InputError: If there is no engine of that name.
    """
    options = engine if isinstance(engine, Layerwise) else None
    if options is None and engine not in get_args(EngineName):
        raise InputError(
            f"engine={engine!r}: choose 'auto', 'autograd', 'layerwise', or a ntkops.Layerwise(...)"
        )
    if engine == "autograd" or linearization.differentiable:
        return AutogradEngine.build(linearization, inputs, batch_size=batch_size, chunk_size=chunk_size)
    layerwise = LayerwiseEngine.build(
        linearization, inputs, batch_size=batch_size, chunk_size=chunk_size, options=options
    )
    if engine == "auto" and not layerwise.covered:
        assert (
            layerwise.fallback.differentiation is not None
        )  # refused here where it cannot be differentiated
        return layerwise.fallback
    return layerwise
