"""One direction of differentiation: U-statistics over pairs, their errors, and Algorithm 2."""

import itertools
import math

import pytest
import torch

import ntkops
from ntkops.errors import UnsupportedOperationError
from ntkops.estimators._statistics import Mean, Pairs, summarize
from tests.estimators.problems import Factored, OnlyProducts, covering, generator, repeated, rotation


def first(moments):
    return moments[..., 0]


@pytest.mark.parametrize("shared", [True, False])
def test_pairs_are_means_and_leave_one_out_by_brute_force(shared):
    terms = torch.randn(2, 5, 5 if shared else 4, generator=generator(0), dtype=torch.float64)
    group = 0 if shared else 1
    pairs = Pairs.of(lambda part: terms[:, part].clone(), 5, cols=group)

    def mean(rows, cols):
        chosen = [(a, b) for a, b in itertools.product(rows, cols) if not shared or a != b]
        return torch.stack([terms[:, a, b] for a, b in chosen]).mean(0)

    everything = range(terms.shape[-1])
    torch.testing.assert_close(pairs.value(), mean(range(5), everything))
    for left_out in range(5):
        rest = [a for a in range(5) if a != left_out]
        expected = mean(rest, rest if shared else everything)
        torch.testing.assert_close(pairs.without(0)[:, left_out], expected)
    if not shared:
        rest = [b for b in everything if b != 2]
        torch.testing.assert_close(pairs.without(1)[:, 2], mean(range(5), rest))


def test_pairs_summed_in_slices_are_the_same(monkeypatch):
    terms = torch.randn(9, 9, generator=generator(0), dtype=torch.float64)
    whole = Pairs.of(lambda part: terms[part].clone(), 9)
    monkeypatch.setattr("ntkops.estimators._statistics._PAIR_ROWS", 4)
    sliced = Pairs.of(lambda part: terms[part].clone(), 9)
    torch.testing.assert_close(whole.row_sums, sliced.row_sums)
    torch.testing.assert_close(whole.column_sums, sliced.column_sums)


def test_the_jackknife_of_a_mean_is_its_standard_error():
    samples = torch.randn(3, 17, generator=generator(0), dtype=torch.float64)
    summary = summarize([Mean(samples, torch.ones(3, dtype=torch.float64))], first)
    torch.testing.assert_close(summary.value, 1 + samples.mean(-1))
    torch.testing.assert_close(summary.stderr, samples.std(-1) / math.sqrt(17))
    assert summary.freedom == 16


def test_what_is_common_cancels_in_a_ratio():
    samples = torch.rand(12, generator=generator(0), dtype=torch.float64) + 0.5
    ratio = summarize([Mean(samples), Mean(2 * samples)], lambda m: m[..., 0] / m[..., 1])
    assert float(ratio.value) == pytest.approx(0.5) and float(ratio.stderr) < 1e-15


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("seed", [0, 1])
def test_proposition_one_with_four_jacobians_of_different_shapes(direction, seed):
    draw = generator(seed)
    n, m, p, q = 4, 6, 5, 3
    J1, J2, J3, J4 = (
        torch.randn(size, generator=draw, dtype=torch.float64) for size in ((n, p), (m, p), (m, q), (n, q))
    )
    truth = float((J1 @ J2.T @ J3 @ J4.T).trace())
    wrong = float((J1 @ J2.T @ J3 @ J4.T).abs().sum())
    results = [
        ntkops.one_sided_product_trace(
            J1, J2, J3, J4, direction=direction, num_passes=400, generator=generator(s)
        )
        for s in range(120)
    ]
    values = torch.tensor([float(result) for result in results])
    spread = float(values.std())
    assert abs(float(values.mean()) - truth) < 4 * spread / math.sqrt(120) and truth != wrong
    assert {result.passes for result in results} == {400}
    errors = torch.tensor([float(result.stderr) for result in results])
    assert (
        0.85 * spread < float(errors.mean()) < 1.5 * spread
    )  # the jackknife may be too large, not too small
    covered = sum(float(r.interval[0]) <= truth <= float(r.interval[1]) for r in results)
    assert covered >= 106  # .95 at level .001


def test_all_pairs_beat_single_pairs():
    J = torch.randn(6, 8, generator=generator(0), dtype=torch.float64)
    values = torch.tensor(
        [
            float(ntkops.one_sided_product_trace(J, J, J, J, num_passes=40, generator=generator(s)))
            for s in range(200)
        ]
    )
    draw = generator(0)
    K, single = J @ J.T, []
    for _ in range(200):
        u, v = (torch.randint(0, 2, (6, 20), generator=draw).double() * 2 - 1 for _ in range(2))
        single.append((u * (K @ v)).sum(0).square().mean())
    assert float(values.std()) < 0.9 * float(torch.stack(single).std())


def test_a_jacobian_given_twice_is_multiplied_once():
    columns: list[int] = []
    J = OnlyProducts(rotation(5), columns)
    result = ntkops.one_sided_product_trace(J, J, J, J, num_passes=40, generator=generator(0))
    assert result.passes == sum(columns) == 40  # 20 probes of each kind, each through J once


@pytest.mark.parametrize("sizes", [(7, 7), (7, 4)])
def test_alignment_from_jvps_alone_with_and_without_common_parameters(sizes):
    draw = generator(3)
    factors = [torch.randn(12, size, generator=draw, dtype=torch.float64) for size in sizes]
    A, B = map(Factored, factors)
    truth = float((A.matrix * B.matrix).sum() / (A.matrix.norm() * B.matrix.norm()))
    assert ntkops.alignment(A, B, method="forward", num_passes=400, generator=generator(0)).passes == 400
    many = [Factored(repeated(factor, 40)) for factor in factors]
    found = ntkops.alignment(*many, method="forward", num_passes=400 * 40, generator=generator(0))
    assert found.passes == 400 * 40 and covering(found.interval, truth, 0) >= 34
    same = ntkops.alignment(A, A, method="forward", num_passes=100, generator=generator(0))
    assert float(same) == pytest.approx(1, abs=1e-12) and float(same.stderr) < 1e-12


@pytest.mark.parametrize("passes", [20, 21])
@pytest.mark.parametrize("method", ["rhutch", "fhutch"])
def test_algorithm_two_divides_by_the_probes_that_it_draws(method, passes):
    J = rotation(30)[:, :25] * torch.linspace(0.1, 2, 25, dtype=torch.float64)
    K = Factored(J)
    for seed in (1, 2, 3):
        result = ntkops.trace(
            K, method=method, num_passes=passes, orthogonalize=True, generator=generator(seed)
        )
        side, draw = (J if method == "fhutch" else J.T), generator(seed)
        half, rest = passes // 2, passes - passes // 2
        Q = torch.linalg.qr(torch.randn(side.shape[1], half, generator=draw, dtype=torch.float64))[0]
        T = torch.randn(side.shape[1], rest, generator=draw, dtype=torch.float64)
        B = T - Q @ (Q.T @ T)
        B = B * math.sqrt(side.shape[1] - half) / B.norm(dim=0)  # on the sphere: its length would be noise
        naive = (side @ Q).square().sum() + (side @ B).square().sum() / rest
        assert float(result) == pytest.approx(float(naive), rel=1e-10)
        assert result.passes == passes


@pytest.mark.parametrize("method", ["rhutch", "fhutch"])
def test_cross_kernels_have_one_sided_traces_too(method):
    draw, runs = generator(0), 400
    left, right = (torch.randn(10, 6, generator=draw, dtype=torch.float64) for _ in range(2))
    K = Factored(repeated(left, runs), repeated(right, runs))
    truth = float((left @ right.T).trace())
    values = ntkops.trace(K, method=method, num_passes=40 * runs, generator=generator(0)).value
    assert abs(float(values.mean()) - truth) < 4 * float(values.std()) / math.sqrt(runs)


def test_sums_have_no_factors_and_say_what_to_do():
    K = Factored(rotation(8)).add_jitter(1.0)
    with pytest.raises(UnsupportedOperationError, match="hutch"):
        ntkops.trace(K, method="rhutch", num_passes=10)
    scaled = 4.0 * Factored(rotation(8)[:, :3])
    result = ntkops.trace(scaled, method="rhutch", num_passes=400, generator=generator(0))
    assert abs(float(result) - 12) < 4 * float(result.stderr)
