"""run.json and report.html."""

from __future__ import annotations

import base64
import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from sgclassify.pipeline.receipts import TileReceipt
from sgclassify.pipeline.record import (
    DONE,
    SET_ASIDE,
    SKIPPED,
    ExposureRecord,
    Failure,
    RunRecord,
    TileRecord,
    write_text,
)
from sgclassify.pipeline.report import MAX_POINTS, SkySample, render
from sgclassify.stages.errors import UnusableInputError

HOSTILE = "<script>alert('x')</script>&\""


def _record(tmp_path: Path) -> RunRecord:
    record = RunRecord(
        ["sgclassify", "run", HOSTILE], {"config_version": 1}, {"id": HOSTILE}, tmp_path / HOSTILE
    )
    good = ExposureRecord(
        "a", {"image": "/a_IMG.fits"}, outcome=DONE, rows=5, usable=4, scored=3, notes=[HOSTILE]
    )
    bad = ExposureRecord("b" + HOSTILE, {"image": "/b_IMG.fits"})
    bad.close(SET_ASIDE, Failure("/b_IMG.fits", HOSTILE, "copy it again"))
    skipped = ExposureRecord("c", {"image": "/c_IMG.fits"})
    skipped.close(SKIPPED, Failure("/c_IMG.fits", "slitless"))
    record.exposures = [skipped, good, bad]
    tile = TileRecord(10, 7, ["a"])
    tile.set_aside(Failure("", "unexpected X", "report it", "Traceback ..."))
    record.tiles = [tile, TileRecord(10, 3, ["a"], outcome=DONE, n_objects=4, n_stars=2, n_galaxies=1)]
    record.notes = [HOSTILE]
    return record


def _receipt(ra: list[float]) -> TileReceipt:
    p_star = np.array([0.9, np.nan, 0.1], dtype=np.float32)
    dec = np.array([-1.0, 0.0, 1.0])
    return TileReceipt(10, 3, "key", 3, 1, 1, 1, 0.1, np.arange(20), np.array(ra), dec, p_star)


def _sample(ra: list[float]) -> SkySample:
    sample = SkySample()
    sample.add(_receipt(ra))
    return sample


def test_run_json(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    _record(tmp_path).write(path)
    record = json.loads(path.read_text())
    assert list(record) == [
        "record_version", "exit_code", "message", "started", "finished", "command", "software",
        "configuration", "model", "counts", "notes", "inputs", "tiles", "peak_mib", "timings",
    ]  # fmt: skip
    assert [item["id"] for item in record["inputs"]] == ["a", "b" + HOSTILE, "c"]
    assert [item["outcome"] for item in record["inputs"]] == ["done", "set_aside", "skipped"]
    assert "fault" not in record["inputs"][0]
    assert record["inputs"][1]["advice"] == "copy it again"
    assert "traceback" not in record["inputs"][1]
    assert [tile["pixel"] for tile in record["tiles"]] == [3, 7]
    assert record["tiles"][1]["traceback"] == "Traceback ..."
    assert record["counts"]["exposures_set_aside"] == 1
    assert record["counts"]["rows_scored"] == 3
    assert record["software"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


class _Links(HTMLParser):
    """Collects what a browser would load."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]


def test_report_is_one_safe_file_with_pictures(tmp_path: Path) -> None:
    html = render(_record(tmp_path), _sample([359.9, 0.0, 0.1]))
    links = _Links()
    links.feed(html)
    assert len(links.loads) == 2
    assert "script" not in links.tags
    for load in links.loads:
        assert base64.b64decode(load.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    assert not re.search(r"https?://", html)
    for text in ("copy it again", "slitless", "10/7", "not scored", "set aside"):
        assert text in html


def test_report_of_a_run_that_ended_early(tmp_path: Path) -> None:
    record = RunRecord([], {}, {}, tmp_path, message="no exposure of the list can be used", exit_code=4)
    html = render(record, SkySample())
    assert "no exposure of the list can be used" in html
    assert "<img" not in html


def test_failure_of_a_known_and_an_unknown_error() -> None:
    known = Failure.from_error(UnusableInputError("/a.fits", "truncated", "copy it again"))
    assert str(known) == "/a.fits: truncated; copy it again"
    assert known.traceback == ""
    try:
        raise KeyError("x")
    except KeyError as error:
        unknown = Failure.from_error(error)
    assert "KeyError" in unknown.fault
    assert "test_failure_of" in unknown.traceback


def test_pictures_leave_matplotlib_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    render(_record(tmp_path), _sample([10.0, 10.1, 10.2]))
    assert "matplotlib.pyplot" not in sys.modules


def test_names_that_are_not_utf8_are_written_all_the_same(tmp_path: Path) -> None:
    write_text(tmp_path / "report.html", "Sternw\udce4rte")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "Sternw\\udce4rte"
    assert len(list(tmp_path.iterdir())) == 1


def test_memory_of_the_sample_does_not_grow_with_the_tiles() -> None:
    sample, n = SkySample(), 500
    for number in range(600):
        ra = np.linspace(0.0, 1.0, n) + number
        p_star = np.full(n, 0.5, dtype=np.float32)
        sample.add(TileReceipt(10, number, "key", n, n, 0, 0, 0.1, np.ones(20, int), ra, ra / 10, p_star))
    points = sample.points()
    assert MAX_POINTS / 4 < points.shape[1] <= 2 * MAX_POINTS
    assert sample.n_objects == 300_000
    assert (sample.histogram == 600).all()
    # every tile is there, equally dense
    per_tile = np.bincount(points[0].astype(int), minlength=600)
    assert per_tile[:600].min() >= 0.8 * per_tile[:600].max() > 0
