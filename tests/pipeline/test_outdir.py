"""The output folder: what is accepted, what is refused, and what is removed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sgclassify.pipeline.record.output import LOCK, MARKER, OutputFolder
from sgclassify.stages.errors import UsageError

SETTINGS = {"model sha256": "ab", "tile_order": 10}
OTHER = {"model sha256": "ab", "tile_order": 11}


def _finish(path: Path) -> None:
    """A finished run with products."""
    with OutputFolder(path, SETTINGS, overwrite=False) as folder:
        folder.open_products()
        (folder.objects / "x").write_text("x")
        (path / "run.json").write_text("{}")
        folder.remove_work()


def test_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    with OutputFolder(path, SETTINGS, overwrite=False) as folder:
        assert folder.work.is_dir()
        folder.open_products()
        assert folder.objects.is_dir()
        assert folder.detections.is_dir()
        folder.remove_work()
    assert sorted(p.name for p in path.iterdir()) == [".receipts", MARKER, "detections", "objects"]


def test_empty_folder_is_accepted(tmp_path: Path) -> None:
    with OutputFolder(tmp_path, SETTINGS, overwrite=False):
        assert (tmp_path / MARKER).is_file()


def test_foreign_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    for overwrite in (False, True):
        with (
            pytest.raises(UsageError, match="not of sgclassify"),
            OutputFolder(tmp_path, SETTINGS, overwrite),
        ):
            pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_file_in_place_of_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("x")
    with pytest.raises(UsageError, match="is a file"), OutputFolder(path, SETTINGS, overwrite=False):
        pass


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    path = tmp_path / "file" / "out"
    with (
        pytest.raises(UsageError, match="cannot be") as caught,
        OutputFolder(path, SETTINGS, overwrite=False),
    ):
        pass
    assert str(path) in str(caught.value)


def test_same_run_again_goes_on(tmp_path: Path) -> None:
    with OutputFolder(tmp_path, SETTINGS, overwrite=False) as folder:
        (folder.prepared / "e1.prepared.json").write_text("{}")
        (folder.work / "dask").mkdir()
        folder.open_products()
        (folder.objects / "x").write_text("x")
        (folder.objects / ".x.123.part").write_text("x")
    with OutputFolder(tmp_path, SETTINGS, overwrite=False) as folder:
        folder.open_products()
        assert [p.name for p in folder.objects.iterdir()] == ["x"]
        assert [p.name for p in folder.prepared.iterdir()] == ["e1.prepared.json"]
        assert not (folder.work / "dask").exists()


def test_products_of_other_settings_need_overwrite(tmp_path: Path) -> None:
    _finish(tmp_path)
    with (
        pytest.raises(UsageError, match=r"tile_order was 10 and is 11.*--overwrite"),
        OutputFolder(tmp_path, OTHER, overwrite=False),
    ):
        pass
    assert (tmp_path / "objects" / "x").exists()
    with OutputFolder(tmp_path, OTHER, overwrite=True) as folder:
        assert folder.is_fresh
    # The products were not opened: they are still those of the first run.
    with OutputFolder(tmp_path, SETTINGS, overwrite=False) as folder:
        assert not folder.is_fresh
    with OutputFolder(tmp_path, OTHER, overwrite=True) as folder:
        folder.open_products()
        assert not (folder.objects / "x").exists()
    with OutputFolder(tmp_path, OTHER, overwrite=False) as folder:
        assert not folder.is_fresh


def test_work_of_other_settings_is_of_no_use(tmp_path: Path) -> None:
    with OutputFolder(tmp_path, SETTINGS, overwrite=False) as folder:
        (folder.prepared / "e1.prepared.json").write_text("{}")
    with OutputFolder(tmp_path, OTHER, overwrite=False) as folder:
        assert not list(folder.prepared.iterdir())
        folder.open_products()
    with pytest.raises(UsageError, match="tile_order"), OutputFolder(tmp_path, SETTINGS, overwrite=False):
        pass


def test_other_inputs_are_refused_by_name(tmp_path: Path) -> None:
    _finish(tmp_path)
    names = [f"e{k} has changed" for k in range(12)]
    with (
        OutputFolder(tmp_path, SETTINGS, overwrite=False) as folder,
        pytest.raises(UsageError, match=r"e0 has changed, .*, e9 has changed, and 2 more"),
    ):
        folder.refuse(names)
    with OutputFolder(tmp_path, SETTINGS, overwrite=True) as folder:
        folder.refuse(names)
        folder.start_afresh()
        folder.open_products()
        assert not (folder.objects / "x").exists()


def test_products_of_an_earlier_version(tmp_path: Path) -> None:
    _finish(tmp_path)
    (tmp_path / MARKER).write_text(json.dumps({"format": 1, "run_key": "ab"}))
    with (
        pytest.raises(UsageError, match="earlier version"),
        OutputFolder(tmp_path, SETTINGS, overwrite=False),
    ):
        pass


def test_inspecting_writes_nothing(tmp_path: Path) -> None:
    OutputFolder(tmp_path / "new", SETTINGS, overwrite=False).inspect()
    assert not (tmp_path / "new").exists()
    _finish(tmp_path / "old")
    before = sorted(tmp_path.rglob("*"))
    OutputFolder(tmp_path / "old", SETTINGS, overwrite=False).inspect()
    with pytest.raises(UsageError, match="tile_order"):
        OutputFolder(tmp_path / "old", OTHER, overwrite=False).inspect()
    assert sorted(tmp_path.rglob("*")) == before


def test_notes_of_the_operator_survive(tmp_path: Path) -> None:
    _finish(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with OutputFolder(tmp_path, SETTINGS, overwrite=False) as folder:
        folder.open_products()
    assert (tmp_path / "notes.txt").exists()


def test_linked_products_are_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "keep").write_text("x")
    out = tmp_path / "out"
    _finish(out)
    (out / "objects" / "x").unlink()
    (out / "objects").rmdir()
    (out / "objects").symlink_to(elsewhere)
    with OutputFolder(out, SETTINGS, overwrite=False) as folder:
        folder.open_products()
    assert (elsewhere / "keep").exists()


def test_two_runs_at_once(tmp_path: Path) -> None:
    with (
        OutputFolder(tmp_path, SETTINGS, overwrite=False),
        pytest.raises(UsageError, match=f"process {os.getpid()} on"),
        OutputFolder(tmp_path, SETTINGS, overwrite=True),
    ):
        pass
    assert not (tmp_path / LOCK).exists()
    with OutputFolder(tmp_path, SETTINGS, overwrite=False):
        pass


def test_lock_of_a_dead_run_is_taken_over(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from sgclassify.pipeline.record.output import OutputFolder;"
        "OutputFolder(Path(sys.argv[1]), {'a': 1}, False).__enter__(); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 9
    assert (tmp_path / LOCK).exists()
    with OutputFolder(tmp_path, SETTINGS, overwrite=False):
        assert json.loads((tmp_path / LOCK).read_text()) == {"pid": os.getpid(), "host": socket.gethostname()}


def test_lock_of_another_host_is_respected(tmp_path: Path) -> None:
    _finish(tmp_path)
    (tmp_path / LOCK).write_text(json.dumps({"pid": 1, "host": "other.example"}))
    with (
        pytest.raises(UsageError, match=r"other\.example.*remove"),
        OutputFolder(tmp_path, SETTINGS, overwrite=False),
    ):
        pass
    assert (tmp_path / LOCK).exists()


def test_path_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xe4")
    with pytest.raises(UsageError, match="not UTF-8"), OutputFolder(path, SETTINGS, overwrite=False):
        pass
    assert not path.exists()
