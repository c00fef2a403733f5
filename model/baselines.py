"""Classical star/galaxy separation on the same objects: CLASS_STAR, SPREAD_MODEL, concentration, PSF less total
magnitude, and boosted trees.

Each but the raw CLASS_STAR is fitted to the training fields that SExtractor has measured, with its error and the
magnitude beside it, so that it is compared as the best it can be and at the same prior as the network.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from sgclassify.model.dataset import CATALOG_COLUMNS, Sample, read_shard
from sgclassify.model.evaluate import score_sample, shards_of
from sgclassify.model.runtime import load
from sgclassify.stages.errors import UsageError
from sgclassify.stages.measure import FEATURES

F64 = npt.NDArray[np.float64]

SMALL_TREES: Final = {"max_iter": 150, "learning_rate": 0.06, "max_leaf_nodes": 8, "min_samples_leaf": 40}
"""For methods of one number: enough for any smooth function of it, its error and the magnitude."""

LARGE_TREES: Final = {"max_iter": 400, "learning_rate": 0.06, "max_leaf_nodes": 15, "l2_regularization": 1.0}
"""For many columns."""

BRIGHTEST_ERROR: Final = 0.005
"""Magnitude error below which bands weigh alike in a mean over the bands."""


@dataclass(frozen=True)
class Measured:
    """What the baselines need of some shards; the first axis is the object.

    Attributes
    ----------
    catalog : ndarray of float32, shape (n, 7, len(CATALOG_COLUMNS))
    features : ndarray of float32, shape (n, 7, n_features)
    star : ndarray of bool, shape (n,)
    """

    catalog: npt.NDArray[np.float32]
    features: npt.NDArray[np.float32]
    star: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, samples: list[Sample]) -> Measured:
        """Stars, galaxies and all else of some samples."""
        kind = [name for s in samples for name in s.table["true_class"].to_pylist()]
        return cls(
            np.concatenate([s.catalog for s in samples]),
            np.concatenate([s.features for s in samples]),
            np.array(kind) == "star",
        )

    def column(self, name: str) -> F64:
        """A column of SExtractor's catalogue, shape (n, 7)."""
        return self.catalog[:, :, CATALOG_COLUMNS.index(name)].astype(np.float64)

    @property
    def covered(self) -> npt.NDArray[np.bool_]:
        """Objects that SExtractor found in some band."""
        return np.asarray(np.isfinite(self.column("Mag_Kron")).any(axis=1))


def _mean(values: F64, error: F64) -> tuple[F64, F64]:
    """Weighted mean over the bands, and its error; nan where no band has both."""
    good = np.isfinite(values) & np.isfinite(error)
    weight = np.where(good, 1.0 / np.maximum(error, 1e-9) ** 2, 0.0)
    total = weight.sum(axis=1)
    known = total > 0
    mean = (weight * np.where(good, values, 0.0)).sum(axis=1) / np.where(known, total, 1.0)
    return np.where(known, mean, np.nan), np.where(known, 1.0 / np.sqrt(np.where(known, total, 1.0)), np.nan)


def _brightness(m: Measured) -> list[F64]:
    """Magnitude and error in the best-measured band, and the number of bands with a detection."""
    magnitude, error = m.column("Mag_Kron"), m.column("MagErr_Kron")
    best = np.argmin(np.where(np.isfinite(error), error, np.inf), axis=1)
    rows = np.arange(len(best))
    return [magnitude[rows, best], error[rows, best], np.isfinite(magnitude).sum(axis=1).astype(np.float64)]


def class_star(m: Measured) -> F64:
    """Mean CLASS_STAR over the bands, weighted by the errors of the magnitudes."""
    return _mean(m.column("Class_Star"), np.maximum(m.column("MagErr_Kron"), BRIGHTEST_ERROR))[0]


def _inputs(m: Measured) -> dict[str, F64]:
    bright = _brightness(m)
    error = np.maximum(m.column("MagErr_Aper1"), BRIGHTEST_ERROR)
    concentration = _mean(m.column("Mag_Aper1") - m.column("Mag_Aper3"), error)
    psf = _mean(
        m.column("Mag_PSF") - m.column("Mag_Model"), np.maximum(m.column("MagErr_Model"), BRIGHTEST_ERROR)
    )
    spread = _mean(m.column("Spread_Model"), np.maximum(m.column("SpreadErr_Model"), 3e-4))
    colors = m.column("Mag_Aper1") - bright[0][:, None]
    flat = m.catalog.reshape(len(m.catalog), -1).astype(np.float64)
    own = m.features.reshape(len(m.features), -1).astype(np.float64)
    flux = m.features[:, :, FEATURES.index("psf_flux")].astype(np.float64)
    with warnings.catch_warnings():
        # an object without any PSF flux has no mean
        warnings.simplefilter("ignore", RuntimeWarning)
        own_colors = flux - np.nanmean(flux, axis=1, keepdims=True)
    return {
        "class_star": np.stack([class_star(m), *bright], axis=1),
        "spread_model": np.stack([*spread, *bright], axis=1),
        "concentration": np.stack([*concentration, *bright], axis=1),
        "psf_minus_total": np.stack([*psf, *bright], axis=1),
        "trees_catalog": np.concatenate([flat, colors, np.stack(bright, axis=1)], axis=1),
        "trees_features": np.concatenate([own, own_colors], axis=1),
    }


class Baselines:
    """The methods, fitted.

    Parameters
    ----------
    training : Measured
        Objects to fit to: those that SExtractor has found are used.
    prior : float
        Share of stars that the probabilities are to assume; an object that a method knows nothing of gets it.

    Raises
    ------
    UsageError
        If SExtractor has measured too few of them.
    """

    def __init__(self, training: Measured, prior: float) -> None:
        from sklearn.ensemble import HistGradientBoostingClassifier

        index = np.flatnonzero(training.covered)
        if len(index) < 100 or len(set(training.star[index].tolist())) < 2:
            raise UsageError(
                f"{len(index)} training objects were measured by SExtractor, which is too few; install Debian's"
                " packages sextractor and psfex and make the data set again"
            )
        used = Measured(training.catalog[index], training.features[index], training.star[index])
        share = used.star.mean()
        weight = np.where(used.star, prior / share, (1 - prior) / (1 - share))
        self.prior, self.n_training = prior, len(index)
        self.fitted: dict[str, Any] = {}
        self.columns: dict[str, npt.NDArray[np.bool_]] = {}
        for name, columns in _inputs(used).items():
            settings = LARGE_TREES if name.startswith("trees") else SMALL_TREES
            trees = HistGradientBoostingClassifier(random_state=0, **settings)
            # scikit-learn cannot bin a column without a value
            self.columns[name] = np.isfinite(columns).any(axis=0)
            self.fitted[name] = trees.fit(columns[:, self.columns[name]], used.star, sample_weight=weight)

    def probabilities(self, m: Measured) -> dict[str, F64]:
        """Probability of being a star by each method, shape (n,)."""
        result = {
            name: self.fitted[name].predict_proba(columns[:, self.columns[name]])[:, 1]
            for name, columns in _inputs(m).items()
        }
        for name, p in result.items():
            if name != "trees_features":
                p[~m.covered] = self.prior
        raw = class_star(m)
        return {"class_star_raw": np.where(np.isfinite(raw), raw, self.prior)} | result


def score_part(data_dir: Path, part: str, models: dict[str, Path | None]) -> tuple[pa.Table, dict[str, Any]]:
    """Score a part of a data set with every method.

    Parameters
    ----------
    data_dir : Path
    part : str
    models : dict of str to Path or None
        Archives: ``model`` gives the column ``p_star``, the others ``p_<name>``. None is the shipped model.

    Returns
    -------
    table : pyarrow.Table
        Truth, ``p_star`` and a column ``p_<method>`` for every method; only objects that SExtractor has found, so that
        all methods are judged on the same.
    told : dict
        Objects that the baselines were fitted to; share of the part's stars and galaxies that SExtractor found.
    """
    training = [s for path in shards_of(data_dir, "training") if (s := _measured_shard(path)) is not None]
    if not training:
        raise UsageError(
            f"{data_dir}: no training field was measured by SExtractor; make the data set with it"
        )
    classifiers = {name: load(path) for name, path in models.items()}
    prior = classifiers["model"].contract.prior_star_fraction
    baselines = Baselines(Measured.of(training), prior)
    tables, found, labelled = [], 0, 0
    for path in shards_of(data_dir, part):
        sample = read_shard(path)
        known = np.isin(sample.table["true_class"].to_pylist(), ("star", "galaxy"))
        covered = Measured.of([sample]).covered
        found, labelled = found + int((known & covered).sum()), labelled + int(known.sum())
        sample = sample.take(np.flatnonzero(covered))
        if not len(sample):
            continue
        columns = {f"p_{name}": p for name, p in baselines.probabilities(Measured.of([sample])).items()}
        for name, classifier in classifiers.items():
            columns["p_star" if name == "model" else f"p_{name}"] = score_sample(classifier, sample)
        table = sample.table
        for name, p in columns.items():
            table = table.append_column(name, pa.array(p, mask=np.isnan(p)))
        tables.append(table)
    if not tables:
        raise UsageError(
            f"{data_dir / part}: SExtractor has measured none of it; make the data set with it installed"
        )
    return pa.concat_tables(tables), {"fitted_to": baselines.n_training, "coverage": found / max(labelled, 1)}


def _measured_shard(path: Path) -> Sample | None:
    sample = read_shard(path, labelled_only=True)
    if not len(sample) or not np.isfinite(sample.catalog).any():
        return None
    return sample
