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


def jacobian(model: nn.Module, x: Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return J, (N·O, P), one classic backward pass for each row, computed in ``dtype``."""
    model = copy.deepcopy(model).to(dtype)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.padding_idx = None  # a padding row counts like any other
    x = x.to(dtype) if x.is_floating_point() else x
    leaves = [p for p in model.parameters() if p.requires_grad]
    rows = []
    with sdpa_kernel(SDPBackend.MATH):  # in backward passes, too: checkpointed blocks run again there
        state = model(x).flatten()
        for entry in state:
            gradients = (
                torch.autograd.grad(entry, leaves, retain_graph=True, allow_unused=True)
                if entry.requires_grad
                else [None] * len(leaves)
            )
            parts = [torch.zeros_like(p) if g is None else g for p, g in zip(leaves, gradients, strict=True)]
            rows.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(rows).detach()


def _nudged(model: nn.Module) -> nn.Module:
    """Return a copy whose parameters are moved by about a rounding unit."""
    moved = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in moved.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.mul_(1 + torch.finfo(parameter.dtype).eps * noise)
    return moved


class Reference:
    """J in float64, of exactly the numbers that the network has, and how near a result must be.

    In float64 the relative error may be 1e-12. In float32, and where a block computes in float32, it may be
    `FLOAT32`, or four times what float32 automatic differentiation itself loses of the same Jacobian. A
    network that is sensitive beyond that (a norm of two features that nearly agree) may err by four times
    what its Jacobian moves when parameters move by a rounding unit: nothing can give back what that loses.
    """

    FLOAT64, FLOAT32 = 1e-12, 1e-5

    def __init__(self, model: nn.Module, x: Tensor, low: bool = False) -> None:
        self.J = jacobian(model, x)
        self.size = float(self.J.norm())
        other = jacobian(model, x, torch.float32) if low else jacobian(_nudged(model), x)
        lost = float((other.double() - self.J).norm()) / max(self.size, 1e-300)
        usual = self.FLOAT32 if low else self.FLOAT64
        self.limit = max(usual, 4.0 * lost)
        self.is_sensitive = self.limit > usual
        self._floor = 1e-6 if low else 1e-14

    def check(self, what: str, found: Tensor, expected: Tensor, scale: float | None = None) -> None:
        """Compare with an error relative to the expected block, or to what bounds its rounding."""
        assert found.shape == expected.shape, (what, found.shape, expected.shape)
        norm = float(expected.norm()) if scale is None else scale
        error = float((found.double() - expected).norm())
        # A kernel that is zero but for rounding (a norm of one feature) has no relative error.
        assert error <= self.limit * norm + self._floor * min(1.0, self.size), (what, error, norm, self.limit)


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
