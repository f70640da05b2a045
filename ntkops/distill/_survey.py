"""Labelled samples, read batch by batch, and what one pass over them shows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError, NonDeterministicDataError, NonFiniteError
from ._teacher import Moments, Teacher, class_moments

__all__ = ["Labelled", "Survey", "survey"]

_BATCH = 256  # samples of a tensor in memory that are run at once


class Labelled:
    """Pairs of samples and labels, held in memory or read from a re-iterable of batches.

    Args:
        data: ``(x, y)``, or a re-iterable of such batches: x one floating tensor, samples first, y integers.
        device: Where the model lives.

    Raises:
        InputError: If it is neither.
    """

    def __init__(self, data: Any, device: torch.device) -> None:
        pair = isinstance(data, (tuple, list)) and len(data) == 2 and isinstance(data[0], Tensor)
        self._pair = (data[0], data[1]) if pair else None
        self._source: Iterable[Any] = () if pair else data
        self._device = device
        self._marks: Tensor | None = None
        if isinstance(data, Tensor):
            raise InputError(_MISSING)
        if not pair and (not isinstance(data, Iterable) or iter(data) is data):
            raise InputError(
                f"{type(data).__name__} cannot be read more than once: pass (x, y), or something that gives "
                "its batches anew for every loop, such as a DataLoader or a list"
            )
        if pair:
            _check(*self._pair)  # type: ignore[misc]

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield samples on the model's device, and their labels on the CPU."""
        if self._pair is not None:
            x, y = self._pair
            for start in range(0, len(x), _BATCH):
                part = slice(start, start + _BATCH)
                yield x[part].detach().to(self._device), _labels(y[part])
            return
        for batch in self._source:
            if not isinstance(batch, (tuple, list)) or len(batch) != 2:
                raise InputError(_MISSING)
            _check(*batch)
            yield batch[0].detach().to(self._device), _labels(batch[1])

    def mark(self, marks: Tensor) -> None:
        """Keep what tells the samples of the first pass from others: one number each."""
        self._marks = marks

    def select(self, indices: Tensor) -> Tensor:
        """Return some samples, in the order of the indices, in one pass.

        Raises:
            NonDeterministicDataError: If the samples are not those of the first pass.
        """
        found: dict[int, Tensor] = {}
        wanted, start = set(indices.tolist()), 0
        for x, _ in self.batches():
            here = marks_of(x)
            first = None if self._marks is None else self._marks[start : start + len(x)]
            if first is not None and not torch.equal(first, here):
                raise NonDeterministicDataError(
                    f"samples {start} to {start + len(x) - 1} are not those of the first pass: medoids need "
                    "data in a fixed order (shuffle=False, no random augmentation), or start='noise'"
                )
            found |= {start + i: x[i].clone() for i in range(len(x)) if start + i in wanted}
            start += len(x)
        return torch.stack([found[i] for i in indices.tolist()])


_MISSING = (
    "labels are missing: there is one barycentre for each class; pass (x, y), or a re-iterable of batches "
    "(x, y)"
)


def marks_of(x: Tensor) -> Tensor:
    """Return one number for each sample, on the CPU."""
    return x.detach().cpu().double().flatten(1).sum(1)


def _labels(y: Any) -> Tensor:
    return torch.as_tensor(y).detach().cpu().long()


def _check(x: Any, y: Any) -> None:
    if y is None:
        raise InputError(_MISSING)
    labels = torch.as_tensor(y)
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2:
        raise InputError(
            "samples are moved along a gradient: each batch has to be one floating tensor (B, ...)"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool or labels.dim() != 1:
        raise InputError(
            f"labels are class numbers, a vector of integers; got {labels.dtype} of shape "
            f"{tuple(labels.shape)}"
        )
    if len(x) != len(labels) or not len(x):
        raise InputError(f"{len(x)} samples with {len(labels)} labels")
    if not bool(torch.isfinite(x).all()):
        raise NonFiniteError("a sample holds NaN or infinity")


# one pass over them: their features, and what enters the normalisations


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
