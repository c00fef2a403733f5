"""Results of an evaluation, typed, and how they become JSON and text."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Final

import numpy as np

from sgclassify.model.judge.metrics import Recall

MODEL: Final = "model"
"""Name of the model itself among the methods."""

PAPER_SNR: Final = 10.0
"""Smallest signal-to-noise ratio in i in the sample of arXiv:2604.10086."""

_INLINE: Final = {"inline": True}
"""In JSON, the fields of this value stand among those of the object that holds it."""

_OPTIONAL: Final = {"optional": True}
"""In JSON, None is left out."""

Interval = tuple[float, float]


@dataclass(frozen=True)
class Selection:
    """Which objects are judged, as asked of `sgclassify.model.judge.evaluate.evaluate`."""

    unblended: bool
    paper_like: bool
    min_snr: float | None
    band: str
    edges: tuple[float, ...]


@dataclass(frozen=True)
class Counts:
    """The judged objects in numbers; a star counts `star_weight` times where a figure depends on the class ratio."""

    objects: int
    stars: int
    star_fraction: float
    star_weight: float
    fields: int
    selection: Selection = field(metadata=_INLINE)
    not_scored: int


@dataclass(frozen=True)
class Figures:
    """Figures of one method on some objects; the intervals are of 95 %."""

    n: int
    star: Recall
    galaxy: Recall
    error: float
    auc: float
    galaxy_purity: float = field(metadata={"name": "galaxy_purity_at_completeness_0.96"})
    star_completeness: float = field(metadata={"name": "star_completeness_at_purity_0.97"})
    star_true_positives: float = field(metadata={"name": "star_true_positives_at_0.005_false"})
    brier: float
    cross_entropy: float
    ece: float
    ece_of_exact_probabilities: float
    error_interval: Interval | None = field(default=None, metadata=_OPTIONAL)
    ece_interval: Interval | None = field(default=None, metadata=_OPTIONAL)


@dataclass(frozen=True)
class Bin:
    """Figures of the objects with a quantity between two edges."""

    low: float
    high: float
    figures: Figures = field(metadata=_INLINE)


@dataclass(frozen=True)
class Method:
    """Figures of one method: on all objects, in bins of magnitude, and in bins of every other quantity by its name."""

    overall: Figures
    by_magnitude: list[Bin]
    by: dict[str, list[Bin]]


@dataclass(frozen=True)
class Surplus:
    """How much larger a figure of a method is than the model's, with its 95 % interval."""

    difference: float
    low: float
    high: float


@dataclass(frozen=True)
class Excess:
    """Errors and cross entropy of a method, compared with the model's."""

    error: float
    error_of_model: float
    errors: Surplus = field(metadata=_INLINE)
    cross_entropy: Surplus


@dataclass(frozen=True)
class Comparison:
    """A method beside the model on the `n` objects that both scored; nothing to compare where there are none."""

    n: int
    excess: Excess | None = field(default=None, metadata=_INLINE)


@dataclass(frozen=True)
class Quasars:
    """Quasars that are called star, with the 95 % interval of their share."""

    called_star: int
    n: int
    low: float
    high: float


@dataclass(frozen=True)
class ErrorRate:
    """Error rate of `n` objects, with its 95 % interval."""

    error: float
    n: int
    low: float
    high: float


@dataclass(frozen=True)
class Bands:
    """Errors with bands hidden: with a number of random bands left, one band alone, all but one, and three.

    `three_over_seven` is the error rate with three random bands over that with seven.
    """

    number: dict[str, ErrorRate] = field(default_factory=dict)
    alone: dict[str, ErrorRate] = field(default_factory=dict)
    without: dict[str, ErrorRate] = field(default_factory=dict)
    trios: dict[str, ErrorRate] = field(default_factory=dict)
    three_over_seven: float | None = field(default=None, metadata=_OPTIONAL)


@dataclass(frozen=True)
class Symmetries:
    """How far the probabilities of `n` objects depend on the orientation of the stamp.

    The spread is an object's largest less its smallest probability over the eight symmetries of the square. The error
    rates are those of the stamps as they are, and of the mean over the symmetries.
    """

    n: int
    median: float
    quantile_95: float = field(metadata={"name": "quantile_0.95"})
    largest: float
    error: float
    error_of_mean: float


@dataclass(frozen=True)
class Evaluation:
    """All figures of a table of scored objects: the model comes first among the methods.

    `paired` compares every other method with the model; `left_out` says in words which figures and objects are absent.
    """

    sample: Counts
    methods: dict[str, Method]
    paired: dict[str, Comparison]
    quasars: Quasars
    left_out: list[str]
    bands: Bands | None = field(default=None, metadata=_OPTIONAL)
    symmetries: Symmetries | None = field(default=None, metadata=_OPTIONAL)


def plain(value: Any) -> Any:
    """The same for JSON: results as objects, and null instead of NaN and infinities."""
    if is_dataclass(value):
        value = _members(value)
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    return value


def _members(result: Any) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for one in fields(result):
        value = getattr(result, one.name)
        if "inline" in one.metadata:
            members |= {} if value is None else _members(value)
        elif value is not None or "optional" not in one.metadata:
            members[one.metadata.get("name", one.name)] = value
    return members


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
