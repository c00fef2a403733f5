"""The empirical PSF of one exposure, from the pixels of its own point sources.

The model is a linear sum of Gauss-Hermite functions (shapelets, Refregier 2003, MNRAS 338, 35) and wider Gaussians. It
is evaluated at the exact sub-pixel place of a source, so undersampled images need no resampling. It is the effective
PSF: what a pixel reads, with the response of the pixel in it. Where point sources are few, a prior keeps the model
near a round PSF of the known width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import numpy as np

from sgclassify.stages.arrays import F32, F64, Bool, Columns
from sgclassify.stages.stamps import Boxes

ORDER: Final = 6
"""Highest order p + q of the Gauss-Hermite functions."""

WIDE: Final = (2.0, 4.0)
"""Widths of the wide Gaussians, in units of the core's."""

TERMS: Final = tuple((p, total - p) for total in range(ORDER + 1) for p in range(total + 1))
N_BASIS: Final = len(TERMS) + len(WIDE)

# Each function of the basis is a product of one of these of x and one of y: the Gauss-Hermite functions, then the wide
# Gaussians.
_N_LINES: Final = ORDER + 1 + len(WIDE)
_TERM_X, _TERM_Y = np.array([*TERMS, *((ORDER + 1 + k,) * 2 for k in range(len(WIDE)))]).T
# Pairs of these, and the number of the pair that two of them make.
_PAIR_A, _PAIR_B = np.triu_indices(_N_LINES)
_PAIR = np.zeros((_N_LINES, _N_LINES), dtype=np.int64)
_PAIR[_PAIR_A, _PAIR_B] = _PAIR[_PAIR_B, _PAIR_A] = np.arange(_PAIR_A.size)
# Elements of a symmetric matrix over the basis, and where each element of the whole matrix is among them.
_UPPER = np.triu_indices(N_BASIS)
_SYMMETRIC = np.zeros((N_BASIS, N_BASIS), dtype=np.int64)
_SYMMETRIC[_UPPER] = _SYMMETRIC[_UPPER[::-1]] = np.arange(_UPPER[0].size)

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
        # not by BLAS: the sums of one source must not depend on how many others there are
        weights = (place[:, :, None] * np.asarray(self.coefficients)).sum(axis=1)
        weights /= (weights * _integrals(self.sigma)).sum(axis=1, keepdims=True)
        return _profiles(weights, _lines(x, size, self.sigma), _lines(y, size, self.sigma)).astype(np.float32)


def _place(x: F64, y: F64, shape: tuple[int, int]) -> F64:
    ny, nx = shape
    u, v = 2.0 * (x + 0.5) / nx - 1.0, 2.0 * (y + 0.5) / ny - 1.0
    return np.stack([np.ones_like(u), np.clip(u, -1.0, 1.0), np.clip(v, -1.0, 1.0)], axis=1)


def _lines(x: F64, size: int, sigma: float) -> F64:
    """The functions of one coordinate that make up the basis, at the pixels of stamps: shape (n, size, `_N_LINES`).

    Gauss-Hermite functions of orders 0 .. `ORDER`, order 0 of unit peak; then the wide Gaussians.
    """
    t = (np.arange(size, dtype=np.float64)[None, :] - x[:, None]) / sigma
    lines = np.empty((len(x), _N_LINES, size))
    lines[:, 0] = np.exp(-0.5 * t**2)
    lines[:, 1] = np.sqrt(2.0) * t * lines[:, 0]
    for n in range(1, ORDER):
        # orthonormal recurrence, stable at every order
        lines[:, n + 1] = np.sqrt(2.0 / (n + 1)) * t * lines[:, n] - np.sqrt(n / (n + 1)) * lines[:, n - 1]
    for k, width in enumerate(WIDE):
        lines[:, ORDER + 1 + k] = np.exp(-0.5 * (t / width) ** 2)
    return lines.transpose(0, 2, 1)


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
    sigma, flux = stars.sigma[:, None, None], stars.flux[:, None, None]
    n_place = 3 if len(stars.flux) >= MIN_STARS_VARIATION else 1
    place = _place(stars.detector_x, stars.detector_y, shape)[:, :n_place]
    mean, precision = _prior(n_place, width)
    # what is as far as the radius does not count
    box = Boxes(stars.x, stars.y, math.nextafter(FIT_RADIUS, 0.0), stars.image.shape[-1])
    window = box.cut(stars.valid)
    pixels = np.where(window, box.cut(stars.image), 0.0).astype(np.float64)
    x, y = stars.x - box.columns[:, 0], stars.y - box.rows[:, 0]
    lines_x, lines_y = (np.ascontiguousarray(_lines(c, pixels.shape[-1], width)) for c in (x, y))
    pairs_x, pairs_y = (lines[:, :, _PAIR_A] * lines[:, :, _PAIR_B] for lines in (lines_x, lines_y))
    # the unit of brightness is unknown: bring every star to the flux of the prior's profile
    profile = _profiles(np.broadcast_to(mean[0], (len(place), N_BASIS)), lines_x, lines_y)
    window &= box.r2 < FIT_RADIUS**2
    inner = window & (box.r2 < CORE_RADIUS**2)
    n_inner = np.maximum(inner.sum(axis=(1, 2)), 1)
    for error in FIT_ERRORS:
        weight = window / (sigma**2 + (error * flux * profile) ** 2)
        weight *= profile
        norm = (weight * profile).sum(axis=(1, 2), keepdims=True)
        light = (weight * pixels).sum(axis=(1, 2), keepdims=True)
        flux = np.maximum(light / np.maximum(norm, 1e-30), 3.0 * sigma)
        weight = window / ((sigma / flux) ** 2 + (error * profile) ** 2)
        data = pixels / flux
        misfit = (inner * weight * (data - profile) ** 2).sum(axis=(1, 2)) / n_inner
        # what is unlike the present profile is not a star, or has a neighbour
        keep = misfit <= (CLIP if error == FIT_ERRORS[0] else CLIP * max(float(np.median(misfit)), 1.0))
        weight, right = weight[keep], precision @ mean.ravel()
        square = _squares(weight, pairs_x[keep], pairs_y[keep])
        column = (lines_y[keep].transpose(0, 2, 1) @ (weight * data[keep]) @ lines_x[keep])[:, _TERM_Y, _TERM_X]
        # einsum, not BLAS: the sum over the stars must not depend on the number of threads
        right += np.einsum("ki,kb->ib", place[keep], column).ravel()
        normal = np.einsum("ki,kj,kb->ijb", place[keep], place[keep], square)[:, :, _SYMMETRIC]
        normal = normal.transpose(0, 2, 1, 3).reshape(precision.shape) + precision
        solution = np.linalg.solve(normal, right).reshape(n_place, N_BASIS)
        coefficients = np.asarray(solution / (solution[0] @ _integrals(width)), dtype=np.float64)
        profile = _profiles(place @ coefficients, lines_x, lines_y)
    return PsfModel(
        sigma=float(width),
        coefficients=tuple(tuple(float(v) for v in row) for row in coefficients),
        shape=shape,
        n_stars=int(keep.sum()),
    )


def _profiles(weights: F64, lines_x: F64, lines_y: F64) -> F64:
    """Sum of the basis with the weights (n, `N_BASIS`) of each star."""
    matrix = np.zeros((len(weights), _N_LINES, _N_LINES))
    matrix[:, _TERM_Y, _TERM_X] = weights
    return np.asarray(lines_y @ matrix @ lines_x.transpose(0, 2, 1))


def _squares(weight: F64, pairs_x: F64, pairs_y: F64) -> F64:
    """Weighted sums, over each star's pixels, of the products of two basis functions; last axis as `_UPPER`.

    A product of two functions of the basis is one of x times one of y, so the sums along x come first. There are only
    45 different products of each, and no more than 465 sums are needed.
    """
    sums = pairs_y.transpose(0, 2, 1) @ (weight @ pairs_x)
    i, j = _UPPER
    return np.asarray(sums[:, _PAIR[_TERM_Y[i], _TERM_Y[j]], _PAIR[_TERM_X[i], _TERM_X[j]]])


def _prior(n_place: int, width: float) -> tuple[F64, F64]:
    """Prior mean of the coefficients, shape (n_place, `N_BASIS`), and their inverse covariance."""
    mean = np.zeros((n_place, N_BASIS))
    mean[0] = _round(width)
    scale = np.full((n_place, N_BASIS), PRIOR_WIDTH)
    scale[0, 0] = 10.0
    scale[:, len(TERMS) :] = np.array(PRIOR_WINGS)
    scale[1:] = PRIOR_VARIATION * np.where(np.arange(N_BASIS) < len(TERMS), 1.0, PRIOR_WINGS[0])
    return mean, np.diag(1.0 / (scale * mean[0, 0]).ravel() ** 2)
