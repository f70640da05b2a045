"""The private call: right for every kind of model, and invisible to the user's."""

import copy
import pickle
import threading
import types
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import ntkops
from ntkops.errors import UnsupportedModelError
from ntkops.model import linearize
from tests.model.zoo import BY_NAME, ZOO, LastStep, SharedSubmodule, TiedAutoencoder, untouched

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
# torch.func refuses saved-tensor hooks and derivatives by torch.autograd inside the model.
CLASSIC_ONLY = ("checkpointed", "residual")


def _one_batch(specimen, lin, x):
    ((start, stop, batch),) = lin.inputs(x).batches(None)
    assert (start, stop) == (0, 5)
    return batch


def _reference_gradients(specimen, model, x, cotangent):
    state = specimen.reference(model, x)
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.autograd.grad(state, parameters, cotangent, allow_unused=True)


# Every model in one dtype for its value and gradient, and in the other one for both modes.
TURNS = [(specimen, list(TOLERANCE)[number % 2]) for number, specimen in enumerate(ZOO)]


@pytest.mark.parametrize(("specimen", "dtype"), TURNS, ids=lambda value: getattr(value, "name", str(value)))
def test_value_and_gradient_agree_with_the_model_itself_which_stays_untouched(specimen, dtype):
    model, x = specimen.make(dtype), specimen.inputs(5, dtype)
    expected = specimen.reference(model, x).detach()
    cotangent = torch.randn(expected.shape, dtype=dtype, generator=torch.Generator().manual_seed(2))
    gradients = _reference_gradients(specimen, model, x, cotangent)
    with untouched(model, x):
        lin = linearize(model, output=specimen.output)
        batch = _one_batch(specimen, lin, x)
        leaves = [p.clone().requires_grad_() for p in lin.parameters]
        with lin.safe_context():
            state = lin.function(leaves, batch)
            mine = torch.autograd.grad(state, leaves, cotangent, allow_unused=True)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(state.detach(), expected, rtol=tolerance, atol=tolerance)
    named = [name for name, p in model.named_parameters() if p.requires_grad]
    assert [n.removeprefix("_orig_mod.") for n in named] == list(lin.names)
    for name, got, wanted in zip(lin.names, mine, gradients, strict=True):
        if wanted is None:
            assert got is None or not bool(got.any()), name
        else:
            torch.testing.assert_close(got, wanted, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize(
    ("specimen", "other"),
    [turn for turn in TURNS if turn[0].name not in CLASSIC_ONLY],
    ids=lambda value: getattr(value, "name", ""),
)
def test_forward_and_reverse_mode_are_adjoint(specimen, other):
    dtype = torch.float32 if other is torch.float64 else torch.float64
    model, x = specimen.make(dtype), specimen.inputs(5, dtype)
    lin = linearize(model, output=specimen.output)
    batch = _one_batch(specimen, lin, x)
    generator = torch.Generator().manual_seed(3)
    tangents = tuple(torch.randn(p.shape, dtype=dtype, generator=generator) for p in lin.parameters)
    with untouched(model, x), lin.safe_context():
        state, pull = torch.func.vjp(lambda *p: lin.function(p, batch), *lin.parameters)
        cotangent = torch.randn(state.shape, dtype=dtype, generator=generator)
        pulled = pull(cotangent)
        if specimen.name in ("weight-norm", "normed-rnn"):  # torch has no forward mode for weight norm
            pushed = torch.func.vjp(pull, cotangent)[1](tangents)[0]
        else:
            pushed = torch.func.jvp(lambda *p: lin.function(p, batch), lin.parameters, tangents)[1]
    left = float((cotangent * pushed).double().sum())
    right = float(sum((t * g).double().sum() for t, g in zip(tangents, pulled, strict=True)))
    scale = float(cotangent.double().norm() * pushed.double().norm())
    assert abs(left - right) <= (1e-12 if dtype is torch.float64 else 1e-5) * scale
    assert abs(right) > 0


def test_torch_functional_call_would_have_replaced_the_parameters_of_a_shared_submodule():
    """The reason for the private copy, and for slots: kept as a warning to whoever simplifies this."""
    model, x = SharedSubmodule().double(), torch.randn(4, 3, dtype=torch.float64)
    original = {name: (p, p.detach().clone()) for name, p in model.named_parameters()}
    with untouched(model, x):
        lin = linearize(model, params={"left.weight": torch.zeros(3, 3, dtype=torch.float64)})
        lin.inputs(x)
    for name, (parameter, value) in original.items():
        assert model.get_parameter(name) is parameter and torch.equal(parameter, value)
    # The zero weight stands in for all three uses of the one module.
    (_, _, batch) = next(iter(lin.inputs(x).batches(None)))
    out = lin.function(lin.parameters, batch)
    assert torch.equal(out, model.left.bias.detach().expand(4, 3))


def test_tied_weights_get_the_sum_of_both_uses():
    model, x = TiedAutoencoder().double(), torch.randn(4, 3, dtype=torch.float64)
    lin = linearize(model, params=["decoder.weight"])
    assert lin.names == ("encoder.weight",)
    ((_, _, batch),) = lin.inputs(x).batches(None)
    got = torch.func.jacrev(lambda w: lin.function((w,), batch))(lin.parameters[0])
    biases = model.encoder.bias.detach(), model.decoder.bias.detach()
    wanted = torch.func.jacrev(
        lambda w: nn.functional.linear(torch.tanh(nn.functional.linear(x, w, biases[0])), w, biases[1])
    )(model.encoder.weight.detach())
    torch.testing.assert_close(got, wanted)


def rows_by_backward(model: nn.Module, tokens: Tensor) -> Tensor:
    """Return J, one backward() of the untouched model for each row."""
    rows = []
    for entry in model(tokens).flatten():
        model.zero_grad()
        entry.backward(retain_graph=True)
        rows.append(torch.cat([p.grad.to_dense().flatten() for p in model.parameters()]))
    return torch.stack(rows)


class ReadsPadding(nn.Module):
    """Uses the embedding's padding index for a mask."""

    def __init__(self, embed: nn.Embedding) -> None:
        super().__init__()
        self.embed = embed

    def forward(self, tokens: Tensor) -> Tensor:
        mask = tokens.ne(0 if self.embed.padding_idx is None else self.embed.padding_idx)
        return (torch.tanh(self.embed(tokens)) * mask.unsqueeze(-1)).sum(1) + self.embed(tokens[:, 0])


class Scaled(nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        return 2 * super().forward(tokens)


class Functional(nn.Module):
    """Looks up by a function, and uses the table once more."""

    def __init__(self, look_up, checkpointed=False) -> None:
        super().__init__()
        self.table, self.head = nn.Parameter(torch.randn(5, 3)), nn.Linear(3, 2)
        self.look_up, self.checkpointed = look_up, checkpointed

    def block(self, tokens: Tensor) -> Tensor:
        return torch.tanh(self.look_up(tokens, self.table)).mean(1)

    def forward(self, tokens: Tensor) -> Tensor:
        block = partial(checkpoint, self.block, use_reentrant=False) if self.checkpointed else self.block
        hidden = block(tokens)
        return torch.cat([self.head(hidden), hidden @ self.table.mT], -1)


EMBEDDINGS = {
    "padding": lambda: ReadsPadding(nn.Embedding(5, 3, padding_idx=2)),
    "padding counted from the end": lambda: ReadsPadding(nn.Embedding(5, 3, padding_idx=-3)),
    "sparse": lambda: ReadsPadding(nn.Embedding(5, 3, padding_idx=2, sparse=True)),
    "subclass": lambda: ReadsPadding(Scaled(5, 3, padding_idx=0)),
    "function": lambda: Functional(partial(F.embedding, padding_idx=2)),
    "function, counted from the end": lambda: Functional(partial(F.embedding, padding_idx=-3)),
    "sparse function": lambda: Functional(partial(F.embedding, padding_idx=2, sparse=True)),
    "transposed table": lambda: Functional(lambda t, w: F.embedding(t, w.mT.contiguous().mT, padding_idx=2)),
    "torch.embedding": lambda: Functional(lambda t, w: torch.embedding(w, t, 2)),
    "torch.embedding, sparse": lambda: Functional(lambda t, w: torch.embedding(w, t, 2, sparse=True)),
    "operator": lambda: Functional(lambda t, w: torch.ops.aten.embedding.default(w, t, 2)),
    "sparse bag": lambda: Functional(lambda t, w: F.embedding_bag(t, w, sparse=True).unsqueeze(1)),
}


# The padding row is 2, in the first three.
TOKENS = torch.tensor([[2, 1, 2, 0], [3, 0, 4, 2], [2, 2, 2, 2], [1, 3, 4, 3], [4, 3, 1, 1], [3, 1, 4, 4]])


@pytest.mark.parametrize("name", EMBEDDINGS)
@pytest.mark.parametrize("first", ["with padding", "without"])
def test_rows_of_embeddings_are_those_of_backward_in_both_modes(name, first):
    torch.manual_seed(0)
    model = EMBEDDINGS[name]().double()
    with torch.no_grad():
        next(model.parameters()).add_(1.0)  # no padding row is zero
    tokens = TOKENS if first == "with padding" else TOKENS.flip(0)
    with untouched(model):
        lin = linearize(model)
        ((_, _, batch),) = lin.inputs(tokens).batches(None)
    expected = rows_by_backward(model, tokens)
    for used in (lin, pickle.loads(pickle.dumps(lin))) if isinstance(model, ReadsPadding) else (lin,):
        function = lambda *p, used=used: used.function(p, batch).flatten()  # noqa: E731
        torch.testing.assert_close(function(*lin.parameters), model(tokens).detach().flatten())
        reverse = partial(torch.func.jacrev, chunk_size=1)
        for transform in (reverse, torch.func.jacfwd) if "bag" not in name else (reverse,):
            found = transform(function, argnums=tuple(range(len(lin.names))))(*lin.parameters)
            torch.testing.assert_close(torch.cat([part.flatten(1) for part in found], 1), expected)


@pytest.mark.parametrize("engine", ["auto", "autograd"])
@pytest.mark.parametrize("name", EMBEDDINGS)
def test_kernels_and_products_of_embeddings_are_those_of_backward(name, engine):
    torch.manual_seed(0)
    model = EMBEDDINGS[name]().double()
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    tokens = TOKENS.flip(0)
    J = rows_by_backward(model, tokens)
    K = ntkops.ntk(model, tokens, engine=engine)
    torch.testing.assert_close(K.to_dense(), J @ J.mT)
    v = torch.randn(len(J), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    J_ = ntkops.jacobian(model, tokens, engine=engine)
    torch.testing.assert_close(J_.mT @ v, J.mT @ v)
    if "bag" not in name:  # which has no forward mode nor a second derivative
        torch.testing.assert_close(J_ @ (J.mT @ v), J @ (J.mT @ v))


def test_a_checkpointed_look_up_is_that_of_backward():
    torch.manual_seed(0)
    model = Functional(partial(F.embedding, padding_idx=2), checkpointed=True).double()
    tokens = torch.tensor([[1, 3, 4, 3], [2, 1, 2, 0], [3, 0, 4, 2]])
    J = rows_by_backward(model, tokens)
    K = ntkops.ntk(model, tokens)
    torch.testing.assert_close(K.to_dense(), J @ J.mT)
    torch.testing.assert_close(K @ J, J @ J.mT @ J)


def test_counts_of_tokens_are_without_effect():
    """They are over the whole batch: rows of J would depend on other samples."""
    model = ReadsPadding(nn.Embedding(5, 3, scale_grad_by_freq=True)).double()
    tokens = torch.tensor([[2, 1, 2, 0], [3, 0, 4, 2]])
    scaled = Functional(partial(F.embedding, scale_grad_by_freq=True)).double()
    for one, plain in ((model, ReadsPadding(nn.Embedding(5, 3))), (scaled, Functional(F.embedding))):
        plain.double().load_state_dict(one.state_dict())
        J = rows_by_backward(plain, tokens)
        torch.testing.assert_close(ntkops.ntk(one, tokens).to_dense(), J @ J.mT)
        torch.testing.assert_close(ntkops.ntk(one, tokens, max_dense_bytes=0) @ J, J @ J.mT @ J)


def test_padding_is_no_fault_of_the_derivative():
    torch.manual_seed(0)
    model = ReadsPadding(nn.Embedding(5, 3, padding_idx=2)).double()
    with torch.no_grad():
        model.embed.weight.add_(1.0)
    ntkops.check_operator(ntkops.ntk(model, TOKENS)).raise_if_failed()


def test_sparse_gradients_are_dense_on_the_private_copy():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Flatten(), nn.Linear(6, 2)).double()
    tokens = torch.tensor([[0, 1], [3, 0]])
    lin = linearize(model)
    ((_, _, batch),) = lin.inputs(tokens).batches(None)
    _, pull = torch.func.vjp(lambda *p: lin.function(p, batch), *lin.parameters)
    assert pull(torch.ones(2, 2, dtype=torch.float64))[0].layout == torch.strided
    assert model[0].sparse


def test_flat_weights_of_recurrent_layers_follow_the_parameters_handed_in():
    model = LastStep(nn.LSTM(3, 4, batch_first=True)).double()
    x = torch.randn(3, 5, 3, dtype=torch.float64)
    lin = linearize(model)
    ((_, _, batch),) = lin.inputs(x).batches(None)
    changed = tuple(2 * p for p in lin.parameters)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(lin.function(changed, batch), other(x).detach())
    torch.testing.assert_close(lin.function(lin.parameters, batch), model(x).detach())


def test_a_recurrent_layer_with_replaced_weights_is_not_rebuilt_by_the_copy():
    """RNNBase.__getstate__ would renew the user's list of weights when it is copied."""
    model = LastStep(nn.GRU(3, 4, batch_first=True)).double()
    model.layer._flat_weights[0] = nn.Parameter(model.layer.weight_ih_l0.detach().clone())
    stale = model.layer._flat_weights
    lin = linearize(model)
    assert model.layer._flat_weights is stale
    ((_, _, batch),) = lin.inputs(torch.randn(2, 3, 3, dtype=torch.float64)).batches(None)
    doubled = lin.function([2 * p for p in lin.parameters], batch)
    assert not torch.allclose(doubled, lin.function(lin.parameters, batch))


def test_hooks_travel_with_the_copy():
    model = nn.Sequential(nn.Linear(3, 2)).double()
    model[0].register_forward_hook(lambda module, args, output: 3 * output)
    model.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    x = torch.randn(4, 3, dtype=torch.float64)
    with untouched(model, x):
        lin = linearize(model)
        ((_, _, batch),) = lin.inputs(x).batches(None)
        state = lin.function(lin.parameters, batch)
    torch.testing.assert_close(state, model(x).detach())
    torch.testing.assert_close(state, 3 * nn.functional.linear(x + 1, *lin.parameters))


def test_attributes_assigned_in_the_forward_pass_do_not_survive_the_call():
    class Remembers(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.calls = getattr(self, "calls", 0) + 1
            self.last = super().forward(x)
            return self.last * self.calls

    model, x = Remembers(3, 2).double(), torch.randn(4, 3, dtype=torch.float64)
    with untouched(model, x):
        lin = linearize(model)
        ((_, _, batch),) = lin.inputs(x).batches(None)
        first, second = (lin.function(lin.parameters, batch) for _ in range(2))
    assert torch.equal(first, second)
    assert not hasattr(lin.call.root, "last")


def test_the_private_copy_holds_no_parameter_between_calls():
    lin = linearize(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval())
    lin.inputs(torch.randn(4, 3))
    assert all(p.is_meta for p in lin.call.root.parameters())
    assert all(b.is_meta for b in lin.call.root.buffers())


def test_an_exception_inside_the_model_leaves_everything_in_place():
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.LSTM(3, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            torch.rand(3)
            if x.shape[0] == 5:
                raise KeyError("in the middle")
            return self.layer(x)[0]

    model = Fails()
    x = torch.randn(5, 4, 3)
    with untouched(model, x):
        lin = linearize(model)
        with pytest.raises(KeyError, match="in the middle"), lin.safe_context():
            lin.inputs(x[:4])  # passes: four samples
            batch = next(iter(lin.inputs(x).batches(None)))[2]
            lin.function(lin.parameters, batch)
        assert all(p.is_meta for p in lin.call.root.parameters())


def test_two_threads_on_one_model_and_one_linearization():
    model = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    x = torch.randn(6, 3, dtype=torch.float64)
    lin = linearize(model)
    ((_, _, batch),) = lin.inputs(x).batches(None)
    scales = (1.0, -2.0, 0.5, 3.0)
    wanted = {s: lin.function([s * p for p in lin.parameters], batch) for s in scales}
    wrong: list[float] = []

    def work(scale: float) -> None:
        own = linearize(model)
        for _ in range(40):
            for used in (lin, own):
                with used.safe_context():
                    params = [scale * p for p in used.parameters]
                    _, pull = torch.func.vjp(lambda *p, used=used: used.function(p, batch), *params)
                    pull(torch.ones(6, 2, dtype=torch.float64))
                    if not torch.equal(used.function(params, batch), wanted[scale]):
                        wrong.append(scale)

    with untouched(model, x):
        threads = [threading.Thread(target=work, args=(scale,)) for scale in scales]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_checkpointed_blocks_are_recomputed_with_the_tensors_of_their_call():
    specimen = BY_NAME["checkpointed"]
    model, x = specimen.make(), specimen.inputs(5)
    lin = linearize(model)
    batch = _one_batch(specimen, lin, x)
    assert lin.call.replicate
    leaves = [p.clone().requires_grad_() for p in lin.parameters]
    others = [(2 * p).requires_grad_() for p in lin.parameters]
    first, second = lin.function(leaves, batch), lin.function(others, batch)
    plain = nn.Sequential(*model.block, model.head)
    for state, params in ((first, leaves), (second, others)):
        got = torch.autograd.grad(state.square().sum(), params)
        named = dict(zip([n for n, _ in plain.named_parameters()], params, strict=True))
        direct = torch.func.functional_call(plain, named, x)
        wanted = torch.autograd.grad(direct.square().sum(), params)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad:UserWarning")
def test_reentrant_checkpointing_is_refused():
    from tests.model.zoo import Checkpointed

    lin = linearize(Checkpointed(use_reentrant=True))
    with pytest.raises(UnsupportedModelError, match="use_reentrant=False"):
        lin.inputs(torch.randn(4, 3))


def test_a_module_that_cannot_be_copied_names_its_attribute():
    model = nn.Sequential(nn.Linear(3, 2))
    model[0].guard = threading.Lock()
    with (
        untouched(model),
        pytest.raises(UnsupportedModelError, match=r"'0\.guard' of type lock.*\(params, inputs\)"),
    ):
        linearize(model)


def test_tensors_outside_parameters_are_shared_not_copied():
    model = nn.Linear(3, 2)
    model.table = {"big": torch.randn(100), "derived": model.weight * 2}
    lin = linearize(model)
    assert lin.call.root.table["big"] is model.table["big"]
    assert lin.call.root.table["derived"] is model.table["derived"]


@pytest.mark.filterwarnings("ignore:.*nn.utils.weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        nn.utils.weight_norm,
        lambda layer: nn.utils.parametrizations.orthogonal(layer),
    ],
    ids=["pruned", "older weight norm", "orthogonal"],
)
def test_layers_that_compute_their_weight(change):
    model = nn.Sequential(change(nn.Linear(3, 3)), nn.Tanh(), nn.Linear(3, 2)).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    wanted = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    with untouched(model, x):
        lin = linearize(model)
        ((_, _, batch),) = lin.inputs(x).batches(None)
        leaves = [p.clone().requires_grad_() for p in lin.parameters]
        got = torch.autograd.grad(lin.function(leaves, batch).square().sum(), leaves)
    for mine, theirs in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_replaced_forward_methods_follow_the_copy():
    """The way in which libraries hook into modules: a partial, or a method of another function."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2)).double()
    model[0].forward = partial(_doubled, model[0])
    model[1].forward = types.MethodType(_doubled, model[1])
    x = torch.randn(4, 3, dtype=torch.float64)
    with untouched(model, x):
        lin = linearize(model)
        ((_, _, batch),) = lin.inputs(x).batches(None)
        zero = lin.function([torch.zeros_like(p) for p in lin.parameters], batch)
    assert not zero.any()
    torch.testing.assert_close(lin.function(lin.parameters, batch), model(x).detach())


def _doubled(module: nn.Linear, x: Tensor) -> Tensor:
    return 2 * nn.functional.linear(x, module.weight, module.bias)


# torch 2.15 reads the .grad of what it traces, and warns about itself.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_functions_inside_a_model():
    @torch.compile(backend="eager")
    def squash(x: Tensor) -> Tensor:
        return torch.tanh(x) * 2

    class Inside(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return squash(super().forward(x))

    model, x = Inside(3, 2).double(), torch.randn(4, 3, dtype=torch.float64)
    lin = linearize(model)
    ((_, _, batch),) = lin.inputs(x).batches(None)
    torch.testing.assert_close(lin.function(lin.parameters, batch), model(x).detach())


def test_compiled_models_and_compiled_parts_are_unwrapped():
    inner = nn.Sequential(
        torch.compile(nn.Linear(3, 4), backend="eager"), nn.Tanh(), nn.Linear(4, 2)
    ).double()
    x = torch.randn(4, 3, dtype=torch.float64)
    lin = linearize(torch.compile(inner, backend="eager"))
    ((_, _, batch),) = lin.inputs(x).batches(None)
    plain = nn.Sequential(inner[0]._orig_mod, inner[1], inner[2])
    torch.testing.assert_close(lin.function(lin.parameters, batch), plain(x).detach())


def test_the_tensors_and_not_their_copies_are_differentiated_under_vmap_over_parameters():
    model, x = nn.Linear(3, 2).double(), torch.randn(4, 3, dtype=torch.float64)
    lin = linearize(model)
    ((_, _, batch),) = lin.inputs(x).batches(None)
    stacked = [torch.stack([p, 2 * p]) for p in lin.parameters]
    both = torch.func.vmap(lambda *p: lin.function(p, batch))(*stacked)
    torch.testing.assert_close(both[0], model(x).detach())
    torch.testing.assert_close(both[1], 2 * model(x).detach())


def test_twice_differentiable():
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    x = torch.randn(3, 2, dtype=torch.float64)
    lin = linearize(model)
    ((_, _, batch),) = lin.inputs(x).batches(None)

    def value(tensor: Tensor, *params: Tensor) -> Tensor:
        return lin.function(params, batch.replace([tensor])).square()

    arguments = tuple(t.clone().requires_grad_() for t in (x, *lin.parameters))
    assert torch.autograd.gradcheck(value, arguments)
    assert torch.autograd.gradgradcheck(value, arguments)
