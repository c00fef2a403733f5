"""The features of the model: what is measured of an object in one band, each declared once.

`sgclassify.stages.measure` says how. Names and order are part of the contract of a model archive.
"""

from __future__ import annotations

from typing import Final, NamedTuple

REFERENCE_SIGMA: Final = 1.2
"""Sigma (pixels) of the reference weight: near the matched filter of a PSF of 2.0-2.3 px FWHM plus pixel."""

RATIO_SIGMAS: Final = (0.7, 1.8, 2.7, 4.0, 6.0)
"""Sigmas (pixels) of the other weights; their fluxes are given relative to the reference flux."""

PSF_SIGMAS: Final = RATIO_SIGMAS[:4]
"""Sigmas (pixels) of the weights whose flux ratios are compared with those of the exposure's point sources."""

WIDENINGS: Final = (1.0, 2.5)
"""Sigmas (pixels) by which the PSF is widened in the search for extended light."""

MOMENT_SIGMA: Final = 1.8
WIDE_MOMENT_SIGMA: Final = 3.5
"""Sigmas (pixels) of the weights of the second moments."""

TOTAL_RADIUS: Final = 6.0
"""Radius (pixels) of the aperture for the total flux."""

ANNULUS: Final = (8.0, 14.0)
"""Radii (pixels) of the annulus around the source."""

FLUX_SOFTENING: Final = 0.05
"""Softening of the asinh magnitude, nanomaggies (magnitude 25.75)."""

PSF_MEASURES: Final = (*(f"ratio_{s}" for s in PSF_SIGMAS), "size")
"""Measures of which the locus of an exposure's point sources is known."""


class Feature(NamedTuple):
    """One feature of one band; ``unit`` is empty for a number without a unit."""

    name: str
    unit: str
    definition: str


_ASINH_FLUX = f"{FLUX_SOFTENING} nanomaggies"

DECLARED: Final = (
    Feature("detected", "", "1 where the object has a detection in this band, else 0"),
    Feature("snr", "", f"asinh of the signal-to-noise ratio in the reference weight (sigma {REFERENCE_SIGMA} px)"),
    Feature("flux", "", f"asinh of the flux within {TOTAL_RADIUS:g} px over {_ASINH_FLUX}"),
    Feature("depth", "mag", "AB magnitude of five times the noise of the reference flux, minus 25"),
    *(Feature(f"ratio_{s}", "", f"flux with a weight of sigma {s} px over the reference flux") for s in RATIO_SIGMAS),
    Feature("size", "px^2", f"second moment (trace) with a weight of sigma {MOMENT_SIGMA} px"),
    Feature("size_wide", "px^2", f"second moment (trace) with a weight of sigma {WIDE_MOMENT_SIGMA} px"),
    Feature("ellipticity", "", "ellipticity of the second moments of `size`"),
    Feature("peak", "", "brightest pixel within 2.5 px over the reference flux"),
    *(
        Feature(f"excess_{s}", "", f"`ratio_{s}` minus that of the exposure's point sources, over the latter")
        for s in PSF_SIGMAS
    ),
    Feature("excess_size", "", "natural logarithm of `size` over `psf_size`"),
    *(
        Feature(f"significance_{s}", "", f"asinh of the difference in `excess_{s}` over its error from sky noise")
        for s in PSF_SIGMAS
    ),
    Feature("psf_flux", "", f"asinh of the flux of a PSF fit over {_ASINH_FLUX}"),
    Feature("psf_snr", "", "asinh of the signal-to-noise ratio of that flux"),
    Feature("psf_misfit", "", "asinh of the fit's chi-square, less the expected one, over the expected spread"),
    *(
        Feature(
            f"extended_{s}",
            "",
            f"flux moved from the PSF into the PSF widened by a Gaussian of sigma {s} px, over the flux of the fit",
        )
        for s in WIDENINGS
    ),
    *(Feature(f"extended_snr_{s}", "", f"asinh of the flux in `extended_{s}` over its error") for s in WIDENINGS),
    Feature("psf_size", "px^2", "median `size` of the exposure's point sources"),
    Feature("psf_ratio_2.7", "", "median `ratio_2.7` of the exposure's point sources"),
    Feature("psf_stars", "", "ln(1 + number of the exposure's point sources)"),
    Feature("header_fwhm", "px", "FWHM in the header"),
    Feature("annulus", "", f"flux between {ANNULUS[0]:g} and {ANNULUS[1]:g} px over the total flux"),
    Feature("valid_core", "", "share of valid pixels in the core"),
    Feature("valid_stamp", "", "share of valid pixels in the stamp"),
    Feature("saturated_core", "", "share of saturated pixels in the core"),
)
"""The features of one band, in the order of the feature axis."""

FEATURES: Final = tuple(feature.name for feature in DECLARED)
"""Their names."""
