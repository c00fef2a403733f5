"""The deployment files: that they parse, agree with each other, and start what is there."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from distributed.cli import dask_scheduler, dask_worker

from sgclassify.pipeline import cli

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = DEPLOY / "compose.yaml"
SBATCH = DEPLOY / "slurm" / "sgclassify.sbatch"
UNITS = DEPLOY / "systemd"
NIGHT = UNITS / "sgclassify-night"
SCRIPTS = (SBATCH, NIGHT, DEPLOY / "train_gpu.sh")

ENVIRONMENT = {"INPUT": "/data/level1", "OUTPUT": "/data/products"}
"""What the compose file cannot do without."""


def _substitute(text: str, values: dict[str, str]) -> str:
    """Variables of a compose file: ``${NAME:-default}`` and ``${NAME:?message}``."""

    def value(match: re.Match[str]) -> str:
        name, kind, rest = match.groups()
        assert kind == ":-" or name in values, f"{name} has no value: {rest}"
        return values.get(name) or rest

    return re.sub(r"\$\{(\w+)(:-|:\?)([^}]*)\}", value, text)


def _compose(**values: str) -> dict[str, Any]:
    return dict(yaml.safe_load(_substitute(COMPOSE.read_text(), {**ENVIRONMENT, **values})))


def _services(**values: str) -> dict[str, Any]:
    return dict(_compose(**values)["services"])


def _parse(command: click.Command, arguments: list[str]) -> dict[str, Any]:
    """Parameters of a command line, which is not run."""
    with command.make_context(command.name or "command", list(arguments)) as context:
        return dict(context.params)


def _shell_words(path: Path) -> list[list[str]]:
    """Words of each line of a script, continued lines joined; quotes stay."""
    lines = path.read_text().replace("\\\n", " ").splitlines()
    return [re.split(r"\s+", line.strip()) for line in lines if line and not line.lstrip().startswith("#")]


def _options_after(path: Path, *start: str) -> set[str]:
    """Long options of the commands of a script that begin with these words."""
    found: set[str] = set()
    for words in _shell_words(path):
        for at in range(len(words)):
            if tuple(words[at : at + len(start)]) == start:
                found |= {word.partition("=")[0] for word in words[at:] if word.startswith("--")}
    return found


def _known(command: click.Command) -> set[str]:
    return {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}


def _instructions() -> list[tuple[str, str]]:
    """Instructions of the Dockerfile with what they are given."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    split = (line.split(maxsplit=1) for line in text.splitlines() if line.strip())
    return [(name, rest) for name, rest in split]


# --- image


def test_image_builds_the_wheel_apart_and_runs_as_another_user() -> None:
    instructions = _instructions()
    starts = [k for k, (name, _) in enumerate(instructions) if name == "FROM"]
    assert [instructions[k][1] for k in starts] == ["python:3.12-slim AS wheel", "python:3.12-slim"]
    first, last = instructions[: starts[1]], instructions[starts[1] :]
    assert any("pip wheel" in rest and "--no-deps" in rest for name, rest in first if name == "RUN")
    assert not [rest for name, rest in last if name in ("COPY", "ADD")], "sources must stay out of the image"
    (user,) = [rest for name, rest in last if name == "USER"]
    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", user)
    assert any(f"--uid {user.split(':')[0]} " in rest for name, rest in last if name == "RUN")
    assert json.loads(dict(last)["ENTRYPOINT"]) == ["sgclassify"]
    assert "PYTHONSAFEPATH=1" in dict(last)["ENV"]
    assert "HEALTHCHECK" not in dict(last)


def test_image_has_no_extras() -> None:
    (install,) = [rest for name, rest in _instructions() if name == "RUN" and "pip install" in rest]
    assert "[" not in install.partition("pip install")[2]


def test_builder_gets_what_the_wheel_is_made_of() -> None:
    copied = {
        source
        for name, rest in _instructions()
        if name == "COPY"
        for source in rest.split()[:-1]
        if not source.startswith("--")
    }
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    assert copied == {line[1:] for line in lines if line.startswith("!")}
    assert all((ROOT / source).exists() for source in copied)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"pyproject.toml", "setup.py", project["readme"]} < copied
    # the four parts, as setup.py names them
    assert {path.parent.name for path in ROOT.glob("*/py.typed")} == {
        source for source in copied if (ROOT / source).is_dir()
    }


# --- compose


def test_compose_services() -> None:
    services = _services()
    assert set(services) == {"scheduler", "cpu-worker", "gpu-worker", "job"}
    assert len({service["image"] for service in services.values()}) == 1
    for name, service in services.items():
        assert service["restart"] == ("no" if name == "job" else "unless-stopped")
        assert "ports" not in service, "a scheduler that is reached from outside runs anybody's code"
        assert service["user"].split(":")[0] not in ("0", "root")
        assert service["read_only"]
        for other, how in service.get("depends_on", {}).items():
            assert other in services
            assert how["condition"] != "service_healthy" or "healthcheck" in services[other]
        assert set(service["networks"]) <= set(_compose()["networks"])
    assert services["gpu-worker"]["profiles"] == ["gpu"]
    assert [name for name, service in services.items() if "build" in service] == ["scheduler"]
    assert (DEPLOY / services["scheduler"]["build"]["context"] / "Dockerfile").is_file()


def test_compose_commands_are_understood() -> None:
    services = _services(WORKERS="9", DEVICE="gpu", LIST="tonight.txt", NAME="2026-11-23")
    (_, *arguments) = services["scheduler"]["command"]
    scheduler = _parse(dask_scheduler.main, arguments)
    assert scheduler["port"] == "8786"
    assert scheduler["dashboard_address"].startswith("127.0.0.1:")
    assert scheduler["dashboard_address"].split(":")[1] in str(services["scheduler"]["healthcheck"]["test"])
    for name, resource in (("cpu-worker", "CPU=1"), ("gpu-worker", "GPU=1")):
        verb, *arguments = services[name]["command"]
        assert (services[name]["entrypoint"], verb) == (["dask"], "worker")
        worker = _parse(dask_worker.main, arguments)
        assert worker["scheduler"] == f"tcp://scheduler:{scheduler['port']}"
        assert (worker["resources"], worker["nthreads"], worker["n_workers"]) == (resource, 1, "1")
        assert worker["memory_limit"] == services[name]["mem_limit"]
    verb, *arguments = services["job"]["command"]
    assert cli.main.commands[verb] is cli.run
    job = _parse(cli.run, arguments)
    assert job["scheduler"] == f"tcp://scheduler:{scheduler['port']}"
    assert (job["workers"], job["device"], job["log_format"]) == (9, "gpu", "json")
    assert job["exposure_list"] == Path("/input/tonight.txt")
    assert job["output"] == Path("/output/2026-11-23")
    assert job["output"] not in job["metrics_file"].parents, "the folder of the products is the run's alone"


def test_compose_paths_are_the_same_for_job_and_workers() -> None:
    services = _services()
    volumes = services["job"]["volumes"]
    assert "/data/level1:/input:ro" in volumes
    assert "/data/products:/output" in volumes
    for name in ("cpu-worker", "gpu-worker"):
        assert services[name]["volumes"] == volumes
        folder = _parse(dask_worker.main, services[name]["command"][1:])["local_directory"]
        assert any(volume.split(":")[1] == folder for volume in volumes)
    assert "install --directory --mode 1777 /scratch" in (ROOT / "Dockerfile").read_text()


@pytest.mark.parametrize("missing", sorted(ENVIRONMENT))
def test_compose_asks_for_the_folders(missing: str) -> None:
    assert re.search(rf"\$\{{{missing}:\?", COMPOSE.read_text())


def test_gpu_worker_has_one_gpu() -> None:
    services = _services(GPU_ID="3")
    (device,) = services["gpu-worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["device_ids"] == ["3"]
    assert device["capabilities"] == ["gpu"]
    assert services["gpu-worker"]["environment"]["CUDA_VISIBLE_DEVICES"] == "0"
    assert services["cpu-worker"]["environment"]["CUDA_VISIBLE_DEVICES"] == ""


# --- what all have in common


def _dask_settings(path: Path) -> dict[str, str]:
    """Settings of Dask in a file, by their environment variables."""
    return dict(re.findall(r"(DASK_\w+)(?:=|: )\"?([\w.]+)\"?$", path.read_text(), flags=re.MULTILINE))


@pytest.mark.parametrize("path", [COMPOSE, SBATCH], ids=lambda path: path.name)
def test_workers_are_set_as_those_of_the_embedded_cluster(path: Path) -> None:
    import dask.config

    from sgclassify.pipeline.cluster.embedded import SETTINGS

    given = dask.config.collect_env(_dask_settings(path))
    for name in ("target", "spill", "pause", "terminate"):
        ours = SETTINGS[f"distributed.worker.memory.{name}"]
        assert dask.config.get(f"distributed.worker.memory.{name}", config=given) == ours
    # what kills its worker is tried again by sgclassify, alone, and not by Dask beside others
    assert dask.config.get("distributed.scheduler.allowed-failures", config=given) == 0


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_is_bash(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("#!/bin/bash\n")
    assert "\nset -euo pipefail\n" in text
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_script_has_no_findings(path: Path) -> None:
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run(["shellcheck", path], check=True)


@pytest.mark.parametrize("path", [SBATCH, NIGHT], ids=lambda path: path.name)
def test_scripts_use_options_that_exist(path: Path) -> None:
    used = _options_after(path, "sgclassify", "run") | _options_after(path, "exec", "sgclassify", "run")
    assert {"--exposure-list", "--output", "--log-format"} <= used
    assert used <= _known(cli.run)
    assert _options_after(path, "dask", "scheduler") - {"--"} <= _known(dask_scheduler.main)
    assert _options_after(path, "exec", "dask", "worker") <= _known(dask_worker.main)


# --- Slurm: what the script hands to the programs, which stand-ins write down


@pytest.fixture
def stand_ins(tmp_path: Path) -> dict[str, str]:
    """Environment in which dask, srun and sgclassify write down what they are given; EXIT_CODE is of the last."""
    folder = tmp_path / "bin"
    folder.mkdir()
    programs = {
        "dask": """
            note "$@"
            while [[ $# -gt 0 ]]; do
                if [[ $1 == --scheduler-file ]]; then [[ -e $2 ]] || echo '{"address": "tcp://x:1"}' >"$2"; fi
                shift
            done
            trap 'touch "$NOTES/over"' TERM
            until [[ -e $NOTES/over ]]; do sleep 0.05; done""",
        # the step's own options end where the program begins
        "srun": """
            note "$@"
            while [[ $1 != bash ]]; do shift; done
            export SLURM_LOCALID=1
            exec "$@" """,
        "sgclassify": """
            note "$@"
            until [[ $(cat "$NOTES"/dask.* | grep -c -x worker) -ge $SERVICES ]]; do sleep 0.05; done
            [[ -z ${UNTIL_TERM:-} ]] || { trap 'exit 143' TERM; touch "$NOTES/at-work"; sleep 30 & wait; }
            exit "${EXIT_CODE:-0}" """,
    }
    written = '{ printf "%s\\n" "$@"; echo "gpu:${CUDA_VISIBLE_DEVICES-unset}"; }'
    note = f'note() {{ {written} >"$NOTES/$(basename "$0").$$"; }}'
    for name, body in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{note}\n{body}\n")
        (folder / name).chmod(0o755)
    notes = tmp_path / "notes"
    notes.mkdir()
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SGCLASSIFY", "CUDA"))},
        "PATH": f"{folder}:{os.environ['PATH']}",
        "NOTES": str(notes),
        "SERVICES": "1",
        "SLURM_JOB_ID": "42",
        "SLURM_NTASKS": "2",
        "SLURM_NNODES": "1",
        "SLURM_MEM_PER_CPU": "3072",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }


def _notes(environment: dict[str, str], program: str) -> list[list[str]]:
    paths = sorted(Path(environment["NOTES"]).glob(f"{program}.*"))
    return [path.read_text().splitlines() for path in paths]


@pytest.mark.parametrize("code", [0, 3, 6])
def test_batch_job_starts_everything_and_ends_with_the_runs_code(
    stand_ins: dict[str, str], tmp_path: Path, code: int
) -> None:
    environment = {**stand_ins, "EXIT_CODE": str(code)}
    command = ["bash", SBATCH, "list.txt", "out folder", "--tta"]
    assert subprocess.run(command, env=environment, timeout=60).returncode == code
    (line,) = _notes(environment, "sgclassify")
    assert line.pop().startswith("gpu:")
    run = _parse(cli.run, line[1:])
    assert (run["exposure_list"], run["output"]) == (Path("list.txt"), Path("out folder"))
    assert run["tta"]
    assert (run["device"], run["workers"]) == ("cpu", 2)
    assert run["scheduler_file"].parent == run["metrics_file"].parent == tmp_path
    assert not run["scheduler_file"].exists(), "the address is removed with the scheduler"
    scheduler, worker = sorted(_notes(environment, "dask"))
    assert _parse(dask_scheduler.main, scheduler[1:-1])["scheduler_file"] == str(run["scheduler_file"])
    given = _parse(dask_worker.main, worker[1:-1])
    assert given["scheduler_file"] == str(run["scheduler_file"])
    assert (given["resources"], given["nthreads"], given["memory_limit"]) == ("CPU=1", 1, "3072MiB")
    assert worker[-1] == "gpu:"


def test_batch_job_with_gpus(stand_ins: dict[str, str]) -> None:
    environment = {
        **stand_ins,
        "SERVICES": "2",
        "SLURM_GPUS_ON_NODE": "2",
        "SLURM_NNODES": "3",
        "CUDA_VISIBLE_DEVICES": "4,6",
    }
    subprocess.run(["bash", SBATCH, "list.txt", "out"], env=environment, timeout=60, check=True)
    (line,) = _notes(environment, "sgclassify")
    run = _parse(cli.run, line[1:-1])
    assert (run["device"], run["workers"]) == ("gpu", 2 + 3 * 2)
    workers = {
        _parse(dask_worker.main, words[1:-1])["resources"]: words[-1]
        for words in _notes(environment, "dask")
        if words[0] == "worker"
    }
    assert workers == {"CPU=1": "gpu:", "GPU=1": "gpu:6"}
    steps = [" ".join(words) for words in _notes(environment, "srun")]
    assert sum("--gres=none --ntasks 2 " in step for step in steps) == 1
    assert sum("--gres=gpu:2 --nodes 3 --ntasks-per-node 2 --ntasks 6 " in step for step in steps) == 1


def test_batch_job_passes_the_warning_before_its_end_on(stand_ins: dict[str, str]) -> None:
    environment = {**stand_ins, "UNTIL_TERM": "1"}
    with subprocess.Popen(["bash", SBATCH, "list.txt", "out"], env=environment) as job:
        try:
            at_work = Path(environment["NOTES"]) / "at-work"
            for _ in range(600):
                if at_work.exists():
                    break
                with pytest.raises(subprocess.TimeoutExpired):
                    job.wait(0.05)
            job.terminate()
            assert job.wait(60) == 143
        finally:
            job.kill()


def test_batch_job_without_arguments(stand_ins: dict[str, str]) -> None:
    result = subprocess.run(["bash", SBATCH], env=stand_ins, capture_output=True, text=True)
    assert result.returncode == 2
    assert "usage: sbatch" in result.stderr


# --- systemd


def _unit(name: str) -> list[tuple[str, str]]:
    """Settings of a unit file, in order."""
    lines = (UNITS / name).read_text().splitlines()
    return [(k, v) for k, _, v in (line.partition("=") for line in lines if line and line[0] not in "#[")]


def test_units_are_valid(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    program = tmp_path / "bin" / NIGHT.name
    program.parent.mkdir()
    shutil.copy2(NIGHT, program)
    for path in [*UNITS.glob("*.service"), *UNITS.glob("*.timer")]:
        # the only program that is not of the system
        (tmp_path / path.name).write_text(path.read_text().replace("/opt/sgclassify/", f"{tmp_path}/"))
    units = ["sgclassify.service", "sgclassify.timer", "sgclassify-failed@.service"]
    result = subprocess.run(
        ["systemd-analyze", "verify", *(tmp_path / name for name in units)], capture_output=True, text=True
    )
    assert (result.returncode, result.stdout + result.stderr) == (0, "")


def test_service_runs_the_script_as_a_user_that_may_write_the_products() -> None:
    service = dict(_unit("sgclassify.service"))
    assert service["User"] not in ("root", "0", "")
    assert Path(service["ExecStart"].split()[0]).name == NIGHT.name
    assert os.access(NIGHT, os.X_OK)
    settings = dict(line.split("=", 1) for line in (UNITS / "night.env").read_text().splitlines() if line[0] != "#")
    writable = [Path(value.lstrip("-")) for name, value in _unit("sgclassify.service") if name == "ReadWritePaths"]
    assert Path(settings["PRODUCTS"]) in writable
    assert Path(settings["METRICS_FILE"]).parent in writable
    assert settings["METRICS_FILE"].endswith(".prom")
    assert (service["NoNewPrivileges"], service["ProtectSystem"]) == ("yes", "strict")
    # the driver ends its workers in order; they must not get the signal beside it
    assert (service["KillMode"], service["KillSignal"]) == ("mixed", "SIGTERM")
    assert service["SuccessExitStatus"] == "3"
    hook = service["OnFailure"].replace("@%n", "@")
    assert (UNITS / hook).is_file()


@pytest.mark.parametrize(("night", "expected"), [("2026-11-23", "2026-11-23"), ("", None)])
def test_night_has_a_folder_of_its_own(stand_ins: dict[str, str], night: str, expected: str | None) -> None:
    environment = {
        **stand_ins,
        "SERVICES": "0",
        "LISTS": "/lists",
        "PRODUCTS": "/products",
        "NIGHT": night,
        "METRICS_FILE": "/metrics/sgclassify.prom",
        "EXIT_CODE": "3",
    }
    # Notes of dask must exist for the stand-in of sgclassify to count them.
    (Path(environment["NOTES"]) / "dask.0").write_text("")
    assert subprocess.run([NIGHT, "--workers", "2"], env=environment, timeout=60).returncode == 3
    (line,) = _notes(environment, "sgclassify")
    run = _parse(cli.run, line[1:-1])
    if expected is None:
        command = ["date", "--utc", "--date=12 hours ago", "+%F"]
        expected = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    assert run["exposure_list"] == Path(f"/lists/{expected}.txt")
    assert run["output"] == Path(f"/products/{expected}")
    assert (run["workers"], run["metrics_file"]) == (2, Path("/metrics/sgclassify.prom"))


def test_night_without_settings(stand_ins: dict[str, str]) -> None:
    result = subprocess.run([NIGHT], env=stand_ins, capture_output=True, text=True)
    assert result.returncode != 0
    assert "LISTS" in result.stderr


# --- documentation


def test_commands_of_the_documentation_are_understood() -> None:
    text = (ROOT / "docs" / "deployment.md").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines()]
    runs = [line for line in lines if re.match(r"(\S*/)?sgclassify run ", line)]
    assert runs
    for line in runs:
        words = shlex.split(line, comments=True)
        _parse(cli.run, words[2:])
    for path in re.findall(r"\bdeploy/[\w./@-]+", text):
        assert (ROOT / path.rstrip(".")).exists(), path


# --- wheel


@pytest.mark.slow
def test_wheel_holds_all_that_runs(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", reason="the wheel is built without fetching anything")
    source = tmp_path / "source"
    source.mkdir()
    # what the builder gets, so that nothing else can slip in or be needed
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        if line.startswith("!"):
            path = ROOT / line[1:]
            if path.is_dir():
                shutil.copytree(path, source / path.name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(path, source)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run(
        [*command, "--wheel-dir", tmp_path, source],
        check=True,
        capture_output=True,
        cwd=tmp_path,
        timeout=600,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {
        f"sgclassify/{path.relative_to(ROOT)}"
        for part in ("pipeline", "stages", "model", "simulation")
        for path in (ROOT / part).rglob("*")
        if path.suffix in (".py", ".toml", ".html", ".pt", ".sha256", ".typed") and "__pycache__" not in path.parts
    }
    assert "sgclassify/pipeline/default.toml" in expected
    assert any(name.endswith(".pt") for name in expected)
    assert any(name.startswith("sgclassify/stages/read/") for name in expected)
    assert expected <= names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"sgclassify"}
