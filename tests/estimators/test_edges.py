"""Every method of every quantity where numbers are extreme: zero, tiny, huge, rank one, one parameter."""

import pytest
import torch

import ntkops
from ntkops.errors import ZeroKernelError
from ntkops.estimators.moments import NORM_METHODS, PAIR_METHODS, TRACE_METHODS
from tests.estimators.problems import Factored, generator, repeated

DTYPES = (torch.float64, torch.float32)


def ratio(K):
    return K.trace() ** 2 / K.square().sum()


def cosine(A, B):
    return (A * B).sum() / (A.norm() * B.norm())


QUANTITIES = {
    "trace": (ntkops.trace, torch.trace, TRACE_METHODS),
    "frobenius_norm": (ntkops.frobenius_norm, torch.norm, NORM_METHODS),
    "effective_rank": (ntkops.effective_rank, ratio, NORM_METHODS),
    "inner": (ntkops.inner, lambda A, B: (A * B).sum(), PAIR_METHODS),
    "alignment": (ntkops.alignment, cosine, PAIR_METHODS),
}
CASES = [
    (name, method)
    for name, (_, _, methods) in QUANTITIES.items()
    for method in methods
    if method != "stratified"  # takes kernels over samples: tests/estimators/test_stratified.py
]
FACTORS = {
    "rank one": lambda: torch.arange(1.0, 13.0).unsqueeze(-1) @ torch.ones(1, 5),
    "one parameter": lambda: torch.linspace(1, 2, 12).unsqueeze(-1),
    "one state": lambda: torch.linspace(1, 2, 7).unsqueeze(0),
    "multiple of the identity": lambda: 3.0 * torch.eye(12),
    "fewer states than passes": lambda: torch.randn(4, 9, generator=generator(0)),
    "fewer parameters than passes": lambda: torch.randn(12, 2, generator=generator(1)),
    "tiny": lambda: 1e-10 * torch.randn(12, 6, generator=generator(2)),
    "huge": lambda: 1e9 * torch.randn(12, 6, generator=generator(3)),
}


RUNS = 8


@pytest.mark.parametrize("case", FACTORS)
@pytest.mark.parametrize("name, method", CASES)
def test_edges_are_finite_and_right(name, method, case):
    """A batch of estimates; of eight intervals of .95 fewer than six hold the truth in one of 170 cases."""
    estimate, truth, _ = QUANTITIES[name]
    for dtype in DTYPES:
        factor = FACTORS[case]().to(dtype)
        factors = [factor, factor.flip(0)] if name in ("inner", "alignment") else [factor]
        exact = float(truth(*((F.double() @ F.double().mT) for F in factors)))
        passes = 26 * len(factors) * RUNS  # for each not a multiple of three
        options = {} if method == "exact" else {"num_passes": passes}
        many = [Factored(repeated(F, RUNS)) for F in factors]
        result = estimate(*many, method=method, generator=generator(5), **options)
        low, high = (end.double() for end in result.interval)
        value, slack = result.value.double(), 60 * torch.finfo(dtype).eps * abs(exact)
        assert value.isfinite().all() and bool(((low <= value) & (value <= high)).all())
        covered = int(((low - slack <= exact) & (exact <= high + slack)).sum())
        assert covered >= (RUNS if result.exact else 6), (dtype, exact, low, high)
        if method in ("exact", "sketch") and case != "multiple of the identity":  # the sketch has all of them
            assert float((value - exact).abs().max()) <= 1e-4 * abs(exact)


@pytest.mark.parametrize("name, method", CASES)
def test_zero_is_zero_or_an_undefined_ratio(name, method):
    estimate, _, _ = QUANTITIES[name]
    count = 2 if name in ("inner", "alignment") else 1
    options = {} if method == "exact" else {"num_passes": 26 * count}
    for dtype in DTYPES:
        zeros = [Factored(torch.zeros(12, 5, dtype=dtype))] * count
        if name in ("effective_rank", "alignment"):
            with pytest.raises(ZeroKernelError, match="zero"):
                estimate(*zeros, method=method, generator=generator(0), **options)
            continue
        result = estimate(*zeros, method=method, generator=generator(0), **options)
        assert float(result) == 0 and all(float(end) == 0 for end in result.interval)
