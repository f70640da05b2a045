"""Making one operator of what the ranks of a process group bring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..checkpoint import fingerprint
from ..engines import Differentiation, Engine, EngineChoice, LayerwiseEngine, build_engine
from ..errors import InputError, ShapeError, ShardingError
from ..model import Inputs, Linearization, linearize
from ..model.batch import BatchDim, are_coupled
from ..operators._projected_features import feature_rows
from ..operators.axes import StateAxis
from ..operators.projection import as_projection
from ..projections import Projection
from .engine import ShardedEngine
from .group import Ranks
from .kernel import ShardedAxis, ShardedKernelOperator, core_of
from .local_samples import no_samples, take_shard
from .projected import ShardedProjectedOperator
from .space import ShardedSpace

if TYPE_CHECKING:
    from ..model.accepted import InputsLike, ModelLike, OutputLike, ParamsLike

__all__ = ["sharded_ntk", "sharded_projected_ntk"]

Choice = Callable[[StateAxis], StateAxis]


@dataclass(frozen=True)
class _Share:
    """What a rank brings."""

    linearization: Linearization
    rows: Inputs | None
    columns: Inputs | None
    engine: Engine | None

    def shape(self) -> torch.Size | None:
        """Shape of the outputs of a sample, where this rank has one."""
        held = self.columns if self.rows is None else self.rows
        return None if held is None else held.output_shape


def sharded_ntk(
    model: ModelLike,
    x: InputsLike,
    x2: InputsLike | None,
    choose: Choice,
    *,
    params: ParamsLike,
    output: OutputLike,
    engine: EngineChoice,
    batch_size: int | Literal["auto"],
    chunk_size: int | Literal["auto"],
    batch_dim: BatchDim,
    group: Any,
    described: dict[str, Any],
) -> ShardedKernelOperator:
    """Return the kernel of samples that are spread over ranks; see `ntkops.ntk` for the arguments.

    ``x`` and ``x2`` are this rank's samples, of which it may have none, as long as another rank has some;
    ``choose`` goes from the axis of all outputs to that of those that are wanted, and ``described`` holds the
    options that all ranks must agree on.

    Raises:
        InputError: If samples are coupled, or differ in length.
        ShardingError: If models, selections, options or outputs differ between ranks.
        RankFailedError: If another rank's model or samples are refused.
    """
    if are_coupled(batch_dim):
        raise InputError(
            f"batch_dim={batch_dim!r}: coupled samples are one whole, which is not spread over ranks: leave "
            "group=None"
        )
    ranks = Ranks(group)

    def bring() -> _Share:
        linearization = linearize(model, params, output, batch_dim=batch_dim)
        rows = take_shard(linearization, x)
        columns = None if x2 is None else take_shard(linearization, x2)
        if rows is not None and columns is not None and rows.output_shape != columns.output_shape:
            raise ShapeError(
                f"the outputs of x have shape {tuple(rows.output_shape)} a sample, those of x2 "
                f"{tuple(columns.output_shape)}"
            )
        held = rows if rows is not None else columns
        if any(side is not None and side.lengths is not None for side in (rows, columns)):
            raise InputError(
                "samples that differ in length are not spread over ranks: leave group=None, or let all have "
                "the same positions"
            )
        built = None
        if held is not None:
            built = build_engine(linearization, held, engine, batch_size=batch_size, chunk_size=chunk_size)
        return _Share(linearization, rows, columns, built)

    # What may fail on one rank comes first, and has no collective inside; then ranks compare what they have.
    share = ranks.together(bring, "ntkops.ntk")
    shape, differentiation = _agreed(ranks, share, {**described, "square": x2 is None})
    own, names = share.engine, share.linearization.names
    covered = own is None or isinstance(own, LayerwiseEngine) and len(own.covered) == len(names)
    opened = ShardedEngine(
        ranks, own, share.linearization, differentiation, layered=not ranks.any(not covered)
    )

    def axis(inputs: Inputs | None) -> ShardedAxis:
        held = no_samples(share.linearization, shape) if inputs is None else inputs
        counts = tuple(ranks.share(held.num_samples))
        if not sum(counts):
            raise InputError("no rank has a sample; pass at least one on one of them")
        every = torch.arange(held.num_outputs).reshape(1, -1)
        return ShardedAxis(held, choose(StateAxis(held, every)).outputs, counts=counts)

    rows = axis(share.rows)
    columns = rows if x2 is None else axis(share.columns)
    parameters = [p.detach() for p in share.linearization.parameters]
    return ShardedKernelOperator(*parameters, core=core_of(opened, rows, columns))


def _agreed(ranks: Ranks, share: _Share, described: dict[str, Any]) -> tuple[torch.Size, Differentiation]:
    """Compare what the ranks bring.

    Returns:
        The shape of outputs, and what the model allows.

    Raises:
        ShardingError: Naming the rank that differs from the first, and in what.
        InputError: If no rank has a sample.
    """
    linearization = share.linearization
    mine = {
        "the selected parameters": list(linearization.names),
        "the shapes of parameters": [tuple(s) for s in linearization.shapes],
        "the dtype": str(linearization.dtype),
        "the values of parameters and buffers": fingerprint(
            model=[*linearization.parameters, *linearization.constants]
        )["model"],
        "the options": described,
    }
    outputs = share.shape()
    differentiation = None if share.engine is None else share.engine.differentiated(per_sample=True)
    mode = None if differentiation is None else differentiation.mode
    # A rank without samples cannot run the model: it takes shape and mode from the first that has some.
    told = ranks.share((mine, None if outputs is None else tuple(outputs), mode, differentiation))
    for rank, (theirs, _, _, _) in enumerate(told[1:], 1):
        for what, value in theirs.items():
            if value != told[0][0][what]:
                raise ShardingError(
                    f"rank {rank} differs from rank 0 in {what}{_shown(told[0][0][what], value)}: all ranks "
                    "must bring the same model and options, and only samples of their own"
                )
    with_samples = [(rank, item) for rank, item in enumerate(told) if item[1] is not None]
    if not with_samples:
        raise InputError("no rank has a sample; pass at least one on one of them")
    first, (_, shape, first_mode, found) = with_samples[0]
    for rank, (_, other, other_mode, _) in with_samples[1:]:
        if other != shape:
            raise ShardingError(
                f"the outputs of a sample have shape {other} on rank {rank} and {shape} on rank {first}: pad "
                "the samples of all ranks to one length"
            )
        if other_mode != first_mode:
            raise ShardingError(
                f"the model is differentiated by {other_mode!r} on rank {rank} and by {first_mode!r} on rank "
                f"{first}: install the same version of torch on all ranks, or choose engine='autograd'"
            )
    return torch.Size(shape), found


def _shown(first: Any, other: Any) -> str:
    """Return what differs, where it is short."""
    text = f" ({other!r} and {first!r})"
    return text if len(text) < 160 else ""


def sharded_projected_ntk(K: ShardedKernelOperator, projection: Any) -> ShardedProjectedOperator:
    """Return the kernel of samples over ranks that is seen through a projection; see `projected_ntk`.

    All ranks call it, with the same projection. Cost: the features of this rank's rows, once.

    Raises:
        ShardingError: If the ranks bring different projections.
    """
    ranks = K.ranks

    def read() -> tuple[Projection, str]:
        found = as_projection(projection, K.num_parameters, K.dtype, K.device)
        # Two maps of one kind and size differ in their seeds, or entries: the image of one vector tells.
        probe = torch.ones((1, K.num_parameters), dtype=K.dtype, device=K.device)
        return found, fingerprint(image=found.apply(probe))["image"]

    found, digest = ranks.together(read, "reading the projection")
    digests = ranks.share(digest)
    for rank, other in enumerate(digests):
        if other != digests[0]:
            raise ShardingError(f"rank {rank} brings another projection than rank 0: give both the same seed")

    def features(kernel: ShardedKernelOperator) -> Tensor:
        axis, engine = kernel._rows, kernel._engine.local

        def work() -> Tensor:
            if engine is None or axis.length == 0:
                shape = (*axis.batch_shape, 0, axis.terms * found.k)
                return torch.zeros(shape, dtype=K.dtype, device=K.device)
            with torch.no_grad():
                return feature_rows(engine, kernel._args, axis, found)

        return ranks.together(work, "features")

    def remake(x: Any) -> tuple[Tensor, ShardedSpace]:
        cross = K.cross(x)
        return features(cross), cross.space

    rows, space = features(K), K.space
    if K._core.symmetric:
        return ShardedProjectedOperator(rows, rows, spaces=(space, space), remake=remake)
    columns = features(K.mT)
    return ShardedProjectedOperator(rows, columns, spaces=(space, K.mT.space), remake=remake)
