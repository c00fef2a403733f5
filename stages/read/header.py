"""What the headers of an exposure say: band, calibration, WCS. Reads no pixel."""

from __future__ import annotations

import hashlib
import math
import re
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from astropy.io.fits import Header
from astropy.wcs import WCS, WcsError

from sgclassify.stages.bands import BANDS, DETECTOR_FILTER, PIXEL_SCALE, SLITLESS
from sgclassify.stages.errors import UnusableInputError
from sgclassify.stages.read.fitsfile import Hdu, Value, first_image
from sgclassify.stages.read.names import ExposureFiles, catalog_stem, exposure_stem, parse_name

F64 = npt.NDArray[np.float64]

NO_VALUE: Final = -9999.0
"""What the CSST pipelines write for "no value" (FORMATS: CAT columns)."""

PIXEL_SCALE_RANGE: Final = (0.01, 1.0)
"""Accepted pixel scales, arcsec. Beyond them CD is in another unit or wrong."""

SCALE_TOLERANCE: Final = 0.05
"""How far (as a share) another pixel scale is from the camera's where it is worth a note: images that are binned or
resampled, whose noise is not that of the pixels that the model has learnt from."""

MAX_ANISOTROPY: Final = 2.0
"""Largest accepted ratio of the pixel scales along the two axes; an undistorted camera has 1."""

MAX_ROUND_TRIP_PX: Final = 0.1
"""Largest accepted error of pixel -> sky -> pixel: above it the distortion polynomial does not invert."""

FWHM_RANGE_PX: Final = (1.0, 6.0)
"""Accepted FWHM of the PSF, pixels; the camera's is about 2. One in arcsec or of a failed fit tells nothing."""

ZERO_POINT_RANGE: Final = (10.0, 40.0)
"""Accepted zero points, AB mag of 1 e-/s; those of the camera lie between 23 and 27."""

_BAND_BY_NAME: Final = {name.lower(): name for name in (*BANDS, *SLITLESS)}
_LINEAR_KEY = re.compile(r"(?:CD|PC)[12]_[12]|C(?:DELT|ROTA)[12]")
_WCS_KEY = re.compile(
    r"(?:WCSAXES|C(?:TYPE|UNIT|RVAL|RPIX|DELT|ROTA)[12]|CD[12]_[12]|PC[12]_[12]|PV[12]_\d+|LONPOLE|LATPOLE"
    r"|RADESYS|EQUINOX|(?:A|B|AP|BP)_(?:ORDER|\d_\d))"
)
_SIP_KEY = re.compile(r"(?:A|B|AP|BP)_(?:ORDER|\d_\d)")
_PV_KEY = re.compile(r"PV[12]_(\d+)")


class SlitlessExposureError(UnusableInputError):
    """The exposure is a slitless spectrum, which shows nothing to classify: skipped, no fault of the file."""


@dataclass(frozen=True, slots=True)
class ExposureHeader:
    """One detector image, as its headers describe it.

    Attributes
    ----------
    exposure_id : str
        Stem of the image's name: unique key of the exposure in a run.
    catalog_stem : str
        Name of the CAT without extension; where CAT is missing, the name it would have had.
    files : ExposureFiles
        IMG, and WHT, FLG, CAT where they are.
    obsid : str
        Observation number; empty if neither header nor name has one.
    chip : int or None
        Detector number, 1 to 30.
    band : str
        One of `sgclassify.stages.bands.BANDS`.
    shape : (int, int)
        Rows and columns of the image: (ny, nx).
    wcs_cards : str
        The WCS cards of the image header, 80 characters each.
    pixel_scale : float
        Side of a pixel at the centre of the image, arcsec.
    zero_point : float
        AB magnitude of 1 e-/s.
    exposure_time : float
        Seconds.
    gain : float
        e-/ADU.
    read_noise : float
        e-.
    saturate, sky_background, sky_rms : float
        e-/s per pixel.
    fwhm_px : float
        FWHM of the PSF, pixels. Of these numbers, nan stands for one that the header does not have.
    date_obs : str
        Start of the observation, as the header writes it; empty if absent.
    notes : tuple of str
        What an operator may want to know, and the run can live with.
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
        """42-bit hash of `exposure_id`, from which object identifiers are made."""
        digest = hashlib.blake2b(self.exposure_id.encode("utf-8", "surrogateescape"), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 22

    def wcs(self) -> WCS:
        """Celestial WCS of the image; do not change it, it is shared within a thread."""
        return build_wcs(self.wcs_cards)

    def pixel_to_sky(self, x: npt.ArrayLike, y: npt.ArrayLike) -> tuple[F64, F64]:
        """Sky positions of pixel positions.

        Parameters
        ----------
        x, y : array_like
            Columns and rows, 0-based, the centre of the first pixel being 0.0; any shape, not finite allowed.

        Returns
        -------
        ra, dec : float64 arrays
            Degrees, ICRS, 0 <= ra < 360; nan where the position is not finite or has no counterpart.
        """
        ra, dec = _transform(self.wcs(), x, y, forward=True)
        return np.where(np.isfinite(ra), ra % 360.0, np.nan), dec

    def sky_to_pixel(self, ra: npt.ArrayLike, dec: npt.ArrayLike) -> tuple[F64, F64]:
        """Pixel positions of sky positions: the inverse of `pixel_to_sky`, nan where there is none."""
        return _transform(self.wcs(), ra, dec, forward=False)


def read_header(files: ExposureFiles) -> ExposureHeader:
    """Read the headers of an exposure, and refuse what can never be used.

    Parameters
    ----------
    files : ExposureFiles
        The files of the exposure. IMG, WHT and FLG are opened (headers only), CAT is not.

    Returns
    -------
    ExposureHeader

    Raises
    ------
    SlitlessExposureError
        If the detector is a slitless one.
    UnusableInputError
        If a file is missing, damaged or truncated, the shapes differ, or the band, the zero point or the WCS
        is missing or makes no sense.
    """
    path = files.image
    image, hdus = first_image(path)
    words = _Keywords(path, image, hdus[0])
    name = parse_name(path)
    chip = _chip(words, name.chip if name else None)
    band = _band(words, chip)
    obsid = words.text("OBSID") or (name.obsid if name else "")
    nx, ny = image.axes
    cards = _wcs_cards(image, hdus[0], path)
    scale = _check_wcs(cards, (ny, nx), path)
    if abs(scale / PIXEL_SCALE - 1.0) > SCALE_TOLERANCE:
        words.notes.append(
            f"the pixel scale is {scale:.3g} arcsec, the camera's {PIXEL_SCALE}: binned or resampled?"
        )
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
    """Whether the variance of a pixel can be derived from the header, for exposures without WHT."""
    if math.isfinite(header.exposure_time) and math.isfinite(header.read_noise):
        return True
    return math.isfinite(header.sky_rms)


def build_wcs(cards: str) -> WCS:
    """WCS from its cards, cached.

    One object a thread: wcslib converts undefined values in place during a transformation, so that two
    threads must not use the same object at once.
    """
    return _build_wcs(cards, threading.get_ident())


@lru_cache(maxsize=128)
def _build_wcs(cards: str, _thread: int) -> WCS:
    # fix=False: the cards were chosen and put right in _wcs_cards; "fixing" would warn about dates and units.
    return WCS(Header.fromstring(cards), naxis=2, fix=False)


def _transform(wcs: WCS, a: npt.ArrayLike, b: npt.ArrayLike, forward: bool) -> tuple[F64, F64]:
    first, second = np.broadcast_arrays(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64))
    out = np.full((2, first.size), np.nan)
    good = (np.isfinite(first) & np.isfinite(second)).ravel()
    if good.any():
        pairs = (first.ravel()[good], second.ravel()[good])
        if forward:
            out[:, good] = wcs.all_pix2world(*pairs, 0)
        elif wcs.sip is not None:
            # quiet: what does not converge is no reason to lose the rest; read_header has checked the image.
            out[:, good] = wcs.all_world2pix(*pairs, 0, quiet=True)
        else:
            # TAN and TPV are inverted by wcslib itself.
            out[:, good] = wcs.wcs_world2pix(*pairs, 0)
    out[:, ~np.isfinite(out).all(axis=0)] = np.nan
    return out[0].reshape(first.shape), out[1].reshape(first.shape)


class _Keywords:
    """Keywords of the image HDU and, where that lacks them, of the primary HDU; collects notes."""

    def __init__(self, path: Path, *hdus: Hdu) -> None:
        self.path = path
        self.hdus = hdus
        self.notes: list[str] = []

    def value(self, *keys: str) -> Value:
        """First value found, the keys in order of preference; None where there is none."""
        for key in keys:
            for hdu in self.hdus:
                value = hdu.values.get(key)
                if value is not None and value != "":
                    return value
        return None

    def text(self, *keys: str) -> str:
        """First value found as text; empty where there is none."""
        value = self.value(*keys)
        return "" if value is None else str(value).strip()

    def number(self, *keys: str, above: float = -math.inf, below: float = math.inf) -> float:
        """First value found as a number; nan where there is none, nan and a note where it makes no sense."""
        value = self.value(*keys)
        number = as_number(value)
        if value is None or number == NO_VALUE:
            return math.nan
        if not (math.isfinite(number) and above < number < below):
            self.notes.append(f"{keys[0]} is {value!r}: ignored")
            return math.nan
        return number


def as_number(value: Value) -> float:
    """A header value as a float; nan where it is no number."""
    if value is None or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except ValueError:
        return math.nan


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


def _wcs_cards(image: Hdu, primary: Hdu, path: Path) -> str:
    """Pick the WCS cards of an image header, and put right what would make astropy warn."""
    source = image if image.values.get("CTYPE1") is not None else primary
    values, texts = source.values, dict(source.texts)
    kinds = [str(values.get(f"CTYPE{k}", "")).strip().upper() for k in (1, 2)]
    if not (kinds[0].startswith("RA--") and kinds[1].startswith("DEC-")):
        raise _bad_wcs(
            path, f"CTYPE is {kinds[0] or 'missing'}, {kinds[1] or 'missing'}; RA and DEC are needed"
        )
    for key in ("CRVAL1", "CRVAL2", "CRPIX1", "CRPIX2"):
        if not math.isfinite(as_number(values.get(key))):
            raise _bad_wcs(path, f"{key} is {values.get(key)!r}")
    if abs(as_number(values["CRVAL2"])) > 90:
        raise _bad_wcs(path, f"CRVAL2 is {values['CRVAL2']}, no declination")
    equinox = as_number(values.get("EQUINOX") or 2000.0)
    # RADECSYS is the name that RADESYS had before 2002
    given = values.get("RADESYS") or values.get("RADECSYS")
    frame = str(given or ("ICRS" if equinox == 2000.0 else "FK5")).strip().upper()
    # FK5 of J2000 and ICRS agree within 0.02 arcsec; beside RADESYS = ICRS, EQUINOX has no meaning.
    if frame != "ICRS" and (frame, equinox) != ("FK5", 2000.0):
        raise _bad_wcs(path, f"RADESYS is {frame}, EQUINOX {equinox:g}; ICRS is needed")
    for k in (1, 2):
        unit = str(values.get(f"CUNIT{k}") or "deg").strip().lower()
        if unit not in ("deg", "degree", "degrees"):
            raise _bad_wcs(path, f"CUNIT{k} is {unit!r}, not deg")
        texts[f"CUNIT{k}"] = _string_card(f"CUNIT{k}", "deg")
    distortion = [int(m[1]) for m in map(_PV_KEY.fullmatch, texts) if m]
    if kinds == ["RA---TAN", "DEC--TAN"] and max(distortion, default=0) >= 5:
        # SCAMP wrote TPV polynomials under the name TAN until 2012; SIP beside them says the same again.
        kinds = ["RA---TPV", "DEC--TPV"]
    if kinds[0].endswith("TPV"):
        texts = {key: card for key, card in texts.items() if not _SIP_KEY.fullmatch(key)}
    for k, kind in enumerate(kinds, start=1):
        texts[f"CTYPE{k}"] = _string_card(f"CTYPE{k}", kind)
    linear = [key for key in texts if _LINEAR_KEY.fullmatch(key)]
    if not any(key.startswith(("CD", "PC")) for key in linear):
        raise _bad_wcs(path, "neither CD nor CDELT")
    chosen = {key: card for key, card in texts.items() if _WCS_KEY.fullmatch(key) and key != "WCSAXES"}
    for key in chosen:
        if not key.startswith(("CTYPE", "CUNIT", "RADESYS")) and not math.isfinite(
            as_number(values.get(key))
        ):
            raise _bad_wcs(path, f"{key} is {values.get(key)!r}")
    if kinds[0].endswith("TPV") and not any(re.fullmatch("CD[12]_[12]", key) for key in linear):
        # wcslib takes the polynomial before CDELT scales, where its coefficients are not in degrees
        matrix = build_wcs("".join(_linear_cards(chosen, kinds))).pixel_scale_matrix
        chosen = {key: card for key, card in chosen.items() if key not in linear}
        for row, column in ((1, 1), (1, 2), (2, 1), (2, 2)):
            key = f"CD{row}_{column}"
            chosen[key] = f"{key:8}= {matrix[row - 1, column - 1]:20.13E}".ljust(80)
    return "".join(chosen[key] for key in sorted(chosen))


def _linear_cards(chosen: dict[str, str], kinds: list[str]) -> list[str]:
    """The cards of the same WCS without its distortion."""
    cards = [card for key, card in chosen.items() if not (_PV_KEY.fullmatch(key) or key.startswith("CTYPE"))]
    return cards + [_string_card(f"CTYPE{k}", kind.replace("TPV", "TAN")) for k, kind in enumerate(kinds, 1)]


def _string_card(key: str, text: str) -> str:
    return f"{key:8}= '{text:8}'".ljust(80)


def _bad_wcs(path: Path, fault: str) -> UnusableInputError:
    return UnusableInputError(path, f"unusable WCS: {fault}", "calibrate the astrometry of the exposure")


def _check_wcs(cards: str, shape: tuple[int, int], path: Path) -> float:
    """Refuse a WCS that cannot be set up, has no sensible scale at the image, or does not invert over it.

    Returns the pixel scale at the centre of the image, arcsec.
    """
    try:
        wcs = build_wcs(cards)
        ny, nx = shape
        x = np.array([0.0, nx - 1.0, 0.0, nx - 1.0, (nx - 1) / 2, (nx + 1) / 2, (nx - 1) / 2])
        y = np.array([0.0, 0.0, ny - 1.0, ny - 1.0, (ny - 1) / 2, (ny - 1) / 2, (ny + 1) / 2])
        ra, dec = _transform(wcs, x, y, forward=True)
        back_x, back_y = _transform(wcs, ra, dec, forward=False)
    except (WcsError, ValueError) as error:
        raise _bad_wcs(path, " ".join(str(error).split())) from None
    if not (np.isfinite(ra).all() and np.isfinite(dec).all()):
        raise _bad_wcs(path, "the image has no position on the sky")
    # Steps of one pixel in x and in y at the centre of the image, in space: at a pole angles would not do.
    a, d = np.radians(ra[4:]), np.radians(dec[4:])
    place = np.array([np.cos(d) * np.cos(a), np.cos(d) * np.sin(a), np.sin(d)])
    scales = 3600.0 * np.degrees(np.linalg.svd(place[:, 1:] - place[:, :1], compute_uv=False))
    low, high = PIXEL_SCALE_RANGE
    scale = math.sqrt(scales[0] * scales[1])
    if not low <= scale <= high:
        raise _bad_wcs(path, f"the pixel scale is {scale:.3g} arcsec, not within {low} to {high}")
    if scales[0] > MAX_ANISOTROPY * scales[1]:
        raise _bad_wcs(path, f"the pixel scales are {scales[0]:.3g} and {scales[1]:.3g} arcsec")
    # "not <=" so that nan counts as an error.
    if not np.hypot(back_x - x, back_y - y).max() <= MAX_ROUND_TRIP_PX:
        raise _bad_wcs(path, "pixel to sky to pixel does not come back")
    return scale
