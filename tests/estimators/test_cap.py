"""``num_passes`` is a cap: what a method will really make is counted before it starts, caches included."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn

import ntkops
from ntkops.errors import InputError, NtkopsError
from tests.estimators.problems import generator

QUANTITIES = {
    "trace": ntkops.trace,
    "norm": ntkops.frobenius_norm,
    "effective rank": ntkops.effective_rank,
    "alignment": ntkops.alignment,
    "inner": ntkops.inner,
    "diagonal": ntkops.diagonal,
    "partial trace": ntkops.partial_trace,
    "over samples": lambda kernel, **options: ntkops.partial_trace(kernel, "samples", **options),
    "log-determinant": lambda kernel, **options: ntkops.logdet(kernel, 0.1, **options),
}
CAPS = ((1, None), (3, None), (9, None), (40, None), (40, 0.01), (200, None))
METHODS = ("auto", "sketch", "hutch++", "ntk-hutch++", "xtrace", "hutchinson", "stratified", "reverse", "slq")


def kernels(engine: str, outputs: int = 12) -> list[ntkops.NTKOperator]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, outputs))
    x = torch.randn(20, 8)
    return [ntkops.ntk(model, shifted, engine=engine, max_dense_bytes=0) for shifted in (x, x + 0.1)]


@pytest.mark.parametrize("name", QUANTITIES)
def test_no_more_passes_are_made_than_were_given(name):
    """The engines take turns: over all methods each meets each cap."""
    count, tried = 2 if name in ("alignment", "inner") else 1, 0
    engines = [kernels(engine)[:count] for engine in ("layerwise", "autograd")]
    for number, method in enumerate(METHODS):
        for turn, (cap, rtol) in enumerate(CAPS, number):
            operators = engines[turn % 2]
            options = {"method": method, "num_passes": cap, "rtol": rtol, "generator": generator(0)}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    found = QUANTITIES[name](*operators, **options)
                except NtkopsError:
                    continue
            assert found.passes <= cap, (method, cap, rtol)
            tried += 1
    assert tried >= 5


def test_no_cache_is_made_under_a_cap():
    (kernel, _) = kernels("layerwise", outputs=16)  # rank 17 at most: 16 backwards
    for method, cap in (("hutch++", 60), ("hutch++", 9), ("sketch", 40), ("hutchinson", 500)):
        found = ntkops.trace(kernel, method=method, num_passes=cap, generator=generator(0))
        assert cap / 2 <= found.passes <= cap
    # Whether it is held already does not change the probes.
    again = ntkops.trace(kernel, method="hutchinson", num_passes=500, generator=generator(0))
    assert again.passes == found.passes
    torch.testing.assert_close(again.value, found.value, rtol=1e-4, atol=0)


@pytest.mark.parametrize("cap", [40, 128, 256])
def test_pairs_of_parts_of_the_samples_are_counted(cap, monkeypatch):
    monkeypatch.setattr("ntkops.estimators._stratified_grams._ENTRIES", 2**15)
    model = nn.GRU(2, 8, batch_first=True)
    kernel = ntkops.ntk(model, torch.randn(16, 15, 2), output=0)
    found = ntkops.effective_rank(kernel, method="stratified", num_passes=cap, generator=generator(0))
    assert cap / 2 <= found.passes <= cap


@pytest.mark.parametrize("method", ["sketch", "hutch++", "xtrace", "stratified", "reverse"])
def test_a_cap_below_the_least_is_refused_with_that_number(method):
    (kernel, _) = kernels("layerwise")
    with pytest.raises(InputError, match="num_passes=1 ") as caught:
        ntkops.frobenius_norm(kernel, method=method, num_passes=1)
    least = int(re.findall(r"num_passes=(\d+)", str(caught.value))[-1])
    assert (
        ntkops.frobenius_norm(kernel, method=method, num_passes=least, generator=generator(0)).passes <= least
    )
    with pytest.raises(InputError):
        ntkops.frobenius_norm(kernel, method=method, num_passes=least - 1)


def test_another_way_is_taken_where_the_first_does_not_fit(monkeypatch):
    monkeypatch.setattr("ntkops.estimators._stratified_grams._ENTRIES", 2**8)
    (kernel, _) = kernels("layerwise")
    found = ntkops.frobenius_norm(kernel, num_passes=7, generator=generator(0))
    assert found.method == "sketch" and found.passes <= 7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_trials_and_row_checks_are_reported_beside_the_passes(dtype):
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3), nn.Tanh()).to(dtype),
        torch.randn(20, 8),
    )
    kernel = ntkops.ntk(model, x.to(dtype), max_dense_bytes=0)
    exact = ntkops.trace(kernel, method="exact")
    assert exact.to_dict()["checks"] == exact.checks
    assert exact.passes == 3 and exact.checks == 1  # a backward pass for each output, and one for the rows
    again = ntkops.trace(kernel, method="exact")
    assert again.passes == 3 and again.checks == 0  # these rows have been looked at
    with ntkops.count_passes() as tally:  # J and its transpose are compared by the first product
        product = ntkops.trace(kernel, method="hutchinson", num_passes=6, generator=generator(0))
    assert product.passes == tally.total == 6 and product.checks == tally.count.checks >= 2
    assert (exact + product).checks == exact.checks + product.checks
    by_parts = ntkops.ntk(model, x.to(dtype), max_dense_bytes=0, batch_size=5)
    found = ntkops.trace(by_parts, method="stratified", num_passes=3, generator=generator(0))
    assert found.passes <= 3 and found.checks >= 4  # one for each of four batches
