"""Losses of outputs: values, gradients, and factors of their Hessians, sample by sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from linear_operator.operators import DiagLinearOperator, LinearOperator
from torch import Tensor

from ..arguments import checked
from ..errors import DeviceError, DtypeError, InputError, NonFiniteError, OutOfRangeError, ShapeError
from ..operators.block_diagonal import DenseBlocks, RankOneBlocks

if TYPE_CHECKING:
    from ..model.accepted import ArrayLike, LossLike

__all__ = [
    "CrossEntropy",
    "Loss",
    "PerSample",
    "SquaredError",
    "as_targets",
    "hessian_factor",
    "is_convex",
    "loss_with_targets",
    "read_loss",
]

_CONCAVE = 1e-6  # share of the largest curvature, below which a negative one is rounding
_ROUNDING = 1e-10  # the same where the Hessian itself is wanted, in float64
_CHUNK = 256  # samples whose Hessians are differentiated at a time
_SLACK = 1e-4  # by which a sum of probabilities may differ from 1: they count as they are
IGNORED = -100  # the class of torch's cross-entropy that counts for nothing


class Loss(Protocol):
    """A loss of outputs ``(N, ...)``: a sum over terms, whose mean `value` and `gradient` are of."""

    def terms(self, outputs: Tensor) -> int:
        """Return the number of terms that the mean is over."""

    def value(self, outputs: Tensor) -> Tensor:
        """Return the mean, ``()``."""

    def gradient(self, outputs: Tensor) -> Tensor:
        """Return the gradient of the mean, ``(N, ...)``."""

    def curvature(self, outputs: Tensor) -> tuple[float, float]:
        """Return the least and the largest curvature of the mean that is known of."""

    def hessian_factor(self, outputs: Tensor, scale: float = 1.0) -> LinearOperator:
        """Return S ``(n, r)`` with S Sᵀ the Hessian of ``scale`` times the sum over terms."""


class SquaredError:
    """(f - Y)², term by term; the mean is over samples and outputs, as torch has it.

    Args:
        targets: ``(N, ...)``; None where its value is not asked for.
    """

    def __init__(self, targets: Tensor | None = None) -> None:
        self._targets = targets

    def terms(self, outputs: Tensor) -> int:
        """Return the number of terms that the mean is over."""
        return outputs.numel()

    def value(self, outputs: Tensor) -> Tensor:
        """Return the mean, ``()``."""
        return (outputs - _given(self._targets)).square().mean()

    def gradient(self, outputs: Tensor) -> Tensor:
        """Return the gradient of the mean, ``(N, ...)``."""
        return 2 / self.terms(outputs) * (outputs - _given(self._targets))

    def curvature(self, outputs: Tensor) -> tuple[float, float]:
        """Return the least and the largest curvature of the mean that is known of."""
        return 2 / self.terms(outputs), 2 / self.terms(outputs)

    def hessian_factor(self, outputs: Tensor, scale: float = 1.0) -> LinearOperator:
        """Return S with S Sᵀ the Hessian of ``scale`` times the sum over terms."""
        return DiagLinearOperator(outputs.new_full((outputs.numel(),), (2 * scale) ** 0.5))


class CrossEntropy:
    """-Σ y log softmax(f), for each sample and each position before the classes, which come last.

    Args:
        targets: ``(N, ..., C)`` probabilities, all 0 where a position counts for nothing; None where only its
            curvature is asked for, and each position counts.
    """

    def __init__(self, targets: Tensor | None = None) -> None:
        self._targets = targets
        self._sums = None if targets is None else targets.sum(-1, keepdim=True)
        self._count = None if self._sums is None else max(int((self._sums > 0).sum()), 1)

    def _weights(self, outputs: Tensor) -> Tensor:
        """Return Σ y, ``(N, ..., 1)``."""
        return outputs.new_ones((*outputs.shape[:-1], 1)) if self._sums is None else self._sums

    def terms(self, outputs: Tensor) -> int:
        """Return the number of terms that the mean is over."""
        return outputs[..., 0].numel() if self._count is None else self._count

    def value(self, outputs: Tensor) -> Tensor:
        """Return the mean, ``()``."""
        return -(_given(self._targets) * outputs.log_softmax(-1)).sum() / self.terms(outputs)

    def gradient(self, outputs: Tensor) -> Tensor:
        """Return the gradient of the mean, ``(N, ...)``."""
        shares = outputs.softmax(-1) * self._weights(outputs)
        return (shares - _given(self._targets)) / self.terms(outputs)

    def curvature(self, outputs: Tensor) -> tuple[float, float]:
        """Return the least and the largest curvature of the mean that is known of."""
        # diag(p) - p pᵀ lies between 0 and 1/2 (Böhning 1992).
        return 0.0, 0.5 / self.terms(outputs)

    def hessian_factor(self, outputs: Tensor, scale: float = 1.0) -> LinearOperator:
        """Return S with S Sᵀ the Hessian of ``scale`` times the sum over terms."""
        # S = diag(√p) - p √pᵀ: S Sᵀ = diag(p) - p pᵀ, since √pᵀ √p = 1. Nothing is inverted and nothing
        # decomposed, and √p = exp(½ log p) is there long after p itself has underflown.
        logs = outputs.double().log_softmax(-1).flatten(0, -2)  # (positions, C)
        size = (scale * self._weights(outputs).double().flatten(0, -2)).sqrt()
        root = (logs / 2).exp()
        parts = size * root, size * logs.exp(), root
        return RankOneBlocks(*(part.to(outputs.dtype) for part in parts))


class PerSample:
    """A function of one sample's outputs and targets; the mean is over samples.

    Args:
        function: ``(outputs, targets) -> ()``, of tensors without a sample axis, made of torch operations.
        targets: ``(N, ...)``.
        outputs: ``(N, ...)``, an example; None where outputs have the shape of the targets.

    Raises:
        InputError: If it is not that.
    """

    def __init__(
        self, function: Callable[[Tensor, Tensor], Tensor], targets: Tensor, outputs: Tensor | None = None
    ) -> None:
        example = targets if outputs is None else outputs
        self._targets = targets
        self._values = torch.func.vmap(function)
        self._gradients = torch.func.vmap(torch.func.grad(function))
        # Backwards twice: some functions have no forward mode, and that of others is wrong.
        twice = torch.func.jacrev(torch.func.grad(function))
        self._hessians = torch.func.vmap(twice, chunk_size=_CHUNK)
        try:
            shape = tuple(torch.as_tensor(function(example[0], targets[0])).shape)
            found = self._gradients(example[:1], targets[:1]) if shape == () else None
        except Exception as error:
            shapes = f"outputs {tuple(example.shape[1:])}, targets {tuple(targets.shape[1:])}"
            raise InputError(f"the loss {function!r} fails on one sample ({shapes}): {error}") from error
        if shape != () or not isinstance(found, Tensor):
            raise InputError(f"the loss of one sample has to be a single number, this one has shape {shape}")

    def terms(self, outputs: Tensor) -> int:
        """Return the number of terms that the mean is over."""
        return len(outputs)

    def value(self, outputs: Tensor) -> Tensor:
        """Return the mean, ``()``."""
        return self._values(outputs, self._targets).mean()

    def gradient(self, outputs: Tensor) -> Tensor:
        """Return the gradient of the mean, ``(N, ...)``."""
        return self._gradients(outputs, self._targets) / len(outputs)

    def _blocks(self, outputs: Tensor) -> Tensor:
        """Return the Hessian of each sample, ``(N, O, O)``."""
        size = outputs[0].numel()
        try:
            found = self._hessians(outputs, self._targets)
        except (NotImplementedError, RuntimeError) as error:
            raise InputError(f"the loss has no second derivative in its outputs: {error}") from error
        return found.reshape(len(outputs), size, size)

    def curvature(self, outputs: Tensor) -> tuple[float, float]:
        """Return the least and the largest curvature of the mean that is known of."""
        values = torch.linalg.eigvalsh(self._blocks(outputs)) / len(outputs)
        return float(values.min()), float(values.max())

    def hessian_factor(self, outputs: Tensor, scale: float = 1.0) -> LinearOperator:
        """Return V √λ for each sample, from the eigenvalues λ and eigenvectors V of its Hessian.

        Raises:
            InputError: If an eigenvalue is negative by more than rounding.
            NonFiniteError: If a Hessian is not finite.
        """
        blocks = self._blocks(outputs.double())
        bad = ~blocks.isfinite().flatten(1).all(1)
        if bool(bad.any()):
            raise NonFiniteError(
                f"the Hessian of the loss of sample {int(bad.nonzero()[0])} holds NaN or infinity; its "
                f"outputs are {_shown(outputs[int(bad.nonzero()[0])])}"
            )
        # H = V λ Vᵀ, S = V √λ: a Cholesky factor would stop at a zero eigenvalue, which a constant added to
        # logits gives
        values, vectors = torch.linalg.eigh((blocks + blocks.mT) / 2)  # ascending
        worst = int(values[:, 0].argmin())
        if not is_convex(float(values[worst, 0]), float(values.max()), _ROUNDING):
            raise InputError(
                f"the loss is not convex in the outputs of sample {worst}: its Hessian has the eigenvalue "
                f"{float(values[worst, 0]):.3g}, so that there is no S with H = S Sᵀ; pass a loss that is "
                "convex in the outputs"
            )
        return DenseBlocks((vectors * (scale * values.clamp(min=0)).sqrt().unsqueeze(-2)).to(outputs.dtype))


def _given(targets: Tensor | None) -> Tensor:
    assert targets is not None, "a value or gradient is asked of a loss without targets"
    return targets


def _shown(outputs: Tensor) -> str:
    return "[" + ", ".join(f"{value:.3g}" for value in outputs.flatten()[:6].tolist()) + "]"


def read_loss(loss: Any) -> str:
    """Return the kind of a loss: "mse", "cross_entropy" or "callable".

    Raises:
        InputError: If it is none of these.
    """
    if callable(loss):
        return "callable"
    if loss not in ("mse", "cross_entropy"):
        raise InputError(
            f"loss={loss!r}: 'mse', 'cross_entropy', or a function (outputs, targets) -> number of one sample"
        )
    return str(loss)


def is_convex(least: float, largest: float, rounding: float = _CONCAVE) -> bool:
    """Whether a negative curvature is no more than rounding."""
    return least >= -rounding * max(abs(largest), abs(least))


def loss_with_targets(loss: Any, outputs: Tensor, targets: Any, *, needed: bool = False) -> Loss:
    """Return a loss of given outputs, checked.

    Args:
        loss: "mse", "cross_entropy", or a function of one sample's outputs and targets.
        outputs: ``(N, *tail)``.
        targets: ``(N, *tail)`` for "mse"; class numbers ``(N, *positions)``, of which -100 counts for
            nothing, or probabilities ``(N, *positions, C)``; for a function whatever it takes, ``(N, ...)``;
            or None.
        needed: Whether values or gradients will be asked for, too.

    Raises:
        InputError: If the loss is not understood, targets are missing, or are no probabilities.
        ShapeError: If they do not fit the outputs.
        DtypeError: If targets of "mse" are integers.
        DeviceError: If they live on another device.
        NonFiniteError: If they hold NaN or infinity.
        OutOfRangeError: If a class does not exist.
    """
    kind = read_loss(loss)
    if kind == "cross_entropy" and (outputs.dim() < 2 or outputs.shape[-1] < 2):
        raise InputError(
            f"loss='cross_entropy' takes outputs (N, ..., C) of two classes or more on the last axis, got "
            f"{tuple(outputs.shape)}; for one logit a sample pass a function, such as lambda f, y: "
            "torch.nn.functional.binary_cross_entropy_with_logits(f, y)"
        )
    if targets is None:
        if kind == "callable" or needed:
            what = "a loss of your own" if kind == "callable" else "the gradient of the loss"
            raise InputError(
                f"{what} needs targets: pass targets=, one for each of the {len(outputs)} samples"
            )
        return SquaredError() if kind == "mse" else CrossEntropy()
    found = _checked_targets(targets, outputs)
    if kind == "callable":
        found = found.double() if found.is_floating_point() else found
        return PerSample(loss, found, outputs.double())
    if kind == "mse":
        if not found.is_floating_point():
            raise DtypeError(
                f"loss='mse' takes targets of a floating dtype, got {found.dtype}; class numbers go with "
                "loss='cross_entropy', or as torch.nn.functional.one_hot(y).to(dtype)"
            )
        if found.shape != outputs.shape:
            raise ShapeError(f"targets {tuple(found.shape)} beside outputs {tuple(outputs.shape)}")
        return SquaredError(found.to(outputs.dtype))
    return CrossEntropy(_probabilities(found, outputs))


def as_targets(targets: Any) -> Tensor:
    """Return targets as a tensor without a graph.

    Raises:
        InputError: If they are nothing of the kind.
    """
    try:
        found = torch.as_tensor(targets).detach()
        if isinstance(targets, list | tuple) and found.is_floating_point():
            found = torch.as_tensor(targets, dtype=torch.float64)  # torch reads them as float32
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"targets: expected a tensor, got {type(targets).__name__}") from error
    return found


def _checked_targets(targets: Any, outputs: Tensor) -> Tensor:
    found = as_targets(targets).clone()  # gradients of the loss may be asked for later
    if found.is_complex():
        raise DtypeError(f"the targets have dtype {found.dtype}; pass real numbers, such as .real")
    if found.dim() == 0 or len(found) != len(outputs):
        raise ShapeError(
            f"targets of shape {tuple(found.shape)} for {len(outputs)} samples: one for each is needed"
        )
    if found.device != outputs.device:
        raise DeviceError(f"the outputs live on {outputs.device}, the targets on {found.device}")
    if found.is_floating_point() and not bool(found.isfinite().all()):
        raise NonFiniteError("the targets hold NaN or infinity")
    return found


def _probabilities(targets: Tensor, outputs: Tensor) -> Tensor:
    """Return ``(N, ..., C)`` probabilities, 0 at positions whose class number is -100."""
    if targets.is_floating_point():
        if targets.shape != outputs.shape:
            raise ShapeError(
                f"probabilities {tuple(targets.shape)} beside outputs {tuple(outputs.shape)}: classes are on "
                "the last axis"
            )
        slack = max(_SLACK, 1e3 * torch.finfo(targets.dtype).eps)
        if bool((targets < -slack).any()) or bool((targets.sum(-1) - 1).abs().gt(slack).any()):
            raise InputError("loss='cross_entropy' takes probabilities that are not negative and sum to 1")
        return targets.to(outputs.dtype)
    if targets.dtype == torch.bool or targets.shape != outputs.shape[:-1]:
        raise ShapeError(
            f"class numbers {tuple(targets.shape)} of {targets.dtype} beside outputs {tuple(outputs.shape)}: "
            f"integers of shape {tuple(outputs.shape[:-1])} are needed; where the classes are not on the "
            "last axis, move them there with output="
        )
    counted, classes = targets != IGNORED, outputs.shape[-1]
    outside = counted & ((targets < 0) | (targets >= classes))
    if bool(outside.any()):
        raise OutOfRangeError(
            f"classes go from 0 to {classes - 1} ({IGNORED} counts for nothing), the targets hold "
            f"{int(targets[outside][0])}"
        )
    chosen = torch.nn.functional.one_hot(targets.long().clamp(min=0), classes)
    return chosen.to(outputs.dtype) * counted.unsqueeze(-1)


@checked
def hessian_factor(
    outputs: Tensor, loss: LossLike, targets: ArrayLike | None = None, *, scale: float = 1.0
) -> LinearOperator:
    r"""Return a factor S of the Hessian of a loss in the outputs, :math:`H = S S^\top`, block diagonal.

    H is the Hessian of ``scale`` times the sum of the loss over samples. For the cross-entropy
    :math:`S = \mathrm{diag}(\sqrt p) - p \sqrt p^\top` exactly, without a decomposition, and finite however
    far the logits are saturated; for "mse" :math:`S = \sqrt 2 I`; any other from the eigenvalues and
    eigenvectors of each sample's Hessian.

    Args:
        outputs: ``(N, *tail)`` of a network.
        loss: "mse": Σ (f - y)², as ``torch.nn.MSELoss(reduction="sum")``; "cross_entropy", of the classes on
            the last axis, summed over samples and positions; or a function ``(outputs, targets) -> ()`` of
            one sample.
        targets: Needed for a function; "mse" and "cross_entropy" have a Hessian without. Class numbers of
            -100 count for nothing.
        scale: What the sum is multiplied by: 1 / N for a mean over N samples, ½ σ⁻² for the log-likelihood of
            a normal distribution with "mse".

    Returns:
        Lazy ``(n, r)``, rows sample-major as those of ``ntkops.jacobian``; n = r = N·O. Memory of a product:
        that of its result. Stored: 3 n for the cross-entropy, n for "mse", n·O for a function.

    Raises:
        InputError: If the loss is not understood or not convex in the outputs of a sample, or targets are
            missing.
        ShapeError: If targets do not fit.
        DtypeError: If outputs or targets have the wrong dtype.
        DeviceError: If they live on different devices.
        NonFiniteError: If one of them, or a Hessian, holds NaN or infinity.
        OutOfRangeError: If a class does not exist.

    Example:
        >>> import torch
        >>> from ntkops.curvature import hessian_factor
        >>> logits = torch.tensor([[0.0, 0.0], [0.0, 1000.0]]).double()
        >>> S = hessian_factor(logits, "cross_entropy")
        >>> torch.allclose((S @ S.mT).diagonal(), torch.tensor([0.25, 0.25, 0.0, 0.0]).double())
        True
    """
    if not 0 < scale < float("inf"):
        raise InputError(f"scale={scale!r}: pass a positive, finite number")
    outputs = require_outputs(outputs)
    return loss_with_targets(loss, outputs, targets).hessian_factor(outputs, scale)


def require_outputs(outputs: Tensor) -> Tensor:
    """Return outputs ``(N, *tail)`` without a graph, checked."""
    if not isinstance(outputs, Tensor) or outputs.dim() == 0 or not outputs.numel():
        raise ShapeError("outputs: expected a tensor (N, *tail) with entries")
    if not outputs.dtype.is_floating_point:
        raise DtypeError(f"outputs have dtype {outputs.dtype}; a real floating dtype is needed")
    bad = ~outputs.isfinite().flatten(1).all(1) if outputs.dim() > 1 else ~outputs.isfinite()
    if bool(bad.any()):
        raise NonFiniteError(f"the outputs of sample {int(bad.nonzero()[0])} hold NaN or infinity")
    return outputs.detach()
