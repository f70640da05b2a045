"""What the layerwise engine is made of, and which of its two ways a call takes."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, Self, TypeVar

import torch
from torch import Tensor

from ..errors import BackwardLimitError
from ..model import Inputs, Linearization
from .attribution import CoverageChanged
from .autograd import AutogradEngine
from .coverage import Coverage
from .differentiation import Differentiation, Parameters
from .gathering import FactorSource
from .layer_cache import FactorCache
from .layer_table import MeasuredLayer
from .options import Layerwise
from .recorded import is_recorded
from .recurrent import trusted_states
from .settings import EngineSettings
from .verify import try_rules

__all__ = ["LayerwiseCore"]

logger = logging.getLogger(__name__)

Auto = Literal["auto"]
Result = TypeVar("Result")

_identities = itertools.count(1 << 32)  # apart from the numbers of other engines in the shared store


class LayerwiseCore(EngineSettings):
    """Coverage, caches and the fallback of a `LayerwiseEngine`.

    Args:
        linearization: The pure function and its snapshot.
        first: A few samples, on which it is found out how the model is differentiated.
        coverage: Which parameters are covered, and how.
        batch_size: Samples per pass, or "auto".
        chunk_size: Columns per pass, or "auto".
        options: What the user decided, None for nothing.
    """

    name = "layerwise"

    def __init__(
        self,
        linearization: Linearization,
        first: Inputs | None,
        coverage: Coverage,
        *,
        batch_size: int | Auto = "auto",
        chunk_size: int | Auto = "auto",
        options: Layerwise | None = None,
    ) -> None:
        self._autograd = AutogradEngine(linearization, first, batch_size=batch_size, chunk_size=chunk_size)
        self._sizes = batch_size, chunk_size
        self._start(coverage, options)

    def _start(self, coverage: Coverage, options: Layerwise | None) -> None:
        self.identity = next(_identities)
        self._cache = FactorCache(self.identity)
        self._source = FactorSource(self._autograd, coverage, options)
        self._measured: list[MeasuredLayer] | None = None

    @classmethod
    def build(
        cls,
        linearization: Linearization,
        inputs: Inputs,
        *,
        batch_size: int | Auto = "auto",
        chunk_size: int | Auto = "auto",
        options: Layerwise | None = None,
    ) -> Self:
        """Find the mode of differentiation, and what the rules cover, and check every covered parameter.

        Args:
            linearization: The pure function and its snapshot.
            inputs: The samples; a slice of them is used.
            batch_size: Samples per pass, or "auto".
            chunk_size: Columns per pass, or "auto".
            options: What the user decided, None for nothing.

        Returns:
            The engine. A covered parameter whose per-sample gradients differ from those of automatic
            differentiation is left to it, with the reason in ``differentiation.reasons``.
        """
        verdict = linearization.verdict
        found = verdict.coverage
        if not isinstance(found, Coverage):
            found = try_rules(linearization, inputs)
        inputs.hand_over_recordings()  # of a kind of input that needs no trial of rules
        sizes = {"batch_size": batch_size, "chunk_size": chunk_size}
        engine = cls(linearization, inputs.head(2), found, options=options, **sizes)
        if found is not verdict.coverage:
            with linearization.full_precision():
                found = replace(found, states=trusted_states(engine._source, inputs))
            engine._source.coverage = verdict.coverage = found
        return engine

    def to(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Self:
        """Return the same engine for another dtype or device; no rule is tried again."""
        moved = self._autograd.to(dtype=dtype, device=device)
        batch_size, chunk_size = self._sizes
        return type(self)(
            moved.linearization,
            moved._first,
            self._coverage,
            batch_size=batch_size,
            chunk_size=chunk_size,
            options=self.options,
        )

    def __getstate__(self) -> dict[str, object]:
        """Leave identity, memory and caches behind: they are this process's."""
        state = {"autograd": self._autograd, "sizes": self._sizes, "coverage": self._coverage}
        return {**state, "options": self.options}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take a fresh identity, so that no cache of another engine is read."""
        self._autograd = state["autograd"]  # type: ignore[assignment]
        self._sizes = state["sizes"]  # type: ignore[assignment]
        self._start(state["coverage"], state["options"])  # type: ignore[arg-type]

    def free(self) -> int:
        """Drop everything cached for this engine and return the bytes set free."""
        with self.linearization.full_precision():  # no other thread is using the workspace
            self._source.workspace.clear()
            return self._cache.clear() + self._autograd.free()

    # what it is and what it costs

    @property
    def _coverage(self) -> Coverage:
        return self._source.coverage

    @property
    def options(self) -> Layerwise:
        """What the user decided."""
        return self._source.options

    @property
    def differentiation(self) -> Differentiation:
        """What the model allows, with a line for every parameter that is not covered."""
        names = self.linearization.names
        reasons = tuple(
            f"layerwise: {names[i]!r} by automatic differentiation: {reason}"
            for i, reason in sorted(self._coverage.reasons.items())
        )
        found = self._autograd.differentiation
        return replace(found, reasons=(*found.reasons, *reasons))

    @property
    def fallback(self) -> AutogradEngine:
        """The engine of automatic differentiation over all parameters."""
        return self._autograd

    @property
    def covered(self) -> tuple[str, ...]:
        """Names of the parameters that the layer rules cover."""
        return tuple(self.linearization.names[i] for i in sorted(self._coverage.covered))

    # which engine does what

    def _delegates(self, params: Parameters, *others: Tensor | Inputs) -> bool:
        """Whether automatic differentiation does all of it: nothing is covered, or graphs are recorded."""
        if not self._coverage.covered:
            return True
        live = self.linearization.differentiable
        return is_recorded(params, others, live)

    def _require_few(self, what: str, *outputs: Tensor) -> None:
        """Refuse more backward passes than the user allows, before any work."""
        if not self._coverage.covered or self._coverage.states is not None:
            return
        limit = self.options.max_backwards
        if self._coverage.backwards(max(numbers.numel() for numbers in outputs)) <= limit:
            return  # even if all are distinct
        distinct = max(torch.unique(numbers).numel() for numbers in outputs)
        passes = self._coverage.backwards(distinct)
        if passes > limit:
            raise BackwardLimitError(
                f"{what} for {distinct} outputs takes {passes} backward passes, more than "
                f"max_backwards={limit}: choose fewer outputs (outputs=[...]), estimate (ntkops.trace, "
                "ntkops.frobenius_norm with method='hutchinson'), or pass "
                f"engine=ntkops.Layerwise(max_backwards={passes})"
            )

    def _rest(self, params: Parameters) -> tuple[AutogradEngine, Parameters] | None:
        """Return the engine for the parameters that are not covered, and these."""
        rest = self._source.uncovered
        return self._autograd.restricted(rest, params) if rest else None

    def _combined(
        self,
        params: Parameters,
        watched: tuple[Tensor | Inputs, ...],
        layers: Callable[[FactorSource], Result],
        autograd: Callable[[AutogradEngine, Parameters], Result],
        add: Callable[[Result, Result], Result],
    ) -> Result:
        """Run the rules for what is covered, automatic differentiation for the rest, and add them."""
        while not self._delegates(params, *watched):
            with torch.no_grad(), self.linearization.full_precision():
                try:
                    result = layers(self._source)
                except CoverageChanged as change:
                    self._demote(change)
                    continue
                rest = self._rest(params)
                return result if rest is None else add(result, autograd(*rest))
        return autograd(self._autograd, params)

    def _demote(self, change: CoverageChanged) -> None:
        """Leave parameters to automatic differentiation for good, aloud.

        What was made with their factors is made again: a sum in which a parameter counts as covered for some
        samples and as uncovered for others would hold it twice, or not at all.
        """
        coverage = self._coverage
        for index in change.lost.keys() & coverage.covered:
            name = self.linearization.names[index]
            logger.warning("parameter %r goes to automatic differentiation: %s", name, change.lost[index])
            coverage = coverage.without(index, change.lost[index])
        if not change.lost:  # the linear layer with which the model ended: one backward pass an output
            logger.warning("%s", change)
            coverage = coverage.without_tail()
        self._source.coverage = self.linearization.verdict.coverage = replace(coverage, states=None)
        self._measured = None
        self.free()
