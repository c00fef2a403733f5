"""What a worker process does beside its tasks: start, and get ready for a run."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from distributed import Status, WorkerPlugin

from sgclassify.model.serve.loaded import ModelRef, classifier_of
from sgclassify.pipeline.cluster.crash import CRASH_DIR, keep_stack
from sgclassify.pipeline.cluster.gpu import claim_gpu
from sgclassify.pipeline.cluster.versions import differing, require_same, versions
from sgclassify.pipeline.process import keep_freed_memory
from sgclassify.stages.errors import ClusterError, SgClassifyError

log = logging.getLogger(__name__)

GPU: Final = "GPU"
CPU: Final = "CPU"

LOAD_S: Final = 180.0
"""Longest time for a worker to get ready."""
_TOKEN_S: Final = 3.0


def dask_setup(worker: object) -> None:
    """Called by the embedded workers as they start.

    What a terminal sends to the workers too, by Ctrl-C or as it closes, is left to the driver: it ends them in order.
    """
    keep_freed_memory()
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if folder := os.environ.get(CRASH_DIR):
        keep_stack(Path(folder))


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

    Dask goes on with a worker whose plugin has failed. If the worker was there when the plugin was registered, the
    driver gets the error and refuses the cluster. A worker that joins later reports under `topic` that it is ready,
    or its error, and then closes: it would fail tasks faster than good workers do them.

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
        keep_freed_memory()
        try:
            if late:
                self._check(who, *await inspect(self.token), worker)
            if self.use_gpu and worker.state.total_resources.get(GPU, 0) >= 1:
                # In the thread that runs the tasks: loading takes seconds, which would cost heartbeats in the event
                # loop, and the number of OpenMP threads holds for the thread that sets it.
                loop, executor = asyncio.get_running_loop(), worker.executors["default"]
                await asyncio.wait_for(loop.run_in_executor(executor, self._load), LOAD_S)
        except Exception as error:
            fault: BaseException = error
            if isinstance(error, TimeoutError):
                fault = ClusterError(f"not ready within {LOAD_S:g} s: busy with other work, or its disk hangs")
            kind = type(fault) if isinstance(fault, SgClassifyError) else ClusterError
            text = str(fault) if isinstance(fault, SgClassifyError) else repr(fault)
            message = text if text.startswith(who) else f"{who}: {text}"
            if late:
                worker.log_event(self.topic, {"refused": message, "kind": kind.__name__})
                # paused at once, as tasks may be on their way; then closed in order, so that no task is blamed for it
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
        claim_gpu()
        if self.model is not None:
            classifier_of(dataclasses.replace(self.model, device="cuda"))
