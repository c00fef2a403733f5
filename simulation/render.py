"""Draw sources on a detector: the noiseless image of one exposure.

A profile convolved with the PSF is a product of Fourier transforms, so a stamp is one product and one inverse
transform. GalSim gives the transform of the PSF (once per node and stamp size) and that of a round Sersic profile of
unit half-light radius (once per index, tabulated). An ellipse is the round profile at a sheared wave vector.

``galsim.Convolve(...).drawImage(method="no_pixel")`` does the same, but needs GalSim objects for every source. This is
ten times faster, and equal within the accuracy asked of either (a test compares them).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Final

import galsim
import numpy as np
import numpy.typing as npt
import scipy.fft
from scipy.special import gamma, gammaincinv

from sgclassify.simulation.psf import OVERSAMPLING, PsfField, waves
from sgclassify.simulation.sky import I_BAND, SERSIC_GRID, Sources
from sgclassify.stages.arrays import F32, F64, I64, Bool
from sgclassify.stages.bands import BAND_INDEX

SIZES: Final = (16, 32, 64, 128, 256, 512)
"""Sides of the stamps, pixels."""

FAINTEST_SNR: Final = 0.2
"""A source with less than this signal-to-noise ratio in the band is not drawn."""

EDGE_LEVEL: Final = 0.1
"""A stamp ends where the profile falls below this many standard deviations of the sky noise of a pixel."""

BULGE_GRADIENT: Final = 0.25
"""Growth of logit(bulge share) from one band to the next redder one: bulges are redder than disks."""

CLUMP_GRADIENT: Final = -0.12
"""Growth of the logarithm of the clumps' share of the light from one band to the next redder one."""

CLUMPY_SNR: Final = 5.0
"""Signal-to-noise ratio above which the clumps of a galaxy are drawn."""


@dataclass(frozen=True, slots=True)
class Scene:
    """Sources on one detector in one band; one entry per source.

    Attributes
    ----------
    x, y : ndarray, float64
        0-based pixel position of the centre.
    flux : ndarray, float64
        Electrons per second.
    point : ndarray, bool
        Whether the source is a point.
    sersic_n, bulge_fraction : ndarray, float64
        Sersic index; share of the bulge in this band (NaN for a single profile).
    shape : ndarray, float64, shape (n, 2, 2)
        Matrix that turns the round profile of unit half-light radius into the source, in pixels.
    clumpiness : ndarray, float64
        Share of the light in clumps in this band.
    texture : ndarray, int64
        Seed of the clumps' places.
    """

    x: F64
    y: F64
    flux: F64
    point: Bool
    sersic_n: F64
    bulge_fraction: F64
    shape: F64
    clumpiness: F64
    texture: I64


def scene(sources: Sources, band: str, x: F64, y: F64, zero_point: float, jacobian: F64) -> Scene:
    """All sources of a field, in their order, on a detector.

    Parameters
    ----------
    sources : Sources
    band : str
    x, y : ndarray, float64, shape (n,)
        0-based pixel positions of the sources.
    zero_point : float
        AB magnitude of 1 e-/s.
    jacobian : ndarray, float64, shape (2, 2)
        Pixels (x, y) per arcsec (east, north).
    """
    k = BAND_INDEX[band]
    flux = 10 ** (-0.4 * (sources.mags[:, k] - zero_point))
    major = sources.r50 / np.sqrt(sources.axis_ratio)
    minor = sources.r50 * np.sqrt(sources.axis_ratio)
    sin, cos = np.sin(sources.position_angle), np.cos(sources.position_angle)
    on_sky = np.stack([np.stack([major * sin, minor * cos], -1), np.stack([major * cos, -minor * sin], -1)], -2)
    on_sky[sources.kind != "galaxy"] = 0.0
    share = np.clip(sources.bulge_fraction, 1e-3, 1 - 1e-3)
    odds = share / (1 - share) * np.exp(BULGE_GRADIENT * (k - I_BAND))
    # clumps are young: half as much again in NUV, half as much in y
    clumpiness = np.clip(sources.clumpiness * np.exp(CLUMP_GRADIENT * (k - I_BAND)), 0.0, 0.6)
    return Scene(
        x, y, flux, sources.kind != "galaxy", sources.sersic_n, odds / (1 + odds), jacobian @ on_sky, clumpiness,
        sources.texture,
    )  # fmt: skip


def render(sky: Scene, psf: PsfField, shape: tuple[int, int], noise: float) -> F32:
    """Draw a scene on a detector of `shape` (ny, nx), e-/s, without sky and noise.

    `noise` is the standard deviation of the noise of an empty pixel, e-/s; light far below it is not drawn.
    """
    image = np.zeros(shape, dtype=np.float32)
    half = _half_sizes(sky, noise)
    # Noise of an aperture of 16 pixels, about the area of the PSF.
    bright = sky.flux > FAINTEST_SNR * 4.0 * noise
    near = (np.abs(sky.x - (shape[1] - 1) / 2) < shape[1] / 2 + half) & (
        np.abs(sky.y - (shape[0] - 1) / 2) < shape[0] / 2 + half
    )
    sizes = np.array(SIZES)[np.minimum(np.searchsorted(SIZES, 2 * half), len(SIZES) - 1)]
    nodes = psf.node_at(sky.x, sky.y)
    for index in np.flatnonzero(bright & near & np.isfinite(sky.flux)):
        size = int(sizes[index])
        x0, y0 = int(np.floor(sky.x[index])) - size // 2, int(np.floor(sky.y[index])) - size // 2
        stamp = draw_stamp(sky, int(index), psf.fourier(int(nodes[index]), size), size, noise)
        ya, yb, xa, xb = max(y0, 0), min(y0 + size, shape[0]), max(x0, 0), min(x0 + size, shape[1])
        if ya < yb and xa < xb:
            image[ya:yb, xa:xb] += stamp[ya - y0 : yb - y0, xa - x0 : xb - x0]
    return image


def draw_stamp(sky: Scene, index: int, transform: npt.NDArray[np.complex64], size: int, noise: float) -> F32:
    """Draw one source.

    Parameters
    ----------
    sky : Scene
    index : int
        Number of the source in the scene.
    transform : ndarray, complex64
        Of the PSF, as `PsfField.fourier` gives it for this size.
    size : int
        Side of the stamp, pixels; its pixel [0, 0] is ``floor(position) - size // 2`` of the detector.
    noise : float
        As for `render`.

    Returns
    -------
    ndarray, float32, shape (size, size)
        Electrons per second.
    """
    x0, y0 = int(np.floor(sky.x[index])) - size // 2, int(np.floor(sky.y[index])) - size // 2
    point = transform * _phase(size, sky.x[index] - x0, sky.y[index] - y0)
    product = point.copy()
    if not sky.point[index]:
        product *= _galaxy_transform(size, sky.shape[index], sky.sersic_n[index], sky.bulge_fraction[index])
        # clumps show only in galaxies that are well detected; elsewhere they would cost time for nothing
        if sky.clumpiness[index] > 0 and sky.flux[index] > CLUMPY_SNR * 4.0 * noise:
            share = np.float32(sky.clumpiness[index])
            clumps = _clump_transform(size, sky.shape[index], int(sky.texture[index]))
            product *= 1 - share
            product += share * clumps * point
    side = OVERSAMPLING * size
    fine = scipy.fft.irfft2(product, (side, side), overwrite_x=True)
    return np.asarray(fine[::OVERSAMPLING, ::OVERSAMPLING] * np.float32(sky.flux[index] * OVERSAMPLING**2))


def _half_sizes(sky: Scene, noise: float) -> F64:
    threshold = EDGE_LEVEL * noise
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        # The wings of a diffraction-limited PSF fall with the third power of the radius, from 0.04 at 2.2 pixels.
        wings = 2.2 * np.cbrt(0.04 * sky.flux / threshold)
        n = np.where(np.isnan(sky.bulge_fraction), sky.sersic_n, 1.0 + 2.0 * sky.bulge_fraction)
        b = gammaincinv(2 * n, 0.5)
        area = np.abs(np.linalg.det(sky.shape))
        effective = sky.flux / (2 * np.pi * n * b ** (-2 * n) * gamma(2 * n) * np.exp(b) * area)
        reach = np.clip(np.log(effective / threshold) / b + 1, 0.0, None) ** n
        major = np.linalg.norm(sky.shape, ord=2, axis=(1, 2))
        galaxy = np.minimum(reach, 12.0) * major
    extended = np.where(sky.point, 0.0, np.nan_to_num(galaxy))
    return np.asarray(np.clip(np.maximum(wings, 4.0) + extended, 8.0, SIZES[-1] / 2))


def _phase(size: int, x: float, y: float) -> npt.NDArray[np.complex64]:
    rows, columns = waves(size)
    return np.asarray(np.exp(-1j * np.float32(y) * rows) * np.exp(-1j * np.float32(x) * columns))


def _galaxy_transform(size: int, shape: F64, sersic_n: float, bulge: float) -> F32:
    rows, columns = waves(size)
    (a, b), (c, d) = shape.astype(np.float32)
    # |shape^T k|^2 for k = (columns, rows).
    square = (a * columns + c * rows) ** 2 + (b * columns + d * rows) ** 2
    if np.isnan(bulge):
        return _sersic_transform(square, int(np.argmin(np.abs(SERSIC_GRID - sersic_n))))
    # bulges are rounder than disks: half way to a circle of the same area
    inner = np.float32(BULGE_SIZE**2)
    around = np.float32(abs(a * d - b * c)) * (rows**2 + columns**2)
    outer = np.float32(DISK_SIZE**2)
    share = np.float32(bulge)
    return share * _sersic_transform(0.5 * (square + around) * inner, _DE_VAUCOULEURS) + (
        1 - share
    ) * _sersic_transform(square * outer, _EXPONENTIAL)


def clumps(texture: int) -> tuple[F64, F64, F64]:
    """Places, sizes and shares of the clumps of a galaxy, drawn from the seed `texture`.

    Returns
    -------
    places : ndarray, float64, shape (m, 2)
        In the frame of the round profile of unit half-light radius: an exponential disk, a little off centre.
    sizes : ndarray, float64, shape (m,)
        Gaussian widths in the same unit.
    shares : ndarray, float64, shape (m,)
        They sum to 1.
    """
    rng = np.random.default_rng(texture)
    m = int(rng.integers(2, 16))
    # an exponential disk of unit half-light radius has a scale length of 1 / 1.678
    radius = np.minimum(rng.gamma(2.0, 1 / 1.678, m), 3.0)
    angle = rng.uniform(0, 2 * np.pi, m)
    offset = rng.normal(0.0, 0.1, 2)
    places = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1) + offset
    return places, rng.uniform(0.05, 0.25, m), rng.dirichlet(np.ones(m))


def _clump_transform(size: int, shape: F64, texture: int) -> npt.NDArray[np.complex64]:
    rows, columns = waves(size)
    places, widths, shares = clumps(texture)
    x, y = (shape @ places.T).astype(np.float32)
    # clumps are round on the sky; the exponentials of rows and columns are separate, so their sum is a product
    width = (widths * np.sqrt(abs(np.linalg.det(shape)))).astype(np.float32)
    along = np.exp(-1j * rows * y[None, :] - 0.5 * (rows * width[None, :]) ** 2) * shares.astype(np.float32)
    across = np.exp(-1j * columns.T * x[None, :] - 0.5 * (columns.T * width[None, :]) ** 2)
    return np.asarray(along.astype(np.complex64) @ across.astype(np.complex64).T)


BULGE_SIZE: Final = 0.6
DISK_SIZE: Final = 1.15
"""Half-light radii of bulge and disk in units of the whole galaxy's; close enough for every bulge share."""

_EXPONENTIAL: Final = int(np.flatnonzero(SERSIC_GRID == 1.0)[0])
_DE_VAUCOULEURS: Final = int(np.flatnonzero(SERSIC_GRID == 4.0)[0])

# The table is even in log(1 + k^2): fine where the transform bends, and looked up without a search.
_TABLE_SIZE: Final = 4096
_TABLE_TOP: Final = 14.0


@functools.lru_cache(maxsize=len(SERSIC_GRID))
def _sersic_table(index: int) -> F32:
    profile = galsim.Sersic(n=float(SERSIC_GRID[index]), half_light_radius=1.0)
    k = np.sqrt(np.expm1(np.linspace(0.0, _TABLE_TOP, _TABLE_SIZE)))
    coarse = np.concatenate([np.linspace(0.0, 1.0, 40)[:-1], np.geomspace(1.0, k[-1], 300)])
    values = [profile.kValue(float(one), 0.0).real for one in coarse]
    return np.asarray(np.interp(k, coarse, values), dtype=np.float32)


def _sersic_transform(square: F32, index: int) -> F32:
    table = _sersic_table(index)
    place = np.log1p(square)
    place *= np.float32((_TABLE_SIZE - 1) / _TABLE_TOP)
    return table[np.minimum(place + np.float32(0.5), _TABLE_SIZE - 1).astype(np.int32)]
