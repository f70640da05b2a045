"""One pass over the real samples: their features, and what enters the normalisations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError
from ._labelled import Labelled, marks_of
from ._teacher import Moments, Teacher, class_moments

__all__ = ["Survey", "survey"]


@dataclass(frozen=True, eq=False)
class Survey:
    """What one pass over the real samples shows.

    Attributes:
        features: ``(n, d)`` float64, on the CPU.
        labels: ``(n,)`` int64.
        num_classes: C.
        moments: For each use of a batch normalisation, over all samples.
        marks: ``(n,)`` one number that tells each sample.
        mean: Of all entries of the data.
        deviation: Standard deviation of these.
        sample: The first sample, for shape, dtype and device.
    """

    features: Tensor
    labels: Tensor
    num_classes: int
    moments: tuple[Moments, ...]
    marks: Tensor
    mean: float
    deviation: float
    sample: Tensor


def survey(teacher: Teacher, data: Labelled, points_per_class: int) -> Survey:
    """Read the real samples once.

    Args:
        teacher: The private copy of the model.
        data: The samples and their labels.
        points_per_class: Samples that each class needs.

    Returns:
        What they show.

    Raises:
        InputError: If labels are out of range, or a class has too few samples.
    """
    features, labels, marks = [], [], []
    num_classes: int | None = None
    moments: tuple[Moments, ...] = ()
    entries, sample = None, None
    for x, y in data.batches():
        if num_classes is None:
            num_classes, sample = teacher.look(x[:1], y[:1], None).logits.shape[1], x[0].clone()
        _check_range(y, num_classes)
        view = teacher.look(x, y, num_classes)
        here = tuple(moment.double() for moment in view.moments)
        moments = tuple(a.joined(b) for a, b in zip(moments, here, strict=True)) if moments else here
        everyone = torch.ones(1, len(x), dtype=torch.int64, device=x.device)
        part = class_moments(x.double().flatten(1).unsqueeze(1), everyone).double()
        entries = part if entries is None else entries.joined(part)
        features.append(view.features.double().cpu())
        labels.append(y)
        marks.append(marks_of(x))
    if num_classes is None or entries is None or sample is None:
        raise InputError("there are no samples")
    data.mark(torch.cat(marks))
    _check_counts(torch.cat(labels), num_classes, points_per_class)
    return Survey(
        torch.cat(features),
        torch.cat(labels),
        num_classes,
        moments,
        torch.cat(marks),
        float(entries.means),
        float(entries.variances.sqrt()),
        sample,
    )


def _check_range(labels: Tensor, num_classes: int) -> None:
    outside = (labels < 0) | (labels >= num_classes)
    if bool(outside.any()):
        raise InputError(
            f"label {int(labels[outside][0])} is out of range: the model has {num_classes} logits"
        )


def _check_counts(labels: Tensor, num_classes: int, needed: int) -> None:
    counts = torch.bincount(labels, minlength=num_classes)
    worst = int(counts.argmin())
    if int(counts[worst]) == 0:
        raise InputError(f"class {worst} is empty: every class of the model's {num_classes} needs samples")
    if int(counts[worst]) < needed:
        raise InputError(
            f"class {worst} has {int(counts[worst])} samples, fewer than points_per_class={needed}"
        )
