"""Which exposures touch which sky tile, from headers alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from astropy.wcs import Wcsprm

from sgclassify.stages import healpix
from sgclassify.stages.arrays import F64, I64, Bool
from sgclassify.stages.bands import PIXEL_SCALE
from sgclassify.stages.config import StageConfig
from sgclassify.stages.errors import UnusableInputError
from sgclassify.stages.read.header import ExposureHeader

SAMPLES: Final = 16
"""Points on each side of a detector's outline, so that the outline follows the distortion of the optics."""

CHAIN_ARCSEC: Final = 30.0
"""Longest chain of detections, each within the match radius of the next, that may lead out of a tile. Such a chain
needs sources that stand side by side without a gap."""


@dataclass(frozen=True)
class Tile:
    """One unit of work.

    Attributes
    ----------
    order, pixel : int
        The HEALPix tile, nested scheme.
    exposures : tuple of str
        Sorted `exposure_id` of the exposures whose padded footprint touches the tile.
    """

    order: int
    pixel: int
    exposures: tuple[str, ...]

    def __str__(self) -> str:
        return f"tile {self.order}/{self.pixel}"


MAX_PART_ROWS: Final = 600
"""Objects of a tile that are cut and scored together. More would keep one worker busy while others have nothing left;
fewer would read the pixels around them, and the catalogues of the tile, more often."""

MAX_DEPTH: Final = 3


@dataclass(frozen=True)
class Part:
    """The objects of a tile whose anchors lie in a HEALPix pixel within it; the pixel may be the tile itself."""

    tile: Tile
    order: int
    pixel: int

    def __str__(self) -> str:
        return str(self.tile)

    def holds(self, ra: F64, dec: F64) -> Bool:
        """Which positions lie in it; ICRS degrees, shape (n,)."""
        return np.asarray(healpix.tile_of(ra, dec, self.order) == self.pixel)


def parts_of(tile: Tile, rows: int) -> list[Part]:
    """Divide a tile of about so many objects into parts of a bounded number of objects, if they lie evenly."""
    depth = 0
    while rows > MAX_PART_ROWS * 4**depth and depth < min(MAX_DEPTH, healpix.INDEX_ORDER - tile.order):
        depth += 1
    return [Part(tile, tile.order + depth, (tile.pixel << 2 * depth) + k) for k in range(4**depth)]


def tile_pad_arcsec(config: StageConfig) -> float:
    """How far outside its detector an exposure still counts for a tile: 36.15 arcsec with the default settings.

    The pad is a sum of

    - ``position_tolerance_arcsec`` and ``position_margin_px``: a row of a catalogue may lie that far off the detector;
    - twice ``blend_radius_arcsec``: the flag BLENDED of an object depends on its neighbours over the border;
    - ten times ``match_radius_arcsec``, a reserve for the matches at both ends of a chain;
    - `CHAIN_ARCSEC`: which detections make one object depends on chains of neighbours that cross the border.
    """
    off_detector = config.position_tolerance_arcsec + config.position_margin_px * PIXEL_SCALE
    return off_detector + 2.0 * config.blend_radius_arcsec + 10.0 * config.match_radius_arcsec + CHAIN_ARCSEC


def tiles_of_headers(headers: Sequence[ExposureHeader], tile_order: int, pad_arcsec: float) -> list[Tile]:
    """Distribute exposures over sky tiles.

    Parameters
    ----------
    headers : sequence of ExposureHeader
        One per exposure.
    tile_order : int
        HEALPix order of the tiles.
    pad_arcsec : float
        How far outside its detector an exposure still counts, see `tile_pad_arcsec`.

    Returns
    -------
    list of Tile
        Every tile that holds a point of a padded detector (and a few that come close), sorted by pixel;
        independent of the order of `headers`.

    Raises
    ------
    UnusableInputError
        If a footprint has no position on the sky; `read_header` refuses such files.
    ValueError
        If two headers share an `exposure_id`.
    """
    return tiles_of(((h.exposure_id, footprint_tiles(h, tile_order, pad_arcsec)) for h in headers), tile_order)


def tiles_of(footprints: Iterable[tuple[str, I64]], tile_order: int) -> list[Tile]:
    """Turn the tiles of each exposure into the exposures of each tile, sorted by pixel.

    Parameters
    ----------
    footprints : iterable of (str, ndarray of int64)
        `exposure_id` and pixels of `footprint_tiles`, which may have been computed elsewhere.
    tile_order : int
        HEALPix order of the pixels.

    Raises
    ------
    ValueError
        If an `exposure_id` comes twice.
    """
    exposures: dict[int, list[str]] = {}
    seen: set[str] = set()
    for exposure_id, pixels in footprints:
        if exposure_id in seen:
            raise ValueError(f"exposure {exposure_id} is in the plan twice")
        seen.add(exposure_id)
        for pixel in pixels.tolist():
            exposures.setdefault(pixel, []).append(exposure_id)
    return [Tile(tile_order, pixel, tuple(sorted(exposures[pixel]))) for pixel in sorted(exposures)]


def footprint_tiles(header: ExposureHeader, tile_order: int, pad_arcsec: float) -> I64:
    """Tiles, ascending HEALPix pixels of an order, that a detector touches when it is widened by a pad.

    Raises
    ------
    UnusableInputError
        If the outline has no position on the sky, or the pixels no scale.
    """
    ny, nx = header.shape
    middle_x, middle_y = (nx - 1) / 2.0, (ny - 1) / 2.0
    ra, dec = _pixel_to_sky(
        header, np.array([middle_x, middle_x + 1.0, middle_x]), np.array([middle_y, middle_y, middle_y + 1.0])
    )
    origin, along_x, along_y = healpix.unit_vectors(ra, dec)
    jacobian = np.stack([along_x - origin, along_y - origin])
    scale = float(np.linalg.svd(jacobian, compute_uv=False)[-1]) / healpix.ARCSEC
    if scale <= 0.0:
        raise _unusable(header, "the pixels have no scale on the sky")
    # A tenth more, because the scale varies over the detector. Between its sampled points, a bent side lies off its
    # chord by about 1/SAMPLES^2 of its own bend.
    pad = 1.1 * pad_arcsec / scale + max(nx, ny) / SAMPLES**2 + 2.0
    ra, dec = _pixel_to_sky(header, *_outline(-0.5 - pad, nx - 0.5 + pad, -0.5 - pad, ny - 0.5 + pad))
    return healpix.polygon_tiles(ra, dec, tile_order)


def _outline(left: float, right: float, bottom: float, top: float) -> tuple[F64, F64]:
    """Points around a rectangle, each once, (x, y)."""
    forth = np.arange(SAMPLES) / SAMPLES
    back = 1.0 - forth
    x = left + (right - left) * np.concatenate([forth, np.ones(SAMPLES), back, np.zeros(SAMPLES)])
    y = bottom + (top - bottom) * np.concatenate([np.zeros(SAMPLES), forth, np.ones(SAMPLES), back])
    return x, y


def _pixel_to_sky(header: ExposureHeader, x: F64, y: F64) -> tuple[F64, F64]:
    """Sky positions (degrees) of 0-based pixel positions, all finite.

    Calls wcslib directly where it knows the distortion (all but SIP). Building astropy's WCS object for each of
    thousands of headers would take several times longer than all the rest of the plan.
    """
    if "A_ORDER" in header.wcs_cards:
        ra, dec = header.pixel_to_sky(x, y)
    else:
        wcs = Wcsprm(header=header.wcs_cards.encode("ascii"))
        ra, dec = wcs.p2s(np.stack([x, y], axis=-1), 0)["world"].T
    if not (np.isfinite(ra).all() and np.isfinite(dec).all()):
        raise _unusable(header, "the border of the image has no position on the sky")
    return ra, dec


def _unusable(header: ExposureHeader, fault: str) -> UnusableInputError:
    return UnusableInputError(header.files.image, f"unusable WCS: {fault}", "calibrate the astrometry of the exposure")
