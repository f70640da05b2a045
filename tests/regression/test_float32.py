"""What float32 leaves of a regression: exact duals, rounding of predictions, ridges that mean something."""

import copy
import re
import warnings

import pytest
import torch
from torch import nn

import ntkops
from ntkops import errors
from ntkops.operators import rounding
from ntkops.regression import KernelRidge, _rounding
from ntkops.regression._rounding import precise_product
from tests.regression.problems import gram, labels

D = torch.float64


def network(seed=0, width=64, inputs=8):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(inputs, width), nn.Tanh(), nn.Linear(width, 1))


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def problems():
    """K of 300 samples in float32, by parameters, and its entries in float64."""
    x = draw(300, 8, seed=1)
    kernels = {params: ntkops.ntk(network(), x, params=params) for params in (None, "2.*")}
    return {params: (K, K.to_dense().double()) for params, K in kernels.items()}, draw(300, 1, seed=2)


@pytest.mark.parametrize("method", ["cholesky", "eigh", "features", "nystrom", "cg", "auto"])
@pytest.mark.parametrize(("params", "ridge"), [(None, 1e-4), (None, 1e-5), ("2.*", 1e-4)])
def test_duals_and_predictions_are_those_of_float64_on_the_same_kernel(problems, params, ridge, method):
    K, dense = problems[0][params]
    y = problems[1]
    r = ridge * float(dense.diagonal().mean())
    A = dense + r * torch.eye(300, dtype=D)
    options = {"inducing": torch.arange(300)} if method == "nystrom" else {}
    given = dense.float() if method == "cg" else K
    if method == "features" and params is None:
        pytest.skip("more features than rows")
    fitted = KernelRidge(ridge, method=method, **options).fit(given, y)
    assert fitted.dual_coef_.dtype == D and fitted.predict(dense.float()).dtype == torch.float32
    if method == "nystrom":
        return  # the system of all inducing points is another one, and its whitening cuts rounding off
    true = float((A @ fitted.dual_coef_ - y.double()).norm() / y.norm())
    reported = float(fitted.solve_info_.residuals.max())
    if fitted.method_ != "features":  # which takes F in float64, and K = F Fᵀ by it
        assert reported / 10 <= true <= 10 * reported + 1e-13
        expected = dense @ torch.linalg.solve(A, y.double())
        found = fitted.predict(dense.float()).double()
        assert float((found - expected).norm() / expected.norm()) < (1e-5 if method == "cg" else 1e-6)
        assert fitted.rounding_ == 0


def test_a_ridge_that_float32_decides_is_refused_by_every_method(problems):
    K, dense = problems[0]["2.*"]
    for method in ("cholesky", "eigh"):
        with pytest.raises(errors.SingularKernelError, match=r"smallest ridge that means something.*float64"):
            KernelRidge(1e-6, method=method).fit(K, problems[1])
    # The same ridge means something where the kernel has it in its digits.
    KernelRidge(1e-6).fit(
        ntkops.ntk(network().double(), draw(300, 8, seed=1).double(), params="2.*"), problems[1].double()
    )
    assert float(dense.diagonal().mean()) > 0


@pytest.mark.parametrize("method", ["cholesky", "eigh"])
def test_the_ridge_that_a_refusal_names_is_one_that_is_taken(method):
    K = gram(24, dtype=torch.float32)
    values, vectors = torch.linalg.eigh(K.double())
    values[0] = -5e-7 * values[-1]  # as far below 0 as float32 may push a zero
    pushed = vectors * values @ vectors.mT
    K, y = ((pushed + pushed.mT) / 2).float(), labels(len(K), dtype=torch.float32)
    with pytest.raises(errors.SingularKernelError) as caught:
        KernelRidge(1e-9, relative=False, method=method).fit(K, y)
    named = float(re.search(r"means something here is ([\d.e+-]+)", str(caught.value))[1])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", errors.RoundingWarning)
        KernelRidge(1.1 * named, relative=False, method=method).fit(K, y)
    with pytest.raises(errors.SingularKernelError):
        KernelRidge(0.8 * named, relative=False, method=method).fit(K, y)


def near_duplicates():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 32), nn.ReLU(), nn.Linear(32, 2))
        for p in model.parameters():
            p.data.mul_(6)
    return model, draw(1, 40, seed=3) + 0.01 * draw(50, 40, seed=4)


@pytest.mark.parametrize("ridge", [1e-5, 1e-6, 1e-7, 1e-8, 1e-9, 1e-10])
def test_near_duplicates_never_answer_wrongly_without_a_word(ridge):
    model, x = near_duplicates()
    K, y = ntkops.ntk(model, x), draw(50, 2, seed=5)
    exact = ntkops.ntk(copy.deepcopy(model).double(), x.double()).to_dense()
    r = ridge * float(exact.diagonal().mean())
    expected = exact @ torch.linalg.solve(exact + r * torch.eye(100, dtype=D), y.double().reshape(-1, 1))
    outcomes = []
    for method in ("cholesky", "eigh", "cg"):
        given = K.to_dense() if method == "cg" else K
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                found = KernelRidge(ridge, method=method).fit(given, y).predict(K.to_dense())
            except (errors.SingularKernelError, errors.NotConvergedError):
                outcomes.append("refused")
                continue
        said = any(issubclass(w.category, errors.RoundingWarning) for w in caught)
        error = float((found.double().reshape(-1, 1) - expected).norm() / expected.norm())
        assert said or error < 0.1, (method, error)
        outcomes.append("warned" if said else "right")
    assert outcomes[0] == outcomes[1]
    if ridge <= 1e-7:
        assert outcomes[0] == "refused"


@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_the_ends_of_a_spectrum(dtype):
    for seed in range(5):
        q = torch.linalg.qr(draw(40, 40, seed=seed).double())[0]
        values = torch.logspace(-6, 2, 40, dtype=D)
        A = q * values @ q.mT
        low, high = rounding.ends((A + A.mT) / 2, torch.linalg.cholesky((A + A.mT) / 2))
        assert 1e-6 * 0.99 <= float(low) <= 1.2e-6 and 80 <= float(high) <= 100.1
        limit = float(rounding.eigenvalue_rounding(high, dtype, 40))
        assert rounding.resolved(low, high, 1.01 * limit, dtype, 40)


def test_rounding_of_eigenvalues_is_what_the_rule_says():
    """The spectral norm of the error of a float32 kernel, both engines, dense and by products."""
    for seed in range(4):
        model, x = network(seed, width=32), draw(60, 8, seed=seed)
        exact = ntkops.ntk(copy.deepcopy(model).double(), x.double()).to_dense()
        largest = torch.linalg.eigvalsh(exact)[-1]
        for engine in ("layerwise", "autograd"):
            K = ntkops.ntk(model, x, engine=engine, max_dense_bytes=0 if seed % 2 else "auto")
            error = (K @ torch.eye(60)).double() - exact
            assert (
                float(
                    torch.linalg.matrix_norm(error, 2)
                    / rounding.eigenvalue_rounding(largest, torch.float32, 60)
                )
                < 1
            )


def test_rounding_of_lazy_predictions_covers_the_error():
    covered, sharp = 0, []
    for seed in range(20):
        model, x, new = network(seed % 10, 16 + seed), draw(25, 8, seed=seed), draw(10, 8, seed=seed + 100)
        twin = copy.deepcopy(model).double()
        exact, engine = ntkops.ntk(twin, x.double()), ("layerwise", "autograd")[seed % 2]
        dense = exact.to_dense()
        r = 10 ** (-1 - seed % 6) * float(dense.diagonal().mean())
        dual = torch.linalg.solve(dense + r * torch.eye(25, dtype=D), draw(25, 1, seed=seed).double())
        lazy = ntkops.ntk(model, new, x, engine=engine, max_dense_bytes=0)
        found, added = precise_product(lazy, dual)
        error = float((found - exact.cross(new.double()).to_dense() @ dual).norm())
        covered += error <= float(added)
        sharp.append(float(added) / max(error, 1e-300))
    assert covered >= 19 and sorted(sharp)[10] < 30


def test_lazy_predictions_say_what_they_round_by_and_warn():
    model, x = near_duplicates()
    K, y = ntkops.ntk(model, x, max_dense_bytes=0), draw(50, 2, seed=5)
    fitted = KernelRidge(1e-1, method="cg").fit(K, y)
    fitted.predict(K)
    assert 0 < fitted.rounding_ < 1e-2
    # The solution is right, since its residual is made by float64 products; products with it are what rounds.
    rough = KernelRidge(1e-4, method="cg").fit(K, y)
    with pytest.warns(errors.RoundingWarning, match="raise the ridge"):
        rough.predict(K)
    assert rough.rounding_ > 1e-2
    exact = ntkops.ntk(model.double(), x.double()).to_dense()
    expected = exact @ rough.dual_coef_.reshape(-1, 1)
    with pytest.warns(errors.RoundingWarning):
        found = rough.predict(K).double().reshape(-1, 1)
    assert float((found - expected).norm() / expected.norm()) <= rough.rounding_


def test_leading_and_trailing_digits_are_both_multiplied():
    """Sums, multiples and ridges are split into what is stored and what is lazy."""
    model, x = network(), draw(20, 8, seed=1)
    lazy, exact = (
        ntkops.ntk(model, x, max_dense_bytes=0),
        ntkops.ntk(network().double(), x.double()).to_dense(),
    )
    extra = draw(20, 20, seed=6)
    V = draw(20, 2, seed=7).double()
    for operator, dense in (
        (2 * lazy + extra, 2 * exact + extra.double()),
        (lazy.add_jitter(0.5), exact + 0.5 * torch.eye(20, dtype=D)),
    ):
        found, added = precise_product(operator, V)
        error = (found - dense @ V).norm(dim=0)
        assert bool((error <= added + 1e-12).all()) and float(added.max() / found.norm(dim=0).max()) < 1e-5


# what is no kernel


@pytest.mark.parametrize("method", ["auto", "cholesky", "eigh", "cg"])
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_kernels_that_are_none_are_named(method, dtype):
    K, y = gram(20, dtype=dtype), labels(12, dtype=dtype)
    skew = K.clone()
    skew[0, 1] += float(K.diagonal().mean())
    values, vectors = torch.linalg.eigh(K.double())
    values[0] = -0.3 * values[-1]
    indefinite = (vectors * values @ vectors.mT).to(dtype)
    with pytest.raises(errors.InputError, match="not symmetric"):
        KernelRidge(1e-4, method=method).fit(skew, y)
    with pytest.raises((errors.SingularKernelError, errors.InputError), match="not positive semidefinite"):
        KernelRidge(1e-4, method=method).fit((indefinite + indefinite.mT) / 2, y)
    batch = torch.stack([K, (indefinite + indefinite.mT) / 2])
    with pytest.raises((errors.SingularKernelError, errors.InputError), match="not positive semidefinite"):
        KernelRidge(1e-4, method=method).fit(batch, torch.stack([y, y], dim=1))
    # K + ridge is what is solved: a ridge above what is negative makes it a proper system
    large = KernelRidge(2 * float(values[-1]), relative=False, method=method).fit(
        (indefinite + indefinite.mT) / 2, y
    )
    rest = indefinite.double() @ large.dual_coef_ + large.ridge_ * large.dual_coef_ - y.double()
    assert float(rest.norm() / y.norm()) < 1e-5


def test_an_asymmetry_that_is_rounding_is_none():
    K = gram(20, dtype=torch.float32)
    K[0, 1] *= 1 + 1e-5
    for method in ("cholesky", "eigh"):
        fitted = KernelRidge(1e-4, method=method).fit(K, labels(12, dtype=torch.float32))
        assert fitted.solve_info_.residuals.max() < 1e-10


def test_indefinite_inducing_rows():
    values, vectors = torch.linalg.eigh(gram(20))
    values[0] = -0.3 * values[-1]
    K = vectors * values @ vectors.mT
    with pytest.raises((errors.SingularKernelError, errors.InputError), match="not positive semidefinite"):
        KernelRidge(1e-3, relative=False, method="nystrom", inducing=12).fit((K + K.mT) / 2, labels(12))


# labels as users have them


def test_labels_of_one_output():
    model, x = network().double(), draw(12, 8).double()
    K, y = ntkops.ntk(model, x), draw(12, 1, seed=3).double()
    column = KernelRidge(1e-3, offset="network").fit(K, y)
    flat = KernelRidge(1e-3, offset="network").fit(K, y[:, 0])
    torch.testing.assert_close(column.predict(K), flat.predict(K).unsqueeze(1))
    each = ntkops.ntk(model, x, outputs="each")
    one = KernelRidge(1e-3).fit(each, y[:, 0])
    assert one.dual_coef_.shape == one.predict(each).shape == (12,)
    torch.testing.assert_close(one.predict(each), KernelRidge(1e-3).fit(each, y).predict(each)[:, 0])
    assert one.variance(each, each.diagonal()).shape == (12,)
    assert one.leave_one_out().residuals.shape == (12,)


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (None, errors.InputError, "target y is None"),
        (["a"] * 12, errors.DtypeError, "no number"),
        ([object()] * 12, errors.DtypeError, "no number"),
        ([1j] * 12, errors.InputError, "Complex"),
        (torch.ones(12, dtype=torch.complex64), errors.InputError, "Complex"),
        ([[1.0], [1.0, 2.0]] * 6, errors.ShapeError, "no array"),
        ("labels", errors.InputError, "expected"),
        ([1] * 12, errors.InputError, "one_hot"),
    ],
)
def test_labels_that_are_none(given, error, text):
    with pytest.raises(error, match=text):
        KernelRidge().fit(gram(20), given)


def test_lists_of_labels_have_the_dtype_of_the_kernel():
    for dtype in (torch.float32, D):
        found = KernelRidge(1.0).fit(gram(20, dtype=dtype), labels(12).tolist())
        assert found.predict(gram(20, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("kind", ["kernel", "cross", "projected", "features", "Nyström", "sum", "stored"])
def test_a_large_kernel_is_multiplied_without_being_made(kind, monkeypatch):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 3))
    x = torch.randn(30, 4)
    K = ntkops.ntk(model, x, outputs="each")
    P = ntkops.projected_ntk(K, 8, generator=torch.Generator().manual_seed(0))
    operator = {
        "kernel": K,
        "cross": K.cross(x[:5]),
        "projected": P,
        "features": P.left,
        "Nyström": ntkops.nystrom_ntk(K, list(range(10))),
        "sum": K + 2 * K,
        "stored": K.to_dense(),
    }[kind]
    block = torch.randn(*operator.shape[:-2], operator.shape[-1], 2, dtype=torch.float64)
    monkeypatch.setattr(_rounding, "_LARGE", 0)
    monkeypatch.setattr(_rounding, "_WIDENED", 7)  # a row at a time
    found, _ = _rounding.precise_product(operator, block)
    dense = operator if kind == "stored" else operator.to_dense()
    expected = dense.double() @ block
    assert float((found - expected).norm() / expected.norm()) < 1e-6
