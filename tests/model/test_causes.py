"""What is refused names its real cause, and what is right is not refused."""

import copy

import pytest
import torch
from torch import nn

import ntkops
from ntkops.errors import CoupledSamplesError, InputError, UnsupportedModelError

D = torch.float64
NODES = 12


class Graph(nn.Module):
    """Messages along edges that belong to the model: its rows are the nodes of one graph."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("edges", torch.stack([torch.arange(NODES), torch.arange(NODES).roll(1)]))

    def forward(self, x):
        hidden = self.layer(x)
        return torch.zeros_like(hidden).index_add(0, self.edges[0], hidden[self.edges[1]])


class Adjacency(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.register_buffer("matrix", torch.rand(NODES, NODES))

    def forward(self, x):
        return self.matrix @ self.layer(x)


@pytest.mark.parametrize("kind", [Graph, Adjacency])
def test_one_graph_is_told_from_samples(kind):
    with pytest.raises(UnsupportedModelError, match=r"works on 12 samples and not on 4.*nodes of one graph"):
        ntkops.ntk(kind().to(D), torch.randn(NODES, 3, dtype=D))


class Hooked(nn.Module):
    """A hook that scales a gradient, as gradient reversal does."""

    def __init__(self, scale):
        super().__init__()
        self.first, self.second, self.scale = nn.Linear(3, 5), nn.Linear(5, 2), scale

    def forward(self, x):
        hidden = torch.tanh(self.first(x))
        if hidden.requires_grad:
            hidden.register_hook(lambda gradient: self.scale * gradient)
        return self.second(hidden)


@pytest.mark.parametrize("scale", [1.0, -0.5])
@pytest.mark.parametrize("engine", ["auto", "autograd"])
def test_hooks_on_gradients_count_as_they_do_in_training(engine, scale):
    torch.manual_seed(0)
    model, x = Hooked(scale).to(D), torch.randn(4, 3, dtype=D)
    rows = []
    for entry in model(x).flatten():
        model.zero_grad()
        entry.backward(retain_graph=True)
        rows.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    J = torch.stack(rows)
    K = ntkops.ntk(model, x, engine=engine, max_dense_bytes=0)
    torch.testing.assert_close(K @ torch.eye(8, dtype=D), J @ J.mT)
    torch.testing.assert_close(ntkops.ntk(model, x, engine=engine).to_dense(), J @ J.mT)
    if engine == "autograd":
        assert any("register_hook" in r for r in K.engine_info.reasons) is (scale != 1.0)


class Force(nn.Module):
    """Differentiates by its own input."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x):
        with torch.enable_grad():
            x = x.requires_grad_()
            return torch.autograd.grad(self.body(x).sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("make", [lambda: nn.Linear(3, 2), Force], ids=["linear", "force"])
def test_inputs_that_require_grad_outside_change_nothing(make):
    torch.manual_seed(0)
    model, x = make().to(D), torch.randn(4, 3, dtype=D)
    expected = ntkops.ntk(model, x).to_dense()
    for given in (x.clone().requires_grad_(), x.clone().requires_grad_() * 1.0):
        torch.testing.assert_close(ntkops.ntk(model, given).to_dense(), expected)


@pytest.mark.filterwarnings("ignore")
def test_quantised_modules_are_named():
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 2))
    dynamic = torch.ao.quantization.quantize_dynamic
    with pytest.raises(UnsupportedModelError, match="'0' is quantised.*floating-point model"):
        ntkops.ntk(dynamic(model, {nn.Linear}, dtype=torch.qint8), torch.randn(5, 3))
    model[1] = dynamic(model[1], {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(CoupledSamplesError, match=r"range of the whole batch by Linear at '1\.0'"):
        ntkops.ntk(model, torch.randn(5, 3))


class Masked(nn.Module):
    """Samples first, its mask time first."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x, mask):
        return (self.layer(x) * mask.mT.unsqueeze(-1)).sum(1)


def test_a_mask_with_time_first_is_named():
    model, x = Masked().to(D), torch.randn(6, 4, 3, dtype=D)
    with pytest.raises(InputError, match=r"input\['mask'\] has 4 samples.*on dimension 1 \(time first\?\)"):
        ntkops.ntk(model, {"x": x, "mask": torch.ones(4, 6, dtype=D)})
    x = torch.randn(6, 6, 3, dtype=D)
    with pytest.raises(UnsupportedModelError, match="has time first, transpose it"):
        ntkops.ntk(model, {"x": x, "mask": torch.ones(6, 6, dtype=D)})


class Failing(nn.Module):
    """Fails for some numbers of samples."""

    def __init__(self, fails):
        super().__init__()
        self.layer, self.fails = nn.Linear(3, 2), fails

    def forward(self, x):
        if self.fails(len(x)):
            raise ValueError("not so many")
        return self.layer(x)


class Places(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.table = nn.Linear(3, 2), nn.Parameter(torch.zeros(6, 1))

    def forward(self, x):
        return self.layer(x) + self.table[torch.arange(len(x))]


@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize("make", [lambda: Failing(lambda count: count > 5), Places], ids=["raises", "range"])
def test_a_number_of_samples_that_fails_later_is_named(make, engine):
    model, x = make().to(D), torch.randn(9, 3, dtype=D)
    with pytest.raises(UnsupportedModelError, match=r"fails on a batch of 9 samples.*batch_size="):
        _ = ntkops.ntk(model, x, engine=engine, max_dense_bytes=0) @ torch.ones(18, dtype=D)
    K = ntkops.ntk(model, x, engine=engine, batch_size=3, max_dense_bytes=0)
    assert (K @ torch.ones(18, dtype=D)).isfinite().all()


# -- exported modules


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.act, self.head = nn.Embedding(6, 3, padding_idx=0), nn.PReLU(), nn.Linear(3, 2)

    def forward(self, tokens):
        return self.head(self.act(self.table(tokens)).mean(1))


@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize("name", ["mlp", "tokens"])
def test_exported_modules_have_the_kernel_of_their_source(name, engine):
    torch.manual_seed(0)
    if name == "mlp":
        model, x = (
            nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2)),
            torch.randn(5, 3, dtype=D),
        )
    else:
        model, x = Tokens(), torch.tensor([[1, 2, 3], [4, 5, 1], [1, 1, 2], [0, 1, 0], [0, 0, 0]])
    model = model.to(D)
    with torch.no_grad():
        next(model.parameters()).add_(0.5)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("samples")},)).module()
    expected = ntkops.ntk(model, x).to_dense()
    torch.testing.assert_close(ntkops.ntk(exported, x, engine=engine).to_dense(), expected)
    eye = torch.eye(len(expected), dtype=D)
    torch.testing.assert_close(ntkops.ntk(exported, x, engine=engine, max_dense_bytes=0) @ eye, expected)


def test_what_cannot_be_done_with_an_export_is_said():
    program = torch.export.export(nn.Linear(3, 2), (torch.randn(6, 3),))
    with pytest.raises(UnsupportedModelError, match=r"pass its \.module\(\)"):
        ntkops.ntk(program, torch.randn(6, 3))
    with pytest.raises(UnsupportedModelError, match="dynamic_shapes="):
        ntkops.ntk(program.module(), torch.randn(6, 3))


# -- inference mode


def _model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2)).to(D), torch.randn(5, 3, dtype=D)


LIVE = _model()
WORK = {
    "dense": lambda K, x: K.to_dense(),
    "product": lambda K, x: K @ torch.ones(10, dtype=D),
    "lazy product": lambda K, x: K.with_engine("autograd") @ torch.ones(10, dtype=D),
    "diagonal": lambda K, x: K.diagonal(),
    "cross": lambda K, x: K.cross(x[:2]).to_dense(),
    "solve": lambda K, x: K.add_jitter(0.1).solve(torch.ones(10, dtype=D)),
    "to": lambda K, x: K.to(torch.float32) @ torch.ones(10),
    "trace": lambda K, x: ntkops.trace(K).value,
    "hutchinson": lambda K, x: (
        ntkops.trace(K, method="hutchinson", num_passes=8, generator=torch.Generator()).value
    ),
    "eigenvalues": lambda K, x: ntkops.eigsh(K, k=2, generator=torch.Generator()).values,
    "regression": lambda K, x: ntkops.KernelRidge(0.1).fit(K, x[:, :2]).predict(K.cross(x[:2])),
    "batches": lambda K, x: ntkops.ntk(_model()[0], [x[:3], x[3:]], max_dense_bytes=0).diagonal(),
    "differentiable": lambda K, x: ntkops.ntk(*LIVE, differentiable=True) @ torch.ones(10, dtype=D),
}


@pytest.mark.parametrize("made", ["before", "inside"])
@pytest.mark.parametrize("name", WORK)
def test_work_in_inference_mode_gives_the_same(name, made):
    model, x = _model()
    expected = WORK[name](ntkops.ntk(model, x), x).detach()
    K = ntkops.ntk(model, x)
    with torch.inference_mode():
        found = WORK[name](ntkops.ntk(*_model()) if made == "inside" else K, x)
        assert found.shape == expected.shape
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(WORK[name](K, x).detach(), expected)  # and caches serve outside, too


def test_what_is_made_in_inference_mode_serves_outside():
    with torch.inference_mode():
        model, x = _model()
        K = ntkops.ntk(model, x)
        vector = torch.ones(10, dtype=D)
        dense = K.to_dense()
    plain, samples = copy.deepcopy(model), x.clone()
    torch.testing.assert_close(ntkops.ntk(plain, samples).to_dense(), dense)
    assert not K.to_dense().is_inference()
    live = ntkops.ntk(plain, samples, differentiable=True)
    (live @ vector).sum().backward()
    with pytest.raises(UnsupportedModelError, match="parameter '0.weight' was made in inference mode"):
        ntkops.ntk(model, samples, differentiable=True)
    with pytest.raises(InputError, match="input was made in inference mode"):
        ntkops.ntk(plain, x, differentiable=True)
