"""The seven filters of the simulated camera: throughput, zero point, sky, as numbers and as speclite filters.

Sources: ``[V]`` CESS throughput curves of the CSST main-survey camera (pivot wavelength, half-peak range,
zero point), sim_csst_lens / csster (sky); NUV, u and y sky levels are recalled values. The curves themselves are not
stored. A top hat with smooth edges between the half-peak wavelengths gives colours to a few hundredths of a magnitude,
which is less than the scatter added to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from sgclassify.stages.arrays import F64
from sgclassify.stages.bands import BANDS


@dataclass(frozen=True, slots=True)
class Filter:
    """One filter of the camera.

    Attributes
    ----------
    pivot_a : float
        Pivot wavelength, angstrom.
    half_peak_a : tuple of float
        Wavelengths at which the throughput is half of its peak, angstrom.
    peak : float
        Peak throughput of telescope, filter and detector.
    zero_point : float
        AB magnitude of 1 e-/s.
    sky : float
        Sky background of a dark exposure, e-/s per pixel of 0.074".
    """

    pivot_a: float
    half_peak_a: tuple[float, float]
    peak: float
    zero_point: float
    sky: float


FILTERS: Final[dict[str, Filter]] = {
    "NUV": Filter(2915.0, (2690.0, 3200.0), 0.29, 24.87, 0.004),
    "u": Filter(3633.0, (3229.0, 4010.0), 0.41, 25.30, 0.021),
    "g": Filter(4790.0, (4059.0, 5464.0), 0.73, 26.32, 0.159),
    "r": Filter(6174.0, (5498.0, 6892.0), 0.74, 26.18, 0.206),
    "i": Filter(7660.0, (6968.0, 8401.0), 0.72, 25.96, 0.214),
    "z": Filter(9083.0, (8480.0, 9448.0), 0.64, 25.27, 0.127),
    "y": Filter(9666.0, (9308.0, 9780.0), 0.37, 23.99, 0.037),
}
"""Filters by band, in order of wavelength."""

PSF_FAMILIES: Final = ("optical", "moffat", "optical_moffat")
SHIFTED_PSF_FAMILY: Final = "double_gaussian"
"""A family that no model is trained on: for the shifted test."""
ALL_PSF_FAMILIES: Final = (*PSF_FAMILIES, SHIFTED_PSF_FAMILY)
"""Kinds of PSF: diffraction with aberrations and jitter; a Moffat function; both."""

EDGE_WIDTH_A: Final = 60.0
"""Width of the smooth edges, angstrom."""

EXTINCTION: Final[F64] = np.array([6.2, 4.9, 3.7, 2.6, 1.95, 1.5, 1.36])
"""A(band) / E(B-V) in the order of ``BANDS``: the Milky Way curve with R_V = 3.1 at the pivot wavelengths."""


def throughput(band: str) -> tuple[F64, F64]:
    """Wavelength in angstrom, and throughput of a band, 0 at both ends; ndarrays, float64, shape (n,)."""
    spec = FILTERS[band]
    low, high = spec.half_peak_a
    wavelength = np.linspace(low - 5 * EDGE_WIDTH_A, high + 5 * EDGE_WIDTH_A, 200)
    edge = EDGE_WIDTH_A / 2.0
    response = spec.peak / (1 + np.exp((low - wavelength) / edge)) / (1 + np.exp((wavelength - high) / edge))
    response[[0, -1]] = 0.0
    return wavelength, response


def register_speclite() -> list[str]:
    """Make the filters known to speclite, which skypy uses for its photometry.

    Returns the names, in the order of ``BANDS``, for ``speclite.filters.load_filter`` in this process.
    """
    from speclite.filters import FilterResponse

    names = []
    for band in BANDS:
        wavelength, response = throughput(band)
        meta = {"group_name": "sgclassify", "band_name": band}
        names.append(str(FilterResponse(wavelength, response, meta).name))
    return names
