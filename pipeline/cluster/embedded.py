"""The Dask cluster that a run starts on this machine, independent of the user's settings of Dask."""

from __future__ import annotations

import copy
import errno
import logging
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import dask
from dask.system import cpu_count
from distributed import Nanny, Scheduler, SpecCluster
from distributed.system import MEMORY_LIMIT

from sgclassify.pipeline.cluster import forks
from sgclassify.pipeline.cluster.crash import CRASH_DIR
from sgclassify.pipeline.cluster.worker import CPU, GPU
from sgclassify.stages.errors import ClusterError

log = logging.getLogger(__name__)

CRASHES: Final = "crashes"
"""Folder below that of the workers for what they leave when they crash."""

STARTS: Final = 3
"""Times that the cluster is started before the run gives up."""

HOST: Final = "127.0.0.1"
_CONFIG: Final = "DASK_INTERNAL_INHERIT_CONFIG"
"""Dask's variable for the configuration of new processes."""

_ANSWER_S: Final = 5.0
_PROBE_S: Final = 60.0

# Pausing a worker for memory can stall a run for ever. The nanny ends a worker that is really too large; its
# tasks fail at once, and the dispatcher tries each of them again alone.
SETTINGS: Final[dict[str, object]] = {
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": 0.95,
    "distributed.scheduler.allowed-failures": 0,
    "distributed.worker.daemon": True,
    "distributed.worker.multiprocessing-method": forks.FORK,
    "distributed.admin.system-monitor.gil.enabled": False,
    "distributed.comm.timeouts.connect": "30s",
}
"""What differs from Dask's own defaults."""

_GPU_NODES: Final = ("nvidia[0-9]*", "nvhost-*", "kfd", "dxg")
"""Devices of the drivers that torch can use: NVIDIA's, Tegra's, AMD's, and that of Windows' subsystem."""

_PROBE: Final = "import distributed.nanny, sgclassify.pipeline.cluster.worker"
"""What a worker process imports before it can report anything."""


@contextmanager
def embedded(n_cpu: int, n_gpu: int, scratch: Path) -> Iterator[SpecCluster]:
    """A cluster of processes on this machine that listens on the loopback interface only.

    Its workers do CPU tasks or have a GPU each; their files go into `scratch`. `ClusterError` if it does not start.
    """
    _check_loopback()
    _check_temporary()
    with _own_surroundings(forks.start()):
        cluster = _started(n_cpu, n_gpu, scratch)
        scheduler_log = logging.getLogger("distributed.scheduler")
        scheduler_log.addFilter(_is_news)
        try:
            yield cluster
        finally:
            cluster.close(timeout=30)
            scheduler_log.removeFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    """False for the traceback of a scheduler that reports to a client that has left: the driver, which ends the run."""
    return not str(record.msg).startswith("Closed comm")


def default_workers() -> int:
    """One worker per core that this process may use, by its affinity and by the quota of its control group."""
    return max(1, cpu_count())


def count_gpus() -> int:
    """GPUs that torch can use on this machine."""
    # torch is imported only where a driver is there: that takes seconds
    if sys.platform == "linux" and not any(path for name in _GPU_NODES for path in Path("/dev").glob(name)):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


@contextmanager
def _own_surroundings(method: str) -> Iterator[None]:
    """Dask's own defaults and `SETTINGS`, here and in the processes that start while the context is open.

    `method` is how workers are started, see `sgclassify.pipeline.cluster.forks.start`.

    The user's configuration is meant for existing clusters. A new process reads it from files and environment, but the
    configuration in Dask's own variable goes first.
    """
    ours: dict[str, Any] = {}
    dask.config.refresh(config=ours, paths=[], env={})
    dask.config.set({**SETTINGS, "distributed.worker.multiprocessing-method": method}, config=ours)
    config, before = dask.config.config, copy.deepcopy(dask.config.config)
    with forks.surroundings({**forks.SURROUNDINGS, _CONFIG: dask.config.serialize(ours)}):
        config.clear()
        config.update(ours)
        try:
            yield
        finally:
            config.clear()
            config.update(before)


def _check_loopback() -> None:
    """Workers that cannot reach the scheduler would try for minutes without a reason."""
    try:
        with socket.create_server((HOST, 0)) as server:
            socket.create_connection(server.getsockname(), timeout=_ANSWER_S).close()
    except OSError as error:
        raise ClusterError(
            f"the workers of this machine cannot start: its loopback interface does not work ({HOST}: "
            f"{error.strerror or error}); bring it up, say with `ip link set lo up`"
        ) from error


def _check_temporary() -> None:
    """Workers unpack compressed images into temporary files."""
    try:
        tempfile.gettempdir()
    except OSError as error:
        raise ClusterError(
            f"the workers of this machine cannot start: temporary files cannot be written ({error.strerror or error}); "
            "make room there, or name another folder in TMPDIR"
        ) from error


def _started(n_cpu: int, n_gpu: int, scratch: Path) -> SpecCluster:
    """The cluster, tried again where a worker process ends while it starts."""
    cpu = {f"cpu-{k}": _worker(scratch, {CPU: 1}, {"CUDA_VISIBLE_DEVICES": ""}) for k in range(n_cpu)}
    gpu = {f"gpu-{k}": _worker(scratch, {GPU: 1}, {"CUDA_VISIBLE_DEVICES": _gpu(k)}) for k in range(n_gpu)}
    # port 0 also for the HTTP server that a scheduler always has: a fixed one may be taken
    listening = {"host": HOST, "port": 0, "dashboard": False, "dashboard_address": f"{HOST}:0"}
    for attempt in range(1, STARTS + 1):
        try:
            return SpecCluster(  # type: ignore[no-untyped-call]
                scheduler={"cls": Scheduler, "options": listening},
                workers={**cpu, **gpu},
                silence_logs=logging.CRITICAL,
            )
        except (RuntimeError, OSError) as error:
            if reason := _cause(error) or _probed():
                raise ClusterError(f"the workers of this machine do not start: {reason}") from error
            fault = error
            log.warning("the workers of this machine did not start (%s), attempt %d", error, attempt)
    raise ClusterError(
        f"the workers of this machine do not start ({fault}); is there memory and room for {n_cpu + n_gpu} "
        "processes? --workers N starts fewer"
    ) from fault


def _cause(error: BaseException) -> str:
    """What the system refused, below Dask's own errors; empty if unknown, or if another attempt may help."""
    while (cause := error.__cause__ or error.__context__) is not None:
        error = cause
    if not isinstance(error, OSError) or error.errno in (None, errno.EAGAIN, errno.ENOMEM):
        return ""
    return "" if isinstance(error, ConnectionError | TimeoutError) else str(error)


def _probed() -> str:
    """Why a new process cannot import what a worker needs: its last line; empty if it can."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, errors="replace", timeout=_PROBE_S,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"a new process has not imported the software within {_PROBE_S:g} s; look after the disk it lies on"
    except OSError as error:
        return f"the system starts no new process ({error.strerror}); --workers N starts fewer"
    if done.returncode == 0:
        return ""
    if done.returncode < 0:
        return f"a new process was ended by signal {-done.returncode} while it imported the software"
    lines = done.stderr.strip().splitlines()
    return f"a new process cannot import the software: {lines[-1] if lines else done.returncode}"


def _worker(scratch: Path, resources: dict[str, float], env: dict[str, str]) -> dict[str, Any]:
    return {
        "cls": Nanny,
        "options": {
            "host": HOST,
            "nthreads": 1,
            "dashboard": False,
            "resources": resources,
            # of the forked worker: what its parent was given is older than the cluster
            "env": {**env, _CONFIG: os.environ[_CONFIG], CRASH_DIR: str(scratch / CRASHES)},
            "local_directory": str(scratch),
            # that of the whole machine, so that one large tile may use what is free
            "memory_limit": int(MEMORY_LIMIT),
            "silence_logs": logging.CRITICAL,
            "preload": ["sgclassify.pipeline.cluster.worker"],
        },
    }


def _gpu(number: int) -> str:
    """Value of CUDA_VISIBLE_DEVICES for one of the visible GPUs, by its number among them."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return visible[number] if number < len(visible) else str(number)
