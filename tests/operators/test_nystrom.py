"""Nyström kernels: below K, exact with enough inducing points, lazy, and with their rank reported."""

import functools
import logging

import pytest
import torch

import ntkops
from ntkops.errors import (
    DenseMemoryError,
    InputError,
    NonFiniteError,
    ShapeError,
    SingularKernelError,
    UnsupportedOperationError,
)
from ntkops.operators import RidgeOperator, energy_gap, nystrom_ntk
from ntkops.operators.capabilities import capabilities, dense_from_tiles
from tests.cases import BY_NAME
from tests.operators.test_contract import SAMPLES, _concrete, _Square, dense_jacobian, make_model
from tests.pairs import pairs

CASE = BY_NAME["mlp"]
N = 9
OUTPUTS = ["all", "each", "trace", 1]


@functools.cache
def point(dtype):
    return ntkops.linearize(CASE.make().to(dtype))


def kernel(outputs="all", *, lazy=True, dtype=torch.float64, count=N):
    limit = 0 if lazy else "auto"
    return ntkops.ntk(point(dtype), CASE.data(count).to(dtype), outputs=outputs, max_dense_bytes=limit)


def dense_reference(outputs, samples):
    K = kernel(outputs, lazy=False).to_dense()
    per_sample = K.shape[-1] // N
    rows = (torch.tensor(samples)[:, None] * per_sample + torch.arange(per_sample)).flatten()
    cross, square = K[..., rows], K[..., rows, :][..., rows]
    return K, cross @ torch.linalg.pinv(square, hermitian=True) @ cross.mT


@pytest.mark.parametrize("outputs", OUTPUTS)
def test_products_blocks_and_diagonals_are_those_of_the_formula(outputs):
    samples = [4, 0, 7]
    Q = nystrom_ntk(kernel(outputs), samples)
    K, expected = dense_reference(outputs, samples)
    v = torch.randn(*K.shape[:-1], 3, dtype=torch.float64)
    torch.testing.assert_close(Q @ v, expected @ v)
    torch.testing.assert_close(Q.diagonal(), expected.diagonal(dim1=-2, dim2=-1))
    torch.testing.assert_close(Q[..., 2:5, 1:3] @ v[..., :2, :], expected[..., 2:5, 1:3] @ v[..., :2, :])
    torch.testing.assert_close(Q[..., 1, 2], expected[..., 1, 2])
    torch.testing.assert_close(nystrom_ntk(kernel(outputs, lazy=False), samples).to_dense(), expected)
    found = capabilities(Q)
    torch.testing.assert_close(dense_from_tiles(found, 4), expected)
    left, right = found.factors()
    torch.testing.assert_close(left @ (right.mT @ v), expected @ v)
    with pytest.raises(DenseMemoryError, match="features"):
        Q.to_dense()


@pytest.mark.parametrize("outputs", OUTPUTS)
def test_it_is_below_the_kernel_and_exact_with_all_samples(outputs):
    K = kernel(outputs, lazy=False)
    dense = K.to_dense()
    below = torch.linalg.eigvalsh(dense - nystrom_ntk(K, [1, 5]).to_dense())
    assert float(below.min()) > -1e-9 * float(dense.abs().max())
    torch.testing.assert_close(nystrom_ntk(K, range(N)).to_dense(), dense, rtol=1e-6, atol=1e-8)


def test_inputs_and_indices_agree():
    K, x = kernel(), CASE.data(N)
    by_index, by_input = nystrom_ntk(K, [2, 6]), nystrom_ntk(K, x[[2, 6]])
    v = torch.randn(K.shape[-1], 2, dtype=torch.float64)
    torch.testing.assert_close(by_index @ v, by_input @ v)
    assert by_index.indices.tolist() == [2, 6] and by_input.indices is None
    mask = torch.zeros(N, dtype=torch.bool)
    mask[[2, 6]] = True
    torch.testing.assert_close(nystrom_ntk(K, mask) @ v, by_index @ v)


@pytest.mark.parametrize("rule", ["random", "rpcholesky", "kmeans"])
@pytest.mark.parametrize("outputs", ["all", "each"])
def test_rules_choose_as_many_points_and_repeat_by_seed(rule, outputs):
    K = kernel(outputs)
    one, two = (
        nystrom_ntk(K, rule, num_inducing=3, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert one.num_inducing == 3 * (K.num_outputs) and one.seed == 3
    v = torch.randn(*K.shape[:-1], 1, dtype=torch.float64)
    torch.testing.assert_close(one @ v, two @ v, rtol=0, atol=0)


def test_the_rank_is_reported_and_nothing_is_added(caplog):
    model = torch.nn.Linear(2, 1, bias=False).double()
    x = torch.randn(N, 2, dtype=torch.float64)
    K = ntkops.ntk(model, x)
    with caplog.at_level(logging.INFO, logger="ntkops"):
        Q = nystrom_ntk(K, range(5))
    assert Q.rank == 2 and "rank" in caplog.text
    torch.testing.assert_close(Q.to_dense(), x @ x.mT)  # two gradients span all of them
    single = nystrom_ntk(K.to(torch.float32), range(5))
    assert single.rank == 2
    torch.testing.assert_close(single.to_dense(), (x @ x.mT).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-9, 1e8])
def test_scales_do_not_matter_in_float32(scale):
    model = torch.nn.Linear(3, 1, bias=False)
    x = torch.randn(N, 3) * scale
    Q = nystrom_ntk(ntkops.ntk(model, x), [0, 1, 2, 3])
    assert Q.rank == 3
    torch.testing.assert_close(Q.to_dense() / scale**2, x @ x.mT / scale**2, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("outputs", ["all", "each", "trace"])
def test_cross_kernels_predict_like_dense_ones(outputs):
    K = kernel(outputs, lazy=False)
    new = CASE.data(4)
    Q = nystrom_ntk(K, [0, 3, 8])
    whole = ntkops.ntk(CASE.make(), torch.cat([CASE.data(N), new + 0.3]), outputs=outputs)
    both = nystrom_ntk(whole, [0, 3, 8]).to_dense()
    size = K.shape[-1]
    torch.testing.assert_close(Q.cross(new + 0.3).to_dense(), both[..., size:, :size])


def test_with_a_ridge_it_is_solved_by_its_own_factor():
    Q = nystrom_ntk(kernel(), [0, 2, 5])
    A = Q.add_jitter(1e-3)
    assert isinstance(A, RidgeOperator)
    b = torch.randn(Q.shape[-1], 2, dtype=torch.float64)
    x, info = A.solve_with_info(b)
    assert info.converged and info.iterations <= 4 and info.preconditioner == "features"
    _, dense = dense_reference("all", [0, 2, 5])
    torch.testing.assert_close(
        x, torch.linalg.solve(dense + 1e-3 * torch.eye(len(dense)), b), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("lazy, seed, outputs", pairs([True, False], range(3), ["all", "each"]), ids=str)
def test_the_energy_gap_splits_and_bounds_the_error(outputs, seed, lazy):
    samples = torch.randperm(N, generator=torch.Generator().manual_seed(seed))[:3].tolist()
    dense, approximation = dense_reference(outputs, samples)
    found = energy_gap(kernel(outputs, lazy=lazy), samples)
    values = torch.linalg.eigvalsh(dense).flip(-1)
    rank = 3 * dense.shape[-1] // N
    assert found.converged and bool((found.rank == rank).all())
    trace = dense.diagonal(dim1=-2, dim2=-1).sum(-1)
    gap = trace - approximation.diagonal(dim1=-2, dim2=-1).sum(-1)
    torch.testing.assert_close(found.gap, gap)
    torch.testing.assert_close(found.tail, values[..., rank:].sum(-1), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.tail + found.misalignment, found.gap)
    error = torch.linalg.matrix_norm(dense - approximation)
    assert bool((error <= found.gap * (1 + 1e-9)).all())  # the tighter bound
    assert bool((found.gap <= found.bound).all())  # eq. 10
    torch.testing.assert_close(found.bound, (trace * gap).sqrt())
    assert bool((found.share > 0).all()) and bool((found.share < 1).all())


def test_all_samples_leave_no_gap():
    found = energy_gap(kernel(lazy=False), range(N))
    assert float(found.gap) <= 1e-9 * float(found.total)


def test_duplicates_are_left_out_and_too_many_refused(caplog):
    K = kernel()
    with caplog.at_level(logging.INFO, logger="ntkops"):
        Q = nystrom_ntk(K, [3, 1, 3, -8])
    assert Q.indices.tolist() == [3, 1] and "duplicates" in caplog.text
    for attempt, match in (
        (lambda: nystrom_ntk(K, []), "no inducing points"),
        (lambda: nystrom_ntk(K, torch.zeros(N, dtype=torch.bool)), "no inducing points"),
        (lambda: nystrom_ntk(K, [N]), "does not exist"),
        (lambda: nystrom_ntk(K, CASE.data(N + 1)), "more points than samples"),
        (lambda: nystrom_ntk(K, "random", num_inducing=N + 1), "more points than samples"),
        (lambda: nystrom_ntk(K, "random", num_inducing=0), "no inducing points"),
        (lambda: nystrom_ntk(K, "random"), "needs num_inducing"),
        (lambda: nystrom_ntk(K, "best", num_inducing=2), "choose 'kmeans'"),
        (lambda: nystrom_ntk(K, [1], num_inducing=2), "goes with a rule"),
    ):
        with pytest.raises(InputError, match=match):
            attempt()


def test_bad_kernels_and_points_are_told():
    K = kernel()
    with pytest.raises(NonFiniteError):
        nystrom_ntk(K, CASE.data(2) * float("nan"))
    with pytest.raises(ShapeError, match="square"):
        nystrom_ntk(K.cross(CASE.data(2)), [0])
    with pytest.raises(ShapeError, match="whole samples"):
        nystrom_ntk(K[2:5, 2:5], [0])
    with pytest.raises(SingularKernelError, match="zero"):
        zero = torch.nn.Linear(2, 1, bias=False).double()
        nystrom_ntk(ntkops.ntk(zero, torch.zeros(4, 2, dtype=torch.float64)), [0, 1])
    live = ntkops.ntk(CASE.make(), CASE.data(4), differentiable=True).requires_grad_(True)
    with pytest.raises(UnsupportedOperationError, match="detach"):
        nystrom_ntk(live, [0])
    with pytest.raises(ShapeError, match="expected"):
        nystrom_ntk(K, [0]) @ torch.ones(3, dtype=torch.float64)


def test_any_operator_takes_indices():
    dense = kernel(lazy=False).to_dense()
    Q = nystrom_ntk(dense, [0, 4])
    rows = torch.tensor([0, 4])
    expected = dense[:, rows] @ torch.linalg.inv(dense[rows][:, rows]) @ dense[rows]
    torch.testing.assert_close(Q.to_dense(), expected)
    with pytest.raises(UnsupportedOperationError, match="as indices"):
        nystrom_ntk(dense, CASE.data(2))


def test_a_square_kernel_stays_symmetric_when_it_is_rebuilt():
    Q = nystrom_ntk(kernel(), [0, 3])
    for made in (
        Q,
        Q.to(torch.float32),
        Q.detach(),
        Q.representation_tree()(*Q.representation()),
        Q[2:5, 2:5],
    ):
        assert made.symmetric
    assert not Q[2:5].symmetric


class _Nystrom(_Square):
    def create_linear_op(self):
        # All samples: linear_operator's suite solves with it, and so needs full rank.
        return nystrom_ntk(super().create_linear_op(), range(SAMPLES))

    def evaluate_linear_op(self, linear_op):
        *params, root = linear_op.representation()
        J = dense_jacobian(params, self.data[1].to(linear_op.dtype))[:, [0, 2]].flatten(0, 1)
        left = J @ (J.mT @ root)
        return left @ left.mT


class _NystromSingle(_Nystrom):
    """In float32, where derivatives of the inverse by the root of K_ZZ⁺ lose κ(K_ZZ)^1.5: here κ = 9."""

    @property
    def data(self):
        apart = [[1, 0, 0], [0, 1, 0], [0, 0, 1], [-1, -1, 0], [1, -1, -1]]
        return make_model(self.dtype), 2 * torch.tensor(apart, dtype=self.dtype)


_Nystrom.__test__ = _NystromSingle.__test__ = False
for _case, _dtype in ((_NystromSingle, torch.float32), (_Nystrom, torch.float64)):
    _class = _concrete(_case, _dtype)
    _class.__module__ = __name__
    globals()[_class.__name__] = _class
del _class, _case, _dtype, _Square, _Nystrom
