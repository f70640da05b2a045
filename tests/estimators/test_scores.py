"""Scores of networks: condition numbers, centred alignment, second derivatives, tables."""

from __future__ import annotations

import json
import math
import warnings

import pytest
import torch
from torch import Tensor, nn

import ntkops
from ntkops.errors import (
    DeviceError,
    InputError,
    NonFiniteError,
    NotConvergedWarning,
    NtkopsError,
    ShapeError,
    UnsupportedOperationError,
    ZeroKernelError,
)

from ..laws.reference import close, jacobian, normal


def network(width: int = 12, seed: int = 0, outputs: int = 2) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, outputs)).double()


def with_spectrum(values: Tensor, seed: int = 1) -> Tensor:
    basis, _ = torch.linalg.qr(normal(len(values), len(values), seed=seed))
    return (basis * values) @ basis.mT


# -- condition numbers


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("products", [None, 300], ids=["dense", "lanczos"])
def test_the_interval_holds_the_condition_number(dtype, products):
    values = torch.linspace(1.0, 50.0, 40, dtype=torch.float64)
    K = with_spectrum(values).to(dtype)
    K = (K + K.mT) / 2
    found = ntkops.condition_number(K, max_products=products, generator=torch.Generator().manual_seed(0))
    assert found.method == ("dense" if products is None else "lanczos")
    low, high = found.interval
    assert low <= 50 <= high and found.converged and not found.exact
    assert float(high - low) < (1e-6 if dtype == torch.float64 else 5e-2)
    close(found.value, torch.tensor(50.0, dtype=torch.float64), 1e-3)


def test_float32_says_what_it_cannot_tell():
    """The largest eigenvalue over the smallest of a float32 kernel was negative here."""
    net, x = network(3), normal(60, 4, seed=2, dtype=torch.float32).double()
    K64 = ntkops.ntk(net, x).to_dense()
    with pytest.warns(NotConvergedWarning, match="not told from zero"):
        found = ntkops.condition_number(ntkops.ntk(net.float(), x.float()))
    assert not found.converged and found.interval[1] == math.inf and math.isinf(found.stderr)
    assert 0 < found.interval[0] <= found.value
    eigenvalues = torch.linalg.eigvalsh(K64)
    if eigenvalues[0] > 0:
        assert found.interval[0] <= eigenvalues[-1] / eigenvalues[0]
    ridge = float(eigenvalues[-1]) / 100
    better = ntkops.condition_number(ntkops.ntk(net.double(), x).add_jitter(ridge))
    close(better.value, (eigenvalues[-1] + ridge) / (eigenvalues[0].clamp(min=0) + ridge), 1e-6)
    assert better.converged


def test_condition_numbers_of_a_batch_and_lazily():
    net, x = network(30), normal(6, 4, seed=2)
    K = ntkops.ntk(net, x, outputs="each", max_dense_bytes=0)
    J = jacobian(net, x).unflatten(0, (6, 2))
    dense = torch.einsum("ncp,mcp->cnm", J, J)
    spectrum = torch.linalg.eigvalsh(dense)
    close(ntkops.condition_number(K).value, spectrum[:, -1] / spectrum[:, 0], 1e-5)


def test_what_has_no_condition_number():
    with pytest.raises(ZeroKernelError):
        ntkops.condition_number(torch.zeros(3, 3))
    with pytest.raises(UnsupportedOperationError, match="negative beyond rounding"):
        ntkops.condition_number(torch.diag(torch.tensor([2.0, -1.0])))
    with pytest.raises(ShapeError):
        ntkops.condition_number(torch.ones(2, 3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        singular = ntkops.condition_number(torch.diag(torch.tensor([2.0, 0.0]).double()))
    assert singular.interval[1] == math.inf and len(caught) == 1


# -- centred alignment


def dense_centred(K: Tensor, samples: int) -> Tensor:
    outputs = K.shape[-1] // samples
    H = torch.eye(samples, dtype=K.dtype) - 1 / samples
    H = torch.kron(H, torch.eye(outputs, dtype=K.dtype))
    return H @ K @ H


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-2, -1)) / torch.linalg.matrix_norm(a) / torch.linalg.matrix_norm(b)


@pytest.mark.parametrize("outputs", ["all", "trace", "each", 1], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_centred_alignment_is_dense(outputs, dtype):
    x, tolerance = (
        normal(9, 4, seed=3, dtype=torch.float32).double(),
        1e-11 if dtype == torch.float64 else 2e-5,
    )
    nets = [network(12, seed).to(torch.float32) for seed in (0, 1)]
    dense = [ntkops.ntk(net.double(), x, outputs=outputs).to_dense() for net in nets]
    expected = cosine(*(dense_centred(K, 9) for K in dense))
    lazy = [ntkops.ntk(net.to(dtype), x.to(dtype), outputs=outputs, max_dense_bytes=0) for net in nets]
    close(ntkops.alignment(*lazy, center="samples", method="exact").value, expected, tolerance)
    assert float((ntkops.alignment(*lazy, method="exact").value - expected).abs().max()) > 1e-3
    if outputs == "all":  # centring over all rows is another thing
        flat = cosine(*(dense_centred(K, 18) for K in dense))
        assert abs(float(flat - expected)) > 1e-4


def test_centred_alignment_is_estimated_and_of_matrices():
    x = normal(20, 4, seed=3)
    K1, K2 = (ntkops.ntk(network(12, seed), x, max_dense_bytes=0) for seed in (0, 1))
    expected = cosine(
        dense_centred(K1[:, :] @ torch.eye(40).double(), 20), dense_centred(K2 @ torch.eye(40).double(), 20)
    )
    for method in ("hutchinson", "hutch++", "sketch"):
        found = ntkops.alignment(
            K1,
            K2,
            center="samples",
            method=method,
            num_passes=400,
            generator=torch.Generator().manual_seed(0),
        )
        assert abs(float(found.value - expected)) <= max(4 * float(found.stderr), 1e-9), method
    A, B = (normal(6, 6, seed=s) for s in (1, 2))
    A, B = A @ A.mT, B @ B.mT
    close(
        ntkops.alignment(A, B, center="samples").value,
        cosine(dense_centred(A, 6), dense_centred(B, 6)),
        1e-12,
    )


def test_bad_centres():
    K = ntkops.ntk(network(), normal(5, 4, seed=3))
    for center in ("rows", 3):
        with pytest.raises(InputError, match="'samples'"):
            ntkops.alignment(K, K, center=center)
    with pytest.raises(InputError, match="differentiable"):
        ntkops.alignment(K, K, center="samples", differentiable=True)
    with pytest.raises(UnsupportedOperationError, match="symmetric"):
        ntkops.alignment(K[:, :5], K[:, :5], center="samples")
    with pytest.raises(ShapeError, match="whole samples|no .* samples"):
        part = K.submatrix([0, 3, 4], [0, 3, 4])
        ntkops.alignment(part, part, center="samples")
    with pytest.raises(ZeroKernelError):
        ntkops.alignment(torch.ones(4, 4), torch.eye(4), center="samples")


# -- second derivatives


def dense_hessians(net: nn.Module, x: Tensor) -> Tensor:
    """(n,) Frobenius norms squared, by autograd twice."""
    leaves = list(net.parameters())
    squares = []
    for value in net(x).flatten():
        first = torch.autograd.grad(value, leaves, create_graph=True)
        flat = torch.cat([g.flatten() for g in first])
        square = 0.0
        for entry in flat:
            if entry.requires_grad:
                second = torch.autograd.grad(entry, leaves, retain_graph=True, allow_unused=True)
                square += sum(float(g.square().sum()) for g in second if g is not None)
        squares.append(square)
    return torch.tensor(squares, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_norm_of_the_hessian(dtype):
    net, x = network(4), normal(5, 4, seed=2, dtype=torch.float32).double()
    expected = dense_hessians(net, x).mean().sqrt()
    found = ntkops.hessian_norm(
        net.to(dtype), x.to(dtype), num_probes=64, generator=torch.Generator().manual_seed(0)
    )
    assert found.interval[0] <= expected <= found.interval[1]
    assert abs(float(found.value - expected)) <= 4 * float(found.stderr)
    assert found.passes == 128 and found.seed is not None
    batches = [x.to(dtype)[:2], x.to(dtype)[2:]]
    streamed = ntkops.hessian_norm(net, batches, num_probes=8, generator=torch.Generator().manual_seed(0))
    whole = ntkops.hessian_norm(net, x.to(dtype), num_probes=8, generator=torch.Generator().manual_seed(0))
    close(streamed.value, whole.value, 1e-12 if dtype == torch.float64 else 1e-5)


def test_intervals_of_hessian_norms_cover():
    net, x = network(4), normal(3, 4, seed=2)
    expected = float(dense_hessians(net, x).mean().sqrt())
    hits = 0
    for seed in range(30):
        found = ntkops.hessian_norm(net, x, num_probes=8, generator=torch.Generator().manual_seed(seed))
        hits += bool(found.interval[0] <= expected <= found.interval[1])
    assert hits >= 27


def test_a_wider_network_is_lazier_and_a_linear_one_is_lazy():
    x, values = normal(6, 4, seed=2), []
    for width in (16, 1024):

        class Scaled(nn.Module):
            def __init__(self, width: int = width) -> None:
                super().__init__()
                torch.manual_seed(0)
                self.first = nn.Parameter(torch.randn(width, 4).double())
                self.last = nn.Parameter(torch.randn(1, width).double())

            def forward(self, x: Tensor) -> Tensor:
                return torch.tanh(x @ self.first.mT / 2) @ self.last.mT / self.last.shape[1] ** 0.5

        values.append(
            float(ntkops.hessian_norm(Scaled(), x, generator=torch.Generator().manual_seed(0)).value)
        )
    assert values[0] > 0
    linear = ntkops.hessian_norm(nn.Linear(4, 2), x.float())
    assert float(linear) == float(linear.interval[0]) == float(linear.interval[1]) == 0
    assert float(ntkops.hessian_norm(network(), x, params="2.*")) == 0
    with pytest.raises(InputError, match="four probes"):
        ntkops.hessian_norm(network(), x, num_probes=3)


def test_an_infinite_second_derivative_is_refused():
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1).double())

        def forward(self, x: Tensor) -> Tensor:
            return (self.w.square() * x).abs().pow(0.75)

    with pytest.raises((NonFiniteError, NtkopsError)):
        ntkops.hessian_norm(Root(), torch.ones(3, 1).double())


# -- tables


def test_traces_of_several_networks():
    x = normal(8, 4, seed=2)
    models = {str(width): network(width) for width in (4, 16, 64)}
    table = ntkops.compare(models, x, num_probes=64, generator=torch.Generator().manual_seed(0))
    exact = torch.stack([jacobian(net, x).square().sum() for net in models.values()])
    for estimate, value in zip(table.estimates["trace"], exact, strict=True):
        assert estimate.interval[0] <= value <= estimate.interval[1] and estimate.passes == 64
    assert table.order("trace") == ["64", "16", "4"] and len(table) == 3
    assert torch.equal(table["trace"], torch.stack([e.value for e in table.estimates["trace"]]))
    assert json.loads(json.dumps(table.to_dict()))["names"] == ["4", "16", "64"]
    assert len(str(table).splitlines()) == 4 and " to " in str(table)


def test_several_scores_and_lists():
    x = normal(4, 4, seed=2)
    table = ntkops.compare([network(16), network(32)], x, ["trace", "condition_number", "effective_rank"])
    K = [ntkops.ntk(network(width), x) for width in (16, 32)]
    assert table.names == ("0", "1")
    for score, function in (
        ("condition_number", ntkops.condition_number),
        ("effective_rank", ntkops.effective_rank),
    ):
        close(table[score], torch.stack([function(k).value for k in K]), 1e-6)
    with pytest.raises(InputError, match="no score 'norm'"):
        _ = table["norm"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (({}, ["trace"]), "no network"),
        (([network()], ["nuclear_norm"]), "choose among 'trace'"),
        (([network()], []), "different scores"),
        (([network()], ["trace", "trace"]), "different scores"),
    ],
)
def test_bad_tables(arguments, message):
    models, scores = arguments
    with pytest.raises(InputError, match=message):
        ntkops.compare(models, normal(4, 4, seed=2), scores)


def test_errors_name_the_network():
    with pytest.raises(InputError, match="two probes"):
        ntkops.compare([network()], normal(4, 4, seed=2), num_probes=1)
    with pytest.raises(NtkopsError) as caught:
        ntkops.compare({"good": network(), "bad": network().float()}, normal(4, 4, seed=2))
    assert any("'bad'" in note for note in caught.value.__notes__)
    assert not isinstance(caught.value, DeviceError)


# -- along training


def test_velocity_is_the_distance_from_the_row_before(tmp_path):
    x = normal(6, 4, seed=2)
    states = [network(12, seed).state_dict() for seed in range(4)]
    dense = []
    for state in states:
        net = network(12)
        net.load_state_dict(state)
        J = jacobian(net, x)
        dense.append(J @ J.mT)
    expected = torch.stack([1 - cosine(a, b) for a, b in zip(dense[1:], dense, strict=False)])
    options = {"quantities": ["kernel_velocity", "trace"], "method": "exact"}
    history = ntkops.track(network(12), x, states, **options)
    assert math.isnan(history["kernel_velocity"][0])
    close(history["kernel_velocity"][1:], expected, 1e-9)
    path = tmp_path / "track.safetensors"
    ntkops.track(network(12), x, states[:2], path=path, **options)
    resumed = ntkops.track(network(12), x, states, path=path, **options)
    assert torch.equal(resumed["kernel_velocity"][1:], history["kernel_velocity"][1:])


def test_velocity_after_going_back():
    x = normal(6, 4, seed=2)
    tracker = ntkops.track(network(12), x, quantities=["kernel_velocity"], method="exact")
    for step in range(3):
        tracker.record(step, network(12, step).state_dict())
    tracker.rewind(1)
    tracker.record(2, network(12, 5).state_dict())
    assert math.isnan(tracker.history["kernel_velocity"][2])
