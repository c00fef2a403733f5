"""A gzip stream as a file with ``read`` and ``seek``, whatever follows its last member."""

from __future__ import annotations

import io
import zlib
from typing import TYPE_CHECKING, BinaryIO, Final, cast

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAGIC: Final = b"\x1f\x8b"
"""First bytes of a gzip member."""

_READ: Final = 2**16
_GZIP_WINDOW: Final = 31
"""``wbits`` that makes zlib read the header of a member and check the CRC and the length at its end."""


def gunzip(packed: BinaryIO) -> BinaryIO:
    """Open a gzip stream for reading.

    Bytes after the last member are ignored, as the gzip program does with a warning: tapes and transfers pad files.
    (`gzip.GzipFile` refuses such a file.)

    Parameters
    ----------
    packed : binary file
        At its start. Reading forward needs only its `read`; seeking backward also its `seek`.

    Returns
    -------
    binary file
        Buffered. Seeking backward decompresses again from the start. Reading raises `EOFError` where a member ends
        early, and `zlib.error` where it is damaged.
    """
    return cast(BinaryIO, io.BufferedReader(_Members(packed), _READ))


class _Members(io.RawIOBase):
    """The decompressed members of a gzip stream, one after the other."""

    def __init__(self, packed: BinaryIO) -> None:
        self._packed = packed
        self._begin(b"")
        self._at = 0
        self._ended = False

    def _begin(self, pending: bytes) -> None:
        self._pending = pending
        self._member = zlib.decompressobj(_GZIP_WINDOW)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        while view.nbytes and not self._ended:
            if self._member.eof:
                self._next()
                continue
            if not self._pending:
                self._pending = self._packed.read(_READ)
            if not self._pending:
                raise EOFError("it ends within a member")
            piece = self._member.decompress(self._pending, view.nbytes)
            self._pending = self._member.unused_data or self._member.unconsumed_tail
            if piece:
                view[: len(piece)] = piece
                self._at += len(piece)
                return len(piece)
        return 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence == io.SEEK_END:
            raise io.UnsupportedOperation("the length of a gzip stream is not known")
        target = offset + (self._at if whence == io.SEEK_CUR else 0)
        if target < self._at:
            self._packed.seek(0)
            self._begin(b"")
            self._at = 0
            self._ended = False
        while self._at < target and self.read(min(target - self._at, _READ)):
            pass
        return self._at

    def _next(self) -> None:
        """Go to the next member, or to the end of the stream."""
        rest = self._pending.lstrip(b"\0")
        while len(rest) < len(MAGIC) and (more := self._packed.read(_READ)):
            rest = (rest + more).lstrip(b"\0")
        if rest.startswith(MAGIC):
            self._begin(rest)
        else:
            self._ended = True
