"""The Jacobian of a model's state with respect to its parameters, as a lazy operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..arguments import checked
from ..engines import Engine, EngineChoice, build_engine
from ..engines.tiles import sample_slices
from ..errors import DeviceError, DtypeError, ParameterSelectionError
from ..model import BatchDim, Inputs, Linearization, linearize
from ..solvers import products_are_steady
from .axes import ParameterAxis, StateAxis
from .base import EngineOperator
from .output_choice import labelled
from .products import Core

if TYPE_CHECKING:
    from ..model.accepted import InputsLike, ModelLike, OutputLike, ParamsLike

__all__ = ["JacobianOperator", "jacobian", "jacobian_rows", "network_states", "state_axis"]

_PASSED = 256  # samples of a forward pass whose outputs alone are kept, so that its memory is not N's


class JacobianOperator(EngineOperator):
    """J, its transpose, or a slice of either: products by vjp and jvp, never stored.

    Make one with `ntkops.jacobian`. ``J @ p`` is a jvp, ``J.mT @ v`` a vjp, and ``J @ J.mT`` is the
    fused kernel operator.
    """

    kernel_class: ClassVar[Any]  # `NTKOperator`, which is made of Jacobians itself and sets it

    def matmul(self, other: Tensor | LinearOperator) -> Tensor | LinearOperator:
        """Multiply; two Jacobians of one snapshot that meet over the parameters give the kernel.

        Args:
            other: ``(n,)``, ``(*batch, n, k)``, or a LinearOperator.

        Returns:
            A tensor for a tensor; an `NTKOperator` for ``J1 @ J2.mT`` of one snapshot; else a lazy
            product.
        """
        if isinstance(other, JacobianOperator) and self._meets(other):
            rows, columns = self._core.rows, other._core.columns
            assert isinstance(rows, StateAxis) and isinstance(columns, StateAxis)
            if _same_rows(rows, columns):
                columns = rows
            return self.kernel_class(*self._args, core=self._core.with_axes(rows, columns))
        if isinstance(other, JacobianOperator):
            inner, facing = self._core.columns, other._core.rows
            if isinstance(inner, ParameterAxis) and isinstance(facing, ParameterAxis):
                self.require_same_parameters(other, "the Jacobians of a product J1 @ J2.mT")
        return super().matmul(other)

    def require_same_parameters(self, other: JacobianOperator, what: str) -> None:
        """Raise where two Jacobians are with respect to different parameters, or at different values.

        Their numbers of columns may agree all the same, and a product would mean nothing.

        Args:
            other: Another Jacobian, or its transpose.
            what: How messages call the two.

        Raises:
            DtypeError: If their dtypes differ.
            DeviceError: If they live apart.
            ParameterSelectionError: Naming the first parameter in which they differ.
        """
        if self.dtype != other.dtype:
            raise DtypeError(f"{what} have the dtypes {self.dtype} and {other.dtype}; cast one of them")
        if self.device != other.device:
            raise DeviceError(f"{what} live on {self.device} and {other.device}; move one of them")
        one, two = self._core.engine.linearization, other._core.engine.linearization
        way_out = "; where that is meant, pass their dense rows, J.to_dense()"
        if one.names != two.names or one.shapes != two.shapes:
            first = next(
                (
                    f"{a!r}, {tuple(s)}, and {b!r}, {tuple(t)}"
                    for a, b, s, t in zip(one.names, two.names, one.shapes, two.shapes, strict=False)
                    if (a, s) != (b, t)
                ),
                f"{len(one.names)} and {len(two.names)} of them",
            )
            raise ParameterSelectionError(f"{what} have different parameters: {first}{way_out}")
        for name, a, b in zip(one.names, self._args, other._args, strict=True):
            if a is not b and not torch.equal(a, b):
                raise ParameterSelectionError(
                    f"{what} have different values of the parameter {name!r}{way_out}"
                )

    def _meets(self, other: JacobianOperator) -> bool:
        """Whether the product with another Jacobian is a kernel: both have all parameters of one snapshot."""
        inner, facing = self._core.columns, other._core.rows
        return (
            isinstance(inner, ParameterAxis)
            and isinstance(facing, ParameterAxis)
            and inner.pick is None
            and facing.pick is None
            and self._core.engine.linearization is other._core.engine.linearization
            and all(a is b for a, b in zip(self._args, other._args, strict=True))
            and inner.slots.shape == facing.slots.shape
        )

    def _dense_cost(self) -> float:
        return 2.0 * self._state_axis().num_distinct

    def _state_axis(self) -> StateAxis:
        """Return the rows of J: the columns of its transpose."""
        return self._state_axes()[0]

    def _dense_if_cheaper(self, columns: int) -> Tensor | None:
        if products_are_steady():
            self._settle()
            return None
        return self._stored_dense()  # N·O x P is never built behind the user's back

    def _dense_values(self, params: Sequence[Tensor]) -> Tensor:
        transposed = isinstance(self._core.columns, StateAxis)
        axis = self._state_axis()
        entries = self._core.rows if transposed else self._core.columns
        assert isinstance(entries, ParameterAxis)
        dense = jacobian_rows(self._core.engine, tuple(params), axis)
        if entries.pick is not None:
            dense = dense[..., entries.pick.to(dense.device)]
        return dense.mT if transposed else dense


def jacobian_rows(engine: Engine, params: tuple[Tensor, ...], axis: StateAxis) -> Tensor:
    """Return the dense rows ``(*batch, n, R·P)`` of an axis, from per-sample gradients."""
    # One pass makes the gradient of an output for all samples of a tile: outputs that are in several terms or
    # members are passed once and then copied to their places.
    distinct, index = torch.unique(axis.flat_outputs, return_inverse=True)  # index (M, R, r)
    count = axis.inputs.num_samples
    tiles = []
    for _, _, part in sample_slices(axis.inputs, engine.tile_samples(len(distinct))):
        tile = engine.jacobian_tile(params, part, distinct)  # (B, u, P)
        if len(index) == 1 and axis.terms == 1 and torch.equal(index.flatten(), torch.arange(len(distinct))):
            tiles.append(tile.unsqueeze(0))  # (1, B, r, P)
        else:
            gathered = tile[:, index.to(tile.device)]  # (B, M, R, r, P)
            tiles.append(gathered.permute(1, 0, 3, 2, 4).flatten(3))  # (M, B, r, R·P)
    engine.count_rows(count * len(distinct), axis.inputs)
    rows = (tiles[0] if len(tiles) == 1 else torch.cat(tiles, dim=1)).flatten(1, 2)  # (M, N·r, R·P)
    if axis.index is not None:
        rows = rows[:, axis.index.to(rows.device)]
    return rows.reshape(*axis.batch_shape, *rows.shape[1:])


def network_states(linearization: Linearization, params: tuple[Tensor, ...], inputs: Inputs) -> Tensor:
    """Return what the network says, ``(N, O)``, by one forward pass without a graph."""
    linearization.check_fresh()
    inputs.check_fresh()
    if not inputs.num_samples:  # other processes have some
        return params[0].new_zeros((0, inputs.num_outputs))
    with torch.no_grad(), linearization.safe_context():
        parts = [linearization.function(params, batch).detach() for _, _, batch in inputs.batches(_PASSED)]
    return torch.cat(parts).flatten(1)


def _same_rows(first: StateAxis, second: StateAxis) -> bool:
    """Whether two axes are the same rows of the same samples."""
    if first is second:
        return True
    same_pick = (first.pick is None and second.pick is None) or (
        first.pick is not None and second.pick is not None and torch.equal(first.pick, second.pick)
    )
    return first.inputs is second.inputs and torch.equal(first.outputs, second.outputs) and same_pick


def state_axis(linearization: Linearization, x: Any) -> StateAxis:
    """Return the axis of all outputs of all samples of ``x``, checked."""
    inputs = linearization.inputs(x)
    return StateAxis(inputs, torch.arange(inputs.num_outputs).reshape(1, -1))


@checked
def jacobian(
    model: ModelLike,
    x: InputsLike,
    params: ParamsLike = None,
    output: OutputLike = None,
    engine: EngineChoice = "auto",
    *,
    axes: Sequence[str] | None = None,
    batch_size: int | Literal["auto"] = "auto",
    chunk_size: int | Literal["auto"] = "auto",
    max_dense_bytes: int | Literal["auto"] = "auto",
    batch_dim: BatchDim = 0,
    differentiable: bool = False,
) -> JacobianOperator:
    r"""Return the Jacobian :math:`J = \partial f(x; \theta) / \partial \theta` as a lazy operator.

    Rows are states, flattened sample-major (row i = sample · O + output); columns are the entries of
    the selected parameters, in the order of ``model.named_parameters()``.

    Args:
        model: `torch.nn.Module`, a function ``(params, inputs) -> output``, or a `Linearization`.
            It is never run or changed itself: the operator works on a private copy.
        x: N samples: a tensor, a tuple (positional arguments), a dict (keyword arguments), or a
            re-iterable of batches of these.
        params: Selects parameters: None (all that require grad), names, glob patterns, modules of the model,
            a predicate ``(name, parameter) -> bool``, a dict of values at which to linearise, or
            `ntkops.Entries` for single weights.
        output: What the state is: None (the model returns a tensor), a key or position, a callable
            on the raw output, or a module path (``"rnn[0]"``, ``"block@1"``).
        engine: "auto", "autograd", or "layerwise" (exact layer structure where rules cover it); a
            `Layerwise` is "layerwise" with routes, and a limit of backward passes, of your own choice.
            Results do not depend on it.
        axes: Names of the axes of one sample's output, which ``J @ J.mT`` hands on to `partial_trace`.
        batch_size: Samples per pass, or "auto". Results do not depend on it.
        chunk_size: Columns per pass, or "auto". Results do not depend on it.
        max_dense_bytes: Largest dense result allowed; "auto" is a quarter of what is free now, 0 never.
        batch_dim: Position of the sample axis in inputs and output, None for coupled samples, or an axis for
            each input; see `ntkops.ntk`.
        differentiable: Keep the live tensors instead of a snapshot, so that products can be
            differentiated.

    Returns:
        `JacobianOperator` of shape ``(N·O, P)``.

    Raises:
        NtkopsError: The one that fits what is wrong with model, selection, inputs or output; see
            `ntkops.errors`.

    Example:
        >>> import torch, ntkops
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(3, 2)
        >>> x = torch.randn(5, 3)
        >>> J = ntkops.jacobian(model, x)
        >>> J.shape, (J @ torch.ones(8)).shape, (J.mT @ torch.ones(10)).shape
        (torch.Size([10, 8]), torch.Size([10]), torch.Size([8]))
    """
    linearization = linearize(model, params, output, batch_dim=batch_dim, differentiable=differentiable)
    axis = labelled(state_axis(linearization, x), axes)
    core = Core(
        engine=build_engine(linearization, axis.inputs, engine, batch_size=batch_size, chunk_size=chunk_size),
        rows=axis,
        columns=ParameterAxis.beside(axis, linearization.num_parameters),
        limit=max_dense_bytes,
    )
    return JacobianOperator(*linearization.parameters, core=core)
