"""The stage's own source detection, for exposures that come without a catalogue."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.ndimage import correlate1d, label
from scipy.spatial import KDTree

from sgclassify.stages.arrays import F32, F64, I32, U16, Bool
from sgclassify.stages.bands import NOMINAL_FWHM_PX, nanomaggies_per_count
from sgclassify.stages.config import StageConfig
from sgclassify.stages.deblend import deblend
from sgclassify.stages.flags import InputFlag
from sgclassify.stages.photometry import APERTURE_RADII, FWHM_PER_SIGMA, MARGIN_PX, Photometry, measure_segments

Strip = tuple[F32, Bool, F32 | float, U16 | None]
"""Rows of an image: sky-subtracted pixels (e-/s), which of them hold data, standard deviation of the sky noise of each
(e-/s; pixels where it is not positive are not used), FLG bits. All of shape (ny, nx), [y, x]."""

log = logging.getLogger(__name__)

# Bits of the catalogue's Flag column, as SExtractor's FLAGS.
FLAG_BIASED, FLAG_BLENDED, FLAG_SATURATED, FLAG_TRUNCATED = 1, 2, 4, 8

# Saturated pixels hold the light of a star: sources are detected in them too, unless the detector is at fault there.
_FAULTY = int(InputFlag.BAD | InputFlag.HOT | InputFlag.WARM | InputFlag.COSMIC_RAY | InputFlag.SATELLITE)
_KERNEL_REACH = 3.0
_POGSON = 2.5 / math.log(10.0)
_STRIP_ROWS = 2048
_MARGIN_ROWS = MARGIN_PX + 22


@dataclass(frozen=True)
class Calibration:
    """What the header of an exposure says about its pixels.

    Attributes
    ----------
    wcs : astropy.wcs.WCS
        Celestial WCS of the whole detector.
    zero_point : float
        AB magnitude of 1 e-/s.
    fwhm_px : float
        FWHM of the PSF, pixels; `sgclassify.stages.bands.NOMINAL_FWHM_PX` where not finite.
    exposure_time : float
        Exposure time, s; without it the errors leave out the photon noise of the sources themselves.
    """

    wcs: Any
    zero_point: float
    fwhm_px: float = math.nan
    exposure_time: float = math.nan


def detect_in_strips(
    read: Callable[[int, int], Strip],
    shape: tuple[int, int],
    calibration: Calibration,
    config: StageConfig,
    strip_rows: int = _STRIP_ROWS,
) -> pa.Table:
    """Detect and measure the sources of an image read in overlapping strips of rows.

    A source belongs to the strip that holds its centre. The strips do not change the result, except for sources whose
    isophote is higher than the overlap. Saturated pixels are used although they are not valid, and set the Flag column.

    Parameters
    ----------
    read : callable
        ``read(y0, y1)`` returns the rows ``y0`` to ``y1 - 1`` of all columns.
    shape : tuple of int
        Shape of the detector (ny, nx), pixels.
    config : StageConfig
        Threshold, smallest area and deblending contrast.
    strip_rows : int
        Rows of a strip without its overlap; memory grows with it, about 150 bytes per pixel.

    Returns
    -------
    pyarrow.Table
        One row per source, in order of Y, then X; `CATALOG_SCHEMA`.

    Raises
    ------
    ValueError
        If the strips have no rows, or the arrays of a strip differ in shape.
    """
    if strip_rows < 1:
        raise ValueError(f"strips of {strip_rows} rows")
    found: list[tuple[Photometry, I32]] = []
    before: F64 = np.empty((0, 2))
    for y0 in range(0, shape[0], strip_rows):
        y1 = min(y0 + strip_rows, shape[0])
        low, high = max(y0 - _MARGIN_ROWS, 0), min(y1 + _MARGIN_ROWS, shape[0])
        ends = (low == 0, high == shape[0])
        photometry, flag = _detect(read(low, high), calibration, config, ends)
        photometry.y[:] += low
        # One pixel more on either side: a centre near the border may come out on either side of it, depending on
        # the strip. What both strips found is then kept once.
        own = (photometry.y >= y0 - (1 if y0 else np.inf)) & (photometry.y < y1 + (1 if y1 < shape[0] else np.inf))
        place = np.column_stack((photometry.x, photometry.y))
        if len(before):
            own &= ~np.isfinite(KDTree(before).query(place, distance_upper_bound=1.0)[0])
        found.append((photometry.take(own), flag[own]))
        before = place[own & (photometry.y > y1 - 3)]
        log.debug("rows %d to %d: %d sources", y0, y1, int(own.sum()))
    photometry = Photometry.concatenate([part for part, _ in found])
    return _table(photometry, np.concatenate([flag for _, flag in found]), calibration)


def _detect(
    strip: Strip, calibration: Calibration, config: StageConfig, ends: tuple[bool, bool]
) -> tuple[Photometry, I32]:
    """Photometry and Flag of the sources of a strip; ``ends``: whether its first, last row is the detector's."""
    image, valid, sigma, flags = strip
    if image.shape != valid.shape or (flags is not None and flags.shape != image.shape):
        raise ValueError("image, mask and flags differ in shape")
    sigma = np.broadcast_to(np.asarray(sigma, dtype=np.float32), image.shape)
    known = math.isfinite(calibration.fwhm_px) and calibration.fwhm_px > 0
    fwhm_px = calibration.fwhm_px if known else NOMINAL_FWHM_PX
    saturated = np.zeros(image.shape, dtype=np.bool_)
    if flags is not None:
        saturated = (flags & int(InputFlag.SATURATED)) != 0
        valid = valid | (saturated & ((flags & _FAULTY) == 0))
    usable = valid & np.isfinite(image) & (sigma > 0) & np.isfinite(sigma)
    image = np.where(usable, image, np.float32(0)).astype(np.float32, copy=False)
    variance = np.where(usable, sigma, np.float32(0)) ** 2
    smoothed, significance = _smooth(image, variance, usable, fwhm_px)
    labels, parents = _segment(smoothed, significance, usable, config)
    n = int(labels.max(initial=0))

    if math.isfinite(calibration.exposure_time) and calibration.exposure_time > 0:
        variance += np.maximum(image, 0) / np.float32(calibration.exposure_time)
    photometry = measure_segments(image, variance, usable, smoothed, labels, fwhm_px)
    flag = np.where(photometry.biased, FLAG_BIASED, 0).astype(np.int32)
    parent, place = np.zeros(n + 1, dtype=np.int64), np.nonzero(labels)
    parent[labels[place]] = parents[place]
    children = np.bincount(parent[1:], minlength=1)
    flag |= np.where(children[parent[1:]] > 1, FLAG_BLENDED, 0).astype(np.int32)
    flag |= _touched(labels[saturated], n) * np.int32(FLAG_SATURATED)
    borders = [labels[:, 0], labels[:, -1]]
    borders += [row for row, end in ((labels[0], ends[0]), (labels[-1], ends[1])) if end]
    flag |= _touched(np.concatenate(borders), n) * np.int32(FLAG_TRUNCATED)
    return photometry, flag


def _smooth(image: F32, variance: F32, usable: Bool, fwhm_px: float) -> tuple[F32, F32]:
    """Image smoothed with a Gaussian of the PSF's width, and its significance in sigma of its own noise.

    Pixels without data get no weight, which bridges gaps of a few pixels. Where the noise is uneven, the quieter pixels
    count more. This is the matched filter of a faint star.
    """
    spread = fwhm_px / FWHM_PER_SIGMA
    reach = max(1, math.ceil(_KERNEL_REACH * spread))
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / spread) ** 2)
    kernel /= kernel.sum()

    def convolve(array: F32, weights: F64) -> F32:
        for axis in (0, 1):
            array = correlate1d(array, weights, axis=axis, mode="constant")
        return array

    weight = np.divide(1, variance, where=usable, out=np.zeros_like(variance))
    light = convolve(image * weight, kernel)
    weight_sum, noise = convolve(weight, kernel), convolve(weight, kernel**2)
    # Rounding leaves specks of weight where there is none.
    known = weight_sum > 1e-3 * weight.max(initial=0) * kernel.max() ** 2
    smoothed = np.divide(light, weight_sum, where=known, out=np.zeros_like(light))
    significance = np.divide(
        light, np.sqrt(noise, where=known, out=np.ones_like(noise)), where=known, out=np.zeros_like(light)
    )
    return smoothed, significance


def _segment(smoothed: F32, significance: F32, usable: Bool, config: StageConfig) -> tuple[I32, I32]:
    """Deblended segments, numbered 1 to n, and the connected segments that they come from."""
    connected, n = label(significance > config.detect_threshold_sigma, np.ones((3, 3)))
    place = np.nonzero(connected)
    # A masked cosmic ray may leave one or two bright pixels, which the smoothing spreads over the mask. So what counts
    # is the pixels of a segment that hold data.
    found = np.bincount(connected[place][usable[place]], minlength=n + 1) >= config.detect_min_px
    found[0] = False
    number = np.where(found, np.cumsum(found), 0).astype(np.int32)
    parents = np.zeros(smoothed.shape, dtype=np.int32)
    parents[place] = number[connected[place]]
    noise = np.divide(smoothed, significance, where=significance > 0, out=np.zeros_like(smoothed))
    labels = deblend(
        smoothed,
        noise,
        parents,
        contrast=config.deblend_contrast,
        min_px=config.detect_min_px,
        prominence_sigma=config.deblend_prominence_sigma,
    )
    return labels, parents


def _touched(labels: I32, n: int) -> I32:
    """For each of the segments 1 to n: 1 if it is among the labels, else 0."""
    return (np.bincount(labels, minlength=n + 1)[1:] > 0).astype(np.int32)


def _schema() -> pa.Schema:
    apertures = range(1, len(APERTURE_RADII) + 1)
    measured = ["FWHM", "A", "B", "PA", "E", "AB", "Flux_Kron", "FluxErr_Kron", "Mag_Kron", "MagErr_Kron"]
    measured += ["Radius_Kron"]
    measured += [f"{name}_Aper{k}" for name in ("Flux", "FluxErr", "Mag", "MagErr") for k in apertures]
    measured += ["R20", "R50", "R90"]
    fields = [("objID", pa.int32()), *((name, pa.float64()) for name in ("X", "Y", "RA", "DEC"))]
    return pa.schema([*fields, ("Flag", pa.int32()), *((name, pa.float32()) for name in measured)])


CATALOG_SCHEMA: pa.Schema = _schema()
"""Columns of a catalogue that the stage makes: the official names (FORMATS: CAT columns), X and Y in 1-based
pixels, RA and DEC ICRS degrees, lengths in pixels, PA in degrees from north to east, fluxes in nanomaggies;
null where there is no value."""


def _position_angle(photometry: Photometry, wcs: Any, ra: F64, dec: F64) -> F64:
    """Angle of the major axes from north to east, degrees in [-90, 90), as upstream catalogues have it."""
    if not photometry.x.size:
        return photometry.theta
    angle = np.radians(photometry.theta)
    end_ra, end_dec = wcs.all_pix2world(photometry.x + np.cos(angle), photometry.y + np.sin(angle), 0)
    east = ((end_ra - ra + 180) % 360 - 180) * np.cos(np.radians(dec))
    result: F64 = (np.degrees(np.arctan2(east, end_dec - dec)) + 90) % 180 - 90
    return result


def _table(photometry: Photometry, flag: I32, calibration: Calibration) -> pa.Table:
    wcs, zero_point = calibration.wcs, calibration.zero_point
    order = np.lexsort((photometry.x, photometry.y))
    p, flag = photometry.take(order), flag[order]
    ra, dec = wcs.all_pix2world(p.x, p.y, 0) if p.x.size else (p.x, p.y)
    nanomaggies = nanomaggies_per_count(zero_point)
    columns: dict[str, npt.NDArray[Any]] = {
        "objID": np.arange(1, p.x.size + 1),
        "X": p.x + 1,
        "Y": p.y + 1,
        "RA": np.asarray(ra),
        "DEC": np.asarray(dec),
        "Flag": flag,
        "FWHM": p.fwhm,
        "A": p.a,
        "B": p.b,
        "PA": _position_angle(p, wcs, np.asarray(ra), np.asarray(dec)),
        "E": 1 - p.b / p.a,
        "AB": p.a / p.b,
        "Radius_Kron": p.kron_radius,
    }
    fluxes = {"Kron": (p.flux_kron, p.error_kron)}
    for k in range(len(APERTURE_RADII)):
        fluxes[f"Aper{k + 1}"] = p.flux_aperture[:, k], p.error_aperture[:, k]
    for name, (flux, error) in fluxes.items():
        positive = np.where(flux > 0, flux, np.nan)
        columns[f"Flux_{name}"], columns[f"FluxErr_{name}"] = flux * nanomaggies, error * nanomaggies
        columns[f"Mag_{name}"] = zero_point - 2.5 * np.log10(positive)
        columns[f"MagErr_{name}"] = _POGSON * error / positive
    for k, name in enumerate(("R20", "R50", "R90")):
        columns[name] = p.radius[:, k]
    arrays = [
        pa.array(columns[field.name].astype(field.type.to_pandas_dtype()), field.type, from_pandas=True)
        for field in CATALOG_SCHEMA
    ]
    return pa.Table.from_arrays(arrays, schema=CATALOG_SCHEMA)
