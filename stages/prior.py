"""Another prior: probabilities for a sample with another share of stars than the model's training sample had."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from sgclassify.stages.arrays import F32, F64
from sgclassify.stages.bands import BAND_INDEX
from sgclassify.stages.errors import UsageError
from sgclassify.stages.features import FEATURES, FLUX_SOFTENING

if TYPE_CHECKING:
    from sgclassify.stages.tile import Inputs


PRIOR_BANDS: Final = ("i", "r", "z", "g", "y", "u", "NUV")
"""Bands of the magnitude that a prior is read at: the first one that was used and has a positive flux counts."""


@dataclass(frozen=True)
class Prior:
    """Share of stars among stars and galaxies, constant or by magnitude.

    Attributes
    ----------
    star_fraction : tuple of float
        Within (0, 1); one number is the share at every magnitude.
    magnitude : tuple of float
        AB magnitudes of the shares, ascending. Linear between them; beyond the ends, the share of the end.
    """

    star_fraction: tuple[float, ...]
    magnitude: tuple[float, ...] = (0.0,)

    def __post_init__(self) -> None:
        if not self.star_fraction or len(self.star_fraction) != len(self.magnitude):
            raise UsageError("the prior needs one share of stars for each magnitude")
        if not all(0.0 < share < 1.0 for share in self.star_fraction):
            raise UsageError("a prior share of stars must lie between 0 and 1, and be neither")
        if not np.isfinite(self.magnitude).all() or (np.diff(self.magnitude) <= 0).any():
            raise UsageError("the magnitudes of a prior must ascend")

    def at(self, magnitude: F64) -> F64:
        """Share of stars at some magnitudes; a NaN magnitude counts as faint."""
        faint = np.where(np.isnan(magnitude), np.inf, magnitude)
        return np.asarray(np.interp(faint, self.magnitude, self.star_fraction))

    def describe(self) -> Any:
        """The share, or the table as a dict, for the record of a run."""
        if len(self.star_fraction) == 1:
            return self.star_fraction[0]
        return {"magnitude": list(self.magnitude), "star_fraction": list(self.star_fraction)}

    def as_text(self) -> str:
        """`describe` as a text, for the metadata of a file."""
        return json.dumps(self.describe())


def magnitudes(stamps: Inputs) -> F64:
    """AB magnitude within a radius of 6 px in the first of `PRIOR_BANDS` with a positive flux, shape (n,); else NaN.

    The stage measures it itself. It is close to the total magnitude for stars and small galaxies.
    """
    flux = FLUX_SOFTENING * np.sinh(stamps.features[:, :, FEATURES.index("flux")].astype(np.float64))
    flux = np.where(stamps.used & (flux > 0), flux, np.nan)
    result = np.full(len(stamps), np.nan)
    for band in reversed(PRIOR_BANDS):
        here = flux[:, BAND_INDEX[band]]
        result = np.where(np.isnan(here), result, 22.5 - 2.5 * np.log10(here))
    return result


def logit_of(probabilities: F32) -> F64:
    """Natural logarithm of the odds of being a star, ln(p_star / p_galaxy), shape (n,).

    Parameters
    ----------
    probabilities : ndarray of float32, shape (n, 2)
        p_star and p_galaxy, each with the relative precision of float32; NaN stays NaN. A probability of 0 counts as
        the smallest float32, so that the logarithm is finite.
    """
    least = np.finfo(np.float32).smallest_subnormal
    star, galaxy = np.log(np.maximum(probabilities.astype(np.float64), least)).T
    return np.asarray(star - galaxy)


def star_probability(logit: npt.ArrayLike, old: float, new: npt.ArrayLike) -> F64:
    """Probability of being a star under another prior, by Bayes' rule.

    Parameters
    ----------
    logit : array_like of float64, shape (n,)
        ln(p_star / p_galaxy) under the prior `old`, as the products store it.
    old : float
        Share of stars that it assumes: ``model_prior_star_fraction`` of the products.
    new : array_like of float64, shape (n,) or ()
        Share of stars to assume instead.
    """
    with np.errstate(invalid="ignore"):  # NaN stays NaN
        # 1 / (1 + exp(-x)) without an overflow
        return np.asarray(np.exp(-np.logaddexp(0.0, -(np.asarray(logit, dtype=np.float64) + prior_shift(old, new)))))


def prior_shift(old: float, new: npt.ArrayLike) -> F64:
    """What the prior `new` adds to a logit under the prior `old`; see `star_probability`."""
    new = np.asarray(new, dtype=np.float64)
    return np.asarray(np.log(new / (1.0 - new)) - np.log(old / (1.0 - old)))
