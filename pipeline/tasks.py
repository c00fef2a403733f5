"""What runs on the workers: thin functions over the stages that hand back small receipts.

Nothing here may import torchvision, training code or the simulator. Errors pass through to the driver.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sgclassify.pipeline.plan import TilePlan, footprint_tiles
from sgclassify.stages.atomic import write_atomic
from sgclassify.stages.bands import PIXEL_SCALE
from sgclassify.stages.columns import DETECTION_COLUMNS
from sgclassify.stages.config import StageConfig
from sgclassify.stages.flags import SgFlag
from sgclassify.stages.prepare import PreparedExposure, prepare_exposure
from sgclassify.stages.prior import Prior, magnitudes, reweighted
from sgclassify.stages.publish import (
    finish_hats,
    publish_detections,
    publish_objects,
    scored_table,
)
from sgclassify.stages.read.header import ExposureHeader
from sgclassify.stages.tile import CHAIN_ARCSEC, TileStamps, extract_tile

if TYPE_CHECKING:
    from sgclassify.model.runtime import Classifier
    from sgclassify.pipeline.outdir import OutputFolder

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

HISTOGRAM_EDGES: Final[tuple[float, ...]] = tuple(k / 20 for k in range(21))
"""Edges of the bins of p_star in the receipts."""

SAMPLE_SIZE: Final = 200
"""Objects of a tile that its receipt shows for the sky map."""

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
    """

    objects: pa.Table
    members: pa.Table
    seconds: float


@dataclass(frozen=True)
class TileReceipt:
    """What the driver learns of a published tile.

    Attributes
    ----------
    order, pixel : int
    n_objects, n_stars, n_galaxies, n_not_scored : int
    seconds : float
        Time spent on the workers.
    histogram : ndarray of int64, shape (20,)
        Objects by p_star, bins of `HISTOGRAM_EDGES`.
    sample_ra, sample_dec : ndarray of float64, shape (k,)
        Positions of at most `SAMPLE_SIZE` objects, degrees.
    sample_p_star : ndarray of float32, shape (k,)
        Their probabilities; nan where not scored.
    """

    order: int
    pixel: int
    n_objects: int
    n_stars: int
    n_galaxies: int
    n_not_scored: int
    seconds: float
    histogram: npt.NDArray[np.int64]
    sample_ra: F64
    sample_dec: F64
    sample_p_star: F32


def prepare(
    header: ExposureHeader, folder: Path, tile_order: int, config: StageConfig
) -> tuple[PreparedExposure, npt.NDArray[np.int64]]:
    """Check and prepare one exposure; with the tiles that it touches, ascending pixels of ``tile_order``."""
    tiles = footprint_tiles(header, tile_order, tile_pad_arcsec(config))
    return prepare_exposure(header, folder, config), tiles


def tile_pad_arcsec(config: StageConfig) -> float:
    """How far beyond its detector an exposure still counts for a tile.

    Catalogue positions may lie off the detector by the tolerances. The rest is for association: what the
    objects of a tile depend on reaches over its border by chains of neighbours within the match radius;
    sources would have to stand side by side without a gap for a chain as long as `CHAIN_ARCSEC`.
    """
    off_detector = config.position_tolerance_arcsec + config.position_margin_px * PIXEL_SCALE
    return off_detector + 2.0 * config.blend_radius_arcsec + 10.0 * config.match_radius_arcsec + CHAIN_ARCSEC


def extract(
    tile: TilePlan, prepared: Sequence[PreparedExposure], stamp_size: int, config: StageConfig
) -> tuple[TileStamps, float]:
    """Stamps and measurements of one tile, and the seconds it took."""
    start = time.monotonic()
    stamps = extract_tile(tile.order, tile.pixel, prepared, stamp_size, config)
    return stamps, time.monotonic() - start


def infer(extracted: tuple[TileStamps, float], model: ModelRef) -> ScoredTile:
    """Score the stamps of one tile."""
    stamps, seconds = extracted
    start = time.monotonic()
    p_star = np.empty(0, dtype=np.float32)
    if len(stamps):
        classifier = classifier_of(model)
        p_star = classifier.averaged(stamps) if model.tta else classifier(stamps)
        if model.prior is not None:
            new = model.prior.at(magnitudes(stamps))
            p_star = reweighted(p_star, model.own_prior, new).astype(np.float32)
    objects = object_table(stamps, p_star)
    return ScoredTile(objects, stamps.members, seconds + time.monotonic() - start)


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

    from sgclassify.model import runtime

    # The nanny sets OMP_NUM_THREADS=1 in embedded workers only. Sums are split by threads, so their number
    # decides about the last bits and must be the same wherever a tile is computed.
    torch.set_num_threads(model.threads)
    return runtime.load(
        model.path, device=model.device, batch_size=model.batch_size, expected_sha256=model.sha256
    )


def object_table(stamps: TileStamps, p_star: F32) -> pa.Table:
    """The rows of the object catalogue.

    Parameters
    ----------
    stamps : TileStamps
    p_star : ndarray of float32, shape (n,)
        Probability of being a star; nan where the model gave no finite number.

    Returns
    -------
    pyarrow.Table
        Probabilities and class are null where an object is not scored, and ``sg_flags`` says why.
    """
    flags = stamps.sg_flags.astype(np.int32)
    failed = ~np.isfinite(p_star) & ((flags & int(SgFlag.NOT_SCORED)) == 0)
    flags = np.where(failed, flags | int(SgFlag.NOT_FINITE), flags).astype(np.int32)
    return scored_table(stamps.object_id, stamps.ra, stamps.dec, p_star, flags, stamps.n_bands, stamps.bands)


def publish(
    tile: TilePlan, scored: ScoredTile, objects: Path, members: Path, metadata: Mapping[str, str]
) -> TileReceipt:
    """Write the objects of a tile, and in the work folder what the exposures need of them.

    A tile without objects writes no partition.
    """
    start = time.monotonic()
    table = scored.objects
    publish_objects(tile.order, tile.pixel, table, objects, metadata)
    write_atomic(member_table(scored), members_path(members, tile), {})
    p_star = table["p_star"].to_numpy(zero_copy_only=False).astype(np.float32)
    known = p_star[np.isfinite(p_star)]
    step = max(1, -(-len(p_star) // SAMPLE_SIZE))
    n_stars = int(np.count_nonzero(known >= 0.5))
    return TileReceipt(
        order=tile.order,
        pixel=tile.pixel,
        n_objects=len(p_star),
        n_stars=n_stars,
        n_galaxies=len(known) - n_stars,
        n_not_scored=len(p_star) - len(known),
        seconds=round(scored.seconds + time.monotonic() - start, 3),
        histogram=np.histogram(known, bins=np.asarray(HISTOGRAM_EDGES))[0].astype(np.int64),
        sample_ra=table["ra"].to_numpy()[::step],
        sample_dec=table["dec"].to_numpy()[::step],
        sample_p_star=p_star[::step],
    )


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


def join(
    prepared: PreparedExposure, members: Sequence[Path], detections: Path, metadata: Mapping[str, str]
) -> int:
    """Write the catalogue of an exposure with the columns of its objects appended; returns the rows scored.

    Parameters
    ----------
    prepared : PreparedExposure
    members : sequence of Path
        Files of the published tiles that the exposure touches.
    detections : Path
        Folder of the product.
    metadata : mapping of str to str
        For the key-value metadata of the file.
    """
    own = pq.read_table(prepared.detections_path, columns=["sg_flags"])["sg_flags"].to_numpy()
    mine = pc.field("exposure_id") == prepared.exposure_id
    found = [pq.read_table(path, filters=mine, columns=_NO_MEMBERS.column_names) for path in members]
    scores = pa.concat_tables([_NO_MEMBERS, *found])
    catalog = pq.read_table(prepared.catalog_path)
    path = detections / f"{prepared.header.catalog_stem}.parquet"
    return publish_detections(catalog, scores, path, metadata, own)


def finish(folder: OutputFolder, receipts: Sequence[TileReceipt], metadata: Mapping[str, str]) -> None:
    """Make the published partitions a catalogue; runs in the driver."""
    finish_hats(folder.objects, [(r.order, r.pixel, r.n_objects) for r in receipts if r.n_objects], metadata)


def members_path(folder: Path, tile: TilePlan) -> Path:
    """File in the work folder that holds the members of a tile and their probabilities."""
    return folder / f"{tile.order}-{tile.pixel}.parquet"
