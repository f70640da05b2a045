"""Trajectories over ranks beside those of one process."""

from __future__ import annotations

import torch

import ntkops

from .problems import CUTS, SAMPLES, network, samples, share

__all__ = ["compare_trajectories"]


def compare_trajectories(rank: int, count: int) -> dict[str, float]:
    """Return the largest difference of outputs of this rank's samples, by what was trained."""
    x, here = samples(), share(rank, count)
    assert CUTS[count][-1] == SAMPLES
    labels = torch.sin(torch.arange(SAMPLES * 3).double()).reshape(SAMPLES, 3)
    classes = torch.arange(SAMPLES) % 3
    spread = ntkops.ntk(network(), x[here], group="world")
    whole = ntkops.ntk(network(), x)
    found = {}

    def compare(name: str, train, target) -> None:
        one = train(spread, target[here])
        other = train(whole, target)
        gap = float((one.outputs - other.outputs[:, here]).abs().max()) if len(x[here]) else 0.0
        found[name] = gap + float((one.losses - other.losses).abs().max())
        change, expected = (path.weights(float(path.times[1])) for path in (one, other))
        found[f"{name} weights"] = max(float((change[n] - expected[n]).abs().max()) for n in expected)
        if not one.info.converged:
            found[name] = float("inf")

    times = [0.5, 20.0]
    options = {"offset": "network", "tol": 1e-11}
    compare("flow", lambda K, Y: ntkops.gradient_flow(K, Y, times, method="krylov", **options), labels)
    compare(
        "decay",
        lambda K, Y: ntkops.gradient_flow(K, Y, [1.0, float("inf")], weight_decay=0.1, **options),
        labels,
    )
    compare("descent", lambda K, Y: ntkops.gradient_descent(K, Y, [1, 30], lr=0.1, **options), labels)
    compare(
        "entropy",
        lambda K, Y: ntkops.gradient_flow(K, Y, times, loss="cross_entropy", offset="network", tol=1e-8),
        classes,
    )
    path = ntkops.gradient_flow(spread, labels[here], times, **options)
    reference = ntkops.gradient_flow(whole, labels, times, **options)
    new = samples(count=6, seed=8)
    cut = slice(rank * 6 // count, (rank + 1) * 6 // count)
    predicted = path.predict(spread.cross(new[cut]))
    expected = reference.predict(whole.cross(new))[:, cut]
    found["predict"] = float((predicted - expected).abs().max()) if len(new[cut]) else 0.0
    return found
