"""The pure core: Jacobian and kernel products as functions of parameters and inputs.

Nothing here holds state, checks data or caches. A *function* maps ``(params, inputs)`` to a tensor;
``params`` and ``inputs`` are any pytrees of tensors. Every product is differentiable (twice and more)
in parameters, inputs and vectors, and composes with `torch.func.grad`, `vmap`, `jvp`, `jacrev` and
`torch.func.stack_module_state`. Operators use the same products on checked data.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from .errors import InputError, ShapeError
from .model.corrections import Corrected

if TYPE_CHECKING:
    from .model.accepted import Pytree

__all__ = [
    # products with the Jacobian
    "jvp",
    "vjp",
    # the kernel
    "ntk_matvec",
    "ntk_diagonal",
    "ntk_block",
    # the linearised network
    "linearized",
]

Function = Callable[[Any, Any], Tensor]


def _call(function: Function, params: Any, inputs: Any) -> Tensor:
    """Call a function of which any derivative is right."""
    with Corrected(recorded=True):
        return function(params, inputs)


Mode = Literal["auto", "forward", "double"]


def jvp(function: Function, params: Pytree, inputs: Any, tangent: Pytree, *, mode: Mode = "auto") -> Tensor:
    r"""Multiply the Jacobian with a parameter-shaped vector: :math:`J p`.

    Args:
        function: ``(params, inputs) -> output`` tensor of any shape.
        params: Pytree of floating tensors at which to linearise.
        inputs: Whatever the function takes.
        tangent: Pytree like ``params``.
        mode: "double" transposes the vjp, so that :math:`J` is what ``backward()`` gives; "forward" uses
            forward-mode differentiation, at about half the cost and less memory, and trusts it: torch's
            formulas of some operations (``cholesky_inverse``, products by ``scatter_reduce``) are wrong, and
            their derivatives of more, without a word. "auto" takes "double", and "forward" for operations
            without a second derivative.

    Returns:
        Tensor of the output's shape. Cost: one forward and two reverse passes; one forward-mode pass for
        "forward".

    Raises:
        InputError: If ``mode`` is none of these.
        RuntimeError: What torch says of an operation that this mode does not have.

    Example:
        >>> import torch
        >>> from ntkops import functional
        >>> w = torch.tensor([[1.0, 2.0]])
        >>> functional.jvp(
        ...     lambda p, x: x @ p.T, w, torch.eye(2), torch.tensor([[3.0, 4.0]])
        ... ).tolist()
        [[3.0], [4.0]]
    """

    def forward(values: Any) -> Tensor:
        return _call(function, values, inputs)

    if mode not in ("auto", "forward", "double"):
        raise InputError(f"mode={mode!r}: choose 'auto', 'forward' or 'double'")
    if mode == "forward":
        return torch.func.jvp(forward, (params,), (tangent,))[1]
    output, pull = torch.func.vjp(forward, params)[:2]
    try:
        # Jᵀu is linear in u, so that the vjp of u -> Jᵀu at any u is the product with J.
        push = torch.func.vjp(lambda u: pull(u)[0], torch.zeros_like(output))[1]
        return push(tangent)[0]
    except (NotImplementedError, RuntimeError) as error:
        if mode == "double":
            raise
        try:
            return torch.func.jvp(forward, (params,), (tangent,))[1]
        except NotImplementedError:
            raise error from None


def vjp(function: Function, params: Pytree, inputs: Any, cotangent: Tensor) -> Pytree:
    r"""Multiply the transposed Jacobian with an output-shaped vector: :math:`J^\top v`.

    Args:
        function: ``(params, inputs) -> output`` tensor of any shape.
        params: Pytree of floating tensors at which to linearise.
        inputs: Whatever the function takes.
        cotangent: Tensor of the output's shape.

    Returns:
        Pytree like ``params``. Cost: one forward and one reverse pass.

    Raises:
        ShapeError: If the cotangent does not have the output's shape.

    Example:
        >>> import torch
        >>> from ntkops import functional
        >>> w = torch.tensor([[1.0, 2.0]])
        >>> functional.vjp(
        ...     lambda p, x: x @ p.T, w, torch.eye(2), torch.tensor([[3.0], [4.0]])
        ... ).tolist()
        [[3.0, 4.0]]
    """
    output, pull = torch.func.vjp(lambda values: _call(function, values, inputs), params)[:2]
    if output.shape != cotangent.shape:
        raise ShapeError(
            f"the output has shape {tuple(output.shape)}, the cotangent {tuple(cotangent.shape)}: they must "
            "match"
        )
    return pull(cotangent)[0]


def ntk_matvec(
    function: Function, params: Pytree, left: Any, right: Any, vector: Tensor, *, mode: Mode = "auto"
) -> Tensor:
    r"""Multiply the kernel with a state vector: :math:`J(x_1) J(x_2)^\top v`.

    Args:
        function: ``(params, inputs) -> output`` tensor.
        params: Pytree of floating tensors at which to linearise.
        left: Inputs x₁ of the rows.
        right: Inputs x₂ of the columns.
        vector: Tensor of the shape of ``function(params, right)``.
        mode: As in `jvp`.

    Returns:
        Tensor of the shape of ``function(params, left)``. Cost: one vjp and one jvp.

    Raises:
        ShapeError: If the vector does not have the shape of the output at ``right``.

    Example:
        >>> import torch
        >>> from ntkops import functional
        >>> w = torch.tensor([[1.0, 2.0]])
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> functional.ntk_matvec(
        ...     lambda p, x: x @ p.T, w, x, x, torch.ones(2, 1)
        ... ).tolist()
        [[2.0], [3.0]]
    """
    return jvp(function, params, left, vjp(function, params, right, vector), mode=mode)


def _per_sample_jacobian(function: Function, params: Any, inputs: Any) -> tuple[Any, torch.Size]:
    """Return per-sample Jacobians, leaves ``(N, O, *parameter)``, and the output shape of a sample."""
    shape: list[torch.Size] = []

    def single(values: Any, sample: Any) -> Tensor:
        output = _call(function, values, tree_map(lambda leaf: leaf.unsqueeze(0), sample)).squeeze(0)
        shape.append(output.shape)
        return output.reshape(-1)

    # chunk_size=1: one output after the other. vmap inside vmap has wrong derivatives for some of torch's
    # operations.
    jacobian = torch.func.vmap(torch.func.jacrev(single, chunk_size=1), in_dims=(None, 0))(params, inputs)
    return jacobian, shape[-1]


def _rows(leaf: Tensor) -> Tensor:
    """Return ``(N, O, p)`` from ``(N, O, *parameter)``, also for a parameter without axes."""
    return leaf.reshape(*leaf.shape[:2], -1)


def ntk_diagonal(function: Function, params: Pytree, inputs: Any) -> Tensor:
    r"""Return the kernel's diagonal: :math:`K_{ii} = |\nabla f_i|^2`.

    Samples must be independent and every leaf of ``inputs`` must carry them on its first axis.

    Args:
        function: ``(params, inputs) -> output`` with the samples on the first axis.
        params: Pytree of floating tensors at which to linearise.
        inputs: Pytree of tensors ``(N, ...)``.

    Returns:
        ``(N, *output)``. Cost: one per-sample reverse pass for each output; memory N·O·P.

    Example:
        >>> import torch
        >>> from ntkops import functional
        >>> w = torch.tensor([[1.0, 2.0]])
        >>> functional.ntk_diagonal(
        ...     lambda p, x: x @ p.T, w, torch.tensor([[3.0, 4.0]])
        ... ).tolist()
        [[25.0]]
    """
    jacobian, shape = _per_sample_jacobian(function, params, inputs)
    leaves, _ = tree_flatten(jacobian)
    diagonal = torch.stack([_rows(leaf).square().sum(-1) for leaf in leaves]).sum(0)
    return diagonal.reshape(-1, *shape)


def ntk_block(function: Function, params: Pytree, left: Any, right: Any) -> Tensor:
    r"""Return the dense kernel :math:`J(x_1) J(x_2)^\top`, samples and outputs apart.

    Samples must be independent and every leaf of the inputs must carry them on its first axis.

    Args:
        function: ``(params, inputs) -> output`` with the samples on the first axis.
        params: Pytree of floating tensors at which to linearise.
        left: Pytree of tensors ``(N₁, ...)``.
        right: Pytree of tensors ``(N₂, ...)``.

    Returns:
        ``(N₁, O, N₂, O)``. Cost: O per-sample passes on each side; memory (N₁ + N₂)·O·P.

    Example:
        >>> import torch
        >>> from ntkops import functional
        >>> w = torch.tensor([[1.0, 2.0]])
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
        >>> functional.ntk_block(lambda p, x: x @ p.T, w, x, x)[:, 0, :, 0].tolist()
        [[1.0, 1.0], [1.0, 2.0]]
    """
    left_leaves, _ = tree_flatten(_per_sample_jacobian(function, params, left)[0])
    right_leaves, _ = tree_flatten(_per_sample_jacobian(function, params, right)[0])
    return sum(  # type: ignore[return-value]
        torch.einsum("aip,bjp->aibj", _rows(a), _rows(b))
        for a, b in zip(left_leaves, right_leaves, strict=True)
    )


def linearized(function: Function, params: Pytree, inputs: Any, displaced: Pytree) -> Tensor:
    r"""Evaluate the linearised network :math:`f(\theta_0) + J(\theta_0) (\theta - \theta_0)`.

    Args:
        function: ``(params, inputs) -> output`` tensor.
        params: Pytree θ₀ at which to linearise.
        inputs: Whatever the function takes.
        displaced: Pytree θ like ``params``.

    Returns:
        Tensor of the output's shape. Cost: one forward pass, and that of `jvp`.

    Example:
        >>> import torch
        >>> from ntkops import functional
        >>> f = lambda p, x: (p * x) ** 2
        >>> functional.linearized(
        ...     f, torch.tensor(1.0), torch.tensor(3.0), torch.tensor(1.5)
        ... ).item()
        18.0
    """
    origin, spec = tree_flatten(params)
    target, _ = tree_flatten(displaced)
    step = tree_unflatten([b - a for a, b in zip(origin, target, strict=True)], spec)
    return _call(function, params, inputs) + jvp(function, params, inputs, step)
