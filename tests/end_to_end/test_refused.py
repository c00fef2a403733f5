"""Runs that end before they begin: the exit code, the reason on the terminal, and nothing left behind."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from sgclassify.model.archive import default_model
from sgclassify.pipeline.cli import main


@pytest.fixture
def refuse(good_list: Path, tmp_path: Path) -> Callable[..., Result]:
    """Run the command in this process; every option has a default that is fine."""

    def run(**options: object) -> Result:
        given = {"exposure-list": good_list, "output": tmp_path / "output", **options}
        words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
        return CliRunner().invoke(main, ["run", *words])

    return run


def written(tmp_path: Path, name: str, content: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("content", "code", "says"),
    [
        (b"", 4, "names no exposure"),
        (b"\xef\xbb\xbf\r\n# nothing yet\r\n\r\n", 4, "names no exposure"),
        (None, 2, "does not exist"),
        (b"\xff\xfe\x00\x01", 2, "no text file"),
        (b"Sternw\xe4rte/a_IMG.fits\n", 2, "not UTF-8 (line 1)"),
    ],
    ids=["empty", "comments", "missing", "binary", "latin-1"],
)
def test_list(
    refuse: Callable[..., Result], tmp_path: Path, content: bytes | None, code: int, says: str
) -> None:
    listed = tmp_path / "list.txt" if content is None else written(tmp_path, "list.txt", content)
    done = refuse(**{"exposure-list": listed})
    assert done.exit_code == code, done.output
    assert says in done.output
    assert not (tmp_path / "output").exists()


def test_list_that_names_missing_files_only(refuse: Callable[..., Result], tmp_path: Path) -> None:
    listed = written(tmp_path, "list.txt", b"a_IMG.fits\nb_IMG.fits\n")
    done = refuse(**{"exposure-list": listed})
    assert done.exit_code == 4
    for name in ("a_IMG.fits", "b_IMG.fits"):
        assert done.output.count(f"{tmp_path / name}: the file does not exist") == 1
    assert sorted(path.name for path in (tmp_path / "output").iterdir()) == [
        ".sgclassify",
        "report.html",
        "run.json",
    ]


def test_output_below_a_file(refuse: Callable[..., Result], tmp_path: Path) -> None:
    file = written(tmp_path, "file", b"mine")
    for output in (file, file / "output"):
        done = refuse(output=output)
        assert done.exit_code == 2, done.output
        assert str(output) in done.output
    assert file.read_bytes() == b"mine"


@pytest.mark.skipif(os.geteuid() == 0, reason="nothing is read-only for root")
def test_output_that_is_read_only(refuse: Callable[..., Result], tmp_path: Path) -> None:
    folder = tmp_path / "closed"
    folder.mkdir(mode=0o555)
    done = refuse(output=folder / "output")
    assert done.exit_code == 2
    assert "cannot be written" in done.output


def test_output_that_the_system_refuses(
    refuse: Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = Path.mkdir

    def mkdir(path: Path, *arguments: Any, **options: Any) -> None:
        if path == tmp_path / "output":
            raise PermissionError(13, "Permission denied", str(path))
        real(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    done = refuse()
    assert done.exit_code == 2, done.output
    assert f"{tmp_path / 'output'}: the output folder cannot be written (Permission denied)" in done.output


def test_output_with_the_files_of_others(refuse: Callable[..., Result], tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()
    written(tmp_path / "output", "thesis.tex", b"mine")
    done = refuse()
    assert done.exit_code == 2
    assert "not of sgclassify" in done.output
    assert [path.name for path in (tmp_path / "output").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("config_version = ", "not valid TOML"),
        ("config_version = 2", "this software reads 1"),
        ("config_version = 1\n[run]\ntile_ordr = 10", "tile_ordr"),
        ("config_version = 1\n[run]\ntile_order = 99", "run.tile_order is 99"),
    ],
)
def test_configuration(refuse: Callable[..., Result], tmp_path: Path, text: str, says: str) -> None:
    done = refuse(config=written(tmp_path, "run.toml", text.encode()))
    assert done.exit_code == 2
    assert says in done.output
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("fault", ["missing", "garbage", "truncated", "altered"])
def test_model(refuse: Callable[..., Result], tmp_path: Path, fault: str) -> None:
    archive = tmp_path / "model.pt"
    content = default_model().read_bytes()
    if fault == "garbage":
        archive.write_bytes(b"no archive")
    elif fault == "truncated":
        archive.write_bytes(content[: len(content) // 2])
    elif fault == "altered":
        archive.write_bytes(content)
        archive.with_name("model.pt.sha256").write_text(f"{'0' * 64}  model.pt\n")
    done = refuse(model=archive)
    assert done.exit_code == 5, done.output
    assert str(archive) in done.output
    assert not (tmp_path / "output").exists()


def test_scheduler_that_is_not_there(refuse: Callable[..., Result], tmp_path: Path) -> None:
    config = written(tmp_path, "run.toml", b"config_version = 1\n[run]\nworker_timeout_s = 1.0\n")
    done = refuse(scheduler="tcp://127.0.0.1:9", config=config)
    assert done.exit_code == 6, done.output
    assert "tcp://127.0.0.1:9: the scheduler does not answer" in done.output
    assert sorted(path.name for path in (tmp_path / "output").iterdir()) == [
        ".sgclassify",
        "report.html",
        "run.json",
    ]
    assert '"exit_code": 6' in (tmp_path / "output" / "run.json").read_text()


@pytest.mark.slow
def test_products_of_another_program(
    sgclassify: Callable[..., Any], reference: Any, good_list: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """One line more in a stage, the version the same: a run does not mix its products with those that are there."""
    packages = tmp_path / "sgclassify"
    packages.mkdir()
    for name in ("pipeline", "model", "simulation", "stages"):
        spec = find_spec(f"sgclassify.{name}")
        assert spec is not None
        assert spec.submodule_search_locations is not None
        source = Path(spec.submodule_search_locations[0])
        if name == "stages":
            shutil.copytree(source, packages / name)
        else:
            (packages / name).symlink_to(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    again = sgclassify(good_list, reference.output, "--dry-run")
    assert again.code == 0, again.stderr
    assert "to be computed" not in again.stdout
    with (packages / "stages/measure.py").open("a") as stream:
        stream.write("# another line\n")
    refused = sgclassify(good_list, reference.output, "--dry-run")
    assert refused.code == 2
    assert "another model, configuration or program: code was '" in refused.stderr
