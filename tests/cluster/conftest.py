"""Worker processes import the functions of these tests by name, wherever the tests were started from."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="session", autouse=True)
def importable_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Put a folder that holds nothing but ``tests`` on the path of this process and of those that it starts.

    The repository itself must not be on it: there ``model`` and ``stages`` could be imported by their bare names.
    """
    folder = tmp_path_factory.mktemp("path")
    (folder / "tests").symlink_to(Path(__file__).parents[1], target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]))
        yield
    assert str(folder) not in sys.path


class Processes:
    """An outside scheduler and workers, as an operator would start them."""

    def __init__(self, folder: Path, env: dict[str, str] | None = None, host: str = "127.0.0.1") -> None:
        self.folder = folder
        # an embedded cluster that another fixture keeps open hands its settings to all new processes
        inherited = {k: v for k, v in os.environ.items() if k != "DASK_INTERNAL_INHERIT_CONFIG"}
        self.env = {**inherited, **(env or {})}
        self.running: list[subprocess.Popen[bytes]] = []
        self.file = folder / "scheduler.json"
        self.scheduler = self._start(
            "scheduler", "--host", host, "--port", "0", "--no-dashboard", "--dashboard-address",
            "127.0.0.1:0", "--scheduler-file", str(self.file),
        )  # fmt: skip
        deadline = time.monotonic() + 20
        while not self.file.exists() or not self.file.stat().st_size:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        self.address = str(json.loads(self.file.read_text())["address"])

    def worker(self, *options: str, **env: str) -> subprocess.Popen[bytes]:
        """Start a worker, with these variables in its environment."""
        host = self.address.rpartition(":")[0].removeprefix("tcp://")
        return self._start(
            "worker", self.address, "--host", host, "--nthreads", "1", "--no-nanny", "--no-dashboard",
            "--local-directory", str(self.folder / "w"), *options, **env,
        )  # fmt: skip

    def log(self, process: subprocess.Popen[bytes]) -> str:
        """What a process has written so far."""
        return (self.folder / f"log{self.running.index(process)}.txt").read_text()

    def _start(self, *arguments: str, **env: str) -> subprocess.Popen[bytes]:
        with (self.folder / f"log{len(self.running)}.txt").open("w") as log:
            command = [sys.executable, "-m", "dask", *arguments]
            process = subprocess.Popen(command, stdout=log, stderr=log, env={**self.env, **env})
        self.running.append(process)
        return process

    def stop(self) -> None:
        """End all processes."""
        for process in reversed(self.running):
            process.kill()
            process.wait()


@pytest.fixture
def processes() -> Iterator[Callable[..., Processes]]:
    """`Processes`, which end with the test."""
    started: list[Processes] = []

    def start(*arguments: Any) -> Processes:
        started.append(Processes(*arguments))
        return started[-1]

    yield start
    for one in started:
        one.stop()


@pytest.fixture
def outside(tmp_path: Path, processes: Callable[..., Processes]) -> Processes:
    """A scheduler without workers."""
    return processes(tmp_path)
