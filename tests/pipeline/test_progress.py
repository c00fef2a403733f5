"""Log lines, JSON lines and the progress bar."""

from __future__ import annotations

import io
import json
import logging

import pytest
from rich.console import Console

from sgclassify.pipeline.progress import Reporter, reporting

log = logging.getLogger("sgclassify.pipeline.test")


def test_text_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with reporting("text") as reporter, reporter.phase("tiles", 2) as phase:
        phase.step()
        log.warning("exposure %s set aside", "a[b]")
    out, err = capsys.readouterr()
    assert out == ""
    assert "WARNING exposure a[b] set aside" in err
    assert "tiles: 1 of 2 done" in err


def test_json_lines(capsys: pytest.CaptureFixture[str]) -> None:
    with reporting("json") as reporter, reporter.phase("tiles", 1) as phase:
        phase.step()
        log.warning("set aside", extra={"exposure": "a", "fault": "x"})
        try:
            raise ValueError("no")
        except ValueError:
            log.exception("defect")
    lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [line["message"] for line in lines[:3]] == ["tiles: 1", "set aside", "defect"]
    assert lines[1]["exposure"] == "a"
    assert lines[1]["level"] == "warning"
    assert set(lines[1]) == {"time", "level", "logger", "message", "exposure", "fault"}
    assert "ValueError: no" in lines[2]["traceback"]
    assert lines[3]["done"] == 1


def test_logging_is_left_as_it_was() -> None:
    logger = logging.getLogger("sgclassify")
    before = list(logger.handlers), logger.level, logger.propagate
    with reporting("json"):
        pass
    assert (list(logger.handlers), logger.level, logger.propagate) == before


def test_bar_on_a_terminal() -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80)
    with Reporter(console).phase("classifying tiles", 2) as phase:
        phase.step()
        phase.step()
    assert "classifying tiles" in stream.getvalue()
    assert "2/2" in stream.getvalue()
