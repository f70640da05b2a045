"""Fits in the space of the parameters: weights and directional derivatives against dense Jacobians."""

import pickle
import warnings

import pytest
import torch
from torch import nn

import ntkops
from ntkops import distill, errors, projected_ntk
from ntkops.operators import nystrom_ntk
from ntkops.projections import SJLT
from ntkops.regression import KernelRidge
from tests.pairs import pairs
from tests.regression.problems import labels, network, reference_jacobian, samples

RIDGE = 1e-3


@pytest.fixture(scope="module")
def case():
    net, x, new = network(), samples(9), samples(4, seed=2)
    return net, x, new, reference_jacobian(net, x), reference_jacobian(net, new)


def flat(weights, lead=0):
    return torch.cat([w.flatten(lead) for w in weights.values()], dim=-1)


def fit(K, Y, **options):
    return KernelRidge(RIDGE, relative=False, **options).fit(K, Y)


def dual(K, Y):
    return torch.linalg.solve(K + RIDGE * torch.eye(len(K), dtype=K.dtype), Y)


# against dense Jacobians


@pytest.mark.parametrize("method", ["cholesky", "eigh", "features", "cg", "lsmr"])
def test_one_change_for_all_outputs(case, method):
    net, x, new, J, J_new = case
    rows, Y = J.flatten(0, 1), labels(9, 3)
    options = {"tol": 1e-10} if method in ("cg", "lsmr") else {}
    fitted = fit(ntkops.ntk(net, x, max_dense_bytes=2**20), Y, method=method, **options)
    expected = rows.mT @ dual(rows @ rows.mT, Y.flatten())
    weights = fitted.weights()
    assert {n: w.shape for n, w in weights.items()} == {n: p.shape for n, p in net.named_parameters()}
    torch.testing.assert_close(flat(weights), expected, rtol=1e-7, atol=1e-7)
    predict = fitted.predictor()
    assert predict.num_jvps == 1
    torch.testing.assert_close(predict(new), J_new @ expected, rtol=1e-7, atol=1e-7)


def test_one_change_for_each_class(case):
    net, x, new, J, J_new = case
    Y = labels(9, 3)
    fitted = fit(ntkops.ntk(net, x, outputs="each"), Y)
    expected = torch.stack([J[:, c].mT @ dual(J[:, c] @ J[:, c].mT, Y[:, c]) for c in range(3)])
    weights = fitted.weights()
    assert all(w.shape == (3, *p.shape) for w, p in zip(weights.values(), net.parameters(), strict=True))
    torch.testing.assert_close(flat(weights, 1), expected)
    predict = fitted.predictor()
    assert predict.num_jvps == 3
    torch.testing.assert_close(predict(new), torch.einsum("mcp,cp->mc", J_new, expected))


@pytest.mark.parametrize("tail", [(), (1,), (2,), (2, 2)])
def test_targets_that_share_the_kernel_of_one_output(case, tail):
    net, x, new, J, J_new = case
    Y = labels(9, *tail)
    fitted = fit(ntkops.ntk(net, x, outputs=1), Y)
    expected = J[:, 1].mT @ dual(J[:, 1] @ J[:, 1].mT, Y.reshape(9, -1))  # (P, k)
    lead = tail if Y.numel() > 9 else ()
    weights = fitted.weights()
    assert weights["0.weight"].shape == (*lead, 12, 4)
    torch.testing.assert_close(flat(weights, len(lead)).reshape(-1, expected.shape[0]).mT, expected)
    torch.testing.assert_close(fitted.predictor()(new), (J_new[:, 1] @ expected).reshape(4, *tail))


def test_some_outputs_of_all(case):
    net, x, new, J, J_new = case
    rows, Y = J[:, [0, 2]].flatten(0, 1), labels(9, 2)
    fitted = fit(ntkops.ntk(net, x, outputs=[0, 2]), Y)
    expected = rows.mT @ dual(rows @ rows.mT, Y.flatten())
    torch.testing.assert_close(fitted.predictor()(new), J_new[:, [0, 2]] @ expected)


def test_a_trace_has_a_change_for_each_output(case):
    net, x, new, J, J_new = case
    Y = labels(9)
    fitted = fit(ntkops.ntk(net, x, outputs="trace"), Y)
    alpha = dual(torch.einsum("nop,mop->nm", J, J), Y)
    expected = torch.einsum("nop,n->op", J, alpha)
    torch.testing.assert_close(flat(fitted.weights(), 1), expected)
    torch.testing.assert_close(fitted.predictor()(new), torch.einsum("mop,op->m", J_new, expected))


def test_a_trace_over_time_of_each_class():
    class Labels(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 2)

        def forward(self, x):
            return self.head(torch.tanh(self.body(x)))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Labels().double()
    x, new = samples(18).reshape(6, 3, 4), samples(6, seed=2).reshape(2, 3, 4)
    outputs = {"time": "trace", "class": "each"}
    fitted = fit(ntkops.ntk(net, x, axes=("time", "class"), outputs=outputs), labels(6, 2))
    assert fitted.weights()["head.bias"].shape == (2, 3, 2)
    cross = fitted._K.cross(new)
    torch.testing.assert_close(fitted.predictor()(new), fitted.predict(cross))


# what else is made of gradients


def compositions(net, x):
    K = ntkops.ntk(net, x)
    J = ntkops.jacobian(net, x)
    P = K.num_parameters
    projection = SJLT(P, 20, seed=0)
    diagonal = torch.linspace(0.1, 2.0, P).double()
    return {
        "multiple": (2.5 * K, lambda J: J * 2.5**0.5),
        "diagonal": (K.add_jitter(0.3), None),
        "projected": (projected_ntk(K, projection), lambda J: projection.apply(J)),
        "metric": (ntkops.sandwich(J, diagonal), lambda J: J * diagonal.sqrt()),
        "negative metric": (ntkops.sandwich(J, torch.eye(P).double()), lambda J: J),
        "J Jᵀ": (J @ J.mT, lambda J: J),
    }


@pytest.mark.parametrize("name", ["multiple", "diagonal", "projected", "metric", "negative metric", "J Jᵀ"])
def test_whatever_a_kernel_is_made_of(case, name):
    net, x, new, J, J_new = case
    K, change = compositions(net, x)[name]
    Y, rows, fresh = labels(9, 3), J.flatten(0, 1), J_new.flatten(0, 1)
    fitted = fit(K, Y)
    if name == "diagonal":
        square, across = rows @ rows.mT + 0.3 * torch.eye(27).double(), fresh @ rows.mT
    else:
        square, across = change(rows) @ change(rows).mT, change(fresh) @ change(rows).mT
    expected = (across @ dual(square, Y.flatten())).reshape(4, 3)
    torch.testing.assert_close((fresh @ flat(fitted.weights())).reshape(4, 3), expected)
    torch.testing.assert_close(fitted.predictor()(new), expected)


def test_class_kernels_through_a_projection(case):
    net, x, new, J, J_new = case
    projection, Y = SJLT(J.shape[-1], 6, seed=0), labels(9, 3)
    seen, seen_new = projection.apply(J), projection.apply(J_new)
    for method in ("features", "cholesky"):
        fitted = fit(projected_ntk(ntkops.ntk(net, x, outputs="each"), projection), Y, method=method)
        expected = torch.stack(
            [seen_new[:, c] @ (seen[:, c].mT @ dual(seen[:, c] @ seen[:, c].mT, Y[:, c])) for c in range(3)],
            dim=1,
        )
        torch.testing.assert_close(fitted.predictor()(new), expected)


@pytest.mark.parametrize("inducing", [[0, 3, 5, 7], samples(3, seed=5)])
@pytest.mark.parametrize("outputs", ["all", "each"])
def test_inducing_points(case, inducing, outputs):
    net, x, new, _, _ = case
    K = nystrom_ntk(ntkops.ntk(net, x, outputs=outputs), inducing)
    fitted = fit(K, labels(9, 3))
    cross = K.cross(new)
    dense = cross.to_dense() @ (
        fitted.dual_coef_.reshape(-1, 1) if outputs == "all" else fitted.dual_coef_.mT.unsqueeze(-1)
    )
    expected = dense.reshape(4, 3) if outputs == "all" else dense.squeeze(-1).mT
    torch.testing.assert_close(fitted.predictor()(new), expected, rtol=1e-9, atol=1e-9)


def test_coefficients_on_some_samples(case):
    net, x, new, J, J_new = case
    fitted = KernelRidge(RIDGE, method="nystrom", inducing=torch.tensor([0, 2, 5])).fit(
        ntkops.ntk(net, x), labels(9, 3)
    )
    change = J.flatten(0, 1).mT @ fitted.dual_coef_.flatten()
    torch.testing.assert_close(fitted.predictor()(new), J_new @ change)


def test_several_functions_have_weights_and_no_prediction(case):
    net, x, new, J, _ = case
    stacked = ntkops.stack({"a": ntkops.jacobian(net, x[:4]), "b": ntkops.jacobian(net, x)}, [2.0, 1.0])
    rows = torch.cat([2**0.5 * J[:4].flatten(0, 1), J.flatten(0, 1)])
    Y = labels(39)
    fitted = fit(stacked @ stacked.mT, Y)
    torch.testing.assert_close(flat(fitted.weights()), rows.mT @ dual(rows @ rows.mT, Y))
    with pytest.raises(errors.UnsupportedOperationError, match="several functions"):
        fitted.predictor()


# distilled


@pytest.mark.parametrize(
    "projected, kind, how, outputs",
    pairs([False, True], ["selection", "synthesis"], ["nystrom", "sketch"], ["all", "each"]),
    ids=str,
)
def test_distilled_sets(case, outputs, how, kind, projected):
    net, x, new, J, J_new = case
    K = ntkops.ntk(net, x, outputs=outputs)
    if projected:
        projection = SJLT(J.shape[-1], 20, seed=0)
        K = projected_ntk(K, projection)
        J = projection.adjoint(projection.apply(J))  # the weights are Pᵀ P Jᵀ U β
    m = K.shape[-1]
    U = [0, 3, 4, 8] if kind == "selection" else labels(m, 5, seed=3)
    fitted = distill.Distilled.of(K, U).fit(K, labels(9, 3), ridge=1e-2, fit=how)
    alpha = fitted.dual_coef_
    if outputs == "all":
        change = J.flatten(0, 1).mT @ alpha.flatten()
        expected = J_new @ change
        torch.testing.assert_close(flat(fitted.weights()), change)
    else:
        change = torch.einsum("ncp,nc->cp", J, alpha)
        expected = torch.einsum("mcp,cp->mc", J_new, change)
        torch.testing.assert_close(flat(fitted.weights(), 1), change)
    predict = fitted.predictor()
    assert predict.num_jvps == (1 if outputs == "all" else 3)
    torch.testing.assert_close(predict(new), expected)


# offsets


def test_the_network_linearised_and_trained(case):
    net, x, new, J, J_new = case
    Y, rows = labels(9, 3), J.flatten(0, 1)
    start, start_new = net(x).detach(), net(new).detach()
    change = rows.mT @ dual(rows @ rows.mT, (Y - start).flatten())
    expected = start_new + J_new @ change
    own = KernelRidge(RIDGE, relative=False, offset="network").fit(ntkops.ntk(net, x), Y)
    torch.testing.assert_close(own.predictor()(new), expected)
    given = KernelRidge(RIDGE, relative=False).fit(ntkops.ntk(net, x), Y, offset=start)
    predict = given.predictor()
    torch.testing.assert_close(predict(new, offset=start_new), expected)
    with pytest.raises(errors.InputError, match="offset=f_new"):
        predict(new)
    with pytest.raises(errors.InputError, match="subtracted none"):
        own.predictor()(new, offset=start_new)
    each = KernelRidge(RIDGE, offset="network").fit(ntkops.ntk(net, x, outputs="each"), Y)
    torch.testing.assert_close(each.predictor()(new), each.predict(each._K.cross(new)))
    constant = KernelRidge(RIDGE, offset=torch.tensor([1.0, 2.0, 3.0]).double()).fit(ntkops.ntk(net, x), Y)
    torch.testing.assert_close(constant.predictor()(new), constant.predict(constant._K.cross(new)))


def test_it_stays_as_it_is_when_the_regression_is_fitted_again(case):
    net, x, new, _, _ = case
    fitted = KernelRidge(RIDGE, offset="network").fit(ntkops.ntk(net, x), labels(9, 3))
    predict = fitted.predictor()
    before = predict(new)
    fitted.set_params(offset=None).fit(ntkops.ntk(net, x, outputs=0), labels(9))
    assert torch.equal(predict(new), before)


# precision, cost, memory


def test_float32(case):
    net, x, new, J, J_new = case
    rows, Y = J.flatten(0, 1), labels(9, 3)
    single = network(dtype=torch.float32)
    expected = rows.mT @ dual(rows @ rows.mT, Y.flatten())
    fitted = fit(ntkops.ntk(single, x.float()), Y.float())
    found = fitted.predictor()(new.float())
    assert found.dtype == torch.float32 and fitted.weights()["0.weight"].dtype == torch.float32
    across = fitted.predict(fitted._K.cross(new.float()))
    size = (J_new @ expected).norm()
    assert (across.double() - J_new @ expected).norm() < 1e-4 * size  # what float32 kernels leave
    assert (found - across).norm() < 1e-5 * size


def test_nothing_dense_and_one_pass_a_prediction(case):
    net, x, new, _, _ = case
    K = ntkops.ntk(net, x, max_dense_bytes=0)
    fitted = fit(K, labels(9, 3), method="cg", tol=1e-12)
    predict = fitted.predictor()
    with ntkops.count_passes() as counter:
        found = predict(new)
    assert counter.count.jvp == 1 and counter.total == 1
    torch.testing.assert_close(found, fitted.predict(K.cross(new)), rtol=1e-9, atol=1e-9)


def test_the_network_is_tried_once(case):
    net, x, new, _, _ = case
    calls = []

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, x):
            calls.append(len(x))
            return self.inner(x)

    predict = fit(ntkops.ntk(Counted(), x), labels(9, 3)).predictor()
    predict(new)
    calls.clear()
    for part in (new, new[:2], 2 * new):
        predict(part)
    assert calls == [4, 2, 4]


def test_it_is_pickled_without_the_training_samples(case):
    net, x, new, _, _ = case
    predict = KernelRidge(RIDGE, offset="network").fit(ntkops.ntk(net, x), labels(9, 3)).predictor()
    many = KernelRidge(RIDGE, offset="network", method="cg").fit(
        ntkops.ntk(net, samples(400)), labels(400, 3)
    )
    data = pickle.dumps(predict)
    assert torch.equal(pickle.loads(data)(new), predict(new))
    assert abs(len(pickle.dumps(many.predictor())) - len(data)) < 400 * 4 * 8 / 4


def test_other_kinds_of_models(case):
    _, x, new, _, _ = case

    def model(params, inputs):
        return torch.tanh(inputs["x"] @ params["w"]) * inputs["scale"]

    params = {"w": labels(4, 2)}
    inputs, fresh = {"x": x, "scale": samples(9, 1)}, {"x": new, "scale": samples(4, 1)}
    fitted = fit(ntkops.ntk(model, inputs, params=params), labels(9, 2))
    assert fitted.weights()["w"].shape == (4, 2)
    torch.testing.assert_close(fitted.predictor()(fresh), fitted.predict(fitted._K.cross(fresh)))


def test_single_weights(case):
    net, x, new, _, _ = case
    K = ntkops.ntk(net, x, params=ntkops.Entries({"0.weight": [0, 5, 7], "2.bias": [1]}))
    fitted = fit(K, labels(9, 3))
    assert {n: w.shape for n, w in fitted.weights().items()} == {"0.weight": (3,), "2.bias": (1,)}
    torch.testing.assert_close(fitted.predictor()(new), fitted.predict(K.cross(new)))


def test_new_samples_from_a_loader(case):
    net, x, new, _, _ = case
    fitted = fit(ntkops.ntk(net, x), labels(9, 3))
    predict = fitted.predictor()
    torch.testing.assert_close(predict([new[:3], new[3:]]), predict(new))


# refusals


def test_what_has_no_weights_is_refused(case):
    net, x, _, J, _ = case
    rows = J.flatten(0, 1)
    dense = fit(rows @ rows.mT, labels(27))
    for ask in (dense.weights, dense.predictor):
        with pytest.raises(errors.UnsupportedOperationError, match="does not know its Jacobian"):
            ask()
    with pytest.raises(errors.NotFittedError):
        KernelRidge().weights()
    with pytest.raises(errors.NotFittedError):
        KernelRidge().predictor()


def test_a_trace_with_several_targets_is_refused_before_any_pass(case):
    net, x, new, _, _ = case
    K = ntkops.ntk(net, x, outputs="trace")
    for method in ("cholesky", "features"):
        K = projected_ntk(K, 3) if method == "features" else K
        fitted = fit(K, labels(9, 2), method=method)
        with ntkops.count_passes() as counter:
            with pytest.raises(errors.UnsupportedOperationError, match="6 copies"):
                fitted.weights()
            with pytest.raises(errors.UnsupportedOperationError, match="K.cross"):
                fitted.predictor()
        assert counter.total == 0


def test_an_uneven_selection_has_weights_and_no_prediction(case):
    net, x, _, J, _ = case
    rows = torch.tensor([0, 4, 5, 9, 20])
    K = ntkops.ntk(net, x).submatrix(rows, rows)
    chosen, Y = J.flatten(0, 1)[rows], labels(5)
    fitted = fit(K, Y)
    torch.testing.assert_close(flat(fitted.weights()), chosen.mT @ dual(chosen @ chosen.mT, Y))
    with pytest.raises(errors.UnsupportedOperationError, match="uneven"):
        fitted.predictor()


def test_bad_samples_are_refused_at_every_call(case):
    net, x, new, _, _ = case
    predict = fit(ntkops.ntk(net, x), labels(9, 3)).predictor()
    broken = new.clone()
    broken[1, 2] = torch.nan
    with pytest.raises(errors.NonFiniteError):
        predict(broken)
    with pytest.raises(errors.DtypeError):
        predict(new.float())
    with pytest.raises(errors.NtkopsError):
        predict(new[:, :3])


def test_a_network_without_directional_derivatives_is_refused(case):
    _, x, _, _, _ = case

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sin()

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, gradient):
            return gradient * ctx.saved_tensors[0].cos()

    class Sine(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 3).double()

        def forward(self, x):
            return Once.apply(self.layer(x))

    fitted = fit(ntkops.ntk(Sine(), x), labels(9, 3))
    assert fitted.weights()["layer.bias"].shape == (3,)
    with pytest.raises(errors.DifferentiationError, match="K.cross"):
        fitted.predictor()


def test_large_coefficients_beside_small_weights_are_said(case):
    net, x, _, _, _ = case
    single = network(dtype=torch.float32)
    K = ntkops.ntk(single, torch.cat([x, x + 1e-5]).float(), max_dense_bytes=0)
    Y = torch.cat([torch.ones(9, 3), -torch.ones(9, 3)])
    fitted = KernelRidge(1e-4, relative=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted.fit(K, Y)
    with pytest.warns(errors.RoundingWarning, match="weights"):
        fitted.weights()
