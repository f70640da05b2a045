"""Eigenvectors of a kernel and of its restrictions to clusters, and how the two cover each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import InputError, ZeroKernelError
from ._features import COPIES
from ._kernels import Kernels, dense_of, read_square
from .class_mean import class_mean

__all__ = [
    "LocalSpectra",
    "check_weight",
    "dense_mean",
    "feature_spectra",
    "feature_spectrum",
    "gap_coverage",
    "local_spectra",
    "restricted_energy",
    "spectrum",
]

_RULES = ("sum", "max", "last")
_TIE = 1e-12  # a share that rounding decides counts as reached, as in ntkops.truncation_rank
_NEGATIVE = 1e-3  # of the largest eigenvalue: beyond it this is no rounding


@dataclass(frozen=True, eq=False)
class LocalSpectra:
    """All eigenpairs of one kernel and of its diagonal blocks.

    Attributes:
        values: ``(r,)`` global eigenvalues, largest first: all n, or the k of a kernel of k features.
        vectors: ``(n, r)`` global eigenvectors.
        indices: Samples of each cluster.
        local_values: Eigenvalues of each block, largest first.
        local_vectors: Eigenvectors of each block.
    """

    values: Tensor
    vectors: Tensor
    indices: tuple[Tensor, ...]
    local_values: tuple[Tensor, ...]
    local_vectors: tuple[Tensor, ...]

    def ranks(self, share: float) -> tuple[int, tuple[int, ...]]:
        """Return the global and the local ranks that hold a share of the respective trace."""
        return _leading_rank(self.values, share), tuple(_leading_rank(v, share) for v in self.local_values)

    def lifted(self, cluster: int, rank: int) -> Tensor:
        """Return the leading local eigenvectors, zero outside their cluster: ``(n, rank)``."""
        padded = self.vectors.new_zeros(len(self.vectors), rank)
        padded[self.indices[cluster]] = self.local_vectors[cluster][:, :rank]
        return padded


def local_spectra(kernel: Tensor, clusters: Tensor, pairs: tuple[Tensor, Tensor]) -> LocalSpectra:
    """Return the eigenpairs of a dense kernel's blocks beside its own; a block of zeros has none.

    Args:
        kernel: ``(n, n)``.
        clusters: ``(n,)`` numbers without gaps.
        pairs: The kernel's own eigenpairs, as `spectrum` returns them.

    Returns:
        `LocalSpectra`. Cost: eigendecompositions of the blocks.
    """
    numbers = clusters.to(kernel.device)
    indices = tuple((numbers == h).nonzero().squeeze(-1) for h in range(int(clusters.max()) + 1))
    blocks = [_block(kernel[index][:, index]) for index in indices]
    return LocalSpectra(*pairs, indices, tuple(b[0] for b in blocks), tuple(b[1] for b in blocks))


def feature_spectra(rows: Tensor, clusters: Tensor, pairs: tuple[Tensor, Tensor]) -> LocalSpectra:
    """Return what `local_spectra` does for F Fᵀ, from F ``(n, k)`` by O(n k²) operations."""
    numbers = clusters.to(rows.device)
    indices = tuple((numbers == h).nonzero().squeeze(-1) for h in range(int(clusters.max()) + 1))
    blocks = [_thin_spectrum(rows[index]) for index in indices]
    blocks = [(v, u) if bool((v > 0).any()) else (v[:0], u[:, :0]) for v, u in blocks]
    return LocalSpectra(*pairs, indices, tuple(b[0] for b in blocks), tuple(b[1] for b in blocks))


def feature_spectrum(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenpairs of F Fᵀ, largest first.

    Raises:
        ZeroKernelError: If F is zero.
    """
    values, vectors = _thin_spectrum(rows)
    if not bool(values[0] > 0):
        raise ZeroKernelError("a share of the trace is undefined: a kernel has no positive eigenvalue")
    return values, vectors


def _thin_spectrum(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the eigenpairs of F Fᵀ, largest first, by a QR of F: no Gram matrix rounds the small ones."""
    basis, small = torch.linalg.qr(rows)
    left, singular, _ = torch.linalg.svd(small, full_matrices=False)
    return singular.square(), basis @ left


def _block(kernel: Tensor) -> tuple[Tensor, Tensor]:
    if not bool((kernel.diagonal() > 0).any()):
        return kernel.new_zeros(0), kernel.new_zeros(len(kernel), 0)
    return spectrum(kernel)


def restricted_energy(
    spectra: LocalSpectra, rank: int, local_ranks: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Return what clusters hold of the leading global eigenvectors, and what their eigenvectors cover.

    Returns:
        ``(H, rank)`` energies |u_j on I_h|², and ``(H, rank)`` covered ones |P_h (u_j on I_h)|².
    """
    energy, covered = [], []
    for index, vectors, kept in zip(spectra.indices, spectra.local_vectors, local_ranks, strict=True):
        part = spectra.vectors[index, :rank]
        energy.append(part.square().sum(0))
        covered.append((vectors[:, :kept].mT @ part).square().sum(0))
    return torch.stack(energy), torch.stack(covered)


def gap_coverage(energy: Tensor, covered: Tensor, rule: str) -> Tensor:
    """Return the coverage c_j of each leading global eigenvector, ``(rank,)``, by one of three rules.

    Args:
        energy: ``(H, rank)`` as `restricted_energy` returns them.
        covered: ``(H, rank)``.
        rule: "sum": |Π_loc u_j|², the definition in property (B). "max": the largest share over clusters, as
            the paper's text says. "last": the share in the last cluster, as its listing says.

    Raises:
        InputError: If the rule is unknown.
    """
    if rule not in _RULES:
        raise InputError(f"coverage={rule!r}: choose one of {', '.join(map(repr, _RULES))}")
    if rule == "sum":
        return covered.sum(0).clamp(max=1)
    present = energy > torch.finfo(energy.dtype).eps * 100  # |u_j|² = 1: below it a share is rounding
    share = covered / torch.where(present, energy, torch.ones_like(energy))
    if rule == "max":
        return torch.where(present, share, torch.zeros_like(share)).amax(0).clamp(max=1)
    # 0/0 in the listing, and NaN is not below any threshold: nothing there is left uncovered.
    return torch.where(present[-1], share[-1], torch.ones_like(share[-1])).clamp(max=1)


def dense_mean(K: Kernels, why: str, class_weight: str | None = None) -> Tensor:
    """Return the mean of the class kernels, dense ``(m, m)`` in float64; see `class_mean`.

    Raises:
        InputError: If the weight is unknown.
        DenseMemoryError: If a kernel refuses to be dense.
    """
    check_weight(class_weight)
    return dense_of(class_mean(read_square(K), weights=class_weight), why, COPIES)


def check_weight(class_weight: str | None) -> None:
    """Raise where a weight of classes is unknown.

    Raises:
        InputError: If it is.
    """
    if class_weight not in (None, "trace"):
        raise InputError(f"class_weight={class_weight!r}: None, or 'trace'")


def spectrum(kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Return eigenvalues, largest first and none negative, and eigenvectors of a dense kernel.

    Raises:
        InputError: If it is not positive semidefinite beyond rounding.
        ZeroKernelError: If it is zero.
    """
    values, vectors = torch.linalg.eigh((kernel + kernel.mT) / 2)
    values, vectors = values.flip(-1), vectors.flip(-1)
    if not bool(values[0] > 0):
        raise ZeroKernelError("a share of the trace is undefined: a kernel has no positive eigenvalue")
    if bool(values[-1] < -_NEGATIVE * values[0]):
        raise InputError(
            f"the kernel is not positive semidefinite: its eigenvalues reach down to {float(values[-1]):.2g}"
            f", the largest is {float(values[0]):.2g}"
        )
    return values.clamp(min=0), vectors


def _leading_rank(values: Tensor, share: float) -> int:
    """Return the least r with which the leading eigenvalues hold a share of their sum."""
    if not len(values):
        return 0
    captured = values.cumsum(0) / values.sum()
    return int((captured < share - _TIE).sum()) + 1 if share < 1 else int((values > 0).sum())
