"""Compare probabilities with truth: how often stars and galaxies are told apart, where, and how far p can be trusted.

Works on the products of a run, on a part of a data set, or on any table with ``p_star`` and ``true_class``. Columns
named ``p_<method>`` are judged beside the model, on the same objects.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as pads
from scipy.spatial import cKDTree

from sgclassify.model.data.dataset import MATCH_RADIUS_ARCSEC, PARTS, REAL, Sample, match_truth, read_shard
from sgclassify.model.judge import metrics
from sgclassify.model.judge.tables import read_table, read_truth
from sgclassify.model.serve.runtime import Classifier, load
from sgclassify.stages.arrays import F64, Bool
from sgclassify.stages.bands import BAND_INDEX, BANDS
from sgclassify.stages.classify import averaged, each_symmetry, scores, with_prior
from sgclassify.stages.columns import CLASSES
from sgclassify.stages.errors import UsageError
from sgclassify.stages.flags import SgFlag
from sgclassify.stages.healpix import unit_vectors
from sgclassify.stages.prior import Prior
from sgclassify.stages.tile import Inputs

MODEL: Final = "model"
"""Name of the model itself among the methods."""

SPURIOUS: Final = "spurious"
"""Class in a data set of what matches no truth."""

ALL: Final = "all"
"""All fields of a data set that a model has never met, whatever part of another training they would be."""

PAPER_STARS, PAPER_GALAXIES = 32_371, 93_525
"""Stars and galaxies of the sample of arXiv:2604.10086."""

PAPER_SNR: Final = 10.0

SYMMETRY_SAMPLE: Final = 2_000
"""Objects that are looked at in all eight symmetries."""

BRIGHT_STAR: Final = 18.0
"""Magnitude of a star that outshines its surroundings and saturates in an exposure."""

BINNINGS: Final[dict[str, tuple[float, ...]]] = {
    "snr": (-np.inf, 5, 7, 10, 15, 20, 40, np.inf),
    "snr_i": (-np.inf, 5, 10, 20, 50, 200, np.inf),
    "r50_arcsec": (0, 0.05, 0.1, 0.2, 0.4, np.inf),
    "redshift": (1e-9, 0.5, 1, 1.5, 2, np.inf),
    "blended": (0, 0.5, np.inf),
    "n_bands": (0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5),
    "star_density": (0, 3, 10, 30, np.inf),
    "roll_deg": (0, 90, 180, 270, 360),
    "bright_star_arcsec": (0, 2, 5, 10, 20, np.inf),
}
"""Edges of the bins besides those of magnitude; ``r50_arcsec`` and ``redshift`` are of galaxies only,
``bright_star_arcsec`` is the distance from the nearest star of the table brighter than `BRIGHT_STAR`, of all others.

``snr`` is the largest over the bands. Calibration is judged by it, not by the true magnitude, which no classifier
knows: of what is measured as equally bright, the galaxies have the brighter total magnitude, so that bins of true
magnitude hold more stars at the faint end than exact probabilities say.
"""


def read_objects(path: Path) -> pa.Table:
    """Objects of a run's ``objects`` folder, or of the run's folder."""
    root = path / "objects" / "dataset" if (path / "objects" / "dataset").is_dir() else path / "dataset"
    if not root.is_dir():
        raise UsageError(f"{path}: no object catalogue here; give the output folder of a run")
    files = sorted(str(file) for file in root.rglob("Npix=*.parquet"))
    return pads.dataset(files, format="parquet").to_table()


def labelled(objects: pa.Table, truth: pa.Table) -> pa.Table:
    """Objects with a match in truth: the truth's columns beside ``p_star``, ``p_galaxy``, ``sg_flags``, ``n_bands``."""
    match = match_truth(objects["ra"].to_numpy(), objects["dec"].to_numpy(), truth)
    found = np.flatnonzero(match >= 0)
    names = ("p_star", "p_galaxy", "sg_flags", "n_bands")
    # another simulator may have columns of these names in its truth
    table = truth.take(match[found]).drop_columns([name for name in names if name in truth.column_names])
    for name in names:
        table = table.append_column(name, objects[name].take(found))
    return table


def scores_of_run(run_dir: Path, truth_path: Path) -> pa.Table:
    """Scored objects of a run beside their truth.

    Raises
    ------
    UsageError
        If the folder holds no products, the truth cannot be read (`read_truth`), or nothing in it is in the products.
    """
    table = labelled(read_objects(run_dir), read_truth(truth_path))
    if not table.num_rows:
        raise UsageError(
            f"{truth_path}: no object of {run_dir} is within {MATCH_RADIUS_ARCSEC:g} arcsec of any in it;"
            " give the truth of the same field, ra and dec in degrees (ICRS)"
        )
    return table


def shards_of(data_dir: Path, part: str) -> list[Path]:
    """Shards of one part of a data set, or of ``all`` but the shifted one; `UsageError` if there are none."""
    parts = [name for name in PARTS if name != "shifted"] if part == ALL else [part]
    paths = sorted(
        (path for name in parts for path in (data_dir / name).glob("*.parquet")), key=lambda p: p.name
    )
    if not paths:
        raise UsageError(f"{data_dir / part}: no shards here; make them with `sgclassify dataset`")
    return paths


def score_sample(
    classifier: Classifier, sample: Sample, hidden: Bool | None = None, prior: float | None = None
) -> F64:
    """Probability of being a star of every object; nan where it has no band.

    Parameters
    ----------
    classifier : Classifier
    sample : Sample
    hidden : ndarray of bool, shape (n, 7), optional
        Bands to hide.
    prior : float, optional
        Share of stars to assume instead of the model's own prior.
    """
    size, held = classifier.contract.stamp_size, sample.image.shape[-1]
    if size != held:
        raise UsageError(f"the model takes stamps of {size} pixels, the data set holds stamps of {held}")
    own = classifier.contract.prior_star_fraction
    found = scores(inputs_of(sample, hidden), classifier.probabilities, own, assumed(prior))
    return found.p_star.astype(np.float64)


def inputs_of(sample: Sample, hidden: Bool | None = None) -> Inputs:
    """What the model is given of a sample, without the bands of `hidden`, shape (n, 7)."""
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
) -> pa.Table:
    """One part (validation, calibration, test, shifted, all) of a data set, scored here by a model.

    `others` are archives to compare it with, which give columns ``p_<name>``.
    """
    classifiers = {"star": load(model)} | {name: load(path) for name, path in (others or {}).items()}
    tables = []
    for path in shards_of(data_dir, part):
        sample = read_shard(path, REAL)
        if not len(sample):
            continue
        table = sample.table
        for name, classifier in classifiers.items():
            p = score_sample(classifier, sample, prior=prior)
            table = table.append_column(f"p_{name}", pa.array(p, mask=np.isnan(p)))
        tables.append(table)
    return pa.concat_tables(tables)


def read_scores(path: Path) -> pa.Table:
    """Any labelled table that `read_table` reads.

    Raises
    ------
    UsageError
        If it cannot be read, or lacks ``p_star`` or ``true_class``.
    """
    return read_table(path, ("p_star", "true_class"))


def _numbers(table: pa.Table, name: str) -> F64 | None:
    if name not in table.column_names:
        return None
    try:
        numbers = table[name].cast(pa.float64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UsageError(f"the column {name} must hold numbers; rename it if it is something else") from error
    return np.asarray(numbers.to_numpy(zero_copy_only=False), dtype=np.float64)


class Judged:
    """A table of scored objects, as arrays.

    Parameters
    ----------
    table : pyarrow.Table
        ``true_class``, ``p_star``, and what there is of the other columns of a shard or a truth table.
    band : str
        Band of the magnitudes.

    Attributes
    ----------
    p : dict of str to ndarray of float64, shape (n,)
        Probability of being a star by each method, the model first.
    star, quasar, scored : ndarray of bool, shape (n,)
        `scored` are the stars and galaxies that the model gave a probability.
    """

    def __init__(self, table: pa.Table, band: str = "i") -> None:
        self.table, self.band = table, band
        kind = np.array(table["true_class"].to_pylist(), dtype=object)
        if len(kind) and not np.isin(kind, REAL).any():
            known = ", ".join(sorted({str(name) for name in kind})[:5])
            raise UsageError(f"true_class is none of {', '.join(REAL)} anywhere; it holds {known}")
        self.star, self.quasar = kind == "star", kind == "qso"
        numbers = _numbers(table, "p_star")
        assert numbers is not None
        self.p = {MODEL: numbers}
        for name in table.column_names:
            if name.startswith("p_") and name not in ("p_star", "p_galaxy"):
                other = _numbers(table, name)
                assert other is not None
                if name == f"p_{MODEL}":
                    raise UsageError(
                        f"the column {name} has the name of the model, which is p_star; rename it"
                    )
                self.p[name.removeprefix("p_")] = other
        if (np.isfinite(numbers) & ((numbers < 0) | (numbers > 1))).any():
            raise UsageError("p_star is not between 0 and 1 everywhere: is it in per cent?")
        self.scored = np.isfinite(numbers) & (self.star | (kind == "galaxy"))
        n = table.num_rows
        unknown = np.full(n, np.nan)

        def or_unknown(name: str) -> F64:
            found = _numbers(table, name)
            return unknown if found is None else found

        self.magnitude = or_unknown(f"mag_{band}")
        self.field = np.nan_to_num(or_unknown("field"), nan=-1).astype(np.int64)
        self.blended = blended(table)
        values: dict[str, F64] = {
            name: or_unknown(name)
            for name in BINNINGS
            if name not in ("snr", "snr_i", "blended", "bright_star_arcsec")
        }
        values["bright_star_arcsec"] = self._from_bright_stars(or_unknown("ra"), or_unknown("dec"))
        values["blended"] = self.blended.astype(np.float64)
        values["snr"] = values["snr_i"] = unknown
        # seven numbers an object, which CSV cannot hold
        if "snr" in table.column_names and pa.types.is_fixed_size_list(table.schema.field("snr").type):
            flat = table["snr"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            snr = flat.reshape(n, len(BANDS)).astype(np.float64)
            values["snr_i"] = snr[:, BAND_INDEX["i"]]
            values["snr"] = np.nan_to_num(snr, nan=0.0).max(axis=1)
        for name in ("r50_arcsec", "redshift"):
            values[name] = np.where(self.star, np.nan, values[name])
        self.values = values

    def _from_bright_stars(self, ra: F64, dec: F64) -> F64:
        """Distance of each object from the nearest bright star, arcsec; nan for these stars, and if there are none."""
        bright = self.star & (self.magnitude < BRIGHT_STAR)
        fainter = np.isfinite(self.magnitude) & ~bright & np.isfinite(ra + dec)
        bright &= np.isfinite(ra + dec)
        distance = np.full(len(ra), np.nan)
        if bright.any() and fainter.any():
            chords, _ = cKDTree(unit_vectors(ra[bright], dec[bright])).query(
                unit_vectors(ra[fainter], dec[fainter])
            )
            distance[fainter] = np.degrees(2.0 * np.arcsin(np.minimum(chords / 2.0, 1.0))) * 3600.0
        return distance

    def left_out(self) -> list[str]:
        """What figures cannot be made of this table, and what objects are not in any, in words."""
        lacks = []
        names, mag = {*self.table.column_names}, f"mag_{self.band}"
        without = int((self.scored & ~np.isfinite(self.magnitude)).sum())
        if not np.isfinite(self.magnitude).any():
            others = [band for band in BANDS if f"mag_{band}" in names - {mag}]
            hint = f" (there are magnitudes of {', '.join(others)}: --band)" if others else ""
            lacks.append(
                f"no {mag} in the truth: no bins by magnitude, nor by the distance from bright stars{hint}"
            )
        elif without:
            lacks.append(f"{without} objects have no {mag}: they are in no figure")
        for name in ("redshift", "r50_arcsec"):
            if not np.isfinite(self.values[name]).any():
                lacks.append(f"no {name} of galaxies in the truth: no bins by {name}")
        if "blended" not in names:
            what = "sg_flags tell what is blended" if "sg_flags" in names else "no bins by blending"
            lacks.append(f"no blended in the truth: {what}")
        classes = Counter(self.table["true_class"].to_pylist())
        for kind, n in sorted((str(kind), n) for kind, n in classes.items() if kind not in (*REAL, SPURIOUS)):
            lacks.append(f"{n} objects of true_class {kind} are in no figure")
        return lacks

    def block(
        self, keep: Bool, method: str, star_weight: float = 1.0, intervals: bool = False
    ) -> dict[str, Any]:
        """Figures of one method on some objects.

        Parameters
        ----------
        keep : ndarray of bool, shape (n,)
            Objects; those that the model did not score, and quasars, do not count.
        method : str
        star_weight : float
            Weight of a star over that of a galaxy in what depends on the class ratio (purity, completeness at purity).
        intervals : bool
            Whether calibration error and area get their (slow) bootstrap intervals.
        """
        index = np.flatnonzero(keep & self.scored & np.isfinite(self.p[method]))
        p, star = self.p[method][index], self.star[index]
        right = (p >= 0.5) == star
        weight = np.where(star, star_weight, 1.0)
        result: dict[str, Any] = {"n": len(p)}
        for name, here in (("star", star), ("galaxy", ~star)):
            found = metrics.recall(int((right & here).sum()), int(here.sum()))
            result[name] = {
                "right": found.right, "n": found.n, "low": found.low, "high": found.high, "share": found.share
            }  # fmt: skip
        result |= {
            "error": float(1 - right.mean()) if len(p) else float("nan"),
            "auc": metrics.roc_auc(p, star),
            "galaxy_purity_at_completeness_0.96": metrics.purity_at_completeness(1 - p, ~star, 0.96, weight),
            "star_completeness_at_purity_0.97": metrics.completeness_at_purity(p, star, 0.97, weight),
            "star_true_positives_at_0.005_false": metrics.true_positives_at(p, star, 0.005),
            "brier": metrics.brier(p, star),
            "cross_entropy": metrics.cross_entropy(p, star),
            "ece": metrics.ece(p, star),
            "ece_of_exact_probabilities": metrics.expected_ece(p) if len(p) else float("nan"),
        }
        if intervals and len(p):
            field = self.field[index]
            result["error_interval"] = metrics.bootstrap_interval(lambda k: float(1 - right[k].mean()), field)
            result["ece_interval"] = metrics.bootstrap_interval(lambda k: metrics.ece(p[k], star[k]), field)
        return result

    def paired(self, keep: Bool, method: str) -> dict[str, Any]:
        """Error rate and cross entropy of a method less those of the model on the same objects, with 95 % intervals."""
        index = np.flatnonzero(keep & self.scored & np.isfinite(self.p[method]))
        star = self.star[index]
        wrong = [((self.p[name][index] >= 0.5) != star).astype(np.float64) for name in (method, MODEL)]
        difference = wrong[0] - wrong[1]
        if not len(index):
            return {"n": 0}
        low, high = metrics.bootstrap_interval(lambda k: float(difference[k].mean()), self.field[index])
        surprise = [metrics.surprise(self.p[name][index], star) for name in (method, MODEL)]
        surplus = surprise[0] - surprise[1]
        less, more = metrics.bootstrap_interval(lambda k: float(surplus[k].mean()), self.field[index])
        return {
            "n": len(index),
            "error": float(wrong[0].mean()),
            "error_of_model": float(wrong[1].mean()),
            "difference": float(difference.mean()),
            "low": low,
            "high": high,
            "cross_entropy": {"difference": float(surplus.mean()), "low": less, "high": more},
        }

    def kept(self, sample: Mapping[str, Any]) -> Bool:
        """The objects that a result's ``sample`` describes: what is judged, and not scored perhaps."""
        keep = np.ones(len(self.star), dtype=bool)
        if np.isfinite(self.magnitude).any():
            keep &= (self.magnitude >= sample["edges"][0]) & (self.magnitude < sample["edges"][-1])
        if sample["unblended"]:
            keep &= ~self.blended
        if sample["paper_like"]:
            keep &= self.values["snr_i"] >= PAPER_SNR
        if sample["min_snr"] is not None:
            keep &= self.values["snr"] >= sample["min_snr"]
        return keep


def evaluate(
    table: pa.Table,
    band: str,
    edges: tuple[float, ...],
    unblended: bool = False,
    paper: bool = False,
    min_snr: float | None = None,
) -> dict[str, Any]:
    """All figures of a table of scored objects.

    Parameters
    ----------
    table : pyarrow.Table
        As for `Judged`.
    band : str
        Band of the magnitudes.
    edges : tuple of float
        Edges of the magnitude bins; objects outside of them are left out everywhere.
    unblended : bool
        Leave out objects that the truth (column ``blended``) or, without one, ``sg_flags`` calls blended.
    paper : bool
        Only objects of the paper's kind: signal-to-noise ratio of at least `PAPER_SNR` in i, not blended; purities are
        those of the paper's class ratio.
    min_snr : float, optional
        Only objects whose signal-to-noise ratio reaches this in some band.

    Returns
    -------
    dict
        ``sample``; for every method ``overall``, ``by_magnitude`` and ``by``, in which bins of what the table does not
        have are absent; ``paired``; ``quasars``; ``left_out``, which says in words what is absent.
    """
    judged = Judged(table, band)
    if unblended and not {"blended", "sg_flags"} & {*table.column_names}:
        raise UsageError("nothing says what is blended: no column blended, nor sg_flags")
    if (paper or min_snr is not None) and not np.isfinite(judged.values["snr_i"]).any():
        raise UsageError("no signal-to-noise ratios (snr): --paper and --min-snr need --data, or its scores")
    chosen = {
        "unblended": unblended or paper,
        "paper_like": paper,
        "min_snr": min_snr,
        "band": band,
        "edges": list(edges),
    }
    keep = judged.kept(chosen)
    with_magnitudes = bool(np.isfinite(judged.magnitude).any())
    here = keep & judged.scored
    n_star, n_galaxy = int((here & judged.star).sum()), int((here & ~judged.star).sum())
    star_weight = 1.0
    if paper and n_star and n_galaxy:
        star_weight = PAPER_STARS / PAPER_GALAXIES * n_galaxy / n_star
    result: dict[str, Any] = {
        "sample": {
            "objects": n_star + n_galaxy,
            "stars": n_star,
            "star_fraction": n_star / (n_star + n_galaxy) if here.any() else float("nan"),
            "star_weight": star_weight,
            "fields": len(np.unique(judged.field[here])),
            **chosen,
            "not_scored": int((keep & ~np.isfinite(judged.p[MODEL])).sum()),
        },
        "methods": {},
        "paired": {},
    }
    for method in judged.p:
        by: dict[str, list[dict[str, Any]]] = {}
        for name, bounds in BINNINGS.items():
            values = judged.values[name]
            rows = []
            for low, high in itertools.pairwise(bounds):
                inside = keep & (values >= low) & (values < high)
                if (inside & judged.scored).any():
                    rows.append({"low": low, "high": high} | judged.block(inside, method))
            by[name] = rows
        result["methods"][method] = {
            "overall": judged.block(keep, method, star_weight, intervals=True),
            "by_magnitude": [
                {"low": low, "high": high}
                | judged.block(keep & (judged.magnitude >= low) & (judged.magnitude < high), method)
                for low, high in itertools.pairwise(edges if with_magnitudes else ())
            ],
            "by": by,
        }
        if method != MODEL:
            result["paired"][method] = judged.paired(keep, method)
    quasars = judged.p[MODEL][keep & judged.quasar & np.isfinite(judged.p[MODEL])]
    called = metrics.recall(int((quasars >= 0.5).sum()), len(quasars))
    result["quasars"] = {"called_star": called.right, "n": called.n, "low": called.low, "high": called.high}
    result["left_out"] = judged.left_out()
    return result


def by_bands(
    data_dir: Path,
    part: str,
    model: Path | None,
    prior: float | None = None,
    draws: int = 1,
    seed: int = 0,
) -> dict[str, Any]:
    """Errors with bands hidden: by their number, for each band alone and left out, and for some trios.

    Parameters
    ----------
    data_dir : Path
    part : str
    model : Path or None
    prior : float, optional
        As of `score_sample`.
    draws : int
        Random subsets of each size for every object. The intervals hold for one: more of the same object are not
        independent.
    seed : int

    Returns
    -------
    dict
        ``number``, ``alone``, ``without``, ``trios``: right and wrong answers and error rate each. Only objects with
        all seven bands count, so that all figures are of the same objects.
    """
    classifier = load(model)
    rng = np.random.default_rng(seed)
    wrong: dict[tuple[str, str], list[float]] = {}
    trios = {
        ",".join(t): [BAND_INDEX[b] for b in t] for t in (("NUV", "u", "g"), ("g", "r", "i"), ("i", "z", "y"))
    }
    for path in shards_of(data_dir, part):
        sample = read_shard(path, CLASSES)
        whole = np.flatnonzero(np.all(sample.valid.any(axis=(2, 3)), axis=1))
        sample = sample.take(whole)
        if not len(sample):
            continue
        star = np.array(sample.table["true_class"].to_pylist()) == "star"

        def judge(kind: str, name: str, hidden: Bool, sample: Sample = sample, star: Bool = star) -> None:
            p = score_sample(classifier, sample, hidden, prior)
            wrong.setdefault((kind, name), []).extend(((p >= 0.5) != star)[np.isfinite(p)].tolist())

        n = len(sample)
        judge("number", "7", np.zeros((n, len(BANDS)), dtype=bool))
        for count in range(1, len(BANDS)):
            for _ in range(draws):
                rank = np.argsort(rng.random((n, len(BANDS))), axis=1)
                judge("number", str(count), rank >= count)
        for k, band in enumerate(BANDS):
            one = np.arange(len(BANDS)) == k
            judge("alone", band, np.tile(~one, (n, 1)))
            judge("without", band, np.tile(one, (n, 1)))
        for name, members in trios.items():
            judge("trios", name, np.tile(~np.isin(np.arange(len(BANDS)), members), (n, 1)))
    result: dict[str, Any] = {"number": {}, "alone": {}, "without": {}, "trios": {}}
    for (kind, name), values in wrong.items():
        found = metrics.recall(int(sum(values)), len(values))
        result[kind][name] = {"error": found.share, "n": found.n, "low": found.low, "high": found.high}
    if result["number"]:
        result["three_over_seven"] = result["number"]["3"]["error"] / max(
            result["number"]["7"]["error"], 1e-12
        )
    return result


def by_symmetry(
    data_dir: Path,
    part: str,
    model: Path | None,
    prior: float | None = None,
    most: int = SYMMETRY_SAMPLE,
) -> dict[str, Any]:
    """How far probabilities depend on the orientation of the stamp.

    Parameters
    ----------
    data_dir : Path
    part : str
    model : Path or None
    prior : float, optional
        As of `score_sample`.
    most : int
        Objects looked at, drawn evenly from the fields.

    Returns
    -------
    dict
        Of each object's largest probability less its smallest one over the eight symmetries of the square: ``median``,
        ``quantile_0.95`` and ``largest``; ``error`` as they are and ``error_of_mean``; ``n``.
    """
    classifier = load(model)
    paths = shards_of(data_dir, part)
    rng = np.random.default_rng(0)
    own, assume = classifier.contract.prior_star_fraction, assumed(prior)
    every, means, stars = [], [], []
    for path in paths:
        sample = read_shard(path, CLASSES)
        sample = sample.take(np.sort(rng.permutation(len(sample))[: -(-most // len(paths))]))
        if len(sample):
            inputs = inputs_of(sample)
            turned = each_symmetry(inputs, classifier.probabilities)
            every.append([with_prior(both, inputs, own, assume).p_star for both in turned])
            # as in a run, which averages before it assumes another prior
            means.append(with_prior(averaged(turned), inputs, own, assume).p_star)
            stars.append(np.array(sample.table["true_class"].to_pylist()) == "star")
    p: F64 = np.concatenate(every, axis=1, dtype=np.float64)
    star = np.concatenate(stars)
    known = np.isfinite(p).all(axis=0)
    p, mean, star = p[:, known], np.concatenate(means)[known], star[known]
    spread = np.ptp(p, axis=0)
    return {
        "n": len(star),
        "median": float(np.median(spread)),
        "quantile_0.95": float(np.quantile(spread, 0.95)),
        "largest": float(spread.max()),
        "error": float(((p[0] >= 0.5) != star).mean()),
        "error_of_mean": float(((mean >= 0.5) != star).mean()),
    }


def symmetry_as_text(found: dict[str, Any]) -> str:
    """`by_symmetry` as text."""
    return (
        f"\nprobabilities of {found['n']} objects in the eight symmetries of the square differ by"
        f" {found['median']:.5f} in the median, by {found['quantile_0.95']:.4f} at 95 %;"
        f" errors {_percent(found['error'])} as they are, {_percent(found['error_of_mean'])} of the mean (--tta)"
    )


def blended(table: pa.Table) -> Bool:
    """Which rows are blended, by the truth where it says so, else by ``sg_flags``, else none."""
    if "blended" in table.column_names:
        column = pc.fill_null(table["blended"].cast(pa.bool_()), False)
        return np.asarray(column.to_numpy(zero_copy_only=False), dtype=bool)
    if "sg_flags" not in table.column_names:
        return np.zeros(table.num_rows, dtype=bool)
    flags = _numbers(table, "sg_flags")
    assert flags is not None
    return np.asarray((np.nan_to_num(flags).astype(np.int64) & int(SgFlag.BLENDED)) != 0)


def _percent(value: float, digits: int = 2) -> str:
    return f"{100 * value:.{digits}f} %" if np.isfinite(value) else "-"


def recall_table(rows: list[dict[str, Any]], quantity: str, label: str) -> str:
    """Recall in each row of a quantity, as text."""
    lines = [f"{quantity:>13} {'star recall':>30} {'galaxy recall':>30} {'ECE':>7}"]
    for row in rows:
        low, high = row["low"], row["high"]
        span = f"{low:.1f}-{high:.1f}"
        if low == -np.inf and high == np.inf:
            span = "all"
        elif low == -np.inf:
            span = f"< {high:.1f}"
        elif high == np.inf:
            span = f"> {low:.1f}"
        cells = [f"{label} {span}".rjust(13)]
        for name in ("star", "galaxy"):
            r = row[name]
            interval = f"[{100 * r['low']:.1f}, {100 * r['high']:.1f}]"
            cells.append((f"{_percent(r['share'])} {interval} of {r['n']}" if r["n"] else "-").rjust(30))
        cells.append((f"{row['ece']:.4f}" if np.isfinite(row["ece"]) else "-").rjust(7))
        lines.append(" ".join(cells))
    return "\n".join(lines)


def as_text(result: dict[str, Any]) -> str:
    """The figures as plain tables: the model by magnitude, then all methods beside each other."""
    sample, band = result["sample"], result["sample"]["band"]
    own = result["methods"][MODEL]
    edges = sample["edges"]
    # without magnitudes, none of them is outside
    whole = {"low": edges[0], "high": edges[-1]} if own["by_magnitude"] else {"low": -np.inf, "high": np.inf}
    whole |= own["overall"]
    told = [f"{sample['objects']} objects, {sample['stars']} of them stars, in {sample['fields']} fields"]
    if sample["paper_like"]:
        told.append(f"signal-to-noise ratio in i at least {PAPER_SNR:g}")
    if sample["min_snr"] is not None:
        told.append(f"signal-to-noise ratio in some band at least {sample['min_snr']:g}")
    if sample["unblended"]:
        told.append("not blended")
    lines = [
        ", ".join(told),
        recall_table(
            [whole, *own["by_magnitude"]], *(("magnitude", band) if own["by_magnitude"] else ("", ""))
        ),
        "",
    ]
    for name, title, label in (("snr", "largest SNR", ""), ("bright_star_arcsec", "bright star at", '"')):
        if rows := own["by"][name]:
            lines += [recall_table(rows, title, label), ""]
    lines.append(
        f"{'method':>18} {'error':>9} {'AUC':>8} {'Brier':>7} {'ECE':>7} {'purity@.96':>10} {'compl@.97':>9}"
        f" {'TP@.5%':>8}  {'error less the model' + chr(39) + 's':<26} cross entropy, less the model's"
    )
    for name, method in result["methods"].items():
        o = method["overall"]
        line = (
            f"{name:>18} {_percent(o['error']):>9} {o['auc']:8.5f} {o['brier']:7.4f} {o['ece']:7.4f}"
            f" {_percent(o['galaxy_purity_at_completeness_0.96']):>10}"
            f" {_percent(o['star_completeness_at_purity_0.97']):>9}"
            f" {_percent(o['star_true_positives_at_0.005_false']):>8}"
        )
        pair = result["paired"].get(name)
        if pair and pair["n"]:
            less = f"{_percent(pair['difference'])} [{100 * pair['low']:.2f}, {100 * pair['high']:.2f}]"
            c = pair["cross_entropy"]
            line += f"  {less:<26} {c['difference']:+.4f} [{c['low']:.4f}, {c['high']:.4f}]"
        else:
            line += f"  {'':<26} {o['cross_entropy']:.4f}"
        lines.append(line)
    q = result["quasars"]
    if q["n"]:
        lines += ["", f"quasars: {q['called_star']} of {q['n']} called star"]
    if result["left_out"]:
        lines += ["", *result["left_out"]]
    return "\n".join(lines)


def bands_as_text(found: dict[str, Any]) -> str:
    """Errors with hidden bands, as text."""
    lines = ["", f"{'bands':>12} {'error':>9} {'interval':>16}"]
    for kind in ("number", "alone", "without", "trios"):
        for name, row in sorted(found[kind].items()) if kind == "number" else found[kind].items():
            label = {"number": name, "alone": f"only {name}", "without": f"all but {name}", "trios": name}[
                kind
            ]
            interval = f"[{100 * row['low']:.2f}, {100 * row['high']:.2f}]"
            lines.append(f"{label:>12} {_percent(row['error']):>9} {interval:>16}")
    if "three_over_seven" in found:
        lines.append(f"errors with three bands over those with seven: {found['three_over_seven']:.2f}")
    return "\n".join(lines)


def plain(value: Any) -> Any:
    """The same without nan and infinities, which JSON does not know: null."""
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value
