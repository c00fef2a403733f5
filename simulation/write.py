"""Write one simulated exposure as Level-1 FITS files (FORMATS, section 2)."""

from __future__ import annotations

import contextlib
import io
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from astropy.io import fits

from sgclassify.simulation.catalog import catalog_hdu
from sgclassify.simulation.detector import DetectorModel, Level1
from sgclassify.stages.write.atomic import atomic_path

FIRST_EXPOSURE: Final = datetime(2028, 6, 10, 0, 0, 0)
"""Start of the first simulated exposure."""


@dataclass(frozen=True, slots=True)
class ExposureLabels:
    """Names and numbers of one exposure that go into file names and headers.

    Attributes
    ----------
    obsid : str
        Observation number, 11 digits.
    chip : int
        Detector number.
    band : str
        Filter.
    start : datetime
        Start of the exposure.
    zero_point : float
        AB magnitude of 1 e-/s that the header claims.
    sky_level, sky_rms : float
        Sky background and noise of an empty pixel, e-/s.
    fwhm_px : float
        FWHM of the PSF, pixels; NaN leaves the keyword out.
    compressed : bool
        Whether the images are tile-compressed (``.fits.fz``).
    variant : bool
        Whether the other spelling of the keywords (ZP for CCDZP, GAIN1 for GAIN01, RDNOISE1 for RDNOIS01)
        and the older lower-case file names are used.
    """

    obsid: str
    chip: int
    band: str
    start: datetime
    zero_point: float
    sky_level: float
    sky_rms: float
    fwhm_px: float
    compressed: bool = False
    variant: bool = False

    def file_name(self, kind: str) -> str:
        """Name of the file of a kind (IMG, WHT, FLG, CAT), extension included."""
        start = self.start.strftime("%Y%m%d%H%M%S")
        stop = (self.start + timedelta(seconds=150)).strftime("%Y%m%d%H%M%S")
        extension = ".fits.fz" if self.compressed and kind != "CAT" else ".fits"
        stem = f"CSST_MSC_MS_SIM_{start}_{stop}_{self.obsid}_{self.chip:02d}"
        if self.variant:
            level = "" if kind == "CAT" else "_L1"
            return f"{stem}_{kind.lower()}{level}{extension}"
        return f"{stem}_L1_V01_{kind}{extension}"


def write_exposure(
    folder: Path, labels: ExposureLabels, data: Level1, catalog: pa.Table | None, wcs: fits.Header,
    detector: DetectorModel,
) -> Path:  # fmt: skip
    """Write IMG, WHT, FLG and, if given, CAT into a folder, which is made if missing; returns the IMG file.

    IMG is written last: an exposure that has its image is complete. The headers get the WCS cards and the detector's
    properties.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cards = _image_cards(labels, wcs, detector, data.cosmic_rays)
    if catalog is not None:
        table = catalog_hdu(catalog, labels.obsid, labels.chip, labels.band)
        table.header.extend(_image_cards(labels, fits.Header(), detector, data.cosmic_rays), update=True)
        _write(folder / labels.file_name("CAT"), [_primary(labels, wcs, detector, "CAT"), table])
    for kind, array in (("FLG", data.flags), ("WHT", data.weight), ("IMG", data.image)):
        own = cards.copy()
        if kind == "IMG":
            own["BUNIT"] = "e-/s"
        hdu = _image_hdu(array, own, kind, labels.compressed)
        _write(folder / labels.file_name(kind), [_primary(labels, wcs, detector, kind), hdu])
    return folder / labels.file_name("IMG")


def _image_hdu(array: Any, cards: fits.Header, kind: str, compressed: bool) -> Any:
    if not compressed:
        return fits.ImageHDU(array, cards, name=kind)
    # SUBTRACTIVE_DITHER_2 keeps zeros exact, which WHT needs. The seed is fixed, so the bytes are the same every time.
    return fits.CompImageHDU(
        array, cards, name=kind, compression_type="RICE_1", quantize_level=16.0, quantize_method=2, dither_seed=1
    )


def _primary(labels: ExposureLabels, wcs: fits.Header, detector: DetectorModel, kind: str) -> fits.PrimaryHDU:
    hdu = fits.PrimaryHDU()
    hdu.header.update({
        "TELESCOP": "CSST", "INSTRUME": "MSC", "OBSID": labels.obsid, "OBSTYPE": "SIM",
        "DATE-OBS": labels.start.isoformat(timespec="seconds"), "EXPTIME": detector.exposure_time,
        "DETECTOR": f"CHIP{labels.chip:02d}", "RA_OBJ": wcs["CRVAL1"], "DEC_OBJ": wcs["CRVAL2"],
        "FILEKIND": kind,
    })  # fmt: skip
    return hdu


def _image_cards(labels: ExposureLabels, wcs: fits.Header, detector: DetectorModel, cosmic_rays: int) -> fits.Header:
    cards = wcs.copy()
    cards["FILTER"] = labels.band
    cards["CHIPID"] = labels.chip
    # Level-1 images are in electrons, but the keyword keeps the gain of the read-out.
    cards["GAIN1" if labels.variant else "GAIN01"] = detector.gain
    cards["RDNOISE1" if labels.variant else "RDNOIS01"] = detector.read_noise
    cards["CCDZP" if labels.variant else "ZP"] = labels.zero_point
    cards["SATURATE"] = detector.saturate
    cards["CRCOUNT"] = cosmic_rays
    cards["SKY_BKG"] = labels.sky_level
    cards["SKY_RMS"] = labels.sky_rms
    if np.isfinite(labels.fwhm_px):
        cards["FWHM"] = round(labels.fwhm_px, 3)
    return cards


def _write(path: Path, hdus: list[Any]) -> None:
    # Checksums belong to the stored form. Their comments get no time of day, which would change the bytes.
    stored = fits.HDUList(hdus)
    with contextlib.ExitStack() as stack:
        if any(isinstance(hdu, fits.CompImageHDU) for hdu in hdus):
            raw = io.BytesIO()
            stored.writeto(raw)
            raw.seek(0)
            opened = fits.open(raw, disable_image_compression=True, do_not_scale_image_data=True)
            stored = stack.enter_context(opened)
        for hdu in stored:
            hdu.add_checksum(when="")
        with atomic_path(path) as part:
            stored.writeto(part)


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file whole or not at all."""
    with atomic_path(path) as part:
        pq.write_table(table, part, compression="zstd")


def start_of(number: int) -> datetime:
    """Start of the exposure with a running number: one every five minutes."""
    return FIRST_EXPOSURE + timedelta(minutes=5 * int(np.int64(number)))
