"""The seven photometric bands of the CSST main-survey camera, and which detector carries which."""

from __future__ import annotations

from typing import Final

BANDS: Final[tuple[str, ...]] = ("NUV", "u", "g", "r", "i", "z", "y")
"""Band names in order of wavelength: the order of every band axis in this project."""

BAND_INDEX: Final[dict[str, int]] = {band: k for k, band in enumerate(BANDS)}

ANCHOR_ORDER: Final[tuple[str, ...]] = ("g", "r", "i", "u", "NUV", "z", "y")
"""Bands from the deepest to the shallowest (5-sigma depth of one 150 s exposure: 26.23, 25.97, 25.60,
25.46, 25.07, 25.04, 23.92 AB mag; computed from the public CESS throughput curves)."""

SLITLESS: Final[frozenset[str]] = frozenset({"GU", "GV", "GI"})
"""Filters of the slitless spectroscopic detectors, which hold no images of sources."""

PIXEL_SCALE: Final = 0.074
"""Nominal pixel scale, arcsec per pixel."""

REAL_SHAPE: Final = (9232, 9216)
"""(ny, nx) of a detector of the camera."""

NOMINAL_FWHM_PX: Final = 2.2
"""FWHM of the PSF, pixels, where a header has none: 0.16 arcsec, between those of the seven bands."""

DETECTOR_FILTER: Final[dict[int, str]] = {
    **dict.fromkeys((12, 13, 18, 19), "NUV"),
    **dict.fromkeys((14, 17), "u"),
    **dict.fromkeys((8, 23), "g"),
    **dict.fromkeys((9, 22), "r"),
    **dict.fromkeys((7, 24), "i"),
    **dict.fromkeys((11, 20), "z"),
    **dict.fromkeys((6, 15, 16, 25), "y"),
    **dict.fromkeys((3, 4, 27, 28), "GU"),
    **dict.fromkeys((2, 5, 26, 29), "GV"),
    **dict.fromkeys((1, 10, 21, 30), "GI"),
}
"""Filter of each of the 30 detectors, by detector number (source: csst-dfs-commons, constants.py)."""


def nanomaggies_per_count(zero_point: float) -> float:
    """Factor from e-/s to nanomaggies, for an AB magnitude of 1 e-/s (one nanomaggy has AB magnitude 22.5)."""
    return float(10.0 ** (0.4 * (22.5 - zero_point)))
