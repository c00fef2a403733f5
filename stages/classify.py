"""Classify objects: from their stamps to probabilities, and to the rows of the object catalogue.

Whatever scores an object calls `scores`: the run, ``sgclassify evaluate`` and ``sgclassify baselines``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from numpy.typing import ArrayLike

from sgclassify.stages.arrays import F32, F64, Bool
from sgclassify.stages.cascade import I8, Answers, Stage
from sgclassify.stages.columns import CLASSES
from sgclassify.stages.flags import SgFlag
from sgclassify.stages.prior import Prior, logit_of, magnitudes, prior_shift, star_probability
from sgclassify.stages.tile import Inputs, TileStamps
from sgclassify.stages.write.publish import indexed

Scorer = Callable[[F32, Bool, F32, F32, F32], F32]
"""A model: takes ``image``, ``valid``, ``sigma``, ``features`` and ``psf`` of `Inputs`. Returns p_star and p_galaxy
under its own prior, shape (n, 2); both are NaN where the model gave no finite number."""

Cascade = Callable[[Inputs, F64], Answers]
"""A model that answers in stages: takes what it is asked about, and what the prior that was asked for adds to the logit
under its own, shape (n,)."""

SYMMETRIES = 8
"""Symmetries of the square: four turns, and four turns of the mirror image."""

T = TypeVar("T", bound=np.generic)


@dataclass(frozen=True)
class Scores:
    """Probabilities of some objects.

    Attributes
    ----------
    p_star : ndarray of float32, shape (n,)
        Probability of being a star under the prior that was asked for; NaN where an object has no band, or the model no
        finite number.
    logit : ndarray of float64, shape (n,)
        ln(p_star / p_galaxy) under the model's own prior.
    stage : ndarray of int8, shape (n,)
        Which `Stage` of the model decided.
    """

    p_star: F32
    logit: F64
    stage: I8


def classify(
    stamps: TileStamps,
    scorer: Scorer,
    own_prior: float,
    prior: Prior | None = None,
    tta: bool = False,
    cascade: Cascade | None = None,
) -> pa.Table:
    """Score the objects of a tile as `scores` does; rows of the object catalogue, see `scored_table`."""
    found = scores(stamps, scorer, own_prior, prior, tta, cascade)
    return object_table(stamps, found.p_star, found.logit, found.stage)


def scores(
    inputs: Inputs,
    scorer: Scorer,
    own_prior: float,
    prior: Prior | None = None,
    tta: bool = False,
    cascade: Cascade | None = None,
) -> Scores:
    """Score objects.

    Parameters
    ----------
    scorer : callable
        The model; not called where there are no objects.
    own_prior : float
        Share of stars that the model assumes.
    prior : Prior, optional
        What to assume instead.
    tta : bool
        Average over the eight symmetries of the square, at eight times the cost.
    cascade : callable, optional
        The same model in stages, which answers in the place of `scorer`; not where `tta` asks for the utmost.
    """
    if not len(inputs):
        return Scores(np.empty(0, dtype=np.float32), np.empty(0), np.empty(0, dtype=np.int8))
    if cascade is not None and not tta:
        found = _asked_in_stages(cascade, inputs, own_prior, prior)
        return with_prior(found.both, inputs, own_prior, prior, found.stage)
    both = averaged(each_symmetry(inputs, scorer)) if tta else _asked(scorer, inputs)
    return with_prior(both, inputs, own_prior, prior)


def with_prior(both: F32, inputs: Inputs, own_prior: float, prior: Prior | None, stage: I8 | None = None) -> Scores:
    """Scores from what the model returned for the same objects; parameters as for `scores`.

    Where no `stage` is given, the whole model decided.
    """
    logit = logit_of(both)
    p_star = both[:, 0]
    if prior is not None:
        p_star = star_probability(logit, own_prior, prior.at(magnitudes(inputs))).astype(np.float32)
    if stage is None:
        stage = np.full(len(both), Stage.WHOLE, dtype=np.int8)
    return Scores(np.where(inputs.used.any(axis=1), p_star, np.float32(np.nan)), logit, stage)


def each_symmetry(inputs: Inputs, scorer: Scorer) -> F32:
    """What the model returns in each of the `SYMMETRIES`, shape (8, n, 2); the first is the stamp as it is."""
    return np.stack([_asked(scorer, _turned(inputs, k)) for k in range(SYMMETRIES)])


def averaged(each: F32) -> F32:
    """Mean of the probabilities of `each_symmetry`, shape (n, 2)."""
    return np.asarray(each.mean(axis=0, dtype=np.float64).astype(np.float32))


def _asked(scorer: Scorer, inputs: Inputs) -> F32:
    return scorer(inputs.image, inputs.valid, inputs.sigma, inputs.features, inputs.psf)


def _asked_in_stages(cascade: Cascade, inputs: Inputs, own_prior: float, prior: Prior | None) -> Answers:
    shift = np.zeros(len(inputs)) if prior is None else prior_shift(own_prior, prior.at(magnitudes(inputs)))
    return cascade(inputs, shift)


def _turned(inputs: Inputs, k: int) -> Inputs:
    def turned(stamps: npt.NDArray[T]) -> npt.NDArray[T]:
        return np.rot90(stamps if k < 4 else stamps[..., ::-1], k, axes=(2, 3))

    return dataclasses.replace(inputs, image=turned(inputs.image), valid=turned(inputs.valid), psf=turned(inputs.psf))


def object_table(stamps: TileStamps, p_star: F32, logit: F64, stage: I8 | None = None) -> pa.Table:
    """`scored_table` of a tile: NOT_FINITE marks the objects that have a band but no finite `p_star`.

    Where no `stage` is given, the whole model decided.
    """
    flags = stamps.sg_flags.astype(np.int32)
    failed = ~np.isfinite(p_star) & ((flags & int(SgFlag.NOT_SCORED)) == 0)
    flags = np.where(failed, flags | int(SgFlag.NOT_FINITE), flags).astype(np.int32)
    if stage is None:
        stage = np.full(len(p_star), Stage.WHOLE, dtype=np.int8)
    return scored_table(stamps.object_id, stamps.ra, stamps.dec, p_star, logit, flags, stage, stamps.bands)


def scored_table(
    object_id: ArrayLike,
    ra: ArrayLike,
    dec: ArrayLike,
    p_star: ArrayLike,
    logit: ArrayLike,
    sg_flags: ArrayLike,
    sg_stage: ArrayLike,
    bands: Sequence[str],
) -> pa.Table:
    """Rows of the object catalogue.

    Parameters
    ----------
    object_id : array_like of int64, shape (n,)
        Unique.
    ra, dec : array_like of float64, shape (n,)
        ICRS, degrees.
    p_star : array_like of float32, shape (n,)
        Probability of a star; not finite where it could not be computed, which sets NOT_SCORED.
    logit : array_like of float64, shape (n,)
        ln(p_star / p_galaxy) under the model's own prior.
    sg_flags : array_like of int32, shape (n,)
        A set NOT_SCORED makes the probabilities null whatever `p_star` says.
    sg_stage : array_like of int8, shape (n,)
        `Stage` of the model that decided.
    bands : sequence of str
        Such as ``"u,g,r,i"``; ``n_bands`` is their number.

    Returns
    -------
    pyarrow.Table
        `OBJECT_COLUMNS`, sorted by ``_healpix_29``, then ``object_id``. Where not null, ``p_galaxy`` is
        1 - ``p_star`` in float32, so that the two add up to exactly 1 in float32; the class of 0.5 is star.
        Where it is null, ``n_bands`` and ``sg_stage`` are 0 and ``bands`` is empty.

    Raises
    ------
    ValueError
        If identifiers repeat, a position is off the sky, or a probability lies outside [0, 1].
    """
    ids = np.asarray(object_id, dtype=np.int64)
    probability = np.asarray(p_star, dtype=np.float32)
    flags = np.asarray(sg_flags, dtype=np.int32)
    null = ~np.isfinite(probability) | ((flags & SgFlag.NOT_SCORED) != 0)
    probability = np.where(null, np.float32(0.0), probability)
    if not ((probability >= 0.0) & (probability <= 1.0)).all():
        raise ValueError("probabilities must lie within [0, 1]")
    galaxy = (np.float32(1.0) - probability).astype(np.float32)
    texts = ["" if empty else text for empty, text in zip(null, bands, strict=True)]
    table = pa.table(
        {
            "object_id": pa.array(ids),
            "ra": pa.array(np.asarray(ra, dtype=np.float64)),
            "dec": pa.array(np.asarray(dec, dtype=np.float64)),
            "p_star": pa.array(probability, mask=null),
            "p_galaxy": pa.array(galaxy, mask=null),
            "sg_class": pa.DictionaryArray.from_arrays(
                pa.array(np.where(probability >= 0.5, 0, 1).astype(np.int8), mask=null), list(CLASSES)
            ),
            "sg_flags": pa.array(np.where(null, flags | np.int32(SgFlag.NOT_SCORED), flags)),
            "n_bands": pa.array([text.count(",") + 1 if text else 0 for text in texts], pa.int8()),
            "bands": pa.array(texts, pa.string()),
            "logit": pa.array(np.asarray(logit, dtype=np.float64), mask=null),
            "sg_stage": pa.array(np.where(null, int(Stage.NONE), np.asarray(sg_stage)).astype(np.int8)),
        }
    )
    return indexed(table)
