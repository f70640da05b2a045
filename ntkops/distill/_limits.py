"""When a dense matrix may be made."""

from __future__ import annotations

from linear_operator.operators import LinearOperator

from ..engines import format_bytes, tensor_bytes
from ..errors import DenseMemoryError
from ..operators.capabilities import dense_bytes_allowed

__all__ = ["require_room"]


def require_room(operator: LinearOperator, why: str = "") -> None:
    """Raise unless the dense result fits into the ``max_dense_bytes`` of the operator's parts.

    Args:
        operator: The operator.
        why: What needs it, and what does not, for the message.

    Raises:
        DenseMemoryError: If it does not.
    """
    needed, allowed = tensor_bytes(operator.shape, operator.dtype), dense_bytes_allowed(operator)
    if needed > allowed:
        raise DenseMemoryError(
            f"{why or 'the dense matrix'}: the dense {' x '.join(map(str, operator.shape))} kernel takes "
            f"{format_bytes(needed)}, above max_dense_bytes={format_bytes(allowed)}; raise it, or use "
            "products"
        )
