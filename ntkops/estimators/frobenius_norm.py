"""The Frobenius norm of an operator."""

from __future__ import annotations

import os

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..arguments import checked
from ..results import Estimate
from ._differentiable import differentiable_estimate
from ._driver import NORM_METHODS, NormMethod, estimate
from ._exact import require_no_checkpoint
from ._quantities import FROBENIUS_NORM
from ._request import spectral_operand

__all__ = ["frobenius_norm"]


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
        rtol: Relative tolerance: P(|error| ≤ rtol · |value|) ≥ 0.95. Default 1e-2 where
            ``num_passes`` is None too.
        num_passes: Passes to spend (one vjp, jvp or foreign product column each); with ``rtol`` a cap
            (by default 20,000 in one direction, and none where exactness is the end).
        method: "auto" (exact where that costs no more, else stratified, else a sketch), "exact" (by tiles),
            "hutchinson", "hutch++" (paper, Algorithm 1), "reverse" (vjps
            alone) or "forward" (jvps alone) (Proposition 1 in its form of least
            variance; tolerances below 1e-2 only with ``num_passes``).
            "sketch" is the (R, M) sketch of `Sketch`, what "auto" takes for K = J Jᵀ that is not stratified
            (else "hutch++", and one direction where there is no other);
            "xtrace" lets each probe be sketch and residual (Epperly, Tropp & Webber 2024), four passes a
            column;
            "ntk-hutch++" sketches by jvps alone, at half the price.
            "stratified" draws m output combinations for each sample by itself, so that no noise comes from
            pairs of samples: m per-sample passes, at least two, exact at one column an output.
            It is for kernels over all outputs of their samples, and what "auto" estimates with where
            layer structure makes such a pass as cheap as a vjp.
        generator: CPU generator of the probes; None draws a seed from the operating system. The result
            records the seed.
        progress: Show a bar, of passes or, for exact work, of tiles, with the time left.
        differentiable: Return a value that can be differentiated (twice, too) with respect to the parameters
            of operators made with ``ntkops.ntk(..., differentiable=True)``: exact, or with ``num_passes`` by
            "hutchinson" or "hutch++" for fixed probes. Memory of the first derivative: one tile or chunk.
        checkpoint: A file that exact work is kept in, tile by tile: a run that is interrupted goes on from
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
    if differentiable:
        require_no_checkpoint(checkpoint)
        return differentiable_estimate(
            FROBENIUS_NORM,
            (operator,),
            rtol=rtol,
            num_passes=num_passes,
            method=method,
            generator=generator,
            progress=progress,
        )
    return estimate(
        FROBENIUS_NORM,
        lambda: spectral_operand(operator, method),
        NORM_METHODS,
        rtol=rtol,
        num_passes=num_passes,
        method=method,
        generator=generator,
        progress=progress,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
    )
