"""Exposures of the foreign fields: detector, WCS, files, SExtractor's catalogues, truth.

Every field has its own mixture of what detectors and headers may do; some fields lack a band, a catalogue or a file.
The order of the random draws is part of the fields: keep it.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final, NamedTuple

import galsim
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS
from foreign_photographs import Photograph, as_photographed
from foreign_sky import BANDS, PIXEL_SCALE, Array, ExposurePsf, PsfTraits, Rng, Sky, Source, draw_sources
from scipy import ndimage

EXPOSURE_S: Final = 150.0
READ_NOISE_E: Final = 5.0
DARK_E_S: Final = 0.02
# AB magnitudes of 1 e-/s (throughputs of CESS) and brightness of the sky, e-/s a pixel
ZERO_POINT: Final = dict(zip(BANDS, (24.87, 25.30, 26.32, 26.18, 25.96, 25.27, 23.99), strict=True))
SKY_E_S: Final = dict(zip(BANDS, (0.004, 0.021, 0.159, 0.206, 0.214, 0.127, 0.037), strict=True))
CHIPS: Final = {
    "NUV": (12, 13, 18, 19), "u": (14, 17), "g": (8, 23), "r": (9, 22), "i": (7, 24), "z": (11, 20),
    "y": (6, 15, 16, 25),
}  # fmt: skip
CHIP_SHAPE: Final = (9232, 9216)  # of a whole detector, of which an exposure here is a part
CHIP_PITCH: Final = (10130, 9750)  # from detector to detector, pixels
MARGIN_PX: Final = 100  # beyond the edges of a field, where sources are drawn too
BAD, HOT, WARM, SATURATED, COSMIC_RAY, SATELLITE = 1, 2, 4, 8, 16, 32  # bits of the flag image

# what some fields are like, by their number
ACROSS_RA_ZERO: Final = 13
WITHOUT_CATALOGUE: Final = (3, 9, 14, 20)
SEXTRACTOR_NAMES: Final = (6, 17)
MISSING_FILES: Final = {8: ("FLG", "r"), 11: ("WHT", "g")}
MISSING_BANDS: Final = {4: ("NUV",), 7: ("u", "y"), 12: ("z",), 16: ("NUV", "u", "y"), 21: ("g", "r")}
TWO_EXPOSURES_A_BAND: Final = (2, 10, 19)
PROJECTIONS: Final = ("TAN", "TAN-SIP", "TPV", "TAN")  # in turns

COMPRESSION: Final = {
    "IMG": {"compression_type": "RICE_1", "quantize_level": 16.0, "quantize_method": 2, "dither_seed": 7},
    "WHT": {"compression_type": "GZIP_2", "quantize_level": 0}, "FLG": {"compression_type": "RICE_1"},
}  # fmt: skip

PROGRAMS: Final = ("source-extractor", "psfex")
SHARE: Final = Path("/usr/share")  # where Debian installs the files of the programs
SETTINGS: Final = {
    "CATALOG_TYPE": "FITS_LDAC", "STARNNW_NAME": SHARE / "source-extractor" / "default.nnw", "PIXEL_SCALE": PIXEL_SCALE,
    "DEBLEND_NTHRESH": 32, "PHOT_APERTURES": "6,8,10,12,16,20,26,32,40,50,60,80", "PHOT_FLUXFRAC": "0.2,0.5,0.9",
    "WEIGHT_TYPE": "MAP_WEIGHT", "WEIGHT_IMAGE": "weight.fits", "WEIGHT_GAIN": "N", "FLAG_IMAGE": "flags.fits",
    "GAIN": EXPOSURE_S, "GAIN_KEY": "NONE", "SATUR_KEY": "NONE", "BACK_FILTERSIZE": 3, "MEMORY_PIXSTACK": 400000,
    "PARAMETERS_NAME": "columns.param", "PSF_NAME": "psf.psf", "NTHREADS": 1, "VERBOSE_TYPE": "QUIET",
}  # fmt: skip
PSFEX_SETTINGS: Final = {
    "PSF_SIZE": "31,31", "PSFVAR_DEGREES": 0, "SAMPLE_MINSN": 20, "SAMPLE_FWHMRANGE": "1.5,3.6",
    "SAMPLE_FLAGMASK": "0x00fe", "BADPIXEL_FILTER": "N", "CHECKIMAGE_TYPE": "NONE", "CHECKPLOT_TYPE": "NONE",
    "CHECKPLOT_DEV": "NULL", "WRITE_XML": "N", "NTHREADS": 1, "VERBOSE_TYPE": "QUIET",
}  # fmt: skip
PSFEX_INPUT: Final = (
    "X_IMAGE", "Y_IMAGE", "VIGNET(25,25)", "FLUX_RADIUS", "FLUX_APER(1)", "FLUXERR_APER(1)", "ELONGATION", "FLAGS",
    "SNR_WIN", "FLUX_AUTO", "FLUXERR_AUTO", "IMAFLAGS_ISO",
)  # fmt: skip

# columns of a catalogue: what SExtractor calls them, and which of its numbers where it has several
SCALARS: Final = {
    "X": "X_IMAGE", "Y": "Y_IMAGE", "RA": "ALPHA_J2000", "DEC": "DELTA_J2000", "A": "A_IMAGE", "B": "B_IMAGE",
    "PA": "THETA_IMAGE", "Flag": "FLAGS", "Flag_ISO": "IMAFLAGS_ISO", "Flag_ISO_Num": "NIMAFLAGS_ISO",
    "FWHM": "FWHM_IMAGE", "AB": "ELONGATION", "E": "ELLIPTICITY", "Radius_Kron": "KRON_RADIUS", "Sky": "BACKGROUND",
    "Type": "CLASS_STAR", "Class_Star": "CLASS_STAR", "XErr": "ERRX2_IMAGE", "YErr": "ERRY2_IMAGE",
    "AErr": "ERRA_IMAGE", "BErr": "ERRB_IMAGE",
}  # fmt: skip
FLUXES: Final = {"Flux": "FLUX", "FluxErr": "FLUXERR", "Mag": "MAG", "MagErr": "MAGERR"}
CSST_COLUMNS: Final = {
    **{name: (column, None) for name, column in SCALARS.items()},
    **{f"{name}_Kron": (f"{column}_AUTO", None) for name, column in FLUXES.items()},
    **{f"{name}_Aper{k + 1}": (f"{column}_APER", k) for k in range(12) for name, column in FLUXES.items()},
    **{name: ("FLUX_RADIUS", k) for k, name in enumerate(("R20", "R50", "R90"))},
    **{f"{name}_PSF": (f"{column}_PSF", None) for name, column in FLUXES.items()},
    "Chi2_PSF": ("CHI2_PSF", None), "X_PSF": ("XPSF_IMAGE", None), "Y_PSF": ("YPSF_IMAGE", None),
    "Spread_Model": ("SPREAD_MODEL", None), "SpreadErr_Model": ("SPREADERR_MODEL", None),
}  # fmt: skip
SEXTRACTOR_COLUMNS: Final = (
    "X_IMAGE", "Y_IMAGE", "ALPHA_J2000", "DELTA_J2000", "A_IMAGE", "B_IMAGE", "THETA_IMAGE", "FWHM_IMAGE",
    "ELONGATION", "ELLIPTICITY", "KRON_RADIUS", "CLASS_STAR", "MAG_AUTO", "MAGERR_AUTO", "FLAGS", "IMAFLAGS_ISO",
    "FLUX_RADIUS", "MAG_PSF", "MAGERR_PSF", "SPREAD_MODEL", "SPREADERR_MODEL",
)  # fmt: skip
SIZES: Final = {"FLUX_APER": 12, "FLUXERR_APER": 12, "MAG_APER": 12, "MAGERR_APER": 12, "FLUX_RADIUS": 3}
TYPES: Final = {
    "ALPHA_J2000": "f8", "DELTA_J2000": "f8", "FLAGS": "i2", "IMAFLAGS_ISO": "i4", "NIMAFLAGS_ISO": "i4",
}  # the others f4 # fmt: skip

TRUTH: Final = pa.schema([
    ("object_id", pa.int64()), ("ra", pa.float64()), ("dec", pa.float64()), ("true_class", pa.large_string()),
    ("redshift", pa.float64()), ("r50_arcsec", pa.float64()), ("sersic_n", pa.float64()),
    *((f"mag_{band}", pa.float64()) for band in BANDS), ("kind", pa.large_string()), ("pair_sep", pa.float64()),
    ("pair_dmag", pa.float64()), ("n_bands", pa.int8()),
])  # fmt: skip


class Effects:
    """What the detectors, headers and files of a field do; a number is 0 in fields without the effect."""

    def __init__(self, rng: Rng) -> None:
        def perhaps(chance: float, low: float, high: float) -> float:
            return rng.uniform(low, high) if rng.random() < chance else 0.0

        self.correlation = perhaps(0.35, 0.02, 0.06)  # of the noise of neighbouring pixels
        self.brighter_fatter = perhaps(0.5, 0.02, 0.08)  # share of a difference that flows back at 90,000 e-
        self.gradient = perhaps(0.55, 0.03, 0.15)  # of the sky, from the middle to the edges
        self.flat = perhaps(0.6, 0.003, 0.01)  # standard deviation of what the flat field has missed
        self.output_gain = perhaps(0.45, 0.002, 0.01)  # standard deviation from output to output
        self.unflagged = perhaps(0.7, 0.03, 0.15)  # share of cosmic rays that the flag image does not know
        self.satellites = rng.random() < 0.2
        self.any_roll = rng.random() < 0.15  # whether each exposure has its own position angle
        self.parity = int(rng.choice([-1, -1, 1]))  # -1 where right ascension grows to the left
        self.compressed = rng.random() < 0.3  # whether every third exposure is compressed


@dataclass(frozen=True)
class Exposure:
    """What the files of an exposure say about it."""

    field: int
    band: str
    chip: int
    identifier: str
    start: datetime
    wcs: fits.Header
    compressed: bool
    zero_point: float
    fwhm_px: float

    def path(self, kind: str) -> Path:
        """File of a kind (IMG, WHT, FLG, CAT), relative to the folder of the field."""
        stop = self.start + timedelta(seconds=EXPOSURE_S)
        name = f"CSST_MSC_MS_WIDE_{self.start:%Y%m%d%H%M%S}_{stop:%Y%m%d%H%M%S}_{self.identifier}_{self.chip:02d}"
        suffix = ".fits.fz" if self.compressed and kind != "CAT" else ".fits"
        return Path(self.identifier) / f"{name}_L1_V01_{kind}{suffix}"

    def write(self, folder: Path, kind: str, hdu: Any) -> None:
        """Write an HDU behind a primary header."""
        primary = fits.PrimaryHDU()
        header = primary.header
        header["TELESCOP"], header["INSTRUME"], header["OBSID"] = "CSST", "MSC", self.identifier
        header["OBSTYPE"] = header["FILETYPE"] = "WIDE"
        header["DATE-OBS"], header["EXPTIME"] = f"{self.start:%Y-%m-%dT%H:%M:%S}", EXPOSURE_S
        header["DETECTOR"] = f"CHIP{self.chip:02d}"
        header["RA_OBJ"], header["DEC_OBJ"] = self.wcs["CRVAL1"], self.wcs["CRVAL2"]
        header["FILEKIND"] = kind
        (folder / self.identifier).mkdir(exist_ok=True)
        fits.HDUList([primary, hdu]).writeto(folder / self.path(kind), checksum=True)


class Level1(NamedTuple):
    """Level-1 arrays of an exposure."""

    image: Array  # e-/s
    weight: Array  # (e-/s)^-2
    flags: Array
    saturate: float  # e-/s
    cosmic_rays: int  # pixels


def make_wcs(
    sky: Sky, chip: int, shape: tuple[int, int], roll: float, parity: int, projection: str, rng: Rng
) -> fits.Header:
    """WCS cards of a part (ny, nx) of a detector that looks near a field under a position angle (radians)."""
    ny, nx = shape
    # where the middle of the field falls
    x0, y0 = (nx - 1) / 2 + rng.uniform(-70, 70), (ny - 1) / 2 + rng.uniform(-70, 70)
    row, column = (chip - 1) % 5, 5 - (chip - 1) // 5
    gap = -775 if chip >= 26 or chip == 21 else 775 if chip <= 5 or chip == 10 else 0
    x_chip, y_chip = CHIP_PITCH[1] // 2 * (2 * column - 5) + gap, CHIP_PITCH[0] * (row - 2)
    x_part, y_part = rng.integers(0, CHIP_SHAPE[1] - nx), rng.integers(0, CHIP_SHAPE[0] - ny)
    scale, cosine, sine = PIXEL_SCALE / 3600, np.cos(roll), np.sin(roll)
    header = fits.Header()
    header["WCSAXES"] = 2
    header["CTYPE1"], header["CTYPE2"] = "RA---" + projection, "DEC--" + projection
    header["CUNIT1"] = header["CUNIT2"] = "deg"
    header["CRVAL1"], header["CRVAL2"] = sky.ra, sky.dec
    header["CRPIX1"] = CHIP_SHAPE[1] / 2 - x_chip - x_part
    header["CRPIX2"] = CHIP_SHAPE[0] / 2 - y_chip - y_part
    header["CD1_1"], header["CD1_2"] = parity * cosine * scale, -sine * scale
    header["CD2_1"], header["CD2_2"] = parity * sine * scale, cosine * scale
    header["RADESYS"], header["EQUINOX"] = "ICRS", 2000.0
    strength = rng.uniform(0.5, 1.5) * rng.choice([-1, 1])
    if projection == "TAN-SIP":
        header["A_ORDER"] = header["B_ORDER"] = 3
        header["A_3_0"] = header["A_1_2"] = header["B_0_3"] = header["B_2_1"] = strength * 6e-13
        header["A_2_0"], header["B_1_1"], header["B_0_2"] = rng.normal(0, 3e-9, 3)
    if projection == "TPV":
        for axis in (1, 2):
            header[f"PV{axis}_1"] = 1.0
            header[f"PV{axis}_7"] = header[f"PV{axis}_9"] = strength * 1.3e-3
            header[f"PV{axis}_4"], header[f"PV{axis}_5"] = rng.normal(0, 5e-5, 2)
    # the part lies far from the reference pixel: move that until the part looks at the field
    for _ in range(8):
        ra, dec = WCS(header).all_pix2world(x0, y0, 0)
        header["CRVAL1"] = (header["CRVAL1"] + sky.ra - float(ra)) % 360
        header["CRVAL2"] = header["CRVAL2"] + sky.dec - float(dec)
    return header


def sky_to_detector(wcs: WCS, dec: float, shape: tuple[int, int]) -> Array:
    """Matrix from offsets on the sky to those on the detector, both in arcsec, at the middle of an exposure."""
    y, x = shape[0] / 2, shape[1] / 2
    ra, decs = wcs.all_pix2world([x, x + 1, x], [y, y, y + 1], 0)
    east = ((ra[1:] - ra[0] + 180) % 360 - 180) * np.cos(np.radians(dec))
    return PIXEL_SCALE * np.linalg.inv(3600 * np.array([east, decs[1:] - decs[0]]))


class Canvas:
    """Image of an exposure, electrons, that sources are drawn on; `to_detector` is of `sky_to_detector`."""

    def __init__(self, band: str, zero_point: float, psf: ExposurePsf, to_detector: Array) -> None:
        self.band, self.zero_point = BANDS.index(band), zero_point
        self.psf, self.to_detector = psf, to_detector
        self.image = galsim.ImageF(psf.shape[1], psf.shape[0], xmin=0, ymin=0, scale=PIXEL_SCALE)

    def electrons(self, magnitudes: Array) -> float:
        """Electrons of an exposure."""
        return EXPOSURE_S * 10 ** (0.4 * (self.zero_point - magnitudes[self.band]))

    def add(self, profile: galsim.GSObject, size: int, x: float, y: float, shift: Any = (0, 0)) -> None:
        """Add a profile on a stamp of a size (pixels), shifted from a source at a pixel (0-based)."""
        ny, nx = self.psf.shape
        if not (-size / 2 < x < nx + size / 2 and -size / 2 < y < ny + size / 2):
            return
        centre = galsim.PositionD(x + shift[0], y + shift[1])
        stamp = profile.drawImage(nx=size, ny=size, scale=PIXEL_SCALE, center=centre, dtype=np.float32)
        common = stamp.bounds & self.image.bounds
        if common.isDefined():
            self.image[common] += stamp[common]

    def add_points(self, source: Source, x: float, y: float) -> None:
        """Add a star or a quasar."""
        for dx, dy, magnitudes in source.points:
            flux = self.electrons(magnitudes)
            size = 48 if flux < 5e3 else 96 if flux < 4e4 else 240 if flux < 1e6 else 512
            shift = self.to_detector @ (dx, dy) / PIXEL_SCALE
            self.add(self.psf.at(x, y, bright=flux > 4e4).withFlux(flux), size, x, y, shift)

    def add_galaxy(self, source: Source, x: float, y: float) -> None:
        """Add a galaxy; faint ones on smaller stamps, by coarser Fourier transforms."""
        total = source.magnitudes[self.band]
        if total < 26.3:
            reach, limits = 7 * source.r50_arcsec * (1.5 if total < 23 else 1.0) + 1.2, (36, 320)
        else:
            reach, limits = 5 * source.r50_arcsec + 0.8, (28, 80)
        size = int(np.clip(2 * np.ceil(reach / PIXEL_SCALE / 2), *limits))
        parts = [(profile, self.electrons(magnitudes)) for profile, magnitudes in source.components]
        flux = sum(part for _, part in parts)
        profiles = [profile.withFlux(part) for profile, part in parts if part > 0.004 * flux]
        galaxy = profiles[0] if len(profiles) == 1 else galsim.Sum(profiles)
        galaxy = galaxy.transform(*self.to_detector.ravel()).withFlux(flux)
        folding, maxk, kvalue = (5e-3, 1e-3, 1e-5) if total < 24 else (2e-2, 4e-3, 1e-4)
        gsparams = galsim.GSParams(
            folding_threshold=folding, maxk_threshold=maxk, kvalue_accuracy=kvalue, maximum_fft_size=16384
        )
        seen = galsim.Convolve([galaxy, self.psf.at(x, y)], gsparams=gsparams, propagate_gsparams=False)
        self.add(seen, size, x, y)


def bleed(electrons: Array, full_well: float) -> None:
    """Spill what is more than the full well along the columns, to both sides at once, in place."""
    for c in np.unique(np.nonzero(electrons > full_well)[1]):
        column = electrons[:, c]
        rows = np.nonzero(column > full_well)[0]
        for run in np.split(rows, np.nonzero(np.diff(rows) > 1)[0] + 1):
            excess = (column[run] - full_well).sum()
            column[run] = full_well
            below, above = run[0] - 1, run[-1] + 1
            while excess > 0 and (below >= 0 or above < len(column)):
                for row in (below, above):
                    if 0 <= row < len(column):
                        taken = min(max(full_well - column[row], 0), excess)
                        column[row] += taken
                        excess -= taken
                below, above = below - 1, above + 1


def cosmic_rays(count: int, shape: tuple[int, int], rng: Rng) -> Array:
    """Electrons of straight tracks: four in five short, the others 10 to 45 pixels."""
    image = np.zeros(shape, np.float32)
    for _ in range(count):
        x, y = rng.uniform(0, shape[1]), rng.uniform(0, shape[0])
        length = rng.exponential(5.0) + 0.5 if rng.random() < 0.8 else rng.uniform(10, 45)
        angle = rng.uniform(0, 6.3)
        a_pixel = rng.lognormal(6.3, 0.8)
        step = np.arange(int(length * 3) + 1) / 3.0
        xs, ys = (x + step * np.cos(angle)).astype(int), (y + step * np.sin(angle)).astype(int)
        inside = (xs >= 0) & (ys >= 0) & (xs < shape[1]) & (ys < shape[0])
        np.add.at(image, (ys[inside], xs[inside]), a_pixel / 3 * rng.uniform(0.5, 1.5, inside.sum()))
    return image


def read_out(electrons: Array, sky_e: float, x: Array, y: Array, effects: Effects, rng: Rng) -> Array:
    """Electrons of sources and sky (e- a pixel) as they are read, with noise; `x` and `y` go from -1 to 1."""
    ny, nx = shape = electrons.shape
    background = np.full(shape, sky_e)
    if effects.gradient:
        a = rng.normal(0, 0.6, 5)
        form = a[0] * x + a[1] * y + a[2] * (x**2 - 0.33) + a[3] * (y**2 - 0.33) + a[4] * x * y
        background = background * np.clip(1 + effects.gradient * form, 0.6, 1.6)
    electrons = electrons + background
    if effects.flat:
        coarse = (ny // 8, nx // 8)
        smooth = ndimage.gaussian_filter(rng.normal(size=coarse), 6)
        smooth = ndimage.zoom(smooth / smooth.std(), (ny / coarse[0], nx / coarse[1]), order=1)[:ny, :nx]
        electrons = electrons * (1 + effects.flat * smooth + rng.normal(0, 0.6 * effects.flat, shape))
    if effects.brighter_fatter:
        for axis in (0, 1):
            along = np.moveaxis(electrons, axis, 0)
            mean = 0.5 * (along[1:] + along[:-1])
            flow = np.clip(effects.brighter_fatter * np.minimum(mean / 9e4, 1.0), 0, 0.2)
            flow = flow * np.diff(along, axis=0)
            change = np.zeros_like(along)
            change[:-1] += flow
            change[1:] -= flow
            electrons = electrons + np.moveaxis(change, 0, axis)
    dark = DARK_E_S * EXPOSURE_S
    counted = rng.poisson(np.maximum(electrons + dark, 0)).astype(np.float64) - dark
    noise = counted - electrons + rng.normal(0, READ_NOISE_E, electrons.shape)
    if effects.correlation:
        c = effects.correlation
        kernel = np.array([[c * c, c, c * c], [c, 1, c], [c * c, c, c * c]])
        noise = ndimage.convolve(noise, kernel / np.sqrt((kernel**2).sum()), mode="reflect")
    return electrons + noise


def expose(electrons: Array, sky_e: float, effects: Effects, rng: Rng) -> Level1:
    """Level-1 arrays of an exposure from the electrons of its sources and of the sky (e- a pixel)."""
    ny, nx = shape = electrons.shape
    full_well = rng.uniform(68000, 92000)
    y, x = np.mgrid[-1 : 1 : ny * 1j, -1 : 1 : nx * 1j]
    raw = read_out(electrons, sky_e, x, y, effects, rng)
    flags = np.zeros(shape, np.uint16)
    bleed(raw, full_well)
    flags[ndimage.binary_dilation(raw >= full_well * 0.995, iterations=1)] |= SATURATED
    if effects.output_gain:
        for row in range(2):
            for column in range(4):
                rows = slice(row * ny // 2, (row + 1) * ny // 2)
                columns = slice(column * nx // 4, (column + 1) * nx // 4)
                gain = 1 + rng.normal(0, effects.output_gain)
                raw[rows, columns] = raw[rows, columns] * gain + rng.normal(0, 0.25)
    hits = rng.poisson(ny * nx / 5500.0)
    unflagged = round(hits * effects.unflagged)
    known = cosmic_rays(hits - unflagged, shape, rng)
    raw += known + cosmic_rays(unflagged, shape, rng)
    flags[known > 12] |= COSMIC_RAY
    count = int(1e-4 * raw.size)
    rows, columns = rng.integers(0, ny, count), rng.integers(0, nx, count)
    raw[rows, columns] += rng.lognormal(5.5, 1.2, count)
    flagged = rng.random(count) < 0.92
    flags[rows[flagged], columns[flagged]] |= HOT
    rows, columns = rng.integers(0, ny, count), rng.integers(0, nx, count)
    raw[rows, columns] += rng.uniform(15, 80, count)
    flags[rows, columns] |= WARM
    for _ in range(rng.poisson(1.2)):  # dead columns, most of them from some row on
        column = int(rng.integers(nx))
        row = int(rng.integers(ny)) if rng.random() < 0.6 else 0
        dead = (slice(row, None), slice(column, column + int(rng.integers(1, 3))))
        raw[dead] = 0.0
        flags[dead] |= BAD
    if effects.satellites and rng.random() < 0.3:
        angle = rng.uniform(0, np.pi)
        across = (x * nx / 2) * np.sin(angle) - (y * ny / 2) * np.cos(angle)
        distance = np.abs(across + rng.uniform(-300, 300))
        raw += rng.poisson(rng.uniform(40, 400) * np.exp(-0.5 * (distance / 1.5) ** 2))
        flags[distance < 6] |= SATELLITE
    raw = np.minimum(raw, full_well)
    # as in csster/csst, inst_corr.py
    weight = (EXPOSURE_S * EXPOSURE_S / (np.maximum(raw, 0) + READ_NOISE_E**2)).astype(np.float32)
    weight[flags > 0] = 0
    image = (raw / EXPOSURE_S).astype(np.float32)
    return Level1(image, weight, flags, full_well / EXPOSURE_S, int((known > 12).sum()))


def extract(exposure: Exposure, data: Level1) -> tuple[Table, int]:
    """SExtractor's table, its PSF magnitudes by PSFEx; and the stars that the PSF was measured from, 0 if it failed."""
    one, two, three = exposure.field % 3, exposure.field // 2 % 3, exposure.field // 3 % 3
    convolution = ("gauss_1.5_3x3.conv", "gauss_2.0_5x5.conv", "default.conv")[one]
    settings = SETTINGS | {
        "DETECT_THRESH": (1.2, 1.5, 1.8)[one], "ANALYSIS_THRESH": (1.2, 1.5, 1.8)[one],
        "DETECT_MINAREA": (4, 5, 6)[two], "DEBLEND_MINCONT": (0.005, 0.001, 0.01)[three],
        "BACK_SIZE": (64, 128, 256)[one], "FILTER_NAME": SHARE / "source-extractor" / convolution,
        "MAG_ZEROPOINT": exposure.zero_point, "SATUR_LEVEL": data.saturate * 0.95,
        "SEEING_FWHM": exposure.fwhm_px * PIXEL_SCALE,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        fits.writeto(folder / "image.fits", data.image)
        fits.writeto(folder / "weight.fits", data.weight)
        fits.writeto(folder / "flags.fits", data.flags.astype(np.int32))
        (folder / "default.sex").touch()  # what is not set here is the program's own default

        def run(command: list[str], options: dict[str, Any]) -> None:
            for key, value in options.items():
                command += [f"-{key}", str(value)]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            if done.returncode and command[0] != "psfex":  # which fails where there are too few stars
                raise RuntimeError(done.stderr)

        columns = folder / "columns.param"
        columns.write_text("\n".join(PSFEX_INPUT) + "\n")
        options = settings | {"DETECT_MINAREA": 5, "PHOT_FLUXFRAC": 0.5, "CATALOG_NAME": "psf.cat"}
        run(["source-extractor", "image.fits"], options)
        default = str(SHARE / "psfex" / "default.psfex")
        run(["psfex", "psf.cat", "-c", default], PSFEX_SETTINGS)
        stars = 0
        if (folder / "psf.psf").exists():
            accepted = int(fits.getheader(folder / "psf.psf", 1).get("ACCEPTED", 0))
            psf = fits.getdata(folder / "psf.psf", 1)["PSF_MASK"]
            if accepted >= 4 and np.isfinite(psf).all() and psf.max() > 0:
                stars = accepted
        wanted = {column for column, _ in CSST_COLUMNS.values()} - {"ALPHA_J2000", "DELTA_J2000"}
        if not stars:
            wanted = {column for column in wanted if "PSF" not in column and "SPREAD" not in column}
        lines = [f"{column}({SIZES[column]})" if column in SIZES else column for column in sorted(wanted)]
        columns.write_text("\n".join(lines) + "\n")
        run(["source-extractor", "image.fits"], settings | {"CATALOG_NAME": "out.cat"})
        return Table(fits.getdata(folder / "out.cat", 2)), stars


def catalogue_of(found: Table, exposure: Exposure) -> Table:
    """SExtractor's table under the official CSST column names, fluxes in nanomaggies; or under some of its own."""
    n = len(found)
    ra, dec = WCS(exposure.wcs).all_pix2world(found["X_IMAGE"], found["Y_IMAGE"], 1)
    found["ALPHA_J2000"], found["DELTA_J2000"] = ra, dec
    official = exposure.field not in SEXTRACTOR_NAMES
    table = Table()
    if official:
        table["OBSID"] = np.array([exposure.identifier] * n, "U11")
        table["CCDNO"] = np.full(n, exposure.chip, np.int32)
    table["objID" if official else "NUMBER"] = np.arange(1, n + 1, dtype=np.int32)
    own = {name: (name, 1 if name == "FLUX_RADIUS" else None) for name in SEXTRACTOR_COLUMNS}
    for name, (column, k) in (CSST_COLUMNS if official else own).items():
        if column not in found.colnames:
            continue
        values = np.asarray(found[column] if k is None else found[column][:, k])
        if name.startswith("Flux"):
            values = values * 10 ** (0.4 * (22.5 - exposure.zero_point))
        if name in ("XErr", "YErr"):
            values = np.sqrt(values)
        table[name] = values.astype(TYPES.get(column, "f4"))
    if official:
        table["Filter"] = np.array([exposure.band] * n, "U3")
    return table


def write_exposure(folder: Path, exposure: Exposure, data: Level1, other_names: bool, rng: Rng) -> None:
    """Write the files of an exposure; the names of some cards differ between versions of the format."""
    good = data.image[data.flags == 0]
    level = float(np.median(good))
    header = exposure.wcs.copy()
    header["FILTER"], header["CHIPID"] = exposure.band, exposure.chip
    header["GAIN01" if other_names else "GAIN1"] = 1.1
    header["RDNOIS01" if other_names else "RDNOISE1"] = READ_NOISE_E
    header["ZP" if rng.random() < 0.5 else "CCDZP"] = exposure.zero_point
    header["SATURATE"], header["CRCOUNT"] = data.saturate, data.cosmic_rays
    header["SKY_BKG"], header["SKY_RMS"] = level, float(1.4826 * np.median(np.abs(good - level)))
    header["FWHM"] = round(exposure.fwhm_px * rng.normal(1.02, 0.015), 4)
    for kind, array in (("IMG", data.image), ("WHT", data.weight), ("FLG", data.flags)):
        if MISSING_FILES.get(exposure.field) == (kind, exposure.band):
            continue
        cards = header.copy()
        cards["EXTNAME"] = kind
        if kind == "IMG":
            cards["BUNIT"] = "e-/s"
        hdu = fits.ImageHDU(array, cards)
        if exposure.compressed:
            hdu = fits.CompImageHDU(array, cards, **COMPRESSION[kind])
        exposure.write(folder, kind, hdu)
    if exposure.field in WITHOUT_CATALOGUE:
        return
    found, stars = extract(exposure, data)
    hdu = fits.BinTableHDU(catalogue_of(found, exposure), name="CAT")
    for name in ("FILTER", "CHIPID", "SATURATE", "SKY_BKG", "SKY_RMS", "FWHM"):
        hdu.header[name] = header[name]
    hdu.header["ZP"], hdu.header["NS_PSF"] = exposure.zero_point, stars
    exposure.write(folder, "CAT", hdu)


def write_truth(path: Path, number: int, sources: list[Source]) -> None:
    """Write the sources that lie on any exposure; the file is there only when it is whole."""
    rows = []
    for k, source in enumerate(source for source in sources if source.bands):
        magnitudes = {f"mag_{band}": value for band, value in zip(BANDS, source.magnitudes, strict=True)}
        identifier = (900000 + number) * 1000000 + k
        rows.append(vars(source) | magnitudes | {"object_id": identifier, "n_bands": len(source.bands)})
    part = path.with_suffix(".part")
    pq.write_table(pa.Table.from_pylist(rows, TRUTH), part)
    part.replace(path)


def simulate_field(number: int, family: str, folder: Path, photographs: Sequence[Photograph] = ()) -> None:
    """Simulate a field, its PSFs of a family: exposures, their list, and last ``truth.parquet``, in a new folder.

    Galaxies have the shapes of `photographs`, if there are any.
    """
    rng = np.random.default_rng(910000 + number)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    ny, nx = shape = tuple(int(size) for size in rng.choice([992, 1024, 1024, 1056], 2))
    sky = Sky(rng)
    sky.ra = 0.002 if number == ACROSS_RA_ZERO else sky.ra
    traits = PsfTraits(family, rng)
    effects = Effects(rng)
    sources = draw_sources(sky, (ny + 2 * MARGIN_PX, nx + 2 * MARGIN_PX), rng)
    if photographs:
        # drawn apart, so that all else is as without
        shapes = np.random.default_rng(930000 + number)
        sources = [as_photographed(source, photographs, shapes) for source in sources]
    ras, decs = np.array([source.ra for source in sources]), np.array([source.dec for source in sources])
    field_roll = rng.uniform(0, 2 * np.pi)
    start = datetime(2029, 1, 1) + timedelta(days=number * 9 + 3, seconds=int(rng.integers(80000)))
    times = 2 if number in TWO_EXPOSURES_A_BAND else 1
    bands = [band for band in BANDS if band not in MISSING_BANDS.get(number, ()) for _ in range(times)]
    lines = ["# one exposure a line"]
    for k, band in enumerate(bands):
        chip = int(rng.choice(CHIPS[band]))
        identifier = f"{20970000000 + number * 100000 + k * 1013 + int(rng.integers(900)):011d}"
        start += timedelta(seconds=int(rng.integers(200, 400)))
        roll = rng.uniform(0, 6.283) if effects.any_roll else field_roll + np.radians(rng.normal(0, 0.4))
        header = make_wcs(sky, chip, shape, roll, effects.parity, PROJECTIONS[number % 4], rng)
        wcs = WCS(header)
        psf = ExposurePsf(traits, band, shape, rng)
        zero_point = ZERO_POINT[band] + rng.normal(0, 0.02)
        small = effects.compressed and k % 3 == 1
        exposure = Exposure(number, band, chip, identifier, start, header, small, zero_point, psf.fwhm_px)
        sky_e = SKY_E_S[band] * sky.brightness * rng.uniform(0.93, 1.07) * EXPOSURE_S
        error = rng.uniform(-0.02, 0.02, 2) / np.sqrt(2)  # of the WCS, arcsec
        xs, ys = wcs.all_world2pix(ras, decs, 0)
        xs, ys = xs + error[0] / PIXEL_SCALE, ys + error[1] / PIXEL_SCALE
        canvas = Canvas(band, zero_point, psf, sky_to_detector(wcs, sky.dec, shape))
        for source, x, y in zip(sources, xs, ys, strict=True):
            if -0.5 <= x <= nx - 0.5 and -0.5 <= y <= ny - 0.5:
                source.bands.add(band)
            if source.magnitudes[BANDS.index(band)] > 29.3:
                continue
            add = canvas.add_points if source.points else canvas.add_galaxy
            add(source, x, y)
        data = expose(np.maximum(canvas.image.array.astype(np.float64), 0.0), sky_e, effects, rng)
        write_exposure(folder, exposure, data, k % 2 == 1, rng)
        lines.append(str(exposure.path("IMG")))
    (folder / "exposures.txt").write_text("\n".join(lines) + "\n")
    write_truth(folder / "truth.parquet", number, sources)
