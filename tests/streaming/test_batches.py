"""Arrays and columns that are read slice by slice."""

import pickle

import numpy as np
import pytest
import torch

import ntkops
from ntkops.errors import InputError
from tests.streaming.sources import Sliced, made, samples

N = 23


def _stored(tmp_path, dtype=np.float64):
    values = samples(N, 3).numpy().astype(dtype)
    mapped = np.memmap(tmp_path / "x.bin", dtype=dtype, mode="w+", shape=values.shape)
    mapped[:] = values
    mapped.flush()
    return np.memmap(tmp_path / "x.bin", dtype=dtype, mode="r", shape=values.shape), values


class Table:
    """A data set of columns whose slices are dicts of lists."""

    def __init__(self, **columns) -> None:
        self.columns, self.column_names, self.read = columns, list(columns), []

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, rows):
        self.read.append((rows.start, rows.stop))
        return {name: list(column[rows]) for name, column in self.columns.items()}

    def select_columns(self, names):
        return Table(**{name: self.columns[name] for name in names})


class Two(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = torch.nn.Embedding(5, 3), torch.nn.Linear(3, 2)
        self.double()

    def forward(self, number, value):
        return self.head(self.table(number) * value)


def test_a_mapped_array_gives_the_same_kernel(tmp_path):
    mapped, values = _stored(tmp_path)
    model, _ = made("mlp")
    batches = ntkops.Batches(mapped, 5)
    assert (len(batches), batches.num_samples, batches.batch_size) == (5, N, 5)
    K, held = ntkops.ntk(model, batches), ntkops.ntk(model, torch.from_numpy(values))
    found, wanted = (ntkops.trace(one, method="exact").value for one in (K, held))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=0)
    norms = [ntkops.frobenius_norm(one, method="exact").value for one in (K, held)]
    torch.testing.assert_close(*norms, rtol=1e-12, atol=0)
    assert np.array_equal(mapped, values)


def test_batches_are_copies_and_a_sequence(tmp_path):
    mapped, values = _stored(tmp_path, ">f4")  # of the other byte order
    batches = ntkops.Batches(mapped, 10, dtype=torch.float64)
    assert [len(batch) for batch in batches] == [10, 10, 3]
    assert torch.equal(batches[-1], torch.from_numpy(values[20:].astype(np.float64)))
    assert torch.equal(torch.cat(batches[1:]), torch.from_numpy(values[10:].astype(np.float64)))
    batches[0].zero_()
    assert np.array_equal(mapped, values)
    with pytest.raises(IndexError, match="there are 3"):
        batches[3]
    again = pickle.loads(pickle.dumps(ntkops.Batches(values, 10)))
    assert len(again) == 3


def test_arrays_are_read_by_slices_alone():
    array = Sliced(samples(N, 3).numpy())
    model, _ = made("mlp")
    K = ntkops.ntk(model, ntkops.Batches(array, 5))
    array.read.clear()
    ntkops.trace(K, method="exact")
    assert array.read == [(0, 5), (5, 10), (10, 15), (15, 20), (20, N)]


@pytest.mark.parametrize("kind", ["tuple", "mapping", "table", "renamed"])
def test_columns_become_arguments(kind):
    number, value = torch.arange(N) % 5, samples(N, 1).numpy()
    table = Table(number=number.numpy(), value=value, name=np.array(["a"] * N))
    batches = {
        "tuple": lambda: ntkops.Batches((number, value), 6),
        "mapping": lambda: ntkops.Batches({"number": number, "value": value}, 6),
        "table": lambda: ntkops.Batches(table, 6, columns=["number", "value"]),
        "renamed": lambda: ntkops.Batches(
            Table(n=number.numpy(), v=value.astype(np.float32)),
            6,
            columns={"number": "n", "value": "v"},
            dtype={"value": torch.float64},
        ),
    }[kind]()
    model = Two()
    found = ntkops.trace(ntkops.ntk(model, batches), method="exact").value
    wanted = ntkops.trace(ntkops.ntk(model, (number, torch.from_numpy(value))), method="exact").value
    torch.testing.assert_close(found, wanted, rtol=1e-6 if kind == "renamed" else 1e-12, atol=0)


def test_dtypes():
    pixels = np.arange(12, dtype=np.uint8).reshape(4, 3)
    assert ntkops.Batches(pixels, 2)[0].dtype == torch.uint8
    assert ntkops.Batches(pixels, 2, dtype=torch.float32)[0].dtype == torch.float32
    both = ntkops.Batches((pixels, pixels.astype(float)), 2, dtype=torch.float32)[0]
    assert [one.dtype for one in both] == [torch.uint8, torch.float32]
    columns = Table(a=[torch.zeros(3)] * 4)
    assert ntkops.Batches(columns, 3, columns="a")[0].shape == (3, 3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ntkops.Batches(np.zeros((4, 2)), 0), "batch_size=0"),
        (lambda: ntkops.Batches(np.zeros((0, 2)), 2), "no samples"),
        (lambda: ntkops.Batches((np.zeros(4), np.zeros(5)), 2), "different lengths"),
        (lambda: ntkops.Batches(np.zeros((4, 2)), 2, columns="x"), "columns="),
        (lambda: ntkops.Batches(Table(a=[[1.0], [2.0]]), 2, columns=["b"]), "there is no"),
        (lambda: ntkops.Batches(Table(a=["x", "y"]), 2), "no numbers"),
        (lambda: ntkops.Batches(iter([1]), 2), "no slices"),
        (lambda: ntkops.Batches(np.zeros((4, 2)), 2, dtype="float32"), "torch.dtype"),
        (lambda: ntkops.Batches({"a": np.zeros(4)}, 2, dtype={"b": torch.float32}), "dtype names"),
        (lambda: ntkops.Batches(Table(a=[[1.0], [2.0, 3.0]]), 2)[0], "different shapes"),
    ],
)
def test_what_cannot_be_read_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_what_is_passed_directly_is_refused_with_the_way_out(tmp_path):
    mapped, _ = _stored(tmp_path)
    model, _ = made("mlp")
    for source in (mapped, Sliced(mapped), Table(x=mapped)):
        with pytest.raises(InputError, match=r"ntkops\.Batches"):
            ntkops.ntk(model, source)
