"""report.html: what a run did, for people; one file that opens offline."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
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

_ORDER: Final = (SET_ASIDE, PENDING, SKIPPED, DONE)
"""Outcomes as the exposures are listed: what needs somebody comes first."""

_STYLE = """
:root { color-scheme: light; background: #ffffff; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 76rem; margin: 2rem auto;
  padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; }
td, th { padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; font-weight: normal; }
thead th { border-bottom: 1px solid #6b7280; font-weight: bold; }
.n { text-align: right; font-variant-numeric: tabular-nums; } .pairs th { white-space: nowrap; }
.listed { table-layout: fixed; width: 100%; }
.bad { color: #b91c1c; } .dim, figcaption { color: #4b5563; }
figure { margin: 0; } img { max-width: 100%; height: auto; }
@media (max-width: 50rem) {
  .listed, .listed tbody, .listed tr, .listed td { display: block; width: auto; text-align: left; }
  .listed thead { display: none; } .listed tr { border-top: 1px solid #6b7280; padding: .5rem 0; }
  .listed td { padding: 0; } .listed td:empty { display: none; }
  .listed td::before { content: attr(data-label) ": "; color: #4b5563; }
}
"""


def write_report(record: RunRecord, sample: SkySample, path: Path) -> None:
    """Write the report of a run.

    Parameters
    ----------
    record : RunRecord
    sample : SkySample
        Objects of the published tiles.
    path : Path
        The HTML file; it is complete under its name or not there.
    """
    write_text(path, render(record, sample))


def render(record: RunRecord, sample: SkySample) -> str:
    """The report as HTML text; everything that comes from outside is escaped."""
    parts = [
        "<!DOCTYPE html><html lang='en'><head><meta charset='utf-8'>",
        "<meta name='viewport' content='width=device-width'>",
        f"<title>sgclassify: {_text(record.output.name)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>Star/galaxy classification: {_text(record.output.name)}</h1>",
        _headline(record),
        "<h2>Numbers</h2>",
        _pairs({name.replace("_", " "): f"{number:,}" for name, number in record.counts().items()}, "n"),
        *_figures(sample),
        "<h2>Exposures</h2>",
        _exposures(record),
    ]
    if aside := [tile for tile in record.tiles if tile.outcome == SET_ASIDE]:
        rows = ((f"{t.order}/{t.pixel}", ", ".join(t.exposures), t.fault, t.advice) for t in aside)
        head = {"tile": "14%", "exposures": "36%", "fault": "25%", "advice": "25%"}
        parts += ["<h2>Tiles set aside</h2>", _listed(head, rows)]
    if record.notes:
        parts += ["<h2>Notes</h2><ul>", *(f"<li>{_text(note)}</li>" for note in record.notes), "</ul>"]
    parts += ["<h2>Model</h2>", _pairs(record.model)]
    parts += ["<h2>Seconds</h2>", _pairs({name: f"{s:,.1f}" for name, s in record.timings.items()}, "n")]
    parts += ["<h2>Software</h2>", _pairs(software())]
    parts += ["<h2>Command</h2>", f"<p><code>{_text(' '.join(record.command))}</code></p>", "</body></html>"]
    return "\n".join(parts) + "\n"


def _text(value: object) -> str:
    return html.escape(str(value))


def _headline(record: RunRecord) -> str:
    if record.message:
        lines = [f"<p class='bad'>{_text(record.message)}</p>"]
    elif record.exit_code == 0:
        lines = ["<p>Everything was done.</p>"]
    else:
        lines = ["<p>Some exposures or tiles were set aside; see below.</p>"]
    if waiting := pending(record.counts()):
        lines.append(f"<p>Pending: {waiting}. The same command goes on with them.</p>")
    started = record.started.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S")
    lines.append(f"<p class='dim'>Exit code {record.exit_code}. Started {started} UTC.</p>")
    return "".join(lines)


def _pairs(values: Mapping[str, object], kind: str = "") -> str:
    """Names and what they are, one a line; ``kind`` is the class of the values."""
    rows = (
        f"<tr><th scope='row'>{_text(name)}</th><td class='{kind}'>{_text(value)}</td></tr>"
        for name, value in values.items()
    )
    return f"<table class='pairs'>{''.join(rows)}</table>"


def _listed(head: Mapping[str, str], rows: Iterable[Sequence[str | int]]) -> str:
    """A table of the page's width, of columns with the given widths; one below the other on a small screen."""
    columns = "".join(f"<col style='width: {width}'>" for width in head.values())
    rows = list(rows)
    kinds = [" class='n'" * isinstance(value, int) for row in rows[:1] for value in row] or [""] * len(head)
    names = "".join(
        f"<th scope='col'{kind}>{_text(name)}</th>" for name, kind in zip(head, kinds, strict=True)
    )
    lines = [f"<table class='listed'><colgroup>{columns}</colgroup><thead><tr>{names}</tr></thead><tbody>"]
    for row in rows:
        cells = (
            f"<td data-label='{_text(name)}'{kind}>{_cell(value)}</td>"
            for name, kind, value in zip(head, kinds, row, strict=True)
        )
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return "".join([*lines, "</tbody></table>"])


def _cell(value: str | int) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    # names of files are broken at their underscores rather than anywhere
    return _text(value).replace("_", "_<wbr>")


def _exposures(record: RunRecord) -> str:
    """The exposures, those with a fault first."""
    rows = []
    for e in sorted(record.exposures, key=lambda e: (_ORDER.index(e.outcome), e.id)):
        remarks = [text for text in (e.file, e.fault, e.advice) if text] if e.outcome != DONE else []
        outcome = e.outcome.replace("_", " ")
        rows.append((e.id, e.band or "", outcome, e.rows, e.scored, "; ".join([*remarks, *e.notes])))
    widths = ("30%", "6%", "9%", "8%", "8%", "39%")
    names = ("exposure", "band", "outcome", "rows", "scored", "remarks")
    return _listed(dict(zip(names, widths, strict=True)), rows)


def _figures(sample: SkySample) -> list[str]:
    """The pictures, with what they show in words."""
    parts = []
    points, every = sample.points()
    if len(points):
        drawn = f"{len(points):,} of {sample.n_objects:,}"
        caption = (
            f"All {sample.n_objects:,} objects."
            if every == 1
            else f"1 of every {every:,} objects, the same share everywhere: {drawn}."
        )
        parts += ["<h2>Objects on the sky</h2>", _figure(pictures.sky_map(points, every), caption)]
    if n_scored := int(sample.histogram.sum()):
        caption = f"All {n_scored:,} scored objects."
        parts += [
            "<h2>Probability of being a star</h2>",
            _figure(pictures.histogram(sample.histogram), caption),
        ]
    return parts


def _figure(picture: pictures.Picture, caption: str) -> str:
    return (
        f"<figure><img src='{picture.url}' width='{picture.width}' height='{picture.height}'"
        f" alt='{_text(picture.alt)}'><figcaption>{_text(caption)}</figcaption></figure>"
    )
