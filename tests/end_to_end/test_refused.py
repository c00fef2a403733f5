"""Runs that end before they begin: the exit code, the reason on the terminal, and nothing left behind."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from sgclassify.model.serve.archive import default_model
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
def test_list(refuse: Callable[..., Result], tmp_path: Path, content: bytes | None, code: int, says: str) -> None:
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
    again = sgclassify(good_list, reference.output, "--dry-run", apart=True)
    assert again.code == 0, again.stderr
    assert "to be computed" not in again.stdout
    with (packages / "stages/measure.py").open("a") as stream:
        stream.write("# another line\n")
    refused = sgclassify(good_list, reference.output, "--dry-run", apart=True)
    assert refused.code == 2
    assert "another model, configuration or program: code was '" in refused.stderr


HEAVY = (
    "torch",
    "hats",
    "dask",
    "distributed",
    "astropy",
    "scipy",
    "photutils",
    "pandas",
    "matplotlib",
    "cdshealpix",
)

REFUSED: dict[str, tuple[str, int, str]] = {
    "list": ("run --exposure-list no.txt --output out", 2, "no.txt does not exist"),
    "binary list": ("run --exposure-list binary.txt --output out", 2, "no text file"),
    "empty list": ("run --exposure-list empty.txt --output out", 4, "names no exposure"),
    "configuration": ("run --exposure-list list.txt --output out --config wrong.toml", 2, "tile_ordr"),
    "no configuration": ("run --exposure-list list.txt --output out --config no.toml", 2, "no.toml"),
    "prior": ("run --exposure-list list.txt --output out --prior-star-fraction 1.5", 2, "between 0 and 1"),
    "table": ("run --exposure-list list.txt --output out --prior-star-fraction no.csv", 2, "no.csv"),
    "model": ("run --exposure-list list.txt --output out --model no.pt", 5, "no such model archive"),
    "garbage": ("run --exposure-list list.txt --output out --model binary.txt", 5, "that can be loaded"),
    "two schedulers": (
        "run --exposure-list list.txt --output out --scheduler tcp://a:1 --scheduler-file b", 2, "exclude",
    ),
    "log": ("run --exposure-list list.txt --output out --log-format xml", 2, "--log-format"),
    "file": ("run --exposure-list list.txt --output list.txt", 2, "is a file"),
    "below a file": ("run --exposure-list list.txt --output list.txt/out", 2, "Not a directory"),
    "others": ("run --exposure-list list.txt --output mine", 2, "not of sgclassify"),
    "settings": ("run --exposure-list list.txt --output earlier", 2, "another model, configuration or program"),
    "busy": ("run --exposure-list list.txt --output busy", 2, "a run is at work in this folder"),
    "dry run": ("run --exposure-list no.txt --output out --dry-run", 2, "no.txt does not exist"),
    "status": ("status mine", 2, "no output folder"),
    "help": ("run --help", 0, "Exit status"),
    "train": ("train --data mine --output out", 2, "manifest.json is not there"),
    "train, settings": ("train --data mine --output out --epochs -1", 2, "--epochs"),
    "dataset": ("dataset --output out --fields 3 --first 3", 2, "leaves nothing"),
    "evaluate": ("evaluate --data mine --table list.txt", 2, "give --run and --truth"),
    "evaluate, edges": ("evaluate --table list.txt --edges 3", 2, "rising numbers"),
    "evaluate, missing": ("evaluate --run mine --truth nowhere.parquet", 2, "nowhere.parquet does not exist"),
    "baselines": ("baselines --data mine --output out --model star=x", 2, "the name star is taken"),
    "simulate": ("simulate --output out --fields 0", 2, "--fields"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_anything_heavy_is_imported(tmp_path: Path, name: str) -> None:
    arguments, code, says = REFUSED[name]
    for folder in ("mine", "earlier/objects", "busy"):
        (tmp_path / folder).mkdir(parents=True)
    written(tmp_path, "mine/thesis.tex", b"mine")
    for folder in ("earlier", "busy"):
        written(tmp_path, f"{folder}/.sgclassify", b'{"format": 2, "settings": {"tile_order": 3}}')
    holder = f'{{"pid": {os.getpid()}, "host": "{socket.gethostname()}"}}'
    written(tmp_path, "busy/.lock", holder.encode())
    written(tmp_path, "binary.txt", b"\xff\xfe\x00\x01")
    written(tmp_path, "empty.txt", b"# none\n")
    written(tmp_path, "a_IMG.fits", b"x")
    written(tmp_path, "list.txt", b"a_IMG.fits\n")
    written(tmp_path, "wrong.toml", b"config_version = 1\n[run]\ntile_ordr = 10\n")
    program = (
        "import sys, json\n"
        "from sgclassify.pipeline.cli import main\n"
        f"try: main({arguments.split()!r}, prog_name='sgclassify')\n"
        "finally: open('modules.json', 'w').write(json.dumps([*sys.modules]))"
    )
    before = sorted(path for path in tmp_path.rglob("*"))
    with (tmp_path / "busy" / ".lock").open("r+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=tmp_path
        )
    assert done.returncode == code, done.stderr
    assert says in done.stdout + done.stderr
    modules = json.loads((tmp_path / "modules.json").read_text())
    assert [module for module in modules if module in HEAVY] == []
    (tmp_path / "modules.json").unlink()
    assert sorted(path for path in tmp_path.rglob("*")) == before
