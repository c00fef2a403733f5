"""Measurements on the pixels of one band's stamps: the catalogue sequence that the model reads.

Upstream catalogues come from several programs whose Kron radii, widths and error models differ, so every feature
is measured again on the pixels, the same way in training and in the night run. All measures use Gaussian weights
round the source, which depend smoothly on its sub-pixel position, and none depends on the orientation of the stamp.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from sgclassify.stages.arrays import F32, F64, Bool, Columns
from sgclassify.stages.features import (
    ANNULUS,
    FEATURES,
    FLUX_SOFTENING,
    MOMENT_SIGMA,
    PSF_SIGMAS,
    RATIO_SIGMAS,
    REFERENCE_SIGMA,
    TOTAL_RADIUS,
    WIDE_MOMENT_SIGMA,
    WIDENINGS,
)
from sgclassify.stages.stamps import offsets_in_stamps, squared_radius

PSF_RADIUS: Final = 6.0
"""Radius (pixels) within which the PSF is fitted to a source."""

PSF_ERROR: Final = 0.03
"""Error of the empirical PSF relative to its value, for the chi-square of bright sources."""


@dataclass(frozen=True)
class Measured(Columns):
    """Raw measures of n stamps of one band.

    Each array has shape (n,), except ``ratios``: (n, `RATIO_SIGMAS`). Fluxes and errors are in the unit of the stamps.
    """

    x: F64
    y: F64
    snr: F64
    reference_flux: F64
    reference_error: F64
    total_flux: F64
    ratios: F64
    size: F64
    size_wide: F64
    ellipticity: F64
    peak: F64
    annulus_flux: F64
    valid_core: F64
    valid_stamp: F64
    saturated_core: F64

    @property
    def ratio(self) -> dict[float, F64]:
        """Flux with each of `RATIO_SIGMAS` over the reference flux, by sigma."""
        return {s: self.ratios[:, k] for k, s in enumerate(RATIO_SIGMAS)}


def _gauss(squared_radius: F64, sigma: float) -> F64:
    return np.exp(-0.5 * squared_radius / sigma**2)


def _sum(values: F64 | Bool) -> F64:
    return np.asarray(values.sum(axis=(1, 2)), dtype=np.float64)


def measure_stamps(
    image: F32, valid: Bool, saturated: Bool, sigma: F32, x: F64, y: F64, core_radius: float
) -> Measured:
    """Measure the sources in a stack of stamps.

    Parameters
    ----------
    image : ndarray of float32, shape (n, size, size)
        Sky-subtracted stamps, axis order [object, y, x]; pixels that are not valid are ignored.
    valid : ndarray of bool, shape (n, size, size)
        Pixels that are data.
    saturated : ndarray of bool, shape (n, size, size)
        Pixels flagged as saturated.
    sigma : ndarray of float32, shape (n,)
        Noise of a sky pixel, in the unit of `image`.
    x, y : ndarray of float64, shape (n,)
        Position of the source within its stamp, 0-based pixels. Sources with a signal-to-noise ratio above 8 are
        re-centred by up to 0.7 px, so the catalogue's kind of centroid does not matter.
    core_radius : float
        Radius of the core, pixels.
    """
    size = image.shape[-1]
    data = np.where(valid, image, 0.0).astype(np.float64)
    noise = np.maximum(sigma.astype(np.float64), 1e-30)
    x, y = _recentred(data, valid, noise, x, y)
    dx, dy = offsets_in_stamps(x, y, size)
    r2 = dx**2 + dy**2
    radius = np.sqrt(r2)

    reference = _gauss(r2, REFERENCE_SIGMA)
    reference_flux = _sum(reference * data)
    reference_error = noise * np.sqrt(np.maximum(_sum(reference**2 * valid), 1e-6))
    floor = np.maximum(reference_flux, reference_error)
    ratios = [np.clip(_sum(_gauss(r2, s) * data) / floor, -5.0, 40.0) for s in RATIO_SIGMAS]

    def moments(s: float) -> tuple[F64, F64]:
        weighted = _gauss(r2, s) * data
        total = np.maximum(_sum(weighted), 2.0 * noise * s)
        xx = _sum(weighted * dx**2) / total
        yy = _sum(weighted * dy**2) / total
        xy = _sum(weighted * dx * dy) / total
        trace = np.clip(xx + yy, 0.05, 4.0 * s**2)
        return trace, np.clip(np.hypot(xx - yy, 2.0 * xy) / trace, 0.0, 1.5)

    moment, ellipticity = moments(MOMENT_SIGMA)
    wide_moment, _ = moments(WIDE_MOMENT_SIGMA)
    total_flux = _sum(np.clip(TOTAL_RADIUS + 0.5 - radius, 0.0, 1.0) * data)
    core = radius <= core_radius
    n_core = np.maximum(_sum(core), 1.0)
    peak = np.where(radius <= 2.5, data, -np.inf).max(axis=(1, 2), initial=-np.inf)
    annulus = (radius >= ANNULUS[0]) & (radius < ANNULUS[1])
    return Measured(
        x=x,
        y=y,
        snr=reference_flux / reference_error,
        reference_flux=reference_flux,
        reference_error=reference_error,
        total_flux=total_flux,
        ratios=np.stack(ratios, axis=1),
        size=moment,
        size_wide=wide_moment,
        ellipticity=ellipticity,
        peak=np.clip(np.where(np.isfinite(peak), peak, 0.0) / floor, -2.0, 2.0),
        annulus_flux=_sum(annulus * data),
        valid_core=_sum(core & valid) / n_core,
        valid_stamp=_sum(valid) / float(size * size),
        saturated_core=_sum(core & saturated) / n_core,
    )


def _recentred(data: F64, valid: Bool, noise: F64, x0: F64, y0: F64) -> tuple[F64, F64]:
    """Centroids under a Gaussian weight that follows the source, within 0.7 px of the given ones."""
    x, y = x0, y0
    for _ in range(3):
        dx, dy = offsets_in_stamps(x, y, data.shape[-1])
        weight = _gauss(dx**2 + dy**2, 1.5)
        flux = _sum(weight * data)
        good = flux > 8.0 * noise * np.sqrt(_sum(weight**2 * valid))
        safe = np.where(good, flux, 1.0)
        # twice the weighted first moment: the fixed point of a source as wide as its weight
        move_x = np.where(good, np.clip(2.0 * _sum(weight * data * dx) / safe, -0.5, 0.5), 0.0)
        move_y = np.where(good, np.clip(2.0 * _sum(weight * data * dy) / safe, -0.5, 0.5), 0.0)
        x, y = np.clip(x + move_x, x0 - 0.7, x0 + 0.7), np.clip(y + move_y, y0 - 0.7, y0 + 0.7)
    return x, y


def _widened(psf: F64, sigma: float) -> F64:
    """Stamps convolved with a Gaussian, shape (n, size, size)."""
    axis = np.arange(psf.shape[-1], dtype=np.float64)
    kernel = np.exp(-0.5 * ((axis[:, None] - axis[None, :]) / sigma) ** 2) / (np.sqrt(2.0 * np.pi) * sigma)
    return np.asarray(kernel @ psf @ kernel)


@dataclass(frozen=True)
class Stamps:
    """Stamps of n sources in one band, with the PSF and the noise of each; nanomaggies.

    Attributes
    ----------
    image : ndarray of float32, shape (n, size, size)
        Sky-subtracted pixels, axis order [object, y, x].
    valid : ndarray of bool, shape (n, size, size)
        Pixels that are data.
    sigma : ndarray of float32, shape (n,)
        Noise of a sky pixel.
    psf : ndarray of float32, shape (n, size, size)
        PSF at the source's place; all 0 where unknown.
    shot : ndarray of float64, shape (n,)
        Variance of a pixel per unit of its flux (photon noise); NaN where unknown.
    """

    image: F32
    valid: Bool
    sigma: F32
    psf: F32
    shot: F64


@dataclass(frozen=True)
class StampLocus:
    """The point sources of the exposure that each of n stamps comes from; each array has shape (n,).

    Attributes
    ----------
    measures : dict of str to ndarray of float64
        ``measures`` of `sgclassify.stages.locus.PointSources`; NaN where unknown.
    n_stars : ndarray of float64
        Number of point sources in `measures`.
    header_fwhm : ndarray of float64
        FWHM in the header, pixels; NaN where absent.
    """

    measures: dict[str, F64]
    n_stars: F64
    header_fwhm: F64


def fit_with_psf(stamps: Stamps, squared_radius: F64) -> dict[str, F64]:
    """Fit the PSF, and the PSF with a share of its light widened, to stamps of one band.

    Parameters
    ----------
    squared_radius : ndarray of float64, shape (n, size, size)
        Squared distances from the source, px^2.

    Returns
    -------
    dict of str to ndarray of float64, shape (n,)
        The features ``psf_flux`` to ``extended_snr_2.5``; NaN where the PSF is unknown or hardly any pixel is valid.
    """
    data = np.where(stamps.valid, stamps.image, 0.0).astype(np.float64)
    model = stamps.psf.astype(np.float64)
    window = stamps.valid & (squared_radius < PSF_RADIUS**2)
    sky = (stamps.sigma.astype(np.float64) ** 2)[:, None, None]
    # a first flux, for the noise that the source itself makes
    square = _sum(window * model**2)
    # half of the light of the PSF must be seen
    known = (_sum(window * model) > 0.5) & (square > 0)
    safe = np.where(known, square, 1.0)
    flux = np.maximum(_sum(window * model * data) / safe, 0.0)[:, None, None]
    bright = np.maximum(flux * model, 0.0)
    variance = sky + np.nan_to_num(stamps.shot)[:, None, None] * bright + (PSF_ERROR * bright) ** 2
    weight = window / np.maximum(variance, 1e-30)
    pp = np.where(known, _sum(weight * model**2), 1.0)
    pd = _sum(weight * model * data)
    fitted, error = pd / pp, 1.0 / np.sqrt(pp)
    count = np.maximum(_sum(window), 2.0) - 1.0
    chi2 = _sum(weight * (data - fitted[:, None, None] * model) ** 2)
    result = {
        "psf_flux": np.arcsinh(fitted / FLUX_SOFTENING),
        "psf_snr": np.arcsinh(fitted / error),
        "psf_misfit": np.arcsinh((chi2 - count) / np.sqrt(2.0 * count)),
    }
    for width in WIDENINGS:
        moved = _widened(model, width) - model
        mm, pm = _sum(weight * moved**2), _sum(weight * model * moved)
        md = _sum(weight * moved * data)
        determinant = np.where(known, mm * pp - pm**2, 1.0)
        determinant = np.maximum(determinant, 1e-12 * np.maximum(mm * pp, 1e-30))
        amount = (md * pp - pm * pd) / determinant
        amount_error = np.sqrt(pp / determinant)
        total = np.maximum((pd * mm - pm * md) / determinant, 2.0 * error)
        result[f"extended_{width}"] = np.clip(amount / total, -3.0, 6.0)
        result[f"extended_snr_{width}"] = np.arcsinh(amount / amount_error)
    return {name: np.where(known, values, np.nan) for name, values in result.items()}


def feature_table(measured: Measured, detected: Bool, stamps: Stamps, locus: StampLocus) -> F32:
    """Turn raw measures into the features of one band.

    Parameters
    ----------
    detected : ndarray of bool, shape (n,)
        Whether the object has a detection in this band.

    Returns
    -------
    ndarray of float32, shape (n, len(FEATURES))
        NaN where a feature has no value.
    """
    psf, sigma = locus.measures, stamps.sigma
    column: dict[str, npt.NDArray[np.generic]] = {
        "detected": detected,
        "snr": np.arcsinh(measured.snr),
        "flux": np.arcsinh(measured.total_flux / FLUX_SOFTENING),
        "depth": 22.5 - 2.5 * np.log10(5.0 * measured.reference_error) - 25.0,
        "size": measured.size,
        "size_wide": measured.size_wide,
        "ellipticity": measured.ellipticity,
        "peak": measured.peak,
        "excess_size": np.log(measured.size / psf["size"]),
        "psf_size": psf["size"],
        "psf_ratio_2.7": psf["ratio_2.7"],
        "psf_stars": np.log1p(locus.n_stars),
        "header_fwhm": locus.header_fwhm,
        "annulus": np.clip(
            measured.annulus_flux
            / np.maximum(np.abs(measured.total_flux), 3.0 * TOTAL_RADIUS * sigma.astype(np.float64)),
            -5.0,
            5.0,
        ),
        "valid_core": measured.valid_core,
        "valid_stamp": measured.valid_stamp,
        "saturated_core": measured.saturated_core,
    }
    r2 = squared_radius(measured.x, measured.y, stamps.valid.shape[-1])
    column |= fit_with_psf(stamps, r2)
    reference = _gauss(r2, REFERENCE_SIGMA)
    for s in RATIO_SIGMAS:
        column[f"ratio_{s}"] = measured.ratio[s]
    for s in PSF_SIGMAS:
        expected = psf[f"ratio_{s}"]
        # error of  flux_s - expected * flux_reference  under sky noise alone
        difference = _gauss(r2, s) - expected[:, None, None] * reference
        error = sigma * np.sqrt(np.maximum(_sum(difference**2 * stamps.valid), 1e-6))
        excess = measured.ratio[s] - expected
        scale = np.maximum(measured.reference_flux, measured.reference_error)
        column[f"excess_{s}"] = excess / expected
        column[f"significance_{s}"] = np.arcsinh(excess * scale / np.maximum(error, 1e-30))
    table = np.stack([np.asarray(column[name], dtype=np.float32) for name in FEATURES], axis=1)
    return np.where(np.isfinite(table), table, np.float32(np.nan)).astype(np.float32)
