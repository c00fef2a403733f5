"""The embedded cluster starts the same whatever it finds around it, or says why it does not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import textwrap
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import dask
import pytest
import yaml

from sgclassify.pipeline import surroundings
from sgclassify.pipeline.cluster import embedded
from sgclassify.pipeline.cluster.handle import open_cluster
from sgclassify.pipeline.config import RunConfig
from sgclassify.stages.errors import ClusterError

CONFIG = RunConfig(device="cpu", worker_timeout_s=20.0)

OF_THE_USER: dict[str, Any] = {
    "distributed": {
        "comm": {
            "default-scheme": "tls",
            "require-encryption": True,
            "tls": {
                "ca-file": "/shared/tls/authority.pem",
                "scheduler": {"cert": "/shared/tls/dask.pem", "key": "/shared/tls/dask.key"},
                "worker": {"cert": "/shared/tls/dask.pem", "key": "/shared/tls/dask.key"},
            },
        },
        "scheduler": {"preload": ["no_such_module"], "allowed-failures": 7},
        "nanny": {"preload": ["no_such_module"], "environ": {"OMP_NUM_THREADS": 7}},
        "worker": {
            "preload": ["no_such_module"],
            "lifetime": {"duration": "1 seconds"},
            "memory": {"terminate": 0.0001},
            "multiprocessing-method": "fork",
        },
    },
    "temporary-directory": "/no/such/folder",
}

START = """
import json, os, sys, tempfile
from pathlib import Path

def seen(_):
    import dask
    return dask.config.config

if __name__ == "__main__":
    import dask
    from sgclassify.pipeline.cluster.handle import open_cluster
    from sgclassify.pipeline.config import RunConfig
    def environment():
        return {k: v for k, v in os.environ.items() if k.startswith("DASK_") or k == "PYTHONSAFEPATH"}
    before = json.dumps(dask.config.config), environment()
    folder = Path(tempfile.mkdtemp(dir=sys.argv[1]))
    config = RunConfig(device="cpu", worker_timeout_s=20.0)
    with open_cluster(config, scheduler=None, n_workers=1, scratch=folder / "dask", shared=folder) as opened:
        worker = opened.client.submit(seen, 0).result(timeout=30)
        driver = json.loads(json.dumps(dask.config.config))
    assert (json.dumps(dask.config.config), environment()) == before
    print(json.dumps([driver, worker]))
"""
"""Starts a cluster; prints Dask's configuration in the driver and in the worker."""


def start(tmp_path: Path, *before: str, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    """Start a cluster in a process of its own; `before` is a command that starts it in other surroundings."""
    script = tmp_path / "bin" / "start.py"
    script.parent.mkdir(exist_ok=True)
    script.write_text(START)
    return subprocess.run(
        [*before, sys.executable, str(script), str(tmp_path)],
        capture_output=True, text=True, check=False, timeout=120, cwd=cwd,
        env={**os.environ, "PYTHONSAFEPATH": "", **env},
    )  # fmt: skip


def unshare(*options: str) -> tuple[str, ...]:
    """A command that runs another one in namespaces of its own; skips the test where that is not allowed."""
    command = ("unshare", *options)
    try:
        subprocess.run([*command, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"{' '.join(command)} is not allowed here: {error}")
    return command


def our_defaults() -> dict[str, Any]:
    ours: dict[str, Any] = {}
    dask.config.refresh(config=ours, paths=[], env={})
    dask.config.set(embedded.SETTINGS, config=ours)
    return dict(json.loads(json.dumps(ours)))


@pytest.mark.parametrize("where", ["named", "home"])
def test_configuration_of_the_user(tmp_path: Path, where: str) -> None:
    folder = tmp_path / (".config/dask" if where == "home" else "settings")
    folder.mkdir(parents=True)
    (folder / "dask.yaml").write_text(yaml.safe_dump(OF_THE_USER))
    env = {"HOME": str(tmp_path)} if where == "home" else {"DASK_CONFIG": str(folder)}
    env["DASK_DISTRIBUTED__WORKER__RESOURCES__CPU"] = "0"
    done = start(tmp_path, **env)
    assert done.returncode == 0, done.stderr
    driver, worker = json.loads(done.stdout)
    for name, ours in our_defaults().items():
        assert driver[name] == ours, name
        assert worker[name] == ours, name


@pytest.mark.parametrize("options", [(), ("--scheduler", "tcp://127.0.0.1:9")], ids=["embedded", "outside"])
def test_malformed_configuration_is_named(tmp_path: Path, options: tuple[str, ...]) -> None:
    (tmp_path / "dask.yaml").write_text("distributed:\n  worker:\n   memory:\n  - nothing\n : x\n")
    (tmp_path / "a_IMG.fits").write_text("x")
    (tmp_path / "list.txt").write_text("a_IMG.fits\n")
    given = ("--exposure-list", str(tmp_path / "list.txt"), "--output", str(tmp_path / "out"), *options)
    done = subprocess.run(
        [sys.executable, "-m", "sgclassify.pipeline", "run", *given],
        capture_output=True, text=True, check=False, env={**os.environ, "DASK_CONFIG": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert f"Dask's configuration cannot be used: A dask config file at '{tmp_path}/dask.yaml'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


TRAP = "import pathlib\npathlib.Path(__file__).with_suffix('.run').touch()\n"


def test_modules_in_the_working_folder_are_not_run(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    for name in ("signal", "multiprocessing", "dask", "numpy", "preload"):
        (here / f"{name}.py").write_text(TRAP)
    done = start(tmp_path, cwd=here)
    assert done.returncode == 0, done.stderr
    module = subprocess.run(
        [sys.executable, "-m", "sgclassify.pipeline", "run", "--exposure-list", "no.txt", "--output", "out"],
        capture_output=True, text=True, check=False, cwd=here, env={**os.environ, "PYTHONSAFEPATH": ""},
    )  # fmt: skip
    assert module.returncode == 2, module.stderr
    assert "no.txt does not exist" in module.stderr
    assert not list(here.glob("*.run"))


def test_path_of_the_user_is_kept(tmp_path: Path) -> None:
    """PYTHONPATH is the user's word: a module that its folder holds is found, by the workers too."""
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(
        f"import pathlib, sys\n"
        f"if 'forkserver' in ' '.join(sys.orig_argv): pathlib.Path({str(folder)!r}, 'worker').touch()\n"
    )
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    done = start(tmp_path, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert (folder / "worker").exists()


def test_temporary_folder_whose_path_is_too_long_for_a_socket(tmp_path: Path) -> None:
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    done = start(tmp_path, TMPDIR=str(folder))
    assert done.returncode == 0, done.stderr
    driver, worker = json.loads(done.stdout)
    assert driver["distributed"]["worker"]["multiprocessing-method"] == "spawn"
    assert worker["distributed"]["worker"]["multiprocessing-method"] == "spawn"


def test_no_loopback_interface(tmp_path: Path) -> None:
    done = start(tmp_path, *unshare("--user", "--map-root-user", "--net"))
    assert "its loopback interface does not work (127.0.0.1: Network is unreachable)" in done.stderr


def test_no_home(tmp_path: Path) -> None:
    """Neither HOME nor an entry in the password database: what Path.home() and astropy stumble over."""
    strangers = unshare("--user", "--map-user=54321", "--map-group=54321")
    code = textwrap.dedent("""
        import pathlib
        from sgclassify.pipeline.surroundings import have_home
        try:
            pathlib.Path.home()
        except RuntimeError:
            have_home()
            import astropy.wcs
            print(pathlib.Path.home())
    """)
    env = {name: value for name, value in os.environ.items() if name != "HOME"}
    done = subprocess.run(
        [*strangers, sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env
    )
    assert done.stdout.strip() == surroundings.NO_HOME, done.stderr


@pytest.mark.parametrize("error", [RuntimeError("no home"), PermissionError(13, "denied")], ids=["none", "closed"])
def test_home_of_no_use(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def home() -> Path:
        raise error

    monkeypatch.setenv("HOME", "/somewhere")
    surroundings.have_home()
    assert os.environ["HOME"] == "/somewhere"
    monkeypatch.setattr(Path, "home", home)
    surroundings.have_home()
    assert os.environ["HOME"] == surroundings.NO_HOME


def refusal(folder: Path) -> str:
    with (
        pytest.raises(ClusterError) as refused,
        open_cluster(CONFIG, scheduler=None, n_workers=1, scratch=folder / "dask", shared=folder.parent),
    ):
        pass
    return str(refused.value)


def test_no_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "no"), "/dev/null"])
    said = refusal(tmp_path)
    assert "temporary files cannot be written" in said
    assert str(tmp_path / "no") in said
    assert "TMPDIR" in said


def test_what_the_system_refuses_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").touch()
    said = refusal(tmp_path / "file")
    assert said.startswith("the workers of this machine do not start: [Errno 20] Not a directory")
    assert "memory" not in said
    assert "attempt" not in caplog.text


def test_software_that_workers_cannot_import_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "distributed.py").write_text("raise ImportError('libfoo.so.3: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.syspath_prepend(str(tmp_path))
    # one that runs has imported what it needs
    forkserver._forkserver._stop()  # type: ignore[attr-defined]
    try:
        said = refusal(tmp_path)
    finally:
        forkserver._forkserver._stop()  # type: ignore[attr-defined]
    assert "a new process cannot import the software: ImportError: libfoo.so.3: cannot open" in said
    assert "memory" not in said
    capfd.readouterr()


@pytest.mark.parametrize(
    ("files", "workers"),
    [
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "100000 100000\n"}, 1),
        ({"/proc/self/cgroup": "0::/job\n", "/sys/fs/cgroup/job/cpu.max": "50000 100000\n"}, 1),
        ({"/proc/self/cgroup": "0::/\n", "/sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        (
            {
                "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "100000\n",
                "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
            },
            1,
        ),
    ],
    ids=["v2", "v2 nested", "v2 without a quota", "v1"],
)
def test_quota_of_the_control_group_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], workers: int | None
) -> None:
    for name, content in files.items():
        path = tmp_path / name.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    monkeypatch.setattr("dask.system.open", lambda name: (tmp_path / name.lstrip("/")).open(), raising=False)
    allowed = len(os.sched_getaffinity(0))
    if workers is not None and allowed == 1:
        pytest.skip("one core: a quota changes nothing")
    assert embedded.default_workers() == (workers or allowed)
