"""The Laplace approximation of a linearised network, against dense algebra in the parameters."""

import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from linear_operator.operators import DiagLinearOperator
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, one_hot

import ntkops
from ntkops import LinearizedLaplace, errors
from tests.regression.problems import labels, network, reference_jacobian, samples

FILE = Path(__file__).with_name("laplace_torch.npz")
CLASSES = torch.tensor([0, 2, 1, 1, 0, 2, 2])


def poisson(outputs, targets):
    return (outputs.exp() - targets * outputs).sum()


LOSSES = {
    "cross_entropy": ("cross_entropy", CLASSES, lambda f: cross_entropy(f, CLASSES, reduction="sum")),
    "mse": ("mse", labels(7, 3), lambda f: (f - labels(7, 3)).square().sum() / (2 * 0.4**2)),
    "poisson": (poisson, labels(7, 3).exp(), lambda f: poisson(f, labels(7, 3).exp())),
}


@functools.cache
def point(dtype):
    """Return the network and its linearisation, once for all tests: what is found out about it is kept."""
    model = network(dtype=dtype)
    return model, ntkops.linearize(model)


def setting(kind, dtype=torch.float64):
    (model, shared), x, x_new = point(dtype), samples(7, dtype=dtype), samples(4, seed=5, dtype=dtype)
    loss, Y, value = LOSSES[kind]
    Y = Y.to(dtype) if Y.is_floating_point() else Y
    K = ntkops.ntk(shared, x)
    post = LinearizedLaplace(0.8, loss, noise_scale=0.4)
    return model, x, x_new, K, Y, post, value


def hessian(value, f):
    """The Hessian of a loss in the outputs, (n, n), by torch."""
    return torch.autograd.functional.hessian(lambda z: value(z.reshape(f.shape)), f.flatten())


def constant(kind):
    return 21 * math.log(0.4 * math.sqrt(2 * math.pi)) if kind == "mse" else 0.0


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", LOSSES)
def test_the_posterior_is_that_of_the_weights(kind, dtype):
    model, x, x_new, K, Y, post, value = setting(kind, dtype)
    assert post.fit(K, Y) is post
    wide, x, x_new = network(), x.double(), x_new.double()
    wide.load_state_dict(model.state_dict())
    J, J_new = (reference_jacobian(wide, part).flatten(0, 1) for part in (x, x_new))
    H = hessian(value, wide(x).detach())
    precision = J.mT @ H @ J + 0.8 * torch.eye(J.shape[1], dtype=torch.float64)
    truth = J_new @ torch.linalg.solve(precision, J_new.mT)
    cross, new = K.cross(x_new.to(dtype)), ntkops.ntk(model, x_new.to(dtype))
    mean, covariance = post.predict(cross, prior=new, return_cov=True)
    again, std = post.predict(cross, prior=new, return_std=True)
    torch.testing.assert_close(mean.double(), wide(x_new).detach(), rtol=0, atol=1e-5)
    torch.testing.assert_close(mean, again)
    atol = (1e-11 if dtype == torch.float64 else 1e-4) * float(truth.max())
    assert mean.dtype == std.dtype == covariance.dtype == dtype
    torch.testing.assert_close(covariance.to_dense().double(), truth, rtol=0, atol=atol)
    torch.testing.assert_close(covariance.diagonal().double(), truth.diagonal(), rtol=0, atol=atol)
    torch.testing.assert_close(std.double().square().flatten(), truth.diagonal(), rtol=0, atol=atol)
    # log p(Y | θ) + log p(θ) - ½ log|precision / δ|
    weights = weights_of(wide)
    evidence = -value(wide(x).detach()) - constant(kind) - 0.4 * weights.square().sum()
    evidence = evidence - torch.linalg.slogdet(precision / 0.8)[1] / 2
    found = post.log_marginal_likelihood()
    assert found.exact and float(found) == pytest.approx(
        float(evidence), rel=1e-12 if dtype == torch.float64 else 1e-4
    )


@pytest.mark.parametrize("center", ["zero", "network"])
@pytest.mark.parametrize("kind", LOSSES)
def test_the_mode_is_that_of_the_weights(kind, center):
    model, x, _, K, Y, post, value = setting(kind)
    post = post.set_params(prior_mean=center).fit(K, Y)
    J, f, weights = reference_jacobian(model, x).flatten(0, 1), model(x).detach(), weights_of(model)
    middle = weights * 0 if center == "zero" else weights

    def objective(theta):
        return value(f + (J @ (theta - weights)).reshape(f.shape)) + 0.4 * (theta - middle).square().sum()

    theta = weights.clone()
    step = theta
    while step.norm() > 1e-10:  # Newton in the parameters, halved until it descends; once more at the end
        gradient = torch.autograd.functional.jacobian(objective, theta)
        step = torch.linalg.solve(torch.autograd.functional.hessian(objective, theta), gradient)
        while objective(theta - step) > objective(theta) and step.norm() > 1e-14:
            step = step / 2
        theta = theta - step
    H = hessian(value, f + (J @ (theta - weights)).reshape(f.shape))
    determinant = torch.linalg.slogdet(torch.eye(J.shape[1], dtype=torch.float64) + J.mT @ H @ J / 0.8)[1]
    truth = float(-objective(theta) - determinant / 2) - constant(kind)
    assert float(post.log_marginal_likelihood(at="mode")) == pytest.approx(truth, rel=1e-10)
    if kind == "mse":
        assert truth >= float(post.log_marginal_likelihood())


@pytest.mark.parametrize("at", ["plug-in", "mode"])
@pytest.mark.parametrize("kind", LOSSES)
def test_the_evidence_is_differentiable_twice(kind, at):
    _, _, _, K, Y, post, _ = setting(kind)
    post.fit(K, Y)

    def value(delta):
        return post.log_marginal_likelihood(delta, at=at).value

    delta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    assert float(value(delta).detach()) == pytest.approx(float(value(0.7)), abs=1e-9)
    (slope,) = torch.autograd.grad(value(delta), delta, create_graph=True)
    (bend,) = torch.autograd.grad(slope, delta)
    ends = [torch.tensor(0.7 + step, dtype=torch.float64, requires_grad=True) for step in (-1e-4, 1e-4)]
    values = [value(end) for end in ends]
    slopes = [torch.autograd.grad(one, end)[0] for one, end in zip(values, ends, strict=True)]
    assert float(slope.detach()) == pytest.approx(float((values[1] - values[0]).detach()) / 2e-4, rel=1e-5)
    assert float(bend) == pytest.approx(float(slopes[1] - slopes[0]) / 2e-4, rel=1e-5)


def test_a_gaussian_process_has_the_evidence_at_the_mode():
    # Squared errors, prior around the network: N(Y; f, K / δ + σ²).
    model, x, _, K, Y, post, _ = setting("mse")
    post = post.set_params(prior_mean="network").fit(K, Y)
    residual = (Y - model(x).detach()).flatten()
    covariance = K.to_dense() / 0.8 + 0.16 * torch.eye(21, dtype=torch.float64)
    truth = torch.distributions.MultivariateNormal(torch.zeros(21).double(), covariance).log_prob(residual)
    assert float(post.log_marginal_likelihood(at="mode")) == pytest.approx(float(truth), rel=1e-12)


def test_where_the_network_is_its_own_mode_both_agree():
    # A linear model, trained to the end with weight decay δ.
    x, model = samples(7), torch.nn.Linear(4, 3).double()
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=500,
        tolerance_grad=1e-13,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model(x), CLASSES, reduction="sum")
        loss = loss + 0.4 * sum(p.square().sum() for p in model.parameters())
        loss.backward()
        return loss

    optimizer.step(closure)
    post = LinearizedLaplace(0.8).fit(ntkops.ntk(model, x), CLASSES)
    one, two = (float(post.log_marginal_likelihood(at=at)) for at in ("plug-in", "mode"))
    assert one == pytest.approx(two, abs=1e-9)


@pytest.mark.parametrize("together", [True, False])
def test_one_precision_for_each_parameter(together):
    model, x, x_new, K, Y, post, value = setting("cross_entropy")
    variances = torch.linspace(0.1, 3, K.left.shape[1]).double()
    shared = ntkops.linearize(model) if together else model
    J, J_new = ntkops.jacobian(shared, x), ntkops.jacobian(shared, x_new)
    post.fit(ntkops.sandwich(J, variances), Y)
    cross = ntkops.sandwich(J_new, variances, J)
    _, covariance = post.predict(cross, prior=ntkops.sandwich(J_new, variances), return_cov=True)
    dense, dense_new = J.to_dense(), J_new.to_dense()
    precision = dense.mT @ hessian(value, model(x).detach()) @ dense + torch.diag(0.8 / variances)
    truth = dense_new @ torch.linalg.solve(precision, dense_new.mT)
    torch.testing.assert_close(covariance.to_dense(), truth, rtol=0, atol=1e-11)
    with pytest.raises(errors.UnsupportedOperationError, match="precision for each weight: take prior_mean"):
        post.log_marginal_likelihood()
    post.set_params(prior_mean="network").fit(ntkops.sandwich(J, variances), Y)
    assert math.isfinite(float(post.log_marginal_likelihood(at="mode")))


def test_outputs_of_your_own_and_dense_kernels():
    model, x, x_new, K, Y, post, _ = setting("cross_entropy")
    mean, std = post.fit(K, Y).predict(K.cross(x_new), prior=ntkops.ntk(model, x_new), return_std=True)
    dense, cross, new = (part.to_dense() for part in (K, K.cross(x_new), ntkops.ntk(model, x_new)))
    f, f_new = model(x).detach(), model(x_new).detach()
    post.fit(dense, one_hot(Y, 3).double(), offset=f)
    again, spread = post.predict(cross, prior=new, offset=f_new, return_std=True)
    torch.testing.assert_close(again, mean)
    torch.testing.assert_close(spread, std)
    with pytest.raises(errors.InputError, match="give predict"):
        post.predict(cross)
    with pytest.raises(errors.ShapeError, match="due is"):
        post.predict(cross, offset=f_new[:2])
    with pytest.raises(errors.DtypeError, match="float32"):
        post.predict(cross, offset=f_new.float())
    with pytest.raises(errors.InputError, match="pass them to fit"):
        post.fit(K, Y).predict(K.cross(x_new), offset=f_new)


def test_rows_that_are_no_outputs_have_no_network():
    model, x, _, K, Y, post, _ = setting("cross_entropy")
    S = torch.linspace(0.5, 2, K.shape[0]).double()
    for kernel in (ntkops.sandwich(torch.diag(S), K), ntkops.sandwich(DiagLinearOperator(S), K)):
        with pytest.raises(errors.InputError, match="outputs yourself"):
            post.fit(kernel, Y)
        with pytest.raises(errors.InputError, match="outputs yourself"):
            ntkops.KernelRidge(0.1, offset="network").fit(kernel, labels(7, 3))


def test_classes_come_last():
    torch.manual_seed(0)
    model, x = torch.nn.Conv2d(1, 3, 3, padding=1).double(), samples(4, 9).reshape(4, 1, 3, 3)
    Y = torch.randint(3, (4, 3, 3))  # as many classes as columns of an image: shapes tell nothing
    K = ntkops.ntk(model, x, axes=("class", "height", "width"))
    with pytest.raises(errors.InputError, match="movedim"):
        LinearizedLaplace().fit(K, Y)
    post = LinearizedLaplace().fit(ntkops.ntk(model, x, output=lambda f: f.movedim(1, -1)), Y)
    assert post.log_likelihood_ == pytest.approx(-cross_entropy(model(x), Y, reduction="sum").item())


@pytest.mark.parametrize("kind", LOSSES)
def test_labels_and_outputs_may_change_afterwards(kind):
    model, x, _, K, Y, post, _ = setting(kind)
    Y, outputs = Y.clone(), model(x).detach()
    post.fit(K, Y, offset=outputs)
    before = [float(post.log_marginal_likelihood(at=at)) for at in ("plug-in", "mode")]
    Y.zero_()
    outputs.zero_()
    after = [float(post.log_marginal_likelihood(at=at)) for at in ("plug-in", "mode")]
    assert after == pytest.approx(before, rel=1e-12)


def test_two_classes_of_one_logit():
    model, x, y = network(outputs=1), samples(7), (CLASSES > 0).double().unsqueeze(1)

    def loss(outputs, targets):
        return binary_cross_entropy_with_logits(outputs, targets, reduction="sum")

    post = LinearizedLaplace(0.5, loss).fit(ntkops.ntk(model, x), y)
    J, f = reference_jacobian(model, x).flatten(0, 1), model(x).detach()
    H = hessian(lambda z: loss(z, y), f)
    truth = -loss(f, y) - 0.25 * weights_of(model).square().sum()
    truth = (
        truth - torch.linalg.slogdet(torch.eye(J.shape[1], dtype=torch.float64) + J.mT @ H @ J / 0.5)[1] / 2
    )
    assert float(post.log_marginal_likelihood()) == pytest.approx(float(truth), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_saturated_classes_leave_the_prior(dtype):
    # Logits of 1e4: the Hessian is zero, and its inverse would overflow.
    model, x, x_new = network(dtype=dtype), samples(7, dtype=dtype), samples(4, seed=5, dtype=dtype)
    with torch.no_grad():
        for p in model[-1].parameters():
            p.mul_(1e4)
    K, new = ntkops.ntk(model, x), ntkops.ntk(model, x_new)
    certain = model(x).argmax(-1)
    post = LinearizedLaplace(2.0).fit(K, certain)
    _, std = post.predict(K.cross(x_new), prior=new, return_std=True)
    torch.testing.assert_close(std.square().flatten(), new.diagonal() / 2, rtol=1e-3, atol=0)
    assert post.log_likelihood_ == pytest.approx(0.0, abs=1e-3)


def test_nothing_dense_is_made_where_that_is_forbidden():
    model, x, x_new, K, Y, post, _ = setting("cross_entropy")
    lazy = ntkops.ntk(model, x, max_dense_bytes=0)
    new, cross = ntkops.ntk(model, x_new), lazy.cross(x_new)
    _, std = post.fit(K, Y).predict(K.cross(x_new), prior=new, return_std=True)
    values = [float(post.log_marginal_likelihood(at=at)) for at in ("plug-in", "mode")]
    post.fit(lazy, Y)
    assert post.method_ == "cg"
    _, found = post.predict(cross, prior=ntkops.ntk(model, x_new, max_dense_bytes=0), return_std=True)
    torch.testing.assert_close(found, std, rtol=1e-4, atol=1e-7)
    covariance = post.predict(cross, prior=new, return_cov=True)[1]
    with pytest.raises(errors.DenseMemoryError):
        covariance.to_dense()
    for at, value in zip(("plug-in", "mode"), values, strict=True):
        estimate = post.log_marginal_likelihood(at=at)
        assert not estimate.exact and abs(float(estimate) - value) < 3
    with pytest.raises(errors.UnsupportedOperationError, match="gradient"):
        post.log_marginal_likelihood(torch.tensor(1.0, requires_grad=True))


def test_small_determinants_are_exact():
    # Stochastic quadrature would take a hundred products a row here.
    _, _, _, K, Y, post, _ = setting("cross_entropy")
    found = post.fit(K, Y).log_marginal_likelihood()
    assert found.exact and found.passes < 200


@pytest.fixture(scope="module")
def recorded():
    with np.load(FILE) as found:
        return {name: torch.from_numpy(np.array(found[name])) for name in found.files}


class TestLaplaceTorch:
    """Numbers that laplace-torch 0.3 gave in float64; record_laplace_torch.py has made them."""

    def fit(self, recorded, name, delta):
        outputs = recorded[f"{name}_2.bias"].numel()
        model = torch.nn.Sequential(
            torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, outputs)
        ).double()
        model.load_state_dict({key: recorded[f"{name}_{key}"] for key in model.state_dict()})
        x, y, x_new = (recorded[f"{name}_{key}"] for key in ("x", "y", "x_new"))
        K = ntkops.ntk(model, x)
        loss = "cross_entropy" if name == "classes" else "mse"
        post = LinearizedLaplace(delta, loss, noise_scale=0.3).fit(K, y)
        return post, K.cross(x_new), ntkops.ntk(model, x_new)

    @pytest.mark.parametrize("name", ["classes", "numbers"])
    def test_its_full_approximation_is_ours(self, recorded, name):
        for number, delta in enumerate(recorded["precisions"].tolist()):
            post, cross, new = self.fit(recorded, name, delta)
            mean, covariance = post.predict(cross, prior=new, return_cov=True)
            truth = recorded[f"{name}_covariance_{number}"]
            torch.testing.assert_close(mean, recorded[f"{name}_mean"], rtol=0, atol=1e-12)
            torch.testing.assert_close(
                covariance.to_dense(), truth, rtol=0, atol=1e-10 * float(truth.abs().max())
            )
            evidence = recorded[f"{name}_evidence_{number}"]
            assert float(post.log_marginal_likelihood()) == pytest.approx(float(evidence), abs=1e-10)
            assert post.log_likelihood_ == pytest.approx(float(recorded[f"{name}_likelihood"]), abs=1e-10)

    def test_where_its_functional_route_deviates(self, recorded):
        # It takes each sample's Hessian for its diagonal: right for squared errors, not for classes.
        shares = {}
        for name in ("classes", "numbers"):
            post, cross, new = self.fit(recorded, name, 1.0)
            _, std = post.predict(cross, prior=new, return_std=True)
            theirs = recorded[f"{name}_functional_variance"].diagonal(dim1=-2, dim2=-1)
            shares[name] = float(((theirs - std.square()).abs() / std.square()).max())
        assert shares["numbers"] < 1e-10 and 0.5 < shares["classes"] < 0.8
        # Its evidence of the squared errors is above the largest possible, that at the mode.
        best = float(post.log_marginal_likelihood(at="mode"))
        assert float(recorded["numbers_functional_evidence"]) > best + 50


class TestBadInput:
    model, x = network(), samples(7)

    @property
    def K(self):
        return ntkops.ntk(self.model, self.x)

    def test_options(self):
        for options, match in (
            ({"prior_precision": 0.0}, "above 0"),
            ({"prior_precision": -1.0}, "above 0"),
            ({"prior_precision": float("nan")}, "above 0"),
            ({"prior_precision": "large"}, "prior_precision"),
            ({"loss": "hinge"}, "hinge"),
            ({"noise_scale": 0.0}, "above 0"),
            ({"prior_mean": "one"}, "prior_mean"),
        ):
            with pytest.raises(errors.InputError, match=match):
                LinearizedLaplace(**options).fit(self.K, CLASSES)

    def test_targets(self):
        with pytest.raises(errors.InputError, match="pass the labels"):
            LinearizedLaplace().fit(self.K, None)
        with pytest.raises(errors.OutOfRangeError, match="classes go from 0 to 2"):
            LinearizedLaplace().fit(self.K, CLASSES + 1)
        with pytest.raises(errors.ShapeError):
            LinearizedLaplace().fit(self.K, CLASSES[:6])
        with pytest.raises(errors.DtypeError, match="floating"):
            LinearizedLaplace(loss="mse").fit(self.K, CLASSES)
        with pytest.raises(errors.NonFiniteError):
            LinearizedLaplace(loss="mse").fit(self.K, labels(7, 3) * float("inf"))
        with pytest.raises(errors.InputError, match="not convex in the outputs of sample 0"):
            LinearizedLaplace(loss=lambda f, y: -(f - y).square().sum() / 4).fit(self.K, labels(7, 3))

    def test_kernels(self):
        for outputs in ("each", "trace"):
            with pytest.raises((errors.ShapeError, errors.UnsupportedOperationError), match="outputs="):
                LinearizedLaplace().fit(ntkops.ntk(self.model, self.x, outputs=outputs), CLASSES)
        with pytest.raises(errors.ShapeError, match="one row for each output"):
            LinearizedLaplace().fit(torch.eye(7).double(), CLASSES, offset=labels(7, 3))
        with pytest.raises(errors.InputError, match="outputs"):
            LinearizedLaplace().fit(self.K, CLASSES, offset=None)
        with pytest.raises(errors.InputError, match="'network'"):
            LinearizedLaplace().fit(self.K, CLASSES, offset="teacher")
        with pytest.raises(errors.DtypeError, match="cast"):
            LinearizedLaplace().fit(self.K, CLASSES, offset=labels(7, 3).float())
        with pytest.raises(errors.ShapeError, match="square kernel"):
            LinearizedLaplace().fit(self.K.cross(samples(3)), CLASSES)

    def test_predictions(self):
        post, x_new = LinearizedLaplace(), samples(4, seed=5)
        with pytest.raises(errors.NotFittedError):
            post.predict(self.K)
        with pytest.raises(errors.NotFittedError):
            post.log_marginal_likelihood()
        K = self.K
        post.fit(K, CLASSES)
        cross, new = K.cross(x_new), ntkops.ntk(self.model, x_new)
        with pytest.raises(errors.InputError, match="other samples"):
            post.predict(cross, prior=ntkops.ntk(self.model, samples(4, seed=9)), return_std=True)
        with pytest.raises(errors.InputError, match="with themselves"):
            post.predict(cross, return_cov=True)
        with pytest.raises(errors.InputError, match="does not belong"):
            post.predict(cross, prior=new.to_dense() / 100, return_std=True)
        with pytest.raises(errors.StaleOperatorError, match="another snapshot"):
            post.predict(ntkops.ntk(network(seed=3), x_new, self.x), prior=new, return_std=True)
        for delta in (0.0, -2.0, float("inf"), "one"):
            with pytest.raises(errors.InputError, match="above 0"):
                post.log_marginal_likelihood(delta)
        with pytest.raises(errors.InputError, match="'plug-in' or 'mode'"):
            post.log_marginal_likelihood(at="map")

    def test_a_precision_that_rounding_swallows(self):
        x, Y = samples(40, dtype=torch.float32), labels(40, 3, dtype=torch.float32)
        K = ntkops.ntk(network(dtype=torch.float32), x).to_dense()  # rank 99 of 120
        with pytest.raises(errors.SingularKernelError, match="prior precision"):
            LinearizedLaplace(1e-9, "mse").fit(K, Y, offset=Y)


@pytest.mark.parametrize("kind", LOSSES)
def test_float32_has_the_digits_that_it_can_have(kind):
    # Values and derivatives, at the weights and at the mode, beside the same network in float64.
    found = []
    for dtype in (torch.float64, torch.float32):
        model = network()
        model.to(torch.float32).to(dtype)  # the same weights
        x = samples(7).float().to(dtype)
        loss, Y, _ = LOSSES[kind]
        Y = Y.float().to(dtype) if Y.is_floating_point() else Y
        post = LinearizedLaplace(0.8, loss, noise_scale=0.4).fit(ntkops.ntk(model, x), Y)
        for at in ("plug-in", "mode"):
            delta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
            value = post.log_marginal_likelihood(delta, at=at).value
            found.append([value.detach(), *torch.autograd.grad(value, delta)])
    for precise, coarse in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(torch.stack(coarse), torch.stack(precise), rtol=1e-5, atol=1e-5)
