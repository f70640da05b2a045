"""The (R, M) sketch: its identities against brute force, its growth, and its edges."""

import math

import pytest
import torch

import ntkops
from ntkops.errors import InputError, ShapeError, UnsupportedOperationError, ZeroKernelError
from ntkops.estimators._leave_out import held_out, leave_one_out
from ntkops.estimators._plans import ScalarPlan
from ntkops.estimators._quantities import TRACE, Inner, Trace
from ntkops.estimators._request import operands
from ntkops.estimators._sketch import SketchCore
from ntkops.estimators._xtrace import _held_out
from tests.estimators.problems import SPECTRA, Factored, OnlyProducts, generator, rotation, with_spectrum
from tests.pairs import pairs

N = 40
MOMENTS = (Trace(0), Inner(0, 0), Inner(0, 1), Inner(1, 1), Trace(1))


def pair(factored=True):
    first = rotation(N, 0) * SPECTRA["power law"](N).sqrt() @ rotation(N, 10)
    second = rotation(N, 1) * SPECTRA["exponential"](N).sqrt() @ rotation(N, 11)
    if factored:
        return Factored(first), Factored(second)
    return OnlyProducts(first @ first.T), OnlyProducts(second @ second.T)


def sketch(operators, columns, seed=0):
    core = SketchCore(operands(*operators), generator(seed))
    core.grow(columns)
    return core


def nystrom(K, probes):
    products = K @ probes
    return products @ torch.linalg.pinv(probes.T @ products, hermitian=True, rtol=1e-13) @ products.T


def brute(kernels, probes, others, left):
    """Return every moment by its definition: dense Nyström kernels of the others, and projected probes."""
    n = probes.shape[0]
    approximations = [nystrom(K, probes[:, others]) for K in kernels]
    Q = torch.linalg.qr(probes[:, others])[0]
    v = probes[:, left] - Q @ (Q.T @ probes[:, left])
    v = v * ((n - len(others)) / v.square().sum(0)).sqrt()
    values = []
    for moment in MOMENTS:
        if isinstance(moment, Trace):
            A = approximations[moment.of]
            rest = (v * ((kernels[moment.of] - A) @ v)).sum(0)
            values.append(A.trace() + rest)
        else:
            A, B = approximations[moment.first], approximations[moment.second]
            exact = ((kernels[moment.first] @ v) * (kernels[moment.second] @ v)).sum(0)
            values.append((A * B).sum() + exact - ((A @ v) * (B @ v)).sum(0))
    return torch.stack(values)


@pytest.mark.parametrize("factored, tolerance", [(True, 1e-12), (False, 1e-10)])
def test_leaving_out_equals_brute_force(factored, tolerance):
    operators = pair(factored)
    kernels = [operator.matrix for operator in operators]
    for columns in (5, 9, 14):
        core = sketch(operators, columns)
        ones = leave_one_out(core.numbers, MOMENTS)
        for i in range(columns):
            others = [j for j in range(columns) if j != i]
            expected = brute(kernels, core._probes, others, [i])
            torch.testing.assert_close(ones[:, i : i + 1], expected, rtol=tolerance, atol=tolerance)
        apart = held_out(core.numbers, MOMENTS, range(columns - 4, columns))
        expected = brute(kernels, core._probes, range(columns - 4), range(columns - 4, columns))
        found = torch.stack([mean.fixed.unsqueeze(-1) + mean.samples for mean in apart])
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("factored", [True, False])
def test_a_fold_of_any_probes_is_that_of_the_last_ones(factored):
    operators = pair(factored)
    core = sketch(operators, 9)
    fold, others = [1, 4, 6], [0, 2, 3, 5, 7, 8]
    found = torch.stack([m.fixed.unsqueeze(-1) + m.samples for m in held_out(core.numbers, MOMENTS, fold)])
    expected = brute([operator.matrix for operator in operators], core._probes, others, fold)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["sketch", "xtrace", "hutch++", "hutchinson"])
def test_the_variance_of_a_form_comes_from_the_length_of_its_image(method):
    # For v uniform on the sphere of radius √d: Var vᵀAv = 2 E[|Av|² - (vᵀAv)²/d]; A is what is left of K.
    kernel = pair()[0]
    plan = ScalarPlan(TRACE, operands(kernel), orthogonalize=False)
    sampler = plan.sampler(method, generator(4))
    sampler.grow(9)
    if method == "sketch":
        (mean,) = held_out(sampler.numbers, [Trace()], range(5, 9))
        probes = sampler._probes
        A = kernel.matrix - nystrom(kernel.matrix, probes[:, :5])
        Q = torch.linalg.qr(probes[:, :5])[0]
        v = probes[:, 5:]
    elif method == "xtrace":
        (mean,) = _held_out(sampler._numbers(), [Trace()], range(5, 9))
        Q = torch.linalg.qr(sampler._products[:, :5])[0]
        v, A = sampler._probes[:, 5:], kernel.matrix
    else:
        (mean,) = sampler.moments()
        Q, v, A = sampler._basis, sampler._probes, kernel.matrix
    P = torch.eye(N, dtype=torch.float64) - Q @ Q.T
    d, v, A = N - Q.shape[1], P @ v, P @ A @ P
    v = v * (d / v.square().sum(0)).sqrt()
    forms, images = (v * (A @ v)).sum(0), (A @ v).square().sum(0)
    torch.testing.assert_close(mean.samples, forms, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(mean.variances, 2 * (images - forms.square() / d), rtol=1e-8, atol=1e-8)
    many = torch.randn(N, 40_000, generator=generator(5), dtype=torch.float64)
    many = P @ many
    many = many * (d / many.square().sum(0)).sqrt()
    forms, images = (many * (A @ many)).sum(0), (A @ many).square().sum(0)
    assert float(2 * (images - forms.square() / d).mean()) == pytest.approx(float(forms.var()), rel=0.05)


@pytest.mark.parametrize("method", ["sketch", "xtrace", "hutch++", "hutchinson", "ntk-hutch++"])
def test_what_cannot_vary_has_no_error(method):
    kernel = Factored(3 * torch.eye(N, dtype=torch.float64))  # vᵀKv is the same for all v on a sphere
    found = ntkops.trace(kernel, method=method, num_passes=24, generator=generator(0))
    assert float(found.value) == pytest.approx(9 * N, rel=1e-12)
    assert float(found.interval[1] - found.interval[0]) < 1e-5 * N


def test_leaving_out_is_unbiased():
    operators = pair()
    first, second = (operator.matrix for operator in operators)
    truth = torch.stack(
        [
            first.trace(),
            (first * first).sum(),
            (first * second).sum(),
            (second * second).sum(),
            second.trace(),
        ]
    )
    ones, apart = [], []
    for seed in range(400):
        numbers = sketch(operators, 7, seed).numbers
        ones.append(leave_one_out(numbers, MOMENTS).mean(-1))
        apart.append(torch.stack([mean.value() for mean in held_out(numbers, MOMENTS, range(3, 7))]))
    for values in (torch.stack(ones), torch.stack(apart)):
        assert ((values.mean(0) - truth).abs() < 4 * values.std(0) / math.sqrt(len(values))).all()


def test_a_sketch_that_grows_equals_one_made_at_once():
    kernel = pair()[0]
    whole = ntkops.estimators.Sketch(kernel, 12, generator=generator(3))
    grown = ntkops.estimators.Sketch(kernel, 5, generator=generator(3)).extend(4).extend(3)
    assert grown.passes == whole.passes == 24 and grown.columns == 12
    for name in ("trace", "frobenius_norm", "effective_rank", "ritz_values"):
        one, other = getattr(whole, name)(), getattr(grown, name)()
        torch.testing.assert_close(one.value, other.value, rtol=1e-10, atol=1e-12)
        assert one.method == "sketch" and one.seed == 3
    products: list[int] = []
    grown = ntkops.estimators.Sketch(OnlyProducts(kernel.matrix, products), 5, generator=generator(3))
    grown.extend(7)
    assert sum(products) == grown.passes == 12
    assert float(grown.trace()) == pytest.approx(float(whole.trace()), rel=1e-9)


def test_sketches_of_the_same_seed_give_an_alignment():
    first, second = pair()
    one = ntkops.estimators.Sketch(first, 10, generator=generator(1))
    other = ntkops.estimators.Sketch(second, 10, generator=generator(1))
    together = ntkops.alignment(first, second, method="sketch", num_passes=40, generator=generator(1))
    found = one.alignment(other)
    assert float(found) == pytest.approx(float(together), rel=1e-12) and found.passes == together.passes == 40
    with pytest.raises(InputError, match="different probes"):
        one.alignment(ntkops.estimators.Sketch(second, 10, generator=generator(2)))
    assert float(one.alignment(one)) == pytest.approx(1, rel=1e-12)


# A scale is extreme for a dtype: these two are one choice.
@pytest.mark.parametrize(
    "spectrum, size, method",
    pairs(
        ["full", "rank one", "identity", "one parameter", "few parameters", "zero", "tiny"],
        [(scale, dtype) for scale in (1e-20, 1.0, 1e18) for dtype in (torch.float64, torch.float32)],
        ["sketch", "xtrace", "ntk-hutch++"],
    ),
    ids=str,
)
def test_edges_are_finite_and_right(spectrum, size, method):
    scale, dtype = size
    draw = generator(4)

    def normal(*shape):
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    n = 3 if spectrum == "tiny" else 24
    factor = (
        {
            "full": lambda: rotation(n) * torch.logspace(0, -4, n, dtype=torch.float64),
            "rank one": lambda: normal(n, 1) @ normal(1, 9),
            "identity": lambda: torch.eye(n, dtype=torch.float64),
            "one parameter": lambda: normal(n, 1),
            "few parameters": lambda: normal(n, 5),
            "zero": lambda: torch.zeros(n, 7, dtype=torch.float64),
            "tiny": lambda: normal(n, 4),
        }[spectrum]()
        .mul(scale**0.5)
        .to(dtype)
    )
    K = factor.double() @ factor.double().T
    for operator, least in ((Factored(factor), 30), (OnlyProducts(factor @ factor.T), 40)):
        if method == "ntk-hutch++" and isinstance(operator, OnlyProducts):
            continue
        for passes in (12, least):
            options = {"method": method, "num_passes": passes, "generator": generator(passes)}
            for estimate, truth in (
                (ntkops.trace, K.trace()),
                (ntkops.frobenius_norm, K.norm()),
                (ntkops.effective_rank, K.trace() ** 2 / K.square().sum()),
            ):
                if spectrum == "zero" and estimate is ntkops.effective_rank:
                    with pytest.raises(ZeroKernelError):
                        estimate(operator, **options)
                    continue
                result = estimate(operator, **options)
                low, high = (float(end) for end in result.interval)
                assert math.isfinite(float(result)) and low <= float(result) <= high
                close = 1e-4 if dtype == torch.float32 else 1e-9
                slack = close * abs(float(truth)) + 12 * float(result.stderr)
                assert abs(float(result) - float(truth)) <= slack, (passes, float(result), float(truth))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
def test_a_sketch_is_exact_once_it_is_full(dtype):
    factor = torch.randn(20, 6, generator=generator(0)).to(dtype)
    sketch = ntkops.estimators.Sketch(Factored(factor), 9, generator=generator(1))
    assert sketch.columns == 6 and sketch.exact and sketch.passes == 12
    truth = torch.linalg.svdvals(factor.double()).square()
    close = 1e-5 if dtype == torch.float32 else 1e-12
    assert float(sketch.trace()) == pytest.approx(float(truth.sum()), rel=close) and sketch.trace().exact
    torch.testing.assert_close(sketch.ritz_values().value, truth, rtol=close, atol=close)


def test_batches_are_sketched_member_by_member():
    batch = torch.stack([with_spectrum(SPECTRA[s](64), 1) for s in ("power law", "exponential", "cluster")])
    truth = batch.diagonal(dim1=-2, dim2=-1).sum(-1)
    for method in ("sketch", "xtrace"):
        result = ntkops.trace(OnlyProducts(batch), method=method, num_passes=120, generator=generator(0))
        assert result.value.shape == (3,) and result.passes <= 120
        assert ((result.value - truth).abs() <= 6 * result.stderr + 1e-6).all()


def test_what_a_sketch_cannot_take_is_named():
    with pytest.raises(InputError, match="not"):
        ntkops.estimators.Sketch(torch.randn(20, 20, generator=generator(0)), 6)
    with pytest.raises(InputError, match="positive semidefinite"):
        ntkops.trace(torch.diag(torch.linspace(-1, 1, 20)), method="sketch", num_passes=8)
    with pytest.raises(ShapeError, match="square"):
        ntkops.estimators.Sketch(torch.ones(3, 4), 3)
    with pytest.raises(InputError, match="distribution"):
        ntkops.estimators.Sketch(torch.eye(4), 3, distribution="rademacher")
    for columns in (0, 2.5, True):
        with pytest.raises(InputError, match="columns"):
            ntkops.estimators.Sketch(torch.eye(4), columns)
    with pytest.raises(UnsupportedOperationError, match="factors"):
        ntkops.trace(OnlyProducts(torch.eye(5)), method="ntk-hutch++", num_passes=3)
