"""run.json and report.html."""

from __future__ import annotations

import base64
import html as markup
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from sgclassify.pipeline.record.pictures import COLOURS
from sgclassify.pipeline.record.receipts import TileReceipt
from sgclassify.pipeline.record.record import (
    DONE,
    PENDING,
    SET_ASIDE,
    SKIPPED,
    ExposureRecord,
    Failure,
    RunRecord,
    TileRecord,
    write_text,
)
from sgclassify.pipeline.record.report import render
from sgclassify.pipeline.record.sample import GALAXY, STAR, SkySample, draw
from sgclassify.stages.errors import UnusableInputError

HOSTILE = "<script>alert('x')</script>&\""


def _record(tmp_path: Path) -> RunRecord:
    record = RunRecord(["sgclassify", "run", HOSTILE], {"config_version": 1}, {"id": HOSTILE}, tmp_path / HOSTILE)
    good = ExposureRecord("a", {"image": "/a_IMG.fits"}, outcome=DONE, rows=5, usable=4, scored=3, notes=[HOSTILE])
    bad = ExposureRecord("b" + HOSTILE, {"image": "/b_IMG.fits"})
    bad.close(SET_ASIDE, Failure("/b_IMG.fits", HOSTILE, "copy it again"))
    skipped = ExposureRecord("c", {"image": "/c_IMG.fits"})
    skipped.close(SKIPPED, Failure("/c_IMG.fits", "slitless"))
    record.exposures = [skipped, good, bad]
    tile = TileRecord(10, 7, ["a"])
    tile.close(SET_ASIDE, Failure("", "unexpected X", "report it", "Traceback ..."))
    record.tiles = [tile, TileRecord(10, 3, ["a"], outcome=DONE, n_objects=4, n_stars=2, n_galaxies=1)]
    record.notes = [HOSTILE]
    return record


def _receipt(ra: list[float]) -> TileReceipt:
    p_star = np.array([0.9, np.nan, 0.1], dtype=np.float32)
    sample = draw(np.arange(3), np.array(ra), np.array([-1.0, 0.0, 1.0]), p_star, 0)
    return TileReceipt(10, 3, "key", 3, 1, 1, 1, 0.1, np.arange(20), sample, 0)


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
    """Collects what a browser would load, and the texts that stand for pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.tags: list[str] = []
        self.alts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.loads += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        self.alts += [value or "" for name, value in attrs if name == "alt"]


def test_report_is_one_safe_file_with_pictures(tmp_path: Path) -> None:
    html = render(_record(tmp_path), _sample([359.9, 0.0, 0.1]))
    links = _Links()
    links.feed(html)
    assert len(links.loads) == 2
    assert "script" not in links.tags
    for load in links.loads:
        assert base64.b64decode(load.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    assert not re.search(r"https?://", html)
    for text in ("copy it again", "slitless", "10/7", "not scored", "set aside", "All 3 objects."):
        assert text in html
    sky, histogram = links.alts
    assert "all objects" in sky
    assert "galaxies 1, not scored 1, stars 1" in sky
    assert "190 objects" in histogram
    assert f"{sum(range(10))} below 0.5" in histogram
    assert f": {', '.join(map(str, range(20)))}." in histogram


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


def _of_many_tiles(tmp_path: Path) -> tuple[RunRecord, SkySample]:
    """A run that was ended early, with remarks of any length, and more objects than are drawn."""
    record = _record(tmp_path)
    remark = "this remark goes on " * 40 + "/a/path/" + "y" * 300
    name = "CSST_MSC_MS_SIM_20270101000000_20270101000230_10000000000_06_L1_V01"
    record.exposures.append(ExposureRecord(name, {}, notes=[remark]))
    record.exposures[0].notes.append(remark)
    record.tiles += [TileRecord(10, 100 + k, [name]) for k in range(1000)]
    record.tiles[0].exposures = [name] * 7
    record.message, record.exit_code, record.notes = "ended by SIGTERM", 143, [remark]
    record.model = {"sha256": "f" * 64, "path": remark}
    sample, n = SkySample(), 8_000
    for k in range(6):
        p_star = np.full(n, 0.7, dtype=np.float32)
        ra = k + np.linspace(0.0, 1.0, n)
        drawn = draw(np.arange(n) + k * 2**32, ra, 10 * ra, p_star, 0)
        sample.add(TileReceipt(10, k, "key", n, n, 0, 0, 0.1, np.full(20, 400), drawn, 0))
    return record, sample


def test_the_report_says_what_is_pending_and_which_share_of_the_objects_is_drawn(tmp_path: Path) -> None:
    record, sample = _of_many_tiles(tmp_path)
    text = markup.unescape(render(record, sample))
    points, every = sample.points()
    assert "Pending: 1 exposure and 1,000 tiles." in text
    assert f"<td data-label='outcome'>{PENDING}</td>" in text
    aside = text[text.index("Tiles set aside") : text.index("<h2>Notes")]
    assert aside.count("<tr>") == 2, "one of 1,001 tiles was set aside, the others wait"
    assert f"1 of every {every} objects, the same share everywhere: {len(points):,} of 48,000." in text
    assert f"Sky map of 1 of every {every} objects" in text


def _luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_colours_can_be_seen(tmp_path: Path) -> None:
    style = re.search(r"<style>(.*?)</style>", render(_record(tmp_path), SkySample()), re.DOTALL)
    assert style is not None
    used = set(re.findall(r"#[0-9a-f]{6}", style[1])) - {"#ffffff"}
    texts = set(re.findall(r"[ {]color: (#[0-9a-f]{6})", style[1]))
    assert len(texts) >= 3
    for colour in {*used, *COLOURS.values()}:
        contrast = 1.05 / (_luminance(colour) + 0.05)
        assert contrast >= (4.5 if colour in texts else 3.0), colour
    # not by hue alone
    assert (_luminance(COLOURS[STAR]) + 0.05) / (_luminance(COLOURS[GALAXY]) + 0.05) >= 2.0


@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_leaves_the_page(tmp_path: Path, width: int) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no browser")
    report = markup.escape(render(*_of_many_tiles(tmp_path)))
    # what would have to be scrolled to counts, whether the page or a part of it scrolls
    measure = (
        "const all = [...this.contentDocument.querySelectorAll(&quot;*&quot;)];"
        "document.title = Math.ceil(Math.max(...all.map(e => e.getBoundingClientRect().right)))"
    )
    frame = f"<iframe style='width: {width}px; border: 0' onload='{measure}' srcdoc=\"{report}\"></iframe>"
    (tmp_path / "page.html").write_text(f"<!DOCTYPE html><html><body>{frame}</body></html>")
    offline = [
        "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
        "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'browser'}",
    ]  # fmt: skip
    done = subprocess.run(
        [browser, *offline, "--dump-dom", (tmp_path / "page.html").as_uri()],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    )
    title = re.search(r"<title>(\d+)</title>", done.stdout)
    assert title is not None
    assert int(title[1]) <= width
