"""Compare probabilities with truth: recall, ranking and calibration of each method, in all and in bins.

The table may come from a run, from a data set, or from anywhere, see `sgclassify.model.judge.scores`. Columns named
``p_<method>`` are judged beside the model, on the same objects.
"""

from __future__ import annotations

import itertools
from typing import Final

import numpy as np
import pyarrow as pa

from sgclassify.model.judge import metrics, results
from sgclassify.model.judge.judged import BINNINGS, Judged
from sgclassify.model.judge.results import MODEL, Comparison, Evaluation, Figures, Method
from sgclassify.stages.arrays import F64, I64, Bool
from sgclassify.stages.errors import UsageError

PAPER_STARS, PAPER_GALAXIES = 32_371, 93_525
"""Stars and galaxies of the sample of arXiv:2604.10086."""

GALAXY_COMPLETENESS: Final = 0.96
STAR_PURITY: Final = 0.97
FALSE_STARS: Final = 0.005
"""Where purity, completeness and true positives are quoted; the names in the JSON and in the tables say so."""


def evaluate(
    table: pa.Table,
    band: str,
    edges: tuple[float, ...],
    unblended: bool = False,
    paper: bool = False,
    min_snr: float | None = None,
) -> Evaluation:
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
        Leave out objects that are blended by the truth (column ``blended``) or, without one, by ``sg_flags``.
    paper : bool
        Only objects like those of the paper: signal-to-noise ratio of at least `PAPER_SNR` in i, not blended. Purities
        are those of the paper's class ratio.
    min_snr : float, optional
        Only objects whose signal-to-noise ratio reaches this in some band.

    Returns
    -------
    Evaluation
        Without bins of quantities that the table does not have.
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
