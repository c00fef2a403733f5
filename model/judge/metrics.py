"""Measures of a classifier: shares with intervals, ranking, calibration. Arrays in, numbers out.

These are not scikit-learn's functions, which are only test oracles. Those are in an extra that judging a run does not
need, change the last bit of one area in four, take 3 ms instead of 0.1 ms per call on a bin, and merge calibration
bins where probabilities are equal.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from scipy.stats import beta, rankdata

from sgclassify.stages.arrays import F64, I64, Bool

ECE_BINS: Final = 15
"""Bins of equal counts in the expected calibration error (Naeini et al. 2015; equal counts: Nguyen & O'Connor 2015)."""

SMALLEST_P: Final = 1e-6
"""Value of a probability of 0 in the cross entropy, which one such mistake would make infinite."""

Figure = Callable[[I64], float]
"""A figure of the objects of an index array."""


@dataclass(frozen=True)
class Recall:
    """Share of a class that is classified right.

    Attributes
    ----------
    right, n : int
        Objects classified right, and objects of the class that were scored.
    low, high : float
        Clopper-Pearson interval of the share, confidence 95 %.
    share : float
        Objects classified right over all; NaN without objects.
    """

    right: int
    n: int
    low: float
    high: float
    share: float


def recall(right: int, n: int) -> Recall:
    """A recall with its exact binomial (Clopper-Pearson) interval."""
    tail = (1.0 - 0.95) / 2.0
    low = float(beta.ppf(tail, right, n - right + 1)) if right else 0.0
    high = float(beta.ppf(1.0 - tail, right + 1, n - right)) if right < n else 1.0
    return Recall(right, n, low, high, right / n if n else float("nan"))


def roc_auc(p_star: F64, star: Bool) -> float:
    """Area under the ROC curve: the chance that a star is scored above a galaxy; ties count half. NaN of one class."""
    n_star, n_galaxy = int(star.sum()), int((~star).sum())
    if not n_star or not n_galaxy:
        return float("nan")
    ranks = rankdata(p_star)
    return float((ranks[star].sum() - n_star * (n_star + 1) / 2) / (n_star * n_galaxy))


def _cumulative(score: F64, positive: Bool, weight: F64 | None) -> tuple[F64, F64]:
    """Weights of the positives and of the negatives at or above each distinct threshold, from the highest down."""
    weight = np.ones(len(score)) if weight is None else weight
    order = np.argsort(-score, kind="stable")
    true = np.cumsum(np.where(positive, weight, 0.0)[order])
    false = np.cumsum(np.where(positive, 0.0, weight)[order])
    last = np.flatnonzero(np.append(np.diff(score[order]) != 0, True)) if len(score) else np.zeros(0, np.int64)
    return true[last], false[last]


def purity_at_completeness(score: F64, positive: Bool, completeness: float, weight: F64 | None = None) -> float:
    """Purity of the sample above the threshold that is complete to at least the given share; NaN of one class.

    A higher score is more like the positive class. The weights of the objects make another class ratio than the
    sample's.
    """
    if not positive.any() or positive.all():
        return float("nan")
    true, false = _cumulative(score, positive, weight)
    k = int(np.argmax(true >= completeness * true[-1] * (1 - 1e-12)))
    return float(true[k] / (true[k] + false[k]))


def completeness_at_purity(score: F64, positive: Bool, purity: float, weight: F64 | None = None) -> float:
    """Largest completeness of a sample above a threshold that is at least this pure; 0 if none is, NaN of one class."""
    return _most_complete(score, positive, weight, lambda true, false: true / (true + false) >= purity)


def true_positives_at(score: F64, positive: Bool, false_share: float) -> float:
    """Largest share of the positives above a threshold that at most this share of the negatives passes; NaN of one
    class."""
    return _most_complete(score, positive, None, lambda _, false: false <= false_share * false[-1])


def _most_complete(score: F64, positive: Bool, weight: F64 | None, allowed_of: Callable[[F64, F64], Bool]) -> float:
    """Largest completeness above a threshold that is allowed; 0 if none is, NaN of one class."""
    if not positive.any() or positive.all():
        return float("nan")
    true, false = _cumulative(score, positive, weight)
    allowed = allowed_of(true, false)
    return float((true[allowed] / true[-1]).max()) if allowed.any() else 0.0


def brier(p_star: F64, star: Bool) -> float:
    """Mean squared error of the probability; NaN without objects."""
    return float(np.mean((p_star - star) ** 2)) if len(p_star) else float("nan")


def surprise(p_star: F64, star: Bool) -> F64:
    """-ln of the probability of each object's true class, at most -ln `SMALLEST_P`; the mean is the cross entropy."""
    return np.asarray(-np.log(np.maximum(np.where(star, p_star, 1.0 - p_star), SMALLEST_P)))


def cross_entropy(p_star: F64, star: Bool) -> float:
    """Mean `surprise`; NaN without objects."""
    return float(surprise(p_star, star).mean()) if len(p_star) else float("nan")


def reliability(p_star: F64, star: Bool, bins: int = ECE_BINS) -> tuple[F64, F64, I64]:
    """Mean probability, share of stars and number of objects in bins of equal counts, in order of the probability.

    Where objects of one probability fall into two bins, their stars are shared evenly: their order says nothing.
    """
    _, same, count = np.unique(p_star, return_inverse=True, return_counts=True)
    shared = (np.bincount(same, star) / count)[same] if len(p_star) else np.zeros(0)
    order = np.argsort(p_star, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    return (
        np.array([p_star[part].mean() for part in parts]),
        np.array([shared[part].mean() for part in parts]),
        np.array([len(part) for part in parts], dtype=np.int64),
    )


def ece(p_star: F64, star: Bool, bins: int = ECE_BINS) -> float:
    """Expected calibration error: mean difference of probability and share of stars over bins of equal counts.

    Even a perfect classifier has one, of the order of sqrt(p (1 - p) bins / n): see `expected_ece`.
    """
    if not len(p_star):
        return float("nan")
    p, share, n = reliability(p_star, star, bins)
    return float((n * np.abs(p - share)).sum() / n.sum())


def expected_ece(p_star: F64) -> float:
    """Mean calibration error of these objects if the probabilities were exact: the part of noise alone."""
    rng = np.random.default_rng(0)
    return float(np.mean([ece(p_star, rng.random(len(p_star)) < p_star) for _ in range(100)]))


def bootstrap_interval(figure: Figure, field: I64) -> tuple[float, float]:
    """95 % interval of a figure from 300 draws of whole fields, since objects of a field share its PSFs.

    If all objects are of one field, objects are drawn instead.
    """
    rng = np.random.default_rng(0)
    names = np.unique(field)
    if len(names) > 1:
        members = [np.flatnonzero(field == name) for name in names]
    else:
        members = [np.array([k]) for k in range(len(field))]
    draws = (rng.integers(0, len(members), len(members)) for _ in range(300))
    values = [figure(np.concatenate([members[k] for k in drawn])) for drawn in draws]
    low, high = np.nanpercentile(values, [2.5, 97.5]) if np.isfinite(values).any() else (np.nan, np.nan)
    return float(low), float(high)
