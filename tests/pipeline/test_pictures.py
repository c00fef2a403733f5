"""The pictures of the report, read as text."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
import pytest
from astropy import units
from astropy.coordinates import SkyCoord
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from sgclassify.pipeline.record.pictures import Drawn, draw_histogram, draw_sky, sky_map
from sgclassify.pipeline.record.sample import GALAXY, NOT_SCORED, SAMPLE, STAR, Sample
from sgclassify.stages.write.page import Picture


def _sample(ra: npt.NDArray[np.float64], dec: npt.NDArray[np.float64]) -> Sample:
    sample = np.zeros(len(ra), dtype=SAMPLE)
    sample["ra"], sample["dec"] = ra % 360.0, dec
    sample["kind"] = np.resize([GALAXY, STAR, GALAXY, NOT_SCORED], len(ra))
    return sample


def _around(ra: float, dec: float, radius: float, n: int = 60) -> Sample:
    """Objects all over a circle (degrees), placed by astropy."""
    angle = np.linspace(0.0, 10 * np.pi, n) * units.rad
    centre = SkyCoord(ra, dec, unit="deg")
    places = centre.directional_offset_by(angle, np.sqrt(np.linspace(0.0, 1.0, n)) * radius * units.deg)
    return _sample(places.ra.deg, places.dec.deg)


def _texts(figure: Figure) -> list[str]:
    with mpl.rc_context({"svg.fonttype": "none"}):
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg")
    return [text.replace("−", "-") for text in re.findall(r"<text[^>]*>([^<]+)</text>", buffer.getvalue())]


def _ticks(figure: Figure) -> list[float]:
    """Tick labels, all of them plain numbers."""
    words = ("galaxy", "star", "not scored", "RA (deg)", "Dec (deg)", " ")
    labels = [text for text in _texts(figure) if text not in words]
    for label in labels:
        assert re.fullmatch(r"(Dec )?-?\d+(\.\d+)?", label), label
    return [float(label.removeprefix("Dec ")) for label in labels]


@settings(max_examples=10, deadline=None)
@given(
    ra=st.one_of(st.floats(0, 359.999), st.sampled_from([0.0, 277.7, 359.9999])),
    dec=st.floats(-89.0, 89.0),
    radius=st.sampled_from([0.003, 0.03, 0.5]),
)
def test_ticks_are_plain_degrees_within_the_field(ra: float, dec: float, radius: float) -> None:
    figure, _ = draw_sky(_around(ra, dec, radius), 1)
    ticks = _ticks(figure)
    assert len(ticks) >= 4
    # a number may be of either axis, of a right ascension between 0 and 360
    reach_ra = 2.0 * np.degrees(np.arcsin(min(np.sin(np.radians(radius)) / np.cos(np.radians(dec)), 1.0)))
    for tick in ticks:
        is_ra = 0.0 <= tick < 360.0 and abs((tick - ra + 180.0) % 360.0 - 180.0) <= max(reach_ra, 2 * radius)
        assert is_ra or abs(tick - dec) <= 2.0 * radius, (tick, ra, dec)


@pytest.mark.parametrize("ra", [0.0, 359.9999, 0.001])
def test_a_field_across_zero(ra: float) -> None:
    texts = _texts(draw_sky(_around(ra, 5.0, 0.01), 1)[0])
    assert "0.000" in texts
    assert any(text.startswith("359.9") for text in texts)
    assert not any(text.startswith(("360", "-0.0")) for text in texts)


@pytest.mark.parametrize(("ra", "dec"), [(30.0, 90.0), (200.0, -89.99), (10.0, 89.985)])
def test_a_field_at_a_pole_is_round(ra: float, dec: float) -> None:
    sample = _around(ra, dec, 0.02)
    figure, alt = draw_sky(sample, 1)
    (axes,) = figure.axes
    # distances on the picture are those on the sky
    xy = axes.collections[0].get_offsets()
    kind = sample[sample["kind"] == GALAXY]
    places = SkyCoord(kind["ra"], kind["dec"], unit="deg")
    expected = places[0].separation(places).arcsec
    np.testing.assert_allclose(np.hypot(*(xy - xy[0]).T), expected, rtol=1e-4, atol=1e-4)
    assert axes.get_aspect() == 1.0
    ticks = _ticks(figure)
    assert {0.0, 90.0, 180.0, 270.0} <= set(ticks)
    parallels = [tick for tick in ticks if abs(abs(tick) - 90.0) < 0.05 and tick != 90.0]
    assert len(parallels) >= 2
    assert "within 1.2 arcmin" in alt


def test_all_of_the_sky() -> None:
    golden = np.arange(500)
    sample = _sample(golden * 137.50776, np.degrees(np.arcsin(np.linspace(-0.99, 0.99, 500))))
    ticks = _ticks(draw_sky(sample, 4)[0])
    assert sum(tick >= 100.0 for tick in ticks) >= 2
    assert min(ticks) >= -90.0


def test_every_object_of_every_kind_is_in_the_picture_and_in_the_words() -> None:
    sample = _around(277.7, 23.95, 0.01)
    figure, alt = draw_sky(sample, 8)
    drawn = {c.get_label(): len(c.get_offsets()) for c in figure.axes[0].collections}
    assert drawn == {"galaxy": 30, "star": 15, "not scored": 15}
    paths = {tuple(map(tuple, c.get_paths()[0].vertices)) for c in figure.axes[0].collections}
    assert len(paths) == 3, "each kind has a shape of its own"
    assert alt.startswith("Sky map of 1 of every 8 objects within 35.8 arcsec of RA 277.6")
    assert "galaxies 30, not scored 15, stars 15" in alt


def test_one_object() -> None:
    picture = sky_map(_sample(np.array([10.0]), np.array([-90.0])), 1)
    assert picture.png.startswith(b"\x89PNG")
    assert "galaxies 1, " in picture.alt
    # the size that the page reserves is that of the picture
    assert (picture.width, picture.height) == tuple(np.frombuffer(picture.png[16:24], ">u4"))


def test_histogram() -> None:
    counts = np.zeros(20, dtype=np.int64)
    counts[[0, 9, 10, 19]] = 1500, 2, 3, 400
    figure, alt = draw_histogram(counts)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert heights == counts.tolist()
    assert "1,905 objects in 20 bins from 0 to 1: 1,502 below 0.5, 403 from 0.5 on" in alt
    assert any(re.fullmatch(r"1,\d00", text) for text in _texts(figure)), "thousands of objects"


def test_a_picture_is_drawn_once_for_the_same_data(tmp_path: Path) -> None:
    drawn: list[int] = []

    def draw(data: Any, number: int) -> Picture:
        drawn.append(number)
        return Picture(bytes([number]), 1, 2, "dots")

    def shown(data: Any, number: int, path: Path | None = tmp_path / "pictures.json") -> Picture:
        pictures = Drawn(path)
        picture = pictures.get("dots", draw, data, number)
        pictures.keep()
        return picture

    one = np.arange(3)
    assert shown(one, 1) == shown(one, 1) == Picture(b"\x01", 1, 2, "dots")
    assert drawn == [1]
    assert shown(one, 2).png == shown(one + 1, 2).png == b"\x02"
    assert drawn == [1, 2, 2]
    (tmp_path / "pictures.json").write_text('{"dots": []}')
    shown(one, 3)
    shown(one, 3, None)
    assert drawn == [1, 2, 2, 3, 3]
