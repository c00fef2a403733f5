"""What runs on the workers: thin functions over the stages that hand back small receipts.

Nothing here may import torchvision, training code or the simulator. Errors pass through to the driver.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import resource
import socket
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sgclassify.pipeline.cluster.gpu import claim_gpu
from sgclassify.pipeline.cluster.worker import TaskTimeoutError, time_limit
from sgclassify.pipeline.record.receipts import (
    PREPARED,
    RECEIPT,
    ExposureReceipt,
    TileReceipt,
    content_digest,
    digest_of,
    members_path,
    stats_of,
    write_receipt,
)
from sgclassify.pipeline.record.sample import HISTOGRAM_EDGES, draw
from sgclassify.stages.arrays import F32
from sgclassify.stages.classify import classify
from sgclassify.stages.columns import DETECTION_COLUMNS
from sgclassify.stages.config import StageConfig
from sgclassify.stages.errors import SgClassifyError
from sgclassify.stages.prepare import prepare_exposure
from sgclassify.stages.prior import Prior
from sgclassify.stages.read.header import ExposureHeader
from sgclassify.stages.read.prepared import PreparedExposure
from sgclassify.stages.tile import TileStamps, extract_tile
from sgclassify.stages.tiling import Tile, footprint_tiles, tile_pad_arcsec
from sgclassify.stages.write.atomic import write_atomic
from sgclassify.stages.write.publish import finish_hats, publish_detections, publish_objects

if TYPE_CHECKING:
    from sgclassify.model.serve.runtime import Classifier


P = ParamSpec("P")
R = TypeVar("R")

MOST_FRAMES: Final = 40
"""Frames of a traceback that is told of."""

JOINED: Final = tuple(column.name for column in DETECTION_COLUMNS)
"""Columns of an object that its detections get."""


def _stored(kind: pa.DataType) -> pa.DataType:
    """Arrow type of a column once it was written: dictionaries are not kept."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


_NO_MEMBERS: Final = pa.schema(
    [("row", pa.int64()), *((column.name, _stored(column.type)) for column in DETECTION_COLUMNS)]
).empty_table()


@dataclass(frozen=True)
class ModelRef:
    """Which model the workers load, and how.

    Attributes
    ----------
    path : Path or None
        The archive; None for the one that the worker's own installation ships.
    sha256 : str
        Checksum that it must have.
    batch_size, threads : int
    device : str
        ``"cpu"`` or ``"cuda"``.
    tta : bool
        Average over the eight symmetries of the square.
    own_prior : float
        Share of stars that the model assumes.
    prior : Prior or None
        What to assume instead.
    """

    path: Path | None
    sha256: str
    batch_size: int
    threads: int
    device: str = "cpu"
    tta: bool = False
    own_prior: float = 0.5
    prior: Prior | None = None


@dataclass(frozen=True)
class Places:
    """Where the files of a run lie, and the token that says whose they are.

    Attributes
    ----------
    prepared, objects, detections, exposures, tiles : Path
        Folders: of prepared exposures, of the two products, and of the receipts of exposures and tiles.
    notes : Path
        Folder of what a worker leaves that ends itself.
    token_path : Path
    token : str
        What `token_path` holds as long as this run owns the folder.
    limit_s : float
        Longest time of one task; 0 for no limit.
    """

    prepared: Path
    objects: Path
    detections: Path
    exposures: Path
    tiles: Path
    notes: Path
    token_path: Path
    token: str
    limit_s: float = 0.0

    def note(self, what: str) -> Path:
        """File that a worker leaves which ended itself because ``what`` took too long."""
        return self.notes / f"{digest_of(what)}.json"

    def limited(self, what: str) -> AbstractContextManager[None]:
        """Context in which no more than `limit_s` may be spent, or else the process ends; see `time_limit`.

        Raises
        ------
        TaskTimeoutError
            If ``what`` has ended another worker in this try: a scheduler that gives it to the next one by itself
            shall not lose them all, each after the whole time.
        """
        note = self.note(what)
        if note.exists():
            raise TaskTimeoutError(what, self.limit_s)
        return time_limit(self.limit_s, what, note)

    def check(self) -> None:
        """Refuse to write for a run that is over.

        A scheduler of others may go on with the tasks of a driver that was killed.

        Raises
        ------
        StaleRunError
        """
        try:
            owner = self.token_path.read_text(encoding="utf-8")
        except FileNotFoundError:
            owner = ""
        if owner != self.token:
            raise StaleRunError(str(self.token_path))


class StaleRunError(SgClassifyError):
    """The run that asked for this is over; another one may be at work in its folder."""


@dataclass(frozen=True)
class Stamps:
    """The stamps of one tile on their way to the model.

    Attributes
    ----------
    stamps : TileStamps
    seconds : float
        Time spent so far.
    peak_mib : float
        Largest memory of the process that cut them, MiB.
    """

    stamps: TileStamps
    seconds: float
    peak_mib: float


@dataclass(frozen=True)
class ScoredTile:
    """The objects of a tile with their probabilities, without the stamps.

    Attributes
    ----------
    objects : pyarrow.Table
        Columns of the object catalogue, without its spatial index.
    members : pyarrow.Table
        Which catalogue row belongs to which object: ``exposure_id``, ``row``, ``object_id``, ``sg_flags``.
    seconds : float
        Time spent so far.
    device : str
        Where the model ran.
    peak_mib : float
        Largest memory so far of the processes that worked on it, MiB.
    """

    objects: pa.Table
    members: pa.Table
    seconds: float
    device: str = "cpu"
    peak_mib: float = 0.0


class TaskError(Exception):
    """An unexpected error of a task in a form that crosses any process border.

    An exception may hold what cannot be unpickled elsewhere, or a traceback that is too deep for it; the driver would
    never hear of the task again.

    Parameters
    ----------
    name, text, trace : str
        Name of the exception's class, its message, and its traceback.
    """

    def __init__(self, name: str, text: str, trace: str) -> None:
        super().__init__(name, text, trace)
        self.name = name
        self.text = text
        self.trace = trace

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"


def bordered(function: Callable[P, R]) -> Callable[P, R]:
    """Let nothing but errors of this project, errors of the system and `TaskError` out of a function."""

    @functools.wraps(function)
    def task(*arguments: P.args, **options: P.kwargs) -> R:
        try:
            return function(*arguments, **options)
        except SgClassifyError as error:
            raise error.with_traceback(None) from None
        except OSError as error:
            raise OSError(*error.args, *([error.filename] if error.filename else [])) from None
        except Exception as error:  # noqa: BLE001
            trace = "".join(traceback.format_exception(error, limit=-MOST_FRAMES))
            raise TaskError(type(error).__name__, str(error), trace) from None

    return task


def worker_name() -> str:
    """This process: host and number."""
    return f"{socket.gethostname()}:{os.getpid()}"


def peak_mib() -> float:
    """Largest resident memory of this process so far, MiB (Linux counts in KiB)."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


@bordered
def prepare(header: ExposureHeader, places: Places, tile_order: int, config: StageConfig) -> ExposureReceipt:
    """Check and prepare one exposure; the receipt of its prepared files is written last."""
    with places.limited(str(header)):
        return _prepare(header, places, tile_order, config)


def _prepare(header: ExposureHeader, places: Places, tile_order: int, config: StageConfig) -> ExposureReceipt:
    start = time.monotonic()
    stats = stats_of(header.files)
    tiles = footprint_tiles(header, tile_order, tile_pad_arcsec(config))
    places.check()
    prepared = prepare_exposure(header, places.prepared, config)
    digest = content_digest(header.exposure_id, header.catalog_stem, header.files, prepared.sha256)
    receipt = ExposureReceipt(
        exposure_id=header.exposure_id,
        catalog_stem=header.catalog_stem,
        digest=digest,
        stats=stats,
        sha256=prepared.sha256,
        rows=prepared.n_rows,
        usable=prepared.n_usable,
        notes=prepared.notes,
        tiles=tuple(tiles.tolist()),
        seconds=round(time.monotonic() - start, 3),
        worker=worker_name(),
        peak_mib=peak_mib(),
    )
    write_receipt(receipt, places.prepared / f"{header.exposure_id}{PREPARED}", prepared=prepared.as_dict())
    return receipt


def load_prepared(exposure_id: str, places: Places) -> PreparedExposure:
    """The prepared exposure that an earlier task left."""
    values = json.loads((places.prepared / f"{exposure_id}{PREPARED}").read_text(encoding="utf-8"))
    return PreparedExposure.from_dict(values["prepared"], places.prepared)


@bordered
def extract(tile: Tile, places: Places, stamp_size: int, config: StageConfig) -> Stamps:
    """Stamps and measurements of one tile."""
    start = time.monotonic()
    with places.limited(str(tile)):
        prepared = [load_prepared(name, places) for name in tile.exposures]
        stamps = extract_tile(tile.order, tile.pixel, prepared, stamp_size, config)
    return Stamps(stamps, time.monotonic() - start, peak_mib())


@bordered
def infer(tile: Tile, extracted: Stamps, places: Places, model: ModelRef) -> ScoredTile:
    """Score the stamps of one tile."""
    if len(extracted.stamps):
        # the first tile of a worker waits for the model, which is no fault of that tile
        classifier_of(model)
    with places.limited(str(tile)):
        return _infer(extracted, model)


def _infer(extracted: Stamps, model: ModelRef) -> ScoredTile:
    stamps = extracted.stamps
    start = time.monotonic()

    def scorer(*arrays: Any) -> F32:
        # not called for a tile without objects, which needs no model
        return classifier_of(model).probabilities(*arrays)

    return ScoredTile(
        classify(stamps, scorer, model.own_prior, model.prior, model.tta),
        stamps.members,
        extracted.seconds + time.monotonic() - start,
        # a worker that offers a GPU may have none that torch sees
        classifier_of(model).device.type if len(stamps) else model.device,
        max(extracted.peak_mib, peak_mib()),
    )


@functools.lru_cache(maxsize=1)
def classifier_of(model: ModelRef) -> Classifier:
    """The model of this worker process: loaded, checked and warmed at its first tile, then kept.

    Raises
    ------
    ModelError
        If this worker has not the very model that the driver checked.
    """
    # Imported here, so that workers which only read and cut do not load torch.
    import torch

    from sgclassify.model.serve import runtime

    # The nanny sets OMP_NUM_THREADS=1 in embedded workers only. Sums are split by threads, so their number
    # decides about the last bits and must be the same wherever a tile is computed.
    torch.set_num_threads(model.threads)
    if model.device == "cuda":
        # done already where the run's plugin has prepared this worker
        claim_gpu()
    return runtime.load(
        model.path, device=model.device, batch_size=model.batch_size, expected_sha256=model.sha256
    )


@bordered
def publish(
    tile: Tile,
    key: str,
    scored: ScoredTile,
    places: Places,
    metadata: Mapping[str, str],
    sample_level: int,
) -> TileReceipt:
    """Write the objects of a tile, then what the exposures need of them together with the tile's receipt.

    A tile without objects writes no partition. ``key`` says what the tile was made of; the receipt shows one object of
    every ``2**sample_level``.
    """
    with places.limited(str(tile)):
        return _publish(tile, key, scored, places, metadata, sample_level)


def _publish(
    tile: Tile,
    key: str,
    scored: ScoredTile,
    places: Places,
    metadata: Mapping[str, str],
    sample_level: int,
) -> TileReceipt:
    start = time.monotonic()
    places.check()
    path = publish_objects(tile.order, tile.pixel, scored.objects, places.objects, metadata)
    table = scored.objects
    p_star = table["p_star"].to_numpy(zero_copy_only=False).astype(np.float32)
    known = p_star[np.isfinite(p_star)]
    identity, ra, dec = (table[name].to_numpy() for name in ("object_id", "ra", "dec"))
    n_stars = int(np.count_nonzero(known >= 0.5))
    receipt = TileReceipt(
        order=tile.order,
        pixel=tile.pixel,
        key=key,
        n_objects=len(p_star),
        n_stars=n_stars,
        n_galaxies=len(known) - n_stars,
        n_not_scored=len(p_star) - len(known),
        seconds=round(scored.seconds + time.monotonic() - start, 3),
        histogram=np.histogram(known, bins=np.asarray(HISTOGRAM_EDGES))[0].astype(np.int64),
        sample=draw(identity, ra, dec, p_star, sample_level),
        sample_level=sample_level,
        worker=worker_name(),
        device=scored.device,
        peak_mib=max(scored.peak_mib, peak_mib()),
        size=path.stat().st_size if path is not None else 0,
    )
    members = members_path(places.tiles, tile.order, tile.pixel)
    write_atomic(member_table(scored), members, {RECEIPT.decode(): receipt.as_json()})
    return receipt


def member_table(scored: ScoredTile) -> pa.Table:
    """Every member detection with what its object got: ``exposure_id``, ``row`` and `JOINED`."""
    object_id = scored.objects["object_id"].to_numpy()
    order = np.argsort(object_id, kind="stable")
    place = order[np.searchsorted(object_id, scored.members["object_id"].to_numpy(), sorter=order)]
    columns = scored.objects.select(JOINED).take(pa.array(place))
    return pa.table(
        {
            "exposure_id": scored.members["exposure_id"],
            "row": scored.members["row"],
            **{name: columns[name] for name in JOINED},
        }
    )


@bordered
def join(
    receipt: ExposureReceipt, key: str, members: Sequence[Path], places: Places, metadata: Mapping[str, str]
) -> ExposureReceipt:
    """Write the catalogue of an exposure with the columns of its objects appended, then its receipt.

    Parameters
    ----------
    receipt : ExposureReceipt
        Of the prepared exposure.
    key : str
        What the product is made of.
    members : sequence of Path
        Files of the published tiles that the exposure touches.
    places : Places
    metadata : mapping of str to str
        For the key-value metadata of the file.

    Returns
    -------
    ExposureReceipt
    """
    with places.limited(f"exposure {receipt.exposure_id}"):
        return _join(receipt, key, members, places, metadata)


def _join(
    receipt: ExposureReceipt, key: str, members: Sequence[Path], places: Places, metadata: Mapping[str, str]
) -> ExposureReceipt:
    prepared = load_prepared(receipt.exposure_id, places)
    own = pq.read_table(prepared.detections_path, columns=["sg_flags"])["sg_flags"].to_numpy()
    mine = pc.field("exposure_id") == receipt.exposure_id
    found = [pq.read_table(path, filters=mine, columns=_NO_MEMBERS.column_names) for path in members]
    scores = pa.concat_tables([_NO_MEMBERS, *(table.replace_schema_metadata() for table in found)])
    catalog = pq.read_table(prepared.catalog_path)
    path = places.detections / f"{receipt.catalog_stem}.parquet"
    places.check()
    scored = publish_detections(catalog, scores, path, metadata, own)
    done = dataclasses.replace(receipt, join_key=key, scored=scored, size=path.stat().st_size)
    write_receipt(done, places.exposures / f"{receipt.exposure_id}.json")
    return done


def finish(objects: Path, tiles: Iterable[tuple[int, int, int]], metadata: Mapping[str, str]) -> None:
    """Make the published partitions a catalogue; runs in the driver.

    Parameters
    ----------
    objects : Path
    tiles : iterable of (int, int, int)
        Order, pixel and number of objects of every published tile.
    metadata : mapping of str to str
    """
    finish_hats(objects, [tile for tile in tiles if tile[2]], metadata)
