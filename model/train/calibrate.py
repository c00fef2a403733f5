"""Fit the step from the logits of the heads to probabilities: weights, temperature, offset, prior."""

from __future__ import annotations

import logging
import math
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import minimize
from torch import Tensor, nn

from sgclassify.model.train.network import Calibration, weighted
from sgclassify.stages.errors import UsageError

log = logging.getLogger(__name__)

CALIBRATION_FOLDS: Final = 5

CALIBRATION_LIMITS: Final = (2.0, 0.5)
"""Largest logarithm of the temperature, or offset, and largest slope of either with brightness."""


def prior_weights(share: float, prior_star_fraction: float) -> Tensor:
    """Weights of the two classes that give a sample another share of stars; their mean over the sample is 1."""
    if not 0.0 < share < 1.0:
        raise UsageError("a sample without stars, or without galaxies, trains and calibrates nothing")
    return torch.tensor([prior_star_fraction / share, (1.0 - prior_star_fraction) / (1.0 - share)])


def _fitted(logits: Tensor, brightness: Tensor, label: Tensor, weight: Tensor, free: tuple[int, int]) -> Calibration:
    """Calibration with the first ``free`` terms of temperature and offset fitted, within bounds."""
    calibration = Calibration().double()
    parameters = (calibration.log_temperature, calibration.offset)
    inputs = logits.double(), brightness.double()

    def cost(values: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        with torch.no_grad():
            for parameter, two in zip(parameters, torch.from_numpy(values).reshape(2, 2), strict=True):
                parameter.copy_(two)
        loss = nn.functional.cross_entropy(calibration(*inputs), label, weight=weight.double())
        gradient = torch.autograd.grad(loss, parameters)
        return float(loss.detach()), torch.cat(gradient).numpy()

    limits = ((CALIBRATION_LIMITS[k] if k < count else 0.0) for count in free for k in range(2))
    found = minimize(cost, np.zeros(4), jac=True, method="L-BFGS-B", bounds=[(-x, x) for x in limits])
    cost(found.x)
    return calibration.float().requires_grad_(False)


CALIBRATIONS: Final = ((1, 0), (2, 0), (2, 1), (2, 2))
"""Terms of temperature and of offset that the candidates fit, the simplest first."""


def fit_calibration(
    logits: Tensor, brightness: Tensor, label: Tensor, field: Tensor, prior_star_fraction: float
) -> Calibration:
    """Calibrate one head on the calibration fields.

    Cross-validation over fields chooses the number of terms with the lowest cross entropy. Weights of the objects make
    the share of stars the prior.

    Parameters
    ----------
    logits : Tensor of float32, shape (n, 2)
    brightness : Tensor of float32, shape (n,)
        As from `Calibration.brightness`.
    label, field : Tensor of int64, shape (n,)
    """
    weight = prior_weights(float((label == 0).double().mean()), prior_star_fraction)
    # each fold has some of the fields; with a single field there is no choice
    fold = torch.unique(field, return_inverse=True)[1] % CALIBRATION_FOLDS
    best = (math.inf, CALIBRATIONS[0])
    for free in CALIBRATIONS if int(fold.max()) > 0 else ():
        loss = 0.0
        for k in range(int(fold.max()) + 1):
            inside, outside = fold == k, fold != k
            fitted = _fitted(logits[outside], brightness[outside], label[outside], weight, free)
            out = fitted(logits[inside], brightness[inside])
            loss += float(nn.functional.cross_entropy(out, label[inside], weight=weight, reduction="sum"))
        log.info("calibration with %d and %d terms: loss %.5f", *free, loss / len(label))
        best = min(best, (loss, free))
    return _fitted(logits, brightness, label, weight, best[1])


def fit_weights(logits: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Weights of the heads' logits with the best answers together; none is negative.

    On the training objects, a head trusts an encoder that knows them by heart more than it should. Therefore the
    weights are fitted on other fields.

    Parameters
    ----------
    logits : Tensor of float32, shape (m, n, 2)
        Of the validation fields.
    label : Tensor of int64, shape (n,)
    weight : Tensor of float32, shape (2,)
        Of the classes, as in training.

    Returns
    -------
    Tensor of float32, shape (m,)
    """
    heads = logits.double()

    def cost(values: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        weights = torch.from_numpy(values).requires_grad_()
        loss = nn.functional.cross_entropy(weighted(heads, weights), label, weight=weight.double())
        (gradient,) = torch.autograd.grad(loss, [weights])
        return float(loss.detach()), gradient.numpy()

    found = minimize(
        cost, np.full(len(heads), 1 / len(heads)), jac=True, method="L-BFGS-B", bounds=[(0.0, 2.0)] * len(heads)
    )
    return torch.from_numpy(found.x).float()
