"""The Dask cluster of a run: an embedded one by default, or an existing scheduler; and what it can do."""

from __future__ import annotations

import concurrent.futures
import json
import logging
import os
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from dask.utils import format_bytes
from distributed import Client, Security, wait
from distributed.client import ClosedClientError, FutureCancelledError
from distributed.scheduler import KilledWorker, NoWorkerError

from sgclassify.pipeline.cluster.embedded import CRASHES, count_gpus, default_workers, embedded
from sgclassify.pipeline.cluster.worker import (
    CPU,
    GPU,
    LOAD_S,
    Readiness,
    crash_of,
    differing,
    inspect,
    require_same,
    versions,
)
from sgclassify.pipeline.config import RunConfig
from sgclassify.stages.errors import ClusterError, ModelError, SgClassifyError

if TYPE_CHECKING:
    from sgclassify.pipeline.tasks import ModelRef

log = logging.getLogger(__name__)

_POLL_S: Final = 2.0
_CONNECT_S: Final = 10.0
"""Longest time to connect to a scheduler: one that runs answers at once."""
_GPU_S: Final = 5.0
"""Time for a first GPU worker once other workers are there."""
_JUNK_S: Final = 5.0
"""Time for a scheduler file to become complete."""

Workers = Mapping[str, Mapping[str, Any]]
"""Workers as the scheduler describes them, by address."""


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
    stall_s : float
        Longest time without the end of any task.
    crash_dir : Path or None
        Where workers that crash leave their stack; None for workers of others.
    seen : Seen
        Workers as they were when last looked at.
    """

    client: Client
    n_slots: int
    cpu: Mapping[str, float]
    inference: Mapping[str, float]
    device: str
    address: str
    embedded: bool
    timeout_s: float
    stall_s: float = float("inf")
    crash_dir: Path | None = None
    seen: Seen = field(default_factory=lambda: Seen())

    def submit(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Submit a task as `distributed.Client.submit` does, each time anew; returns its future.

        Raises
        ------
        ClusterError
            If the scheduler is lost.
        """
        try:
            return self.client.submit(function, *arguments, pure=False, **options)
        except (ClosedClientError, OSError) as error:
            raise self._lost(error) from error

    def wait_any(self, futures: set[Any]) -> set[Any]:
        """Wait until at least one future is done; return those that are.

        Raises
        ------
        ClusterError
            If the scheduler is lost, or no worker was there for `timeout_s`.
        """
        watch = _Watch(self)
        if time.monotonic() - self.seen.at > _POLL_S:
            self.look()
        while True:
            try:
                with self.client.as_current():
                    return set(wait(futures, timeout=_POLL_S, return_when="FIRST_COMPLETED").done)  # type: ignore[no-untyped-call]
            except TimeoutError:
                watch.check()
            except (FutureCancelledError, concurrent.futures.CancelledError, OSError) as error:
                raise self._lost(error) from error

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
            except (FutureCancelledError, concurrent.futures.CancelledError, OSError) as lost:
                raise self._lost(lost) from lost
            if isinstance(error, NoWorkerError):
                raise ClusterError(f"{self.address}: {error}")
            return None, self._killed(error) if isinstance(error, KilledWorker) else error, trace

    def _lost(self, error: BaseException) -> ClusterError:
        """What it means that the scheduler no longer knows of tasks, or that the connection to it breaks."""
        if self.client.status != "running" or not isinstance(error, concurrent.futures.CancelledError):
            return ClusterError(f"{self.address}: the scheduler is lost; look at its log and run again")
        return ClusterError(f"{self.address}: tasks were cancelled on the scheduler")

    def _killed(self, error: KilledWorker) -> TaskKilledError:
        """What is known of the death of a worker."""
        worker = error.last_worker
        known = [f"worker {worker.name} at {worker.address}, process {worker.pid}"]
        memory = self.seen.workers.get(worker.address, {}).get("metrics", {}).get("memory")
        if memory:
            known.append(f"memory when last seen {format_bytes(memory)}")
        if worker.memory_limit:
            known.append(f"limit {format_bytes(worker.memory_limit)}")
        if self.crash_dir is not None and (crash := crash_of(self.crash_dir, worker.pid)):
            known.append(crash)
        return TaskKilledError("; ".join(known))

    def look(self) -> Workers:
        """Workers of the cluster now; `seen` is brought up to date."""
        workers = workers_of(self.client)
        self.seen.workers.update(workers)
        self.seen.at = time.monotonic()
        return workers

    def is_fit(self, workers: Workers) -> bool:
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


@dataclass
class Seen:
    """Workers as they were when last looked at, at the time `at`; those that are gone since among them."""

    workers: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    at: float = 0.0


class TaskKilledError(SgClassifyError):
    """The worker process ended while it computed a task, every time that the scheduler tried.

    Parameters
    ----------
    known : str
        What is known of the worker and its death.
    """

    exit_code = 3
    path = ""
    advice = (
        "its memory may not suffice: give the workers more, or choose smaller tiles (a larger tile_order)"
    )

    def __init__(self, known: str = "") -> None:
        super().__init__(known)
        self.fault = "the worker process ended while it computed this" + (f" ({known})" if known else "")
        if "Fatal Python error" in known:
            self.advice = "a library crashed: report it, with these exposures"

    def __str__(self) -> str:
        return f"{self.fault}; {self.advice}"


class _Watch:
    """Looks after the cluster while a task is waited for."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._started = time.monotonic()
        self._empty_since: float | None = None

    def check(self) -> None:
        """Raise `ClusterError` if the scheduler is lost, or there was no worker or no end of a task for too long."""
        self._cluster.check_alive()
        if time.monotonic() - self._started > self._cluster.stall_s:
            raise ClusterError(
                f"{self._cluster.address}: no task has ended for {self._cluster.stall_s:g} s, though each may take a "
                "quarter of that; look at the logs of scheduler and workers, and run again: it goes on from here"
            )
        if self._cluster.is_fit(self._cluster.look()):
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
        Worker processes of the embedded cluster; None for one per core. Else: workers to wait for.
    scratch : Path
        Folder for the files of embedded workers.
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
    with ExitStack() as stack:
        if own:
            if config.device == "gpu" and not n_gpu:
                raise ClusterError(
                    "device = 'gpu' is asked for, but this machine has no GPU that torch can use; ask for the "
                    "CPU: --device cpu, or use a cluster that has one: --scheduler"
                )
            address = stack.enter_context(
                embedded(n_workers or default_workers(), n_gpu, scratch)
            ).scheduler_address
        else:
            address = scheduler or _read_address(scheduler_file, config.worker_timeout_s)  # type: ignore[arg-type]
        client = _connect(address, min(_CONNECT_S, config.worker_timeout_s), scheduler_file)
        stack.callback(_close, client)
        notices = _Notices(on_notice)
        present = frozenset(workers_of(client))
        if not own or n_gpu:
            token = shared / "preflight"
            token.write_text(str(os.getpid()))
            stack.callback(token.unlink, missing_ok=True)
            if not own:
                _check_versions(client, address, token, notices)
            plugin = Readiness(
                token=token,
                topic=f"sgclassify-{uuid.uuid4().hex}",
                model=model,
                use_gpu=config.device != "cpu",
                present=present,
            )
            client.subscribe_topic(plugin.topic, notices.handle)  # type: ignore[no-untyped-call]
            stack.callback(_withdraw, client, plugin)
            _make_ready(client, address, plugin)
        wants_gpu = n_gpu > 0 if own else config.device != "cpu"
        notices.ready.update(present)
        workers = _wait_for_workers(client, address, config, n_workers or 1, notices, wants_gpu=wants_gpu)
        notices.start()
        yield _cluster_of(client, workers, config, address, scratch if own else None)


class _Notices:
    """What the driver learns of single workers."""

    def __init__(self, on_notice: Callable[[str], None] | None) -> None:
        self._on_notice = on_notice
        self._said: set[str] = set()
        self.started = False
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
        self.started = True
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
            if self.started:
                self._refuse(self.refused[-1])


def _read_address(path: Path, timeout_s: float) -> str:
    """Address in a scheduler file, once it is there."""
    start = time.monotonic()
    while True:
        patience = min(_JUNK_S, timeout_s)
        try:
            address = json.loads(path.read_text(encoding="utf-8"))["address"]
            if isinstance(address, str) and address:
                return address
            fault = "names no address"
        except FileNotFoundError:
            fault, patience = "is not there", timeout_s
        except OSError as error:
            fault = f"cannot be read ({error.strerror})"
        except (ValueError, KeyError, TypeError):
            fault = "is not what `dask scheduler --scheduler-file` writes"
        if time.monotonic() - start > patience:
            raise ClusterError(
                f"{path}: the scheduler file {fault}, after {patience:g} s; start the scheduler with "
                f"`dask scheduler --scheduler-file {path}`"
            )
        time.sleep(0.1)


def _connect(address: str, timeout_s: float, file: Path | None) -> Client:
    """A client of a scheduler that answers."""
    security = Security()  # type: ignore[no-untyped-call]
    advice = "check the address and that it runs"
    if file is not None:
        advice = f"{file} may be left from a scheduler that has ended"
    try:
        if address.startswith("tls://"):
            _check_tls(address, security)
            advice += ", and that one authority has signed all certificates"
        elif address.startswith("tcp://"):
            advice += ", or whether it is a tls:// scheduler"
        # the timeout is also that of reconnecting, which is never of use: the tasks of a lost scheduler are lost
        return Client(address, security=security, timeout=timeout_s, set_as_default=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError, RuntimeError, ImportError) as error:
        raise ClusterError(f"{address}: the scheduler does not answer ({error}); {advice}") from error


def _check_tls(address: str, security: Security) -> None:
    """A scheduler on tls:// needs certificates, without which Dask fails with a TypeError."""
    keys = "DASK_DISTRIBUTED__COMM__TLS__{CA_FILE,CLIENT__CERT,CLIENT__KEY}"
    try:
        found = security.get_connection_args("client").get("ssl_context")  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise ClusterError(f"{address}: the certificates cannot be read ({error}); look at {keys}") from error
    if found is None:
        raise ClusterError(
            f"{address}: no certificates are configured; set {keys} in the environment (docs/clusters.md)"
        )


def _withdraw(client: Client, plugin: Readiness) -> None:
    """Take the plugin off the scheduler: workers that come after the run are none of its business."""
    try:
        client.unregister_worker_plugin(plugin.name)  # type: ignore[no-untyped-call]
    except Exception as error:  # noqa: BLE001
        # of any kind, since it may come from a worker: one that has just come does not have the plugin yet
        log.debug("taking the plugin off the scheduler: %r", error)


def _check_versions(client: Client, address: str, token: Path, notices: _Notices) -> None:
    """The scheduler and the workers that are there must run the same software and see the shared folder."""
    ours = versions()
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


def _make_ready(client: Client, address: str, plugin: Readiness) -> None:
    """Have `Readiness` set up on the workers that are there, and on those that come."""
    try:
        client.register_plugin(plugin)
    except SgClassifyError as error:
        raise type(error)(f"{address}: {error}") from error
    except Exception as error:
        raise ClusterError(
            f"{address}: a worker cannot run the software: {error!r}; look at the logs of the workers"
        ) from error


def _close(client: Client) -> None:
    try:
        client.close(timeout=10)  # type: ignore[no-untyped-call]
    except OSError as error:
        log.debug("closing the connection to the scheduler: %s", error)


def _offering(workers: Workers, resource: str) -> Workers:
    return {a: w for a, w in workers.items() if w.get("resources", {}).get(resource, 0) >= 1}


def _wait_for_workers(
    client: Client, address: str, config: RunConfig, count: int, notices: _Notices, *, wants_gpu: bool
) -> Workers:
    """Workers that are ready, once there are `count` with a GPU among them if wanted, or when the time is over."""
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
            if not wants_gpu or _offering(workers, GPU):
                break
            if over or (now > gpu_deadline and not _offering(pending, GPU)):
                raise ClusterError(
                    f"{address}: none of the {len(workers)} workers offers a GPU for the model; start one for each "
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


def _cluster_of(
    client: Client, workers: Workers, config: RunConfig, address: str, scratch: Path | None
) -> Cluster:
    """How these workers share the work; `scratch` is None for workers of others."""
    gpu, cpu = _offering(workers, GPU), _offering(workers, CPU)
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
        embedded=scratch is not None,
        timeout_s=config.lost_workers_timeout_s,
        # three tasks of a tile that each take the longest time are no stall yet
        stall_s=4 * config.task_timeout_s if config.task_timeout_s else float("inf"),
        crash_dir=scratch / CRASHES if scratch is not None else None,
    )
