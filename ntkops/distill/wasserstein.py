"""Data distillation by matching features in the Wasserstein metric."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..arguments import checked
from ..errors import InputError
from ..model.context import safe_context, untouched_randomness
from ..results import Barycenter, SyntheticData
from ._descent import Options, Record, descend, resolve_run
from ._survey import Labelled, Survey, survey
from ._teacher import Teacher
from .barycenter import wasserstein_barycenter

__all__ = ["wasserstein"]

Augmentation = Callable[[Tensor, torch.Generator], Tensor]

_KIND = "wasserstein"
_BETAS = (0.5, 0.9)  # of Adam, as in the authors' code


@checked
def wasserstein(
    model: nn.Module,
    data: tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]],
    points_per_class: int,
    *,
    features: str | Callable[..., Tensor] | None = None,
    weights: Literal["free", "uniform"] = "free",
    start: Literal["medoids", "noise"] = "medoids",
    iterations: int = 400,
    learning_rate: float = 0.25,
    features_weight: float = 1.0,
    statistics_weight: float = 1.0,
    augment: Augmentation | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    path: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 50,
) -> SyntheticData:
    r"""Synthesise labelled samples whose features are the Wasserstein barycentres of each class (WMDD).

    Features of the real samples give k barycentre points :math:`b_{cj}` for each class, with weights. Adam
    then moves the pixels of k samples a class down

    .. math:: \mathrm{CE}(f(\tilde x), c) + w_F \|F(\tilde x) - b\|_F
              + w_S \sum_\ell \frac1C \sum_c \|\mu_{\ell c} - \tilde\mu_{\ell c}\|
              + \|\sigma^2_{\ell c} - \tilde\sigma^2_{\ell c}\|

    with the means and variances of each class at the inputs of each batch normalisation ℓ. As in the
    authors' code these are variances and the norm of the features is not squared, where the text of the
    distilled-kernel paper has standard deviations and a square. Variances are those of all samples of a
    class, their spread between batches included, and do not depend on how the data are batched. The
    targets are the model's logits at the samples found, so that they can be regressed on.

    The model is never touched: a private copy runs in evaluation mode, whatever the mode of the model.

    Args:
        model: Classifier with logits ``(B, C)``.
        data: ``(x, y)``, or a re-iterable of such batches, such as a DataLoader: one floating tensor with the
            samples first, and class numbers below C, every class at least ``points_per_class`` times. It is
            read once, and for ``start="medoids"`` once more, in the same order.
        points_per_class: k.
        features: What the features are: the path of a module, whose output is flattened; a callable
            ``(model, x) -> features``, given the private copy; None for what enters the last linear layer.
        weights: "free": k-means, which is the barycentre of one measure; "uniform": every point stands for
            1/k of its class, up to a sample; see `wasserstein_barycenter`.
        start: "medoids": the real samples with features nearest to the barycentre points, each once;
            "noise": normal, with mean and standard deviation of all entries of the data.
        iterations: Steps of Adam; the learning rate falls to zero along half a cosine.
        learning_rate: First step, in units of the standard deviation of all entries of the data.
        features_weight: :math:`w_F`, at least 0.
        statistics_weight: :math:`w_S`, at least 0; 0 where the model has no batch normalisation. It depends
            on the data: the authors take .01 to 500.
        augment: Differentiable ``(samples, generator) -> samples`` applied before each pass; the last
            iterate is then returned, without it the best.
        generator: CPU generator of clusters, noise and augmentation; None draws a seed.
        progress: Show a bar of iterations.
        path: File to go on from: written every ``checkpoint_every`` iterations and at the end, read if it is
            there. A run that was interrupted ends with the same bits. Callables are known by name alone.
        checkpoint_every: Iterations between two writings.

    Returns:
        `SyntheticData` with s = k·C samples. Cost: one or two passes over the data, the barycentres, and for
        each iteration one forward and one backward pass over all s samples at once. The features of the data
        are held in memory, in float64.

    Raises:
        InputError: If labels are missing or out of range, a class is empty or has too few samples or
            different features, there is no batch normalisation for its statistics, or an option is not
            understood.
        NonDeterministicDataError: If the second pass over the data differs from the first.
        UnsupportedModelError: If the model cannot be copied.
        OutputError: If logits or features are not one row for each sample.
        NonFiniteError: If data or features are not finite, or the descent diverges.
        MissingDependencyError: If scikit-learn is not installed.
        CheckpointError: If the file is damaged, or of another run.

    References:
        Liu et al., "Dataset distillation via the Wasserstein metric" (2025), and its code; section 4.1 and
        appendix C.5 of the distilled-kernel paper.

    Example:
        >>> import torch
        >>> from ntkops.distill.wasserstein import wasserstein
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(3, 8),
        ...     torch.nn.BatchNorm1d(8),
        ...     torch.nn.ReLU(),
        ...     torch.nn.Linear(8, 2),
        ... )
        >>> x, y = torch.randn(40, 3), torch.arange(40) % 2
        >>> found = wasserstein(
        ...     model,
        ...     (x, y),
        ...     3,
        ...     iterations=10,
        ...     generator=torch.Generator().manual_seed(0),
        ... )
        >>> (
        ...     found.inputs.shape,
        ...     found.labels.tolist(),
        ...     found.loss <= float(found.losses[0]),
        ...     model.training,
        ... )
        (torch.Size([6, 3]), [0, 0, 0, 1, 1, 1], True, True)
    """
    started = time.perf_counter()
    options = Options(iterations, learning_rate, _BETAS, progress, keep_last=augment is not None)
    record = Record(path, _KIND, checkpoint_every)
    options.check()
    record.check()
    _check(points_per_class, weights, start, features_weight, statistics_weight)
    teacher = Teacher(model, features, statistics_weight > 0)
    labelled = Labelled(data, teacher.device)
    generator, seed = resolve_run(generator, record)
    with (
        torch.inference_mode(False),
        untouched_randomness(teacher.device),
        safe_context(teacher.device, math_attention=False),
    ):
        drawn = generator.get_state()
        with torch.no_grad():
            real = survey(teacher, labelled, points_per_class)
        record = record.of(
            model=dict(teacher.model.state_dict()),
            data=[real.marks, real.labels],
            functions=[_name(features), _name(augment)],
            options=[points_per_class, weights, start, iterations, float(learning_rate)],
            loss=[float(features_weight), float(statistics_weight)],
            generator=drawn,
        )
        centres = _centres(real, points_per_class, weights, generator)
        indices = _medoids(real, centres) if start == "medoids" else None
        z = _noise(real, points_per_class, generator) if indices is None else labelled.select(indices)
        labels = torch.arange(real.num_classes).repeat_interleave(points_per_class)
        objective = Synthesis(
            teacher,
            labels.to(z.device),
            torch.cat([centre.points for centre in centres]).to(z),
            real,
            (features_weight, statistics_weight),
            None if augment is None else (augment, generator),
        )
        scale = real.deviation or 1.0
        with torch.enable_grad():
            ended = descend(objective, z, options, record, generator, seed=seed, scale=scale)
        with torch.no_grad():
            targets = teacher.look(ended.z, labels, None).logits
    return SyntheticData(
        inputs=ended.z,
        targets=targets,
        labels=labels,
        weights=torch.cat([centre.weights for centre in centres]),
        transport=torch.tensor([centre.cost for centre in centres], dtype=torch.float64),
        losses=ended.history[:, 0],
        terms={name: ended.history[:, 1 + i] for i, name in enumerate(objective.terms)},
        iteration=ended.iteration,
        indices=indices,
        seed=seed,
        seconds=time.perf_counter() - started,
    )


def _check(
    points_per_class: int, weights: str, start: str, features_weight: float, statistics_weight: float
) -> None:
    if isinstance(points_per_class, bool) or not isinstance(points_per_class, int) or points_per_class < 1:
        raise InputError(f"points_per_class={points_per_class!r}; it is a number, at least 1")
    if weights not in ("free", "uniform"):
        raise InputError(f"weights={weights!r}: choose 'free' or 'uniform'")
    if start not in ("noise", "medoids"):
        raise InputError(f"start={start!r}: choose 'medoids' or 'noise'")
    for name, value in (("features_weight", features_weight), ("statistics_weight", statistics_weight)):
        if not math.isfinite(value) or value < 0:
            raise InputError(f"{name}={value!r}; it is a weight, at least 0")


def _name(function: Any) -> str | None:
    return (
        function if function is None or isinstance(function, str) else getattr(function, "__qualname__", "")
    )


def _centres(
    real: Survey, points_per_class: int, weights: Literal["free", "uniform"], generator: torch.Generator
) -> list[Barycenter]:
    """Return the barycentre of the features of each class."""
    classes = [real.features[real.labels == number] for number in range(real.num_classes)]
    return [
        wasserstein_barycenter(rows, points_per_class, weights=weights, generator=generator)
        for rows in classes
    ]


def _medoids(survey: Survey, centres: list[Barycenter]) -> Tensor:
    """Return distinct real samples, class by class, with features nearest to the barycentre points."""
    from scipy.optimize import linear_sum_assignment

    chosen = []
    for number, centre in enumerate(centres):
        members = (survey.labels == number).nonzero().flatten()
        distances = torch.cdist(
            centre.points, survey.features[members], compute_mode="donot_use_mm_for_euclid_dist"
        )
        _, columns = linear_sum_assignment(distances.square().numpy())
        chosen.append(members[torch.from_numpy(columns)])
    return torch.cat(chosen)


def _noise(survey: Survey, points_per_class: int, generator: torch.Generator) -> Tensor:
    shape = (survey.num_classes * points_per_class, *survey.sample.shape)
    drawn = torch.randn(shape, generator=generator, dtype=torch.float64)
    return (survey.mean + survey.deviation * drawn).to(survey.sample)


# the loss


class Synthesis:
    """Cross entropy, distance of the features to their targets, and of the statistics to the real ones.

    Args:
        teacher: The private copy of the model.
        labels: ``(s,)`` classes of the samples.
        points: ``(s, d)`` targets of their features.
        survey: What the real samples show.
        weights: Of features and statistics.
        augmentation: What is done to the samples before each pass, and what it draws from.
    """

    sampled = False

    def __init__(
        self,
        teacher: Teacher,
        labels: Tensor,
        points: Tensor,
        survey: Survey,
        weights: tuple[float, float],
        augmentation: tuple[Augmentation, torch.Generator] | None,
    ) -> None:
        self._teacher, self._labels, self._points = teacher, labels, points
        self._num_classes, self._weights, self._augmentation = survey.num_classes, weights, augmentation
        self._real = [(m.means.to(points), m.variances.to(points)) for m in survey.moments]
        self.terms: tuple[str, ...] = ("cross_entropy", "features", "statistics")

    def evaluate(self, z: Tensor) -> tuple[float, Tensor, tuple[float, ...]]:
        """Return loss, gradient and terms."""
        moving = z.detach().clone().requires_grad_()
        x = moving if self._augmentation is None else self._augmentation[0](moving, self._augmentation[1])
        total, terms = self._loss(x)
        (gradient,) = torch.autograd.grad(total, moving)
        return float(total.detach()), gradient, terms

    def judge(self, z: Tensor) -> float:
        """Return the loss, without augmentation."""
        with torch.no_grad():
            return float(self._loss(z)[0])

    def state(self) -> dict[str, float]:
        """Return nothing: the generator is kept with the run."""
        return {}

    def restore(self, state: Mapping[str, float]) -> None:
        """Take nothing."""

    def _loss(self, x: Tensor) -> tuple[Tensor, tuple[float, ...]]:
        view = self._teacher.look(x, self._labels, self._num_classes)
        entropy = nn.functional.cross_entropy(view.logits, self._labels)
        distance = torch.linalg.vector_norm(view.features - self._points)
        statistics = entropy.new_zeros(())
        for found, (means, variances) in zip(view.moments, self._real, strict=True):
            statistics = statistics + torch.linalg.vector_norm(found.means - means, dim=1).mean()
            statistics = statistics + torch.linalg.vector_norm(found.variances - variances, dim=1).mean()
        total = entropy + self._weights[0] * distance + self._weights[1] * statistics
        return total, (float(entropy.detach()), float(distance.detach()), float(statistics.detach()))
