"""Gauss and Gauss-Radau rules of spectral measures, from Lanczos with full reorthogonalisation.

A vector z and a symmetric K define the measure that has the mass (uᵢᵀ z)² at the eigenvalue λᵢ; zᵀ f(K) z is
the integral of f. m products give its Jacobi matrix T of order m, whose eigenvalues and eigenvectors are
the nodes and weights of the Gauss rule, right for polynomials of degree 2 m - 1 (Golub, Meurant 2010,
chapters 3 and 6). One more row of T is chosen such that a given number is a node: the Gauss-Radau rule.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..vectors import Space

__all__ = ["Jacobi"]

_EXHAUSTED = 4.0  # rounding units of the largest entry below which a coupling is no direction any more
_GROWTH = 1.5


class Jacobi:
    """The Jacobi matrices of several starting vectors, which grow together.

    All vectors are multiplied in one block. A starting vector whose Krylov space is exhausted stays as it
    is, and its rules are exact from then on.

    Args:
        multiply: ``(n, b) -> (n, b)``, the product with a symmetric operator.
        space: The space of its vectors.
        starts: ``(n, p)`` starting vectors of any length; they are normalised.
        report: Called with the number of columns multiplied after each step.

    Example:
        >>> import torch
        >>> from ntkops.spectra import Jacobi
        >>> from ntkops.vectors import Space
        >>> K = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))
        >>> rules = Jacobi(
        ...     lambda V: K @ V,
        ...     Space(3, torch.float64),
        ...     torch.ones(3, 1, dtype=torch.float64),
        ... )
        >>> rules.extend(3)
        >>> nodes, weights = rules.gauss()
        >>> (
        ...     [round(x, 9) for x in nodes[0].tolist()],
        ...     [round(w, 9) for w in weights[0].tolist()],
        ... )
        ([1.0, 2.0, 4.0], [0.333333333, 0.333333333, 0.333333333])
    """

    def __init__(
        self,
        multiply: Callable[[Tensor], Tensor],
        space: Space,
        starts: Tensor,
        *,
        report: Callable[[int], None] | None = None,
    ) -> None:
        self._multiply, self._space, self._report = multiply, space, report
        count = starts.shape[-1]
        lengths = space.sum_squares(starts).sqrt()  # (p,)
        self._current = _scaled(starts, lengths)  # (n, p)
        self._basis = starts.new_empty((count, 0, starts.shape[-2]))  # (p, capacity, n)
        self.alphas = torch.zeros((count, 0), dtype=torch.float64, device=starts.device)
        self.betas = torch.zeros_like(self.alphas)
        self.alive: Tensor = lengths > 0
        self.products = 0

    @property
    def steps(self) -> int:
        """Order m of the Jacobi matrices."""
        return self.alphas.shape[-1]

    @property
    def scale(self) -> float:
        """A bound for the largest |eigenvalue| seen, by Gershgorin's discs; 0 before the first step."""
        if not self.steps:
            return 0.0
        before = torch.nn.functional.pad(self.betas[:, :-1], (1, 0))
        return float((self.alphas.abs() + self.betas + before).max())

    def extend(self, steps: int) -> None:
        """Go on to so many steps in all, or until every Krylov space is exhausted."""
        steps = min(steps, self._space.size)
        self._reserve(steps)
        while self.steps < steps and self._space.any(bool(self.alive.any())):
            self._step()

    def combine(self, coefficients: Tensor) -> Tensor:
        """Return combinations of the basis vectors of each start.

        Args:
            coefficients: ``(p, m, t)``, one for each of the m steps.

        Returns:
            ``(p, n, t)`` in the dtype of the vectors.
        """
        return self._basis[:, : coefficients.shape[-2]].mT @ coefficients.to(self._basis.dtype)

    def decompositions(self) -> tuple[Tensor, Tensor]:
        """Return eigenvalues ``(p, m)``, ascending, and eigenvectors ``(p, m, m)`` of the Jacobi matrices."""
        values, vectors = torch.linalg.eigh(self._matrices(self.steps))
        return values, vectors

    def forget(self) -> None:
        """Free the vectors; the rules stay, and can not be extended any more."""
        self._basis, self._current = self._basis[:, :0], self._current[:, :0]

    def gauss(self, order: int | None = None) -> tuple[Tensor, Tensor]:
        """Return the Gauss rules.

        Args:
            order: Number of nodes; None for all steps.

        Returns:
            Nodes, ascending, and weights that sum to 1, both ``(p, m)`` in float64.
        """
        nodes, vectors = torch.linalg.eigh(self._matrices(order or self.steps))
        return nodes, vectors[:, 0].square()

    def radau(self, end: float) -> tuple[Tensor, Tensor]:
        """Return the Gauss-Radau rules with a node at, or by rounding just below, a lower bound.

        Args:
            end: A number that no eigenvalue of the operator lies below.

        Returns:
            Nodes, ascending, and weights that sum to 1, both ``(p, m + 1)`` in float64.
        """
        order = self.steps
        small = self._matrices(order)
        nodes, vectors = torch.linalg.eigh(small)
        # A Ritz value at the end itself, or below it by rounding, takes the node with it.
        slack = 4 * torch.finfo(torch.float64).eps * self.scale
        fixed = torch.minimum(torch.full_like(nodes[:, 0], end), nodes[:, 0] - slack)  # (p,)
        # T bordered by β and ω has the eigenvalue θ iff ω - θ = β² e_mᵀ (T - θ)⁻¹ e_m = Σ_i (β s_mi)² / (θ_i
        # - θ), with s the eigenvectors of T.
        coupling = torch.where(self.alive, self.betas[:, -1], 0.0)
        gaps = nodes - fixed.unsqueeze(-1)
        inner = ((vectors[:, -1] * coupling.unsqueeze(-1)).square() / gaps.clamp(min=slack or 1.0)).sum(-1)
        matrices = torch.zeros((len(nodes), order + 1, order + 1), dtype=torch.float64, device=nodes.device)
        matrices[:, :order, :order] = small
        matrices[:, -1, -1] = torch.where(self.alive, fixed + inner, self.alphas[:, 0])
        matrices[:, -1, -2] = matrices[:, -2, -1] = coupling
        nodes, vectors = torch.linalg.eigh(matrices)
        return nodes, vectors[:, 0].square()

    def largest_mass(self, points: Tensor) -> Tensor:
        r"""Return the largest mass that the measures can have at given points.

        It is the Christoffel function :math:`1 / \sum_{k<m} p_k(x)^2` of the orthonormal polynomials. By the
        Chebyshev-Markov-Stieltjes inequalities it also bounds how far the distribution function of the
        measure lies from that of its Gauss rule at x (Akhiezer 1965, theorem 2.5.4).

        Args:
            points: ``(g,)``.

        Returns:
            ``(p, g)`` in [0, 1], float64; 0 for measures that are known entirely.
        """
        points = points.to(self.alphas)
        previous = torch.zeros((len(self.alphas), len(points)), dtype=torch.float64, device=points.device)
        current = torch.ones_like(previous)
        total = torch.ones_like(previous)
        for step in range(self.steps - 1):
            alpha, beta = self.alphas[:, step, None], self.betas[:, step, None]
            before = self.betas[:, step - 1, None] if step else torch.zeros_like(beta)
            following = ((points - alpha) * current - before * previous) / torch.where(beta > 0, beta, 1.0)
            # far outside the spectrum polynomials grow by powers of m: 1e150 squared is still a number, and 1
            # / it is 0
            previous, current = current, following.clamp(-1e150, 1e150)
            total = total + current.square()
        return torch.where(self.alive[:, None], 1 / total, 0.0)

    # one step

    def _step(self) -> None:
        step, alive = self.steps, self.alive
        self._basis[:, step] = self._current.mT
        images = torch.zeros_like(self._current)
        images[:, alive] = self._multiply(self._current[:, alive])
        self.products += int(alive.sum())
        known = self._basis[:, : step + 1].mT  # (p, n, m)
        rest = images.mT.unsqueeze(-1)  # (p, n, 1)
        alpha = torch.zeros_like(self.alive, dtype=torch.float64)
        for _ in range(2):  # what the first projection leaves by rounding, the second removes
            share = self._space.inner(known, rest)  # (p, m, 1)
            alpha = alpha + share[:, -1, 0]
            rest = rest - known @ share.to(rest.dtype)
        beta = self._space.sum_squares(rest).sqrt().squeeze(-1)  # (p,)
        if step:  # a padded row stands apart, at a point that is an entry of T already
            alpha = torch.where(alive, alpha, self.alphas[:, 0])
        self.alphas = torch.cat([self.alphas, alpha.unsqueeze(-1)], dim=-1)
        self.betas = torch.cat([self.betas, torch.where(alive, beta, 0.0).unsqueeze(-1)], dim=-1)
        # |K v| is rounded to some eps of the largest eigenvalue: a rest of that length has a random
        # direction.
        cutoff = _EXHAUSTED * torch.finfo(rest.dtype).eps * self.scale
        self.alive = alive & (beta > cutoff)
        if self.steps >= self._space.size:
            self.alive = torch.zeros_like(alive)
        self.betas[:, -1] = torch.where(self.alive, self.betas[:, -1], 0.0)
        self._current = torch.where(self.alive, _scaled(rest.squeeze(-1).mT, beta), 0.0)
        if self._report is not None:
            self._report(int(alive.sum()))

    def _reserve(self, steps: int) -> None:
        count, capacity, size = self._basis.shape
        if capacity < steps:
            wanted = min(max(steps, int(_GROWTH * capacity)), self._space.size)
            grown = self._basis.new_zeros((count, wanted, size))
            grown[:, :capacity] = self._basis
            self._basis = grown

    def _matrices(self, order: int) -> Tensor:
        """Return the leading parts of the Jacobi matrices, ``(p, order, order)``."""
        off = self.betas[:, : order - 1]
        return (
            torch.diag_embed(self.alphas[:, :order])
            + torch.diag_embed(off, offset=1)
            + torch.diag_embed(off, offset=-1)
        )


def _scaled(block: Tensor, lengths: Tensor) -> Tensor:
    """Return columns divided by their lengths; columns of length zero stay zero."""
    # The quotient is formed in float64, where neither 1e-20 nor its inverse is out of range.
    return (block.double() / torch.where(lengths > 0, lengths, 1.0)).to(block.dtype)
