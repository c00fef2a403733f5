"""Files of the foreign exposures: images, SExtractor's catalogues, truth."""

from __future__ import annotations

import subprocess
import tempfile
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from astropy.io import fits
from astropy.table import Table
from astropy.wcs import WCS
from foreign_detector import EXPOSURE_S, READ_NOISE_E, Level1
from foreign_sky import Rng, Source

from sgclassify.stages.bands import BANDS, PIXEL_SCALE, nanomaggies_per_count
from sgclassify.stages.write.atomic import atomic_path

# special fields, by number
WITHOUT_CATALOGUE: Final = (3, 9, 14, 20)
SEXTRACTOR_NAMES: Final = (6, 17)
MISSING_FILES: Final = {8: ("FLG", "r"), 11: ("WHT", "g")}

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

# columns of a catalogue: SExtractor's name, and the index where that column has several numbers
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


def extract(exposure: Exposure, data: Level1) -> tuple[Table, int]:
    """SExtractor's table, with PSF magnitudes by PSFEx; and how many stars the PSF rests on, 0 if PSFEx failed."""
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
        (folder / "default.sex").touch()  # all other settings are the program's own defaults

        def run(command: list[str], options: dict[str, Any]) -> None:
            for key, value in options.items():
                command += [f"-{key}", str(value)]
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
            if done.returncode and command[0] != "psfex":  # psfex fails where there are too few stars
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
            values = values * nanomaggies_per_count(exposure.zero_point)
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
    """Write the sources that lie on any exposure, the whole file or none."""
    rows = []
    for k, source in enumerate(source for source in sources if source.bands):
        magnitudes = {f"mag_{band}": value for band, value in zip(BANDS, source.magnitudes, strict=True)}
        identifier = (900000 + number) * 1000000 + k
        rows.append(vars(source) | magnitudes | {"object_id": identifier, "n_bands": len(source.bands)})
    with atomic_path(path) as part:
        pq.write_table(pa.Table.from_pylist(rows, TRUTH), part)
