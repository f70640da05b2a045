r"""Trace, Frobenius norm, inner product, alignment and effective rank.

Each is a function of traces and inner products of its operators (`_quantities`). They have the same options,
which `trace` explains.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..arguments import checked
from ..errors import InputError
from ..operators.centred import centred
from ..results import Estimate
from ._differentiable import differentiable_estimate
from ._driver import run
from ._exact import ExactWork
from ._plans import ScalarPlan
from ._quantities import ALIGNMENT, EFFECTIVE_RANK, FROBENIUS_NORM, INNER, TRACE, Quantity
from ._request import Request, operands, spectral_operand

__all__ = [
    # quantities
    "alignment",
    "effective_rank",
    "frobenius_norm",
    "inner",
    "trace",
    # their methods
    "NORM_METHODS",
    "PAIR_METHODS",
    "TRACE_METHODS",
]

_First = Literal["auto", "exact", "stratified", "sketch"]
_Product = Literal["ntk-hutch++", "hutch++", "hutchinson"]
TraceMethod = Literal[_First, Literal["xtrace"], _Product, Literal["rhutch", "fhutch"]]
NormMethod = Literal[_First, Literal["xtrace"], _Product, Literal["reverse", "forward"]]
PairMethod = Literal[_First, _Product, Literal["reverse", "forward"]]
TRACE_METHODS, NORM_METHODS, PAIR_METHODS = (
    get_args(kind)[1:] for kind in (TraceMethod, NormMethod, PairMethod)
)


@checked
def trace(
    operator: LinearOperator | Tensor,
    *,
    rtol: float | None = None,
    num_passes: int | None = None,
    method: TraceMethod = "auto",
    orthogonalize: bool = False,
    generator: torch.Generator | None = None,
    progress: bool = False,
    differentiable: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: float = 60.0,
) -> Estimate:
    r"""Estimate or compute the trace, :math:`\mathrm{tr}\,K = \sum_i K_{ii} = |J|_F^2`.

    Exact: one per-sample pass for each output, memory of one tile. Hutchinson and Hutch++: two passes a
    product column. One-sided: :math:`\mathrm{tr}\,K = E|J^\top v|^2 = E|J p|^2`, one pass a probe. All are
    unbiased. Source: paper, sections 3.1 and 3.2.

    Args:
        operator: Square ``(*batch, n, n)`` operator or tensor.
        rtol: Relative tolerance: P(|error| ≤ rtol · |value|) ≥ 0.95. Default 1e-2 where
            ``num_passes`` is None too.
        num_passes: Passes to spend (one vjp, jvp or foreign product column each); with ``rtol`` a cap
            (by default 20,000 in one direction, and none where exactness is the end).
        method: "auto" (exact where that costs no more, else stratified, else a sketch), "exact" (the sum
            of the diagonal), "hutchinson", "hutch++" (paper, Algorithm 1), "rhutch" (vjps alone) or
            "fhutch" (jvps alone) (Algorithm 2).
            "sketch" is the (R, M) sketch of `Sketch`, what "auto" takes for K = J Jᵀ that is not stratified
            (else "hutch++", and one direction where there is no other);
            "xtrace" lets each probe be sketch and residual (Epperly, Tropp & Webber 2024), four passes a
            column;
            "ntk-hutch++" sketches by jvps alone and takes quadratic forms by vjps alone.
            "stratified" draws m output combinations for each sample by itself, so that no noise comes from
            pairs of samples: m per-sample passes, exact at one column an output.
            It is for kernels over all outputs of their samples, and what "auto" estimates with where
            layer structure makes such a pass as cheap as a vjp.
        orthogonalize: For "rhutch" and "fhutch": spend half the probes on an orthonormal basis of random
            directions (the optional step of Algorithm 2). It pays only where they are not few against
            the dimension: otherwise the other half alone decides the error.
        generator: CPU generator of the probes; None draws a seed from the operating system. The result
            records the seed.
        progress: Show a bar, of passes or, for exact work, of rows, with the time left.
        differentiable: Return a value that can be differentiated (twice, too) with respect to the parameters
            of operators made with ``ntkops.ntk(..., differentiable=True)``: exact, or with ``num_passes`` by
            "hutchinson" or "hutch++" for fixed probes. Memory of the first derivative: one tile or chunk.
        checkpoint: A file that exact work is kept in, part by part: a run that is interrupted goes on from
            it, and gives the same bits as one that is not. Makes "auto" exact. It is refused if model,
            parameters or data have changed; sizes of chunks and the number of threads are followed.
        checkpoint_every: Seconds from one writing of the file to the next; an interrupt writes it, too.

    Returns:
        Estimate with value, standard error, 95 % interval, method, passes really made, and whether the
        tolerance was met. The interval uses the quantile of the hardest spectrum, one large
        eigenvalue, for as many probes (it tends to Student's), and is wider where `rtol` made it stop
        early. "sketch" and "xtrace" take the value from all probes, the error from a third of them
        judged by the rest. With a single residual probe the error is infinite.

    Raises:
        CheckpointError: If the file belongs to other work, or cannot be read or written.
        InputError: If an option is not understood, or the passes do not pay for the method.
        ShapeError: If the operator is not square.
        UnsupportedOperationError: If a one-sided method is asked of an operator without factors.
        DtypeError: If the operator is not of a real floating dtype, or two of them differ.
        NonFiniteError: If a product is not finite.

    Warns:
        NotConvergedWarning: If the passes were spent before the tolerance was met.

    Example:
        >>> import torch, ntkops
        >>> _ = torch.manual_seed(0)
        >>> K = ntkops.ntk(torch.nn.Linear(3, 2), torch.randn(5, 3))
        >>> exact = ntkops.trace(K)
        >>> estimate = ntkops.trace(
        ...     K,
        ...     method="rhutch",
        ...     num_passes=50,
        ...     generator=torch.Generator().manual_seed(1),
        ... )
        >>> (
        ...     exact.method,
        ...     abs(float(estimate) - float(exact)) < 4 * float(estimate.stderr),
        ... )
        ('exact', True)
    """
    if orthogonalize and method not in ("rhutch", "fhutch"):
        raise InputError(f"orthogonalize is for method='rhutch' and 'fhutch', not {method!r}")
    return _estimate(
        TRACE,
        (operator,),
        TRACE_METHODS,
        rtol,
        num_passes,
        method,
        generator,
        progress,
        differentiable,
        checkpoint,
        checkpoint_every,
        orthogonalize=orthogonalize,
    )


@checked
def frobenius_norm(
    operator: LinearOperator | Tensor,
    *,
    rtol: float | None = None,
    num_passes: int | None = None,
    method: NormMethod = "auto",
    generator: torch.Generator | None = None,
    progress: bool = False,
    differentiable: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: float = 60.0,
) -> Estimate:
    r"""Estimate or compute the Frobenius norm, :math:`|K|_F = (\mathrm{tr}\,K^\top K)^{1/2}`.

    Exact: tile by tile, nothing n x n is held. Hutchinson and Hutch++ estimate :math:`\mathrm{tr}\,K^\top K =
    E|K v|^2` without bias, with one product a column where the paper's form K (Kᵀ v) takes two. The
    square root has a bias of relative order 1/m. Source: paper, section 3.3 and Proposition 1.

    Args:
        operator: ``(*batch, m, n)`` operator or tensor. What is known to be L Lᵀ, such as `ntkops.ggn`, is
            looked at as LᵀL where that is smaller, by "auto" and "exact"; kernels of samples are not.
        rtol: Relative tolerance.
        num_passes: Passes to spend; with ``rtol`` a cap.
        method: "auto", "exact", "hutchinson", "hutch++", "ntk-hutch++", "sketch", "xtrace" and "stratified"
            as for `trace`; "reverse" (vjps alone) or "forward" (jvps alone), Proposition 1 in its form of
            least variance, where tolerances below 1e-2 take ``num_passes``.
        generator: CPU generator of the probes.
        progress: Show a bar.
        differentiable: Return a value that can be differentiated with respect to live operators' parameters.
        checkpoint: A file that exact work is kept in, tile by tile.
        checkpoint_every: Seconds from one writing of the file to the next.

    Returns:
        Estimate as for `trace`; "stratified" takes at least two passes.

    Raises:
        CheckpointError: As for `trace`.
        InputError: If an option is not understood, or the passes do not pay for the method.
        UnsupportedOperationError: If a one-sided method is asked of an operator without factors.
        DtypeError: If the operator is not of a real floating dtype, or two of them differ.
        NonFiniteError: If a product is not finite.

    Warns:
        NotConvergedWarning: If the passes were spent before the tolerance was met.

    Example:
        >>> import torch, ntkops
        >>> A = torch.diag(torch.tensor([3.0, 4.0]))
        >>> float(ntkops.frobenius_norm(A))
        5.0
    """
    return _estimate(
        FROBENIUS_NORM,
        (operator,),
        NORM_METHODS,
        rtol,
        num_passes,
        method,
        generator,
        progress,
        differentiable,
        checkpoint,
        checkpoint_every,
    )


@checked
def inner(
    first: LinearOperator | Tensor,
    second: LinearOperator | Tensor,
    *,
    rtol: float | None = None,
    num_passes: int | None = None,
    method: PairMethod = "auto",
    generator: torch.Generator | None = None,
    progress: bool = False,
    differentiable: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: float = 60.0,
) -> Estimate:
    r"""Estimate or compute the inner product :math:`\langle K_1, K_2 \rangle_F = \mathrm{tr}(K_1^\top K_2)`.

    Exact: by the tiles of both, side by side. Hutchinson and Hutch++: :math:`E[(K_1 v)^\top (K_2 v)]`,
    unbiased, with the same probes for both. Source: paper, section 3.3 and Proposition 1.

    Args:
        first: ``(*batch, m, n)`` operator or tensor.
        second: One of the same shape.
        rtol: Relative tolerance.
        num_passes: Passes to spend; with ``rtol`` a cap.
        method: "auto", "exact", "hutchinson", "hutch++", "ntk-hutch++", "sketch" and "stratified" as for
            `trace`; "reverse" (vjps alone) or "forward" (jvps alone), Proposition 1 in its form of least
            variance, where tolerances below 1e-2 take ``num_passes``.
        generator: CPU generator of the probes.
        progress: Show a bar.
        differentiable: Return a value that can be differentiated with respect to live operators' parameters.
        checkpoint: A file that exact work is kept in, tile by tile.
        checkpoint_every: Seconds from one writing of the file to the next.

    Returns:
        Estimate as for `trace`; "stratified" takes at least two passes of each kernel.

    Raises:
        CheckpointError: As for `trace`.
        InputError: If an option is not understood, or the passes do not pay for the method.
        UnsupportedOperationError: If a one-sided method is asked of an operator without factors.
        DtypeError: If the operator is not of a real floating dtype, or two of them differ.
        NonFiniteError: If a product is not finite.
        ShapeError: If the shapes differ.

    Warns:
        NotConvergedWarning: If the passes were spent before the tolerance was met.

    Example:
        >>> import torch, ntkops
        >>> A = torch.diag(torch.tensor([3.0, 4.0]))
        >>> float(ntkops.inner(A, torch.eye(2)))
        7.0
    """
    return _estimate(
        INNER,
        (first, second),
        PAIR_METHODS,
        rtol,
        num_passes,
        method,
        generator,
        progress,
        differentiable,
        checkpoint,
        checkpoint_every,
    )


@checked
def alignment(
    first: LinearOperator | Tensor,
    second: LinearOperator | Tensor,
    *,
    center: Literal["samples"] | None = None,
    rtol: float | None = None,
    num_passes: int | None = None,
    method: PairMethod = "auto",
    generator: torch.Generator | None = None,
    progress: bool = False,
    differentiable: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: float = 60.0,
) -> Estimate:
    r"""Estimate or compute the alignment :math:`\langle K_1, K_2 \rangle_F / (|K_1|_F |K_2|_F)`.

    The cosine of two kernels, in [0, 1] for positive semidefinite ones; not centred by default. All three
    terms share their sketch and their probes, so that noise cancels in the ratio; the error is the
    jackknife's. The ratio has a bias of relative order 1/m. Source: paper, section 3.3 and Proposition 1.

    Args:
        first: ``(*batch, m, n)`` operator or tensor.
        second: One of the same shape.
        center: "samples" for the centred alignment of :math:`H K_1 H` and :math:`H K_2 H`, with
            :math:`H = (I - 11^\top / N) \otimes I_O`: each output minus its mean over the samples (Cortes,
            Mohri & Rostamizadeh 2012). O products more a kernel. A matrix has one row a sample.
        rtol: Relative tolerance.
        num_passes: Passes to spend; with ``rtol`` a cap.
        method: "auto", "exact", "hutchinson", "hutch++", "ntk-hutch++", "sketch" and "stratified" as for
            `trace`; "reverse" (vjps alone) or "forward" (jvps alone), Proposition 1 in its form of least
            variance, where tolerances below 1e-2 take ``num_passes``.
        generator: CPU generator of the probes.
        progress: Show a bar.
        differentiable: Return a value that can be differentiated with respect to live operators' parameters.
        checkpoint: A file that exact work is kept in, tile by tile.
        checkpoint_every: Seconds from one writing of the file to the next.

    Returns:
        Estimate as for `trace`; "stratified" takes at least two passes of each kernel.

    Raises:
        CheckpointError: As for `trace`.
        InputError: If an option is not understood, or the passes do not pay for the method.
        UnsupportedOperationError: If a one-sided method is asked of an operator without factors.
        DtypeError: If the operator is not of a real floating dtype, or two of them differ.
        NonFiniteError: If a product is not finite.
        ShapeError: If the shapes differ, or rows to be centred are no whole samples.
        ZeroKernelError: If one of the kernels is zero.

    Warns:
        NotConvergedWarning: If the passes were spent before the tolerance was met.

    Example:
        >>> import torch, ntkops
        >>> A = torch.diag(torch.tensor([3.0, 4.0]))
        >>> float(ntkops.alignment(A, 2 * A))
        1.0
    """
    if center is not None:
        if center != "samples":
            raise InputError(f"center={center!r}: pass 'samples', or None for kernels as they are")
        if differentiable or checkpoint is not None:
            raise InputError("center='samples' goes neither with differentiable=True nor with checkpoint=")
        first, second = centred(first, "the first kernel"), centred(second, "the second kernel")
    return _estimate(
        ALIGNMENT,
        (first, second),
        PAIR_METHODS,
        rtol,
        num_passes,
        method,
        generator,
        progress,
        differentiable,
        checkpoint,
        checkpoint_every,
    )


@checked
def effective_rank(
    operator: LinearOperator | Tensor,
    *,
    rtol: float | None = None,
    num_passes: int | None = None,
    method: NormMethod = "auto",
    generator: torch.Generator | None = None,
    progress: bool = False,
    differentiable: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: float = 60.0,
) -> Estimate:
    r"""Estimate or compute the effective rank, :math:`(\mathrm{tr}\,K)^2 / |K|_F^2`.

    It is the participation ratio of the eigenvalues: n for a multiple of the identity, 1 for rank one, and
    :math:`n \cos^2(K, I)`. (Equation 16 of the paper lacks the square.) Trace and norm share their probes, so
    that their noise partly cancels; the error is the jackknife's. The ratio has a bias of relative order
    1/m. Cost as for the norm.

    Args:
        operator: Square ``(*batch, n, n)`` operator or tensor; of L Lᵀ the smaller side, as for the norm.
        rtol: Relative tolerance.
        num_passes: Passes to spend; with ``rtol`` a cap.
        method: "auto", "exact", "hutchinson", "hutch++", "ntk-hutch++", "sketch", "xtrace" and "stratified"
            as for `trace`; "reverse" (vjps alone) or "forward" (jvps alone), Proposition 1 in its form of
            least variance, where tolerances below 1e-2 take ``num_passes``.
        generator: CPU generator of the probes.
        progress: Show a bar.
        differentiable: Return a value that can be differentiated with respect to live operators' parameters.
        checkpoint: A file that exact work is kept in, tile by tile.
        checkpoint_every: Seconds from one writing of the file to the next.

    Returns:
        Estimate as for `trace`; "stratified" takes at least two passes.

    Raises:
        CheckpointError: As for `trace`.
        InputError: If an option is not understood, or the passes do not pay for the method.
        UnsupportedOperationError: If a one-sided method is asked of an operator without factors.
        DtypeError: If the operator is not of a real floating dtype, or two of them differ.
        NonFiniteError: If a product is not finite.
        ShapeError: If the operator is not square.
        ZeroKernelError: If the kernel is zero.

    Warns:
        NotConvergedWarning: If the passes were spent before the tolerance was met.

    Example:
        >>> import torch, ntkops
        >>> float(ntkops.effective_rank(torch.eye(7)))
        7.0
    """
    return _estimate(
        EFFECTIVE_RANK,
        (operator,),
        NORM_METHODS,
        rtol,
        num_passes,
        method,
        generator,
        progress,
        differentiable,
        checkpoint,
        checkpoint_every,
    )


def _estimate(
    quantity: Quantity,
    operators: Sequence[LinearOperator | Tensor],
    methods: Sequence[str],
    rtol: float | None,
    num_passes: int | None,
    method: str,
    generator: torch.Generator | None,
    progress: bool,
    differentiable: bool,
    checkpoint: str | os.PathLike[str] | None,
    checkpoint_every: float,
    *,
    orthogonalize: bool = False,
) -> Estimate:
    """Return the estimate of a quantity of one or two operators."""
    if differentiable:
        if checkpoint is not None:
            raise InputError(
                "checkpoint= does not go with differentiable=True: a file does not hold the graph"
            )
        return differentiable_estimate(
            quantity,
            operators,
            rtol=rtol,
            num_passes=num_passes,
            method=method,
            generator=generator,
            progress=progress,
        )
    request = Request.check(
        methods, method=method, rtol=rtol, num_passes=num_passes, generator=generator, progress=progress
    )
    work = ExactWork(quantity.name, request.progress, checkpoint, checkpoint_every)
    if checkpoint is not None:
        if method not in ("auto", "exact"):
            raise InputError(
                f"checkpoint= keeps exact work, not method={method!r}: leave the method out, or keep probes "
                "with ntkops.Sketch.save"
            )
        # "auto" might sample in one run and be exact in the next: a file holds exact sums alone
        request = replace(request, method="exact")
    # Norm and effective rank of L Lᵀ are those of LᵀL: the smaller side, where no method of a side was named.
    found = spectral_operand(operators[0], method) if quantity.spectral else operands(*operators)
    return run(ScalarPlan(quantity, found, orthogonalize=orthogonalize), request, work)
