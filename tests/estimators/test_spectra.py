"""Leading eigenpairs and truncation ranks against dense decompositions."""

import pytest
import torch

import ntkops
from ntkops.errors import InputError, NotConvergedWarning, ShapeError, ZeroKernelError
from tests.cases import BY_NAME
from tests.estimators.problems import SPECTRA, OnlyProducts, generator, with_spectrum
from tests.pairs import pairs

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])


@pytest.mark.parametrize(
    "seed, spectrum, dtype", pairs([1, 2, 3], SPECTRA, [torch.float64, torch.float32]), ids=str
)
def test_lanczos_finds_the_leading_pairs(spectrum, seed, dtype):
    values = SPECTRA[spectrum](200).sort(descending=True).values
    K = with_spectrum(values, seed).to(dtype)
    columns: list[int] = []
    pairs = ntkops.eigsh(OnlyProducts(K, columns), k=5, generator=generator(seed))
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(pairs.values, values[:5], rtol=tolerance, atol=tolerance)
    assert pairs.converged and pairs.method == "lanczos" and pairs.passes == sum(columns)
    true = (K.double() @ pairs.vectors.double() - pairs.vectors.double() * pairs.values).norm(dim=0)
    bound = 2 * torch.finfo(dtype).eps ** 0.5 * float(values[0])
    assert (true <= bound).all()
    torch.testing.assert_close(pairs.residuals, true, rtol=0, atol=0.1 * bound)
    gram = pairs.vectors.T @ pairs.vectors
    torch.testing.assert_close(
        gram, torch.eye(5, dtype=dtype), rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-12
    )


@pytest.mark.parametrize("block_size", [1, 4])
def test_copies_of_a_multiple_eigenvalue_are_found(block_size):
    values = torch.cat([torch.full((4,), 3.0), torch.linspace(0.0, 2.0, 196).flip(0)]).double()
    K = OnlyProducts(with_spectrum(values))
    pairs = ntkops.eigsh(K, k=6, block_size=block_size, generator=generator(0))
    torch.testing.assert_close(pairs.values, values[:6], rtol=1e-9, atol=1e-9)


@DTYPES
@pytest.mark.parametrize("which", ["largest", "smallest"])
@pytest.mark.parametrize("copies", [2, 5, 8])
def test_a_block_finds_all_copies_at_once(copies, which, dtype):
    wanted = torch.cat([torch.full((copies,), 3.0), torch.full((2,), 2.5)]).double()
    values = torch.cat([wanted, torch.linspace(0.5, 2.0, 200 - len(wanted)).flip(0)])
    K = with_spectrum(values if which == "largest" else 4.0 - values).to(dtype)
    columns: list[int] = []
    pairs = ntkops.eigsh(
        OnlyProducts(K, columns),
        k=len(wanted),
        which=which,
        block_size=copies,
        max_products=2000,  # and so no dense decomposition
        generator=generator(copies),
    )
    expected = wanted if which == "largest" else 4.0 - wanted
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(pairs.values, expected, rtol=tolerance, atol=tolerance)
    assert pairs.converged and pairs.passes == sum(columns)
    assert columns[0] == copies and columns[-1] == len(wanted)  # the residuals come from fresh products
    gram = (pairs.vectors.T @ pairs.vectors).double()
    torch.testing.assert_close(gram, torch.eye(len(wanted)).double(), rtol=0, atol=10 * tolerance)


@DTYPES
@pytest.mark.parametrize("scale", [1e-20, 1e18])
def test_blocks_at_extreme_scales(scale, dtype):
    values = torch.cat([torch.full((4,), 3.0), torch.linspace(0.0, 2.0, 96).flip(0)]).double() * scale
    pairs = ntkops.eigsh(
        OnlyProducts(with_spectrum(values).to(dtype)),
        k=5,
        block_size=4,
        max_products=2000,
        generator=generator(0),
    )
    torch.testing.assert_close(pairs.values / scale, values[:5] / scale, rtol=1e-5, atol=1e-6)
    assert pairs.converged


@pytest.mark.parametrize("matrix", [torch.eye(150), torch.zeros(150, 150), torch.ones(150, 150)])
def test_invariant_subspaces_do_not_stop_it(matrix):
    matrix = matrix.double()
    pairs = ntkops.eigsh(OnlyProducts(matrix), k=3, generator=generator(0))
    expected = torch.linalg.eigvalsh(matrix).flip(0)[:3]
    torch.testing.assert_close(pairs.values, expected, rtol=1e-9, atol=1e-9)


def test_small_operators_and_many_pairs_are_dense():
    K = with_spectrum(torch.arange(1.0, 21.0))
    pairs = ntkops.eigsh(K, k=20)
    assert pairs.method == "dense" and pairs.seed is None
    torch.testing.assert_close(pairs.values, torch.arange(20.0, 0.0, -1.0, dtype=torch.float64))


def test_negative_eigenvalues_are_shown():
    K = with_spectrum(torch.tensor([2.0, -1.0, 0.5]))
    torch.testing.assert_close(
        ntkops.eigsh(K, k=3).values, torch.tensor([2.0, 0.5, -1.0], dtype=torch.float64)
    )


def test_too_few_products_are_told():
    K = OnlyProducts(with_spectrum(torch.linspace(1, 2, 300)))
    with pytest.warns(NotConvergedWarning, match="raise max_products or tol"):
        pairs = ntkops.eigsh(K, k=4, max_products=10, generator=generator(0))
    assert not pairs.converged and pairs.passes == 10
    assert float(pairs.residuals.max()) > 0


def test_our_kernels_lazily_and_in_batches():
    case = BY_NAME["mlp"]
    model, x = case.make(), case.data(90)
    lazy, dense = ntkops.ntk(model, x, max_dense_bytes=0), ntkops.ntk(model, x).to_dense()
    pairs = ntkops.eigsh(lazy, k=3, generator=generator(0))
    torch.testing.assert_close(pairs.values, torch.linalg.eigvalsh(dense).flip(0)[:3], rtol=1e-9, atol=1e-9)
    each = ntkops.ntk(model, x, outputs="each", max_dense_bytes=0)
    batch = ntkops.eigsh(each, k=2, generator=generator(0))
    expected = torch.linalg.eigvalsh(ntkops.ntk(model, x, outputs="each").to_dense()).flip(-1)[:, :2]
    assert batch.values.shape == (2, 2) and batch.vectors.shape == (2, 90, 2)
    torch.testing.assert_close(batch.values, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "options", [{"k": 0}, {"k": 400}, {"tol": -1.0}, {"k": 5, "max_products": 3}, {"block_size": 0}]
)
def test_bad_options_are_named(options):
    with pytest.raises(InputError):
        ntkops.eigsh(OnlyProducts(torch.eye(300)), **options)
    with pytest.raises(ShapeError):
        ntkops.eigsh(torch.ones(3, 4))


@pytest.mark.parametrize(
    "spectrum, epsilon, method",
    pairs(["power law", "exponential", "step"], [0.5, 0.1, 0.01], ["dense", "lanczos"]),
    ids=str,
)
def test_truncation_ranks_match_the_definition(spectrum, epsilon, method):
    values = SPECTRA[spectrum](160).sort(descending=True).values
    share = values.cumsum(0) / values.sum()
    expected = int((share >= 1 - epsilon - 1e-12).long().argmax()) + 1
    result = ntkops.truncation_rank(
        OnlyProducts(with_spectrum(values)), epsilon, method=method, generator=generator(0)
    )
    assert int(result) == expected and result.converged
    assert float(result.captured) == pytest.approx(float(share[expected - 1]), rel=1e-8)
    assert result.exact == (method == "dense")


def test_truncation_ranks_of_classes():
    case = BY_NAME["mlp"]
    each = ntkops.ntk(case.make(), case.data(40), outputs="each", max_dense_bytes=0)
    result = ntkops.truncation_rank(each, 0.05)
    dense = ntkops.ntk(case.make(), case.data(40), outputs="each").to_dense()
    for number in range(2):
        values = torch.linalg.eigvalsh(dense[number]).flip(0).clamp(min=0)
        share = values.cumsum(0) / values.sum()
        assert int(result.rank[number]) == int((share >= 0.95).long().argmax()) + 1


def test_truncation_ranks_of_nothing_are_refused():
    with pytest.raises(ZeroKernelError):
        ntkops.truncation_rank(torch.zeros(4, 4))
    with pytest.raises(InputError, match="epsilon"):
        ntkops.truncation_rank(torch.eye(4), 1.5)
    with pytest.raises(InputError, match="method"):
        ntkops.truncation_rank(torch.eye(4), method="magic")
