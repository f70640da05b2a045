"""The kernels between real samples and samples that move, with the derivative in those that move."""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import torch
from torch import Tensor

from ..engines import build_engine, tensor_bytes
from ..errors import InputError
from ..model import Inputs, Linearization
from ..operators import JacobianOperator, NTKOperator
from ..operators.axes import StateAxis

__all__ = ["Frame", "Scene", "moving_tensor"]

_SAMPLES = 64  # real samples whose block is differentiated at once, where their gradients are not kept
_ENTRIES = 1 << 24  # of a block of K_XZ
_UNLIMITED = 1 << 62


class Frame(Protocol):
    """Everything that an objective asks at one position of the moving samples z.

    Attributes:
        square: K_ZZ, ``(*batch, m, m)``, float64.
    """

    square: Tensor

    def cross(self, samples: Tensor) -> Tensor:
        """Return rows of K_XZ for some real samples, ``(*batch, b, m)``, float64."""
        ...

    def pull_cross(self, samples: Tensor, cotangent: Tensor) -> None:
        """Add the derivative of ``<cotangent, cross(samples)>`` in z to the gradient."""
        ...

    def states(self) -> Tensor:
        """Return the model's outputs at z that the kernel is of, ``(m, q)``, float64."""
        ...

    def pull_states(self, cotangent: Tensor) -> None:
        """Add the derivative of ``<cotangent, states()>`` in z to the gradient."""
        ...

    def gradient(self, cotangent: Tensor) -> Tensor:
        """Return the gradient, that of ``<cotangent, square>`` added."""
        ...


class Scene:
    """A kernel's real samples, and the model with moving samples.

    The parameters are fixed at the kernel's values; derivatives flow to the moving samples alone.

    Args:
        kernel: Square kernel over whole samples.
    """

    def __init__(self, kernel: NTKOperator) -> None:
        core = kernel._core
        self.kernel = kernel
        self.rows: StateAxis = kernel._rows
        self.linearization = _with_live_samples(core.engine.linearization)
        engine = build_engine(
            self.linearization, self.rows.inputs, "auto", batch_size="auto", chunk_size="auto"
        )
        # K_ZZ and a chunk of K_XZ are what the method works with; the kernel's limit is for what is N wide.
        self._core = dataclasses.replace(core, engine=engine, limit=_UNLIMITED)
        self._kept: Tensor | None = None  # gradients of the real samples, (*batch, N, r, R·P)

    @property
    def num_samples(self) -> int:
        """Number N of real samples."""
        return self.rows.inputs.num_samples

    @property
    def numbers(self) -> Tensor:
        """Outputs that the kernel is of, in order."""
        return self.rows.outputs.reshape(-1)

    def parts(self) -> dict[str, Any]:
        """Return what tells this kernel from another, its samples aside."""
        linearization = self.linearization
        return {
            "parameters": dict(zip(linearization.names, linearization.parameters, strict=True)),
            "constants": list(linearization.constants),
            "outputs": self.rows.outputs,
        }

    def keep_gradients(self) -> bool:
        """Compute the gradients of the real samples once, if they fit into ``max_dense_bytes``."""
        jacobian = self.kernel.left
        needed = tensor_bytes(jacobian.shape, jacobian.dtype)
        if needed > self.kernel._core.max_dense_bytes:
            return False
        with torch.no_grad():
            dense = jacobian.to_dense()
        self._kept = dense.unflatten(-2, (self.num_samples, -1))
        return True

    def chunks(self, samples: Tensor, num_moving: int) -> tuple[Tensor, ...]:
        """Cut real samples into parts whose block of K_XZ is handled at once."""
        if self._kept is None:
            engine = self._core.engine
            return samples.split(max(1, min(_SAMPLES, engine.batch_size(self.rows.inputs))))
        width = self.rows.outputs.shape[-1] ** 2 * num_moving * self.rows.batch_shape.numel()
        return samples.split(max(1, _ENTRIES // max(1, width)))

    def frame(self, z: Tensor, differentiate: bool = True) -> Frame:
        """Return the kernels at one position of the moving samples."""
        z = z.detach().clone().requires_grad_(differentiate)
        axis = StateAxis(self.linearization.inputs(z), self.rows.outputs)
        return (
            _KernelFrame(self, z, axis) if self._kept is None else _GradientFrame(self, z, axis, self._kept)
        )

    def real_states(self) -> Tensor:
        """Return the model's outputs at the real samples that the kernel is of, ``(N, q)``."""
        with torch.no_grad():
            return self._states(self.rows.inputs)

    def _states(self, inputs: Inputs) -> Tensor:
        linearization = self.linearization
        parts = [linearization.function(linearization.parameters, b) for _, _, b in inputs.batches(256)]
        return torch.cat(parts)[:, self.numbers.to(parts[0].device)]

    def block(self, rows: StateAxis, columns: StateAxis) -> Tensor:
        """Return a dense block of the kernel, attached to the moving samples."""
        return self.kernel._rebuild(self._core.with_axes(rows, columns)).to_dense()

    def jacobian(self, axis: StateAxis) -> Tensor:
        """Return the gradients of moving samples, ``(*batch, m, R·P)``, attached to them."""
        operator: JacobianOperator = self.kernel._rebuild(self._core.with_axes(axis, axis)).left
        return operator.to_dense()


class _Base:
    """What both ways share: the model's outputs, and the sum of derivatives."""

    def __init__(self, scene: Scene, z: Tensor, axis: StateAxis) -> None:
        self._scene, self._z, self._axis = scene, z, axis
        self._gradient = torch.zeros_like(z, requires_grad=False)
        self._states: Tensor | None = None

    def _pull(self, value: Tensor, cotangent: Tensor, *, retain: bool = False) -> None:
        (found,) = torch.autograd.grad(value, self._z, cotangent.to(value.dtype), retain_graph=retain)
        self._gradient += found

    def states(self) -> Tensor:
        """Return the model's outputs at z."""
        self._states = self._scene._states(self._axis.inputs)
        return self._states.detach().double()

    def pull_states(self, cotangent: Tensor) -> None:
        """Add their derivative."""
        assert self._states is not None
        self._pull(self._states, cotangent, retain=True)


class _GradientFrame(_Base):
    """With the gradients of the real samples at hand: one Jacobian of z an evaluation, the rest products."""

    def __init__(self, scene: Scene, z: Tensor, axis: StateAxis, real: Tensor) -> None:
        super().__init__(scene, z, axis)
        self._real = real
        self._moving = scene.jacobian(axis)
        self._values = self._moving.detach()
        self._cotangent = torch.zeros_like(self._values)
        self.square = (self._values @ self._values.mT).double()

    def _rows(self, samples: Tensor) -> Tensor:
        whole = len(samples) == self._real.shape[-3]  # chunks are in order, batches never all
        chosen = self._real if whole else self._real.index_select(-3, samples.to(self._real.device))
        return chosen.flatten(-3, -2)

    def cross(self, samples: Tensor) -> Tensor:
        """Return rows of K_XZ."""
        return (self._rows(samples) @ self._values.mT).double()

    def pull_cross(self, samples: Tensor, cotangent: Tensor) -> None:
        """Add the derivative of ``<cotangent, cross(samples)>``."""
        self._cotangent += cotangent.to(self._values.dtype).mT @ self._rows(samples)

    def gradient(self, cotangent: Tensor) -> Tensor:
        """Return the gradient."""
        both = (cotangent + cotangent.mT).to(self._values.dtype)
        self._pull(self._moving, self._cotangent + both @ self._values)
        return self._gradient


class _KernelFrame(_Base):
    """Block by block of the kernel, where the gradients of the real samples are too many to keep."""

    def __init__(self, scene: Scene, z: Tensor, axis: StateAxis) -> None:
        super().__init__(scene, z, axis)
        self._attached = scene.block(axis, axis)
        self.square = self._attached.detach().double()
        self._last: tuple[Tensor, Tensor] | None = None

    def cross(self, samples: Tensor) -> Tensor:
        """Return rows of K_XZ; their graph is kept until the next ones are asked for."""
        self._last = None
        rows = StateAxis(self._scene.rows.inputs.select(samples), self._axis.outputs)
        block = self._scene.block(rows, self._axis)
        self._last = (samples, block)
        return block.detach().double()

    def pull_cross(self, samples: Tensor, cotangent: Tensor) -> None:
        """Add the derivative of ``<cotangent, cross(samples)>``."""
        if self._last is None or self._last[0] is not samples:
            self.cross(samples)
        assert self._last is not None
        block, self._last = self._last[1], None
        self._pull(block, cotangent)

    def gradient(self, cotangent: Tensor) -> Tensor:
        """Return the gradient."""
        self._pull(self._attached, cotangent)
        return self._gradient


def _with_live_samples(linearization: Linearization) -> Linearization:
    """Return the same model with parameters that are constants and samples that are live."""
    return Linearization(
        linearization.call,
        linearization.selector,
        {n: p.detach() for n, p in zip(linearization.names, linearization.parameters, strict=True)},
        {name: tensor.detach() for name, tensor in linearization.frozen.items()},
        {name: tensor.detach() for name, tensor in linearization.buffers.items()},
        batch_dim=linearization.batch_dim,
        differentiable=True,
        origins=dict(linearization.origins()),
    )


def moving_tensor(inputs: Inputs) -> Tensor:
    """Return samples as one floating tensor that can be moved.

    Raises:
        InputError: If they are anything else.
    """
    parts = [batch.tensors for _, _, batch in inputs.batches()]
    if any(len(part) != 1 or not part[0].is_floating_point() for part in parts):
        raise InputError(
            "inducing points are moved along a gradient, so that each sample has to be one floating tensor: "
            "take an embedding's output as the input, or keep to real points (ntkops.distill.select)"
        )
    return torch.cat([part[0] for part in parts]).detach()
