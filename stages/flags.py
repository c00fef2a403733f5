"""The one registry of ``sg_flags``, the quality bit mask of the product, and the bits of the FLG input.

The bits are frozen: a bit is never given another meaning, new ones are added at the end.
"""

from __future__ import annotations

import enum
from typing import Self


class SgFlag(enum.IntFlag):
    """Bits of the ``sg_flags`` column (int32), each with its meaning."""

    meaning: str

    def __new__(cls, value: int, meaning: str = "") -> Self:
        """One bit."""
        flag = int.__new__(cls, value)
        flag._value_ = value
        flag.meaning = meaning
        return flag

    NO_POSITION = 1 << 0, "catalogue row without a usable position; not scored"
    POSITION_MISMATCH = 1 << 1, "pixel and sky position of the row disagree; not scored"
    NOT_SCORED = 1 << 2, "probabilities are null: too few valid pixels in every band, or another bit says why"
    NO_WEIGHT = 1 << 3, "a band was used without its weight image"
    NO_FLAG_IMAGE = 1 << 4, "a band was used without its flag image"
    STAGE_CATALOG = 1 << 5, "a detection comes from the stage's own source detection, its CAT being missing"
    EDGE = 1 << 6, "the stamp of a band reaches over the edge of its detector"
    MASKED = 1 << 7, "the core of a band has masked pixels"
    SATURATED = 1 << 8, "the core of a band has saturated pixels"
    COSMIC_RAY = 1 << 9, "the core of a band was hit by a cosmic ray"
    ARTIFACT = 1 << 10, "the core of a band lies on a satellite trail, ghost or scattered light"
    BLENDED = 1 << 11, "another object lies within the blending radius"
    FEW_BANDS = 1 << 12, "fewer than three bands were used"
    LOW_SNR = 1 << 13, "no band reaches a signal-to-noise ratio of 5"
    DUPLICATE_ID = 1 << 14, "the row's objID occurs more than once in its CAT"
    NOT_FINITE = 1 << 15, "the model returned a probability that is not finite; not scored"


class InputFlag(enum.IntFlag):
    """Bits of the FLG image (uint16), as the CSST Level-1 pipeline writes them."""

    BAD = 1
    HOT = 2
    WARM = 4
    SATURATED = 8
    COSMIC_RAY = 16
    SATELLITE = 32
    GHOST = 64
    SCATTERED = 128


def decode(value: int) -> list[str]:
    """Names of the bits set in one ``sg_flags`` value, such as ``"edge"``, lowest bit first.

    Raises
    ------
    ValueError
        If the value is negative, or a bit is set that the registry does not know.
    """
    unknown = value & ~int(sum(SgFlag))
    if value < 0 or unknown:
        raise ValueError(f"sg_flags {value} has bits that are not in the registry: {unknown:#x}")
    return [flag.name.lower() for flag in SgFlag if value & flag and flag.name is not None]
