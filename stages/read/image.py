"""One image of a FITS file, plain or tile-compressed: its physical values, and what compression changed in them."""

from __future__ import annotations

import errno
import math
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO, Final, Self, cast

import numpy as np
import numpy.typing as npt

from sgclassify.stages.arrays import F64
from sgclassify.stages.errors import UnusableInputError
from sgclassify.stages.read.bintable import read_numbers
from sgclassify.stages.read.cards import as_number
from sgclassify.stages.read.compressed import TileRows
from sgclassify.stages.read.fitsfile import RECOPY, Hdu, copy_stream, first_image, open_stream

KEEP_FLOATS: Final = ("GZIP_1", "GZIP_2", "NOCOMPRESS")
"""Compressions (ZCMPTYPE) that can store floats unchanged; the others store integers only."""

COMPRESSIONS: Final = (*KEEP_FLOATS, "RICE_1", "RICE_ONE", "PLIO_1", "HCOMPRESS_1")
"""Compressions that astropy decodes."""

UNSIGNED_16: Final = 32768.0
"""BZERO of unsigned 16-bit integers (FITS standard 4.0, table 11)."""

_DTYPE: Final = {8: ">u1", 16: ">i2", 32: ">i4", 64: ">i8", -32: ">f4", -64: ">f8"}

_FAULTS_OF_THE_FILE = (None, errno.EINVAL, errno.EOVERFLOW)
"""System errors that only a damaged tile descriptor can cause, by a seek to nowhere; None is astropy's own OSError."""


@dataclass(frozen=True, slots=True)
class Scaling:
    """How stored values become physical ones (FITS standard 4.0, section 4.4.2.5).

    Attributes
    ----------
    scale, zero : float
        BSCALE and BZERO.
    blank : int or None
        Stored integer that means "no value"; None where there is none, and for floats.
    """

    scale: float
    zero: float
    blank: int | None

    @classmethod
    def of(cls, path: Path, hdu: Hdu) -> Self:
        """Scaling of an image; refused if its cards are not numbers, or BSCALE is 0."""
        scale = _card(path, hdu, "BSCALE", 1.0)
        if scale == 0:
            raise _bad_card(path, hdu, "BSCALE")
        blank: int | None = None
        # BLANK means nothing for floats, though astropy applies it to quantised floats.
        if _bitpix(hdu) > 0:
            key = "BLANK" if hdu.values.get("BLANK") is not None else "ZBLANK"
            value = hdu.values.get(key)
            if value is not None:
                if not isinstance(value, int) or isinstance(value, bool):
                    raise _bad_card(path, hdu, key)
                blank = value
        return cls(scale, _card(path, hdu, "BZERO", 0.0), blank)

    def physical(self, stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Physical values; NaN for "no value". Integers stay integers where BZERO only makes them unsigned."""
        if self.blank is None and self.scale == 1.0:
            if self.zero == 0.0:
                return stored
            sign = 1 << (8 * stored.dtype.itemsize - 1)
            if stored.dtype.kind == "i" and self.zero == sign:
                size = stored.dtype.itemsize
                unsigned: npt.NDArray[Any] = stored.astype(f"i{size}").view(f"u{size}")
                unsigned ^= unsigned.dtype.type(sign)
                return unsigned
        with np.errstate(all="ignore"):  # damaged pixels may hold any number
            values: npt.NDArray[Any] = stored * self.scale + self.zero
        if self.blank is not None:
            values[stored == self.blank] = np.nan
        return values


class ImageReader(ABC):
    """Reads windows of one image.

    Attributes
    ----------
    shape : (int, int)
        Rows and columns.
    quantised : str
        How compression rounded the pixels to steps; empty where it did not.
    smeared : str
        How compression mixed neighbouring pixels, so that none is exact; empty where it did not.
    keeps_zeros : bool
        Whether a quantised pixel is 0 exactly where it was 0 before.
    has_blank : bool
        Whether a stored integer means "no value".
    costly : bool
        Whether the file is decompressed to be read.
    """

    quantised: str = ""
    smeared: str = ""
    keeps_zeros: bool = False
    costly: bool = False

    def __init__(self, path: Path, hdu: Hdu) -> None:
        self.path = path
        self.hdu = hdu
        self.shape = (hdu.axes[1], hdu.axes[0])
        self.scaling = Scaling.of(path, hdu)
        self.has_blank = self.scaling.blank is not None

    def read(self, y0: int, y1: int, x0: int, x1: int) -> npt.NDArray[Any]:
        """Physical values (BSCALE, BZERO and BLANK applied) of the pixels [y0:y1, x0:x1], 0-based."""
        return self.scaling.physical(self._stored(y0, y1, x0, x1))

    def step(self, y0: int, y1: int, x0: int, x1: int) -> F64 | float:
        """Steps to which the values of a window were rounded: each is within half a step of the original.

        Returns
        -------
        float or float64 array that broadcasts to the window
            In the unit of the pixels; 0 where the values are the original ones.
        """
        return abs(self.scaling.scale) if _bitpix(self.hdu) > 0 else 0.0

    @abstractmethod
    def _stored(self, y0: int, y1: int, x0: int, x1: int) -> npt.NDArray[Any]: ...


class _PlainReader(ImageReader):
    """Uncompressed image."""

    def __init__(self, path: Path, stream: BinaryIO, hdu: Hdu) -> None:
        super().__init__(path, hdu)
        self.stream = stream
        self.dtype = np.dtype(_DTYPE[_bitpix(hdu)])

    def _stored(self, y0: int, y1: int, x0: int, x1: int) -> npt.NDArray[Any]:
        row = self.shape[1] * self.dtype.itemsize
        self.stream.seek(self.hdu.data_offset + y0 * row)
        data = self.stream.read((y1 - y0) * row)
        if len(data) < (y1 - y0) * row:
            raise UnusableInputError(self.path, f"truncated: rows {y0} to {y1} are not there", RECOPY)
        return np.frombuffer(data, dtype=self.dtype).reshape(y1 - y0, -1)[:, x0:x1]


class _CompressedReader(ImageReader):
    """Tile-compressed image: astropy decodes the strips that a window touches."""

    def __init__(self, path: Path, stream: BinaryIO, hdu: Hdu, start: int) -> None:
        super().__init__(path, hdu)
        kind = _compression(path, hdu)
        values = hdu.values
        self.has_blank = self.has_blank or "ZBLANK" in values or "ZBLANK" in _columns(hdu)
        with _decoding(path):
            self.tiles = TileRows(path, stream, hdu, start)
            self.scales = np.zeros((1, 1))
            if _quantised(hdu):
                tiles = [-(-n // k) for n, k in zip(self.shape, self.tiles.tile, strict=True)]
                self.scales = np.abs(read_numbers(stream, path, hdu, "ZSCALE")).reshape(tiles)
        # Tiles that could not be quantised are stored unchanged, without a scale.
        if self.scales.any():
            method = values.get("ZQUANTIZ") or "NO_DITHER"
            self.quantised = f"floats rounded to steps of up to {self.scales.max():.3g} ({method})"
            self.keeps_zeros = method == "SUBTRACTIVE_DITHER_2"
        loss = _setting(hdu, "SCALE", 0.0) if kind == "HCOMPRESS_1" else 0.0
        if loss:
            self.smeared = f"compressed with loss (HCOMPRESS_1, SCALE {loss:g})"
        # PLIO cannot store negative numbers, so CFITSIO stores unsigned integers without their offset.
        self.positive = kind == "PLIO_1" and _bitpix(hdu) == 16 and self.scaling.zero == UNSIGNED_16

    def step(self, y0: int, y1: int, x0: int, x1: int) -> F64 | float:
        if not self.quantised:
            return super().step(y0, y1, x0, x1)
        found: F64 = self.scales[np.arange(y0, y1) // self.tiles.tile[0]] * abs(self.scaling.scale)
        return found if found.shape[1] == 1 else found[:, np.arange(x0, x1) // self.tiles.tile[1]]

    def _stored(self, y0: int, y1: int, x0: int, x1: int) -> npt.NDArray[Any]:
        with _decoding(self.path):
            found = self.tiles.rows(y0, y1)[:, x0:x1]
        return found ^ np.int16(-0x8000) if self.positive else found


def temporary_copy() -> IO[bytes]:
    """Make an empty file for decompressed content, deleted as it is closed."""
    return tempfile.TemporaryFile(prefix="sgclassify-")


def open_image(stack: ExitStack, path: Path, unpacked: IO[bytes] | None = None) -> ImageReader:
    """Open the first two-dimensional image of a file.

    Parameters
    ----------
    stack : ExitStack
        Closes the file, and deletes the decompressed copy of a .gz file.
    path : Path
        FITS file.
    unpacked : binary file, optional
        Decompressed content of a .gz file, where it is there already; not closed.

    Raises
    ------
    UnusableInputError
        If there is no such image, it cannot be decoded, or compression has destroyed its pixels.
    """
    hdu, hdus = first_image(path)
    start = hdus[-2].data_offset + hdus[-2].padded_bytes if len(hdus) > 1 else 0
    stream, size = stack.enter_context(open_stream(path))
    if unpacked is not None:
        stream = cast(BinaryIO, unpacked)
    elif size is None:
        # Decompress once: each seek backwards in a gzip stream starts again from its beginning.
        copy = stack.enter_context(temporary_copy())
        copy_stream(stream, copy, path, hdu)
        stream = cast(BinaryIO, copy)
    reader = _CompressedReader(path, stream, hdu, start) if hdu.compressed else _PlainReader(path, stream, hdu)
    reader.costly = hdu.compressed or size is None
    return reader


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Turn astropy's errors on damaged compressed data into a fault of the file."""
    try:
        # Damaged tiles may hold any number; values that are not finite are masked later.
        with np.errstate(all="ignore"):
            yield
    except (MemoryError, UnusableInputError):
        raise
    except Exception as error:
        # The errors of astropy's decoders have no common class, and that of the C code has no public name. Only the
        # decoders run here, on bytes whose checksums may not have been verified.
        if isinstance(error, OSError) and error.errno not in _FAULTS_OF_THE_FILE:
            raise  # a fault of the disk or the network, which may pass
        text = " ".join(str(error).split())
        raise UnusableInputError(path, f"compressed image cannot be decoded ({text})", RECOPY) from error


def _compression(path: Path, hdu: Hdu) -> str:
    """ZCMPTYPE of a compressed image; refused where it is unknown, or has destroyed the pixels."""
    kind = str(hdu.values.get("ZCMPTYPE", "")).strip()
    if kind not in COMPRESSIONS:
        fault = f"compressed by an unknown method (ZCMPTYPE {kind!r})"
        raise UnusableInputError(path, fault, f"known are {' '.join(COMPRESSIONS)}")
    if _bitpix(hdu) < 0 and not _quantised(hdu) and (kind not in KEEP_FLOATS or "ZSCALE" in hdu.values):
        fault = f"floats compressed by {kind} without a column ZSCALE: only whole numbers are left of them"
        raise UnusableInputError(path, fault, "compress the image again, with quantisation or by GZIP_2")
    return kind


def _quantised(hdu: Hdu) -> bool:
    return _bitpix(hdu) < 0 and "ZSCALE" in _columns(hdu)


def _columns(hdu: Hdu) -> list[str]:
    return [str(hdu.values.get(f"TTYPE{k}", "")) for k in range(1, int(hdu.number("TFIELDS", 0)) + 1)]


def _setting(hdu: Hdu, name: str, default: float) -> float:
    """Setting of the compression, from the pair of cards ZNAMEk, ZVALk."""
    for key, value in hdu.values.items():
        if key.startswith("ZNAME") and str(value).strip().upper() == name:
            return hdu.number(f"ZVAL{key.removeprefix('ZNAME')}", default)
    return default


def _bitpix(hdu: Hdu) -> int:
    return int(hdu.number("ZBITPIX" if hdu.compressed else "BITPIX", 8))


def _card(path: Path, hdu: Hdu, key: str, default: float) -> float:
    """Number of a card; the default where it is absent or undefined."""
    value = hdu.values.get(key)
    if value is None:
        return default
    number = as_number(value)
    if not math.isfinite(number):
        raise _bad_card(path, hdu, key)
    return number


def _bad_card(path: Path, hdu: Hdu, key: str) -> UnusableInputError:
    fault = f"{key} of {hdu.label} is {hdu.values[key]!r}"
    return UnusableInputError(path, fault, "correct the card, or process the exposure again")
