"""The pictures of the report: the objects on the sky, and the histogram of their probabilities."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from sgclassify.pipeline.record.sample import GALAXY, HISTOGRAM_EDGES, NOT_SCORED, STAR, Sample
from sgclassify.stages.arrays import F64, I64
from sgclassify.stages.write.atomic import write_atomic_text
from sgclassify.stages.write.page import Picture

if TYPE_CHECKING:
    from astropy.wcs import WCS
    from matplotlib.figure import Figure

COLOURS: Final = {GALAXY: "#1e3a8a", NOT_SCORED: "#6b7280", STAR: "#c2650a"}
"""Each with a contrast of 3 and more against white; they differ in brightness too, for those who see no colours."""

_NAMES: Final = {GALAXY: "galaxy", NOT_SCORED: "not scored", STAR: "star"}
_PLURALS: Final = {GALAXY: "galaxies", NOT_SCORED: "not scored", STAR: "stars"}
_MARKERS: Final = {GALAXY: "o", NOT_SCORED: "x", STAR: "*"}
_AREAS: Final = {GALAXY: 1.0, NOT_SCORED: 1.5, STAR: 4.0}
"""Of the markers, by which they look about equally large."""

_GRID: Final = "#9ca3af"
_ARCSEC: Final = 1.0 / 3600.0

WIDE: Final = 45.0
"""Degrees from the middle of a field; beyond, no plane touches the sky well."""


class Drawn:
    """The pictures of earlier runs into a folder, from a file: drawing takes a second, and not every run adds objects.

    Without a file, every picture is drawn.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._kept: dict[str, dict[str, Any]] = {}
        self._used: dict[str, dict[str, Any]] = {}
        if path is not None:
            with suppress(OSError, ValueError):
                self._kept = json.loads(path.read_text(encoding="utf-8"))

    def get(self, name: str, draw: Callable[..., Picture], data: npt.NDArray[Any], *arguments: int) -> Picture:
        """What ``draw(data, *arguments)`` returns; from the file if the picture of that name was drawn of the same."""
        versions = [version(one) for one in ("sgclassify", "astropy", "matplotlib")]
        key = hashlib.sha256(json.dumps([versions, arguments]).encode() + data.tobytes()).hexdigest()
        picture = None
        with suppress(AttributeError, KeyError, TypeError, ValueError):
            if (kept := dict(self._kept[name])).pop("key") == key:
                picture = Picture(**{**kept, "png": base64.b64decode(kept["png"])})
        picture = picture or draw(data, *arguments)
        self._used[name] = {"key": key, **asdict(picture), "png": base64.b64encode(picture.png).decode()}
        return picture

    def keep(self) -> None:
        """Write the file for the next run."""
        if self._path is not None and self._path.parent.is_dir():
            write_atomic_text(json.dumps(self._used), self._path)


def sky_map(points: Sample, every: int) -> Picture:
    """Objects on the sky; see `draw_sky`."""
    return Picture.of(*draw_sky(points, every))


def histogram(counts: I64) -> Picture:
    """How many objects have which p_star; see `draw_histogram`."""
    return Picture.of(*draw_histogram(counts))


def draw_sky(points: Sample, every: int) -> tuple[Figure, str]:
    """Draw at least one object on the sky, areas in proportion; returns the figure, and the same in words.

    The points are one of `every` so many objects.
    """
    from astropy import units

    wcs, centre, radius = _projection(points["ra"], points["dec"])
    x, y = wcs.wcs_world2pix(points["ra"], points["dec"], 0)
    figure = _figure((8.0, 5.6))
    axes: Any = figure.add_subplot(projection=wcs)
    size = float(np.clip(20_000 / len(x), 1.0, 12.0))
    # what is rarer is drawn over what there is more of
    for kind, name in _NAMES.items():
        chosen = points["kind"] == kind
        if chosen.any():
            axes.scatter(
                x[chosen],
                y[chosen],
                s=size * _AREAS[kind],
                c=COLOURS[kind],
                marker=_MARKERS[kind],
                linewidths=0.8 if kind == NOT_SCORED else 0,
                label=name,
            )
    _frame(axes, x, y, radius)
    for axis, name in zip(axes.coords, ("RA", "Dec"), strict=True):
        # plain degrees, of a right ascension from 0 to 360, with as many digits as the field needs
        axis.set_format_unit(units.deg, decimal=True, show_decimal_unit=False)
        axis.set_ticks(number=5)
        axis.set_ticklabel(exclude_overlapping=True)
        axis.set_axislabel(f"{name} (deg)")
        axis.grid(color=_GRID, alpha=0.5, linestyle="-", linewidth=0.6)
    if abs(centre[1]) + radius >= 90.0 and radius <= WIDE:
        _label_pole(axes, wcs, centre[1])
    figure.legend(loc="outside right upper", markerscale=float(np.sqrt(24.0 / size)), frameon=False)
    kinds = ", ".join(f"{_PLURALS[kind]} {np.count_nonzero(points['kind'] == kind):,}" for kind in _NAMES)
    share = "all objects" if every == 1 else f"1 of every {every:,} objects"
    place = f"RA {centre[0]:.4f}, Dec {centre[1]:.4f} degrees"
    return figure, f"Sky map of {share} within {_angle(radius)} of {place}: {kinds}."


def _frame(axes: Any, x: F64, y: F64, radius: float) -> None:
    """Limits around all objects, on the sky."""
    margin = max(0.04 * max(np.ptp(x), np.ptp(y)), 1.0)
    # half the circle, and the height of the equator unrolled: nothing lies beyond
    most_x, most_y = (179.9 / _ARCSEC, 57.2 / _ARCSEC) if radius > WIDE else (np.inf, np.inf)
    axes.set_aspect("equal")
    axes.set_xlim(max(x.min() - margin, -most_x), min(x.max() + margin, most_x))
    axes.set_ylim(max(y.min() - margin, -most_y), min(y.max() + margin, most_y))


def _label_pole(axes: Any, wcs: WCS, dec: float) -> None:
    """Label a field that holds a pole: meridians at the frame, parallels, which may not reach it, where they are."""
    from astropy import units
    from matplotlib.ticker import MaxNLocator

    sign = np.sign(dec)
    ra_axis, dec_axis = axes.coords
    ra_axis.set_ticks(spacing=45 * units.deg)
    ra_axis.set_ticklabel_position("lbrt")
    ra_axis.set_axislabel_position("b")
    low, high = axes.get_ylim()
    distances = np.asarray(MaxNLocator(4).tick_values(0.0, (high - low) * _ARCSEC / 2.0))[1:-1]
    dec_axis.set_ticks(sign * (90.0 - distances) * units.deg)
    dec_axis.set_ticklabel_visible(False)
    dec_axis.set_ticks_visible(False)
    dec_axis.set_axislabel(" ")
    for value in sign * (90.0 - distances):
        place = wcs.wcs_world2pix(22.5, value, 0)
        label = f"Dec {value:.9f}".rstrip("0").rstrip(".").replace("-", "−")
        box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1.0}
        axes.text(*place, label, ha="center", va="center", fontsize=9, bbox=box)


def draw_histogram(counts: I64) -> tuple[Figure, str]:
    """Draw how many objects have which p_star; returns the figure, and the same in words.

    `counts`, shape (20,), are the objects in the bins of `HISTOGRAM_EDGES`.
    """
    edges = np.asarray(HISTOGRAM_EDGES)
    figure = _figure((8.0, 3.0))
    axes: Any = figure.add_subplot()
    star = edges[:-1] >= 0.5
    for kind, chosen, hatch in ((GALAXY, ~star, None), (STAR, star, "///")):
        axes.bar(
            edges[:-1][chosen],
            counts[chosen],
            width=np.diff(edges)[chosen],
            align="edge",
            color=COLOURS[kind],
            edgecolor="white",
            hatch=hatch,
            label=_NAMES[kind],
        )
    axes.set_xlabel("p_star")
    axes.set_ylabel("objects")
    axes.set_xlim(0, 1)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False)
    alt = (
        f"Histogram of p_star of {counts.sum():,} objects in {len(counts)} bins from 0 to 1: "
        f"{counts[~star].sum():,} below 0.5, {counts[star].sum():,} from 0.5 on. "
        f"Objects by bin: {', '.join(f'{n:,}' for n in counts)}."
    )
    return figure, alt


def _figure(size: tuple[float, float]) -> Figure:
    # Imported here: slow to import, and of use at the very end of a run only. The Agg canvas needs no display
    # and leaves no global state behind. The projections of astropy register themselves.
    import astropy.visualization.wcsaxes  # noqa: F401
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _projection(ra: F64, dec: F64) -> tuple[WCS, tuple[float, float], float]:
    """A projection of equal areas around the middle of some objects, in pixels of an arcsecond.

    Returns it, then in degrees the right ascension and declination of the middle and the largest distance from it.
    """
    from astropy.wcs import WCS

    lon, lat = np.radians(ra), np.radians(dec)
    vectors = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)])
    x, y, z = mean = vectors.mean(axis=1)
    centre = float(np.degrees(np.arctan2(y, x)) % 360.0), float(np.degrees(np.arctan2(z, np.hypot(x, y))))
    unit = mean / max(float(np.linalg.norm(mean)), 1e-9)
    # by the chord, which unlike the cosine tells small distances
    chord = float(np.linalg.norm(vectors - unit[:, np.newaxis], axis=0).max())
    radius = float(np.degrees(2.0 * np.arcsin(min(chord / 2.0, 1.0))))
    wcs = WCS(naxis=2)
    # around the place itself, as a plane would lie on a small field; of a wide one, the equator unrolled
    wcs.wcs.ctype = ["RA---CEA", "DEC--CEA"] if radius > WIDE else ["RA---ZEA", "DEC--ZEA"]
    wcs.wcs.crval = [centre[0], 0.0 if radius > WIDE else centre[1]]
    wcs.wcs.cunit = ["deg", "deg"]
    wcs.wcs.cdelt = [-_ARCSEC, _ARCSEC]
    if radius <= WIDE:
        # north up at the pole too
        wcs.wcs.lonpole = 180.0
    return wcs, centre, radius


def _angle(degrees: float) -> str:
    if degrees >= 1.0:
        return f"{degrees:.1f} degrees"
    return f"{60.0 * degrees:.1f} arcmin" if degrees >= 1.0 / 60.0 else f"{3600.0 * degrees:.1f} arcsec"
