"""The one-step view of distillation: the span of the samples' gradients, residuals, regret."""

import pytest
import torch
from torch import nn

import ntkops
from ntkops import errors
from ntkops.regression import (
    one_step_regret,
    optimal_residual,
    projection_residual,
    tangent_projector,
)
from tests.regression.problems import labels, network, reference_jacobian, samples


def flat_gradient(model, loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def dense_projector(J):
    return torch.linalg.pinv(J) @ J


def subspace(dimension, rank, seed=0):
    return torch.linalg.qr(labels(dimension, rank, seed=seed))[0].mT.contiguous()  # (r, P), orthonormal rows


# the projector


def test_stacked_projector_from_every_kind_of_argument():
    model, z = network(), samples(3)
    J = reference_jacobian(model, z).flatten(0, 1)
    truth, v = dense_projector(J), labels(J.shape[1], 4)
    for x in (ntkops.ntk(model, z), ntkops.jacobian(model, z), J, 2 * ntkops.ntk(model, z)):
        projector = tangent_projector(x)
        assert projector.shape == (J.shape[1], J.shape[1]) and int(projector.rank) == 9
        torch.testing.assert_close(projector @ v, truth @ v)
        torch.testing.assert_close(projector @ (projector @ v), projector @ v)
        torch.testing.assert_close(projector.mT @ v[:, 0], truth @ v[:, 0])
        torch.testing.assert_close(projector.to_dense(), truth)
        torch.testing.assert_close(projector.diagonal(), truth.diagonal())


def test_one_projector_for_each_class():
    model, z = network(), samples(3)
    J = reference_jacobian(model, z)
    projector = tangent_projector(ntkops.ntk(model, z, outputs="each"))
    assert projector.shape == (3, J.shape[-1], J.shape[-1]) and projector.rank.tolist() == [3, 3, 3]
    v = labels(J.shape[-1], 2)
    truth = torch.stack([dense_projector(J[:, c]) @ v for c in range(3)])
    torch.testing.assert_close(projector @ v, truth)
    residual = projection_residual(projector, v)
    torch.testing.assert_close(residual, (v - truth).square().sum(-2))


def test_repeated_samples_span_nothing_new():
    model, z = network(), samples(3)
    once, twice = (tangent_projector(ntkops.ntk(model, x)) for x in (z, torch.cat([z, z])))
    assert int(once.rank) == int(twice.rank) == 9
    v = labels(once.shape[-1], 2)
    torch.testing.assert_close(once @ v, twice @ v, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
def test_the_projector_does_not_depend_on_the_scale(dtype, scale):
    J = labels(4, 30, dtype=dtype)
    projector = tangent_projector(J * scale)
    v = labels(30, 2, dtype=dtype)
    assert projector.dtype == dtype and int(projector.rank) == 4
    torch.testing.assert_close(projector @ v, tangent_projector(J) @ v)


def test_bad_arguments_of_the_projector():
    with pytest.raises(errors.ZeroKernelError):
        tangent_projector(torch.zeros(2, 5))
    with pytest.raises(errors.InputError, match="Jacobian"):
        tangent_projector("J")
    with pytest.raises(errors.ShapeError):
        tangent_projector(torch.ones(5))
    with pytest.raises(errors.NonFiniteError):
        tangent_projector(torch.full((2, 5), float("nan")))
    with pytest.raises(errors.InputError, match="rtol"):
        tangent_projector(torch.ones(2, 5), rtol=2.0)
    with pytest.raises(errors.ShapeError, match="named_parameters"):
        projection_residual(tangent_projector(torch.ones(2, 5)), torch.ones(4))
    with pytest.raises(errors.NonFiniteError):
        projection_residual(tangent_projector(torch.ones(2, 5)), torch.full((5,), float("inf")))


# Lemma C.1


@pytest.mark.parametrize("loss", ["squared", "cross entropy", "soft cross entropy"])
def test_loss_gradients_lie_in_the_span_of_logit_gradients(loss):
    model, z = network(), samples(4)
    targets = {
        "squared": labels(4, 3),
        "cross entropy": torch.tensor([0, 2, 1, 1]),
        "soft cross entropy": labels(4, 3).softmax(-1),
    }[loss]
    criterion = nn.MSELoss(reduction="sum") if loss == "squared" else nn.CrossEntropyLoss(reduction="sum")
    logits = model(z)
    value = criterion(logits, targets)
    (delta,) = torch.autograd.grad(value, logits, retain_graph=True)
    gradient = flat_gradient(model, value)
    K = ntkops.ntk(model, z)
    torch.testing.assert_close(K.left.mT @ delta.flatten(), gradient)  # g = Jᵀ δ
    residual = projection_residual(tangent_projector(K), gradient)
    assert residual < 1e-24 * gradient.square().sum()


def test_gradients_on_other_samples_do_not():
    model, z = network(), samples(4)
    gradient = flat_gradient(model, model(samples(4, seed=9)).square().sum())
    residual = projection_residual(tangent_projector(ntkops.ntk(model, z)), gradient)
    assert residual > 1e-3 * gradient.square().sum()


# Corollary 3.5


@pytest.mark.parametrize("seed", range(3))
def test_the_leading_eigenspace_leaves_the_least(seed):
    tasks = labels(20, 12, seed=seed) * torch.logspace(0, -2, 20, dtype=torch.float64).unsqueeze(1)
    G = tasks @ tasks.mT / 12
    values, vectors = torch.linalg.eigh(G)
    for rank in (1, 4, 9):
        best = tangent_projector(vectors[:, -rank:].mT.contiguous())
        least = float(projection_residual(best, tasks).mean())
        tail = float(values[:-rank].sum())
        assert (
            least == pytest.approx(tail, rel=1e-9) == pytest.approx(optimal_residual(tasks, rank), rel=1e-9)
        )
        for other in range(20):
            rows = subspace(20, rank, seed=100 * seed + other)
            projector = tangent_projector(rows)
            residual = float(projection_residual(projector, tasks).mean())
            captured = float((rows @ G @ rows.mT).trace())
            delta = float(values[-rank:].sum()) - captured  # what this subspace misses of the best
            assert residual >= tail * (1 - 1e-12)
            assert residual <= (tail + delta) * (1 + 1e-10) + 1e-14


# Theorem 3.3


def quadratic(P, k, seed):
    """Return tasks with L-smooth quadratic losses: Hessians with eigenvalues in [-L, L]."""
    generator = torch.Generator().manual_seed(seed)
    smoothness = float(torch.rand((), generator=generator)) * 4 + 0.5
    hessians = []
    for _ in range(k):
        q = torch.linalg.qr(torch.randn(P, P, generator=generator, dtype=torch.float64))[0]
        values = (2 * torch.rand(P, generator=generator, dtype=torch.float64) - 1) * smoothness
        hessians.append(q @ torch.diag(values) @ q.mT)
    g = torch.randn(P, k, generator=generator, dtype=torch.float64)
    return smoothness, g, torch.stack(hessians), generator


def losses(g, hessians, step):
    step = step if step.dim() == 2 else step.unsqueeze(1).expand_as(g)
    return (g * step).sum(0) + 0.5 * torch.einsum("ik,kij,jk->k", step, hessians, step)


@pytest.mark.parametrize("convex", [False, True])
def test_regret_bound_holds_and_the_printed_one_does_not(convex):
    violated = {"printed": 0, "sign mended": 0, "ours": 0}
    trials = 200
    for seed in range(trials):
        smoothness, g, hessians, generator = quadratic(8, 3, seed)
        if convex:
            hessians = hessians @ hessians.mT / smoothness  # eigenvalues in [0, L]
        rows = subspace(8, 3, seed=seed)
        projector = tangent_projector(rows)
        update = rows.mT @ torch.randn(3, generator=generator, dtype=torch.float64)
        eta = float(torch.rand((), generator=generator)) + 0.05
        inside = rows.mT @ (rows @ g)
        best = -inside / smoothness
        true = float((losses(g, hessians, -eta * update) - losses(g, hessians, best)).mean())
        regret = one_step_regret(projector, g, update, step_size=eta, smoothness=smoothness, convex=convex)
        second = 0.5 * smoothness * (eta**2 * update.square().sum() - best.square().sum(0).mean())
        along, first = (g * best).sum(0).mean(), eta * (update @ g).mean()
        slack = 1e-12
        violated["printed"] += true > float(along - first + second) + slack
        violated["sign mended"] += true > float(-along - first + second) + slack
        violated["ours"] += true > regret.bound + slack
        assert regret.model_gap == pytest.approx(float(-along - first + second), abs=1e-10)
        # equation (6): the best step lowers the tasks' losses by at least |Π g|² / (2 L)
        decrease = -losses(g, hessians, best).mean()
        assert decrease >= regret.guaranteed_decrease - 1e-12
        assert regret.guaranteed_decrease == pytest.approx(
            (float(g.square().sum(0).mean()) - regret.residual) / (2 * smoothness)
        )
    assert violated["ours"] == 0
    assert violated["printed"] > 0.6 * trials
    if not convex:
        assert violated["sign mended"] > 0.2 * trials


def test_soft_labels_realise_the_best_step_and_hard_ones_do_not():
    # Remark 3.4 with a squared loss: the labels f(z) - δ, δ the projector's coefficients, give g = Π g_t.
    model, z, x = network(), samples(4), samples(20, seed=3)
    task = flat_gradient(model, (model(x) - labels(20, 3)).square().sum() / 20)
    K = ntkops.ntk(model, z)
    projector = tangent_projector(K)
    logits = model(z).detach()

    def update(y):
        return flat_gradient(model, 0.5 * (model(z) - y).square().sum())

    soft = logits - projector.coefficients(task).reshape(4, 3)
    smoothness = 2.0
    of_soft = one_step_regret(projector, task, update(soft), step_size=1 / smoothness, smoothness=smoothness)
    torch.testing.assert_close(update(soft), projector @ task)
    assert of_soft.model_gap < 1e-20 * of_soft.guaranteed_decrease
    classes = torch.cartesian_prod(*[torch.arange(3)] * 4)
    gaps = []
    for choice in classes:
        hard = nn.functional.one_hot(choice, 3).double()
        found = one_step_regret(
            projector, task, update(hard), step_size=1 / smoothness, smoothness=smoothness
        )
        gaps.append(found.model_gap)
    assert min(gaps) > 1e-2 * of_soft.guaranteed_decrease


def test_bad_arguments_of_the_regret():
    projector, g = tangent_projector(torch.eye(4)[:2]), torch.ones(4)
    inside, outside = torch.tensor([1.0, 1.0, 0, 0]), torch.tensor([0, 0, 1.0, 0])
    with pytest.raises(errors.InputError, match="outside the subspace"):
        one_step_regret(projector, g, outside, step_size=0.1, smoothness=1.0)
    with pytest.raises(errors.InputError, match="step_size"):
        one_step_regret(projector, g, inside, step_size=0.0, smoothness=1.0)
    with pytest.raises(errors.InputError, match="smoothness"):
        one_step_regret(projector, g, inside, step_size=0.1, smoothness=float("inf"))
    with pytest.raises(errors.ShapeError, match="one subspace"):
        one_step_regret(tangent_projector(torch.ones(2, 1, 4)), g, inside, step_size=0.1, smoothness=1.0)
    with pytest.raises(errors.InputError, match="rank"):
        optimal_residual(torch.ones(4, 2), -1)
    with pytest.raises(errors.ShapeError):
        optimal_residual(torch.ones(4), 1)
