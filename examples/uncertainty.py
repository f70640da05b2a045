"""How sure a network is: digits with a class that it never saw, and a regression with intervals.

Run it with ``python examples/uncertainty.py``. A network is trained on the digits 0 to 8 and asked about all
ten: `ntkops.LinearizedLaplace` says from its kernel what the weights leave open. Then `ntkops.KernelRidge`
with ``ridge="evidence"`` predicts the progress of diabetes with intervals, held against what happened.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ntkops
from ntkops.plotting import plot_calibration, plot_ridge_path

__all__ = ["diabetes", "digits", "draw", "main"]

UNSEEN = 9


def train(model: nn.Module, x: Tensor, y: Tensor, precision: float) -> None:
    """Minimise the negative log posterior of the weights."""
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y, reduction="sum")
        loss = loss + precision / 2 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)


def draws(logits: Tensor, covariance: Any, count: int = 100, step: int = 20) -> Tensor:
    """Draw logits of each sample, ``(count, M, C)``, from its block of the lazy joint covariance."""
    (samples, classes), generator = logits.shape, torch.Generator().manual_seed(0)
    roots = []
    for start in range(0, samples, step):
        stop = min(start + step, samples)
        rows = slice(start * classes, stop * classes)
        dense = covariance[rows, rows].to_dense().unflatten(0, (-1, classes)).unflatten(2, (-1, classes))
        values, vectors = torch.linalg.eigh(dense.diagonal(dim1=0, dim2=2).movedim(-1, 0))  # (step, C, C)
        roots.append(vectors * values.clamp(min=0).sqrt().unsqueeze(-2))
    noise = torch.randn(count, samples, classes, 1, generator=generator, dtype=logits.dtype)
    return logits + (torch.cat(roots) @ noise).squeeze(-1)


def digits(samples: int = 300, tests: int = 150, width: int = 24) -> dict[str, Any]:
    """Train on nine digits, and ask about ten."""
    from sklearn.datasets import load_digits

    images, numbers = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x, y = (torch.from_numpy(images) / 16)[order], torch.from_numpy(numbers)[order]
    seen, unseen = ((y != UNSEEN).nonzero().squeeze(1), (y == UNSEEN).nonzero().squeeze(1))
    known, asked = seen[:samples], torch.cat([seen[samples : samples + tests], unseen[:tests]])
    x_new, y_new = x[asked], y[asked]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 9)).double()
    train(model, x[known], y[known], 0.1)
    K = ntkops.ntk(model, x[known])
    post = ntkops.LinearizedLaplace(0.1).fit(K, y[known])
    precisions = torch.logspace(-3, 2, 21, dtype=torch.float64)
    evidence = [float(post.log_marginal_likelihood(p)) for p in precisions]
    best = float(precisions[torch.tensor(evidence).argmax()])
    train(model, x[known], y[known], best)  # with the decay that the evidence prefers
    K = ntkops.ntk(model, x[known])
    post = ntkops.LinearizedLaplace(best).fit(K, y[known])
    logits, covariance = post.predict(K.cross(x_new), prior=ntkops.ntk(model, x_new), return_cov=True)
    plain = logits.softmax(-1)
    drawn = draws(logits, covariance).softmax(-1)  # (draws, M, C)
    averaged = drawn.mean(0)
    return {
        "precisions": precisions,
        "evidence": evidence,
        "best": best,
        "labels": y_new,
        "unseen": y_new == UNSEEN,
        "doubt": drawn.var(0).sum(-1),
        "plain": plain,
        "averaged": averaged,
        "post": post,
    }


def separation(score: Tensor, unseen: Tensor) -> float:
    """Return how often an unseen sample has a higher score than a seen one."""
    return float((score[unseen][:, None] > score[~unseen]).double().mean())


def diabetes(samples: int = 300, width: int = 256) -> dict[str, Any]:
    """Regression with the kernel of a random network, its ridge and scale by evidence."""
    from sklearn.datasets import load_diabetes

    data, target = load_diabetes(return_X_y=True)
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(1))
    x = torch.from_numpy(data)[order] * len(data) ** 0.5  # features of unit variance
    y = torch.from_numpy(target)[order]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, width), nn.Tanh(), nn.Linear(width, 1)).double()
    K = ntkops.ntk(model, x[:samples], outputs=0)
    fit = ntkops.KernelRidge("evidence", offset=float(y[:samples].mean())).fit(K, y[:samples])
    new = ntkops.ntk(model, x[samples:], outputs=0)
    mean, std = fit.predict(K.cross(x[samples:]), prior=new, return_std=True)
    spread = (std.square() + fit.noise_scale_**2).sqrt()
    return {"fit": fit, "y": y[samples:], "mean": mean, "std": std, "spread": spread}


def draw(first: dict[str, Any], second: dict[str, Any]) -> Any:
    """Return the figure: confidence and calibration of both, and the evidence of ridges."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 4), layout="constrained")
    axes = figure.subplots(1, 4)
    bins = torch.linspace(0, 1, 26).tolist()
    for name, colour, probabilities in (
        ("network", "#0072B2", first["plain"]),
        ("posterior", "#D55E00", first["averaged"]),
    ):
        confidence = probabilities.max(-1).values[first["unseen"]]
        axes[0].hist(confidence.numpy(), bins, color=colour, alpha=0.6, label=name)
        seen = ~first["unseen"]
        plot_calibration(first["labels"][seen], probabilities[seen], ax=axes[1], label=name)
    axes[0].set_title(f"confidence at the unseen {UNSEEN}")
    axes[0].set_xlabel("probability of the most likely class")
    axes[0].legend(fontsize="small")
    axes[1].set_title("digits that were seen")
    plot_ridge_path(second["fit"].ridge_path_, axes[2])
    axes[2].set_title("diabetes: the ridge")
    plot_calibration(second["y"], second["mean"], second["spread"], axes[3], label="with noise")
    plot_calibration(second["y"], second["mean"], second["std"], axes[3], label="mean alone")
    axes[3].set_title("diabetes: intervals")
    return figure


def main(arguments: list[str] | None = None) -> None:
    """Compute, print, and write the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("uncertainty.png"))
    parser.add_argument("--quick", action="store_true", help="small sizes: shows that it runs")
    given = parser.parse_args(arguments)
    first = digits(40, 20, 4) if given.quick else digits()
    second = diabetes(60, 16) if given.quick else diabetes()
    seen = ~first["unseen"]
    right = (first["plain"].argmax(-1) == first["labels"])[seen].double().mean()
    print(f"digits: prior precision {first['best']:.3g}, accuracy on seen digits {float(right):.3f}")
    for name in ("plain", "averaged"):
        confidence = first[name].max(-1).values
        chosen = first[name][seen].gather(1, first["labels"][seen].unsqueeze(1))
        print(
            f"  {name:8s}: confidence {float(confidence[seen].mean()):.3f} at seen digits, "
            f"{float(confidence[first['unseen']].mean()):.3f} at the unseen {UNSEEN}; "
            f"separated in {separation(-confidence, first['unseen']):.1%} of pairs; "
            f"log-likelihood {float(chosen.log().mean()):.3f}"
        )
    doubt = separation(first["doubt"], first["unseen"])
    print(f"  the variance of the drawn probabilities separates {doubt:.1%} of pairs")
    fit, residual = second["fit"], second["y"] - second["mean"]
    inside = (residual.abs() < 1.96 * second["spread"]).double().mean()
    print(
        f"diabetes: ridge {fit.ridge_ / fit.scale_:.3g} of the mean diagonal, noise {fit.noise_scale_:.1f}, "
        f"root mean square error {float(residual.square().mean().sqrt()):.1f}, "
        f"{float(inside):.1%} of new labels inside their 95 % intervals"
    )
    draw(first, second).savefig(given.out, dpi=110)


if __name__ == "__main__":
    main()
