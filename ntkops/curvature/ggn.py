"""The generalised Gauss-Newton matrix and the Fisher information of a loss, as lazy operators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from linear_operator.operators import LinearOperator
from linear_operator.utils.getitem import _is_noop_index
from torch import Tensor

from ..arguments import checked
from ..engines import EngineChoice
from ..errors import InputError
from ..model import BatchDim
from ..operators import JacobianOperator, Sandwich, jacobian
from ..operators.axes import StateAxis
from ..operators.block_diagonal import DenseBlocks
from ..operators.chain import product_factors
from ..operators.jacobian import network_states
from .losses import Loss, as_targets, loss_with_targets, read_loss, require_outputs

if TYPE_CHECKING:
    from ..model.accepted import ArrayLike, InputsLike, LossLike, ModelLike, OutputLike, ParamsLike

__all__ = ["GGNOperator", "ggn"]

_NAMES = {None: "GGN", "type2": "type-2 Fisher", "empirical": "empirical Fisher"}


class GGNOperator(Sandwich):
    r"""The matrix :math:`G = F F^\top` with :math:`F = J^\top S`, ``(P, P)``, lazily; made by `ntkops.ggn`.

    S Sᵀ is the Hessian of the loss in the outputs, or what stands for it. Products take one jvp and one vjp a
    column, diagonals and dense results one per-sample pass an output. Slices, sums, multiples and
    ``G.add_jitter(ridge)`` stay lazy.

    Args:
        left_linear_op: F, ``(P, r)``.
        right_linear_op: Fᵀ.
        kind: What it is: "GGN", "type-2 Fisher" or "empirical Fisher".

    Example:
        >>> import torch, ntkops
        >>> model, x = torch.nn.Linear(3, 2), torch.ones(4, 3)
        >>> G = ntkops.ggn(model, x, fisher="empirical", targets=torch.tensor([0, 1, 1, 0]))
        >>> G.kind, G.hessian_factor.shape, G.function_space.shape
        ('empirical Fisher', torch.Size([8, 4]), torch.Size([4, 4]))
    """

    def __init__(self, left_linear_op: Any, right_linear_op: Any, kind: str = "GGN") -> None:
        super().__init__(left_linear_op, right_linear_op)
        self.kind = kind
        self._nondifferentiable_kwargs["kind"] = kind  # what linear_operator makes it anew from

    @property
    def jacobian(self) -> JacobianOperator:
        """J, ``(n, P)``."""
        found = product_factors(self.right_linear_op)[-1]
        assert isinstance(found, JacobianOperator)
        return found

    @property
    def hessian_factor(self) -> LinearOperator:
        """S, ``(n, r)``, block diagonal."""
        found: LinearOperator = product_factors(self.left_linear_op)[-1]
        return found

    @property
    def function_space(self) -> Sandwich:
        r"""The matrix :math:`A = F^\top F = S^\top K S` with :math:`K = J J^\top`, ``(r, r)``, lazily.

        Its eigenvalues are those of G, but for zeros: trace, norms, leading eigenvalues and log-determinants
        of one are had from the other.
        """
        J, S = self.jacobian, self.hessian_factor
        return Sandwich(Sandwich(S.mT, J @ J.mT), S)

    def _getitem(self, row_index: Any, col_index: Any, *batch_indices: Any) -> LinearOperator:
        if _is_noop_index(row_index) and _is_noop_index(col_index):
            return self
        return Sandwich(self.left_linear_op, self.right_linear_op)._getitem(
            row_index, col_index, *batch_indices
        )

    def _transpose_nonbatch(self) -> GGNOperator:
        return self

    def __repr__(self) -> str:
        """Show the kind, the sizes of both sides, and where it lives."""
        r = self.hessian_factor.shape[1]
        sizes = f"{'x'.join(map(str, self.shape))}, function space {r}x{r}"
        return f"GGNOperator({self.kind}, {sizes}, {self.dtype}, {self.device})"


@checked
def ggn(
    model: ModelLike,
    x: InputsLike,
    loss: LossLike = "cross_entropy",
    targets: ArrayLike | None = None,
    fisher: Literal["type2", "empirical"] | None = None,
    *,
    reduction: Literal["sum", "mean"] = "sum",
    params: ParamsLike = None,
    output: OutputLike = None,
    engine: EngineChoice = "auto",
    axes: Sequence[str] | None = None,
    batch_size: int | Literal["auto"] = "auto",
    chunk_size: int | Literal["auto"] = "auto",
    max_dense_bytes: int | Literal["auto"] = "auto",
    batch_dim: BatchDim = 0,
) -> GGNOperator:
    r"""Return the generalised Gauss-Newton matrix :math:`G = J^\top H J` of a loss as a lazy operator.

    :math:`H = \mathrm{blockdiag}(\nabla^2_f \ell_n) = S S^\top` is the Hessian of the loss in the outputs, so
    that G is that of the loss of the linearised network in its parameters. For the cross-entropy
    :math:`S = \mathrm{diag}(\sqrt p) - p \sqrt p^\top`, exactly, and finite however far the logits are
    saturated. The same spectrum, but for zeros, has ``G.function_space``, :math:`S^\top K S` with
    :math:`K = J J^\top`: `ntkops.logdet` takes the smaller of the two.

    Args:
        model: `torch.nn.Module`, a function ``(params, inputs) -> output``, or a `Linearization`.
        x: N samples, as for `ntkops.jacobian`; a re-iterable of batches, too.
        loss: "cross_entropy", of classes on the last axis of the output, at each position before it (tokens,
            pixels); "mse"; or a function ``(outputs, targets) -> ()`` of one sample, made of torch operations
            and convex in the outputs.
        targets: Needed for a function and for the empirical Fisher. Class numbers ``(N, *positions)``, of
            which -100 counts for nothing as in torch, or probabilities in the shape of the outputs; values in
            that shape for "mse"; whatever a function takes, ``(N, ...)``. Of samples that differ in length
            one for each position, end to end.
        fisher: None for the Gauss-Newton matrix; "type2" for the Fisher information under the model's own
            distribution, which it is for "cross_entropy" and "mse"; "empirical" for
            :math:`\sum_n \nabla_\theta \ell_n \nabla_\theta \ell_n^\top` at the targets, which is another
            matrix, and is no approximation of the two where the model does not fit.
        reduction: "sum" over samples (and positions, and entries of "mse"), as a log-likelihood has it; or
            "mean", what torch's losses take by default: divided by the N·O entries for "mse", by the
            positions that count for "cross_entropy", by N for a function.
        params: Selects parameters, as for `ntkops.jacobian`.
        output: What the state is, as for `ntkops.jacobian`.
        engine: "auto", "autograd", "layerwise" or a `Layerwise`. Results do not depend on it.
        axes: Names of the axes of one sample's output; that which is called "class" has the classes of
            "cross_entropy", where it is not the last. The rows of J and H are then in the order that has it
            last.
        batch_size: Samples per pass, or "auto".
        chunk_size: Columns per pass, or "auto".
        max_dense_bytes: Largest dense result allowed, of the function-space side, too; 0 never.
        batch_dim: The axis of inputs and output on which the samples lie, axes of single inputs, or None for
            the nodes of a graph, which are the samples then; see `ntkops.ntk`.

    Returns:
        `GGNOperator` ``(P, P)``, symmetric and positive semidefinite, of the parameters in the order of
        ``model.named_parameters()``. Making it takes one forward pass, and the eigenvectors of N blocks
        ``(O, O)`` for a function. A product takes one jvp and one vjp a column.

    Raises:
        InputError: If loss, Fisher or reduction are not understood, targets are missing, the loss is not
            convex in the outputs of a sample, which is named, or samples that differ in length have no
            matrix by positions.
        ShapeError: If targets do not fit.
        DtypeError: If targets have the wrong dtype.
        DeviceError: If targets live elsewhere.
        NonFiniteError: If outputs, targets or a Hessian hold NaN or infinity.
        OutOfRangeError: If a class does not exist.
        NtkopsError: The one that fits what is wrong with model, selection, inputs or output; see
            `ntkops.errors`.

    References:
        Schraudolph, Fast curvature matrix-vector products (2002); Martens, New insights and perspectives on
        the natural gradient method (2020); Kunstner, Balles, Hennig, Limitations of the empirical Fisher
        approximation (2019).

    Example:
        >>> import torch, ntkops
        >>> _ = torch.manual_seed(0)
        >>> layers = torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)
        >>> model, x = torch.nn.Sequential(*layers).double(), torch.randn(5, 3).double()
        >>> G = ntkops.ggn(model, x)
        >>> G.shape, G.function_space.shape, (G @ torch.ones(68).double()).shape
        (torch.Size([68, 68]), torch.Size([20, 20]), torch.Size([68]))
        >>> A = G.function_space
        >>> both = ntkops.logdet(G, 0.1), ntkops.logdet(A, 0.1)
        >>> bool(torch.isclose(both[0].value, both[1].value + 48 * torch.tensor(0.1).log()))
        True
    """
    kind = read_loss(loss)
    if fisher not in _NAMES:
        raise InputError(f"fisher={fisher!r}: None for the GGN, 'type2' or 'empirical'")
    if reduction not in ("sum", "mean"):
        raise InputError(f"reduction={reduction!r}: 'sum' or 'mean'")
    if fisher == "type2" and kind == "callable":
        raise InputError(
            "fisher='type2' takes expectations under the distribution of the model, which a function does "
            "not tell: pass loss='cross_entropy' or 'mse', or fisher=None for the Gauss-Newton matrix, which "
            "it is for minus the log-likelihood of an exponential family in its natural parameters"
        )
    if targets is None and (fisher == "empirical" or kind == "callable"):  # before the model is run
        what = "the empirical Fisher" if fisher == "empirical" else "a loss of your own"
        raise InputError(f"{what} needs targets=, one for each sample")
    J = jacobian(
        model,
        x,
        params,
        output,
        engine,
        axes=axes,
        batch_size=batch_size,
        chunk_size=chunk_size,
        max_dense_bytes=max_dense_bytes,
        batch_dim=batch_dim,
    )
    inputs = J._state_axis().inputs
    outputs = require_outputs(_outputs(J))
    if inputs.lengths is not None and (kind == "callable" or fisher == "empirical"):
        raise InputError(
            "samples differ in length, and the gradients and Hessians of a whole sample are blocks of one "
            "size: pass one length at a time, or loss='cross_entropy' or 'mse', which go by positions, with "
            "fisher=None"
        )
    if kind == "cross_entropy":
        J, outputs, targets = _classes_last(J, outputs, targets)
    found = loss_with_targets(loss, outputs, targets, needed=fisher == "empirical")
    scale = 1.0 / found.terms(outputs) if reduction == "mean" else 1.0
    S = _gradients(found, outputs, scale) if fisher == "empirical" else found.hessian_factor(outputs, scale)
    # Jᵀ H J = (Jᵀ S)(Jᵀ S)ᵀ: symmetric and semidefinite whatever is rounded
    F = Sandwich(J.mT, S)
    return GGNOperator(F, F.mT, _NAMES[fisher])


def _outputs(J: JacobianOperator) -> Tensor:
    """Return the outputs of samples, of nodes, or of positions where lengths differ, ``(N, *tail)``."""
    axis = J._state_axis()
    inputs = axis.inputs
    states = network_states(J._core.engine.linearization, J._args, inputs)
    if inputs.is_coupled:
        return states.reshape(inputs.output_shape)
    if inputs.lengths is None:
        return states.reshape(len(states), *inputs.output_shape)
    rows = states.flatten()
    rows = rows if axis.index is None else rows[axis.index.to(rows.device)]
    return rows.reshape(-1, *inputs.output_shape[1:])


def _gradients(loss: Loss, outputs: Tensor, scale: float) -> DenseBlocks:
    """Return the gradients of single samples as columns, ``(n, N)``."""
    # gradient of the mean times the number of terms is that of each sample: Σ_n g_n g_nᵀ = S Sᵀ, one column a
    # sample
    each = loss.gradient(outputs) * (loss.terms(outputs) * math.sqrt(scale))
    return DenseBlocks(each.reshape(len(outputs), -1, 1).to(outputs.dtype))


def _classes_last(J: JacobianOperator, outputs: Tensor, targets: Any) -> tuple[JacobianOperator, Tensor, Any]:
    """Return rows of J, outputs, and probabilities, with the axis named "class" as the last one."""
    axis = J._state_axis()
    names = [name for name, _ in axis.labels]
    if "class" not in names or names[-1] == "class":
        return J, outputs, targets
    if axis.inputs.lengths is not None:
        raise InputError(
            f"samples differ in length, and their axes are {tuple(names)}: put the classes on the last axis "
            "of the output with output="
        )
    place, first = names.index("class"), int(axis.inputs.is_coupled)  # nodes come before what has names
    order = [*range(first), *(first + name for name in range(len(names)) if name != place), first + place]
    numbers = torch.arange(axis.inputs.num_outputs).reshape(axis.inputs.output_shape).permute(order)
    moved = StateAxis(
        axis.inputs, numbers.reshape(1, -1), labels=tuple(axis.labels[n - first] for n in order[first:])
    )
    J = J._rebuild(J._core.with_axes(moved, J._core.columns))
    if targets is not None:
        targets = as_targets(targets)
        if targets.is_floating_point() and targets.shape == outputs.shape:
            targets = targets.movedim(place + 1, -1)
    return J, outputs.movedim(place + 1, -1), targets
