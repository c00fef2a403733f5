"""The detectors of the camera, and the sky positions of their pixels in an exposure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS

from sgclassify.stages.arrays import F64
from sgclassify.stages.bands import DETECTOR_FILTER, PIXEL_SCALE

CHIPS_OF_BAND: Final[dict[str, tuple[int, ...]]] = {
    band: tuple(chip for chip, name in sorted(DETECTOR_FILTER.items()) if name == band)
    for band in dict.fromkeys(DETECTOR_FILTER.values())
}
"""Detector numbers by filter."""


def chip_center(chip: int) -> tuple[float, float]:
    """Centre of detector 1 to 30 from the tangent point of the focal plane, pixels (x, y) (FORMATS, section 1).

    Raises ``ValueError`` if there is no such detector.
    """
    if chip not in DETECTOR_FILTER:
        raise ValueError(f"no detector {chip}")
    row, column = (chip - 1) % 5 + 1, 6 - (chip - 1) // 5
    x = 4875.0 * (2 * (column - 1) - 5)
    if chip >= 26 or chip == 21:
        x -= 775.0
    elif chip <= 5 or chip == 10:
        x += 775.0
    return x, 10130.0 * (row - 3)


@dataclass(frozen=True, slots=True)
class Pointing:
    """Where one detector looks.

    Attributes
    ----------
    chip : int
        Detector number.
    shape : tuple of int
        (ny, nx), pixels. A detector smaller than the real one is the middle of the real one.
    ra, dec : float
        Sky position of the middle of the detector, degrees.
    roll_deg : float
        Rotation of the detector, degrees: angle from north to the y axis through east for an image of usual parity.
    mirrored : bool
        Whether the image has the other parity (east to the right when north is up).
    distortion : float
        Cubic radial distortion, deg^-2: written as TPV; 0 writes TAN.
    """

    chip: int
    shape: tuple[int, int]
    ra: float
    dec: float
    roll_deg: float
    mirrored: bool = False
    distortion: float = 0.0


def wcs_header(pointing: Pointing) -> fits.Header:
    """World coordinates of a pointing: CTYPE, CRVAL, CRPIX, CD and, with a distortion, PV cards.

    The tangent point is that of the focal plane, so it may lie far outside the detector.
    """
    x_chip, y_chip = chip_center(pointing.chip)
    ny, nx = pointing.shape
    roll = np.radians(pointing.roll_deg)
    parity = 1.0 if pointing.mirrored else -1.0
    scale = PIXEL_SCALE / 3600.0
    projection = "TPV" if pointing.distortion else "TAN"
    header = fits.Header()
    header["WCSAXES"] = 2
    header["CTYPE1"], header["CTYPE2"] = f"RA---{projection}", f"DEC--{projection}"
    header["CUNIT1"], header["CUNIT2"] = "deg", "deg"
    header["CRVAL1"], header["CRVAL2"] = pointing.ra, pointing.dec
    header["CRPIX1"], header["CRPIX2"] = (nx + 1) / 2 - x_chip, (ny + 1) / 2 - y_chip
    header["CD1_1"], header["CD1_2"] = parity * scale * np.cos(roll), scale * np.sin(roll)
    header["CD2_1"], header["CD2_2"] = -parity * scale * np.sin(roll), scale * np.cos(roll)
    header["RADESYS"], header["EQUINOX"] = "ICRS", 2000.0
    if pointing.distortion:
        for axis in (1, 2):
            header[f"PV{axis}_1"] = 1.0
            header[f"PV{axis}_7"] = header[f"PV{axis}_9"] = pointing.distortion
    # Move the tangent point until the middle of the detector looks at (ra, dec).
    for _ in range(20):
        ra, dec = WCS(header).all_pix2world((nx - 1) / 2, (ny - 1) / 2, 0)
        error_ra = (pointing.ra - float(ra) + 180.0) % 360.0 - 180.0
        error_dec = pointing.dec - float(dec)
        header["CRVAL1"] = (header["CRVAL1"] + error_ra) % 360.0
        header["CRVAL2"] += error_dec
        if abs(error_ra) < 1e-10 and abs(error_dec) < 1e-10:
            break
    return header


def shifted(header: fits.Header, east_arcsec: float, north_arcsec: float) -> fits.Header:
    """Copy of a WCS header, its reference position shifted on the sky: an error of astrometric calibration."""
    moved = header.copy()
    moved["CRVAL1"] += east_arcsec / 3600.0 / np.cos(np.radians(header["CRVAL2"]))
    moved["CRVAL2"] += north_arcsec / 3600.0
    return moved


def jacobian(wcs: WCS, shape: tuple[int, int]) -> F64:
    """Pixels per arcsec at the middle of a detector of `shape` (ny, nx).

    Returns
    -------
    ndarray, float64, shape (2, 2)
        ``J @ (east, north)`` in arcsec is the offset (x, y) in pixels.
    """
    x, y = (shape[1] - 1) / 2, (shape[0] - 1) / 2
    step = 5.0
    ra, dec = wcs.all_pix2world([x, x + step, x], [y, y, y + step], 0)
    east = ((ra[1:] - ra[0] + 180.0) % 360.0 - 180.0) * np.cos(np.radians(dec[0])) * 3600.0
    north = (dec[1:] - dec[0]) * 3600.0
    return np.asarray(np.linalg.inv(np.stack([east, north]) / step))
