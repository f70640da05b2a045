"""Kernels and diagonals from factors: Gram matrices or per-sample gradients, layer by layer.

A kernel is wanted as a list of M matrices, each a sum of R terms over r outputs a sample, rows
sample-major: K_m = Σ_R J_{o_mR} J_{o'_mR}ᵀ. All outputs (M = R = 1), one kernel an output (R = r = 1)
and the trace (M = r = 1) are the three that occur most, and need no copy of any factor.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .cost import DiagonalRoute, KernelRoute, choose_diagonal
from .factors import Direct, Outer, outer_gradients
from .layer_rules import Activation, OneHot
from .memory import even_size
from .summation import COLUMNS, Total, Workspace, long_product, row_blocks, wide_dtype

__all__ = [
    "SLAB_ENTRIES",
    "Picker",
    "add_directs",
    "add_outers",
    "gram_of_activations",
    "outer_grams",
    "outer_lengths",
    "own_products",
    "recorded_kernel",
    "squared",
]

_GRAM_ENTRIES = 2**22  # entries of one block of the Gram matrix of positions
_MANY_POSITIONS = 128  # rows of such a block below which more blocks cost more than they save
_LENGTH_ENTRIES = 2**20  # entries of gradients that are squared at a time: what stays near the processor
_SMALL_SAMPLES = 160  # up to which kernels of single outputs go through one batched product
_SHORT = 1024  # gradients that are copied side by side: a product of few terms is all dispatch
# Entries of gradients that are written down at a time, 8 MiB in float32. As many outputs as that allows, with
# all inputs: 82 to 92 billion operations a second and core, where 16 columns of inputs at a time reach 50 to
# 62.
SLAB_ENTRIES = 2**21


def recorded_kernel(one: Direct, other: Direct, left_index: Tensor, right_index: Tensor) -> Tensor:
    """Return ``(M, N₁·r₁, N₂·r₂)`` kernels of gradients that are written down, differentiable."""
    rows, columns = Picker(left_index).rows(one.gradients), Picker(right_index).rows(other.gradients)
    return torch.stack([long_product(a, b.mT) for a, b in zip(rows, columns, strict=True)])


class Picker:
    """Takes directions out of a factor, as a view where they are all there in order."""

    def __init__(self, index: Tensor) -> None:
        self.shape = tuple(index.shape)
        flat = index.flatten().tolist()  # (M, R, r)
        self._ordered = flat == list(range(len(flat)))
        self._index = index

    def __call__(self, factor: Tensor) -> Tensor:
        """Turn ``(B, C, ...)`` into ``(M, B, R, r, ...)``."""
        kernels, terms, rows = self.shape
        if self._ordered and factor.shape[1] == kernels * terms * rows:
            picked = factor.unflatten(1, self.shape)
        else:
            picked = factor[:, self._index.to(factor.device)]
        return picked.movedim(1, 0)

    def each(self, factor: Tensor) -> Tensor:
        """Turn ``(B, C, ...)`` into ``(M, R, B, rest)`` where r = 1."""
        return self(factor).squeeze(3).transpose(1, 2).flatten(3)

    def rows(self, factor: Tensor) -> list[Tensor]:
        """Turn ``(B, C, ...)`` into M matrices ``(B·r, R·rest)``, rows sample-major."""
        _, terms, rows = self.shape
        picked = self(factor)  # (M, B, R, r, ...)
        # Σ_R J_R J'_Rᵀ is one product of matrices whose terms stand side by side; with r or R of 1 as views.
        if rows == 1:
            return [block.flatten(1) for block in picked]
        if terms == 1:
            return [block.flatten(0, 2).flatten(1) for block in picked]
        return [block.transpose(1, 2).flatten(0, 1).flatten(1) for block in picked]


def gram_of_activations(left: Outer, right: Outer, dtype: torch.dtype) -> Tensor:
    """Return ``(B₁·S₁, B₂·S₂)`` inner products of activations of one group, and of the 1 that a bias sees."""
    one, other = left.activations, right.activations
    if isinstance(one, OneHot):
        assert isinstance(other, OneHot)
        gram = (one.index.flatten()[:, None] == other.index.flatten()).to(dtype)
    else:
        assert isinstance(other, Tensor)
        rows, columns = (a.squeeze(1).mT.flatten(0, 1) for a in (one, other))  # (B·S, d_in)
        gram = long_product(rows, columns.mT).to(dtype)
    return gram if left.unit.bias is None else gram + 1


def add_outers(
    target: Tensor,
    left: Outer,
    right: Outer,
    pick_left: Picker,
    pick_right: Picker,
    symmetric: bool,
    workspace: Workspace,
    route: KernelRoute,
) -> None:
    """Add the kernels of one layer."""
    if route == "gradient":
        _add_gradients(target, left, right, pick_left, pick_right, symmetric, workspace)
    elif left.shape.positions == right.shape.positions == 1:
        _add_gram(target, left, right, pick_left, pick_right, symmetric, workspace)
    elif pick_left.shape[2] * pick_right.shape[2] > 1:
        _add_half_gram(target, left, right, pick_left, pick_right, symmetric)
    else:
        _add_position_gram(target, left, right, pick_left, pick_right, symmetric)


def _add_gram(
    target: Tensor,
    left: Outer,
    right: Outer,
    pick_left: Picker,
    pick_right: Picker,
    symmetric: bool,
    workspace: Workspace,
) -> None:
    """Without shared weights: K += (A Aᵀ) ∘ (G Gᵀ), as ⟨g aᵀ, g' a'ᵀ⟩ = ⟨g, g'⟩ ⟨a, a'⟩."""
    gram = gram_of_activations(left, right, target.dtype)  # (N₁, N₂)
    count, columns = gram.shape
    r1, r2 = pick_left.shape[2], pick_right.shape[2]
    # Many small kernels of single outputs: one batched product instead of a call each.
    if r1 == r2 == pick_left.shape[1] == 1 and max(count, columns) <= _SMALL_SAMPLES:
        each = pick_left.each(left.gradients).squeeze(1)  # (M, N₁, d_out)
        others = each if symmetric else pick_right.each(right.gradients).squeeze(1)
        target.addcmul_(long_product(each, others.mT), gram)
        return
    one = pick_left.rows(left.gradients)
    other = one if symmetric else pick_right.rows(right.gradients)
    for block, a, b in zip(target, one, other, strict=True):
        for start, stop in row_blocks(count, r1, symmetric):
            end = stop if symmetric else columns
            product = workspace.matrix("product", (stop - start) * r1, end * r2, a)
            long_product(a[start * r1 : stop * r1], b[: end * r2].mT, product)
            part = block[start * r1 : stop * r1, : end * r2]
            weights = gram[start:stop, :end]
            if r1 == r2 == 1:
                part.addcmul_(product, weights)
            else:
                shape = (stop - start, r1, end, r2)
                part.unflatten(0, shape[:2]).unflatten(2, shape[2:]).addcmul_(
                    product.view(shape), weights[:, None, :, None]
                )


def _add_position_gram(
    target: Tensor, left: Outer, right: Outer, pick_left: Picker, pick_right: Picker, symmetric: bool
) -> None:
    """With S positions: K += Σ_{s,t} (A_s A_tᵀ) ∘ (G_s G_tᵀ)."""
    gram = gram_of_activations(left, right, target.dtype)
    s1, s2 = left.shape.positions, right.shape.positions
    n1, n2 = len(gram) // s1, gram.shape[1] // s2
    gram = gram.view(n1, s1, n2, s2)
    one = _position_rows(pick_left, left)
    other = one if symmetric else _position_rows(pick_right, right)
    r1, r2 = pick_left.shape[2], pick_right.shape[2]
    step = max(1, _GRAM_ENTRIES // max(1, r1 * s1 * n2 * r2 * s2))
    if symmetric:  # four blocks, each up to its own diagonal: (1 + 1/4) / 2, five of eight parts of the work
        step = min(step, max(-(-n1 // 4), -(-_MANY_POSITIONS // s1)))
    wide = wide_dtype(target)
    for block, a, b in zip(target, one, other, strict=True):
        for start in range(0, n1, step):
            stop = min(start + step, n1)
            end = stop if symmetric else n2
            product = long_product(a[start:stop].flatten(0, 2), b[:end].flatten(0, 2).mT)
            product = product.view(stop - start, r1, s1, end, r2, s2)
            weights = gram[start:stop, :, :end].unsqueeze(1).unsqueeze(4)  # (n, 1, s, n', 1, t)
            found = product.mul_(weights).sum((2, 5), dtype=wide).flatten(2).flatten(0, 1)
            block[start * r1 : stop * r1, : end * r2].add_(found)


def _add_half_gram(
    target: Tensor, left: Outer, right: Outer, pick_left: Picker, pick_right: Picker, symmetric: bool
) -> None:
    r"""With S positions and several outputs: K_nn' += G_n (W_nn' G_n')ᵀ with W_nn' = A_nᵀ A_n'.

    Only the Gram matrix of activations is made, and the output gradients are moved through it: none of the
    (r S)² inner products of output gradients of two samples is. In every shape that was measured it was 2 to
    10 times faster than those.
    """
    (n1, _, _, outputs, s1), s2 = left.gradients.shape, right.gradients.shape[-1]
    one, other = pick_left(left.gradients.squeeze(2)), pick_right(right.gradients.squeeze(2))
    terms, r1, r2 = pick_left.shape[1], pick_left.shape[2], pick_right.shape[2]
    shift = 0 if left.unit.bias is None else 1
    wide = wide_dtype(target)
    a_dtype = left.gradients.dtype
    for n in range(n1):
        end = n + 1 if symmetric else len(right.gradients)
        gram = _pair_grams(left.activations, right.activations, n, end).to(a_dtype) + shift  # (n', S₁, S₂)
        # A sum over (s, d_out) has at most COLUMNS terms, and what is moved at most SLAB_ENTRIES.
        step = even_size(outputs, min(COLUMNS, SLAB_ENTRIES // (end * terms * r2)) // s1)
        for block, a, b in zip(target, one, other, strict=True):  # (N, R, r, d_out, S)
            found = torch.zeros((r1, end, r2), dtype=wide, device=target.device)
            for start in range(0, outputs, step):
                part = slice(start, start + step)
                signals = b[:end, :, :, part].reshape(end, -1, s2)
                moved = torch.bmm(signals, gram.mT).view(end, terms, r2, -1)
                for term in range(terms):
                    rows = a[n, term, :, part].reshape(r1, -1)
                    columns = moved[:, term].reshape(end * r2, -1)
                    found += (rows @ columns.mT).view(r1, end, r2)
            block[n * r1 : (n + 1) * r1, : end * r2] += found.flatten(1)


def _pair_grams(left: Activation, right: Activation, sample: int, end: int) -> Tensor:
    """Return ``(n', S₁, S₂)`` inner products of the activations of one sample with those of others."""
    if isinstance(left, OneHot):
        assert isinstance(right, OneHot)
        return (left.index[sample, :, None] == right.index[:end, None, :]).float()
    assert isinstance(right, Tensor)
    others = right[:end, 0]  # (n', d_in, S₂)
    return left[sample, 0].mT @ others


def _position_rows(pick: Picker, layer: Outer) -> list[Tensor]:
    """Return M blocks ``(B, r, S, R·d_out)`` of output gradients."""
    picked = pick(layer.gradients.squeeze(2))  # (M, B, R, r, d_out, S)
    return [block.permute(0, 2, 4, 1, 3).flatten(3) for block in picked]


def _add_gradients(
    target: Tensor,
    left: Outer,
    right: Outer,
    pick_left: Picker,
    pick_right: Picker,
    symmetric: bool,
    workspace: Workspace,
) -> None:
    """K += J Jᵀ with the per-sample gradients of this layer, some inputs at a time."""
    first, second = left.activations, right.activations
    if isinstance(first, OneHot) and isinstance(second, OneHot):
        first, second = _compressed(first, second)
    shape, terms = left.shape, pick_left.shape[1]
    width = first.size if isinstance(first, OneHot) else shape.inputs
    # Some outputs with all inputs: the products that write gradients down are wide, and rows of the result
    # lie in memory as the products that follow read them.
    rows = max(left.gradients[:, :, 0, 0, 0].numel(), right.gradients[:, :, 0, 0, 0].numel())
    step = even_size(shape.outputs, SLAB_ENTRIES // max(1, rows * shape.groups * width))
    total = Total(
        target, len(left.gradients), symmetric, shape.groups * shape.outputs * width * terms, workspace
    )
    for start in range(0, shape.outputs, step):
        part = slice(start, start + step)
        one = _written_down(left.gradients[:, :, :, part], first, workspace, "left")
        other = (
            one if symmetric else _written_down(right.gradients[:, :, :, part], second, workspace, "right")
        )
        _add_rows(total, one, other, pick_left, pick_right, symmetric)
    if left.unit.bias is not None:
        one = left.gradients.sum(-1)
        other = one if symmetric else right.gradients.sum(-1)
        _add_rows(total, one, other, pick_left, pick_right, symmetric)
    total.finish()


def _add_rows(
    total: Total, left: Tensor, right: Tensor, pick_left: Picker, pick_right: Picker, symmetric: bool
) -> None:
    """Add the products of gradients ``(B, C, ...)``."""
    single = pick_left.shape[2] == pick_right.shape[2] == 1
    if single and max(len(left), len(right)) <= _SMALL_SAMPLES:
        each = pick_left.each(left)
        total.add_each(each, each if symmetric else pick_right.each(right))
        return
    one = pick_left.rows(left)
    other = one if symmetric else pick_right.rows(right)
    for number, (a, b) in enumerate(zip(one, other, strict=True)):
        total.add(number, a, b)


def _written_down(gradients: Tensor, activations: Activation, workspace: Workspace, side: str) -> Tensor:
    """Return `outer_gradients` in memory that is used again."""
    if isinstance(activations, OneHot) or gradients.shape[2] > 1:
        return outer_gradients(gradients, activations)
    entries = gradients[..., 0].numel() * activations.shape[2]
    return outer_gradients(gradients, activations, workspace.take(("gradient", side), entries, gradients))


def _compressed(left: OneHot, right: OneHot) -> tuple[OneHot, OneHot]:
    """Number only the rows of a table that occur."""
    # Rows that neither side looks up have gradients of zero: d_in becomes the number of those that are.
    found, index = torch.unique(torch.cat([left.index.flatten(), right.index.flatten()]), return_inverse=True)
    split = left.index.numel()
    return (
        OneHot(index[:split].view_as(left.index), len(found)),
        OneHot(index[split:].view_as(right.index), len(found)),
    )


def add_directs(
    target: Tensor,
    left: Sequence[Direct],
    right: Sequence[Direct],
    pick_left: Picker,
    pick_right: Picker,
    symmetric: bool,
    workspace: Workspace,
) -> None:
    """K += J Jᵀ with gradients that are written down: long ones by themselves, short ones side by side."""
    terms = sum(direct.gradients.shape[2] for direct in left) * pick_left.shape[1]
    total = Total(target, len(left[0].gradients), symmetric, terms, workspace)
    for one, other in zip(_side_by_side(left), _side_by_side(right), strict=True):
        _add_rows(total, one, other, pick_left, pick_right, symmetric)
    total.finish()


def _side_by_side(directs: Sequence[Direct]) -> list[Tensor]:
    """Return long gradients by themselves, short ones in one piece ``(B, C, Σ p)``."""
    short = [direct.gradients for direct in directs if direct.gradients.shape[2] < _SHORT]
    joined = [torch.cat(short, dim=2)] if len(short) > 1 else short
    return joined + [direct.gradients for direct in directs if direct.gradients.shape[2] >= _SHORT]


def squared(gradients: Tensor) -> Tensor:
    """Return ``(B, C)`` sums of squares in float64."""
    return gradients.flatten(2).square().sum(2, dtype=wide_dtype(gradients))


def outer_lengths(layer: Outer, workspace: Workspace, force: DiagonalRoute | None) -> Tensor:
    """Return ``(B, C)`` squared lengths of one layer's gradients."""
    activations, gradients = layer.activations, layer.gradients
    extra = 0 if layer.unit.bias is None else 1
    if choose_diagonal(layer.shape, force) == "gram":
        if layer.shape.positions == 1:  # |g aᵀ|² = |g|² |a|², and |g|² for the bias
            if isinstance(activations, OneHot):
                return squared(gradients) * (1 + extra)
            return squared(gradients) * (squared(activations) + extra)
        # |Σ_s g_s a_sᵀ|² = Σ_st ⟨a_s, a_t⟩ ⟨g_s, g_t⟩, as ⟨G (AᵀA), G⟩ with G of d_out x S.
        gram = _own_gram(activations, gradients.dtype) + extra  # (B, S, S)
        signals = gradients.squeeze(2)  # (B, C, d_out, S)
        return ((signals @ gram.unsqueeze(1)) * signals).sum((2, 3), dtype=torch.float64)
    return _written_lengths(layer, workspace)


def _written_lengths(layer: Outer, workspace: Workspace) -> Tensor:
    """Return the squared lengths of gradients that are written down, a few outputs at a time."""
    activations, gradients, shape = layer.activations, layer.gradients, layer.shape
    if isinstance(activations, OneHot):
        activations, _ = _compressed(activations, activations)
    size = gradients[:, :1].numel() // max(shape.positions, 1)
    inputs = activations.size if isinstance(activations, OneHot) else shape.inputs
    step = max(1, _LENGTH_ENTRIES // max(1, size * inputs))
    parts = []
    for part in gradients.split(step, dim=1):
        out = None
        if isinstance(activations, Tensor) and shape.groups == 1:
            out = workspace.take(("gradient", "left"), size * inputs * part.shape[1], gradients)
        parts.append(squared(outer_gradients(part, activations, out)))
    result = torch.cat(parts, dim=1)
    return result if layer.unit.bias is None else result + squared(gradients.sum(-1))


def _own_gram(activations: Activation, dtype: torch.dtype) -> Tensor:
    """Return ``(B, S, S)`` inner products of the activations of each sample."""
    if isinstance(activations, OneHot):
        return (activations.index[:, :, None] == activations.index[:, None, :]).to(dtype)
    flat = activations.squeeze(1)  # (B, d_in, S)
    return flat.mT @ flat


def own_products(gradients: Tensor) -> Tensor:
    """Return ``(B, C, C)`` inner products of the gradients ``(B, C, p)`` of each sample."""
    return torch.bmm(gradients, gradients.mT).double()


def outer_grams(layer: Outer) -> Tensor:
    """Return ``(B, C, C)`` inner products of one layer's gradients of each sample."""
    shape, activations = layer.shape, layer.activations
    if shape.positions == 1 and shape.groups == 1:  # ⟨g_c aᵀ, g_d aᵀ⟩ = ⟨g_c, g_d⟩ |a|²
        lengths = torch.ones(len(layer.gradients), 1, 1, dtype=torch.float64, device=layer.gradients.device)
        if isinstance(activations, Tensor):
            lengths = activations.double().square().flatten(1).sum(1)[:, None, None]
        return own_products(layer.gradients.flatten(2)) * (lengths + (layer.unit.bias is not None))
    if isinstance(activations, OneHot):
        activations, _ = _compressed(activations, activations)
    found = own_products(outer_gradients(layer.gradients, activations).flatten(2))
    return found if layer.unit.bias is None else found + own_products(layer.gradients.sum(-1).flatten(2))
