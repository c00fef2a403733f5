"""The command line: help, usage, lazily imported parts, exit codes."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from sgclassify.pipeline import cli, tasks
from sgclassify.pipeline.cli import LAZY, main
from sgclassify.pipeline.record import RunRecord


def test_help_names_every_command_without_importing_it() -> None:
    result = CliRunner().invoke(main, ["--help"])
    assert result.exit_code == 0
    for name in ("run", *LAZY):
        assert name in result.output


def test_version() -> None:
    assert metadata.version("sgclassify") in CliRunner().invoke(main, ["--version"]).output


@pytest.mark.parametrize(
    "arguments",
    [
        ["run"],
        ["run", "--exposure-list", "x"],
        ["run", "--exposure-list", "x", "--output", "y", "--workers", "0"],
        ["run", "--exposure-list", "x", "--output", "y", "--log-format", "xml"],
        ["walk"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    assert CliRunner().invoke(main, arguments).exit_code == 2


def test_missing_list(tmp_path: Path) -> None:
    arguments = ["run", "--exposure-list", str(tmp_path / "no.txt"), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "no.txt" in result.stderr
    assert result.stdout == ""


def test_missing_model(tmp_path: Path) -> None:
    (tmp_path / "a_IMG.fits").write_text("x")
    (tmp_path / "list.txt").write_text("a_IMG.fits\n")
    result = CliRunner().invoke(
        main,
        [
            *("run", "--exposure-list", str(tmp_path / "list.txt"), "--output", str(tmp_path / "out")),
            *("--model", str(tmp_path / "no.pt")),
        ],
    )
    assert result.exit_code == 5
    assert "no.pt" in result.stderr
    assert not (tmp_path / "out").exists()


def test_defect_is_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(*_: object) -> None:
        raise ZeroDivisionError("x / 0")

    monkeypatch.setattr("sgclassify.pipeline.run.run", defect)
    result = CliRunner().invoke(main, ["run", "--exposure-list", "x", "--output", str(tmp_path / "out")])
    assert result.exit_code == 1
    assert "ZeroDivisionError" in result.stderr


def test_exit_code_and_table_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = RunRecord([], {}, {}, tmp_path, exit_code=3)
    monkeypatch.setattr("sgclassify.pipeline.run.run", lambda *_: record)
    result = CliRunner().invoke(main, ["run", "--exposure-list", "x", "--output", str(tmp_path)])
    assert result.exit_code == 3
    for word in (
        "exposures",
        "set aside",
        "skipped",
        "tiles",
        "stars",
        "galaxies",
        "not scored",
        str(tmp_path),
    ):
        assert word in result.stdout


def test_missing_extra_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cli.LAZY, "simulate", ("sgclassify.simulation.cli", "simulate", ""))  # type: ignore[index]
    monkeypatch.setitem(sys.modules, "sgclassify.simulation.cli", None)
    result = CliRunner().invoke(main, ["simulate"])
    assert result.exit_code == 2
    assert "extra 'simulate'" in result.output


def test_lazy_command_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command()
    def simulate() -> None:
        click.echo("simulated")

    module = type(sys)("sgclassify.simulation.cli")
    module.simulate = simulate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sgclassify.simulation.cli", module)
    assert "simulated" in CliRunner().invoke(main, ["simulate"]).output


def test_module_can_be_run() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "sgclassify.pipeline", "--version"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.startswith("sgclassify")


def test_workers_import_no_training_code_and_no_simulator() -> None:
    code = (
        f"import sys, {tasks.__name__}, sgclassify.model.runtime;"
        "bad = ('torchvision', 'galsim', 'skypy', 'speclite', 'sklearn', 'sgclassify.simulation');"
        "found = [m for m in sys.modules if m.split('.')[0] in bad or m.startswith(bad)];"
        "ours = [m for m in sys.modules if m.startswith('sgclassify.model.')];"
        "assert not found, found;"
        "assert set(ours) <= {'sgclassify.model.runtime', 'sgclassify.model.contract'}, ours"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("prior", ["0", "1", "-0.5", "nan", "no.csv"])
def test_a_prior_that_is_none_is_refused(tmp_path: Path, prior: str) -> None:
    (tmp_path / "a_IMG.fits").write_text("x")
    (tmp_path / "list.txt").write_text("a_IMG.fits\n")
    arguments = ["run", "--exposure-list", str(tmp_path / "list.txt"), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(main, [*arguments, "--prior-star-fraction", prior])
    assert result.exit_code == 2
    assert prior in result.stderr
    assert not (tmp_path / "out").exists()


def collected_when_interrupted() -> None:
    seen: list[str] = []

    def interrupted(phase: str, info: dict[str, int]) -> None:
        if not seen:
            seen.append(phase)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)

    gc.callbacks.append(interrupted)
    try:
        gc.collect()
        time.sleep(5.0)
    finally:
        gc.callbacks.remove(interrupted)


class Finalised:
    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)


def finalised_when_interrupted() -> None:
    thing = Finalised()
    del thing
    time.sleep(5.0)


def forgotten_when_interrupted() -> None:
    def interrupted(_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)

    thing = threading.Event()
    reference = weakref.ref(thing, interrupted)
    del thing
    time.sleep(5.0)
    assert reference() is None


@pytest.mark.parametrize(
    "work", [collected_when_interrupted, finalised_when_interrupted, forgotten_when_interrupted]
)
def test_a_signal_that_python_would_swallow_is_not_lost(work: Callable[[], None]) -> None:
    before = signal.getsignal(signal.SIGALRM), sys.unraisablehook
    with pytest.raises(SystemExit) as ended, cli._terminable():
        work()
    assert ended.value.code == 128 + signal.SIGTERM
    assert (signal.getsignal(signal.SIGALRM), sys.unraisablehook) == before
