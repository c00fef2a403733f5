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
from typing import Any

import click
import pytest
from click.testing import CliRunner

from sgclassify.pipeline import cli, tasks
from sgclassify.pipeline.cli import LAZY, main
from sgclassify.pipeline.record.record import ExposureRecord, RunRecord, TileRecord


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


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """A list that names an exposure, which is no FITS file."""
    (tmp_path / "a_IMG.fits").write_text("x")
    (tmp_path / "list.txt").write_text("a_IMG.fits\n")
    return tmp_path / "list.txt"


def test_defect_is_exit_code_1(tmp_path: Path, listed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def defect(*_: object) -> None:
        raise ZeroDivisionError("x / 0")

    monkeypatch.setattr("sgclassify.pipeline.run.run", defect)
    arguments = ["run", "--exposure-list", str(listed), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "ZeroDivisionError" in result.stderr


def test_exit_code_and_table_of_a_run(tmp_path: Path, listed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = RunRecord([], {}, {}, tmp_path, exit_code=3)
    monkeypatch.setattr("sgclassify.pipeline.run.run", lambda *_: record)
    arguments = ["run", "--exposure-list", str(listed), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(main, arguments)
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


def test_the_table_says_what_the_run_did_not_reach(tmp_path: Path) -> None:
    record = RunRecord([], {}, {}, tmp_path, exit_code=6)
    assert "pending" not in cli.summary(record)
    record.exposures, record.tiles = (
        [ExposureRecord("a", {})],
        [TileRecord(10, k, ["a"]) for k in range(1200)],
    )
    table = cli.summary(record)
    assert "pending     1 exposure and 1,200 tiles: run the same command again" in table
    assert "0 set aside" in table


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
        f"import sys, {tasks.__name__}, sgclassify.model.serve.runtime;"
        "bad = ('torchvision', 'galsim', 'skypy', 'speclite', 'sklearn', 'sgclassify.simulation');"
        "found = [m for m in sys.modules if m.split('.')[0] in bad or m.startswith(bad)];"
        "ours = [m for m in sys.modules if m.startswith('sgclassify.model.')];"
        "assert not found, found;"
        "assert all(m.startswith('sgclassify.model.serve') for m in ours), ours"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_two_files_of_one_name_or_observation_are(tmp_path: Path, write_level1: Any) -> None:
    # a copy, another exposure, and another version of the first one
    for folder, name, chip in (("a", "x", 8), ("b", "x", 8), ("c", "x", 23), ("d", "x_V02", 8)):
        write_level1(tmp_path / folder, name=f"{name}_{{KIND}}.fits", chip=chip)
    (tmp_path / "list.txt").write_text("a\nb\nc\nd\n")
    arguments = ["--exposure-list", str(tmp_path / "list.txt"), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(main, ["run", *arguments, "--dry-run"])
    assert result.exit_code == 0, result.stderr
    a, b, c, d = (tmp_path / k / f"{'x_V02' if k == 'd' else 'x'}_IMG.fits" for k in "abcd")
    assert f"{b} is the same exposure as {a}: done once" in result.stderr
    assert "exposure x_V02 has the same observation, detector and start as exposure x" in result.stderr
    assert str(d) not in result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "exposure x: to be prepared"
    assert lines[1] == f"exposure x: set aside: its products would have the names of those of {a}"
    assert lines[2] == "exposure x_V02: to be prepared"
    assert lines[-1].startswith("2 exposures can be used")
    assert str(c) in result.stderr


FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="the system has no /dev/full")

FAKES = """
import sys, types, click, pathlib
from sgclassify.pipeline import cli
from sgclassify.pipeline import surroundings
from sgclassify.pipeline.record.record import RunRecord
surroundings.import_dask = lambda: None
run = sys.modules["sgclassify.pipeline.run"] = types.ModuleType("run")
run.run = lambda *_: RunRecord([], {}, {}, pathlib.Path(NAME), exit_code=3)
run.plan = lambda *_: NAME
for command, (module, attribute, _) in cli.LAZY.items():
    fake = sys.modules.setdefault(module, types.ModuleType(module))
    setattr(fake, attribute, click.Command(command, callback=lambda: click.echo(NAME)))
"""
"""The commands without their work: each prints its NAME."""


def ended(
    listed: Path, command: str, name: str = "done", *, out: int | Any = subprocess.PIPE, **env: str
) -> subprocess.CompletedProcess[bytes]:
    """The end of a command, in a process of its own with this standard output."""
    given = ["--exposure-list", str(listed), "--output", str(listed.with_name("out"))]
    words = {"run": ["run", *given], "dry": ["run", *given, "--dry-run"]}.get(command, command.split())
    code = f"NAME = {name!a}{FAKES}cli.main({words!r})"
    return subprocess.run(
        [sys.executable, "-c", code],
        stdout=out,
        stderr=subprocess.PIPE,
        check=False,
        env={**os.environ, **env},
    )


# what a command has written elsewhere counts; where its result is what it prints, a lost result is a fault
ENDS = [
    ("run", 3), ("dry", 1), ("status OUT", 1), ("evaluate", 1), ("simulate", 0), ("dataset", 0), ("train", 0),
    ("baselines", 0), ("--help", 1), ("--version", 1),
]  # fmt: skip


def made(listed: Path, command: str) -> str:
    """The command line, with an output folder where it needs one."""
    folder = listed.with_name("earlier")
    folder.mkdir()
    (folder / ".sgclassify").write_text("{}")
    return command.replace("OUT", str(folder))


@needs_full
@pytest.mark.parametrize(("command", "code"), ENDS)
def test_standard_output_that_takes_nothing(listed: Path, command: str, code: int) -> None:
    with FULL.open("w") as full:
        done = ended(listed, made(listed, command), out=full)
    assert done.returncode == code, done.stderr
    assert done.stderr.count(b"standard output cannot be written: No space left on device") == 1
    assert b"Traceback" not in done.stderr
    assert b"Exception ignored" not in done.stderr


@pytest.mark.parametrize(("command", "code"), ENDS)
def test_pipe_that_nobody_reads(listed: Path, command: str, code: int) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = ended(listed, made(listed, command), out=write)
    finally:
        os.close(write)
    assert done.returncode == code, done.stderr
    assert done.stderr.count(b"standard output cannot be written: Broken pipe") == 1
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize("command", ["run", "dry", "evaluate"])
@pytest.mark.parametrize(
    "env",
    [
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "ascii:strict"},
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
    ],
    ids=["latin-1", "ascii", "C"],
)
def test_name_that_standard_output_cannot_show(listed: Path, command: str, env: dict[str, str]) -> None:
    name = "巡天\udcff-2026"
    done = ended(listed, command, name, **env)
    assert done.returncode == (3 if command == "run" else 0), done.stderr
    assert b"-2026" in done.stdout
    if env.get("PYTHONIOENCODING") == "latin-1":
        assert rb"\u5de1\u5929\udcff-2026" in done.stdout
    assert b"Traceback" not in done.stderr


def test_terminal_that_has_gone(tmp_path: Path) -> None:
    """What cannot be written to standard error is dropped, also by the progress bars of rich."""
    code = (
        "import sys, time, os;"
        "from sgclassify.pipeline.streams import lenient;"
        "from sgclassify.pipeline.progress import reporting\n"
        "with lenient(), reporting('text') as reporter:\n"
        "    with reporter.phase('a', 2) as phase:\n"
        "        phase.step(); os.kill(os.getppid(), 10); time.sleep(1.0); phase.step()\n"
        f"open({str(tmp_path / 'end')!r}, 'w').write('reached')"
    )
    ours, theirs = os.openpty()
    hung = []
    before = signal.signal(signal.SIGUSR1, lambda *_: hung.append(os.close(ours)))
    try:
        process = subprocess.Popen([sys.executable, "-c", code], stderr=theirs, env={**os.environ, "TERM": "xterm"})
        os.close(theirs)
        assert process.wait(60) == 0
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert hung
    assert (tmp_path / "end").read_text() == "reached"


@pytest.mark.parametrize("closed", [0, 1, 2])
def test_a_file_does_not_take_the_place_of_a_closed_stream(tmp_path: Path, closed: int) -> None:
    code = (
        "from sgclassify.pipeline.streams import lenient\n"
        f"with lenient(), open({str(tmp_path / 'file')!r}, 'w') as file:\n"
        "    assert file.fileno() > 2"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, preexec_fn=lambda: os.close(closed), timeout=60)
    assert done.returncode == 0


@pytest.mark.parametrize("prior", ["0", "1", "-0.5", "nan", "no.csv", "", " "])
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


@pytest.mark.parametrize("work", [collected_when_interrupted, finalised_when_interrupted, forgotten_when_interrupted])
def test_a_signal_that_python_would_swallow_is_not_lost(work: Callable[[], None]) -> None:
    before = signal.getsignal(signal.SIGALRM), sys.unraisablehook
    with pytest.raises(SystemExit) as ended, cli._terminable():
        work()
    assert ended.value.code == 128 + signal.SIGTERM
    assert (signal.getsignal(signal.SIGALRM), sys.unraisablehook) == before


def test_hangup_ends_a_run_in_order() -> None:
    def wait() -> None:
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(5.0)

    with pytest.raises(SystemExit) as ended, cli._terminable():
        wait()
    assert ended.value.code == 128 + signal.SIGHUP


def test_hangup_that_is_ignored_stays_so() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with cli._terminable():
            os.kill(os.getpid(), signal.SIGHUP)
            time.sleep(0.1)
    finally:
        assert signal.signal(signal.SIGHUP, before) is signal.SIG_IGN
