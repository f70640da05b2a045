"""Projected gradients in files: values, resumption, fingerprints, one writer, mapped reading."""

import json
import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn

import ntkops
from ntkops import errors
from ntkops.projections import SJLT, Gaussian
from tests.regression.problems import network, reference_jacobian, samples

module = sys.modules["ntkops.regression.gradient_features"]


@pytest.fixture(scope="module")
def case():
    net, x = network(outputs=1), samples(23)
    P = sum(p.numel() for p in net.parameters())
    projection = SJLT(P, 10, seed=5)
    J = reference_jacobian(net, x)
    matrix = projection.apply(torch.eye(P).double()).mT  # (k, P)
    return net, x, projection, J[:, 0] @ matrix.mT


def write(case, path, **options):
    net, x, projection, _ = case
    return ntkops.gradient_features(net, x, projection, path, tile_size=5, **options)


def test_they_are_projected_gradients(case, tmp_path):
    expected = case[-1]
    F = write(case, tmp_path / "made" / "f")
    assert F.shape == (23, 10) and len(F) == 23 and F.dtype == torch.float64 and F.k == 10
    torch.testing.assert_close(F[:], expected)
    seen = 0
    for start, stop, tile in F.tiles():
        assert start == seen and stop - start == len(tile)
        torch.testing.assert_close(tile, expected[start:stop])
        seen = stop
    assert seen == 23
    for rows in (slice(3, 4), slice(4, 17), slice(-3, None), slice(20, 99), slice(7, 7), slice(9, 3)):
        torch.testing.assert_close(F[rows], expected[rows])
    torch.testing.assert_close(F[-1], expected[-1])
    torch.testing.assert_close(F[0], expected[0])
    again = ntkops.GradientFeatures(tmp_path / "made" / "f")
    assert torch.equal(again[:], F[:]) and again.num_samples == 23 and again.tile_size == 5
    again.verify()
    assert "23 x 10" in repr(again) and "5 tiles" in repr(again) and "seed=5" in repr(again)


@pytest.mark.parametrize("row", [23, -24])
def test_rows_that_do_not_exist(case, tmp_path, row):
    F = write(case, tmp_path)
    with pytest.raises(errors.OutOfRangeError, match="23"):
        F[row]
    with pytest.raises(errors.InputError, match="without steps"):
        F[::2]
    with pytest.raises(errors.InputError, match="a row"):
        F[True]


def test_all_outputs_are_sample_major(tmp_path):
    net, x = network(outputs=3), samples(7)
    rows = reference_jacobian(net, x).flatten(0, 1)
    matrix = samples(6, inputs=rows.shape[1], seed=9)
    F = ntkops.gradient_features(net, x, matrix, tmp_path, tile_size=2)
    torch.testing.assert_close(F[:], rows @ matrix.mT)
    assert F.num_outputs == 3 and [stop for _, stop, _ in F.tiles()] == [6, 12, 18, 21]
    # the same numbers again are the same projection
    assert torch.equal(ntkops.gradient_features(net, x, matrix.clone(), tmp_path)[:], F[:])
    with pytest.raises(errors.CheckpointError, match="projection"):
        ntkops.gradient_features(net, x, 2 * matrix, tmp_path)


def test_a_number_of_features_is_a_projection_that_stays(case, tmp_path):
    net, x, _, _ = case
    one = ntkops.gradient_features(net, x, 10, tmp_path / "a")
    two = ntkops.gradient_features(net, x, 10, tmp_path / "b")
    assert torch.equal(one[:], two[:]) and one.k == 10


def test_samples_from_a_loader_in_any_batches(case, tmp_path):
    net, x, projection, expected = case
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x), batch_size=4)
    F = ntkops.gradient_features(net, loader, projection, tmp_path, tile_size=5)
    torch.testing.assert_close(F[:], expected)
    with ntkops.count_passes() as counter:
        write(case, tmp_path)  # the same samples in one tensor
    assert counter.count.per_sample <= 1


def test_a_function_of_labels(tmp_path):
    net, x = network(outputs=3), samples(8)
    y = torch.arange(8) % 3
    params = {name: p.detach() for name, p in net.named_parameters()}

    def margin(p, inputs):
        images, labels = inputs
        logits = torch.func.functional_call(net, p, (images,))
        own = logits.gather(1, labels[:, None])
        others = logits.scatter(1, labels[:, None], -torch.inf)
        return own - others.logsumexp(1, keepdim=True)

    F = ntkops.gradient_features(margin, (x, y), 12, tmp_path, params=params)
    K = ntkops.ntk(margin, (x, y), params=params)
    sketch = ntkops.projected_ntk(K, SJLT(K.num_parameters, 12, seed=0))
    torch.testing.assert_close(F[:], sketch.features())


def test_float32(tmp_path):
    net, x = network(outputs=1, dtype=torch.float32), samples(9, dtype=torch.float32)
    projection = SJLT(sum(p.numel() for p in net.parameters()), 10, seed=5)
    F = ntkops.gradient_features(net, x, projection, tmp_path / "single")
    double = reference_jacobian(network(outputs=1), x.double())[:, 0]
    expected = projection.apply(double)
    assert F.dtype == torch.float32 and (F[:] - expected).norm() < 1e-6 * expected.norm()


# going on


def interrupt(monkeypatch, after):
    """Let the writing of tiles stop after some."""
    save, written = module.save, []

    def stopping(place, *args, **kwargs):
        if len(written) == after:
            raise KeyboardInterrupt
        save(place, *args, **kwargs)
        written.append(place)

    monkeypatch.setattr(module, "save", stopping)


def test_an_interruption_costs_the_tile_at_hand(case, tmp_path, monkeypatch):
    interrupt(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        write(case, tmp_path)
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.glob("tile*")) == [
        "tile-000000.safetensors",
        "tile-000001.safetensors",
    ]
    with pytest.raises(errors.CheckpointError, match="2 of 5 tiles"):
        ntkops.GradientFeatures(tmp_path)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.glob("tile*")}
    F = write(case, tmp_path)
    torch.testing.assert_close(F[:], case[-1])
    assert {p: p.stat().st_mtime_ns for p in times} == times  # kept as they were
    before = {p: p.stat().st_mtime_ns for p in tmp_path.glob("tile*")}
    assert torch.equal(write(case, tmp_path)[:], F[:])
    assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("tile*")} == before


def test_a_tile_that_is_missing_in_the_middle_is_made(case, tmp_path):
    F = write(case, tmp_path)
    first = F[:].clone()
    (tmp_path / "tile-000002.safetensors").unlink()
    with pytest.raises(errors.CheckpointError, match="4 of 5"):
        ntkops.GradientFeatures(tmp_path)
    assert torch.equal(write(case, tmp_path)[:], first)


def test_auto_takes_the_size_that_is_there(case, tmp_path):
    net, x, projection, expected = case
    write(case, tmp_path)
    F = ntkops.gradient_features(net, x, projection, tmp_path)
    assert F.tile_size == 5
    with pytest.raises(errors.CheckpointError, match="sizes"):
        ntkops.gradient_features(net, x, projection, tmp_path, tile_size=6)
    whole = ntkops.gradient_features(net, x, projection, tmp_path / "other")
    assert len(list(whole.tiles())) == 1
    torch.testing.assert_close(whole[:], expected)


# what does not belong together


def changed(case, what):
    net, x, projection, _ = case
    options = {}
    if what == "parameters":
        net = network(outputs=1)
        with torch.no_grad():
            net[0].weight[0, 0] += 1e-9
    if what == "model":
        net = nn.Sequential(net[0], nn.ReLU(), net[2])
    if what == "projection":
        projection = SJLT(projection.dim, 10, seed=6)
    if what == "kind":
        projection = Gaussian(projection.dim, 10, seed=5)
    if what == "samples":
        x = x.clone()
        x[7, 0] += 1e-12
    if what == "order":
        x = x.flip(0)
    if what == "sizes":
        x = x[:22]
    if what == "dtype":
        net, x = network(outputs=1, dtype=torch.float32), x.float()
    if what == "selection":
        options["params"] = ["0.weight"]
        projection = SJLT(48, 10, seed=5)
    return net, x, projection, options


@pytest.mark.parametrize(
    "what, named",
    [
        ("parameters", "parameters"),
        ("model", "model"),
        ("projection", "projection"),
        ("kind", "projection"),
        ("samples", "samples"),
        ("order", "samples"),
        ("sizes", "sizes"),
        ("dtype", "dtype"),
        ("selection", "parameters"),
    ],
)
def test_a_change_is_refused_by_name(case, tmp_path, what, named):
    write(case, tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.glob("tile*")}
    net, x, projection, options = changed(case, what)
    with pytest.raises(errors.CheckpointError, match=rf"differs: .*{named}"):
        ntkops.gradient_features(net, x, projection, tmp_path, **options)
    assert {p.name: p.read_bytes() for p in tmp_path.glob("tile*")} == before


def test_code_that_changed_is_noticed_by_what_it_computes(tmp_path):
    params, x = {"w": samples(4, 1)}, samples(6)

    def state(p, x):
        return torch.tanh(x @ p["w"])

    ntkops.gradient_features(state, x, 2, tmp_path, params=params, tile_size=2)

    def state(p, x):
        return torch.sin(x @ p["w"])

    with pytest.raises(errors.CheckpointError, match="the code of the model"):
        ntkops.gradient_features(state, x, 2, tmp_path, params=params)


def test_tiles_of_two_folders_do_not_mix(case, tmp_path):
    net, x, projection, _ = case
    write(case, tmp_path / "a")
    ntkops.gradient_features(net, x, SJLT(projection.dim, 10, seed=6), tmp_path / "b", tile_size=5)
    name = "tile-000001.safetensors"
    os.replace(tmp_path / "b" / name, tmp_path / "a" / name)
    with pytest.raises(errors.CheckpointError, match="another folder"):
        ntkops.GradientFeatures(tmp_path / "a")
    with pytest.raises(errors.CheckpointError, match="projection"):
        write(case, tmp_path / "a")


@pytest.mark.parametrize("number", range(5))
def test_tiles_of_two_data_sets_do_not_mix(case, tmp_path, number):
    net, x, projection, _ = case
    write(case, tmp_path / "a")
    ntkops.gradient_features(net, samples(23, seed=2), projection, tmp_path / "b", tile_size=5)
    name = f"tile-{number:06d}.safetensors"
    os.replace(tmp_path / "b" / name, tmp_path / "a" / name)
    with pytest.raises(errors.CheckpointError, match="another data set"):
        ntkops.GradientFeatures(tmp_path / "a")
    with pytest.raises(errors.CheckpointError, match="differs: .*samples"):
        write(case, tmp_path / "a")


def test_a_last_tile_of_a_set_that_begins_alike_makes_that_set(case, tmp_path):
    net, x, projection, _ = case
    write(case, tmp_path / "a")
    other = torch.cat([x[:20], x[:3]])
    due = ntkops.gradient_features(net, other, projection, tmp_path / "b", tile_size=5)[:].clone()
    name = "tile-000004.safetensors"
    os.replace(tmp_path / "b" / name, tmp_path / "a" / name)
    assert torch.equal(ntkops.GradientFeatures(tmp_path / "a")[:], due)


def test_tiles_that_were_renamed_are_refused(case, tmp_path):
    F = write(case, tmp_path)
    first, second = F._files[:2]
    first.rename(tmp_path / "other")
    second.rename(first)
    (tmp_path / "other").rename(second)
    with pytest.raises(errors.CheckpointError, match="renamed"):
        ntkops.GradientFeatures(tmp_path)


def test_a_damaged_file_is_refused(case, tmp_path):
    F = write(case, tmp_path)
    place = tmp_path / "tile-000001.safetensors"
    whole = place.read_bytes()
    place.write_bytes(whole[:-9])
    with pytest.raises(errors.CheckpointError, match="no whole safetensors file"):
        ntkops.GradientFeatures(tmp_path)
    place.write_bytes(whole[:-8] + bytes(8))
    with pytest.raises(errors.CheckpointError, match="altered"):
        F.verify()
    place.write_bytes(pickle.dumps({"features": 1}))
    with pytest.raises(errors.CheckpointError, match="pickle"):
        write(case, tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(errors.CheckpointError, match="there is no file"):
        ntkops.GradientFeatures(tmp_path / "nowhere")


# one writer


def test_a_second_writer_is_refused(case, tmp_path):
    script = textwrap.dedent(
        """
        import fcntl, sys

        file = open(sys.argv[1], "ab")
        fcntl.flock(file, fcntl.LOCK_EX)
        print("held", flush=True)
        sys.stdin.read()
        """
    )
    command = [sys.executable, "-c", script, str(tmp_path / "writer.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(errors.CheckpointError, match="another process"):
                write(case, tmp_path)
            assert not list(tmp_path.glob("tile*"))
        finally:
            other.kill()  # the system lets go of its lock
    assert len(write(case, tmp_path)) == 23


def test_what_fails_under_the_lock_is_what_is_raised(case, tmp_path):
    from ntkops.checkpoint import only_writer

    with pytest.raises(FileNotFoundError), only_writer(tmp_path / "lock"):
        raise FileNotFoundError("a reader's own")
    lock = tmp_path / "lock"
    with only_writer(lock), pytest.raises(errors.CheckpointError, match="another"), only_writer(lock):
        pass
    with pytest.raises(errors.CheckpointError, match="locked"), only_writer(tmp_path / "no" / "lock"):
        pass


def test_a_path_that_is_a_file_is_refused(case, tmp_path):
    (tmp_path / "file").write_text("text")
    with pytest.raises(errors.CheckpointError, match="cannot be made"):
        write(case, tmp_path / "file")


# mapped


def test_tiles_are_mapped_and_never_written_to(case, tmp_path):
    F = write(case, tmp_path)
    first = F[:].clone()
    _, _, tile = next(iter(F.tiles()))
    with open("/proc/self/maps") as maps:
        assert any("tile-000000.safetensors" in line for line in maps)
    tile.fill_(7.0)
    F[1:3].mul_(2)
    assert torch.equal(F[:], first)
    F.verify()


def test_the_header_is_json(case, tmp_path):
    write(case, tmp_path)
    data = (tmp_path / "tile-000000.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    document = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["ntkops"])
    assert document["metadata"]["k"] == 10 and "seed=5" in document["metadata"]["projection"]
    assert set(document["fingerprint"]) == {
        "model",
        "parameters",
        "projection",
        "dtype",
        "sizes",
        "samples",
    }


@pytest.mark.parametrize("size", [0, -3, "all", 2.5, True])
def test_a_bad_size(case, tmp_path, size):
    net, x, projection, _ = case
    with pytest.raises(errors.InputError, match="tile_size"):
        ntkops.gradient_features(net, x, projection, tmp_path, tile_size=size)


def test_a_projection_that_does_not_fit(case, tmp_path):
    net, x, projection, _ = case
    with pytest.raises(errors.ShapeError):
        ntkops.gradient_features(net, x, SJLT(projection.dim + 1, 10, seed=5), tmp_path)
    with pytest.raises(errors.InputError):
        ntkops.gradient_features(net, x, "gaussian", tmp_path)
    assert not list(tmp_path.glob("tile*"))
