"""From the detections of an exposure to its point sources and its PSF."""

from __future__ import annotations

import dataclasses
from typing import Final

import numpy as np

from sgclassify.stages.arrays import F32, F64, I64
from sgclassify.stages.config import StageConfig
from sgclassify.stages.locus import (
    GAUSSIAN_FWHM,
    MAX_CANDIDATES,
    MIN_SNR,
    PointSources,
    candidates,
    gaussian_width,
    point_source_members,
    point_sources,
)
from sgclassify.stages.measure import Measured, measure_stamps
from sgclassify.stages.psf import PsfModel, Stars, fit_psf, round_psf
from sgclassify.stages.rolling import RollingStamps
from sgclassify.stages.sky import SkyMesh

PSF_STAMP: Final = 32
"""Side (pixels) of the stamps that point sources are measured on."""

CHUNK: Final = 1024
"""Stamps measured at once; memory grows with it, about 100 kB per stamp."""

BOX_PX: Final = 6
CORE_PX: Final = 3
"""Half the sides (pixels) of the two boxes of `snr_limit`."""

REACH: Final = 1e-4
"""Most that the pixels outside the larger box count in the signal-to-noise ratio, per unit of the root of their sum of
squares over the noise. They are at least 5.3 pixels from the source, as it moves by up to 0.7 pixels when it is centred
again. The squares of the reference weights there are 7e-9 of all, and 98 % of all are in the smaller box."""

ROUNDING: Final = 1.001
"""Far more than the sums of `snr_limit`, in float32, lose by rounding."""


def measure_point_sources(
    stamps: RollingStamps, sky: SkyMesh, fwhm_px: float, config: StageConfig
) -> tuple[PointSources, PsfModel]:
    """Find the locus of point sources among the detections of an exposure, and fit the PSF.

    Parameters
    ----------
    stamps : RollingStamps
        Stamps of the detections, of side `PSF_STAMP`, with the sky; all rows of the detector are added.
    fwhm_px : float
        Expected FWHM, pixels.
    """
    noise = sky.noise_near(stamps.x, stamps.y)
    measured, index = _brightest(stamps, sky, noise, config)
    members = point_source_members(measured, fwhm_px) if index.size else np.zeros(0, np.int64)
    if not members.size:
        model = round_psf(fwhm_px / GAUSSIAN_FWHM, sky.shape)
        return _expected_point_sources(model, config), model
    psf = point_sources(measured, members)
    measured, index = measured.take(members), index[members]
    stars = Stars(
        image=_without_sky(stamps, sky, index)[0],
        valid=stamps.valid[index],
        sigma=noise[index],
        flux=measured.reference_flux,
        x=measured.x,
        y=measured.y,
        detector_x=stamps.first_x[index] + measured.x,
        detector_y=stamps.first_y[index] + measured.y,
    )
    return psf, fit_psf(stars, sky.shape, gaussian_width(psf.measures["size"]))


def _brightest(stamps: RollingStamps, sky: SkyMesh, noise: F32, config: StageConfig) -> tuple[Measured, I64]:
    """Measures of all detections that may be among the point sources, and their indices.

    The detections go in the order of the most that their signal-to-noise ratio can be. So once as many are found as
    the locus takes, the others need no measurement.
    """
    limit = snr_limit(stamps, sky, noise)
    order = np.argsort(-limit, kind="stable")[: int(np.count_nonzero(limit >= MIN_SNR))]
    parts = [_measure(stamps, sky, noise, order[:CHUNK], config)]
    counted = parts[0].snr[candidates(parts[0])]
    for start in range(CHUNK, order.size, CHUNK):
        if np.count_nonzero(counted > limit[order[start]]) >= MAX_CANDIDATES:
            break
        parts.append(_measure(stamps, sky, noise, order[start : start + CHUNK], config))
        counted = np.append(counted, parts[-1].snr[candidates(parts[-1])])
    measured, index = Measured.concatenate(parts), order[: len(parts) * CHUNK]
    # in the order of the catalogue
    index, place = np.sort(index), np.argsort(index)
    return measured.take(place), index


def _measure(stamps: RollingStamps, sky: SkyMesh, noise: F32, index: I64, config: StageConfig) -> Measured:
    image, x, y = _without_sky(stamps, sky, index)
    valid, saturated = stamps.valid[index], stamps.saturated[index]
    return measure_stamps(image, valid, saturated, noise[index], x, y, config.core_radius_px)


def _without_sky(stamps: RollingStamps, sky: SkyMesh, index: I64) -> tuple[F32, F64, F64]:
    """Some of the stamps without the sky, and the places (x, y) in them."""
    x, y = stamps.first_x[index], stamps.first_y[index]
    return stamps.image[index] - sky.level_of_stamps(y, x, stamps.size), stamps.x[index] - x, stamps.y[index] - y


def snr_limit(stamps: RollingStamps, sky: SkyMesh, noise: F32) -> F64:
    """The most that the signal-to-noise ratio of each detection can be; ``noise`` is that of a sky pixel.

    A weighted sum over its own noise is at most the root of the sum of squares of the pixels (Cauchy-Schwarz). Where
    all pixels of a small box around the source are data, those outside a larger one hardly count. Elsewhere it is
    infinite. Most detections are fainter than any star of the PSF, and need no more than this.
    """
    box, core = (slice(stamps.size // 2 - half, stamps.size // 2 + half) for half in (BOX_PX, CORE_PX))
    level = sky.level_of_stamps(stamps.first_y + box.start, stamps.first_x + box.start, 2 * BOX_PX)
    near = np.where(stamps.valid[:, box, box], stamps.image[:, box, box] - level, np.float32(0))
    highest = float(np.abs(sky.level).max(initial=0))
    # a sum that overflows gives no limit, nor does a noise of 0
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        inner = np.sqrt(np.einsum("kij,kij->k", near, near).astype(np.float64))
        # the sky is not taken off here, which would take longer
        outer = np.sqrt(np.einsum("kij,kij->k", stamps.image, stamps.image).astype(np.float64))
        limit = ROUNDING * (inner + REACH * (outer + stamps.size * highest)) / noise
    known = np.isfinite(limit) & stamps.valid[:, core, core].all(axis=(1, 2))
    return np.where(known, limit, np.inf)


def _expected_point_sources(model: PsfModel, config: StageConfig) -> PointSources:
    """The locus that point sources of this PSF would have, for an exposure that shows none."""
    middle, place = np.array([PSF_STAMP / 2.0]), np.array([0.0])
    image = model.stamps(middle, middle, place, place, PSF_STAMP)
    sigma = np.full(1, 1e-6, dtype=np.float32)
    measured = measure_stamps(
        image, np.ones(image.shape, bool), np.zeros(image.shape, bool), sigma, middle, middle, config.core_radius_px
    )
    return dataclasses.replace(point_sources(measured, np.zeros(1, np.int64)), n_stars=0)
