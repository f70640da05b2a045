"""Is J the derivative of the model? Finite differences in float64, and who is at fault."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from ..engines import AutogradEngine
from ..errors import NtkopsError
from ..model import Batch, Linearization
from ..model.rounding import lowest_dtype
from ..results import Check
from ._engines import Ours, state_inputs
from ._products import Products, relative

__all__ = ["derivative_checks"]

_SAMPLES = 4
# Central differences are best at the cube root of the rounding unit; kinks want them smaller.
_STEPS = (16.0, 4.0, 1.0, 0.25)
_BOUND = 1e-4  # relative: kinks leave a true derivative this far from differences


class _Slope:
    """The model in float64 on a few samples, its derivative, and finite differences."""

    def __init__(self, linearization: Linearization, batch: Batch, generator: torch.Generator) -> None:
        self.linearization, self.batch = linearization, batch
        unit = torch.finfo(lowest_dtype(linearization, batch)).eps
        # (f(h) - f(-h)) / 2h errs by h² f''' / 6 and by ε |f| / h, which are alike at h = ε^{1/3}: an error
        # of ε^{2/3}.
        self.steps = tuple(step * unit ** (1 / 3) for step in _STEPS)
        self.bound = max(_BOUND, 100 * unit ** (2 / 3))
        self.params = tuple(p.detach() for p in linearization.parameters)
        self.tangents = tuple(
            torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p) * _scale(p)
            for p in self.params
        )
        _leave_out_padding(linearization, self.tangents)

    def difference(self, chosen: Sequence[int]) -> list[Tensor]:
        """Return central differences along the chosen parameters' tangents, one for each step."""
        found = []
        for step in self.steps:
            ends = [self._at(chosen, sign * step) for sign in (1, -1)]
            found.append((ends[0] - ends[1]) / (2 * step))
        return found

    def _at(self, chosen: Sequence[int], step: float) -> Tensor:
        moved = list(self.params)
        for index in chosen:
            moved[index] = moved[index] + step * self.tangents[index]
        return self.linearization.function(moved, self.batch).double()

    def push(self, chosen: Sequence[int], engine: AutogradEngine, inputs: object) -> Tensor:
        """Return J p along the chosen parameters' tangents."""
        tangent = torch.cat(
            [
                (t if index in chosen else torch.zeros_like(t)).flatten()
                for index, t in enumerate(self.tangents)
            ]
        )
        return engine.jvp(self.params, inputs, tangent.unsqueeze(0)).flatten()  # type: ignore[arg-type]

    def error(self, chosen: Sequence[int], engine: AutogradEngine, inputs: object) -> float:
        """Return how far J p is from the nearest difference quotient."""
        pushed = self.push(chosen, engine, inputs)
        return min(relative(pushed, quotient.flatten()) for quotient in self.difference(chosen))


def _leave_out_padding(linearization: Linearization, tangents: Sequence[Tensor]) -> None:
    """Move no padding row: it moves the output and has no gradient, as in training."""
    root = getattr(linearization.call, "root", nn.Module())
    for path, module in root.named_modules(remove_duplicate=False):
        name = f"{path}.weight".lstrip(".")
        padding = getattr(module, "padding_idx", None)
        if isinstance(module, nn.Embedding) and padding is not None and name in linearization.names:
            tangents[linearization.names.index(name)][padding] = 0.0


def _scale(parameter: Tensor) -> float:
    size = float(parameter.double().norm()) / max(parameter.numel(), 1) ** 0.5
    return size if size > 0 else 1.0


def derivative_checks(operator: Ours, products: Products) -> Iterator[Check]:
    """Check J against finite differences in float64."""
    axis = state_inputs(operator)
    try:
        double = operator.to(dtype=torch.float64) if operator.dtype != torch.float64 else operator
        moved = state_inputs(double)
        inputs = moved.inputs.select(torch.arange(min(_SAMPLES, axis.inputs.num_samples)))
        linearization = double._core.engine.linearization
        engine = AutogradEngine.build(linearization, inputs)
        if engine.differentiation.mode == "reverse":
            yield Check(
                "true derivative", None, None, _BOUND, "the model has no forward derivative to compare"
            )
            return
        _, _, batch = next(iter(inputs.batches(None)))
        with linearization.safe_context():
            slope = _Slope(linearization, batch, products.generator)
            whole = range(len(slope.params))
            error = slope.error(whole, engine, inputs)
            if error <= slope.bound:
                yield Check("true derivative", True, error, slope.bound, "J p against differences in float64")
                return
            guilty = _bisect(whole, lambda part: slope.error(part, engine, inputs) > slope.bound)
    except (NtkopsError, RuntimeError) as problem:
        yield Check("true derivative", None, None, _BOUND, f"not compared: {problem}")
        return
    names = [linearization.names[index] for index in guilty]
    yield Check("true derivative", False, error, slope.bound, _blame(names))


def _bisect(indices: Sequence[int], fails: Callable[[Sequence[int]], bool]) -> list[int]:
    """Return the smallest parts whose check fails on its own."""
    pending, guilty = [list(indices)], []
    while pending:
        part = pending.pop()
        if len(part) == 1:
            guilty += part
            continue
        # J p is linear in p: a part of the parameters that passes alone can be left out of the search
        parts = [part[: len(part) // 2], part[len(part) // 2 :]]
        failing = [half for half in parts if fails(half)]
        if not failing:  # only together: name them all
            guilty += part
        pending += failing
    return sorted(guilty)


def _blame(names: Sequence[str]) -> str:
    modules = list(dict.fromkeys(name.rpartition(".")[0] or "the model itself" for name in names))
    shown = ", ".join(itertools.islice(names, 4)) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    places = ", ".join(repr(module) for module in modules[:4])
    return (
        f"J is not the derivative along {shown} (modules {places}): look there for detach(), no_grad(), "
        "padding_idx, rounding, a renormalisation of weights, or a custom autograd.Function; what is "
        "detached on purpose is computed as the model defines it"
    )
