"""A network that solves u'' = -1: which loss is learned faster, and which weights balance them?

Run as: python examples/stacked_functions.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import ntkops


def main() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)).double()

    def u(p: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(net, p, (x,))

    def residual(p: dict[str, Tensor], x: Tensor) -> Tensor:
        def slope(z: Tensor) -> Tensor:
            return grad(lambda y: functional_call(net, p, (y[None],))[0, 0])(z)[0]

        return vmap(grad(slope))(x) + 1

    ends, inside = torch.tensor([[0.0], [1.0]]).double(), torch.rand(60, 1).double()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-5)
    weights = {"u": 1.0, "r": 1.0}
    for step in range(31):
        params = dict(net.named_parameters())
        if step % 10 == 0:
            J = ntkops.stack(
                {
                    "u": ntkops.jacobian(u, ends, params=params),
                    "r": ntkops.jacobian(residual, inside, params=params),
                }
            )
            K = J @ J.mT
            weights = ntkops.balance(K)
            largest = float(ntkops.eigsh(K.weighted(weights), 1).values[0])
            shown = ", ".join(f"{name} {weight:.2f}" for name, weight in weights.items())
            print(f"step {step}: weights {shown}; largest eigenvalue of the weighted kernel {largest:.3g}")
        loss = weights["u"] * u(params, ends).square().sum() / 2
        loss = loss + weights["r"] * residual(params, inside).square().sum() / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
