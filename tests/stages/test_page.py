"""Pages from templates: escaped, in one style, and refused where a value is missing."""

from __future__ import annotations

import re
from importlib.resources import files

import pytest
from jinja2 import UndefinedError
from matplotlib.figure import Figure

from sgclassify.stages.write.page import Picture, render

EVALUATION = {"heading": "t", "spread": "", "text": "", "sections": [], "mistakes": None}
HOSTILE = "<script>alert('x')</script>&\""


def evaluation(**values: object) -> str:
    return render("sgclassify.model.judge", "evaluation.html", **{**EVALUATION, **values})


def test_values_are_escaped_wherever_they_stand() -> None:
    picture = Picture.of(Figure(figsize=(1, 1)), HOSTILE)
    html = evaluation(
        heading=HOSTILE,
        spread=HOSTILE,
        text=HOSTILE,
        sections=[(HOSTILE, HOSTILE, picture)],
        mistakes=[(picture, HOSTILE)],
    )
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt;&amp;&#34;") == 9


def test_a_value_that_is_missing_is_an_error() -> None:
    values = {name: value for name, value in EVALUATION.items() if name != "spread"}
    with pytest.raises(UndefinedError, match="spread"):
        render("sgclassify.model.judge", "evaluation.html", **values)


def test_no_mistakes_are_said_and_unknown_ones_are_not() -> None:
    assert "<p>None.</p>" in evaluation(mistakes=[])
    assert "mistakes" not in evaluation(mistakes=None)


def test_every_page_has_the_one_style() -> None:
    packages = ("stages.write", "pipeline.record", "model.judge")
    folders = [files(f"sgclassify.{package}") / "templates" for package in packages]
    templates = [item.read_text() for folder in folders for item in folder.iterdir() if item.name.endswith(".html")]
    assert len(templates) >= 4
    assert sum("<style>" in text for text in templates) == 1
    assert sum(text.startswith('{% extends "base.html" %}') for text in templates) == 2
    assert not any(re.search(r"https?:|<script|<link", text) for text in templates)


def test_a_picture_knows_its_size() -> None:
    picture = Picture.of(Figure(figsize=(3, 2)), "nothing")
    assert picture.png.startswith(b"\x89PNG")
    assert (picture.width, picture.height) == (330, 220)
    assert int.from_bytes(picture.png[16:20], "big") == 330
