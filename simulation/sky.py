"""The simulated sky: galaxies, stars, quasars and close binaries of one field, with their truth.

Counts, sizes, shapes and the stellar locus are constants of this module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from scipy.spatial import cKDTree

from sgclassify.simulation.config import COMPACT_SHARE
from sgclassify.simulation.filters import EXTINCTION
from sgclassify.simulation.galaxy_pool import N_QUASARS, galaxy_pool, quasar_pool
from sgclassify.stages.arrays import F64, I64, Bool
from sgclassify.stages.bands import BAND_INDEX, BANDS
from sgclassify.stages.healpix import chord, unit_vectors

I_BAND: Final = BAND_INDEX["i"]

GALAXY_COUNTS: Final = (46.0, 0.31, 25.0)
"""N(<i) per arcmin^2 = a * 10**(b * (i - c)), (a, b, c)."""

GALAXY_BRIGHTEST_I: Final = 17.0
"""Brightest galaxy drawn, AB mag in i."""

SIZE_RELATION: Final = (-0.53, -0.125, 23.0, 0.18)
"""log10 of the half-light radius in arcsec = a + b * (i - c), with scatter d in dex, (a, b, c, d)."""

SERSIC_QUANTILES: Final = ((0.0, 0.16, 0.5, 0.84, 1.0), (0.4, 0.73, 1.42, 4.4, 5.8))
SERSIC_GRID: Final = np.array([0.4, 0.5, 0.65, 0.8, 1.0, 1.25, 1.5, 1.8, 2.2, 2.7, 3.3, 4.0, 4.8, 5.8])
"""Sersic indices to draw; the renderer tabulates one profile for each."""

CLUMPINESS: Final = (-2.0, -0.35)
"""Decimal logarithm of the share of a galaxy's i light that is in star-forming clumps: from 1 to 45 %, as in the clumpy
galaxies of HST's deep fields (Guo et al. 2015, ApJ 800, 39)."""

SMALLEST_CLUMPY: Final = 0.1
"""Half-light radius (arcsec) below which clumps are not drawn: the camera would not resolve them."""

AXIS_RATIO_QUANTILES: Final = ((0.0, 0.05, 0.5, 0.95, 1.0), (0.15, 0.25, 0.56, 0.90, 1.0))

STAR_COUNT_I: Final = np.array([14.0, 16.0, 18.0, 20.0, 21.0, 22.0, 23.0, 24.0, 25.0, 26.0, 27.0])
STAR_COUNT_N: Final = np.array([120.0, 330.0, 810.0, 2080.0, 3150.0, 4610.0, 6530.0, 9010.0, 12200.0, 16000.0, 20700.0])
"""Cumulative stars per deg^2 at a galactic latitude of 60 degrees; both ends continue the last slope."""

LOCUS: Final = np.array([
    # NUV-u, u-g, g-r, r-i, i-z, z-y
    [1.48, 0.76, -0.22, -0.22, -0.15, -0.04],  # A0
    [1.99, 0.93, 0.10, -0.02, -0.09, -0.02],  # F0
    [2.14, 0.95, 0.23, 0.04, -0.02, -0.01],  # F5
    [2.64, 1.25, 0.41, 0.16, 0.04, 0.02],  # G2
    [3.34, 1.56, 0.56, 0.23, 0.07, 0.02],  # K0
    [4.80, 2.42, 1.07, 0.45, 0.18, 0.06],  # K5
    [5.35, 2.53, 1.19, 0.70, 0.35, 0.10],  # M0
    [5.88, 2.47, 1.27, 0.95, 0.47, 0.14],  # M2
    [6.25, 2.91, 1.30, 1.65, 0.67, 0.23],  # M4
    [6.83, 2.86, 1.49, 2.37, 1.05, 0.30],  # M6
])  # fmt: skip
"""Stellar locus, one row per spectral type."""

LOCUS_SCATTER: Final = 0.03
WHITE_DWARF_SHARE: Final = 0.01
WHITE_DWARF_COLORS: Final = np.array([0.30, 0.20, -0.25, -0.25, -0.20, -0.10])

CLASSIFIED_I: Final = 25.5
"""Magnitude to which the star fraction of a field is defined: about the 5-sigma limit of one exposure."""

BLEND_RADIUS_ARCSEC: Final = 1.0
BLEND_MAG: Final = 2.0
"""A source is blended when another one, at most this much fainter, lies within the radius."""


@dataclass(frozen=True, slots=True)
class SkyModel:
    """What one field of the sky holds; drawn by :func:`sgclassify.simulation.simulate.simulate_field`.

    Attributes
    ----------
    ra, dec : float
        Centre of the field, degrees.
    radius_arcsec : float
        Radius of the disk in which sources are drawn.
    mag_limit_i : float
        Faintest source drawn, AB mag in i.
    star_fraction : float
        Stars / (stars + galaxies), brighter than ``CLASSIFIED_I``.
    binary_fraction : float
        Share of stars that are the primary of a close binary.
    quasar_fraction : float
        Quasars / (stars + galaxies), brighter than ``CLASSIFIED_I``.
    ebv : float
        Foreground reddening E(B-V), mag.
    density : float
        Galaxies in units of the mean counts; stars follow by the star fraction.
    compact_share : pair of float
        Range of the share of galaxies with a half-light radius below 0.08 arcsec.
    """

    ra: float
    dec: float
    radius_arcsec: float
    mag_limit_i: float
    star_fraction: float
    binary_fraction: float
    quasar_fraction: float
    ebv: float
    density: float = 1.0
    compact_share: tuple[float, float] = COMPACT_SHARE


@dataclass(frozen=True, slots=True)
class Sources:
    """Sources of one field; every array has one entry per source.

    Attributes
    ----------
    ra, dec : ndarray, float64
        ICRS position, degrees.
    kind : ndarray of str
        ``star``, ``galaxy`` or ``qso``.
    mags : ndarray, float64, shape (n, 7)
        AB magnitudes in the order of ``BANDS``, reddened.
    redshift : ndarray, float64
        0 for stars.
    r50, sersic_n, axis_ratio, position_angle, bulge_fraction : ndarray, float64
        Half-light radius (arcsec, geometric mean of the axes), Sersic index, axis ratio, position angle
        (radians, north through east) and, for galaxies of a bulge and a disk, the bulge's share of the i
        light. NaN where it does not apply.
    clumpiness : ndarray, float64
        Share of the i light of a galaxy that is in clumps; 0 for other sources.
    texture : ndarray, int64
        Seed of the clumps' places.
    system : ndarray, int64
        Index of the primary for the two stars of a binary, else -1.
    separation : ndarray, float64
        Separation of the binary, arcsec, else NaN.
    """

    ra: F64
    dec: F64
    kind: npt.NDArray[np.str_]
    mags: F64
    redshift: F64
    r50: F64
    sersic_n: F64
    axis_ratio: F64
    position_angle: F64
    bulge_fraction: F64
    clumpiness: F64
    texture: I64
    system: I64
    separation: F64

    def __len__(self) -> int:
        return len(self.ra)


def galaxy_density(mag_i: float) -> float:
    """Galaxies brighter than an i magnitude, per square arcminute."""
    scale, slope, pivot = GALAXY_COUNTS
    return float(scale * 10 ** (slope * (mag_i - pivot)))


def draw_sources(model: SkyModel, rng: np.random.Generator) -> Sources:
    """Draw the sources of one field: galaxies first, then stars (primaries, then companions), then quasars.

    The same state of `rng` gives the same field.
    """
    area = np.pi * (model.radius_arcsec / 60.0) ** 2 * model.density
    classified_galaxies = galaxy_density(CLASSIFIED_I) * area
    classified_stars = classified_galaxies * model.star_fraction / (1 - model.star_fraction)
    classified_quasars = (classified_galaxies + classified_stars) * model.quasar_fraction

    n_galaxies = rng.poisson(max(galaxy_density(model.mag_limit_i) - galaxy_density(GALAXY_BRIGHTEST_I), 0) * area)
    galaxy_i = _galaxy_magnitudes(n_galaxies, model.mag_limit_i, rng)
    galaxy_z, galaxy_mags = galaxy_pool().draw(galaxy_i, rng)

    star_i = _star_magnitudes(classified_stars, model.mag_limit_i, rng)
    star_mags = _star_colors(star_i, rng)
    primary = np.flatnonzero(rng.random(len(star_i)) < model.binary_fraction)
    companion_mags, separation = _companions(star_mags[primary], rng)

    quasar_i = _quasar_magnitudes(rng.poisson(classified_quasars), rng)
    quasar_z, quasar_mags = quasar_pool().draw(quasar_i, rng, window=N_QUASARS)

    n_singles, n_pairs, n_quasars = len(star_i), len(primary), len(quasar_i)
    n_stars = n_singles + n_pairs
    dx, dy = _positions(n_galaxies + n_singles + n_quasars, model.radius_arcsec, rng)
    angle = rng.uniform(0, 2 * np.pi, n_pairs)
    pair_dx = dx[n_galaxies + primary] + separation * np.cos(angle)
    pair_dy = dy[n_galaxies + primary] + separation * np.sin(angle)
    split = n_galaxies + n_singles
    dx = np.concatenate([dx[:split], pair_dx, dx[split:]])
    dy = np.concatenate([dy[:split], pair_dy, dy[split:]])
    ra, dec = _offset(model.ra, model.dec, dx, dy)

    n_point = n_stars + n_quasars
    system = np.full(n_galaxies + n_point, -1, dtype=np.int64)
    pair_separation = np.full(n_galaxies + n_point, np.nan)
    for members in (n_galaxies + primary, n_galaxies + n_singles + np.arange(n_pairs)):
        system[members] = n_galaxies + primary
        pair_separation[members] = separation
    mags = np.concatenate([galaxy_mags, star_mags, companion_mags, quasar_mags]) + EXTINCTION * model.ebv
    shape = galaxy_shapes(galaxy_i, model.compact_share, rng)
    blank = np.full(n_point, np.nan)
    r50, sersic_n, axis_ratio, position_angle, bulge = (np.concatenate([column, blank]) for column in shape)
    clumpiness = np.where(r50 > SMALLEST_CLUMPY, 10 ** rng.uniform(*CLUMPINESS, len(r50)), 0.0)
    clumpiness[sersic_n > 3.0] = 0.0
    texture = rng.integers(0, 2**31, len(r50))
    return Sources(
        ra, dec, np.repeat(["galaxy", "star", "qso"], [n_galaxies, n_stars, n_quasars]), mags,
        np.concatenate([galaxy_z, np.zeros(n_stars), quasar_z]), r50, sersic_n, axis_ratio, position_angle,
        bulge, clumpiness, texture, system, pair_separation,
    )  # fmt: skip


def _galaxy_magnitudes(n: int, limit: float, rng: np.random.Generator) -> F64:
    slope = GALAXY_COUNTS[1]
    low, high = 10 ** (slope * GALAXY_BRIGHTEST_I), 10 ** (slope * limit)
    return np.asarray(np.log10(rng.uniform(low, high, n)) / slope)


def _star_magnitudes(n_classified: float, limit: float, rng: np.random.Generator) -> F64:
    log_n = np.log10(STAR_COUNT_N)
    to_limit = 10 ** np.interp(limit, STAR_COUNT_I, log_n)
    per_classified = to_limit / 10 ** np.interp(CLASSIFIED_I, STAR_COUNT_I, log_n)
    n = rng.poisson(n_classified * per_classified)
    return np.asarray(np.interp(np.log10(rng.uniform(STAR_COUNT_N[0], to_limit, n)), log_n, STAR_COUNT_I))


def _quasar_magnitudes(n: int, rng: np.random.Generator) -> F64:
    # Counts rise by 0.3 dex per magnitude to i = 20, and much less beyond. One slope of 0.15 from 18 on stands for
    # both.
    slope = 0.15
    return np.asarray(np.log10(rng.uniform(10 ** (slope * 18.0), 10 ** (slope * CLASSIFIED_I), n)) / slope)


def _star_colors(mag_i: F64, rng: np.random.Generator) -> F64:
    n = len(mag_i)
    # Towards the faint end more and more stars are M dwarfs; the rest there are halo turn-off stars.
    is_dwarf = rng.random(n) < np.interp(mag_i, [16.0, 20.0, 24.0], [0.30, 0.50, 0.65])
    locus = np.where(is_dwarf, rng.normal(6.8, 1.1, n), rng.normal(3.2, 0.9, n))
    locus = np.clip(locus, 0.0, len(LOCUS) - 1.0)
    steps = np.arange(len(LOCUS))
    colors = np.stack([np.interp(locus, steps, LOCUS[:, k]) for k in range(LOCUS.shape[1])], axis=1)
    is_halo = ~is_dwarf & (rng.random(n) < np.interp(mag_i, [17.0, 20.0], [0.0, 0.8]))
    colors[:, 1] -= np.where(is_halo, rng.uniform(0.2, 0.4, n), 0.0)
    colors[rng.random(n) < WHITE_DWARF_SHARE] = WHITE_DWARF_COLORS
    colors += rng.normal(0.0, LOCUS_SCATTER, colors.shape)
    return _from_colors(mag_i, colors)


def _from_colors(mag_i: F64, colors: F64) -> F64:
    # A color is the bluer band less the redder one: add them up from the i band outwards.
    mags = np.empty((len(mag_i), len(BANDS)))
    mags[:, I_BAND] = mag_i
    for band in range(I_BAND - 1, -1, -1):
        mags[:, band] = mags[:, band + 1] + colors[:, band]
    for band in range(I_BAND + 1, len(BANDS)):
        mags[:, band] = mags[:, band - 1] - colors[:, band - 1]
    return mags


def _companions(primary_mags: F64, rng: np.random.Generator) -> tuple[F64, F64]:
    n = len(primary_mags)
    mag_i = primary_mags[:, I_BAND] + np.minimum(np.abs(rng.normal(0.0, 1.5, n)), 4.0)
    separation = 10 ** rng.uniform(np.log10(0.05), np.log10(0.3), n)
    return _star_colors(mag_i, rng), separation


def galaxy_shapes(mag_i: F64, compact_share: tuple[float, float], rng: np.random.Generator) -> tuple[F64, ...]:
    """Shapes of galaxies by their magnitude: ``r50`` to ``bulge_fraction`` of `Sources`, each of shape (n,).

    `compact_share` is the range of the share with a half-light radius below 0.08 arcsec.
    """
    n = len(mag_i)
    a, b, pivot, scatter = SIZE_RELATION
    r50 = 10 ** (a + b * (mag_i - pivot) + rng.normal(0.0, scatter, n))
    compact = rng.random(n) < rng.uniform(*compact_share)
    r50 = np.where(compact, rng.uniform(0.02, 0.08, n), np.clip(r50, 0.02, 5.0))
    levels, values = SERSIC_QUANTILES
    drawn_n = np.exp(np.interp(rng.random(n), levels, np.log(values)))
    sersic_n = SERSIC_GRID[np.abs(np.log(drawn_n[:, None] / SERSIC_GRID)).argmin(axis=1)]
    axis_ratio = np.interp(rng.random(n), *AXIS_RATIO_QUANTILES)
    position_angle = rng.uniform(0.0, np.pi, n)
    bulge = np.where(rng.random(n) < 0.5, np.clip((drawn_n - 0.7) / 4.0, 0.02, 0.9), np.nan)
    return r50, sersic_n, axis_ratio, position_angle, bulge


def _positions(n: int, radius: float, rng: np.random.Generator) -> tuple[F64, F64]:
    r, angle = radius * np.sqrt(rng.random(n)), rng.uniform(0.0, 2 * np.pi, n)
    return r * np.cos(angle), r * np.sin(angle)


def _offset(ra0: float, dec0: float, east: F64, north: F64) -> tuple[F64, F64]:
    # Inverse gnomonic projection of offsets in arcsec about the centre of the field.
    x, y = np.radians(east / 3600.0), np.radians(north / 3600.0)
    sin0, cos0 = np.sin(np.radians(dec0)), np.cos(np.radians(dec0))
    ra = ra0 + np.degrees(np.arctan2(x, cos0 - y * sin0))
    dec = np.degrees(np.arctan2(sin0 + y * cos0, np.hypot(x, cos0 - y * sin0)))
    return np.mod(ra, 360.0), dec


def blended(sources: Sources) -> Bool:
    """Whether another source, at most ``BLEND_MAG`` fainter in i, lies within ``BLEND_RADIUS_ARCSEC``."""
    result = np.zeros(len(sources), dtype=bool)
    if len(sources) == 0:
        return result
    tree = cKDTree(unit_vectors(sources.ra, sources.dec))
    pairs = tree.query_pairs(chord(BLEND_RADIUS_ARCSEC), output_type="ndarray")
    mag = sources.mags[:, I_BAND]
    for one, other in ((pairs[:, 0], pairs[:, 1]), (pairs[:, 1], pairs[:, 0])):
        result[one[mag[other] < mag[one] + BLEND_MAG]] = True
    return result


def truth_table(sources: Sources, field_index: int) -> pa.Table:
    """Truth of one field (FORMATS, section 6), with extra columns for evaluation.

    The number of the field is the high part of ``object_id``.

    Returns
    -------
    pyarrow.Table
        Columns ``object_id``, ``ra``, ``dec``, ``true_class``, ``redshift``, ``r50_arcsec``, ``sersic_n``,
        ``mag_<band>``; extra: ``axis_ratio``, ``bulge_fraction``, ``blended``, ``binary``, ``system_id`` (-1
        for singles) and ``pair_separation_arcsec``. NaN where a value does not apply.
    """
    base = field_index * 10_000_000
    system = np.where(sources.system >= 0, base + sources.system, -1)
    columns: dict[str, object] = {
        "object_id": base + np.arange(len(sources), dtype=np.int64),
        "ra": sources.ra,
        "dec": sources.dec,
        "true_class": pa.array(sources.kind.tolist(), pa.string()),
        "redshift": sources.redshift,
        "r50_arcsec": sources.r50,
        "sersic_n": sources.sersic_n,
    }
    columns |= {f"mag_{band}": sources.mags[:, k] for k, band in enumerate(BANDS)}
    columns |= {
        "axis_ratio": sources.axis_ratio,
        "bulge_fraction": sources.bulge_fraction,
        "blended": blended(sources),
        "binary": sources.system >= 0,
        "system_id": system,
        "pair_separation_arcsec": sources.separation,
    }
    return pa.table(columns)
