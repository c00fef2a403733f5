"""The features of one object in one band, measured on one stamp at a time."""

from __future__ import annotations

from dataclasses import dataclass
from math import asinh, log, log1p, log10, nan, sqrt

import numpy as np

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
from sgclassify.stages.measure import PSF_ERROR, PSF_RADIUS


@dataclass
class Source:
    """One source on one exposure: its stamp, [y, x], and what was measured on it. `x`, `y`: its place in the stamp."""

    image: F64
    valid: Bool
    saturated: Bool
    sigma: float
    x: float
    y: float
    flux: float = nan
    error: float = nan
    total: float = nan
    annulus: float = nan
    size: float = nan
    size_wide: float = nan
    ellipticity: float = nan
    peak: float = nan
    valid_core: float = nan
    saturated_core: float = nan

    def __post_init__(self) -> None:
        self.ratios: dict[float, float] = {}


@dataclass(frozen=True)
class Surroundings:
    """What the features need of the exposure that a stamp comes from."""

    locus: dict[str, float]
    n_stars: int
    fwhm: float
    shot: float
    detected: bool


def grid(source: Source) -> tuple[F64, F64, F64]:
    """Offsets of the pixels from the source along x and y, and squared distances."""
    rows, columns = np.mgrid[: source.image.shape[0], : source.image.shape[1]]
    dx, dy = columns - source.x, rows - source.y
    return dx, dy, dx**2 + dy**2


def gauss(r2: F64, sigma: float) -> F64:
    """Round Gaussian of unit peak."""
    return np.asarray(np.exp(-0.5 * r2 / sigma**2))


def recentre(source: Source) -> None:
    """Move the place of a bright source to its centroid, by up to 0.7 px."""
    x0, y0 = source.x, source.y
    for _ in range(3):
        dx, dy, r2 = grid(source)
        weight = gauss(r2, 1.5)
        flux = float((weight * source.image).sum())
        if not flux > 8.0 * source.sigma * sqrt((weight**2 * source.valid).sum()):
            return
        move_x = 2.0 * float((weight * source.image * dx).sum()) / flux
        move_y = 2.0 * float((weight * source.image * dy).sum()) / flux
        source.x = float(np.clip(source.x + np.clip(move_x, -0.5, 0.5), x0 - 0.7, x0 + 0.7))
        source.y = float(np.clip(source.y + np.clip(move_y, -0.5, 0.5), y0 - 0.7, y0 + 0.7))


def moments(source: Source, sigma: float) -> tuple[float, float]:
    """Trace of the weighted second moments, and ellipticity."""
    dx, dy, r2 = grid(source)
    weighted = gauss(r2, sigma) * source.image
    total = max(float(weighted.sum()), 2.0 * source.sigma * sigma)
    xx, yy = float((weighted * dx**2).sum()) / total, float((weighted * dy**2).sum()) / total
    xy = float((weighted * dx * dy).sum()) / total
    trace = float(np.clip(xx + yy, 0.05, 4.0 * sigma**2))
    return trace, float(np.clip(np.hypot(xx - yy, 2.0 * xy) / trace, 0.0, 1.5))


def measure(source: Source, core_radius: float) -> None:
    """Fill in all that is measured on the stamp alone."""
    source.image = np.where(source.valid, source.image, 0.0).astype(np.float64)
    source.sigma = max(source.sigma, 1e-30)
    recentre(source)
    _, _, r2 = grid(source)
    radius = np.sqrt(r2)
    reference = gauss(r2, REFERENCE_SIGMA)
    source.flux = float((reference * source.image).sum())
    source.error = source.sigma * sqrt(max(float((reference**2 * source.valid).sum()), 1e-6))
    floor = max(source.flux, source.error)
    for s in RATIO_SIGMAS:
        source.ratios[s] = float(np.clip((gauss(r2, s) * source.image).sum() / floor, -5.0, 40.0))
    source.size, source.ellipticity = moments(source, MOMENT_SIGMA)
    source.size_wide, _ = moments(source, WIDE_MOMENT_SIGMA)
    source.total = float((np.clip(TOTAL_RADIUS + 0.5 - radius, 0.0, 1.0) * source.image).sum())
    source.annulus = float(source.image[(radius >= ANNULUS[0]) & (radius < ANNULUS[1])].sum())
    near = source.image[radius <= 2.5]
    source.peak = float(np.clip(near.max() / floor, -2.0, 2.0)) if near.size else 0.0
    core = radius <= core_radius
    source.valid_core = float((core & source.valid).sum()) / max(float(core.sum()), 1.0)
    source.saturated_core = float((core & source.saturated).sum()) / max(float(core.sum()), 1.0)


def widened(psf: F64, sigma: float) -> F64:
    """A stamp convolved with a Gaussian."""
    axis = np.arange(len(psf))
    kernel = np.exp(-0.5 * ((axis[:, None] - axis[None, :]) / sigma) ** 2) / (sqrt(2.0 * np.pi) * sigma)
    return np.asarray(kernel @ psf @ kernel)


def fit(source: Source, psf: F64, shot: float) -> dict[str, float]:
    """Fit the PSF, and the PSF with a share of its light widened."""
    _, _, r2 = grid(source)
    window = source.valid & (r2 < PSF_RADIUS**2)
    square = float((window * psf**2).sum())
    if not ((window * psf).sum() > 0.5 and square > 0):
        return {}
    flux = max(float((window * psf * source.image).sum()) / square, 0.0)
    bright = np.maximum(flux * psf, 0.0)
    variance = source.sigma**2 + np.nan_to_num(shot) * bright + (PSF_ERROR * bright) ** 2
    weight = window / np.maximum(variance, 1e-30)
    pp = float((weight * psf**2).sum())
    pd = float((weight * psf * source.image).sum())
    fitted, error = pd / pp, 1.0 / sqrt(pp)
    count = max(float(window.sum()), 2.0) - 1.0
    chi2 = float((weight * (source.image - fitted * psf) ** 2).sum())
    found = {
        "psf_flux": asinh(fitted / FLUX_SOFTENING),
        "psf_snr": asinh(fitted / error),
        "psf_misfit": asinh((chi2 - count) / sqrt(2.0 * count)),
    }
    for width in WIDENINGS:
        moved = widened(psf, width) - psf
        mm, pm = float((weight * moved**2).sum()), float((weight * psf * moved).sum())
        md = float((weight * moved * source.image).sum())
        determinant = max(mm * pp - pm**2, 1e-12 * max(mm * pp, 1e-30))
        amount = (md * pp - pm * pd) / determinant
        total = max((pd * mm - pm * md) / determinant, 2.0 * error)
        found[f"extended_{width}"] = float(np.clip(amount / total, -3.0, 6.0))
        found[f"extended_snr_{width}"] = asinh(amount / sqrt(pp / determinant))
    return found


def features(source: Source, psf: F64, around: Surroundings) -> F32:
    """All features of the band, in the order of `FEATURES`; NaN where one has no value."""
    locus = around.locus
    value = {
        "detected": float(around.detected),
        "snr": asinh(source.flux / source.error),
        "flux": asinh(source.total / FLUX_SOFTENING),
        "depth": 22.5 - 2.5 * log10(5.0 * source.error) - 25.0,
        "size": source.size,
        "size_wide": source.size_wide,
        "ellipticity": source.ellipticity,
        "peak": source.peak,
        "excess_size": log(source.size / locus["size"]),
        "psf_size": locus["size"],
        "psf_ratio_2.7": locus["ratio_2.7"],
        "psf_stars": log1p(around.n_stars),
        "header_fwhm": around.fwhm,
        "annulus": float(
            np.clip(source.annulus / max(abs(source.total), 3.0 * TOTAL_RADIUS * source.sigma), -5.0, 5.0)
        ),
        "valid_core": source.valid_core,
        "valid_stamp": float(source.valid.mean()),
        "saturated_core": source.saturated_core,
    }
    value |= {f"ratio_{s}": source.ratios[s] for s in RATIO_SIGMAS}
    value |= fit(source, psf, around.shot)
    _, _, r2 = grid(source)
    for s in PSF_SIGMAS:
        expected = locus[f"ratio_{s}"]
        difference = gauss(r2, s) - expected * gauss(r2, REFERENCE_SIGMA)
        error = source.sigma * sqrt(max(float((difference**2 * source.valid).sum()), 1e-6))
        excess = source.ratios[s] - expected
        value[f"excess_{s}"] = excess / expected
        value[f"significance_{s}"] = asinh(excess * max(source.flux, source.error) / max(error, 1e-30))
    row = np.array([value.get(name, nan) for name in FEATURES], dtype=np.float32)
    return np.where(np.isfinite(row), row, np.float32(nan)).astype(np.float32)
