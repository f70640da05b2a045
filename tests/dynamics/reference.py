"""Training of linearised networks in dense float64, by other means than the library's."""

from __future__ import annotations

import numpy as np
import torch
from scipy.integrate import solve_ivp
from scipy.linalg import expm
from torch import nn

__all__ = ["descent", "entropy_flow", "flow", "jacobian", "network", "spectrum"]


def network(outputs=2, dtype=torch.float64, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(3, 12), nn.Tanh(), nn.Linear(12, outputs)).to(dtype)


def jacobian(model, x):
    """J (N·O, P) of the current parameters, row by row."""
    rows = []
    for value in model(x).reshape(-1):
        parts = torch.autograd.grad(value, list(model.parameters()), retain_graph=True)
        rows.append(torch.cat([part.reshape(-1) for part in parts]))
    return torch.stack(rows).detach()


def flow(K, r, t, *, lr=1.0, decay=0.0):
    """The residual Y - f and the dual a at time t of a mean over all entries of r, (n,)."""
    size = len(r)
    rate = 2 * lr / size
    system = np.zeros((size + 1, size + 1))
    system[:size, :size] = -rate * (K.numpy() + decay * size / 2 * np.eye(size))
    system[:size, size] = rate * r.numpy()
    dual = torch.from_numpy(expm(t * system)[:size, size])
    return r - K @ dual, dual


def descent(J, r, steps, *, lr, momentum=0.0, decay=0.0):
    """Residual and change of the weights after steps of torch's optimizer on the linear model."""
    weights = torch.zeros(J.shape[1], dtype=J.dtype, requires_grad=True)
    optimizer = torch.optim.SGD([weights], lr=lr, momentum=momentum, weight_decay=decay)
    for _ in range(steps):
        optimizer.zero_grad()
        (J @ weights - r).square().mean().backward()
        optimizer.step()
    return (r - J @ weights).detach(), weights.detach()


def entropy_flow(K, start, probabilities, t, *, decay=0.0):
    """Outputs (N, C) under cross-entropy, one kernel K (N·C, N·C), by an implicit method."""
    shape = start.shape
    kernel, y, f0 = K.numpy(), probabilities.numpy(), start.numpy()

    def slope(_, dual):
        outputs = f0 + (kernel @ dual).reshape(shape)
        shifted = np.exp(outputs - outputs.max(1, keepdims=True))
        shares = shifted / shifted.sum(1, keepdims=True)
        return -((shares - y) / len(y)).reshape(-1) - decay * dual

    found = solve_ivp(slope, (0, t), np.zeros(f0.size), method="Radau", rtol=1e-11, atol=1e-13)
    return torch.from_numpy(f0 + (kernel @ found.y[:, -1]).reshape(shape))


def spectrum(values, seed=0):
    """A symmetric matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(seed)
    turn = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))[0]
    return (turn * values) @ turn.T
