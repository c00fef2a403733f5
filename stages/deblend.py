"""Separation of touching sources: each segment is split at the saddles between its significant peaks.

Own code, not `sep`: its deblending gives up the whole image ("object deblending overflow") where one segment of a
crowded field has more than 1024 peaks. On a simulated exposure of 2560 x 2560 pixels, sep takes about two thirds of the
time of detection and photometry here, and 1329 of 1390 sources are the same.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from scipy.ndimage import find_objects

from sgclassify.stages.arrays import F32, I32, I64


def deblend(smoothed: F32, noise: F32, labels: I32, *, contrast: float, min_px: int, prominence_sigma: float) -> I32:
    """Split segments into one for each significant peak.

    The criterion is that of SExtractor's multi-threshold deblending (Bertin & Arnouts 1996), in the limit of infinitely
    many thresholds. Going down in brightness, two peaks meet at their saddle. If each holds enough of the segment's
    light above the saddle, both are sources of their own; otherwise the lesser one becomes part of the other. Pixels
    below the saddle go to the source that they slope up to (watershed).

    Parameters
    ----------
    smoothed : ndarray of float32, shape (ny, nx)
        The image that the segments were found in, [y, x].
    noise : ndarray of float32, shape (ny, nx)
        Standard deviation of the smoothed image.
    labels : ndarray of int32, shape (ny, nx)
        0 or the number of the segment, 1 to n without gaps.
    contrast : float
        Smallest share of a segment's light that a peak must hold above the saddle.
    min_px : int
        Smallest number of pixels of a peak above the saddle.
    prominence_sigma : float
        Smallest height of a peak above the saddle, in standard deviations.

    Returns
    -------
    ndarray of int32, shape (ny, nx)
        Numbers of the sources, 1 to m without gaps; the pixels that are not 0 are those of ``labels``.
    """
    result = labels.copy()
    n_sources = int(labels.max(initial=0))
    # Most segments have one local maximum and stay whole.
    n_peaks = np.bincount(labels[_peaks(smoothed, labels)], minlength=n_sources + 1)
    boxes = find_objects(labels)
    for label in np.flatnonzero(n_peaks[1:] > 1) + 1:
        box = boxes[label - 1]
        member = labels[box] == label
        basins = _basins(
            np.where(member, smoothed[box], 0),
            member,
            contrast * float(smoothed[box][member].sum(dtype=np.float64)),
            min_px,
            prominence_sigma * float(np.median(noise[box][member])),
        )
        # The first source keeps the segment's number.
        part = result[box]
        part[member & (basins > 0)] = basins[member & (basins > 0)] + n_sources
        n_sources += int(basins.max(initial=0))
    return result


def _peaks(smoothed: F32, labels: I32) -> tuple[I64, I64]:
    """Pixels of the segments, (y, x), that none of their eight neighbours exceeds, on the image or off the segment."""
    ny, nx = smoothed.shape
    # Only a few percent of the pixels belong to a segment.
    y, x = np.nonzero(labels)
    for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (-1, -1), (1, -1), (-1, 1)):
        beside = smoothed[np.clip(y + dy, 0, ny - 1), np.clip(x + dx, 0, nx - 1)]
        highest = smoothed[y, x] >= beside
        y, x = y[highest], x[highest]
    return y, x


def _basins(values: F32, member: npt.NDArray[np.bool_], min_flux: float, min_px: int, min_height: float) -> I32:
    """Number the sources of one segment: 0 for the first and for pixels outside, then 1, 2, ...

    A flood from the brightest pixel down. A *basin* is a peak and the pixels that slope up to it. Basins that meet and
    are not separate sources are merged through ``alias``. A *pool* is a connected set of basins, with its light and
    area so far; ``split`` tells whether it already holds separate sources.
    """
    height, width = values.shape
    stride = width + 2
    # a border of zeros
    padded = np.zeros((height + 2, stride), dtype=values.dtype)
    padded[1:-1, 1:-1] = values
    level: list[float] = padded.ravel().tolist()
    row, column = np.nonzero(member)
    inside = (row + 1) * stride + column + 1
    order = inside[np.argsort(-values[row, column], kind="stable")].tolist()
    around = (-stride - 1, -stride, -stride + 1, -1, 1, stride - 1, stride, stride + 1)
    basin_of = [0] * len(level)
    alias, pool_of = [0], [0]
    peak, light, area, split = [0.0], [0.0], [0], [False]

    def root(links: list[int], k: int) -> int:
        while links[k] != k:
            links[k] = links[links[k]]
            k = links[k]
        return k

    for pixel in order:
        here = level[pixel]
        up, down = pixel - stride, pixel + stride
        # not a loop: this is where the time goes
        basins = {
            basin_of[up - 1], basin_of[up], basin_of[up + 1], basin_of[pixel - 1], basin_of[pixel + 1],
            basin_of[down - 1], basin_of[down], basin_of[down + 1],
        }  # fmt: skip
        basins.discard(0)
        if not basins:
            basin = len(alias)
            alias.append(basin)
            pool_of.append(basin)
            peak.append(here)
            light.append(here)
            area.append(1)
            split.append(False)
            basin_of[pixel] = basin
            continue
        if len(basins) == 1:
            basin = root(alias, basins.pop())
            basin_of[pixel] = basin
            pool = root(pool_of, basin)
            light[pool] += here
            area[pool] += 1
            continue
        basins = {root(alias, b) for b in basins}
        pools = {root(pool_of, b) for b in basins}
        if len(pools) > 1:
            separate = [
                p
                for p in sorted(pools)
                if split[p]
                or (light[p] - here * area[p] >= min_flux and area[p] >= min_px and peak[p] - here >= min_height)
            ]
            # If no pool is separate, the one with the most light above the saddle takes in the others.
            kept = separate or [max(sorted(pools), key=lambda p: light[p] - here * area[p])]
            heirs = [b for b in sorted(basins) if root(pool_of, b) in kept]
            heir = max(heirs, key=lambda b: peak[b])
            first = kept[0]
            for p in sorted(pools):
                if p not in kept:
                    # A pool that is not split is one basin and has its number.
                    alias[p] = heir
                    peak[heir] = max(peak[heir], peak[p])
                if p != first:
                    pool_of[p] = first
                    light[first] += light[p]
                    area[first] += area[p]
            split[first] = len(separate) > 1 or split[first]
        touching = [pixel + step for step in around if basin_of[pixel + step]]
        basin = root(alias, basin_of[max(touching, key=level.__getitem__)])
        basin_of[pixel] = basin
        pool = root(pool_of, basin)
        light[pool] += here
        area[pool] += 1

    final = np.array([root(alias, b) for b in range(len(alias))])
    numbers = np.zeros(len(alias), dtype=np.int32)
    used = np.unique(final[1:])
    numbers[used] = np.arange(used.size)
    result: I32 = numbers[final][np.array(basin_of)].reshape(height + 2, stride)[1:-1, 1:-1]
    return result
