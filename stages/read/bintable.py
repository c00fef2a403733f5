"""FITS binary tables as Arrow tables: every row and column, as it is."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sgclassify.stages.errors import UnusableInputError
from sgclassify.stages.read.cards import Value
from sgclassify.stages.read.fitsfile import RECOPY, Hdu, iter_data, open_stream, scan

Raw = npt.NDArray[Any]

MAX_TABLE_BYTES: Final = 2**32
"""Largest table accepted, 4 GiB: a catalogue of ten million rows of 100 columns."""

MAX_COLUMNS: Final = 999
"""Columns of a binary table (FITS standard 4.0, section 7.3.1); a damaged header may claim any number."""

_CODES: Final = {
    "L": "S1",
    "B": "u1",
    "I": ">i2",
    "J": ">i4",
    "K": ">i8",
    "E": ">f4",
    "D": ">f8",
    "C": ">c8",
    "M": ">c16",
    "A": "S",
    "X": "u1",
    "P": ">i4",
    "Q": ">i8",
}
"""TFORM codes -> NumPy types of the stored values (FITS standard 4.0, table 18)."""

_UNSIGNED: Final = {"I": (2**15, np.uint16), "J": (2**31, np.uint32), "K": (2**63, np.uint64)}
_TFORM = re.compile(r"(\d*)([LXBIJKAEDCMPQ])(.*)")


def read_bintable(path: Path, hdu: Hdu) -> pa.Table:
    """Read a binary table HDU.

    Parameters
    ----------
    path : Path
        FITS file, gzip-compressed or not.
    hdu : Hdu
        The table, from `sgclassify.stages.read.fitsfile.scan` of the same file.

    Returns
    -------
    pyarrow.Table
        Columns in the order and with the names of the file, in native byte order. Vector columns are
        fixed-size lists (nested for TDIM), variable-length ones lists, complex values pairs;
        TSCAL, TZERO applied; TNULL and undefined logicals are null; trailing blanks of strings are stripped.
        Field metadata hold ``unit`` and ``ucd``, where the file has them.

    Raises
    ------
    UnusableInputError
        If the table is damaged, too large, tile-compressed, or has two columns of one name.
    """
    if hdu.values.get("ZTABLE") is True:
        raise UnusableInputError(path, "the table is tile-compressed", "decompress it with funpack")
    if hdu.data_bytes > MAX_TABLE_BYTES:
        raise UnusableInputError(path, f"absurd table size: {hdu.data_bytes} bytes", RECOPY)
    if len(hdu.axes_stored) != 2:
        raise UnusableInputError(path, f"the table in {hdu.label} has not 2 axes", RECOPY)
    width, n_rows = hdu.axes_stored
    columns = [_Column(path, hdu.values, k) for k in range(1, int(hdu.number("TFIELDS", 0)) + 1)]
    names = [column.name for column in columns]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise UnusableInputError(path, f"two columns have the name {twice[0]!r}", "rename one of them")
    if sum(column.bytes for column in columns) != width:
        raise UnusableInputError(
            path, f"the columns of {hdu.label} do not add up to its {width}-byte rows", RECOPY
        )
    with open_stream(path) as (stream, _):
        data = b"".join(iter_data(stream, path, hdu))
    rows = np.frombuffer(data, dtype=np.uint8, count=width * n_rows).reshape(n_rows, width)
    heap = memoryview(data)[int(hdu.number("THEAP", width * n_rows)) :]
    arrays: list[pa.Array] = []
    fields: list[pa.Field] = []
    start = 0
    for column in columns:
        array = column.array(rows[:, start : start + column.bytes], heap)
        start += column.bytes
        arrays.append(array)
        fields.append(pa.field(column.name, array.type, metadata=column.metadata or None))
    return pa.Table.from_arrays(arrays, schema=pa.schema(fields))


def column_names(hdu: Hdu) -> list[str]:
    """Names of the columns of a binary table HDU, in its order."""
    count = min(int(hdu.number("TFIELDS", 0)), MAX_COLUMNS)
    return [_column_name(hdu.values, k) for k in range(1, count + 1)]


def _column_name(values: dict[str, Value], k: int) -> str:
    return str(values.get(f"TTYPE{k}") or f"col{k}").strip()


class _Column:
    """One column of a binary table: its declaration, and how to decode it."""

    def __init__(self, path: Path, values: dict[str, Value], k: int) -> None:
        self.path = path
        form = str(values.get(f"TFORM{k}", "")).strip().upper()
        match = _TFORM.match(form)
        self.name = _column_name(values, k)
        if match is None:
            raise UnusableInputError(path, f"column {self.name} has the unknown format {form!r}", RECOPY)
        self.repeat = int(match[1]) if match[1] else 1
        self.code = match[2]
        self.rest = match[3]
        self.scale = _number(values.get(f"TSCAL{k}"), 1)
        self.zero = _number(values.get(f"TZERO{k}"), 0)
        null = values.get(f"TNULL{k}")
        self.null = null if isinstance(null, int) and not isinstance(null, bool) else None
        self.dims = _dims(values.get(f"TDIM{k}"))
        texts = {"unit": values.get(f"TUNIT{k}"), "ucd": values.get(f"TUCD{k}")}
        # XML, which the products hold, knows no control characters
        self.metadata = {
            key: "".join(c for c in str(text) if c.isprintable()).strip()
            for key, text in texts.items()
            if text
        }

    @property
    def bytes(self) -> int:
        """Width of the column in the table's rows."""
        if self.code == "X":
            return -(-self.repeat // 8)
        if self.code == "A":
            return self.repeat
        size = np.dtype(_CODES[self.code]).itemsize
        return size * self.repeat * (2 if self.code in "PQ" else 1)

    def array(self, stored: npt.NDArray[np.uint8], heap: memoryview) -> pa.Array:
        """Decode the column.

        Parameters
        ----------
        stored : uint8 array (n_rows, bytes)
        heap : memoryview
            What follows the rows: the values of variable-length columns.
        """
        n = len(stored)
        if self.repeat == 0:
            return pa.nulls(n)
        if self.code in "PQ":
            return self._variable(stored, heap)
        if self.code == "A":
            return self._strings(stored)
        if self.code == "X":
            bits = np.unpackbits(np.ascontiguousarray(stored), axis=1)[:, : self.repeat]
            return _nest(pa.array(bits.ravel().astype(bool)), [self.repeat])
        values = np.ascontiguousarray(stored).view(_CODES[self.code])
        shape = self.dims if self.dims and math.prod(self.dims) == self.repeat else (self.repeat,)
        return _nest(self._decode(values.ravel(), self.code), shape)

    def _decode(self, values: Raw, code: str) -> pa.Array:
        """Flat values as an Arrow array of native byte order, scaled, with nulls."""
        if code == "L":
            return pa.array(values == b"T", mask=(values != b"T") & (values != b"F"))
        if code == "A":
            return pa.array(values.tobytes().decode("ascii", "replace"))
        if code in "CM":
            flat = values.astype(values.dtype.newbyteorder("=")).view(
                np.float32 if code == "C" else np.float64
            )
            return pa.FixedSizeListArray.from_arrays(pa.array(flat), 2)
        native = values.astype(values.dtype.newbyteorder("="))
        mask = native == self.null if self.null is not None and code in "BIJK" else None
        if self.scale == 1 and code in _UNSIGNED and self.zero == _UNSIGNED[code][0]:
            # Adding 2^(n-1) to an n-bit integer is flipping its first bit.
            unsigned = _UNSIGNED[code][1]
            native = native.view(unsigned) ^ unsigned(_UNSIGNED[code][0])
        elif self.scale == 1 and code == "B" and self.zero == -128:
            native = (native ^ np.uint8(128)).view(np.int8)
        elif self.scale != 1 or self.zero != 0:
            native = native * float(self.scale) + float(self.zero)
        return pa.array(native, mask=mask)

    def _strings(self, stored: npt.NDArray[np.uint8]) -> pa.Array:
        width = self.repeat
        shape: tuple[int, ...] = (1,)
        substring = re.match(r"(\d+)", self.rest)
        if self.dims and math.prod(self.dims) <= self.repeat:
            # The first axis in FITS order, the last here, is the length of one string.
            width, shape = self.dims[-1], self.dims[:-1] or (1,)
        elif substring and 0 < int(substring[1]) <= self.repeat:
            width, shape = int(substring[1]), (self.repeat // int(substring[1]),)
        used = np.ascontiguousarray(stored[:, : width * math.prod(shape)])
        texts = used.view(f"S{width}").ravel()
        return _nest(pa.array([_text(item) for item in texts.tolist()], pa.string()), shape)

    def _variable(self, stored: npt.NDArray[np.uint8], heap: memoryview) -> pa.Array:
        code = self.rest[:1]
        if code not in _CODES or code in "PQX" or not code:
            raise UnusableInputError(self.path, f"column {self.name}: unknown variable-length format", RECOPY)
        lengths, starts = np.ascontiguousarray(stored).view(_CODES[self.code]).T.astype(np.int64)
        if code == "A":
            return pa.array(
                [
                    _text(bytes(self._slice(heap, a, n, self.name)))
                    for a, n in zip(starts, lengths, strict=True)
                ],
                pa.string(),
            )
        kind = np.dtype(_CODES[code])
        pieces = [
            self._slice(heap, a, n * kind.itemsize, self.name) for a, n in zip(starts, lengths, strict=True)
        ]
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        flat = np.frombuffer(b"".join(pieces), dtype=kind)
        return pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), self._decode(flat, code))

    def _slice(self, heap: memoryview, start: int, size: int, name: str) -> memoryview:
        if size < 0 or start < 0 or start + size > len(heap):
            raise UnusableInputError(self.path, f"column {name} points outside the table's heap", RECOPY)
        return heap[start : start + size]


def table_hdus(path: Path) -> list[Hdu]:
    """All binary tables of a file that are not tile-compressed images."""
    return [hdu for hdu in scan(path) if hdu.is_table and not hdu.compressed]


def _nest(flat: pa.Array, shape: tuple[int, ...] | list[int]) -> pa.Array:
    """Fold a flat array into fixed-size lists; `shape` is in C order, (1,) leaves the array flat."""
    if tuple(shape) == (1,):
        return flat
    for length in reversed(shape):
        flat = pa.FixedSizeListArray.from_arrays(flat, length)
    return flat


def _text(stored: bytes) -> str:
    return stored.split(b"\0", 1)[0].decode("ascii", "replace").rstrip(" ")


def _dims(value: Value) -> tuple[int, ...]:
    """Shape of TDIM in C order; empty where it is missing or malformed."""
    match = re.fullmatch(r"\s*\(([\d,\s]+)\)\s*", str(value or ""))
    parts = match[1].split(",") if match else []
    if not all(part.strip() for part in parts):
        return ()
    return tuple(int(part) for part in reversed(parts))


def _number(value: Value, default: int) -> int | float:
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else default
