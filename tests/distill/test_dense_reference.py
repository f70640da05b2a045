"""Each stage of the chain against one written from matrices alone: Jacobians by autograd, solves by torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import ntkops
from ntkops import distill
from ntkops.projections.dense import Dense

SAMPLES, POINTS, NEW, OUTPUTS, FEATURES, RIDGE = 36, 24, 10, 3, 60, 1e-2


class Gated(nn.Module):
    """A wave through a gate, on top of a plain branch with a shared scale."""

    def __init__(self) -> None:
        super().__init__()
        self.wave, self.gate = nn.Linear(4, 9), nn.Linear(4, 9, bias=False)
        self.scale = nn.Parameter(torch.rand(9))
        self.out, self.beside = nn.Linear(9, OUTPUTS), nn.Linear(4, OUTPUTS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.sin(self.wave(x)) * torch.sigmoid(self.gate(x)) * self.scale.exp()
        return self.out(hidden) + self.beside(torch.tanh(x))


class Given(Dense):
    """A projection whose matrix is known."""

    def columns(self, start: int, stop: int, dtype, device) -> Tensor:
        seed = torch.Generator().manual_seed(3)
        whole = torch.randn(self.dim, self.k, generator=seed, dtype=torch.float64)
        return whole[start:stop].to(device, dtype)

    def matrix(self) -> Tensor:
        return self.columns(0, self.dim, torch.float64, "cpu").mT / self.k**0.5


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """Return J, ``(C, N, P)``, one row at a time."""
    params = list(model.parameters())
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(out, params, retain_graph=True)])
        for out in model(x).mT.flatten()
    ]
    return torch.stack(rows).reshape(OUTPUTS, len(x), -1)


class Reference:
    """Kernels (C, m, m), cross kernels (C, M, m), logits and the ridge, as plain numbers."""

    def __init__(self, model: nn.Module, x: Tensor, new: Tensor, P: Tensor | None = None) -> None:
        F, G = jacobian(model, x), jacobian(model, new)
        if P is not None:
            F, G = F @ P.mT, G @ P.mT
        self.K, self.cross = F @ F.mT, G @ F.mT
        self.Y, self.truth = model(x).detach(), model(new).detach()
        self.ridge = RIDGE * float(self.K.diagonal(dim1=-2, dim2=-1).mean())
        self.mean = self.K.mean(0)

    def duals(self, ridge: float) -> Tensor:
        """Return α, ``(m, C)``."""
        A = self.K + ridge * torch.eye(self.K.shape[-1], dtype=torch.float64)
        return torch.linalg.solve(A, self.Y.mT.unsqueeze(-1)).squeeze(-1).mT

    def full(self) -> Tensor:
        """Return predictions of the regression on all points, ``(M, C)``."""
        return torch.einsum("cmn,nc->mc", self.cross, self.duals(self.ridge))

    def nystrom(self, U: Tensor) -> Tensor:
        """Return predictions of min |Y - K U b|² + r bᵀ Uᵀ K U b."""
        found = []
        for K, cross, y in zip(self.K, self.cross, self.Y.mT, strict=True):
            A = U.mT @ K @ K @ U + self.ridge * U.mT @ K @ U
            found.append(cross @ U @ torch.linalg.solve(A, U.mT @ K @ y))
        return torch.stack(found, dim=-1)

    def sketch(self, U: Tensor) -> Tensor:
        """Return predictions of (Uᵀ K U + r) b = Uᵀ y."""
        found = []
        for K, cross, y in zip(self.K, self.cross, self.Y.mT, strict=True):
            A = U.mT @ K @ U + self.ridge * torch.eye(U.shape[-1], dtype=torch.float64)
            found.append(cross @ U @ torch.linalg.solve(A, U.mT @ y))
        return torch.stack(found, dim=-1)


def orthonormal(columns: Tensor) -> Tensor:
    return torch.linalg.qr(columns).Q


def krylov(kernel: Tensor, start: Tensor, blocks: int) -> Tensor:
    """Return a basis of span{B, K B, K² B, ...}."""
    basis = block = orthonormal(start)
    for _ in range(blocks - 1):
        block = kernel @ block
        block = orthonormal(block - basis @ (basis.mT @ block))
        basis = orthonormal(torch.cat([basis, block], dim=-1))
    return basis


def close(found: Tensor, expected: Tensor) -> None:
    assert found.dtype == torch.float64
    assert float((found - expected).abs().max()) <= 1e-9 * float(expected.abs().max())


@pytest.fixture(scope="module")
def case():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = Gated().double()
        x, new = torch.randn(SAMPLES, 4).double(), torch.randn(NEW, 4).double()
    return model, x, new, Given(sum(p.numel() for p in model.parameters()), FEATURES, seed=0)


@pytest.fixture(scope="module", params=[False, True], ids=["all parameters", "projected"])
def stage(request, case):
    """Kernel, cross kernel and reference over the points, before and after the projection."""
    model, x, new, projection = case
    K = ntkops.ntk(model, x[:POINTS], outputs="each")
    if request.param:
        K = ntkops.projected_ntk(K, projection)
    return K, K.cross(new), Reference(model, x[:POINTS], new, projection.matrix() if request.param else None)


def test_kernels_and_regression_on_all_points(stage) -> None:
    K, cross, expected = stage
    close(K.to_dense(), expected.K)
    close(cross.to_dense(), expected.cross)
    close(ntkops.KernelRidge(RIDGE).fit(K, expected.Y).predict(cross), expected.full())


@pytest.mark.parametrize("fit", ["nystrom", "sketch"])
def test_greedily_chosen_points(stage, fit) -> None:
    K, cross, expected = stage
    rest, chosen = expected.mean.clone(), []
    for _ in range(8):
        at = int(rest.diagonal().argmax())
        chosen.append(at)
        rest = rest - torch.outer(rest[:, at], rest[at]) / rest[at, at]
    found = distill.select(K, 8, "greedy")
    assert found.indices.tolist() == chosen
    U = torch.eye(POINTS, dtype=torch.float64)[:, chosen]
    close(found.fit(K, expected.Y, ridge=RIDGE, fit=fit).predict(cross), getattr(expected, fit)(U))


@pytest.mark.parametrize("fit", ["nystrom", "sketch"])
def test_krylov_gradients(stage, fit) -> None:
    K, cross, expected = stage
    found = distill.synthesize(K, 2 * OUTPUTS, "krylov", Y=expected.Y)
    U = krylov(expected.mean, expected.Y, 2)
    close(found.U @ found.U.mT, U @ U.mT)
    close(found.fit(K, expected.Y, ridge=RIDGE, fit=fit).predict(cross), getattr(expected, fit)(U))


@pytest.mark.parametrize("count", [2, 3, 6])
@pytest.mark.parametrize("fit", ["nystrom", "sketch"])
def test_galerkin_gradients(stage, fit, count) -> None:
    K, cross, expected = stage
    A = expected.duals(expected.ridge)
    if count < OUTPUTS:  # the leading directions of Aᵀ K (K + r) A
        middle = expected.mean @ expected.mean + expected.ridge * expected.mean
        U = orthonormal(A @ torch.linalg.eigh(A.mT @ middle @ A)[1][:, -count:])
    else:
        U = krylov(expected.mean, A, count // OUTPUTS)
    found = distill.synthesize(K, count, "galerkin", Y=expected.Y, ridge=RIDGE)
    close(found.U @ found.U.mT, U @ U.mT)
    predictions = found.fit(K, expected.Y, ridge=RIDGE, fit=fit).predict(cross)
    close(predictions, getattr(expected, fit)(U))
    if count >= OUTPUTS and fit == "sketch":  # lossless: the regression on all points
        close(predictions, expected.full())


def test_the_chain_runs_these_stages(case) -> None:
    model, x, new, projection = case
    P, points = projection.matrix(), x[:POINTS]
    report = distill.chain(
        model,
        x,
        new,
        model(new).argmax(-1),
        data=points,
        projection=projection,
        gradients=lambda K, Y: distill.synthesize(K, 6, "krylov", Y=Y),
        ridge=RIDGE,
    )

    def distilled(one: Reference) -> Tensor:
        return one.nystrom(krylov(one.mean, one.Y, 2))

    whole, fewer = Reference(model, x, new), Reference(model, points, new)
    seen, seen_all = Reference(model, points, new, P), Reference(model, x, new, P)
    due = [whole.full(), fewer.full(), seen.full(), distilled(seen), distilled(seen_all), distilled(fewer)]
    runs = [*report.stages, report.ablations["data"], report.ablations["projection"]]
    for run, expected in zip(runs, due, strict=True):
        error = float((expected - whole.truth).square().mean())
        assert run.mean_squared_error == pytest.approx(error, rel=1e-9)
        assert run.fidelity == float((expected.argmax(-1) == whole.truth.argmax(-1)).double().mean())
