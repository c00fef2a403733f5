"""From the detections of an exposure to its point sources and its PSF."""

from __future__ import annotations

import dataclasses
from typing import Final

import numpy as np

from sgclassify.stages.arrays import F32, F64, I64, Bool
from sgclassify.stages.config import StageConfig
from sgclassify.stages.locus import (
    GAUSSIAN_FWHM,
    MIN_SNR,
    PointSources,
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
"""Half the sides (pixels) of the two boxes of `maybe_bright`."""

REACH: Final = 1e-4
"""Most that the pixels outside the larger box count in the signal-to-noise ratio, per unit of the root of their sum of
squares over the noise. They are at least 5.3 pixels from the source, as it moves by up to 0.7 pixels when it is centred
again. The squares of the reference weights there are 7e-9 of all, and 98 % of all are in the smaller box."""


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
    ny, nx = sky.shape
    row, column = (np.rint(place).astype(np.int64) for place in (stamps.y, stamps.x))
    noise = sky.noise_at(np.clip(row, 0, ny - 1), np.clip(column, 0, nx - 1))
    possible = np.flatnonzero(maybe_bright(stamps, sky, noise))
    parts: list[Measured] = []
    for start in range(0, possible.size, CHUNK):
        index = possible[start : start + CHUNK]
        image, x, y = _without_sky(stamps, sky, index)
        valid, saturated = stamps.valid[index], stamps.saturated[index]
        parts.append(measure_stamps(image, valid, saturated, noise[index], x, y, config.core_radius_px))
    members = np.zeros(0, np.int64)
    if parts:
        measured = Measured.concatenate(parts)
        bright = np.flatnonzero(measured.snr >= MIN_SNR)
        measured, index = measured.take(bright), possible[bright]
        members = point_source_members(measured, fwhm_px)
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


def _without_sky(stamps: RollingStamps, sky: SkyMesh, index: I64) -> tuple[F32, F64, F64]:
    """Some of the stamps without the sky, and the places (x, y) in them."""
    x, y = stamps.first_x[index], stamps.first_y[index]
    return stamps.image[index] - sky.level_of_stamps(y, x, stamps.size), stamps.x[index] - x, stamps.y[index] - y


def maybe_bright(stamps: RollingStamps, sky: SkyMesh, noise: F32) -> Bool:
    """Whether a signal-to-noise ratio of `sgclassify.stages.locus.MIN_SNR` is possible; ``noise`` is of a sky pixel.

    A weighted sum over its own noise is at most the root of the sum of squares of the pixels (Cauchy-Schwarz). Where
    all pixels of a small box around the source are data, those outside a larger one hardly count. Most detections are
    fainter than any star of the PSF, and need no more than this.
    """
    box, core = (slice(stamps.size // 2 - half, stamps.size // 2 + half) for half in (BOX_PX, CORE_PX))
    level = sky.level_of_stamps(stamps.first_y + box.start, stamps.first_x + box.start, 2 * BOX_PX)
    near = np.where(stamps.valid[:, box, box], stamps.image[:, box, box] - level, np.float32(0))
    highest = np.abs(sky.level).max(initial=0)
    # a sum that overflows is not below the limit
    with np.errstate(over="ignore"):
        inner = np.sqrt(np.einsum("kij,kij->k", near, near))
        # the sky is not taken off here, which would take longer
        outer = np.sqrt(np.einsum("kij,kij->k", stamps.image, stamps.image)) + stamps.size * highest
        faint = inner + REACH * outer < 0.99 * MIN_SNR * noise
    return np.asarray(~(faint & stamps.valid[:, core, core].all(axis=(1, 2))))


def _expected_point_sources(model: PsfModel, config: StageConfig) -> PointSources:
    """The locus that point sources of this PSF would have, for an exposure that shows none."""
    middle, place = np.array([PSF_STAMP / 2.0]), np.array([0.0])
    image = model.stamps(middle, middle, place, place, PSF_STAMP)
    sigma = np.full(1, 1e-6, dtype=np.float32)
    measured = measure_stamps(
        image, np.ones(image.shape, bool), np.zeros(image.shape, bool), sigma, middle, middle, config.core_radius_px
    )
    return dataclasses.replace(point_sources(measured, np.zeros(1, np.int64)), n_stars=0)
