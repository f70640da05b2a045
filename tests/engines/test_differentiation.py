"""How a model is differentiated: what is chosen, what is said, what is refused."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ntkops
from ntkops.engines.differentiation import linearize_batch, sample_gradients
from ntkops.errors import DifferentiationError, InputError, NonFiniteError
from tests.cases import BY_NAME, CASES, REVERSE_ONLY, Case, reference_jacobian
from tests.pairs import pairs


class HiddenNoGrad(nn.Module):
    """Part of the model runs without gradients: reverse mode sees a constant, forward mode does not."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        with torch.no_grad():
            gate = torch.sigmoid(self.first(x))
        return self.second(gate * x)


class RootAtZero(nn.Module):
    """A finite output with an infinite derivative."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    def forward(self, x):
        return (x * self.weight).abs().sum(1, keepdim=True).sqrt()


@pytest.mark.parametrize(
    "name, mode, columns",
    pairs(["mlp", "gru-time", "attention", "tied"], ["forward", "double", "classic"], ["vmap", "loop"]),
)
def test_every_mode_gives_the_same_products(name, mode, columns):
    case = BY_NAME[name]
    model, x = case.make(), case.data()
    J = reference_jacobian(case, model, x)
    linearization = ntkops.linearize(model, output=case.options.get("output"))
    _, _, batch = next(iter(linearization.inputs(x).batches(None)))
    with linearization.safe_context():
        point = linearize_batch(mode, linearization.function, linearization.parameters, batch, columns)
        cotangents = torch.randn(3, 3, len(J) // 3, dtype=torch.float64)
        tangents = tuple(torch.randn(3, *s, dtype=torch.float64) for s in linearization.shapes)
        pulled = torch.cat([g.flatten(1) for g in point.pull(cotangents)], dim=1)
        pushed = point.push(tangents).flatten(1)
    torch.testing.assert_close(pulled, cotangents.flatten(1) @ J)
    torch.testing.assert_close(pushed, torch.cat([t.flatten(1) for t in tangents], dim=1) @ J.T)


@pytest.mark.parametrize("case", [*CASES, REVERSE_ONLY], ids=lambda case: case.name)
def test_per_sample_gradients_by_vmap_and_by_loop(case):
    model, x = case.make(), case.data()
    J = reference_jacobian(case, model, x)
    outputs = len(J) // 3
    K = ntkops.ntk(model, x, **case.options)
    engine = K._core.engine
    linearization = engine.linearization
    _, _, batch = next(iter(K._core.rows.inputs.batches(None)))
    cotangents = torch.randn(3, 2, outputs, dtype=torch.float64)
    expected = torch.einsum("iro,iop->irp", cotangents, J.reshape(3, outputs, -1))
    how = engine.differentiated(columns=True, per_sample=True)
    for mode in {"loop", how.per_sample}:
        with linearization.safe_context():
            gradients = sample_gradients(
                mode,
                how.mode,
                linearization.function,
                linearization.parameters,
                batch,
                cotangents,
                how.columns,
            )
        rows = torch.cat([g.reshape(*g.shape[:2], -1) for g in gradients], dim=2)
        torch.testing.assert_close(rows, expected)


def test_reasons_tell_what_was_left():
    case = BY_NAME["old-style"]
    info = ntkops.ntk(case.make(), case.data()).engine_info
    assert info.mode == "classic"
    assert any(r.startswith("forward:") for r in info.reasons)
    assert any(r.startswith("double:") for r in info.reasons)


def test_recurrent_layers_take_a_loop_over_samples_and_say_so():
    case = BY_NAME["gru-time"]
    info = ntkops.ntk(case.make(), case.data(), **case.options).engine_info
    assert info.mode == "forward" and info.per_sample == "loop"
    assert any(r.startswith("per sample:") for r in info.reasons)


class Solved(nn.Module):
    """Right-hand sides of a system with learnt entries, of which vmap makes another shape."""

    def __init__(self):
        super().__init__()
        self.matrix, self.head = nn.Parameter(torch.randn(3, 3)), nn.Linear(6, 2)

    def forward(self, x):
        system = 4 * torch.eye(3).to(x) + self.matrix
        return self.head(torch.linalg.solve(system, x.view(-1, 2, 3).mT).flatten(1))


def test_outputs_that_vmap_changes_are_made_without_it():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = Solved().double(), torch.randn(4, 6).double()
    K = ntkops.ntk(model, x, engine="autograd")
    assert K.engine_info.per_sample == "loop"
    rows = torch.stack(
        [
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(entry, [*model.parameters()], retain_graph=True)]
            )
            for entry in model(x).flatten()
        ]
    )
    block = torch.randn(8, 3, generator=torch.Generator().manual_seed(1)).double()
    torch.testing.assert_close(K @ block, rows @ (rows.mT @ block))
    torch.testing.assert_close(K.to_dense(), rows @ rows.mT)


def test_a_hidden_no_grad_is_refused_not_mistaken_for_a_kernel():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = HiddenNoGrad()
    with pytest.raises(DifferentiationError, match=r"torch\.no_grad\(\) inside the model"):
        _ = ntkops.ntk(model, torch.ones(3, 3)).engine_info


class Unmoved(nn.Module):
    """Parameters that do not move the output: a key bias, one before a norm, a shift of logits."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(4, 4) for _ in range(3))
        self.before, self.head = nn.Conv1d(4, 6, 1), nn.Linear(6, 3)
        self.shift = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        x = torch.softmax(self.query(x) @ self.key(x).mT / 2, -1) @ self.value(x) + x
        x = F.instance_norm(self.before(x.mT))
        return torch.log_softmax(self.head(torch.tanh(x).mean(-1)) + self.shift, -1)


class Difference(nn.Module):
    """The same model minus itself: its output is zero, its derivative is not."""

    def __init__(self):
        super().__init__()
        self.one = Unmoved()
        self.other = copy.deepcopy(self.one)

    def forward(self, x):
        return self.one(x) - self.other(x)


@pytest.mark.parametrize(
    "name, engine, dtype",
    pairs(
        ["key.bias", "before.bias", "shift", "one.key.bias"],
        ["auto", "autograd"],
        [torch.float64, torch.float32, torch.bfloat16],
    ),
    ids=str,
)
def test_a_parameter_that_does_not_move_the_output_has_a_kernel_of_zeros(name, engine, dtype):
    torch.manual_seed(0)
    model = (Difference() if name.startswith("one") else Unmoved()).to(dtype)
    x = torch.randn(5, 6, 4).to(dtype)
    whole = ntkops.ntk(model, x, engine=engine).to_dense()
    K = ntkops.ntk(model, x, params=name, engine=engine)
    eps = torch.finfo(dtype).eps
    assert float(K.to_dense().norm()) <= (1e2 * eps) ** 2 * float(whole.norm())
    assert float((K @ torch.ones(K.shape[0], dtype=K.dtype)).norm()) <= (1e2 * eps) ** 2 * 15 * float(
        whole.norm()
    )
    assert abs(float(ntkops.trace(K))) <= (1e2 * eps) ** 2 * 15 * float(whole.norm())


class WrongForwardMode(nn.Module):
    """Operations of which torch's forward mode is wrong, and backward right."""

    def __init__(self, apply):
        super().__init__()
        self.weight, self.head, self.apply_ = nn.Parameter(torch.randn(4, 4)), nn.Linear(4, 2), apply

    def forward(self, x):
        return self.head(torch.tanh(self.apply_(self.weight, x)))


def _factor(weight):
    return torch.linalg.cholesky(weight @ weight.mT + torch.eye(4).to(weight))


class WrongTangent(torch.autograd.Function):
    """A sine with a wrong jvp."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.sin()

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx, t):
        return t * ctx.saved_tensors[0].sin()


WRONG_FORWARD = {
    "cholesky_inverse": lambda w, x: x @ torch.cholesky_inverse(_factor(w)),
    "scatter_reduce": lambda w, x: x @ torch.ones(4, 4).to(w).scatter_reduce(0, INDEX, w, "prod"),
    "a triangle is read": lambda w, x: x @ torch.linalg.cholesky(w + 9 * torch.eye(4).to(w)),
    "wrong jvp": lambda w, x: WrongTangent.apply(x @ w),
}
INDEX = torch.tensor([[0, 1, 2, 3]]).expand(4, 4) % 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", WRONG_FORWARD)
def test_where_forward_mode_is_wrong_the_next_mode_is_taken(name, dtype):
    torch.manual_seed(0)
    model, x = WrongForwardMode(WRONG_FORWARD[name]).to(dtype), torch.randn(5, 4).to(dtype)
    case = Case(name, lambda dtype: model, lambda count, dtype: x)
    J = reference_jacobian(case, copy.deepcopy(model).double(), x.double())
    K = ntkops.ntk(model, x, max_dense_bytes=0, engine="autograd")
    assert K.engine_info.mode == "double"
    assert any("J is what backward() gives" in reason for reason in K.engine_info.reasons)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    products = (K @ torch.eye(10, dtype=dtype)).double()
    torch.testing.assert_close(products, J @ J.mT, rtol=tolerance, atol=tolerance)

    def function(params, x):
        return torch.func.functional_call(model, params, (x,))

    params = {key: p.detach() for key, p in model.named_parameters()}
    sizes = [p.numel() for p in params.values()]
    z = torch.randn(sum(sizes), dtype=torch.float64)
    tangent = {k: t.view_as(p).to(p) for (k, p), t in zip(params.items(), z.split(sizes), strict=True)}
    pushed = ntkops.functional.jvp(function, params, x, tangent).double().flatten()
    torch.testing.assert_close(pushed, J @ z, rtol=tolerance, atol=tolerance)


def test_an_infinite_derivative_is_named():
    x = torch.ones(2, 2, dtype=torch.float64)
    K = ntkops.ntk(RootAtZero(), x, max_dense_bytes=0)
    with pytest.raises(NonFiniteError, match="although parameters, inputs and output are"):
        K @ torch.ones(2, dtype=torch.float64)
    J = ntkops.jacobian(RootAtZero(), x)
    with pytest.raises(NonFiniteError, match="first at parameter 'weight'"):
        J.mT @ torch.ones(2, dtype=torch.float64)


def test_a_non_finite_vector_is_named():
    case = BY_NAME["mlp"]
    K = ntkops.ntk(case.make(), case.data(), max_dense_bytes=0)
    v = torch.ones(6, 2, dtype=torch.float64)
    v[3, 1] = float("nan")
    with pytest.raises(NonFiniteError, match="right-hand side is not finite, first at column 1"):
        K @ v


@pytest.mark.parametrize(
    "option", [{"batch_size": 0}, {"chunk_size": -1}, {"batch_size": 1.5}, {"engine": "magic"}]
)
def test_bad_options_are_named(option):
    case = BY_NAME["mlp"]
    with pytest.raises(InputError, match=next(iter(option))):
        ntkops.ntk(case.make(), case.data(), **option)


def test_the_former_name_of_the_mode_warns():
    case = BY_NAME["mlp"]
    info = ntkops.ntk(case.make(), case.data()).engine_info
    with pytest.warns(ntkops.NtkopsWarning, match="EngineInfo.mode"):
        assert info.rung == info.mode == "forward"
