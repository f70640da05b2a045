"""Coupled samples, the nodes of a graph, and an axis for each input, against dense Jacobians by torch."""

from __future__ import annotations

import functools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ntkops
from ntkops.errors import (
    CoupledSamplesError,
    DenseMemoryError,
    InputError,
    NonFiniteError,
    ShapeError,
    StaleOperatorError,
    UnsupportedOperationError,
)
from tests.pairs import pairs

from ..laws.reference import close, jacobian, normal

NODES, C = 6, 3
TOLERANCES = {torch.float64: 1e-12, torch.float32: 5e-6}
ENGINES = ("auto", "autograd")


class GCN(nn.Module):
    """Two convolutions over a graph; rules cover all of it but the scale."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, C, bias=False)
        self.scale = nn.Parameter(torch.tensor(1.3))

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        hidden = torch.tanh(adjacency @ self.first(x))
        return adjacency @ self.last(hidden) * self.scale


def model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return GCN().to(dtype)


def graph(count: int = NODES, seed: int = 1, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """A random graph of the numbers of float32."""
    linked = (normal(count, count, seed=seed) > 0.5).float()
    linked = ((linked + linked.mT + torch.eye(count)) > 0).float()
    adjacency = linked / linked.sum(1, keepdim=True)
    return normal(count, 4, seed=seed + 50, dtype=torch.float32).to(dtype), adjacency.to(dtype)


@functools.cache
def rows(count: int = NODES, seed: int = 1) -> Tensor:
    """J in float64, (nodes, C, P)."""
    x, adjacency = graph(count, seed, torch.float32)
    J = jacobian(model(torch.float32).double(), (x.double(), adjacency.double()))
    return J.unflatten(0, (count, C))


def contracted(left: Tensor, right: Tensor, outputs: Any) -> Tensor:
    if outputs == "each":
        return torch.einsum("acp,bcp->cab", left, right)
    if outputs == "trace":
        return torch.einsum("acp,bcp->ab", left, right)
    if outputs != "all":
        numbers = [outputs] if isinstance(outputs, int) else list(outputs)
        left, right = left[:, numbers], right[:, numbers]
    return left.flatten(0, 1) @ right.flatten(0, 1).mT


@functools.cache
def point(dtype: torch.dtype) -> ntkops.Linearization:
    return ntkops.linearize(model(torch.float32).to(dtype), batch_dim=None)


@pytest.mark.parametrize(
    "outputs, engine, dtype", pairs(["all", "each", "trace", 1, [2, 0]], ENGINES, TOLERANCES), ids=str
)
def test_node_kernels(outputs: Any, engine: str, dtype: torch.dtype):
    x, lin = graph(dtype=dtype), point(dtype)
    expected = contracted(rows(), rows(), outputs)
    K = ntkops.ntk(lin, x, outputs=outputs, engine=engine)
    assert K.shape == expected.shape and K.num_samples == NODES and K.output_shape == (C,)
    assert K.num_outputs == expected.shape[-1] // NODES
    close(K.to_dense(), expected, TOLERANCES[dtype])
    close(K.diagonal(), expected.diagonal(dim1=-2, dim2=-1), TOLERANCES[dtype])
    vectors = normal(*expected.shape[:-1], 2, seed=3, dtype=dtype)
    lazy = ntkops.ntk(lin, x, outputs=outputs, engine=engine, max_dense_bytes=0)
    close(lazy @ vectors, expected @ vectors.double(), TOLERANCES[dtype])
    with pytest.raises(DenseMemoryError):
        lazy.to_dense()
    new = graph(9, 2, dtype)
    crossed = contracted(rows(9, 2), rows(), outputs)
    for found in (lazy.cross(new), ntkops.ntk(lin, new, x, outputs=outputs, engine=engine)):
        assert found.num_samples == 9
        close(found @ vectors, crossed @ vectors.double(), TOLERANCES[dtype])
    close(K.cross(new).to_dense(), crossed, TOLERANCES[dtype])


@pytest.mark.parametrize("engine", ENGINES)
def test_a_dense_kernel_takes_a_backward_pass_a_row_and_a_product_two_passes(engine: str):
    K = ntkops.ntk(model(), graph(), batch_dim=None, engine=engine)
    with ntkops.engines.passes.count_passes() as passes:
        K.to_dense()
    assert passes.total <= NODES * C
    lazy = ntkops.ntk(model(), graph(), batch_dim=None, engine="autograd", max_dense_bytes=0)
    with ntkops.engines.passes.count_passes() as passes:
        lazy @ torch.ones(NODES * C, dtype=torch.float64)
    assert passes.count.vjp == passes.count.jvp == passes.total / 2 == 1


def test_a_jacobian_and_what_a_kernel_keeps():
    net, x = model(), graph()
    point = ntkops.linearize(net, batch_dim=None)
    J = ntkops.jacobian(point, x, axes=("class",))
    close(J.to_dense(), rows().flatten(0, 1), 1e-12)
    close(J[3:5].to_dense(), rows().flatten(0, 1)[3:5], 1e-12)
    K = J @ J.mT
    assert K.axes == {"class": C} and K.num_samples == NODES
    other = ntkops.jacobian(point, graph(9, 2), axes=("class",))
    close((other @ J.mT).to_dense(), contracted(rows(9, 2), rows(), "all"), 1e-12)
    expected = contracted(rows(), rows(), "all")
    close(pickle.loads(pickle.dumps(K)).to_dense(), expected, 1e-12)
    close(K.to(torch.float32).to_dense(), expected, 5e-6)
    numbers = torch.tensor([7, 2, 2, 16])
    part = K.submatrix(numbers, slice(3, 9))
    close(part.to_dense(), expected[numbers, 3:9], 1e-12)
    assert part.mT.num_samples == 2 and part.mT.num_outputs == 3
    x[0][2, 1] += 1
    with pytest.raises(StaleOperatorError):
        K @ torch.ones(NODES * C, dtype=torch.float64)


def test_derivatives_reach_parameters_and_inputs():
    net, (x, adjacency) = model(), graph()
    x.requires_grad_()
    K = ntkops.ntk(net, (x, adjacency), batch_dim=None, differentiable=True)
    vector = normal(NODES * C, seed=3)
    leaves = [x, *net.parameters()]
    found = torch.autograd.grad((K @ vector).square().sum(), leaves)
    J = jacobian(net, (x, adjacency), graph=True)
    expected = torch.autograd.grad((J @ (J.mT @ vector)).square().sum(), leaves)
    for one, other in zip(found, expected, strict=True):
        close(one, other, 1e-10)


@pytest.mark.parametrize("choice", [{"samples": "each"}, {"samples": "trace"}, {"class": "trace"}], ids=str)
def test_samples_are_an_axis_by_name(choice: dict[str, str]):
    full = torch.einsum("acp,bdp->acbd", rows(), rows())
    own = torch.einsum("acad->acd", full)
    expected = {"each": own, "trace": own.sum(0)}[choice["samples"]] if "samples" in choice else None
    K = ntkops.ntk(point(torch.float64), graph(), axes=("class",), outputs=choice)
    close(K.to_dense(), torch.einsum("acbc->ab", full) if expected is None else expected, 1e-12)
    assert K.num_samples == NODES


def test_estimators():
    K, dense = ntkops.ntk(point(torch.float64), graph()), contracted(rows(), rows(), "all")
    full = dense.reshape(NODES, C, NODES, C)
    close(ntkops.trace(K).value, dense.trace(), 1e-12)
    close(ntkops.partial_trace(K, over="samples").value, torch.einsum("acad->cd", full), 1e-12)
    close(ntkops.partial_trace(K, over="outputs").value, torch.einsum("acbc->ab", full), 1e-12)
    sampled = ntkops.partial_trace(K, over="samples", method="hutchinson", num_passes=6 * NODES)
    close(sampled.value, torch.einsum("acad->cd", full), 1e-12)  # as many probes as nodes are exact
    values = torch.linalg.eigvalsh(dense).flip(0)
    close(ntkops.eigsh(K, 3).values, values[:3], 1e-10)
    centring = torch.eye(NODES, dtype=torch.float64) - 1 / NODES
    H = torch.kron(centring, torch.eye(C, dtype=torch.float64))
    other = ntkops.ntk(point(torch.float64), graph(seed=7))
    second = contracted(rows(seed=7), rows(seed=7), "all")
    one, two = H @ dense @ H, H @ second @ H
    aligned = (one * two).sum() / (one.norm() * two.norm())
    close(ntkops.alignment(K, other, center="samples").value, aligned, 1e-10)
    parts = ntkops.partition(K, by="layer")
    close(parts.trace.value.sum(), dense.trace(), 1e-12)
    assert ntkops.check_operator(K, generator=torch.Generator()).passed
    few = ntkops.nystrom_ntk(K, [4, 1])
    at = [12, 13, 14, 3, 4, 5]
    inverse = torch.linalg.pinv(dense[at][:, at], hermitian=True)
    close(few.to_dense(), dense[:, at] @ inverse @ dense[at], 1e-6)
    with pytest.raises(UnsupportedOperationError, match="stratified"):
        ntkops.trace(K, method="stratified")
    with pytest.raises(UnsupportedOperationError, match="nodes of a graph are coupled"):
        ntkops.nystrom_ntk(K, "rpcholesky", num_inducing=2)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("outputs", ["each", "trace", "all"])
def test_regression_on_a_subset_of_nodes(outputs: str, dtype: torch.dtype):
    train, test = torch.tensor([4, 0, 3, 1]), torch.tensor([5, 2])
    labels = normal(NODES, C, seed=5, dtype=dtype)
    K = ntkops.ntk(point(dtype), graph(dtype=dtype), outputs=outputs)
    at = [(n[:, None] * C + torch.arange(C)).flatten() if outputs == "all" else n for n in (train, test)]
    fit = ntkops.KernelRidge(1e-1, relative=False).fit(K.submatrix(at[0], at[0]), labels[train])
    full, other = contracted(rows(), rows(), outputs), contracted(rows(9, 2), rows(), outputs)
    ridge = 0.1 * torch.eye(len(at[0]), dtype=torch.float64)
    weights = torch.linalg.inv(full[..., at[0], :][..., at[0]] + ridge)
    known = labels[train].double()
    known = known.flatten() if outputs == "all" else known.mT.unsqueeze(-1) if outputs == "each" else known

    def expected(crossed: Tensor) -> Tensor:
        found = crossed[..., at[0]] @ (weights @ known)
        return found.squeeze(-1).mT if outputs == "each" else found.reshape(-1, C)

    tolerance = {torch.float64: 1e-10, torch.float32: 2e-4}[dtype]
    close(fit.predict(K.submatrix(at[1], at[0])), expected(full[..., at[1], :]), tolerance)
    some = K.submatrix(at[0], at[0]).cross(graph(9, 2, dtype))
    assert some.num_samples == 9
    close(fit.predict(some), expected(other), tolerance)
    with pytest.raises(ShapeError, match="columns of the cross kernel"):
        fit.predict(K.submatrix(at[1], at[0].flip(0)))
    if outputs != "trace":
        shown = ntkops.KernelRidge(1e-1, offset="network").fit(K.submatrix(at[0], at[0]), labels[train])
        assert shown.predict(some).shape == (9, C)


@pytest.mark.parametrize("fisher", [None, "empirical"])
@pytest.mark.parametrize("named", [False, True])
def test_curvature_of_a_graph(fisher: Any, named: bool):
    classes = torch.tensor([0, 2, 1, -100, 2, 0])
    J, f = rows(), model(torch.float32).double()(*graph()).detach()
    p, counted = f.softmax(-1), (classes >= 0).double()
    if fisher:
        gradients = counted[:, None] * (p - nn.functional.one_hot(classes.clamp(min=0), C))
        L = torch.einsum("ncp,nc->np", J, gradients)
        expected = L.mT @ L
    else:
        H = counted[:, None, None] * (torch.diag_embed(p) - p[:, :, None] * p[:, None])
        expected = torch.einsum("ncp,ncd,ndq->pq", J, H, J)
    options: dict[str, Any] = (
        {"axes": ("class", "copy"), "output": lambda y: y.unsqueeze(-1)} if named else {}
    )
    given = classes[:, None] if named else classes
    net = model(torch.float32).double()
    G = ntkops.ggn(net, graph(), targets=given, fisher=fisher, batch_dim=None, **options)
    close(G.to_dense(), expected, 1e-12)
    close(G.function_space.diagonal().sum(), expected.trace(), 1e-12)


def test_what_a_graph_leaves_open():
    K, other = ntkops.ntk(point(torch.float64), graph()), graph(9, 2)
    prior, labels = ntkops.ntk(model(torch.float32).double(), other, batch_dim=None), normal(NODES, C, seed=5)
    J, new = rows().flatten(0, 1), rows(9, 2).flatten(0, 1)
    fit = ntkops.KernelRidge(0.1, relative=False, offset="network").fit(K, labels)
    mean, std = fit.predict(K.cross(other), prior=prior, return_std=True)
    A = J @ J.mT + 0.1 * torch.eye(len(J), dtype=torch.float64)
    expected = new @ new.mT - new @ J.mT @ torch.linalg.solve(A, J @ new.mT)
    scale = fit.noise_scale_**2 / 0.1
    close(std.flatten() ** 2, scale * expected.diagonal(), 1e-9)
    predict = fit.predictor()
    close(predict(other), mean, 1e-10)
    close(pickle.loads(pickle.dumps(predict))(graph()), fit.predict(K), 1e-10)
    with pytest.raises(InputError, match="other samples"):
        fit.predict(K.cross(other), prior=ntkops.ntk(point(torch.float64), graph(9, 3)), return_std=True)
    classes = torch.tensor([0, 2, 1, 1, 2, 0])
    post = ntkops.LinearizedLaplace(0.5).fit(K, classes)
    G = ntkops.ggn(point(torch.float64), graph(), targets=classes).to_dense()
    covariance = new @ torch.linalg.inv(G + 0.5 * torch.eye(len(G), dtype=torch.float64)) @ new.mT
    mean, found = post.predict(K.cross(other), prior=prior, return_cov=True)
    assert mean.shape == (9, C)
    close(found.to_dense(), covariance, 1e-10)


def test_batch_statistics_by_consent():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2)).double().train()
    x = normal(7, 4, seed=1)
    with pytest.raises(CoupledSamplesError, match="batch_dim=None"):
        ntkops.ntk(net, x)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    K = ntkops.ntk(net, x, batch_dim=None)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    J = jacobian(net, x)
    close(K.to_dense(), J @ J.mT, 1e-11)
    vectors = normal(14, 2, seed=2)
    close(ntkops.ntk(net, x, batch_dim=None, max_dense_bytes=0) @ vectors, J @ (J.mT @ vectors), 1e-11)
    new = jacobian(net, normal(4, 4, seed=3))
    close(K.cross(normal(4, 4, seed=3)).to_dense(), new @ J.mT, 1e-11)


class Readout(nn.Module):
    """The energy of a graph: no axes, or one of several energies."""

    def __init__(self, outputs: int | None) -> None:
        super().__init__()
        self.body, self.outputs = nn.Linear(4, outputs or 1), outputs

    def forward(self, x: Tensor) -> Tensor:
        found = self.body(x).square().sum(0)
        return found if self.outputs else found.squeeze(0)


@pytest.mark.parametrize("outputs", [None, 2])
def test_one_output_of_a_whole(outputs: int | None):
    net, x, other = Readout(outputs).double(), normal(5, 4, seed=1), normal(3, 4, seed=2)
    K = ntkops.ntk(net, x, batch_dim=None)
    J, new = jacobian(net, x), jacobian(net, other)
    close(K.to_dense(), J @ J.mT, 1e-12)
    close(K.cross(other).to_dense(), new @ J.mT, 1e-12)


def test_what_is_refused():
    net, (x, adjacency) = model(), graph()
    with pytest.raises(InputError, match=r"a list.*one whole.*ntkops\.stack"):
        ntkops.ntk(net, [(x, adjacency)], batch_dim=None)
    with pytest.raises(InputError, match="not spread over ranks"):
        ntkops.ntk(net, (x, adjacency), batch_dim=None, group="world")
    with pytest.raises(InputError, match=r"outputs='trace'.*output=lambda"):
        ntkops.ntk(net, (x, adjacency), batch_dim=None, outputs="sum")
    bad = x.clone()
    bad[2, 1] = torch.nan
    with pytest.raises(NonFiniteError, match=r"input\[0\].*position \(2, 1\)"):
        ntkops.ntk(net, (bad, adjacency), batch_dim=None)
    K = ntkops.ntk(net, (x, adjacency), batch_dim=None)
    with pytest.raises(ShapeError, match="uneven selection"):
        K[:5, :5].cross(graph(4, 2))
    with pytest.raises(ShapeError, match="all axes but the first must agree"):
        ntkops.ntk(Wide().double(), x, batch_dim=None).cross(normal(4, 5, seed=1))
    # The summed output of each node, which is what "sum" may also mean:
    summed = ntkops.ntk(net, (x, adjacency), batch_dim=None, output=lambda y: y.sum(-1, keepdim=True))
    J = rows().sum(1)
    close(summed.to_dense(), J @ J.mT, 1e-12)


class Wide(nn.Module):
    """As many outputs a node as it has features."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(0) * self.scale


# -- an axis for each input


class Recurrent(nn.Module):
    """Samples on axis 0 of the sequences, on axis 1 of the first states, and edges that all share."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, x: Tensor, h: Tensor, edges: Tensor) -> Tensor:
        return self.head(self.body(x, h)[0][:, -1]) * edges.sum(0)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("kind", ["keywords", "positions"])
def test_an_axis_for_each_input(kind: str, engine: str, dtype: torch.dtype):
    torch.manual_seed(0)
    net = Recurrent()
    shapes = [(5, 3, 3), (1, 5, 4), (4, 2)]
    leaves = [normal(*shape, seed=i, dtype=torch.float32) for i, shape in enumerate(shapes)]
    J = jacobian(net.double(), tuple(leaf.double() for leaf in leaves))
    given: Any = tuple(leaf.to(dtype) for leaf in leaves)
    axes: Any = (0, 1, None)
    if kind == "keywords":
        given, axes = (dict(zip(("x", "h", "edges"), both, strict=True)) for both in (given, axes))
    options = {"batch_dim": axes, "engine": engine, "batch_size": 2}
    K = ntkops.ntk(net.to(dtype), given, **options)
    close(K.to_dense(), J @ J.mT, TOLERANCES[dtype])
    close(K.diagonal(), (J @ J.mT).diagonal(), TOLERANCES[dtype])
    assert K.num_samples == 5
    lazy = ntkops.ntk(net, given, **options, max_dense_bytes=0)
    vectors = normal(10, 2, seed=3, dtype=dtype)
    close(lazy @ vectors, J @ (J.mT @ vectors.double()), TOLERANCES[dtype])
    close(K.submatrix([6, 1], slice(None)).to_dense(), (J @ J.mT)[[6, 1]], TOLERANCES[dtype])
    close(pickle.loads(pickle.dumps(K)).to_dense(), J @ J.mT, TOLERANCES[dtype])


def test_batches_with_what_all_samples_share():
    torch.manual_seed(0)
    net = Recurrent().double()
    x, h, edges = normal(5, 3, 3, seed=0), normal(1, 5, 4, seed=1), normal(4, 2, seed=2)
    J = jacobian(net, (x, h, edges))
    batches = [(x[:3], h[:, :3], edges), (x[3:], h[:, 3:], edges)]
    K = ntkops.ntk(net, batches, batch_dim=(0, 1, None))
    close(K.to_dense(), J @ J.mT, 1e-12)
    close(ntkops.trace(K).value, (J @ J.mT).trace(), 1e-12)
    K = ntkops.ntk(net, batches, batch_dim=(0, 1, None), max_dense_bytes=0)
    edges[0, 0] += 1
    with pytest.raises(ntkops.errors.NonDeterministicDataError):
        K @ torch.ones(10, dtype=torch.float64)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"x": 0, "h": 1}, r"no axis for input\['edges'\]"),
        ({"x": 0, "h": 1, "edges": None, "z": 0}, "names 'z'"),
        ((0, 1, None), "by position, and input is a dict"),
        ({"x": 0, "h": 0, "edges": None}, r"input\['h'\] has 1 samples and input\['x'\] has 5"),
        ({"x": 0, "h": 5, "edges": None}, r"input\['h'\].*has no axis 5"),
        ({"x": 0, "h": -1, "edges": None}, "batch_dim=-1"),
        ({"x": 0, "h": True, "edges": None}, "batch_dim=True"),
        ({}, "batch_dim={}"),
        ("x", "batch_dim='x'"),
        (1.0, "batch_dim=1.0"),
    ],
    ids=str,
)
def test_axes_that_are_none(axes: Any, message: str):
    x = {"x": normal(5, 3, 3, seed=0), "h": normal(1, 5, 4, seed=1), "edges": normal(4, 2, seed=2)}
    with pytest.raises(InputError, match=message):
        ntkops.ntk(Recurrent().double(), x, batch_dim=axes)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_cross_kernel_with_another_length(engine: str):
    """The first axis of the output may have another length for independent samples, too."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, new = normal(3, 4, 3, seed=1), normal(2, 6, 3, seed=2)
    left, right = (jacobian(net, z).unflatten(0, (*z.shape[:2], 2)) for z in (new, x))
    K = ntkops.ntk(net, x, axes=("time", "class"), engine=engine)
    close(K.cross(new).to_dense(), left.flatten(0, 2) @ right.flatten(0, 2).mT, 1e-12)
    assert K.cross(new).axes == {"time": 6, "class": 2}
    vectors = normal(24, 2, seed=3)
    close(K.cross(new) @ vectors, left.flatten(0, 2) @ (right.flatten(0, 2).mT @ vectors), 1e-12)
    each = ntkops.ntk(net, x, axes=("time", "class"), outputs={"class": "each"}, engine=engine)
    expected = torch.einsum("atcp,bscp->catbs", left, right).flatten(3).flatten(1, 2)
    close(each.cross(new).to_dense(), expected, 1e-12)
    traced = ntkops.ntk(net, x, axes=("time", "class"), outputs={"time": "trace"}, engine=engine)
    with pytest.raises(ShapeError, match="summed over the first axis"):
        traced.cross(new)
