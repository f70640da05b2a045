"""Losses of inducing points and their gradients, in closed form down to the blocks of the kernel.

No derivative goes through a factorisation: an objective turns the blocks K_ZZ and K_XZ into a value and
into cotangents of these blocks, in float64, and the frame carries the cotangents on to the samples.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import SingularKernelError
from ..regression._operands import Layout
from ._frames import Frame, Scene

__all__ = ["EnergyObjective", "RegressionObjective"]

logger = logging.getLogger(__name__)

_LARGEST_JITTER = 1e-2


class _Kernels:
    """What the objectives share: which samples they see, and the factor of K_ZZ.

    Args:
        scene: Real and moving samples.
        batch_size: Real samples an evaluation; None for all of them.
        jitter: Multiple of the mean diagonal that is added to K_ZZ.
        generator: Draws the batches.
    """

    terms: tuple[str, ...] = ()

    def __init__(
        self, scene: Scene, batch_size: int | None, jitter: float, generator: torch.Generator
    ) -> None:
        self._scene, self._generator = scene, generator
        self._batch_size = batch_size
        self.sampled = batch_size is not None and batch_size < scene.num_samples
        self.jitter = jitter

    def state(self) -> dict[str, float]:
        """Return the jitter, which only ever grows."""
        return {"jitter": self.jitter}

    def restore(self, state: Mapping[str, float]) -> None:
        """Take it back."""
        self.jitter = state["jitter"]

    def _everything(self) -> Tensor:
        return torch.arange(self._scene.num_samples)

    def _samples(self) -> Tensor:
        if not self.sampled:
            return self._everything()
        drawn = torch.randperm(self._scene.num_samples, generator=self._generator)[: self._batch_size]
        return drawn.sort().values

    def _factor(self, square: Tensor, ridge: float = 0.0) -> Tensor:
        """Return the Cholesky factor of K_ZZ + (ridge + jitter · mean diagonal) I."""
        mean = square.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
        eye = torch.eye(square.shape[-1], dtype=square.dtype, device=square.device)
        symmetric = (square + square.mT) / 2
        while True:
            factor, info = torch.linalg.cholesky_ex(symmetric + (ridge + self.jitter * mean) * eye)
            if not bool(info.any()):
                return factor
            if self.jitter * 10 > _LARGEST_JITTER or not bool((mean > 0).all()):
                raise SingularKernelError(
                    f"the kernel of the inducing points has no Cholesky factor with {self.jitter:.1e} of its "
                    "mean diagonal added: take fewer points, or a smaller learning_rate"
                )
            self.jitter *= 10
            logger.info("jitter raised to %.1e of the mean diagonal", self.jitter)

    def _with_jitter(self, cotangent: Tensor) -> Tensor:
        """Add what the jitter, a multiple of the mean diagonal of K_ZZ, contributes to the cotangent."""
        size = cotangent.shape[-1]
        trace = cotangent.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]
        eye = torch.eye(size, dtype=cotangent.dtype, device=cotangent.device)
        return cotangent + self.jitter / size * trace * eye


class EnergyObjective(_Kernels):
    r"""The share of the energy outside the span of the inducing gradients.

    .. math:: \frac{\operatorname{tr}(K - K_{XZ} (K_{ZZ} + \delta I)^{-1} K_{ZX})}{\operatorname{tr} K}

    Args:
        scene: Real and moving samples.
        diagonal: ``(N,)`` the diagonal of K, summed over batch and outputs of a sample.
        batch_size: Real samples an evaluation; None for all.
        jitter: First jitter.
        generator: Draws the batches.
    """

    def __init__(
        self,
        scene: Scene,
        diagonal: Tensor,
        *,
        batch_size: int | None,
        jitter: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__(scene, batch_size, jitter, generator)
        self._diagonal = diagonal.cpu()

    def evaluate(self, z: Tensor) -> tuple[float, Tensor, tuple[float, ...]]:
        """Return share and gradient."""
        return self._over(z, self._samples())

    def judge(self, z: Tensor) -> float:
        """Return the share on all samples."""
        frame, samples = self._scene.frame(z, differentiate=False), self._everything()
        with torch.no_grad():
            factor = self._factor(frame.square)
            captured = 0.0
            for chunk in self._scene.chunks(samples, len(z)):
                captured += float(_whiten(factor, frame.cross(chunk)).square().sum())
        total = float(self._diagonal.sum())
        return (total - captured) / total

    def _over(self, z: Tensor, samples: Tensor) -> tuple[float, Tensor, tuple[float, ...]]:
        frame = self._scene.frame(z)
        factor = self._factor(frame.square)
        total = float(self._diagonal[samples].sum())
        captured, outer = 0.0, torch.zeros_like(frame.square)
        for chunk in self._scene.chunks(samples, len(z)):
            block = frame.cross(chunk)
            whitened = _whiten(factor, block)  # (*batch, m, b)
            solved = torch.linalg.solve_triangular(factor.mT, whitened, upper=True)
            captured += float(whitened.square().sum())
            outer += solved @ solved.mT
            frame.pull_cross(chunk, -2 / total * solved.mT)
        gradient = frame.gradient(self._with_jitter(outer / total))
        return (total - captured) / total, gradient, ()


class RegressionObjective(_Kernels):
    r"""The squared error on the real targets of a ridge regression on the inducing points.

    .. math:: \frac{\|Y - K_{XZ} (K_{ZZ} + \lambda I)^{-1} T\|_F^2}{\|Y\|_F^2}

    T is fixed, or the model's outputs at Z, or solved for. In the last case the regression on all real
    targets with weights in the span of the inducing gradients, and its penalty, is what is minimised, and
    T gives the same predictions.

    Args:
        scene: Real and moving samples.
        layout: How targets stand to the kernel.
        targets: ``(N, ...)`` real targets.
        ridge: λ, absolute.
        points_targets: T: fixed ``(m, ...)``; None for the model's outputs at Z.
        learn: Solve for T.
        batch_size: Real samples an evaluation; None for all.
        jitter: First jitter.
        generator: Draws the batches.
    """

    def __init__(
        self,
        scene: Scene,
        layout: Layout,
        targets: Tensor,
        *,
        ridge: float,
        points_targets: Tensor | None,
        learn: bool,
        batch_size: int | None,
        jitter: float,
        generator: torch.Generator,
    ) -> None:
        super().__init__(scene, batch_size, jitter, generator)
        self._layout, self._targets = layout, targets.double()
        self.ridge, self._fixed, self._learn = ridge, points_targets, learn

    def evaluate(self, z: Tensor) -> tuple[float, Tensor, tuple[float, ...]]:
        """Return error and gradient."""
        frame, samples = self._scene.frame(z), self._samples()
        value, gradient = (self._solved if self._learn else self._given)(frame, samples, len(z), True)
        assert gradient is not None
        return value, gradient, ()

    def judge(self, z: Tensor) -> float:
        """Return the error on all samples."""
        frame = self._scene.frame(z, differentiate=False)
        with torch.no_grad():
            return (self._solved if self._learn else self._given)(frame, self._everything(), len(z), False)[0]

    def point_targets(self, z: Tensor) -> Tensor:
        """Return T, ``(m, ...)``."""
        frame = self._scene.frame(z, differentiate=False)
        with torch.no_grad():
            if not self._learn:
                return self._layout.restore(self._right_hand_side(frame)[0])
            weights = self._weights(frame, self._everything(), len(z))[1]
            return self._layout.restore(frame.square @ weights + self.ridge * weights)

    def _right_hand_side(self, frame: Frame) -> tuple[Tensor, bool]:
        """Return T as columns, and whether it moves with z."""
        if self._fixed is not None:
            return self._layout.columns(self._fixed.double()), False
        return self._layout.columns(frame.states()), True

    def _columns(self, samples: Tensor) -> Tensor:
        return self._layout.columns(self._targets[samples.to(self._targets.device)])

    def _given(
        self, frame: Frame, samples: Tensor, size: int, differentiate: bool
    ) -> tuple[float, Tensor | None]:
        factor = self._factor(frame.square, self.ridge)
        right, moves = self._right_hand_side(frame)
        weights = torch.cholesky_solve(right, factor)  # (*batch, m, q)
        scale = float(self._targets[samples.to(self._targets.device)].square().sum())
        error, pulled = 0.0, torch.zeros_like(weights)
        for chunk in self._scene.chunks(samples, size):
            block = frame.cross(chunk)
            residual = block @ weights - self._columns(chunk)
            error += float(residual.square().sum())
            pulled += block.mT @ residual * (2 / scale)
            if differentiate:
                frame.pull_cross(chunk, residual @ weights.mT * (2 / scale))
        if not differentiate:
            return error / scale, None
        back = torch.cholesky_solve(pulled, factor)  # derivative in T
        if moves:
            frame.pull_states(self._layout.restore(back))
        outer = back @ weights.mT
        return error / scale, frame.gradient(self._with_jitter(-(outer + outer.mT) / 2))

    def _weights(self, frame: Frame, samples: Tensor, size: int) -> tuple[float, Tensor]:
        """Return the penalised error of the best weights, and these, ``(*batch, m, q)``."""
        factor = self._factor(frame.square)
        eye = torch.eye(frame.square.shape[-1], dtype=torch.float64, device=factor.device)
        gram, moment, squares = torch.zeros_like(frame.square), None, 0.0
        with torch.no_grad():
            for chunk in self._scene.chunks(samples, size):
                whitened, columns = _whiten(factor, frame.cross(chunk)), self._columns(chunk)
                gram += whitened @ whitened.mT
                part = whitened @ columns
                moment = part if moment is None else moment + part
                squares += float(columns.square().sum())
            assert moment is not None
            inner = torch.linalg.solve(gram + self.ridge * eye, moment)
        penalised = squares - float((inner * moment).sum())
        return penalised / squares, torch.linalg.solve_triangular(factor.mT, inner, upper=True)

    def _solved(
        self, frame: Frame, samples: Tensor, size: int, differentiate: bool
    ) -> tuple[float, Tensor | None]:
        value, weights = self._weights(frame, samples, size)
        if not differentiate:
            return value, None
        scale = float(self._targets.square().sum())
        for chunk in self._scene.chunks(samples, size):
            residual = frame.cross(chunk) @ weights - self._columns(chunk)
            frame.pull_cross(chunk, residual @ weights.mT * (2 / scale))
        # The weights are at their minimum, so that their own derivative does not enter.
        outer = weights @ weights.mT * (self.ridge / scale)
        return value, frame.gradient(self._with_jitter(outer))


def _whiten(factor: Tensor, block: Tensor) -> Tensor:
    """Return L⁻¹ K_ZX for the factor L and a block of K_XZ."""
    return torch.linalg.solve_triangular(factor, block.mT, upper=False)
