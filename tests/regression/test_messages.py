"""What KernelRidge refuses, with the way out, and scikit-learn's conventions."""

import copy
import pickle

import pytest
import torch

import ntkops
from ntkops import errors
from ntkops.regression import KernelRidge, metrics
from tests.regression.problems import gram, labels, network, samples


@pytest.mark.parametrize("ridge", [-1.0, float("nan"), float("inf"), "best", [], [1.0, -1.0], True, [None]])
def test_bad_ridges(ridge):
    with pytest.raises(errors.InputError, match="ridge"):
        KernelRidge(ridge).fit(gram(20), labels(12))


@pytest.mark.parametrize("method", ["cholesky", "eigh", "auto"])
def test_no_ridge_on_a_rank_deficient_kernel(method):
    for dtype in (torch.float32, torch.float64):
        with pytest.raises(errors.SingularKernelError, match="rank 5 of 12.*cutoff=5"):
            KernelRidge(0, method=method).fit(gram(5, dtype=dtype), labels(12, dtype=dtype))
    fitted = KernelRidge(0, method=method).fit(gram(20), labels(12))
    torch.testing.assert_close(fitted.predict(gram(20)), labels(12), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("method", ["cholesky", "eigh"])
def test_a_ridge_lost_in_the_rounding_of_float32(method):
    K = gram(3, 40, dtype=torch.float32)
    K[0, 1] = K[1, 0] = K[0, 1] * (1 + 1e-6)  # what float32 products do to a kernel
    with pytest.raises(errors.SingularKernelError, match="rounding of this torch.float32"):
        KernelRidge(1e-9, method=method).fit(K, labels(40, dtype=torch.float32))


@pytest.mark.parametrize("method", ["features", "nystrom"])
def test_no_ridge_on_features(method):
    from linear_operator.operators import RootLinearOperator

    options = {"inducing": 4} if method == "nystrom" else {}
    with pytest.raises(errors.SingularKernelError, match="rank 4 at most"):
        KernelRidge(0, method=method, **options).fit(RootLinearOperator(labels(12, 4)), labels(12))


def test_what_float64_cannot_resolve_is_said():
    K = torch.diag(torch.tensor([1e6, 1e6, 1e-8, 1e-8], dtype=torch.float64))
    q = torch.linalg.qr(labels(4, 4))[0]
    K = q @ K @ q.mT
    K = (K + K.mT) / 2
    with pytest.warns(errors.NotConvergedWarning, match="raise it"):
        fitted = KernelRidge(1e-8, relative=False, method="cholesky").fit(K, q[:, 3])
    assert not fitted.solve_info_.converged and fitted.solve_info_.residuals.max() > 1e-6


def test_labels_that_do_not_fit():
    K = gram(20)
    with pytest.raises(errors.InputError, match="one_hot"):
        KernelRidge().fit(K, torch.arange(12))
    for Y in (labels(11), labels(11, 3), labels(5, 3)):
        with pytest.raises(errors.ShapeError, match="12 rows"):
            KernelRidge().fit(K, Y)
    with pytest.raises(errors.ShapeError, match="one column of labels for each"):
        KernelRidge().fit(torch.stack([K, K]), labels(12, 3))
    with pytest.raises(errors.ShapeError, match="single number"):
        KernelRidge().fit(K, torch.tensor(1.0).double())
    with pytest.raises(errors.DtypeError, match="cast"):
        KernelRidge().fit(K, labels(12, dtype=torch.float32))
    bad = labels(12, 2)
    bad[3, 1] = float("nan")
    with pytest.raises(errors.NonFiniteError, match=r"\(3, 1\)"):
        KernelRidge().fit(K, bad)


def test_kernels_that_do_not_fit():
    K, Y = gram(20), labels(12)
    with pytest.raises(errors.ShapeError, match="predict"):
        KernelRidge().fit(K[:5], Y)
    with pytest.raises(errors.InputError, match="LinearOperator"):
        KernelRidge().fit("K", Y)
    with pytest.raises(errors.ShapeError):
        KernelRidge().fit(torch.ones(12).double(), Y)
    with pytest.raises(errors.DtypeError):
        KernelRidge().fit(torch.ones(12, 12, dtype=torch.int64), Y)
    broken = K.clone()
    broken[2, 3] = float("nan")
    with pytest.raises(errors.NonFiniteError, match=r"\(2, 3\)"):
        KernelRidge().fit(broken, Y)
    with pytest.raises(errors.ZeroKernelError, match="relative=False"):
        KernelRidge().fit(torch.zeros_like(K), Y)
    fitted = KernelRidge().fit(K, Y)
    with pytest.raises(errors.ShapeError, match=r"due is \(M, 12\)"):
        fitted.predict(labels(5, 11))
    with pytest.raises(errors.DtypeError):
        fitted.predict(labels(5, 12, dtype=torch.float32))
    with pytest.raises(errors.NonFiniteError):
        fitted.predict(torch.full((5, 12), float("nan"), dtype=torch.float64))
    with pytest.raises(errors.ShapeError, match="K_diag"):
        fitted.variance(labels(5, 12), torch.ones(4).double())


def test_an_unfitted_regression():
    for call in (lambda r: r.predict(gram(20)), lambda r: r.leave_one_out()):
        with pytest.raises(errors.InputError, match="not fitted"):
            call(KernelRidge())


@pytest.mark.parametrize(
    "options, words",
    [
        ({"method": "lu"}, "'cholesky'"),
        ({"method": "cholesky", "cutoff": 3}, "cut-off"),
        ({"cutoff": 0}, "from 1 to 12"),
        ({"cutoff": 13}, "from 1 to 12"),
        ({"cutoff": 1.5}, "between 0 and 1"),
        ({"method": "nystrom"}, "inducing=200"),
        ({"inducing": 13}, "from 1 to 12"),
        ({"inducing": torch.tensor([1, 1])}, "twice"),
        ({"inducing": torch.tensor([0.5])}, "positions"),
        ({"inducing": 3, "method": "eigh"}, "'nystrom'"),
        ({"method": "features"}, "knows its features"),
    ],
)
def test_options_that_do_not_fit(options, words):
    with pytest.raises(errors.InputError, match=words):
        KernelRidge(1e-3, **options).fit(gram(20), labels(12))


def test_inducing_rows_out_of_range():
    with pytest.raises(errors.OutOfRangeError):
        KernelRidge(1e-3, inducing=torch.tensor([12])).fit(gram(20), labels(12))


def test_a_dense_method_on_a_kernel_that_must_stay_lazy():
    lazy = ntkops.ntk(network(), samples(6), max_dense_bytes=0)
    for method in ("cholesky", "eigh"):
        with pytest.raises(errors.DenseMemoryError, match="method='cg'"):
            KernelRidge(method=method).fit(lazy, labels(6, 3))


# snapshots


def test_kernels_of_other_snapshots_are_refused():
    model, x, x_new, Y = network(), samples(6), samples(4, seed=5), labels(6, 3)
    K = ntkops.ntk(model, x)
    fitted = KernelRidge().fit(K, Y)
    same = ntkops.ntk(model, x_new, x)  # another operator of the unchanged model
    torch.testing.assert_close(fitted.predict(same), fitted.predict(K.cross(x_new)))
    with torch.no_grad():
        model[0].weight[0, 0] += 1e-6
    changed = ntkops.ntk(model, x_new, x)
    for cross in (changed, 2 * changed, changed + K.cross(x_new)):
        with pytest.raises(errors.StaleOperatorError, match="'0.weight' differs"):
            fitted.predict(cross)
    with pytest.raises(errors.StaleOperatorError):
        fitted.variance(changed, torch.ones(12).double())
    assert fitted.predict(K.cross(x_new)).shape == (4, 3)  # the fitted kernel is a value


def test_other_selections_and_outputs_are_refused():
    model, x, x_new = network(), samples(6), samples(4, seed=5)
    fitted = KernelRidge().fit(ntkops.ntk(model, x), labels(6, 3))
    with pytest.raises(errors.StaleOperatorError, match="selected"):
        fitted.predict(ntkops.ntk(model, x_new, x, params="0.*"))
    first = KernelRidge().fit(ntkops.ntk(model, x, outputs=0), labels(6))
    with pytest.raises(errors.ShapeError, match="other outputs"):
        first.predict(ntkops.ntk(model, x_new, x, outputs=1))


# scikit-learn's conventions


def test_parameters_and_copies():
    original = KernelRidge([1e-3, 1e-2], method="eigh", relative=False)
    assert original.get_params()["ridge"] == [1e-3, 1e-2] and repr(original).startswith(
        "KernelRidge(method='eigh'"
    )
    assert repr(KernelRidge()) == "KernelRidge()"
    original.set_params(ridge=1e-3, method="cholesky")
    assert original.ridge == 1e-3
    with pytest.raises(errors.InputError, match="no parameter 'lam'"):
        original.set_params(lam=1)
    fitted = original.fit(gram(20), labels(12))
    for twin in (pickle.loads(pickle.dumps(fitted)), copy.deepcopy(fitted)):
        torch.testing.assert_close(twin.predict(gram(20)), fitted.predict(gram(20)))


def test_a_fit_of_a_network_survives_pickling():
    model, x, x_new, Y = network(), samples(6), samples(4, seed=5), labels(6, 3)
    K = ntkops.ntk(model, x)
    fitted = KernelRidge().fit(K, Y)
    twin = pickle.loads(pickle.dumps(fitted))
    torch.testing.assert_close(twin.predict(K.cross(x_new)), fitted.predict(K.cross(x_new)))


def test_scikit_learn_clones_and_selects():
    base = pytest.importorskip("sklearn.base")
    selection = pytest.importorskip("sklearn.model_selection")
    original = KernelRidge([1e-3, 1e-2], method="eigh", offset=torch.zeros(2).double(), cutoff=3)
    twin = base.clone(original)
    assert twin is not original and twin.get_params().keys() == original.get_params().keys()
    assert twin.ridge == original.ridge and twin.cutoff == 3
    assert base.is_regressor(original)
    F = labels(40, 5)
    K, Y = (F @ F.mT).numpy(), (F @ labels(5, 2)).numpy()
    assert base.clone(KernelRidge(generator=torch.Generator().manual_seed(1))).generator is not None
    search = selection.GridSearchCV(KernelRidge(), {"ridge": [1e-6, 10.0]}, cv=4).fit(K, Y)
    assert search.best_params_ == {"ridge": 1e-6} and search.best_score_ > 0.999


def test_score():
    K, Y = gram(20), labels(12, 3)
    fitted = KernelRidge(1e-6).fit(K, Y)
    assert fitted.score(K, Y) > 0.999
    assert fitted.score(K, Y.argmax(-1)) == 1.0
    sklearn_metrics = pytest.importorskip("sklearn.metrics")
    loose = KernelRidge(10.0).fit(K, Y)
    expected = sklearn_metrics.r2_score(Y.numpy(), loose.predict(K).numpy())
    assert loose.score(K, Y) == pytest.approx(expected)


# metrics


def test_metrics():
    scores, logits = (
        torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 0.0]]),
        torch.tensor([[2.0, 1.0], [1.0, 0.0], [3.0, 0.0]]),
    )
    assert metrics.accuracy(scores, torch.tensor([0, 1, 1])) == pytest.approx(2 / 3)
    assert metrics.fidelity(scores, logits) == pytest.approx(2 / 3)
    assert metrics.mean_squared_error(scores, logits) == pytest.approx(2 / 6)
    assert metrics.r2_score(torch.ones(4, 1), torch.ones(4, 1)) == 1.0
    K = torch.diag(torch.tensor([1.0, 2.0, 10.0]))
    assert float(metrics.smallest_eigenvalue(K)) == 1.0 and float(metrics.condition_number(K)) == 10.0
    assert float(metrics.condition_number(gram(1, 3))) > 1e14
    assert float(metrics.condition_number(-K)) == float("inf")
    model, x = network(), samples(5)
    each = metrics.condition_number(ntkops.ntk(model, x, outputs="each"))
    assert each.shape == (3,)


def test_messages_of_metrics():
    with pytest.raises(errors.InputError, match="fidelity"):
        metrics.accuracy(torch.ones(3, 2), torch.ones(3))
    with pytest.raises(errors.ShapeError):
        metrics.accuracy(torch.ones(3, 2), torch.ones(2, dtype=torch.int64))
    with pytest.raises(errors.ShapeError):
        metrics.fidelity(torch.ones(3, 2), torch.ones(2, 2))
    with pytest.raises(errors.ShapeError):
        metrics.fidelity(torch.ones(3), torch.ones(3))
    with pytest.raises(errors.ShapeError):
        metrics.mean_squared_error(torch.ones(3), torch.ones(2))
    with pytest.raises(errors.NonFiniteError):
        metrics.mean_squared_error(torch.full((2,), float("nan")), torch.ones(2))
    with pytest.raises(errors.ShapeError, match="square"):
        metrics.condition_number(torch.ones(2, 3))
    with pytest.raises(errors.ShapeError, match="empty"):
        metrics.r2_score(torch.ones(0), torch.ones(0))
