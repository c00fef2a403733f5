"""The headers of an exposure: band, calibration, WCS. Reads no pixels."""

from __future__ import annotations

import hashlib
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy.typing as npt
from astropy.wcs import WCS

from sgclassify.stages.arrays import F64
from sgclassify.stages.bands import BANDS, DETECTOR_FILTER, PIXEL_SCALE, SLITLESS
from sgclassify.stages.errors import SlitlessExposureError, UnusableInputError
from sgclassify.stages.read.cards import Value, as_number
from sgclassify.stages.read.fitsfile import Hdu, first_image
from sgclassify.stages.read.names import ExposureFiles, catalog_stem, exposure_stem, parse_name
from sgclassify.stages.read.wcs import WCS_KEY, build_wcs, check_wcs, right_ascension, transform, wcs_cards

NO_VALUE: Final = -9999.0
"""What the CSST pipelines write for "no value" (FORMATS: CAT columns)."""

SCALE_TOLERANCE: Final = 0.05
"""Relative difference from the camera's pixel scale above which a note is made. The image is then binned or resampled,
and its noise differs from that of the pixels that the model was trained on."""

FWHM_RANGE_PX: Final = (1.0, 6.0)
"""Accepted FWHM of the PSF, pixels; the camera's is about 2. Values outside are in arcsec or from a failed fit."""

ZERO_POINT_RANGE: Final = (10.0, 40.0)
"""Accepted zero points, AB mag of 1 e-/s; the camera's lie between 23 and 27."""

_BAND_BY_NAME: Final = {name.lower(): name for name in (*BANDS, *SLITLESS)}


@dataclass(frozen=True, slots=True)
class ExposureHeader:
    """One detector image, as its headers describe it.

    Attributes
    ----------
    exposure_id : str
        Stem of the image's name: unique key of the exposure in a run.
    catalog_stem : str
        Name of the CAT without extension; where CAT is missing, the name that it would have.
    files : ExposureFiles
        IMG, and WHT, FLG, CAT where they exist.
    obsid : str
        Observation number; empty if neither header nor name has one.
    chip : int or None
        Detector number, 1 to 30.
    band : str
        One of `sgclassify.stages.bands.BANDS`.
    shape : (int, int)
        Rows and columns of the image: (ny, nx).
    wcs_cards : str
        The WCS, as cards of 80 characters in a fixed form (see `sgclassify.stages.read.wcs.wcs_cards`).
    pixel_scale : float
        Side of a pixel at the centre of the image, arcsec.
    zero_point : float
        AB magnitude of 1 e-/s.
    exposure_time : float
        Seconds; NaN where the header has no value, as for the numbers below.
    gain : float
        e-/ADU.
    read_noise : float
        e-.
    saturate, sky_background, sky_rms : float
        e-/s per pixel.
    fwhm_px : float
        FWHM of the PSF, pixels.
    date_obs : str
        Start of the observation, as in the header; empty if absent.
    notes : tuple of str
        Oddities for the operator that do not stop the run.
    """

    exposure_id: str
    catalog_stem: str
    files: ExposureFiles
    obsid: str
    chip: int | None
    band: str
    shape: tuple[int, int]
    wcs_cards: str
    pixel_scale: float
    zero_point: float
    exposure_time: float
    gain: float
    read_noise: float
    saturate: float
    sky_background: float
    sky_rms: float
    fwhm_px: float
    date_obs: str
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return f"exposure {self.exposure_id}"

    @property
    def exposure_key(self) -> int:
        """42-bit hash of `exposure_id`; object identifiers are made from it."""
        digest = hashlib.blake2b(self.exposure_id.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 22

    @property
    def centre(self) -> tuple[float, float]:
        """RA and Dec of the centre of the image, degrees."""
        ny, nx = self.shape
        ra, dec = self.pixel_to_sky((nx - 1) / 2, (ny - 1) / 2)
        return float(ra), float(dec)

    def wcs(self) -> WCS:
        """Celestial WCS of the image. Do not change it: the thread shares one object."""
        return build_wcs(self.wcs_cards)

    def pixel_to_sky(self, x: npt.ArrayLike, y: npt.ArrayLike) -> tuple[F64, F64]:
        """Sky positions, ICRS degrees, 0 <= ra < 360, of pixel positions: columns and rows, of any shape.

        Pixels are 0-based: the centre of the first is 0.0. NaN where the position is not finite or is not on the sky.
        """
        ra, dec = transform(self.wcs(), x, y, forward=True)
        return right_ascension(ra), dec

    def sky_to_pixel(self, ra: npt.ArrayLike, dec: npt.ArrayLike) -> tuple[F64, F64]:
        """Pixel positions of sky positions: the inverse of `pixel_to_sky`; NaN where there is none."""
        return transform(self.wcs(), ra, dec, forward=False)


def read_header(files: ExposureFiles) -> ExposureHeader:
    """Read the headers of IMG, WHT and FLG, and refuse an exposure that can never be used; CAT is not opened.

    Raises
    ------
    SlitlessExposureError
        If the detector is slitless.
    UnusableInputError
        If a file is missing, damaged or truncated, the shapes differ, or the band, the zero point or the WCS
        is missing or out of range.
    """
    path = files.image
    image, hdus = first_image(path)
    words = _Keywords(path, image, hdus[0])
    name = parse_name(path)
    chip = _chip(words, name.chip if name else None)
    band = _band(words, chip)
    obsid = words.text("OBSID") or (name.obsid if name else "")
    nx, ny = image.axes
    source = image if image.values.get("CTYPE1") is not None else hdus[0]
    words.note_repeats(source, *sorted(filter(WCS_KEY.fullmatch, source.repeated)))
    cards = wcs_cards(source.values, path)
    scale = check_wcs(cards, (ny, nx), path)
    if abs(scale / PIXEL_SCALE - 1.0) > SCALE_TOLERANCE:
        words.notes.append(f"the pixel scale is {scale:.3g} arcsec, the camera's {PIXEL_SCALE}: binned or resampled?")
    _check_companions(files, words, (ny, nx))
    exposure_time = words.number("EXPTIME", above=0)
    if words.value("EXPTIME") is None:
        words.notes.append("no EXPTIME: the photon noise of sources is left out")
    unit = words.text("BUNIT")
    if re.search(r"adu|dn\b", unit.lower()):
        words.notes.append(f"BUNIT is {unit}: taken for e-/s, as the zero point says")
    header = ExposureHeader(
        exposure_id=exposure_stem(path),
        catalog_stem=catalog_stem(files),
        files=files,
        obsid=obsid,
        chip=chip,
        band=band,
        shape=(ny, nx),
        wcs_cards=cards,
        pixel_scale=scale,
        zero_point=_zero_point(words),
        exposure_time=exposure_time,
        gain=words.number("GAIN1", "GAIN01", "GAIN", above=0),
        read_noise=words.number("RDNOISE1", "RDNOIS01", "RDNOISE"),
        saturate=words.number("SATURATE", above=0),
        sky_background=words.number("SKY_BKG"),
        sky_rms=words.number("SKY_RMS", above=0),
        fwhm_px=words.number("FWHM", above=FWHM_RANGE_PX[0], below=FWHM_RANGE_PX[1]),
        date_obs=words.text("DATE-OBS"),
        notes=(*words.notes, *_missing(files)),
    )
    if files.weight is None and not has_noise_model(header):
        fault = "no WHT file, and no EXPTIME with RDNOISE1, nor SKY_RMS, to derive the weight from"
        raise UnusableInputError(path, fault, "deliver the WHT file")
    return header


def has_noise_model(header: ExposureHeader) -> bool:
    """Whether the header is enough to derive the variance of a pixel, for exposures without WHT."""
    if math.isfinite(header.exposure_time) and math.isfinite(header.read_noise):
        return True
    return math.isfinite(header.sky_rms)


class _Keywords:
    """Keywords of the image HDU, or of the primary HDU where the image HDU lacks them; collects notes."""

    def __init__(self, path: Path, *hdus: Hdu) -> None:
        self.path = path
        self.hdus = hdus
        self.notes: list[str] = []

    def value(self, *keys: str) -> Value:
        """First value found, trying the keys in order; None where there is none."""
        for key in keys:
            for hdu in self.hdus:
                value = hdu.values.get(key)
                if value is not None and value != "":
                    self.note_repeats(hdu, key)
                    return value
        return None

    def note_repeats(self, hdu: Hdu, *keys: str) -> None:
        """Note each keyword that occurs more than once with different values; one note per keyword."""
        for key in keys:
            note = f"{key} occurs more than once, with different values: the first counts"
            if key in hdu.repeated and note not in self.notes:
                self.notes.append(note)

    def text(self, *keys: str) -> str:
        """First value found as text; empty where there is none."""
        value = self.value(*keys)
        return "" if value is None else str(value).strip()

    def number(self, *keys: str, above: float = -math.inf, below: float = math.inf) -> float:
        """First value found as a number; NaN where there is none, NaN and a note where it is out of range."""
        value = self.value(*keys)
        number = as_number(value)
        if value is None or number == NO_VALUE:
            return math.nan
        if not (math.isfinite(number) and above < number < below):
            self.notes.append(f"{keys[0]} is {value!r}: ignored")
            return math.nan
        return number


def _chip(words: _Keywords, from_name: int | None) -> int | None:
    text = words.text("DETECTOR", "CHIPID")
    match = re.search(r"(\d+)\s*$", text)
    chip = int(match[1]) if match else None
    if chip is not None and from_name is not None and chip != from_name:
        words.notes.append(f"DETECTOR says chip {chip}, the file name {from_name}: DETECTOR is believed")
    return chip if chip is not None else from_name


def _band(words: _Keywords, chip: int | None) -> str:
    expected = DETECTOR_FILTER.get(chip) if chip is not None else None
    text = words.text("FILTER")
    if not text:
        if expected in SLITLESS:
            raise SlitlessExposureError(words.path, f"slitless detector {chip} ({expected})", "nothing to do")
        fault = f"no FILTER in the header of {words.hdus[0].label}, nor in the first"
        raise UnusableInputError(words.path, fault, "add the keyword")
    band = _BAND_BY_NAME.get(text.lower())
    if band is None:
        advice = f"known are {' '.join(BANDS)}"
        raise UnusableInputError(words.path, f"unknown FILTER {text!r}", advice)
    if band in SLITLESS:
        raise SlitlessExposureError(words.path, f"slitless filter {band}", "nothing to do")
    if expected is not None and expected != band:
        words.notes.append(f"FILTER is {band}, but detector {chip} carries {expected}: FILTER is believed")
    return band


def _zero_point(words: _Keywords) -> float:
    value = words.value("ZP", "CCDZP")
    if value is None or as_number(value) == NO_VALUE:
        raise UnusableInputError(words.path, "no zero point (ZP or CCDZP)", "calibrate the exposure")
    number = as_number(value)
    low, high = ZERO_POINT_RANGE
    if not math.isfinite(number) or not low <= number <= high:
        fault = f"the zero point {value!r} is no AB magnitude of 1 e-/s"
        raise UnusableInputError(words.path, fault, f"expected is a number from {low:g} to {high:g}")
    return number


def _missing(files: ExposureFiles) -> list[str]:
    notes = {
        "no WHT file: weights derived from the noise model": files.weight,
        "no FLG file: only saturation is flagged": files.flag,
        "no CAT file: sources are detected by the stage": files.catalog,
    }
    return [note for note, path in notes.items() if path is None]


def _check_companions(files: ExposureFiles, words: _Keywords, shape: tuple[int, int]) -> None:
    for kind, path in (("WHT", files.weight), ("FLG", files.flag)):
        if path is None:
            continue
        hdu, hdus = first_image(path)
        nx, ny = hdu.axes
        if (ny, nx) != shape:
            fault = f"{kind} is {nx} x {ny} pixels, its IMG {shape[1]} x {shape[0]}"
            raise UnusableInputError(path, fault, "deliver the file that belongs to the image")
        others = _Keywords(path, hdu, hdus[0])
        for key in ("OBSID", "DETECTOR"):
            mine, theirs = words.text(key).lstrip("0"), others.text(key).lstrip("0")
            if mine and theirs and mine != theirs:
                fault = f"{key} of {kind} is {theirs}, of its IMG {mine}"
                raise UnusableInputError(path, fault, "deliver the file that belongs to the image")
