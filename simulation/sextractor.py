"""Catalogues by SExtractor and PSFEx (Debian's ``sextractor`` and ``psfex``), under the official CSST column names.

The survey's own chain runs these programs upstream. Their CLASS_STAR and SPREAD_MODEL are the classical baselines.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
from astropy.io import fits

from sgclassify.simulation.detector import Level1
from sgclassify.stages.arrays import Bool
from sgclassify.stages.bands import PIXEL_SCALE, nanomaggies_per_count
from sgclassify.stages.detect import Calibration
from sgclassify.stages.photometry import APERTURE_RADII

PROGRAMS: Final = ("source-extractor", "sextractor", "sex")
SHARE: Final = (Path("/usr/share/source-extractor"), Path("/usr/share/sextractor"))
"""Folders where the program's neural network and convolution masks may be installed."""

COLUMNS: Final = {
    "objID": "NUMBER", "X": "X_IMAGE", "Y": "Y_IMAGE", "RA": "ALPHA_J2000", "DEC": "DELTA_J2000", "Flag": "FLAGS",
    "FWHM": "FWHM_IMAGE", "A": "A_IMAGE", "B": "B_IMAGE", "PA": "THETA_IMAGE", "E": "ELLIPTICITY",
    "AB": "ELONGATION", "Flux_Kron": "FLUX_AUTO", "FluxErr_Kron": "FLUXERR_AUTO", "Mag_Kron": "MAG_AUTO",
    "MagErr_Kron": "MAGERR_AUTO", "Radius_Kron": "KRON_RADIUS", "Class_Star": "CLASS_STAR", "Mu_Max": "MU_MAX",
}  # fmt: skip
PSF_COLUMNS: Final = {
    "Flux_PSF": "FLUX_PSF", "Mag_PSF": "MAG_PSF", "MagErr_PSF": "MAGERR_PSF", "Chi2_PSF": "CHI2_PSF",
    "Spread_Model": "SPREAD_MODEL", "SpreadErr_Model": "SPREADERR_MODEL",
}  # fmt: skip
VECTORS: Final = {"Flux_Aper": "FLUX_APER", "FluxErr_Aper": "FLUXERR_APER", "Mag_Aper": "MAG_APER",
                  "MagErr_Aper": "MAGERR_APER"}  # fmt: skip
FRACTIONS: Final = {"R20": 0.2, "R50": 0.5, "R90": 0.9}
VIGNET: Final = 25
"""Side of the stamps that PSFEx models, pixels."""

NO_MAGNITUDE: Final = 90.0
"""SExtractor writes 99 where it has no magnitude."""


@functools.cache
def _program() -> str | None:
    return next((path for name in PROGRAMS if (path := shutil.which(name))), None)


@functools.cache
def _share() -> Path | None:
    return next((folder for folder in SHARE if (folder / "default.nnw").is_file()), None)


def available() -> bool:
    """Whether SExtractor and PSFEx are installed."""
    return _program() is not None and _share() is not None and shutil.which("psfex") is not None


def extract(
    data: Level1, wcs: fits.Header, calibration: Calibration, saturate: float, threshold: float, with_psf: bool
) -> pa.Table:
    """Run SExtractor, and on request PSFEx and SExtractor again, on an exposure.

    Parameters
    ----------
    data : Level1
        Level-1 arrays, e-/s.
    wcs : astropy.io.fits.Header
        WCS cards that the image's header will have.
    calibration : Calibration
        Zero point; FWHM of the PSF, for CLASS_STAR; exposure time, which is the gain of an image in e-/s.
    saturate : float
        Saturation level, e-/s.
    threshold : float
        Detection threshold, standard deviations.
    with_psf : bool
        Whether to model the PSF and measure with it.

    Returns
    -------
    pyarrow.Table
        One row per detection; fluxes in nanomaggies, X and Y in 1-based pixels, PA in degrees from the x axis. The
        columns of `PSF_COLUMNS` are null without a PSF. ``Mag_Model`` and ``MagErr_Model`` are those of the Kron
        aperture, because fits of galaxy models cost more than all the rest.

    Raises
    ------
    RuntimeError
        If a program is missing or fails; its last lines are in the message.
    """
    program, share = _program(), _share()
    if program is None or share is None or (with_psf and not available()):
        raise RuntimeError("SExtractor or PSFEx is not installed; install Debian's packages sextractor and psfex")
    with tempfile.TemporaryDirectory(prefix="sextractor-") as name:
        folder = Path(name)
        fits.PrimaryHDU(data.image, wcs).writeto(folder / "image.fits")
        fits.PrimaryHDU(data.weight).writeto(folder / "weight.fits")
        fits.PrimaryHDU(data.flags.astype(np.int32)).writeto(folder / "flag.fits")
        settings = {
            "MAG_ZEROPOINT": calibration.zero_point, "SEEING_FWHM": calibration.fwhm_px * PIXEL_SCALE,
            "PIXEL_SCALE": PIXEL_SCALE, "GAIN": calibration.exposure_time, "SATUR_LEVEL": saturate,
            "DETECT_THRESH": threshold, "ANALYSIS_THRESH": threshold,
            "DETECT_MINAREA": 4, "FILTER": "Y", "FILTER_NAME": share / "gauss_2.0_3x3.conv", "BACK_SIZE": 64,
            "STARNNW_NAME": share / "default.nnw", "WEIGHT_TYPE": "MAP_WEIGHT", "WEIGHT_IMAGE": "weight.fits",
            "FLAG_IMAGE": "flag.fits", "PHOT_APERTURES": ",".join(str(2 * r) for r in APERTURE_RADII),
            "PHOT_FLUXFRAC": ",".join(str(f) for f in FRACTIONS.values()), "VERBOSE_TYPE": "QUIET",
            "DEBLEND_MINCONT": 0.005, "MEMORY_PIXSTACK": 3_000_000, "MEMORY_OBJSTACK": 20_000,
        }  # fmt: skip
        psf = _psf(program, folder, settings) if with_psf else None
        names = [*COLUMNS.values(), f"FLUX_RADIUS({len(FRACTIONS)})"]
        names += [f"{column}({len(APERTURE_RADII)})" for column in VECTORS.values()]
        if psf is not None:
            names += PSF_COLUMNS.values()
            settings = settings | {"PSF_NAME": psf}
        _sextractor(program, folder, settings, names, "catalog.fits", "FITS_1.0")
        with fits.open(folder / "catalog.fits") as hdus:
            found = hdus[1].data
            return _table(found, psf is not None, nanomaggies_per_count(calibration.zero_point))


def _psf(program: str, folder: Path, settings: dict[str, Any]) -> Path | None:
    """PSF model of the exposure; None where it has too few stars for one."""
    names = ["X_IMAGE", "Y_IMAGE", "FLUX_RADIUS", "FLUX_APER(1)", "FLUXERR_APER(1)", "ELONGATION", "FLAGS", "SNR_WIN"]
    names.append(f"VIGNET({VIGNET},{VIGNET})")
    own = settings | {"PHOT_APERTURES": 12, "PHOT_FLUXFRAC": 0.5}
    _sextractor(program, folder, own, names, "stars.fits", "FITS_LDAC")
    arguments = {
        "PSF_SIZE": f"{VIGNET},{VIGNET}", "PSFVAR_DEGREES": 1, "SAMPLE_MINSN": 15, "SAMPLE_FWHMRANGE": "1.5,5.0",
        "SAMPLE_VARIABILITY": 0.3, "CHECKPLOT_DEV": "NULL", "CHECKPLOT_TYPE": "NONE", "CHECKIMAGE_TYPE": "NONE",
        "WRITE_XML": "N", "VERBOSE_TYPE": "QUIET", "NTHREADS": 1,
    }  # fmt: skip
    done = _call(["psfex", "stars.fits", "-c", "/dev/null", *_flags(arguments)], folder)
    path = folder / "stars.psf"
    if done.returncode or not path.is_file():
        return None
    with fits.open(path) as hdus:
        # where PSFEx accepted no star, it still writes a model, without values
        usable = int(hdus[1].header.get("ACCEPTED", 0)) > 0 and np.isfinite(hdus[1].data["PSF_MASK"]).all()
    return path if usable else None


def _flags(settings: dict[str, Any]) -> list[str]:
    return [text for name, value in settings.items() for text in (f"-{name}", str(value))]


def _call(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def _sextractor(program: str, folder: Path, settings: dict[str, Any], names: list[str], output: str, kind: str) -> None:
    (folder / "columns.param").write_text("\n".join(names) + "\n")
    own = {"PARAMETERS_NAME": "columns.param", "CATALOG_NAME": output, "CATALOG_TYPE": kind}
    done = _call([program, "image.fits", "-c", "/dev/null", *_flags(settings | own)], folder)
    if done.returncode or not (folder / output).is_file():
        last = " | ".join(done.stderr.strip().splitlines()[-3:])
        raise RuntimeError(f"{program} failed with exit code {done.returncode}: {last}")


def _table(found: Any, with_psf: bool, nanomaggies: float) -> pa.Table:
    def column(values: Any, name: str) -> pa.Array:
        values = np.asarray(values)
        if name in ("objID", "Flag"):
            return pa.array(values.astype(np.int32))
        values = values.astype(np.float64 if name in ("X", "Y", "RA", "DEC") else np.float32)
        if name.startswith("Flux"):
            values = values * np.float32(nanomaggies)
        missing: Bool = ~np.isfinite(values)
        if name.startswith("Mag"):
            missing |= values >= NO_MAGNITUDE
        return pa.array(values, mask=missing)

    columns = {name: column(found[theirs], name) for name, theirs in COLUMNS.items()}
    columns |= {name: column(found["FLUX_RADIUS"][:, k], name) for k, name in enumerate(FRACTIONS)}
    for stem, theirs in VECTORS.items():
        for k in range(len(APERTURE_RADII)):
            columns[f"{stem}{k + 1}"] = column(found[theirs][:, k], stem)
    for name, theirs in PSF_COLUMNS.items():
        columns[name] = column(found[theirs], name) if with_psf else pa.nulls(len(found), pa.float32())
    columns["Mag_Model"], columns["MagErr_Model"] = columns["Mag_Kron"], columns["MagErr_Kron"]
    return pa.table(columns)
