"""Text of FITS files, whose standard knows ASCII alone, and whose writers do not."""

from __future__ import annotations


def decode(stored: bytes) -> str:
    """Text of the bytes of a header card or of a table: UTF-8, or Latin-1, which knows every byte, where it is none."""
    try:
        return stored.decode("utf-8")
    except UnicodeDecodeError:
        return stored.decode("latin-1")


def printable(text: str) -> str:
    """The text without control characters, which XML does not know, and without blanks around it."""
    return "".join(c for c in text if c.isprintable()).strip()
