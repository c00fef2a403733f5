"""Level and noise of the sky on a mesh of boxes, robust to sources and masked pixels."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import sliding_window_view

from sgclassify.stages.arrays import F32, F64, I64, Bool

ReadRows = Callable[[int, int], tuple[F32, Bool]]

# Sources are cut off at this many sigma on either side of the median, as SExtractor does.
_CLIP_SIGMA = 3.0
_CLIP_ROUNDS = 12
# Quantile one Gaussian sigma below the median.
_LOWER_QUANTILE = 0.15865525
# Clipping at 3 sigma moves the two quantiles that give sigma. This is true sigma / measured sigma for a Gaussian
# without its tails beyond 3 sigma.
_CLIP_CORRECTION = 1.00382
_TRUNCATION_CORRECTION = 1.01361
"""Standard deviation of a normal distribution over that of the same clipped at three of them."""
# SExtractor: mode = 2.5 median - 1.5 mean, unless the box is so crowded that mean and median differ by more
# than 0.3 sigma, where the median is the better guess (Bertin & Arnouts 1996, A&AS 117, 393).
_CROWDED = 0.3
# A box with a smaller share of valid pixels is not reliable: it is filled from its neighbours.
_MIN_VALID_SHARE = 0.1
_MIN_SAMPLES = 9


@dataclass(frozen=True)
class SkyMesh:
    """Sky of one exposure on a mesh of boxes.

    Box ``k`` of an axis holds the pixels from ``k * box`` on; the last box also holds a remainder of
    less than half a box, so it has between half and one and a half times its nominal side.

    Attributes
    ----------
    level : ndarray of float32, shape (my, mx)
        Sky level, e-/s per pixel, [y, x]. NaN everywhere if the exposure has no usable box at all.
    sigma : ndarray of float32, shape (my, mx)
        Standard deviation of one pixel, e-/s, [y, x]. NaN as ``level``.
    box : int
        Nominal side of the boxes, pixels.
    shape : tuple of int
        Shape of the detector (ny, nx), pixels.
    """

    level: F32
    sigma: F32
    box: int
    shape: tuple[int, int]

    def at(self, y0: int, y1: int, x0: int, x1: int) -> tuple[F32, F32]:
        """Level and noise of each pixel of a window.

        Bilinear between the centres of the boxes, constant outside the outermost centres. The value of a pixel is the
        same in every window, to the last bit.

        Parameters
        ----------
        y0, y1, x0, x1 : int
            Window, rows ``y0`` to ``y1 - 1`` and columns ``x0`` to ``x1 - 1``, 0-based pixels. Beyond the edge of the
            detector the value is that of the nearest pixel.

        Returns
        -------
        level, sigma : ndarray of float32, shape (y1 - y0, x1 - x0)
            e-/s, [y, x].
        """
        low, high, part = _weights(y0, y1, _edges(self.shape[0], self.box))
        rest = np.float32(1) - part

        def interpolate(mesh: F32) -> F32:
            along_x = self._along_x(mesh, x0, x1)
            pixels: F32 = along_x[low]
            pixels *= rest[:, None]
            pixels += along_x[high] * part[:, None]
            return pixels

        return interpolate(self.level), interpolate(self.sigma)

    def level_of_stamps(self, first_y: I64, first_x: I64, size: int) -> F32:
        """Level of the pixels of stamps, the same to the last bit as from `at`.

        Parameters
        ----------
        first_y, first_x : ndarray of int64, shape (n,)
            First pixel of each stamp, 0-based.
        size : int
            Side of the stamps, pixels.

        Returns
        -------
        ndarray of float32, shape (n, size, size)
            e-/s, [stamp, y, x].
        """
        return self._of_stamps(self.level, first_y, first_x, size)

    def noise_of_stamps(self, first_y: I64, first_x: I64, size: int) -> F32:
        """Noise of the pixels of stamps, as `level_of_stamps`."""
        return self._of_stamps(self.sigma, first_y, first_x, size)

    def noise_at(self, y: I64, x: I64) -> F32:
        """Noise of some pixels of the detector (rows ``y``, columns ``x``), the same to the last bit as from `at`."""
        low, high, part = _weights(0, self.shape[0], _edges(self.shape[0], self.box))
        along_x, part = self._along_x(self.sigma, 0, self.shape[1]), part[y]
        noise: F32 = along_x[low[y], x] * (np.float32(1) - part) + along_x[high[y], x] * part
        return noise

    def noise_near(self, x: F64, y: F64) -> F32:
        """Noise of the pixels of the detector that are nearest to places, 0-based pixels, finite."""
        row, column = (np.clip(np.rint(c).astype(np.int64), 0, n - 1) for c, n in zip((y, x), self.shape, strict=True))
        return self.noise_at(row, column)

    def _of_stamps(self, mesh: F32, first_y: I64, first_x: I64, size: int) -> F32:
        if not first_y.size:
            return np.zeros((0, size, size), dtype=np.float32)
        y0, x0 = int(first_y.min()), int(first_x.min())
        low, high, part = _weights(y0, int(first_y.max()) + size, _edges(self.shape[0], self.box))
        lines = sliding_window_view(self._along_x(mesh, x0, int(first_x.max()) + size), size, axis=1)
        row, column = (first_y - y0)[:, None] + np.arange(size), (first_x - x0)[:, None]
        stamps: F32 = lines[low[row], column]
        stamps *= (np.float32(1) - part)[row][:, :, None]
        stamps += lines[high[row], column] * part[row][:, :, None]
        return stamps

    def _along_x(self, mesh: F32, x0: int, x1: int) -> F32:
        """Each row of boxes, interpolated to the columns ``x0`` to ``x1 - 1``."""
        low, high, part = _weights(x0, x1, _edges(self.shape[1], self.box))
        return np.asarray(mesh[:, low] * (np.float32(1) - part) + mesh[:, high] * part)


def measure_sky(image: F32, valid: Bool, box: int) -> SkyMesh:
    """Measure the sky of an image held in memory.

    Parameters
    ----------
    image : ndarray of float, shape (ny, nx)
        Pixels, e-/s, [y, x]; values of pixels that are not valid are ignored.
    valid : ndarray of bool, shape (ny, nx)
        Pixels to use.
    box : int
        Side of the boxes, pixels.

    Raises
    ------
    ValueError
        If the shapes differ, the image has no pixels or the box is not positive.
    """
    if image.shape != valid.shape:
        raise ValueError(f"image of shape {image.shape} and mask of shape {valid.shape} differ")
    shape = (image.shape[0], image.shape[1])
    return measure_sky_rows(lambda y0, y1: (image[y0:y1], valid[y0:y1]), shape, box)


def measure_sky_rows(read: ReadRows, shape: tuple[int, int], box: int) -> SkyMesh:
    """Measure the sky of an image read in bands of rows, one band of boxes at a time.

    Parameters
    ----------
    read : callable
        ``read(y0, y1)`` returns the rows ``y0`` to ``y1 - 1`` of all columns as (image in e-/s, valid).
    shape : tuple of int
        Shape of the detector (ny, nx), pixels.
    box : int
        Side of the boxes, pixels. A band has at most one and a half times as many rows.

    Returns
    -------
    SkyMesh
        The same as from `measure_sky`.

    Raises
    ------
    ValueError
        If the shape has no pixels or the box is not positive.
    """
    if box < 1 or min(shape) < 1:
        raise ValueError(f"no sky can be measured in boxes of {box} pixels on a detector of shape {shape}")
    edges_y, edges_x = _edges(shape[0], box), _edges(shape[1], box)
    level = np.empty((edges_y.size - 1, edges_x.size - 1), dtype=np.float32)
    sigma = np.empty_like(level)
    for k, (y0, y1) in enumerate(itertools.pairwise(edges_y)):
        image, valid = read(int(y0), int(y1))
        for m, (x0, x1) in enumerate(itertools.pairwise(edges_x)):
            box_valid = valid[:, x0:x1]
            level[k, m], sigma[k, m] = _box_statistics(image[:, x0:x1][box_valid], box_valid.size)
    level, sigma = _fill(level), _fill(sigma)
    return SkyMesh(_median_3x3(level), _median_3x3(sigma), box, (int(shape[0]), int(shape[1])))


def _edges(n: int, box: int) -> npt.NDArray[np.int64]:
    """Edges of the boxes along an axis of ``n`` pixels: a remainder below half a box joins the last."""
    count = max(1, (n + box // 2) // box)
    edges = np.arange(count + 1, dtype=np.int64) * box
    edges[-1] = n
    return edges


def _weights(
    start: int, stop: int, edges: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], F32]:
    """Lower box, upper box and the upper one's weight, for each pixel of one axis of a window."""
    centres = (edges[:-1] + edges[1:] - 1) / 2
    position = np.clip(np.arange(start, stop, dtype=np.float64), centres[0], centres[-1])
    low = np.clip(np.searchsorted(centres, position, side="right") - 1, 0, max(centres.size - 2, 0))
    high = np.minimum(low + 1, centres.size - 1)
    span = np.where(high > low, centres[high] - centres[low], 1.0)
    return low, high, ((position - centres[low]) / span).astype(np.float32)


def _box_statistics(samples: F32, n_pixels: int) -> tuple[float, float]:
    """Sky level and noise of a box of ``n_pixels``, of which ``samples`` are valid; NaN where these are too few.

    The samples are sorted once. Each round of clipping then leaves a range of them, whose median and quantiles are
    single elements.
    """
    ordered = np.sort(samples.astype(np.float32, copy=False))
    ordered = ordered[: ordered.searchsorted(np.float32(np.nan))]
    if ordered.size < max(_MIN_SAMPLES, _MIN_VALID_SHARE * n_pixels):
        return math.nan, math.nan
    first, end = 0, ordered.size
    for _ in range(_CLIP_ROUNDS):
        median = _quantile(ordered, first, end, 0.5)
        # Sources only add light, so the width comes from the lower half of the histogram.
        sigma = (median - _quantile(ordered, first, end, _LOWER_QUANTILE)) * _CLIP_CORRECTION
        # If pixels are quantised coarsely, both quantiles can lie in one step: then nothing is clipped.
        sigma = sigma if sigma > 0 else math.inf
        low, high = _between(ordered, median - _CLIP_SIGMA * sigma, median + _CLIP_SIGMA * sigma)
        # Clipping never widens the range, so it always ends.
        low, high = max(low, first), min(high, end)
        if (low, high) == (first, end):
            break
        first, end = low, high
    # Relative to the median: no digits are lost to rounding where the sky is high.
    origin = _quantile(ordered, first, end, 0.5)
    relative = (ordered[first:end] - np.float32(origin)).astype(np.float64)
    count = end - first
    mean = float(relative.mean())
    # Pixels come in steps (a fifth of the noise in NUV), so a single order statistic is off by up to half a step. The
    # mean of the middle of the histogram and the spread of its lower half are not.
    margin = int(0.3 * count)
    centre = float(relative[margin : count - margin].mean())
    below = relative[: relative.searchsorted(centre)]
    sigma = math.sqrt(float(np.square(below - centre).sum()) / max(below.size, 1)) * _TRUNCATION_CORRECTION
    if not sigma > 0:
        sigma = float(relative.std())
    excess = mean - centre
    mode = origin + centre - (1.5 * excess if abs(excess) < _CROWDED * sigma else 0.0)
    return mode, sigma


def _quantile(ordered: F32, first: int, end: int, q: float) -> float:
    """Quantile of the elements ``first`` to ``end - 1`` of sorted samples."""
    place = first + q * (end - first - 1)
    low = int(place)
    a, b = float(ordered[low]), float(ordered[min(low + 1, end - 1)])
    return a + (b - a) * (place - low)


def _between(ordered: F32, low: float, high: float) -> tuple[int, int]:
    """First and end of the elements of sorted samples that are not below ``low`` nor above ``high``."""
    # The nearest float32 within the limits: searching for a float64 would copy the samples.
    with np.errstate(over="ignore"):
        inner_low, inner_high = np.float32(low), np.float32(high)
    if float(inner_low) < low:
        inner_low = np.nextafter(inner_low, np.float32(np.inf))
    if float(inner_high) > high:
        inner_high = np.nextafter(inner_high, np.float32(-np.inf))
    return int(ordered.searchsorted(inner_low)), int(ordered.searchsorted(inner_high, side="right"))


def _neighbourhood(mesh: F32) -> F32:
    """The 3x3 boxes around each box, NaN outside the mesh, shape (9, my, mx)."""
    my, mx = mesh.shape
    padded = np.pad(mesh, 1, constant_values=np.nan)
    return np.stack([padded[dy : dy + my, dx : dx + mx] for dy in range(3) for dx in range(3)])


def _fill(mesh: F32) -> F32:
    """Fill boxes without a value with the mean of the neighbours that have one, ring after ring."""
    missing = np.isnan(mesh)
    if missing.all():
        return mesh
    mesh = mesh.copy()
    while missing.any():
        around = _neighbourhood(mesh)
        known = ~np.isnan(around)
        count = known.sum(axis=0)
        ring = missing & (count > 0)
        mesh[ring] = np.where(known, around, 0).sum(axis=0)[ring] / count[ring]
        missing &= ~ring
    return mesh


def _median_3x3(mesh: F32) -> F32:
    """Median over the 3x3 boxes around each box, as far as they are on the mesh.

    This removes single boxes that a bright star or a large galaxy has raised.
    """
    if np.isnan(mesh).all():
        return mesh
    result: F32 = np.nanmedian(_neighbourhood(mesh), axis=0).astype(np.float32)
    return result
