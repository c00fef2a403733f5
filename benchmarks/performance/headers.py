"""Simulated headers of many exposures, for the plan. Sparse files of the camera's full size take little disk space."""

from __future__ import annotations

from pathlib import Path

from astropy.io import fits

from sgclassify.simulation.camera import CHIPS_OF_BAND
from sgclassify.stages.bands import BANDS, PIXEL_SCALE, REAL_SHAPE

NY, NX = REAL_SHAPE
SCALE = PIXEL_SCALE / 3600
BLOCK = 2880


def header(ra: float, dec: float, band: str, chip: int) -> bytes:
    """Primary and image header of a detector that looks at a position (degrees)."""
    primary = fits.PrimaryHDU().header
    primary["DETECTOR"] = f"CHIP{chip:02d}"
    image = fits.Header()
    image["XTENSION"], image["BITPIX"], image["NAXIS"] = "IMAGE", -32, 2
    image["NAXIS1"], image["NAXIS2"], image["PCOUNT"], image["GCOUNT"] = NX, NY, 0, 1
    image["FILTER"], image["EXPTIME"], image["GAIN1"], image["RDNOISE1"] = band, 150.0, 1.1, 5.0
    image["ZP"], image["SATURATE"], image["SKY_BKG"], image["SKY_RMS"] = 25.8, 600.0, 0.2, 0.05
    image["FWHM"] = 2.1
    image["CTYPE1"], image["CTYPE2"] = "RA---TAN", "DEC--TAN"
    image["CRVAL1"], image["CRVAL2"] = ra, dec
    image["CRPIX1"], image["CRPIX2"] = NX / 2, NY / 2
    image["CD1_1"], image["CD1_2"], image["CD2_1"], image["CD2_2"] = -SCALE, 0.0, 0.0, SCALE
    text = primary.tostring() + image.tostring()
    return bytes(text.encode("ascii"))


def simulate(folder: Path, count: int) -> Path:
    """Write `count` exposures with headers only, seven per field; returns the list."""
    bands = {band: CHIPS_OF_BAND[band][0] for band in BANDS}
    size = -(-NX * NY * 4 // BLOCK) * BLOCK
    names = []
    for number in range(count):
        field, (band, chip) = number // 7, list(bands.items())[number % 7]
        ra, dec = (field % 800) * 0.45, -60.0 + (field // 800) * 0.19
        name = f"CSST_MSC_MS_SIM_20270101000000_20270101000230_{number:011d}_{chip:02d}_L1_V01_IMG.fits"
        path = folder / f"{field // 1000:04d}" / name
        path.parent.mkdir(exist_ok=True)
        text = header(ra, dec, band, chip)
        with path.open("wb") as stream:
            stream.write(text)
            stream.truncate(len(text) + size)
        names.append(str(path))
    listed = folder / "list.txt"
    listed.write_text("\n".join(names) + "\n")
    return listed
