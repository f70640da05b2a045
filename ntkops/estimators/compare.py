"""Scores of several networks on the same samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ..arguments import checked
from ..constructors import ntk
from ..engines import EngineChoice
from ..errors import InputError, NtkopsError
from ..model import BatchDim, linearize
from ..operators.kernel import NTKOperator
from ..results import Comparison, Estimate
from ._request import checked_generator
from .condition_number import condition_number
from .moments import effective_rank, frobenius_norm, trace

if TYPE_CHECKING:
    from ..model.accepted import InputsLike, ModelLike, OutputLike, ParamsLike

__all__ = ["compare"]

_SEEDS = 2**31 - 1
_SCORES: dict[str, Callable[..., Estimate]] = {
    "trace": trace,
    "condition_number": condition_number,
    "frobenius_norm": frobenius_norm,
    "effective_rank": effective_rank,
}


@checked
def compare(
    models: Mapping[str, ModelLike] | Sequence[ModelLike],
    x: InputsLike,
    scores: str | Sequence[str] = ("trace",),
    *,
    num_probes: int = 4,
    params: ParamsLike = None,
    output: OutputLike = None,
    batch_dim: BatchDim = 0,
    generator: torch.Generator | None = None,
) -> Comparison:
    r"""Score networks at initialisation by their kernels, as architecture searches do.

    The trace is estimated from forward passes alone, :math:`\mathrm{tr}\,K = E|J z|^2` (NASI, NTK-SAP): one
    jvp a probe, with relative variance :math:`2 |K|_F^2 / (\mathrm{tr}\,K)^2`, and the same seed for all
    networks. With four probes an order of networks is uncertain where the intervals overlap, which the table
    shows; take `ntkops.trace` for as many digits as needed.

    Args:
        models: Name to module, or modules in order, which are called "0", "1", ....
        x: Samples that every network takes.
        scores: Among "trace", "condition_number" (`ntkops.condition_number`), "frobenius_norm" and
            "effective_rank", the last three as their functions compute them by default.
        num_probes: Probes of the trace, at least 2.
        params: As for `ntkops.ntk`; the same for all networks.
        output: As for `ntkops.ntk`; TE-NAS takes the condition number of the summed logits,
            ``output=lambda y: y.sum(-1, keepdim=True)``.
        batch_dim: As for `ntkops.ntk`.
        generator: CPU generator from which the seed of the probes is drawn.

    Returns:
        `Comparison`, a table. Cost of a trace: the trial of a network, and ``num_probes`` jvps.

    Raises:
        InputError: If there is no network, or a score or option is not understood.
        NtkopsError: What `ntkops.ntk` and the estimators raise, with the network's name in a note.

    Warns:
        NotConvergedWarning: If a score did not reach its tolerance.

    Example:
        >>> import torch, ntkops
        >>> _ = torch.manual_seed(0)
        >>> models = {str(w): torch.nn.Sequential(
        ...     torch.nn.Linear(4, w), torch.nn.ReLU(), torch.nn.Linear(w, 2)) for w in (8, 64)}
        >>> table = ntkops.compare(models, torch.randn(6, 4), generator=torch.Generator().manual_seed(1))
        >>> table["trace"].shape, len(table.estimates["trace"]), table.order("trace")
        (torch.Size([2]), 2, ['64', '8'])
    """
    named = dict(models) if isinstance(models, Mapping) else {str(i): m for i, m in enumerate(models)}
    wanted = (scores,) if isinstance(scores, str) else tuple(scores)
    if not named:
        raise InputError("there is no network to compare")
    for score in wanted:
        if score not in _SCORES:
            raise InputError(f"there is no score {score!r}: choose among {', '.join(map(repr, _SCORES))}")
    if not wanted or len(set(wanted)) < len(wanted):
        raise InputError(f"scores={wanted!r}: name different scores, one at least")
    if num_probes < 2:
        raise InputError(f"num_probes={num_probes}: an error needs two probes at least")
    drawn, _ = checked_generator(generator)
    # One seed for all networks: those with as many parameters meet the same probes, whose noise then does not
    # change their order.
    seed = int(torch.randint(_SEEDS, (), generator=drawn))
    # Where jvps are all that is needed, no rule is tried.
    engine: EngineChoice = "autograd" if wanted == ("trace",) else "auto"
    columns: dict[str, list[Estimate]] = {score: [] for score in wanted}
    for name, model in named.items():
        try:
            linearization = linearize(model, params, output, batch_dim=batch_dim)
            kernel = ntk(linearization, x, engine=engine)
            for score in wanted:
                columns[score].append(_scored(score, kernel, num_probes, seed))
            kernel.free()
        except NtkopsError as error:
            error.add_note(f"(of the network {name!r})")
            raise
    return Comparison(tuple(named), {score: tuple(column) for score, column in columns.items()})


def _scored(score: str, kernel: NTKOperator, probes: int, seed: int) -> Estimate:
    options: dict[str, Any] = {"generator": torch.Generator().manual_seed(seed)}
    if score == "trace":
        options |= {"method": "fhutch", "num_passes": probes}
    return _SCORES[score](kernel, **options)
