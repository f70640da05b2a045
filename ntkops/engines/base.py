"""Engine: products, blocks and rows of J, counted and checked, whatever they are made from."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..model import Inputs, Linearization
from ..results import LayerInfo
from .choose import find_differentiation
from .cost import KernelShape
from .differentiation import Differentiation, Parameters
from .factors import is_transformed
from .memory import EngineSizes, shared_store
from .readout import readout_diagonal, readout_kernel
from .tiles import Source, gram, own_kernels, part_kernels

__all__ = ["Engine", "Linearized", "Work", "is_recorded", "require_finite_product"]

Auto = Literal["auto"]
Work = Callable[[Source, Parameters], Tensor]

_identities = itertools.count()


class Linearized(Protocol):
    """Products with J of N₁ samples and Jᵀ of N₂, which share what can be shared."""

    def pull(self, vectors: Tensor) -> Tensor:
        """Return J(right)ᵀ v, ``(k, P)``, for ``(k, N₂, O)``."""
        ...

    def push(self, tangents: Tensor) -> Tensor:
        """Return J(left) p, ``(k, N₁, O)``, for ``(k, P)``."""
        ...

    def through(self, vectors: Tensor) -> Tensor:
        """Return J(left) J(right)ᵀ v, ``(k, N₁, O)``, for ``(k, N₂, O)``."""
        ...


class Engine(EngineSizes):
    """What computes products and blocks of J.

    The engine holds no parameters and no data: both come with each call, so that one engine serves
    a kernel, its slices, its cross kernels and its Jacobians, at detached and at live parameters. A kind of
    engine says where factors come from, and how products are made.

    Args:
        linearization: The pure function and its snapshot.
        first: A few samples, on which it is found out how the model is differentiated; None where that is
            known.
        batch_size: Samples per pass, or "auto" for as many as the memory holds.
        chunk_size: Columns per pass, or "auto".
        like: An engine for other parts of the same work, which shares its sizes and counts its passes.

    Raises:
        InputError: If a size is neither "auto" nor a positive integer.
    """

    name = "engine"

    def __init__(
        self,
        linearization: Linearization,
        first: Inputs | None,
        *,
        batch_size: int | Auto = "auto",
        chunk_size: int | Auto = "auto",
        like: Engine | None = None,
    ) -> None:
        super().__init__(linearization, batch_size, chunk_size, like)
        self._first = first
        self._whole: Engine | None = None  # the engine for all parameters of which these are a part
        self.identity = next(_identities)

    def __getstate__(self) -> dict[str, object]:
        """Leave the identity behind: it keys the caches of this process."""
        state = dict(self.__dict__)
        del state["identity"]
        return state

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take a fresh identity, so that no cache of another engine is read."""
        self.__dict__.update(state)
        self.identity = next(_identities)

    def free(self) -> int:
        """Drop everything cached for this engine and return the bytes set free."""
        return shared_store.release(self.identity)

    @property
    def differentiation(self) -> Differentiation:
        """How the model is differentiated: found once for a linearisation, when something is."""
        return self.differentiated()

    def differentiated(self, *, columns: bool = False, per_sample: bool = False) -> Differentiation:
        """Return how the model is differentiated, what it takes for columns or per-sample Jacobians found."""
        if self._whole is not None:  # one trial for all of its parts
            return self._whole.differentiated(columns=columns, per_sample=per_sample)
        verdict = self.linearization.verdict
        # The model floor keeps it for engines and knows no engine: what it holds has no type there.
        known = verdict.differentiation if isinstance(verdict.differentiation, Differentiation) else None
        is_known = known is not None and not (
            (columns and known.columns is None) or (per_sample and known.per_sample is None)
        )
        if known is None or not is_known:
            assert self._first is not None
            wanted = {"columns": columns, "per_sample": per_sample}
            verdict.differentiation = known = find_differentiation(
                self.linearization, self._first, known, **wanted
            )
        return known

    @property
    def num_parameters(self) -> int:
        """Number P of selected parameters' entries."""
        return self.linearization.num_parameters

    # what a kind of engine supplies

    def to(self, dtype: torch.dtype | None = None, device: torch.device | None = None) -> Engine:
        """Return the same engine for another dtype or device."""
        raise NotImplementedError

    def linearized(
        self, params: Parameters, left: Inputs, right: Inputs, operand: Tensor, columns: float
    ) -> Linearized:
        """Return products with J(left) and J(right)ᵀ.

        Args:
            params: The selected parameters, snapshot or live.
            left: N₁ samples.
            right: N₂ samples; the same object as ``left`` shares the forward pass.
            operand: What is about to be multiplied.
            columns: How many columns of K v that is worth, to whoever weighs what to make first.
        """
        raise NotImplementedError

    def kernel_passes(self, inputs: Inputs, wanted: KernelShape, distinct: int) -> float:
        """Return what a dense kernel costs, in passes over the samples of its rows.

        Args:
            inputs: Samples of the rows.
            wanted: The kernel.
            distinct: Number of distinct outputs in it.
        """
        raise NotImplementedError

    def kernel_repeats(self, inputs: Inputs, wanted: KernelShape, distinct: int) -> float:
        """Return how many times each backward pass of a dense kernel is made, where pairs of tiles meet.

        Args:
            inputs: Samples of the rows.
            wanted: The kernel.
            distinct: Number of distinct outputs in it.
        """
        raise NotImplementedError

    def allows(self, distinct: int) -> bool:
        """Return whether the user allows as many backward passes as so many outputs take."""
        return True

    def diagonal_passes(self, inputs: Inputs, distinct: int) -> float:
        """Return what the diagonal costs, in passes over the samples.

        Args:
            inputs: N samples.
            distinct: Number of distinct outputs in it.
        """
        raise NotImplementedError

    # what layer structure adds, where an engine has any

    @property
    def covered(self) -> tuple[str, ...]:
        """Names of the parameters that the layer rules cover."""
        return ()

    @property
    def over_time(self) -> bool:
        """Whether the output is all hidden states of a recurrent layer, whose kernels have their own way."""
        return False

    def layers(self, inputs: Inputs, wanted: KernelShape, distinct: int) -> tuple[LayerInfo, ...]:
        """Return how each parameter is computed in a kernel, in the parameters' order."""
        return ()

    def cache_passes(self, inputs: Inputs) -> float:
        """Return the most backward passes that factors for products with some samples may take, once."""
        return 0.0

    def large_factor_passes(self, inputs: Inputs) -> float:
        """Return in how many backward passes large factors for products would be made; 0 where none are."""
        return 0.0

    def settle(self, params: Parameters, inputs: Inputs) -> None:
        """Make the factors for products with some samples now, where they fit: a product later makes none."""

    def _summed(
        self, params: Parameters, watched: Sequence[Tensor | Inputs], work: Work, by_parameter: bool = False
    ) -> Tensor:
        """Return work on all sources of factors: summed, or side by side where parameters are columns."""
        raise NotImplementedError

    def _require_few(self, what: str, *outputs: Tensor) -> None:
        """Refuse more backward passes than the user allows, before any work."""

    # products

    def vjp(self, params: Parameters, inputs: Inputs, vectors: Tensor) -> Tensor:
        """Return Jᵀv, flat, for each row of ``vectors``.

        Args:
            params: The selected parameters, snapshot or live.
            inputs: N samples.
            vectors: ``(k, N, O)``.

        Returns:
            ``(k, P)``. Cost: k vjp passes, or products with factors that are kept.
        """
        # Worth half as many columns of K v, which is a pull and a push.
        return self.linearized(params, inputs, inputs, vectors, len(vectors) / 2).pull(vectors)

    def jvp(self, params: Parameters, inputs: Inputs, tangents: Tensor) -> Tensor:
        """Return J p for each row of ``tangents``.

        Args:
            params: The selected parameters, snapshot or live.
            inputs: N samples.
            tangents: ``(k, P)``.

        Returns:
            ``(k, N, O)``. Cost: k jvp passes, or products with factors that are kept.
        """
        return self.linearized(params, inputs, inputs, tangents, len(tangents) / 2).push(tangents)

    def product(self, params: Parameters, left: Inputs, right: Inputs, vectors: Tensor) -> Tensor:
        """Return J(left) J(right)ᵀ v for each row of ``vectors``, without flattening in between.

        Args:
            params: The selected parameters, snapshot or live.
            left: N₁ samples.
            right: N₂ samples; the same object as ``left`` shares what is made of them.
            vectors: ``(k, N₂, O)``.

        Returns:
            ``(k, N₁, O)``. Cost: k vjp and k jvp passes, or products with factors that are kept.
        """
        return self.linearized(params, left, right, vectors, len(vectors)).through(vectors)

    # blocks and rows

    def kernel(
        self,
        params: Parameters,
        left: Inputs,
        right: Inputs,
        left_outputs: Tensor,
        right_outputs: Tensor,
    ) -> Tensor:
        """Return dense kernels Σ_r J(left)_{o_r} J(right)_{o_r}ᵀ tile by tile.

        Args:
            params: The selected parameters, snapshot or live.
            left: N₁ samples.
            right: N₂ samples; the same object as ``left`` lets symmetry halve the work.
            left_outputs: ``(M, R, r₁)`` output numbers: M kernels, R terms, r₁ outputs a sample.
            right_outputs: ``(M, R, r₂)``.

        Returns:
            ``(M, N₁·r₁, N₂·r₂)``. Cost: one pass an output on each side, or one for each column of the
            linear layer that ends the model, whichever are fewer; more where the workspace holds only a
            part of the factors. Memory: the result and two tiles.

        Raises:
            BackwardLimitError: If the outputs take more backward passes than the user allows.
        """
        self._require_few("the kernel", left_outputs, right_outputs)

        def work(source: Source, chosen: Parameters) -> Tensor:
            return readout_kernel(source, chosen, left, right, left_outputs, right_outputs)

        result = self._summed(params, (left, right), work)
        require_finite_product(result, "the kernel", self.linearization, left_outputs)
        return result

    def diagonal(self, params: Parameters, inputs: Inputs, outputs: Tensor) -> Tensor:
        """Return kernel diagonals Σ_r |∇f_{i,o_r}|².

        Args:
            params: The selected parameters, snapshot or live.
            inputs: N samples.
            outputs: ``(M, R, r)`` output numbers.

        Returns:
            ``(M, N·r)``. Cost: one pass for each distinct output, or for each column of the linear layer
            that ends the model, whichever are fewer. Memory does not grow with N.

        Raises:
            BackwardLimitError: If the outputs take more backward passes than the user allows.
        """
        self._require_few("the diagonal", outputs)
        result = self._summed(
            params, (inputs,), lambda source, chosen: readout_diagonal(source, chosen, inputs, outputs)
        )
        require_finite_product(result, "the diagonal", self.linearization, outputs)
        return result

    def part_kernels(
        self,
        params: Parameters,
        left: Inputs,
        right: Inputs,
        outputs: tuple[Tensor, Tensor],
        owners: Mapping[str, int],
        count: int,
    ) -> Tensor:
        """Return dense kernels of parts of the parameters, ``(L, M, N₁·r₁, N₂·r₂)``, as `tiles.part_kernels`.

        Cost: that of one kernel, and the memory of L.

        Raises:
            BackwardLimitError: If the outputs take more backward passes than the user allows.
        """
        self._require_few("the kernels of parts", *outputs)

        def work(source: Source, chosen: Parameters) -> Tensor:
            return part_kernels(source, chosen, left, right, outputs, owners, count)

        result = self._summed(params, (left, right), work)
        require_finite_product(result, "the kernels of parts", self.linearization, outputs[0])
        return result

    def own_kernels(
        self, params: Parameters, inputs: Inputs, numbers: tuple[Tensor, Tensor], left: Tensor, right: Tensor
    ) -> Tensor:
        """Return ``(M, r₁, r₂)`` sums of kernels of single samples, in float64; see `tiles.own_kernels`.

        Cost: one pass for each distinct output. No pair of two samples is made.

        Raises:
            BackwardLimitError: If the outputs take more backward passes than the user allows.
        """
        self._require_few("the kernel of single samples", left, right)
        result = self._summed(
            params,
            (inputs,),
            lambda source, chosen: own_kernels(source, chosen, inputs, numbers, left, right),
        )
        require_finite_product(result, "the kernel of single samples", self.linearization, left)
        return result

    def sample_gram(self, params: Parameters, inputs: Inputs, cotangents: Tensor) -> Tensor:
        r"""Return the Gram matrix of per-sample gradients, :math:`W_{ir,js} = g_{ir}^\top g_{js}`.

        Args:
            params: The selected parameters, snapshot or live.
            inputs: N samples.
            cotangents: ``(N, r, O)``: r output combinations for each sample.

        Returns:
            ``(N, r, N, r)``. Cost: r passes, more where tiles do not fit at once.
        """
        result = self._summed(
            params, (inputs, cotangents), lambda source, chosen: gram(source, chosen, inputs, cotangents)
        )
        require_finite_product(result, "the Gram matrix", self.linearization, cotangents)
        return result

    def jacobian_tile(self, params: Parameters, inputs: Inputs, outputs: Tensor) -> Tensor:
        """Return the rows of J of every sample for some outputs.

        Args:
            params: The selected parameters, snapshot or live.
            inputs: B samples; the caller keeps B·r·P within `workspace_bytes`.
            outputs: ``(r,)`` output numbers.

        Returns:
            ``(B, r, P)``. Cost: r passes over these samples.
        """

        def work(source: Source, chosen: Parameters) -> Tensor:
            return source.written_down(source.of_outputs(chosen, inputs, outputs))

        result = self._summed(params, (inputs,), work, by_parameter=True)
        require_finite_product(result, "Jᵀv of single samples", self.linearization, outputs)
        return result


def is_recorded(params: Sequence[Tensor], others: Sequence[Tensor | Inputs], live: bool) -> bool:
    """Return whether autograd records, or a torch.func transform looks at, what goes into a product.

    ``live`` is whether inputs may carry a graph although autograd does not record now.
    """
    tensors = list(params)
    for other in others:
        if isinstance(other, Tensor):
            tensors.append(other)
        elif live or torch.is_grad_enabled():
            # One sample tells: all batches are cut from the same tensors.
            _, _, batch = next(iter(other.batches(1)))
            tensors.extend(batch.tensors)
    if any(is_transformed(tensor) for tensor in tensors):
        return True
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def require_finite_product(result: Tensor, what: str, linearization: Linearization, operand: Tensor) -> None:
    """Raise NonFiniteError if a product of ``operand`` holds NaN or infinity, and say where it comes from."""
    # A finite sum needs one pass and no mask; only where it is not, or has overflowed, are entries looked at.
    if is_transformed(result) or bool(torch.isfinite(result.sum())) or bool(torch.isfinite(result).all()):
        return
    if not bool(torch.isfinite(operand).all()):
        first = tuple(int(i) for i in (~torch.isfinite(operand)).nonzero()[0])
        raise NonFiniteError(
            f"{what}: the right-hand side is not finite, first at column {first[0]}, entry {first[1:]}; "
            "mend the vector before the product"
        )
    hint = ""
    if result.dim() == 2 and result.shape[1] == linearization.num_parameters:  # (k, P)
        position = int((~torch.isfinite(result)).nonzero()[0, 1])
        for name, size in zip(linearization.names, linearization.sizes, strict=True):
            if position < size:
                hint = f", first at parameter {name!r}"
                break
            position -= size
    elif result.dim() == 3:  # (k, N, O), or (B, r, P) of single samples
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
