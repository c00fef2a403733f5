"""Header cards of FITS files, keyword -> value, and the decoding of their texts.

Own code, because astropy's parser warns about every odd card of a file, and changes state that all threads share.
"""

from __future__ import annotations

import math
import re
from typing import Final

CARD: Final = 80
"""Bytes of a card (FITS standard 4.0, section 3.2)."""

Value = str | int | float | bool | None

_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([EDed][+-]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)
_STRING = re.compile(r"'((?:[^']|'')*)'")


def parse_cards(header: bytes) -> tuple[dict[str, Value], frozenset[str]]:
    """Values of a header up to its END.

    Parameters
    ----------
    header : bytes
        Whole cards.

    Returns
    -------
    values : dict
        Keyword -> value; the first value of a repeated keyword. CONTINUE cards are joined to their strings.
    repeated : frozenset of str
        Keywords that occur again with another value.
    """
    values: dict[str, Value] = {}
    repeated: set[str] = set()
    # Cut first, then decode: a UTF-8 character may take several bytes of a card.
    cards = [decode(header[k : k + CARD]) for k in range(0, len(header), CARD)]
    for k, card in enumerate(cards):
        key = card[:8].rstrip()
        if key == "END":
            break
        if card[8:10] != "= ":
            continue
        value = parse_value(card[10:])
        if isinstance(value, str) and value.endswith("&") and card[10:].lstrip().startswith("'"):
            value = _continued(value, cards[k + 1 :])
        if key not in values:
            values[key] = value
        elif value != values[key]:
            repeated.add(key)
    return values, frozenset(repeated)


def _continued(text: str, following: list[str]) -> str:
    """A string and its CONTINUE cards, joined (FITS standard 4.0, section 4.2.1.2).

    An ``&`` at the end means "continued" only where the next card is a CONTINUE with a string.
    """
    for card in following:
        more = card[10:].lstrip()
        if not (text.endswith("&") and card.startswith("CONTINUE  ") and more.startswith("'")):
            break
        text = text[:-1] + str(parse_value(more))
    return text.rstrip()


def parse_value(text: str) -> Value:
    """Value of a card from its text after the equals sign. Text that is not a FITS value comes back as a string.

    ``NaN`` and ``Inf`` are not FITS values, but some programs write them. They become floats, so that the caller can
    say what is wrong.
    """
    text = text.strip()
    if text.startswith("'"):
        match = _STRING.match(text)
        return match[1].replace("''", "'").rstrip() if match else text[1:].rstrip()
    word = text.split("/", 1)[0].strip()
    if not word:
        return None
    if word in ("T", "F"):
        return word == "T"
    number = _parse_number(word)
    return word if number is None else number


def _parse_number(word: str) -> int | float | None:
    """A number in any form that FITS allows; None for other text."""
    if _NUMBER.fullmatch(word):
        if word.lstrip("+-").isdigit():
            return int(word)
        return float(word.upper().replace("D", "E"))
    return float(word) if _NOT_FINITE.fullmatch(word) else None


def as_number(value: Value) -> float:
    """A header value as a float, also where the header has it in quotes; NaN where it is not a number."""
    number = _parse_number(value.strip()) if isinstance(value, str) else value
    return math.nan if number is None or isinstance(number, bool) else float(number)


def decode(stored: bytes) -> str:
    """Decode bytes of a header card or of a table as UTF-8, or as Latin-1, which accepts every byte, if that fails."""
    # The standard allows ASCII only; some programs write other characters.
    try:
        return stored.decode("utf-8")
    except UnicodeDecodeError:
        return stored.decode("latin-1")


def printable(text: str) -> str:
    """The text without control characters, which XML does not allow, and without blanks around it."""
    return "".join(c for c in text if c.isprintable()).strip()
