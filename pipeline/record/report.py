"""report.html: what a run did, for people; one file that opens offline."""

from __future__ import annotations

from datetime import UTC
from pathlib import Path
from typing import Final

from sgclassify.pipeline.record import pictures
from sgclassify.pipeline.record.record import (
    DONE,
    PENDING,
    SET_ASIDE,
    SKIPPED,
    RunRecord,
    pending,
    software,
    write_text,
)
from sgclassify.pipeline.record.sample import SkySample
from sgclassify.stages.write import page

_ORDER: Final = (SET_ASIDE, PENDING, SKIPPED, DONE)
"""Order of the exposures by outcome: those that need attention come first."""


def write_report(record: RunRecord, sample: SkySample, path: Path, pictures_file: Path | None = None) -> None:
    """Write the report of a run, an HTML file that is complete under its name or not there.

    `sample` has objects of the published tiles. `pictures_file` keeps the pictures for the next run.
    """
    drawn = pictures.Drawn(pictures_file)
    write_text(path, render(record, sample, drawn))
    drawn.keep()


def render(record: RunRecord, sample: SkySample, drawn: pictures.Drawn | None = None) -> str:
    """The report as HTML text; all values are escaped."""
    counts = record.counts()
    return page.render(
        "sgclassify.pipeline.record",
        "report.html",
        record=record,
        waiting=pending(counts),
        started=record.started.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S"),
        counts={name.replace("_", " "): f"{number:,}" for name, number in counts.items()},
        figures=_figures(sample, drawn or pictures.Drawn(None)),
        exposures=_exposures(record),
        tiles=[
            (f"{t.order}/{t.pixel}", ", ".join(t.exposures), t.fault, t.advice)
            for t in record.tiles
            if t.outcome == SET_ASIDE
        ],
        seconds={name: f"{s:,.1f}" for name, s in record.timings.items()},
        software=software(),
    )


def _exposures(record: RunRecord) -> list[tuple[str | int, ...]]:
    """Rows of the table of exposures; those with a fault come first."""
    rows: list[tuple[str | int, ...]] = []
    for e in sorted(record.exposures, key=lambda e: (_ORDER.index(e.outcome), e.id)):
        remarks = [text for text in (e.file, e.fault, e.advice) if text] if e.outcome != DONE else []
        outcome = e.outcome.replace("_", " ")
        rows.append((e.id, e.band or "", outcome, e.rows, e.scored, "; ".join([*remarks, *e.notes])))
    return rows


def _figures(sample: SkySample, drawn: pictures.Drawn) -> list[tuple[str, page.Picture, str]]:
    """The pictures, each with its heading and its caption."""
    figures = []
    points, every = sample.points()
    if len(points):
        shown = f"{len(points):,} of {sample.n_objects:,}"
        caption = (
            f"All {sample.n_objects:,} objects."
            if every == 1
            else f"1 of every {every:,} objects, the same share everywhere: {shown}."
        )
        figures.append(("Objects on the sky", drawn.get("sky", pictures.sky_map, points, every), caption))
    if n_scored := int(sample.histogram.sum()):
        caption = f"All {n_scored:,} scored objects."
        figures.append(
            ("Probability of being a star", drawn.get("histogram", pictures.histogram, sample.histogram), caption)
        )
    return figures
