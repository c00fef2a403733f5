"""Measurements on the pixels of one band's stamps: the catalogue sequence that the model reads.

Upstream catalogues come from several programs whose Kron radii, widths and error models differ, so every feature
is measured again on the pixels, the same way in training and in the night run. All measures use Gaussian weights
round the source, which depend smoothly on its sub-pixel position, and none depends on the orientation of the stamp.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from sgclassify.stages.arrays import F32, F64, Bool
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

PSF_RADIUS: Final = 6.0
"""Radius (pixels) within which the PSF is fitted to a source."""

PSF_ERROR: Final = 0.03
"""Error of the empirical PSF relative to its value, for the chi-square of bright sources."""

GAUSSIAN_FWHM: Final = 2.3548
HINT_WIDTH: Final = 0.5
"""How far (in the logarithm of the squared width) the point sources may be expected from the FWHM in the header."""

MAX_PSF_ELLIPTICITY: Final = 0.6
"""Largest ellipticity of a point source: an axis ratio of 1 to 2. In 264 simulated exposures 99 % of the stars above 20
times the noise have less than 0.3, 95 % of the cosmic rays, which are as small as stars or smaller, more than 0.7."""

WINGS: Final = 0.15
"""How much the wings of a telescope's PSF add to the logarithm of its squared width, over the Gaussian of its FWHM."""

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
        Median over the point sources of each of `sgclassify.stages.features.PSF_MEASURES`; the expected value where
        the exposure has no point source.
    n_stars : int
        Point sources behind the medians.
    """

    measures: dict[str, float]
    n_stars: int


@dataclass(frozen=True)
class Measured:
    """Raw measures of n stamps of one band; each array has shape (n,) unless said.

    Fluxes and errors are in the unit of the stamps.
    """

    x: F64
    y: F64
    snr: F64
    reference_flux: F64
    reference_error: F64
    total_flux: F64
    ratio: dict[float, F64]
    size: F64
    size_wide: F64
    ellipticity: F64
    peak: F64
    annulus_flux: F64
    valid_core: F64
    valid_stamp: F64
    saturated_core: F64

    def take(self, index: npt.NDArray[np.int64]) -> Measured:
        """The measures of an index array of stamps, in its order."""
        columns = {
            field.name: getattr(self, field.name)[index]
            for field in dataclasses.fields(self)
            if field.name != "ratio"
        }
        return Measured(ratio={s: values[index] for s, values in self.ratio.items()}, **columns)

    @classmethod
    def concatenate(cls, parts: list[Measured]) -> Measured:
        """Put the measures of several stacks one after the other; `parts` is not empty."""
        columns = {
            field.name: np.concatenate([getattr(part, field.name) for part in parts])
            for field in dataclasses.fields(cls)
            if field.name != "ratio"
        }
        ratio = {s: np.concatenate([part.ratio[s] for part in parts]) for s in RATIO_SIGMAS}
        return cls(ratio=ratio, **columns)


def _gauss(squared_radius: F64, sigma: float) -> F64:
    return np.exp(-0.5 * squared_radius / sigma**2)


def _squared_radius(x: F64, y: F64, size: int) -> F64:
    axis = np.arange(size, dtype=np.float64)
    return np.asarray(
        (axis[None, None, :] - x[:, None, None]) ** 2 + (axis[None, :, None] - y[:, None, None]) ** 2
    )


def _sum(values: F64 | Bool) -> F64:
    return np.asarray(values.sum(axis=(1, 2)), dtype=np.float64)


def measure_stamps(
    image: F32, valid: Bool, saturated: Bool, sigma: F32, x: F64, y: F64, core_radius: float
) -> Measured:
    """Measure the sources in a stack of stamps.

    Parameters
    ----------
    image : ndarray of float32, shape (n, size, size)
        Sky-subtracted stamps, axis order [object, y, x]; not-valid pixels are ignored.
    valid : ndarray of bool, shape (n, size, size)
        Pixels that are data.
    saturated : ndarray of bool, shape (n, size, size)
        Pixels flagged as saturated.
    sigma : ndarray of float32, shape (n,)
        Noise of a sky pixel, in the unit of `image`.
    x, y : ndarray of float64, shape (n,)
        Position of the source within its stamp, 0-based pixels. Sources of signal-to-noise ratio above 8 are
        re-centred by up to 0.7 px, so that the catalogue's kind of centroid does not matter.
    core_radius : float
        Radius of the core, pixels.

    Returns
    -------
    Measured
    """
    size = image.shape[-1]
    data = np.where(valid, image, 0.0).astype(np.float64)
    noise = np.maximum(sigma.astype(np.float64), 1e-30)
    axis = np.arange(size, dtype=np.float64)
    x = x.copy()
    y = y.copy()
    x0, y0 = x.copy(), y.copy()
    for _ in range(3):
        dx, dy = axis[None, None, :] - x[:, None, None], axis[None, :, None] - y[:, None, None]
        weight = _gauss(dx**2 + dy**2, 1.5)
        flux = _sum(weight * data)
        good = flux > 8.0 * noise * np.sqrt(_sum(weight**2 * valid))
        safe = np.where(good, flux, 1.0)
        # twice the weighted first moment: the fixed point of a source as wide as its weight
        x += np.where(good, np.clip(2.0 * _sum(weight * data * dx) / safe, -0.5, 0.5), 0.0)
        y += np.where(good, np.clip(2.0 * _sum(weight * data * dy) / safe, -0.5, 0.5), 0.0)
        x = np.clip(x, x0 - 0.7, x0 + 0.7)
        y = np.clip(y, y0 - 0.7, y0 + 0.7)
    dx, dy = axis[None, None, :] - x[:, None, None], axis[None, :, None] - y[:, None, None]
    r2 = dx**2 + dy**2
    radius = np.sqrt(r2)

    reference = _gauss(r2, REFERENCE_SIGMA)
    reference_flux = _sum(reference * data)
    reference_error = noise * np.sqrt(np.maximum(_sum(reference**2 * valid), 1e-6))
    floor = np.maximum(reference_flux, reference_error)
    ratio = {s: np.clip(_sum(_gauss(r2, s) * data) / floor, -5.0, 40.0) for s in RATIO_SIGMAS}

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
        ratio=ratio,
        size=moment,
        size_wide=wide_moment,
        ellipticity=ellipticity,
        peak=np.clip(np.where(np.isfinite(peak), peak, 0.0) / floor, -2.0, 2.0),
        annulus_flux=_sum(annulus * data),
        valid_core=_sum(core & valid) / n_core,
        valid_stamp=_sum(valid) / float(size * size),
        saturated_core=_sum(core & saturated) / n_core,
    )


def _log_size(size: F64) -> F64:
    """Logarithm of the squared width, in units of `MOMENT_SIGMA`.

    The moment without its weight (exact for a Gaussian), since under the weight all large sources look alike.
    """
    return np.asarray(np.log(size / np.maximum(2.0 * MOMENT_SIGMA**2 - size, 0.05) / 2.0))


def _expected_log_size(fwhm_px: float) -> float:
    """`_log_size` of the point sources where the FWHM is known."""
    return float(2.0 * np.log(fwhm_px / GAUSSIAN_FWHM / MOMENT_SIGMA) - np.log(2.0) + WINGS)


def point_source_members(measured: Measured, fwhm_px: float, min_snr: float = 20.0) -> npt.NDArray[np.int64]:
    """Find the point sources among the detections of one exposure.

    Point sources share one size while galaxies spread over many, so the locus is the densest place of the
    log-size distribution, and among places nearly as dense the smallest. The header's FWHM is a hint only.

    Parameters
    ----------
    measured : Measured
        Measures of the exposure's detections.
    fwhm_px : float
        FWHM of the header, pixels; not finite where it has none.
    min_snr : float
        Faintest detections used.

    Returns
    -------
    ndarray of int64
        Indices into `measured`; empty where fewer than two detections qualify (one where the header has a FWHM).
    """
    good = (measured.snr >= min_snr) & (measured.valid_core > 0.97) & (measured.saturated_core == 0)
    # a bright neighbour inside the stamp moves every measure
    good &= np.abs(measured.annulus_flux) < 0.3 * np.abs(measured.total_flux)
    # sharper than any PSF, or a streak: a cosmic ray or a hot pixel
    good &= (measured.size > MIN_PSF_SIZE) & (measured.ellipticity < MAX_PSF_ELLIPTICITY)
    index = np.flatnonzero(good)
    none = np.zeros(0, dtype=np.int64)
    hinted = 1.0 < fwhm_px < 6.0
    if index.size < (1 if hinted else 2):
        return none
    if index.size > 2000:
        index = index[np.argsort(-measured.snr[index], kind="stable")[:2000]]
    log_size = _log_size(measured.size[index])
    # width of the locus: noise of the size at the faint end, PSF variation over the field at the bright end
    width = 0.03 + 2.0 / measured.snr[index]
    # bright detections are stars more often, and tell the PSF better
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
        # too few to stand against the header
        chosen &= np.abs(log_size - expected) < 1.5 * HINT_WIDTH
    members = index[chosen]
    return members if members.size >= (1 if hinted else 2) else none


def fwhm_ratio(psf: PointSources, fwhm_px: float) -> float:
    """FWHM of an exposure's point sources over a FWHM in pixels, as far as their moments tell; nan without both."""
    if not psf.n_stars or not np.isfinite(fwhm_px):
        return float("nan")
    return float(np.exp(0.5 * (_log_size(np.array(psf.measures["size"])) - _expected_log_size(fwhm_px))))


def point_sources(measured: Measured, members: npt.NDArray[np.int64]) -> PointSources:
    """The point-source locus: medians of the measures of the members, of which there is one at least."""
    measures = {f"ratio_{s}": float(np.median(measured.ratio[s][members])) for s in PSF_SIGMAS}
    measures["size"] = float(np.median(measured.size[members]))
    return PointSources(measures, int(members.size))


def gaussian_width(size: float) -> float:
    """Width (pixels) of the Gaussian whose second moment under the weight of `MOMENT_SIGMA` is `size` (px^2)."""
    return float(np.sqrt(1.0 / max(2.0 / size - 1.0 / MOMENT_SIGMA**2, 0.05)))


def _widened(psf: F64, sigma: float) -> F64:
    """Stamps convolved with a Gaussian, shape (n, size, size)."""
    axis = np.arange(psf.shape[-1], dtype=np.float64)
    kernel = np.exp(-0.5 * ((axis[:, None] - axis[None, :]) / sigma) ** 2) / (np.sqrt(2.0 * np.pi) * sigma)
    return np.asarray(kernel @ psf @ kernel)


def fit_with_psf(
    image: F32, valid: Bool, sigma: F32, shot: F64, psf: F32, squared_radius: F64
) -> dict[str, F64]:
    """Fit the PSF, and the PSF with a share of its light widened, to stamps of one band.

    Parameters
    ----------
    image : ndarray of float32, shape (n, size, size)
        Sky-subtracted stamps.
    valid : ndarray of bool, shape (n, size, size)
    sigma : ndarray of float32, shape (n,)
        Noise of a sky pixel, in the unit of `image`.
    shot : ndarray of float64, shape (n,)
        Variance of a pixel per unit of its flux (photon noise), in the unit of `image`.
    psf : ndarray of float32, shape (n, size, size)
        PSF at the source's place; all 0 where unknown.
    squared_radius : ndarray of float64, shape (n, size, size)
        Squared distances from the source, px^2.

    Returns
    -------
    dict of str to ndarray of float64, shape (n,)
        The features ``psf_flux`` to ``extended_snr_2.5``; nan where the PSF is unknown or hardly a pixel is valid.
    """
    data = np.where(valid, image, 0.0).astype(np.float64)
    model = psf.astype(np.float64)
    window = valid & (squared_radius < PSF_RADIUS**2)
    sky = (sigma.astype(np.float64) ** 2)[:, None, None]
    # a first flux, for the noise that the source itself makes
    square = _sum(window * model**2)
    # half of the light of the PSF must be seen
    known = (_sum(window * model) > 0.5) & (square > 0)
    safe = np.where(known, square, 1.0)
    flux = np.maximum(_sum(window * model * data) / safe, 0.0)[:, None, None]
    bright = np.maximum(flux * model, 0.0)
    variance = sky + np.nan_to_num(shot)[:, None, None] * bright + (PSF_ERROR * bright) ** 2
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


def feature_table(
    measured: Measured,
    detected: Bool,
    sigma: F32,
    psf: dict[str, F64],
    psf_stars: F64,
    header_fwhm: F64,
    image: F32,
    valid: Bool,
    psf_stamps: F32,
    shot: F64,
) -> F32:
    """Turn raw measures into the features of one band.

    Parameters
    ----------
    measured : Measured
        Measures of n stamps, in nanomaggies.
    detected : ndarray of bool, shape (n,)
        Whether the object has a detection in this band.
    sigma : ndarray of float32, shape (n,)
        Noise of a sky pixel, nanomaggies.
    psf : dict of str to ndarray of float64, shape (n,)
        `PointSources.measures` of each stamp's exposure; nan where unknown.
    psf_stars, header_fwhm : ndarray of float64, shape (n,)
        Point sources behind `psf`; FWHM of the header in pixels, nan where absent.
    image : ndarray of float32, shape (n, size, size)
        Stamps, nanomaggies.
    valid : ndarray of bool, shape (n, size, size)
        Pixels that are data.
    psf_stamps : ndarray of float32, shape (n, size, size)
        PSF at the source's place; all 0 where unknown.
    shot : ndarray of float64, shape (n,)
        Variance of a pixel per unit of its flux, nanomaggies; nan where unknown.

    Returns
    -------
    ndarray of float32, shape (n, len(FEATURES))
        nan where a feature has no value.
    """
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
        "psf_stars": np.log1p(psf_stars),
        "header_fwhm": header_fwhm,
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
    r2 = _squared_radius(measured.x, measured.y, valid.shape[-1])
    column |= fit_with_psf(image, valid, sigma, shot, psf_stamps, r2)
    reference = _gauss(r2, REFERENCE_SIGMA)
    for s in RATIO_SIGMAS:
        column[f"ratio_{s}"] = measured.ratio[s]
    for s in PSF_SIGMAS:
        expected = psf[f"ratio_{s}"]
        # error of  flux_s - expected * flux_reference  under sky noise alone
        difference = _gauss(r2, s) - expected[:, None, None] * reference
        error = sigma * np.sqrt(np.maximum(_sum(difference**2 * valid), 1e-6))
        excess = measured.ratio[s] - expected
        scale = np.maximum(measured.reference_flux, measured.reference_error)
        column[f"excess_{s}"] = excess / expected
        column[f"significance_{s}"] = np.arcsinh(excess * scale / np.maximum(error, 1e-30))
    table = np.stack([np.asarray(column[name], dtype=np.float32) for name in FEATURES], axis=1)
    return np.where(np.isfinite(table), table, np.float32(np.nan)).astype(np.float32)
