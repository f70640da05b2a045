"""What is said about the random maps, held against many seeds: means, variances, bits."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from ntkops.projections import SJLT, SRHT, CountSketch, Gaussian, Rademacher
from ntkops.projections.counter import integers, normal_rows, sign_rows, signs, stream_key, words

from .maps import DIM, MAPS, K, dense, vectors

SEEDS = 400


@functools.cache
def matrices(name: str) -> torch.Tensor:
    """Return many maps as matrices, ``(seeds, k, dim)``."""
    return torch.stack([dense(MAPS[name](seed)) for seed in range(SEEDS)])


def images(name: str) -> torch.Tensor:
    """Return images of `structured` under many maps, ``(seeds, rows, k)``."""
    return structured() @ matrices(name).mT


def structured() -> torch.Tensor:
    """Return rank-one checks: dense, sparse, periodic with period k, and a pair with an angle."""
    generic, sparse, periodic = vectors(1)[0], torch.zeros(DIM).double(), torch.zeros(DIM).double()
    sparse[[3, 50, 51, 120]] = torch.tensor([1.0, -2.0, 1.5, 1.0], dtype=torch.float64)
    periodic[5::K] = 1
    return normalised(torch.stack([generic, sparse, periodic, 0.6 * generic + vectors(1, seed=9)[0]]))


def normalised(x: torch.Tensor) -> torch.Tensor:
    return x / x.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("name", MAPS)
def test_inner_products_are_unbiased(name: str) -> None:
    x, y = structured(), images(name)
    grams = y @ y.mT  # (seeds, 4, 4)
    error = grams.mean(0) - x @ x.mT
    standard = grams.std(0) / math.sqrt(SEEDS)
    assert float((error.abs() - 4.5 * standard).max()) <= 1e-12, error
    # All unit vectors together see a factor in the lengths of a percent, where one alone sees a tenth.
    lengths = matrices(name).square().sum((1, 2)) / DIM
    assert abs(float(lengths.mean()) - 1) <= 4.5 * float(lengths.std()) / math.sqrt(SEEDS) + 1e-12


@pytest.mark.parametrize("name", MAPS)
def test_the_map_is_isometric_on_average(name: str) -> None:
    products = matrices(name).mT @ matrices(name)
    error = products.mean(0) - torch.eye(DIM, dtype=torch.float64)
    standard = products.std(0) / math.sqrt(SEEDS)
    # 137² entries: five standard errors, and one entry in a hundred for those whose tails are heavy.
    beyond = error.abs() > 5 * standard + 1e-12
    assert float(beyond.double().mean()) <= 1e-2


@pytest.mark.parametrize("name", ["CountSketch", "SJLT", "SRHT", "Rademacher", "Gaussian"])
def test_the_variance_of_lengths_and_inner_products_is_at_most_what_is_said(name: str) -> None:
    x, y = structured(), images(name)
    grams = y @ y.mT
    lengths = x.square().sum(1)
    bound = (lengths[:, None] * lengths + (x @ x.mT) ** 2) / K
    # The relative error of a variance is about √((kurtosis - 1) / seeds).
    centred = (grams - x @ x.mT).square()
    noise = centred.std(0) / math.sqrt(SEEDS)
    assert bool((centred.mean(0) <= bound * 1.02 + 4.5 * noise).all())


@pytest.mark.parametrize("name", ["Gaussian", "Rademacher"])
def test_the_variance_of_the_dense_maps_is_the_formula(name: str) -> None:
    x = structured()[[0, 3]]
    y = torch.stack([MAPS[name](seed).apply(x) for seed in range(1200)])
    squares, inner = x.square().sum(1), x[0] @ x[1]
    expected = (squares[0] * squares[1] + inner**2) / K
    if name == "Rademacher":
        expected = expected - 2 * (x[0] ** 2 * x[1] ** 2).sum() / K
    measured = (y[:, 0] * y[:, 1]).sum(1).var()
    assert float(measured) == pytest.approx(float(expected), rel=0.15)


def test_colliding_segments_behave_as_hashes_do() -> None:
    """Entries of different segments meet with probability 1 / k, whatever their places."""
    pairs = 4000
    places = CountSketch(2 * pairs * K, K, 0).adjoint(torch.eye(K)).abs().argmax(0).view(pairs, 2, K)
    assert bool((places.sort(-1).values == torch.arange(K)).all())  # inside of a segment none meet
    for here, there in ((0, 0), (3, 5)):
        meets = (places[:, 0, here] == places[:, 1, there]).double()
        assert float(meets.mean()) == pytest.approx(1 / K, abs=4.5 * math.sqrt(1 / K / pairs))


def test_rows_of_the_sjlt_are_a_uniform_choice() -> None:
    segments = 4000
    columns = SJLT(5 * segments, 5, 0, nonzeros=2).adjoint(torch.eye(5))[:, ::5]
    rows = columns.mT.nonzero()[:, 1].view(segments, 2)
    chosen = torch.bincount(rows @ torch.tensor([5, 1]), minlength=25).view(5, 5) / segments
    chosen = chosen[torch.triu_indices(5, 5, 1).unbind()]
    assert float((chosen - 0.1).abs().max()) <= 4.5 * math.sqrt(0.09 / segments)


def test_rows_of_the_srht_are_a_uniform_choice() -> None:
    places = torch.cat([SRHT(4096 * 8, 64, seed)._chosen(0, 8, torch.device("cpu")) for seed in range(40)])
    assert all(len(row.unique()) == 64 for row in places)
    found = torch.bincount(places.flatten() // 64, minlength=64).double()  # 64 bins of 64 rows each
    expected = places.numel() / 64
    assert float(((found - expected) ** 2 / expected).sum()) <= 63 + 5 * math.sqrt(2 * 63)


# the counter-based numbers themselves


def reference_splitmix(state: int, count: int) -> list[int]:
    """Return outputs of SplitMix64 as it is published, in Python's integers."""
    mask, found = 2**64 - 1, []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & mask
        z = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        found.append(z ^ (z >> 31))
    return found


def test_words_are_those_of_splitmix64() -> None:
    # The first output for the seed 0 as published with the reference code.
    assert reference_splitmix(0, 1) == [0xE220A8397B1DCDAF]
    for key in (0, 7, 2**63 + 12345, 2**64 - 1):
        unsigned = [word % 2**64 for word in words(key, 0, 50).tolist()]
        assert unsigned == reference_splitmix(key, 50)
    assert torch.equal(words(3, 0, 100)[40:], words(3, 40, 100))


def test_streams_have_nothing_to_do_with_each_other() -> None:
    keys = {stream_key(seed, name, number) for seed in range(20) for name in "ab" for number in range(20)}
    assert len(keys) == 800
    one, other = (signs(stream_key(0, name), 0, 2**18, torch.float64) for name in ("a", "b"))
    neighbour = signs(stream_key(1, "a"), 0, 2**18, torch.float64)
    for pair in ((one, other), (one, neighbour), (one[1:], one[:-1]), (one[64:], one[:-64])):
        assert abs(float((pair[0] * pair[1]).mean())) <= 4.5 / math.sqrt(2**18)


def test_bits_are_balanced_and_pairwise_independent() -> None:
    found = signs(stream_key(0, "bits"), 0, 64 * 2**14, torch.float64).view(-1, 64)
    assert float(found.mean(0).abs().max()) <= 4.5 / math.sqrt(2**14)
    correlations = found.mT @ found / 2**14 - torch.eye(64)
    assert float(correlations.abs().max()) <= 5.5 / math.sqrt(2**14)


def test_sign_rows_do_not_depend_on_the_cut() -> None:
    whole = sign_rows(9, 0, 20, 70, torch.float32)
    assert whole.shape == (20, 70) and torch.equal(whole.abs(), torch.ones(20, 70))
    assert torch.equal(whole[5:12], sign_rows(9, 5, 12, 70, torch.float32))
    assert torch.equal(signs(9, 3, 200, torch.float32), signs(9, 0, 200, torch.float32)[3:])


@pytest.mark.parametrize("below", [1, 2, 7, 1000, 2**40])
def test_integers_are_uniform(below: int) -> None:
    found = integers(11, 0, 40_000, below)
    assert int(found.min()) >= 0 and int(found.max()) < below
    bins = min(below, 8)
    counts = torch.bincount((found.double() * bins / below).long(), minlength=bins).double()
    shares = (
        torch.bincount((torch.arange(below) * bins // below), minlength=bins) / below if below < 8 else None
    )
    if below in (1, 2, 7):
        assert float((counts / 40_000 - shares).abs().max()) <= 4.5 * math.sqrt(0.25 / 40_000)
    else:
        assert float((counts / 40_000 - 1 / bins).abs().max()) <= 4.5 * math.sqrt(0.25 / 40_000)
    bounds = torch.full((40_000,), below)
    assert torch.equal(found, integers(11, 0, 40_000, bounds))


def test_normal_variates_have_the_moments_of_the_normal_distribution() -> None:
    found = normal_rows(13, 0, 400, 501, torch.float64)
    assert torch.equal(found[100:150], normal_rows(13, 100, 150, 501, torch.float64))
    count = found.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        error = abs(float((found**power).mean()) - moment)
        assert error <= 4.5 * math.sqrt(variance / count), power
    assert float(found.abs().max()) < 5.8
    correlation = (found[:, 1::2] * found[:, :-1:2]).mean()
    assert abs(float(correlation)) <= 4.5 / math.sqrt(count / 2)


def test_independent_rows_of_the_dense_maps() -> None:
    for kind in (Rademacher, Gaussian):
        matrix = dense(kind(4000, 16, 0)) * 4
        gram = matrix @ matrix.mT / 4000
        assert float((gram - torch.eye(16)).abs().max()) <= 5 * math.sqrt(2 / 4000)
