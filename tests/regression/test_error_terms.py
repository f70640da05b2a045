"""Appendix B with its errata: each claim that fails as printed is shown to fail, with numbers."""

import pytest
import torch

import ntkops
from ntkops import errors
from ntkops.regression import KernelRidge, error_terms, projection_error, truncation_error
from tests.regression.problems import gram, labels, network, samples


def population(count, mu, seed=0):
    """Return features of ``count`` points whose covariance is exactly diag(mu)."""
    q = torch.linalg.qr(labels(count, len(mu), seed=seed))[0]
    return q * (count * torch.as_tensor(mu, dtype=torch.float64)).sqrt()


MU = [4.0, 1.0, 0.3, 0.05]
WEIGHTS = torch.tensor([[1.0, 0.0], [-0.5, 2.0], [1.0, 1.0], [0.3, -1.0]], dtype=torch.float64)


def test_terms_of_a_population_known_exactly():
    F, outside = population(60, MU), labels(60, 2, seed=9)
    outside -= F @ torch.linalg.lstsq(F, outside).solution  # what the features cannot give
    Y = F @ WEIGHTS + outside
    weight, count = 0.2, 25
    terms = error_terms(F @ F.mT, Y, ridge=weight * 60, num_samples=count)
    mu = torch.tensor(MU, dtype=torch.float64)
    sigma2 = outside.square().mean(0)
    torch.testing.assert_close(terms.approximation, sigma2)
    torch.testing.assert_close(terms.r2, 1 - sigma2 / Y.square().mean(0))
    shrink = (weight / (mu + weight)).square() * mu
    torch.testing.assert_close(terms.bias, shrink @ WEIGHTS.square())
    torch.testing.assert_close(terms.variance, sigma2 / count * (mu / (mu + weight)).square().sum())
    dimension = (mu / (mu + weight)).sum()
    torch.testing.assert_close(terms.effective_dimension, dimension)
    torch.testing.assert_close(terms.variance_bound, sigma2 * dimension / count)
    assert (terms.variance <= terms.variance_bound).all()
    energy = mu.unsqueeze(1) * WEIGHTS.square() / Y.square().mean(0)
    torch.testing.assert_close(terms.label_energy[:4], energy)
    assert terms.label_energy[4:].abs().max() < 1e-20


def test_bias_is_what_the_ridge_takes_from_the_fit():
    F = population(60, MU)
    Y = F @ WEIGHTS
    ridge = 3.0
    fitted = KernelRidge(ridge, relative=False).fit(F @ F.mT, Y)
    shrunk = (Y - fitted.predict(F @ F.mT)).square().mean(0)
    torch.testing.assert_close(error_terms(F @ F.mT, Y, ridge).bias, shrunk)


def test_variance_is_what_repeated_noise_shows():
    # Fixed design: Var of the fitted values, mean over the points, is σ²/n Σ μ²/(μ+λ)² exactly.
    F = population(40, MU)
    K, ridge, sigma2 = F @ F.mT, 5.0, 0.7
    hat = K @ torch.linalg.inv(K + ridge * torch.eye(40).double())
    exact = sigma2 * hat.square().sum() / 40
    found = error_terms(K, labels(40), ridge, noise=sigma2)
    torch.testing.assert_close(found.variance, exact)


def test_shapes_of_the_terms():
    model, x = network(), samples(9)
    for outputs, Y, shape in (("each", labels(9, 3), (3,)), ("all", labels(9, 3), ()), (0, labels(9), ())):
        K = ntkops.ntk(model, x, outputs=outputs)
        terms = error_terms(K, Y, 0.1, noise=0.5)
        assert terms.bias.shape == terms.variance.shape == terms.r2.shape == shape
        assert (terms.root_mean_square_bound >= terms.bias.sqrt()).all()
    K = ntkops.ntk(model, x, outputs="each")
    each = error_terms(K, labels(9, 3), 0.1, noise=torch.tensor([1.0, 2.0, 3.0]))
    single = error_terms(K[1], labels(9, 3)[:, 1], 0.1, noise=2.0)
    torch.testing.assert_close(each.variance[1], single.variance)
    torch.testing.assert_close(each.label_energy[1], single.label_energy)


def test_label_energy_sums_to_r2():
    K, Y = gram(5), labels(12, 2)
    terms = error_terms(K, Y, 0.1)
    torch.testing.assert_close(terms.label_energy.sum(-2), terms.r2)


# errata


def test_erratum_variance_with_cubed_eigenvalues_depends_on_units():
    # Features in other units, c φ, with ridge c² r: the same predictor, so the same variance.
    F, Y = population(40, MU), labels(40)
    for factor in (1.0, 10.0):
        scaled = error_terms(factor**2 * F @ F.mT, Y, factor**2 * 2.0, noise=1.0)
        mu, weight = factor**2 * torch.tensor(MU).double(), factor**2 * 2.0 / 40
        ours, printed = (mu / (mu + weight)).square().sum() / 40, (mu**3 / (mu + weight) ** 2).sum() / 40
        torch.testing.assert_close(scaled.variance, ours)
        if factor == 10.0:
            assert printed > 100 * scaled.variance  # beyond its own bound σ² d(λ)/n
            assert printed > scaled.variance_bound


def test_erratum_signal_weight_of_equation_22():
    # (Σ + λ)⁻¹ Σ w, without another 1/n, is what ridge regression makes of y = Φ w.
    F, w, weight = population(40, MU), WEIGHTS[:, :1], 0.1
    covariance = F.mT @ F / 40
    shifted = covariance + weight * torch.eye(4).double()
    fitted = torch.linalg.solve(shifted, F.mT @ (F @ w) / 40)
    torch.testing.assert_close(fitted, torch.linalg.solve(shifted, covariance @ w))
    assert (torch.linalg.solve(shifted, covariance @ w) / 40).norm() < 0.03 * fitted.norm()


@pytest.mark.parametrize("r", [1, 2, 3])
def test_erratum_bias_saturates(r):
    # w = Σʳ ξ: the paper has bias = O(λʳ). Tikhonov's qualification is 1 for every r >= 1.
    mu = torch.logspace(0, -1, 6, dtype=torch.float64)
    F = population(30, mu.tolist())
    Y = F @ (mu**r * labels(6, seed=2)).unsqueeze(1)
    small, smaller = (float(error_terms(F @ F.mT, Y, 30 * w).bias.sqrt()) for w in (1e-4, 1e-5))
    exponent = torch.log10(torch.tensor(small / smaller))
    assert float(exponent) == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0, 2.0])
def test_erratum_proposition_b6_needs_a_square_root(decay):
    values = torch.arange(1, 101, dtype=torch.float64) ** -decay
    delta = 0.05
    found = truncation_error(torch.diag(values), delta)
    rank = int(found.rank)
    assert float(values[:rank].sum()) >= (1 - delta) * float(values.sum()) * (1 - 1e-12)
    assert rank == 100 or float(values[: rank - 1].sum()) < (1 - delta) * float(values.sum())
    exact = values[rank:].norm() / values.norm()
    torch.testing.assert_close(found.error, exact)
    assert found.error <= found.bound * (1 + 1e-12)
    printed = delta * values[rank] / values.mean()
    if decay <= 1:
        assert found.error > printed  # false as printed
    if decay == 0.0:
        assert float(found.error) == pytest.approx(0.224, abs=1e-3) and float(printed) == pytest.approx(0.05)


def test_erratum_projections_do_not_preserve_eigenvalues():
    # k a little above n: the eigenvalues of a flat kernel spread over (1 ± √(n/k))² (Marchenko, Pastur).
    n, k = 200, 205
    projected = labels(n, k) / k**0.5  # J = I with n features, Gaussian projection
    values = torch.linalg.eigvalsh(projected @ projected.mT)
    assert values[-1] > 3.5 and values[0] < 1e-3  # where k = O(log n / ε²) is said to give 1 ± ε


def jl_problem(seed=0, n=30, rows=6, P=400, k=60):
    F, F_new = labels(n, P, seed=seed), labels(rows, P, seed=seed + 50)
    S = labels(P, k, seed=seed + 100) / k**0.5
    return F, F_new, F @ S, F_new @ S


@pytest.mark.parametrize("seed", range(5))
def test_projection_terms_are_exact_and_bounded(seed):
    F, F_new, G, G_new = jl_problem(seed)
    Y, ridge = labels(30, 2, seed=seed), 20.0
    found = projection_error(
        F @ F.mT, F_new @ F.mT, G @ G.mT, G_new @ G.mT, Y, ridge, K_diag=F_new.square().sum(1)
    )
    exact = KernelRidge(ridge, relative=False).fit(F @ F.mT, Y).predict(F_new @ F.mT)
    approximate = KernelRidge(ridge, relative=False).fit(G @ G.mT, Y).predict(G_new @ G.mT)
    torch.testing.assert_close(found.total, exact - approximate)
    assert (found.test_kernel.abs() <= found.test_kernel_bound).all()
    assert (found.inverse.abs() <= found.inverse_bound).all()
    assert 0 < found.epsilon < 1


def test_erratum_errors_are_not_relative_to_the_entries():
    # B.2 has |K̃ - K| <= ε |K_ij|. Inner products near zero have no such bound.
    F, _, G, _ = jl_problem()
    K, projected = F @ F.mT, G @ G.mT
    lengths = K.diagonal().sqrt()
    off = ~torch.eye(30, dtype=torch.bool)
    of_lengths = ((projected - K).abs() / (lengths.unsqueeze(1) * lengths))[off].max()
    of_entries = ((projected - K).abs() / K.abs())[off].max()
    assert of_lengths < 0.6 and of_entries > 50


def test_printed_bound_of_the_projection_terms_fails():
    # With ε |K_*| instead of ε |φ_*| √tr K, a test point orthogonal to the samples has bound zero.
    F, F_new, G, G_new = jl_problem()
    basis = torch.linalg.qr(F.mT)[0]
    F_new = F_new - F_new @ basis @ basis.mT
    G_new = F_new @ (labels(400, 60, seed=100) / 60**0.5)
    found = projection_error(
        F @ F.mT, F_new @ F.mT, G @ G.mT, G_new @ G.mT, labels(30), 20.0, K_diag=F_new.square().sum(1)
    )
    smallest = torch.linalg.eigvalsh(G @ G.mT)[0]
    printed = found.epsilon * (F_new @ F.mT).norm(dim=1) * labels(30).norm() / (smallest + 20.0)
    assert (found.test_kernel.abs() > 1e6 * printed).all()
    assert (found.test_kernel.abs() <= found.test_kernel_bound).all()


@pytest.mark.parametrize("sigma", [0.1, 10.0])
def test_erratum_approximation_error_is_a_root(sigma):
    # A linear model plus what no feature gives: B.1 derives ε² = (1 - R²) Var f, and then writes ε for it.
    F, outside = population(60, MU), labels(60, 1, seed=9)
    columns = torch.cat([F, torch.ones(60, 1).double()], dim=1)  # f has mean zero, as B.1 assumes
    outside -= columns @ torch.linalg.lstsq(columns, outside).solution
    outside *= sigma / outside.square().mean().sqrt()
    F = F - F.mean(0)
    terms = error_terms(F @ F.mT, F @ WEIGHTS[:, :1] + outside, ridge=1e-9)
    unexplained = float((1 - terms.r2) * (F @ WEIGHTS[:, :1] + outside).square().mean())
    root = float((outside.square().mean()).sqrt())
    assert unexplained == pytest.approx(float(terms.approximation)) == pytest.approx(root**2)
    assert not 0.5 < unexplained / root < 2  # as printed it is not even in the units of f


def test_erratum_the_two_laws_of_the_approximation_error():
    # What is quadratic in Δθ leaves a root mean square ~ |Δθ|² |H|, and (1 - R²) Var f ~ |Δθ|⁴ |H|²: the text
    # has both equal to each other and to the first.
    F, H = population(60, MU), labels(60, 1, seed=3)
    H -= F @ torch.linalg.lstsq(F, H).solution  # second derivatives along Δθ, outside the span of gradients
    found = []
    for length in (1.0, 0.1):
        Y = F @ WEIGHTS[:, :1] + length**2 * H / 2
        found.append(float(error_terms(F @ F.mT, Y, ridge=1e-9).approximation))
    ratio = found[0] / found[1]
    assert ratio == pytest.approx(1e4, rel=1e-6)  # (1 - R²) Var f
    assert ratio**0.5 == pytest.approx(1e2, rel=1e-6)  # its root, which has the law of the text


def test_erratum_the_constant_of_the_projection_lemma():
    # Dasgupta and Gupta, cited by section 4.2: k >= 4 ln n / (ε²/2 - ε³/3), above 8 ln n / ε² for any ε.
    epsilon = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    classical, printed = 4 / (epsilon**2 / 2 - epsilon**3 / 3), 8 / epsilon**2
    assert bool((classical > printed).all())
    assert float((classical / printed)[9]) == pytest.approx(1.5)  # at ε = 1/2


def test_erratum_kept_distances_are_no_kept_kernel_without_the_origin():
    # A linear map that keeps every distance between the samples, and loses what they have in common.
    V = torch.linalg.qr(labels(50, 8, seed=1))[0]
    common = V[:, 7]
    F = labels(12, 7, seed=2) @ V[:, :7].mT + 3 * common
    G = F - (F @ common).unsqueeze(1) * common
    torch.testing.assert_close(torch.cdist(G, G), torch.cdist(F, F))
    torch.testing.assert_close(F @ F.mT - G @ G.mT, torch.full((12, 12), 9.0).double())


# bad input


def test_messages():
    K, Y = gram(20), labels(12)
    with pytest.raises(errors.InputError, match="ridge"):
        error_terms(K, Y, 0.0)
    with pytest.raises(errors.InputError, match="num_samples"):
        error_terms(K, Y, 1.0, num_samples=0)
    with pytest.raises(errors.InputError, match="noise"):
        error_terms(K, Y, 1.0, noise=-1.0)
    with pytest.raises(errors.ShapeError, match="noise"):
        error_terms(K, Y, 1.0, noise=torch.ones(3))
    with pytest.raises(errors.ShapeError, match="square"):
        error_terms(K[:5], Y, 1.0)
    with pytest.raises(errors.ZeroKernelError):
        error_terms(torch.zeros(3, 3), torch.ones(3), 1.0)
    with pytest.raises(errors.InputError, match="delta"):
        truncation_error(K, 1.5)
    with pytest.raises(errors.ShapeError, match="square"):
        truncation_error(K[:5], 0.1)
    across, prior = labels(5, 12), torch.ones(5).double()
    with pytest.raises(errors.InputError, match="ridge"):
        projection_error(K, across, K, across, Y, 0.0, K_diag=prior)
    with pytest.raises(errors.ShapeError, match="due is"):
        projection_error(K, across[:, :5], K, across, Y, 1.0, K_diag=prior)
    with pytest.raises(errors.ShapeError, match="K_diag"):
        projection_error(K, across, K, across, Y, 1.0, K_diag=prior[:2])
    with pytest.raises(errors.ZeroKernelError):
        projection_error(K, across, K, across, Y, 1.0, K_diag=0 * prior)
