"""Samples that differ in length: rows are real positions, on every route, and padding is checked."""

from __future__ import annotations

import functools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import ntkops
from ntkops.engines import tiles
from ntkops.errors import InputError, NonDeterministicDataError, OutputError, ShapeError

from ..laws.reference import close, normal

LENGTHS = (4, 2, 5, 1, 3, 5)
NEW = (7, 2, 3)
C = 2
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5}
ENGINES = ("auto", "autograd")


class Attention(nn.Module):
    """Positions that see each other where the mask lets them; outputs (samples, positions, classes)."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.key, self.head = nn.Linear(3, 4), nn.Linear(4, 4), nn.Linear(4, C)
        self.scale = nn.Parameter(torch.tensor(0.8))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        hidden = torch.tanh(self.embed(x))
        scores = self.key(hidden) @ hidden.mT * self.scale
        if mask is not None:
            scores = scores.masked_fill(~mask[:, None], float("-inf"))
        return self.head(scores.softmax(-1) @ hidden + hidden)


def model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return Attention().to(dtype)


def sequences(lengths: tuple[int, ...] = LENGTHS, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    return [normal(n, 3, seed=10 + n + 7 * i, dtype=torch.float32).to(dtype) for i, n in enumerate(lengths)]


def pad(some: list[Tensor], side: str = "right") -> dict[str, Tensor]:
    x = nn.utils.rnn.pad_sequence(some, batch_first=True, padding_side=side)
    ones = [torch.ones(len(one), dtype=torch.long) for one in some]
    mask = nn.utils.rnn.pad_sequence(ones, batch_first=True, padding_side=side)
    return {"x": x, "mask": mask.bool()}


def source(kind: str, dtype: torch.dtype = torch.float64, lengths: tuple[int, ...] = LENGTHS) -> Any:
    """The same sequences, batched in another way."""
    some = sequences(lengths, dtype)
    if kind in ("right", "left"):
        collate = functools.partial(pad, side=kind)
        return ntkops.Batches(some, 4, collate=collate, mask="mask")
    if kind == "alone":
        return [{"x": one[None]} for one in some]
    if kind == "loader":  # batches of one length
        groups = [[i for i, n in enumerate(lengths) if n == length] for length in dict.fromkeys(lengths)]
        assert [i for group in groups for i in group] != list(range(len(lengths)))
        return DataLoader(some, batch_sampler=groups, collate_fn=pad)
    stored = pad(some)  # arrays that are padded already
    return ntkops.Batches(stored, 3, mask="mask")


KINDS = ("right", "left", "alone", "arrays")


@functools.cache
def rows(lengths: tuple[int, ...] = LENGTHS) -> list[Tensor]:
    """J of each sequence by itself, (positions, classes, P), in float64 of the float32 numbers."""
    net = model(torch.float32).double()
    found = []
    for one in sequences(lengths, torch.float32):
        out = net(one[None].double()).flatten()
        leaves = list(net.parameters())
        J = [torch.autograd.grad(entry, leaves, retain_graph=True) for entry in out]
        found.append(torch.stack([torch.cat([g.flatten() for g in row]) for row in J]).unflatten(0, (-1, C)))
    return found


def contracted(left: list[Tensor], right: list[Tensor], choice: dict[str, str]) -> Tensor:
    """Kernels by blocks of two samples."""
    lines = []
    for a in left:
        line = []
        for b in right:
            n = min(len(a), len(b))
            if choice.get("time") == "trace":
                block = torch.einsum("tcp,tdp->cd", a[:n], b[:n])
                line.append(block.trace().reshape(1, 1) if choice.get("class") == "trace" else block)
            elif choice.get("class") == "each":
                line.append(torch.einsum("tcp,scp->cts", a, b))
            elif choice.get("class") == "trace":
                line.append(torch.einsum("tcp,scp->ts", a, b))
            else:
                line.append(a.flatten(0, 1) @ b.flatten(0, 1).mT)
        lines.append(torch.cat(line, -1))
    return torch.cat(lines, -2)


CHOICES: list[dict[str, str]] = [
    {},
    {"class": "each"},
    {"class": "trace"},
    {"time": "trace"},
    {"time": "trace", "class": "trace"},
]


@functools.cache
def point(dtype: torch.dtype) -> ntkops.Linearization:
    return ntkops.linearize(model(torch.float32).to(dtype))


CASES = [
    *((CHOICES[0], kind) for kind in KINDS),
    *((choice, kind) for choice, kind in zip(CHOICES[1:], KINDS, strict=True)),
]
# Every case in float64 by layer structure, and in turn in float32 or by automatic differentiation.
WAYS = [
    (*case, *way)
    for number, case in enumerate(CASES)
    for way in (
        ("auto", torch.float64),
        [("auto", torch.float32), ("autograd", torch.float64)][number % 2],
    )
]


@pytest.mark.parametrize(("choice", "kind", "engine", "dtype"), WAYS, ids=str)
def test_rows_are_real_positions(
    choice: dict[str, str], kind: str, engine: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tiles, "_HELD_BYTES", 200)  # a few samples in memory at a time
    options = {"axes": ("time", "class"), "outputs": choice, "engine": engine}
    K = ntkops.ntk(point(dtype), source(kind, dtype), **options)
    expected = contracted(rows(), rows(), choice)
    tolerance = TOLERANCES[dtype]
    assert K.shape == expected.shape and K.num_samples == len(LENGTHS)
    if "time" not in choice:
        wide = 1 if choice else C
        assert K.offsets.tolist() == [0, *(wide * torch.tensor(LENGTHS).cumsum(0)).tolist()]
    close(K.to_dense(), expected, tolerance)
    lazy = ntkops.ntk(point(dtype), source(kind, dtype), **options, max_dense_bytes=0, batch_size=2)
    vectors = normal(*expected.shape[:-1], 2, seed=3, dtype=dtype)
    close(lazy @ vectors, expected @ vectors.double(), tolerance)
    diagonal = expected.diagonal(dim1=-2, dim2=-1)
    close(lazy.diagonal(), diagonal, tolerance)
    close(ntkops.diagonal(lazy).value, diagonal, tolerance)
    close(ntkops.trace(lazy, method="exact").value, diagonal.sum(-1), tolerance)
    close(ntkops.frobenius_norm(lazy, method="exact").value, expected.norm(dim=(-2, -1)), tolerance)
    numbers = torch.tensor([3, 0, 5, 5])
    close(K.submatrix(numbers, slice(1, 6)).to_dense(), expected[..., numbers, 1:6], tolerance)
    if choice.get("time") != "trace":
        other = contracted(rows(NEW), rows(), choice)
        crossed = lazy.cross(source(kind, dtype, NEW))
        close(crossed @ vectors, other @ vectors.double(), tolerance)
        close(K.cross(source(kind, dtype, NEW)).to_dense(), other, tolerance)


@pytest.mark.parametrize("engine", ENGINES)
def test_stratified_estimates(engine: str):
    K = ntkops.ntk(point(torch.float64), source("right"), engine=engine)
    dense = contracted(rows(), rows(), {})
    for quantity, value in ((ntkops.trace, dense.trace()), (ntkops.frobenius_norm, dense.norm())):
        found = []
        for seed in range(16):
            drawn = torch.Generator().manual_seed(seed)
            found.append(float(quantity(K, method="stratified", num_passes=3, generator=drawn).value))
        mean, error = torch.tensor(found).mean(), torch.tensor(found).std() / len(found) ** 0.5
        assert error > 0 and abs(mean - value) <= 4 * error + 0.02 * value, quantity.__name__
    spread = ntkops.effective_rank(K, method="exact").value
    close(spread, dense.trace() ** 2 / dense.square().sum(), 1e-12)


def test_batches_of_one_length_of_a_loader():
    K = ntkops.ntk(point(torch.float64), source("loader"))
    order = [i for length in dict.fromkeys(LENGTHS) for i, n in enumerate(LENGTHS) if n == length]
    some = [rows()[i] for i in order]
    close(K.to_dense(), contracted(some, some, {}), 1e-12)


def test_what_a_kernel_keeps():
    K = ntkops.ntk(point(torch.float64), source("right"))
    dense = contracted(rows(), rows(), {})
    J = ntkops.jacobian(point(torch.float64), source("left"))
    close(J.to_dense(), torch.cat([one.flatten(0, 1) for one in rows()]), 1e-12)
    close((J @ J.mT).to_dense(), dense, 1e-12)
    close(pickle.loads(pickle.dumps(K)).to_dense(), dense, 1e-12)
    close(K.to(torch.float32).to_dense(), dense, 1e-5)
    part = K[4:20, 4:20]
    close(pickle.loads(pickle.dumps(part)).to_dense(), dense[4:20, 4:20], 1e-12)
    at = list(range(8, 12)) + list(range(22, 24))  # all rows of samples 1 and 3
    inverse = torch.linalg.pinv(dense[at][:, at], hermitian=True)
    close(ntkops.nystrom_ntk(K, [1, 3]).to_dense(), dense[:, at] @ inverse @ dense[at], 1e-6)
    assert ntkops.check_operator(K, generator=torch.Generator()).passed
    values = torch.linalg.eigvalsh(dense).flip(0)
    close(ntkops.eigsh(K, 2).values, values[:2], 1e-10)


@pytest.mark.parametrize("choice", ["all", {"class": "each"}, {"class": "trace"}], ids=str)
def test_regression(choice: Any):
    K = ntkops.ntk(point(torch.float64), source("right"), axes=("time", "class"), outputs=choice)
    kind = {} if choice == "all" else choice
    dense, other = contracted(rows(), rows(), kind), contracted(rows(NEW), rows(), kind)
    labels = normal(dense.shape[-1], *([] if choice == "all" else [C]), seed=4)
    fit = ntkops.KernelRidge(0.1, relative=False).fit(K, labels)
    known = labels.mT.unsqueeze(-1) if choice == {"class": "each"} else labels
    expected = other @ torch.linalg.solve(dense + 0.1 * torch.eye(dense.shape[-1]).double(), known)
    expected = expected.squeeze(-1).mT if choice == {"class": "each"} else expected
    close(fit.predict(K.cross(source("left", lengths=NEW))), expected, 1e-10)
    if choice != {"class": "trace"}:
        moved = ntkops.KernelRidge(0.1, offset="network").fit(K, labels)
        assert moved.predict(K.cross(source("left", lengths=NEW))).shape == expected.shape


def test_a_sum_goes_on_from_its_file(tmp_path):
    K = ntkops.ntk(point(torch.float64), source("right"))
    found = ntkops.frobenius_norm(K, checkpoint=tmp_path / "norm.safetensors")
    again = ntkops.frobenius_norm(K, checkpoint=tmp_path / "norm.safetensors")
    assert torch.equal(found.value, again.value)


# -- one output for a whole sequence


class Pooled(Attention):
    """One output for a whole sequence; with ``masked=False`` it takes padding for content."""

    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.masked = masked

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None or not self.masked:
            return super().forward(x).mean(1)
        return (super().forward(x, mask) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


def pooled(masked: bool) -> nn.Module:
    torch.manual_seed(0)
    return Pooled(masked).double()


@pytest.mark.parametrize("engine", ENGINES)
def test_one_output_for_samples_of_unlike_length(engine: str):
    net = pooled(True)
    J = []
    for one in sequences():
        out = net(one[None]).flatten()
        J += [torch.autograd.grad(entry, list(net.parameters()), retain_graph=True) for entry in out]
    J = torch.stack([torch.cat([g.flatten() for g in row]) for row in J])
    stored = ntkops.Batches(pad(sequences()), 3)
    for given in (source("alone"), ntkops.Batches(sequences(), 4, collate=pad), stored):
        K = ntkops.ntk(net, given, engine=engine)
        close(K.to_dense(), J @ J.mT, 1e-12)
        close(ntkops.trace(K, method="exact").value, (J @ J.mT).trace(), 1e-12)
        close(K[3:7, 1:9].to_dense(), (J @ J.mT)[3:7, 1:9], 1e-12)
        close(ntkops.ntk(net, given, engine=engine, max_dense_bytes=0) @ J, J @ (J.mT @ J), 1e-12)


# -- padding is checked


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_a_forgotten_mask_is_refused(dtype: torch.dtype):
    net = model(dtype)
    batches = ntkops.Batches(sequences(dtype=dtype), 4, columns={"x": "x"}, collate=pad, mask="mask")
    with pytest.raises(InputError, match=r"padding of batch 0\['x'\] changes the outputs of sample 3 by"):
        ntkops.ntk(net, batches)
    ntkops.ntk(net, source("right", dtype))  # with the mask
    stored = ntkops.Batches({"x": pad(sequences(dtype=dtype))["x"]}, 3, mask=lambda batch: batch["x"].any(-1))
    with pytest.raises(InputError, match="padding of batch"):
        ntkops.ntk(net, stored)


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_positions_that_are_counted_from_the_left_are_not_padded_there(dtype: torch.dtype):
    class Counted(Attention):
        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            places = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
            return super().forward(x + 0.1 * places, mask)

    torch.manual_seed(0)
    net = Counted().to(dtype)
    ntkops.ntk(net, source("right", dtype))
    with pytest.raises(InputError, match=r"padding of batch 0\['x'\], batch 0\['mask'\] changes.*pad behind"):
        ntkops.ntk(net, source("left", dtype))


def test_padding_that_counts_as_states_is_refused():
    message = r"batch 0 pads sample 3 from outputs of shape \(1, 2\) to \(5, 2\).*mask="
    with pytest.raises(InputError, match=message):
        ntkops.ntk(model(), ntkops.Batches(sequences(), 4, collate=pad))
    with pytest.raises(InputError, match="nothing says which positions are real"):
        ntkops.ntk(model(), DataLoader(sequences((4, 2, 1, 3, 1)), batch_size=3, collate_fn=pad))
    # All batches of a loader may have one length, and pad to it.
    with pytest.raises(InputError, match="nothing says which positions are real"):
        ntkops.ntk(model(), DataLoader(sequences((4, 2, 1, 4)), batch_size=2, collate_fn=pad))
    with pytest.raises(InputError, match=r"padding of batch 0\['x'\]"):
        ntkops.ntk(pooled(False), DataLoader(sequences((4, 2, 1, 4)), batch_size=4, collate_fn=pad))
    ntkops.ntk(pooled(True), DataLoader(sequences((4, 2, 1, 4)), batch_size=4, collate_fn=pad))


def test_a_loader_that_makes_no_single_samples_is_taken_as_it_is():
    def pairs(some: list[Tensor]) -> dict[str, Tensor]:
        assert len(some) > 1
        return pad(some)

    assert (
        ntkops.ntk(model(), DataLoader(sequences((3, 3, 3, 3)), batch_size=2, collate_fn=pairs)).shape[0]
        == 24
    )


def test_a_pooled_model_that_takes_padding_for_content_is_refused():
    with pytest.raises(InputError, match=r"padding of batch 0\['x'\]"):
        ntkops.ntk(pooled(False), ntkops.Batches(sequences(), 4, collate=pad))
    ntkops.ntk(pooled(True), ntkops.Batches(sequences(), 4, collate=pad))


def test_what_stands_at_padding_is_without_effect():
    net, some = model(), sequences()

    def loud(items: list[Tensor]) -> dict[str, Tensor]:
        made = pad(items)
        made["x"] = made["x"].masked_fill(~made["mask"][..., None], 1e6)
        return made

    K = ntkops.ntk(net, ntkops.Batches(some, 4, collate=loud, mask="mask"))
    close(K.to_dense(), contracted(rows(), rows(), {}), 1e-9)


# -- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": "real"}, r"mask: there is no 'real' in a batch; it has \['x', 'mask'\]"),
        ({"mask": "x"}, r"mask= gives a tensor of shape \(1, 4, 3\) for 1 samples"),
        ({"mask": lambda batch: batch["mask"].float()}, "float32 tensor"),
        ({"mask": lambda batch: batch["mask"].long() + 1}, "other values than 0 and 1"),
        ({"mask": lambda batch: batch["mask"][0]}, r"of shape \(4,\)"),
        ({"mask": lambda batch: 3}, "a int for 1 samples"),
        ({"columns": ["x", "z"]}, "columns: there is no 'z'"),
        ({"collate": "pad"}, "collate='pad'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_batches_that_are_not_understood(options: dict[str, Any], message: str):
    with pytest.raises(InputError, match=message):
        ntkops.Batches(sequences(), 4, **{"collate": pad, **options})


def test_inputs_that_do_not_fit():
    with pytest.raises(InputError, match="no samples"):
        ntkops.Batches([], 4, collate=pad)
    with pytest.raises(InputError, match=r"a generator does not give them by number"):
        ntkops.Batches((one for one in sequences()), 4, collate=pad)
    with pytest.raises(InputError, match=r"mask= has 5 positions in batch 0.*shape \(2,\).*mask=None"):
        ntkops.ntk(pooled(True), ntkops.Batches(sequences(), 4, collate=pad, mask="mask"))
    empty = ntkops.Batches(
        sequences(), 6, collate=pad, mask=lambda batch: batch["mask"] & (batch["mask"].sum(1) > 1)[:, None]
    )
    with pytest.raises(InputError, match="sample 3 has no real position"):
        ntkops.ntk(model(), empty)
    channels = nn.Conv1d(3, 2, 1).double()
    with pytest.raises(
        OutputError, match=r"shape \(2, 4\) in batch 0 and \(2, 2\) in batch 1.*let output= put"
    ):
        ntkops.ntk(channels, [one.mT[None] for one in sequences()])
    K = ntkops.ntk(
        channels, [one.mT[None] for one in sequences()], output=lambda y: y.mT, axes=("time", "class")
    )
    assert K.shape == (40, 40)


@pytest.mark.parametrize(
    "outputs", ["each", 0, [0, 1], {"time": "each"}, {"samples": "each"}, {"samples": "trace"}], ids=str
)
def test_choices_that_not_all_samples_have(outputs: Any):
    with pytest.raises(InputError, match="samples differ in length"):
        ntkops.ntk(model(), source("right"), axes=("time", "class"), outputs=outputs)


def test_what_needs_a_grid_of_rows():
    K = ntkops.ntk(point(torch.float64), source("right"), axes=("time", "class"))
    with pytest.raises(InputError, match="samples differ in length.*outputs="):
        ntkops.partial_trace(K, over="class")
    traced = ntkops.ntk(
        point(torch.float64), source("right"), axes=("time", "class"), outputs={"time": "trace"}
    )
    with pytest.raises(ShapeError, match="summed over the first axis"):
        traced.cross(source("right", lengths=NEW))


def test_a_mask_that_changes_is_noticed():
    some, changed = sequences(), [False]

    def fickle(items: list[Tensor]) -> dict[str, Tensor]:
        made = pad(items)
        if changed[0]:
            made["mask"][0, 0] = False
        return made

    K = ntkops.ntk(
        nn.Linear(3, 2).double(),
        ntkops.Batches(some, 4, columns="x", collate=fickle, mask="mask"),
        max_dense_bytes=0,
    )
    changed[0] = True
    with pytest.raises(NonDeterministicDataError):
        K @ torch.ones(40, dtype=torch.float64)


def test_a_model_for_one_length_only():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(15, 5)

        def forward(self, x: Tensor) -> Tensor:
            return self.body(x.flatten(1)).unsqueeze(-1)

    stored = pad(sequences())
    net, columns = Fixed().double(), {"x": stored["x"], "mask": stored["mask"]}
    masked = ntkops.Batches(columns, 3, columns="x", mask=lambda batch: batch.ne(0).any(-1))
    with pytest.raises(InputError, match="padding cannot be checked.*leave mask=None"):
        ntkops.ntk(net, masked)


def test_columns_that_not_all_samples_have():
    x, linear = normal(2, 5, 3, seed=1), nn.Linear(3, 2).double()
    for outputs in (3, "each"):
        with pytest.raises(InputError, match="samples differ in length"):
            ntkops.ntk(linear, x, [one[None] for one in sequences()], outputs=outputs)
    K = ntkops.ntk(linear, x, [one[None] for one in sequences()])
    assert K.shape == (20, 40)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_curvature_by_positions(kind: str, reduction: Any):
    net, J = model(torch.float32).double(), torch.cat(rows())  # (positions, C, P)
    classes = torch.arange(len(J)) % C
    classes[3] = -100
    p = torch.cat([net(one[None].double())[0] for one in sequences()]).detach().softmax(-1)
    H = (classes >= 0).double()[:, None, None] * (torch.diag_embed(p) - p[:, :, None] * p[:, None])
    expected = torch.einsum("ncp,ncd,ndq->pq", J, H, J)
    G = ntkops.ggn(net, source(kind), targets=classes, reduction=reduction)
    close(G.to_dense(), expected / (len(J) - 1 if reduction == "mean" else 1), 1e-12)
    squared = ntkops.ggn(net, source(kind), "mse", reduction=reduction)
    share = 2 * J.flatten(0, 1).mT @ J.flatten(0, 1) / (J[..., 0].numel() if reduction == "mean" else 1)
    close(squared.to_dense(), share, 1e-12)
    with pytest.raises(InputError, match="differ in length"):
        ntkops.ggn(net, source(kind), targets=classes, fisher="empirical")


def test_fits_by_positions():
    net, new = model(torch.float32).double(), [one[None] for one in sequences(NEW)]
    K, J = ntkops.ntk(net, source("right")), torch.cat(rows()).flatten(0, 1)
    fit = ntkops.KernelRidge(0.1, offset="network").fit(K, normal(len(J), seed=3))
    close(fit.predictor()(new), fit.predict(K.cross(new)), 1e-10)
    with pytest.raises(ShapeError, match="differ in length"):
        ntkops.KernelRidge(0.1).fit(K, normal(len(J) // 4, 4, seed=3))
    post = ntkops.LinearizedLaplace().fit(K, torch.arange(len(J) // C) % C)
    logits = torch.cat([net(one[None].double())[0] for one in sequences()])
    likelihood = -nn.functional.cross_entropy(logits, torch.arange(len(J) // C) % C, reduction="sum").item()
    assert post.log_likelihood_ == pytest.approx(likelihood)
    with pytest.raises(ShapeError):  # one label a sample, which as many rows each would fit
        ntkops.LinearizedLaplace().fit(K, torch.zeros(len(J) // 4, dtype=torch.long))
