"""One sky tile: associate the detections, cut the stamps of every band, measure the catalogue sequence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.spatial import cKDTree

from sgclassify.stages.arrays import F32, F64, I32, I64, Bool
from sgclassify.stages.associate import SkyPositions, TileObjects, objects_of_tile
from sgclassify.stages.bands import ANCHOR_ORDER, BAND_INDEX, BANDS
from sgclassify.stages.collect import BandStamps
from sgclassify.stages.config import StageConfig
from sgclassify.stages.errors import LongChainError
from sgclassify.stages.features import FEATURES
from sgclassify.stages.flags import SgFlag
from sgclassify.stages.healpix import chord, near_tile, unit_vectors
from sgclassify.stages.read.catalog import ROW_BITS
from sgclassify.stages.read.prepared import PreparedExposure
from sgclassify.stages.tangent import moved_back
from sgclassify.stages.tiling import CHAIN_ARCSEC, Part

DETECTION_SNR = 5.0
"""Signal-to-noise ratio below which a band does not count as a detection for the LOW_SNR flag."""


@dataclass(frozen=True)
class Inputs:
    """What the model is given of some objects; the first axis of every array is the object.

    Attributes
    ----------
    image : ndarray of float32, shape (n, 7, size, size)
        Sky-subtracted stamps, nanomaggies, axis order [object, band, y, x]; 0 where not valid.
    valid : ndarray of bool, shape (n, 7, size, size)
    sigma : ndarray of float32, shape (n, 7)
        Noise of a sky pixel, nanomaggies; 1 for an absent band.
    features : ndarray of float32, shape (n, 7, n_features)
        Catalogue sequence; NaN where a feature has no value.
    psf : ndarray of float32, shape (n, 7, size, size)
        PSF of each band's exposure at the source's place in the stamp; sums to 1 over the plane, all 0 where unknown.
    used : ndarray of bool, shape (n, 7)
        Bands that have enough valid pixels to be scored on.
    """

    image: F32
    valid: Bool
    sigma: F32
    features: F32
    psf: F32
    used: Bool

    def __len__(self) -> int:
        return len(self.image)


@dataclass(frozen=True)
class TileStamps(Inputs):
    """The objects of one tile, ready for the model.

    Attributes
    ----------
    object_id : ndarray of int64, shape (n,)
        From the anchor detection alone: exposure key and catalogue row.
    ra, dec : ndarray of float64, shape (n,)
        Sky position of the anchor detection, ICRS degrees.
    sg_flags : ndarray of int32, shape (n,)
    members : pyarrow.Table
        Columns ``exposure_id``, ``row``, ``object_id``, ``sg_flags``: which catalogue row belongs to which object.
    """

    object_id: I64
    ra: F64
    dec: F64
    sg_flags: I32
    members: pa.Table

    @property
    def n_bands(self) -> npt.NDArray[np.int8]:
        """Number of bands used, shape (n,)."""
        return np.asarray(self.used.sum(axis=1), dtype=np.int8)

    @property
    def bands(self) -> list[str]:
        """Bands used, such as ``"u,g,r,i"``, in order of wavelength."""
        return [",".join(band for band, on in zip(BANDS, row, strict=True) if on) for row in self.used]


@dataclass(frozen=True)
class _Pool:
    """Usable detections of all exposures of a tile, ordered by exposure, then by row."""

    at: SkyPositions
    x: F64
    y: F64
    sg_flags: I32

    def near(self, order: int, pixel: int) -> _Pool:
        """The detections within `CHAIN_ARCSEC` of a tile: all that may have to do with its objects."""
        near = near_tile(self.at.ra, self.at.dec, order, pixel, CHAIN_ARCSEC)
        return _Pool(self.at.take(near), self.x[near], self.y[near], self.sg_flags[near])

    def load(self, margin_arcsec: float) -> SkyPositions:
        """All detections: the exposures of a tile were chosen with a margin of `CHAIN_ARCSEC`."""
        if margin_arcsec > CHAIN_ARCSEC:
            raise LongChainError(
                f"detections within the match radius of each other form a chain of more than {CHAIN_ARCSEC / 2:.0f}"
                " arcsec; a catalogue of this tile is not one of separate sources"
            )
        return self.at


@dataclass(frozen=True)
class _Objects:
    """Objects of a tile, in order of their id, and the pool's detections that belong to them.

    Attributes
    ----------
    object_id, anchor : ndarray of int64, shape (n,)
        Id of each object, and its anchor detection.
    member, owner : ndarray of int64, shape (m,)
        Detections of all objects, and the number of the object that each belongs to.
    """

    object_id: I64
    anchor: I64
    member: I64
    owner: I64


def anchor_order(prepared: Sequence[PreparedExposure]) -> list[PreparedExposure]:
    """Exposures from the deepest band to the shallowest, by name within a band, whatever their order."""
    return sorted(prepared, key=lambda p: (ANCHOR_ORDER.index(p.header.band), p.exposure_id))


def _pool(exposures: Sequence[PreparedExposure]) -> _Pool:
    tables = [exposure.usable_detections() for exposure in exposures]
    rank = np.repeat(np.arange(len(tables), dtype=np.int64), [table.num_rows for table in tables])
    column = {name: np.concatenate([table[name].to_numpy() for table in tables]) for name in tables[0].column_names}
    at = SkyPositions(column["ra"], column["dec"], rank, column["row"])
    return _Pool(at, column["x"], column["y"], column["sg_flags"])


def extract_tile(
    order: int,
    pixel: int,
    prepared: Sequence[PreparedExposure],
    stamp_size: int,
    config: StageConfig,
    wanted: Callable[[F64, F64], Bool] | None = None,
    part: Part | None = None,
) -> TileStamps:
    """Associate a tile's detections into objects and cut and measure their stamps.

    Parameters
    ----------
    order, pixel : int
        HEALPix order and nested pixel of the tile.
    prepared : sequence of PreparedExposure
        Every exposure that covers the tile or its margin, in any order.
    stamp_size : int
        Side of the stamps, pixels (the model's contract).
    wanted : callable, optional
        Takes the positions of the objects, degrees; returns which of them to cut and measure. None for all. The result
        for an object does not depend on which others are wanted.
    part : Part, optional
        Part of the tile to extract, instead of the objects that are wanted. This costs less: nothing is associated that
        is far from the part.

    Returns
    -------
    TileStamps
        Objects whose anchor detection lies in the tile, in order of their `object_id`.
    """
    exposures = anchor_order(prepared)
    pool, found, wanted = _associated(_pool(exposures), order, pixel, config, wanted, part)
    objects = _chosen(pool, found, exposures, wanted)
    member, owner = objects.member, objects.owner
    ra, dec = pool.at.ra[objects.anchor], pool.at.dec[objects.anchor]

    stamps = BandStamps(len(ra), stamp_size)
    detected = np.zeros((len(ra), len(BANDS)), dtype=bool)
    for number, exposure in enumerate(exposures):
        own = pool.at.rank[member] == number
        x, y = _project(exposure, ra, dec)
        x[owner[own]] = pool.x[member[own]]
        y[owner[own]] = pool.y[member[own]]
        stamps.add_exposure(exposure, number, x, y, config)
        detected[owner[own], BAND_INDEX[exposure.header.band]] = True
    features = stamps.measure(exposures, detected, config)

    flags = stamps.flags()
    np.bitwise_or.at(flags, owner, pool.sg_flags[member])
    flags[_blended(pool, objects, config)] |= int(SgFlag.BLENDED)
    snr = np.sinh(features[:, :, FEATURES.index("snr")])
    flags[~(snr >= DETECTION_SNR).any(axis=1)] |= int(SgFlag.LOW_SNR)
    names = np.array([p.exposure_id for p in exposures], dtype=object)
    members = pa.table(
        {
            "exposure_id": pa.array(names[pool.at.rank[member]].tolist(), pa.string()),
            "row": pool.at.row[member],
            "object_id": objects.object_id[owner],
            "sg_flags": pool.sg_flags[member],
        }
    )
    return TileStamps(
        object_id=objects.object_id,
        ra=ra,
        dec=dec,
        sg_flags=flags,
        used=stamps.used,
        image=stamps.image,
        valid=stamps.valid,
        sigma=stamps.sigma,
        features=features,
        psf=stamps.psf,
        members=members,
    )


def _associated(
    pool: _Pool,
    order: int,
    pixel: int,
    config: StageConfig,
    wanted: Callable[[F64, F64], Bool] | None,
    part: Part | None,
) -> tuple[_Pool, TileObjects, Callable[[F64, F64], Bool] | None]:
    """Detections near the tile or its part, the objects among them, and which of these are wanted."""

    def objects_of(order: int, pixel: int) -> tuple[_Pool, TileObjects]:
        near = pool.near(order, pixel)
        margin = 2.0 * config.blend_radius_arcsec
        return near, objects_of_tile(order, pixel, near.load, config.match_radius_arcsec, margin)

    if part is None:
        return *objects_of(order, pixel), wanted
    try:
        return *objects_of(part.order, part.pixel), None
    except LongChainError:
        # a chain that leads far out of the part may yet end in the tile
        return *objects_of(order, pixel), part.holds


def _chosen(
    pool: _Pool, found: TileObjects, exposures: Sequence[PreparedExposure], wanted: Callable[[F64, F64], Bool] | None
) -> _Objects:
    """The objects that are wanted, all if it is None, in order of their id."""
    # found's arrays run over the members; source leads back into the pool
    member, owner, anchor = found.source, found.object_index, found.source[found.anchor]
    if wanted is not None:
        keep = wanted(pool.at.ra[anchor], pool.at.dec[anchor])
        kept = keep[owner]
        member, owner = member[kept], (np.cumsum(keep) - 1)[owner[kept]]
        anchor = anchor[keep]
    key = np.array([p.header.exposure_key for p in exposures], dtype=np.int64)
    object_id = (key[pool.at.rank[anchor]] << ROW_BITS) | pool.at.row[anchor]
    rank = np.argsort(object_id, kind="stable")
    return _Objects(object_id[rank], anchor[rank], member, np.argsort(rank, kind="stable")[owner])


def _project(exposure: PreparedExposure, ra: F64, dec: F64) -> tuple[F64, F64]:
    """Positions on an exposure's detector, 0-based pixels, of sky positions in the system of its catalogue."""
    return exposure.header.sky_to_pixel(*moved_back(ra, dec, exposure.offset_deg, exposure.header.centre))


def _blended(pool: _Pool, objects: _Objects, config: StageConfig) -> I64:
    """Objects with a detection of another object within the blending radius of their anchor.

    The detections of one source in several exposures belong to one object, so any other detection is a neighbour.
    """
    owner = np.full(len(pool.at), -1, dtype=np.int64)
    owner[objects.member] = objects.owner
    tree = cKDTree(unit_vectors(pool.at.ra, pool.at.dec))
    points = unit_vectors(pool.at.ra[objects.anchor], pool.at.dec[objects.anchor])
    pairs = cKDTree(points).sparse_distance_matrix(tree, chord(config.blend_radius_arcsec), output_type="ndarray")
    return np.unique(pairs["i"][owner[pairs["j"]] != pairs["i"]])
