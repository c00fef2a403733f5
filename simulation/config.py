"""Configuration of the simulation."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field

from sgclassify.simulation.detector import DetectorModel
from sgclassify.simulation.filters import ALL_PSF_FAMILIES, FILTERS, PSF_FAMILIES
from sgclassify.stages.bands import BANDS, REAL_SHAPE

Span = tuple[float, float]

COMPACT_SHARE: Span = (0.01, 0.03)
"""Share of galaxies with a half-light radius below 0.08 arcsec, drawn for each field."""


@dataclass(frozen=True)
class SimulationConfig:
    """What to simulate. A pair of numbers is a range, from which a value is drawn evenly.

    Attributes
    ----------
    seed : int
        Seed of all random draws.
    n_fields : int
        Number of fields.
    detector_shape : tuple of int
        (ny, nx) of a detector, pixels.
    bands : tuple of str
        Bands observed.
    exposures_per_band : int
        Exposures of each band in each field.
    mag_limit_i : float
        Faintest source drawn, AB mag in i.
    star_fraction : pair of float
        Stars / (stars + galaxies) to i = 25.5; drawn for each field.
    binary_fraction, quasar_fraction : pair of float
        Close binaries among stars; quasars among all sources; drawn for each field.
    ebv : pair of float
        Foreground reddening E(B-V), mag; drawn for each field.
    dec_range : pair of float
        Declinations of the fields, degrees.
    density : pair of float
        Galaxies in units of the mean counts; drawn for each field.
    compact_share : pair of float
        Range of the share of galaxies with a half-light radius below 0.08 arcsec.
    exposure_time : pair of float
        Seconds; drawn for each exposure.
    sky_scale : pair of float
        Sky background in units of the dark sky; drawn for each exposure.
    psf_families : tuple of str
        Kinds of PSF; one is drawn for each exposure.
    psf_quality : pair of float
        0 is the sharpest PSF (FWHM 1.8 pixels), 1 the widest (2.8); drawn for each field.
    psf_nodes : int
        Nodes of the PSF along each axis of a detector.
    psf_strain : float
        Aberrations, shears and their changes over the detector, relative to the usual ones; see
        `sgclassify.simulation.psf.PsfModel.strained`.
    read_noise : pair of float
        Electrons; drawn for each exposure.
    zero_point_scatter : float
        Largest departure of an exposure's zero point from the nominal one, mag; the header has the true one, but for
        `zero_point_error`.
    fwhm_error : float
        Standard deviation of the relative error of the FWHM in the header.
    no_fwhm_share : float
        Share of the exposures whose header has no FWHM.
    cosmic_rays_flagged : pair of float
        Share of the cosmic rays that the flag image marks; drawn for each exposure.
    zero_point_error : float
        Standard deviation of the error of the zero point in the header, mag.
    astrometric_error : pair of float
        Error of the WCS in the header, arcsec; drawn for each exposure.
    dither_arcsec : float
        Largest offset of an exposure from the centre of its field along each axis.
    distortion_share, mirrored_share, compressed_share, variant_share, satellite_share : float
        Share of the exposures with, in this order: a distorted (TPV) WCS, an image of the other parity,
        tile-compressed images, the older names and keywords, a satellite trail.
    detection_sigma : pair of float
        Detection threshold of the CAT files, in standard deviations of the smoothed image; drawn for each exposure.
    catalogs : bool
        Whether CAT files are written.
    catalog_program : str
        What makes the CAT files: ``"photutils"`` (the stage's own detection) or ``"sextractor"``.
    sextractor_columns : bool
        Whether to write ``<IMG stem>.sextractor.parquet``, measurements of SExtractor and PSFEx, beside each IMG.
    detector : DetectorModel
        The detector.
    """

    seed: int = 1
    n_fields: int = 1
    detector_shape: tuple[int, int] = (1024, 1024)
    bands: tuple[str, ...] = BANDS
    exposures_per_band: int = 1
    mag_limit_i: float = 27.0
    star_fraction: Span = (0.05, 0.5)
    binary_fraction: Span = (0.05, 0.10)
    quasar_fraction: Span = (0.005, 0.01)
    ebv: Span = (0.0, 0.1)
    dec_range: Span = (-75.0, 75.0)
    density: Span = (1.0, 1.0)
    compact_share: Span = COMPACT_SHARE
    exposure_time: Span = (150.0, 150.0)
    sky_scale: Span = (1.0, 1.9)
    psf_families: tuple[str, ...] = PSF_FAMILIES
    psf_quality: Span = (0.0, 1.0)
    psf_nodes: int = 3
    psf_strain: float = 1.0
    read_noise: Span = (4.7, 5.5)
    zero_point_scatter: float = 0.1
    zero_point_error: float = 0.01
    fwhm_error: float = 0.03
    no_fwhm_share: float = 0.0
    cosmic_rays_flagged: Span = (0.97, 0.97)
    astrometric_error: Span = (0.01, 0.03)
    dither_arcsec: float = 4.0
    distortion_share: float = 0.25
    mirrored_share: float = 0.1
    compressed_share: float = 0.0
    variant_share: float = 0.0
    satellite_share: float = 0.03
    detection_sigma: Span = (2.7, 3.5)
    catalogs: bool = True
    catalog_program: str = "photutils"
    sextractor_columns: bool = False
    detector: DetectorModel = field(default_factory=DetectorModel)

    def __post_init__(self) -> None:
        unknown = [band for band in self.bands if band not in FILTERS]
        if unknown or not self.bands:
            raise ValueError(f"bands must be some of {', '.join(BANDS)}, not {', '.join(unknown) or 'none'}")
        families = [name for name in self.psf_families if name not in ALL_PSF_FAMILIES]
        if families or not self.psf_families:
            raise ValueError(f"PSF families must be some of {', '.join(ALL_PSF_FAMILIES)}")
        if self.catalog_program not in ("photutils", "sextractor"):
            raise ValueError(f"catalog_program must be photutils or sextractor, not {self.catalog_program}")
        if min(self.detector_shape) < 16 or any(a > b for a, b in zip(self.detector_shape, REAL_SHAPE, strict=True)):
            raise ValueError(f"a detector has from 16 x 16 to {REAL_SHAPE[1]} x {REAL_SHAPE[0]} pixels")
        if self.n_fields < 1 or self.exposures_per_band < 1 or self.seed < 0:
            raise ValueError("n_fields and exposures_per_band must be at least 1, seed at least 0")
        if not 0 <= self.star_fraction[0] <= self.star_fraction[1] < 1:
            raise ValueError(f"star_fraction must lie from 0 to below 1, not {self.star_fraction}")

    def digest(self) -> str:
        """Hexadecimal digest of all values that a field depends on (all but the number of fields)."""
        values = asdict(self) | {"n_fields": 0}
        return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()
