"""The one registry of ``sg_flags``, the quality bit mask of the product, and the bits of the FLG input.

The bits are frozen: a bit is never given another meaning, new ones are added at the end.
"""

from __future__ import annotations

import enum


class SgFlag(enum.IntFlag):
    """Bits of the ``sg_flags`` column (int32)."""

    NO_POSITION = 1 << 0
    POSITION_MISMATCH = 1 << 1
    NOT_SCORED = 1 << 2
    NO_WEIGHT = 1 << 3
    NO_FLAG_IMAGE = 1 << 4
    STAGE_CATALOG = 1 << 5
    EDGE = 1 << 6
    MASKED = 1 << 7
    SATURATED = 1 << 8
    COSMIC_RAY = 1 << 9
    ARTIFACT = 1 << 10
    BLENDED = 1 << 11
    FEW_BANDS = 1 << 12
    LOW_SNR = 1 << 13
    DUPLICATE_ID = 1 << 14
    NOT_FINITE = 1 << 15


MEANING: dict[SgFlag, str] = {
    SgFlag.NO_POSITION: "catalogue row without a usable position; not scored",
    SgFlag.POSITION_MISMATCH: "pixel and sky position of the row disagree; not scored",
    SgFlag.NOT_SCORED: "probabilities are null: too few valid pixels in every band, or another bit says why",
    SgFlag.NO_WEIGHT: "a band was used without its weight image",
    SgFlag.NO_FLAG_IMAGE: "a band was used without its flag image",
    SgFlag.STAGE_CATALOG: "a detection comes from the stage's own source detection, its CAT being missing",
    SgFlag.EDGE: "the stamp of a band reaches over the edge of its detector",
    SgFlag.MASKED: "the core of a band has masked pixels",
    SgFlag.SATURATED: "the core of a band has saturated pixels",
    SgFlag.COSMIC_RAY: "the core of a band was hit by a cosmic ray",
    SgFlag.ARTIFACT: "the core of a band lies on a satellite trail, ghost or scattered light",
    SgFlag.BLENDED: "another object lies within the blending radius",
    SgFlag.FEW_BANDS: "fewer than three bands were used",
    SgFlag.LOW_SNR: "no band reaches a signal-to-noise ratio of 5",
    SgFlag.DUPLICATE_ID: "the row's objID occurs more than once in its CAT",
    SgFlag.NOT_FINITE: "the model returned a probability that is not finite; not scored",
}


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
    """Names of the bits set in one ``sg_flags`` value, lowest bit first.

    Parameters
    ----------
    value : int
        A non-negative ``sg_flags`` value.

    Returns
    -------
    list of str
        Names such as ``"edge"``; unknown bits raise.

    Raises
    ------
    ValueError
        If a bit is set that the registry does not know.
    """
    unknown = value & ~int(sum(SgFlag))
    if value < 0 or unknown:
        raise ValueError(f"sg_flags {value} has bits that are not in the registry: {unknown:#x}")
    return [flag.name.lower() for flag in SgFlag if value & flag and flag.name is not None]
