"""Redshifts and colours of galaxies and quasars, drawn with skypy once per process and kept in memory.

Galaxies follow the luminosity functions and spectral coefficients of Herbel et al. 2017 (JCAP 08, 035), with the values
of skypy's own examples. Their spectra are the kcorrect templates that come with skypy. Counts, sizes and shapes do
*not* come from here: :mod:`sgclassify.simulation.sky` draws magnitudes from the observed number counts and asks this
pool for a galaxy of about that magnitude.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from sgclassify.simulation.filters import FILTERS, register_speclite
from sgclassify.stages.arrays import F64
from sgclassify.stages.bands import BAND_INDEX

POOL_SEED: Final = 20_170_835
"""Seed of the pool. The pool is a constant of the program, so a field depends only on its own seed."""

Z_RANGE: Final = (0.02, 2.95)
"""Redshifts of the galaxies: below, volumes are negligible; above, the templates end inside the NUV band."""

LAYERS: Final = ((28.5, 0.03), (24.0, 0.5))
"""(limit of the skypy magnitude, area in deg^2) of the two draws: one deep, one wide for bright galaxies."""

QUASAR_Z: Final = (0.3, 2.9)
"""Redshifts of the quasars."""

N_QUASARS: Final = 2000
"""Number of quasars in the pool."""

QUASAR_LINES: Final = (
    (1216.0, 92.0, 20.0), (1549.0, 24.0, 15.0), (1908.0, 21.0, 24.0), (2800.0, 32.0, 35.0),
    (4861.0, 46.0, 40.0), (6565.0, 195.0, 47.0),
)  # fmt: skip
"""Rest wavelength, equivalent width, width (sigma), all in angstrom, of the broad emission lines (Vanden
Berk et al. 2001, composite of SDSS quasars)."""


@dataclass(frozen=True, slots=True)
class _Population:
    m_star: tuple[float, float]
    phi_star: tuple[float, float]
    alpha: float
    alpha0: tuple[float, ...]
    alpha1: tuple[float, ...]
    weight: tuple[float, ...]


_POPULATIONS: Final = (
    _Population(  # blue
        (-0.9408582, -20.40492365), (0.00370253, -9.73858), -1.3,
        (2.079, 3.524, 1.917, 1.992, 2.536), (2.265, 3.862, 1.921, 1.685, 2.480),
        (3.47e09, 3.31e06, 2.13e09, 1.64e10, 1.01e09),
    ),
    _Population(  # red
        (-0.70798041, -20.37196157), (0.0035097, -1.41649), -0.5,
        (2.461, 2.358, 2.568, 2.268, 2.402), (2.410, 2.340, 2.200, 2.540, 2.464),
        (3.84e09, 1.57e06, 3.91e08, 4.66e10, 3.03e07),
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Pool:
    """Redshifts and magnitudes to draw from.

    Attributes
    ----------
    redshift : ndarray, float64, shape (n,)
    mags : ndarray, float64, shape (n, 7)
        AB magnitudes in the order of ``BANDS``; rows sorted by the i band.
    """

    redshift: F64
    mags: F64

    def draw(self, mag_i: F64, rng: np.random.Generator, window: int = 60) -> tuple[F64, F64]:
        """Draw an entry of about the wanted i magnitude for each source, and shift it to that magnitude.

        Parameters
        ----------
        mag_i : ndarray, float64, shape (n,)
            Wanted AB magnitudes in i.
        rng : numpy.random.Generator
        window : int, optional
            How many ranks up or down, in order of i magnitude, an entry may be taken from.

        Returns
        -------
        redshift : ndarray, float64, shape (n,)
        mags : ndarray, float64, shape (n, 7)
            AB magnitudes in the order of ``BANDS``; the i column equals `mag_i`.
        """
        own_i = self.mags[:, BAND_INDEX["i"]]
        rank = np.searchsorted(own_i, mag_i) + rng.integers(-window, window + 1, len(mag_i))
        rank = np.clip(rank, 0, len(own_i) - 1)
        return self.redshift[rank], self.mags[rank] + (mag_i - own_i[rank])[:, None]


def igm_dimming(redshift: F64, wavelength_a: F64) -> F64:
    """Dimming of a source by the Lyman-alpha forest between it and us.

    Parameters
    ----------
    redshift : ndarray, float64, shape (n, 1)
    wavelength_a : ndarray, float64, shape (m,)
        Observed wavelength, angstrom.

    Returns
    -------
    ndarray, float64, shape (n, m)
        Dimming in magnitudes, from the mean optical depth of the Lyman-alpha line of Madau 1995 (ApJ 441, 18).
    """
    blueward = wavelength_a < 1215.67 * (1 + redshift)
    return np.where(blueward, 1.086 * 0.0036 * (wavelength_a / 1215.67) ** 3.46, 0.0)


@contextmanager
def _legacy_seed(seed: int) -> Iterator[None]:
    # skypy draws from numpy's global generator: seed it, and restore its state afterwards.
    state = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed)  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


def _import_skypy() -> tuple[Any, Any, Any]:
    from astropy.utils.exceptions import AstropyDeprecationWarning

    with warnings.catch_warnings():
        # skypy 0.5 builds the test runner that astropy 8 has deprecated, at import; nothing here uses it.
        warnings.filterwarnings("ignore", message="The TestRunner", category=AstropyDeprecationWarning)
        from skypy import galaxies
        from skypy.galaxies import spectrum
        from skypy.utils import photometry
    return galaxies, spectrum, photometry


@functools.lru_cache(maxsize=1)
def galaxy_pool() -> Pool:
    """Some 20,000 galaxies to i of about 28, made at the first call (some seconds).

    Raises ``ImportError`` if skypy or speclite is not installed (``pip install sgclassify[simulate]``).
    """
    from astropy import units
    from astropy.cosmology import FlatLambdaCDM
    from astropy.modeling.models import Exponential1D, Linear1D

    galaxies, spectrum, photometry = _import_skypy()
    templates = spectrum.kcorrect
    cosmology = FlatLambdaCDM(H0=70.0, Om0=0.3)
    z_grid = np.linspace(*Z_RANGE, 100)
    # Magnitudes of the templates by redshift, once for all draws: a spectrum is a sum of templates.
    table = photometry.mag_ab(templates.wavelength, templates.templates, register_speclite(), redshift=z_grid)
    fluxes = 10 ** (-0.4 * table)
    redshifts, mags = [], []
    with _legacy_seed(POOL_SEED):
        for limit, area in LAYERS:
            for kind in _POPULATIONS:
                z, absolute_b = galaxies.schechter_lf(
                    z_grid, Linear1D(*kind.m_star), Exponential1D(*kind.phi_star), kind.alpha, limit,
                    area * units.deg**2, cosmology,
                )  # fmt: skip
                coefficients = spectrum.dirichlet_coefficients(z, kind.alpha0, kind.alpha1, weight=kind.weight)
                mass = templates.stellar_mass(coefficients, absolute_b, "bessell-B")
                flux = np.einsum("nt,ntb->nb", coefficients * mass[:, None], _at(fluxes, z_grid, z))
                mags.append(cosmology.distmod(z).value[:, None] - 2.5 * np.log10(flux))
                redshifts.append(z)
    return _sorted_pool(np.concatenate(redshifts), np.concatenate(mags))


def _at(table: F64, grid: F64, z: F64) -> F64:
    place = np.interp(z, grid, np.arange(len(grid), dtype=np.float64))
    low = np.minimum(place.astype(int), len(grid) - 2)
    part = (place - low).reshape(-1, *[1] * (table.ndim - 1))
    return np.asarray(table[low] * (1 - part) + table[low + 1] * part)


def _sorted_pool(redshift: F64, mags: F64) -> Pool:
    pivots = np.array([spec.pivot_a for spec in FILTERS.values()])
    mags = mags + igm_dimming(redshift[:, None], pivots)
    keep = np.isfinite(mags).all(axis=1)
    order = np.flatnonzero(keep)[np.argsort(mags[keep, BAND_INDEX["i"]], kind="stable")]
    return Pool(redshift[order], mags[order])


@functools.lru_cache(maxsize=1)
def quasar_pool() -> Pool:
    """`N_QUASARS` quasars: a power law with broad emission lines.

    All have the same i magnitude, 20, so draw with a `window` of `N_QUASARS`.
    """
    from astropy import units

    *_, photometry = _import_skypy()
    names = register_speclite()
    rng = np.random.default_rng(POOL_SEED)
    wavelength = np.arange(550.0, 12_000.0, 4.0)
    z_grid = np.linspace(*QUASAR_Z, 80)
    slopes = np.array([-2.1, -1.7, -1.3, -0.9])  # of f_lambda; the composite has -1.56 with a spread of 0.3
    spectra = []
    for slope in slopes:
        flux = (wavelength / 3000.0) ** slope
        for line, width, sigma in QUASAR_LINES:
            peak = width / (sigma * np.sqrt(2 * np.pi)) * (line / 3000.0) ** slope
            flux = flux + peak * np.exp(-0.5 * ((wavelength - line) / sigma) ** 2)
        flux[wavelength < 912.0] *= 0.5
        spectra.append(flux)
    unit = units.Unit("1e-17 erg s-1 cm-2 angstrom-1")
    table = photometry.mag_ab(wavelength * units.angstrom, np.array(spectra) * unit, names, redshift=z_grid)
    redshift = rng.uniform(*QUASAR_Z, N_QUASARS)
    slope = np.clip(rng.normal(-1.56, 0.3, N_QUASARS), slopes[0], slopes[-1])
    by_slope = _at(table, z_grid, redshift)
    place = np.interp(slope, slopes, np.arange(float(len(slopes))))
    low = np.minimum(place.astype(int), len(slopes) - 2)
    rows, part = np.arange(N_QUASARS), (place - low)[:, None]
    mags = by_slope[rows, low] * (1 - part) + by_slope[rows, low + 1] * part
    mags += rng.normal(0.0, 0.04, mags.shape)
    mags += 20.0 - mags[:, [BAND_INDEX["i"]]]
    return _sorted_pool(redshift, mags)
