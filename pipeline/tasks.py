"""What runs on the workers: thin functions over the stages that hand back small receipts.

Nothing here may import torchvision, training code or the simulator. Errors pass through to the driver.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sgclassify.pipeline.plan import TilePlan, footprint_tiles
from sgclassify.stages.bands import PIXEL_SCALE
from sgclassify.stages.config import StageConfig
from sgclassify.stages.flags import SgFlag
from sgclassify.stages.prepare import PreparedExposure, prepare_exposure
from sgclassify.stages.read.header import ExposureHeader
from sgclassify.stages.tile import TileStamps, extract_tile

if TYPE_CHECKING:
    from sgclassify.model.runtime import Classifier

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

HISTOGRAM_EDGES: Final[tuple[float, ...]] = tuple(k / 20 for k in range(21))
"""Edges of the bins of p_star in the receipts."""

SAMPLE_SIZE: Final = 200
"""Objects of a tile that its receipt shows for the sky map."""

CHAIN_ARCSEC: Final = 30.0


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
    """

    path: Path | None
    sha256: str
    batch_size: int
    threads: int
    device: str = "cpu"


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

    Catalogue positions may lie off the detector by the tolerances. The rest is for association: what the objects
    of a tile depend on reaches over its border by chains of neighbours within the match radius; sources would
    have to stand side by side without a gap for a chain as long as `CHAIN_ARCSEC`.
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
    p_star = classifier_of(model)(stamps) if len(stamps) else np.empty(0, dtype=np.float32)
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
    blind = (flags & int(SgFlag.NOT_SCORED)) != 0
    failed = ~np.isfinite(p_star) & ~blind
    flags = np.where(failed, flags | int(SgFlag.NOT_FINITE | SgFlag.NOT_SCORED), flags).astype(np.int32)
    null = blind | failed
    p_star = np.where(null, np.float32(0), p_star).astype(np.float32)
    classes = pa.DictionaryArray.from_arrays(
        pa.array(np.where(p_star >= 0.5, 0, 1).astype(np.int8), mask=null), pa.array(["star", "galaxy"])
    )
    return pa.table(
        {
            "object_id": stamps.object_id,
            "ra": stamps.ra,
            "dec": stamps.dec,
            "p_star": pa.array(p_star, mask=null),
            "p_galaxy": pa.array((np.float32(1) - p_star).astype(np.float32), mask=null),
            "sg_class": classes,
            "sg_flags": flags,
            "n_bands": stamps.n_bands,
            "bands": pa.array(stamps.bands, pa.string()),
        }
    )


def members_path(folder: Path, tile: TilePlan) -> Path:
    """File in the work folder that holds the members of a tile and their probabilities."""
    return folder / f"{tile.order}-{tile.pixel}.parquet"
