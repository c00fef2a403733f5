"""The sample of objects that the sky map shows: the same share of every tile, whichever run computed it.

How many objects a run has is not known when its first tile is published, so the samples are nested: of every object a
hash of its ``object_id`` tells to how many halvings it belongs. Each tile keeps those of one level, and the map shows
those of the highest level of all.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt

from sgclassify.stages.arrays import F32, F64, I64

MAX_POINTS: Final = 20_000
"""Objects on the sky map, at most."""

MAX_SAMPLED: Final = 100_000
"""Catalogue rows up to which the receipts of all tiles keep every object. More than `MAX_POINTS`, since an object has
one row or many, and nobody knows before how many."""

HISTOGRAM_EDGES: Final[tuple[float, ...]] = tuple(k / 20 for k in range(21))
"""Edges of the bins of p_star in the receipts."""

SAMPLE: Final = np.dtype([("ra", "<f8"), ("dec", "<f8"), ("kind", "i1"), ("rank", "u1")])
"""An object of a sample: position (degrees), what it is, and the highest level that it belongs to."""

GALAXY, STAR, NOT_SCORED = 0, 1, -1

_MOST_PARTS: Final = 4096

Sample = npt.NDArray[np.void]


class Sampled(Protocol):
    """What the receipt of a tile (`sgclassify.pipeline.record.receipts.TileReceipt`) tells of its objects."""

    @property
    def n_objects(self) -> int: ...
    @property
    def histogram(self) -> I64: ...
    @property
    def sample(self) -> Sample: ...
    @property
    def sample_level(self) -> int: ...


def ranks(object_id: I64) -> npt.NDArray[np.uint8]:
    """Highest level of each object; half of all objects reach level 1, a quarter level 2, and so on."""
    whole = np.asarray(object_id, dtype="<i8").tobytes()
    hashes = b"".join(blake2b(whole[k : k + 8], digest_size=8).digest() for k in range(0, len(whole), 8))
    # zeros at the lower end of the hash; one bit is set so that there is an end
    bits = np.frombuffer(hashes, dtype="<u8") | np.uint64(1 << 63)
    lowest = bits & (~bits + np.uint64(1))
    return (np.frexp(lowest.astype(np.float64))[1] - 1).astype(np.uint8)


def draw(object_id: I64, ra: F64, dec: F64, p_star: F32, level: int) -> Sample:
    """The objects of a tile that belong to a level: one of every ``2**level``.

    Positions are in degrees; `p_star` is NaN where an object is not scored.
    """
    rank = ranks(object_id)
    chosen = rank >= level
    sample = np.empty(np.count_nonzero(chosen), dtype=SAMPLE)
    # to 0.004 arcsec, which no picture shows: the receipts are text
    sample["ra"], sample["dec"] = np.round(ra[chosen], 6), np.round(dec[chosen], 6)
    p = p_star[chosen]
    sample["kind"] = np.where(np.isnan(p), NOT_SCORED, np.where(p >= 0.5, STAR, GALAXY))
    sample["rank"] = rank[chosen]
    return sample


def level_for(n_rows: int) -> int:
    """Level at which the tiles of a run keep their samples; a run has no more objects than catalogue rows, `n_rows`."""
    level = 0
    while n_rows > MAX_SAMPLED << level:
        level += 1
    return level


class SkySample:
    """Objects of the published tiles for the pictures; its memory does not grow with their number."""

    def __init__(self) -> None:
        self.histogram = np.zeros(len(HISTOGRAM_EDGES) - 1, dtype=np.int64)
        self.n_objects = 0
        self._level = 0
        self._parts: list[Sample] = []
        self._n = 0

    def add(self, receipt: Sampled) -> None:
        """Add a tile."""
        self.histogram += receipt.histogram
        self.n_objects += receipt.n_objects
        self._level = max(self._level, receipt.sample_level)
        part = receipt.sample[receipt.sample["rank"] >= self._level]
        if len(part):
            self._parts.append(part)
            self._n += len(part)
        if self._n > 2 * MAX_POINTS or len(self._parts) > _MOST_PARTS:
            self._thin()

    def points(self) -> tuple[Sample, int]:
        """The objects to draw, in order of their positions, and N where they are one of every N objects.

        Neither depends on the order of the tiles, or on the level at which each of them kept its sample as long as
        that is not above the one that is needed.
        """
        self._thin()
        return np.sort(self._parts[0]), 2**self._level

    def _thin(self) -> None:
        """Raise the level until the objects are few enough."""
        kept = np.concatenate([np.empty(0, dtype=SAMPLE), *self._parts])
        kept = kept[kept["rank"] >= self._level]
        while len(kept) > MAX_POINTS:
            self._level += 1
            kept = kept[kept["rank"] >= self._level]
        self._parts, self._n = [kept], len(kept)
