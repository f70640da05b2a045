"""What an operator does in an expression: it meets numbers, tensors, operators and SciPy, or says why not.

linear_operator takes whatever it is given and fails, or goes on with a wrong dtype, somewhere inside. Every
operator of ours looks at the other side first.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self, overload

import numpy as np
import torch
from linear_operator.operators import LinearOperator, ZeroLinearOperator
from torch import Tensor

from ..errors import (
    BackwardLimitError,
    DenseMemoryError,
    DeviceError,
    DtypeError,
    InputError,
    NonFiniteError,
    ShapeError,
    UnsupportedOperationError,
)
from ..results.html import facts_html
from .positions import tensor_positions

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator as ScipyOperator


__all__ = [
    "Expression",
    "to_scipy",
]


_NUMPY_DTYPES = {torch.float16: np.float16, torch.float32: np.float32, torch.float64: np.float64}


def to_scipy(operator: LinearOperator) -> ScipyOperator:
    """Return the SciPy view of a two-dimensional operator; see `EngineOperator.to_scipy`."""
    from scipy.sparse.linalg import LinearOperator as ScipyOperator

    if operator.dim() != 2:
        raise ShapeError(
            f"SciPy operators are matrices, this one has shape {tuple(operator.shape)}: index its batch"
        )
    if operator.dtype not in _NUMPY_DTYPES:
        raise DtypeError(f"NumPy has no dtype for {operator.dtype}; use .to(torch.float32) first")
    dtype = _NUMPY_DTYPES[operator.dtype]

    def multiply(side: LinearOperator, array: Any) -> Any:
        if np.iscomplexobj(array):
            return multiply(side, array.real) + 1j * multiply(side, array.imag)
        if not np.issubdtype(array.dtype, np.number) and array.dtype != bool:
            raise DtypeError(f"the operator multiplies numbers, not an array of {array.dtype}")
        block = torch.as_tensor(np.ascontiguousarray(array), dtype=operator.dtype, device=operator.device)
        with torch.no_grad():
            return (side @ block).cpu().numpy()

    transposed = operator.mT  # real: Kᴴ = Kᵀ
    return ScipyOperator(
        shape=tuple(operator.shape),
        dtype=dtype,
        matvec=lambda v: multiply(operator, v.reshape(-1)),
        rmatvec=lambda v: multiply(transposed, v.reshape(-1)),
        matmat=lambda v: multiply(operator, v),
        rmatmat=lambda v: multiply(transposed, v),
    )


_INVERSE = "no inverse is formed; use K.add_jitter(ridge).solve(b), or torch.linalg.inv(K.to_dense())"
_WAYS_OUT = {
    "inverse": _INVERSE,
    "inv": _INVERSE,
    "pinv": _INVERSE,
    "pinverse": _INVERSE,
    "det": "use K.add_jitter(ridge).logdet()",
    "slogdet": "use K.add_jitter(ridge).logdet()",
    "matrix_rank": "use ntkops.truncation_rank(K) or ntkops.effective_rank(K)",
    "cholesky": "use K.cholesky()",
    "vstack": "use torch.cat((K1, K2), dim=-2)",
    "hstack": "use torch.cat((K1, K2), dim=-1)",
}
_JOINS = (torch.cat, torch.concat, torch.concatenate)
_NORMS = (torch.norm, torch.linalg.norm, torch.linalg.matrix_norm)


class Expression(LinearOperator):
    """Arithmetic, indexing, casts and torch's functions, with every operand checked before any work."""

    join: ClassVar[Any]  # what joins operators, `joined.join`: it is made of expressions itself and sets it

    def __repr__(self) -> str:
        """Show the shape, what the operator is made of, and where it lives."""
        size = "x".join(map(str, self.shape))
        parts = [_shown(part) for part in self._args if isinstance(part, (LinearOperator, Tensor))]
        return f"{type(self).__name__}({', '.join([size, *parts])}, {self.dtype}, {self.device})"

    def _repr_html_(self) -> str:
        """Show the same in a notebook, a row for each part."""
        parts = [part for part in self._args if isinstance(part, (LinearOperator, Tensor))]
        info = getattr(self, "num_parameters", None)
        facts: dict[str, object] = {
            "shape": " x ".join(map(str, self.shape)),
            "parameters": info,
            "made of": ", ".join(map(_shown, parts)) if parts and info is None else None,
            "dtype": self.dtype,
            "device": self.device,
        }
        return facts_html(type(self).__name__, facts)

    if TYPE_CHECKING:  # what linear_operator, which has no annotations, gives
        shape: torch.Size

        @property
        def dtype(self) -> torch.dtype: ...  # noqa: D102
        @property
        def device(self) -> torch.device: ...  # noqa: D102
        @overload
        def __matmul__(self, other: Tensor) -> Tensor: ...
        @overload
        def __matmul__(self, other: LinearOperator) -> LinearOperator: ...
        def __matmul__(self, other: Any) -> Any: ...  # noqa: D105

        def to_dense(self) -> Tensor: ...  # noqa: D102

        def diagonal(self, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Tensor: ...  # noqa: D102

    # NumPy leaves numpy_number * K to K, instead of turning K into an array first.
    __array_ufunc__ = None

    # sums and multiples

    def __add__(self, other: Any) -> LinearOperator:
        """Add an operator or a dense tensor of the same shape and dtype lazily; 0 is allowed, for sum()."""
        added = self._summand(other)
        return self if added is None else super().__add__(added)

    def __sub__(self, other: Any) -> LinearOperator:
        """Subtract an operator or a dense tensor lazily; a number is refused as in addition."""
        taken = self._summand(other)
        return self if taken is None else self + taken.mul(-1)

    def __rsub__(self, other: Any) -> LinearOperator:
        """Subtract from an operator or a dense tensor, likewise."""
        whole = self._summand(other)
        return self.mul(-1) if whole is None else self.mul(-1) + whole

    def __neg__(self) -> LinearOperator:
        """Return -K, lazily."""
        return self.mul(-1)

    def __pos__(self) -> Self:
        """Return K itself."""
        return self

    def _summand(self, other: Any) -> Tensor | LinearOperator | None:
        """Return what can be added, None for zero."""
        number = isinstance(other, numbers.Number) or isinstance(other, Tensor) and other.dim() == 0
        if isinstance(other, ZeroLinearOperator) or (number and other == 0):
            return None
        if number:
            raise UnsupportedOperationError(
                "K + number would add it to every entry, which is rarely meant: use K.add_jitter(number) for "
                "K + number * I"
            )
        matrix = self._matrix(other, "add")
        if tuple(matrix.shape[-2:]) != tuple(self.shape[-2:]):
            raise ShapeError(f"cannot add shapes {tuple(self.shape)} and {tuple(matrix.shape)}")
        return matrix

    def mul(self, other: Any) -> LinearOperator:
        """Multiply by a number lazily, or entry by entry by a matrix, densely.

        Args:
            other: A finite number; a tensor of one entry, or one a batch entry, ``(*batch, 1, 1)``; or an
                operator or dense tensor of the same shape and dtype.

        Returns:
            The lazy multiple, or the dense product of entries.

        Raises:
            DtypeError: If it is nothing of these, complex, or of another dtype.
            NonFiniteError: If a number is not finite.
            ShapeError: If a matrix does not fit.
            DeviceError: If a matrix lives on another device.
            DenseMemoryError: If a product of entries does not fit into ``max_dense_bytes``.
        """
        if isinstance(other, numbers.Real):
            value = float(other)
            if not -float("inf") < value < float("inf"):
                raise NonFiniteError(f"{value} times an operator is not finite: pass a finite number")
            return super().mul(value)
        if isinstance(other, Tensor) and other.numel() == 1 and not other.is_complex():
            return super().mul(other.to(dtype=self.dtype, device=self.device))
        matrix = self._matrix(other, "multiply")
        try:
            torch.broadcast_shapes(self.shape, matrix.shape)
        except RuntimeError:
            fits = False
        else:
            fits = len(matrix.shape) > 1
        if not fits:
            raise ShapeError(
                f"an operator of shape {tuple(self.shape)} is multiplied by a number, or entry by entry by a "
                f"matrix of its shape, not by {tuple(matrix.shape)}; K @ B is the product of matrices, "
                "DiagLinearOperator(d) @ K scales rows"
            )
        return super().mul(matrix)

    def div(self, other: Any) -> LinearOperator:
        """Divide by a number lazily, or entry by entry by a dense tensor.

        Args:
            other: A number that is not 0, or a tensor as for a product.

        Returns:
            The lazy quotient, or the dense one of entries.

        Raises:
            InputError: If the number is 0.
            UnsupportedOperationError: For an operator.
        """
        if isinstance(other, LinearOperator):
            raise UnsupportedOperationError(
                "A / B of two operators would divide entry by entry, which is rarely meant: use "
                "B.add_jitter(ridge).solve(V) for B⁻¹ V, or A.to_dense() / B.to_dense()"
            )
        if isinstance(other, numbers.Real):
            if other == 0:
                raise InputError("an operator is divided by 0")
            return self.mul(1 / float(other))
        if not isinstance(other, Tensor):
            self._matrix(other, "divide by")
        if other.numel() == 1:  # cast first: a float32 reciprocal would be rounded
            other = other.to(dtype=self.dtype, device=self.device)
        return self.mul(other.reciprocal())

    def __rtruediv__(self, other: Any) -> NoReturn:
        """Refuse: there are two readings, and neither is lazy."""
        raise UnsupportedOperationError(f"a quotient by a {type(self).__name__} has no lazy form: {_INVERSE}")

    def __pow__(self, other: Any) -> NoReturn:
        """Refuse: there are two readings."""
        raise UnsupportedOperationError(
            "K ** p has two readings: K @ K is the product of matrices; K.to_dense() ** p the entries' power"
        )

    def _matrix(self, other: Any, verb: str) -> Tensor | LinearOperator:
        """Return a tensor or operator that has the operator's dtype and device."""
        if not isinstance(other, Tensor | LinearOperator):
            raise DtypeError(
                f"an operator and a {type(other).__name__}: you can {verb} numbers, tensors and operators; "
                "pass torch.as_tensor(array) for a NumPy array"
            )
        if other.dtype != self.dtype:
            raise DtypeError(
                f"the operator has dtype {self.dtype}, what is to {verb} {other.dtype}; cast one of them"
            )
        if other.device is not None and other.device != self.device:
            raise DeviceError(f"the operator lives on {self.device}, what is to {verb} on {other.device}")
        return other

    # products

    def matmul(self, other: Any) -> Any:
        """Multiply with a vector, a block of columns, or another operator (lazily).

        Args:
            other: ``(n,)``, ``(*batch, n, k)``, or a LinearOperator.

        Returns:
            ``(m,)`` or ``(*batch, m, k)``; a lazy product for an operator.

        Raises:
            ShapeError: If the number of rows does not fit.
            DtypeError: If it is neither a tensor nor an operator, or its dtype differs from the operator's.
            DeviceError: If the device differs from the operator's.
        """
        if isinstance(other, Tensor):
            self._check_operand(other)
        elif not isinstance(other, LinearOperator):
            raise DtypeError(
                f"an operator multiplies tensors and operators, not a {type(other).__name__}; pass "
                "torch.as_tensor(v), or use .to_scipy() for NumPy arrays"
            )
        elif self._matrix(other, "multiply").shape[-2] != self.shape[-1]:
            raise ShapeError(
                f"cannot multiply shapes {tuple(self.shape)} and {tuple(other.shape)}: the second needs "
                f"{self.shape[-1]} rows"
            )
        return super().matmul(other)

    def _check_operand(self, other: Tensor) -> None:
        length = self.shape[-1]
        rows = other.shape[0] if other.dim() == 1 else other.shape[-2] if other.dim() > 1 else None
        if rows != length:
            raise ShapeError(
                f"expected {length} rows{self._described_rows()}, got {tuple(other.shape)}"
                f"{self._operand_hint(other)}"
            )
        if other.dtype != self.dtype:
            raise DtypeError(
                f"the operator has dtype {self.dtype}, the vector {other.dtype}; cast one of them"
            )
        if other.device != self.device:
            raise DeviceError(f"the operator lives on {self.device}, the vector on {other.device}")

    def _described_rows(self) -> str:
        """Say what the rows of a vector stand for."""
        return ""

    def _operand_hint(self, other: Tensor) -> str:
        """Say what a vector of the wrong shape may have been meant for."""
        return ""

    # indexing

    def __getitem__(self, index: Any) -> Any:
        """Index like a tensor: slices and one index tensor stay lazy, pairs of index tensors are entries.

        Args:
            index: As for a tensor of the same shape; lists, ranges, NumPy arrays and masks too.

        Returns:
            A lazy operator, or a tensor where a matrix dimension is gone.

        Raises:
            OutOfRangeError: If an index lies outside the operator, is no integer, or a mask does not have
                the length of its axis.
        """
        return super().__getitem__(tensor_positions(index, self.shape))

    # exact numbers

    def trace(self) -> Tensor:
        """Return the sum of the diagonal, exact; `ntkops.trace` estimates it where that is expensive.

        Returns:
            ``(*batch)``. Cost: that of ``K.diagonal()``.

        Raises:
            ShapeError: If the operator is not square.
            BackwardLimitError: If the diagonal takes too many backward passes.
        """
        if self.shape[-1] != self.shape[-2]:
            raise ShapeError(f"a {self.shape[-2]} x {self.shape[-1]} operator has no trace")
        try:
            entries = self.diagonal()
        except BackwardLimitError as error:
            raise BackwardLimitError(f"K.trace() is exact: {error}; ntkops.trace(K) estimates it") from error
        return entries.double().sum(-1).to(self.dtype)

    def norm(self, ord: Any = "fro") -> Tensor:
        """Return a norm of the dense matrix, exact; `ntkops.frobenius_norm` estimates it otherwise.

        Args:
            ord: "fro", "nuc", 2, -2, 1, -1, inf or -inf, as for `torch.linalg.matrix_norm`.

        Returns:
            ``(*batch)``.

        Raises:
            InputError: If the norm is not known.
            DenseMemoryError: If the dense matrix exceeds ``max_dense_bytes``.
        """
        if isinstance(ord, bool) or ord not in ("fro", "nuc", 2, -2, 1, -1, float("inf"), -float("inf")):
            raise InputError(f"ord={ord!r}: choose 'fro', 'nuc', 2, -2, 1, -1, inf or -inf")
        try:
            dense = self.to_dense()
        except DenseMemoryError as error:
            raise DenseMemoryError(
                f"K.norm() is exact and needs every entry: {error}; ntkops.frobenius_norm(K) estimates it, "
                "ntkops.eigsh(K) finds the largest eigenvalues"
            ) from error
        return torch.linalg.matrix_norm(dense.double(), ord).to(self.dtype)

    # torch's functions

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer torch's functions as far as they have a form for operators.

        Args:
            func: The function of torch.
            types: Types of the arguments.
            args: Positional arguments.
            kwargs: Keyword arguments.

        Returns:
            What the method of that name returns.

        Raises:
            UnsupportedOperationError: For others, with the way to what they are usually wanted for.
        """
        named = {key: value for key, value in (kwargs or {}).items() if value not in (None, False)}
        if func in _JOINS:
            return _joined(*args, **named)
        if func in _NORMS and named.keys() <= {"ord", "p"} and len(args) + len(named) <= 2:
            return args[0].norm(*args[1:], *named.values())
        if func is torch.trace:
            return args[0].trace()
        try:
            return super().__torch_function__(func, types, args, kwargs)
        except NotImplementedError as error:
            name = getattr(func, "__name__", str(func)).removeprefix("linalg_")
            if not str(error).startswith("torch.") or name == "solve_triangular":  # whose type is specified
                raise
            way_out = _WAYS_OUT.get(name, "apply it to K.to_dense(), where that fits")
            raise UnsupportedOperationError(
                f"torch's {name} has no form for a {cls.__name__}: {way_out}"
            ) from error

    def _joined_with(self, parts: Sequence[LinearOperator | Tensor], dim: int) -> LinearOperator:
        """Return parts, of which this is one, side by side, lazily."""
        joined: LinearOperator = self.join(parts, dim)
        return joined

    # casting

    def to(self, *args: Any, **kwargs: Any) -> Self:
        """Return the operator on another device or in another floating dtype.

        Args:
            *args: As in `torch.Tensor.to`, whose errors are raised.
            **kwargs: As in `torch.Tensor.to`.

        Returns:
            A new operator, or this one if nothing changes.
        """
        # An empty tensor reads the arguments as every tensor does.
        goal = torch.empty(0, dtype=self.dtype, device=self.device).to(*args, **kwargs)
        if (goal.dtype, goal.device) == (self.dtype, self.device):
            return self
        return self._moved(goal.dtype, goal.device)

    def _moved(self, dtype: torch.dtype, device: torch.device) -> Self:
        return super().to(dtype=dtype, device=device)

    def type(self, dtype: torch.dtype) -> Self:
        """Return the operator in another floating dtype."""
        return self.to(dtype=dtype)

    def cpu(self) -> Self:
        """Return the operator on the CPU."""
        return self.to(device="cpu")

    def cuda(self, device_id: Any = None) -> Self:
        """Return the operator on a CUDA device."""
        return self.to(device="cuda" if device_id is None else f"cuda:{device_id}")

    # numpy and scipy

    def to_scipy(self) -> Any:
        """Return a `scipy.sparse.linalg.LinearOperator` with the same products.

        Returns:
            A SciPy operator in the matching NumPy dtype; vectors are copied to the operator's
            device and back, the real and the imaginary part of complex ones one after the other.

        Raises:
            ShapeError: If the operator has a batch.
            DtypeError: If NumPy has no such dtype (bfloat16).
        """
        return to_scipy(self)

    def __array__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse a silent conversion: NumPy would otherwise make a 0-d object array."""
        raise UnsupportedOperationError(
            "an operator does not turn into an array by itself: use .to_scipy() for SciPy's solvers, or "
            ".materialize().numpy() for the dense matrix"
        )


def _joined(tensors: Any, dim: Any = 0) -> LinearOperator:
    """Return what `torch.cat` of operators and tensors is, of which one at least is ours."""
    parts = tuple(tensors)
    ours = next(part for part in parts if isinstance(part, Expression))
    if isinstance(dim, bool) or not isinstance(dim, int) or not -ours.dim() <= dim < ours.dim():
        raise InputError(f"dim={dim!r}: an operator of shape {tuple(ours.shape)} has no such axis")
    return ours._joined_with(parts, dim % ours.dim() - ours.dim())


def _shown(part: LinearOperator | Tensor) -> str:
    """Show one part of an operator: its kind, or its value where that is one number."""
    if isinstance(part, Tensor):
        return f"{float(part):.6g}" if part.numel() == 1 else f"tensor {tuple(part.shape)}"
    return type(part).__name__
