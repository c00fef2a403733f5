"""The Dask cluster of a run: an embedded one by default, or an existing scheduler; and what it can do."""

from __future__ import annotations

import concurrent.futures
import logging
import os
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import dask
from distributed import Client, Nanny, Scheduler, SpecCluster, wait
from distributed.client import FutureCancelledError
from distributed.scheduler import KilledWorker, NoWorkerError

from sgclassify.pipeline.config import RunConfig
from sgclassify.stages.errors import ClusterError, SgClassifyError

log = logging.getLogger(__name__)

_POLL_S: Final = 2.0

GPU: Final = "GPU"
CPU: Final = "CPU"

# Pausing a worker for memory can stall a run for ever; a worker that is really too large is ended by its
# nanny, its task tried once more, and then set aside with a reason.
_EMBEDDED_SETTINGS: Final[dict[str, object]] = {
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": 0.95,
    "distributed.scheduler.allowed-failures": 1,
    "distributed.worker.daemon": True,
    "distributed.admin.system-monitor.gil.enabled": False,
    "distributed.comm.timeouts.connect": "30s",
}


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
    embedded : bool
        Whether the cluster lives and ends with the run.
    timeout_s : float
        Longest time without workers.
    """

    client: Client
    n_slots: int
    cpu: Mapping[str, float]
    inference: Mapping[str, float]
    device: str
    address: str
    embedded: bool
    timeout_s: float

    def wait_any(self, futures: set[Any]) -> set[Any]:
        """Wait until at least one future is done; return those that are.

        Raises
        ------
        ClusterError
            If the scheduler is lost, or no worker was there for `timeout_s`.
        """
        watch = _Watch(self)
        while True:
            try:
                with self.client.as_current():
                    return set(wait(futures, timeout=_POLL_S, return_when="FIRST_COMPLETED").done)  # type: ignore[no-untyped-call]
            except TimeoutError:
                watch.check()
            except (FutureCancelledError, concurrent.futures.CancelledError) as error:
                self.check_alive()
                raise ClusterError(f"{self.address}: tasks were cancelled on the scheduler") from error

    def outcome(self, future: Any) -> tuple[Any, BaseException | None, str]:
        """Result, error and traceback text of a future that is done.

        Raises
        ------
        ClusterError
            If the scheduler is lost, or found no worker for the task.
        """
        watch = _Watch(self)
        while True:
            try:
                error = future.exception(timeout=_POLL_S)
                if error is None:
                    # A result whose worker was lost in the meantime is computed again behind this call.
                    return future.result(timeout=_POLL_S), None, ""
                trace = "".join(
                    traceback.format_exception(type(error), error, future.traceback(timeout=_POLL_S))
                )
            except TimeoutError:
                watch.check()
                continue
            except (FutureCancelledError, concurrent.futures.CancelledError) as cancelled:
                self.check_alive()
                raise ClusterError(f"{self.address}: tasks were cancelled on the scheduler") from cancelled
            if isinstance(error, NoWorkerError):
                raise ClusterError(f"{self.address}: {error}")
            return None, TaskKilledError() if isinstance(error, KilledWorker) else error, trace

    def is_fit(self, workers: Mapping[str, Mapping[str, Any]]) -> bool:
        """Whether these workers, as the scheduler describes them, can do all the work."""
        return all(
            any(
                all(w.get("resources", {}).get(k, 0) >= v for k, v in needs.items()) for w in workers.values()
            )
            for needs in (self.cpu, self.inference)
        )

    def check_alive(self) -> None:
        """Raise `ClusterError` if the scheduler is lost."""
        if self.client.status != "running":
            raise ClusterError(f"{self.address}: the scheduler is lost; look at its log and run again")


class TaskKilledError(SgClassifyError):
    """The worker process ended while it computed a task, every time that the scheduler tried."""

    exit_code = 3
    path = ""
    fault = "the worker process ended while it computed this, every time"
    advice = (
        "its memory may not suffice: give the workers more, or choose smaller tiles (a larger tile_order)"
    )

    def __str__(self) -> str:
        return f"{self.fault}; {self.advice}"


class _Watch:
    """Looks after the cluster while a task is waited for."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._empty_since: float | None = None

    def check(self) -> None:
        """Raise `ClusterError` if the scheduler is lost or there was no worker for too long."""
        self._cluster.check_alive()
        if self._cluster.is_fit(workers_of(self._cluster.client)):
            self._empty_since = None
            return
        now = time.monotonic()
        self._empty_since = self._empty_since if self._empty_since is not None else now
        if now - self._empty_since > self._cluster.timeout_s:
            raise ClusterError(
                f"{self._cluster.address}: for {self._cluster.timeout_s:g} s no worker is left that "
                "offers what the run needs; look at the logs of the workers, start workers, and run again"
            )


def workers_of(client: Client) -> dict[str, dict[str, Any]]:
    """Workers of the cluster as the scheduler describes them, by address; none if it does not answer."""
    try:
        info = client.scheduler_info(n_workers=-1)
    except OSError:
        return {}
    return dict(info.get("workers", {}))


@contextmanager
def open_cluster(
    config: RunConfig, *, scheduler: str | None, n_workers: int | None, scratch: Path, shared: Path
) -> Iterator[Cluster]:
    """Open the cluster and check that it can do the work.

    Parameters
    ----------
    config : RunConfig
    scheduler : str or None
        Address of an existing scheduler; None starts a cluster on this machine that ends with the context.
    n_workers : int or None
        Worker processes of the embedded cluster; None for one a core. With `scheduler`: workers to wait for.
    scratch : Path
        Folder for the files of embedded workers.
    shared : Path
        Folder that every worker must see under the same path.

    Raises
    ------
    ClusterError
        If the scheduler does not answer, no worker comes in time, workers lack what the run needs, run
        another version of the software or do not see `shared`.
    """
    with ExitStack() as stack:
        if scheduler is None:
            address = stack.enter_context(_embedded(config, n_workers, scratch)).scheduler_address
        else:
            address = scheduler
        try:
            client = Client(address, timeout=config.worker_timeout_s, set_as_default=False)  # type: ignore[no-untyped-call]
        except (OSError, ValueError) as error:
            raise ClusterError(
                f"{address}: the scheduler does not answer ({error}); check the address and that it runs"
            ) from error
        stack.callback(_close, client)
        workers = _wait_for_workers(client, n_workers or 1, config.worker_timeout_s, address)
        yield _preflight(client, workers, config, address, shared, embedded=scheduler is None)


def _close(client: Client) -> None:
    try:
        client.close(timeout=10)  # type: ignore[no-untyped-call]
    except OSError as error:
        log.debug("closing the connection to the scheduler: %s", error)


@contextmanager
def _embedded(config: RunConfig, n_workers: int | None, scratch: Path) -> Iterator[SpecCluster]:
    """A cluster of processes on this machine that listens on the loopback interface only."""
    n_cpu = n_workers or default_workers()
    n_gpu = count_gpus() if config.device != "cpu" else 0
    with dask.config.set(_EMBEDDED_SETTINGS):
        cluster = SpecCluster(  # type: ignore[no-untyped-call]
            scheduler={
                "cls": Scheduler,
                # port 0 also for the HTTP server that a scheduler always has: a fixed one may be taken
                "options": {
                    "host": "127.0.0.1",
                    "port": 0,
                    "dashboard": False,
                    "dashboard_address": "127.0.0.1:0",
                },
            },
            workers={
                **{
                    f"cpu-{k}": _worker(scratch, {CPU: 1}, {"CUDA_VISIBLE_DEVICES": ""}) for k in range(n_cpu)
                },
                **{
                    f"gpu-{k}": _worker(scratch, {GPU: 1}, {"CUDA_VISIBLE_DEVICES": _gpu(k)})
                    for k in range(n_gpu)
                },
            },
            silence_logs=logging.CRITICAL,
        )
        try:
            yield cluster
        finally:
            cluster.close(timeout=30)


def _worker(scratch: Path, resources: dict[str, float], env: dict[str, str]) -> dict[str, Any]:
    return {
        "cls": Nanny,
        "options": {
            "host": "127.0.0.1",
            "nthreads": 1,
            "dashboard": False,
            "resources": resources,
            "env": env,
            "local_directory": str(scratch),
            "memory_limit": _memory_limit(),
            "silence_logs": logging.CRITICAL,
            "preload": ["sgclassify.pipeline.worker"],
        },
    }


def _memory_limit() -> int:
    """Memory at which a worker is ended: the whole machine's, so that one large tile may use what is free."""
    from distributed.system import MEMORY_LIMIT

    return int(MEMORY_LIMIT)


def default_workers() -> int:
    """One worker a core that this process may use."""
    return max(1, len(os.sched_getaffinity(0)))


def count_gpus() -> int:
    """GPUs that torch can use on this machine."""
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _gpu(number: int) -> str:
    """What CUDA_VISIBLE_DEVICES must say for the GPU that is number `number` among the visible ones."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return visible[number] if number < len(visible) else str(number)


def _wait_for_workers(
    client: Client, count: int, timeout_s: float, address: str
) -> dict[str, dict[str, Any]]:
    """Workers of the cluster, once there are at least `count`, or some after the time is over."""
    with suppress(TimeoutError):
        client.wait_for_workers(count, timeout=timeout_s)
    workers = workers_of(client)
    if not workers:
        raise ClusterError(f"{address}: no worker came within {timeout_s:g} s; start workers and run again")
    if len(workers) < count:
        log.warning("%s: %d of %d workers came within %g s", address, len(workers), count, timeout_s)
    return workers


def _preflight(
    client: Client,
    workers: dict[str, dict[str, Any]],
    config: RunConfig,
    address: str,
    shared: Path,
    *,
    embedded: bool,
) -> Cluster:
    """Check that the workers offer what the run needs."""

    def offering(resource: str) -> dict[str, dict[str, Any]]:
        return {a: w for a, w in workers.items() if w.get("resources", {}).get(resource, 0) >= 1}

    gpu, cpu = offering(GPU), offering(CPU)
    if config.device == "gpu" and not gpu:
        raise ClusterError(
            f"{address}: device = 'gpu' is asked for, but no worker offers the resource GPU"
            + (
                "; this machine has no GPU that torch can use"
                if embedded
                else "; start one with --resources GPU=1"
            )
        )
    use_gpu = bool(gpu) and config.device != "cpu"
    # Where no worker says CPU, any worker may do any work.
    cpu_resources: dict[str, float] = {CPU: 1} if cpu else {}
    slots = sum(int(w.get("nthreads", 1)) for w in (cpu or workers).values())
    if not embedded:
        _check_workers(client, address, shared)
    log.info(
        "cluster %s: %d workers, %d CPU slots, model on %s",
        address if not embedded else "on this machine",
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
        embedded=embedded,
        timeout_s=config.worker_timeout_s,
    )


def _check_workers(client: Client, address: str, shared: Path) -> None:
    """Every worker must run this version of the software and see the shared folder."""
    token = shared / "preflight"
    token.write_text(str(os.getpid()))
    try:
        answers: dict[str, Any] = client.run(_inspect, str(token), on_error="return")
    except OSError as error:
        raise ClusterError(f"{address}: the workers do not answer ({error})") from error
    finally:
        token.unlink()
    ours = software_version()
    for worker, answer in sorted(answers.items()):
        if isinstance(answer, BaseException):
            raise ClusterError(f"{address}: worker {worker} cannot run the software: {answer!r}")
        version, sees = answer
        if version != ours:
            raise ClusterError(
                f"{address}: worker {worker} runs sgclassify {version}, this is {ours}; install one version"
            )
        if not sees:
            raise ClusterError(
                f"{address}: worker {worker} does not see {shared}; the output must lie on a file system "
                "that all workers share under one path"
            )


def software_version() -> str:
    """Installed version of the software."""
    return metadata.version("sgclassify")


def _inspect(token: str) -> tuple[str, bool]:
    """On a worker: the version of the software, and whether the token can be seen."""
    return software_version(), Path(token).is_file()
