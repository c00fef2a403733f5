"""The celestial WCS of an image header.

The project's own parser reads the cards once. This module then writes new cards from those values for wcslib and
astropy, so that no card is ever read in two ways. A missing card gets the default of the FITS standard.
"""

from __future__ import annotations

import math
import re
import threading
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from astropy.io.fits import Header
from astropy.wcs import WCS, WcsError

from sgclassify.stages.arrays import F64
from sgclassify.stages.errors import UnusableInputError
from sgclassify.stages.read.cards import Value, as_number

PIXEL_SCALE_RANGE: Final = (0.01, 1.0)
"""Accepted pixel scales, arcsec. Outside, CD is wrong or in another unit."""

MAX_ANISOTROPY: Final = 2.0
"""Largest accepted ratio of the pixel scales of the two axes; 1 without distortion."""

MAX_ROUND_TRIP_PX: Final = 0.1
"""Largest accepted error of pixel -> sky -> pixel. Above it, the distortion polynomial cannot be inverted."""

MAX_RIGHT_ASCENSION: Final = 720.0
"""Largest accepted right ascension, degrees, positive or negative: some programs count beyond 0 to 360."""

MAX_DECLINATION: Final = 90.0 + 1e-9
"""Largest accepted declination, degrees, positive or negative: a pole, plus rounding."""

WCS_KEY: Final = re.compile(
    r"C(?:TYPE|UNIT|RVAL|RPIX|DELT)[12]|CROTA2|(?:CD|PC)[12]_[12]|PV[12]_(?:0|[1-9][0-9]?)|LONPOLE|LATPOLE"
    r"|RADE(?:C)?SYS|EQUINOX|EPOCH|[AB]_(?:ORDER|[0-9]_[0-9])"
)
"""Keywords that `wcs_cards` reads. AP and BP of SIP are not needed: the polynomial itself is inverted."""

_PV_KEY: Final = re.compile(r"PV([12])_(0|[1-9][0-9]?)")
_MATRIX: Final = ((1, 1), (1, 2), (2, 1), (2, 2))

# Known codes only: wcslib reads others, such as TAN-TPD, or TNX without its WAT cards, as an undistorted TAN.
_PROJECTIONS: Final = re.compile(
    "AZP|SZP|TAN|STG|SIN|ARC|ZPN|ZEA|AIR|CYP|CEA|CAR|MER|SFL|PAR|MOL|AIT|COP|COE|COD|COO|BON|PCO|TSC|CSC|QSC|HPX|XPH|TPV"
)
_CTYPE: Final = re.compile(r"([A-Z]{3})(-SIP)?")


def right_ascension(ra: npt.ArrayLike) -> F64:
    """Right ascensions wrapped to 0 <= ra < 360 degrees; values already in this range do not change."""
    wrapped = np.mod(np.asarray(ra, dtype=np.float64), 360.0)
    # The remainder of a tiny negative number rounds to 360.
    return np.where(wrapped == 360.0, 0.0, wrapped)


def wcs_cards(values: Mapping[str, Value], path: Path) -> str:
    """Write the WCS of a header as cards of a fixed form.

    Parameters
    ----------
    values : mapping of str to header values
        Keyword -> value of the HDU with the WCS. A keyword without a value counts as absent.

    Returns
    -------
    str
        Cards of 80 characters, sorted. The linear part is always CD, and the frame ICRS. Numbers have all digits of
        their float64. Polynomials are named TPV or TAN-SIP, and are complete.

    Raises
    ------
    UnusableInputError
        If the axes, the frame or the units are not supported, a number that is needed is missing or malformed, or
        the cards can be read in two ways.
    """
    header = _Values(values, path)
    projection, suffix = header.projection()
    header.check_frame()
    cards: dict[str, str | int | float] = {"RADESYS": "ICRS"}
    for k in (1, 2):
        unit = str(values.get(f"CUNIT{k}") or "deg").strip().lower()
        if unit not in ("deg", "degree", "degrees"):
            raise bad_wcs(path, f"CUNIT{k} is {unit!r}, not deg")
        cards[f"CUNIT{k}"] = "deg"
        cards[f"CRPIX{k}"] = header.number(f"CRPIX{k}")
        cards[f"CRVAL{k}"] = header.number(f"CRVAL{k}")
    ra, dec = header.number("CRVAL1"), header.number("CRVAL2")
    if abs(ra) > MAX_RIGHT_ASCENSION:
        raise bad_wcs(path, f"CRVAL1 is {values['CRVAL1']}, no right ascension")
    if abs(dec) > MAX_DECLINATION:
        raise bad_wcs(path, f"CRVAL2 is {values['CRVAL2']}, no declination")
    cards |= {"CRVAL1": float(right_ascension(ra)), "CRVAL2": min(max(dec, -90.0), 90.0)}
    cards |= header.linear()
    cards |= {key: header.number(key) for key in ("LONPOLE", "LATPOLE") if values.get(key) is not None}

    pv = header.pv()
    sip: dict[str, int | float] = {}
    # SCAMP named its TPV polynomials TAN until 2012, and Starlink's PolyTan still does. In the standard, TAN has no
    # PV2, and no PV1 above PV1_4.
    if projection == "TAN" and any(m >= 5 or (axis == 2 and value) for (axis, m), value in pv.items()):
        if (suffix or max(m for _, m in pv) < 5) and header.sip():
            # SIP says the same: CTYPE names it, or PV holds no distortion.
            pv = {}
        else:
            projection = "TPV"
    elif projection == "TAN":
        pv = {(axis, m): value for (axis, m), value in pv.items() if axis == 1}
        _check_native(pv, path)
    if projection == "TPV":
        # SIP beside TPV says the same again.
        pv = {(1, 1): 1.0, (2, 1): 1.0} | pv
    else:
        sip = header.sip()
    cards |= {f"PV{axis}_{m}": value for (axis, m), value in pv.items()} | sip
    name = f"{projection}-SIP" if sip else projection
    cards |= {"CTYPE1": f"RA---{name}", "CTYPE2": f"DEC--{name}"}
    return "".join(_card(key, cards[key]) for key in sorted(cards))


class _Values:
    """The values of a header, read by the rules of the FITS standard for a WCS."""

    def __init__(self, values: Mapping[str, Value], path: Path) -> None:
        self.values = values
        self.path = path

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number; ``default`` where the keyword is absent or has no value."""
        value = self.values.get(key)
        if value is None and default is not None:
            return default
        number = as_number(value)
        if not math.isfinite(number):
            raise bad_wcs(self.path, f"{key} is {'missing' if value is None else repr(value)}")
        return number

    def projection(self) -> tuple[str, str]:
        """Code of the projection, such as TAN, and its suffix: ``-SIP`` or nothing."""
        kinds = [str(self.values.get(f"CTYPE{k}") or "").strip().upper() for k in (1, 2)]
        if not (kinds[0].startswith("RA--") and kinds[1].startswith("DEC-")):
            fault = f"CTYPE is {kinds[0] or 'missing'}, {kinds[1] or 'missing'}; RA and DEC are needed"
            raise bad_wcs(self.path, fault)
        match = _CTYPE.fullmatch(kinds[0][5:])
        if match is None or not _PROJECTIONS.fullmatch(match[1]) or kinds[1][5:] != kinds[0][5:]:
            raise bad_wcs(self.path, f"CTYPE is {kinds[0]}, {kinds[1]}, no projection that is known")
        return match[1], match[2] or ""

    def check_frame(self) -> None:
        """Refuse frames other than ICRS. FK5 of J2000 agrees with it within 0.02 arcsec."""
        # RADECSYS and EPOCH are the names of RADESYS and EQUINOX before 2002.
        frame = str(self.values.get("RADESYS") or self.values.get("RADECSYS") or "").strip().upper()
        given = self.values.get("EQUINOX") or None
        if frame == "ICRS":
            # EQUINOX means nothing for ICRS.
            return
        equinox = 2000.0
        if given is not None:
            equinox = as_number(given.strip().removeprefix("J") if isinstance(given, str) else given)
        elif not frame and as_number(self.values.get("EPOCH")) < 1984.0:
            # A later EPOCH is often that of the observation.
            equinox = as_number(self.values["EPOCH"])
        if frame not in ("", "FK5") or equinox != 2000.0:
            year = repr(given) if math.isnan(equinox) else f"{equinox:g}"
            raise bad_wcs(self.path, f"RADESYS is {frame or 'missing'}, EQUINOX {year}; ICRS is needed")

    def linear(self) -> dict[str, float]:
        """The linear part as CD1_1, CD1_2, CD2_1, CD2_2, degrees per pixel."""
        has = {kind: any(self.values.get(f"{kind}{i}_{j}") is not None for i, j in _MATRIX) for kind in ("CD", "PC")}
        deltas = any(self.values.get(f"CDELT{k}") is not None for k in (1, 2))
        if not (has["CD"] or has["PC"] or deltas):
            raise bad_wcs(self.path, "neither CD nor CDELT")
        cd = {f"CD{i}_{j}": self.number(f"CD{i}_{j}", 0.0) for i, j in _MATRIX} if has["CD"] else {}
        if cd and not has["PC"]:
            # CDELT and CROTA2 beside CD are for programs that cannot read CD.
            return cd
        delta = {i: self.number(f"CDELT{i}", 1.0) for i in (1, 2)}
        if has["PC"]:
            turn = {(i, j): self.number(f"PC{i}_{j}", float(i == j)) for i, j in _MATRIX}
            product = {f"CD{i}_{j}": delta[i] * turn[i, j] for i, j in _MATRIX}
            if cd and not np.allclose(
                list(cd.values()), list(product.values()), 1e-6, 1e-6 * max(map(abs, cd.values()))
            ):
                raise bad_wcs(self.path, "CD and PC are both there, and differ")
            return product
        angle = math.radians(self.number("CROTA2", 0.0))
        cos, sin = math.cos(angle), math.sin(angle)
        return {"CD1_1": delta[1] * cos, "CD1_2": -delta[2] * sin, "CD2_1": delta[1] * sin, "CD2_2": delta[2] * cos}

    def pv(self) -> dict[tuple[int, int], float]:
        """PVi_m by (i, m)."""
        matches = [match for key in self.values if (match := _PV_KEY.fullmatch(key))]
        return {
            (int(match[1]), int(match[2])): self.number(match[0])
            for match in matches
            if self.values[match[0]] is not None
        }

    def sip(self) -> dict[str, int | float]:
        """The cards of the SIP polynomials; empty without distortion."""
        found: dict[str, int | float] = {}
        orders: dict[str, int] = {}
        for axis in "AB":
            name = f"{axis}_ORDER"
            pattern = re.compile(rf"{axis}_([0-9])_([0-9])")
            matches = [m for key, value in self.values.items() if value is not None and (m := pattern.fullmatch(key))]
            terms = {m[0]: (int(m[1]) + int(m[2]), self.number(m[0])) for m in matches}
            if self.values.get(name) is None:
                if any(value for _, value in terms.values()):
                    raise bad_wcs(self.path, f"{name} is missing")
                continue
            order = self.number(name)
            if order not in range(10):
                raise bad_wcs(self.path, f"{name} is {self.values[name]!r}")
            orders[axis] = int(order)
            found |= {key: value for key, (degree, value) in terms.items() if degree <= order}
        if not any(found.values()) and max(orders.values(), default=0) < 2:
            return {}
        for axis in "AB":
            if axis not in orders:
                raise bad_wcs(self.path, f"{axis}_ORDER is missing")
            # astropy ignores both polynomials if one has a degree below 2.
            found[f"{axis}_ORDER"] = max(orders[axis], 2)
        return found


def _check_native(pv: Mapping[tuple[int, int], float], path: Path) -> None:
    """Refuse PV cards beside TAN that may be a polynomial.

    In the standard, PV1_1 and PV1_2 are the native longitude and latitude of CRVAL; for TAN everybody puts CRVAL at the
    pole. Other values are more likely the start of a TPV polynomial.
    """
    native = (pv.get((1, 1), 0.0), pv.get((1, 2), 90.0)) == (0.0, 90.0)
    if native and (not pv.get((1, 0)) or (1, 1) in pv or (1, 2) in pv):
        return
    cards = ", ".join(f"PV1_{m} = {value:g}" for (_, m), value in sorted(pv.items()))
    raise bad_wcs(path, f"{cards} beside TAN: if they are a polynomial, CTYPE is RA---TPV, DEC--TPV")


def _card(key: str, value: str | int | float) -> str:
    text = f"'{value:8}'" if isinstance(value, str) else f"{value!r:>20}".upper()
    return f"{key:8}= {text}".ljust(80)


def bad_wcs(path: Path, fault: str) -> UnusableInputError:
    """Make the error for a WCS that cannot be used."""
    return UnusableInputError(path, f"unusable WCS: {fault}", "calibrate the astrometry of the exposure")


def build_wcs(cards: str) -> WCS:
    """Make a WCS from its cards, cached.

    Each thread gets its own object: wcslib changes undefined values in place during a transformation, so two threads
    must not use the same object at once.
    """
    return _build_wcs(cards, threading.get_ident())


@lru_cache(maxsize=128)
def _build_wcs(cards: str, _thread: int) -> WCS:
    # fix=False: wcs_cards has corrected the cards already; "fixing" would warn about dates and units.
    return WCS(Header.fromstring(cards), naxis=2, fix=False)


def transform(wcs: WCS, a: npt.ArrayLike, b: npt.ArrayLike, forward: bool) -> tuple[F64, F64]:
    """Pixel to sky (``forward``) or sky to pixel: 0-based pixels, degrees; NaN where there is no counterpart."""
    first, second = np.broadcast_arrays(np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64))
    out = np.full((2, first.size), np.nan)
    good = (np.isfinite(first) & np.isfinite(second)).ravel()
    if good.any():
        pairs = (first.ravel()[good], second.ravel()[good])
        if forward:
            out[:, good] = wcs.all_pix2world(*pairs, 0)
        elif wcs.sip is not None:
            # quiet: a point that does not converge must not stop the others; read_header has checked the image.
            out[:, good] = wcs.all_world2pix(*pairs, 0, quiet=True)
        else:
            # TAN and TPV are inverted by wcslib itself.
            out[:, good] = wcs.wcs_world2pix(*pairs, 0)
    out[:, ~np.isfinite(out).all(axis=0)] = np.nan
    return out[0].reshape(first.shape), out[1].reshape(first.shape)


def check_wcs(cards: str, shape: tuple[int, int], path: Path) -> float:
    """Check a WCS over an image of ``shape`` (ny, nx); return the pixel scale at the centre of the image, arcsec.

    Raises
    ------
    UnusableInputError
        If wcslib rejects the cards (of `wcs_cards`), a pixel scale is impossible, or the WCS cannot be inverted.
    """
    try:
        wcs = build_wcs(cards)
        ny, nx = shape
        x = np.array([0.0, nx - 1.0, 0.0, nx - 1.0, (nx - 1) / 2, (nx + 1) / 2, (nx - 1) / 2])
        y = np.array([0.0, 0.0, ny - 1.0, ny - 1.0, (ny - 1) / 2, (ny - 1) / 2, (ny + 1) / 2])
        ra, dec = transform(wcs, x, y, forward=True)
        back_x, back_y = transform(wcs, ra, dec, forward=False)
    except (WcsError, ValueError) as error:
        raise bad_wcs(path, " ".join(str(error).split())) from None
    if not (np.isfinite(ra).all() and np.isfinite(dec).all()):
        raise bad_wcs(path, "the image has no position on the sky")
    # Steps of one pixel in x and in y at the centre of the image, as vectors: angles would fail at a pole.
    a, d = np.radians(ra[4:]), np.radians(dec[4:])
    place = np.array([np.cos(d) * np.cos(a), np.cos(d) * np.sin(a), np.sin(d)])
    scales = 3600.0 * np.degrees(np.linalg.svd(place[:, 1:] - place[:, :1], compute_uv=False))
    low, high = PIXEL_SCALE_RANGE
    scale = math.sqrt(scales[0] * scales[1])
    if not low <= scale <= high:
        raise bad_wcs(path, f"the pixel scale is {scale:.3g} arcsec, not within {low} to {high}")
    if scales[0] > MAX_ANISOTROPY * scales[1]:
        raise bad_wcs(path, f"the pixel scales are {scales[0]:.3g} and {scales[1]:.3g} arcsec")
    # "not <=" so that NaN counts as an error.
    if not np.hypot(back_x - x, back_y - y).max() <= MAX_ROUND_TRIP_PX:
        raise bad_wcs(path, "pixel to sky to pixel does not come back")
    return scale
