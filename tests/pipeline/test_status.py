"""What is told of a run while it works and after it died: progress file, status command, metrics."""

from __future__ import annotations

import json
import os
import re
import socket
from pathlib import Path

import pytest
from click.testing import CliRunner

from sgclassify.pipeline.cli import main
from sgclassify.pipeline.record.output import PROGRESS, OutputFolder
from sgclassify.pipeline.record.prometheus import MetricsFile
from sgclassify.pipeline.record.record import DONE, SET_ASIDE, ExposureRecord, Failure, RunRecord, TileRecord
from sgclassify.pipeline.record.status import ProgressFile, describe, read_status
from sgclassify.stages.errors import UsageError

SETTINGS = {"tile_order": 10}


def _record(tmp_path: Path) -> RunRecord:
    record = RunRecord(["sgclassify"], {}, {}, tmp_path)
    bad = ExposureRecord("bad\x1b[31m", {})
    bad.close(SET_ASIDE, Failure("/bad.fits", "truncated", "copy it again"))
    record.exposures = [ExposureRecord("good", {}, outcome=DONE, attempts=2, peak_mib=100.0), bad]
    record.tiles = [TileRecord(10, 3, ["good"], outcome=DONE, n_objects=5, n_stars=2, n_galaxies=3, attempts=1)]
    record.timings = {"headers": 1.5}
    return record


def test_states_of_a_run(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no output folder"):
        read_status(tmp_path)
    record = _record(tmp_path)
    with OutputFolder(tmp_path, SETTINGS, overwrite=False) as folder:
        assert read_status(tmp_path)["state"] == "running"
        folder.open_products()
        progress = ProgressFile(folder.work / PROGRESS, record)
        progress.step("classifying tiles", 0, 7)
        progress.step("classifying tiles", 1, 7)
        status = read_status(tmp_path)
        assert status["holder"] == {"pid": os.getpid(), "host": socket.gethostname()}
        assert (status["progress"]["done"], status["progress"]["total"]) == (0, 7), "not at every step"
        progress.step("classifying tiles", 7, 7)
        (folder.receipts.tiles / "10-3.parquet").write_text("")
        text = describe(read_status(tmp_path))
        assert f"running: process {os.getpid()} on {socket.gethostname()}" in text
        assert "classifying tiles: 7 of 7" in text
        assert "1 complete" in text
        assert "bad?[31m: truncated" in text, "no control characters"
    # as a killed driver leaves it
    assert read_status(tmp_path)["state"] == "dead"
    assert "the same command goes on" in describe(read_status(tmp_path))
    record.exit_code = 3
    record.write(tmp_path / "run.json")
    with OutputFolder(tmp_path, SETTINGS, overwrite=False) as folder:
        folder.remove_work()
    status = read_status(tmp_path)
    assert (status["state"], status["exit_code"]) == ("finished", 3)
    assert status["set_aside"] == [{"id": "bad\x1b[31m", "fault": "truncated"}]
    assert status["counts"]["objects"] == 5


def test_a_run_that_died_after_a_finished_one(tmp_path: Path) -> None:
    record = _record(tmp_path)
    record.exit_code = 0
    with OutputFolder(tmp_path, SETTINGS, overwrite=False) as folder:
        folder.open_products()
        record.write(tmp_path / "run.json")
        folder.remove_work()
    later = _record(tmp_path)
    later.started = later.started.replace(year=later.started.year + 1)
    with OutputFolder(tmp_path, SETTINGS, overwrite=False) as folder:
        ProgressFile(folder.work / PROGRESS, later).step("preparing exposures", 1, 2)
    assert read_status(tmp_path)["state"] == "dead"


@pytest.mark.parametrize(("code", "state"), [(0, "finished"), (3, "finished"), (4, "finished"), (6, "dead")])
def test_a_run_that_wrote_its_record(tmp_path: Path, code: int, state: str) -> None:
    record = _record(tmp_path)
    record.exit_code, record.message = code, "the message"
    with OutputFolder(tmp_path, SETTINGS, overwrite=False) as folder:
        record.write(tmp_path / "run.json")
        folder.remove_work()
    status = read_status(tmp_path)
    assert (status["state"], status["exit_code"]) == (state, code)
    assert "the message" in describe(status)


def test_a_run_that_ended_early_says_what_waits(tmp_path: Path) -> None:
    record = _record(tmp_path)
    record.exposures += [ExposureRecord("late", {}), ExposureRecord("later", {})]
    record.tiles.append(TileRecord(10, 4, ["late"]))
    record.exit_code, record.message = 143, "ended by SIGTERM"
    with OutputFolder(tmp_path, SETTINGS, overwrite=False) as folder:
        folder.open_products()
        ProgressFile(folder.work / PROGRESS, record).step("classifying tiles", 1, 2)
        assert [one["id"] for one in read_status(tmp_path)["progress"]["set_aside"]] == ["bad\x1b[31m"]
        record.write(tmp_path / "run.json")
    status = read_status(tmp_path)
    assert (status["state"], status["exit_code"]) == ("dead", 143)
    assert [one["id"] for one in status["set_aside"]] == ["bad\x1b[31m"]
    assert (status["counts"]["exposures_pending"], status["counts"]["tiles_pending"]) == (2, 1)
    says = describe(status)
    assert "pending     2 exposures and 1 tile: the run ended before their turn" in says
    assert says.count("set aside") == 1
    # a record that an earlier version wrote
    del status["counts"]["exposures_pending"], status["counts"]["tiles_pending"]
    assert "pending" not in describe(status)


def test_command(tmp_path: Path) -> None:
    with OutputFolder(tmp_path / "out", SETTINGS, overwrite=False):
        pass
    done = CliRunner().invoke(main, ["status", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["state"] == "dead"
    assert "state" in CliRunner().invoke(main, ["status", str(tmp_path / "out")]).stdout
    (tmp_path / "none").mkdir()
    assert CliRunner().invoke(main, ["status", str(tmp_path / "none")]).exit_code == 2
    assert CliRunner().invoke(main, ["status", str(tmp_path / "nowhere")]).exit_code == 2


_LINE = re.compile(r'^[a-z_]+(\{[a-z]+="[a-z_ ]*"\})? -?[0-9.e+-]+$')


def test_metrics(tmp_path: Path) -> None:
    record = _record(tmp_path)
    path = tmp_path / "m.prom"
    metrics = MetricsFile(path, record)
    metrics.step("classifying tiles", 0, 7)
    running = path.read_text()
    assert "sgclassify_run_running 1\n" in running
    assert 'sgclassify_run_phase_total{phase="classifying tiles"} 7\n' in running
    assert "exit_code" not in running
    record.exit_code = 3
    metrics.write(finished=True)
    text = path.read_text()
    for line in text.splitlines():
        assert line.startswith(("# HELP sgclassify_run_", "# TYPE sgclassify_run_")) or _LINE.match(line), line
    for line in (
        "sgclassify_run_exit_code 3",
        'sgclassify_run_exposures{outcome="set_aside"} 1',
        'sgclassify_run_exposures{outcome="pending"} 0',
        'sgclassify_run_tiles{outcome="pending"} 0',
        'sgclassify_run_tiles{outcome="done"} 1',
        'sgclassify_run_objects{class="galaxy"} 3',
        "sgclassify_run_retried 1",
        'sgclassify_run_phase_seconds{phase="headers"} 1.5',
        f'sgclassify_run_peak_memory_bytes{{process="worker"}} {100 * 2**20}',
    ):
        assert line + "\n" in text
    assert [p.name for p in tmp_path.iterdir()] == ["m.prom"]


def test_metrics_that_cannot_be_written_do_not_end_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    MetricsFile(tmp_path / "file" / "m.prom", _record(tmp_path)).write(finished=True)
