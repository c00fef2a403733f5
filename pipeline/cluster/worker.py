"""What a worker process does beside its tasks: start, get ready for a run, end itself when it is stuck."""

from __future__ import annotations

import asyncio
import dataclasses
import faulthandler
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from distributed import Status, WorkerPlugin

from sgclassify.stages.errors import ClusterError, SgClassifyError
from sgclassify.stages.program import code_digest
from sgclassify.stages.write.atomic import write_atomic_text

if TYPE_CHECKING:
    from sgclassify.pipeline.tasks import ModelRef

log = logging.getLogger(__name__)

GPU: Final = "GPU"
CPU: Final = "CPU"

CRASH_DIR: Final = "SGCLASSIFY_CRASH_DIR"
"""Environment variable: folder in which a worker that crashes leaves the Python stack of its threads."""

STUCK: Final = 70
"""Exit status of a process that ended itself in `time_limit`."""

PACKAGES: Final = ("sgclassify", "dask", "distributed", "numpy", "pyarrow", "torch")
CODE: Final = "sgclassify code"
"""Name under which the digest of the program stands among the versions."""
_SAME: Final = ("sgclassify", CODE, "python", "dask", "distributed")

LOAD_S: Final = 180.0
"""Longest time for a worker to get ready."""
_TOKEN_S: Final = 3.0
_NOTE_S: Final = 5.0


def dask_setup(worker: object) -> None:
    """Called by the embedded workers as they start.

    What a terminal sends to the workers too, by Ctrl-C or as it closes, is left to the driver: it ends them in order.
    """
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if folder := os.environ.get(CRASH_DIR):
        Path(folder).mkdir(parents=True, exist_ok=True)
        # the file stays open, since it can no longer be opened in a crash
        faulthandler.enable(crash_file(Path(folder), os.getpid()).open("w"))


def crash_file(folder: Path, pid: int) -> Path:
    """File in which the worker with this process id leaves its stack."""
    return folder / f"{pid}.txt"


def crash_of(folder: Path, pid: int) -> str:
    """What the worker with this process id left of its crash, in one line; empty if nothing."""
    try:
        lines = crash_file(folder, pid).read_text(errors="replace").splitlines()
    except OSError:
        return ""
    # "Fatal Python error: ...", then every thread, innermost frame first; the one that crashed is called current
    fault = lines[0] if lines else ""
    start = next((k for k, line in enumerate(lines) if line.startswith("Current thread")), len(lines))
    frames = [line.strip() for line in lines[start:] if line.startswith("  File ")]
    return ", in ".join(filter(None, [fault, *frames[:1]]))


def versions() -> dict[str, str]:
    """Versions of the software of this process that decide whether it can take part in a run."""
    found = {"python": ".".join(map(str, sys.version_info[:2])), CODE: code_digest()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def require_same(theirs: Mapping[str, str], ours: Mapping[str, str], who: str) -> None:
    """Raise `ClusterError` where another version cannot work with ours; packages of `theirs` only."""
    for name in _SAME:
        if name in theirs and theirs[name] != ours[name]:
            raise ClusterError(
                f"{who} runs {name} {theirs[name]}, this is {ours[name]}; install the same everywhere, and start "
                "workers again that have run another"
            )


def differing(theirs: Mapping[str, str], ours: Mapping[str, str]) -> list[str]:
    """Packages whose other version may change the last bits of a product, such as ``numpy 2.1 (here 2.2)``."""
    return [
        f"{name} {theirs[name]} (here {ours[name]})"
        for name in ours
        if name not in _SAME and theirs[name] != ours[name]
    ]


async def inspect(token: Path) -> tuple[dict[str, str], bool]:
    """On a worker: the versions of its software, and whether it sees a file that the driver wrote."""
    # in a thread: a file system that hangs must not stop the heartbeat
    return versions(), await asyncio.to_thread(_sees, token)


def _sees(token: Path) -> bool:
    """Whether the file is there; network file systems may show new files a little later."""
    deadline = time.monotonic() + _TOKEN_S
    while not token.is_file():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True


@dataclass
class Readiness(WorkerPlugin):
    """Makes every worker of the run ready before its first task, also those that join late.

    Dask goes on with a worker whose plugin has failed. Where the worker was there when the plugin was registered,
    the driver gets the error and refuses the cluster. A worker that joins later reports under `topic` that it is
    ready, or the error, and then closes: it would fail tasks faster than good workers do them.

    Attributes
    ----------
    token : Path
        File that workers must see.
    topic : str
        Topic of Dask's events for what the driver should know.
    model : ModelRef or None
        Loaded at once by the workers that offer a GPU; None for no model.
    use_gpu : bool
        Whether GPUs are used at all.
    present : frozenset of str
        Addresses of the workers that the driver has inspected itself.
    ours : dict of str to str
        Versions of the driver.
    """

    token: Path
    topic: str
    model: ModelRef | None
    use_gpu: bool
    present: frozenset[str]
    ours: dict[str, str] = field(default_factory=versions)
    # one name for all runs, so that a run replaces what a killed one left on the scheduler
    name: str = "sgclassify"

    async def setup(self, worker: Any) -> None:
        """Check and prepare a worker; its event loop goes on."""
        late = worker.address not in self.present
        who = f"worker {worker.name} ({worker.address})"
        try:
            if late:
                self._check(who, *await inspect(self.token), worker)
            if self.use_gpu and worker.state.total_resources.get(GPU, 0) >= 1:
                # In the thread that runs the tasks: it takes seconds, which would cost heartbeats in the event
                # loop, and the number of OpenMP threads holds for the thread that sets it.
                loop, executor = asyncio.get_running_loop(), worker.executors["default"]
                await asyncio.wait_for(loop.run_in_executor(executor, self._load), LOAD_S)
        except Exception as error:
            fault: BaseException = error
            if isinstance(error, TimeoutError):
                fault = ClusterError(
                    f"not ready within {LOAD_S:g} s: busy with other work, or its disk hangs"
                )
            kind = type(fault) if isinstance(fault, SgClassifyError) else ClusterError
            text = str(fault) if isinstance(fault, SgClassifyError) else repr(fault)
            message = text if text.startswith(who) else f"{who}: {text}"
            if late:
                worker.log_event(self.topic, {"refused": message, "kind": kind.__name__})
                # paused at once: tasks may be on their way; then in order, so that none is blamed for it
                worker.status = Status.paused
                worker.loop.add_callback(worker.close_gracefully, restart=False, reason="not fit for the run")
            raise kind(message) from error
        if late:
            worker.log_event(self.topic, {"ready": worker.address})

    def _check(self, who: str, theirs: dict[str, str], sees: bool, worker: Any) -> None:
        require_same(theirs, self.ours, who)
        if not sees:
            raise ClusterError(f"{who} does not see {self.token.parent}; it must see the output folder")
        if others := differing(theirs, self.ours):
            worker.log_event(self.topic, {"differs": f"{who}: {', '.join(others)}"})

    def _load(self) -> None:
        # imported here: workers that only read and cut do not load torch
        from sgclassify.pipeline.cluster.gpu import claim_gpu
        from sgclassify.pipeline.tasks import classifier_of

        claim_gpu()
        if self.model is not None:
            classifier_of(dataclasses.replace(self.model, device="cuda"))


class TaskTimeoutError(SgClassifyError):
    """A task took so long that the worker ended itself; see `time_limit`.

    Parameters
    ----------
    what : str
        The job.
    seconds : float
        Longest time that it may take.
    """

    exit_code = 3
    path = ""
    advice = "look after the disk or the network that its files lie on and run again, or raise task_timeout_s"

    def __init__(self, what: str, seconds: float) -> None:
        super().__init__(what, seconds)
        self.fault = f"took longer than {seconds:g} s; each worker that took it ended itself"

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.fault}; {self.advice}"


@contextmanager
def time_limit(seconds: float, what: str, note: Path) -> Iterator[None]:
    """End this process if the block takes too long: a thread that is stuck in a read cannot be ended otherwise.

    Parameters
    ----------
    seconds : float
        Longest time; 0 or less for no limit.
    what : str
        What is done, for the note.
    note : Path
        File written before the process ends, JSON: ``what``, ``seconds``, ``pid``, ``time``.
    """
    if seconds <= 0:
        yield
        return
    watchdog = threading.Timer(seconds, _end, (seconds, what, note))
    watchdog.daemon = True
    watchdog.start()
    try:
        yield
    finally:
        watchdog.cancel()


def _end(seconds: float, what: str, note: Path) -> None:
    def write() -> None:
        content = {"what": what, "seconds": seconds, "pid": os.getpid(), "time": time.time()}
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomic_text(json.dumps(content), note)

    # the note may lie on the very disk that hangs
    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    writer.join(_NOTE_S)
    os._exit(STUCK)
