"""The figures of an evaluation as plain text."""

from __future__ import annotations

import numpy as np

from sgclassify.model.judge.judged import PAPER_SNR
from sgclassify.model.judge.results import MODEL, Bands, Bin, Comparison, Evaluation, Figures, Symmetries


def as_text(result: Evaluation) -> str:
    """The figures as plain tables: the model by magnitude, then all methods beside each other."""
    sample, own = result.sample, result.methods[MODEL]
    selection = sample.selection
    edges, label = (selection.edges, selection.band) if own.by_magnitude else ((-np.inf, np.inf), "")
    told = [f"{sample.objects} objects, {sample.stars} of them stars, in {sample.fields} fields"]
    if selection.paper_like:
        told.append(f"signal-to-noise ratio in i at least {PAPER_SNR:g}")
    if selection.min_snr is not None:
        told.append(f"signal-to-noise ratio in some band at least {selection.min_snr:g}")
    if selection.unblended:
        told.append("not blended")
    rows = [Bin(edges[0], edges[-1], own.overall), *own.by_magnitude]
    lines = [", ".join(told), _recall_table(rows, "magnitude" if own.by_magnitude else "", label), ""]
    for name, title, label in (("snr", "largest SNR", ""), ("bright_star_arcsec", "bright star at", '"')):
        if own.by[name]:
            lines += [_recall_table(own.by[name], title, label), ""]
    lines.append(
        f"{'method':>18} {'error':>9} {'AUC':>8} {'Brier':>7} {'ECE':>7} {'purity@.96':>10} {'compl@.97':>9}"
        f" {'TP@.5%':>8}  {'error less the model' + chr(39) + 's':<26} cross entropy, less the model's"
    )
    lines += [_method_line(name, method.overall, result.paired.get(name)) for name, method in result.methods.items()]
    if result.quasars.n:
        lines += ["", f"quasars: {result.quasars.called_star} of {result.quasars.n} called star"]
    if result.left_out:
        lines += ["", *result.left_out]
    return "\n".join(lines)


def bands_as_text(found: Bands) -> str:
    """Errors with hidden bands, as text."""
    lines = ["", f"{'bands':>12} {'error':>9} {'interval':>16}"]
    labelled = [*sorted(found.number.items())]
    labelled += [(f"only {name}", rate) for name, rate in found.alone.items()]
    labelled += [(f"all but {name}", rate) for name, rate in found.without.items()]
    for label, rate in [*labelled, *found.trios.items()]:
        interval = f"[{100 * rate.low:.2f}, {100 * rate.high:.2f}]"
        lines.append(f"{label:>12} {_percent(rate.error):>9} {interval:>16}")
    if found.three_over_seven is not None:
        lines.append(f"errors with three bands over those with seven: {found.three_over_seven:.2f}")
    return "\n".join(lines)


def symmetry_as_text(found: Symmetries) -> str:
    """The spread over the symmetries, as text."""
    return (
        f"\nprobabilities of {found.n} objects in the eight symmetries of the square differ by"
        f" {found.median:.5f} in the median, by {found.quantile_95:.4f} at 95 %;"
        f" errors {_percent(found.error)} as they are, {_percent(found.error_of_mean)} of the mean (--tta)"
    )


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %" if np.isfinite(value) else "-"


def _recall_table(rows: list[Bin], quantity: str, label: str) -> str:
    """Recall in each bin of a quantity."""
    lines = [f"{quantity:>13} {'star recall':>30} {'galaxy recall':>30} {'ECE':>7}"]
    for row in rows:
        span = f"{row.low:.1f}-{row.high:.1f}"
        if row.low == -np.inf:
            span = "all" if row.high == np.inf else f"< {row.high:.1f}"
        elif row.high == np.inf:
            span = f"> {row.low:.1f}"
        cells = [f"{label} {span}".rjust(13)]
        for recall in (row.figures.star, row.figures.galaxy):
            interval = f"[{100 * recall.low:.1f}, {100 * recall.high:.1f}]"
            told = f"{_percent(recall.share)} {interval} of {recall.n}" if recall.n else "-"
            cells.append(told.rjust(30))
        cells.append((f"{row.figures.ece:.4f}" if np.isfinite(row.figures.ece) else "-").rjust(7))
        lines.append(" ".join(cells))
    return "\n".join(lines)


def _method_line(name: str, figures: Figures, pair: Comparison | None) -> str:
    line = (
        f"{name:>18} {_percent(figures.error):>9} {figures.auc:8.5f} {figures.brier:7.4f} {figures.ece:7.4f}"
        f" {_percent(figures.galaxy_purity):>10} {_percent(figures.star_completeness):>9}"
        f" {_percent(figures.star_true_positives):>8}"
    )
    if pair is None or pair.excess is None:
        return f"{line}  {'':<26} {figures.cross_entropy:.4f}"
    e, c = pair.excess.errors, pair.excess.cross_entropy
    less = f"{_percent(e.difference)} [{100 * e.low:.2f}, {100 * e.high:.2f}]"
    return f"{line}  {less:<26} {c.difference:+.4f} [{c.low:.4f}, {c.high:.4f}]"
