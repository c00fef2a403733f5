"""Find the same object in two tables by position: truth, and SExtractor's catalogues."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import numpy as np
import pyarrow as pa
from scipy.spatial import cKDTree

from sgclassify.model.data.shards import CATALOG_COLUMNS
from sgclassify.stages.arrays import F32, I64, Bool
from sgclassify.stages.bands import BANDS, PIXEL_SCALE
from sgclassify.stages.healpix import unit_vectors

MATCH_RADIUS_ARCSEC: Final = 2 * PIXEL_SCALE
_RADIUS: Final = np.radians(MATCH_RADIUS_ARCSEC / 3600.0)


def match_truth(ra: Any, dec: Any, truth: pa.Table, radius_arcsec: float = MATCH_RADIUS_ARCSEC) -> I64:
    """Match objects to truth, one to one, the brightest truth first, each to its nearest free object.

    Where truth is equally bright, or has no magnitudes, the closest free pair comes first.

    Parameters
    ----------
    ra, dec : ndarray of float64, shape (n,)
        Positions of the objects, degrees.
    truth : pyarrow.Table
        Truth table (FORMATS section 6); the magnitudes may be absent or null.

    Returns
    -------
    ndarray of int64, shape (n,)
        Row of the truth table; -1 where nothing matches.
    """
    match = np.full(len(ra), -1, dtype=np.int64)
    if not len(ra) or not truth.num_rows:
        return match
    tree = cKDTree(unit_vectors(ra, dec))
    points = unit_vectors(truth["ra"].to_numpy(), truth["dec"].to_numpy())
    brightness = np.full(truth.num_rows, 99.0)
    for name in (f"mag_{band}" for band in BANDS):
        if name in truth.column_names:
            magnitude = truth[name].to_numpy(zero_copy_only=False)
            brightness = np.minimum(brightness, np.where(np.isfinite(magnitude), magnitude, 99.0))
    radius = np.radians(radius_arcsec / 3600.0)
    pairs = cKDTree(points).sparse_distance_matrix(tree, radius, output_type="ndarray")
    pairs = pairs[np.lexsort((pairs["j"], pairs["i"], pairs["v"], brightness[pairs["i"]]))]
    free = np.ones(truth.num_rows, dtype=bool)
    for row, k in zip(pairs["i"].tolist(), pairs["j"].tolist(), strict=True):
        if free[row] and match[k] < 0:
            match[k], free[row] = row, False
    return match


def near_truth(truth: pa.Table) -> Callable[[Any, Any], Bool]:
    """Make a function of positions (ra, dec, degrees): is any source of the truth table within the match radius?"""
    tree = cKDTree(unit_vectors(truth["ra"].to_numpy(), truth["dec"].to_numpy()))

    def near(ra: Any, dec: Any) -> Bool:
        distance, _ = tree.query(unit_vectors(ra, dec))
        return np.asarray(distance <= _RADIUS)

    return near


def catalog_columns(ra: Any, dec: Any, catalogs: list[tuple[str, pa.Table]]) -> F32:
    """SExtractor's measurements of each object, by position, shape (n, 7, len(CATALOG_COLUMNS))."""
    result = np.full((len(ra), len(BANDS), len(CATALOG_COLUMNS)), np.nan, dtype=np.float32)
    points = unit_vectors(ra, dec)
    for band, table in catalogs:
        if not table.num_rows:
            continue
        distance, row = cKDTree(unit_vectors(table["RA"].to_numpy(), table["DEC"].to_numpy())).query(points)
        here = (distance < _RADIUS) & ~np.isfinite(result[:, BANDS.index(band)]).any(axis=1)
        for k, name in enumerate(CATALOG_COLUMNS):
            values = table[name].cast(pa.float32()).to_numpy(zero_copy_only=False)
            result[here, BANDS.index(band), k] = values[row[here]]
    return result
