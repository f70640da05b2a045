"""Densities and distributions of eigenvalues against dense decompositions."""

import pytest
import torch
from matplotlib.figure import Figure

import ntkops
from ntkops.errors import InputError, NotConvergedWarning, ShapeError, ZeroKernelError
from ntkops.estimators import spectral_density
from ntkops.plotting import plot_spectral_density
from tests.cases import BY_NAME
from tests.estimators.problems import SPECTRA, OnlyProducts, generator, with_spectrum

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


def smooth(values, grid, width):
    distance = (grid.unsqueeze(-1) - values) / width
    return torch.exp(-distance.square() / 2).mean(-1) / (width * (2 * torch.pi) ** 0.5)


@DTYPES
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e18])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_small_operators_are_exact(spectrum, scale, dtype):
    values = SPECTRA[spectrum](50) * scale
    found = spectral_density(with_spectrum(values).to(dtype), bandwidth=0.05 * scale)
    assert found.exact and found.seed is None and found.band[0] is found.values
    expected = smooth(values, found.grid, 0.05 * scale)
    torch.testing.assert_close(found.values * scale, expected * scale, rtol=1e-4, atol=1e-5)
    assert float(torch.trapezoid(found.values, found.grid)) == pytest.approx(1, rel=1e-3)
    assert float(found.cdf(values.max().reshape(1) * 1.01)) == pytest.approx(1)


@DTYPES
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_estimates_and_bands(spectrum, dtype):
    values = SPECTRA[spectrum](300)
    K = with_spectrum(values).to(dtype)
    for seed in range(3):
        found = spectral_density(OnlyProducts(K), method="slq", num_probes=12, generator=generator(seed))
        assert found.passes <= 12 * 64 and found.nodes.shape == found.weights.shape
        torch.testing.assert_close(found.weights.sum(-1), torch.ones(12, dtype=torch.float64))
        torch.testing.assert_close(found.density(found.grid), found.values)
        torch.testing.assert_close(found.cdf(found.grid), found.cumulative)
        exact = smooth(values, found.grid, found.bandwidth)
        share = (values <= found.grid.unsqueeze(-1)).double().mean(-1)
        for curve, (low, high), error, expected in (
            (found.values, found.band, found.quadrature_error, exact),
            (found.cumulative, found.cumulative_band, found.cumulative_error, share),
        ):
            error = error + 1e-5 * expected.max()
            # Whole curves leave their bands at times; coverage at a point is measured below.
            assert (curve - 3 * (curve - low) - error <= expected).all()
            assert (expected <= curve + 3 * (high - curve) + error).all()


@pytest.mark.slow
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_bands_cover_at_every_point(spectrum):
    values = SPECTRA[spectrum](80)
    K, grid = with_spectrum(values), float(values.max()) * torch.linspace(0.013, 0.97, 9).double()
    width = float(values.max()) / 20
    expected, share = smooth(values, grid, width), (values <= grid.unsqueeze(-1)).double().mean(-1)
    hits = torch.zeros(2, 9)
    for seed in range(300):
        found = spectral_density(
            OnlyProducts(K), method="slq", num_steps=40, num_probes=6, grid=grid, bandwidth=width,
            generator=generator(seed),
        )  # fmt: skip
        for row, (ends, error, exact) in enumerate(
            [
                (found.band, found.quadrature_error, expected),
                (found.cumulative_band, found.cumulative_error, share),
            ]
        ):
            rounding = 1e-9 * exact.max() + error
            hits[row] += (ends[0] - rounding <= exact) & (exact <= ends[1] + rounding)
    assert (hits >= 272).all()  # 0.95 of 300 at level 0.001


def test_a_tolerance_is_reached_or_said_to_be_missed():
    K = OnlyProducts(with_spectrum(torch.linspace(0, 1, 400).double()))
    options = {"method": "slq", "num_steps": 40, "bandwidth": 0.1, "generator": generator(0)}
    found = spectral_density(K, rtol=0.1, **options)
    expected = smooth(torch.linspace(0, 1, 400).double(), found.grid, 0.1)
    assert found.converged and (found.values - expected).norm() <= 0.1 * expected.norm()
    with pytest.warns(NotConvergedWarning, match="wider than rtol"):
        assert not spectral_density(K, rtol=1e-3, num_passes=200, **options).converged


def test_logarithmic_scale_leaves_rounding_out():
    values = torch.cat([torch.logspace(0, -6, 150), torch.zeros(50)]).double()
    for method in ("exact", "slq"):
        found = spectral_density(
            OnlyProducts(with_spectrum(values)),
            scale="log",
            method=method,
            num_steps=200,
            generator=generator(0),
        )
        mass = float(torch.trapezoid(found.values, found.grid.log10()))
        assert mass == pytest.approx(0.75, abs=0.05) and found.grid.min() > 0
        assert float(found.cdf(torch.tensor([1e-9]))) == pytest.approx(0.25, abs=0.05)
    with pytest.raises(ZeroKernelError):
        spectral_density(torch.zeros(5, 5), scale="log")


@pytest.mark.parametrize("method", ["exact", "slq"])
@pytest.mark.parametrize("matrix", [torch.zeros(8, 8), torch.eye(8), torch.ones(8, 8), torch.ones(1, 1)])
def test_flat_and_tiny_spectra(matrix, method):
    found = spectral_density(matrix, method=method, generator=generator(0))
    assert found.values.isfinite().all() and found.cumulative[-1] == pytest.approx(1)
    assert found.quadrature_error.isfinite().all() and found.band[1].isfinite().all()


def test_our_kernels_lazily():
    case = BY_NAME["mlp"]
    model, x = case.make(), case.data(60)
    found = spectral_density(ntkops.ntk(model, x, max_dense_bytes=0), num_probes=8, generator=generator(0))
    assert found.method == "slq" and found.passes > 0
    with pytest.raises(ShapeError, match="index"):
        spectral_density(ntkops.ntk(model, x, outputs="each"))


@pytest.mark.parametrize(
    "options",
    [
        {"num_steps": 0},
        {"num_probes": 0},
        {"bandwidth": 0.0},
        {"scale": "cubic"},
        {"grid": torch.tensor([1.0, 0.0])},
        {"scale": "log", "grid": torch.tensor([0.0, 1.0])},
        {"method": "slq", "num_passes": 3},
    ],
)
def test_bad_options_are_named(options):
    with pytest.raises(InputError):
        spectral_density(with_spectrum(torch.linspace(0, 1, 20)), **options)


@pytest.mark.parametrize("cumulative", [False, True])
def test_drawings(cumulative):
    K = with_spectrum(SPECTRA["power law"](60))
    ax = plot_spectral_density(spectral_density(K, scale="log"), Figure().subplots(), cumulative=cumulative)
    drawn = spectral_density(K, scale="log", method="slq", generator=generator(0))
    plot_spectral_density(drawn, ax, label="estimated", cumulative=cumulative)
    assert ax.get_xscale() == "log" and len(ax.collections) == 1
    with pytest.raises(InputError, match="scale"):
        plot_spectral_density(spectral_density(K), ax)
    with pytest.raises(ShapeError):
        plot_spectral_density(K, ax)


def test_the_smaller_side_gives_all_eigenvalues():
    """A kernel of more rows than parameters, too large to be dense, has the spectrum of JᵀJ, and zeros."""
    model, x = torch.nn.Linear(3, 2).double(), torch.randn(40, 3, dtype=torch.float64)
    K = ntkops.ntk(model, x, max_dense_bytes=10_000)  # 80 rows take 51,200, 8 parameters 512
    found = spectral_density(K)
    values = torch.linalg.eigvalsh(ntkops.ntk(model, x).to_dense())
    wanted = spectral_density(torch.diag(values), grid=found.grid, bandwidth=found.bandwidth)
    assert found.exact and found.size == 80 and found.nodes.shape == (1, 9)
    torch.testing.assert_close(found.values, wanted.values, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(found.cumulative, wanted.cumulative, rtol=0, atol=1e-12)
    assert not spectral_density(K, method="slq", num_probes=2).exact


def test_a_cap_below_the_exact_passes_leaves_probes():
    K = OnlyProducts(with_spectrum(SPECTRA["power law"](50)))
    found = spectral_density(K, num_steps=10, num_passes=20, generator=generator(0))
    assert not found.exact and found.passes <= 20
