"""Structure of the kernels: their spectra, what clusters contain of them, and what choosing points costs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from _distilled_curves import rounded, seeded
from _distilled_networks import Problem
from torch import Tensor

import ntkops
from ntkops.distill import (
    containment,
    local_global,
    local_global_properties,
    random_clusters,
    select,
    spectral_clusters,
    synthesize,
)

__all__ = ["clusters_and_spectra", "costs", "galerkin_distance", "spectra"]

Row = dict[str, Any]
EPSILON = 0.05


def spectra(problem: Problem, *, shown: bool) -> Row:
    """Figure 2: eigenvalues of the class kernels as shares of the trace, and truncation ranks."""
    values = torch.linalg.eigvalsh(problem.K).flip(-1).clamp(min=0)
    mean = torch.linalg.eigvalsh(problem.mean).flip(-1).clamp(min=0)
    shares = values / values.sum(-1, keepdim=True)
    return {
        "m": problem.K.shape[-1],
        "values": [[rounded(float(v), 3) for v in row[:200]] for row in shares] if shown else [],
        "ranks": [_rank(row, EPSILON) for row in values],
        "ranks_99": [_rank(row, 0.01) for row in values],
        "mean_rank": _rank(mean, EPSILON),
        "negative_entries": rounded(float((problem.mean < 0).double().mean()), 3),
    }


def _rank(values: Tensor, epsilon: float) -> int:
    shares = values.cumsum(0) / values.sum()
    return int((shares < 1 - epsilon - 1e-12).sum()) + 1


def clusters_and_spectra(problem: Problem, clusters: int, num_random: int, *, maps: bool) -> list[Row]:
    """Figures 4 and 8: properties (A) and (B) for each class and for the mean, with random partitions."""
    rows = []
    for label, kernel in [*enumerate(problem.K), ("mean", problem.mean)]:
        labels = spectral_clusters(kernel, clusters, generator=seeded())
        found = local_global_properties(kernel, labels, EPSILON, num_random=num_random, generator=seeded(1))
        row: Row = {
            "class": label,
            "rank": found.global_rank,
            "pooled": rounded(found.pooled_containment, 7),
            "pooled_bound": rounded(found.pooled_bound, 7),
            "untruncated": rounded(found.untruncated_containment, 7),
            "untruncated_bound": rounded(found.untruncated_bound, 7),
            "least_cluster": rounded(float(found.local_containment.min())),
            "weighted_gap": rounded(found.weighted_gap),
            "gap_bound": rounded(found.weighted_gap_bound),
            "mean_gap": rounded(found.mean_gap),
            "single_gap": rounded(found.single_gap),
            "random": [
                {
                    "pooled": rounded(r.pooled_containment, 7),
                    "untruncated": rounded(r.untruncated_containment, 7),
                    "least_cluster": rounded(float(r.local_containment.min())),
                    "weighted_gap": rounded(r.weighted_gap),
                    "mean_gap": rounded(r.mean_gap),
                    "single_gap": rounded(r.single_gap),
                }
                for r in found.random
            ],
        }
        if maps and label != "mean":
            map_ = containment(kernel, labels, EPSILON)
            random = containment(kernel, random_clusters(labels, generator=seeded(2)), EPSILON)
            row["cumulative"] = _short(map_.cumulative)
            row["random_cumulative"] = _short(random.cumulative.mean(0))
            row["variance"] = _short(map_.variance)
            row["alignment_max"] = _short(map_.alignment.amax(0))
            row["alignment_mean"] = _short(map_.alignment.mean(0))
            row["union"] = _short(map_.union)
            row["random_union"] = _short(random.union)
        rows.append(row)
    return rows


def _short(values: Tensor) -> Any:
    if values.dim() == 1:
        return [rounded(float(v), 3) for v in values]
    return [_short(row) for row in values]


def galerkin_distance(problem: Problem, full: Tensor, ridge: float) -> float:
    """Return how far the prediction from C Galerkin vectors is from the full one, relative to the largest."""
    classes = problem.K.shape[0]
    found = synthesize(problem.K, classes, "galerkin", Y=problem.targets, ridge=ridge, generator=seeded())
    predictions = found.fit(problem.K, problem.targets, ridge=ridge, fit="sketch").predict(problem.cross)
    return float((predictions - full).abs().max() / full.abs().max())


def costs(problem: Problem, sizes: Sequence[int], s: int) -> list[Row]:
    """Table 1: time of every method for n points, kernel given, and how it grows with n."""
    model, x = problem.model, problem.data.x[: max(sizes)].double()
    traced = ntkops.ntk(model, x, outputs="trace").to_dense().detach()
    with torch.no_grad():
        targets = model(x)

    def algorithm(K: Tensor, Y: Tensor) -> object:
        return local_global(K, Y, 10, 0.8, 0.8, generator=seeded())

    work: dict[str, Callable[[Tensor, Tensor], object]] = {
        **{m: (lambda K, Y, m=m: select(K, s, m, generator=seeded())) for m in _SELECTIONS},
        **{
            m: (lambda K, Y, m=m: synthesize(K, s, m, Y=Y, generator=seeded()))
            for m in ("pca", "kmeans", "krylov")
        },
        "algorithm 1": algorithm,
    }
    rows = []
    for name, make in work.items():
        times = []
        for n in sizes:
            K, Y = traced[:n, :n].contiguous(), targets[:n]
            samples = []
            for _ in range(3):
                started = time.process_time()
                make(K, Y)
                samples.append(time.process_time() - started)
            times.append(min(samples))
        growth = math.log(times[-1] / times[-2]) / math.log(sizes[-1] / sizes[-2])
        rows.append(
            {
                "method": name,
                "sizes": list(sizes),
                "seconds": [rounded(t, 3) for t in times],
                "growth": rounded(growth, 3),
            }
        )
    return rows


_SELECTIONS = ("random", "leverage", "fps", "kmedoids", "rpcholesky")
