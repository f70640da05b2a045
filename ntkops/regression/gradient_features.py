"""Projected gradients in files: written once, tile by tile, and mapped into memory wherever they are used."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from ..arguments import checked
from ..checkpoint import Checkpoint, fingerprint, load, only_writer, save
from ..constructors import ntk, projected_ntk
from ..engines import EngineChoice, tensor_bytes
from ..errors import CheckpointError, InputError, NonFiniteError, OutOfRangeError
from ..estimators._exact import network_of
from ..model import BatchDim, Inputs
from ..operators._projected_features import feature_rows
from ..operators.axes import StateAxis
from ..operators.projected import ProjectedNTKOperator
from ..operators.projection import MatrixProjection
from ..projections import SJLT, Projection

if TYPE_CHECKING:
    from ..model.accepted import InputsLike, ModelLike, OutputLike, ParamsLike
    from ..operators.projection import ProjectionLike

__all__ = ["GradientFeatures", "gradient_features"]

KIND = "features"
_TILE_BYTES = 2**26
_COMPARED = 4  # samples whose features are computed anew
_OF_NETWORK = ("model", "parameters", "projection", "dtype")


class GradientFeatures:
    r"""Features :math:`J P^\top` in files; made by `gradient_features`, and opened again by their path alone.

    The folder holds one safetensors file for each tile of consecutive samples. In its header stands a JSON
    document with the sizes, and with fingerprints of the model, the parameters, the projection, the dtype and
    the tile's samples in their order; and one of all samples before it, so that tiles of two data sets do not
    mix. Tiles are mapped into memory: nothing is copied, pages are read where
    they are used, and what is written to such a tensor never reaches the file.

    Args:
        path: The folder.

    Attributes:
        path: The folder.
        shape: ``(N·O, k)``: row i = sample · O + output.
        dtype: Dtype of the features.
        num_samples: N.
        num_outputs: O.
        tile_size: Samples of a tile.
        projection: The projection, as it shows itself.
        fingerprint: Digests of the model, the parameters, the projection and the dtype.

    Raises:
        CheckpointError: If there are no features, or not those of all samples; if a file is damaged, is a
            pickle, belongs to others than the first, or was renamed.

    Example:
        >>> import tempfile, torch, ntkops
        >>> _ = torch.manual_seed(0)
        >>> model, x = torch.nn.Linear(3, 1), torch.randn(6, 3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = ntkops.gradient_features(model, x, 2, folder, tile_size=4)
        ...     F = ntkops.GradientFeatures(folder)
        ...     F.shape, [tile.shape[0] for _, _, tile in F.tiles()], F[3:5].shape
        (torch.Size([6, 2]), [4, 2], torch.Size([2, 2]))
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        first = load(_file(self.path, 0), kind=KIND, mapped=True)
        record = _record(first, self.path)
        self.num_samples, self.num_outputs = record["num_samples"], record["num_outputs"]
        self.tile_size, self.projection = record["tile_size"], record["projection"]
        self.shape = torch.Size((self.num_samples * self.num_outputs, record["k"]))
        self.fingerprint = {name: first.fingerprint[name] for name in _OF_NETWORK}
        self.dtype = first.tensors["features"].dtype
        self._files = [_file(self.path, n) for n in range(-(-self.num_samples // self.tile_size))]
        missing = [place for place in self._files if not place.exists()]
        if missing:
            raise CheckpointError(
                f"{self.path} holds {len(self._files) - len(missing)} of {len(self._files)} tiles; call "
                "gradient_features with what it was started with, which goes on from them"
            )
        before = ""
        for number, place in enumerate(self._files):  # headers alone
            held = self._held(number)
            if held.metadata.get("before") != before:
                raise CheckpointError(
                    f"{place} follows other samples than those of the tiles before it: it, or one of them, "
                    "was moved here from the features of another data set"
                )
            before = _following(held)

    @property
    def k(self) -> int:
        """Number of features of a row."""
        return self.shape[1]

    def __len__(self) -> int:
        """Number of rows."""
        return self.shape[0]

    def tiles(self) -> Iterator[tuple[int, int, Tensor]]:
        """Yield first row, one past the last, and the mapped rows between, tile by tile.

        Yields:
            Two positions and ``(r, k)``.

        Raises:
            CheckpointError: If a file is damaged, or belongs to others than the first.
        """
        for number in range(len(self._files)):
            yield self._rows_of(number)

    def _rows_of(self, number: int) -> tuple[int, int, Tensor]:
        start, stop = self._samples_of(number)
        return start * self.num_outputs, stop * self.num_outputs, self._held(number).tensors["features"]

    def _samples_of(self, number: int) -> tuple[int, int]:
        start = number * self.tile_size
        return start, min(start + self.tile_size, self.num_samples)

    def _held(self, number: int) -> Checkpoint:
        """Return a tile, whose sizes and network are those of the first."""
        held = load(self._files[number], kind=KIND, mapped=True)
        start, stop = self._samples_of(number)
        due = ((stop - start) * self.num_outputs, self.k)
        alike = all(held.fingerprint.get(name) == value for name, value in self.fingerprint.items())
        if not alike or tuple(held.tensors["features"].shape) != due:
            raise CheckpointError(
                f"{self._files[number]} belongs to other features than {self._files[0].name}: it was moved "
                "here from another folder"
            )
        if held.metadata.get("first_sample") != start:
            raise CheckpointError(
                f"{self._files[number]} holds other samples than those from {start} on: it was renamed"
            )
        return held

    def __getitem__(self, rows: int | slice) -> Tensor:
        """Return a row ``(k,)``, or consecutive rows ``(r, k)``: mapped where one tile holds them.

        Raises:
            OutOfRangeError: If the row does not exist.
            InputError: If it is neither a number nor a slice without steps.
        """
        if isinstance(rows, int) and not isinstance(rows, bool):
            if not -len(self) <= rows < len(self):
                raise OutOfRangeError(f"row {rows} does not exist: there are {len(self)}")
            rows %= len(self)
            return self[rows : rows + 1][0]
        if not isinstance(rows, slice) or rows.step not in (None, 1):
            raise InputError(f"features[{rows!r}]: pass a row, or a slice without steps")
        start, stop, _ = rows.indices(len(self))
        width, parts = self.tile_size * self.num_outputs, []
        for number in range(start // width, -(-max(stop, start) // width)):
            first, last, tile = self._rows_of(number)
            parts.append(tile[max(start, first) - first : min(stop, last) - first])
        if not parts:
            return torch.empty((0, self.k), dtype=self.dtype)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def verify(self) -> None:
        """Read everything, and compare the checksums.

        Raises:
            CheckpointError: If a file was altered after it was written.
        """
        for place in self._files:
            load(place, kind=KIND)

    def require_same_network(self, other: GradientFeatures) -> None:
        """Raise unless two sets of features are of one network, seen through one projection.

        Raises:
            CheckpointError: Naming what differs.
        """
        different = [name for name in _OF_NETWORK if self.fingerprint[name] != other.fingerprint[name]]
        if different:
            raise CheckpointError(
                f"the features in {self.path} and {other.path} have no inner products that mean something: "
                f"they differ in {', '.join(different)}"
            )

    def __repr__(self) -> str:
        """Show the sizes, the projection and the folder."""
        return (
            f"GradientFeatures({len(self)} x {self.k}, {self.dtype}, {len(self._files)} tiles, "
            f"{self.projection}, {str(self.path)!r})"
        )


@checked
def gradient_features(
    model: ModelLike,
    x: InputsLike,
    projection: ProjectionLike,
    path: str | os.PathLike[str],
    *,
    params: ParamsLike = None,
    output: OutputLike = None,
    tile_size: int | Literal["auto"] = "auto",
    engine: EngineChoice = "auto",
    batch_size: int | Literal["auto"] = "auto",
    batch_dim: BatchDim = 0,
    progress: bool = False,
) -> GradientFeatures:
    r"""Write the projected gradients :math:`J P^\top` of all samples to files, or go on writing them.

    For data attribution the state is one number a sample, the margin of its label for example: a function of
    parameters and inputs, ``(params, (images, labels)) -> (N, 1)``, or an ``output=`` of the model.

    A call that was interrupted is made again: tiles that are there are kept, after their fingerprints were
    compared, and the features of a few samples were computed anew.

    Args:
        model: `torch.nn.Module`, a function ``(params, inputs) -> output``, or a `Linearization`.
        x: N samples, as `ntkops.ntk` takes them; a re-iterable of batches is never held in memory.
        projection: One of `ntkops.projections` with dim P, a ``(k, P)`` tensor, or k, for a sparse one that
            is seeded by 0. All features that are to meet need the same.
        path: Folder of the files; it is made where it is missing.
        params: Selects parameters; see `ntkops.ntk`.
        output: What the state is; see `ntkops.ntk`.
        tile_size: Samples of one file; "auto" for some 64 MB, or as the files have it.
        engine: See `ntkops.ntk`.
        batch_size: See `ntkops.ntk`.
        batch_dim: See `ntkops.ntk`.
        progress: Show a bar of tiles.

    Returns:
        `GradientFeatures`. Cost: one per-sample pass an output, and one application of P; of tiles that are
        there their samples are read for the fingerprints. Memory: one tile, and the engine's workspace.

    Raises:
        InputError: If ``tile_size`` is no size.
        CheckpointError: If the folder holds features of another model, other parameters, another projection,
            other samples or another order of them, another dtype or size of tiles, naming which; if another
            process writes to it; or if it cannot be written.
        NonFiniteError: If a feature is NaN or infinite.
        NtkopsError: The one that fits what is wrong with model, selection, inputs, output or projection; see
            `ntkops.errors`.

    References:
        Park, Georgiev, Ilyas, Leclerc, Madry, TRAK: Attributing model behavior at scale (2023).

    Example:
        >>> import tempfile, torch, ntkops
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(
        ...     torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
        ... )
        >>> x = torch.randn(10, 3)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     F = ntkops.gradient_features(model, x, ntkops.projections.SJLT(41, 16, seed=3), folder)
        ...     K = ntkops.projected_ntk(
        ...         ntkops.ntk(model, x), ntkops.projections.SJLT(41, 16, seed=3)
        ...     )
        ...     bool(torch.allclose(F[:] @ F[:].T, K.to_dense(), atol=1e-5))
        True
    """
    if tile_size != "auto" and (isinstance(tile_size, str) or tile_size < 1):
        raise InputError(f"tile_size={tile_size!r}: pass 'auto', or a positive number of samples")
    K = ntk(
        model,
        x,
        params=params,
        output=output,
        engine=engine,
        batch_size=batch_size,
        max_dense_bytes=0,
        batch_dim=batch_dim,
    )
    if isinstance(projection, int):
        projection = SJLT(K.num_parameters, projection, nonzeros=max(1, min(4, projection)), seed=0)
    rows = projected_ntk(K, projection)
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"the folder {folder} cannot be made ({error})") from error
    with only_writer(folder / "writer.lock"):
        _Writing.of(rows, folder, None if tile_size == "auto" else tile_size).run(progress)
    return GradientFeatures(folder)


@dataclasses.dataclass(frozen=True, eq=False)
class _Writing:
    """Tiles that are to be there, and what they are made of."""

    rows: ProjectedNTKOperator
    folder: Path
    tile_size: int
    prints: Mapping[str, str]

    @classmethod
    def of(cls, rows: ProjectedNTKOperator, folder: Path, tile_size: int | None) -> _Writing:
        """Return the work to be done in a folder; None for the size that its files have."""
        if tile_size is None:
            known = _file(folder, 0)
            one = tensor_bytes((rows.num_outputs, rows.projection.k), rows.dtype)
            tile_size = max(1, _TILE_BYTES // one)
            if known.exists():
                tile_size = int(_record(load(known, kind=KIND, mapped=True), folder)["tile_size"])
        prints = fingerprint(
            **network_of(rows),
            projection=_identity(rows.projection),
            dtype=rows.dtype,
            sizes=[rows.num_samples, rows.num_outputs, tile_size],
        )
        return cls(rows, folder, tile_size, prints)

    def run(self, progress: bool) -> None:
        """Write the tiles that are missing; those that are there are compared first."""
        count, size = self.rows.num_samples, self.tile_size
        starts = range(0, count, size)
        between, looked = self.rows._rows.inputs.in_order(), False
        places = [_file(self.folder, number) for number in range(len(starts))]
        missing = {place for place in places if not place.exists()}
        for place, start in zip(places, starts, strict=True):
            if place in missing:
                continue
            part = between(start, min(start + size, count))
            held = load(place, self._prints_of(part), kind=KIND, mapped=True)
            if not looked:
                self._require_same_values(held.tensors["features"], part, place)
                looked = True
        between, before = self.rows._rows.inputs.in_order(), ""
        with tqdm(total=len(missing), desc="features", unit="tile", disable=not progress) as bar:
            for place, start in zip(places, starts, strict=True):
                if place in missing:
                    part = between(start, min(start + size, count))
                    self._write(place, part, start, before)
                    bar.update()
                before = _following(load(place, kind=KIND, mapped=True))

    def _prints_of(self, part: Inputs) -> dict[str, str]:
        (_, _, batch), *_ = part.batches(None)
        given = batch.inputs
        if isinstance(given, tuple) and len(given) == 1:  # a loader's batches of what one tensor may hold
            (given,) = given
        return {**self.prints, **fingerprint(samples=given)}

    def _features(self, part: Inputs) -> Tensor:
        core = self.rows._core
        with torch.no_grad():
            axis = StateAxis(part, self.rows._rows.outputs)
            return feature_rows(core.engine, tuple(self.rows._args), axis, self.rows.projection)

    def _require_same_values(self, held: Tensor, part: Inputs, place: Path) -> None:
        """Compute some features anew: fingerprints see parameters and data, not what code does.

        Raises:
            CheckpointError: If they differ by more than rounding.
        """
        some = part.select(torch.arange(min(_COMPARED, part.num_samples)))
        found = self._features(some).cpu().double()
        expected = held[: len(found)].double()
        eps = torch.finfo(held.dtype).eps
        if not bool((found - expected).norm() <= eps**0.5 * expected.norm()):
            raise CheckpointError(
                f"{place} belongs to another computation: its first samples have other features now, though "
                "parameters and samples are the same; the code of the model or of the output has changed"
            )

    def _write(self, place: Path, part: Inputs, start: int, before: str) -> None:
        features = self._features(part)
        if not bool(torch.isfinite(features).all()):
            raise NonFiniteError(
                f"the features of {place.name} are not finite: they overflow {features.dtype}"
            )
        record = {
            "num_samples": self.rows.num_samples,
            "num_outputs": self.rows.num_outputs,
            "tile_size": self.tile_size,
            "first_sample": start,
            "before": before,
            "k": features.shape[-1],
            "projection": repr(self.rows.projection),
        }
        save(place, {"features": features}, record, self._prints_of(part), kind=KIND)


def _following(held: Checkpoint) -> str:
    """Return the digest of all samples up to those of a tile, which the next one holds as "before"."""
    return fingerprint(all=[held.metadata["before"], held.fingerprint["samples"]])["all"]


def _file(folder: Path, number: int) -> Path:
    return folder / f"tile-{number:06d}.safetensors"


def _record(held: Checkpoint, folder: Path) -> dict[str, Any]:
    """Return the sizes that stand in a file.

    Raises:
        CheckpointError: If they are damaged.
    """
    record = held.metadata
    sizes = [record.get(name) for name in ("num_samples", "num_outputs", "tile_size", "k")]
    whole = all(isinstance(size, int) and size > 0 for size in sizes) and "features" in held.tensors
    if not whole or not set(_OF_NETWORK) <= set(held.fingerprint):
        raise CheckpointError(f"{folder} has a damaged record: its sizes are missing")
    return record


def _identity(projection: Projection) -> Any:
    """Return what tells a projection from others in another run, for a fingerprint."""
    return projection.matrix if isinstance(projection, MatrixProjection) else projection.key
