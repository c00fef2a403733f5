"""The stages of a model that answers in stages: which of them decided about an object, and when one is certain.

The first stage is cheap and settles most objects. Only those that it is not certain of go on to the next one.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt

from sgclassify.stages.arrays import F32, F64, Bool
from sgclassify.stages.features import FEATURES

I8 = npt.NDArray[np.int8]


class Stage(enum.IntEnum):
    """Values of the ``sg_stage`` column (int8), each with its meaning."""

    meaning: str

    def __new__(cls, value: int, meaning: str) -> Self:
        """One stage."""
        stage = int.__new__(cls, value)
        stage._value_ = value
        stage.meaning = meaning
        return stage

    NONE = 0, "not scored"
    SEQUENCE = 1, "the measurements alone"
    PART = 2, "the lightest network of the model"
    WHOLE = 3, "the whole model"


@dataclass(frozen=True)
class Answers:
    """What a model answers.

    Attributes
    ----------
    both : ndarray of float32, shape (n, 2)
        p_star and p_galaxy under the model's own prior; both are NaN where the model gave no finite number.
    stage : ndarray of int8, shape (n,)
        `Stage` that decided.
    """

    both: F32
    stage: I8


@dataclass(frozen=True)
class Certainty:
    """When a stage is certain: where its logit is at least exp(`level` + `slope` * brightness), see `brightness`.

    The answers of two stages differ more where an object is bright, as there is more to see.
    """

    level: float
    slope: float

    def settled(self, logit: F64, shift: F64, bright: F64) -> Bool:
        """Objects that the stage is certain of.

        Parameters
        ----------
        logit : ndarray of float64, shape (n,)
            ln(p_star / p_galaxy) of the stage under the model's own prior; NaN settles nothing.
        shift : ndarray of float64, shape (n,)
            What another prior adds to it. The stage must be certain under both, of the same class.
        bright : ndarray of float64, shape (n,)
            `brightness`.
        """
        least = np.exp(self.level + self.slope * bright)
        other = logit + shift
        return np.asarray((np.minimum(logit, other) >= least) | (np.maximum(logit, other) <= -least))


def brightness(features: F32) -> F64:
    """Brightness of each object from its catalogue sequence (n, 7, n_features), shape (n,).

    It is asinh of the largest signal-to-noise ratio over the bands, within 0 and 7, less 3 (a ratio of 10).
    """
    snr = np.nan_to_num(features[:, :, FEATURES.index("snr")]).max(axis=1)
    return np.asarray(np.clip(snr, 0.0, 7.0).astype(np.float64) - 3.0)
