"""Make a model answer in stages: calibrate the early ones, and find when each is certain."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from sgclassify.model.judge.metrics import ece
from sgclassify.model.serve.contract import CascadeContract
from sgclassify.model.train.calibrate import fit_calibration
from sgclassify.model.train.network import HEADS, Answer, Calibration, FusionNetwork, weighted
from sgclassify.stages.arrays import F64, Bool
from sgclassify.stages.cascade import Certainty, Stage

log = logging.getLogger(__name__)

MARGIN: Final = 1.1
"""How far beyond the worst object of the calibration fields a stage must be certain: there are others elsewhere."""

LEAST: Final = 2.0
"""Smallest number of standard deviations at which a stage is certain, however few objects it is fitted to."""

WORST_ECE: Final = 0.0005
"""Largest rise of the calibration error on the calibration fields; half of what is allowed elsewhere."""


@dataclass(frozen=True)
class Objects:
    """Calibration objects, and what the heads of all networks make of them.

    Attributes
    ----------
    heads : Tensor of float32, shape (3 * number of networks, n, 2)
        Logits.
    features : Tensor of float32, shape (n, 7, n_features)
    label, field : Tensor of int64, shape (n,)
    """

    heads: Tensor
    features: Tensor
    label: Tensor
    field: Tensor


@dataclass(frozen=True)
class Cascade:
    """The early stages of a model: their answers in order, and the contract."""

    early: tuple[Answer, ...]
    contract: CascadeContract


def fit_cascade(networks: Sequence[FusionNetwork], whole: Answer, prior: float, objects: Objects) -> Cascade:
    """Fit the early stages of a model on the calibration fields.

    The first stage is the sequence of the lightest network, the second that network as a whole, if there are others.
    The heads of the second stage keep the weights that they have in the model; a temperature makes up for the rest. A
    stage is certain where its logit is so many standard deviations from 0 that not one calibration object is lost, and
    a margin more. A lost object is one that the whole model has right and the stage wrong. The standard deviation is of
    the difference between the logit of the whole model and that of the stage, at the brightness of the object.

    Parameters
    ----------
    whole : Answer
        The answer of the model from all heads.
    prior : float
        Share of stars that the probabilities assume.
    """
    lightest = min(range(len(networks)), key=lambda k: sum(p.numel() for p in networks[k].parameters()))
    first = len(HEADS) * lightest
    brightness = Calibration.brightness(objects.features)
    own = whole.weights[first : first + len(HEADS)].float()  # type: ignore[index]
    if not float(own.sum()):
        own = torch.eye(len(HEADS))[0]
    parts = {Stage.SEQUENCE: (slice(first + len(HEADS) - 1, first + len(HEADS)), torch.ones(1))}
    if len(networks) > 1:
        parts[Stage.PART] = slice(first, first + len(HEADS)), own
    share = float((objects.label == 0).double().mean())
    judge = _Judge(
        _logit(whole, objects.heads, objects.features),
        brightness.double().numpy(),
        (objects.label == 0).numpy(),
        float(np.log(share / (1.0 - share)) - np.log(prior / (1.0 - prior))),
    )
    offset = whole.calibration.offset.detach().float()[0]
    early, certain, logits = [], {}, {}
    for stage, (heads, weights) in parts.items():
        start = torch.stack([offset, torch.zeros(())])
        total = weighted(objects.heads[heads], weights) + start
        calibration = fit_calibration(total, brightness, objects.label, objects.field, prior)
        calibration.offset[0] += offset
        # what half precision, which the archive is in, makes of it
        early.append(Answer(weights, calibration).half().float().requires_grad_(False))
        logits[stage] = _logit(early[-1], objects.heads[heads], objects.features)
        certain[stage.name] = judge.certainty(stage, logits[stage])
    figures = judge.figures(logits, certain) | {"fields": len(torch.unique(objects.field))}
    log.info("cascade: %s", figures)
    return Cascade(tuple(early), CascadeContract(lightest, certain, figures))


def _logit(answer: Answer, heads: Tensor, features: Tensor) -> F64:
    """ln(p_star / p_galaxy) of an answer, in double precision."""
    with torch.inference_mode():
        logits = weighted(heads, answer.weights.float())  # type: ignore[arg-type]
        found = answer.calibration(logits, Calibration.brightness(features)).double()
    return np.asarray((found[:, 0] - found[:, 1]).numpy())


@dataclass(frozen=True)
class _Judge:
    """Calibration objects as the whole model sees them.

    Attributes
    ----------
    whole : ndarray of float64, shape (n,)
        Logit of the whole model under its own prior.
    brightness : ndarray of float64, shape (n,)
    star : ndarray of bool, shape (n,)
    shift : float
        What the share of stars of these objects adds to a logit.
    """

    whole: F64
    brightness: F64
    star: Bool
    shift: float

    def lost(self, logit: F64) -> Bool:
        """Objects that the whole model has right and this answer wrong, under either of the two priors."""
        lost = np.zeros(len(logit), dtype=bool)
        for shift in (0.0, self.shift):
            lost |= ((self.whole + shift >= 0) == self.star) & ((logit + shift >= 0) != self.star)
        return lost

    def certainty(self, stage: Stage, logit: F64) -> Certainty:
        """When a stage with these logits is certain."""
        level, slope = _scatter(self.whole - logit, self.brightness)
        least = np.minimum(abs(logit), abs(logit + self.shift)) / np.exp(level + slope * self.brightness)
        lost = self.lost(logit)
        deviations = max(LEAST, MARGIN * float(least[lost].max(initial=0.0)))
        while True:
            found = Certainty(level + float(np.log(deviations)), slope)
            rise = self._ece(self.mixed(logit, found)) - self._ece(self.whole)
            if rise <= WORST_ECE or not self._settled(logit, found).any():
                break
            deviations *= MARGIN
        log.info("%s is certain at %.2f standard deviations; %d objects are lost before", stage, deviations, lost.sum())
        return found

    def _settled(self, logit: F64, certain: Certainty) -> Bool:
        return certain.settled(logit, np.full(len(logit), self.shift), self.brightness)

    def mixed(self, logit: F64, certain: Certainty) -> F64:
        """Logits of the stage where it is certain, else of the whole model."""
        return np.where(self._settled(logit, certain), logit, self.whole)

    def _ece(self, logit: F64) -> float:
        return ece(1.0 / (1.0 + np.exp(-(logit + self.shift))), self.star)

    def figures(self, logits: dict[Stage, F64], certain: dict[str, Certainty]) -> dict[str, object]:
        """What the stages do together on these objects, under the share of stars among them."""
        open_, together = np.ones(len(self.star), dtype=bool), self.whole.copy()
        settled = {}
        for stage, logit in logits.items():
            here = open_ & self._settled(logit, certain[stage.name])
            settled[stage.name] = round(float(here.mean()), 4)
            together[here] = logit[here]
            open_ &= ~here
        right = {name: (x + self.shift >= 0) == self.star for name, x in (("all", self.whole), ("stages", together))}
        return {
            "objects": len(self.star),
            "stars": int(self.star.sum()),
            "settled": settled,
            "stars right": [int(right[name][self.star].sum()) for name in ("all", "stages")],
            "galaxies right": [int(right[name][~self.star].sum()) for name in ("all", "stages")],
            "ece": [round(self._ece(self.whole), 5), round(self._ece(together), 5)],
        }


def _scatter(difference: F64, brightness: F64) -> tuple[float, float]:
    """Logarithm of the standard deviation of a difference, linear in the brightness: level and slope."""

    def cost(values: F64) -> float:
        logarithm = values[0] + values[1] * brightness
        return float(np.mean(logarithm + 0.5 * difference**2 * np.exp(-2.0 * logarithm)))

    start = 0.5 * np.log(np.mean(difference**2) + 1e-12)
    level, slope = minimize(cost, [start, 0.0], method="Nelder-Mead").x
    return float(level), float(slope)
