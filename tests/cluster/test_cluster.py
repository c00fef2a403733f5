"""Real Dask processes: what the embedded cluster offers, what is refused, what is noticed when it breaks."""

from __future__ import annotations

import os
import pickle
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import psutil
import pytest

from sgclassify.pipeline.cluster.dispatch import dispatch
from sgclassify.pipeline.cluster.handle import Cluster, open_cluster
from sgclassify.pipeline.config import RunConfig
from sgclassify.pipeline.errors import TaskKilledError
from sgclassify.pipeline.record.record import Failure
from sgclassify.stages.errors import ClusterError, ModelError, UnusableInputError

CONFIG = RunConfig(device="cpu", worker_timeout_s=20.0)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    with open_cluster(CONFIG, scheduler=None, n_workers=2, scratch=folder / "dask", shared=folder) as opened:
        yield opened


def _submit(cluster: Cluster, function: Any) -> Any:
    return lambda job: cluster.client.submit(function, job, pure=False, resources=cluster.cpu)


def _outcomes(cluster: Cluster, function: Any, jobs: Any, in_flight: int = 2) -> dict[Any, Any]:
    return {done.job: done.result for done in dispatch(cluster, jobs, _submit(cluster, function), in_flight)}


def _unusable(job: int) -> int:
    if job == 1:
        raise UnusableInputError(f"/{job}.fits", "truncated", "copy it again")
    return job


def _model(job: int) -> int:
    raise ModelError("another model")


def _fail_once(path: str) -> str:
    marker = Path(path)
    if not marker.exists():
        marker.touch()
        raise OSError("stale handle")
    return "fine"


def _defect(job: int) -> float:
    return job / 0


def _die(job: int) -> int:
    if job == 0:
        time.sleep(2.5)  # long enough to be seen
        os._exit(11)
    return job


def _environment(job: int) -> tuple[int, str, str]:
    return (
        os.getpid(),
        os.environ.get("CUDA_VISIBLE_DEVICES", "unset"),
        os.environ.get("OMP_NUM_THREADS", "unset"),
    )


def test_embedded_cluster(cluster: Cluster) -> None:
    assert cluster.n_slots == 2
    assert cluster.device == "cpu"
    assert cluster.address.startswith("tcp://127.0.0.1:")
    outcomes = _outcomes(cluster, _environment, range(8), 4)
    assert len({pid for pid, _, _ in outcomes.values()}) == 2
    assert os.getpid() not in {pid for pid, _, _ in outcomes.values()}
    assert {rest for _, *rest in map(list, outcomes.values()) for rest in [tuple(rest)]} == {("", "1")}


def test_unusable_input_costs_its_job_only(cluster: Cluster) -> None:
    outcomes = _outcomes(cluster, _unusable, range(3))
    assert outcomes == {0: 0, 1: Failure("/1.fits", "truncated", "copy it again"), 2: 2}


def test_model_error_of_a_worker_ends_the_run(cluster: Cluster) -> None:
    with pytest.raises(ModelError, match="another model"):
        _outcomes(cluster, _model, range(3))


def test_unexpected_error_is_tried_again(cluster: Cluster, tmp_path: Path) -> None:
    job = str(tmp_path / "tried")
    assert _outcomes(cluster, _fail_once, [job]) == {job: "fine"}


def test_defect_is_set_aside_with_its_traceback(cluster: Cluster) -> None:
    failure = _outcomes(cluster, _defect, [1])[1]
    assert "ZeroDivisionError" in failure.fault
    assert "_defect" in failure.traceback


def test_error_passes_through_a_chain_of_futures(cluster: Cluster) -> None:
    def submit(job: int) -> Any:
        first = cluster.client.submit(_unusable, job, pure=False)
        return cluster.client.submit(_environment, first, pure=False)

    (done,) = dispatch(cluster, [1], submit, 2)
    assert done.result == Failure("/1.fits", "truncated", "copy it again")


def test_a_job_that_kills_its_worker_is_set_aside(tmp_path: Path) -> None:
    with open_cluster(CONFIG, scheduler=None, n_workers=1, scratch=tmp_path / "dask", shared=tmp_path) as opened:
        outcomes = _outcomes(opened, _die, range(3), 3)
    failure = outcomes.pop(0)
    assert outcomes == {1: 1, 2: 2}
    assert re.search(
        r"the worker process ended .*worker cpu-0 at tcp://127\.0\.0\.1:\d+, process \d+; "
        r"memory when last seen [\d.]+ .iB; limit \d",
        failure.fault,
    )


def _crash(job: int) -> None:
    import faulthandler
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    faulthandler._sigsegv()  # type: ignore[attr-defined]


def test_crash_is_named(tmp_path: Path) -> None:
    with open_cluster(CONFIG, scheduler=None, n_workers=1, scratch=tmp_path / "dask", shared=tmp_path) as opened:
        failure = _outcomes(opened, _crash, [0])[0]
    assert "Segmentation fault" in failure.fault
    assert "test_cluster.py" in failure.fault
    assert "in _crash" in failure.fault
    assert "report it" in failure.advice


def test_embedded_cluster_where_others_need_encryption(tmp_path: Path) -> None:
    with (
        dask.config.set({"distributed.comm.require-encryption": True}),
        open_cluster(CONFIG, scheduler=None, n_workers=1, scratch=tmp_path / "dask", shared=tmp_path) as opened,
    ):
        assert _outcomes(opened, _unusable, [2]) == {2: 2}


def _kill_workers(stop: threading.Event, limit: int, killed: list[int]) -> None:
    """Kill the worker processes of this one as they come, at most so many."""
    mine = {child.pid for child in psutil.Process().children(recursive=True)}
    while not stop.wait(0.005) and len(killed) < limit:
        for child in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                # workers are children of the process that they are forked from, which has the same command
                of_fork = child.ppid() != os.getpid() and "forkserver" in " ".join(child.cmdline())
                if child.pid not in mine and of_fork and len(killed) < limit:
                    child.kill()
                    mine.add(child.pid)
                    killed.append(child.pid)


@pytest.mark.parametrize("deaths", [1, 100])
def test_a_worker_that_dies_while_it_starts(tmp_path: Path, deaths: int) -> None:
    stop, killed = threading.Event(), list[int]()
    killer = threading.Thread(target=_kill_workers, args=(stop, deaths, killed))
    killer.start()
    try:
        if deaths == 1:
            with open_cluster(
                CONFIG, scheduler=None, n_workers=2, scratch=tmp_path / "dask", shared=tmp_path
            ) as opened:
                outcomes = [done.result for done in dispatch(opened, range(3), _submit(opened, _environment), 2)]
            assert len(outcomes) == 3
        else:
            with (
                pytest.raises(ClusterError, match="do not start"),
                open_cluster(CONFIG, scheduler=None, n_workers=1, scratch=tmp_path / "dask", shared=tmp_path),
            ):
                pass
        assert len(killed) >= 1
    finally:
        stop.set()
        killer.join()


def test_gpu_that_nobody_offers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sgclassify.pipeline.cluster.handle.count_gpus", lambda: 0)
    config = replace(CONFIG, device="gpu")
    with (
        pytest.raises(ClusterError, match="GPU"),
        open_cluster(config, scheduler=None, n_workers=1, scratch=tmp_path / "dask", shared=tmp_path),
    ):
        pass


def test_embedded_gpu_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sgclassify.pipeline.cluster.handle.count_gpus", lambda: 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    config = replace(CONFIG, device="auto")
    with open_cluster(config, scheduler=None, n_workers=1, scratch=tmp_path / "dask", shared=tmp_path) as opened:
        assert opened.device == "cuda"
        assert opened.n_slots == 1
        on_gpu = opened.client.submit(_environment, 0, pure=False, resources=opened.inference).result(timeout=20)
        on_cpu = opened.client.submit(_environment, 0, pure=False, resources=opened.cpu).result(timeout=20)
    assert on_gpu[1] == "3"
    assert on_cpu[1] == ""
    assert on_gpu[0] != on_cpu[0]


def test_no_scheduler_at_the_address(tmp_path: Path) -> None:
    config = replace(CONFIG, worker_timeout_s=0.5)
    with (
        pytest.raises(ClusterError, match="does not answer"),
        open_cluster(config, scheduler="tcp://127.0.0.1:9", n_workers=None, scratch=tmp_path, shared=tmp_path),
    ):
        pass


def test_address_that_is_none(tmp_path: Path) -> None:
    config = replace(CONFIG, worker_timeout_s=0.5)
    with (
        pytest.raises(ClusterError, match="does not answer"),
        open_cluster(config, scheduler="nowhere://x", n_workers=None, scratch=tmp_path, shared=tmp_path),
    ):
        pass


def _sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


@pytest.mark.slow
def test_outside_cluster_with_and_without_workers(outside: Any, tmp_path: Path) -> None:
    config = replace(CONFIG, worker_timeout_s=1.0)
    with (
        pytest.raises(ClusterError, match="no worker came within 1 s"),
        open_cluster(config, scheduler=outside.address, n_workers=None, scratch=tmp_path, shared=tmp_path),
    ):
        pass
    outside.worker("--resources", "GPU=1")
    config = replace(CONFIG, device="auto")
    with open_cluster(config, scheduler=outside.address, n_workers=1, scratch=tmp_path, shared=tmp_path) as opened:
        assert opened.device == "cuda"
        assert opened.inference == {"GPU": 1}
        assert opened.cpu == {}
        assert _outcomes(opened, _sleep, [0]) == {0: 0}
    with (
        pytest.raises(ClusterError, match="does not see"),
        open_cluster(CONFIG, scheduler=outside.address, n_workers=1, scratch=tmp_path, shared=_here_only(tmp_path)),
    ):
        pass


def _here_only(folder: Path) -> Path:
    """A folder that means something else in another process."""
    here = folder / "here"
    here.mkdir()
    descriptor = os.open(here, os.O_RDONLY)
    return Path(f"/proc/self/fd/{descriptor}")


@pytest.mark.slow
def test_lost_scheduler_is_noticed(outside: Any, tmp_path: Path) -> None:
    outside.worker()
    with open_cluster(CONFIG, scheduler=outside.address, n_workers=1, scratch=tmp_path, shared=tmp_path) as opened:
        future = opened.client.submit(_sleep, 60)
        outside.scheduler.send_signal(signal.SIGKILL)
        with pytest.raises(ClusterError, match=r"scheduler is lost|cancelled"):
            opened.wait_any({future})


def test_a_task_that_never_ends_is_noticed(cluster: Cluster) -> None:
    stalled = replace(cluster, stall_s=1.0)
    future = cluster.client.submit(_sleep, 4.0, pure=False, resources=cluster.cpu)
    with pytest.raises(ClusterError, match="no task has ended for 1 s"):
        stalled.wait_any({future})
    assert cluster.wait_any({future}) == {future}


@pytest.mark.slow
def test_lost_workers_are_noticed(outside: Any, tmp_path: Path) -> None:
    worker = outside.worker()
    config = replace(CONFIG, lost_workers_timeout_s=2.0)
    with open_cluster(config, scheduler=outside.address, n_workers=1, scratch=tmp_path, shared=tmp_path) as opened:
        future = opened.client.submit(_sleep, 60)
        worker.kill()
        with pytest.raises(ClusterError, match="no worker is left"):
            opened.wait_any({future})


def test_errors_cross_process_borders() -> None:
    for error in (
        UnusableInputError("/a", "b", "c"),
        TaskKilledError("y"),
        ClusterError("x"),
        ModelError("x"),
    ):
        back = pickle.loads(pickle.dumps(error))
        assert type(back) is type(error)
        assert str(back) == str(error)
        assert vars(back) == vars(error)
