"""The products depend on the inputs alone: not on their order, nor on how the work is shared out."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

pytestmark = pytest.mark.slow


def test_order_of_list_and_of_tiles(
    sgclassify: Callable[..., Any], reference: Any, field: Any, tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    roundabout = [field.folder / ".." / field.folder.name / image.name for image in reversed(field.images)]
    listed = tmp_path / "reversed.txt"
    listed.write_text("# the other way round\n\n" + "\n".join(map(str, roundabout)))
    done = sgclassify(
        Path("../reversed.txt"),
        tmp_path / "output",
        cwd=tmp_path / "elsewhere",
        tile_shuffle_seed=7,
        window=1,
    )
    assert done.code == 0, done.stderr
    assert done.digests() == reference.digests()


def test_number_of_workers_and_tiles_in_flight(
    sgclassify: Callable[..., Any], reference: Any, good_list: Path, tmp_path: Path
) -> None:
    done = sgclassify(good_list, tmp_path / "output", "--workers", "2", window=4)
    assert done.code == 0, done.stderr
    assert done.digests() == reference.digests()


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[str]:
    """Address of a scheduler with two workers, in processes of their own, as an operator starts them."""
    file = tmp_path / "scheduler.json"
    quiet = ["--no-dashboard", "--dashboard-address", "127.0.0.1:0"]
    running = [
        _dask("scheduler", "--host", "127.0.0.1", "--port", "0", *quiet, "--scheduler-file", str(file))
    ]
    try:
        deadline = time.monotonic() + 60
        while not (file.exists() and file.stat().st_size):
            assert time.monotonic() < deadline, "the scheduler did not start"
            time.sleep(0.1)
        address = str(json.loads(file.read_text())["address"])
        for number in range(2):
            local = ["--local-directory", str(tmp_path / f"worker{number}")]
            options = ["--host", "127.0.0.1", "--nthreads", "1", "--no-nanny", *quiet, *local]
            running.append(_dask("worker", address, *options))
        yield address
    finally:
        for process in reversed(running):
            process.kill()
            process.wait()


def _dask(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "dask", *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def test_scheduler_of_others(
    sgclassify: Callable[..., Any], reference: Any, good_list: Path, scheduler: str, tmp_path: Path
) -> None:
    done = sgclassify(good_list, tmp_path / "output", "--scheduler", scheduler, "--workers", "2")
    assert done.code == 0, done.stderr
    assert done.digests() == reference.digests()


def test_killed_run_leaves_whole_files_and_is_run_again(
    sgclassify: Callable[..., Any], reference: Any, good_list: Path, tmp_path: Path
) -> None:
    output = tmp_path / "output"

    def kill_after_a_tile(process: subprocess.Popen[str]) -> None:
        while process.poll() is None and not list(output.glob("objects/dataset/*/*/Npix=*.parquet")):
            time.sleep(0.02)
        process.kill()

    killed = sgclassify(good_list, output, watch=kill_after_a_tile)
    assert killed.code == -signal.SIGKILL
    expected = reference.digests()
    assert killed.digests()
    for name, digest in killed.digests().items():
        assert expected[name] == digest
    again = sgclassify(good_list, output)
    assert again.code == 0, again.stderr
    assert again.digests() == expected
    assert again.leftovers() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_ends_in_order_and_is_gone_on_with(
    sgclassify: Callable[..., Any], reference: Any, good_list: Path, tmp_path: Path, number: signal.Signals
) -> None:
    output = tmp_path / "output"

    def interrupt_at_work(process: subprocess.Popen[str]) -> None:
        while process.poll() is None and not list(output.glob(".work/exposures/*.prepared.json")):
            time.sleep(0.02)
        process.send_signal(number)

    done = sgclassify(good_list, output, watch=interrupt_at_work)
    assert done.code == 128 + number, done.stderr
    assert "SystemExit" in done.record["message"]
    assert not (output / ".lock").exists()
    assert not list(output.rglob("*.part"))
    again = sgclassify(good_list, output)
    assert again.code == 0, again.stderr
    assert min(one["attempts"] for one in again.inputs.values()) == 0, "what was prepared is of use"
    assert again.digests() == reference.digests()
    assert again.leftovers() == []


def test_size_of_tiles_changes_the_layout_only(
    sgclassify: Callable[..., Any], reference: Any, good_list: Path, tmp_path: Path
) -> None:
    done = sgclassify(good_list, tmp_path / "output", tile_order=10)
    assert done.code == 0, done.stderr
    assert len(done.record["tiles"]) < len(reference.record["tiles"])
    assert _rows(done) == _rows(reference)
    assert done.digests("detections") == reference.digests("detections")


def _rows(run: Any) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    parts = [
        pq.read_table(path, partitioning=None) for path in (run.output / "objects").rglob("Npix=*.parquet")
    ]
    return list(pa.concat_tables(parts).sort_by("object_id").to_pylist())
