"""Level and noise of the sky on a mesh of boxes, robust to sources and masked pixels."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sgclassify.stages.arrays import F32, Bool

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
        low_y, high_y, part_y = _weights(y0, y1, _edges(self.shape[0], self.box))
        low_x, high_x, part_x = _weights(x0, x1, _edges(self.shape[1], self.box))

        rest_y, rest_x = np.float32(1) - part_y, np.float32(1) - part_x

        def interpolate(mesh: F32) -> F32:
            along_x = mesh[:, low_x] * rest_x + mesh[:, high_x] * part_x
            pixels: F32 = along_x[low_y]
            pixels *= rest_y[:, None]
            pixels += along_x[high_y] * part_y[:, None]
            return pixels

        return interpolate(self.level), interpolate(self.sigma)


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
        # All boxes of the band but the last are equally wide, and are measured together.
        last = int(edges_x[-2])
        parts = [(0, last, edges_x.size - 2)] if last else []
        for x0, x1, n_boxes in [*parts, (last, int(edges_x[-1]), 1)]:
            pixels = np.where(valid[:, x0:x1], image[:, x0:x1], np.nan).astype(np.float32, copy=False)
            samples = pixels.reshape(pixels.shape[0], n_boxes, -1).swapaxes(0, 1).reshape(n_boxes, -1)
            first = 0 if x0 == 0 else edges_x.size - 2
            level[k, first : first + n_boxes], sigma[k, first : first + n_boxes] = _box_statistics(samples)
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


def _box_statistics(samples: F32) -> tuple[F32, F32]:
    """Sky level and noise of boxes, NaN where too few samples are valid.

    Each row of ``samples`` (n_boxes, n_pixels) is a box, NaN where masked. A row is sorted once. Each round of clipping
    then leaves a range of it, whose median and quantiles are single elements.
    """
    n_boxes, n_pixels = samples.shape
    ordered = np.sort(samples, axis=1)  # NaN goes to the end
    n_valid = n_pixels - np.isnan(ordered).sum(axis=1)
    usable = n_valid >= max(_MIN_SAMPLES, _MIN_VALID_SHARE * n_pixels)
    level = np.full(n_boxes, np.nan, dtype=np.float32)
    noise = np.full(n_boxes, np.nan, dtype=np.float32)
    if not usable.any():
        return level, noise
    ordered, n_valid = ordered[usable], n_valid[usable]
    box = np.arange(ordered.shape[0])

    def quantile(q: float) -> npt.NDArray[np.float64]:
        place = first + q * (end - first - 1)
        low = place.astype(np.int64)
        high = np.minimum(low + 1, end - 1)
        a, b = ordered[box, low].astype(np.float64), ordered[box, high].astype(np.float64)
        result: npt.NDArray[np.float64] = a + (b - a) * (place - low)
        return result

    first, end = np.zeros_like(n_valid), n_valid
    for _ in range(_CLIP_ROUNDS):
        median = quantile(0.5)
        # Sources only add light, so the width comes from the lower half of the histogram.
        sigma = (median - quantile(_LOWER_QUANTILE)) * _CLIP_CORRECTION
        # If pixels are quantised coarsely, both quantiles can lie in one step: then nothing is clipped.
        sigma = np.where(sigma > 0, sigma, np.inf)
        new_first = (ordered < (median - _CLIP_SIGMA * sigma)[:, None]).sum(axis=1)
        new_end = (ordered <= (median + _CLIP_SIGMA * sigma)[:, None]).sum(axis=1)
        # Clipping never widens the range, so it always ends.
        new_first, new_end = np.maximum(new_first, first), np.minimum(new_end, end)
        if np.array_equal(new_first, first) and np.array_equal(new_end, end):
            break
        first, end = new_first, new_end
    # Relative to the median: no digits are lost to rounding where the sky is high.
    origin = quantile(0.5)
    place = np.arange(ordered.shape[1])
    kept = (place >= first[:, None]) & (place < end[:, None])
    relative = np.where(kept, ordered - origin[:, None].astype(np.float32), np.float32(0)).astype(np.float64)
    count = end - first
    mean = relative.sum(axis=1) / count
    # Pixels come in steps (a fifth of the noise in NUV), so a single order statistic is off by up to half a step. The
    # mean of the middle of the histogram and the spread of its lower half are not.
    low, high = first + (0.3 * count).astype(np.int64), end - (0.3 * count).astype(np.int64)
    middle = (place >= low[:, None]) & (place < high[:, None])
    centre = np.where(middle, relative, 0.0).sum(axis=1) / np.maximum(high - low, 1)
    below = kept & (relative < centre[:, None])
    square = np.where(below, relative - centre[:, None], 0.0) ** 2
    sigma = np.sqrt(square.sum(axis=1) / np.maximum(below.sum(axis=1), 1)) * _TRUNCATION_CORRECTION
    spread = np.sqrt(np.maximum((relative**2).sum(axis=1) / count - mean**2, 0.0))
    sigma = np.where(sigma > 0, sigma, spread)
    excess = mean - centre
    mode = origin + centre - np.where(np.abs(excess) < _CROWDED * sigma, 1.5 * excess, 0.0)
    level[usable], noise[usable] = mode, sigma
    return level, noise


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
