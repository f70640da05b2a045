"""Growing to a tolerance: nothing is repeated, nothing is biased, and lucky looks are paid for."""

import functools
import math

import pytest
import scipy.stats
import torch

import ntkops
from ntkops.errors import DtypeError, InputError, NonFiniteError, NotConvergedWarning, ShapeError
from ntkops.estimators._quantities import ALIGNMENT, EFFECTIVE_RANK, FROBENIUS_NORM, INNER, TRACE
from ntkops.estimators._request import operands
from ntkops.estimators._two_sided import TwoSided
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
from tests.pairs import pairs

QUANTITIES = {
    "trace": (TRACE, 1),
    "norm": (FROBENIUS_NORM, 1),
    "rank": (EFFECTIVE_RANK, 1),
    "inner": (INNER, 2),
    "alignment": (ALIGNMENT, 2),
}
OTHER_SPECTRA = {
    "slow power law": lambda n: torch.arange(1, n + 1).double() ** -0.5,
    "spike": lambda n: torch.cat([torch.ones(1), torch.full((n - 1,), 1e-3)]).double(),
    "plateaus": lambda n: 10.0 ** -(torch.arange(n) // (n // 4)).double(),
}


def sampler(name, matrices, seed=0, sketched=True):
    quantity, count = QUANTITIES[name]
    found = operands(*matrices[:count])
    return TwoSided(quantity, found, generator(seed), sketched=sketched)


def moments(source):
    return torch.stack([moment.value() for moment in source.moments()])


@pytest.mark.parametrize("name", QUANTITIES)
def test_grown_hutch_plus_plus_equals_its_definition(name):
    A, B = (with_spectrum(SPECTRA[s](60), seed) for s, seed in (("power law", 0), ("exponential", 1)))
    columns: list[int] = []
    grown = sampler(name, [OnlyProducts(A, columns), OnlyProducts(B, columns)])
    for target in (10, 16, 31):
        grown.grow(target)
    assert sum(columns) <= 31 * QUANTITIES[name][1]
    Q, T = grown._basis, grown._probes
    eye = torch.eye(Q.shape[-1], dtype=torch.float64)
    torch.testing.assert_close(Q.T @ Q, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(Q.T @ T, torch.zeros_like(Q.T @ T), rtol=0, atol=1e-12)
    operators = {0: A, 1: B}
    for value, moment in zip(moments(grown), grown._quantity.moments, strict=True):
        pair = (moment.first, moment.second) if hasattr(moment, "first") else None
        M = operators[moment.of] if pair is None else operators[pair[0]].T @ operators[pair[1]]
        expected = (Q.T @ M @ Q).trace() + (T * (M @ T)).sum() / T.shape[-1]
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["trace", "inner", "norm"])
def test_grown_moments_are_unbiased(name):
    A, B = (with_spectrum(SPECTRA[s](30), seed) for s, seed in (("step", 0), ("cluster", 1)))
    truth = {"trace": A.trace(), "inner": (A * B).sum(), "norm": A.square().sum()}[name]
    runs = 400
    grown = sampler(name, [repeated(A, runs), repeated(B, runs)])
    for target in (7, 12, 17):
        grown.grow(target)
    values = moments(grown)[0]
    assert values.shape == (runs,)
    assert abs(float(values.mean() - truth)) < 4 * float(values.std()) / math.sqrt(runs)


@pytest.mark.parametrize(
    "spectrum, method, name", pairs(OTHER_SPECTRA, ["hutchinson", "hutch++"], ["trace", "norm", "rank"])
)
def test_a_tolerance_holds_with_its_probability_on_other_spectra(spectrum, method, name):
    values = OTHER_SPECTRA[spectrum](160)
    A, runs = with_spectrum(values, 2), 30
    estimate, truth = {
        "trace": (ntkops.trace, float(values.sum())),
        "norm": (ntkops.frobenius_norm, float(values.norm())),
        "rank": (ntkops.effective_rank, float(values.sum() ** 2 / values.square().sum())),
    }[name]
    hits = covered = 0
    for seed in range(runs):
        result = estimate(OnlyProducts(A), rtol=0.1, method=method, generator=generator(seed))
        hits += abs(float(result) - truth) <= 0.1 * truth
        covered += covering(result.interval, truth)
    for count in (hits, covered):
        assert scipy.stats.binom.cdf(count, runs, 0.95) > 1e-3, (hits, covered)


def test_the_first_look_never_ends_it():
    columns: list[int] = []
    result = ntkops.trace(
        OnlyProducts(3.0 * torch.eye(400), columns), rtol=0.5, method="hutchinson", generator=generator(0)
    )
    assert len(columns) >= 2 and result.converged and float(result.stderr) < 1e-5  # rounding of float32
    assert result.passes == sum(columns)


def test_auto_turns_exact_once_that_is_cheaper():
    A = with_spectrum(OTHER_SPECTRA["slow power law"](500), 0)
    columns: list[int] = []
    result = ntkops.trace(OnlyProducts(A, columns), rtol=0.004, generator=generator(0))
    assert result.exact and result.passes == sum(columns) == 500  # 1,039 columns could be needed
    estimate = ntkops.trace(OnlyProducts(A), rtol=0.1, generator=generator(0))
    assert estimate.method == "hutch++" and estimate.passes < 100


def test_exactness_respects_the_cap():
    A = OnlyProducts(with_spectrum(OTHER_SPECTRA["slow power law"](100), 0))
    with pytest.raises(InputError, match="num_passes=50"):
        ntkops.trace(A, method="exact", num_passes=50)
    with pytest.warns(NotConvergedWarning):
        result = ntkops.trace(A, rtol=1e-6, num_passes=90, generator=generator(0))
    assert not result.exact and not result.converged and result.passes <= 90


def test_one_direction_stays_one_direction():
    K = Factored(rotation(20)[:, :5])
    result = ntkops.trace(K, method="fhutch", num_passes=100, generator=generator(0))
    assert result.method == "fhutch" and not result.exact and result.passes == 100
    with pytest.warns(NotConvergedWarning):
        result = ntkops.frobenius_norm(K, method="reverse", rtol=1e-3, num_passes=300, generator=generator(0))
    assert result.passes <= 300 and not result.converged


@pytest.mark.parametrize(("method", "passes"), [("hutchinson", 1), ("hutch++", 3)])
def test_the_length_of_one_product_is_the_error_of_a_single_residual_probe(method, passes):
    matrix = with_spectrum(SPECTRA["power law"](40))
    exact, runs = float(matrix.trace()), 200
    A = OnlyProducts(repeated(matrix, runs))
    found = ntkops.trace(A, method=method, num_passes=passes * runs, generator=generator(0))
    assert scipy.stats.binom.cdf(covering(found.interval, exact, 0), runs, 0.95) > 1e-3
    assert found.stderr.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_variances_near_a_multiple_of_the_identity_do_not_cancel(dtype):
    eps = torch.finfo(dtype).eps
    for shift in (0.0, 1e3 * eps):
        matrix = 3 * torch.eye(50, dtype=torch.float64) + shift * with_spectrum(SPECTRA["power law"](50))
        result = ntkops.trace(
            OnlyProducts(matrix.to(dtype)), method="hutchinson", num_passes=32, generator=generator(0)
        )
        variance = 2 * (matrix.square().sum() - matrix.trace().square() / 50) * 50 / 52
        expected = float((variance / 32).sqrt())
        assert float(result.stderr) <= 2 * expected + 10 * eps


@pytest.mark.parametrize("shape", [(24, 40), (40, 24)])
@pytest.mark.parametrize("method", ["exact", "hutchinson", "hutch++", "reverse", "forward"])
def test_rectangular_operators(shape, method):
    draw = generator(0)
    left, right = (torch.randn(size, 8, generator=draw, dtype=torch.float64) for size in shape)
    K = Factored(left, right)
    other = Factored(left.flip(0), right)
    passes = None if method == "exact" else 400 if method in ("reverse", "forward") else 64
    options = {"method": method, "num_passes": passes, "generator": generator(1)}
    for result, truth in (
        (ntkops.frobenius_norm(K, **options), K.matrix.norm()),
        (ntkops.inner(K, other, **options), (K.matrix * other.matrix).sum()),
        (
            ntkops.alignment(K, other, **options),
            (K.matrix * other.matrix).sum() / (K.matrix.norm() * other.matrix.norm()),
        ),
    ):
        assert abs(float(result) - float(truth)) <= 5 * float(result.stderr) + 1e-9 * abs(float(truth))
        assert passes is None or 0 < result.passes <= passes


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_square_operators_need_not_be_symmetric(method):
    A = torch.randn(40, 40, generator=generator(0), dtype=torch.float64)
    A, runs = A + 3 * torch.eye(40, dtype=torch.float64), 400
    many = OnlyProducts(repeated(A, runs))
    for estimate, truth in ((ntkops.trace, A.trace()), (ntkops.frobenius_norm, A.norm())):
        values = estimate(many, method=method, num_passes=30 * runs, generator=generator(0)).value
        assert abs(float(values.mean()) - float(truth)) < 4 * float(values.std()) / math.sqrt(runs) + 0.05


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_batches_are_estimated_member_by_member(method):
    batch = torch.stack([with_spectrum(SPECTRA[s](64), 1) for s in ("power law", "exponential", "cluster")])
    truth = batch.diagonal(dim1=-2, dim2=-1).sum(-1)
    columns: list[int] = []
    result = ntkops.trace(OnlyProducts(batch, columns), method=method, num_passes=90, generator=generator(0))
    assert result.value.shape == result.stderr.shape == (3,)
    assert ((result.value - truth).abs() <= 5 * result.stderr + 1e-9).all()
    assert result.passes == 3 * sum(columns) <= 90  # a column is multiplied by each of three matrices
    errors = (result.value - truth) / result.stderr.clamp(min=1e-12)
    assert len(set(errors.tolist())) == 3


def test_every_part_of_a_sum_is_counted():
    A = with_spectrum(SPECTRA["power law"](64))
    K = Factored(rotation(64)[:, :10])
    columns: list[int] = []
    total = K + OnlyProducts(A, columns)
    result = ntkops.trace(total.add_jitter(0.5), method="hutchinson", num_passes=60, generator=generator(0))
    assert sum(columns) == 20 and result.passes == 60  # vjp, jvp and one product a column


@pytest.mark.parametrize("spectrum", ["one", "power law"])
def test_intervals_allow_for_rounding_in_float32(spectrum):
    A = torch.ones(200, 200) if spectrum == "one" else with_spectrum(SPECTRA[spectrum](200)).float()
    A = A * 1e3
    truth = float(A.double().trace())
    for seed in range(20):
        found = ntkops.trace(OnlyProducts(A), method="hutch++", num_passes=180, generator=generator(seed))
        assert covering(found.interval, truth, 0) or spectrum != "one"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entries_that_are_not_finite_are_refused_by_every_way(dtype):
    broken = with_spectrum(SPECTRA["power law"](20)).to(dtype)
    broken[3, 3] = torch.inf
    for estimate in (ntkops.trace, ntkops.frobenius_norm, ntkops.effective_rank, ntkops.diagonal):
        for operator in (broken, OnlyProducts(broken)):
            with pytest.raises(NonFiniteError):
                estimate(operator)


def test_what_is_no_operator_is_named():
    with pytest.raises(InputError, match="ndarray"):
        ntkops.trace(torch.eye(3).numpy())
    with pytest.raises(ShapeError, match=r"\(3,\)"):
        ntkops.trace(torch.ones(3))
    with pytest.raises(ShapeError, match="entries"):
        ntkops.frobenius_norm(torch.ones(0, 3))
    with pytest.raises(DtypeError, match="int64"):
        ntkops.trace(torch.eye(3).long())
    with pytest.raises(DtypeError, match="complex"):
        ntkops.trace(torch.eye(3, dtype=torch.complex64))
    with pytest.raises(DtypeError, match="float32 and torch.float64"):
        ntkops.inner(torch.eye(3), torch.eye(3).double())
    with pytest.raises(InputError, match="Generator"):
        ntkops.trace(torch.eye(3), generator=3)
    with pytest.raises(InputError, match="orthogonalize"):
        ntkops.trace(torch.eye(3), orthogonalize=True)
    with pytest.raises(InputError, match="does not pay"):
        ntkops.trace(Factored(torch.eye(9)), method="hutchinson", num_passes=1)


@functools.cache
def twelve_outputs(dtype):
    """Return a network linearised and six samples, once for all tests."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hidden, head = torch.nn.Linear(4, 16), torch.nn.Linear(16, 12)
        model = torch.nn.Sequential(hidden, torch.nn.Tanh(), head, torch.nn.Tanh()).to(dtype)
        return ntkops.linearize(model), torch.randn(6, 4).to(dtype)


def above_the_limit(dtype=torch.float64, limit=4, **options):
    """A kernel of twelve outputs where a user allows four backward passes."""
    return ntkops.ntk(*twelve_outputs(dtype), engine=ntkops.Layerwise(max_backwards=limit), **options)


@pytest.mark.parametrize("options", [{}, {"max_dense_bytes": 0}, {"outputs": "each"}])
@pytest.mark.parametrize("name", ["trace", "diagonal", "frobenius_norm", "effective_rank", "partial_trace"])
def test_above_the_limit_of_backwards_the_default_estimates(name, options):
    if name == "partial_trace" and "outputs" in options:
        options = {}  # of one output there is nothing to sum
    estimate = getattr(ntkops, name)
    truth = estimate(above_the_limit(limit=99, **options), method="exact").value
    limited = above_the_limit(**options)
    for cap in ({}, {"num_passes": 5}):
        with pytest.raises(ntkops.errors.BackwardLimitError):
            estimate(limited, method="exact", **cap)
    found = estimate(limited, rtol=0.3, generator=generator(0))
    assert not found.exact or found.method != "exact"
    assert float((found.value - truth).norm()) <= 0.3 * float(found.value.norm())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_above_the_limit_of_backwards_products_go_on_whatever_they_have_cost(dtype):
    limited, whole = above_the_limit(dtype), above_the_limit(limit=99).to_dense()
    close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
    wide = whole.to(dtype)
    vector = torch.ones(len(whole), 1, dtype=dtype)
    for _ in range(100):  # products have long cost more than the dense block
        product = limited @ vector
    torch.testing.assert_close(product, wide @ vector, **close)
    found = ntkops.eigsh(limited, 2, generator=generator(0))
    torch.testing.assert_close(found.values, torch.linalg.eigvalsh(whole).flip(0)[:2], rtol=1e-4, atol=0)
    ridged = whole + torch.eye(len(whole), dtype=torch.float64)
    low, high = ntkops.logdet(limited, 1.0, rtol=0.1, generator=generator(0)).interval
    assert low <= torch.logdet(ridged) <= high
    assert int(ntkops.truncation_rank(limited, 0.1, generator=generator(0)).rank) > 1
    solution = limited.add_jitter(1.0).solve(vector)
    expected = torch.linalg.solve(ridged, vector.double()).to(dtype)
    torch.testing.assert_close(solution, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ntkops.errors.BackwardLimitError):
        limited.to_dense()


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("n", [200, 1000])
def test_rounding_of_long_sums_is_inside_the_interval(n, batched):
    # A batched product with one column adds its n terms in longer runs than one without a batch does.
    A = torch.full((n, n), 1e3)
    found = ntkops.trace(
        OnlyProducts(A[None] if batched else A), method="hutch++", num_passes=180, generator=generator(0)
    )
    low, high = found.interval
    assert bool((low <= 1e3 * n).all()) and bool((high >= 1e3 * n).all())
    assert float((high - low).max()) < 1e-4 * 1e3 * n
