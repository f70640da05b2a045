"""A sketch that was saved goes on with the same bits, or is refused with what differs."""

import pytest
import torch

import ntkops
from ntkops.errors import CheckpointError
from ntkops.estimators import Sketch
from tests.cases import BY_NAME
from tests.pairs import pairs

CASE = BY_NAME["mlp"]


def _kernel(engine="auto", seed=1, **options):
    return ntkops.ntk(CASE.make(), CASE.data(24, seed=seed), engine=engine, **options)


def _generator():
    return torch.Generator().manual_seed(3)


@pytest.mark.parametrize(
    "outputs, engine, distribution",
    pairs(["all", "trace", "each"], ["autograd", "layerwise"], ["sphere", "gaussian"]),
    ids=str,
)
def test_an_interrupted_sketch_goes_on_bit_for_bit(tmp_path, engine, outputs, distribution):
    path = tmp_path / "sketch.safetensors"
    whole = Sketch(_kernel(engine, outputs=outputs), 3, generator=_generator(), distribution=distribution)
    first = Sketch(_kernel(engine, outputs=outputs), 3, generator=_generator(), distribution=distribution)
    for _ in range(2):
        first.save(path)
        first = Sketch.load(path, _kernel(engine, outputs=outputs))  # a new process has new operators
        whole.extend(4)
        first.extend(4)
    assert torch.equal(first._core._probes, whole._core._probes)
    for quantity in ("trace", "frobenius_norm", "effective_rank", "ritz_values"):
        one, other = getattr(first, quantity)(), getattr(whole, quantity)()
        assert torch.equal(one.value, other.value) and torch.equal(one.stderr, other.stderr)
        assert one.seed == other.seed == 3
        assert one.passes >= other.passes  # factors of layers are not in the file, and are made again


def test_dense_tensors_too(tmp_path):
    path = tmp_path / "sketch.safetensors"
    K = _kernel().to_dense().float()
    sketch = Sketch(K, 5, generator=_generator())
    sketch.save(path)
    again = Sketch.load(path, K.clone())
    assert torch.equal(sketch.extend(5).trace().value, again.extend(5).trace().value)


def test_what_differs_is_named(tmp_path):
    path = tmp_path / "sketch.safetensors"
    Sketch(_kernel("autograd"), 4, generator=_generator()).save(path)
    model = CASE.make()
    with torch.no_grad():
        model[0].bias.add_(1e-12)
    with pytest.raises(CheckpointError, match="fingerprint differs: parameters"):
        Sketch.load(path, ntkops.ntk(model, CASE.data(24), engine="autograd"))
    with pytest.raises(CheckpointError, match="fingerprint differs: data"):
        Sketch.load(path, _kernel("autograd", seed=2))
    with pytest.raises(CheckpointError, match="fingerprint differs: data"):
        Sketch.load(path, _kernel("autograd", outputs="trace"))
    with pytest.raises(CheckpointError, match=r"chunk_size 8, now 2; build the operator with the same"):
        Sketch.load(path, _kernel("autograd", chunk_size=2))
    with pytest.raises(CheckpointError, match="batch_size 24, now 5"):
        Sketch.load(path, _kernel("autograd", batch_size=5))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        with pytest.raises(CheckpointError, match=rf"threads {threads}, now {threads + 1}"):
            Sketch.load(path, _kernel("autograd"))
    finally:
        torch.set_num_threads(threads)
    with pytest.raises(CheckpointError, match="cannot be recognised"):
        Sketch(2 * _kernel(), 4).save(path)
    with pytest.raises(CheckpointError, match="no file"):
        Sketch.load(tmp_path / "nothing", _kernel("autograd"))
