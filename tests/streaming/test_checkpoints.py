"""Exact work that is interrupted and goes on, bit for bit; files that do not belong are refused."""

import pytest
import torch

import ntkops
from ntkops import NTKOperator, checkpoint
from ntkops.engines import tiles
from ntkops.errors import CheckpointError, InputError
from ntkops.estimators import _quantities
from tests.pairs import pairs
from tests.streaming.sources import Counted, made, samples, uneven

N = 19


@pytest.fixture(autouse=True)
def many_steps(monkeypatch):
    """Cut the work into many tiles and parts."""
    monkeypatch.setattr(tiles, "_HELD_BYTES", 250)
    monkeypatch.setattr(NTKOperator, "tile_size", lambda self: 12)
    monkeypatch.setattr(NTKOperator, "diagonal_step", lambda self: 4)


def _kernel(seed=0, model_change=0.0, **options):
    model, shape = made("mlp", torch.float32)
    with torch.no_grad():
        model[0].bias += model_change
    x = samples(N, *shape, dtype=torch.float32, seed=seed)
    options = {"x": Counted(x, uneven(N)), **options}
    return ntkops.ntk(model, options.pop("x"), **options)


def _target():
    y = samples(3 * N, 2, dtype=torch.float32, seed=9)
    return y @ y.mT


WORK = {
    "trace": lambda K, **options: ntkops.trace(K, **options),
    "frobenius_norm": lambda K, **options: ntkops.frobenius_norm(K, **options),
    "effective_rank": lambda K, **options: ntkops.effective_rank(K, **options),
    "inner": lambda K, **options: ntkops.inner(K, _target(), **options),
    "alignment": lambda K, **options: ntkops.alignment(K, _kernel(seed=1), **options),
}


class Interrupter:
    """Raises KeyboardInterrupt when a step is about to be added up."""

    def __init__(self, monkeypatch) -> None:
        self.left = -1
        plain, summed = _quantities._tile_sums, NTKOperator.diagonal_parts

        def count():
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

        def tiles(*arguments):
            count()
            return plain(*arguments)

        def parts(*arguments):
            for part in summed(*arguments):
                count()
                yield part

        monkeypatch.setattr(_quantities, "_tile_sums", tiles)
        monkeypatch.setattr(NTKOperator, "diagonal_parts", parts)


@pytest.mark.parametrize("quantity, engine, stop", pairs(WORK, ["layerwise", "autograd"], [1, 3]))
def test_an_interrupted_run_goes_on_with_the_same_bits(quantity, engine, stop, tmp_path, monkeypatch):
    work, interrupter = WORK[quantity], Interrupter(monkeypatch)
    whole = work(_kernel(engine=engine), checkpoint=tmp_path / "whole")
    for after in (stop, 2):  # interrupted twice
        interrupter.left = after
        with pytest.raises(KeyboardInterrupt):
            work(_kernel(engine=engine), checkpoint=tmp_path / "cut")
    interrupter.left = -1
    found = work(_kernel(engine=engine), checkpoint=tmp_path / "cut")
    assert torch.equal(found.value, whole.value)
    assert found.exact
    assert found.passes >= whole.passes  # what was interrupted is made again
    torch.testing.assert_close(
        whole.value, work(_kernel(engine=engine), method="exact").value, rtol=1e-6, atol=0
    )


@pytest.mark.parametrize("quantity", ["trace", "frobenius_norm"])
def test_finished_work_is_not_done_again(quantity, tmp_path, monkeypatch):
    first = WORK[quantity](_kernel(), checkpoint=tmp_path / "file")
    monkeypatch.setattr(NTKOperator, "_block", None)
    monkeypatch.setattr(NTKOperator, "_block_row", None)
    monkeypatch.setattr(NTKOperator, "_within", None)
    again = WORK[quantity](_kernel(), checkpoint=tmp_path / "file")
    assert torch.equal(again.value, first.value)
    assert again.passes == first.passes


@pytest.mark.parametrize("every", [0, 1e9])
def test_the_file_is_written_as_often_as_asked(every, tmp_path, monkeypatch):
    written = []
    save = checkpoint.save
    monkeypatch.setattr(
        "ntkops.checkpoint.save", lambda *a, **k: (written.append(a[2]["done"]), save(*a, **k))
    )
    ntkops.frobenius_norm(_kernel(), checkpoint=tmp_path / "file", checkpoint_every=every)
    tiles = 5 * 6 // 2  # of 12 of 57 rows
    assert written == ([*range(1, tiles + 1), tiles] if every == 0 else [tiles])


def test_sizes_and_threads_are_followed(tmp_path, monkeypatch):
    """A file decides how the work goes on, whatever is free now, and how many threads there are."""
    whole = ntkops.frobenius_norm(_kernel(batch_size=4, chunk_size=2), checkpoint=tmp_path / "whole")
    interrupter = Interrupter(monkeypatch)
    interrupter.left = 7
    with pytest.raises(KeyboardInterrupt):
        ntkops.frobenius_norm(_kernel(batch_size=4, chunk_size=2), checkpoint=tmp_path / "cut")
    monkeypatch.setattr(NTKOperator, "tile_size", lambda self: 30)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        found = ntkops.frobenius_norm(_kernel(batch_size=9, chunk_size=5), checkpoint=tmp_path / "cut")
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found.value, whole.value)


def test_the_kernel_itself_stays_as_it_is(tmp_path):
    K = _kernel()
    engine = K._core.engine
    ntkops.frobenius_norm(K, checkpoint=tmp_path / "file")
    assert K._core.engine is engine
    assert engine._room.kept_workspace is None


# files that are refused


@pytest.fixture
def cut(tmp_path, monkeypatch):
    """Return the file of an interrupted norm."""
    with monkeypatch.context() as inside:
        Interrupter(inside).left = 5
        with pytest.raises(KeyboardInterrupt):
            ntkops.frobenius_norm(_kernel(), checkpoint=tmp_path / "cut")
    return tmp_path / "cut"


def test_other_data_parameters_and_quantities_are_refused(cut):
    with pytest.raises(CheckpointError, match="data"):
        ntkops.frobenius_norm(_kernel(seed=1), checkpoint=cut)
    with pytest.raises(CheckpointError, match="parameters"):
        ntkops.frobenius_norm(_kernel(model_change=1e-3), checkpoint=cut)
    with pytest.raises(CheckpointError, match="quantity"):
        ntkops.effective_rank(_kernel(), checkpoint=cut)
    with pytest.raises(CheckpointError, match="data"):
        ntkops.frobenius_norm(_kernel(outputs="trace"), checkpoint=cut)
    with pytest.raises(CheckpointError, match="engine"):
        ntkops.frobenius_norm(_kernel(engine="autograd"), checkpoint=cut)


@pytest.mark.parametrize("damage", ["truncated", "altered", "foreign", "text"])
def test_damaged_and_foreign_files_are_refused(damage, cut):
    content = bytearray(cut.read_bytes())
    if damage == "truncated":
        cut.write_bytes(content[:-5])
    elif damage == "altered":
        content[-3] ^= 1
        cut.write_bytes(content)
    elif damage == "foreign":
        checkpoint.save(cut, {"sums": torch.zeros(1)}, {}, kind="track")
    else:
        cut.write_text("nothing of ours")
    before = cut.read_bytes()
    with pytest.raises(CheckpointError):
        ntkops.frobenius_norm(_kernel(), checkpoint=cut)
    assert cut.read_bytes() == before


def test_what_no_file_can_hold_is_refused(tmp_path):
    K = _kernel()
    with pytest.raises(InputError, match="keeps exact work"):
        ntkops.trace(K, method="hutch++", checkpoint=tmp_path / "file")
    with pytest.raises(InputError, match="differentiable"):
        ntkops.trace(K, differentiable=True, checkpoint=tmp_path / "file")
    with pytest.raises(InputError, match="checkpoint="):
        ntkops.trace(K, checkpoint=3)
    with pytest.raises(InputError, match="checkpoint_every"):
        ntkops.trace(K, checkpoint=tmp_path / "file", checkpoint_every=-1)
    with pytest.raises(CheckpointError, match="no folder"):
        ntkops.trace(K, checkpoint=tmp_path / "none" / "file")
    with pytest.raises(CheckpointError, match="cannot be recognised"):
        ntkops.frobenius_norm(K + K, checkpoint=tmp_path / "file")


def test_dense_tensors_are_kept_too(tmp_path):
    matrix = _target()
    found = ntkops.frobenius_norm(matrix, checkpoint=tmp_path / "file")
    torch.testing.assert_close(float(found), float(matrix.double().norm()), rtol=1e-12, atol=0)
    with pytest.raises(CheckpointError, match="operator"):
        ntkops.frobenius_norm(2 * matrix, checkpoint=tmp_path / "file")


# progress


@pytest.mark.parametrize(
    ("work", "shown"),
    [
        (lambda K: ntkops.frobenius_norm(K, method="exact", progress=True), "15/15"),
        (lambda K: ntkops.trace(K, method="exact", progress=True), "57/57"),
        (lambda K: ntkops.diagonal(K, method="exact", progress=True), "57/57"),
        (lambda K: ntkops.partial_trace(K, "samples", method="exact", progress=True), "19/19"),
    ],
    ids=["norm", "trace", "diagonal", "partial trace"],
)
def test_exact_work_shows_how_far_it_is(work, shown, capsys):
    work(_kernel())
    assert shown in capsys.readouterr().err
