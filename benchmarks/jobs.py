"""Jobs of the field against the plain way of doing them: CPU time, ratios within one run (docs/jobs.md)."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from _measure import agreement, interleaved, ratio, summaries
from _models import cnn, mlp, normal, seeded
from _tables import Benchmark, say, table, verdict
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

import ntkops

Work = Callable[[], Tensor]


@dataclass(frozen=True)
class Job:
    """A job in two ways that give the same numbers: what it is, the largest ratio claimed, both ways."""

    title: str
    most: float
    make: Callable[[bool], tuple[Work, Work]]  # of small size or not: the library's way, and the plain one
    tolerance: float = 1e-10


def nine_layers() -> nn.Module:
    """Return eight convolutions and a linear layer."""
    layers = list(cnn([3, 16, 16, 16, 32, 32, 32, 32, 32]))
    return nn.Sequential(*layers[:6], nn.AvgPool2d(2), *layers[6:])


def partition(quick: bool) -> tuple[Work, Work]:
    """Traces, norms and alignments of nine layers, against one sweep over the kernel for its norm."""
    model = ntkops.linearize(seeded(nine_layers))
    # Tiles alone: nothing dense is kept from one timing to the next.
    made = ntkops.ntk(model, normal(6 if quick else 64, 3, 16, 16), max_dense_bytes=0)
    return (
        lambda: ntkops.partition(made).whole_norm.value,
        lambda: ntkops.frobenius_norm(made, method="exact").value,
    )


def small_networks() -> list[nn.Module]:
    """Return twelve networks with three convolutions, new modules each time."""
    acts = (nn.Tanh, nn.ReLU)
    return [seeded(partial(cnn, [3, 16, 16, 32], act=acts[seed % 2]), seed=seed) for seed in range(12)]


def compare(quick: bool) -> tuple[Work, Work]:
    """Traces of networks that nothing is known of, by as many probes, which are not the same ones."""
    x = normal(4 if quick else 32, 3, 16, 16)

    def ours() -> Tensor:
        return ntkops.compare(small_networks(), x, generator=torch.Generator().manual_seed(2))["trace"]

    def plain() -> Tensor:
        traces = []
        for model in small_networks():
            params = {name: value.detach() for name, value in model.named_parameters()}
            generator = torch.Generator().manual_seed(3)
            total = torch.zeros(())
            for _ in range(4):
                probe = {
                    name: torch.randn(value.shape, generator=generator) for name, value in params.items()
                }
                _, moved = jvp(partial(_called, model, x), (params,), (probe,))
                total += moved.square().sum()
            traces.append(total / 4)
        return torch.stack(traces)

    return ours, plain


def predictor(quick: bool) -> tuple[Work, Work]:
    """Predictions of new samples by one jvp each, against a product with the kernel across them."""
    network = seeded(mlp, 20, 64, 64, 10).double()
    x, new = (normal(count, 20, seed=count).double() for count in ((40, 8) if quick else (3000, 100)))
    # Products alone: nothing dense is kept from one timing to the next.
    K = ntkops.ntk(network, x, max_dense_bytes=0)
    fitted = ntkops.KernelRidge(1e-2, tol=1e-2).fit(K, torch.sin(x[:, :10]))
    predict, alpha = fitted.predictor(), fitted.dual_coef_.reshape(-1, 1)
    return (
        lambda: predict(new),
        lambda: (K.cross(new) @ alpha).reshape(-1, 10),
    )


def _called(model: nn.Module, x: Tensor, params: dict[str, Tensor]) -> Tensor:
    return functional_call(model, params, (x,))


def pinn(count: int) -> Callable[[bool], tuple[Work, Work]]:
    """Return a job: traces of blocks and eigenvalues for values and Laplacians at ``count`` points each."""
    # Linearising is timed, too: the functions are the same, as in training, and their parameters new.

    def make(quick: bool) -> tuple[Work, Work]:
        points = 8 if quick else count
        net = seeded(mlp, 2, 50, 50, 50, 1).double()
        params = {name: value.detach() for name, value in net.named_parameters()}
        ends, inside = torch.rand(2, points, 2, generator=torch.Generator().manual_seed(1)).double()

        def value(p: dict[str, Tensor], z: Tensor) -> Tensor:
            return functional_call(net, p, (z[None],))[0, 0]

        def laplacian(p: dict[str, Tensor], z: Tensor) -> Tensor:
            return hessian(lambda y: value(p, y))(z).diagonal().sum()

        def u(p: dict[str, Tensor], x: Tensor) -> Tensor:
            return functional_call(net, p, (x,))

        def residual(p: dict[str, Tensor], x: Tensor) -> Tensor:
            return vmap(lambda z: laplacian(p, z))(x)

        def fresh() -> dict[str, Tensor]:
            return {name: value.clone() for name, value in params.items()}

        def ours() -> Tensor:
            now = fresh()
            J = ntkops.stack(
                {
                    "u": ntkops.jacobian(u, ends, params=now),
                    "r": ntkops.jacobian(residual, inside, params=now),
                }
            )
            K = J @ J.mT
            eigenvalues = torch.linalg.eigvalsh(K.to_dense())
            return torch.cat([K.blocks.trace.value, eigenvalues])

        def plain() -> Tensor:
            now, rows = fresh(), []
            for function, x in ((value, ends), (laplacian, inside)):
                gradients = vmap(grad(function), (None, 0))(now, x)
                rows.append(torch.cat([part.flatten(1) for part in gradients.values()], dim=1))
            J = torch.cat(rows)
            K = J @ J.mT
            traces = torch.stack([K[:points, :points].trace(), K[points:, points:].trace()])
            return torch.cat([traces, torch.linalg.eigvalsh(K)])

        return ours, plain

    return make


def written_down(model: nn.Module, *x: Tensor) -> Tensor:
    """Return J of all outputs of one call, ``(outputs, P)``, by torch.func."""
    params = {name: value.detach() for name, value in model.named_parameters()}
    parts = jacrev(lambda p: functional_call(model, p, x).flatten())(params)
    return torch.cat([part.flatten(1) for part in parts.values()], dim=1)


class _Graph(nn.Module):
    """Two graph convolutions, outputs (nodes, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(32, 64), nn.Linear(64, 4)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        return adjacency @ self.last(torch.relu(adjacency @ self.first(x)))


def graph(quick: bool) -> tuple[Work, Work]:
    """Return the kernel of all nodes and classes of one graph."""
    torch.manual_seed(0)
    model, nodes = _Graph().double(), 20 if quick else 250
    linked = (torch.rand(nodes, nodes) < 0.05) | torch.eye(nodes).bool()
    adjacency = linked.double() / linked.sum(1, keepdim=True)
    x = torch.randn(nodes, 32, dtype=torch.float64)
    point = ntkops.linearize(model, batch_dim=None)

    def plain() -> Tensor:
        J = written_down(model, x, adjacency)
        return J @ J.mT

    return lambda: ntkops.ntk(point, (x, adjacency)).to_dense(), plain


class _Tagger(nn.Module):
    """A small transformer, outputs (samples, positions, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.tags = nn.Embedding(50, 32), nn.Linear(32, 3)
        self.layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)

    def forward(self, tokens: Tensor, real: Tensor) -> Tensor:
        return self.tags(self.layer(self.words(tokens), src_key_padding_mask=~real))


def padded(sequences: list[Tensor]) -> dict[str, Tensor]:
    """Pad token numbers with zeros, which are no token."""
    tokens = nn.utils.rnn.pad_sequence(sequences, batch_first=True)
    return {"tokens": tokens, "real": tokens != 0}


def unlike_lengths(quick: bool) -> tuple[Work, Work]:
    """Return the kernel of sequences of 4 to 24 tokens, padded in batches, against one after the other."""
    torch.manual_seed(0)
    model = _Tagger().double()
    lengths = torch.randint(4, 25, (4 if quick else 48,)).tolist()
    sequences = [torch.randint(1, 50, (length,)) for length in lengths]
    point = ntkops.linearize(model)
    batches = ntkops.Batches(sequences, 8, collate=padded, mask="real")

    def plain() -> Tensor:
        J = torch.cat([written_down(model, *padded([one]).values()) for one in sequences])
        return J @ J.mT

    return lambda: ntkops.ntk(point, batches).to_dense(), plain


JOBS = {
    "partition": Job("partition of a 9-layer CNN, against one kernel's sweep", 1.3, partition, 1e-6),
    "compare": Job("traces of 12 small CNNs, 4 jvps each, against torch.func", 2.0, compare, 0.5),
    "pinn_400": Job("kernel of a PINN, second derivatives, N = 400, against torch.func", 1.5, pinn(400)),
    "pinn_60": Job("kernel of a PINN, second derivatives, N = 60, against torch.func", 3.0, pinn(60)),
    "graph": Job("node kernel of a GCN, 250 nodes, 4 classes, against torch.func", 2.0, graph),
    "unlike_lengths": Job(
        "kernel of 48 sequences of 4 to 24 tokens, against torch.func", 3.0, unlike_lengths
    ),
    "predictor": Job("100 predictions by jvps, N = 3000, against K.cross(x) @ α", 0.25, predictor, 1e-9),
}


def measure_job(name: str, *, quick: bool = False, repetitions: int = 5) -> dict[str, Any]:
    """Compare both ways of a job, and time them."""
    job = JOBS[name]
    ours, plain = job.make(quick)
    close = agreement(name, {"ours": ours()}, plain(), job.tolerance)
    series = interleaved({"ours": ours, "plain": plain}, repetitions)
    return {
        "job": name, "title": job.title, "difference": close["ours"], "time": summaries(series),
        "ratio": ratio(series["ours"], series["plain"]),
    }  # fmt: skip


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measure jobs."""
    entries = []
    for name in options.parts:
        say(name)
        entries.append(measure_job(name, quick=options.quick, repetitions=options.repetitions))
    return {"jobs": entries}


def judge(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Say of each job whether it takes at most what is claimed."""
    what = "CPU time, times the plain way"
    return [
        verdict(what, e["title"], e["ratio"]["cpu"]["median"], most=JOBS[e["job"]].most)
        for e in result["jobs"]
    ]


def tables(result: Mapping[str, Any]) -> list[str]:
    """Return what each job takes."""
    return table(result["jobs"], {"job": "title", "CPU time, times the plain way": "ratio.cpu"})


BENCHMARK = Benchmark(
    "jobs", __doc__, measure, tables, judge, parts=tuple(JOBS), key=("job",), repetitions=(7, 2)
)
main = BENCHMARK.main

if __name__ == "__main__":
    sys.exit(main())
