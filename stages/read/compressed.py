"""Rows of a tile-compressed image. astropy decodes them, in strips of whole rows of tiles.

Of a whole file astropy decodes a tile at a time: it seeks and reads each tile, and searches the header for where the
heap begins. That takes three times as long as the decoding itself. Where astropy is asked for all of an image, it reads
the heap once. So each strip is given to it as a small file of its own: the cards about the compression, the strip's
rows of the table, and its part of the heap.
"""

from __future__ import annotations

import io
import re
import threading
import warnings
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np
import numpy.typing as npt
from astropy.io import fits
from astropy.utils.exceptions import AstropyUserWarning

from sgclassify.stages.errors import UnusableInputError
from sgclassify.stages.read.bintable import heap_pointers
from sgclassify.stages.read.cards import CARD
from sgclassify.stages.read.fitsfile import BLOCK, RECOPY, Hdu

STRIP_PIXELS: Final = 2**21
"""Pixels of a strip, 8 MB of float32; more where one row of tiles has more."""

_KEPT: Final = re.compile(r"XTENSION|BITPIX|NAXIS\d*|PCOUNT|GCOUNT|TFIELDS|T[A-Z]+\d+|Z[A-Z]+\d*")
"""Cards that say how an image is stored. The others describe what it shows, and are odd in many files."""

_PRIMARY: Final = b"".join(
    card.encode().ljust(CARD)
    for card in (
        "SIMPLE  =                    T",
        "BITPIX  =                    8",
        "NAXIS   =                    0",
        "END",
    )
).ljust(BLOCK)

_OPENING = threading.Lock()
"""Held while warnings are filtered: all threads of a process share the filters."""


class TileRows:
    """Stored values of a tile-compressed image, whole rows at a time; the strip that was decoded last is kept.

    Damage raises whatever error astropy or NumPy has for it.

    Parameters
    ----------
    path : Path
        The file, for messages.
    stream : binary file
        Its decompressed content. Another reader may move its position.
    hdu : Hdu
        The compressed image.
    start : int
        Byte at which the header of the HDU begins.

    Attributes
    ----------
    tile : (int, int)
        Rows and columns of a tile.
    """

    def __init__(self, path: Path, stream: BinaryIO, hdu: Hdu, start: int) -> None:
        self._stream = stream
        self._nx, self._ny = hdu.axes
        self.tile = (_side(hdu, "ZTILE2"), _side(hdu, "ZTILE1"))
        self._across = -(-self._nx // self.tile[1])
        self._height = max(1, STRIP_PIXELS // (self._nx * self.tile[0])) * self.tile[0]
        width, n_rows = hdu.axes_stored
        if n_rows < -(-self._ny // self.tile[0]) * self._across:
            raise ValueError(f"{n_rows} tiles of {self.tile[1]} x {self.tile[0]} pixels")
        stream.seek(start)
        header = stream.read(hdu.data_offset - start)
        cards = [header[k : k + CARD] for k in range(0, len(header), CARD)]
        self._cards = [(key, card) for card in cards if _KEPT.fullmatch(key := card[:8].decode("latin-1").rstrip())]
        seed = hdu.values.get("ZDITHER0", 0)
        # anything else goes to astropy as it is, which refuses it
        self._seed = seed if isinstance(seed, int) else None
        table = stream.read(width * n_rows)
        if len(table) < width * n_rows:
            raise UnusableInputError(path, f"truncated: {hdu.label} has no whole table of tiles", RECOPY)
        self._table = np.frombuffer(table, dtype=np.uint8).reshape(n_rows, width)
        self._pointers = heap_pointers(path, hdu)
        heap = int(hdu.number("THEAP", width * n_rows))
        self._heap, self._heap_bytes = hdu.data_offset + heap, hdu.data_bytes - heap
        self._first = self._last = 0
        self._strip: npt.NDArray[Any] = np.empty((0, self._nx))

    def rows(self, y0: int, y1: int) -> npt.NDArray[Any]:
        """Rows ``y0`` to ``y1 - 1``, all columns; not for writing."""
        if self._first <= y0 and y1 <= self._last:
            return self._strip[y0 - self._first : y1 - self._first]
        pieces = []
        while y0 < y1:
            if not self._first <= y0 < self._last:
                first = y0 // self._height * self._height
                last = min(first + self._height, self._ny)
                # the old strip goes before the new one comes
                self._first, self._last, self._strip = 0, 0, np.empty((0, self._nx))
                self._strip = self._decode(first, last)
                self._first, self._last = first, last
            end = min(y1, self._last)
            pieces.append(self._strip[y0 - self._first : end - self._first])
            y0 = end
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _decode(self, y0: int, y1: int) -> npt.NDArray[Any]:
        """Decode rows that begin and end with a row of tiles."""
        first, end = y0 // self.tile[0] * self._across, -(-y1 // self.tile[0]) * self._across
        table, low, high = self._table_of(first, end)
        self._stream.seek(self._heap + low)
        heap = self._stream.read(high - low)
        # Each tile is dithered by the seed plus its number.
        seed = {} if self._seed is None or not first else {"ZDITHER0": self._seed + first}
        changed = {"NAXIS2": end - first, "ZNAXIS2": y1 - y0, "PCOUNT": len(heap)} | seed
        cards = [_card(key, changed[key]) if key in changed else card for key, card in self._cards]
        if seed and not any(key == "ZDITHER0" for key, _ in self._cards):
            cards.append(_card("ZDITHER0", changed["ZDITHER0"]))
        header = b"".join([*cards, b"END".ljust(CARD)])
        data = table.tobytes() + heap
        file = b"".join([_PRIMARY, header.ljust(-(-len(header) // BLOCK) * BLOCK), data, bytes(-len(data) % BLOCK)])
        with _OPENING, warnings.catch_warnings():
            # Odd cards do not matter here; damage raises.
            warnings.simplefilter("ignore", AstropyUserWarning)
            # Scaled elsewhere and not by astropy, which forgets BLANK beside the BZERO of unsigned integers.
            with fits.open(io.BytesIO(file), memmap=False, do_not_scale_image_data=True) as hdus:
                return np.asarray(hdus[1].section[:, :])

    def _table_of(self, first: int, end: int) -> tuple[npt.NDArray[np.uint8], int, int]:
        """Some rows of the table, their pointers moved to a heap of their own: where it begins and ends in the heap."""
        rows = self._table[first:end].copy()
        found = [
            (place, np.ascontiguousarray(rows[:, place : place + 2 * kind.itemsize]).view(kind), size)
            for place, kind, size in self._pointers
        ]
        low, high = self._heap_bytes, 0
        for _, pairs, size in found:
            used = pairs[:, 0] != 0
            if used.any():
                count, start = pairs[used].astype(np.int64).T
                stop = start + count * size
                if min(count.min(), start.min()) < 0 or max(count.max(), start.max(), stop.max()) > self._heap_bytes:
                    raise ValueError("a tile lies outside of the heap")
                low, high = min(low, int(start.min())), max(high, int(stop.max()))
        low = min(low, high)
        for place, pairs, _ in found:
            pairs[:, 1] = np.where(pairs[:, 0] != 0, pairs[:, 1] - low, 0)
            rows[:, place : place + 2 * pairs.itemsize] = pairs.view(np.uint8)
        return rows, low, high


def _side(hdu: Hdu, key: str) -> int:
    """Side of the tiles, pixels."""
    value = hdu.values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{key} is {'missing' if value is None else repr(value)}")
    return value


def _card(key: str, value: int) -> bytes:
    return f"{key:8}= {value:20d}".encode().ljust(CARD)
