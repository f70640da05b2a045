"""Several functions of the same parameters, one below the other, and their kernel in named blocks."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, TypeAlias

import torch
from linear_operator.operators import ConstantMulLinearOperator, LinearOperator
from torch import Tensor

from ..arguments import checked
from ..engines import count_passes, shared_store
from ..errors import InputError, ShapeError, UnsupportedOperationError, ZeroKernelError
from ..results import Estimate
from .algebra import unscaled
from .axes import ParameterAxis
from .capabilities import capabilities
from .jacobian import JacobianOperator
from .joined import JoinedOperator
from .sandwich import Sandwich

__all__ = ["BlockKernelOperator", "Blocks", "balance", "stack"]

Weights: TypeAlias = Mapping[str, float] | Sequence[float] | Tensor | Estimate


@checked
def stack(jacobians: Mapping[str, JacobianOperator], weights: Weights | None = None) -> JoinedOperator:
    r"""Put the Jacobians of several functions of the same parameters one below the other.

    With the solution u of a differential equation on the boundary and its residual r inside, or with the
    losses of several tasks, :math:`J J^\top` has the blocks :math:`J_u J_u^\top, J_u J_r^\top, ...` that
    training couples. ``torch.cat`` of Jacobians makes the same without names.

    Args:
        jacobians: Name to the Jacobian of `ntkops.jacobian`, ``(n_i, P)`` each. Their models or functions
            must have the same parameters at the same values.
        weights: Weights λ of the losses, by name or in order: rows are multiplied by √λ, so that
            :math:`J J^\top` is :math:`\Lambda^{1/2} K \Lambda^{1/2}`, which has the spectrum of K Λ.

    Returns:
        Lazy ``(Σ n_i, P)``; ``J @ J.mT`` is a `BlockKernelOperator`. Cost of a product: one vjp or jvp a
        function and column.

    Raises:
        InputError: If there is none, one is no Jacobian over all its parameters, or a weight is not positive.
        ShapeError: If one has a batch.
        ParameterSelectionError: If two have other parameters, or other values of them.

    Example:
        >>> import torch, ntkops
        >>> from torch.func import functional_call, grad, vmap
        >>> _ = torch.manual_seed(0)
        >>> net = torch.nn.Sequential(
        ...     torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
        ... ).double()
        >>> params = {name: p.detach() for name, p in net.named_parameters()}
        >>> def u(p, x):
        ...     return functional_call(net, p, (x,))
        >>> def residual(p, x):  # u'' + 1
        ...     f = lambda z: u(p, z[None])[0, 0]
        ...     return vmap(grad(lambda z: grad(f)(z)[0]))(x) + 1
        >>> ends, inside = torch.tensor([[0.0], [1.0]]).double(), torch.rand(5, 1).double()
        >>> J = ntkops.stack(
        ...     {
        ...         "u": ntkops.jacobian(u, ends, params=params),
        ...         "r": ntkops.jacobian(residual, inside, params=params),
        ...     }
        ... )
        >>> K = J @ J.mT
        >>> K.shape, K.blocks["u", "r"].shape, K.blocks.trace.value.shape
        (torch.Size([7, 7]), torch.Size([2, 5]), torch.Size([2]))
        >>> sorted(ntkops.balance(K))
        ['r', 'u']
    """
    if not jacobians:
        raise InputError("stack({}) holds no Jacobian; pass names and Jacobians, {'u': J_u, 'r': J_r}")
    for name, part in jacobians.items():
        if not isinstance(name, str):
            raise InputError(f"stack: the name {name!r} is no string")
        if not isinstance(part, JacobianOperator) or not isinstance(part._core.columns, ParameterAxis):
            shape = f" of shape {tuple(part.shape)}" if isinstance(part, LinearOperator) else ""
            raise InputError(
                f"stack: {name!r} is a {type(part).__name__}{shape}; pass what ntkops.jacobian gives, (n, P)"
            )
        if part._core.columns.pick is not None:
            raise InputError(f"stack: {name!r} is over some columns of J; pass J over all its parameters")
        if part.batch_shape:
            raise ShapeError(f"stack: {name!r} has the batch {tuple(part.batch_shape)}; pass J without one")
    parts, names = list(jacobians.values()), tuple(jacobians)
    for name, part in jacobians.items():
        parts[0].require_same_parameters(part, f"{names[0]!r} and {name!r}")
    return _scaled(parts, names, _weights(weights, names))


def _scaled(parts: Iterable[LinearOperator], names: tuple[str, ...], weights: list[float]) -> JoinedOperator:
    """Return the stack of √λ_i J_i: its kernel has the blocks √(λ_i λ_j) K_ij."""
    rows = [
        part
        if weight == 1
        else ConstantMulLinearOperator(
            part, torch.tensor(math.sqrt(weight), dtype=part.dtype, device=part.device)
        )
        for part, weight in zip(parts, weights, strict=True)
    ]
    return JoinedOperator(*rows, dim=-2, output_device=rows[0].device, names=names)


def _weights(weights: Any, names: tuple[str, ...]) -> list[float]:
    """Return a positive number for each function, from what was given by name, in order, or not at all."""
    if weights is None:
        return [1.0] * len(names)
    if isinstance(weights, Estimate):
        weights = weights.value
    if isinstance(weights, Mapping):
        if set(weights) != set(names):
            raise InputError(f"weights for {sorted(map(str, weights))}: the functions are {sorted(names)}")
        weights = [weights[name] for name in names]
    try:
        found = [float(weight) for weight in weights]
    except (TypeError, ValueError) as error:
        raise InputError(f"weights={weights!r}: pass a number for each of {', '.join(names)}") from error
    if len(found) != len(names):
        raise InputError(f"{len(found)} weights are given for {len(names)} functions")
    for name, weight in zip(names, found, strict=True):
        if not 0 < weight < math.inf:
            raise InputError(f"the weight {weight} of {name!r} is not a positive, finite number")
    return found


class BlockKernelOperator(Sandwich):
    """The kernel J₁ J₂ᵀ of several functions of the same parameters, with blocks; made by ``J1 @ J2.mT``.

    The factors are a stack, ``(n, P)``, and the transpose of a stack; see `ntkops.stack`. A product takes one
    vjp and one jvp for each function; diagonals, tiles and dense results come from per-sample gradients.

    Example:
        >>> import torch, ntkops
        >>> model, x = torch.nn.Linear(3, 1), torch.randn(5, 3)
        >>> J = ntkops.stack({"a": ntkops.jacobian(model, x[:2]), "b": ntkops.jacobian(model, x)})
        >>> (J @ J.mT).blocks
        Blocks(a 2, b 5)
        >>> (J @ J.mT).blocks["b", "b"].shape
        torch.Size([5, 5])
    """

    @property
    def blocks(self) -> Blocks:
        """The blocks by name."""
        return Blocks(self)

    def to_dense(self) -> Tensor:
        """Return the dense kernel, which is kept as that of one function is.

        Returns:
            ``(n, m)``. Cost: one per-sample pass for each output of each function.

        Raises:
            DenseMemoryError: If it is larger than a part allows, before anything is allocated.
        """
        if self._is_recorded():  # a stored block has no graph
            return super().to_dense()
        stored = self._stored_dense()
        if stored is None:
            stored = super().to_dense()
            owner, key = self._dense_key()
            if key is not None:
                shared_store.put(owner, key, stored)
        return stored

    def _stored_dense(self) -> Tensor | None:
        """Return the dense kernel if it was made, and nothing has changed since."""
        owner, key = self._dense_key()
        return None if key is None else shared_store.get(owner, key)

    def _dense_key(self) -> tuple[int, tuple[object, ...] | None]:
        """Return whose memory it is, and the key; None where the parameters are not the snapshot."""
        found: list[object] = ["blocks"]
        owner = 0
        for side in (self.left_linear_op, self.right_linear_op.mT):
            for part, factor in map(unscaled, _named(side).values()):
                if not isinstance(part, JacobianOperator):  # a stack of stacks
                    return owner, None
                part._check_fresh()
                owner = part._core.engine.identity
                key = part._dense_key()
                if key is None:
                    return owner, None
                # The rows of a part, the versions of its parameters, and its weight.
                found.append((owner, key[1], key[3], factor))
        return owner, tuple(found)

    def weighted(self, weights: Weights | Estimate) -> BlockKernelOperator:
        """Return Λ^{1/2} K Λ^{1/2} lazily, the kernel of weighted losses.

        Args:
            weights: One positive weight a function, by name (as `ntkops.balance` gives them) or in order;
                weights that are there already are multiplied.

        Returns:
            Symmetric, lazy.

        Raises:
            InputError: If a weight is missing, too many, or not positive.
            UnsupportedOperationError: If the kernel is not that of one stack with itself.
        """
        rows = self.blocks
        if not capabilities(self).symmetric:
            raise UnsupportedOperationError(
                "weights belong to a square kernel J @ J.mT; weight the stacks: ntkops.stack({...}, weights)"
            )
        stacked = _scaled(rows.rows.values(), rows.names, _weights(weights, rows.names))
        return BlockKernelOperator(stacked, stacked.mT)


class Blocks:
    """The blocks of a kernel of several functions.

    Args:
        kernel: The kernel.

    Attributes:
        rows: Name to rows of J, weights included.
        columns: The same for the columns.
    """

    def __init__(self, kernel: BlockKernelOperator) -> None:
        self._kernel = kernel
        self.rows, self.columns = _named(kernel.left_linear_op), _named(kernel.right_linear_op.mT)

    def __repr__(self) -> str:
        """Return names and sizes of the blocks."""
        rows = ", ".join(f"{name} {part.shape[-2]}" for name, part in self.rows.items())
        columns = ", ".join(f"{name} {part.shape[-2]}" for name, part in self.columns.items())
        return f"Blocks({rows})" if rows == columns else f"Blocks({rows} x {columns})"

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the functions of the rows."""
        return tuple(self.rows)

    def __getitem__(self, names: tuple[str, str]) -> LinearOperator:
        """Return the lazy block of two functions, ``K.blocks["u", "r"]``.

        Raises:
            InputError: If it is not asked for by two names that exist.
        """
        if not isinstance(names, tuple) or len(names) != 2:
            raise InputError(f"blocks[{names!r}]: name the functions of rows and columns, blocks['u', 'r']")
        for name, known in zip(names, (self.rows, self.columns), strict=True):
            if name not in known:
                raise InputError(f"there is no function {name!r}: choose among {', '.join(map(repr, known))}")
        # c₁ J₁ (c₂ J₂)ᵀ = c₁ c₂ J₁ J₂ᵀ: J₁ @ J₂.mT is a kernel, of multiples it would be a plain product.
        (left, one), (right, other) = unscaled(self.rows[names[0]]), unscaled(self.columns[names[1]])
        block: LinearOperator = left @ right.mT
        return block if one * other == 1 else block * (one * other)

    @property
    def trace(self) -> Estimate:
        """Exact traces of the blocks on the diagonal, ``(blocks,)``, in the order of ``names``.

        Raises:
            InputError: If rows and columns are not the same functions.
        """
        start, found = time.perf_counter(), []
        for name in self.rows:
            if name not in self.columns or self.rows[name].shape != self.columns[name].shape:
                raise InputError(f"the block of {name!r} with itself is no square: there is no trace")
        stored = self._kernel._stored_dense()
        if stored is not None and list(self.rows) == list(self.columns):
            diagonal = stored.diagonal().double().split([part.shape[-2] for part in self.rows.values()])
            return Estimate.of_exact(torch.stack([part.sum() for part in diagonal]).cpu(), passes=0)
        with count_passes() as counter:
            for name in self.rows:
                own = capabilities(self[name, name])
                parts = own.diagonal_parts(own.diagonal_step())
                found.append(sum(part.double().sum(-1).cpu() for _, part in parts))
        value = torch.stack([torch.as_tensor(trace) for trace in found])
        return Estimate.of_exact(value, passes=counter.total, seconds=time.perf_counter() - start)


def _named(stacked: LinearOperator) -> dict[str, LinearOperator]:
    """Return the parts of a stack by name, numbered where they have none; a single Jacobian is one part."""
    parts = stacked.linear_ops if isinstance(stacked, JoinedOperator) else [stacked]
    names = stacked.names if isinstance(stacked, JoinedOperator) else None
    return dict(zip(names or [str(i) for i in range(len(parts))], parts, strict=True))


@checked
def balance(operator: BlockKernelOperator, per: Literal["sum", "mean"] = "sum") -> dict[str, float]:
    r"""Return the weights of losses under which all functions are learned at the same mean rate.

    .. math:: \lambda_i = \frac{\mathrm{tr} K}{\mathrm{tr} K_{ii}}

    Source: Wang, Yu & Perdikaris 2022, algorithm 1.

    Args:
        operator: Square kernel of a stack, ``J @ J.mT``.
        per: "sum" for losses that are sums over their samples; "mean" for means, whose traces are divided by
            their numbers of rows.

    Returns:
        Name to weight, for ``K.weighted(...)``, `ntkops.stack` and the loss. Cost: the diagonal of K.

    Raises:
        InputError: If the operator is no kernel of a stack, or ``per`` is not understood.
        ZeroKernelError: If a function does not depend on the parameters: its trace is zero.

    Example:
        >>> import torch, ntkops
        >>> _ = torch.manual_seed(0)
        >>> model, x = torch.nn.Linear(3, 1), torch.randn(6, 3)
        >>> J = ntkops.stack({"a": ntkops.jacobian(model, x), "b": ntkops.jacobian(model, 3 * x)})
        >>> K = J @ J.mT
        >>> traces = K.weighted(ntkops.balance(K)).blocks.trace.value
        >>> bool(torch.allclose(traces[0], traces[1]))
        True
    """
    if not isinstance(operator, BlockKernelOperator):
        raise InputError(
            f"balance is for the kernel of a stack, J @ J.mT of ntkops.stack, not a {type(operator).__name__}"
        )
    if per not in ("sum", "mean"):
        raise InputError(f"per={per!r}: pass 'sum' or 'mean', as the losses are")
    blocks = operator.blocks
    traces = dict(zip(blocks.names, blocks.trace.value.tolist(), strict=True))
    for name, trace in traces.items():
        if not trace > 0:
            raise ZeroKernelError(
                f"the trace of {name!r} is zero: that function does not depend on the parameters"
            )
    if per == "mean":
        traces = {name: trace / blocks.rows[name].shape[-2] for name, trace in traces.items()}
    # λ_i tr K_ii = tr K for all i: the blocks of the weighted kernel have one trace. Where losses are means,
    # K_ii comes with 1 / n_i, and so do the traces by now.
    total = sum(traces.values())
    return {name: total / trace for name, trace in traces.items()}


JoinedOperator.kernel_class = BlockKernelOperator  # what J @ J'.mT of two stacks is
