"""Distillation over a process group: what a rank returns, and what one process would."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import ntkops
from ntkops import distill
from ntkops.operators.capabilities import taken_columns

from .problems import block, generator, network, samples, share

Parts = dict[str, Any]

COLUMNS = torch.tensor([20, 3, 20, 0, 11])
NEW = (0, 2, 2, 6)  # shares of new samples


def kernels(x: Any, **group: Any) -> Parts:
    """Return kernels of all kinds: class kernels, over all outputs, projected, scaled, in a sequence."""
    each = ntkops.ntk(network(), x, outputs="each", **group)
    whole = ntkops.ntk(network(), x, outputs="all", **group)
    projected = ntkops.projected_ntk(each, 40, generator=generator())
    single = [ntkops.ntk(network(), x, outputs=c, **group) for c in range(2)]
    return {
        "each": each,
        "all": whole,
        "projected": projected,
        "one": single[0],
        "sequence": single,
        "multiple": 2 * single[0],
        "sum": single[0] + single[1],
        "ridge": single[0].add_jitter(0.5),
    }


SINGLE = ("each", "all", "projected", "one", "multiple", "sum", "ridge")
METHODS = ("random", "fps", "rpcholesky", "greedy")
CROSSED = ("each", "all", "projected", "one")


def found(here: slice, there: slice, **group: Any) -> Parts:
    """Return columns, chosen points and predictions of some samples for some new ones."""
    every, results, new = kernels(samples()[here], **group), {}, samples(count=6, seed=9)[there]
    for name in SINGLE:
        results["columns", name] = taken_columns(every[name], COLUMNS)
    for name in ("each", "all", "projected", "sequence"):
        for method in METHODS:
            chosen = distill.select(every[name], 7, method, generator=generator())
            results["points", name, method] = chosen.indices
            results["details", name, method] = chosen.info.details
    for name, inducing in (("each", [20, 3, 11]), ("all", [20, 3, 11]), ("one", "random")):
        K, number = every[name], 5 if inducing == "random" else None
        Q = ntkops.nystrom_ntk(K, inducing, num_inducing=number, generator=generator())
        width = 3 if name == "all" else 1
        v = block(2, 23 * width)[here.start * width : here.stop * width]
        results["nystrom", name] = Q @ v
        results["nystrom diagonal", name] = Q.diagonal(0, -2, -1)
        results["nystrom cross", name] = Q.cross(new) @ v
        results["inducing", name] = (Q.indices.tolist(), Q.seed, Q.rank)
    labels = torch.tanh(samples() @ torch.ones(5, 3, dtype=torch.float64) + torch.arange(3))
    for name in CROSSED:
        K = every[name]
        Y = (labels if name != "one" else labels[:, 0])[here]
        chosen = distill.select(K, 9, "greedy", Y=Y)
        results["targets", name] = chosen.targets
        for fit in ("nystrom", "sketch"):
            fitted = chosen.fit(K, Y, ridge=1e-3 if fit == "nystrom" else [1e-3, 1e-2], fit=fit)
            cross = K.cross(new)
            results["predictions", name, fit] = fitted.predict(cross)
            results["dual", name, fit] = fitted.dual_coef_
            results["coefficients", name, fit] = fitted.coef_
            prior = torch.full(cross.shape[:-1], 1e3, dtype=torch.float64)
            results["variance", name, fit] = fitted.variance(cross, prior)
    return results


def over_ranks(rank: int, count: int) -> Parts:
    """Return what this rank finds, and what is refused on it."""
    part = share(rank, count)
    results = found(part, slice(NEW[rank], NEW[rank + 1]), group="world")
    each = ntkops.ntk(network(), samples()[part], outputs="each", group="world")
    Y = torch.zeros(part.stop - part.start, 3, dtype=torch.float64)
    chosen = distill.select(each, 3, "random", generator=generator(rank))  # all draw what rank 0 does
    results["seeds"] = chosen.indices
    U = torch.ones(each.shape[-1], 2, dtype=torch.float64)
    bad = Y.clone()
    if rank == count - 1:
        bad[0, 0] = torch.nan
    fitted = chosen.fit(each, Y + 1)
    calls: dict[str, Callable[[], Any]] = {
        "leverage": lambda: distill.select(each, 3, "leverage"),
        "kmedoids": lambda: distill.select(each, 3, "kmedoids"),
        "labels": lambda: distill.select(each, 3, "random", labels=torch.zeros(each.shape[-1]).long()),
        "too many": lambda: distill.select(each, 24, "random"),
        "coefficients": lambda: distill.Distilled.of(each, U),
        "other points": lambda: distill.Distilled.of(each, [rank]),
        "no such point": lambda: distill.Distilled.of(each, [23]),
        "no such column": lambda: taken_columns(each, torch.tensor([23])),
        "loo": lambda: chosen.fit(each, Y, ridge="loo"),
        "a label that is not finite": lambda: chosen.fit(each, bad),
        "operator": lambda: chosen.operator(each),
        "cross": lambda: chosen.cross(each),
        "weights": lambda: fitted.weights(),
        "predictor": lambda: fitted.predictor(),
        "score": lambda: fitted.score(each, Y),
        "class_mean": lambda: distill.class_mean(each),
        "synthesize": lambda: distill.synthesize(each, 2),
        "spectral_clusters": lambda: distill.spectral_clusters(each, 2),
        "local_global": lambda: distill.local_global(each, Y, 2, 0.1, 0.1),
        "containment": lambda: distill.containment(each, 2),
        "properties": lambda: distill.local_global_properties(each, 2),
        "kernel_inducing": lambda: distill.kernel_inducing(each, 2),
        "variance_coverage": lambda: distill.variance_coverage(each, chosen),
        "nystrom_error": lambda: distill.nystrom_error(each, chosen),
        "transfer": lambda: distill.transfer_accuracy(each, chosen, Y, each, Y.argmax(1)),
        "variance error": lambda: distill.posterior_variance_error(
            each, chosen, each, each.diagonal(0, -2, -1)
        ),
    }
    calls |= {
        "nystrom of inputs": lambda: ntkops.nystrom_ntk(each, samples()[:4]),
        "nystrom by pivots": lambda: ntkops.nystrom_ntk(each, "rpcholesky", num_inducing=3),
        "nystrom of a sum": lambda: ntkops.nystrom_ntk(each + each, [0, 1]),
        "nystrom of other points": lambda: ntkops.nystrom_ntk(each, [rank]),
        "nystrom of no such point": lambda: ntkops.nystrom_ntk(each, [23]),
    }
    for name, call in calls.items():
        try:
            call()
            results["refused", name] = "nothing"
        except ntkops.NtkopsError as error:
            results["refused", name] = type(error).__name__
        except Exception as error:
            results["refused", name] = f"not ours: {type(error).__name__}: {error}"
    return results


def of_one_process() -> Parts:
    """Return the same of one process."""
    return found(slice(0, 23), slice(None))
