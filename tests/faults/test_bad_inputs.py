"""Forty bad inputs and faults, each with the exception that names it and the way out.

Every row is one call of the public interface. What must work rather than raise is a row, too. Options and
methods that the messages name are asked of the functions and classes themselves.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ntkops
from ntkops import checkpoint, errors
from ntkops.operators.ridge import RidgeOperator
from tests.cases import BY_NAME
from tests.faults.memory import short_of_memory

X = torch.linspace(-1, 1, 60).reshape(20, 3)


class Layer(nn.Module):
    """A linear layer and anything after it."""

    def __init__(self, after=lambda y: y, outputs=2):
        super().__init__()
        self.fc = nn.Linear(3, outputs)
        with torch.no_grad():
            for p in self.fc.parameters():
                p.copy_(torch.linspace(-0.5, 0.7, p.numel()).view_as(p))
        self.after = after

    def forward(self, x):
        return self.after(self.fc(x))


class Constant(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return x.sum(-1, keepdim=True)


class Mutating(Layer):
    def forward(self, x):
        x.add_(1)
        return self.fc(x)


class Data:
    """A re-iterable that gives other data in every pass."""

    def __init__(self, change):
        self.change, self.passes = change, 0

    def __iter__(self):
        self.passes += 1
        return iter([X + self.change * self.passes])


def ntk(model=None, x=X, **options):
    return ntkops.ntk(model or Layer(), x, **options)


def with_parameter(value):
    model = Layer()
    model.fc.weight.data[0] = value
    return model


def with_row(value):
    x = X.clone()
    x[17, 1] = value
    return x


def singular():
    return ntk(nn.Linear(3, 1, bias=False))


def stale():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    K = ntk(model)
    with torch.no_grad():
        model[0].weight.add_(1)
    return K @ torch.ones(40)


def not_converged():
    K = ntk(BY_NAME["mlp"].make(), BY_NAME["mlp"].data(5))
    return K.add_jitter(1e-12).with_solver(method="cg", max_iterations=1).solve(torch.ones(10).double())


def root_at_zero():
    x = X.clone()
    x[2] = 0
    model = nn.Sequential(nn.Linear(3, 1, bias=False), Norm())
    return ntk(model, x).left.mT @ torch.ones(20)


class Norm(nn.Module):
    def forward(self, x):
        return x.square().sum(-1, keepdim=True).sqrt()


def quantised():
    """A layer with integer weights and one floating scale, as quantised layers have them."""
    layer = nn.Module()
    layer.weight = nn.Parameter(torch.ones(2, 3, dtype=torch.int8), requires_grad=False)
    layer.scale = nn.Parameter(torch.ones(2))
    layer.forward = lambda x: torch.nn.functional.linear(x, layer.weight.float()) * layer.scale
    return layer


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(Layer().fc)


# row, what, call, exception of ours, built-in base, words of the message in order
ROWS = [
    (1, "dropout", lambda: ntk(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5))), errors.StochasticModelError,
     ValueError, r"Dropout at '1' \(p=0.5\).*model\.eval\(\)"),
    (2, "batch norm", lambda: ntk(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))),
     errors.CoupledSamplesError, ValueError, r"BatchNorm1d at '1'.*model\.eval\(\)"),
    (5, "unknown key", lambda: ntk(params={"nope": torch.ones(2)}), errors.UnknownParameterError, KeyError,
     "unknown parameter 'nope'; did you mean"),
    (5, "unknown name", lambda: ntk(params="fc.wieght"), errors.UnknownParameterError, KeyError,
     "did you mean 'fc.weight'"),
    (6, "broadcastable shape", lambda: ntk(params={"fc.bias": torch.ones(1)}), errors.ParameterShapeError,
     ValueError, r"'fc.bias'.*expected shape \(2,\), got \(1,\)"),
    (7, "all frozen", lambda: ntk(Layer().requires_grad_(False)), errors.ParameterSelectionError, ValueError,
     r"no parameter is selected: none of the 2 requires grad; .*params='\*'"),
    (7, "empty selection", lambda: ntk(params=[]), errors.ParameterSelectionError, ValueError,
     "no parameter is selected.*'fc.weight'"),
    (8, "pattern without a match", lambda: ntk(params="body.*"), errors.UnknownParameterError, KeyError,
     r"matches pattern 'body\.\*'; did you mean"),
    (9, "dict output", lambda: ntk(BY_NAME["dict"].make(), BY_NAME["dict"].data()), errors.OutputError,
     TypeError, "returned a dict with 'hidden'.*'logits'.*pass output='hidden'"),
    (10, "integer output", lambda: ntk(Layer(lambda y: y.argmax(-1))), errors.OutputError, TypeError,
     "dtype torch.int64.*floating-point scores"),
    (10, "boolean output", lambda: ntk(Layer(lambda y: y > 0)), errors.OutputError, TypeError, "torch.bool"),
    (11, "complex output", lambda: ntk(Layer(lambda y: torch.complex(y, y))), errors.OutputError, TypeError,
     r"torch\.complex64.*torch\.view_as_real"),
    (11, "complex parameter", lambda: ntk(nn.Linear(3, 2, dtype=torch.complex64), X.to(torch.complex64)),
     errors.UnsupportedModelError, TypeError, r"parameter 'weight' has dtype torch\.complex64"),
    (13, "no sample axis", lambda: ntk(Layer(lambda y: y.sum(0))), errors.OutputError, TypeError,
     r"shape \(2,\) has no sample axis of .*batch_dim="),
    (13, "mean loss", lambda: ntk(Layer(lambda y: y.mean())), errors.OutputError, TypeError,
     r"shape \(\) has no sample axis.*reduction='none'"),
    (14, "NaN parameter", lambda: ntk(with_parameter(float("nan"))), errors.NonFiniteError, ValueError,
     "parameter 'fc.weight' has 3 NaN of 6 entries"),
    (15, "infinite input", lambda: ntk(x=with_row(float("inf"))), errors.NonFiniteError, ValueError,
     "input row 17 is not finite"),
    (15, "NaN in a vector", lambda: ntk() @ torch.full((40,), float("nan")), errors.NonFiniteError,
     ValueError, "right-hand side is not finite, first at column 0"),
    (16, "root at 0", root_at_zero, errors.NonFiniteError, ValueError,
     "Jᵀv is not finite although parameters, inputs and output are, first at parameter '0.weight'"),
    (17, "float64 data", lambda: ntk(x=X.double()), errors.DtypeError, TypeError,
     r"input is float64, the model float32; cast with x\.to\(torch\.float32\)"),
    (18, "another device", lambda: ntk(x=X.to("meta")), errors.DeviceError, ValueError,
     r"lives on meta, the model on cpu; move it with \.to\('cpu'\)"),
    (18, "no generator", lambda: ntkops.trace(ntk(), generator=3), errors.InputError, ValueError,
     r"generator=3: pass a torch\.Generator, or None"),
    (19, "meta parameters", lambda: ntk(nn.Linear(3, 2, device="meta")), errors.UnsupportedModelError,
     TypeError, "'weight' has no data"),
    (19, "lazy parameters", lambda: ntk(nn.LazyLinear(2)), errors.UnsupportedModelError, TypeError,
     "'weight' is not initialised"),
    (20, "short vector", lambda: ntk() @ torch.ones(20), errors.ShapeError, ValueError,
     r"expected 40 rows \(20 samples x 2 outputs\), got \(20,\).*outputs='trace'"),
    (20, "output axis kept", lambda: ntk() @ torch.ones(20, 2), errors.ShapeError, ValueError,
     r"sample-major: pass v\.reshape\(-1\)"),
    (20, "integer vector", lambda: ntk() @ torch.ones(40, dtype=torch.int64), errors.DtypeError, TypeError,
     "dtype torch.float32, the vector torch.int64"),
    (21, "no samples", lambda: ntk(x=X[:0]), errors.InputError, ValueError, "no samples; pass at least one"),
    (22, "shuffling", lambda: ntk(x=DataLoader(TensorDataset(X), batch_size=5, shuffle=True)),
     errors.NonDeterministicDataError, ValueError, "differ at batch 0; pass shuffle=False"),
    (22, "augmentation", lambda: ntk(x=Data(0.1)), errors.NonDeterministicDataError, ValueError,
     "differ at batch 0"),
    (23, "iterator", lambda: ntk(x=iter([X])), errors.InputError, ValueError, "one-shot iterator"),
    (25, "no passes", lambda: ntkops.trace(ntk(), num_passes=0), errors.InputError, ValueError,
     "num_passes=0: pass a positive integer"),
    (25, "few passes", lambda: ntkops.trace(ntk(), method="hutch++", num_passes=2), errors.InputError,
     ValueError, "at least 6 passes: that is num_passes=6"),
    (26, "negative ridge", lambda: ntkops.KernelRidge(-1.0).fit(ntk(), torch.ones(20, 2)), errors.InputError,
     ValueError, "ridge=-1.0"),
    (26, "negative jitter", lambda: ntk().add_jitter(-1.0), errors.InputError, ValueError, "ridge=-1.0"),
    (26, "singular", lambda: ntkops.KernelRidge(0.0).fit(singular(), torch.ones(20)),
     errors.SingularKernelError, ValueError, "ridge"),
    (26, "singular solve", lambda: singular().solve(torch.ones(20)), errors.SingularKernelError, ValueError,
     r"numerically singular.*K\.add_jitter\(ridge\)"),
    (27, "not converged", not_converged, errors.NotConvergedError, ArithmeticError,
     r"after 1 iterations.*relative residual.*max_iterations.*\.result"),
    (28, "labels of other length", lambda: ntkops.KernelRidge().fit(ntk(outputs="trace"), torch.ones(4)),
     errors.ShapeError, ValueError, r"4 rows of labels, shape \(4,\), do not fit a kernel of 20 rows"),
    (28, "class numbers", lambda: ntkops.KernelRidge().fit(ntk(outputs="trace"), torch.arange(20)),
     errors.InputError, ValueError, "one_hot"),
    (29, "point that is not there", lambda: ntkops.nystrom_ntk(ntk(), [0, 20]), errors.InputError, ValueError,
     "point 20 does not exist: there are 20 samples"),
    (29, "no points", lambda: ntkops.nystrom_ntk(ntk(), []), errors.InputError, ValueError, "at least one"),
    (31, "too large", lambda: ntk(max_dense_bytes=100).to_dense(), errors.DenseMemoryError, MemoryError,
     r"40 x 40 matrix needs 6\.2 KiB, above max_dense_bytes=100 B.*raise max_dense_bytes"),
    (35, "TorchScript", lambda: ntk(scripted()), errors.UnsupportedModelError, TypeError, "is TorchScript"),
    (35, "DataParallel", lambda: ntk(nn.DataParallel(Layer())), errors.UnsupportedModelError, TypeError,
     r"pass its \.module"),
    (35, "integer weights", lambda: ntk(quantised(), params="*"), errors.UnsupportedModelError, TypeError,
     r"parameter 'weight' has dtype torch\.int8"),
    (36, "mutated input", lambda: ntk(Mutating()), errors.ModelMutationError, ValueError,
     "changes input in place"),
    (38, "changed since", stale, errors.StaleOperatorError, ValueError,
     r"changed in place since the operator was made: parameter '0\.weight'"),
    # what torch would say in its own words
    (20, "samples of other width", lambda: ntk().cross(torch.ones(4, 7)), errors.InputError, ValueError,
     r"cannot be called with these samples \(input of shape \(\d, 7\), float32.*pass samples of the shape"),
    (20, "token out of range", lambda: ntk(nn.Embedding(5, 2), torch.tensor([[7]])), errors.InputError,
     ValueError, "IndexError: index out of range.*values"),
    (20, "float as an index", lambda: ntk()[1.5], errors.OutOfRangeError, IndexError, "not by 1.5"),
    (20, "floats as indices", lambda: ntk()[torch.tensor([1.5])], errors.OutOfRangeError, IndexError,
     "a tensor of torch.float32"),
    (20, "bool as an index", lambda: ntk()[True], errors.OutOfRangeError, IndexError, "not by True"),
    (20, "float in a slice", lambda: ntk()[1.5:3], errors.OutOfRangeError, IndexError, "not 1.5"),
    (20, "float in a submatrix", lambda: ntk().submatrix([0.5], [1]), errors.OutOfRangeError, IndexError,
     "a tensor of torch.float32"),
    (20, "choice of outputs", lambda: ntk(outputs=1.5), errors.InputError, ValueError, "'each' or 'trace'"),
    (26, "string as jitter", lambda: ntk().add_jitter("0.1"), errors.InputError, ValueError, "ridge='0.1'"),
    (26, "None as jitter", lambda: ntk().add_jitter(None), errors.InputError, ValueError, "ridge=None"),
    (31, "inverse", lambda: torch.inverse(ntk()), errors.UnsupportedOperationError, TypeError,
     r"no inverse is formed; use K\.add_jitter\(ridge\)\.solve\(b\)"),
    (31, "inverse of a ridge", lambda: torch.linalg.inv(ntk().add_jitter(1.0)),
     errors.UnsupportedOperationError, TypeError, r"solve\(b\)"),
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS, ids=[f"{number}-{what.replace(' ', '-')}" for number, what, *_ in ROWS])
def test_bad_input(row):
    _, _, call, exception, base, words = row
    with pytest.raises(exception, match=words) as caught:
        call()
    assert isinstance(caught.value, base) and isinstance(caught.value, errors.NtkopsError)
    require_ways_out(str(caught.value))


# Options that messages may name: of our functions, and of the functions of torch that they advise on.
OPTIONS = {
    option
    for function in (ntkops.ntk, ntkops.trace, ntkops.linearize, ntkops.KernelRidge,
                     ntkops.NTKOperator.add_jitter, RidgeOperator.with_solver, nn.Dropout, nn.BatchNorm1d,
                     nn.CrossEntropyLoss, nn.Linear, DataLoader)
    for option in inspect.signature(function).parameters
}  # fmt: skip
OWNERS = {"K": ntkops.NTKOperator, "ntkops": ntkops, "model": nn.Module, "torch": torch,
          "x": torch.Tensor, "v": torch.Tensor, "functional": nn.functional}  # fmt: skip


def require_ways_out(message):
    """Assert that every option and every method that a message names is there."""
    named = set(re.findall(r"\b([a-z_][a-z_0-9]*)=", message))
    assert named <= OPTIONS, named - OPTIONS
    for owner, name in re.findall(r"(?<![\w'])(\w+)\.([a-z_]\w*)", message):
        assert hasattr(OWNERS[owner], name), f"{owner}.{name}"


def test_3_a_submodule_by_two_paths_works_and_the_model_is_intact():
    case = BY_NAME["shared"]
    model = case.make()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters(remove_duplicate=False)}
    ntkops.ntk(model, case.data()).to_dense()
    for name, p in model.named_parameters(remove_duplicate=False):
        assert id(p) == before[name][0] and torch.equal(p, before[name][1])


def test_4_two_threads_get_right_results():
    K = ntk(max_dense_bytes=0)
    v = torch.ones(40)
    expected = K @ v
    with ThreadPoolExecutor(2) as pool:
        for found in pool.map(lambda _: K @ v, range(20)):
            torch.testing.assert_close(found, expected)


def test_12_an_output_without_parameters_warns_and_is_zero():
    assert ntk(engine="autograd").engine_info.mode  # torch warns of itself where forward mode is first used
    with pytest.warns(UserWarning, match=r"does not depend on the selected parameters \(w\)"):
        K = ntk(Constant())
    assert not K.to_dense().any()
    for ratio in (ntkops.effective_rank, lambda K: ntkops.alignment(K, K)):
        with pytest.raises(errors.ZeroKernelError, match="zero"):
            ratio(K)


def test_21_one_sample_and_one_output_work():
    assert ntk(x=X[:1]).to_dense().shape == (2, 2)
    assert ntk(Layer(outputs=1), x=X[:1]).to_dense().shape == (1, 1)


def test_24_a_ragged_last_batch_works():
    torch.testing.assert_close(ntk(x=[X[:12], X[12:]]).to_dense(), ntk().to_dense())


def test_25_more_passes_than_rows_are_exact():
    assert ntkops.trace(ntk(), num_passes=1000, method="hutch++").exact


def test_29_duplicate_points_count_once():
    points = ntkops.nystrom_ntk(ntk(outputs="trace"), [0, 0, 1])
    torch.testing.assert_close(points.to_dense(), ntkops.nystrom_ntk(ntk(outputs="trace"), [0, 1]).to_dense())


def test_30_a_singular_block_has_a_reported_rank_and_no_jitter():
    K = ntk(nn.Linear(3, 1, bias=False).double(), X.double())
    found = ntkops.nystrom_ntk(K, list(range(20)))
    assert int(found.rank) == torch.linalg.matrix_rank(X) < 20
    torch.testing.assert_close(found.to_dense(), K.to_dense())


def test_32_out_of_memory_is_retried_and_ends_in_an_error(monkeypatch):
    K = ntk(engine="autograd", max_dense_bytes=0)
    v = torch.ones(40)
    expected = K @ v
    with short_of_memory(monkeypatch, samples=4):
        torch.testing.assert_close(K @ v, expected)
    with (
        short_of_memory(monkeypatch, samples=0),
        pytest.raises(errors.OutOfMemoryError, match=r"even one at a time \(batch_size\) needs about"),
    ):
        K @ v
    assert {"batch_size", "chunk_size", "params", "outputs"} <= set(inspect.signature(ntkops.ntk).parameters)


def test_33_fused_attention_works():
    case = BY_NAME["attention"]
    K = ntkops.ntk(case.make(), case.data(), max_dense_bytes=0)
    torch.testing.assert_close(
        K @ torch.ones(6).double(), K.left.mT.mT @ (K.left.mT @ torch.ones(6).double())
    )


def test_34_branches_on_values_fall_back_to_a_loop_and_say_so():
    case = BY_NAME["branching"]
    K = ntkops.ntk(case.make(), case.data(), engine="autograd")
    assert K.engine_info.per_sample == "loop" and any("loop" in reason for reason in K.engine_info.reasons)


@pytest.mark.parametrize("engine", ["autograd", "layerwise"])
def test_37_autocast_around_everything_changes_nothing(engine):
    v = torch.linspace(-1, 1, 80).reshape(40, 2)
    K = ntk(engine=engine)
    dense, product, diagonal = K.to_dense().clone(), K @ v, K.diagonal().clone()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for other in (ntk(engine=engine), ntk(engine=engine, max_dense_bytes=0)):
            assert (other @ v).dtype == torch.float32
            torch.testing.assert_close(other @ v, product)
            torch.testing.assert_close(other.diagonal(), diagonal)
            torch.testing.assert_close(other.left.mT @ v, K.left.mT @ v)
        other = ntk(engine=engine)
        torch.testing.assert_close(other.to_dense(), dense)
        torch.testing.assert_close(other @ v, product)  # from the dense block
    assert other.engine_info.covered == K.engine_info.covered


def test_39_files_that_are_no_checkpoints_are_refused(tmp_path):
    path = tmp_path / "state.safetensors"
    checkpoint.save(path, {"sum": torch.ones(3)}, fingerprint=checkpoint.fingerprint(data=X))
    with pytest.raises(errors.CheckpointError, match="fingerprint differs: data"):
        checkpoint.load(path, checkpoint.fingerprint(data=X + 1))
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(errors.CheckpointError, match="cut short"):
        checkpoint.load(path)
    path.write_bytes(pickle.dumps({"sum": 1}))
    with pytest.raises(errors.CheckpointError, match="pickle"):
        checkpoint.load(path)


@contextmanager
def interrupted(monkeypatch, after):
    """Let the n-th forward pass be interrupted."""
    from ntkops.model import Linearization

    function, calls = Linearization.function, []

    def limited(self, params, batch):
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return function(self, params, batch)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Linearization, "function", limited)
        yield


def test_40_an_interrupt_leaves_the_model_and_the_operator(monkeypatch):
    model = Layer()
    K = ntk(model, engine="autograd", batch_size=5, max_dense_bytes=0)
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    expected = K @ torch.ones(40)
    with interrupted(monkeypatch, 2):
        K @ torch.ones(40)
    assert torch.equal(K @ torch.ones(40), expected) and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_every_row_of_the_forty_is_here():
    named = {int(name.split("_")[1]) for name in globals() if name.startswith("test_") and name[5].isdigit()}
    assert named | {row[0] for row in ROWS} == set(range(1, 41))
