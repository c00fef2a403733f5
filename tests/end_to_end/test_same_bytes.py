"""The products depend on the inputs alone: not on their order, nor on how the work is shared out."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from sgclassify.stages import tiling

pytestmark = pytest.mark.slow


def test_order_of_list_and_of_tiles(
    sgclassify: Callable[..., Any],
    warm: tuple[str, ...],
    reference: Any,
    field: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # tiles in parts
    monkeypatch.setattr(tiling, "MAX_PART_ROWS", 4)
    (tmp_path / "elsewhere").mkdir()
    roundabout = [field.folder / ".." / field.folder.name / image.name for image in reversed(field.images)]
    listed = tmp_path / "reversed.txt"
    listed.write_text("# the other way round\n\n" + "\n".join(map(str, roundabout)))
    done = sgclassify(
        Path("../reversed.txt"),
        tmp_path / "output",
        *warm,
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


def test_four_workers(sgclassify: Callable[..., Any], small: Any, tmp_path: Path) -> None:
    done = sgclassify(small.exposure_list, tmp_path / "output", *small.options[:2], "--workers", "4")
    assert done.code == 0, done.stderr
    assert done.digests() == small.undisturbed.digests()
    assert len({tile["worker"] for tile in done.record["tiles"]}) > 1


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory, outside_at: Callable[[Path], Any]) -> Iterator[Any]:
    """A cluster of others with two workers for CPU tasks, and one that offers a GPU where torch sees none."""
    cluster = outside_at(tmp_path_factory.mktemp("others"))
    for resource in ("CPU=1", "CPU=1", "GPU=1"):
        cluster.worker("--resources", resource)
    yield cluster
    cluster.stop()


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_cluster_of_others(
    sgclassify: Callable[..., Any], small: Any, others: Any, tmp_path: Path, device: str
) -> None:
    """A worker that offers a GPU where torch sees none infers on its CPU: the same bytes."""
    given = ("--scheduler-file", str(others.file), "--workers", "3", "--device", device, *small.options[:2])
    done = sgclassify(small.exposure_list, tmp_path / "output", *given)
    assert done.code == 0, done.stderr
    assert done.digests() == small.undisturbed.digests()
    assert done.record["model"]["device"] == ("cpu" if device == "cpu" else "cuda")
    assert {tile["device"] for tile in done.record["tiles"] if tile["n_objects"]} == {"cpu"}


def test_appended_exposures(sgclassify: Callable[..., Any], warm: tuple[str, ...], small: Any, tmp_path: Path) -> None:
    lines = small.exposure_list.read_text().splitlines()
    options = (*small.options[:2], *warm)
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(lines[:2]) + "\n")
    first = sgclassify(listed, tmp_path / "output", *options)
    assert first.code == 0, first.stderr
    assert first.digests() != small.undisturbed.digests()
    listed.write_text("\n".join(lines) + "\n")
    planned = sgclassify(listed, tmp_path / "output", *options, "--dry-run")
    assert planned.code == 0, planned.stderr
    assert "3 exposures can be used, 2 of them are known already" in planned.stdout
    both = sgclassify(listed, tmp_path / "output", *options)
    assert both.code == 0, both.stderr
    assert both.digests() == small.undisturbed.digests()
    assert both.leftovers() == []


def test_killed_run_leaves_whole_files_and_is_run_again(
    sgclassify: Callable[..., Any], warm: tuple[str, ...], small: Any, tmp_path: Path
) -> None:
    output = tmp_path / "output"

    def kill_after_a_tile(process: subprocess.Popen[str]) -> None:
        while process.poll() is None and not list(output.glob("objects/dataset/*/*/Npix=*.parquet")):
            time.sleep(0.02)
        process.kill()

    killed = sgclassify(small.exposure_list, output, *small.options, watch=kill_after_a_tile)
    assert killed.code == -signal.SIGKILL
    expected = small.undisturbed.digests()
    assert killed.digests()
    for name, digest in killed.digests().items():
        assert expected[name] == digest
    again = sgclassify(small.exposure_list, output, *small.options[:2], *warm)
    assert again.code == 0, again.stderr
    assert again.digests() == expected
    assert again.leftovers() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_ends_in_order_and_is_gone_on_with(
    sgclassify: Callable[..., Any], warm: tuple[str, ...], small: Any, tmp_path: Path, number: signal.Signals
) -> None:
    output = tmp_path / "output"

    def interrupt_at_work(process: subprocess.Popen[str]) -> None:
        while process.poll() is None and not list(output.glob(".work/exposures/*.prepared.json")):
            time.sleep(0.02)
        process.send_signal(number)

    done = sgclassify(small.exposure_list, output, *small.options, watch=interrupt_at_work)
    assert done.code == 128 + number, done.stderr
    assert done.record["message"] == f"ended by {number.name}"
    assert done.record["exit_code"] == 128 + number
    assert {one["outcome"] for one in done.inputs.values()} == {"pending"}
    assert {tile["outcome"] for tile in done.record["tiles"]} <= {"done", "pending"}
    assert "3 exposures" in done.stderr.splitlines()[-1]
    assert not (output / ".lock").exists()
    assert not (output / ".work" / "dask").exists()
    assert not list(output.rglob("*.part"))
    again = sgclassify(small.exposure_list, output, *small.options[:2], *warm)
    assert again.code == 0, again.stderr
    assert min(one["attempts"] for one in again.inputs.values()) == 0, "what was prepared is of use"
    assert again.digests() == small.undisturbed.digests()
    assert again.leftovers() == []


def test_size_of_tiles_changes_the_layout_only(
    sgclassify: Callable[..., Any], warm: tuple[str, ...], reference: Any, good_list: Path, tmp_path: Path
) -> None:
    done = sgclassify(good_list, tmp_path / "output", *warm, tile_order=10)
    assert done.code == 0, done.stderr
    assert len(done.record["tiles"]) < len(reference.record["tiles"])
    assert _rows(done) == _rows(reference)
    assert done.digests("detections") == reference.digests("detections")


def _rows(run: Any) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    parts = [pq.read_table(path, partitioning=None) for path in (run.output / "objects").rglob("Npix=*.parquet")]
    return list(pa.concat_tables(parts).sort_by("object_id").to_pylist())
