"""Square stamps cut around positions, in native pixels, without resampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sgclassify.stages.arrays import F32, F64, I64, U16, Bool
from sgclassify.stages.read.pixels import PixelWindow

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
    first = np.nan_to_num(first, nan=-_FAR, posinf=_FAR, neginf=-_FAR)
    return np.clip(first, -_FAR, _FAR).astype(np.int64)


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
    step = np.arange(size)
    rows, cols = first_y[:, None] + step, first_x[:, None] + step
    row_inside, col_inside = (rows >= 0) & (rows < ny), (cols >= 0) & (cols < nx)
    inside = row_inside[:, :, None] & col_inside[:, None, :]
    # Clipped indices read some pixel of the edge where the stamp lies outside; it is overwritten at once.
    rows, cols = np.clip(rows, 0, ny - 1), np.clip(cols, 0, nx - 1)
    stamps = array[rows[:, :, None], cols[:, None, :]].astype(native, copy=False)
    np.copyto(stamps, np.asarray(fill, dtype=native), where=~inside)
    return stamps, inside


def offsets_in_stamps(x: F64, y: F64, size: int) -> tuple[F64, F64]:
    """Offsets of the pixels of stamps from a place in each, pixels, along x, shape (n, 1, size), and y, (n, size, 1).

    The places, shape (n,), are 0-based pixels of the stamps; ``size`` is the side of the stamps.
    """
    axis = np.arange(size, dtype=np.float64)
    return axis[None, None, :] - x[:, None, None], axis[None, :, None] - y[:, None, None]


def squared_radius(x: F64, y: F64, size: int) -> F64:
    """Squared distances of the pixels of stamps from a place in each, px^2, shape (n, size, size), [object, y, x]."""
    dx, dy = offsets_in_stamps(x, y, size)
    return dx**2 + dy**2


@dataclass(frozen=True)
class SourceStamps:
    """Stamps of sources on one exposure.

    Attributes
    ----------
    image : ndarray of float32, shape (n, size, size)
        Axis order [source, y, x]; 0 outside the detector.
    valid : ndarray of bool, shape (n, size, size)
        Pixels that are data.
    inside : ndarray of bool, shape (n, size, size)
        Pixels on the detector.
    flags : ndarray of uint16, shape (n, size, size)
        Bits of `sgclassify.stages.flags.InputFlag`.
    noise : ndarray of float32, shape (n,)
        Noise of the pixel nearest to the source.
    first_x, first_y : ndarray of int64, shape (n,)
        First pixel of each stamp on the detector, see `stamp_origin`.
    """

    image: F32
    valid: Bool
    inside: Bool
    flags: U16
    noise: F32
    first_x: I64
    first_y: I64


def cut_sources(window: PixelWindow, image: F32, valid: Bool, noise: F32, x: F64, y: F64, size: int) -> SourceStamps:
    """Cut the stamps of some sources of an exposure.

    Parameters
    ----------
    window : PixelWindow
        Pixels of the exposure that cover all stamps, as far as these lie on the detector.
    image, noise : ndarray of float32, shape of the window
        The same pixels without the sky, and their noise.
    valid : ndarray of bool, shape of the window
        Which of them are data.
    x, y : ndarray of float64, shape (n,)
        Positions on the detector, 0-based pixels, finite.
    size : int
        Side of the stamps, pixels.
    """
    ny, nx = image.shape
    at = (x - window.x0, y - window.y0, size)
    stamps, inside = cut_stamps(image, *at)
    column = np.clip(np.rint(x).astype(np.int64) - window.x0, 0, nx - 1)
    row = np.clip(np.rint(y).astype(np.int64) - window.y0, 0, ny - 1)
    return SourceStamps(
        image=stamps,
        valid=cut_stamps(valid, *at)[0] & inside,
        inside=inside,
        flags=cut_stamps(window.flags, *at)[0],
        noise=noise[row, column],
        first_x=stamp_origin(x, size),
        first_y=stamp_origin(y, size),
    )
