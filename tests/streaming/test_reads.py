"""How often a source is read, and that what comes out is what samples in memory give."""

import pytest
import torch

import ntkops
from ntkops.engines import tiles
from ntkops.errors import NonDeterministicDataError
from ntkops.estimators import _stratified_grams
from ntkops.model import linearize
from ntkops.model.inputs import joined
from ntkops.operators.capabilities import capabilities
from tests.pairs import pairs
from tests.streaming.sources import MODELS, Counted, Reused, made, samples, uneven

N = 23
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture
def small_parts(monkeypatch):
    """Keep a few samples in memory at a time, so that a pass has many parts."""
    monkeypatch.setattr(tiles, "_HELD_BYTES", 500)


def _pair(name, dtype=torch.float64, engine="auto", **options):
    """Return a streamed kernel with its source, and the same kernel in memory."""
    model, shape = made(name, dtype)
    x = samples(N, *shape, dtype=dtype)
    source = Counted(x, uneven(N))
    streamed = ntkops.ntk(model, source, engine=engine, **options)
    source.clear()
    return streamed, source, ntkops.ntk(model, x, engine=engine, **options)


def _close(found, wanted, dtype=torch.float64):
    scale = wanted.abs().max()
    assert found.shape == wanted.shape
    assert float((found - wanted).abs().max()) <= TOLERANCE[dtype] * float(scale)


QUANTITIES = {
    "trace": lambda K: ntkops.trace(K, method="exact").value,
    "diagonal": lambda K: ntkops.diagonal(K, method="exact").value,
    "partial trace": lambda K: ntkops.partial_trace(K, "samples", method="exact").value,
    "stratified trace": lambda K: (
        ntkops.trace(K, method="stratified", num_passes=1, generator=torch.Generator().manual_seed(1)).value
    ),
}


@pytest.mark.parametrize(
    "quantity, name, engine, dtype",
    pairs(QUANTITIES, MODELS, ["layerwise", "autograd"], [torch.float64, torch.float32]),
    ids=str,
)
def test_one_pass_is_enough(quantity, name, engine, dtype, small_parts):
    streamed, source, held = _pair(name, dtype, engine)
    found = QUANTITIES[quantity](streamed)
    peeked = source.sizes[0] if quantity == "partial trace" else 0  # the cost model looks at one sample
    assert source.samples in (N, N + peeked)
    _close(found, QUANTITIES[quantity](held), dtype)


@pytest.mark.parametrize("engine", ["layerwise", "autograd"])
def test_traces_of_every_class_take_one_pass(engine, small_parts):
    streamed, source, held = _pair("mlp", engine=engine, outputs="each")
    found = ntkops.trace(streamed, method="exact").value
    assert (source.passes, source.samples) == (1, N)
    assert found.shape == (3,)
    _close(found, ntkops.trace(held, method="exact").value)


@pytest.mark.parametrize("name", ["mlp", "narrow", "conv"])
def test_the_diagonal_of_an_operator_takes_one_pass(name, small_parts):
    streamed, source, held = _pair(name)
    found = streamed.diagonal()
    assert (source.passes, source.samples) == (1, N)
    _close(found, held.diagonal())


@pytest.mark.parametrize("part", ["rows", "gaussian", "kronecker"])
def test_projected_features_and_rows_take_one_pass(part, small_parts):
    model, shape = made("mlp")
    x = samples(N, *shape)
    source = Counted(x, uneven(N))
    J, held = ntkops.jacobian(model, source), ntkops.jacobian(model, x)
    K = ntkops.ntk(model, source)
    source.clear()
    if part == "rows":
        found, wanted = J.to_dense(), held.to_dense()
    else:
        kind = {"gaussian": ntkops.projections.Gaussian, "kronecker": ntkops.projections.LayerKronecker}[part]
        size = K.num_parameters if part == "gaussian" else [p.shape for p in model.parameters()]
        projection = kind(size, 4, seed=0)
        found = ntkops.projected_ntk(K, projection).features()
        wanted = ntkops.projected_ntk(ntkops.ntk(model, x), projection).features()
    assert (source.passes, source.samples) == (1, N)
    _close(found, wanted)


# tiles


@pytest.mark.parametrize("name, engine, size", pairs(MODELS, ["layerwise", "autograd"], [8, 30, 1000]))
def test_tiles_read_once_a_row(name, engine, size, small_parts):
    streamed, source, held = _pair(name, engine=engine)
    tiles, wanted = list(capabilities(streamed).tiles(size)), held.to_dense()
    rows = len({tile.rows.start for tile in tiles})
    assert source.passes <= rows
    dense = torch.zeros_like(wanted)
    for tile in tiles:
        dense[tile.rows, tile.cols] = tile.block
        dense[tile.cols, tile.rows] = tile.block.mT
    _close(dense, wanted)


def test_tiles_of_cross_kernels_read_rows_once(small_parts):
    model, shape = made("mlp")
    x, y = samples(N, *shape), samples(17, *shape, seed=1)
    one, other = Counted(x, uneven(N)), Counted(y, uneven(17, 5))
    K = ntkops.ntk(model, one, other, outputs="trace")
    one.clear()
    other.clear()
    tiles = list(capabilities(K).tiles(6))
    assert one.passes == 1
    assert other.passes == -(-N // 6)
    dense = torch.cat([torch.cat([t.block for t in tiles if t.rows.start == r], 1) for r in range(0, N, 6)])
    _close(dense, ntkops.ntk(model, x, y, outputs="trace").to_dense())


def test_a_sequence_of_batches_is_not_read_before_what_is_wanted(small_parts):
    model, shape = made("mlp")
    x = samples(N, *shape)
    read = []

    class Recorded(list):
        def __getitem__(self, index):
            read.append(index)
            return super().__getitem__(index)

    K = ntkops.ntk(model, Recorded(x.split(5)), outputs="trace")
    read.clear()
    found = list(capabilities(K).tiles(10))
    assert read == [*range(5), *range(2, 5)]  # the last rows are what was read last
    assert len(found) == 6


@pytest.mark.parametrize("engine", ["layerwise", "autograd"])
@pytest.mark.parametrize("name", MODELS)
def test_dense_kernels_read_once_a_row_of_tiles(name, engine, small_parts):
    streamed, source, held = _pair(name, engine=engine)
    _close(streamed.to_dense(), held.to_dense())
    # 500 bytes hold 5 or 20 samples; layers of automatic differentiation read again.
    assert source.passes <= 2 * (1 + N // 5)


@pytest.mark.parametrize("quantity", ["frobenius_norm", "effective_rank"])
@pytest.mark.parametrize("method", ["exact", "stratified"])
def test_norms_agree(quantity, method, monkeypatch, small_parts):
    monkeypatch.setattr(_stratified_grams, "_ENTRIES", 400)
    streamed, source, held = _pair("mlp")
    options = {"method": method, "num_passes": 8 if method == "stratified" else None}
    found, wanted = (
        getattr(ntkops, quantity)(K, generator=torch.Generator().manual_seed(0), **options)
        for K in (streamed, held)
    )
    torch.testing.assert_close(found.value, wanted.value, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.stderr, wanted.stderr, rtol=1e-9, atol=1e-12)
    if method == "stratified":  # 5 samples a part: 9 parts, of which the first stays while the others pass
        assert source.passes <= 1 + N // 5


def test_alignment_and_inner_agree_with_a_target_in_memory():
    streamed, _, held = _pair("mlp", outputs="trace")
    y = samples(N, 2, seed=5)
    target = y @ y.mT
    for quantity in (ntkops.alignment, ntkops.inner):
        found, wanted = (quantity(K, target, method="exact").value for K in (streamed, held))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)


# products, sketch, conjugate gradients


def test_products_hold_no_more_than_a_batch_of_the_source():
    streamed, source, held = _pair("mlp", max_dense_bytes=0)
    assert streamed.engine_info.batch_size == max(source.sizes)
    V = samples(3 * N, 4, seed=2)
    for _ in range(6):  # enough to pay for factors, which are not kept of a stream
        found = streamed @ V
    _close(found, held @ V)
    assert streamed.free() == 0


def test_a_sketch_of_a_stream_agrees():
    streamed, _, held = _pair("mlp", max_dense_bytes=0)
    one, other = (ntkops.Sketch(K, 8, generator=torch.Generator().manual_seed(0)) for K in (streamed, held))
    for name in ("trace", "frobenius_norm", "effective_rank"):
        torch.testing.assert_close(
            getattr(one, name)().value, getattr(other, name)().value, rtol=1e-10, atol=0
        )


def test_a_saved_sketch_of_a_stream_goes_on_with_the_same_bits(tmp_path):
    model, shape = made("mlp")
    x = samples(N, *shape)

    def kernel(y=x):
        return ntkops.ntk(model, Counted(y, uneven(N)), batch_size=6, chunk_size=4, max_dense_bytes=0)

    sketch = ntkops.Sketch(kernel(), 5, generator=torch.Generator().manual_seed(0))
    sketch.save(tmp_path / "sketch")
    found = ntkops.Sketch.load(tmp_path / "sketch", kernel()).extend(4).trace()
    assert torch.equal(found.value, sketch.extend(4).trace().value)
    with pytest.raises(ntkops.NtkopsError, match="data"):
        ntkops.Sketch.load(tmp_path / "sketch", kernel(x + 1))


def test_conjugate_gradients_on_a_stream():
    streamed, _, held = _pair("mlp", outputs="trace")
    y = samples(N, 1, seed=4)
    dense, streamed = held.to_dense(), streamed.with_engine(batch_size=6)
    found = streamed.add_jitter(1.0).solve(y)
    wanted = torch.linalg.solve(dense + torch.eye(N), y)
    _close(found, wanted, torch.float32)


# what may go wrong


def test_a_source_may_write_over_its_last_batch(small_parts):
    model, shape = made("mlp")
    x = samples(N, *shape)
    K, held = ntkops.ntk(model, Reused(x, 6), batch_size=4), ntkops.ntk(model, x)
    _close(ntkops.trace(K, method="exact").value, ntkops.trace(held, method="exact").value)
    norms = [ntkops.frobenius_norm(one, method="exact").value for one in (K, held)]
    torch.testing.assert_close(*norms, rtol=1e-12, atol=0)
    v = samples(3 * N, 1, seed=2)
    _close(K @ v, held @ v)


def test_exchanged_entries_are_another_data_set():
    model, shape = made("conv")
    x = torch.zeros(6, *shape, dtype=torch.float64)
    x[:, 0, 0] = 1.0  # bits with many zeros behind them
    source = Counted(x, [4, 2])
    K = ntkops.ntk(model, source)
    source.x = x.flip(-1)
    with pytest.raises(NonDeterministicDataError, match="batch 0"):
        ntkops.trace(K, method="exact")


@pytest.mark.parametrize("change", ["more", "fewer", "none"])
def test_a_source_that_changes_its_length_is_refused(change, small_parts):
    model, shape = made("mlp")
    x = samples(20, *shape)
    source = Counted(x, [5] * 4)
    K = ntkops.ntk(model, source)
    source.x = {"more": torch.cat([x, x[:5]]), "fewer": x[:15], "none": x[:0]}[change]
    source.sizes = {"more": [5] * 5, "fewer": [5] * 3, "none": [0]}[change]
    with pytest.raises(ntkops.NtkopsError):
        ntkops.trace(K, method="exact")


def test_batches_of_other_shapes_are_read_together_and_not_joined():
    model = torch.nn.Sequential(
        torch.nn.AdaptiveAvgPool1d(2), torch.nn.Flatten(), torch.nn.Linear(4, 2)
    ).double()
    source = [samples(4, 2, 5), samples(4, 2, 7)]
    inputs = linearize(model).inputs(source)
    between = inputs.in_order()
    assert between(0, 4).num_samples == 4
    both = between(2, 6)
    assert both.num_samples == 4 and not both.is_one_batch
    parts = [(start, stop, batch.tensors[0]) for start, stop, batch in both.batches(3)]
    assert [part[:2] for part in parts] == [(0, 2), (2, 3), (3, 4)]
    assert torch.equal(parts[0][2], source[0][2:]) and torch.equal(parts[1][2], source[1][:1])
    again = joined([between(0, 4), between(4, 8)]).select(torch.tensor([7, 1, 0]))
    found = [batch.tensors[0] for _, _, batch in again.batches()]
    assert torch.equal(found[0], source[1][3:]) and torch.equal(found[1], source[0][[1, 0]])


# ranges in order


def test_ranges_are_read_in_order_and_again():
    model, shape = made("mlp")
    x = samples(30, *shape)
    source = Counted(x, uneven(30))
    inputs = linearize(model).inputs(source)
    source.clear()
    between = inputs.in_order()

    def content(start, stop):
        (_, _, batch) = next(iter(between(start, stop).batches(None)))
        return batch.tensors[0]

    for start, stop in [(0, 4), (4, 9), (4, 6), (6, 9), (8, 20), (22, 23), (23, 30)]:
        assert torch.equal(content(start, stop), x[start:stop])
    assert source.passes == 1
    assert torch.equal(content(2, 30), x[2:])
    assert source.passes == 2
    both = joined([between(0, 3), between(10, 12)])
    (_, _, batch) = next(iter(both.batches(None)))
    assert torch.equal(batch.tensors[0], torch.cat([x[:3], x[10:12]]))


def test_the_parts_are_small(monkeypatch):
    monkeypatch.setattr(tiles, "_HELD_BYTES", 3 * 8 * 4)
    model, shape = made("mlp")
    x = samples(30, *shape)
    inputs = linearize(model).inputs(Counted(x, uneven(30)))
    assert max(stop - start for start, stop, _ in tiles.sample_slices(inputs, 100)) == 4
    held = linearize(model).inputs(x)
    ((start, stop, part),) = tiles.sample_slices(held, 100)
    assert (start, stop) == (0, 30)
    assert part is held
