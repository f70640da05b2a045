"""Models that are refused by looking at them."""

import functools

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations

from ntkops.errors import (
    CoupledSamplesError,
    DeviceError,
    DtypeError,
    ModelMutationError,
    NonFiniteError,
    NtkopsError,
    ParameterSelectionError,
    StochasticModelError,
    UnsupportedModelError,
    UnsupportedOperationError,
)
from ntkops.model import linearize
from tests.model.zoo import untouched


def _net(*layers: nn.Module) -> nn.Module:
    return nn.ModuleDict({"body": nn.Sequential(nn.Linear(3, 4), *layers)})


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (
            lambda: nn.Dropout(0.3),
            StochasticModelError,
            r"Dropout at 'body\.1' \(p=0\.3\).*call model\.eval\(\)",
        ),
        (lambda: nn.AlphaDropout(0.3), StochasticModelError, r"AlphaDropout at 'body\.1'"),
        (lambda: nn.Dropout2d(0.3), StochasticModelError, r"Dropout2d at 'body\.1'"),
        (lambda: nn.RReLU(), StochasticModelError, r"RReLU at 'body\.1' \(random slope"),
        (
            lambda: nn.MultiheadAttention(4, 2, dropout=0.1),
            StochasticModelError,
            r"MultiheadAttention at 'body\.1' \(dropout=0\.1\)",
        ),
        (lambda: nn.GRU(4, 2, 2, dropout=0.1), StochasticModelError, r"GRU at 'body\.1' \(dropout=0\.1\)"),
        (
            lambda: nn.TransformerEncoderLayer(4, 2, 8),
            StochasticModelError,
            r"MultiheadAttention at 'body\.1\.self_attn' .*Dropout at 'body\.1\.dropout'",
        ),
        (lambda: nn.BatchNorm1d(4), CoupledSamplesError, r"BatchNorm1d at 'body\.1' \(training mode\)"),
        (lambda: nn.SyncBatchNorm(4), CoupledSamplesError, r"SyncBatchNorm at 'body\.1'"),
        (
            lambda: nn.BatchNorm1d(4, track_running_stats=False).eval(),
            CoupledSamplesError,
            r"'body\.1' \(no running statistics\)",
        ),
        (
            lambda: parametrizations.spectral_norm(nn.Linear(4, 2)),
            ModelMutationError,
            r"power iteration .*_SpectralNorm at 'body\.1\.parametrizations\.weight\.0'",
        ),
        (
            lambda: nn.Embedding(4, 2, max_norm=1.0),
            ModelMutationError,
            r"Embedding at 'body\.1' \(max_norm=1\.0\).*torch\.renorm.*max_norm=None",
        ),
        (lambda: nn.EmbeddingBag(4, 2, max_norm=1.0), ModelMutationError, r"EmbeddingBag at 'body\.1'"),
    ],
)
def test_modules_in_the_wrong_mode_are_named(build, error, message):
    model = _net(build())
    with untouched(model), pytest.raises(error, match=message):
        linearize(model)


@pytest.mark.filterwarnings("ignore:.*nn.utils.spectral_norm.*:FutureWarning")
def test_the_older_spectral_norm_is_found_too():
    model = _net(nn.utils.spectral_norm(nn.Linear(4, 2)))
    with untouched(model), pytest.raises(ModelMutationError, match=r"Linear at 'body\.1'"):
        linearize(model)
    assert linearize(model.eval()).num_parameters > 0


@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.Dropout(0.0),
        lambda: nn.Dropout(0.3).eval(),
        lambda: nn.MultiheadAttention(4, 2),
        lambda: nn.BatchNorm1d(4).eval(),
        lambda: nn.GroupNorm(2, 4),
        lambda: nn.RReLU(0.2, 0.2),
        lambda: (
            nn.Embedding(4, 2, max_norm=1.0).requires_grad_(False).eval().from_pretrained(torch.ones(4, 2))
        ),
    ],
)
def test_modules_in_a_harmless_mode_pass(build):
    linearize(_net(build()))


def test_an_inert_dropout_of_a_single_recurrent_layer_passes():
    layer = nn.GRU(4, 2)
    layer.dropout = 0.5  # acts between layers only
    linearize(_net(layer))


def test_many_culprits_are_counted():
    model = _net(*(nn.Dropout(0.1) for _ in range(20)))
    with pytest.raises(StochasticModelError, match=r"'body\.8' \(p=0\.1\) and 12 more"):
        linearize(model)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning")
def test_torchscript_is_refused():
    scripted = torch.jit.script(nn.Linear(3, 2))
    for model in (scripted, nn.Sequential(nn.Linear(3, 3), scripted)):
        with pytest.raises(UnsupportedModelError, match="is TorchScript.*pass the eager module"):
            linearize(model)

    @torch.jit.script
    def function(params: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return x * params["w"]

    with pytest.raises(UnsupportedModelError, match="TorchScript function"):
        linearize(function, params={"w": torch.ones(1)})


def test_wrappers_for_several_processes_are_refused_with_the_module_inside():
    with pytest.raises(
        UnsupportedModelError, match=r"DataParallel at the top level wraps.*pass its \.module"
    ):
        linearize(nn.DataParallel(nn.Linear(3, 2)))

    class FullyShardedDataParallel(nn.Module):
        """Stands in for torch's class, which needs a device; it is recognised by its name."""

    with pytest.raises(UnsupportedModelError, match="sharded by FSDP"):
        linearize(nn.Sequential(nn.Linear(3, 2), FullyShardedDataParallel()))


def test_sharded_parameters_are_refused():
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
        fully_shard(model[1], mesh=mesh)
        with pytest.raises(UnsupportedModelError, match="at '1' is sharded by FSDP.*full state dict"):
            linearize(model)
        with pytest.raises(UnsupportedModelError, match=r"DistributedDataParallel .*pass its \.module"):
            linearize(nn.parallel.DistributedDataParallel(nn.Linear(3, 2)))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("model", "message"),
    [(None, "a NoneType"), ("net", "a str"), (nn.Linear, "a type and not an instance"), (3, "a int")],
)
def test_things_that_are_no_models(model, message):
    with pytest.raises(UnsupportedModelError, match=message):
        linearize(model, params={"w": torch.ones(1)})


def test_parameters_without_data():
    with pytest.raises(UnsupportedModelError, match="parameter 'weight' has no data .meta device."):
        linearize(nn.Linear(3, 2, device="meta"))
    with pytest.raises(
        UnsupportedModelError, match=r"parameter '0\.weight' is not initialised .*once on a batch"
    ):
        linearize(nn.Sequential(nn.LazyLinear(3)))
    model = nn.Linear(3, 2)
    model.register_buffer("table", torch.zeros(3, device="meta"))
    with pytest.raises(UnsupportedModelError, match="buffer 'table' has no data"):
        linearize(model)


class Mixed(nn.Module):
    def __init__(self, **tensors):
        super().__init__()
        for name, tensor in tensors.items():
            setattr(
                self,
                name,
                nn.Parameter(tensor, requires_grad=tensor.is_floating_point() or tensor.is_complex()),
            )


def test_parameters_that_cannot_be_differentiated():
    with pytest.raises(UnsupportedModelError, match="parameter 'b' has dtype torch.complex64.*view_as_real"):
        linearize(Mixed(a=torch.ones(2), b=torch.ones(2, dtype=torch.complex64)))
    quantised = Mixed(a=torch.ones(2), b=torch.ones(2, dtype=torch.int8))
    with pytest.raises(UnsupportedModelError, match="parameter 'b' has dtype torch.int8.*leave it out"):
        linearize(quantised, params="*")
    assert linearize(quantised).names == ("a",)
    assert linearize(Mixed(a=torch.ones(2), b=torch.ones(2, dtype=torch.complex64)), params="a").names == (
        "a",
    )


def test_selected_parameters_of_several_dtypes():
    model = Mixed(a=torch.ones(2), b=torch.ones(2, dtype=torch.float64))
    with pytest.raises(
        DtypeError, match=r"'a' is torch\.float32, 'b' torch\.float64; select those of one dtype"
    ):
        linearize(model)
    assert linearize(model, params="b").dtype == torch.float64


def test_a_model_spread_over_devices(monkeypatch):
    model = Mixed(a=torch.ones(2), b=torch.ones(2))
    # Without a second device: the check looks at nothing but the attribute.
    monkeypatch.setattr(
        type(model.b), "device", property(lambda p: torch.device("cuda", 0 if p is model.b else 1))
    )
    with pytest.raises(
        DeviceError, match=r"parameter 'a' lives on cuda:1, parameter 'b' on cuda:0; move all"
    ):
        linearize(model)


def test_parameters_that_are_not_finite_are_named_and_counted():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
        model[1].weight[1] = float("inf")
    for params in (None, "0.*"):  # unselected ones too
        with (
            untouched(model),
            pytest.raises(
                NonFiniteError, match=r"parameter '1\.weight' has 1 NaN and 2 infinite of 4 entries"
            ),
        ):
            linearize(model, params=params)
    with pytest.raises(NonFiniteError, match="parameter 'w' has 1 NaN of 1"):
        linearize(lambda p, x: x * p["w"], params={"w": torch.tensor([float("nan")])})


def test_buffers_may_hold_infinity():
    model = nn.Linear(3, 2)
    model.register_buffer("mask", torch.full((2,), -float("inf")))
    linearize(model)


def test_functions_need_their_parameters():
    function = lambda params, x: x @ params["w"]  # noqa: E731
    for params in (None, {}, "w"):
        with pytest.raises(ParameterSelectionError, match="plain function .*pass params= a dict of tensors"):
            linearize(function, params=params)
    with pytest.raises(ParameterSelectionError, match=r"params\['layer'\] is a dict.*flatten nested dicts"):
        linearize(function, params={"layer": {"w": torch.ones(3, 2)}})
    with pytest.raises(ParameterSelectionError, match=r"params\[0\] is a Tensor.*maps strings to tensors"):
        linearize(function, params={0: torch.ones(3, 2)})


def test_functions_get_the_inputs_as_they_were_passed():
    seen = []

    def function(params, inputs):
        seen.append(type(inputs))
        x = inputs["x"] if isinstance(inputs, dict) else inputs[0] if isinstance(inputs, tuple) else inputs
        return x @ params["w"] + params["b"]

    x = torch.randn(4, 3)
    params = {"w": torch.randn(3, 2), "b": torch.randn(2)}
    for inputs, kind in ((x, torch.Tensor), ((x, x), tuple), ({"x": x}, dict)):
        seen.clear()
        lin = linearize(function, params=params)
        assert lin.names == ("w", "b")
        ((_, _, batch),) = lin.inputs(inputs).batches(None)
        torch.testing.assert_close(lin.function(lin.parameters, batch), x @ params["w"] + params["b"])
        assert set(seen) == {kind}


def test_one_tensor_under_two_keys_of_a_function_is_one_parameter():
    w = torch.randn(3, 3).double()
    lin = linearize(lambda p, x: torch.tanh(x @ p["u"]) @ p["v"], params={"u": w, "v": w})
    assert lin.names == ("u",)
    x = torch.randn(4, 3).double()
    ((_, _, batch),) = lin.inputs(x).batches(None)
    got = torch.func.jacrev(lambda w: lin.function((w,), batch))(lin.parameters[0])
    torch.testing.assert_close(got, torch.func.jacrev(lambda w: torch.tanh(x @ w) @ w)(w))


def test_partials_and_callable_objects_are_functions():
    def scaled(params, x, factor):
        return factor * x * params["w"]

    lin = linearize(functools.partial(scaled, factor=2.0), params={"w": torch.ones(3)})
    assert lin.inputs(torch.randn(4, 3)).num_outputs == 3


def test_a_linearization_is_returned_as_it_is_and_takes_no_other_choice():
    model = nn.Linear(3, 2)
    lin = linearize(model, params="weight")
    assert linearize(lin) is lin
    for options in ({"params": "bias"}, {"output": 0}, {"batch_dim": 1}, {"differentiable": True}):
        with pytest.raises(UnsupportedOperationError, match="linearised already"):
            linearize(lin, **options)


def test_every_error_is_one_of_ours():
    with pytest.raises(NtkopsError):
        linearize(nn.Linear(3, 2), params="x")
    with pytest.raises(ValueError, match="Dropout"):
        linearize(_net(nn.Dropout(0.5)))
