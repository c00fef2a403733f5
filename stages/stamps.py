"""Square stamps cut around positions, in native pixels, without resampling."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from sgclassify.stages.arrays import F64, I64

# Origins are clipped here, so that absurd or missing positions cannot overflow; no detector is that large.
_FAR = 1 << 40


def stamp_origin(x: npt.ArrayLike, size: int) -> npt.NDArray[np.int64]:
    """First pixel of a stamp along one axis: ``ceil(x - size / 2)``.

    This is the pixel that `astropy.nddata.Cutout2D` starts at, for odd and for even sizes.

    Parameters
    ----------
    x : array_like of float64
        Positions along the axis, 0-based pixels (centre of the first pixel = 0.0).
    size : int
        Side of the stamp, pixels; positive.

    Returns
    -------
    ndarray of int64
        Index of the first pixel, the shape of ``x``; may be negative. Positions that are not finite give an
        index far outside any detector.

    Raises
    ------
    ValueError
        If the size is not positive.
    """
    if size < 1:
        raise ValueError(f"stamp size must be positive, not {size}")
    first = np.ceil(np.asarray(x, dtype=np.float64) - size / 2.0)
    first = np.where(np.isnan(first), -_FAR, np.minimum(np.maximum(first, -_FAR), _FAR))
    return first.astype(np.int64)


def cut_stamps(
    array: npt.NDArray[Any], x: npt.ArrayLike, y: npt.ArrayLike, size: int, fill: float | bool = 0
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Cut one square stamp around each position.

    All stamps are made at once: for many positions or large stamps the caller goes in chunks.

    Parameters
    ----------
    array : ndarray, shape (ny, nx)
        The image, [y, x], of any dtype and byte order.
    x, y : array_like of float64, shape (n,)
        Centres, 0-based pixels of ``array``; anywhere, also far outside or not finite.
    size : int
        Side of the stamps, pixels.
    fill : float or bool
        Value of the pixels outside the array.

    Returns
    -------
    stamps : ndarray, shape (n, size, size)
        The pixels, [object, y, x], in the dtype of ``array``, native byte order. Pixel ``[k, 0, 0]`` is the
        pixel ``(stamp_origin(y[k], size), stamp_origin(x[k], size))`` of the array.
    inside : ndarray of bool, shape (n, size, size)
        Whether the pixel lies on the array.

    Raises
    ------
    ValueError
        If the array is not two-dimensional, the positions are not two equally long vectors, or the size is
        not positive.
    """
    if array.ndim != 2:
        raise ValueError(f"stamps are cut from a two-dimensional array, not from shape {array.shape}")
    first_x, first_y = stamp_origin(x, size), stamp_origin(y, size)
    if first_x.ndim != 1 or first_x.shape != first_y.shape:
        raise ValueError(f"x and y must be vectors of one length, not {first_x.shape} and {first_y.shape}")
    native = array.dtype.newbyteorder("=")
    if array.size == 0 or first_x.size == 0:
        shape = (first_x.size, size, size)
        return np.full(shape, fill, dtype=native), np.zeros(shape, dtype=np.bool_)

    ny, nx = array.shape
    if min(ny, nx) < size:
        return _cut_at_edge(array, first_x, first_y, size, fill)
    # All stamps as if they were moved into the array: right for all but those across its edge.
    place = np.clip(first_y, 0, ny - size), np.clip(first_x, 0, nx - size)
    stamps = sliding_window_view(array, (size, size))[place].astype(native, copy=False)
    inside = np.ones(stamps.shape, dtype=np.bool_)
    edge = np.flatnonzero((place[0] != first_y) | (place[1] != first_x))
    if edge.size:
        stamps[edge], inside[edge] = _cut_at_edge(array, first_x[edge], first_y[edge], size, fill)
    return stamps, inside


def _cut_at_edge(
    array: npt.NDArray[Any], first_x: I64, first_y: I64, size: int, fill: float | bool
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Stamps from their first pixels, pixel by pixel."""
    ny, nx = array.shape
    native = array.dtype.newbyteorder("=")
    step = np.arange(size)
    rows, cols = first_y[:, None] + step, first_x[:, None] + step
    row_inside, col_inside = (rows >= 0) & (rows < ny), (cols >= 0) & (cols < nx)
    inside = row_inside[:, :, None] & col_inside[:, None, :]
    # Clipped indices read some pixel of the edge where the stamp lies outside; it is overwritten at once.
    rows, cols = np.clip(rows, 0, ny - 1), np.clip(cols, 0, nx - 1)
    stamps = array[rows[:, :, None], cols[:, None, :]].astype(native, copy=False)
    np.copyto(stamps, np.asarray(fill, dtype=native), where=~inside)
    return stamps, inside


def offsets(x: F64, size: int) -> F64:
    """Offsets of the pixels of stamps from a place in each, along one axis, pixels, shape (n, size).

    The places, shape (n,), are 0-based pixels of the stamps; ``size`` is the side of the stamps.
    """
    return np.arange(size, dtype=np.float64) - x[:, None]


def squared_radius(x: F64, y: F64, size: int) -> F64:
    """Squared distances of the pixels of stamps from a place in each, px^2, shape (n, size, size), [object, y, x]."""
    return offsets(x, size)[:, None, :] ** 2 + offsets(y, size)[:, :, None] ** 2


class Boxes:
    """A square part of each of n stamps around a place in it, as far as it is in the stamp.

    Parameters
    ----------
    x, y : ndarray of float64, shape (n,)
        Places, 0-based pixels of the stamps.
    reach : float
        Pixels of the stamp at most this far from the place are in the box.
    size : int
        Side of the stamps.

    Attributes
    ----------
    rows, columns : ndarray of int64, shape (n, side)
        The pixels of the stamps that are in the boxes.
    r2 : ndarray of float64, shape (n, side, side)
        Squared distances of the pixels from the place, px^2.
    """

    def __init__(self, x: F64, y: F64, reach: float, size: int) -> None:
        self.side = min(size, math.floor(2.0 * reach) + 1)
        # a box that would leave the stamp is moved into it, and still has all pixels within reach
        last = size - self.side
        first_x, first_y = (np.minimum(np.maximum(stamp_origin(place, self.side), 0), last) for place in (x, y))
        step = np.arange(self.side)
        self.rows, self.columns = first_y[:, None] + step, first_x[:, None] + step
        self.r2 = squared_radius(x - first_x, y - first_y, self.side)
        rows = self.rows + size * np.arange(len(x))[:, None]
        self._pixels = size * rows[:, :, None] + self.columns[:, None, :]

    def cut(self, stamps: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The boxes out of stamps, shape (n, size, size); the result has shape (n, side, side)."""
        return np.take(stamps, self._pixels)
