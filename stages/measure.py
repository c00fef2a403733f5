"""Measurements on the pixels of one band's stamps: the catalogue sequence that the model reads.

Upstream catalogues come from several programs whose Kron radii, widths and error models differ, so every feature
is measured again on the pixels, the same way in training and in the night run. All measures use Gaussian weights
round the source, which depend smoothly on its sub-pixel position, and none depends on the orientation of the stamp.

A Gaussian weight is one of x times one of y, so all weighted sums of a stamp are products of small matrices (`_sums`).
Each stamp has its own, so its measures do not depend on the other stamps, to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
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
from sgclassify.stages.stamps import Boxes, offsets, squared_radius

PSF_RADIUS: Final = 6.0
"""Radius (pixels) within which the PSF is fitted to a source."""

PSF_ERROR: Final = 0.03
"""Error of the empirical PSF relative to its value, for the chi-square of bright sources."""

SIGMAS: Final = tuple(sorted({REFERENCE_SIGMA, *RATIO_SIGMAS, MOMENT_SIGMA, WIDE_MOMENT_SIGMA}))
"""All sigmas (pixels) under whose weights fluxes are measured."""

CENTRE_SIGMA: Final = 1.5
"""Sigma (pixels) of the weight under which sources are centred again."""

CHUNK: Final = 256
"""Stamps that go through all steps together: few enough to stay in the processor's cache."""


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


def _gauss(offset: F64, sigmas: Sequence[float]) -> F64:
    """Gaussian weights of each sigma along one axis, shape (n, sigmas, size), from the offsets of the pixels."""
    return np.asarray(np.exp(-0.5 * (offset[:, None, :] / np.asarray(sigmas)[:, None]) ** 2))


def _powers(offset: F64, highest: int) -> F64:
    """1, offset, offset^2, ... along one axis, shape (n, highest + 1, size)."""
    return np.stack([offset**power for power in range(highest + 1)], axis=1)


def _sums(stamps: F64, along_y: F64, along_x: F64) -> F64:
    """Weighted sums over stamps: [k, a, b] is that of stamp k under its weights a of y times its weights b of x."""
    return np.asarray(along_y @ stamps @ along_x.transpose(0, 2, 1))


def _diagonal(sums: F64) -> F64:
    """Sums under weight a of y and the same of x, shape (n, weights)."""
    return np.asarray(np.diagonal(sums, axis1=1, axis2=2))


def _total(values: F64 | Bool) -> F64:
    """Sums over all pixels of stamps."""
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
    parts = [slice(k, k + CHUNK) for k in range(0, max(len(x), 1), CHUNK)]
    return Measured.concatenate(
        [_measure(image[k], valid[k], saturated[k], sigma[k], x[k], y[k], core_radius) for k in parts]
    )


def _measure(image: F32, valid: Bool, saturated: Bool, sigma: F32, x: F64, y: F64, core_radius: float) -> Measured:
    size = image.shape[-1]
    data = np.where(valid, image, np.float32(0)).astype(np.float64)
    usable = valid.astype(np.float64)
    noise = np.maximum(sigma.astype(np.float64), 1e-30)
    x, y = _recentred(data, usable, noise, x, y)
    dx, dy = offsets(x, size), offsets(y, size)
    weight_x, weight_y = _gauss(dx, SIGMAS), _gauss(dy, SIGMAS)
    flux = dict(zip(SIGMAS, _diagonal(_sums(data, weight_y, weight_x)).T, strict=True))

    reference_flux = flux[REFERENCE_SIGMA]
    k = SIGMAS.index(REFERENCE_SIGMA)
    square = _sums(usable, weight_y[:, [k]] ** 2, weight_x[:, [k]] ** 2)[:, 0, 0]
    reference_error = noise * np.sqrt(np.maximum(square, 1e-6))
    floor = np.maximum(reference_flux, reference_error)

    def moments(s: float) -> tuple[F64, F64]:
        k = SIGMAS.index(s)
        sums = _sums(data, weight_y[:, [k]] * _powers(dy, 2), weight_x[:, [k]] * _powers(dx, 2))
        total = np.maximum(flux[s], 2.0 * noise * s)
        xx, yy, xy = sums[:, 0, 2] / total, sums[:, 2, 0] / total, sums[:, 1, 1] / total
        trace = np.clip(xx + yy, 0.05, 4.0 * s**2)
        return trace, np.clip(np.hypot(xx - yy, 2.0 * xy) / trace, 0.0, 1.5)

    moment, ellipticity = moments(MOMENT_SIGMA)
    wide_moment, _ = moments(WIDE_MOMENT_SIGMA)
    r2 = squared_radius(x, y, size)
    annulus = (r2 >= ANNULUS[0] ** 2) & (r2 < ANNULUS[1] ** 2)
    box = Boxes(x, y, max(TOTAL_RADIUS + 0.5, core_radius), size)
    near, radius = box.cut(data), np.sqrt(box.r2)
    core = radius <= core_radius
    n_core = np.maximum(_total(core), 1.0)
    peak = np.where(radius <= 2.5, near, -np.inf).max(axis=(1, 2), initial=-np.inf)
    return Measured(
        x=x,
        y=y,
        snr=reference_flux / reference_error,
        reference_flux=reference_flux,
        reference_error=reference_error,
        total_flux=_total(np.clip(TOTAL_RADIUS + 0.5 - radius, 0.0, 1.0) * near),
        ratios=np.stack([np.clip(flux[s] / floor, -5.0, 40.0) for s in RATIO_SIGMAS], axis=1),
        size=moment,
        size_wide=wide_moment,
        ellipticity=ellipticity,
        peak=np.clip(np.where(np.isfinite(peak), peak, 0.0) / floor, -2.0, 2.0),
        annulus_flux=np.vecdot(annulus.reshape(-1, size**2).astype(np.float64), data.reshape(-1, size**2)),
        valid_core=_total(core & box.cut(valid)) / n_core,
        valid_stamp=_total(usable) / float(size * size),
        saturated_core=_total(core & box.cut(saturated)) / n_core,
    )


def _recentred(data: F64, usable: F64, noise: F64, x0: F64, y0: F64) -> tuple[F64, F64]:
    """Centroids under a Gaussian weight that follows the source, within 0.7 px of the given ones."""
    x, y = x0, y0
    for _ in range(3):
        dx, dy = offsets(x, data.shape[-1]), offsets(y, data.shape[-1])
        weight_x, weight_y = _gauss(dx, (CENTRE_SIGMA,)), _gauss(dy, (CENTRE_SIGMA,))
        sums = _sums(data, weight_y * _powers(dy, 1), weight_x * _powers(dx, 1))
        flux = sums[:, 0, 0]
        good = flux > 8.0 * noise * np.sqrt(_sums(usable, weight_y**2, weight_x**2)[:, 0, 0])
        safe = np.where(good, flux, 1.0)
        # twice the weighted first moment: the fixed point of a source as wide as its weight
        move_x = np.where(good, np.clip(2.0 * sums[:, 0, 1] / safe, -0.5, 0.5), 0.0)
        move_y = np.where(good, np.clip(2.0 * sums[:, 1, 0] / safe, -0.5, 0.5), 0.0)
        x, y = np.clip(x + move_x, x0 - 0.7, x0 + 0.7), np.clip(y + move_y, y0 - 0.7, y0 + 0.7)
    return x, y


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


def _widened(psf: F64, sigma: float, box: Boxes) -> F64:
    """Stamps convolved with a Gaussian, in the boxes only, shape (n, side, side)."""
    axis = np.arange(psf.shape[-1], dtype=np.float64)
    kernel = np.exp(-0.5 * ((axis[:, None] - axis[None, :]) / sigma) ** 2) / (np.sqrt(2.0 * np.pi) * sigma)
    return _sums(psf, kernel.take(box.rows, axis=0), kernel.take(box.columns, axis=0))


def fit_with_psf(stamps: Stamps, x: F64, y: F64) -> dict[str, F64]:
    """Fit the PSF, and the PSF with a share of its light widened, to stamps of one band.

    Parameters
    ----------
    x, y : ndarray of float64, shape (n,)
        Position of the source within its stamp, 0-based pixels.

    Returns
    -------
    dict of str to ndarray of float64, shape (n,)
        The features ``psf_flux`` to ``extended_snr_2.5``; NaN where the PSF is unknown or hardly any pixel is valid.
    """
    box = Boxes(x, y, PSF_RADIUS, stamps.image.shape[-1])
    psf = stamps.psf.astype(np.float64)
    profile = box.cut(psf)
    window = box.cut(stamps.valid) & (box.r2 < PSF_RADIUS**2)
    data = np.where(window, box.cut(stamps.image), np.float32(0)).astype(np.float64)
    model = np.where(window, profile, 0.0)
    sky = (stamps.sigma.astype(np.float64) ** 2)[:, None, None]
    # a first flux, for the noise that the source itself makes
    square = _total(model**2)
    # half of the light of the PSF must be seen
    known = (_total(model) > 0.5) & (square > 0)
    flux = np.maximum(_total(model * data) / np.where(known, square, 1.0), 0.0)[:, None, None]
    bright = np.maximum(flux * model, 0.0)
    variance = sky + np.nan_to_num(stamps.shot)[:, None, None] * bright + (PSF_ERROR * bright) ** 2
    weight = window / np.maximum(variance, 1e-30)
    # weighted sums of the products of the data (d), the PSF (p) and what moves when it is widened (m)
    parts = np.stack([data, model, *(_widened(psf, width, box) - profile for width in WIDENINGS)], axis=1)
    lines = parts.reshape(*parts.shape[:2], box.side**2)
    products = (parts * weight[:, None]).reshape(lines.shape) @ lines.transpose(0, 2, 1)
    dd, pd, pp = products[:, 0, 0], products[:, 0, 1], np.where(known, products[:, 1, 1], 1.0)
    fitted, error = pd / pp, 1.0 / np.sqrt(pp)
    count = np.maximum(_total(window), 2.0) - 1.0
    chi2 = dd - fitted * pd
    result = {
        "psf_flux": np.arcsinh(fitted / FLUX_SOFTENING),
        "psf_snr": np.arcsinh(fitted / error),
        "psf_misfit": np.arcsinh((chi2 - count) / np.sqrt(2.0 * count)),
    }
    for k, width in enumerate(WIDENINGS, start=2):
        mm, pm, md = products[:, k, k], products[:, 1, k], products[:, 0, k]
        determinant = np.where(known, mm * pp - pm**2, 1.0)
        determinant = np.maximum(determinant, 1e-12 * np.maximum(mm * pp, 1e-30))
        amount = (md * pp - pm * pd) / determinant
        amount_error = np.sqrt(pp / determinant)
        total = np.maximum((pd * mm - pm * md) / determinant, 2.0 * error)
        result[f"extended_{width}"] = np.clip(amount / total, -3.0, 6.0)
        result[f"extended_snr_{width}"] = np.arcsinh(amount / amount_error)
    return {name: np.where(known, values, np.nan) for name, values in result.items()}


def _ratio_errors(measured: Measured, stamps: Stamps, expected: F64) -> F64:
    """Errors of ``flux_s - expected * flux_reference`` under sky noise alone, shape (n, `PSF_SIGMAS`).

    ``expected`` has the same shape. The squared error is the sum of squares of the combined weight over the valid
    pixels, times that of the noise.
    """
    size = stamps.valid.shape[-1]
    sigmas = (REFERENCE_SIGMA, *PSF_SIGMAS)
    weight_x, weight_y = _gauss(offsets(measured.x, size), sigmas), _gauss(offsets(measured.y, size), sigmas)
    usable = stamps.valid.astype(np.float64)
    # products of each weight with itself, and with the reference
    square = _diagonal(_sums(usable, weight_y**2, weight_x**2))
    cross = _diagonal(_sums(usable, weight_y * weight_y[:, :1], weight_x * weight_x[:, :1]))
    total = square[:, 1:] - 2.0 * expected * cross[:, 1:] + expected**2 * square[:, :1]
    return np.asarray(stamps.sigma[:, None] * np.sqrt(np.maximum(total, 1e-6)))


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
    column |= fit_with_psf(stamps, measured.x, measured.y)
    for s in RATIO_SIGMAS:
        column[f"ratio_{s}"] = measured.ratio[s]
    errors = _ratio_errors(measured, stamps, np.stack([psf[f"ratio_{s}"] for s in PSF_SIGMAS], axis=1))
    scale = np.maximum(measured.reference_flux, measured.reference_error)
    for s, error in zip(PSF_SIGMAS, errors.T, strict=True):
        expected = psf[f"ratio_{s}"]
        excess = measured.ratio[s] - expected
        column[f"excess_{s}"] = excess / expected
        column[f"significance_{s}"] = np.arcsinh(excess * scale / np.maximum(error, 1e-30))
    table = np.stack([np.asarray(column[name], dtype=np.float32) for name in FEATURES], axis=1)
    return np.where(np.isfinite(table), table, np.float32(np.nan)).astype(np.float32)
