"""Dense Jacobians without ntkops, how far a result may be from them, and proof that nothing was touched."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["Reference", "jacobian", "untouched"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def jacobian(
    model: nn.Module, x: Tensor, dtype: torch.dtype = torch.float64, directions: Tensor | None = None
) -> Tensor:
    """Return J, (N·O, P), one classic backward pass for each row, computed in ``dtype``.

    With ``directions``, (k, N·O), return their products with J, one pass for each.
    """
    model = copy.deepcopy(model).to(dtype)
    for module in model.modules():
        if isinstance(module, (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)):
            # torch's backward pass is wrong for some layouts of gradients, see ntkops/model/corrections.py
            module.register_forward_hook(lambda _, given, result: result.flatten().view(result.shape))
    x = x.to(dtype) if x.is_floating_point() else x
    leaves = [p for p in model.parameters() if p.requires_grad]
    rows = []
    with sdpa_kernel(SDPBackend.MATH):  # in backward passes, too: checkpointed blocks run again there
        state = model(x).flatten()
        entries = state if directions is None else [(v.to(state) * state).sum() for v in directions]
        for entry in entries:
            gradients = (
                torch.autograd.grad(entry, leaves, retain_graph=True, allow_unused=True)
                if entry.requires_grad
                else [None] * len(leaves)
            )
            parts = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, gradients, strict=True)]
            rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows).detach()


def _nudged(model: nn.Module, x: Tensor, seed: int = 3) -> tuple[nn.Module, Tensor]:
    """Return a copy whose parameters are moved by about a rounding unit, and samples that are."""
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)

    def units(tensor: Tensor) -> Tensor:
        noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        return 1 + torch.finfo(tensor.dtype).eps * noise

    with torch.no_grad():
        for parameter in moved.parameters():
            parameter.mul_(units(parameter))
    return moved, x * units(x) if x.is_floating_point() else x


class Reference:
    """J in float64, of exactly the numbers that the network has, and how near a result must be.

    In float64 the relative error may be 1e-12. In float32, and where a block computes in float32, it may be
    `FLOAT32`, or four times what float32 automatic differentiation itself loses of the same Jacobian: row by
    row, and in random directions, since single rows may round to nothing what others do not. A network that
    is sensitive beyond that (a norm of two features that nearly agree) may err by four times what its
    Jacobian moves, measured in the same way, when parameters and samples move by a rounding unit: nothing can
    give back what that loses.
    """

    FLOAT64, FLOAT32 = 1e-12, 1e-5

    def __init__(self, model: nn.Module, x: Tensor, low: bool = False) -> None:
        self.J = jacobian(model, x)
        self._given = (model, x)
        other = (model, x, torch.float32) if low else (*_nudged(model, x), torch.float64)
        lost = self._lost(*other)
        self.is_zero = not self.J.any()
        # Where J is less than what is lost of it (it may be zero), that is what rounding is relative to.
        self.size = max(float(self.J.norm()), lost, 1e-300)
        self.usual = self.FLOAT32 if low else self.FLOAT64
        self.lost = 4.0 * lost / self.size
        self._floor = 1e-6 if low else 1e-14

    @property
    def is_sensitive(self) -> bool:
        """Whether rounding alone moves J beyond the usual bound."""
        return self.lost > self.usual

    def is_sensitive_after_all(self) -> bool:
        """Whether one of eight further steps of a rounding unit moves J, where the first one did not."""
        if self.is_sensitive:
            return True
        steps = (self._lost(*_nudged(*self._given, seed), torch.float64) for seed in range(4, 12))
        return any(4.0 * lost > self.usual * self.size for lost in steps)

    def _lost(self, model: nn.Module, x: Tensor, dtype: torch.dtype) -> float:
        """Return how far J of this model in this dtype is from J, row by row or in random directions."""
        generator = torch.Generator().manual_seed(7)
        mixing = torch.randn(16, len(self.J), generator=generator, dtype=torch.float64)
        rows = jacobian(model, x, dtype).double() - self.J
        mixed = jacobian(model, x, dtype, mixing).double() - mixing @ self.J
        return max(float(rows.norm()), float((mixed.norm(dim=1) / mixing.norm(dim=1)).max()))

    def check(
        self,
        what: str,
        found: Tensor,
        expected: Tensor,
        scale: float | None = None,
        whole: float | None = None,
    ) -> None:
        """Compare with an error relative to the expected block, or to ``scale``, which bounds its rounding.

        What is lost of J is relative to the length of J, so that of a kernel to ``whole``, its square.
        """
        assert found.shape == expected.shape, (what, found.shape, expected.shape)
        scale = float(expected.norm()) if scale is None else scale
        whole = scale if whole is None else whole
        error = float((found.double() - expected).norm())
        # A kernel that is zero but for rounding (a norm of one feature) has no relative error.
        limit = max(self.usual * scale, self.lost * whole) + self._floor * min(1.0, self.size)
        assert error <= limit, (what, error, scale, self.usual, self.lost)


@contextmanager
def untouched(model: nn.Module, *inputs: Tensor) -> Iterator[None]:
    """Prove that a model, its inputs and the global random state are the same bits afterwards."""

    def look() -> tuple[object, ...]:
        held = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        modules = dict(model.named_modules(remove_duplicate=False))
        flags = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
        return (
            {name: id(tensor) for name, tensor in held.items()},
            flags,
            {n: (id(m), m.training, *(len(getattr(m, hook)) for hook in _HOOKS)) for n, m in modules.items()},
            [sorted(vars(m)) for m in modules.values()],
        )

    def tensors() -> list[Tensor]:
        return [*model.state_dict().values(), *inputs, torch.get_rng_state()]

    seen, bits = look(), [tensor.detach().clone() for tensor in tensors()]
    try:
        yield
    finally:
        assert look() == seen
        assert all(torch.equal(a, b) for a, b in zip(tensors(), bits, strict=True))
