"""The Dask cluster of a run: of this machine by default, or an existing one; and the tasks on it."""

from __future__ import annotations

import concurrent.futures
import logging
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from distributed import Client, wait
from distributed.client import ClosedClientError, FutureCancelledError
from distributed.scheduler import KilledWorker, NoWorkerError

from sgclassify.model.serve.loaded import ModelRef
from sgclassify.pipeline.cluster.connect import connect, disconnect, read_address
from sgclassify.pipeline.cluster.embedded import CRASHES, count_gpus, default_workers, embedded
from sgclassify.pipeline.cluster.preflight import Notices, offering, readied, wait_for_workers
from sgclassify.pipeline.cluster.watch import POLL_S, Seen, Watch, Workers, lost_scheduler, workers_of
from sgclassify.pipeline.cluster.worker import CPU, GPU, Readiness
from sgclassify.pipeline.config import RunConfig
from sgclassify.stages.errors import ClusterError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cluster:
    """A cluster that was found fit for the run.

    Attributes
    ----------
    client : distributed.Client
    n_slots : int
        Threads that CPU tasks can use.
    cpu, inference : dict of str to float
        Dask resources that CPU tasks and the model ask for.
    device : str
        Torch device of the model: ``"cpu"`` or ``"cuda"``.
    address : str
        Address of the scheduler.
    timeout_s : float
        Longest time without workers.
    stall_s : float
        Longest time without the end of any task.
    crash_dir : Path or None
        Where workers that crash leave their stack; None for an existing cluster.
    seen : Seen
        Workers as they were when last looked at.
    """

    client: Client
    n_slots: int
    cpu: Mapping[str, float]
    inference: Mapping[str, float]
    device: str
    address: str
    timeout_s: float
    stall_s: float = float("inf")
    crash_dir: Path | None = None
    seen: Seen = field(default_factory=Seen)

    def submit(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Submit a task anew, as `distributed.Client.submit` does; `ClusterError` if the scheduler is lost."""
        try:
            return self.client.submit(function, *arguments, pure=False, **options)
        except (ClosedClientError, OSError) as error:
            raise self._lost(error) from error

    def wait_any(self, futures: set[Any]) -> set[Any]:
        """Wait until at least one future is done; return those that are.

        `ClusterError` if the scheduler is lost, or no worker was there for `timeout_s`.
        """
        watch = self._watch()
        if time.monotonic() - self.seen.at > POLL_S:
            self.seen.look(self.client)
        while True:
            try:
                with self.client.as_current():
                    return set(wait(futures, timeout=POLL_S, return_when="FIRST_COMPLETED").done)  # type: ignore[no-untyped-call]
            except TimeoutError:
                watch.check()
            except (FutureCancelledError, concurrent.futures.CancelledError, OSError) as error:
                raise self._lost(error) from error

    def outcome(self, future: Any) -> tuple[Any, BaseException | None, str]:
        """Result, error and traceback text of a future that is done.

        `ClusterError` if the scheduler is lost, or found no worker for the task.
        """
        watch = self._watch()
        while True:
            try:
                error = future.exception(timeout=POLL_S)
                if error is None:
                    # A result whose worker was lost in the meantime is computed again behind this call.
                    return future.result(timeout=POLL_S), None, ""
                trace = "".join(traceback.format_exception(type(error), error, future.traceback(timeout=POLL_S)))
            except TimeoutError:
                watch.check()
                continue
            except (FutureCancelledError, concurrent.futures.CancelledError, OSError) as lost:
                raise self._lost(lost) from lost
            if isinstance(error, NoWorkerError):
                raise ClusterError(f"{self.address}: {error}")
            if isinstance(error, KilledWorker):
                error = self.seen.death(error, self.crash_dir)
            return None, error, trace

    def _watch(self) -> Watch:
        needs = (self.cpu, self.inference)
        return Watch(self.client, self.address, needs, self.timeout_s, self.stall_s, self.seen)

    def _lost(self, error: BaseException) -> ClusterError:
        """What it means that the scheduler no longer knows of tasks, or that the connection to it breaks."""
        if self.client.status == "running" and isinstance(error, concurrent.futures.CancelledError):
            return ClusterError(f"{self.address}: tasks were cancelled on the scheduler")
        return lost_scheduler(self.address)


@contextmanager
def open_cluster(
    config: RunConfig,
    *,
    scheduler: str | None,
    n_workers: int | None,
    scratch: Path,
    shared: Path,
    scheduler_file: Path | None = None,
    model: ModelRef | None = None,
    on_notice: Callable[[str], None] | None = None,
) -> Iterator[Cluster]:
    """Open the cluster and check that it can do the work.

    Parameters
    ----------
    config : RunConfig
    scheduler : str or None
        Address of an existing scheduler; None starts a cluster on this machine that ends with the context.
    n_workers : int or None
        Workers of the cluster on this machine, None for one per core; of an existing one, workers to wait for.
    scratch : Path
        Folder for the files of workers on this machine.
    shared : Path
        Folder that every worker must see under the same path.
    scheduler_file : Path or None
        File that an existing scheduler has written its address into, instead of `scheduler`.
    model : ModelRef or None
        What GPU workers load before their first task.
    on_notice : callable, optional
        Gets what is logged as a warning: versions that differ, late workers that were refused.

    Raises
    ------
    ClusterError
        If the scheduler does not answer, no worker comes in time, workers lack what the run needs, run
        another version of the software, do not see `shared` or share a GPU.
    ModelError
        If a GPU worker cannot load `model`.
    """
    own = scheduler is None and scheduler_file is None
    n_gpu = count_gpus() if own and config.device != "cpu" else 0
    if own and config.device == "gpu" and not n_gpu:
        raise ClusterError(
            "device = 'gpu' is asked for, but this machine has no GPU that torch can use; ask for the "
            "CPU: --device cpu, or use a cluster that has one: --scheduler"
        )
    with ExitStack() as stack:
        if own:
            local = embedded(n_workers or default_workers(), n_gpu, scratch)
            address = stack.enter_context(local).scheduler_address
        elif scheduler_file is not None:
            address = read_address(scheduler_file, config.worker_timeout_s)
        else:
            address = str(scheduler)
        client = connect(address, config.worker_timeout_s, scheduler_file)
        stack.callback(disconnect, client)
        notices = Notices(on_notice)
        present = frozenset(workers_of(client))
        if not own or n_gpu:
            topic = f"sgclassify-{uuid.uuid4().hex}"
            plugin = Readiness(shared / "preflight", topic, model, config.device != "cpu", present)
            stack.enter_context(readied(client, address, plugin, notices, ours=own))
        notices.ready.update(present)
        wants_gpu = n_gpu > 0 if own else config.device != "cpu"
        workers = wait_for_workers(client, address, config, n_workers or 1, notices, wants_gpu=wants_gpu)
        notices.start()
        yield _cluster_of(client, workers, config, address, scratch if own else None)


def _cluster_of(client: Client, workers: Workers, config: RunConfig, address: str, scratch: Path | None) -> Cluster:
    """How these workers share the work; `scratch` is None for an existing cluster."""
    gpu, cpu = offering(workers, GPU), offering(workers, CPU)
    use_gpu = bool(gpu) and config.device != "cpu"
    # Where no worker says CPU, any worker may do any work.
    cpu_resources: dict[str, float] = {CPU: 1} if cpu else {}
    slots = sum(
        min([int(w.get("nthreads", 1)), *([int(w["resources"][CPU])] if cpu else [])])
        for w in (cpu or workers).values()
    )
    log.info(
        "cluster %s: %d workers, %d CPU slots, model on %s",
        address if scratch is None else "on this machine",
        len(workers),
        slots,
        "GPU" if use_gpu else "CPU",
    )
    return Cluster(
        client=client,
        n_slots=max(1, slots),
        cpu=cpu_resources,
        inference={GPU: 1} if use_gpu else cpu_resources,
        device="cuda" if use_gpu else "cpu",
        address=address,
        timeout_s=config.lost_workers_timeout_s,
        # three tasks of a tile that each take the longest time are no stall yet
        stall_s=4 * config.task_timeout_s if config.task_timeout_s else float("inf"),
        crash_dir=scratch / CRASHES if scratch is not None else None,
    )
