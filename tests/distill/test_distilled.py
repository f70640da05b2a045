"""The currency: U, what it makes of kernels, and the two fits."""

import copy
import functools
import pickle

import pytest
import torch
from linear_operator.operators import DenseLinearOperator, RootLinearOperator

import ntkops
from ntkops.distill import Distilled, class_mean
from ntkops.errors import (
    DtypeError,
    InputError,
    NonFiniteError,
    OutOfRangeError,
    ShapeError,
    SingularKernelError,
    UnsupportedOperationError,
    ZeroKernelError,
)
from ntkops.regression import KernelRidge
from tests.pairs import pairs
from tests.regression.problems import network, samples

from .problems import (
    Forbidden,
    coefficients,
    features,
    full_predictions,
    generator,
    kernels,
    labels,
    objective,
)

K, Y, U = kernels(), labels(), coefficients()
NEW = features(seed=3, points=15) @ features().mT  # a cross kernel of other points


def forms():
    """The same class kernels, one way after another."""
    return {
        "tensor": K,
        "operator": DenseLinearOperator(K),
        "sequence": list(K),
        "lazy": Forbidden(K),
        "lazy sequence": [Forbidden(part) for part in K],
    }


@pytest.mark.parametrize("form", forms())
def test_operators_are_the_dense_products(form):
    distilled = Distilled.of(K, U)
    inside, cross = distilled.operator(forms()[form]), distilled.cross(forms()[form])
    block = torch.randn(6, 3, generator=generator(), dtype=torch.float64)
    torch.testing.assert_close(inside @ block, U.mT @ K @ U @ block)
    torch.testing.assert_close(cross @ block, K @ U @ block)
    torch.testing.assert_close(cross.mT @ U.expand(4, -1, -1), (K @ U).mT @ U)


def test_a_distilled_kernel_may_be_dense_where_the_kernel_may():
    distilled = Distilled.of(K, U)
    inside = distilled.operator(K)
    expected = U.mT @ K @ U
    torch.testing.assert_close(inside.to_dense(), expected)
    torch.testing.assert_close(inside[1].to_dense(), expected[1])
    torch.testing.assert_close(inside[..., 1:3, :].to_dense(), expected[..., 1:3, :])
    torch.testing.assert_close(inside[2, [0, 5], [3, 4]], expected[2, [0, 5], [3, 4]])
    torch.testing.assert_close(inside.diagonal(), expected.diagonal(dim1=-2, dim2=-1))
    torch.testing.assert_close(distilled.cross(NEW)[..., 2:7, :].to_dense(), (NEW @ U)[..., 2:7, :])
    torch.testing.assert_close(distilled.cross(NEW).mT.to_dense(), (NEW @ U).mT)


def test_nothing_forbidden_becomes_dense():
    distilled = Distilled.of(K, U)
    with pytest.raises(ntkops.errors.DenseMemoryError):
        distilled.operator(Forbidden(K)).to_dense()


def test_estimators_take_the_lazy_operator():
    distilled = Distilled.of(K, U)
    dense, lazy = U.mT @ K @ U, distilled.operator(Forbidden(K))
    values = torch.linalg.eigvalsh(dense).flip(-1)
    torch.testing.assert_close(ntkops.eigsh(lazy, 2, generator=generator()).values, values[:, :2])
    torch.testing.assert_close(
        ntkops.trace(lazy, method="exact").value, dense.diagonal(dim1=-2, dim2=-1).sum(-1)
    )
    torch.testing.assert_close(
        ntkops.frobenius_norm(lazy, method="exact").value, torch.linalg.matrix_norm(dense)
    )
    ranks = ntkops.truncation_rank(distilled.operator(K), 0.05).rank
    shares = values.cumsum(-1) / values.sum(-1, keepdim=True)
    assert ranks.tolist() == ((shares < 0.95).sum(-1) + 1).tolist()


def test_kernel_ridge_takes_the_lazy_operators():
    distilled = Distilled.of(K, U, Y)
    ridge = 1e-2
    fitted = KernelRidge(ridge, relative=False, tol=1e-10).fit(
        distilled.operator(Forbidden(K)), distilled.targets
    )
    assert fitted.method_ == "cg"
    other = distilled.fit(K, Y, ridge=ridge, relative=False, fit="sketch")
    torch.testing.assert_close(fitted.predict(distilled.cross(Forbidden(NEW))), other.predict(NEW))


def test_a_network_kernel_stays_lazy_and_has_features():
    model, x, new = network(), samples(20), samples(7, seed=4)
    lazy, dense = (ntkops.ntk(model, x, outputs="each", max_dense_bytes=b) for b in (0, "auto"))
    targets = model(x).detach()
    mixed = coefficients(4, points=20)
    distilled = Distilled.of(lazy, mixed, targets)
    matrix = dense.to_dense()
    torch.testing.assert_close(distilled.operator(lazy) @ mixed[:4], mixed.mT @ matrix @ mixed @ mixed[:4])
    assert distilled.features.shape == (3, 4, sum(p.numel() for p in model.parameters()))
    vector = torch.randn(distilled.features.shape[-1], 2, generator=generator(), dtype=torch.float64)
    expected = mixed.mT @ (dense.left.to_dense() @ vector)
    torch.testing.assert_close(distilled.features @ vector.expand(3, -1, -1), expected)
    first, second = distilled.fit(lazy, targets), distilled.fit(matrix, targets)
    torch.testing.assert_close(first.predict(lazy.cross(new)), second.predict(dense.cross(new).to_dense()))


def test_a_selection_multiplies_the_chosen_points_alone():
    model, x, new = network(), samples(20), samples(7, seed=4)
    kernel = ntkops.ntk(model, x, outputs="each")
    chosen = Distilled.of(kernel, torch.tensor([7, 2, 11]))
    inside = chosen.operator(kernel)
    assert isinstance(inside, ntkops.operators.NTKOperator)
    assert inside.symmetric
    torch.testing.assert_close(inside.to_dense(), kernel.to_dense()[:, [7, 2, 11]][..., [7, 2, 11]])
    cross = chosen.cross(kernel.cross(new))
    torch.testing.assert_close(cross.to_dense(), kernel.cross(new).to_dense()[..., [7, 2, 11]])
    torch.testing.assert_close(chosen.U[[7, 2, 11]], torch.eye(3, dtype=torch.float64))


# the mean of the class kernels


@pytest.mark.parametrize("form", forms())
def test_class_mean(form):
    block = coefficients(3)
    torch.testing.assert_close(class_mean(forms()[form]) @ block, K.mean(0) @ block)
    shares = 1 / K.diagonal(dim1=-2, dim2=-1).sum(-1)
    even = torch.einsum("c,cij->ij", shares / shares.sum(), K)
    found = class_mean(forms()[form], weights="trace") @ block
    torch.testing.assert_close(found * (even @ block).norm() / found.norm(), even @ block)


def test_class_mean_of_a_network_is_its_traced_kernel():
    model, x = network(), samples(20)
    each = ntkops.ntk(model, x, outputs="each", max_dense_bytes=0)
    traced = ntkops.ntk(model, x, outputs="trace")
    mean = class_mean(each)
    torch.testing.assert_close(3 * (mean @ coefficients(2, points=20)), traced @ coefficients(2, points=20))
    with pytest.raises(ntkops.errors.DenseMemoryError):
        mean.to_dense()
    cross, block = each.cross(samples(4)), coefficients(2, points=20)
    torch.testing.assert_close(class_mean(cross) @ block, (cross @ block.expand(3, -1, -1)).mean(0))


def test_weights_keep_the_mean_trace_and_are_checked():
    found = class_mean(K, weights="trace")
    torch.testing.assert_close(found.to_dense().trace(), K.diagonal(dim1=-2, dim2=-1).sum(-1).mean())
    assert class_mean(K[0]).to_dense().equal(K[0])
    with pytest.raises(InputError, match="weights of classes"):
        class_mean(K, weights=torch.tensor([1.0, -1.0, 1.0, 1.0]))
    with pytest.raises(ShapeError, match="one for each"):
        class_mean(K, weights=torch.ones(3))
    with pytest.raises(InputError, match="None, 'trace'"):
        class_mean(K, weights="even")
    with pytest.raises(ZeroKernelError, match="class 1"):
        class_mean(torch.stack([K[0], 0 * K[0]]), weights="trace")


# fits


@pytest.mark.parametrize("form", forms())
@pytest.mark.parametrize("fit", ["nystrom", "sketch"])
def test_fits_against_their_normal_equations(form, fit):
    given = forms()[form]
    fitted = Distilled.of(K, U).fit(given, Y, ridge=1e-3, fit=fit)
    r = 1e-3 * K.diagonal(dim1=-2, dim2=-1).mean()
    small, images, right = U.mT @ K @ U, K @ U, Y.mT.unsqueeze(-1)
    if fit == "sketch":
        beta = torch.linalg.solve(small + r * torch.eye(6, dtype=torch.float64), U.mT @ right)
    else:
        beta = torch.linalg.solve(images.mT @ images + r * small, images.mT @ right)
    torch.testing.assert_close(fitted.coef_, beta.squeeze(-1).mT)
    torch.testing.assert_close(fitted.dual_coef_, (U @ beta).squeeze(-1).mT)
    torch.testing.assert_close(fitted.ridge_, float(r))
    torch.testing.assert_close(fitted.predict(NEW), (NEW @ U @ beta).squeeze(-1).mT)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ridge", [1e-6, 1e-3, 1.0])
def test_nystrom_is_never_worse_in_the_training_objective(seed, ridge):
    distilled = Distilled.of(K, coefficients(6, seed=seed))
    nystrom, sketch = (distilled.fit(K, Y, ridge=ridge, fit=f).dual_coef_ for f in ("nystrom", "sketch"))
    assert objective(K, Y, nystrom, ridge) < objective(K, Y, sketch, ridge)


@pytest.mark.parametrize("fit", ["nystrom", "sketch"])
def test_all_points_are_the_full_regression(fit):
    whole = Distilled.of(K, torch.arange(40))
    torch.testing.assert_close(whole.fit(K, Y, fit=fit).predict(NEW), full_predictions(K, Y, 1e-4, NEW))


@pytest.mark.parametrize("fit", ["nystrom", "sketch"])
def test_one_combination_for_each_class_is_the_full_regression(fit):
    ridge = 1e-4 * K.diagonal(dim1=-2, dim2=-1).mean()
    duals = torch.linalg.solve(
        K + ridge * torch.eye(40, dtype=torch.float64), Y.mT.unsqueeze(-1)
    )  # (C, m, 1)
    duals = duals / torch.linalg.vector_norm(duals, dim=-2, keepdim=True)
    one = Distilled.of(K, duals, Y)
    assert one.size == 1 and one.targets.shape == (1, 4)
    for given, cross in ((K, NEW), (list(K), list(NEW)), (Forbidden(K), Forbidden(NEW))):
        found = one.fit(given, Y, fit=fit).predict(cross)
        assert (found - full_predictions(K, Y, 1e-4, NEW)).abs().max() < 1e-8


def test_nystrom_depends_on_the_span_alone():
    turn = torch.randn(6, 6, generator=generator(2), dtype=torch.float64)
    scales = torch.tensor([1e-8, 1.0, 1e6, 1.0, 1e-3, 1.0], dtype=torch.float64)
    expected = Distilled.of(K, U).fit(K, Y).predict(NEW)
    for other in (U @ turn, U * scales):
        torch.testing.assert_close(
            Distilled.of(K, other).fit(K, Y).predict(NEW), expected, rtol=1e-6, atol=1e-8
        )
    basis = Distilled.of(K, U).orthonormalized()
    torch.testing.assert_close(basis.U.mT @ basis.U, torch.eye(6, dtype=torch.float64))
    torch.testing.assert_close(basis.fit(K, Y).predict(NEW), expected)


@pytest.mark.parametrize("fit", ["nystrom", "sketch"])
def test_fits_do_not_depend_on_the_order_of_points(fit):
    order = torch.randperm(40, generator=generator(1))
    expected = Distilled.of(K, U).fit(K, Y, fit=fit).predict(NEW)
    moved = K[:, order][..., order]
    found = Distilled.of(moved, U[order]).fit(moved, Y[order], fit=fit).predict(NEW[..., order])
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e18])
@pytest.mark.parametrize("fit", ["nystrom", "sketch"])
def test_fits_do_not_depend_on_the_scale_of_the_kernel(dtype, scale, fit):
    expected = Distilled.of(K, U).fit(K, Y, ridge=1e-2, fit=fit).predict(NEW)
    scaled, cross = (scale * K).to(dtype), (scale * NEW).to(dtype)
    for given, new in ((scaled, cross), (Forbidden(scaled), Forbidden(cross))):
        found = Distilled.of(given, U.to(dtype)).fit(given, Y.to(dtype), ridge=1e-2, fit=fit).predict(new)
        assert found.dtype == dtype
        gap = (found.double() - expected).norm() / expected.norm()
        assert gap < (2e-4 if dtype == torch.float32 else 1e-9)


def test_other_layouts_of_labels():
    flat = kernels(points=40)[0]
    outputs = labels()[:20, :2]  # 20 samples of two outputs each: a kernel over 40 rows
    for fit in ("nystrom", "sketch"):
        found = Distilled.of(flat, U).fit(flat, outputs, fit=fit)
        column = Distilled.of(flat, U).fit(flat, outputs.reshape(-1), fit=fit)
        assert found.coef_.shape == (6,) and found.dual_coef_.shape == (20, 2)
        torch.testing.assert_close(found.predict(flat), column.predict(flat).reshape(20, 2))
    shared = Distilled.of(flat, U, Y)
    assert shared.targets.shape == (6, 4)
    torch.testing.assert_close(
        shared.fit(flat, Y).predict(flat)[:, 2], shared.fit(flat, Y[:, 2]).predict(flat)
    )


def test_ridge_by_leaving_out():
    fitted = Distilled.of(K, U).fit(K, Y, ridge="loo")
    assert fitted.ridge_path_.errors.argmin() == fitted.ridge_path_.best
    assert fitted.ridge_ == float(fitted.ridge_path_.ridges[fitted.ridge_path_.best])


@pytest.mark.parametrize("fit", ["nystrom", "sketch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_variance_against_the_formula(fit, dtype):
    wide = features(seed=3, points=15)
    prior = wide.square().sum(-1)
    fitted = Distilled.of(K, U).fit(K, Y, ridge=1e-2, fit=fit)
    r, small, rows, images = fitted.ridge_, U.mT @ K @ U, NEW @ U, K @ U
    if fit == "sketch":
        left = prior - (rows @ torch.linalg.inv(small + r * torch.eye(6, dtype=torch.float64)) * rows).sum(-1)
    else:
        missed = prior - (rows @ torch.linalg.inv(small) * rows).sum(-1)
        inside = r * torch.linalg.inv(images.mT @ images + r * small)
        left = missed + (rows @ inside * rows).sum(-1)
    given = Distilled.of(K.to(dtype), U.to(dtype)).fit(K.to(dtype), Y.to(dtype), ridge=1e-2, fit=fit)
    found = given.variance(NEW.to(dtype), prior.to(dtype))
    assert found.dtype == torch.float64
    scale = float(prior.max())  # which rounding is relative to
    torch.testing.assert_close(
        found, left.mT, rtol=0, atol=scale * (1e-5 if dtype == torch.float32 else 1e-9)
    )


@functools.cache
def point():
    """Return a network and its linearisation, once for all tests: what is found out about it is kept."""
    model = network()
    return model, ntkops.linearize(model)


@pytest.mark.parametrize(
    "kind, chosen, fit",
    pairs(["numbers", "several", "features", "network", "projected"], [False, True], ["nystrom", "sketch"]),
)
def test_a_file_holds_what_prediction_needs(kind, chosen, fit):
    (model, shared), x, new = point(), samples(40), samples(7, seed=5)
    kernel = ntkops.ntk(shared, x, outputs="each")
    if kind == "projected":
        kernel = ntkops.projected_ntk(kernel, 30, generator=generator())
    cross, prior = kernel.cross(new), ntkops.ntk(shared, new, outputs="each").diagonal()
    stored = kind not in ("network", "projected")
    if stored:
        given, cross = kernel.to_dense(), cross.to_dense()
        root = torch.linalg.cholesky(given + 1e-6 * torch.eye(40, dtype=torch.float64))
        kernel = {"numbers": given, "several": list(given), "features": RootLinearOperator(root)}[kind]
    count, classes, size = 8, 3, len(x)
    combinations = torch.randn(size, count + 5, generator=generator(), dtype=torch.float64)[
        :, :count
    ]  # a view
    distilled = Distilled.of(kernel, range(count) if chosen else combinations)
    fitted = distilled.fit(kernel, model(x).detach(), fit=fit, ridge=1e-3)
    fitted.predict(cross)  # the first look at a cross kernel makes its features
    file = pickle.dumps(fitted)
    numbers = size * classes + 3 * classes * count**2 + (0 if chosen else size * count)
    assert len(file) < 8 * numbers + 5000 + (0 if stored else len(pickle.dumps(kernel)))
    for again in (pickle.loads(file), copy.deepcopy(fitted)):
        assert torch.equal(again.predict(cross), fitted.predict(cross))
        if kind != "projected":  # whose prior is another
            assert torch.equal(again.variance(cross, prior), fitted.variance(cross, prior))
        assert torch.equal(again.U, fitted.U) and torch.equal(again.dual_coef_, fitted.dual_coef_)
        assert repr(again) == repr(fitted)
        if stored:
            with pytest.raises(UnsupportedOperationError, match="does not know its Jacobian"):
                again.weights()
        else:
            torch.testing.assert_close(again.predictor()(new), fitted.predictor()(new))


def test_a_selection_holds_the_numbers_of_its_points_alone():
    K = RootLinearOperator(DenseLinearOperator(torch.ones(50_000, 1)))
    found = Distilled.of(K, torch.arange(300) * 7)
    fitted = found.fit(K, torch.ones(50_000, 1), ridge=1e-2)
    for U in (found._U, fitted._U):
        assert U.matrix is None and len(pickle.dumps(U)) < 10_000  # as a matrix it takes 60 MB
    assert (found.size, found.num_points) == (300, 50_000)
    assert Distilled.of(torch.eye(3), [2, 0]).U.tolist() == [[0, 1], [0, 0], [1, 0]]


def test_the_file_of_a_predictor_does_not_grow_with_the_points():
    model, sizes = network(), []
    for size in (40, 400):
        x = samples(size)
        kernel = ntkops.ntk(model, x, outputs="each")
        fitted = Distilled.of(kernel, range(8)).fit(kernel, model(x).detach(), ridge=1e-3)
        sizes.append(len(pickle.dumps(fitted.predictor())))
    assert abs(sizes[1] - sizes[0]) < 100


@pytest.mark.parametrize("fit", ["nystrom", "sketch"])
@pytest.mark.parametrize("bad", ["shape", "nan", "another"])
def test_prior_variances_that_are_none(fit, bad):
    wide = features(seed=3, points=15)
    fitted, prior = Distilled.of(K, U).fit(K, Y, fit=fit), wide.square().sum(-1)
    given = {"shape": prior[:, :3], "nan": prior * torch.nan, "another": prior * 1e-3}[bad]
    with pytest.raises({"shape": ShapeError, "nan": NonFiniteError, "another": InputError}[bad]):
        fitted.variance(NEW, given)


def test_combinations_that_repeat_change_nothing():
    twice = torch.cat([U, U[:, :2]], dim=-1)
    torch.testing.assert_close(
        Distilled.of(K, twice).fit(K, Y).predict(NEW),
        Distilled.of(K, U).fit(K, Y).predict(NEW),
        rtol=1e-6,
        atol=1e-8,
    )


# what is refused


def test_messages():
    with pytest.raises(ShapeError, match=r"40 points"):
        Distilled.of(K, torch.ones(39, 2, dtype=torch.float64))
    with pytest.raises(DtypeError, match="float32"):
        Distilled.of(K, U.float())
    with pytest.raises(InputError, match="twice"):
        Distilled.of(K, [1, 2, 1])
    with pytest.raises(OutOfRangeError, match="point 40"):
        Distilled.of(K, [1, 40])
    with pytest.raises(InputError, match="at least one"):
        Distilled.of(K, torch.zeros(0, dtype=torch.int64))
    with pytest.raises(NonFiniteError, match="U holds"):
        Distilled.of(K, U * float("nan"))
    with pytest.raises(ShapeError, match="square"):
        Distilled.of(NEW, U)
    with pytest.raises(ShapeError, match="4 classes|coefficients for 3 classes"):
        Distilled.of(K, U.expand(3, -1, -1))
    with pytest.raises(InputError, match="empty"):
        Distilled.of([], U)
    with pytest.raises(ShapeError, match="one shape"):
        Distilled.of([K[0], K[1][:20, :20]], U)
    distilled = Distilled.of(K, U)
    with pytest.raises(InputError, match="nystrom"):
        distilled.fit(K, Y, fit="full")
    with pytest.raises(InputError, match="one-hot"):
        distilled.fit(K, Y.long())
    with pytest.raises(ShapeError, match="made of 40"):
        distilled.operator(K[:, :20, :20])
    with pytest.raises(ShapeError, match="cross kernel"):
        distilled.fit(K, Y).predict(NEW[..., :20])
    with pytest.raises(SingularKernelError, match="zero"):
        Distilled.of(K, torch.zeros(40, 1, dtype=torch.float64)).fit(K, Y)
    with pytest.raises(ZeroKernelError):
        distilled.fit(0 * K, Y)
