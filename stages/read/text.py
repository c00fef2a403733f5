"""Text of FITS files. The standard allows ASCII only; some programs write other characters."""

from __future__ import annotations


def decode(stored: bytes) -> str:
    """Decode bytes of a header card or of a table as UTF-8, or as Latin-1, which accepts every byte, if that fails."""
    try:
        return stored.decode("utf-8")
    except UnicodeDecodeError:
        return stored.decode("latin-1")


def printable(text: str) -> str:
    """The text without control characters, which XML does not allow, and without blanks around it."""
    return "".join(c for c in text if c.isprintable()).strip()
