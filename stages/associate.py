"""Association of the detections of all exposures into objects, on the whole sky or one tile at a time.

The exposures are taken in order of their rank (deepest band first). The detections of one exposure are matched one to
one, nearest pair first, to the anchors of the objects found so far. A detection without a partner becomes the anchor of
a new object. So every detection is in exactly one object, an object has at most one detection per exposure, and no
member is farther than the radius from its anchor.

Two detections can influence each other only through a chain of steps no longer than the radius. So a tile has the same
objects as the whole sky if all chains that leave the tile end among the loaded detections: `objects_of_tile` widens its
margin until they do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import ArrayLike
from scipy.spatial import cKDTree

from sgclassify.stages import healpix
from sgclassify.stages.arrays import F64, I64, Bool, Columns

MAX_PAIRS: Final = 1_000_000
"""Pairs of positions held in memory at once (some 50 MB). Real catalogues stay far below it; beyond it, pairs
are taken in shells of separation."""

# Separations are compared in whole micro-arcseconds. That is far below any centroid error, and far above rounding,
# which may differ between processors and must not decide between two partners.
_PER_ARCSEC: Final = 1_000_000


@dataclass(frozen=True)
class SkyPositions(Columns):
    """Detections as association sees them.

    Attributes
    ----------
    ra, dec : ndarray of float64, shape (n,)
        ICRS, degrees, finite.
    rank : ndarray of int64, shape (n,)
        Rank of the exposure, 0 = first choice as anchor; one number per exposure.
    row : ndarray of int64, shape (n,)
        Number of the detection within its exposure.
    """

    ra: F64
    dec: F64
    rank: I64
    row: I64

    def __len__(self) -> int:
        return len(self.ra)


@dataclass(frozen=True)
class Association:
    """Objects found among n detections.

    Attributes
    ----------
    object_index : ndarray of int64, shape (n,)
        Object of each detection. Objects are numbered in the canonical order of their anchors: rank, right
        ascension, declination, row.
    anchor : ndarray of int64, shape (n_objects,)
        Detection that is the anchor of each object.
    """

    object_index: I64
    anchor: I64


@dataclass(frozen=True)
class TileObjects:
    """Objects whose anchor lies in one tile, with all their members (also those across the border).

    Attributes
    ----------
    positions : SkyPositions
        The m members, sorted by object and, within one, canonically (the anchor comes first).
    source : ndarray of int64, shape (m,)
        Where each member stands in what `load` returned last.
    object_index : ndarray of int64, shape (m,)
        Object of each member, ascending.
    anchor : ndarray of int64, shape (n_objects,)
        Member that is the anchor of each object.
    margin_arcsec : float
        Margin around the tile that had to be loaded.
    """

    positions: SkyPositions
    source: I64
    object_index: I64
    anchor: I64
    margin_arcsec: float


def canonical_order(ra: F64, dec: F64, rank: I64, row: I64) -> I64:
    """Order of detections that does not depend on how they were listed: by rank, ra, dec, row of `SkyPositions`."""
    return np.lexsort((row, dec, ra, rank)).astype(np.int64)


def associate(
    ra: ArrayLike, dec: ArrayLike, exposure_rank: ArrayLike, radius_arcsec: float, row: ArrayLike | None = None
) -> Association:
    """Group detections into objects.

    Pairs of equal separation are taken in the order of their objects, then of their detections; detections at
    exactly the same position count as one place and are matched together.

    Parameters
    ----------
    ra, dec : array_like of float64, shape (n,)
        ICRS, degrees.
    exposure_rank : array_like of int64, shape (n,)
        Rank of the exposure of each detection, 0 = first choice as anchor; one number per exposure.
    radius_arcsec : float
        Largest distance between a member and its anchor.
    row : array_like of int64, shape (n,), optional
        Number of the detection within its exposure: tells apart detections of one exposure at exactly the
        same position. Without it the result may depend on the order in which such detections are listed.

    Raises
    ------
    ValueError
        If a position is not finite, the arrays differ in length, or the radius is negative or not finite.
    """
    at = _positions(ra, dec, exposure_rank, row)
    if not (np.isfinite(radius_arcsec) and radius_arcsec >= 0.0):
        raise ValueError(f"the radius must be finite and not negative, not {radius_arcsec}")
    n = len(at)
    vectors, place = _places(at.ra, at.dec)
    order = canonical_order(at.ra, at.dec, at.rank, at.row)
    object_index = np.full(n, -1, dtype=np.int64)
    anchor = np.empty(n, dtype=np.int64)
    n_objects = 0
    for exposure in np.split(order, np.flatnonzero(np.diff(at.rank[order])) + 1) if n else ():
        partner = _match(vectors, place[anchor[:n_objects]], place[exposure], radius_arcsec)
        matched = partner >= 0
        object_index[exposure[matched]] = partner[matched]
        new = exposure[~matched]
        object_index[new] = n_objects + np.arange(len(new))
        anchor[n_objects : n_objects + len(new)] = new
        n_objects += len(new)
    return Association(object_index, anchor[:n_objects].copy())


def chained(ra: ArrayLike, dec: ArrayLike, seeds: Bool, radius_arcsec: float) -> Bool:
    """Detections that can be reached from the seeds in steps no longer than the radius.

    Parameters
    ----------
    ra, dec : array_like of float64, shape (n,)
        ICRS, degrees.
    seeds : ndarray of bool, shape (n,)
        Where the chains begin.
    radius_arcsec : float
        Longest step. Steps within one exposure count too, which association would not need: the set may be
        larger than the friends of friends between exposures, never smaller.

    Returns
    -------
    ndarray of bool, shape (n,)
        True for the seeds and for all that they reach.
    """
    vectors, place = _places(np.asarray(ra, dtype=np.float64), np.asarray(dec, dtype=np.float64))
    reached = np.zeros(len(vectors), dtype=np.bool_)
    reached[place[seeds]] = True
    # Half a micro-arcsecond more, the rounding that association applies to separations.
    step = healpix.chord(radius_arcsec + 1.0 / _PER_ARCSEC)
    front, rest = np.flatnonzero(reached), np.flatnonzero(~reached)
    while len(front) and len(rest):
        nearest, _ = cKDTree(vectors[front]).query(vectors[rest], k=1, distance_upper_bound=step)
        near = np.isfinite(nearest)
        front, rest = rest[near], rest[~near]
        reached[front] = True
    return reached[place]


def closed_components(
    positions: SkyPositions, order: int, pixel: int, margin_arcsec: float, radius_arcsec: float
) -> tuple[Bool, bool]:
    """Detections that the objects of a tile may depend on, and whether all of them are known.

    Parameters
    ----------
    positions : SkyPositions
        At least all detections of the cone around the tile widened by the margin (`healpix.near_tile`).
    order, pixel : int
        The tile.
    margin_arcsec : float
        How far beyond the tile's cone everything is loaded.
    radius_arcsec : float
        Match radius.

    Returns
    -------
    members : ndarray of bool, shape (n,)
        Detections in the tile, and those that chains of steps no longer than the radius connect to them.
    closed : bool
        True if all of them keep more than the radius away from the border of the loaded cone: then no
        detection outside of it can change the tile's objects.
    """
    inside = healpix.tile_of(positions.ra, positions.dec, order) == pixel
    members = chained(positions.ra, positions.dec, inside, radius_arcsec)
    _, tile_radius = healpix.tile_cone(order, pixel)
    if tile_radius + margin_arcsec >= 180.0 * 3600.0:
        return members, True
    # Two micro-arcseconds for rounding; what keeps this distance has all its neighbours within the cone.
    safe = margin_arcsec - radius_arcsec - 2.0 / _PER_ARCSEC
    kept = healpix.near_tile(positions.ra[members], positions.dec[members], order, pixel, safe)
    return members, bool(kept.all())


def objects_of_tile(
    order: int,
    pixel: int,
    load: Callable[[float], SkyPositions],
    radius_arcsec: float,
    margin_arcsec: float | None = None,
) -> TileObjects:
    """Objects whose anchor lies in a tile, exactly as association of the whole sky would give them.

    Parameters
    ----------
    order, pixel : int
        The tile.
    load : callable
        ``load(margin_arcsec)`` returns at least all detections, of all exposures, for which
        ``healpix.near_tile(ra, dec, order, pixel, margin_arcsec)`` holds. Called again with twice the margin
        as long as a chain of detections leads out of what is loaded.
    radius_arcsec : float
        Match radius.
    margin_arcsec : float, optional
        First margin; ten radii by default.

    Returns
    -------
    TileObjects
        Independent of the order of what is loaded, and of the first margin but for `margin_arcsec` itself.
    """
    margin = max(10.0 * radius_arcsec if margin_arcsec is None else margin_arcsec, 2.0 * radius_arcsec, 0.01)
    while True:
        loaded = load(margin)
        members, closed = closed_components(loaded, order, pixel, margin, radius_arcsec)
        if closed:
            break
        margin *= 2.0
    source = np.flatnonzero(members)
    near = loaded.take(source)
    found = associate(near.ra, near.dec, near.rank, radius_arcsec, near.row)
    own = healpix.tile_of(near.ra[found.anchor], near.dec[found.anchor], order) == pixel
    number = np.where(own, np.cumsum(own) - 1, -1)[found.object_index]
    canonical = canonical_order(near.ra, near.dec, near.rank, near.row)
    canonical = canonical[number[canonical] >= 0]
    keep = canonical[np.argsort(number[canonical], kind="stable")]
    object_index = number[keep]
    anchor = np.searchsorted(object_index, np.arange(int(own.sum())))
    return TileObjects(near.take(keep), source[keep], object_index, anchor, margin)


def _positions(ra: ArrayLike, dec: ArrayLike, rank: ArrayLike, row: ArrayLike | None) -> SkyPositions:
    """Arrays of the agreed types and of one length."""
    at = SkyPositions(
        np.asarray(ra, dtype=np.float64),
        np.asarray(dec, dtype=np.float64),
        np.asarray(rank, dtype=np.int64),
        np.arange(np.size(ra), dtype=np.int64) if row is None else np.asarray(row, dtype=np.int64),
    )
    if {at.ra.shape, at.dec.shape, at.rank.shape, at.row.shape} != {(np.size(ra),)}:
        raise ValueError("ra, dec, rank and row must be one-dimensional and of one length")
    return at


def _places(ra: F64, dec: F64) -> tuple[F64, I64]:
    """Unit vectors (p, 3) of the different positions, and which of them each detection has.

    A tree over points that coincide degenerates to a list: hence all searches are among places.
    """
    different, place = np.unique(ra + 1j * dec, return_inverse=True)
    return healpix.unit_vectors(different.real, different.imag), place.astype(np.int64).reshape(ra.shape)


class _Places:
    """The detections that still lack a partner, by place."""

    def __init__(self, place: I64) -> None:
        # Stable: canonical order is kept within a place, and the first detection of a place stands for it.
        self.order = np.argsort(place, kind="stable")
        self.place, start, count = np.unique(place[self.order], return_index=True, return_counts=True)
        self.first = self.order[start]
        # Lists: the matching reads and counts them one by one.
        self.next: list[int] = start.tolist()
        self.left: list[int] = count.tolist()

    def free(self) -> I64:
        """Numbers of the places that have detections left."""
        return np.flatnonzero(self.left)

    def pop(self, number: int, count: int) -> I64:
        """The next `count` detections of a place, which then no longer lack a partner."""
        start = self.next[number]
        self.next[number] += count
        self.left[number] -= count
        return self.order[start : start + count]


def _match(vectors: F64, anchors: I64, detections: I64, radius_arcsec: float) -> I64:
    """One-to-one partners, nearest pair first.

    Parameters
    ----------
    vectors : ndarray of float64, shape (p, 3)
        Unit vectors of the places.
    anchors, detections : ndarray of int64, shape (a,), (d,)
        Places of the objects' anchors, and of one exposure's detections, in canonical order.
    radius_arcsec : float
        Largest separation.

    Returns
    -------
    ndarray of int64, shape (d,)
        Number of the anchor that each detection belongs to, -1 for none.
    """
    partner = np.full(len(detections), -1, dtype=np.int64)
    if not len(anchors) or not len(detections):
        return partner
    ours, theirs = _Places(anchors), _Places(detections)
    limit = round(radius_arcsec * _PER_ARCSEC)
    done = -1
    while done < limit:
        i_free, j_free = ours.free(), theirs.free()
        if not len(i_free) or not len(j_free):
            break
        i_tree, j_tree = cKDTree(vectors[ours.place[i_free]]), cKDTree(vectors[theirs.place[j_free]])
        done = _next_shell(i_tree, j_tree, done, limit)
        pairs = i_tree.sparse_distance_matrix(j_tree, _chord_of(done), output_type="ndarray")
        i, j = i_free[pairs["i"]], j_free[pairs["j"]]
        separation = np.rint(healpix.angle_of_chord(pairs["v"]) * _PER_ARCSEC).astype(np.int64)
        order = np.lexsort((theirs.first[j], ours.first[i], separation))
        order = order[separation[order] <= done]
        for a, d in zip(i[order].tolist(), j[order].tolist(), strict=True):
            if ours.left[a] and theirs.left[d]:
                both = min(ours.left[a], theirs.left[d])
                partner[theirs.pop(d, both)] = ours.pop(a, both)
    return partner


def _chord_of(separation: int) -> float:
    """Chord that holds all pairs whose separation rounds to so many micro-arcseconds or fewer."""
    return healpix.chord((separation + 0.6) / _PER_ARCSEC)


def _next_shell(i_tree: cKDTree, j_tree: cKDTree, done: int, limit: int) -> int:
    """Largest separation to take next, so that no more than `MAX_PAIRS` pairs of places come at once.

    All pairs up to `done` have been taken, so the free places hold none of them.
    """
    outer = limit
    while outer > done + 1 and i_tree.count_neighbors(j_tree, _chord_of(outer)) > MAX_PAIRS:
        outer = done + (outer - done) // 2
    return outer
