"""The point sources of one exposure: which detections they are, and how they look (their locus)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from sgclassify.stages.arrays import F64, I64, Bool
from sgclassify.stages.features import MOMENT_SIGMA, PSF_SIGMAS
from sgclassify.stages.measure import Measured

GAUSSIAN_FWHM: Final = 2.3548
"""FWHM of a Gaussian of unit sigma, rounded: the last bits of the products of today's model rest on these digits
(`sgclassify.stages.photometry.FWHM_PER_SIGMA` is exact)."""

MIN_SNR: Final = 20.0
"""Signal-to-noise ratio of the faintest detections that may be point sources."""

MAX_CANDIDATES: Final = 2000
"""Most detections among which the locus is sought: the brightest."""

HINT_WIDTH: Final = 0.5
"""Standard deviation of the size of the point sources about the FWHM in the header, in the logarithm of the squared
width."""

MAX_PSF_ELLIPTICITY: Final = 0.6
"""Largest ellipticity of a point source: an axis ratio of 1 to 2. In 264 simulated exposures, 99 % of the stars above
20 times the noise have less than 0.3. Cosmic rays are no larger than stars, but 95 % of them have more than 0.7."""

WINGS: Final = 0.15
"""What the wings of a telescope's PSF add to the logarithm of the squared width of the Gaussian of its FWHM."""

FEW_STARS: Final = 5
"""With fewer point sources the FWHM in the header decides which detections are point sources."""

MIN_PSF_SIZE: Final = 0.7
"""Smallest weighted moment (px^2) of a PSF: that of a Gaussian of 1.5 px FWHM; the camera's is 2 px and wider."""


@dataclass(frozen=True)
class PointSources:
    """The locus of point sources in one exposure, from its own pixels.

    Attributes
    ----------
    measures : dict of str to float
        Median over the point sources of each of `sgclassify.stages.features.PSF_MEASURES`; the expected value where the
        exposure has none.
    n_stars : int
        Number of point sources in the medians.
    """

    measures: dict[str, float]
    n_stars: int


def _log_size(size: F64) -> F64:
    """Logarithm of the squared width, in units of `MOMENT_SIGMA`.

    The weight is taken out of the moment (exactly for a Gaussian), because under it all large sources look alike.
    """
    return np.asarray(np.log(size / np.maximum(2.0 * MOMENT_SIGMA**2 - size, 0.05) / 2.0))


def _expected_log_size(fwhm_px: float) -> float:
    """`_log_size` of the point sources where the FWHM is known."""
    return float(2.0 * np.log(fwhm_px / GAUSSIAN_FWHM / MOMENT_SIGMA) - np.log(2.0) + WINGS)


def candidates(measured: Measured) -> Bool:
    """Which detections may be point sources as far as each shows alone; the brightest `MAX_CANDIDATES` count."""
    good = (measured.snr >= MIN_SNR) & (measured.valid_core > 0.97) & (measured.saturated_core == 0)
    # a bright neighbour inside the stamp moves every measure
    good &= np.abs(measured.annulus_flux) < 0.3 * np.abs(measured.total_flux)
    # sharper than any PSF, or a streak: a cosmic ray or a hot pixel
    good &= (measured.size > MIN_PSF_SIZE) & (measured.ellipticity < MAX_PSF_ELLIPTICITY)
    return np.asarray(good)


def point_source_members(measured: Measured, fwhm_px: float) -> I64:
    """Find the point sources among the detections of one exposure.

    Point sources share one size, while galaxies have many. So the locus is the densest place of the distribution of
    log-size; among places nearly as dense, the one of the smallest size. The FWHM in the header is only a hint.

    Parameters
    ----------
    measured : Measured
        Measures of the exposure's detections.
    fwhm_px : float
        FWHM of the header, pixels; not finite where it has none.

    Returns
    -------
    ndarray of int64
        Indices into `measured`; empty where fewer than two detections qualify (fewer than one if the header has a
        FWHM).
    """
    index = np.flatnonzero(candidates(measured))
    none = np.zeros(0, dtype=np.int64)
    hinted = 1.0 < fwhm_px < 6.0
    if index.size < (1 if hinted else 2):
        return none
    if index.size > MAX_CANDIDATES:
        index = index[np.argsort(-measured.snr[index], kind="stable")[:MAX_CANDIDATES]]
    log_size = _log_size(measured.size[index])
    # width of the locus: noise of the size at the faint end, PSF variation over the field at the bright end
    width = 0.03 + 2.0 / measured.snr[index]
    # bright detections are stars more often, and show the PSF better
    vote = np.sqrt(np.minimum(measured.snr[index], 1000.0))
    distance = (log_size[:, None] - log_size[None, :]) / width[None, :]
    density = (vote * np.exp(-0.5 * distance**2)).sum(axis=1)
    expected = _expected_log_size(fwhm_px) if hinted else np.nan
    if hinted:
        density *= np.exp(-0.5 * ((log_size - expected) / HINT_WIDTH) ** 2)
    dense = density >= 0.5 * density.max()
    centre = log_size[dense].min()
    near = np.abs(log_size - centre) < 2.0 * width
    centre = np.median(log_size[near])
    chosen = np.abs(log_size - centre) < 2.5 * width
    if hinted and np.count_nonzero(chosen) < FEW_STARS:
        # too few to overrule the header
        chosen &= np.abs(log_size - expected) < 1.5 * HINT_WIDTH
    members = index[chosen]
    return members if members.size >= (1 if hinted else 2) else none


def fwhm_ratio(psf: PointSources, fwhm_px: float) -> float:
    """FWHM of an exposure's point sources, judged by their moments, over a FWHM in pixels; NaN if either is missing."""
    if not psf.n_stars or not np.isfinite(fwhm_px):
        return float("nan")
    return float(np.exp(0.5 * (_log_size(np.array(psf.measures["size"])) - _expected_log_size(fwhm_px))))


def point_sources(measured: Measured, members: I64) -> PointSources:
    """The locus of point sources: medians of the measures of the members (at least one)."""
    measures = {f"ratio_{s}": float(np.median(measured.ratio[s][members])) for s in PSF_SIGMAS}
    measures["size"] = float(np.median(measured.size[members]))
    return PointSources(measures, int(members.size))


def gaussian_width(size: float) -> float:
    """Width (pixels) of the Gaussian whose second moment under the weight of `MOMENT_SIGMA` is `size` (px^2)."""
    return float(np.sqrt(1.0 / max(2.0 / size - 1.0 / MOMENT_SIGMA**2, 0.05)))
