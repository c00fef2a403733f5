"""The empirical PSF of one exposure, from the pixels of its own point sources.

The model is a linear sum of Gauss-Hermite functions (shapelets, Refregier 2003, MNRAS 338, 35) and wider Gaussians. It
is evaluated at the exact sub-pixel place of a source, so undersampled images need no resampling. It is the effective
PSF: what a pixel reads, with the response of the pixel in it. Where point sources are few, a prior keeps the model
near a round PSF of the known width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from sgclassify.stages.arrays import F32, F64, Bool, Columns
from sgclassify.stages.stamps import squared_radius

ORDER: Final = 6
"""Highest order p + q of the Gauss-Hermite functions."""

WIDE: Final = (2.0, 4.0)
"""Widths of the wide Gaussians, in units of the core's."""

TERMS: Final = tuple((p, total - p) for total in range(ORDER + 1) for p in range(total + 1))
N_BASIS: Final = len(TERMS) + len(WIDE)

FIT_RADIUS: Final = 9.0
"""Radius (pixels) within which the stars are fitted."""

CORE_RADIUS: Final = 4.0
"""Radius (pixels) within which a star is compared with the profile."""

FIT_ERRORS: Final = (0.15, 0.04, 0.02)
"""Error of a star's profile, relative to the profile, in the three rounds of the fit. The first is the error of a round
PSF; the last is what keeps the brightest star from deciding alone."""

MAX_STARS: Final = 300
MIN_STARS_VARIATION: Final = 25
"""Fewest point sources for which the PSF may vary (linearly) over the detector."""

PRIOR_WIDTH: Final = 0.15
PRIOR_VARIATION: Final = 0.08
"""Prior standard deviations of the shape and of its change from the centre to the edge of the detector, in units of
the central Gaussian's coefficient."""

PRIOR_WINGS: Final = (0.035, 0.0015)
"""Prior mean of the coefficients of the wide Gaussians in the same units: a Moffat function of beta 3 has about as
much light there."""

CLIP: Final = 1.8
"""A star is left out if its reduced chi-square exceeds this (in the later rounds: this many times the median, if
that is above 1): it is a galaxy, or has a neighbour."""


@dataclass(frozen=True)
class PsfModel:
    """PSF of one exposure.

    Attributes
    ----------
    sigma : float
        Width of the central Gaussian, pixels.
    coefficients : tuple of tuple of float, shape (1 or 3, `N_BASIS`)
        Coefficients of the basis, then their slopes along x and y from the centre to the edge of the detector.
        The PSF at the centre sums to 1 over the plane.
    shape : tuple of int
        (ny, nx) of the detector.
    n_stars : int
        Point sources fitted.
    """

    sigma: float
    coefficients: tuple[tuple[float, ...], ...]
    shape: tuple[int, int]
    n_stars: int

    def stamps(self, x: F64, y: F64, detector_x: F64, detector_y: F64, size: int) -> F32:
        """PSF at the places of sources, sampled at the pixels of their stamps.

        Parameters
        ----------
        x, y : ndarray of float64, shape (n,)
            Place of each source in its stamp, 0-based pixels.
        detector_x, detector_y : ndarray of float64, shape (n,)
            Its place on the detector, 0-based pixels.
        size : int
            Side of the stamps.

        Returns
        -------
        ndarray of float32, shape (n, size, size)
            Axis order [source, y, x]; each sums to 1 over the plane.
        """
        place = _place(detector_x, detector_y, self.shape)[:, : len(self.coefficients)]
        weights = place @ np.asarray(self.coefficients)
        weights = weights / (weights @ _integrals(self.sigma))[:, None]
        return _evaluate(weights, x, y, size, self.sigma).astype(np.float32)


def _place(x: F64, y: F64, shape: tuple[int, int]) -> F64:
    ny, nx = shape
    u, v = 2.0 * (x + 0.5) / nx - 1.0, 2.0 * (y + 0.5) / ny - 1.0
    return np.stack([np.ones_like(u), np.clip(u, -1.0, 1.0), np.clip(v, -1.0, 1.0)], axis=1)


def _hermite(offset: F64, sigma: float) -> F64:
    """Gauss-Hermite functions of orders 0 .. `ORDER`; the last axis is the order. Order 0 has unit peak."""
    t = offset / sigma
    values = [np.exp(-0.5 * t**2)]
    values.append(np.sqrt(2.0) * t * values[0])
    for n in range(1, ORDER):
        # orthonormal recurrence, stable at every order
        values.append(np.sqrt(2.0 / (n + 1)) * t * values[n] - np.sqrt(n / (n + 1)) * values[n - 1])
    return np.stack(values, axis=-1)


def _axes(x: F64, size: int, sigma: float) -> tuple[F64, list[F64]]:
    offset = np.arange(size, dtype=np.float64)[None, :] - x[:, None]
    wide = [np.exp(-0.5 * (offset / (w * sigma)) ** 2) for w in WIDE]
    return _hermite(offset, sigma), wide


def _evaluate(weights: F64, x: F64, y: F64, size: int, sigma: float) -> F64:
    """Sum of the basis with the weights (n, `N_BASIS`) of each source."""
    (hx, wide_x), (hy, wide_y) = _axes(x, size, sigma), _axes(y, size, sigma)
    matrix = np.zeros((len(x), ORDER + 1, ORDER + 1))
    for k, (p, q) in enumerate(TERMS):
        matrix[:, q, p] = weights[:, k]
    total = hy @ matrix @ hx.transpose(0, 2, 1)
    for k, (wx, wy) in enumerate(zip(wide_x, wide_y, strict=True)):
        total += weights[:, len(TERMS) + k, None, None] * wy[:, :, None] * wx[:, None, :]
    return np.asarray(total)


def _integrals(sigma: float) -> F64:
    """Sums of the basis functions over the plane."""
    # int h_n dt = sqrt(2 pi) sqrt((n-1)!!/n!!) for even n, 0 for odd n
    line = np.zeros(ORDER + 1)
    line[0] = np.sqrt(2.0 * np.pi) * sigma
    for n in range(2, ORDER + 1, 2):
        line[n] = line[n - 2] * np.sqrt((n - 1) / n)
    core = [line[p] * line[q] for p, q in TERMS]
    return np.array([*core, *(2.0 * np.pi * (w * sigma) ** 2 for w in WIDE)])


def round_psf(width: float, shape: tuple[int, int]) -> PsfModel:
    """PSF of an exposure without point sources: round, of a Gaussian width in pixels, with wings."""
    return PsfModel(float(width), (tuple(_round(width).tolist()),), shape, 0)


def _round(width: float) -> F64:
    coefficients = np.zeros(N_BASIS)
    coefficients[0] = 1.0
    coefficients[len(TERMS) :] = PRIOR_WINGS
    return np.asarray(coefficients / (coefficients @ _integrals(width)))


@dataclass(frozen=True)
class Stars(Columns):
    """Stamps of n point sources, axis order [source, y, x].

    Attributes
    ----------
    image : ndarray of float32, shape (n, size, size)
        Sky-subtracted pixels.
    valid : ndarray of bool, shape (n, size, size)
        Pixels that are data.
    sigma : ndarray of float32, shape (n,)
        Noise of a sky pixel, in the unit of `image`.
    flux : ndarray of float64, shape (n,)
        Any positive measure that is proportional to the brightness, in the unit of `image`.
    x, y : ndarray of float64, shape (n,)
        Place of each source in its stamp, 0-based pixels.
    detector_x, detector_y : ndarray of float64, shape (n,)
        Its place on the detector, 0-based pixels.
    """

    image: F32
    valid: Bool
    sigma: F32
    flux: F64
    x: F64
    y: F64
    detector_x: F64
    detector_y: F64


def fit_psf(stars: Stars, shape: tuple[int, int], width: float) -> PsfModel:
    """Fit the PSF to stamps of point sources.

    Parameters
    ----------
    stars : Stars
        At least one.
    shape : tuple of int
        (ny, nx) of the detector.
    width : float
        Gaussian width of the PSF (pixels): the scale of the basis.
    """
    stars = stars.take(np.argsort(-stars.flux / stars.sigma, kind="stable")[:MAX_STARS])
    n, sigma, flux = len(stars.flux), stars.sigma, stars.flux
    n_place = 3 if n >= MIN_STARS_VARIATION else 1
    place = _place(stars.detector_x, stars.detector_y, shape)[:, :n_place]
    mean, precision = _prior(n_place, width)
    basis, r2 = _basis(stars.x, stars.y, stars.image.shape[-1], width)
    # the unit of brightness is unknown: bring every star to the flux of the prior's profile
    profile = basis @ mean[0]
    window = stars.valid.reshape(n, -1) & (r2 < FIT_RADIUS**2)
    inner = window & (r2 < CORE_RADIUS**2)
    pixels = stars.image.reshape(n, -1).astype(np.float64)
    for error in FIT_ERRORS:
        weight = window / (sigma[:, None] ** 2 + (error * flux[:, None] * profile) ** 2)
        norm = (weight * profile**2).sum(axis=1)
        flux = np.maximum((weight * profile * pixels).sum(axis=1) / np.maximum(norm, 1e-30), 3.0 * sigma)
        variance = (sigma / flux)[:, None] ** 2 + (error * profile) ** 2
        data = pixels / flux[:, None]
        misfit = (inner * (data - profile) ** 2 / variance).sum(axis=1) / np.maximum(inner.sum(axis=1), 1)
        # what is unlike the present profile is not a star, or has a neighbour
        keep = misfit <= (CLIP if error == FIT_ERRORS[0] else CLIP * max(float(np.median(misfit)), 1.0))
        normal, right = precision.copy(), precision @ mean.ravel()
        for k in np.flatnonzero(keep):
            w = window[k] / variance[k]
            square = (basis[k] * w[:, None]).T @ basis[k]
            column = basis[k].T @ (w * data[k])
            normal += np.kron(np.outer(place[k], place[k]), square)
            right += np.kron(place[k], column)
        solution = np.linalg.solve(normal, right).reshape(n_place, N_BASIS)
        coefficients = np.asarray(solution / (solution[0] @ _integrals(width)), dtype=np.float64)
        profile = np.einsum("nkb,nb->nk", basis, place @ coefficients)
    return PsfModel(
        sigma=float(width),
        coefficients=tuple(tuple(float(v) for v in row) for row in coefficients),
        shape=shape,
        n_stars=int(keep.sum()),
    )


def _prior(n_place: int, width: float) -> tuple[F64, F64]:
    """Prior mean of the coefficients, shape (n_place, `N_BASIS`), and their inverse covariance."""
    mean = np.zeros((n_place, N_BASIS))
    mean[0] = _round(width)
    scale = np.full((n_place, N_BASIS), PRIOR_WIDTH)
    scale[0, 0] = 10.0
    scale[:, len(TERMS) :] = np.array(PRIOR_WINGS)
    scale[1:] = PRIOR_VARIATION * np.where(np.arange(N_BASIS) < len(TERMS), 1.0, PRIOR_WINGS[0])
    return mean, np.diag(1.0 / (scale * mean[0, 0]).ravel() ** 2)


def _basis(x: F64, y: F64, size: int, sigma: float) -> tuple[F64, F64]:
    """Basis functions of each star, shape (n, size * size, `N_BASIS`), and squared distances (n, size * size)."""
    (hx, wide_x), (hy, wide_y) = _axes(x, size, sigma), _axes(y, size, sigma)
    parts = [hy[:, :, None, q] * hx[:, None, :, p] for p, q in TERMS]
    parts += [wy[:, :, None] * wx[:, None, :] for wx, wy in zip(wide_x, wide_y, strict=True)]
    n = len(x)
    return np.stack([p.reshape(n, -1) for p in parts], axis=2), squared_radius(x, y, size).reshape(n, -1)
