"""Classical star/galaxy separation on the same objects: CLASS_STAR, SPREAD_MODEL, concentration, PSF less total
magnitude, and boosted trees.

Each but the raw CLASS_STAR is fitted to the training fields, with its error and the magnitude beside it. So each is
compared at its best, and at the same prior as the network.
"""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sgclassify.model.data.shards import CATALOG_COLUMNS, REAL, Sample, read_shard, true_classes
from sgclassify.model.judge.ceiling import MagnitudePrior, oracle_probabilities
from sgclassify.model.judge.results import MODEL
from sgclassify.model.judge.scores import score_sample, shards_of
from sgclassify.model.serve import runtime
from sgclassify.stages.arrays import F32, F64, Bool
from sgclassify.stages.bands import BAND_INDEX
from sgclassify.stages.columns import CLASSES
from sgclassify.stages.errors import UsageError
from sgclassify.stages.features import FEATURES

log = logging.getLogger(__name__)

RAW: Final = "class_star_i_raw"
"""CLASS_STAR of the i band as it is, cut at 0.5."""

ORACLE: Final = "oracle"
"""Name of the likelihood ratio with the true PSF, see `sgclassify.model.judge.ceiling`."""

METHODS: Final = (
    RAW, "class_star", "spread_model", "concentration", "psf_model", "trees_catalog", "trees_features",
)  # fmt: skip

DEGREE: Final = 3
"""Order of the products in a logistic regression. In five-fold cross-validation over the 64 training fields that
SExtractor has measured (seed 20260), orders 1, 2, 3 err in 9.7, 7.7, 7.6 % (CLASS_STAR), 4.9, 4.1, 3.9 %
(SPREAD_MODEL), 6.0, 5.1, 5.0 % (concentration) and 4.6, 3.5, 3.4 % (PSF magnitude); boosted trees on the same few
numbers in 7.3, 4.3, 5.5 and 3.7 %."""

_ALL_TREES: Final = {"learning_rate": 0.06, "max_leaf_nodes": 15, "l2_regularization": 1.0}

TREES: Final = {"trees_catalog": {**_ALL_TREES, "max_iter": 150}, "trees_features": {**_ALL_TREES, "max_iter": 400}}
"""Settings of the boosted trees. On the catalogue, in the same cross-validation, 150 and 400 rounds both err in 3.2 %
with logarithmic losses of 0.099 and 0.113, and 200 rounds with 8 leaves in 3.4 %. Twelve times as many objects have the
stage's own features, which allows more rounds; no other setting was tried there."""

BRIGHTEST_ERROR: Final = 0.005
"""Magnitude error below which bands weigh alike in a mean over the bands."""

SPREAD_ERROR: Final = 3e-4
"""The same for SPREAD_MODEL."""

SURE: Final = 0.005
"""CLASS_STAR stays this far from 0 and 1, so that its logarithmic odds are finite."""

FEWEST: Final = 100
"""With fewer objects nothing is fitted."""


@dataclass(frozen=True)
class CatalogSample:
    """What the baselines need of some shards; the first axis is the object.

    Attributes
    ----------
    catalog : ndarray of float32, shape (n, 7, len(CATALOG_COLUMNS))
    features : ndarray of float32, shape (n, 7, n_features)
    star : ndarray of bool, shape (n,)
    """

    catalog: F32
    features: F32
    star: Bool

    @classmethod
    def of(cls, sample: Sample) -> CatalogSample:
        """All objects of a sample."""
        return cls(sample.catalog, sample.features, true_classes(sample.table) == "star")

    @classmethod
    def read(cls, paths: list[Path]) -> CatalogSample:
        """Stars and galaxies of some shards, without reading their stamps."""
        parts = []
        for path in paths:
            table = pq.read_table(path, columns=["true_class", "catalog", "features"])
            table = table.filter(pc.is_in(table["true_class"], pa.array(CLASSES)))
            arrays = (table[name].combine_chunks().to_numpy_ndarray() for name in ("catalog", "features"))
            parts.append((*arrays, true_classes(table) == "star"))
        return cls(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def column(self, name: str) -> F64:
        """A column of SExtractor's catalogue, shape (n, 7)."""
        return self.catalog[:, :, CATALOG_COLUMNS.index(name)].astype(np.float64)

    @property
    def found(self) -> Bool:
        """Objects that SExtractor found in some band."""
        return np.asarray(np.isfinite(self.column("Mag_Kron")).any(axis=1))


def _mean(values: F64, error: F64) -> tuple[F64, F64]:
    """Mean over the bands by inverse variance, and its error; NaN where no band has both."""
    good = np.isfinite(values) & np.isfinite(error)
    weight = np.where(good, 1.0 / np.maximum(error, 1e-9) ** 2, 0.0)
    total = weight.sum(axis=1)
    known = total > 0
    mean = (weight * np.where(good, values, 0.0)).sum(axis=1) / np.where(known, total, 1.0)
    return np.where(known, mean, np.nan), np.where(known, 1.0 / np.sqrt(np.where(known, total, 1.0)), np.nan)


def _brightness(m: CatalogSample) -> list[F64]:
    """Magnitude and error in the best-measured band, and the number of bands with a detection."""
    magnitude, error = m.column("Mag_Kron"), m.column("MagErr_Kron")
    best = np.argmin(np.where(np.isfinite(error), error, np.inf), axis=1)
    rows = np.arange(len(best))
    return [magnitude[rows, best], error[rows, best], np.isfinite(magnitude).sum(axis=1).astype(np.float64)]


def class_star(m: CatalogSample) -> F64:
    """Mean CLASS_STAR over the bands, weighted by the errors of the magnitudes."""
    return _mean(m.column("Class_Star"), np.maximum(m.column("MagErr_Kron"), BRIGHTEST_ERROR))[0]


def inputs(m: CatalogSample) -> dict[str, F64]:
    """Inputs of each fitted method, shape (n, columns); a row with a NaN is an object without a value.

    The methods of one number get

    - that number,
    - its significance: asinh of the ratio to its error (CLASS_STAR: its logarithmic odds),
    - the logarithm of its error (CLASS_STAR has none),
    - the magnitude, and the logarithm of its error, in the band where that error is smallest,
    - the number of bands with a detection.

    The trees get every column of every band, missing ones as NaN, and the colours.
    """
    magnitude, magnitude_error, n_bands = _brightness(m)
    bright = [magnitude - 22.0, np.log10(np.maximum(magnitude_error, 1e-3)), n_bands]

    def with_error(value: F64, error: F64) -> F64:
        return np.stack([value, np.arcsinh(value / error), np.log10(error), *bright], axis=1)

    mean = class_star(m)
    sure = np.clip(mean, SURE, 1.0 - SURE)
    aperture_error = np.maximum(m.column("MagErr_Aper1"), BRIGHTEST_ERROR)
    total_error = np.maximum(m.column("MagErr_Model"), BRIGHTEST_ERROR)
    spread_error = np.maximum(m.column("SpreadErr_Model"), SPREAD_ERROR)
    apertures = m.column("Mag_Aper1") - magnitude[:, None]
    flux = m.features[:, :, FEATURES.index("psf_flux")].astype(np.float64)
    with warnings.catch_warnings():
        # an object without any PSF flux has no mean
        warnings.simplefilter("ignore", RuntimeWarning)
        own_colors = flux - np.nanmean(flux, axis=1, keepdims=True)
    n = len(m.star)
    catalog, features = (a.reshape(n, -1).astype(np.float64) for a in (m.catalog, m.features))
    return {
        "class_star": np.stack([mean, np.log(sure / (1.0 - sure)), *bright], axis=1),
        "spread_model": with_error(*_mean(m.column("Spread_Model"), spread_error)),
        "concentration": with_error(*_mean(m.column("Mag_Aper1") - m.column("Mag_Aper3"), aperture_error)),
        "psf_model": with_error(*_mean(m.column("Mag_PSF") - m.column("Mag_Model"), total_error)),
        "trees_catalog": np.concatenate([catalog, apertures, np.stack(bright, axis=1)], axis=1),
        "trees_features": np.concatenate([features, own_colors], axis=1),
    }


def _covered(name: str, columns: F64, m: CatalogSample) -> Bool:
    if name == "trees_features":
        return np.ones(len(columns), dtype=bool)
    return m.found if name == "trees_catalog" else np.asarray(np.isfinite(columns).all(axis=1))


class Baselines:
    """The methods, fitted.

    Parameters
    ----------
    training : CatalogSample
        Stars and galaxies to fit to. A method is fitted to those that have its columns.
    prior : float
        Share of stars that the probabilities assume, as in the network's contract. An object without a value gets it.

    `UsageError` if no method can be fitted.

    A method is left out, with a warning, if too few objects have a value for it. This happens to those on SExtractor's
    columns where SExtractor was not installed.

    The weights of the classes come from the share of stars in all of `training`. The share among the objects with a
    value would be wrong: SExtractor finds more stars than galaxies, and the prior is that of all objects.
    """

    def __init__(self, training: CatalogSample, prior: float) -> None:
        from sklearn.ensemble import HistGradientBoostingClassifier
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import PolynomialFeatures, StandardScaler

        self.prior = prior
        self.fitted: dict[str, Any] = {}
        self.fitted_to: dict[str, int] = {}
        share = float(training.star.mean()) if len(training.star) else np.nan
        weight = np.where(training.star, prior / share, (1 - prior) / (1 - share))
        for name, columns in inputs(training).items():
            used = _covered(name, columns, training)
            n = int(used.sum())
            if n < FEWEST or len(set(training.star[used].tolist())) < 2:
                log.warning(
                    "%s is left out: %d training objects have what it needs, which is too few; more fields give"
                    " more, with Debian's packages sextractor and psfex installed", name, n,
                )  # fmt: skip
                continue
            self.fitted_to[name] = n
            if name in TREES:
                # early stopping would hold out objects, not fields
                method = HistGradientBoostingClassifier(random_state=0, early_stopping=False, **TREES[name])
                fit = {"sample_weight": weight[used]}
            else:
                products = PolynomialFeatures(DEGREE, include_bias=False)
                method = make_pipeline(StandardScaler(), products, StandardScaler(), LogisticRegression(max_iter=2000))
                fit = {"logisticregression__sample_weight": weight[used]}
            # a missing band leaves columns without any value, which scikit-learn cannot bin
            known = columns[used]
            known[:, ~np.isfinite(known).any(axis=0)] = 0.0
            self.fitted[name] = method.fit(known, training.star[used], **fit)
        if not self.fitted:
            raise UsageError("too few training objects for any method; make a larger data set")

    def probabilities(self, m: CatalogSample) -> tuple[dict[str, F64], dict[str, Bool]]:
        """Probability of being a star by each of `METHODS` that is not left out, and where the method has a value.

        Where it has none, the probability is the prior.
        """
        raw = m.column("Class_Star")[:, BAND_INDEX["i"]]
        probabilities, covered = {RAW: raw.copy()}, {RAW: np.isfinite(raw)}
        for name, columns in inputs(m).items():
            if name not in self.fitted:
                continue
            use = covered[name] = _covered(name, columns, m)
            p = probabilities[name] = np.zeros(len(columns))
            if use.any():
                p[use] = self.fitted[name].predict_proba(columns[use])[:, 1]
        for name, p in probabilities.items():
            p[~covered[name]] = self.prior
        return probabilities, covered


@dataclass(frozen=True)
class MethodSummary:
    """How a method does on the stars and galaxies of a part.

    Attributes
    ----------
    fitted_to : int
        Training objects; 0 for a method that is not fitted here.
    coverage : float
        Share of the objects that the method has a value for.
    error, error_of_model : float
        Error rates of the method and of the model on these, at p = 0.5.
    error_of_all : float
        Error rate of the method on all objects, with the prior where it has no value.
    """

    method: str
    fitted_to: int
    coverage: float
    error: float
    error_of_model: float
    error_of_all: float


def score_part(
    data_dir: Path, part: str, models: dict[str, Path | None], found_only: bool = False, oracle: int = 0,
    prior: float | None = None, training: Path | None = None,
) -> tuple[pa.Table, list[MethodSummary]]:  # fmt: skip
    """Score a part of a data set with every method.

    Parameters
    ----------
    models : dict of str to Path or None
        Archives: ``model`` gives the column ``p_star``, the others ``p_<name>``. None is the shipped model.
    found_only : bool
        Leave out objects that SExtractor did not find, so that all methods are judged on objects that they know.
    oracle : int
        About how many objects, spread over the fields, also get ``p_oracle``, see `oracle_probabilities`.
    prior : float, optional
        Share of stars that all methods assume; the model's own where None.
    training : Path, optional
        Another data set, to whose training fields the methods are fitted.

    Returns
    -------
    table : pyarrow.Table
        Truth, ``p_star``, a column ``p_<method>`` for every method, and ``found`` (by SExtractor, in some band).
    summaries : list of MethodSummary

    Raises
    ------
    UsageError
        If a part is missing, if no method can be fitted, if a method would be judged on the objects it is fitted to,
        or with `found_only` if SExtractor found nothing.
    """
    classifiers = {name: runtime.load(path) for name, path in models.items()}
    assumed = classifiers[MODEL].contract.prior_star_fraction if prior is None else prior
    fitted_to = shards_of(training or data_dir, "training")
    paths = shards_of(data_dir, part)
    if {path.resolve() for path in fitted_to} & {path.resolve() for path in paths}:
        raise UsageError(f"{data_dir}: the methods would be judged on what they are fitted to; name other --training")
    baselines = Baselines(CatalogSample.read(fitted_to), assumed)
    by_magnitude = MagnitudePrior(fitted_to) if oracle else None
    tables, known = [], []
    for path in paths:
        sample = read_shard(path, REAL)
        if found_only:
            sample = sample.take(np.flatnonzero(CatalogSample.of(sample).found))
        if not len(sample):
            continue
        m = CatalogSample.of(sample)
        probabilities, covered = baselines.probabilities(m)
        for name, classifier in classifiers.items():
            p = probabilities[name] = score_sample(classifier, sample, prior=prior)
            covered[name] = np.isfinite(p)
        if by_magnitude is not None:
            p = oracle_probabilities(data_dir, part, sample, -(-oracle // len(paths)), by_magnitude)
            probabilities[ORACLE], covered[ORACLE] = p, np.isfinite(p)
        table = sample.table.append_column("found", pa.array(m.found))
        for name, p in probabilities.items():
            table = table.append_column(_column(name), pa.array(p, mask=np.isnan(p)))
        tables.append(table)
        known.append(covered)
    if not tables:
        raise UsageError(f"{data_dir / part}: SExtractor has measured none of it; make the data set with it installed")
    table = pa.concat_tables(tables)
    covers = {name: np.concatenate([covered[name] for covered in known]) for name in known[0]}
    return table, _summaries(table, covers, baselines.fitted_to)


def _summaries(table: pa.Table, covers: dict[str, Bool], fitted_to: dict[str, int]) -> list[MethodSummary]:
    """How each method does on the objects that it has a value for, and on all."""
    kind = true_classes(table)
    judged = np.isin(kind, CLASSES)
    wrong = {name: (table[_column(name)].to_numpy() >= 0.5) != (kind == "star") for name in covers}
    has = {name: judged & covered for name, covered in covers.items()}
    return [
        MethodSummary(
            method=name,
            fitted_to=fitted_to.get(name, 0),
            coverage=_share(has[name][judged]),
            error=_share(values[has[name]]),
            error_of_model=_share(wrong[MODEL][has[name]]),
            error_of_all=_share(values[judged]),
        )
        for name, values in wrong.items()
    ]


def _column(method: str) -> str:
    return "p_star" if method == MODEL else f"p_{method}"


def _share(values: Bool) -> float:
    return float(values.mean()) if len(values) else float("nan")


def as_text(summaries: list[MethodSummary]) -> str:
    """The summaries as a table."""
    lines = [f"{'method':>18} {'fitted to':>9} {'coverage':>8} {'error':>8} {'model there':>11} {'error of all':>12}"]
    lines += [
        f"{row.method:>18} {row.fitted_to or '-':>9} {100 * row.coverage:7.1f}% {100 * row.error:7.2f}%"
        f" {100 * row.error_of_model:10.2f}% {100 * row.error_of_all:11.2f}%"
        for row in summaries
    ]
    return "\n".join(lines)
