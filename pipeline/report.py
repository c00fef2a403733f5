"""report.html: what a run did, for people; one file that opens offline."""

from __future__ import annotations

import base64
import html
import io
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from sgclassify.pipeline.receipts import HISTOGRAM_EDGES, TileReceipt
from sgclassify.pipeline.record import DONE, SKIPPED, RunRecord, software, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

log = logging.getLogger(__name__)

MAX_POINTS = 20_000
"""Objects drawn on the sky map, at most."""

_STAR, _GALAXY, _NONE = "#b45309", "#1d4ed8", "#9ca3af"

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2937; max-width: 70rem; margin: 2rem auto;
  padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; }
td, th { padding: .25rem .8rem .25rem 0; text-align: left; vertical-align: top; }
th { border-bottom: 1px solid #9ca3af; } td.n { text-align: right; font-variant-numeric: tabular-nums; }
.bad { color: #b91c1c; } .dim { color: #6b7280; } code { overflow-wrap: anywhere; }
img { max-width: 100%; } .scroll { overflow-x: auto; }
"""


class SkySample:
    """Objects of the published tiles for the pictures; its memory does not grow with their number."""

    def __init__(self) -> None:
        self.histogram = np.zeros(len(HISTOGRAM_EDGES) - 1, dtype=np.int64)
        self.n_objects = 0
        self._points: list[npt.NDArray[np.float64]] = []
        self._n_points = 0
        self._step = 1

    def add(self, receipt: TileReceipt) -> None:
        """Add a tile."""
        self.histogram += receipt.histogram
        self.n_objects += receipt.n_objects
        points = np.stack([receipt.sample_ra, receipt.sample_dec, receipt.sample_p_star]).astype(np.float64)
        self._points.append(points[:, :: self._step])
        self._n_points += self._points[-1].shape[1]
        if self._n_points > 2 * MAX_POINTS:
            # every second one, now and of what is still to come, so that all tiles stay equally dense
            self._points = [np.concatenate(self._points, axis=1)[:, ::2]]
            self._n_points, self._step = self._points[0].shape[1], 2 * self._step

    def points(self) -> npt.NDArray[np.float64]:
        """Right ascension, declination (degrees) and p_star (nan where not scored), shape (3, n)."""
        return np.concatenate([np.empty((3, 0)), *self._points], axis=1)


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
        _table((), ((name.replace("_", " "), number) for name, number in record.counts().items())),
    ]
    if sample.n_objects:
        parts += [
            "<h2>Objects on the sky</h2>",
            _picture(lambda axes: _sky_map(axes, sample.points()), (8, 5)),
        ]
        parts += [
            "<h2>Probability of being a star</h2>",
            _picture(lambda axes: _histogram(axes, sample.histogram), (8, 3)),
        ]
    parts += ["<h2>Exposures</h2>", _exposures(record)]
    aside = [tile for tile in record.tiles if tile.outcome != DONE]
    if aside:
        rows = ((f"{t.order}/{t.pixel}", ", ".join(t.exposures), t.fault, t.advice) for t in aside)
        parts += ["<h2>Tiles set aside</h2>", _table(("tile", "exposures", "fault", "advice"), rows)]
    if record.notes:
        parts += ["<h2>Notes</h2><ul>", *(f"<li>{_text(note)}</li>" for note in record.notes), "</ul>"]
    parts += ["<h2>Model</h2>", _table((), record.model.items())]
    parts += [
        "<h2>Time</h2>",
        _table(("phase", "seconds"), ((k, round(v, 1)) for k, v in record.timings.items())),
    ]
    parts += ["<h2>Software</h2>", _table((), software().items())]
    parts += ["<h2>Command</h2>", f"<p><code>{_text(' '.join(record.command))}</code></p>", "</body></html>"]
    return "\n".join(parts) + "\n"


def _text(value: object) -> str:
    return html.escape(str(value))


def _headline(record: RunRecord) -> str:
    started = (
        f"<span class='dim'>started {_text(record.started.isoformat(sep=' ', timespec='seconds'))}</span>"
    )
    if record.message:
        return f"<p class='bad'>{_text(record.message)}</p><p>{started}</p>"
    state = (
        "Everything was done."
        if record.exit_code == 0
        else "Some exposures or tiles were set aside; see below."
    )
    return f"<p>{state} {started}</p>"


def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["<div class='scroll'><table>"]
    if head:
        lines.append("<tr>" + "".join(f"<th>{_text(name)}</th>" for name in head) + "</tr>")
    for row in rows:
        cells = (
            f"<td class='n'>{v:,}</td>" if isinstance(v, (int, float)) else f"<td>{_text(v)}</td>"
            for v in row
        )
        lines.append("<tr>" + "".join(cells) + "</tr>")
    return "".join([*lines, "</table></div>"])


def _exposures(record: RunRecord) -> str:
    """The exposures, those with a fault first."""
    rows = []
    for e in sorted(record.exposures, key=lambda e: (e.outcome == DONE, e.outcome == SKIPPED, e.id)):
        reason = "; ".join(text for text in (e.file, e.fault, e.advice) if text) if e.outcome != DONE else ""
        outcome = e.outcome.replace("_", " ")
        rows.append(
            (e.id, e.band or "", outcome, e.rows, e.scored, "; ".join([reason, *e.notes]).strip("; "))
        )
    return _table(("exposure", "band", "outcome", "rows", "scored", "remarks"), rows)


def _picture(draw: Callable[[Axes], None], size: tuple[float, float]) -> str:
    """A drawing as an inline PNG."""
    # Imported here: slow to import, and of use at the very end of a run only. The Agg canvas needs no display
    # and leaves no global state behind.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    draw(axes)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f"<img alt='' src='data:image/png;base64,{data}'>"


def _sky_map(axes: Any, points: npt.NDArray[np.float64]) -> None:
    ra, dec, star = points
    step = -(-len(ra) // MAX_POINTS)
    ra, dec, star = _unwrapped(ra[::step]), dec[::step], star[::step]
    with np.errstate(invalid="ignore"):
        groups = (
            ("galaxy", _GALAXY, star < 0.5),
            ("star", _STAR, star >= 0.5),
            ("not scored", _NONE, np.isnan(star)),
        )
    size = float(np.clip(20_000 / max(len(ra), 1), 1.0, 12.0))
    for label, colour, chosen in groups:
        if chosen.any():
            axes.scatter(ra[chosen], dec[chosen], s=size, c=colour, linewidths=0, label=label)
    stretch = 1.0 / max(np.cos(np.radians(np.median(dec))), 0.05)
    axes.set_aspect(stretch, adjustable="datalim")
    axes.invert_xaxis()
    axes.set_xlabel("RA (deg)")
    axes.set_ylabel("Dec (deg)")
    axes.legend(loc="upper right", markerscale=2.0)


def _unwrapped(ra: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Right ascensions without the jump at 360 degrees, where a field lies across it."""
    centre = np.degrees(np.angle(np.exp(1j * np.radians(ra)).mean())) % 360.0
    return np.asarray(centre + (ra - centre + 180.0) % 360.0 - 180.0)


def _histogram(axes: Any, counts: npt.NDArray[np.int64]) -> None:
    edges = np.asarray(HISTOGRAM_EDGES)
    middle = (edges[:-1] + edges[1:]) / 2
    colours = [_STAR if p >= 0.5 else _GALAXY for p in middle]
    axes.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=colours, edgecolor="white")
    axes.set_xlabel("p_star")
    axes.set_ylabel("objects")
    axes.set_xlim(0, 1)
    axes.yaxis.get_major_locator().set_params(integer=True)
