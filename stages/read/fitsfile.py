"""FITS files on disk: 2880-byte blocks, header cards, declared sizes, checksums.

A header may declare any size. So all that can be checked without decoding the data is checked here, before memory is
allocated for it.
"""

from __future__ import annotations

import hashlib
import math
import stat
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, Final, cast

import numpy as np

from sgclassify.stages.errors import UnusableInputError
from sgclassify.stages.read.cards import CARD, Value, parse_cards
from sgclassify.stages.read.gunzip import MAGIC, gunzip

BLOCK: Final = 2880
"""Bytes of a FITS block (FITS standard 4.0, section 3.1)."""

MAX_HEADER_BLOCKS: Final = 1000
"""Longest header, 36,000 cards: stops the search for END in a large file that is not FITS."""

CHUNK: Final = 1456 * BLOCK
"""Bytes read at once when a file is streamed (4.2 MB, a whole number of blocks)."""

MAX_PIXELS: Final = 2**30
"""Largest image accepted: 12 times the 9216 x 9232 detector."""

RECOPY: Final = "copy the file again from its archive"


@dataclass(frozen=True, slots=True)
class Hdu:
    """One header-data unit; its data are not read.

    Attributes
    ----------
    index : int
        Place in the file, 0 for the primary HDU.
    values : dict
        Keyword -> value; the first value of a repeated keyword.
    repeated : frozenset of str
        Keywords that occur again with another value; the standard does not say which one is valid.
    data_offset : int
        Byte at which the data start (in the decompressed stream of a .gz file).
    data_bytes : int
        Declared length of the data, without padding.
    """

    index: int
    values: dict[str, Value]
    repeated: frozenset[str]
    data_offset: int
    data_bytes: int

    @property
    def name(self) -> str:
        """EXTNAME in upper case; without it, ``PRIMARY`` for the first HDU and an empty string for the others."""
        name = self.values.get("EXTNAME")
        return str(name).strip().upper() if name is not None else ("PRIMARY" if self.index == 0 else "")

    @property
    def label(self) -> str:
        """Name of this HDU in messages."""
        return f"HDU {self.index}" + (f" ({self.name})" if self.name else "")

    @property
    def compressed(self) -> bool:
        """Whether this is a tile-compressed image, stored as a binary table."""
        return self.is_table and self.values.get("ZIMAGE") is True

    @property
    def is_table(self) -> bool:
        """Whether this is a binary table, whatever it holds."""
        return str(self.values.get("XTENSION", "")).strip() in ("BINTABLE", "A3DTABLE")

    @property
    def is_image(self) -> bool:
        """Whether this HDU is an image, compressed or not, with at least one axis."""
        kind = str(self.values.get("XTENSION", "IMAGE")).strip()
        return self.compressed or (kind in ("IMAGE", "IUEIMAGE") and bool(self.axes))

    @property
    def axes(self) -> tuple[int, ...]:
        """Lengths of the (decompressed) axes in FITS order: NAXIS1 first."""
        letter = "Z" if self.compressed else ""
        count = self.values.get(f"{letter}NAXIS")
        if not isinstance(count, int):
            return ()
        lengths = [self.values.get(f"{letter}NAXIS{k}") for k in range(1, count + 1)]
        return tuple(n for n in lengths if isinstance(n, int))

    @property
    def axes_stored(self) -> tuple[int, ...]:
        """NAXIS1, NAXIS2, ... of the data as stored: for a table, bytes per row and number of rows."""
        lengths = [self.values.get(f"NAXIS{k}") for k in range(1, int(self.number("NAXIS", 0)) + 1)]
        return tuple(n for n in lengths if isinstance(n, int))

    @property
    def padded_bytes(self) -> int:
        """Length of the data with its padding."""
        return -(-self.data_bytes // BLOCK) * BLOCK

    def number(self, key: str, default: float) -> float:
        """Value of a keyword as a float; ``default`` where it is absent or not a number."""
        value = self.values.get(key)
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else default


def scan(path: Path, stop: Callable[[Hdu], bool] | None = None) -> list[Hdu]:
    """Read the headers of a FITS file, and check the declared sizes of its data against the size of the file.

    Parameters
    ----------
    path : Path
        FITS file, gzip-compressed or not; its content decides, not its name.
    stop : callable, optional
        Called with each HDU; the scan ends after the first one for which it returns True.

    Returns
    -------
    list of Hdu
        In the order of the file.

    Raises
    ------
    UnusableInputError
        If the file is missing, empty, not FITS, malformed or truncated.
    """
    hdus: list[Hdu] = []
    with open_stream(path) as (stream, size):
        while True:
            found = _read_header(stream, path, len(hdus), hdus[-1] if hdus else None)
            if found is None:
                return hdus
            hdu = found[0]
            hdus.append(hdu)
            _check_size(hdu, size, path)
            if stop is not None and stop(hdu):
                return hdus
            with _stream_faults(path):
                stream.seek(hdu.data_offset + hdu.padded_bytes)


def verify(path: Path, unpacked: Callable[[], IO[bytes]] | None = None) -> str:
    """Read a whole FITS file, verify every CHECKSUM and DATASUM in it, and return the SHA-256 of the file on disk.

    Parameters
    ----------
    path : Path
        FITS file, gzip-compressed or not.
    unpacked : callable, optional
        Makes the file that gets the decompressed content of a gzip file; not called for another.

    Raises
    ------
    UnusableInputError
        As `scan`, and if a sum does not match or a .gz file is damaged. Bytes after the last HDU, or after the
        end of a gzip stream, are not an error.
    """
    size = _regular_size(path)
    digest = hashlib.sha256()
    with _opened(path) as raw:
        reader = _HashingReader(raw, digest)
        packed = raw.read(len(MAGIC)) == MAGIC
        raw.seek(0)
        stream = gunzip(cast(BinaryIO, reader)) if packed else cast(BinaryIO, reader)
        if packed and unpacked is not None:
            stream = cast(BinaryIO, _CopyingReader(stream, unpacked()))
        last: Hdu | None = None
        while True:
            found = _read_header(stream, path, 0 if last is None else last.index + 1, last)
            if found is None:
                break
            last, header = found
            _check_size(last, None if packed else size, path)
            with _stream_faults(path):
                _verify_sums(stream, path, last, header)
        with _stream_faults(path):
            while stream.read(CHUNK):
                pass
        while reader.read(CHUNK):
            pass
    return digest.hexdigest()


@contextmanager
def open_stream(path: Path) -> Iterator[tuple[BinaryIO, int | None]]:
    """Open a FITS file for reading; a gzip file is decompressed on the way.

    Yields the stream and its size in bytes: None for a gzip file, whose decompressed size is known only at its end.
    """
    size = _regular_size(path)
    with _opened(path) as raw:
        packed = raw.read(len(MAGIC)) == MAGIC
        raw.seek(0)
        if packed:
            with gunzip(raw) as stream:
                yield stream, None
        else:
            yield raw, size


def iter_data(stream: BinaryIO, path: Path, hdu: Hdu) -> Iterator[bytes]:
    """Data of one HDU in pieces, without padding."""
    with _stream_faults(path):
        stream.seek(hdu.data_offset)
        left = hdu.data_bytes
        while left:
            piece = stream.read(min(left, CHUNK))
            if not piece:
                raise _truncated(path, hdu, hdu.data_bytes - left)
            left -= len(piece)
            yield piece


def copy_stream(stream: BinaryIO, copy: IO[bytes], path: Path, hdu: Hdu) -> None:
    """Copy a stream from its start to the end of one HDU, with its padding."""
    with _stream_faults(path):
        stream.seek(0)
        left = hdu.data_offset + hdu.padded_bytes
        while left and (piece := stream.read(min(left, CHUNK))):
            copy.write(piece)
            left -= len(piece)
    if left > hdu.padded_bytes - hdu.data_bytes:
        raise _truncated(path, hdu, max(hdu.padded_bytes - left, 0))
    copy.flush()


def first_image(path: Path) -> tuple[Hdu, tuple[Hdu, ...]]:
    """Find the first two-dimensional image HDU of a file; return it, and all HDUs up to it.

    Raises
    ------
    UnusableInputError
        As `scan`, and if there is no such HDU or its declared size is absurd.
    """
    hdus = scan(path, stop=_is_plane)
    found = hdus[-1]
    if not _is_plane(found):
        for hdu in hdus:
            if hdu.is_image:
                size = " x ".join(map(str, hdu.axes))
                fault = f"the image in {hdu.label} is not two-dimensional ({size} pixels)"
                raise UnusableInputError(path, fault, "deliver a single detector image")
        raise UnusableInputError(path, "no two-dimensional image in any HDU", "is this a Level-1 image?")
    return found, tuple(hdus)


def _is_plane(hdu: Hdu) -> bool:
    return hdu.is_image and len(hdu.axes) == 2 and math.prod(hdu.axes) > 0


class _HashingReader:
    """A file that is read once from its start, and hashed at the same time."""

    def __init__(self, raw: BinaryIO, digest: hashlib._Hash) -> None:
        self._raw = raw
        self._digest = digest

    def read(self, size: int = -1) -> bytes:
        piece = self._raw.read(size)
        self._digest.update(piece)
        return piece


class _CopyingReader:
    """A stream that is read once from its start, and copied at the same time."""

    def __init__(self, stream: BinaryIO, copy: IO[bytes]) -> None:
        self._stream = stream
        self._copy = copy

    def read(self, size: int = -1) -> bytes:
        piece = self._stream.read(size)
        self._copy.write(piece)
        return piece


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        raw = path.open("rb")
    except PermissionError:
        raise UnusableInputError(path, "no permission to read the file", "change its permissions") from None
    with raw:
        yield raw


@contextmanager
def _stream_faults(path: Path) -> Iterator[None]:
    """Turn the errors of a damaged gzip stream into a fault of the file."""
    try:
        yield
    except (EOFError, zlib.error) as error:
        raise UnusableInputError(path, f"damaged or truncated gzip file ({error})", RECOPY) from None


def _regular_size(path: Path) -> int:
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise UnusableInputError(path, "the file does not exist", "correct the exposure list") from None
    except PermissionError:
        raise UnusableInputError(path, "no permission to read the file", "change its permissions") from None
    if not stat.S_ISREG(status.st_mode):
        raise UnusableInputError(path, "not a regular file", "correct the exposure list")
    if status.st_size == 0:
        raise UnusableInputError(path, "the file is empty (0 bytes)", RECOPY)
    return status.st_size


def _read_header(stream: BinaryIO, path: Path, index: int, before: Hdu | None) -> tuple[Hdu, bytes] | None:
    """Read the next header of a stream at a block boundary; None after the last HDU."""
    blocks: list[bytes] = []
    start = 0 if before is None else before.data_offset + before.padded_bytes
    while True:
        with _stream_faults(path):
            block = stream.read(BLOCK)
        if not blocks:
            if index == 0 and not block.startswith(b"SIMPLE  ="):
                raise UnusableInputError(path, "not a FITS file (it does not begin with SIMPLE)", RECOPY)
            # After the last HDU the standard allows "special records"; they are ignored.
            if index > 0 and not block.startswith(b"XTENSION"):
                return None
        if len(block) < BLOCK or len(blocks) == MAX_HEADER_BLOCKS:
            raise UnusableInputError(path, f"truncated: the header of HDU {index} has no END", RECOPY)
        blocks.append(block)
        if any(block[k : k + 8] == b"END     " for k in range(0, BLOCK, CARD)):
            break
    header = b"".join(blocks)
    values, repeated = parse_cards(header)
    size = _declared_bytes(values, index, path)
    return Hdu(index, values, repeated, start + len(header), size), header


def _declared_bytes(values: dict[str, Value], index: int, path: Path) -> int:
    def integer(key: str, default: int | None = None) -> int:
        value = values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or (value < 0 and key != "BITPIX"):
            raise UnusableInputError(path, f"malformed header in HDU {index}: {key} is {value!r}", RECOPY)
        return value

    bitpix = integer("BITPIX")
    if bitpix not in (8, 16, 32, 64, -32, -64):
        raise UnusableInputError(path, f"malformed header in HDU {index}: BITPIX is {bitpix}", RECOPY)
    axes = [integer(f"NAXIS{k}") for k in range(1, integer("NAXIS") + 1)]
    pixels = math.prod(axes) if axes else 0
    packed = values.get("ZIMAGE") is True
    shown = [integer(f"ZNAXIS{k}") for k in range(1, integer("ZNAXIS") + 1)] if packed else axes
    table = str(values.get("XTENSION", "")).strip() in ("BINTABLE", "A3DTABLE", "TABLE")
    if (packed or not table) and shown and math.prod(shown) > MAX_PIXELS:
        size = " x ".join(map(str, shown))
        raise UnusableInputError(path, f"absurd image size in HDU {index}: {size} pixels", RECOPY)
    if not axes:
        return 0
    return abs(bitpix) // 8 * integer("GCOUNT", 1) * (integer("PCOUNT", 0) + pixels)


def _check_size(hdu: Hdu, size: int | None, path: Path) -> None:
    # Padding may be missing at the end of a file: no data are lost.
    if size is not None and hdu.data_offset + hdu.data_bytes > size:
        raise _truncated(path, hdu, max(size - hdu.data_offset, 0))


def _truncated(path: Path, hdu: Hdu, present: int) -> UnusableInputError:
    fault = f"truncated: {hdu.label} declares {hdu.data_bytes} bytes of data, {present} are there"
    return UnusableInputError(path, fault, RECOPY)


def _verify_sums(stream: BinaryIO, path: Path, hdu: Hdu, header: bytes) -> None:
    """Read the data of an HDU and compare its sums (FITS standard 4.0, section 4.4.2.7 and appendix J)."""
    datasum = 0
    left = hdu.padded_bytes
    while left:
        piece = stream.read(min(left, CHUNK))
        if not piece:
            if left > hdu.padded_bytes - hdu.data_bytes:
                raise _truncated(path, hdu, hdu.padded_bytes - left)
            break
        left -= len(piece)
        datasum = _add(datasum, piece)
    declared = hdu.values.get("DATASUM")
    if declared not in (None, "") and str(declared).strip() != str(datasum):
        raise UnusableInputError(path, f"DATASUM of {hdu.label} does not match its data", RECOPY)
    # A valid HDU sums to all ones ("minus zero"), because CHECKSUM is the complement of the rest.
    if hdu.values.get("CHECKSUM") not in (None, "") and _add(datasum, header) not in (0, 0xFFFFFFFF):
        raise UnusableInputError(path, f"CHECKSUM of {hdu.label} does not match", RECOPY)


def _add(total: int, piece: bytes) -> int:
    """Add bytes to a 32-bit ones' complement sum."""
    piece += bytes(-len(piece) % 4)
    total += int(np.frombuffer(piece, dtype=">u4").sum(dtype=np.uint64))
    while total >> 32:
        total = (total & 0xFFFFFFFF) + (total >> 32)
    return total
