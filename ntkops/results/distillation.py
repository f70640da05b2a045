"""How a distilled set came about."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["DistillationInfo"]


@dataclass(frozen=True, eq=False)
class DistillationInfo:
    """What a method of distillation did.

    Attributes:
        method: Its name; "given" for coefficients that were passed in.
        class_mean: Whether it worked on the mean of the class kernels instead of on each.
        converged: Whether an iteration met its tolerance; True where there is none.
        passes: Passes made.
        seed: Seed of what was drawn; None if nothing was.
        seconds: Wall-clock time.
        details: What only this method has to say, by name.
    """

    method: str
    class_mean: bool = False
    converged: bool = True
    passes: int = 0
    seed: int | None = None
    seconds: float = 0.0
    details: Mapping[str, Any] = field(default_factory=dict)
