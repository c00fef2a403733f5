"""How far the answers of a model depend on which bands there are, and on the orientation of the stamps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from sgclassify.model.data.shards import true_classes
from sgclassify.model.judge import metrics
from sgclassify.model.judge.results import Bands, ErrorRate, Symmetries
from sgclassify.model.judge.scores import assumed, inputs_of, loaded, samples_of, score_sample, shards_of
from sgclassify.model.serve import runtime
from sgclassify.stages.arrays import F64, Bool
from sgclassify.stages.bands import BAND_INDEX, BANDS
from sgclassify.stages.classify import averaged, each_symmetry, with_prior
from sgclassify.stages.columns import CLASSES

SYMMETRY_SAMPLE: Final = 2_000
"""Objects that are looked at in all eight symmetries."""

TRIOS: Final = (("NUV", "u", "g"), ("g", "r", "i"), ("i", "z", "y"))


def by_bands(
    data_dir: Path, part: str, model: Path | None, prior: float | None = None, draws: int = 1, exact: bool = False
) -> Bands:
    """Errors with bands hidden: by their number, for each band alone and left out, and for some trios.

    Only objects with all seven bands count, so that all figures are of the same objects. Every object has `draws`
    random subsets of each size. The intervals hold for one: several of one object are not independent.
    """
    classifier = loaded(model, exact)
    rng = np.random.default_rng(0)
    wrong: dict[tuple[str, str], list[bool]] = {}
    for sample in samples_of(shards_of(data_dir, part), CLASSES):
        sample = sample.take(np.flatnonzero(np.all(sample.valid.any(axis=(2, 3)), axis=1)))
        if not len(sample):
            continue
        star = true_classes(sample.table) == "star"
        for kind, name, hidden in _hidden(len(sample), draws, rng):
            p = score_sample(classifier, sample, hidden, prior)
            wrong.setdefault((kind, name), []).extend(((p >= 0.5) != star)[np.isfinite(p)].tolist())
    rates: dict[str, dict[str, ErrorRate]] = {"number": {}, "alone": {}, "without": {}, "trios": {}}
    for (kind, name), values in wrong.items():
        found = metrics.recall(sum(values), len(values))
        rates[kind][name] = ErrorRate(found.share, found.n, found.low, found.high)
    ratio = None
    if number := rates["number"]:
        ratio = number["3"].error / max(number["7"].error, 1e-12)
    return Bands(**rates, three_over_seven=ratio)


def _hidden(n: int, draws: int, rng: np.random.Generator) -> Iterator[tuple[str, str, Bool]]:
    """Kind, name and hidden bands, shape (n, 7), of every choice of bands."""
    yield "number", "7", np.zeros((n, len(BANDS)), dtype=bool)
    for count in range(1, len(BANDS)):
        for _ in range(draws):
            yield "number", str(count), np.argsort(rng.random((n, len(BANDS))), axis=1) >= count
    for k, band in enumerate(BANDS):
        one = np.arange(len(BANDS)) == k
        yield "alone", band, np.tile(~one, (n, 1))
        yield "without", band, np.tile(one, (n, 1))
    for trio in TRIOS:
        left = np.isin(np.arange(len(BANDS)), [BAND_INDEX[band] for band in trio])
        yield "trios", ",".join(trio), np.tile(~left, (n, 1))


def by_symmetry(
    data_dir: Path, part: str, model: Path | None, prior: float | None = None, most: int = SYMMETRY_SAMPLE
) -> Symmetries:
    """How far probabilities depend on the orientation of the stamp, of `most` objects drawn evenly from the fields."""
    classifier = runtime.load(model)
    paths = shards_of(data_dir, part)
    rng = np.random.default_rng(0)
    own, assume = classifier.contract.prior_star_fraction, assumed(prior)
    every, means, stars = [], [], []
    for sample in samples_of(paths, CLASSES):
        sample = sample.take(np.sort(rng.permutation(len(sample))[: -(-most // len(paths))]))
        inputs = inputs_of(sample)
        turned = each_symmetry(inputs, classifier.probabilities)
        every.append([with_prior(both, inputs, own, assume).p_star for both in turned])
        # as in a run, which averages before it assumes another prior
        means.append(with_prior(averaged(turned), inputs, own, assume).p_star)
        stars.append(true_classes(sample.table) == "star")
    p: F64 = np.concatenate(every, axis=1, dtype=np.float64)
    star = np.concatenate(stars)
    known = np.isfinite(p).all(axis=0)
    p, mean, star = p[:, known], np.concatenate(means)[known], star[known]
    spread = np.ptp(p, axis=0)
    return Symmetries(
        n=len(star),
        median=float(np.median(spread)),
        quantile_95=float(np.quantile(spread, 0.95)),
        largest=float(spread.max()),
        error=float(((p[0] >= 0.5) != star).mean()),
        error_of_mean=float(((mean >= 0.5) != star).mean()),
    )
