"""The point sources of an exposure and its PSF: a linear sum of basis functions, fitted star by star."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from math import sqrt

import numpy as np

from performance.naive.measure import Source, grid, measure
from sgclassify.stages.arrays import F64
from sgclassify.stages.features import PSF_SIGMAS, RATIO_SIGMAS
from sgclassify.stages.locus import GAUSSIAN_FWHM, MIN_SNR, gaussian_width, point_source_members
from sgclassify.stages.measure import Measured
from sgclassify.stages.psf import (
    CLIP,
    CORE_RADIUS,
    FIT_ERRORS,
    FIT_RADIUS,
    MAX_STARS,
    MIN_STARS_VARIATION,
    ORDER,
    PRIOR_VARIATION,
    PRIOR_WIDTH,
    PRIOR_WINGS,
    TERMS,
    WIDE,
)

N_BASIS = len(TERMS) + len(WIDE)


@dataclass(frozen=True)
class Psf:
    """PSF of an exposure, and the locus of its point sources; `coefficients`: at the centre, slopes along x and y."""

    width: float
    coefficients: F64
    shape: tuple[int, int]
    locus: dict[str, float]
    n_stars: int

    def stamp(self, x: float, y: float, column: float, row: float, size: int) -> F64:
        """The PSF of a source at `x`, `y` of a stamp and at `column`, `row` of the detector; sums to 1."""
        weights = place(column, row, self.shape)[: len(self.coefficients)] @ self.coefficients
        weights = weights / (weights @ integrals(self.width))
        image = np.zeros((size, size))
        for weight, function in zip(weights, basis(x, y, size, self.width), strict=True):
            image += weight * function
        return image


def place(column: float, row: float, shape: tuple[int, int]) -> F64:
    """1, and the place on the detector from -1 to 1 along x and y."""
    u, v = 2.0 * (column + 0.5) / shape[1] - 1.0, 2.0 * (row + 0.5) / shape[0] - 1.0
    return np.array([1.0, np.clip(u, -1.0, 1.0), np.clip(v, -1.0, 1.0)])


def hermite(offset: F64, width: float) -> list[F64]:
    """Gauss-Hermite functions of orders 0 to `ORDER`."""
    t = offset / width
    values = [np.exp(-0.5 * t**2)]
    values.append(sqrt(2.0) * t * values[0])
    for n in range(1, ORDER):
        values.append(sqrt(2.0 / (n + 1)) * t * values[n] - sqrt(n / (n + 1)) * values[n - 1])
    return values


def basis(x: float, y: float, size: int, width: float) -> list[F64]:
    """The basis functions on the pixels of a stamp."""
    axis = np.arange(size, dtype=np.float64)
    along_x, along_y = hermite(axis - x, width), hermite(axis - y, width)
    functions = [np.outer(along_y[q], along_x[p]) for p, q in TERMS]
    for wide in WIDE:
        wx = np.exp(-0.5 * ((axis - x) / (wide * width)) ** 2)
        wy = np.exp(-0.5 * ((axis - y) / (wide * width)) ** 2)
        functions.append(np.outer(wy, wx))
    return functions


def integrals(width: float) -> F64:
    """Sums of the basis functions over the plane."""
    line = np.zeros(ORDER + 1)
    line[0] = sqrt(2.0 * np.pi) * width
    for n in range(2, ORDER + 1, 2):
        line[n] = line[n - 2] * sqrt((n - 1) / n)
    return np.array([line[p] * line[q] for p, q in TERMS] + [2.0 * np.pi * (w * width) ** 2 for w in WIDE])


def round_profile(width: float) -> F64:
    """Coefficients of a round PSF."""
    coefficients = np.zeros(N_BASIS)
    coefficients[0] = 1.0
    coefficients[len(TERMS) :] = PRIOR_WINGS
    return np.asarray(coefficients / (coefficients @ integrals(width)))


def as_measured(sources: list[Source]) -> Measured:
    """What the choice of the point sources takes."""
    column = {
        "x": "x", "y": "y", "reference_flux": "flux", "reference_error": "error", "total_flux": "total",
        "size": "size", "size_wide": "size_wide", "ellipticity": "ellipticity", "peak": "peak",
        "annulus_flux": "annulus", "valid_core": "valid_core", "saturated_core": "saturated_core",
    }  # fmt: skip
    values = {name: np.array([getattr(source, own) for source in sources]) for name, own in column.items()}
    return Measured(
        **values,
        snr=np.array([source.flux / source.error for source in sources]),
        ratios=np.array([[source.ratios[s] for s in RATIO_SIGMAS] for source in sources]),
        valid_stamp=np.array([source.valid.mean() for source in sources]),
    )


def point_source_psf(
    sources: list[Source], corners: list[tuple[int, int]], fwhm: float, shape: tuple[int, int], core_radius: float
) -> Psf:
    """PSF of an exposure from its measured detections; ``corners``: first column and row of their stamps."""
    bright = [k for k, source in enumerate(sources) if source.flux / source.error >= MIN_SNR]
    members = []
    if bright:
        found = as_measured([sources[k] for k in bright])
        members = [bright[k] for k in point_source_members(found, fwhm)]
    if not members:
        return expected_psf(fwhm, shape, core_radius)
    stars = [sources[k] for k in members]
    locus = {f"ratio_{s}": float(np.median([star.ratios[s] for star in stars])) for s in PSF_SIGMAS}
    locus["size"] = float(np.median([star.size for star in stars]))
    width = gaussian_width(locus["size"])
    coefficients = fit_stars(stars, [corners[k] for k in members], width, shape)
    return Psf(width, coefficients, shape, locus, len(members))


def expected_psf(fwhm: float, shape: tuple[int, int], core_radius: float) -> Psf:
    """PSF of an exposure that shows no point source: round, as wide as its header says."""
    width = fwhm / GAUSSIAN_FWHM
    psf = Psf(width, round_profile(width)[None, :], shape, {}, 0)
    size = 32
    stamp = psf.stamp(size / 2, size / 2, 0.0, 0.0, size)
    source = Source(stamp, np.ones(stamp.shape, bool), np.zeros(stamp.shape, bool), 1e-6, size / 2, size / 2)
    measure(source, core_radius)
    locus = {f"ratio_{s}": source.ratios[s] for s in PSF_SIGMAS} | {"size": source.size}
    return dataclasses.replace(psf, locus=locus)


def fit_stars(stars: list[Source], corners: list[tuple[int, int]], width: float, shape: tuple[int, int]) -> F64:
    """Coefficients of the PSF, in three rounds over all stars."""
    brightest = sorted(range(len(stars)), key=lambda k: -stars[k].flux / stars[k].sigma)[:MAX_STARS]
    stars, corners = [stars[k] for k in brightest], [corners[k] for k in brightest]
    n_place = 3 if len(stars) >= MIN_STARS_VARIATION else 1
    places = [place(c + s.x, r + s.y, shape)[:n_place] for s, (c, r) in zip(stars, corners, strict=True)]
    matrices = [np.stack([f.ravel() for f in basis(s.x, s.y, len(s.image), width)], axis=1) for s in stars]
    distances = [grid(s)[2].ravel() for s in stars]
    mean = np.zeros((n_place, N_BASIS))
    mean[0] = round_profile(width)
    scale = np.full((n_place, N_BASIS), PRIOR_WIDTH)
    scale[0, 0] = 10.0
    scale[:, len(TERMS) :] = PRIOR_WINGS
    scale[1:] = PRIOR_VARIATION * np.where(np.arange(N_BASIS) < len(TERMS), 1.0, PRIOR_WINGS[0])
    precision = np.diag(1.0 / (scale * mean[0, 0]).ravel() ** 2)
    coefficients, fluxes = mean, [star.flux for star in stars]
    for number, error in enumerate(FIT_ERRORS):
        rows = []
        for k, star in enumerate(stars):
            profile = matrices[k] @ (places[k] @ coefficients)
            window = star.valid.ravel() & (distances[k] < FIT_RADIUS**2)
            weight = window / (star.sigma**2 + (error * fluxes[k] * profile) ** 2)
            norm = max(float((weight * profile**2).sum()), 1e-30)
            fluxes[k] = max(float((weight * profile * star.image.ravel()).sum()) / norm, 3.0 * star.sigma)
            variance = (star.sigma / fluxes[k]) ** 2 + (error * profile) ** 2
            data = star.image.ravel() / fluxes[k]
            inner = window & (distances[k] < CORE_RADIUS**2)
            misfit = float((inner * (data - profile) ** 2 / variance).sum()) / max(int(inner.sum()), 1)
            rows.append((misfit, window / variance, data))
        limit = CLIP if number == 0 else CLIP * max(float(np.median([row[0] for row in rows])), 1.0)
        normal, right = precision.copy(), precision @ mean.ravel()
        for k, (misfit, weight, data) in enumerate(rows):
            if misfit <= limit:
                normal += np.kron(np.outer(places[k], places[k]), (matrices[k] * weight[:, None]).T @ matrices[k])
                right += np.kron(places[k], matrices[k].T @ (weight * data))
        solution = np.linalg.solve(normal, right).reshape(n_place, N_BASIS)
        coefficients = solution / (solution[0] @ integrals(width))
    return np.asarray(coefficients)
