"""Out of memory: smaller parts from where it happened, the same results, and an error with both numbers."""

import logging

import pytest
import torch
from linear_operator.operators import DiagLinearOperator

import ntkops
from ntkops.engines import AutogradEngine
from ntkops.engines.differentiation import _TorchFunc
from ntkops.engines.memory import Share, parts, retry
from ntkops.errors import OutOfMemoryError
from ntkops.shortage import is_out_of_memory
from ntkops.vectors import Space
from tests.cases import BY_NAME, reference_jacobian
from tests.faults.memory import CPU_TEXT, CUDA_TEXT, short_of_memory
from tests.pairs import pairs

ENGINES = ["autograd", "layerwise"]
MODELS = ["mlp", "conv", "tied", "adapter", "gru-time"]


def _kernel(name, count=7, **options):
    case = BY_NAME[name]
    return ntkops.ntk(case.make(), case.data(count), **case.options, **options)


def _expected(name, count=7, **options):
    return _kernel(name, count, engine="autograd", **options).to_dense()


@pytest.mark.parametrize("name, engine, kind", pairs(MODELS, ENGINES, ["cpu", "cuda"]))
def test_results_are_those_without_the_fault(monkeypatch, name, engine, kind):
    reference = _expected(name)
    K = _kernel(name, engine=engine)
    lazy = _kernel(name, engine=engine, max_dense_bytes=0)
    v = torch.randn(K.shape[0], 3, dtype=torch.float64)
    with short_of_memory(monkeypatch, samples=2, kind=kind) as passed:
        torch.testing.assert_close(lazy @ v, reference @ v)
        torch.testing.assert_close(K.diagonal(), reference.diagonal())
        torch.testing.assert_close(K.to_dense(), reference)
        torch.testing.assert_close(K.left.mT @ v, K.left.to_dense().mT @ v)
    assert max(passed) <= 2


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("outputs", ["all", "each", "trace", 1])
def test_every_choice_of_outputs_and_cross_kernels(monkeypatch, engine, outputs):
    case = BY_NAME["mlp"]
    K = _kernel("mlp", 6, engine=engine, outputs=outputs)
    other = case.data(5, seed=9)
    square, cross = _expected("mlp", 6, outputs=outputs), K.cross(other).to_dense()
    K.free()
    fresh = _kernel("mlp", 6, engine=engine, outputs=outputs)
    with short_of_memory(monkeypatch, samples=2):
        torch.testing.assert_close(fresh.to_dense(), square)
        torch.testing.assert_close(fresh.diagonal(), square.diagonal(dim1=-2, dim2=-1))
        # The trial run of new samples takes up to four of them.
        cross_inputs = fresh.cross(other[:2])
        torch.testing.assert_close(cross_inputs.to_dense(), cross[..., : cross_inputs.shape[-2], :])


@pytest.mark.parametrize("engine", ENGINES)
def test_sample_grams(monkeypatch, engine):
    K = _kernel("mlp", 6, engine=engine)
    w = torch.randn(6, 2, 2, dtype=torch.float64)
    expected = K.sample_gram(w)
    with short_of_memory(monkeypatch, samples=1):
        torch.testing.assert_close(_kernel_without_trial(K).sample_gram(w), expected)


def _kernel_without_trial(K):
    """The same operator with fresh caches; nothing of the model is tried again."""
    import copy

    return copy.deepcopy(K)


def test_products_go_on_from_the_finished_chunks(monkeypatch, caplog):
    K = _kernel("mlp", 6, engine="autograd", max_dense_bytes=0)
    v = torch.randn(12, 20, dtype=torch.float64)
    expected = K @ v
    pull, pulled, failed = _TorchFunc.pull, [], []

    def limited(self, cotangents):
        if len(pulled) == 1 and len(cotangents) > 3:  # the second chunk, and all as wide as it
            failed.append(len(cotangents))
            raise RuntimeError(CPU_TEXT)
        pulled.append(len(cotangents))
        return pull(self, cotangents)

    monkeypatch.setattr(_TorchFunc, "pull", limited)
    with caplog.at_level(logging.WARNING, logger="ntkops"):
        torch.testing.assert_close(K @ v, expected)
    assert pulled[0] == 8 and failed == [8, 4] and pulled == [8, 2, 2, 2, 2, 2, 2]
    assert "out of memory on cpu with chunk_size of 8" in caplog.text and "going on with 4" in caplog.text
    assert K.engine_info.chunk_size == 2  # and stays there
    assert K.with_engine("autograd").engine_info.chunk_size == 8


def test_samples_go_on_from_the_finished_batches(monkeypatch):
    K = _kernel("mlp", 8, engine="autograd", max_dense_bytes=0)
    v = torch.randn(16, 1, dtype=torch.float64)
    expected = K @ v
    with short_of_memory(monkeypatch, samples=3) as passed:
        torch.testing.assert_close(K @ v, expected)
    # One way back and one forward, no batch twice; and one over each batch and its half, which must agree.
    assert passed.count(2) == 4 + 4 + 4 and passed.count(1) == 4 and set(passed) == {1, 2}
    assert K.engine_info.batch_size == 2


@pytest.mark.parametrize("engine", ENGINES)
def test_the_floor_names_both_numbers(monkeypatch, engine):
    K = _kernel("mlp", 4, engine=engine, max_dense_bytes=0)
    dense = _kernel("mlp", 4, engine=engine)
    with short_of_memory(monkeypatch, samples=0):
        for attempt_ in (lambda: K @ torch.ones(8, dtype=torch.float64), dense.to_dense, dense.diagonal):
            with pytest.raises(
                OutOfMemoryError, match=r"even one at a time .* needs about .*B, and .*B are free; choose"
            ):
                attempt_()
    assert issubclass(OutOfMemoryError, MemoryError) and not issubclass(OutOfMemoryError, RuntimeError)
    torch.testing.assert_close(dense.to_dense(), _expected("mlp", 4))  # and is as good as before


def test_sizes_that_were_chosen_stay(monkeypatch):
    K = _kernel("mlp", 6, engine="autograd", batch_size=4, chunk_size=2, max_dense_bytes=0)
    with (
        short_of_memory(monkeypatch, samples=2),
        pytest.raises(OutOfMemoryError, match=r"batch_size=4, as chosen, .* pass a smaller batch_size"),
    ):
        K @ torch.ones(12, 3, dtype=torch.float64)
    assert K.engine_info.batch_size == 4 and K.engine_info.chunk_size == 2


def test_factors_that_do_not_fit_are_left_for_automatic_differentiation(monkeypatch, caplog):
    K = _kernel("mlp", 6, engine="layerwise", max_dense_bytes=0)
    v = torch.randn(12, 9, dtype=torch.float64)
    expected = _expected("mlp", 6) @ v

    def fail(*_):
        raise torch.OutOfMemoryError(CUDA_TEXT)

    import ntkops.engines.factor_cache as factor_cache

    monkeypatch.setattr(factor_cache, "prepare_products", fail)
    monkeypatch.setattr(factor_cache, "prepare_readout", fail)
    with caplog.at_level(logging.WARNING, logger="ntkops"):
        torch.testing.assert_close(K @ v, expected)
    assert "going on by automatic differentiation" in caplog.text
    assert (K.engine_info.engine, K.engine_info.batch_size) == ("layerwise", 6)


def test_streams_are_not_read_again_for_smaller_batches(monkeypatch):
    case = BY_NAME["mlp"]
    x = case.data(12)

    class Source:
        reads = 0

        def __iter__(self):
            Source.reads += 1
            return iter(x.split(6))

    reference = ntkops.ntk(case.make(), x).to_dense()
    K = ntkops.ntk(case.make(), Source(), engine="autograd", max_dense_bytes=0)
    Source.reads = 0
    v = torch.randn(24, 1, dtype=torch.float64)
    with short_of_memory(monkeypatch, samples=3):
        torch.testing.assert_close(K @ v, reference @ v)
    assert Source.reads == 2  # one for each side, as without the fault


def test_what_is_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError(CUDA_TEXT)) and is_out_of_memory(RuntimeError(CPU_TEXT))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(OutOfMemoryError("ours")) and not is_out_of_memory(ValueError(CPU_TEXT))
    assert not is_out_of_memory(ntkops.errors.DenseMemoryError("ours"))


def test_torch_says_it_in_these_words():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def _share(limits, most=8):
    return Share(
        "things",
        lambda: limits.get("size", most),
        lambda failed: limits.update(size=failed // 2),
        torch.device("cpu"),
        lambda: 1,
    )


def test_parts_are_nested_and_the_outer_one_gives_way_first():
    outer, inner, done = {}, {}, []

    def work(a, b):
        for _ in parts(6, _share(inner, 6), lambda c, d: one(b - a, d - c)):
            pass

    def one(columns, samples):
        if columns * samples > 4:
            raise MemoryError
        done.append((columns, samples))

    for _ in parts(8, _share(outer), work):
        pass
    assert outer == {"size": 1} and inner == {"size": 3}
    assert sum(c * s for c, s in done) == 48


def test_other_exceptions_pass_through():
    limits = {}
    for error in (ValueError("no"), RuntimeError("shapes"), KeyboardInterrupt()):

        def work(error=error):
            raise error

        with pytest.raises(type(error)):
            retry(_share(limits), 4, work)
    assert limits == {}


def test_even_parts_stay_even_and_change_only_with_the_fault():
    limits = {}
    spans = [(a, b) for a, b, _ in parts(10, _share(limits, 4), lambda a, b: None, even=True)]
    assert spans == [(0, 4), (4, 8), (8, 10)]


@pytest.mark.parametrize("tile", [1, 2, 3, 5])
def test_symmetric_kernels_of_small_tiles(monkeypatch, tile):
    case = BY_NAME["mlp"]
    J = reference_jacobian(case, case.make(), case.data(7))
    gradients = AutogradEngine.of

    def limited(self, params, inputs, cotangents):
        if inputs.num_samples > tile:
            raise MemoryError
        return gradients(self, params, inputs, cotangents)

    monkeypatch.setattr(AutogradEngine, "of", limited)
    found = _kernel("mlp", 7, engine="autograd").to_dense()
    torch.testing.assert_close(found, J @ J.mT)
    assert torch.equal(found, found.mT)


def test_sketches_and_orthonormalising_say_what_memory_was_for(monkeypatch):
    space = Space(2**50, torch.float32)
    with pytest.raises(OutOfMemoryError, match="drawing 8 columns of 1125899906842624"):
        space.probes(8, torch.Generator())
    wide = torch.ones(1).expand(2**45, 4)
    for block in (wide, wide.expand(2, -1, -1)):
        with pytest.raises(OutOfMemoryError, match="orthonormalising 4 columns"):
            Space(2**45, torch.float32).orthonormalize(block)
    vast = DiagLinearOperator(torch.ones(1, dtype=torch.float64).expand(2**44))
    for estimate in (
        lambda: ntkops.trace(vast, method="hutch++", num_passes=60),
        lambda: ntkops.eigsh(vast, k=3),
        lambda: ntkops.spectral_density(vast),
        lambda: ntkops.logdet(vast, 1.0, method="slq"),
    ):
        with pytest.raises(OutOfMemoryError, match="take fewer columns"):
            estimate()


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_memory_that_runs_out_beside_products_is_named(monkeypatch, method):
    K = _kernel("mlp", 12, max_dense_bytes=0)
    joined = torch.cat

    def short(parts, *args, **kwargs):
        if any(isinstance(part, torch.Tensor) and part.dim() >= 2 for part in parts):
            raise RuntimeError(CPU_TEXT)
        return joined(parts, *args, **kwargs)

    monkeypatch.setattr(torch, "cat", short)
    with pytest.raises(OutOfMemoryError):
        ntkops.trace(K, method=method, num_passes=40)
