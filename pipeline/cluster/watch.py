"""Look after the workers of a cluster while the driver waits for tasks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from dask.utils import format_bytes
from distributed import Client
from distributed.scheduler import KilledWorker

from sgclassify.pipeline.cluster.crash import crash_of
from sgclassify.pipeline.errors import TaskKilledError
from sgclassify.stages.errors import ClusterError

POLL_S: Final = 2.0
"""Time between two looks at the workers."""

Workers = Mapping[str, Mapping[str, Any]]
"""Workers as the scheduler describes them, by address."""


def workers_of(client: Client) -> dict[str, dict[str, Any]]:
    """Workers of the cluster now, by address; none if the scheduler does not answer."""
    try:
        info = client.scheduler_info(n_workers=-1)
    except OSError:
        return {}
    return dict(info.get("workers", {}))


@dataclass
class Seen:
    """Workers as the driver saw them last, also those that are gone; `at` is the time of the last look."""

    workers: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    at: float = float("-inf")

    def look(self, client: Client) -> Workers:
        """Workers of the cluster now, which are remembered."""
        workers = workers_of(client)
        self.workers.update(workers)
        self.at = time.monotonic()
        return workers

    def death(self, error: KilledWorker, crash_dir: Path | None) -> TaskKilledError:
        """What is known of the death of a worker; a worker of this machine leaves its stack in `crash_dir`."""
        worker = error.last_worker
        known = [f"worker {worker.name} at {worker.address}, process {worker.pid}"]
        memory = self.workers.get(worker.address, {}).get("metrics", {}).get("memory")
        if memory:
            known.append(f"memory when last seen {format_bytes(memory)}")
        if worker.memory_limit:
            known.append(f"limit {format_bytes(worker.memory_limit)}")
        if crash_dir is not None and (crash := crash_of(crash_dir, worker.pid)):
            known.append(crash)
        return TaskKilledError("; ".join(known))


def lost_scheduler(address: str) -> ClusterError:
    """The error of a scheduler that is lost."""
    return ClusterError(f"{address}: the scheduler is lost; look at its log and run again")


@dataclass
class Watch:
    """Looks after a `Cluster`, whose fields these are, during one wait for tasks.

    For each of the `needs`, the Dask resources of one kind of task, there must be a worker that offers them.
    """

    client: Client
    address: str
    needs: tuple[Mapping[str, float], ...]
    timeout_s: float
    stall_s: float
    seen: Seen
    _started: float = field(default_factory=time.monotonic)
    _empty_since: float | None = None

    def check(self) -> None:
        """Raise `ClusterError` if the scheduler is lost, or no worker was there or no task has ended for too long."""
        if self.client.status != "running":
            raise lost_scheduler(self.address)
        now = time.monotonic()
        if now - self._started > self.stall_s:
            raise ClusterError(
                f"{self.address}: no task has ended for {self.stall_s:g} s, though each may take a quarter of that; "
                "look at the logs of scheduler and workers, and run again: it goes on from here"
            )
        if self._is_fit(self.seen.look(self.client)):
            self._empty_since = None
            return
        self._empty_since = self._empty_since if self._empty_since is not None else now
        if now - self._empty_since > self.timeout_s:
            raise ClusterError(
                f"{self.address}: for {self.timeout_s:g} s no worker is left that "
                "offers what the run needs; look at the logs of the workers, start workers, and run again"
            )

    def _is_fit(self, workers: Workers) -> bool:
        """Whether these workers can do all the work."""
        return all(
            any(all(w.get("resources", {}).get(k, 0) >= v for k, v in needs.items()) for w in workers.values())
            for needs in self.needs
        )
