"""Samples of unlike length: which positions of their outputs are real, and that padding does not move them.

Every sample has an output for each of its real positions. An engine takes as many outputs of each sample:
those of the longest one. The outputs of real positions come first, in their order, and zeros behind them, so
that all that an engine sums over samples is right as it is; the rows of an operator are the real ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError, NtkopsError, OutputError
from .batch import Batch
from .coupling import first_line
from .rounding import neighbours
from .stream import Stream

if TYPE_CHECKING:
    from .pure import PureFunction

__all__ = ["real_rows", "require_neutral_padding", "sample_lengths"]

_ROUNDING_UNITS = 1e2  # up to which outputs at two lengths agree without a further look
_NOISE_FACTOR = 10.0  # a difference is rounding if a step of some units makes this share of it


def real_rows(rows: Tensor, batch: Batch) -> Tensor:
    """Return the outputs ``(B, O)`` of real positions, and zeros behind them, of ``(B, T·inner)`` at all.

    Raises:
        OutputError: If the mask has other positions than the output.
    """
    mask, inner, due = batch.mask, batch.inner, batch.num_outputs
    assert inner is not None and due is not None
    if mask is not None:
        if rows.shape[1] != mask.shape[1] * inner:
            raise OutputError(
                f"the output has {rows.shape[1] // inner} positions on a batch whose mask has "
                f"{mask.shape[1]}; mask= says which positions of the output are states"
            )
        order = (~mask).to(torch.uint8).argsort(dim=1, stable=True)  # real ones first, as they come
        index = order.unsqueeze(2).expand(-1, -1, inner)
        split = rows.unflatten(1, (mask.shape[1], inner)).gather(1, index)
        # What stands at padding may be anything; its gradient is exactly zero.
        rows = torch.where(mask.gather(1, order).unsqueeze(2), split, 0).flatten(1)
    return F.pad(rows, (0, due - rows.shape[1])) if rows.shape[1] < due else rows[:, :due]


def sample_lengths(stream: Stream, shapes: Sequence[torch.Size]) -> tuple[Tensor, torch.Size] | None:
    """Return how many real positions each sample has, and the shape of the output of one; None if all agree.

    ``shapes`` are those of the output of one sample of each batch.

    Raises:
        OutputError: If outputs differ in more than their first axis.
        InputError: If a mask does not fit the outputs, or leaves nothing of a sample.
    """
    first = shapes[0]
    if not stream.is_masked and all(shape == first for shape in shapes):
        return None
    for shape in shapes:
        if not shape or shape[1:] != first[1:]:
            raise OutputError(
                f"the output of one sample has shape {tuple(first)} in batch 0 and {tuple(shape)} in batch "
                f"{shapes.index(shape)}: it may differ in its first axis alone, the positions; let output= "
                "put that first, or pad all batches to one length"
            )
    lengths = []
    for number, (shape, real, count) in enumerate(zip(shapes, stream.real, stream.lengths, strict=True)):
        if real is None:
            lengths.append(torch.full((count,), shape[0]))
            continue
        if real.positions != shape[0]:
            raise InputError(
                f"mask= has {real.positions} positions in batch {number}, and the output of a sample has "
                f"shape {tuple(shape)}: its first axis must be these positions; leave mask=None where the "
                "model puts them together"
            )
        lengths.append(real.counts)
    found = torch.cat(lengths)
    if not bool((found > 0).all()):
        first_empty = int((found == 0).nonzero()[0])
        raise InputError(f"sample {first_empty} has no real position by mask=; leave it out")
    return found, torch.Size((int(found.max()), *first[1:]))


def require_neutral_padding(
    linearization: PureFunction, stream: Stream, shapes: Sequence[torch.Size]
) -> None:
    """Raise if a sample has other outputs where it is padded than at its own length.

    The sample with the most padding is run as it stands in its batch, and alone. ``shapes`` are those of the
    output of one sample of each batch.

    Raises:
        InputError: Naming the inputs that are padded, or saying that padding counts as states.
    """
    number = stream.most_padded()
    if number is None:  # no sample is known to be padded
        return
    (padded,) = stream.pick(torch.tensor([number])).batches
    batch = stream.batch_of(number)
    alone = stream.alone(number, padded)
    if alone is None:  # it cannot be had at another length
        return
    if not stream.is_masked:
        with torch.no_grad(), linearization.safe_context():
            state = linearization.output_shape(alone)
        if state != shapes[batch]:
            raise InputError(
                f"batch {batch} pads sample {number} from outputs of shape {tuple(state)} to "
                f"{tuple(shapes[batch])}, and nothing says which positions are real: pass mask=, a key of "
                "the batch or a function of it"
            )
    params = tuple(p.detach() for p in linearization.parameters)

    def outputs(sample: Batch, values: Sequence[Tensor] = params) -> Tensor:
        with torch.no_grad(), linearization.safe_context():
            return linearization.function(values, sample).detach().double()

    long = outputs(padded)
    try:
        short = outputs(alone)
    except NtkopsError as error:
        raise InputError(
            f"padding cannot be checked: the model does not run sample {number} at its own length "
            f"({first_line(error)}); where it takes one length only, leave mask=None, and take the rows of "
            "the kernel that are real"
        ) from error
    # As anywhere: rounding is no difference, and where a model enlarges it, what a step of rounding units
    # makes.
    gap, scale = (long - short).abs(), float(torch.maximum(long.abs(), short.abs()).max())
    limit = _ROUNDING_UNITS * torch.finfo(linearization.lowest_dtype).eps * scale
    if bool((gap <= limit).all()):
        return
    noise = max(
        float((outputs(padded.replace(samples), moved) - long).norm())
        for moved, samples in neighbours(params, padded.tensors)
    )
    if float(gap.norm()) <= _NOISE_FACTOR * noise:
        return
    shapes_of = zip(padded.layout.labels, padded.tensors, alone.tensors, strict=True)
    named = [label for label, one, other in shapes_of if one.shape != other.shape and label[:8] != "the mask"]
    share = float(gap.max()) / max(scale, 1e-300)
    raise InputError(
        f"padding of {', '.join(named)} changes the outputs of sample {number} by {share:.1e} of the "
        f"largest: in batch {batch} it has others than alone; give the model its mask (columns= must not "
        "drop it), pad behind the samples where positions are counted, or batch samples of one length"
    )
