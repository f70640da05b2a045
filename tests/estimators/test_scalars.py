"""Trace, norm, inner product, alignment and effective rank: exact, unbiased, covered, counted."""

import math
import warnings

import pytest
import scipy.stats
import torch
from linear_operator.operators import BlockDiagLinearOperator, DenseLinearOperator

import ntkops
from ntkops.errors import (
    InputError,
    NonFiniteError,
    NotConvergedWarning,
    ShapeError,
    UnsupportedOperationError,
    ZeroKernelError,
)
from tests.cases import BY_NAME
from tests.estimators.problems import (
    SPECTRA,
    Factored,
    OnlyProducts,
    covering,
    generator,
    repeated,
    rotation,
    with_spectrum,
)

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
N = 48


def kernels(dtype=torch.float64, spectrum="power law"):
    values = SPECTRA[spectrum](N)
    return with_spectrum(values, 0).to(dtype), with_spectrum(values.flip(0) + values, 1).to(dtype)


def factored(spectrum="power law", seed=0, runs=None):
    """Return a kernel with its factors; with ``runs``, a batch of as many, all the same."""
    values = SPECTRA[spectrum](N)
    factor = rotation(N, seed) * values.sqrt() @ rotation(N, seed + 10)
    return Factored(factor if runs is None else repeated(factor, runs))


QUANTITIES = {
    "trace": (lambda A, B, **k: ntkops.trace(A, **k), lambda A, B: A.trace()),
    "norm": (lambda A, B, **k: ntkops.frobenius_norm(A, **k), lambda A, B: A.norm()),
    "inner": (lambda A, B, **k: ntkops.inner(A, B, **k), lambda A, B: (A * B).sum()),
    "alignment": (
        lambda A, B, **k: ntkops.alignment(A, B, **k),
        lambda A, B: (A * B).sum() / (A.norm() * B.norm()),
    ),
    "effective rank": (
        lambda A, B, **k: ntkops.effective_rank(A, **k),
        lambda A, B: A.trace() ** 2 / A.square().sum(),
    ),
}
METHODS = {
    name: ("hutchinson", "hutch++", *(("rhutch", "fhutch") if name == "trace" else ("reverse", "forward")))
    for name in QUANTITIES
}
CASES = [(name, method) for name in QUANTITIES for method in METHODS[name]]


@DTYPES
@pytest.mark.parametrize("name", QUANTITIES)
def test_exact_values_match_the_dense_matrix(name, dtype):
    A, B = kernels(dtype)
    estimate, reference = QUANTITIES[name]
    result = estimate(A, B)
    assert result.exact and result.method == "exact" and result.passes == 0 and float(result.stderr) == 0
    assert float(result) == pytest.approx(
        float(reference(A.double(), B.double())), rel=1e-6 if dtype == torch.float32 else 1e-12
    )
    assert result.interval[0] == result.interval[1] == result.value


@pytest.mark.parametrize("name", QUANTITIES)
def test_exact_by_products_alone_counts_them(name):
    A, B = kernels()
    estimate, reference = QUANTITIES[name]
    columns: list[int] = []
    result = estimate(OnlyProducts(A, columns), OnlyProducts(B, columns), method="exact")
    assert float(result) == pytest.approx(float(reference(A, B)), rel=1e-12)
    assert result.passes == sum(columns)


@pytest.mark.parametrize("name, method", CASES)
def test_estimates_agree_within_their_error_and_count_their_passes(name, method):
    A, B = factored(seed=0), factored(spectrum="exponential", seed=1)
    estimate, reference = QUANTITIES[name]
    truth = float(reference(A.matrix, B.matrix))
    result = estimate(A, B, method=method, num_passes=240, generator=generator(7))
    assert result.method == method and not result.exact and result.seed == 7
    assert 0 < result.passes <= 240
    runs = 20
    A, B = factored(seed=0, runs=runs), factored(spectrum="exponential", seed=1, runs=runs)
    result = estimate(A, B, method=method, num_passes=240 * runs, generator=generator(0))
    assert 0 < result.passes <= 240 * runs
    inside = covering(result.interval, truth, 0)
    assert inside >= 15, inside


@pytest.mark.parametrize(
    "name, method",
    [case for case in CASES if case[0] in ("trace", "inner")] + [("norm", m) for m in METHODS["norm"]],
)
def test_linear_moments_are_unbiased(name, method):
    runs = 400
    A, B = factored("step", seed=0, runs=runs), factored("power law", seed=1, runs=runs)
    estimate, reference = QUANTITIES[name]
    truth = float(reference(A.matrix[0], B.matrix[0]))
    power = 2 if name == "norm" else 1  # the square of the norm is the unbiased one
    found = estimate(A, B, method=method, num_passes=40 * runs, generator=generator(0))
    values = found.value**power
    error = float(values.mean()) - truth**power
    assert abs(error) < 4 * float(values.std()) / math.sqrt(len(values))


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "rhutch"])
def test_intervals_of_the_trace_cover(spectrum, method):
    runs = 200
    A = factored(spectrum, runs=runs)
    found = ntkops.trace(A, method=method, num_passes=60 * runs, generator=generator(0))
    covered = covering(found.interval, float(A.matrix[0].trace()), 0)
    # One-sided binomial test of a coverage of .95 at level .001.
    assert scipy.stats.binom.cdf(covered, runs, 0.95) > 1e-3, covered


@pytest.mark.parametrize("name", QUANTITIES)
def test_a_tolerance_is_met(name):
    A, B = factored("power law", 0), factored("exponential", 1)
    estimate, reference = QUANTITIES[name]
    truth = float(reference(A.matrix, B.matrix))
    hits = 0
    for seed in range(30):
        result = estimate(A, B, rtol=0.1, method="hutch++", generator=generator(seed))
        assert result.converged
        hits += abs(float(result) - truth) <= 0.1 * abs(truth)
    assert scipy.stats.binom.cdf(hits, 30, 0.95) > 1e-3, hits


def test_hutch_plus_plus_matches_a_naive_one():
    A = kernels()[0]
    for seed in (1, 2, 3):
        result = ntkops.trace(OnlyProducts(A), method="hutch++", num_passes=30, generator=generator(seed))
        draw = generator(seed)
        sketch = torch.randn(N, 10, generator=draw, dtype=torch.float64)
        Q = torch.linalg.qr(A @ sketch)[0]
        T = torch.randn(N, 10, generator=draw, dtype=torch.float64)
        T = T - Q @ (Q.T @ T)
        T = T * math.sqrt(N - 10) / T.norm(dim=0)  # on the sphere: its length would be noise
        naive = (Q.T @ A @ Q).trace() + (T * (A @ T)).sum() / 10
        assert float(result) == pytest.approx(float(naive), rel=1e-10)
        images = A @ T - Q @ (Q.T @ (A @ T))
        variances = 2 * (images.square().sum(0) - (T * images).sum(0).square() / (N - 10))
        assert float(result.stderr) == pytest.approx(float((variances.mean() / 10).sqrt()), rel=1e-10)
        assert result.passes == 30


@pytest.mark.parametrize("passes", [4, 5, 7, 10, 11])
def test_hutch_plus_plus_is_unbiased_when_three_does_not_divide(passes):
    A, runs = kernels(spectrum="cluster")[0], 400
    many = OnlyProducts(repeated(A, runs))
    values = ntkops.trace(many, method="hutch++", num_passes=passes * runs, generator=generator(0)).value
    assert abs(float(values.mean()) - float(A.trace())) < 4 * float(values.std()) / runs**0.5


def test_orthogonalised_one_sided_traces_are_unbiased_and_less_noisy():
    runs = 200
    A = factored("step", runs=runs)
    for method in ("rhutch", "fhutch"):
        values = {
            flag: ntkops.trace(
                A, method=method, num_passes=61 * runs, orthogonalize=flag, generator=generator(0)
            ).value
            for flag in (False, True)
        }
        error = values[True].mean() - A.matrix[0].trace()
        assert abs(float(error)) < 4 * float(values[True].std()) / runs**0.5
        assert values[True].std() < values[False].std()


@pytest.mark.slow
def test_four_jacobians_of_proposition_one():
    draw = generator(5)
    J1, J4 = (torch.randn(5, 7, generator=draw, dtype=torch.float64) for _ in range(2))
    J2, J3 = (torch.randn(4, 7, generator=draw, dtype=torch.float64) for _ in range(2))
    truth = float((J1 @ J2.T @ J3 @ J4.T).trace())
    for direction in ("reverse", "forward"):
        result = ntkops.one_sided_product_trace(
            J1, J2, J3, J4, num_passes=80000, direction=direction, generator=generator(1)
        )
        assert abs(float(result) - truth) < 4 * float(result.stderr)
        assert float(result.stderr) < 0.5 * abs(truth) + 2
        assert result.passes == 80000
        # The order that the paper states for the reverse form is another number here.
        other = float((J1 @ J2.T @ J3 @ J4.T).T.trace()) if direction == "forward" else None
        assert other is None or other == pytest.approx(truth)


def test_four_jacobians_are_checked():
    J, K = torch.ones(3, 4), torch.ones(2, 4)
    with pytest.raises(ShapeError, match="same states"):
        ntkops.one_sided_product_trace(J, K, J, J, num_passes=8)
    with pytest.raises(ShapeError, match="same parameters"):
        ntkops.one_sided_product_trace(J, torch.ones(3, 5), J, J, num_passes=8)
    with pytest.raises(InputError, match="direction"):
        ntkops.one_sided_product_trace(J, J, J, J, num_passes=8, direction="up")
    with pytest.raises(InputError, match="num_passes=4"):
        ntkops.one_sided_product_trace(J, J, J, J, num_passes=2)


@DTYPES
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e18])
@pytest.mark.parametrize("name, method", [*CASES, *((name, "exact") for name in QUANTITIES)])
def test_scales_do_not_overflow(name, method, scale, dtype):
    root = (rotation(12) * SPECTRA["power law"](12).sqrt()).to(dtype) * scale**0.5
    A = Factored(root)
    estimate, reference = QUANTITIES[name]
    result = estimate(
        A, A, method=method, num_passes=None if method == "exact" else 60, generator=generator(0)
    )
    truth = float(reference(A.matrix.double(), A.matrix.double()))
    assert math.isfinite(float(result)) and math.isfinite(float(result.stderr))
    slack = 6 * float(result.stderr) + 1e-4 * abs(truth)
    assert abs(float(result) - truth) <= slack


@pytest.mark.parametrize("method", ["exact", "hutchinson", "hutch++"])
def test_zero_rank_one_and_identity(method):
    passes = None if method == "exact" else 40
    options = {"method": method, "num_passes": passes, "generator": generator(0)}
    zero = OnlyProducts(torch.zeros(20, 20, dtype=torch.float64))
    assert float(ntkops.trace(zero, **options)) == 0
    assert float(ntkops.frobenius_norm(zero, **options)) == 0
    for ratio in (ntkops.effective_rank, lambda A, **k: ntkops.alignment(A, A, **k)):
        with pytest.raises(ZeroKernelError, match="is zero"):
            ratio(zero, **options)
    one = torch.ones(20, 1, dtype=torch.float64)
    assert float(ntkops.effective_rank(OnlyProducts(one @ one.T), **options)) == pytest.approx(
        1, rel=1e-8 if method != "hutchinson" else 2.0
    )
    identity = ntkops.trace(OnlyProducts(3.0 * torch.eye(20, dtype=torch.float64)), **options)
    assert float(identity) == pytest.approx(60) and float(identity.stderr) < 1e-12


@pytest.mark.parametrize("size", [1, 2, 3])
def test_tiny_operators(size):
    A = with_spectrum(torch.arange(1.0, size + 1))
    for method in ("auto", "exact", "hutchinson", "hutch++"):
        result = ntkops.trace(OnlyProducts(A), method=method, generator=generator(0))
        assert float(result) == pytest.approx(float(A.trace()), rel=0.05)


def test_more_passes_than_the_space_has_go_exact():
    A = kernels()[0]
    result = ntkops.trace(OnlyProducts(A), method="hutch++", num_passes=10 * N)
    assert result.exact and float(result) == pytest.approx(float(A.trace()), rel=1e-12)
    assert result.passes <= N


def test_the_pass_limit_is_told():
    A = factored("cluster")
    with pytest.warns(NotConvergedWarning, match="raise num_passes, or loosen rtol"):
        result = ntkops.trace(A, rtol=1e-6, num_passes=30, method="hutchinson", generator=generator(0))
    assert not result.converged and result.passes <= 30


def test_auto_is_exact_where_that_is_cheap_and_says_so():
    case = BY_NAME["mlp"]
    K = ntkops.ntk(case.make(), case.data(8), max_dense_bytes=0)
    result = ntkops.trace(K)
    assert result.exact and result.passes == 2  # one per-sample pass for each of two outputs
    sampled = ntkops.trace(factored(), rtol=0.2, generator=generator(0))
    assert sampled.method == "sketch" and sampled.converged


def test_reverse_only_models_get_one_sided_estimates():
    case = BY_NAME["embedding-bag"]
    K = ntkops.ntk(case.make(), case.data(30), engine="autograd", max_dense_bytes=0)
    truth = float(ntkops.trace(K, method="exact"))
    result = ntkops.trace(K, method="rhutch", num_passes=200, generator=generator(0))
    assert abs(float(result) - truth) < 4 * float(result.stderr) and result.passes == 200
    norm = ntkops.frobenius_norm(K, method="reverse", num_passes=100, generator=generator(0))
    assert abs(float(norm) - float(ntkops.frobenius_norm(K, method="exact"))) < 4 * float(norm.stderr)


@pytest.mark.parametrize("outputs", ["all", "each", "trace"])
@pytest.mark.parametrize("method", ["exact", "hutchinson", "hutch++", "one-sided"])
def test_our_kernels_lazily_and_with_counted_passes(outputs, method):
    case = BY_NAME["conv"]
    model, x = case.make(), case.data(6)
    K = ntkops.ntk(model, x, outputs=outputs, max_dense_bytes=0)
    dense = ntkops.ntk(model, x, outputs=outputs).to_dense()
    for name, (estimate, _) in QUANTITIES.items():
        one_sided = "rhutch" if name == "trace" else "reverse"
        chosen = one_sided if method == "one-sided" else method
        truth = estimate(dense, dense, method="exact").value
        with ntkops.count_passes() as tally:
            result = estimate(
                K, K, method=chosen, num_passes=None if method == "exact" else 200, generator=generator(3)
            )
        assert result.passes == tally.total > 0
        assert result.value.shape == K.batch_shape
        assert ((result.value - truth).abs() <= 6 * result.stderr + 1e-9 * truth.abs()).all(), (
            name,
            result.value,
            truth,
            result.stderr,
        )


def test_sums_with_a_ridge_are_as_exact():
    case = BY_NAME["mlp"]
    K = ntkops.ntk(case.make(), case.data(6), max_dense_bytes=0)
    dense = ntkops.ntk(case.make(), case.data(6)).to_dense()
    shifted = (2.0 * K).add_jitter(0.5)
    expected = 2 * dense + 0.5 * torch.eye(len(dense), dtype=dense.dtype)
    assert float(ntkops.trace(shifted)) == pytest.approx(float(expected.trace()), rel=1e-12)
    assert float(ntkops.frobenius_norm(shifted, method="exact")) == pytest.approx(
        float(expected.norm()), rel=1e-12
    )
    assert float(ntkops.alignment(shifted, DenseLinearOperator(expected))) == pytest.approx(1.0, rel=1e-12)
    each = ntkops.ntk(case.make(), case.data(6), outputs="each", max_dense_bytes=0)
    blocks = BlockDiagLinearOperator(each)
    assert float(ntkops.trace(blocks)) == pytest.approx(float(dense.trace()), rel=1e-12)


def test_seeds_reproduce_and_the_global_state_is_left_alone():
    A = factored()
    before = torch.get_rng_state()
    first = ntkops.trace(A, method="hutch++", num_passes=30)
    again = ntkops.trace(A, method="hutch++", num_passes=30, generator=generator(first.seed))
    assert float(first) == float(again)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "options, message",
    [
        ({"method": "magic"}, "choose 'auto' or one of 'exact', 'stratified'"),
        ({"rtol": 0.0}, "rtol=0.0"),
        ({"rtol": 2.0}, "between 0 and 1"),
        ({"num_passes": 0}, "num_passes=0"),
        ({"num_passes": 2.5}, "num_passes=2.5"),
        ({"method": "hutch++", "num_passes": 2}, "at least 6 passes: that is num_passes=6"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        ntkops.trace(factored(), **options)


def test_bad_operators_are_named():
    with pytest.raises(ShapeError, match="square"):
        ntkops.trace(torch.ones(3, 4))
    with pytest.raises(ShapeError, match=r"\(3, 3\) and \(4, 4\)"):
        ntkops.alignment(torch.eye(3), torch.eye(4))
    with pytest.raises(UnsupportedOperationError, match="factors"):
        ntkops.trace(OnlyProducts(torch.eye(5)), method="rhutch")
    poisoned = torch.eye(5)
    poisoned[2, 2] = float("nan")
    with pytest.raises(NonFiniteError):
        ntkops.trace(OnlyProducts(poisoned), method="hutchinson", num_passes=4)


def test_a_share_of_the_trace_is_a_number():
    first = ntkops.trace(torch.eye(3))
    assert float(first / ntkops.trace(2 * torch.eye(3))) == 0.5
    assert set(first.to_dict()) >= {"value", "stderr", "interval", "method", "passes", "checks"}
    assert "exact" in str(first)


def test_progress_bars_do_not_warn(capsys):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ntkops.trace(factored(), method="hutchinson", rtol=0.2, progress=True, generator=generator(0))
    assert capsys.readouterr().out == ""
