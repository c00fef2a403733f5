"""Compare probabilities with truth: recall, ranking and calibration of each method, in all and in bins.

The table may come from a run, from a data set, or from anywhere, see `sgclassify.model.judge.scores`. Columns named
``p_<method>`` are judged beside the model, on the same objects.
"""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy.spatial import cKDTree

from sgclassify.model.data.shards import REAL, SPURIOUS, true_classes
from sgclassify.model.judge import metrics, results
from sgclassify.model.judge.results import MODEL, PAPER_SNR, Comparison, Evaluation, Figures, Method, Selection
from sgclassify.stages.arrays import F64, I64, Bool
from sgclassify.stages.bands import BAND_INDEX, BANDS
from sgclassify.stages.errors import UsageError
from sgclassify.stages.flags import SgFlag
from sgclassify.stages.healpix import unit_vectors

PAPER_STARS, PAPER_GALAXIES = 32_371, 93_525
"""Stars and galaxies of the sample of arXiv:2604.10086."""

GALAXY_COMPLETENESS: Final = 0.96
STAR_PURITY: Final = 0.97
FALSE_STARS: Final = 0.005
"""Where purity, completeness and true positives are quoted; the names in the JSON and in the tables say so."""

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
"""Edges of the bins besides those of magnitude. ``r50_arcsec`` and ``redshift`` are of galaxies only.
``bright_star_arcsec`` is the distance from the nearest star brighter than `BRIGHT_STAR`; these stars have none.

``snr`` is the largest over the bands. Calibration is judged by it, not by the true magnitude, which no classifier
knows. Among objects measured as equally bright, the galaxies have the brighter total magnitude. So the faint bins of
true magnitude hold more stars than exact probabilities say.
"""


def numbers(table: pa.Table, name: str) -> F64:
    """A column as numbers, NaN where it has no value or is not there."""
    if name not in table.column_names:
        return np.full(table.num_rows, np.nan)
    try:
        column = table[name].cast(pa.float64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UsageError(f"the column {name} must hold numbers; rename it if it is something else") from error
    return np.asarray(column.to_numpy(zero_copy_only=False), dtype=np.float64)


class Judged:
    """A table of scored objects, as arrays.

    Parameters
    ----------
    table : pyarrow.Table
        ``true_class``, ``p_star``, any ``p_<method>``, and what there is of the other columns of a shard or a truth
        table.
    band : str
        Band of the magnitudes.

    Attributes
    ----------
    p : dict of str to ndarray of float64, shape (n,)
        Probability of being a star by each method, the model first.
    star, quasar, scored : ndarray of bool, shape (n,)
        `scored` are the stars and galaxies to which the model gave a probability.
    values : dict of str to ndarray of float64, shape (n,)
        The quantities of `BINNINGS`; NaN where unknown.
    """

    def __init__(self, table: pa.Table, band: str = "i") -> None:
        self.table, self.band = table, band
        kind = true_classes(table)
        if len(kind) and not np.isin(kind, REAL).any():
            known = ", ".join(sorted({str(name) for name in kind})[:5])
            raise UsageError(f"true_class is none of {', '.join(REAL)} anywhere; it holds {known}")
        self.star, self.quasar = kind == "star", kind == "qso"
        self.p = _probabilities(table)
        own = self.p[MODEL]
        if (np.isfinite(own) & ((own < 0) | (own > 1))).any():
            raise UsageError("p_star is not between 0 and 1 everywhere: is it in per cent?")
        self.scored = np.isfinite(own) & (self.star | (kind == "galaxy"))
        self.magnitude = numbers(table, f"mag_{band}")
        self.field = np.nan_to_num(numbers(table, "field"), nan=-1).astype(np.int64)
        self.blended = _blended(table)
        self.values = {name: np.full(table.num_rows, np.nan) for name in BINNINGS}
        for name in ("r50_arcsec", "redshift"):
            self.values[name] = np.where(self.star, np.nan, numbers(table, name))
        self.values |= {name: numbers(table, name) for name in ("n_bands", "star_density", "roll_deg")}
        self.values["bright_star_arcsec"] = self._from_bright_stars(numbers(table, "ra"), numbers(table, "dec"))
        self.values["blended"] = self.blended.astype(np.float64)
        # CSV cannot hold seven numbers per object
        if "snr" in table.column_names and pa.types.is_fixed_size_list(table.schema.field("snr").type):
            flat = table["snr"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
            snr = flat.reshape(table.num_rows, len(BANDS)).astype(np.float64)
            self.values["snr_i"] = snr[:, BAND_INDEX["i"]]
            self.values["snr"] = np.nan_to_num(snr, nan=0.0).max(axis=1)

    def _from_bright_stars(self, ra: F64, dec: F64) -> F64:
        """Distance of each object from the nearest bright star, arcsec; NaN for these stars, and if there are none."""
        bright = self.star & (self.magnitude < BRIGHT_STAR)
        fainter = np.isfinite(self.magnitude) & ~bright & np.isfinite(ra + dec)
        bright &= np.isfinite(ra + dec)
        distance = np.full(len(ra), np.nan)
        if bright.any() and fainter.any():
            chords, _ = cKDTree(unit_vectors(ra[bright], dec[bright])).query(unit_vectors(ra[fainter], dec[fainter]))
            distance[fainter] = np.degrees(2.0 * np.arcsin(np.minimum(chords / 2.0, 1.0))) * 3600.0
        return distance

    def kept(self, selection: Selection) -> Bool:
        """Objects that are selected, whether or not they are scored."""
        keep = np.ones(len(self.star), dtype=bool)
        if np.isfinite(self.magnitude).any():
            keep &= (self.magnitude >= selection.edges[0]) & (self.magnitude < selection.edges[-1])
        if selection.unblended:
            keep &= ~self.blended
        if selection.paper_like:
            keep &= self.values["snr_i"] >= PAPER_SNR
        if selection.min_snr is not None:
            keep &= self.values["snr"] >= selection.min_snr
        return keep

    def left_out(self) -> list[str]:
        """Figures that this table does not allow, and objects that are in no figure, in words."""
        lacks = []
        names, mag = {*self.table.column_names}, f"mag_{self.band}"
        without = int((self.scored & ~np.isfinite(self.magnitude)).sum())
        if not np.isfinite(self.magnitude).any():
            others = [band for band in BANDS if f"mag_{band}" in names - {mag}]
            hint = f" (there are magnitudes of {', '.join(others)}: --band)" if others else ""
            lacks.append(f"no {mag} in the truth: no bins by magnitude, nor by the distance from bright stars{hint}")
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


def _probabilities(table: pa.Table) -> dict[str, F64]:
    """Probability of being a star by each method, the model first."""
    if f"p_{MODEL}" in table.column_names:
        raise UsageError(f"the column p_{MODEL} has the name of the model, which is p_star; rename it")
    others = [n for n in table.column_names if n.startswith("p_") and n not in ("p_star", "p_galaxy")]
    return {MODEL: numbers(table, "p_star")} | {n.removeprefix("p_"): numbers(table, n) for n in others}


def _blended(table: pa.Table) -> Bool:
    """Which rows are blended, by the truth where it says so, else by ``sg_flags``, else none."""
    if "blended" in table.column_names:
        column = pc.fill_null(table["blended"].cast(pa.bool_()), False)
        return np.asarray(column.to_numpy(zero_copy_only=False), dtype=bool)
    flags = np.nan_to_num(numbers(table, "sg_flags")).astype(np.int64)
    return np.asarray((flags & int(SgFlag.BLENDED)) != 0)


def evaluate(
    table: pa.Table,
    band: str,
    edges: tuple[float, ...],
    unblended: bool = False,
    paper: bool = False,
    min_snr: float | None = None,
) -> Evaluation:
    """All figures of a table of scored objects, without bins of quantities that it does not have.

    Parameters
    ----------
    table : pyarrow.Table
        As for `Judged`.
    band, edges : str, tuple of float
        Band and edges of the magnitude bins; objects outside of them are left out everywhere.
    unblended : bool
        Leave out objects that are blended by the truth (column ``blended``) or, without one, by ``sg_flags``.
    paper : bool
        Only objects like those of the paper: signal-to-noise ratio of at least `PAPER_SNR` in i, not blended. Purities
        are those of the paper's class ratio.
    min_snr : float, optional
        Only objects whose signal-to-noise ratio reaches this in some band.
    """
    judged = Judged(table, band)
    if unblended and not {"blended", "sg_flags"} & {*table.column_names}:
        raise UsageError("nothing says what is blended: no column blended, nor sg_flags")
    if (paper or min_snr is not None) and not np.isfinite(judged.values["snr_i"]).any():
        raise UsageError("no signal-to-noise ratios (snr): --paper and --min-snr need --data, or its scores")
    selection = results.Selection(unblended or paper, paper, min_snr, band, edges)
    keep = judged.kept(selection)
    here = keep & judged.scored
    n_star, n_galaxy = int((here & judged.star).sum()), int((here & ~judged.star).sum())
    star_weight = 1.0
    if paper and n_star and n_galaxy:
        star_weight = PAPER_STARS / PAPER_GALAXIES * n_galaxy / n_star
    quasars = judged.p[MODEL][keep & judged.quasar & np.isfinite(judged.p[MODEL])]
    called = metrics.recall(int((quasars >= 0.5).sum()), len(quasars))
    return Evaluation(
        sample=results.Counts(
            objects=n_star + n_galaxy,
            stars=n_star,
            star_fraction=n_star / (n_star + n_galaxy) if here.any() else float("nan"),
            star_weight=star_weight,
            fields=len(np.unique(judged.field[here])),
            selection=selection,
            not_scored=int((keep & ~np.isfinite(judged.p[MODEL])).sum()),
        ),
        methods={name: _method(judged, keep, name, edges, star_weight) for name in judged.p},
        paired={name: _compared(judged, keep, name) for name in judged.p if name != MODEL},
        quasars=results.Quasars(called.right, called.n, called.low, called.high),
        left_out=judged.left_out(),
    )


def _method(judged: Judged, keep: Bool, method: str, edges: tuple[float, ...], star_weight: float) -> Method:
    def bins(values: F64, bounds: tuple[float, ...], empty: bool) -> list[results.Bin]:
        insides = [(low, high, keep & (values >= low) & (values < high)) for low, high in itertools.pairwise(bounds)]
        return [
            results.Bin(low, high, _figures(judged, inside, method))
            for low, high, inside in insides
            if empty or (inside & judged.scored).any()
        ]

    with_magnitudes = bool(np.isfinite(judged.magnitude).any())
    return Method(
        overall=_figures(judged, keep, method, star_weight, intervals=True),
        by_magnitude=bins(judged.magnitude, edges if with_magnitudes else (), empty=True),
        by={name: bins(judged.values[name], bounds, empty=False) for name, bounds in BINNINGS.items()},
    )


def _known(judged: Judged, keep: Bool, method: str) -> I64:
    """Rows that the model and the method scored; quasars do not count."""
    return np.flatnonzero(keep & judged.scored & np.isfinite(judged.p[method]))


def _figures(judged: Judged, keep: Bool, method: str, star_weight: float = 1.0, intervals: bool = False) -> Figures:
    """Figures of one method on some objects.

    Purity and completeness weigh a star `star_weight` times a galaxy. The bootstrap intervals are slow, and only made
    with `intervals`.
    """
    index = _known(judged, keep, method)
    p, star, field = judged.p[method][index], judged.star[index], judged.field[index]
    right = (p >= 0.5) == star
    weight = np.where(star, star_weight, 1.0)
    intervals = intervals and len(p) > 0

    def interval(figure: metrics.Figure) -> tuple[float, float] | None:
        return metrics.bootstrap_interval(figure, field) if intervals else None

    return Figures(
        n=len(p),
        star=metrics.recall(int((right & star).sum()), int(star.sum())),
        galaxy=metrics.recall(int((right & ~star).sum()), int((~star).sum())),
        error=float(1 - right.mean()) if len(p) else float("nan"),
        auc=metrics.roc_auc(p, star),
        galaxy_purity=metrics.purity_at_completeness(1 - p, ~star, GALAXY_COMPLETENESS, weight),
        star_completeness=metrics.completeness_at_purity(p, star, STAR_PURITY, weight),
        star_true_positives=metrics.true_positives_at(p, star, FALSE_STARS),
        brier=metrics.brier(p, star),
        cross_entropy=metrics.cross_entropy(p, star),
        ece=metrics.ece(p, star),
        ece_of_exact_probabilities=metrics.expected_ece(p) if len(p) else float("nan"),
        error_interval=interval(lambda k: float(1 - right[k].mean())),
        ece_interval=interval(lambda k: metrics.ece(p[k], star[k])),
    )


def _compared(judged: Judged, keep: Bool, method: str) -> Comparison:
    """Error rate and cross entropy of a method less those of the model on the same objects."""
    index = _known(judged, keep, method)
    if not len(index):
        return Comparison(0)
    star = judged.star[index]
    p, of_model = judged.p[method][index], judged.p[MODEL][index]
    wrong, wrong_of_model = (((q >= 0.5) != star).astype(np.float64) for q in (p, of_model))

    def surplus(difference: F64) -> results.Surplus:
        interval = metrics.bootstrap_interval(lambda k: float(difference[k].mean()), judged.field[index])
        return results.Surplus(float(difference.mean()), *interval)

    excess = results.Excess(
        error=float(wrong.mean()),
        error_of_model=float(wrong_of_model.mean()),
        errors=surplus(wrong - wrong_of_model),
        cross_entropy=surplus(metrics.surprise(p, star) - metrics.surprise(of_model, star)),
    )
    return Comparison(len(index), excess)
