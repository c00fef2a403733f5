"""Offsets of a fraction of an arcminute, as vectors on the plane that touches the sky at a point.

Differences of right ascension will not do: near a pole they can have any value, and even times cos(Dec) they change
over a field.
"""

from __future__ import annotations

import numpy as np

from sgclassify.stages.arrays import F64
from sgclassify.stages.healpix import unit_vectors

Position = tuple[float, float]
"""Right ascension and declination, degrees."""


def offsets(ra: F64, dec: F64, from_ra: F64, from_dec: F64, centre: Position) -> tuple[F64, F64]:
    """Offsets of positions from reference positions near them.

    Parameters
    ----------
    ra, dec, from_ra, from_dec : ndarray of float64, shape (n,)
        The positions, and their reference positions; degrees.
    centre : (float, float)
        Where the plane touches the sky; RA and Dec, degrees.

    Returns
    -------
    east, north : ndarray of float64, shape (n,)
        Degrees, in the directions that east and north have at the centre.
    """
    step = np.degrees(unit_vectors(ra, dec) - unit_vectors(from_ra, from_dec))
    east, north = _axes(centre)
    return (step * east).sum(axis=1), (step * north).sum(axis=1)


def moved_back(ra: F64, dec: F64, offset: tuple[float, float], centre: Position) -> tuple[F64, F64]:
    """Positions from which an offset leads to the given ones.

    Parameters
    ----------
    ra, dec : ndarray of float64, shape (n,)
        Degrees.
    offset : (float, float)
        East and north at the centre, degrees, as from `offsets`.
    centre : (float, float)
        Where the plane touches the sky; RA and Dec, degrees.

    Returns
    -------
    ra, dec : ndarray of float64, shape (n,)
        Degrees; unchanged to the last bit where the offset is 0.
    """
    east, north = _axes(centre)
    tx, ty, tz = np.radians(offset[0]) * east + np.radians(offset[1]) * north
    x, y, z = unit_vectors(ra, dec).T
    # Compute the changes of the angles, not the angles themselves: this loses no digits.
    turn = np.arctan2(y * tx - x * ty, x * (x - tx) + y * (y - ty))
    before, after = np.hypot(x, y), np.hypot(x - tx, y - ty)
    rise = np.arctan2(before * (z - tz) - z * after, before * after + z * (z - tz))
    return ra + np.degrees(turn), np.clip(dec + np.degrees(rise), -90.0, 90.0)


def _axes(centre: Position) -> tuple[F64, F64]:
    """Unit vectors to the east and the north at a point."""
    a, d = np.radians(centre[0]), np.radians(centre[1])
    east = np.array([-np.sin(a), np.cos(a), 0.0])
    north = np.array([-np.sin(d) * np.cos(a), -np.sin(d) * np.sin(a), np.cos(d)])
    return east, north
