"""A wide linear readout: as many backward passes as it reads features."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..model import Inputs
from ..model.record import record
from .attribution import CoverageChanged
from .cost import ProductRoute
from .coverage import LinearReadout, moves_within, read_positions
from .differentiation import Parameters
from .hidden_states import states_diagonal, states_kernel
from .products import ProductFactors, Span, prepare_products
from .source import Known, LayerSource
from .summation import long_product
from .tiles import Source, diagonal, kernel, mirror, over_parts, rows_of_parts
from .units import plan_units

__all__ = [
    "prepare_readout",
    "readout_diagonal",
    "readout_kernel",
]


_ENTRIES = 2**24  # entries of a kernel of directions that is made in one piece


class Reduction:
    """An orthonormal basis for what the head can pass on to some outputs."""

    def __init__(self, readout: LinearReadout, params: Parameters, outputs: Tensor, num_outputs: int) -> None:
        self._classes_total, self._num_outputs = readout.classes, num_outputs
        numbers = torch.unique(outputs).cpu()
        # The grid of all of the classes at all of the positions, which holds them.
        self.distinct = len(numbers)
        self.positions, _ = torch.unique(numbers // readout.classes, return_inverse=True)
        self.classes, _ = torch.unique(numbers % readout.classes, return_inverse=True)
        rows = readout.matrix(params)[self.classes.to(params[readout.weight].device)]
        self._full = readout
        self._rows = rows
        self.size = len(self.positions) * min(rows.shape)  # the rank of W_classes at each position

    @property
    def pays(self) -> bool:
        """Whether there are fewer directions than outputs."""
        return self.size < self.distinct

    @property
    def name(self) -> tuple[bytes, bytes]:
        """What the directions depend on, beside the head."""
        return self.positions.numpy().tobytes(), self.classes.numpy().tobytes()

    @property
    def is_product(self) -> bool:
        """Whether the outputs are all of some classes at all of some positions."""
        return self.distinct == len(self.positions) * len(self.classes)

    def prepare(self) -> Reduction:
        """Factor the head: Q of ``(classes, k)``, rounded once from float64."""
        # Before the head the kernel is W K_h Wᵀ; with W = Q R that is Q K' Qᵀ, K' = R K_h Rᵀ of the columns
        # of Q.
        basis, _ = torch.linalg.qr(self._rows.double())
        self.basis = basis.to(self._rows.dtype)
        return self

    @property
    def considered(self) -> Tensor:
        """Which outputs are all of the classes at all of the positions, ``(O,)``, true or false."""
        columns = self.positions[:, None] * self._classes_total + self.classes
        found = torch.zeros(self._num_outputs, dtype=torch.bool)
        found[columns.flatten()] = True
        return found.to(self._rows.device)

    @property
    def directions(self) -> Tensor:
        """Cotangents ``(positions · k, O)``."""
        count, width = len(self.positions), self.basis.shape[1]
        found = self.basis.new_zeros((count, width, self._num_outputs))
        for number, position in enumerate(self.positions.tolist()):
            columns = position * self._classes_total + self.classes
            found[number][:, columns.to(found.device)] = self.basis.mT
        return found.flatten(0, 1)

    def split(self, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return where the position, and the class, of each output is in `positions` and `classes`."""
        return (
            torch.searchsorted(self.positions, outputs // self._classes_total),
            torch.searchsorted(self.classes, outputs % self._classes_total),
        )

    def coordinates(self, outputs: Tensor) -> Tensor:
        """Return the outputs in terms of the directions, ``(*outputs, positions · k)``."""
        place, row = (index.flatten().to(self.basis.device) for index in self.split(outputs))
        # ∂f_(s, v) = Σ_j Q_vj ∂(Qᵀ f_s)_j, since f_s moves within the range of Q.
        found = self.basis.new_zeros((len(place), len(self.positions), self.basis.shape[1]))
        found[torch.arange(len(place), device=found.device), place] = self.basis[row]
        return found.view(*outputs.shape, -1)


class ReadoutSource(LayerSource):
    """Factors of what is before the head, for the directions of a reduction instead of outputs."""

    def __init__(self, source: LayerSource, reduction: Reduction) -> None:
        assert source.coverage.body is not None and source.coverage.readout is not None
        super().__init__(source.sizes, source.coverage.body, source.options)
        self.workspace = source.workspace
        self._readout, self._reduction = source.coverage.readout, reduction
        self._basis = reduction.directions

    def _directions(self, params: Parameters, inputs: Inputs, outputs: Tensor) -> tuple[Tensor, Known]:
        """Return some of the directions, the head's place verified."""
        if not ends_with(self, self._readout, self._reduction, params, inputs):
            raise CoverageChanged(
                {}, "a batch does not end with the linear layer that the first samples ended with"
            )
        chosen = self._basis[outputs.to(self._basis.device)]
        known = Known(self._reduction.name, outputs, len(self._basis))
        return chosen.unsqueeze(1).expand(-1, inputs.num_samples, -1), known


def ends_with(
    source: LayerSource, readout: LinearReadout, reduction: Reduction, params: Parameters, inputs: Inputs
) -> bool:
    """Return whether the first sample's output moves with parameters before the head within its range only.

    A random combination of the outputs, and its projection on the directions, must have the same gradients
    before the head; at the head the combination itself must arrive. Cost: one forward and three backward
    passes over one sample.
    """
    _, _, batch = next(iter(inputs.select(torch.zeros(1, dtype=torch.long)).batches(1)))
    with source.linearization.safe_context():
        recording = record(source.linearization.function, params, batch)
        layout = source.coverage.layouts.get(recording.calls[-1].signature) if recording.calls else None
        if layout is None or readout.weight not in {p.index for p in recording.calls[-1].places.values()}:
            return False
        generator = torch.Generator().manual_seed(18)
        whole = torch.randn((1, inputs.num_outputs), generator=generator, dtype=torch.float64)
        sent = whole.to(recording.output)
        if read_positions(recording, layout, sent, readout.classes) != readout.positions:
            return False
        directions = reduction.directions
        sent = sent.to(directions.dtype) * reduction.considered
        projected = sent @ directions.mT @ directions
        units = plan_units(recording.calls, source.coverage.covered - readout.parameters)
        sent, projected = (c.to(recording.output).unsqueeze(0) for c in (sent, projected))
        return moves_within(recording, units, sent, projected, source.dtype)


def _reduced(source: LayerSource, params: Parameters, outputs: Tensor, *inputs: Inputs) -> Reduction | None:
    """Return the directions that stand for some outputs; None without a head, or where they are not fewer."""
    readout = source.coverage.readout
    if readout is None or not all(map(readout.ends, inputs)):
        return None
    reduction = Reduction(readout, params, outputs, inputs[0].num_outputs)
    return reduction.prepare() if reduction.pays else None


def head_activations(source: LayerSource, params: Parameters, inputs: Inputs) -> Tensor:
    """Return what the head reads at every output position, ``(N, S, d)``: one forward pass."""
    readout = source.coverage.readout
    assert readout is not None
    # The coverage of the head alone: of its factors the activations are read, and one direction is enough.
    head = LayerSource(
        source.sizes, replace(source.coverage, covered=readout.parameters, readout=None, body=None)
    )
    (layer,) = head.of_outputs(params, inputs, torch.zeros(1, dtype=torch.long)).outers
    assert isinstance(layer.activations, Tensor)
    return layer.activations[:, 0].mT[:, list(readout.positions)]


# kernels


def readout_kernel(
    source: Source,
    params: Parameters,
    left: Inputs,
    right: Inputs,
    left_outputs: Tensor,
    right_outputs: Tensor,
) -> Tensor:
    """Return ``(M, N₁·r₁, N₂·r₂)`` kernels by the way that takes fewest backward passes.

    The output numbers are ``(M, R, r₁)`` and ``(M, R, r₂)``.
    """
    kernels, _, width = left_outputs.shape
    pairs = torch.cat([left_outputs.flatten(1), right_outputs.flatten(1)], dim=1)
    if kernels > 1:
        unique, index = torch.unique(pairs, dim=0, return_inverse=True)
    if kernels > 1 and len(unique) < kernels:  # an expanded batch: each distinct kernel is made once
        one, other = unique.tensor_split([left_outputs[0].numel()], dim=1)
        one = one.unflatten(1, (-1, width))
        other = other.unflatten(1, (-1, right_outputs.shape[2]))
        distinct = readout_kernel(source, params, left, right, one, other)
        return distinct[index.to(distinct.device)]
    if not isinstance(source, LayerSource):
        return kernel(source, params, left, right, left_outputs, right_outputs)
    over_time = states_kernel(source, params, left, right, left_outputs, right_outputs)
    if over_time is not None:
        return over_time
    both = torch.cat([left_outputs.flatten(), right_outputs.flatten()])
    reduction = _reduced(source, params, both, left, right)
    if reduction is None:
        return kernel(source, params, left, right, left_outputs, right_outputs)
    body = ReadoutSource(source, reduction)
    same = torch.equal(left_outputs, right_outputs)
    if _is_trace(left_outputs, reduction) and same:  # the sum over an orthonormal basis is the same
        index = torch.arange(reduction.size).view(1, -1, 1)
        result = kernel(body, params, left, right, index, index)
    else:
        one = reduction.coordinates(left_outputs)
        other = one if same else reduction.coordinates(right_outputs)
        result = _projected(body, params, left, right, one, other)
    _add_head(result, source, params, left, right, reduction, left_outputs, right_outputs)
    if same and left is right:
        mirror(result)
    return result


def _is_trace(outputs: Tensor, reduction: Reduction) -> bool:
    """Whether one kernel is wanted that is summed over all of the grid, each output once."""
    single = outputs.shape[0] == outputs.shape[2] == 1
    return single and reduction.is_product and outputs.numel() == reduction.distinct


def _projected(
    body: ReadoutSource, params: Parameters, left: Inputs, right: Inputs, one: Tensor, other: Tensor
) -> Tensor:
    """Return the kernels Σ_R B K' B'ᵀ for coordinates ``(M, R, r, C)``, in parts that fit."""
    size = one.shape[-1]
    n1, n2 = left.num_samples, right.num_samples
    # The kernel of the directions, N₁ C x N₂ C, is larger than what is made of it: parts of the samples.
    if n1 * n2 * size**2 > _ENTRIES and max(n1, n2) > 1:
        if left is right and one is other:  # three quarters, and the fourth by symmetry
            (a, b), cut = _halves(left), (n1 // 2) * one.shape[2]
            result = one.new_empty((len(one), n1 * one.shape[2], n1 * one.shape[2]))
            result[:, :cut, :cut] = _projected(body, params, a, a, one, one)
            result[:, cut:, cut:] = _projected(body, params, b, b, one, one)
            result[:, cut:, :cut] = _projected(body, params, b, a, one, one)
            result[:, :cut, cut:] = result[:, cut:, :cut].mT
            return result
        if n1 >= n2:
            return torch.cat([_projected(body, params, a, right, one, other) for a in _halves(left)], 1)
        return torch.cat([_projected(body, params, left, b, one, other) for b in _halves(right)], 2)
    index = torch.arange(size).view(1, 1, -1)
    inner = kernel(body, params, left, right, index, index).view(n1, size, n2, size)
    if one.shape[2] == other.shape[2] == 1:
        return _single_entries(inner, one.squeeze(2), other.squeeze(2))
    result = inner.new_zeros((len(one), n1 * one.shape[2], n2 * other.shape[2]))
    for target, rows, columns in zip(result, one, other, strict=True):
        for a, b in zip(rows, columns, strict=True):  # (r₁, C), (r₂, C)
            moved = (a @ inner.flatten(2)).view(n1 * len(a) * n2, size)
            target += (moved @ b.mT).view(n1 * len(a), n2 * len(b))
    return result


def _single_entries(inner: Tensor, one: Tensor, other: Tensor) -> Tensor:
    """The same for one row and column a sample: entries ⟨Σ_R bᵀb', K'⟩, ``(M, N₁, N₂)``."""
    n1, size, n2, _ = inner.shape
    # Σ_R bᵀ K' b' = ⟨Σ_R b b'ᵀ, K'⟩: the terms are summed before K' is looked at.
    flat = inner.transpose(1, 2).reshape(n1 * n2, size**2)  # (N₁ N₂, C²)
    step = max(1, _ENTRIES // size**2)
    parts = [(a.mT @ b).flatten(1) @ flat.mT for a, b in zip(one.split(step), other.split(step), strict=True)]
    return torch.cat(parts).view(-1, n1, n2)


def _halves(inputs: Inputs) -> tuple[Inputs, Inputs]:
    """Return the first and the second half of the samples."""
    middle, between = inputs.num_samples // 2, inputs.in_order()
    return between(0, middle), between(middle, inputs.num_samples)


def _add_head(
    result: Tensor,
    source: LayerSource,
    params: Parameters,
    left: Inputs,
    right: Inputs,
    reduction: Reduction,
    left_outputs: Tensor,
    right_outputs: Tensor,
) -> None:
    """Add the head's own kernel: outputs of one class share ⟨h, h'⟩, and 1 for the bias."""
    readout = source.coverage.readout
    assert readout is not None
    chosen = reduction.positions
    one = head_activations(source, params, left)[:, chosen]  # (N₁, S, d)
    other = one if left is right else head_activations(source, params, right)[:, chosen]
    gram = (one.flatten(0, 1) @ other.flatten(0, 1).mT).view(*one.shape[:2], *other.shape[:2])
    if readout.bias is not None:
        gram += 1
    (p1, c1), (p2, c2) = reduction.split(left_outputs), reduction.split(right_outputs)
    r1, r2 = left_outputs.shape[2], right_outputs.shape[2]
    if r1 == r2 == 1:
        # weights[m, p, q]: how many terms of kernel m pair the same class at positions p and q.
        weights = torch.zeros((len(result), len(chosen), len(chosen)), dtype=gram.dtype)
        kernels = torch.arange(len(result)).view(-1, 1, 1).expand_as(p1)
        weights.index_put_((kernels, p1, p2), (c1 == c2).to(gram.dtype), accumulate=True)
        result += torch.einsum("mpq,npkq->mnk", weights.to(gram.device), gram)
        return
    for number, target in enumerate(result):
        view = target.view(len(one), r1, len(other), r2)
        for term in range(left_outputs.shape[1]):
            a, b = (c1[number, term][:, None] == c2[number, term]).nonzero(as_tuple=True)
            view[:, a, :, b] += gram[:, p1[number, term][a], :, p2[number, term][b]]


# diagonals


def readout_diagonal(source: Source, params: Parameters, inputs: Inputs, outputs: Tensor) -> Tensor:
    """Return ``(M, N·r)`` kernel diagonals by the way that takes fewest backward passes."""
    if not isinstance(source, LayerSource):
        return diagonal(source, params, inputs, outputs)
    over_time = states_diagonal(source, params, inputs, outputs)
    if over_time is not None:
        return over_time
    reduction = _reduced(source, params, outputs, inputs)
    if reduction is None:
        return diagonal(source, params, inputs, outputs)
    body = ReadoutSource(source, reduction)
    readout = source.coverage.readout
    assert readout is not None
    numbers, index = torch.unique(outputs, return_inverse=True)
    place, _ = reduction.split(numbers)
    traced = _is_trace(outputs, reduction)
    every = torch.arange(reduction.size)

    def lengths_of(start: int, stop: int, part: Inputs) -> Tensor:
        if traced:
            own = diagonal(body, params, part, every.view(1, -1, 1), counted=False).mT  # (n, 1)
        else:
            grams = body.of_outputs(params, part, every).grams()  # (n, C, C)
            basis = reduction.coordinates(numbers).to(grams.dtype)  # (u, C)
            own = ((basis @ grams) * basis).sum(2)  # bᵀ K'_nn b, (n, u)
        # The gradient of output (s, v) at the head is e_v h_sᵀ, and e_v: |h_s|² + 1, whatever the class.
        read = head_activations(source, params, part)[:, reduction.positions].double().square().sum(2)
        read = (read + (readout.bias is not None))[:, place]  # (n, u)
        head = read.sum(1, keepdim=True) if traced else read
        return (own.double() + head).to(source.dtype)

    share = body.tile_share(reduction.size)
    lengths = rows_of_parts(inputs.num_samples, over_parts(inputs, share, lengths_of))
    body.count_rows(inputs.num_samples * reduction.size, inputs)
    if traced:
        return lengths.mT
    return lengths[:, index.to(lengths.device)].sum(2).movedim(1, 0).flatten(1)


# -- products with cached factors of a model with a linear readout: as wide as the readout, not as the output


@dataclass(eq=False)
class ReadoutFactors:
    """The interface of `ProductFactors` for a body in reduced directions and a head.

    Attributes:
        body: Factors of what is before the head, for the directions.
        readout: The head.
        basis: Q, ``(V, k)``.
        read: ``(N, S, d)`` what the head reads.
        weight: Where its weight lies in the flat parameter vector.
        bias: Where its bias lies, or None.
    """

    body: ProductFactors
    readout: LinearReadout
    basis: Tensor
    read: Tensor
    weight: Span
    bias: Span | None

    @property
    def spans_key(self) -> object:
        """What two sides of a kernel must have in common."""
        return ("readout", self.body.spans_key)

    def tensors(self) -> list[Tensor]:
        """Return what takes memory."""
        return [*self.body.tensors(), self.basis, self.read]

    @property
    def column_entries(self) -> int:
        """Entries that one column of a product takes in between."""
        return max(
            self.body.column_entries, len(self.read) * len(self.readout.positions) * self.readout.classes
        )

    def _by_position(self, vectors: Tensor) -> Tensor:
        """Split ``(k, N, O)`` by output position."""
        return vectors.unflatten(2, (len(self.readout.positions), self.readout.classes))  # (k, N, S, V)

    def _reduce(self, split: Tensor) -> Tensor:
        """Return Qᵀ v at each position: Jᵀv before the head sees no more of v."""
        return long_product(split, self.basis).flatten(2)  # (k, N, S·k')

    def _expand(self, reduced: Tensor) -> Tensor:
        """Return ``(k, N, S, V)`` for ``(k, N, S·k')``."""
        return reduced.unflatten(2, (len(self.readout.positions), -1)) @ self.basis.mT

    def pull(self, vectors: Tensor, size: int) -> Tensor:
        """Return Jᵀv, ``(k, P)``, for ``(k, N, O)``; parameters that are not covered get zero."""
        split = self._by_position(vectors)
        result = self.body.pull(self._reduce(split), size)
        pulled = long_product(split.flatten(1, 2).mT, self.read.flatten(0, 1))  # (k, V, d)
        if self.readout.transposed:
            pulled = pulled.mT
        result[:, self.weight.start : self.weight.stop] += pulled.flatten(1)
        if self.bias is not None:
            result[:, self.bias.start : self.bias.stop] += split.sum((1, 2))
        return result

    def push(self, tangents: Tensor) -> Tensor:
        """Return J p, ``(k, N, O)``, for ``(k, P)``."""
        result = self._expand(self.body.push(tangents))
        weight = tangents[:, self.weight.start : self.weight.stop]
        shape = (self.readout.classes, self.readout.width)
        matrix = (
            weight.unflatten(1, shape[::-1]).mT if self.readout.transposed else weight.unflatten(1, shape)
        )
        result += (self.read.flatten(0, 1) @ matrix.mT).view_as(result)
        if self.bias is not None:
            result += tangents[:, None, None, self.bias.start : self.bias.stop]
        return result.flatten(2)

    def through(self, right: ReadoutFactors, vectors: Tensor) -> Tensor:
        """Return J(self) J(right)ᵀ v, ``(k, N₁, O)``, for ``(k, N₂, O)``."""
        split = right._by_position(vectors)
        result = self._expand(self.body.through(right.body, right._reduce(split)))
        one, other, flat = self.read.flatten(0, 1), right.read.flatten(0, 1), split.flatten(1, 2)
        # (H H'ᵀ) V costs N₁ N₂ a column and class, H (H'ᵀ V) (N₁ + N₂) d.
        if len(one) * len(other) < (len(one) + len(other)) * self.readout.width:
            moved = (one @ other.mT) @ flat
        else:
            moved = one @ (other.mT @ flat)
        if self.bias is not None:
            moved = moved + flat.sum(1, keepdim=True)
        return (result + moved.view_as(result)).flatten(2)


def prepare_readout(
    source: LayerSource, params: Parameters, inputs: Inputs, route: ProductRoute | None
) -> ReadoutFactors | None:
    """Return the factors of N samples for products, or None if no readout makes them fewer."""
    readout = source.coverage.readout
    if readout is None or not readout.ends(inputs):
        return None
    reduction = Reduction(readout, params, torch.arange(inputs.num_outputs), inputs.num_outputs)
    if not reduction.pays:
        return None
    body = ReadoutSource(source, reduction.prepare())
    factors = body.of_outputs(params, inputs, torch.arange(reduction.size))
    ready = prepare_products(factors, source.rows, route)
    starts = source.starts
    weight = Span(starts[readout.weight], starts[readout.weight + 1])
    bias = None if readout.bias is None else Span(starts[readout.bias], starts[readout.bias + 1])
    return ReadoutFactors(
        ready, readout, reduction.basis, head_activations(source, params, inputs), weight, bias
    )
