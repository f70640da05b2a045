"""The kernel of a network's outputs over random readouts, given its hidden layers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..arguments import checked
from ..errors import InputError
from ..model import BatchDim, Linearization, linearize
from .capabilities import multiply
from .jacobian import jacobian, network_states
from .sandwich import Sandwich, sandwich

if TYPE_CHECKING:
    from ..model.accepted import InputsLike, ModelLike, OutputLike

__all__ = ["nngp"]


@checked
def nngp(
    model: ModelLike,
    x: InputsLike,
    head: str | nn.Module,
    *,
    weight_variance: float,
    bias_variance: float,
    output: OutputLike = None,
    batch_dim: BatchDim = 0,
) -> Sandwich:
    r"""Return the covariance of a network's outputs over random readouts, lazily and exactly.

    The outputs are linear in the readout, f = J_head θ_head, and J_head does not depend on its weights: with
    weights of variance σ_w² / width and biases of variance σ_b² the covariance is
    :math:`J_\text{head}\,\mathrm{diag}(\sigma_w^2 / \text{width}, \sigma_b^2)\,J_\text{head}^\top`, given
    the hidden layers as they are. No sampling takes part. For wide random layers it is the NNGP kernel.

    Args:
        model: `torch.nn.Module`, whose last layer is the readout.
        x: N samples, as for `ntkops.ntk`.
        head: The readout: a module of the model, or its path.
        weight_variance: σ_w² ≥ 0.
        bias_variance: σ_b² ≥ 0; without effect on a readout that has no bias.
        output: What the state is, as for `ntkops.ntk`.
        batch_dim: Position of the sample axis in inputs and output.

    Returns:
        Lazy ``(N·O, N·O)``, sample-major; it knows its factors. Cost of a product: a jvp and a vjp of the
        readout alone.

    Raises:
        InputError: If there is no such layer, it has no weight, a variance is negative, or the outputs are
            not linear in it (a layer follows).
        NtkopsError: The one that fits what is wrong with model or inputs; see `ntkops.errors`.

    References:
        Lee et al., Deep Neural Networks as Gaussian Processes (2018).

    Example:
        >>> import torch, ntkops
        >>> _ = torch.manual_seed(0)
        >>> hidden = torch.nn.Linear(3, 64), torch.nn.ReLU()
        >>> model = torch.nn.Sequential(*hidden, torch.nn.Linear(64, 1))
        >>> x = torch.randn(5, 3)
        >>> S = ntkops.nngp(model, x, "2", weight_variance=2.0, bias_variance=0.1)
        >>> features = model[:2](x)
        >>> expected = 2.0 / 64 * features @ features.T + 0.1
        >>> bool(torch.allclose(S.to_dense(), expected, atol=1e-5))
        True
    """
    for name, value in (("weight_variance", weight_variance), ("bias_variance", bias_variance)):
        if not math.isfinite(value) or value < 0:
            raise InputError(f"{name}={value!r}: pass a variance, a finite number that is 0 or more")
    if not isinstance(model, nn.Module):
        raise InputError(f"model: the readout is a layer of a torch.nn.Module, got {type(model).__name__}")
    names = _parameters_of(model, head)
    linearization = linearize(model, names, output, batch_dim=batch_dim)
    J = jacobian(linearization, x)
    values = dict(zip(linearization.names, linearization.parameters, strict=True))
    # A weight (outputs, width, ...) has σ_w² / (inputs of an output), a bias σ_b², in the parameters' order.
    variances = torch.cat(
        [
            torch.full_like(value.detach(), weight_variance / value[0].numel()).reshape(-1)
            if value.dim() > 1
            else torch.full_like(value.detach(), bias_variance)
            for value in values.values()
        ]
    )
    _require_linear(linearization, J)
    return sandwich(J, variances)


def _parameters_of(model: nn.Module, head: Any) -> list[str]:
    """Return the names of the readout's parameters.

    Raises:
        InputError: If it is no module of the model, or has no weight matrix.
    """
    modules = dict(model.named_modules())
    found = [path for path, module in modules.items() if module is head or path == head]
    if not found:
        raise InputError(
            f"head={head!r} is no layer of the model; it has {', '.join(repr(p) for p in modules if p)}"
        )
    own = [
        f"{found[0]}.{name}" if found[0] else name
        for name, _ in modules[found[0]].named_parameters(recurse=False)
    ]
    tensors = dict(model.named_parameters())
    if not any(name in tensors and tensors[name].dim() > 1 for name in own):
        raise InputError(f"head={found[0]!r} ({type(modules[found[0]]).__name__}) has no weight matrix")
    return [name for name in own if name in tensors]


def _require_linear(linearization: Linearization, J: Any) -> None:
    """Raise unless f(x) = J θ, as a readout has it.

    Raises:
        InputError: If it is not.
    """
    with torch.no_grad():
        flat = torch.cat([parameter.detach().reshape(-1) for parameter in linearization.parameters])
        linear = multiply(J, flat.unsqueeze(-1)).squeeze(-1)
    outputs = network_states(linearization, J._args, J._state_axis().inputs).reshape(-1)
    # f is linear in θ, without a constant, where f(θ) = J θ; √eps is far above rounding, and far below what a
    # nonlinearity leaves.
    error = float((linear - outputs).double().norm())
    size = float(outputs.double().norm())
    if error > torch.finfo(linear.dtype).eps ** 0.5 * max(size, float(linear.double().norm())):
        raise InputError(
            f"the outputs are not linear in the head (|f - J θ| = {error:.2g} where |f| = {size:.2g}): a "
            "layer follows it, or something is added; name the last layer, or choose the state with output="
        )
