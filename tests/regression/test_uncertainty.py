"""Deviations and joint covariances of predictions, against dense algebra written out."""

import numpy as np
import pytest
import torch

import ntkops
from ntkops import errors
from ntkops.regression import KernelRidge
from tests.regression.problems import gram, labels, network, samples

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}


def reference(K, across, new, y, ridge):
    """s² (K_** - C (K + r)⁻¹ Cᵀ) with the profiled s², from dense kernels and columns (*batch, n, k)."""
    A = K + ridge * torch.eye(K.shape[-1], dtype=K.dtype)
    scale = (y * torch.linalg.solve(A, y)).sum() / y.numel()
    return scale * (new - across @ torch.linalg.solve(A, across.mT))


def problem(outputs, dtype=torch.float64, **options):
    model, x, x_new = network(dtype=dtype), samples(7, dtype=dtype), samples(4, seed=5, dtype=dtype)
    Y = labels(7, 3, dtype=dtype)
    K = ntkops.ntk(model, x, outputs=outputs, **options)
    new = ntkops.ntk(model, x_new, outputs=outputs, **options)
    y = Y.mT.unsqueeze(-1) if outputs == "each" else Y.reshape(-1, 1) if outputs == "all" else Y
    return K, K.cross(x_new), new, Y, y.double()


def in_shape(outputs, diagonal):
    if outputs == "each":
        return diagonal.mT
    return diagonal.reshape(4, 3) if outputs == "all" else diagonal.unsqueeze(-1).expand(4, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("method", "outputs"),
    [("cholesky", "all"), ("cholesky", "each"), ("eigh", "trace"), ("features", "all"), ("cg", "each")],
)
def test_deviations_and_covariances(outputs, method, dtype):
    K, cross, new, Y, y = problem(outputs, dtype)
    fit = KernelRidge(0.05, method=method, tol=1e-10 if dtype == torch.float64 else 1e-6).fit(K, Y)
    mean, std = fit.predict(cross, prior=new, return_std=True)
    again, covariance = fit.predict(cross, prior=new, return_cov=True)
    torch.testing.assert_close(mean, fit.predict(cross))
    torch.testing.assert_close(mean, again)
    dense = (part.to_dense().double() for part in (K, cross, new))
    truth = reference(*dense, y, fit.ridge_)
    atol = TOLERANCE[dtype] * float(truth.abs().max())
    assert covariance.dtype == std.dtype == dtype
    torch.testing.assert_close(covariance.to_dense().double(), truth, rtol=0, atol=atol)
    diagonal = truth.diagonal(dim1=-2, dim2=-1)
    torch.testing.assert_close(std.double().square(), in_shape(outputs, diagonal), rtol=0, atol=atol)
    torch.testing.assert_close(covariance.diagonal().double(), diagonal, rtol=0, atol=atol)
    right = labels(truth.shape[-1], 2, dtype=dtype)
    torch.testing.assert_close((covariance @ right).double(), truth @ right.double(), rtol=0, atol=4 * atol)


def test_nystrom_adds_what_its_features_miss():
    K = gram(20, 17)
    fit = KernelRidge(0.3, relative=False, method="nystrom", inducing=torch.tensor([0, 3, 6, 9])).fit(
        K[:12, :12], labels(12)
    )
    chosen, across = K[:12, [0, 3, 6, 9]], K[12:, [0, 3, 6, 9]]
    weights = torch.linalg.inv(K[:12, :12][[0, 3, 6, 9]][:, [0, 3, 6, 9]])
    low, seen = chosen @ weights @ chosen.mT, across @ weights @ chosen.mT
    truth = reference(low, seen, K[12:, 12:], labels(12, 1), 0.3)
    mean, covariance = fit.predict(K[12:, :12], prior=K[12:, 12:], return_cov=True)
    torch.testing.assert_close(covariance.to_dense(), truth, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(covariance.diagonal(), truth.diagonal(), rtol=1e-7, atol=1e-7)
    assert mean.shape == (5,)


def test_a_scalar_target_and_an_array():
    K = gram(20, 17)
    fit = KernelRidge("evidence").fit(K[:12, :12].numpy(), labels(12).numpy())
    mean, std = fit.predict(K[12:, :12].numpy(), prior=K[12:, 12:].numpy(), return_std=True)
    assert isinstance(mean, np.ndarray) and isinstance(std, np.ndarray) and mean.shape == std.shape == (5,)
    truth = reference(K[:12, :12], K[12:, :12], K[12:, 12:], labels(12, 1), fit.ridge_)
    np.testing.assert_allclose(std**2, truth.diagonal().numpy(), rtol=1e-6)


def test_variance_is_that_of_the_kernel_and_deviations_those_of_the_labels():
    K, Y = gram(20, 17), labels(12, 2)
    fit = KernelRidge(0.1).fit(K[:12, :12], Y)
    _, std = fit.predict(K[12:, :12], prior=K[12:, 12:], return_std=True)
    plain = fit.variance(K[12:, :12], K[12:, 12:].diagonal())
    scale = fit.noise_scale_**2 / fit.ridge_
    torch.testing.assert_close(std.square(), (scale * plain).unsqueeze(-1).expand(5, 2))


@pytest.mark.parametrize("outputs", ["all", "each"])
def test_covariances_are_sliced(outputs):
    K, cross, new, Y, y = problem(outputs)
    covariance = KernelRidge(0.05).fit(K, Y).predict(cross, prior=new, return_cov=True)[1]
    dense = covariance.to_dense()
    close = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(covariance[..., 1:3, 1:3].to_dense(), dense[..., 1:3, 1:3], **close)
    torch.testing.assert_close(covariance[..., 1:3, :2].to_dense(), dense[..., 1:3, :2], **close)
    torch.testing.assert_close(covariance[..., 1:3, 1:3].diagonal(), dense[..., 1:3, 1:3].diagonal(0, -2, -1))
    torch.testing.assert_close(covariance[..., 2:4, :2].diagonal(), dense[..., 2:4, :2].diagonal(0, -2, -1))
    torch.testing.assert_close(covariance.mT.to_dense(), dense.mT, **close)
    at = torch.tensor([0, 2])
    if outputs == "all":
        torch.testing.assert_close(covariance[at, at.flip(0)], dense[at, at.flip(0)], **close)
    else:
        with pytest.raises(errors.UnsupportedOperationError, match="share one fit"):
            covariance[0]


def test_new_labels_and_samples_of_the_process():
    # With the noise added the covariance has our solver, and a draw has the length that it should have.
    K, cross, new, Y, y = problem("all")
    fit = KernelRidge(0.05).fit(K, Y)
    covariance = fit.predict(cross, prior=new, return_cov=True)[1]
    noisy = covariance.add_jitter(fit.noise_scale_**2)
    assert type(noisy).__name__ == "RidgeOperator"
    truth = covariance.to_dense() + fit.noise_scale_**2 * torch.eye(12)
    torch.testing.assert_close(noisy.solve(labels(12)), torch.linalg.solve(truth, labels(12)))


def test_nothing_dense_is_made_where_that_is_forbidden():
    K, cross, new, Y, y = problem("all", max_dense_bytes=0)
    dense, dense_cross, dense_new, _, _ = problem("all")
    fit = KernelRidge(0.05, tol=1e-10).fit(K, Y)
    assert fit.method_ == "cg"
    mean, std = fit.predict(cross, prior=new, return_std=True)
    covariance = fit.predict(cross, prior=new, return_cov=True)[1]
    truth = reference(*(part.to_dense() for part in (dense, dense_cross, dense_new)), y, fit.ridge_)
    torch.testing.assert_close(std.flatten().square(), truth.diagonal(), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(covariance.diagonal(), truth.diagonal(), rtol=1e-6, atol=1e-12)
    torch.testing.assert_close(covariance @ labels(12), truth @ labels(12), rtol=1e-6, atol=1e-10)
    with pytest.raises(errors.DenseMemoryError, match="max_dense_bytes"):
        covariance.to_dense()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_at_the_training_samples_no_variance_is_negative(dtype):
    # The prior cancels to rounding there: .0 and not NaN.
    model, x = network(dtype=dtype), samples(30, dtype=dtype)
    K = ntkops.ntk(model, x, outputs=1)
    fit = KernelRidge("evidence").fit(K, K.to_dense() @ labels(30, dtype=dtype))
    _, std = fit.predict(K, prior=K, return_std=True)
    assert bool((std >= 0).all()) and float(std.max()) < 2 * fit.noise_scale_
    covariance = fit.predict(K, prior=K, return_cov=True)[1]
    assert bool((covariance.diagonal() >= 0).all())


class TestBadInput:
    K, Y = gram(20, 17), labels(12)

    @property
    def fit(self):
        return KernelRidge(0.1).fit(self.K[:12, :12], self.Y)

    def test_what_is_asked(self):
        fit, cross, new = self.fit, self.K[12:, :12], self.K[12:, 12:]
        with pytest.raises(errors.InputError, match="one of them"):
            fit.predict(cross, prior=new, return_std=True, return_cov=True)
        with pytest.raises(errors.InputError, match="with themselves"):
            fit.predict(cross, return_std=True)
        with pytest.raises(errors.InputError, match="with themselves"):
            fit.predict(cross, return_cov=True)
        with pytest.raises(errors.InputError, match="mean does not depend"):
            fit.predict(cross, prior=new)
        with pytest.raises(errors.InputError, match="True or False"):
            fit.predict(cross, prior=new, return_std="yes")

    def test_a_prior_that_does_not_fit(self):
        fit, cross, new = self.fit, self.K[12:, :12], self.K[12:, 12:]
        with pytest.raises(errors.ShapeError, match=r"\(5, 5\)"):
            fit.predict(cross, prior=new[:3, :3], return_std=True)
        with pytest.raises(errors.ShapeError, match="shape"):
            fit.predict(cross, prior=new.diagonal(), return_std=True)
        with pytest.raises(errors.DtypeError, match="float32"):
            fit.predict(cross, prior=new.float(), return_std=True)
        with pytest.raises(errors.NonFiniteError):
            fit.predict(cross, prior=new * float("nan"), return_cov=True)
        with pytest.raises(errors.InputError, match="does not belong"):
            fit.predict(cross, prior=0.01 * new, return_std=True)
        with pytest.raises(errors.InputError, match="does not belong"):
            fit.predict(cross, prior=0.01 * new, return_cov=True)[1].diagonal()

    def test_a_cut_off_is_no_process(self):
        fit = KernelRidge(0.1, cutoff=3).fit(self.K[:12, :12], self.Y)
        with pytest.raises(errors.UnsupportedOperationError, match="cut-off"):
            fit.predict(self.K[12:, :12], prior=self.K[12:, 12:], return_std=True)


class TestPriorsOfOtherSamples:
    model, x, x_new = network(), samples(7), samples(4, seed=5)

    def predict(self, prior, outputs="all", x_new=None, **options):
        K = ntkops.ntk(self.model, self.x, outputs=outputs)
        fit = KernelRidge(0.05).fit(K, labels(7, 3))
        return fit.predict(K.cross(self.x_new if x_new is None else x_new), prior=prior, return_std=True)

    def test_other_samples(self):
        other = ntkops.ntk(self.model, samples(4, seed=6))
        with pytest.raises(errors.InputError, match="other samples"):
            self.predict(other)
        with pytest.raises(errors.InputError, match="other samples"):
            self.predict(ntkops.ntk(self.model, self.x_new.flip(0)))
        with pytest.raises(errors.InputError, match="other samples"):
            self.predict(2 * other)

    def test_other_outputs(self):
        K = ntkops.ntk(self.model, self.x, outputs=0)
        fit = KernelRidge(0.05).fit(K, labels(7))
        with pytest.raises(errors.InputError, match="other outputs"):
            fit.predict(
                K.cross(self.x_new), prior=ntkops.ntk(self.model, self.x_new, outputs=1), return_std=True
            )

    def test_other_weights(self):
        with pytest.raises(errors.StaleOperatorError, match="the prior belongs to another snapshot"):
            self.predict(ntkops.ntk(network(seed=3), self.x_new))

    def test_equal_samples_in_other_tensors_are_welcome(self):
        one = self.predict(ntkops.ntk(self.model, self.x_new))
        two = self.predict(ntkops.ntk(self.model, self.x_new.clone()))
        torch.testing.assert_close(one, two)
        batches = [self.x_new[:2], self.x_new[2:]]
        torch.testing.assert_close(one, self.predict(ntkops.ntk(self.model, batches)))
        again = [part.clone() for part in batches]
        torch.testing.assert_close(one, self.predict(ntkops.ntk(self.model, again), x_new=batches))
        with pytest.raises(errors.InputError, match="other samples"):
            self.predict(ntkops.ntk(self.model, batches[::-1]), x_new=batches)
