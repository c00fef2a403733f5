"""What the driver checks before a run: do the workers have what the run needs, and are they ready?"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from distributed import Client

from sgclassify.pipeline.cluster.versions import differing, require_same
from sgclassify.pipeline.cluster.watch import Workers, workers_of
from sgclassify.pipeline.cluster.worker import GPU, LOAD_S, Readiness, inspect
from sgclassify.pipeline.config import RunConfig
from sgclassify.stages.errors import ClusterError, ModelError, SgClassifyError

log = logging.getLogger(__name__)

_GPU_S: Final = 5.0
"""Time for a first GPU worker once other workers are there."""


class Notices:
    """What the driver learns of single workers; `on_notice` gets every notice, once."""

    def __init__(self, on_notice: Callable[[str], None] | None) -> None:
        self._on_notice = on_notice
        self._said: set[str] = set()
        self._started = False
        self.ready: set[str] = set()
        self.refused: list[SgClassifyError] = []

    def say(self, text: str) -> None:
        """Log a warning, once, and pass it on."""
        if text in self._said:
            return
        self._said.add(text)
        log.warning("%s", text)
        if self._on_notice is not None:
            self._on_notice(text)

    def differs(self, others: str) -> None:
        """Warn of packages of other versions."""
        self.say(f"{others}: another version may change the last bits of the products")

    def start(self) -> None:
        """From now on, a worker that is refused costs itself only."""
        self._started = True
        for error in self.refused:
            self._refuse(error)

    def _refuse(self, error: SgClassifyError) -> None:
        self.say(f"a worker that came late was refused and closed: {error}")

    def handle(self, event: tuple[float, Mapping[str, str]]) -> None:
        """Take an event that `Readiness` has sent from a worker."""
        _, message = event
        if "ready" in message:
            self.ready.add(message["ready"])
        if "differs" in message:
            self.differs(message["differs"])
        if "refused" in message:
            kind = ModelError if message["kind"] == ModelError.__name__ else ClusterError
            self.refused.append(kind(message["refused"]))
            if self._started:
                self._refuse(self.refused[-1])


@contextmanager
def readied(client: Client, address: str, plugin: Readiness, notices: Notices, *, ours: bool) -> Iterator[None]:
    """Have every worker made ready by the plugin, those that come later too, while the context is open.

    `ours` says whether the cluster is of this machine: its workers surely run this software and see its files. Raises
    `ClusterError` or `ModelError` if a worker is not fit.
    """
    plugin.token.write_text(str(os.getpid()))
    try:
        if not ours:
            _check_versions(client, address, plugin, notices)
        client.subscribe_topic(plugin.topic, notices.handle)  # type: ignore[no-untyped-call]
        try:
            _register(client, address, plugin)
            yield
        finally:
            _withdraw(client, plugin)
    finally:
        plugin.token.unlink(missing_ok=True)


def _check_versions(client: Client, address: str, plugin: Readiness, notices: Notices) -> None:
    """The scheduler and the workers that are there must run the same software and see the shared folder."""
    ours, token = plugin.ours, plugin.token
    try:
        scheduler: dict[str, str] = client.get_versions()["scheduler"]["packages"]  # type: ignore[index]
        answers: dict[str, Any] = client.run(inspect, token, on_error="return")
    except OSError as error:
        raise ClusterError(f"{address}: the cluster does not answer ({error})") from error
    require_same({name: scheduler[name] for name in ("dask", "distributed")}, ours, f"scheduler {address}")
    differ: dict[str, list[str]] = {}
    for worker, answer in sorted(answers.items()):
        if isinstance(answer, OSError):
            continue  # it has left: what matters is who is there when the work begins
        if isinstance(answer, BaseException):
            raise ClusterError(f"{address}: worker {worker} cannot run the software: {answer!r}")
        theirs, sees = answer
        require_same(theirs, ours, f"{address}: worker {worker}")
        if not sees:
            raise ClusterError(
                f"{address}: worker {worker} does not see {token.parent}; the output must lie on a file "
                "system that all workers share under one path"
            )
        for other in differing(theirs, ours):
            differ.setdefault(other, []).append(worker)
    for other, of in differ.items():
        notices.differs(f"{other} on {len(of)} of {len(answers)} workers, such as {of[0]}")


def _register(client: Client, address: str, plugin: Readiness) -> None:
    """Have `Readiness` set up on the workers that are there, and on those that come."""
    try:
        client.register_plugin(plugin)
    except SgClassifyError as error:
        raise type(error)(f"{address}: {error}") from error
    except Exception as error:
        raise ClusterError(
            f"{address}: a worker cannot run the software: {error!r}; look at the logs of the workers"
        ) from error


def _withdraw(client: Client, plugin: Readiness) -> None:
    """Take the plugin off the scheduler: workers that come after the run do not need it."""
    try:
        client.unregister_worker_plugin(plugin.name)  # type: ignore[no-untyped-call]
    except Exception as error:  # noqa: BLE001
        # of any kind, since it may come from a worker: one that has just come does not have the plugin yet
        log.debug("taking the plugin off the scheduler: %r", error)


def offering(workers: Workers, resource: str) -> Workers:
    """Those of the workers that offer a resource."""
    return {a: w for a, w in workers.items() if w.get("resources", {}).get(resource, 0) >= 1}


def wait_for_workers(
    client: Client, address: str, config: RunConfig, count: int, notices: Notices, *, wants_gpu: bool
) -> Workers:
    """Workers that are ready, once there are `count` with a GPU among them if wanted, or when the time is over.

    Raises `ClusterError` or `ModelError`: none in time, none offers a GPU though one is wanted, or one is refused.
    """
    deadline = time.monotonic() + config.worker_timeout_s
    gpu_deadline: float | None = None
    while True:
        known = workers_of(client)
        workers = {a: w for a, w in known.items() if a in notices.ready}
        pending = {a: w for a, w in known.items() if a not in notices.ready}
        if notices.refused:
            raise notices.refused[0]
        now = time.monotonic()
        over = now > deadline + (LOAD_S if pending else 0.0)
        if workers and (len(workers) >= count or over):
            gpu_deadline = gpu_deadline or min(now + _GPU_S, deadline)
            if not wants_gpu or offering(workers, GPU):
                break
            if over or (now > gpu_deadline and not offering(pending, GPU)):
                raise ClusterError(
                    f"{address}: none of the {len(workers)} workers offers a GPU for the model; start one per "
                    f"GPU with `dask worker {address} --nthreads 1 --resources GPU=1`, or ask for the CPU: "
                    "--device cpu"
                )
        elif over:
            raise ClusterError(
                f"{address}: no worker came within {config.worker_timeout_s:g} s; start workers with "
                f"`dask worker {address} --nthreads 1` and run again"
            )
        time.sleep(0.1)
    if len(workers) < count:
        notices.say(f"{address}: {len(workers)} of {count} workers came within {config.worker_timeout_s:g} s")
    return workers
