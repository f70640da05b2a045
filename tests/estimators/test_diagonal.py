"""The diagonal: exact, or estimated with an error for each entry."""

import pytest
import torch

import ntkops
from ntkops.errors import InputError, NotConvergedWarning, ShapeError
from tests.cases import BY_NAME
from tests.estimators.problems import SPECTRA, Factored, OnlyProducts, generator, rotation, with_spectrum


def test_exact_diagonals_cost_what_is_said():
    A = with_spectrum(SPECTRA["power law"](30))
    columns: list[int] = []
    result = ntkops.diagonal(OnlyProducts(A, columns))
    torch.testing.assert_close(result.value, A.diagonal())
    assert result.exact and result.passes == sum(columns) == 30
    case = BY_NAME["mlp"]
    K = ntkops.ntk(case.make(), case.data(6), max_dense_bytes=0)
    assert ntkops.diagonal(K).passes == 2


@pytest.mark.parametrize("method", ["hutchinson", "fhutch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_estimated_diagonals_are_covered_entry_by_entry(method, dtype):
    K = Factored((rotation(60)[:, :20] * torch.linspace(0.5, 2, 20)).to(dtype))
    truth = K.matrix.double().diagonal()
    result = ntkops.diagonal(K, method=method, num_passes=600, generator=generator(0))
    assert result.passes == 600 and result.value.shape == (60,) and not result.exact
    low, high = result.interval
    inside = (low <= truth) & (truth <= high)
    assert int(inside.sum()) >= 50


def test_running_sums_equal_plain_ones():
    A = with_spectrum(SPECTRA["step"](100))
    result = ntkops.diagonal(OnlyProducts(A), method="hutchinson", num_passes=95, generator=generator(4))
    draw = generator(4)
    parts = [torch.randint(0, 2, (100, k), generator=draw).double() * 2 - 1 for k in (64, 31)]
    probes = torch.cat(parts, dim=1)
    samples = probes * (A @ probes)
    torch.testing.assert_close(result.value, samples.mean(-1))
    torch.testing.assert_close(result.stderr, samples.std(-1) / 95**0.5)


def test_tolerances_are_relative_to_the_whole_diagonal():
    A = with_spectrum(SPECTRA["cluster"](300))
    result = ntkops.diagonal(OnlyProducts(A), method="hutchinson", rtol=0.2, generator=generator(0))
    assert result.converged and not result.exact
    assert float((result.value - A.diagonal()).norm() / A.diagonal().norm()) < 0.2
    with pytest.warns(NotConvergedWarning, match="the diagonal"):
        ntkops.diagonal(OnlyProducts(A), method="hutchinson", rtol=1e-3, num_passes=60)


def test_batches_and_bad_options():
    batch = torch.stack([with_spectrum(SPECTRA["step"](20), seed) for seed in (0, 1)])
    result = ntkops.diagonal(OnlyProducts(batch), method="hutchinson", num_passes=30)
    assert result.value.shape == (2, 20) and result.passes == 30
    with pytest.raises(ShapeError, match="square"):
        ntkops.diagonal(torch.ones(2, 3))
    with pytest.raises(InputError, match="hutchinson"):
        ntkops.diagonal(torch.eye(2), method="hutch++")
