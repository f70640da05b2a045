"""The safe context: every setting held, every setting restored."""

import threading

import pytest
import torch
from torch import nn

from ntkops.model import linearize
from ntkops.model.context import safe_context
from tests.model.zoo import _settings

CPU = torch.device("cpu")


def test_settings_are_held_inside_and_restored_outside():
    before = _settings()
    with safe_context(CPU, math_attention=True, no_mkldnn=True):
        cuda = torch.backends.cuda
        assert cuda.math_sdp_enabled()
        assert not (cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled() or cuda.cudnn_sdp_enabled())
        assert not torch.backends.mha.get_fastpath_enabled()
        assert not torch.backends.mkldnn.enabled
        assert torch.get_float32_matmul_precision() == "highest"
    assert _settings() == before


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN, nn.Linear])
def test_settings_for_cuda(layer, monkeypatch):
    lin = linearize(nn.Sequential(layer(3, 2)))
    monkeypatch.setattr(type(lin), "device", torch.device("cuda"))
    cudnn = torch.backends.cudnn
    before = cudnn.enabled, cudnn.allow_tf32
    assert before == (True, True)
    with lin.safe_context():
        assert (cudnn.enabled, cudnn.allow_tf32) == (layer is nn.Linear, False)
        assert torch.backends.mkldnn.enabled
    assert (cudnn.enabled, cudnn.allow_tf32) == before


def test_attention_is_left_alone_where_no_forward_mode_is_needed():
    before = torch.backends.cuda.flash_sdp_enabled()
    with safe_context(CPU, math_attention=False):
        assert torch.backends.cuda.flash_sdp_enabled() == before


@pytest.mark.parametrize("unusual", [True, False])
def test_unusual_settings_are_restored_after_an_exception(unusual):
    torch.backends.mha.set_fastpath_enabled(not unusual)
    torch.backends.cuda.enable_math_sdp(not unusual)
    torch.set_float32_matmul_precision("medium" if unusual else "highest")
    try:
        before = _settings()
        with pytest.raises(KeyError), safe_context(CPU, math_attention=True, no_mkldnn=True):
            raise KeyError
        assert _settings() == before
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
        torch.backends.cuda.enable_math_sdp(True)
        torch.set_float32_matmul_precision("highest")


NEWER_SETTINGS = hasattr(torch.backends.cuda.matmul, "fp32_precision")  # torch 2.9 and newer


@pytest.fixture
def precision_settings():
    """Put the newer precision settings back, whatever a test does to them; torch 2.8 has none."""
    if not NEWER_SETTINGS:
        yield []
        torch.set_float32_matmul_precision("highest")
        return
    settings = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv]
    before = [setting.fp32_precision for setting in settings]
    yield settings
    torch.backends.fp32_precision = "none"
    for setting, value in zip(settings, before, strict=True):
        setting.fp32_precision = value
    torch.set_float32_matmul_precision("highest")


@pytest.mark.skipif(not NEWER_SETTINGS, reason="settings of torch 2.9 and newer")
def test_the_newer_precision_settings_are_held_and_restored(precision_settings):
    matmul = precision_settings[0]
    matmul.fp32_precision = "tf32"
    with pytest.raises(RuntimeError):  # torch refuses the older reading from now on
        torch.get_float32_matmul_precision()
    with safe_context(CPU, math_attention=True):
        assert matmul.fp32_precision == "ieee"
    assert matmul.fp32_precision == "tf32"


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
def test_the_older_precision_setting_is_restored_in_full(precision, precision_settings):
    torch.set_float32_matmul_precision(precision)
    before = [setting.fp32_precision for setting in precision_settings]
    with safe_context(CPU, math_attention=True):
        assert torch.get_float32_matmul_precision() == "highest"
        assert not {"tf32", "bf16"} & {setting.fp32_precision for setting in precision_settings}
    assert torch.get_float32_matmul_precision() == precision
    assert [setting.fp32_precision for setting in precision_settings] == before


def test_contexts_nest():
    before = _settings()
    with safe_context(CPU, math_attention=True):
        inside = _settings()
        with safe_context(CPU, math_attention=True, no_mkldnn=True):
            pass
        assert _settings() == inside
    assert _settings() == before


def test_threads_that_overlap_restore_the_first_setting():
    before = _settings()
    entered, leave = threading.Event(), threading.Event()

    def work() -> None:
        with safe_context(CPU, math_attention=True):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=work)
    with safe_context(CPU, math_attention=True):
        thread.start()
        entered.wait(10)
    assert not torch.backends.cuda.flash_sdp_enabled()  # the other thread still needs it
    leave.set()
    thread.join()
    assert _settings() == before


def test_autocast_is_off_inside_and_on_again_outside():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
        lin = linearize(model)
        ((_, _, batch),) = lin.inputs(x).batches(None)
        with lin.safe_context():
            state = lin.function(lin.parameters, batch)
        assert torch.is_autocast_enabled("cpu")
    assert state.dtype == torch.float32
    assert torch.equal(state, model(x))


@pytest.mark.parametrize("grad", [True, False])
def test_gradient_mode_is_left_as_it_is(grad):
    with torch.set_grad_enabled(grad), safe_context(CPU, math_attention=True):
        assert torch.is_grad_enabled() == grad


def test_inference_mode_is_left_for_the_time_of_the_context():
    with torch.inference_mode():
        with safe_context(CPU, math_attention=True):
            assert not torch.is_inference_mode_enabled()
        assert torch.is_inference_mode_enabled()
        lin = linearize(nn.Linear(3, 2))
        assert not any(p.is_inference() for p in lin.parameters)


@pytest.mark.parametrize(
    ("layer", "dtype", "off"),
    [
        (nn.LSTM, torch.float32, True),
        (nn.LSTM, torch.bfloat16, True),
        (nn.RNN, torch.float32, True),
        (nn.LSTM, torch.float64, False),
        (nn.GRU, torch.float32, False),
        (nn.Linear, torch.float32, False),
    ],
)
def test_onednn_is_off_only_for_fused_recurrent_layers_in_low_precision(layer, dtype, off):
    lin = linearize(nn.Sequential(layer(3, 2)).to(dtype))
    with lin.safe_context():
        assert torch.backends.mkldnn.enabled != off


def test_a_float32_lstm_has_forward_mode_inside():
    model = nn.LSTM(3, 2, batch_first=True)
    lin = linearize(model, output=0)
    ((_, _, batch),) = lin.inputs(torch.randn(3, 4, 3)).batches(None)
    with lin.safe_context():
        _, tangent = torch.func.jvp(lambda *p: lin.function(p, batch), lin.parameters, lin.parameters)
    assert bool(tangent.any())
