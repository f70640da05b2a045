"""Looking at results: a product that is not finite is an error that names its cause."""

from __future__ import annotations

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..model import Linearization

__all__ = ["require_finite_product"]


def _is_transformed(tensor: Tensor) -> bool:
    """Whether a tensor is seen from inside a torch.func transform, where its values cannot be read."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def require_finite_product(result: Tensor, what: str, linearization: Linearization, operand: Tensor) -> None:
    """Raise if a product holds NaN or infinity, and say where it comes from.

    Args:
        result: The product.
        what: Its formula, for the message.
        linearization: Where to look for non-finite parameters.
        operand: The block that was multiplied.

    Raises:
        NonFiniteError: Naming the operand's row, the parameter, or the derivative.
    """
    if _is_transformed(result) or bool(torch.isfinite(result.sum())) or bool(torch.isfinite(result).all()):
        return
    if not bool(torch.isfinite(operand).all()):
        first = tuple(int(i) for i in (~torch.isfinite(operand)).nonzero()[0])
        raise NonFiniteError(
            f"{what}: the right-hand side is not finite, first at column {first[0]}, entry {first[1:]}; "
            "mend the vector before the product"
        )
    hint = ""
    if result.dim() == 2 and result.shape[1] == linearization.num_parameters:
        position = int((~torch.isfinite(result)).nonzero()[0, 1])
        for name, size in zip(linearization.names, linearization.sizes, strict=True):
            if position < size:
                hint = f", first at parameter {name!r}"
                break
            position -= size
    elif result.dim() == 3:
        row = (~torch.isfinite(result)).nonzero()[0]
        hint = (
            f", first at sample {int(row[1])}, output {int(row[2])}"
            if what != "Jᵀv of single samples"
            else (f", first at sample {int(row[0])}")
        )
    raise NonFiniteError(
        f"{what} is not finite although parameters, inputs and output are{hint}: a derivative is infinite or "
        "undefined there (square root or norm at 0, division by 0); move the input off that point or use "
        "float64 if it is an overflow"
    )
