"""HEALPix tiles (nested scheme): index of a position, cone around a tile, tiles under a polygon.

A thin layer over ``cdshealpix``. A position belongs to the tile that the HATS spatial index (order 29) puts
it in, so that the tile of an object is always the partition its row is written to.
"""

from __future__ import annotations

from typing import Final

import cdshealpix
import numpy as np
from astropy import units
from astropy.coordinates import Latitude, Longitude
from numpy.typing import ArrayLike

from sgclassify.stages.arrays import F64, I64, Bool

INDEX_ORDER: Final = 29
"""Order of the spatial index ``_healpix_29`` of a HATS catalogue."""

ARCSEC: Final = np.pi / (180.0 * 3600.0)
"""One arcsecond in radians."""

# One thread: the processes of a run already share the cores among themselves.
_THREADS: Final = 1


def unit_vectors(ra: ArrayLike, dec: ArrayLike) -> F64:
    """Unit vectors, shape (n, 3), axis order x, y, z, of sky positions: ICRS degrees, shape (n,).

    Raises
    ------
    ValueError
        If a position is not finite or a declination lies outside [-90, 90].
    """
    lon, lat = _radians(ra, dec)
    cos_lat = np.cos(lat)
    return np.stack([cos_lat * np.cos(lon), cos_lat * np.sin(lon), np.sin(lat)], axis=-1)


def chord(angle_arcsec: float) -> float:
    """Length, in radii, of the chord that an angle cuts on the unit sphere; more than 180 degrees count as 180."""
    return float(2.0 * np.sin(min(angle_arcsec * ARCSEC, np.pi) / 2.0))


def angle_of_chord(length: F64) -> F64:
    """Angle, arcsec, that belongs to a chord of the unit sphere (accurate for the smallest separations)."""
    angle: F64 = 2.0 * np.arcsin(np.minimum(length / 2.0, 1.0)) / ARCSEC
    return angle


def index29(ra: ArrayLike, dec: ArrayLike) -> I64:
    """Order-29 nested HEALPix index, the HATS spatial index, of positions: ICRS degrees of any turn, shape (n,).

    Raises
    ------
    ValueError
        If a position is not finite or a declination lies outside [-90, 90].
    """
    lon, lat = _radians(ra, dec)
    index = cdshealpix.nested.lonlat_to_healpix(
        Longitude(lon, units.rad), Latitude(lat, units.rad), INDEX_ORDER, num_threads=_THREADS
    )
    return np.asarray(index).astype(np.int64).reshape(lon.shape)


def tile_of(ra: ArrayLike, dec: ArrayLike, order: int) -> I64:
    """Nested pixel, at an order from 0 to 29, of the tile that holds each position: ICRS degrees, shape (n,)."""
    return tile_of_index(index29(ra, dec), order)


def tile_of_index(index: I64, order: int) -> I64:
    """Nested pixel, at an order from 0 to 29, of the tile that holds each order-29 nested index."""
    return index >> np.int64(2 * (INDEX_ORDER - order))


def tile_cone(order: int, pixel: int) -> tuple[F64, float]:
    """The cone that contains a tile: unit vector of the tile's centre, shape (3,), and radius, arcsec."""
    lon, lat = cdshealpix.nested.healpix_to_lonlat(np.array([pixel]), order, num_threads=_THREADS)
    centre = unit_vectors(lon.deg, lat.deg)[0]
    lon, lat = cdshealpix.nested.vertices(np.array([pixel]), order, step=8, num_threads=_THREADS)
    border = unit_vectors(lon.deg.ravel(), lat.deg.ravel())
    radius = float(angle_of_chord(np.linalg.norm(border - centre, axis=1)).max())
    # The border is curved between its sampled points: two per cent is far more than it can bulge.
    return centre, 1.02 * radius


def near_tile(ra: ArrayLike, dec: ArrayLike, order: int, pixel: int, margin_arcsec: float) -> Bool:
    """Positions within the cone around a tile, widened by a margin.

    Parameters
    ----------
    ra, dec : array_like of float64, shape (n,)
        ICRS, degrees.
    order, pixel : int
        The tile.
    margin_arcsec : float
        Added to the radius of the tile's cone, arcsec.

    Returns
    -------
    ndarray of bool, shape (n,)
        True at least for every position in the tile and for every position within the margin of it.
    """
    centre, radius = tile_cone(order, pixel)
    distance = angle_of_chord(np.linalg.norm(unit_vectors(ra, dec) - centre, axis=1))
    return distance <= radius + margin_arcsec


def polygon_tiles(ra: ArrayLike, dec: ArrayLike, order: int) -> I64:
    """The tiles that a polygon on the sky touches.

    Parameters
    ----------
    ra, dec : array_like of float64, shape (n,)
        Corners in order around the polygon, ICRS, degrees; sides are great circles. The polygon is the
        smaller of the two parts of the sphere, and may hold a pole or cross right ascension 0.
    order : int
        HEALPix order of the tiles.

    Returns
    -------
    ndarray of int64
        Ascending nested pixel numbers.

    Raises
    ------
    ValueError
        If fewer than three different corners are given, or one is not finite.
    """
    lon, lat = _radians(ra, dec)
    pixels, _, _ = cdshealpix.nested.polygon_search(
        Longitude(lon, units.rad), Latitude(lat, units.rad), order, flat=True
    )
    corners = tile_of(np.degrees(lon), np.degrees(lat), order)
    return np.union1d(np.asarray(pixels).astype(np.int64), corners)


def _radians(ra: ArrayLike, dec: ArrayLike) -> tuple[F64, F64]:
    """Checked positions in radians, right ascension in [0, 2 pi)."""
    lon = np.atleast_1d(np.asarray(ra, dtype=np.float64))
    lat = np.atleast_1d(np.asarray(dec, dtype=np.float64))
    if not (np.isfinite(lon).all() and np.isfinite(lat).all() and (np.abs(lat) <= 90.0).all()):
        raise ValueError("positions must be finite, with declinations within [-90, 90] degrees")
    return np.radians(lon % 360.0), np.radians(lat)
