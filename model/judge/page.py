"""The figures of an evaluation as a page that opens offline, with a gallery of the worst mistakes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa

from sgclassify.model.judge import metrics
from sgclassify.model.judge.evaluate import Judged
from sgclassify.model.judge.results import MODEL, Bands, Evaluation, as_text, bands_as_text
from sgclassify.model.judge.scores import samples_of, shards_of
from sgclassify.stages.arrays import Bool
from sgclassify.stages.bands import BANDS
from sgclassify.stages.write.atomic import write_atomic_text
from sgclassify.stages.write.page import Picture, render

WORST: Final = 24
"""Mistakes shown."""


def _picture(draw: Callable[[Any], None], size: tuple[float, float], alt: str) -> Picture:
    """A drawing as a picture; `alt` describes it in words."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    draw(figure)
    return Picture.of(figure, alt)


def _recall(figure: Any, result: Evaluation) -> None:
    axes = figure.subplots(1, 2, sharex=True)
    for axis, kind in zip(axes, ("star", "galaxy"), strict=True):
        for name, method in result.methods.items():
            rows = [(row.low, row.high, getattr(row.figures, kind)) for row in method.by_magnitude]
            rows = [row for row in rows if row[2].n]
            x = [(low + high) / 2 for low, high, _ in rows]
            y = np.array([1 - recall.share for *_, recall in rows])
            if name == MODEL:
                axis.fill_between(x, [1 - r.high for *_, r in rows], [1 - r.low for *_, r in rows], alpha=0.25)
            axis.plot(x, np.maximum(y, 1e-5), marker="o", ms=3, lw=2 if name == MODEL else 1, label=name)
        # of nothing, matplotlib makes no logarithmic axis
        scale = "log" if any(len(line.get_xdata()) for line in axis.lines) else "linear"
        axis.set(yscale=scale, title=f"{kind}s misclassified", xlabel=f"{result.sample.selection.band} magnitude")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=7)


def _roc(axis: Any, p: Any, star: Any, name: str) -> None:
    order = np.argsort(-p, kind="stable")
    true = np.cumsum(star[order]) / max(star.sum(), 1)
    false = np.cumsum(~star[order]) / max((~star).sum(), 1)
    axis.plot(np.maximum(false, 1e-5), 1 - true + 1e-5, lw=2 if name == MODEL else 1, label=name)


def _reliability(axis: Any, p: Any, star: Any, label: str) -> None:
    mean, share, n = metrics.reliability(p, star)
    error = np.sqrt(np.maximum(share * (1 - share), 1e-6) / np.maximum(n, 1))
    axis.errorbar(mean, share, error, marker="o", ms=3, lw=1, label=label)


def _ranking(figure: Any, judged: Judged, keep: Bool, edges: tuple[float, ...]) -> None:
    axes = figure.subplots(1, 2)
    for name, p in judged.p.items():
        index = keep & np.isfinite(p)
        _roc(axes[0], p[index], judged.star[index], name)
    axes[0].set(
        xscale="log", yscale="log", xlabel="galaxies called star", ylabel="stars missed", title="ROC (both axes log)"
    )
    axes[0].legend(fontsize=7)
    p = judged.p[MODEL]
    _reliability(axes[1], p[keep], judged.star[keep], "all")
    for low, high in itertools.pairwise(edges):
        part = keep & (judged.magnitude >= low) & (judged.magnitude < high)
        if part.sum() > 200:
            _reliability(axes[1], p[part], judged.star[part], f"{low:g}-{high:g}")
    axes[1].plot([0, 1], [0, 1], color="0.7", lw=1)
    axes[1].set(xlabel="p_star", ylabel="share of stars", title="Reliability")
    axes[1].legend(fontsize=7)


def _bands(figure: Any, found: Bands) -> None:
    axes = figure.subplots(1, 2)
    numbers = sorted(found.number, key=int)
    axes[0].plot([int(k) for k in numbers], [found.number[k].error for k in numbers], marker="o")
    axes[0].set(yscale="log", xlabel="bands", ylabel="share misclassified", title="Random bands")
    kinds = [(found.alone, "only "), (found.without, "all but "), (found.trios, "")]
    bars = [(prefix + name, rate.error) for kind, prefix in kinds for name, rate in kind.items()]
    axes[1].barh([b[0] for b in bars], [b[1] for b in bars])
    axes[1].tick_params(labelsize=7)
    axes[1].set(xscale="log", xlabel="share misclassified")


def gallery(data_dir: Path, part: str, table: pa.Table, keep: Bool) -> list[tuple[Picture, str]]:
    """Stamps of the objects that were misclassified with the highest confidence, each with its caption.

    `part` is the part of the data that `table` was scored from, `keep` are the objects to choose from.
    """
    judged = Judged(table)
    p = judged.p[MODEL]
    surprise = np.where(keep & judged.scored, np.abs(p - judged.star), -1.0)
    worst = [int(k) for k in np.argsort(-surprise, kind="stable")[:WORST] if surprise[k] > 0.5]
    wanted = {int(table["object_id"][k].as_py()): k for k in worst}
    stamps: dict[int, Any] = {}
    for sample in samples_of(shards_of(data_dir, part)):
        for row, name in enumerate(sample.table["object_id"].to_pylist()):
            if name in wanted:
                stamps[wanted[name]] = (sample.image[row].astype(float), sample.valid[row], sample.sigma[row])
    parts = []
    for k in worst:
        image, valid, sigma = stamps[k]

        def draw(figure: Any, image: Any = image, valid: Any = valid, sigma: Any = sigma) -> None:
            for b, axis in enumerate(figure.subplots(1, len(BANDS))):
                shown = np.arcsinh(np.where(valid[b], image[b], np.nan) / sigma[b])
                axis.imshow(
                    shown, origin="lower", cmap="gray", vmin=-2, vmax=max(3.0, float(np.nanmax(shown, initial=3)))
                )
                axis.set_title(BANDS[b], fontsize=8)
                axis.axis("off")

        facts = {name: table[name][k].as_py() for name in table.column_names if name != "snr"}
        told = [f"truth {facts['true_class']}", f"p_star {p[k]:.3f}"]
        known = [("mag_i", "i = {:.2f}")]
        if facts["true_class"] == "galaxy":
            known += [("r50_arcsec", "r50 {:.3f} arcsec"), ("redshift", "z {:.2f}")]
        told += [text.format(facts[name]) for name, text in known if facts.get(name) is not None]
        told += [name for name in ("blended", "binary") if facts.get(name)]
        told += [f"{facts['n_bands']} bands", f"sg_flags {facts['sg_flags']}", f"object_id {facts['object_id']}"]
        parts.append((_picture(draw, (9, 1.5), f"stamps of {told[0]}"), ", ".join(told)))
    return parts


def write_page(
    path: Path, title: str, result: Evaluation, table: pa.Table, stamps: list[tuple[Picture, str]] | None
) -> None:
    """Write the page of a table of judged objects, with `stamps` as from `gallery`.

    The HTML file is complete under its name or not there.
    """
    selection = result.sample.selection
    judged = Judged(table, selection.band)
    keep = judged.scored & judged.kept(selection)
    by_magnitude = bool(result.methods[MODEL].by_magnitude)
    spread = ""
    sections: list[tuple[str, str, Picture]] = []
    if by_magnitude:
        counts, _ = np.histogram(judged.magnitude[keep], selection.edges)
        bounds = itertools.pairwise(selection.edges)
        bins = ", ".join(f"{a:g}-{b:g}: {n}" for (a, b), n in zip(bounds, counts, strict=True))
        spread = f"Objects by {selection.band} magnitude: {bins}."
        alt = "Share of stars and of galaxies misclassified by magnitude, by method; the numbers are above."
        picture = _picture(lambda figure: _recall(figure, result), (10, 4), alt)
        sections.append(("Errors by magnitude", "", picture))
    alt = "Ranking by method, and share of stars against probability; the numbers are above."
    picture = _picture(lambda figure: _ranking(figure, judged, keep, selection.edges), (10, 4.5), alt)
    sections.append(("Ranking and reliability", "", picture))
    if (bands := result.bands) is not None:
        alt = "Errors by number of bands that are left; the numbers are above."
        picture = _picture(lambda figure: _bands(figure, bands), (10, 4), alt)
        sections.append(("Missing bands", bands_as_text(bands), picture))
    values = {"heading": title, "spread": spread, "text": as_text(result), "sections": sections, "mistakes": stamps}
    write_atomic_text(render("sgclassify.model.judge", "evaluation.html", **values), path)
