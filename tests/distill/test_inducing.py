"""Inducing points moved by gradient descent: gradients, losses, resuming, and what is refused."""

import copy
import functools

import pytest
import torch
from torch import nn

import ntkops
from ntkops import checkpoint
from ntkops.distill import _descent
from ntkops.distill._frames import Scene, moving_tensor
from ntkops.distill.inducing import _Choice, _objective, kernel_inducing
from ntkops.errors import (
    CheckpointError,
    InputError,
    ShapeError,
    UnsupportedOperationError,
    ZeroKernelError,
)
from ntkops.operators import energy_gap
from tests.pairs import pairs

OUTPUTS = ["trace", "each", "all", 1, [0, 2]]
CHOICES = {
    "energy": {"objective": "energy"},
    "energy, in batches": {"objective": "energy", "batch_size": 11},
    "outputs as targets": {"objective": "regression"},
    "given targets": {"objective": "regression", "targets": True},
    "solved targets": {"objective": "regression", "learn_targets": True},
}


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 3)).double()


@functools.cache
def point(dtype=torch.float64):
    """Return the network linearised, once for all tests: what is found out about it is kept there."""
    return ntkops.linearize(network().to(dtype))


def kernel(outputs="trace", **options):
    return ntkops.ntk(point(), samples(), outputs=outputs, **options)


def convolutional(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, 2, 1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 2),
    )
    model(torch.randn(64, 1, 6, 6))
    return model.eval()


def samples(count=20, dtype=torch.float64):
    return torch.randn(count, 3, generator=torch.Generator().manual_seed(1), dtype=dtype)


def choice(**changes):
    options = {
        "objective": "energy",
        "targets": None,
        "ridge": 1e-2,
        "learn_targets": False,
        "batch_size": None,
        "jitter": 1e-4,
    }
    return _Choice(**(options | changes))


def given_targets(outputs):
    shape = {"trace": (20, 4), "each": (20, 3), "all": (20, 3), "1": (20, 2), "[0, 2]": (20, 2)}[str(outputs)]
    return torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


@pytest.mark.parametrize("name, outputs, kept", pairs(CHOICES, OUTPUTS, [True, False]), ids=str)
def test_gradients_match_finite_differences(name, outputs, kept):
    K = kernel(outputs)
    wanted = dict(CHOICES[name])
    if wanted.pop("targets", None):
        wanted["targets"] = given_targets(outputs)
    scene = Scene(K)
    if kept:
        assert scene.keep_gradients()
    indices = torch.tensor([0, 5, 9, 12])
    z = samples()[indices] + 0.1
    losses = _objective(choice(**wanted), scene, indices, z, torch.Generator().manual_seed(4))

    def evaluate(at):
        losses._generator.manual_seed(4)
        return losses.evaluate(at)

    _, gradient, _ = evaluate(z)
    direction = torch.randn(z.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    step = 1e-5
    slope = (evaluate(z + step * direction)[0] - evaluate(z - step * direction)[0]) / (2 * step)
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=1e-6)
    if not losses.sampled:
        assert losses.judge(z) == pytest.approx(evaluate(z)[0], rel=1e-12)


def test_the_loss_is_the_energy_gap_up_to_the_jitter():
    K = kernel("each")
    found = kernel_inducing(K, start=range(5), iterations=5, jitter=1e-10)
    gap = energy_gap(K, found.inputs)
    share = float(gap.gap.sum() / gap.total.sum())
    assert share == pytest.approx(found.loss, rel=1e-6)
    assert share <= found.loss


def test_solved_targets_give_the_predictions_of_all_targets():
    K, Y = kernel(), torch.sin(samples()[:, :2])
    found = kernel_inducing(
        K, start=range(5), objective="regression", targets=Y, learn_targets=True, iterations=3, jitter=1e-12
    )
    cross = K.cross(found.inputs).to_dense().mT  # K_XZ
    inner = ntkops.ntk(point(), found.inputs, outputs="trace").to_dense()
    eye = torch.eye(5, dtype=torch.float64)
    ours = cross @ torch.linalg.solve(inner + found.ridge * eye, found.targets)
    weights = torch.linalg.solve(cross.mT @ cross + found.ridge * inner, cross.mT @ Y)
    torch.testing.assert_close(ours, cross @ weights, rtol=1e-7, atol=1e-9)


def test_given_targets_are_those_of_the_start():
    K = kernel()
    Y = torch.sin(samples())
    found = kernel_inducing(K, start=[3, 7], objective="regression", targets=Y, iterations=2)
    torch.testing.assert_close(found.targets, Y[[3, 7]])
    followed = kernel_inducing(K, start=[3, 7], objective="regression", iterations=2)
    torch.testing.assert_close(followed.targets, network()(followed.inputs).detach())


@pytest.mark.parametrize("objective", ["energy", "regression"])
def test_a_convolutional_network_is_served_below_start_and_random_points(objective):
    model = convolutional()
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(40, 1, 6, 6, generator=torch.Generator().manual_seed(1))
    K = ntkops.ntk(model, x, outputs="trace")
    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(0)
    found = kernel_inducing(K, 4, objective=objective, iterations=25, generator=generator)
    assert torch.equal(torch.get_rng_state(), state)
    assert found.loss < found.start_loss and found.loss == pytest.approx(float(found.losses.min()))
    for seed in range(3):
        drawn = torch.Generator().manual_seed(seed)
        random = kernel_inducing(K, 4, start="random", objective=objective, iterations=0, generator=drawn)
        assert found.loss < random.loss
    assert not model.training and all(
        torch.equal(before[name], value) for name, value in model.state_dict().items()
    )
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    if objective == "energy":
        gap = energy_gap(K, found.inputs)
        assert float(gap.share) <= found.loss * (1 + 1e-4)
        assert float(gap.gap) < float(energy_gap(K, found.indices).gap)


def test_batches_compare_iterates_on_all_samples():
    K = kernel()
    found = kernel_inducing(
        K, start=range(4), batch_size=6, iterations=20, generator=torch.Generator().manual_seed(0)
    )
    whole = kernel_inducing(K, start=found.inputs, iterations=0)
    assert found.loss == pytest.approx(whole.loss, rel=1e-10)
    assert found.loss < found.start_loss
    assert found.iteration == 20 or found.iteration % 4 == 0  # 20 samples, 6 at a time


def test_nothing_as_wide_as_the_data_is_built_where_that_is_forbidden():
    found, kept = (
        kernel_inducing(K, start=[0, 4], iterations=4) for K in (kernel(max_dense_bytes=0), kernel())
    )
    torch.testing.assert_close(found.inputs, kept.inputs, rtol=1e-8, atol=1e-10)


def test_both_ways_give_the_same_run():
    runs = [
        kernel_inducing(kernel("each", max_dense_bytes=size), start=[0, 4], iterations=4)
        for size in ("auto", 20 * 3 * 20 * 8)  # the second holds K, and no gradients
    ]
    torch.testing.assert_close(runs[0].inputs, runs[1].inputs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_losses_do_not_depend_on_the_scale_of_the_kernel(dtype, scale):
    # K = s² K₀ exactly, for s a power of two
    power = 2.0 ** round(torch.log2(torch.tensor(scale)).item())
    model, x = network().to(dtype), samples().to(dtype)
    plain = kernel_inducing(ntkops.ntk(point(dtype), x, outputs="trace"), start=[0, 4, 9], iterations=3)
    K = ntkops.ntk(model, x, outputs="trace", output=lambda y: power * y)
    scaled = kernel_inducing(K, start=[0, 4, 9], iterations=3)
    assert scaled.loss == pytest.approx(plain.loss, rel=1e-9)
    torch.testing.assert_close(scaled.inputs, plain.inputs)


def test_duplicate_points_need_the_jitter_alone():
    model = network().float()
    K = ntkops.ntk(model, samples(dtype=torch.float32), outputs="trace")
    found = kernel_inducing(K, start=samples(dtype=torch.float32)[[0, 0, 1, 1]], iterations=5)
    assert 0 < found.loss < 1 and found.jitter <= 1e-2


class Interrupt(Exception):
    pass


@pytest.mark.parametrize("given", [True, False])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, monkeypatch, given):
    K = kernel()

    def run(path):
        generator = torch.Generator().manual_seed(5) if given else None
        return kernel_inducing(
            K,
            4,
            start="random",
            iterations=6,
            batch_size=7,
            path=path,
            checkpoint_every=2,
            generator=generator,
        )

    calls, plain = [], checkpoint.save

    def save(*args, **kwargs):
        plain(*args, **kwargs)
        calls.append(1)
        if len(calls) == 2:
            raise Interrupt

    with monkeypatch.context() as patch:
        patch.setattr(_descent.checkpoint, "save", save)
        with pytest.raises(Interrupt):
            run(tmp_path / "cut")
    resumed = run(tmp_path / "cut")
    if given:
        whole = run(tmp_path / "whole")
    else:
        whole = kernel_inducing(
            K,
            4,
            start="random",
            iterations=6,
            batch_size=7,
            generator=torch.Generator().manual_seed(resumed.seed),
        )
    assert torch.equal(whole.inputs, resumed.inputs) and torch.equal(whole.losses, resumed.losses)
    assert whole.loss == resumed.loss and whole.start_loss == resumed.start_loss
    assert torch.equal(whole.indices, resumed.indices)
    again = run(tmp_path / "cut")  # a finished run is read
    assert torch.equal(again.inputs, resumed.inputs)
    with pytest.raises(CheckpointError, match="objective"):
        kernel_inducing(
            K, 4, start="random", iterations=6, jitter=1e-3, path=tmp_path / "cut", generator=None
        )


def test_what_is_refused():
    K, x = kernel(), samples()
    cases = [
        (InputError, {"objective": "gap"}, "'energy' or 'regression'"),
        (InputError, {"targets": x}, "no targets"),
        (InputError, {"iterations": -1}, "iterations"),
        (InputError, {"learning_rate": 0.0}, "learning_rate"),
        (InputError, {"batch_size": 0}, "batch_size"),
        (InputError, {"jitter": 1.0}, "jitter"),
        (InputError, {"objective": "regression", "ridge": -1.0}, "ridge"),
        (InputError, {"checkpoint_every": 0}, "checkpoint_every"),
        (InputError, {"num_points": 3, "start": range(3)}, "num_points"),
        (InputError, {"start": "random"}, "num_points"),
        (ZeroKernelError, {"objective": "regression", "targets": torch.zeros(20, 2).double()}, "zero"),
        (InputError, {"objective": "regression", "targets": x, "start": x[:2] + 1}, "not known"),
        (
            UnsupportedOperationError,
            {"objective": "regression", "learn_targets": True, "batch_size": 5},
            "batch",
        ),
    ]
    for error, changes, message in cases:
        with pytest.raises(error, match=message):
            kernel_inducing(K, **({"start": range(3), "iterations": 1} | changes))
    with pytest.raises(ShapeError, match="whole samples"):
        kernel_inducing(K[:5, 3:9], start=range(3))
    with pytest.raises(UnsupportedOperationError, match="no kernel of a model"):
        kernel_inducing(K.to_dense(), start=range(3))


def test_samples_that_are_no_floats_are_refused():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Flatten(), nn.Linear(12, 2)).double()
    K = ntkops.ntk(model, torch.arange(15).reshape(5, 3) % 5, outputs="trace")
    with pytest.raises(InputError, match="floating tensor"):
        kernel_inducing(K, start=range(2))
    assert moving_tensor(ntkops.linearize(network()).inputs(samples())).shape == (20, 3)


def test_too_fast_a_descent_goes_back_and_slows_down():
    K = kernel()
    found = kernel_inducing(K, start=range(4), iterations=60, learning_rate=20.0)
    assert float(found.losses[1]) > found.start_loss > found.loss
