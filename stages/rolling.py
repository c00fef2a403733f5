"""Stamps cut from an image that goes by in bands of rows, so that one pass over the pixels is enough."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sgclassify.stages.arrays import F32, F64, I64, U16, Bool, Columns
from sgclassify.stages.flags import InputFlag
from sgclassify.stages.stamps import cut_stamps, stamp_origin


@dataclass(frozen=True)
class _Rows(Columns):
    """Rows of a detector, all columns: pixels, which are data, and FLG."""

    image: F32
    valid: Bool
    flags: U16

    def part(self, rows: slice) -> _Rows:
        """Some of the rows, copied: a view would hold on to all."""
        return _Rows(self.image[rows].copy(), self.valid[rows].copy(), self.flags[rows].copy())


class RollingStamps:
    """Square stamps around places on a detector whose rows are added band by band, from the first to the last.

    Each stamp is cut in the band that holds its last row. Of the bands before, only the rows that it needs are kept.

    Parameters
    ----------
    x, y : ndarray of float64, shape (n,)
        Places on the detector, 0-based pixels, finite; also outside.
    size : int
        Side of the stamps, pixels.
    shape : tuple of int
        (ny, nx) of the detector.

    Attributes
    ----------
    x, y : ndarray of float64, shape (n,)
        The places.
    size : int
        Side of the stamps, pixels.
    first_x, first_y : ndarray of int64, shape (n,)
        First pixel of each stamp on the detector, see `sgclassify.stages.stamps.stamp_origin`.
    image : ndarray of float32, shape (n, size, size)
        Pixels, [source, y, x]; 0 where they are not data.
    valid, saturated : ndarray of bool, shape (n, size, size)
        Pixels that are data, and those flagged as saturated.
    """

    def __init__(self, x: F64, y: F64, size: int, shape: tuple[int, int]) -> None:
        self.x, self.y, self.size = x, y, size
        self.first_x, self.first_y = stamp_origin(x, size), stamp_origin(y, size)
        self.image = np.zeros((len(x), size, size), dtype=np.float32)
        self.valid = np.zeros(self.image.shape, dtype=np.bool_)
        self.saturated = np.zeros(self.image.shape, dtype=np.bool_)
        end = np.minimum(self.first_y + size, shape[0])
        self._order = np.argsort(end, kind="stable")
        self._end = end[self._order]
        self._done = 0
        empty = np.zeros((0, shape[1]))
        self._before = _Rows(empty.astype(np.float32), empty.astype(np.bool_), empty.astype(np.uint16))

    def __len__(self) -> int:
        return len(self.x)

    def add(self, y0: int, image: F32, valid: Bool, flags: U16) -> None:
        """Take the next rows, which begin at row ``y0``: all columns of the pixels, of which are data, and of FLG."""
        done = int(np.searchsorted(self._end, y0 + len(image), side="right"))
        ready = self._order[self._done : done]
        self._done = done
        rows, keep = _Rows(image, valid, flags), self.size - 1
        begun = self.first_y[ready] < y0
        self._cut(ready[~begun], y0, rows)
        if begun.any() or len(image) < keep:
            seam = _Rows.concatenate((self._before, rows.part(slice(keep))))
            self._cut(ready[begun], y0 - len(self._before.image), seam)
            # a band with fewer rows than a stamp does not hold all that the next one needs
            rows = rows if len(image) >= keep else seam
        self._before = rows.part(slice(max(0, len(rows.image) - keep), None))

    def _cut(self, index: I64, y0: int, rows: _Rows) -> None:
        """Cut some stamps from rows that begin at ``y0`` and hold all of them, as far as they are on the detector."""
        half = self.size / 2.0
        at = self.first_x[index] + half, self.first_y[index] - y0 + half, self.size
        valid = cut_stamps(rows.valid, *at, fill=False)[0]
        self.valid[index] = valid
        self.image[index] = np.where(valid, cut_stamps(rows.image, *at)[0], np.float32(0))
        self.saturated[index] = (cut_stamps(rows.flags, *at)[0] & int(InputFlag.SATURATED)) != 0
