"""Scored objects beside their truth: from the products of a run, from a data set, or from any table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.dataset as pads

from sgclassify.model.data.match import MATCH_RADIUS_ARCSEC, match_truth
from sgclassify.model.data.shards import PARTS, REAL, Sample, read_shard
from sgclassify.model.judge.tables import read_table, read_truth
from sgclassify.model.serve import runtime
from sgclassify.stages import classify
from sgclassify.stages.arrays import F64, Bool
from sgclassify.stages.errors import UsageError
from sgclassify.stages.prior import Prior
from sgclassify.stages.tile import Inputs

ALL: Final = "all"
"""All fields of a data set that a model has never met, whatever part of another training they would be."""


def read_objects(path: Path) -> pa.Table:
    """Objects of a run's ``objects`` folder, or of the run's folder."""
    root = path / "objects" / "dataset" if (path / "objects" / "dataset").is_dir() else path / "dataset"
    if not root.is_dir():
        raise UsageError(f"{path}: no object catalogue here; give the output folder of a run")
    files = sorted(str(file) for file in root.rglob("Npix=*.parquet"))
    return pads.dataset(files, format="parquet").to_table()


def scores_of_run(run_dir: Path, truth_path: Path) -> pa.Table:
    """Objects of a run that match truth: the truth's columns beside the scores, ``sg_flags`` and ``n_bands``.

    `UsageError` if the folder holds no products, the truth cannot be read (`read_truth`), or no object matches it.
    """
    objects, truth = read_objects(run_dir), read_truth(truth_path)
    match = match_truth(objects["ra"].to_numpy(), objects["dec"].to_numpy(), truth)
    found = np.flatnonzero(match >= 0)
    if not len(found):
        raise UsageError(
            f"{truth_path}: no object of {run_dir} is within {MATCH_RADIUS_ARCSEC:g} arcsec of any in it;"
            " give the truth of the same field, ra and dec in degrees (ICRS)"
        )
    names = ("p_star", "p_galaxy", "sg_flags", "n_bands")
    # another simulator may have columns of these names in its truth
    table = truth.take(match[found]).drop_columns([name for name in names if name in truth.column_names])
    for name in names:
        table = table.append_column(name, objects[name].take(found))
    return table


def shards_of(data_dir: Path, part: str) -> list[Path]:
    """Shards of one part of a data set, or of ``all`` but the shifted one; `UsageError` if there are none."""
    parts = [name for name in PARTS if name != "shifted"] if part == ALL else [part]
    paths = sorted((path for name in parts for path in (data_dir / name).glob("*.parquet")), key=lambda p: p.name)
    if not paths:
        raise UsageError(f"{data_dir / part}: no shards here; make them with `sgclassify dataset`")
    return paths


def samples_of(paths: Sequence[Path], classes: Sequence[str] = REAL) -> Iterator[Sample]:
    """Objects of these true classes in each shard that has any."""
    for path in paths:
        sample = read_shard(path, classes)
        if len(sample):
            yield sample


def loaded(path: Path | None, exact: bool = False) -> runtime.Classifier:
    """A model, None for the shipped one, that answers in stages if it can, unless it is to be `exact`."""
    classifier = runtime.load(path)
    return replace(classifier, stages=None) if exact else classifier


def score_sample(
    classifier: runtime.Classifier, sample: Sample, hidden: Bool | None = None, prior: float | None = None
) -> F64:
    """Probability of being a star of every object; NaN where it has no band. It is what a run gives.

    `hidden`, shape (n, 7), are bands to hide. `prior` is a share of stars to assume instead of the model's own.
    """
    size, held = classifier.contract.stamp_size, sample.image.shape[-1]
    if size != held:
        raise UsageError(f"the model takes stamps of {size} pixels, the data set holds stamps of {held}")
    own = classifier.contract.prior_star_fraction
    asked = inputs_of(sample, hidden), classifier.probabilities, own, assumed(prior)
    found = classify.scores(*asked, cascade=classifier.cascade)
    return found.p_star.astype(np.float64)


def inputs_of(sample: Sample, hidden: Bool | None = None) -> Inputs:
    """Inputs of the model for a sample, without the bands of `hidden`, shape (n, 7)."""
    valid, features, psf = sample.valid, sample.features, sample.psf.astype(np.float32)
    if hidden is not None:
        valid = valid & ~hidden[:, :, None, None]
        features = np.where(hidden[:, :, None], np.float32(np.nan), features)
        psf = np.where(hidden[:, :, None, None], np.float32(0), psf)
    image = np.where(valid, sample.image.astype(np.float32), np.float32(0))
    return Inputs(image, valid, sample.sigma, features, psf, np.any(valid, axis=(2, 3)))


def assumed(prior: float | None) -> Prior | None:
    """A share of stars as the stages take it."""
    return None if prior is None else Prior((prior,))


def scores_of_part(
    data_dir: Path,
    part: str,
    model: Path | None,
    prior: float | None = None,
    others: Mapping[str, Path | None] | None = None,
    exact: bool = False,
) -> pa.Table:
    """One part (validation, calibration, test, shifted, all) of a data set, scored here by a model.

    `others` are archives to compare it with; each adds a column ``p_<name>``. In an `exact` judgement, all models are
    asked as a whole about every object.
    """
    classifiers = {"star": loaded(model, exact)}
    classifiers |= {name: loaded(path, exact) for name, path in (others or {}).items()}
    tables = []
    for sample in samples_of(shards_of(data_dir, part)):
        table = sample.table
        for name, classifier in classifiers.items():
            p = score_sample(classifier, sample, prior=prior)
            table = table.append_column(f"p_{name}", pa.array(p, mask=np.isnan(p)))
        tables.append(table)
    return pa.concat_tables(tables)


def read_scores(path: Path) -> pa.Table:
    """Any table that `read_table` reads, with ``p_star`` and ``true_class``."""
    return read_table(path, ("p_star", "true_class"))
