"""Kernels of a model and its samples: here, or over the processes of a group."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from .arguments import checked
from .distributed import ShardedKernelOperator
from .distributed.build import sharded_ntk, sharded_projected_ntk
from .engines import EngineChoice, build_engine
from .errors import InputError
from .model import BatchDim, linearize
from .operators.axes import StateAxis
from .operators.jacobian import state_axis
from .operators.kernel import NTKOperator
from .operators.output_choice import OutputChoice, choose_outputs, labelled, over_samples
from .operators.products import Core, Spending
from .operators.projected import FeatureFiles, ProjectedCore, ProjectedNTKOperator
from .operators.projection import as_projection
from .operators.sample_kernel import SampleKernelOperator
from .projections import SJLT
from .vectors import resolve_generator

if TYPE_CHECKING:
    from .model.accepted import GroupLike, InputsLike, ModelLike, OutputLike, ParamsLike
    from .operators.projection import ProjectionLike

__all__ = ["ntk", "projected_ntk"]


@checked
def ntk(
    model: ModelLike,
    x: InputsLike,
    x2: InputsLike | None = None,
    outputs: OutputChoice = "all",
    params: ParamsLike = None,
    output: OutputLike = None,
    engine: EngineChoice = "auto",
    batch_size: int | Literal["auto"] = "auto",
    chunk_size: int | Literal["auto"] = "auto",
    max_dense_bytes: int | Literal["auto"] = "auto",
    *,
    axes: Sequence[str] | None = None,
    batch_dim: BatchDim = 0,
    differentiable: bool = False,
    group: GroupLike = None,
) -> NTKOperator:
    r"""Return the empirical neural tangent kernel :math:`K = J(x) J(x_2)^\top` as a lazy operator.

    Args:
        model: `torch.nn.Module`, a function ``(params, inputs) -> output``, or a `Linearization`.
            It is never run or changed itself: the operator works on a private copy.
        x: N samples: a tensor, a tuple (positional arguments), a dict (keyword arguments), or a
            re-iterable of batches of these.
        x2: M samples of the columns; None for the square kernel of ``x``.
        outputs: "all" for all outputs, ``(N·O, M·O)``, sample-major; "each" for the batch of O kernels
            of single outputs, ``(O, N, M)``; "trace" for their sum, ``(N, M)``; a number for one of
            them; a list for a kernel over some, ``(N·len, M·len)``. With ``axes``, a dict by their names:
            "each" axes become the batch, in the order of ``axes``, "trace" axes are summed over, and the
            others are "all": ``{"time": "trace", "class": "each"}`` is ``(C, N, M)``. "samples" is the name
            of one more axis, for square kernels: ``{"samples": "trace"}`` is ``(O, O)``, the sum of the
            kernels of single samples, and ``{"samples": "each"}`` these, ``(N, O, O)``.
        params: Selects parameters: None (all that require grad), names, glob patterns, modules of the model,
            a predicate ``(name, parameter) -> bool``, a dict of values at which to linearise, or
            `ntkops.Entries` for single weights.
        output: What the state is: None (the model returns a tensor), a key or position, a callable
            on the raw output, or a module path (``"rnn[0]"``, ``"block@1"``).
        engine: "auto", "autograd", or "layerwise" (exact layer structure where rules cover it); a
            `Layerwise` is "layerwise" with routes, and a limit of backward passes, of your own choice.
            Results do not depend on it.
        batch_size: Samples per pass, or "auto": what the memory holds, and less from where it runs out, with
            a warning in the log. Results do not depend on it.
        chunk_size: Columns per pass, or "auto" in the same way. Results do not depend on it.
        max_dense_bytes: Largest dense result allowed; "auto" is a quarter of what is free now. Inside
            it products may switch to a dense block once that is cheaper (`engine_info.dense`); at 0
            nothing dense is ever built.
        axes: Names of the axes of one sample's output, such as ``("time", "class")``.
        batch_dim: Position of the sample axis in inputs and output; None for coupled samples, such as the
            nodes of one graph, which are then the first axis of the output; or an axis for each input, by
            keyword or position: ``{"x": 0, "h": 1, "edges": None}``, None for what all samples share.
        differentiable: Keep the live tensors instead of a snapshot, so that products can be
            differentiated.
        group: A `torch.distributed.ProcessGroup`, or "world": x holds this rank's samples (none is allowed
            where other ranks have some), every rank makes the same call with the same model, and the result
            is a `ShardedKernelOperator`, whose shape is that of this rank's rows. Nothing dense is built.

    Returns:
        `NTKOperator`. Cost of ``K @ V``: at most one vjp and one jvp a column (times O for
        "each", "trace"); less where layer factors are cached, or a dense block has been paid for.
        Over "samples" a `SampleKernelOperator`, whose blocks cost one per-sample pass an output.

    Raises:
        InputError: If ``outputs``, ``axes`` or ``engine`` is not understood.
        ShapeError: If the outputs of ``x`` and ``x2`` have different shapes, or ``axes`` does not name
            each axis of the output.
        OutOfRangeError: If an output number does not exist.
        ShardingError: If the ranks of ``group`` bring different models, options or output shapes.
        RankFailedError: If another rank of ``group`` has failed.
        NtkopsError: The one that fits what is wrong with model, selection, inputs or output; see
            `ntkops.errors`.

    Example:
        >>> import torch, ntkops
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
        ... )
        >>> x = torch.randn(5, 3)
        >>> K = ntkops.ntk(model, x)
        >>> K.shape, (K @ torch.ones(10)).shape
        (torch.Size([10, 10]), torch.Size([10]))
        >>> ntkops.ntk(model, x, outputs="each").shape, K.cross(torch.randn(4, 3)).shape
        (torch.Size([2, 5, 5]), torch.Size([8, 10]))
        >>> gru = torch.nn.GRU(3, 2, batch_first=True)
        >>> ntkops.ntk(
        ...     gru,
        ...     torch.randn(5, 4, 3),
        ...     output=0,
        ...     axes=("time", "hidden"),
        ...     outputs={"time": "each"},
        ... ).shape
        torch.Size([4, 10, 10])
    """
    of_samples = over_samples(outputs)
    if of_samples and (x2 is not None or group is not None):
        raise InputError(
            f"outputs={outputs!r}: kernels of single samples are square, and of one process: leave x2=None "
            "and group=None"
        )

    def choose(axis: StateAxis) -> StateAxis:
        return choose_outputs(labelled(axis, axes), outputs)

    if group is not None:
        if differentiable:
            raise InputError("products over a process group have no derivative: leave differentiable=False")
        sharded: Any = sharded_ntk(
            model,
            x,
            x2,
            choose,
            params=params,
            output=output,
            engine=engine,
            batch_size=batch_size,
            chunk_size=chunk_size,
            batch_dim=batch_dim,
            group=group,
            described={"outputs": outputs, "axes": axes, "batch_dim": batch_dim, "engine": repr(engine)},
        )
        return sharded
    linearization = linearize(model, params, output, batch_dim=batch_dim, differentiable=differentiable)
    whole = state_axis(linearization, x)
    rows = choose(whole)
    columns = rows if x2 is None else rows.over(linearization.inputs(x2))
    core = Core(
        engine=build_engine(
            linearization, whole.inputs, engine, batch_size=batch_size, chunk_size=chunk_size
        ),
        rows=rows,
        columns=columns,
        limit=max_dense_bytes,
    )
    if of_samples:
        kernels: Any = SampleKernelOperator(*linearization.parameters, core=core)
        return kernels
    return NTKOperator(*linearization.parameters, core=core)


@checked
def projected_ntk(
    K: NTKOperator,
    projection: ProjectionLike,
    *,
    max_dense_bytes: int | Literal["auto"] | None = None,
    memmap: str | PathLike[str] | None = None,
    generator: torch.Generator | None = None,
) -> ProjectedNTKOperator:
    r"""Return the kernel that is seen through a projection, :math:`J P^\top P J^\top`, lazily.

    With P from `ntkops.projections` it is an unbiased sketch of K from features of k numbers a row; with
    rows of P that are orthonormal it is the kernel restricted to their span,
    :math:`\Phi \Pi \Phi^\top` with :math:`\Pi = P^\top P` (eq. 7 of the paper on distilled kernels): a
    basis of principal components, or of the gradients of inducing points.

    Args:
        K: Kernel from `ntkops.ntk`, square or cross, with any choice of outputs; over a process group too,
            where products then sum k numbers a column over ranks. All outputs, and the
            samples of `cross`, meet the same P.
        projection: One of `ntkops.projections` with dim P; a number k, for a random `SJLT` to k features;
            or a constant ``(k, P)`` tensor or LinearOperator in the dtype of K.
        max_dense_bytes: Largest dense result, the features among them; None for that of K. At 0 features
            are never kept, and products go through J and P.
        memmap: An existing directory: features are kept there, in memory-mapped files, whatever their size,
            and removed with the last operator that uses them. For CPU kernels of one process. None keeps
            them in memory.
        generator: CPU generator from which the seed of a projection given by its k is drawn; None for a
            fresh one. ``.projection.seed`` is the seed.

    Returns:
        `ProjectedNTKOperator`, the shape of K. Cost of the features: one per-sample pass for each output
        and one application of P; then n k operations a product. Memory: the features and one tile of
        gradients, never N x P.

    Raises:
        InputError: If K is no kernel of `ntkops.ntk`, or the projection nothing that projects; or if a
            generator is given with a projection that is fixed; or if ``memmap`` is no directory.
        ShapeError: If the projection does not take P entries.
        DtypeError: If a given matrix has another dtype than K.
        DeviceError: If a given matrix lives on another device.
        UnsupportedOperationError: If a given matrix requires grad.

    Example:
        >>> import torch, ntkops
        >>> from ntkops import projected_ntk
        >>> from ntkops.projections import SJLT
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
        ... )
        >>> K = ntkops.ntk(model, torch.randn(5, 3))
        >>> sketch = projected_ntk(K, SJLT(dim=50, k=16, seed=0))
        >>> sketch.shape, sketch.features().shape, sketch.cross(torch.randn(4, 3)).shape
        (torch.Size([10, 10]), torch.Size([10, 16]), torch.Size([8, 10]))
    """
    known = isinstance(K, NTKOperator) and not isinstance(K, ProjectedNTKOperator)
    if not known and not isinstance(K, ShardedKernelOperator):
        kind = "already projected" if isinstance(K, ProjectedNTKOperator) else f"a {type(K).__name__}"
        raise InputError(
            f"K is {kind}: pass a kernel from ntkops.ntk; ntkops.projections.compose joins projections"
        )
    if isinstance(projection, int) and not isinstance(projection, bool):
        shared = K.space.common(resolve_generator(generator)[0])  # one seed for all ranks
        projection = SJLT(K.num_parameters, projection, nonzeros=max(1, min(4, projection)), generator=shared)
    elif generator is not None:
        raise InputError("generator draws a projection that is given by its k; this one is fixed")
    if isinstance(K, ShardedKernelOperator):
        if memmap is not None:
            raise InputError("memmap is for kernels of one process: over a group each rank holds its share")
        sharded: Any = sharded_projected_ntk(K, projection)
        return sharded
    found = as_projection(projection, K.num_parameters, K.dtype, K.device)
    if memmap is not None and (not Path(memmap).is_dir() or K.device.type != "cpu"):
        raise InputError(f"memmap={str(memmap)!r}: an existing directory, for a kernel on the CPU")
    core = ProjectedCore(
        engine=K._core.engine,
        rows=K._core.rows,
        columns=K._core.columns,
        limit=K._core.limit if max_dense_bytes is None else max_dense_bytes,
        spending=Spending(),
        projection=found,
        files=None if memmap is None else FeatureFiles(Path(memmap)),
    )
    return ProjectedNTKOperator(*K._args, core=core)
