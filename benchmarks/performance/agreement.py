"""Whether two runs give the same answers: objects matched by position, and their probabilities compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from scipy.spatial import cKDTree

from sgclassify.stages.arrays import F64
from sgclassify.stages.healpix import unit_vectors

SAME_ARCSEC = 0.01
"""Objects nearer than this are the same one: both take their position from the same detection."""

SAME_P = 1e-3


@dataclass(frozen=True)
class Agreement:
    """Shares of objects that the other run has too, and of these with a `p_star` within `SAME_P`."""

    objects: float
    same: float
    largest: float
    median: float


def objects_of(output: Path) -> tuple[F64, F64, F64]:
    """Right ascension, declination and p_star of all objects of a run."""
    names = ["ra", "dec", "p_star"]
    tables = [pq.read_table(path, columns=names) for path in sorted(output.rglob("Npix=*.parquet"))]
    ra, dec, p_star = (
        np.concatenate([t[name].to_numpy(zero_copy_only=False).astype(np.float64) for t in tables]) for name in names
    )
    return ra, dec, p_star


def agreement(first: tuple[F64, F64, F64], second: tuple[F64, F64, F64]) -> Agreement:
    """Compare objects, given as right ascensions, declinations (degrees) and p_star."""
    tree = cKDTree(unit_vectors(second[0], second[1]))
    apart, nearest = tree.query(unit_vectors(first[0], first[1]))
    found = apart < np.radians(SAME_ARCSEC / 3600)
    p, q = first[2][found], second[2][nearest[found]]
    difference = np.where(np.isnan(p) & np.isnan(q), 0.0, np.abs(p - q))
    difference = np.where(np.isnan(difference), 1.0, difference)
    if not difference.size:
        return Agreement(0.0, 0.0, 1.0, 1.0)
    return Agreement(
        float(found.mean()), float((difference <= SAME_P).mean()), float(difference.max()), float(np.median(difference))
    )
