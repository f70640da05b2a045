"""Does an operator have the properties that everything built on it relies on?"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from linear_operator.operators import LinearOperator
from torch import Tensor

from ..arguments import checked
from ..curvature import GGNOperator
from ..errors import InputError, NtkopsError
from ..operators import JacobianOperator, NTKOperator
from ..operators.capabilities import capabilities
from ..results import Check, CheckReport
from ..vectors import resolve_generator
from ._derivative import derivative_checks
from ._engines import engine_checks, lazily
from ._products import Products, duality_checks, product_checks

__all__ = ["check_operator"]


@checked
def check_operator(
    operator: LinearOperator | Tensor, *, generator: torch.Generator | None = None, columns: int = 3
) -> CheckReport:
    r"""Check the properties of an operator that estimators, solvers and you rely on.

    For any operator: the adjoint identity :math:`\langle u, K v\rangle = \langle K^\top u, v\rangle`,
    linearity, symmetry and definiteness (where rows and columns are the same), the diagonal, repeatability to
    the bit, finite values, no use of the global random state. For the operators of ntkops also: the same
    products with other batches and chunks and with the other engine, J and its transpose by automatic
    differentiation, samples that do not see each other, a derivative that finite differences in float64
    confirm, and a model that is left as it was; for `ntkops.ggn`, that its two sides belong together. Errors
    are relative; what passes is a thousand rounding units of the coarsest dtype that the model computes in.
    Where J is not the derivative, the parameters at fault are found by bisection and named.

    Args:
        operator: A `JacobianOperator`, an `NTKOperator`, or any LinearOperator or tensor ``(*batch, n, m)``.
        generator: CPU generator of the test vectors; None draws a seed from the operating system.
        columns: Test vectors at a time; at least 2.

    Returns:
        The table of checks: ``print(report)``, ``report.passed``, ``report.raise_if_failed()``. Cost: about
        twenty products, and for the derivative ten forward passes of at most four samples.

    Raises:
        InputError: If it is no operator, or ``columns`` is too small.

    Example:
        >>> import torch, ntkops
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
        ... )
        >>> report = ntkops.check_operator(ntkops.ntk(model, torch.randn(5, 3)))
        >>> report.passed, report["symmetry"].passed
        (True, True)
    """
    if not isinstance(operator, LinearOperator | Tensor) or operator.dim() < 2:
        raise InputError(f"expected a LinearOperator or a matrix, got {type(operator).__name__}")
    if capabilities(operator).space.is_spread:
        raise InputError(
            "the rows of the operator lie on several ranks, and products are compared entry by entry: check "
            "the kernel of this rank's samples alone, ntkops.ntk(model, shard)"
        )
    if columns < 2:
        raise InputError(f"columns={columns}: linearity needs two test vectors at least")
    started = time.perf_counter()
    generator, _ = resolve_generator(generator)
    # A dense block that is kept would be symmetric, repeatable and its own adjoint whatever J is.
    checked = lazily(operator) if isinstance(operator, JacobianOperator | NTKOperator) else operator
    products = Products(checked, columns, generator)
    with torch.no_grad():
        checks = tuple(_all_checks(checked, products))
    return CheckReport(_name(operator), checks, time.perf_counter() - started)


def _all_checks(operator: LinearOperator | Tensor, products: Products) -> Iterator[Check]:
    try:
        yield from product_checks(products)
    except NtkopsError as error:  # a product that is refused is a finding, too
        yield Check("products", False, None, 0.0, f"{type(error).__name__}: {error}")
        return
    if isinstance(operator, GGNOperator):
        yield from duality_checks(operator, products)
    if isinstance(operator, JacobianOperator | NTKOperator):
        yield from engine_checks(operator, products)
        yield from derivative_checks(operator, products)


def _name(operator: LinearOperator | Tensor) -> str:
    if isinstance(operator, Tensor):
        return f"Tensor{tuple(operator.shape)}"
    if isinstance(operator, JacobianOperator | NTKOperator | GGNOperator):
        return repr(operator)
    return f"{type(operator).__name__}{tuple(operator.shape)}"
