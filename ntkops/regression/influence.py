"""Scores of training samples: what each of them is to each prediction, from stored features of gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from ..arguments import checked
from ..engines import format_bytes, tensor_bytes
from ..errors import (
    DenseMemoryError,
    DeviceError,
    DtypeError,
    InputError,
    ShapeError,
    ZeroKernelError,
)
from ..operators.products import dense_limit
from ..regression import GradientFeatures
from ._factorizations import CholeskyFactor
from ._operands import read_ridges, require_finite

if TYPE_CHECKING:
    from ..model.accepted import ArrayLike

__all__ = ["influence"]

Features: TypeAlias = GradientFeatures | Tensor

_TILE_BYTES = 2**25  # of a tile in float64


@checked
def influence(
    F: Features | Sequence[Features],
    F_test: Features | Sequence[Features],
    *,
    ridge: float = 1e-4,
    relative: bool = True,
    weights: ArrayLike | Sequence[Tensor] | None = None,
    max_dense_bytes: int | Literal["auto"] = "auto",
) -> Tensor:
    r"""Return scores of all training samples for all test samples, from features of their gradients.

    .. math:: S = \Phi_* (\Phi^\top \Phi + r)^{-1} \Phi^\top W = K_* (K + r)^{-1} W, \quad K = \Phi \Phi^\top

    It is the matrix that takes labels of the training samples to predictions of kernel ridge regression,
    times a weight of each sample. With features of the margin, log p / (1 - p) for the probability p of the
    label, and weights 1 - p, minus the derivative of the loss -log p by the margin, these are TRAK's scores.

    Of several checkpoints scores without weights are averaged, and multiplied by the average weights.

    Args:
        F: ``(N, k)`` features of the training samples: a `GradientFeatures` or a tensor; or a list, one for
            each checkpoint.
        F_test: ``(M, k)`` features of the test samples, through the same projections; a list where F is one.
        ridge: r ≥ 0.
        relative: Whether it is a multiple of the mean diagonal of K, for each checkpoint; False for an
            absolute one, as TRAK's.
        weights: ``(N,)`` weights of the training samples; a list, one for each checkpoint, whose mean is
            taken; None for one.
        max_dense_bytes: Largest result; "auto" for a quarter of what is free.

    Returns:
        ``(M, N)`` in the dtype of the features, float32 for half precision; sums and products are made in
        float64. Cost: 2 N k² + 2 M N k flops a checkpoint. Memory: the result, k² numbers, and two tiles of
        some 32 MB.

    Raises:
        InputError: If features, checkpoints, weights or the ridge are not such.
        ShapeError: If they do not fit.
        DtypeError: If features have no floating dtype, or different ones.
        DeviceError: If tensors live on different devices.
        NonFiniteError: If one of them holds NaN or infinity.
        CheckpointError: If stored features are of different networks, parameters or projections.
        SingularKernelError: If the ridge is below what rounding leaves of the smallest eigenvalue.
        ZeroKernelError: If the ridge is relative to features that are zero.
        DenseMemoryError: If the result is larger than ``max_dense_bytes``, before any work.

    References:
        Park, Georgiev, Ilyas, Leclerc, Madry, TRAK: Attributing model behavior at scale (2023), section 3.

    Example:
        >>> import torch, ntkops
        >>> draw = torch.Generator().manual_seed(0)
        >>> F, F_test = (torch.randn(n, 5, generator=draw).double() for n in (40, 3))
        >>> scores = ntkops.influence(F, F_test)
        >>> labels = torch.randn(40, generator=draw).double()
        >>> fitted = ntkops.KernelRidge(1e-4).fit(F @ F.T, labels)
        >>> scores.shape, bool(torch.allclose(scores @ labels, fitted.predict(F_test @ F.T)))
        (torch.Size([3, 40]), True)
    """
    trained, tested = _read_checkpoints(F, "F"), _read_checkpoints(F_test, "F_test")
    _require_pairs(trained, tested)
    (absolute,) = read_ridges(float(ridge))
    first = trained[0]
    dtype = torch.promote_types(first.dtype, torch.float32)
    shape = torch.Size((tested[0].shape[0], first.shape[0]))
    needed, limit = tensor_bytes(shape, dtype), dense_limit(max_dense_bytes, _device(first))
    if needed > limit:
        raise DenseMemoryError(
            f"the {shape[0]} x {shape[1]} scores need {format_bytes(needed)}, above max_dense_bytes="
            f"{format_bytes(limit)}: score the test samples in parts, F_test[a:b], or raise it"
        )
    scale = _read_weights(weights, len(trained), shape[1])
    scores = torch.zeros(shape, dtype=dtype, device=_device(first))
    for train, test in zip(trained, tested, strict=True):
        factor = _factor(train, absolute, relative)
        for rows, new in _tiles(test, "F_test"):
            solved = factor.dual(new.mT).mT  # (m, k)
            for columns, tile in _tiles(train, "F"):
                scores[rows, columns] += (solved @ tile.mT / len(trained)).to(dtype)
    return scores if scale is None else scores.mul_(scale.to(scores))


def _factor(train: Features, ridge: float, relative: bool) -> CholeskyFactor:
    """Return the factor of Φᵀ Φ + r.

    Raises:
        SingularKernelError: If it is singular beside its rounding.
        ZeroKernelError: If the ridge is relative to nothing.
    """
    gram = torch.zeros(train.shape[1], train.shape[1], dtype=torch.float64, device=_device(train))
    for _, tile in _tiles(train, "F"):
        gram.addmm_(tile.mT, tile)
    scale = float(gram.trace()) / train.shape[0]
    if relative and not scale > 0:
        raise ZeroKernelError("the features are zero, so that no ridge is relative to them: relative=False")
    absolute = ridge * scale if relative else ridge
    return CholeskyFactor(gram, absolute, torch.float64, scale if relative else None)


def _tiles(features: Features, what: str) -> Iterator[tuple[slice, Tensor]]:
    """Yield rows and their features in float64, checked."""
    step = max(1, _TILE_BYTES // (8 * features.shape[1]))
    parts = [(0, features.shape[0], features)] if isinstance(features, Tensor) else features.tiles()
    for first, last, held in parts:
        for start in range(first, last, step):
            stop = min(start + step, last)
            tile = held[start - first : stop - first].detach()
            yield slice(start, stop), require_finite(tile, what).double()


def _read_checkpoints(given: Any, what: str) -> list[Features]:
    """Return the features of each checkpoint.

    Raises:
        InputError: If they are nothing of the kind.
        ShapeError: If one is no matrix with entries.
        DtypeError: If they are not of one floating dtype.
        DeviceError: If they live on different devices.
    """
    found = list(given) if isinstance(given, list | tuple) else [given]
    if not found:
        raise InputError(f"{what} is empty: pass the features of one checkpoint at least")
    for one in found:
        if not isinstance(one, Tensor | GradientFeatures):
            raise InputError(
                f"{what}: pass what gradient_features returns, an (n, k) tensor, or a list of them, one a "
                f"checkpoint; got a {type(one).__name__}"
            )
        if len(one.shape) != 2 or 0 in one.shape:
            raise ShapeError(f"{what} has shape {tuple(one.shape)}: features are (n, k), with entries")
        if not one.dtype.is_floating_point or one.dtype != found[0].dtype:
            raise DtypeError(f"{what} has dtype {one.dtype}: pass features of one floating dtype")
        if _device(one) != _device(found[0]):
            raise DeviceError(f"{what} lives on {_device(one)} and {_device(found[0])}: move one of them")
    return found


def _require_pairs(trained: list[Features], tested: list[Features]) -> None:
    """Raise unless each checkpoint has training and test features that may meet."""
    if len(trained) != len(tested):
        raise InputError(f"F has {len(trained)} checkpoints, F_test {len(tested)}: pass both of each")
    for number, (train, test) in enumerate(zip(trained, tested, strict=True)):
        where = f"checkpoint {number}: " if len(trained) > 1 else ""
        if train.shape[1] != test.shape[1]:
            raise ShapeError(
                f"{where}F has {train.shape[1]} features a row, F_test {test.shape[1]}: project both alike"
            )
        if (train.shape[0], test.shape[0]) != (trained[0].shape[0], tested[0].shape[0]):
            raise ShapeError(f"{where}other numbers of rows than those of the first checkpoint")
        if train.dtype != test.dtype:
            raise DtypeError(f"{where}F has dtype {train.dtype}, F_test {test.dtype}; cast one of them")
        if _device(train) != _device(test):
            raise DeviceError(f"{where}F lives on {_device(train)}, F_test on {_device(test)}")
        if isinstance(train, GradientFeatures) and isinstance(test, GradientFeatures):
            train.require_same_network(test)


def _read_weights(weights: Any, checkpoints: int, rows: int) -> Tensor | None:
    """Return the mean weights of the training samples, ``(N,)`` in float64, or None.

    Raises:
        InputError: If they are no numbers, or not as many vectors as checkpoints.
        ShapeError: If they are not one a row.
        NonFiniteError: If one is NaN or infinite.
    """
    if weights is None:
        return None
    several = isinstance(weights, list | tuple) and any(isinstance(one, Tensor) for one in weights)
    if several and len(weights) != checkpoints:
        raise InputError(f"{len(weights)} vectors of weights for {checkpoints} checkpoints")
    try:
        given = weights if several else [weights]
        is_complex = any(torch.as_tensor(one).is_complex() for one in given)
        found = [] if is_complex else [torch.as_tensor(one, dtype=torch.float64) for one in given]
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"weights are no vector of numbers: {error}") from error
    if is_complex:
        raise InputError("weights are complex: pass real numbers, such as .real")
    for one in found:
        if tuple(one.shape) != (rows,):
            raise ShapeError(f"weights have shape {tuple(one.shape)}, due is ({rows},): one a row of F")
        require_finite(one, "the weights")
    return torch.stack([one.detach() for one in found]).mean(0)


def _device(features: Features) -> torch.device:
    return features.device if isinstance(features, Tensor) else torch.device("cpu")
