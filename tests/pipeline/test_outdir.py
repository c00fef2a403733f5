"""The output folder: what is accepted, what is refused, and what is removed."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from sgclassify.pipeline.outdir import LOCK, MARKER, OutputFolder
from sgclassify.stages.errors import UsageError


def _finish(path: Path, key: str) -> None:
    """A finished run with products."""
    with OutputFolder(path, key, overwrite=False) as folder:
        folder.clear()
        (folder.objects / "x").write_text("x")
        (path / "run.json").write_text("{}")
        folder.remove_work()


def test_new_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"
    with OutputFolder(path, "key", overwrite=False) as folder:
        assert folder.work.is_dir()
        folder.clear()
        assert folder.objects.is_dir()
        assert folder.detections.is_dir()
        folder.remove_work()
    assert sorted(p.name for p in path.iterdir()) == [MARKER, "detections", "objects"]


def test_empty_folder_is_accepted(tmp_path: Path) -> None:
    with OutputFolder(tmp_path, "key", overwrite=False):
        assert (tmp_path / MARKER).is_file()


def test_foreign_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="not of sgclassify"), OutputFolder(tmp_path, "key", overwrite):
            pass
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_file_in_place_of_the_folder(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_text("x")
    with pytest.raises(UsageError, match="is a file"), OutputFolder(path, "key", overwrite=False):
        pass


def test_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    path = tmp_path / "file" / "out"
    with pytest.raises(UsageError, match="cannot be") as caught, OutputFolder(path, "key", overwrite=False):
        pass
    assert str(path) in str(caught.value)


def test_same_run_again_starts_afresh(tmp_path: Path) -> None:
    _finish(tmp_path, "key")
    with OutputFolder(tmp_path, "key", overwrite=False) as folder:
        assert (folder.objects / "x").exists(), "nothing is removed before the run knows that it can write"
        folder.clear()
        assert not (folder.objects / "x").exists()


def test_products_of_another_run_need_overwrite(tmp_path: Path) -> None:
    _finish(tmp_path, "key")
    with pytest.raises(UsageError, match="--overwrite"), OutputFolder(tmp_path, "other", overwrite=False):
        pass
    assert (tmp_path / "objects" / "x").exists()
    with OutputFolder(tmp_path, "other", overwrite=True):
        pass
    # It was not cleared: the products are still those of the first run.
    with OutputFolder(tmp_path, "key", overwrite=False):
        pass


def test_notes_of_the_operator_survive(tmp_path: Path) -> None:
    _finish(tmp_path, "key")
    (tmp_path / "notes.txt").write_text("x")
    with OutputFolder(tmp_path, "key", overwrite=False) as folder:
        folder.clear()
    assert (tmp_path / "notes.txt").exists()


def test_linked_products_are_not_followed(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "keep").write_text("x")
    out = tmp_path / "out"
    _finish(out, "key")
    (out / "objects" / "x").unlink()
    (out / "objects").rmdir()
    (out / "objects").symlink_to(elsewhere)
    with OutputFolder(out, "key", overwrite=False) as folder:
        folder.clear()
    assert (elsewhere / "keep").exists()


def test_two_runs_at_once(tmp_path: Path) -> None:
    with (
        OutputFolder(tmp_path, "key", overwrite=False),
        pytest.raises(UsageError, match=f"process {os.getpid()} on"),
        OutputFolder(tmp_path, "key", overwrite=True),
    ):
        pass
    assert not (tmp_path / LOCK).exists()
    with OutputFolder(tmp_path, "key", overwrite=False):
        pass


def test_lock_of_a_dead_run_is_taken_over(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from sgclassify.pipeline.outdir import OutputFolder;"
        "OutputFolder(Path(sys.argv[1]), 'key', False).__enter__(); os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 9
    assert (tmp_path / LOCK).exists()
    with OutputFolder(tmp_path, "key", overwrite=False):
        assert json.loads((tmp_path / LOCK).read_text()) == {"pid": os.getpid(), "host": socket.gethostname()}


def test_lock_of_another_host_is_respected(tmp_path: Path) -> None:
    _finish(tmp_path, "key")
    (tmp_path / LOCK).write_text(json.dumps({"pid": 1, "host": "other.example"}))
    with (
        pytest.raises(UsageError, match=r"other\.example.*remove"),
        OutputFolder(tmp_path, "key", overwrite=False),
    ):
        pass
    assert (tmp_path / LOCK).exists()


def test_path_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xe4")
    with pytest.raises(UsageError, match="not UTF-8"), OutputFolder(path, "key", overwrite=False):
        pass
    assert not path.exists()
