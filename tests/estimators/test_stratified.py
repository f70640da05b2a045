"""Probes drawn sample by sample: moments, references, unbiasedness, exactness, errors, tiles and passes."""

import math
import re

import pytest
import scipy.stats
import torch

import ntkops
from ntkops.errors import InputError, NotConvergedWarning, UnsupportedOperationError, ZeroKernelError
from ntkops.estimators import _stratified_grams
from ntkops.estimators._stratified import FrameMoments, extend_frames, projection_moments
from tests.cases import BY_NAME
from tests.estimators.problems import OnlyProducts, generator
from tests.estimators.sampled import SampledDense
from tests.pairs import pairs

QUANTITIES = {
    "trace": (lambda A, B, **k: ntkops.trace(A, **k), lambda A, B: A.trace(), 1),
    "norm": (lambda A, B, **k: ntkops.frobenius_norm(A, **k), lambda A, B: A.norm(), 1),
    "effective rank": (
        lambda A, B, **k: ntkops.effective_rank(A, **k),
        lambda A, B: A.trace() ** 2 / A.square().sum(),
        1,
    ),
    "inner": (lambda A, B, **k: ntkops.inner(A, B, **k), lambda A, B: (A * B).sum(), 2),
    "alignment": (
        lambda A, B, **k: ntkops.alignment(A, B, **k),
        lambda A, B: (A * B).sum() / (A.norm() * B.norm()),
        2,
    ),
}
EACH = pytest.mark.parametrize("name", QUANTITIES)


def psd(n, rank, seed=0):
    root = torch.randn(n, rank, generator=generator(seed), dtype=torch.float64)
    return root @ root.mT


def kernels(samples=10, outputs=8, rank=30, dtype=torch.float64):
    """Two kernels with shared directions, so that neither inner product nor alignment is trivial."""
    n = samples * outputs
    first = psd(n, rank)
    second = first + 0.5 * psd(n, rank, seed=1)
    return first.to(dtype), second.to(dtype)


def empty(samples, outputs):
    return torch.empty((samples, outputs, 0), dtype=torch.float64)


# frames and their moments


@pytest.mark.parametrize("outputs, blocks", [(1, (1,)), (5, (2,)), (5, (5,)), (6, (1, 2)), (6, (2, 2, 2))])
def test_frames_are_orthonormal_also_across_blocks(outputs, blocks):
    frames, draw = empty(7, outputs), generator(0)
    for size in blocks:
        frames = torch.cat([frames, extend_frames(frames, size, draw)], dim=-1)
    eye = torch.eye(sum(blocks), dtype=torch.float64).expand(7, -1, -1)
    torch.testing.assert_close(frames.mT @ frames, eye, atol=1e-13, rtol=0)


def test_projection_moments_match_the_integral_over_the_circle():
    angles = torch.arange(16, dtype=torch.float64) * (2 * math.pi / 16)  # exact for degree four
    v = torch.stack([angles.cos(), angles.sin()], dim=-1)
    moments = torch.einsum("ai,aj,ak,al->ijkl", v, v, v, v) / 16
    A, B = projection_moments(2, 1)
    eye = torch.eye(2, dtype=torch.float64)
    expected = (
        A * torch.einsum("ij,kl->ijkl", eye, eye)
        + B * torch.einsum("ik,jl->ijkl", eye, eye)
        + B * torch.einsum("il,jk->ijkl", eye, eye)
    )
    torch.testing.assert_close(moments, expected)


@pytest.mark.parametrize("outputs, blocks", [(4, (2,)), (5, (2, 1)), (5, (1, 1, 2)), (6, (3,)), (3, (1, 2))])
def test_block_moments_are_unbiased(outputs, blocks):
    B1, B2 = (psd(outputs, 2, seed) - seed * torch.eye(outputs, dtype=torch.float64) for seed in (0, 1))
    moments, draw, count = FrameMoments(outputs, blocks), generator(3), 20000
    frames, parts = empty(count, outputs), []
    for size in blocks:
        parts.append(extend_frames(frames, size, draw))
        frames = torch.cat([frames, parts[-1]], dim=-1)
    W1, W2 = ([V.mT @ B @ V for V in parts] for B in (B1, B2))
    t1, t2 = (sum(w.diagonal(dim1=1, dim2=2).sum(1) for w in W) for W in (W1, W2))
    products = moments.inner(sum((a * b).sum((1, 2)) for a, b in zip(W1, W2, strict=True)), t1 * t2)
    assert abs(float(products.mean() - (B1 * B2).sum())) <= 4 * float(products.std()) / count**0.5 + 1e-9
    eye = torch.eye(outputs, dtype=torch.float64)
    spread = sum(
        (w - (t1 / sum(blocks))[:, None, None] * eye[: len(w[0]), : len(w[0])]).square().sum((1, 2))
        for w in W1
    )
    variance = moments.variance(spread)
    assert float(variance.mean()) == pytest.approx(float(t1.var()), rel=0.06, abs=1e-12)
    up, down = moments.matrix()
    eye = torch.eye(outputs, dtype=torch.float64)
    blocks_found = (
        up * sum(V @ w @ V.mT for V, w in zip(parts, W1, strict=True)) - down * t1[:, None, None] * eye
    )
    error = (blocks_found.mean(0) - B1).abs()
    assert bool((error <= 5 * blocks_found.std(0) / count**0.5 + 1e-9).all())


# values


def test_the_norm_matches_a_naive_one():
    A = kernels(4, 5)[0]
    result = ntkops.frobenius_norm(
        SampledDense(A, 4), method="stratified", num_passes=2, generator=generator(7)
    )
    frames = extend_frames(empty(4, 5), 2, generator(7))
    x, y = projection_moments(5, 2)
    total = 0.0
    for i in range(4):
        for j in range(4):
            W = frames[i].T @ A[5 * i : 5 * i + 5, 5 * j : 5 * j + 5] @ frames[j]
            if i != j:
                total += 2.5**2 * float(W.square().sum())
            else:  # the two equations E|W|² = (x + y) s + y t², E(tr W)² = 2 y s + x t²
                system = torch.tensor([[x + y, y], [2 * y, x]], dtype=torch.float64)
                right = torch.stack([W.square().sum(), W.trace() ** 2])
                total += float(torch.linalg.solve(system, right)[0])
    assert float(result) == pytest.approx(total**0.5, rel=1e-12)
    assert result.passes == 2 and result.method == "stratified" and result.seed == 7


@pytest.mark.parametrize("columns", [2, 5])
@pytest.mark.parametrize("name", ["trace", "norm", "inner"])
def test_moments_are_unbiased(name, columns):
    A, B = kernels(5, 6, rank=4)
    estimate, reference, count = QUANTITIES[name]
    power = 2 if name == "norm" else 1
    operators = SampledDense(A, 5), SampledDense(B, 5)
    values = torch.tensor(
        [
            float(
                estimate(*operators, method="stratified", num_passes=count * columns, generator=generator(s))
            )
            ** power
            for s in range(150)
        ],
        dtype=torch.float64,
    )
    error = float(values.mean() - reference(A, B) ** power)
    assert abs(error) < 4 * float(values.std()) / len(values) ** 0.5


def test_a_single_column_gives_an_unbiased_trace_with_an_error():
    A = kernels(12, 6)[0]
    results = [
        ntkops.trace(SampledDense(A, 12), method="stratified", num_passes=1, generator=generator(s))
        for s in range(200)
    ]
    values = torch.stack([r.value for r in results])
    assert abs(float(values.mean() - A.trace())) < 4 * float(values.std()) / 200**0.5
    assert float(torch.stack([r.stderr for r in results]).mean()) > 0.9 * float(values.std())


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_all_columns_are_exact(name, dtype):
    A, B = kernels(6, 4, dtype=dtype)
    estimate, reference, count = QUANTITIES[name]
    sampler_only = SampledDense(A, 6), SampledDense(B, 6)
    for operator in sampler_only:
        operator.cost_of_all = math.inf  # so that the frames themselves must be exact
    result = estimate(*sampler_only, method="stratified", num_passes=4 * count, generator=generator(0))
    assert result.exact and result.method == "stratified" and float(result.stderr) == 0
    assert float(result) == pytest.approx(
        float(reference(A.double(), B.double())), rel=1e-5 if dtype == torch.float32 else 1e-12
    )


@EACH
def test_more_passes_than_outputs_go_exact(name):
    A, B = kernels(6, 4)
    estimate, reference, count = QUANTITIES[name]
    result = estimate(SampledDense(A, 6), SampledDense(B, 6), method="stratified", num_passes=100)
    assert result.exact and result.passes <= 4 * count
    assert float(result) == pytest.approx(float(reference(A, B)), rel=1e-12)


@EACH
def test_one_output_a_sample_is_exact_at_once(name):
    A, B = kernels(7, 1, rank=7)
    estimate, reference, count = QUANTITIES[name]
    result = estimate(SampledDense(A, 7), SampledDense(B, 7), method="stratified", num_passes=count)
    assert float(result) == pytest.approx(float(reference(A, B)), rel=1e-12) and float(result.stderr) == 0


def test_two_kernels_that_are_the_same_are_aligned_without_error():
    A = kernels()[0]
    result = ntkops.alignment(
        SampledDense(A, 10),
        SampledDense(3 * A, 10),
        method="stratified",
        num_passes=4,
        generator=generator(0),
    )
    assert float(result) == pytest.approx(1, abs=1e-12) and float(result.stderr) < 1e-7


# errors


@EACH
def test_intervals_cover(name):
    """Two columns twice as often as four, where there is more to be known."""
    A, B = kernels(12, 8, rank=3)
    estimate, reference, count = QUANTITIES[name]
    truth, covered = float(reference(A, B)), 0
    operators = SampledDense(A, 12), SampledDense(B, 12)
    for seed in range(150):
        passes = count * (2 if seed % 3 else 4)
        low, high = estimate(
            *operators, method="stratified", num_passes=passes, generator=generator(seed)
        ).interval
        covered += float(low) <= truth <= float(high)
    assert scipy.stats.binom.cdf(covered, 150, 0.95) > 1e-3, covered


def test_the_variance_of_the_trace_is_unbiased():
    A = kernels(15, 6, rank=4)[0]
    results = [
        ntkops.trace(SampledDense(A, 15), method="stratified", num_passes=2, generator=generator(s))
        for s in range(400)
    ]
    variance = torch.stack([r.value for r in results]).var()
    assert float(torch.stack([r.stderr**2 for r in results]).mean()) == pytest.approx(
        float(variance), rel=0.25
    )


def test_the_variance_of_the_norm_is_not_too_small():
    A = kernels(20, 6)[0]
    for columns in (2, 4):
        results = [
            ntkops.frobenius_norm(
                SampledDense(A, 15), method="stratified", num_passes=columns, generator=generator(s)
            )
            for s in range(150)
        ]
        variance = torch.stack([r.value for r in results]).var()
        claimed = torch.stack([r.stderr**2 for r in results]).mean()
        assert 0.85 * float(variance) < float(claimed) < 9 * float(variance)


@EACH
def test_a_tolerance_is_met_and_frames_grow_without_repeating_passes(name):
    A, B = kernels(12, 24, rank=20)
    estimate, reference, count = QUANTITIES[name]
    truth, hits = float(reference(A, B)), 0
    for seed in range(40):
        operators = SampledDense(A, 12), SampledDense(B, 12)
        result = estimate(*operators, method="stratified", rtol=0.15, generator=generator(seed))
        assert result.converged and result.passes <= 24 * count + (24 * count if result.exact else 0)
        hits += abs(float(result) - truth) <= 0.15 * truth
    assert scipy.stats.binom.cdf(hits, 40, 0.95) > 1e-3, hits


def test_the_pass_limit_is_told():
    A = kernels(4, 12)[0]
    with pytest.warns(NotConvergedWarning, match="raise num_passes, or loosen rtol"):
        result = ntkops.trace(SampledDense(A, 4), method="stratified", rtol=1e-6, num_passes=3)
    assert not result.converged and result.passes == 3


def test_too_few_samples_to_judge_the_norm_say_so():
    A = psd(12, 5)
    result = ntkops.frobenius_norm(
        SampledDense(A, 1), method="stratified", num_passes=2, generator=generator(0)
    )
    assert math.isinf(float(result.stderr)) and math.isfinite(float(result))


# edges


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e18])
def test_scales_do_not_overflow(name, scale, dtype):
    A, B = kernels(6, 5, dtype=dtype)
    estimate, reference, count = QUANTITIES[name]
    A, B = A * scale, B * scale
    result = estimate(
        SampledDense(A, 6),
        SampledDense(B, 6),
        method="stratified",
        num_passes=3 * count,
        generator=generator(1),
    )
    truth = float(reference(A.double(), B.double()))
    assert math.isfinite(float(result)) and math.isfinite(float(result.stderr))
    assert abs(float(result) - truth) <= 8 * float(result.stderr)


def test_zero_and_identity():
    zero = SampledDense(torch.zeros(20, 20, dtype=torch.float64), 5)
    options = {"method": "stratified", "generator": generator(0)}
    assert float(ntkops.trace(zero, num_passes=2, **options)) == 0
    norm = ntkops.frobenius_norm(zero, num_passes=2, **options)
    assert float(norm) == 0 and float(norm.stderr) == 0
    with pytest.raises(ZeroKernelError, match="is zero"):
        ntkops.effective_rank(zero, num_passes=2, **options)
    identity = SampledDense(3 * torch.eye(20, dtype=torch.float64), 5)
    result = ntkops.trace(identity, num_passes=2, **options)
    assert float(result) == pytest.approx(60) and float(result.stderr) < 1e-9


def test_too_few_passes_and_operators_without_samples_are_refused():
    A, B = kernels(6, 4)
    with pytest.raises(InputError, match="num_passes=2"):
        ntkops.frobenius_norm(SampledDense(A, 6), method="stratified", num_passes=1)
    with pytest.raises(UnsupportedOperationError, match="sample by sample"):
        ntkops.trace(OnlyProducts(A), method="stratified", num_passes=2)
    with pytest.raises(InputError, match="shared probes need the same"):
        ntkops.alignment(SampledDense(A, 6), SampledDense(B, 3), method="stratified", num_passes=4)
    case = BY_NAME["mlp"]
    model, x = case.make(), case.data(6)
    for kernel in (
        ntkops.ntk(model, x, outputs="trace"),
        ntkops.ntk(model, x, outputs="each"),
        ntkops.ntk(model, x, outputs=[1, 0]),
        ntkops.ntk(model, x)[:5, :5],
        2.0 * ntkops.ntk(model, x),
    ):
        with pytest.raises(UnsupportedOperationError, match="sample by sample"):
            ntkops.trace(kernel, method="stratified", num_passes=2)


# kernels of ours, tiles and passes


@pytest.mark.parametrize(
    "engine, case, name", pairs(["auto", "autograd"], ["conv", "gru-time", "attention"], QUANTITIES), ids=str
)
def test_kernels_of_ours_lazily_and_with_counted_passes(name, case, engine):
    case = BY_NAME[case]
    model, other, x = case.make(), case.make(), case.data(7)
    with torch.no_grad():
        for number, parameter in enumerate(other.parameters()):
            parameter.add_(
                0.3 * torch.randn(parameter.shape, generator=generator(number), dtype=parameter.dtype)
            )
    K1, K2 = (ntkops.ntk(m, x, engine=engine, max_dense_bytes=0, **case.options) for m in (model, other))
    D1, D2 = (ntkops.ntk(m, x, **case.options).to_dense().double() for m in (model, other))
    estimate, reference, count = QUANTITIES[name]
    truth, columns = float(reference(D1, D2)), 2
    with ntkops.count_passes() as tally:
        result = estimate(K1, K2, method="stratified", num_passes=columns * count, generator=generator(5))
    assert result.passes == tally.total <= columns * count or result.exact
    assert abs(float(result) - truth) <= 6 * float(result.stderr) + 1e-6 * abs(truth)


@EACH
@pytest.mark.parametrize("entries", [2, 40, 400])
def test_tiles_change_nothing_but_memory_and_their_passes_are_counted(name, entries, monkeypatch):
    A, B = kernels(11, 5)
    estimate, _, count = QUANTITIES[name]
    operators = SampledDense(A, 11), SampledDense(B, 11)
    options = {"method": "stratified", "num_passes": 2 * count}
    whole = estimate(*operators, generator=generator(3), **options)
    monkeypatch.setattr(_stratified_grams, "_ENTRIES", entries)
    if name != "trace":  # pairs of parts are made more than once, and the cap holds
        with pytest.raises(InputError, match="takes at least") as caught:
            estimate(*operators, generator=generator(3), **options)
        options["num_passes"] = int(re.search(r"num_passes=(\d+)$", str(caught.value))[1])
    tiled = estimate(*operators, generator=generator(3), **options)
    assert float(tiled) == pytest.approx(float(whole), rel=1e-12)
    assert float(tiled.stderr) == pytest.approx(float(whole.stderr), rel=1e-9)
    if name == "trace":  # no pair of samples is needed, so nothing is done twice
        assert tiled.passes == whole.passes
    else:
        assert tiled.passes >= whole.passes


def test_auto_takes_probes_by_sample_where_exact_is_dear():
    model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.Tanh(), torch.nn.Linear(5, 40))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, generator=generator(0))
    x = torch.randn(200, 3, generator=generator(1))  # of 60 the exact value is about as cheap
    K = ntkops.ntk(model, x, max_dense_bytes=0)
    result = ntkops.frobenius_norm(K, rtol=0.3, generator=generator(2))
    assert result.converged and result.method in ("stratified", "exact")
    capped = ntkops.frobenius_norm(K, num_passes=4, generator=generator(2))
    assert capped.method == "stratified" and capped.passes <= 4
    close = ntkops.ntk(model, x[:60], max_dense_bytes=0)  # the methods race, and whichever wins is right
    result = ntkops.frobenius_norm(close, rtol=0.3, generator=generator(2))
    exact = float(ntkops.frobenius_norm(close, method="exact"))
    assert result.converged and float(result.interval[0]) <= exact <= float(result.interval[1])
