"""What runs on the workers: thin functions over the stages that send small receipts back to the driver.

Nothing here may import torchvision, training code or the simulator.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, ParamSpec, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sgclassify.model.serve.loaded import ModelRef, classifier_of
from sgclassify.pipeline.cluster.gpu import claim_gpu
from sgclassify.pipeline.errors import StaleRunError, TaskError, TaskTimeoutError
from sgclassify.pipeline.process import peak_mib, process_name, time_limit
from sgclassify.pipeline.record.receipts import (
    PREPARED,
    RECEIPT,
    ExposureReceipt,
    TileReceipt,
    content_digest,
    digest_of,
    members_path,
    stats_of,
)
from sgclassify.pipeline.record.sample import HISTOGRAM_EDGES, draw
from sgclassify.stages.arrays import F32, I64
from sgclassify.stages.classify import classify
from sgclassify.stages.columns import DETECTION_COLUMNS
from sgclassify.stages.config import StageConfig
from sgclassify.stages.errors import SgClassifyError
from sgclassify.stages.healpix import tile_of
from sgclassify.stages.prepare import prepare_exposure
from sgclassify.stages.read.header import ExposureHeader
from sgclassify.stages.read.prepared import PreparedExposure
from sgclassify.stages.tile import TileStamps, extract_tile
from sgclassify.stages.tiling import Part, Tile, footprint_tiles, tile_pad_arcsec
from sgclassify.stages.write.atomic import write_atomic
from sgclassify.stages.write.publish import publish_detections, publish_objects

P = ParamSpec("P")
R = TypeVar("R")

MOST_FRAMES: Final = 40
"""Frames that are kept of a traceback."""

JOINED: Final = tuple(column.name for column in DETECTION_COLUMNS)
"""Columns of an object that its detections get."""


def _stored(kind: pa.DataType) -> pa.DataType:
    """Arrow type of a column once it was written: dictionaries are not kept."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


_NO_MEMBERS: Final = pa.schema(
    [("row", pa.int64()), *((column.name, _stored(column.type)) for column in DETECTION_COLUMNS)]
).empty_table()


@dataclass(frozen=True)
class Places:
    """Where the files of a run lie, and the token that says whose they are.

    Attributes
    ----------
    prepared, objects, detections, exposures, tiles : Path
        Folders: of prepared exposures, of the two products, and of the receipts of exposures and tiles.
    notes : Path
        Folder for the notes of workers that end themselves.
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
        """File that a worker leaves if it ends itself because ``what`` took too long."""
        return self.notes / f"{digest_of(what)}.json"

    def limited(self, what: str) -> AbstractContextManager[None]:
        """Context that ends the process after `limit_s`; see `time_limit`.

        `TaskTimeoutError` if ``what`` has ended another worker in this try. A scheduler may give it to the next worker
        by itself, and would lose them all, each after the whole time.
        """
        note = self.note(what)
        if note.exists():
            raise TaskTimeoutError(what, self.limit_s)
        return time_limit(self.limit_s, what, note)

    def check(self) -> None:
        """Raise `StaleRunError` if the run is over: a scheduler may continue the tasks of a driver that was killed."""
        try:
            owner = self.token_path.read_text(encoding="utf-8")
        except FileNotFoundError:
            owner = ""
        if owner != self.token:
            raise StaleRunError(str(self.token_path))


@dataclass(frozen=True)
class Stamps:
    """The stamps of a part of a tile on their way to the model.

    `seconds` were spent so far; `peak_mib` is the largest memory of the process that cut them, MiB.
    """

    stamps: TileStamps
    seconds: float
    peak_mib: float


@dataclass(frozen=True)
class Scored:
    """The objects of a part of a tile with their probabilities, without the stamps.

    Attributes
    ----------
    objects : pyarrow.Table
        Columns of the object catalogue, without its spatial index.
    members : pyarrow.Table
        Which catalogue row belongs to which object: ``exposure_id``, ``row``, ``object_id``, ``sg_flags``.
    seconds : float
        Time spent so far.
    device : str
        Where the model ran; empty if it was not needed.
    peak_mib : float
        Largest memory so far of the processes that worked on it, MiB.
    """

    objects: pa.Table
    members: pa.Table
    seconds: float
    device: str = ""
    peak_mib: float = 0.0


def bordered(function: Callable[P, R]) -> Callable[P, R]:
    """Let nothing but errors of this project, errors of the system and `TaskError` out of a function."""

    @functools.wraps(function)
    def task(*arguments: P.args, **options: P.kwargs) -> R:
        error: Exception
        try:
            return function(*arguments, **options)
        except SgClassifyError as known:
            error = known.with_traceback(None)
        except OSError as known:
            error = OSError(*known.args, *([known.filename] if known.filename else []))
        except Exception as other:  # noqa: BLE001
            trace = "".join(traceback.format_exception(other, limit=-MOST_FRAMES))
            error = TaskError(type(other).__name__, str(other), trace)
        # Raised out here, and without what caused it: Dask would send that along, and its tracebacks.
        error.__cause__ = error.__context__ = None
        raise error

    return task


@bordered
def prepare(header: ExposureHeader, places: Places, tile_order: int, config: StageConfig) -> ExposureReceipt:
    """Check and prepare one exposure; the receipt of its prepared files is written last."""
    start = time.monotonic()
    with places.limited(str(header)):
        stats = stats_of(header.files)
        tiles = footprint_tiles(header, tile_order, tile_pad_arcsec(config))
        places.check()
        prepared = prepare_exposure(header, places.prepared, config)
        receipt = ExposureReceipt(
            exposure_id=header.exposure_id,
            catalog_stem=header.catalog_stem,
            digest=content_digest(header.exposure_id, header.catalog_stem, header.files, prepared.sha256),
            stats=stats,
            sha256=prepared.sha256,
            rows=prepared.n_rows,
            usable=prepared.n_usable,
            notes=prepared.notes,
            tiles=tuple(tiles.tolist()),
            tile_rows=_rows_by_tile(prepared, tiles, tile_order),
            seconds=round(time.monotonic() - start, 3),
            worker=process_name(),
            peak_mib=peak_mib(),
        )
        path = places.prepared / f"{header.exposure_id}{PREPARED}"
        receipt.write(path, prepared=prepared.as_dict())
    return receipt


def _rows_by_tile(prepared: PreparedExposure, tiles: I64, tile_order: int) -> tuple[int, ...]:
    """Usable detections of an exposure in each of its tiles (ascending pixels)."""
    usable = prepared.usable_detections()
    pixels = np.sort(tile_of(usable["ra"].to_numpy(), usable["dec"].to_numpy(), tile_order))
    return tuple((np.searchsorted(pixels, tiles + 1) - np.searchsorted(pixels, tiles)).tolist())


def load_prepared(exposure_id: str, places: Places) -> PreparedExposure:
    """The prepared exposure that an earlier task left."""
    values = json.loads((places.prepared / f"{exposure_id}{PREPARED}").read_text(encoding="utf-8"))
    return PreparedExposure.from_dict(values["prepared"], places.prepared)


@bordered
def extract(part: Part, places: Places, stamp_size: int, config: StageConfig) -> Stamps:
    """Stamps and measurements of a part of a tile."""
    start = time.monotonic()
    tile = part.tile
    with places.limited(str(part)):
        prepared = [load_prepared(name, places) for name in tile.exposures]
        stamps = extract_tile(tile.order, tile.pixel, prepared, stamp_size, config, part=part)
    return Stamps(stamps, time.monotonic() - start, peak_mib())


@bordered
def check(model: ModelRef) -> None:
    """Load the model, which compares its answers with its reference; this process keeps it for its tiles."""
    if model.device == "cuda":
        claim_gpu()
    classifier_of(model)


@bordered
def infer(part: Part, extracted: Stamps, places: Places, model: ModelRef) -> Scored:
    """Score the stamps of a part of a tile; without stamps, the model is not loaded."""
    stamps, device, cascade = extracted.stamps, "", None
    if len(stamps):
        if model.device == "cuda":
            # done already where the run's plugin has prepared this worker
            claim_gpu()
        # The first tile of a worker waits for the model, which is no fault of that tile: outside of its time limit.
        # A worker that offers a GPU may have none that torch sees.
        device = classifier_of(model).device.type
        cascade = None if model.exact else classifier_of(model).cascade

    def scorer(*arrays: Any) -> F32:
        # not called for a tile without objects, which needs no model
        return classifier_of(model).probabilities(*arrays)

    start = time.monotonic()
    with places.limited(str(part)):
        objects = classify(stamps, scorer, model.own_prior, model.prior, model.tta, cascade)
    seconds = extracted.seconds + time.monotonic() - start
    return Scored(objects, stamps.members, seconds, device, max(extracted.peak_mib, peak_mib()))


@bordered
def publish(
    tile: Tile, key: str, parts: Sequence[Scored], places: Places, metadata: Mapping[str, str], sample_level: int
) -> TileReceipt:
    """Write the objects of all parts of a tile, then what the exposures need of them together with the tile's receipt.

    A tile without objects writes no partition. ``key`` says what the tile was made of; the receipt shows one object of
    every ``2**sample_level``.
    """
    start = time.monotonic()
    with places.limited(str(tile)):
        places.check()
        table = pa.concat_tables([part.objects for part in parts])
        path = publish_objects(tile.order, tile.pixel, table, places.objects, metadata)
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
            seconds=round(sum(part.seconds for part in parts) + time.monotonic() - start, 3),
            histogram=np.histogram(known, bins=np.asarray(HISTOGRAM_EDGES))[0].astype(np.int64),
            sample=draw(identity, ra, dec, p_star, sample_level),
            sample_level=sample_level,
            worker=process_name(),
            device=next((part.device for part in parts if part.device), "cpu"),
            peak_mib=max(peak_mib(), *(part.peak_mib for part in parts)),
            size=path.stat().st_size if path is not None else 0,
            exposures=tile.exposures,
        )
        members = members_path(places.tiles, tile.order, tile.pixel)
        table = pa.concat_tables([member_table(part) for part in parts])
        write_atomic(table, members, {RECEIPT.decode(): receipt.as_json()})
    return receipt


def member_table(scored: Scored) -> pa.Table:
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
    """
    with places.limited(str(receipt)):
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
        done.write(places.exposures / f"{receipt.exposure_id}.json")
    return done
