"""Clusters of others, in real processes: what the preflight refuses, who comes late, who leaves."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import pytest

from sgclassify.pipeline.cluster.dispatch import dispatch
from sgclassify.pipeline.cluster.handle import Cluster, open_cluster
from sgclassify.pipeline.config import RunConfig
from sgclassify.stages.errors import ClusterError, ModelError

pytestmark = [pytest.mark.slow, pytest.mark.faults]

CONFIG = RunConfig(device="cpu", worker_timeout_s=20.0, batch_size=4)

Open = Callable[..., AbstractContextManager[Cluster]]


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    """``opened(address, device="cpu", n_workers=1, ...)`` opens a cluster of others."""

    def open_it(scheduler: str | None, n_workers: int = 1, **given: Any) -> AbstractContextManager[Cluster]:
        names = {field.name for field in dataclasses.fields(RunConfig)}
        config = replace(CONFIG, **{name: value for name, value in given.items() if name in names})
        rest = {name: value for name, value in given.items() if name not in names}
        return open_cluster(config, scheduler=scheduler, n_workers=n_workers, scratch=tmp_path, shared=tmp_path, **rest)

    return open_it


def refusal(cluster: AbstractContextManager[Cluster], kind: type[Exception] = ClusterError) -> str:
    """Why a cluster is refused."""
    with pytest.raises(kind) as caught, cluster:
        pass
    return str(caught.value)


def wait_for(condition: Callable[[], Any], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def pid_after(seconds: float) -> int:
    time.sleep(seconds)
    return os.getpid()


def pids(cluster: Cluster, n: int, seconds: float = 0.2) -> list[int]:
    """Processes that did `n` tasks."""

    def submit(_: int) -> Any:
        return cluster.client.submit(pid_after, seconds, pure=False, resources=cluster.cpu)

    return [done.result for done in dispatch(cluster, range(n), submit, n)]


# What is not there


@pytest.mark.parametrize("device", ["auto", "gpu"])
def test_no_worker_with_a_gpu(outside: Any, opened: Open, device: str) -> None:
    outside.worker()
    start = time.monotonic()
    message = refusal(opened(outside.address, device=device))
    assert time.monotonic() - start < 15
    assert f"dask worker {outside.address} --nthreads 1 --resources GPU=1" in message
    assert "--device cpu" in message


def test_cpu_tasks_keep_to_workers_that_offer_it(outside: Any, opened: Open) -> None:
    workers = [
        outside.worker("--resources", "CPU=1"),
        outside.worker("--resources", "GPU=1"),
        outside.worker(),
    ]
    with opened(outside.address, 3, device="auto") as cluster:
        assert (cluster.n_slots, cluster.cpu, cluster.inference) == (1, {"CPU": 1}, {"GPU": 1})
        assert set(pids(cluster, 6)) == {workers[0].pid}


# Scheduler files


def test_scheduler_file(outside: Any, opened: Open, tmp_path: Path) -> None:
    outside.worker()
    late = tmp_path / "late.json"

    def write() -> None:
        late.write_text('{"addr')
        time.sleep(0.5)
        late.write_bytes(outside.file.read_bytes())

    timer = threading.Timer(0.5, write)
    timer.start()
    with opened(None, scheduler_file=late) as cluster:
        assert cluster.crash_dir is None
        assert cluster.address == outside.address
        assert len(pids(cluster, 1)) == 1
    timer.join()


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "is not there"),
        ("junk", "is not what"),
        ("[1]", "is not what"),
        ("{}", "is not what"),
        ('{"address": 3}', "names no address"),
        ('{"address": "tcp://127.0.0.1:9"}', "may be left from a scheduler that has ended"),
    ],
)
def test_scheduler_file_that_is_of_no_use(opened: Open, tmp_path: Path, content: str | None, fault: str) -> None:
    file = tmp_path / "scheduler.json"
    if content is not None:
        file.write_text(content)
    message = refusal(opened(None, scheduler_file=file, worker_timeout_s=0.5))
    assert str(file) in message
    assert fault in message


# Versions


def preload(folder: Path, code: str) -> tuple[str, str]:
    """Options of a worker that runs this code as it starts."""
    path = folder / f"preload{len(list(folder.glob('preload*')))}.py"
    path.write_text(code)
    return "--preload", str(path)


def other_version(folder: Path, **other: str) -> tuple[str, str]:
    return preload(
        folder,
        f"from sgclassify.pipeline.cluster import worker\nours = worker.versions()\n"
        f"worker.versions = lambda: {{**ours, **{other!r}}}\n",
    )


@pytest.mark.parametrize("name", ["sgclassify", "sgclassify code", "python", "distributed"])
def test_worker_of_another_version(outside: Any, opened: Open, tmp_path: Path, name: str) -> None:
    outside.worker(*other_version(tmp_path, **{name: "0.0.7"}))
    message = refusal(opened(outside.address))
    assert "worker tcp://127.0.0.1:" in message
    assert f"runs {name} 0.0.7, this is" in message


def test_refusal_is_heard_where_the_worker_lacks_the_plugin(
    outside: Any, opened: Open, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lacking(_: Any, name: str) -> None:
        raise KeyError(name)

    monkeypatch.setattr("distributed.Client.unregister_worker_plugin", lacking)
    outside.worker(*other_version(tmp_path, sgclassify="0.0.7"))
    assert "runs sgclassify 0.0.7, this is" in refusal(opened(outside.address))


def test_other_numpy_is_a_notice(outside: Any, opened: Open, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    worker = outside.worker(*other_version(tmp_path, numpy="1.0"))
    wait_for(lambda: "Registered to" in outside.log(worker))
    notices: list[str] = []
    with caplog.at_level(logging.WARNING), opened(outside.address, on_notice=notices.append):
        pass
    (notice,) = notices
    assert "numpy 1.0 (here 2" in notice
    assert "1 of 1 workers" in notice
    assert [r.getMessage() for r in caplog.records if r.name.startswith("sgclassify")] == [notice]


def test_worker_without_the_software(outside: Any, opened: Open, tmp_path: Path) -> None:
    worker = outside.worker(
        *preload(tmp_path, "import sys\nsys.modules['sgclassify.pipeline.cluster.worker'] = None\n")
    )
    wait_for(lambda: "Registered to" in outside.log(worker))
    message = refusal(opened(outside.address))
    assert "worker tcp://127.0.0.1:" in message
    assert "cannot run the software" in message


# Workers that offer a GPU


@pytest.fixture(scope="module")
def model() -> Any:
    from sgclassify.model.serve.archive import default_model
    from sgclassify.model.serve.loaded import ModelRef
    from sgclassify.stages.read.checksum import sha256_of

    return ModelRef(None, sha256_of(default_model()), batch_size=4, threads=2)


def loaded(model: Any) -> tuple[int, int, str, int]:
    """On a worker: how often its model was loaded and found loaded, where it runs, its threads."""
    import torch

    from sgclassify.model.serve.loaded import classifier_of

    classifier = classifier_of(model)
    info = classifier_of.cache_info()
    return info.misses, info.hits, classifier.device.type, torch.get_num_threads()


def test_gpu_worker_is_warm_and_infers_on_its_cpu_where_torch_sees_no_gpu(
    outside: Any, opened: Open, model: Any
) -> None:
    worker = outside.worker("--resources", "GPU=1", CUDA_VISIBLE_DEVICES="")
    with opened(outside.address, device="auto", model=model) as cluster:
        assert cluster.device == "cuda"
        used = replace(model, device=cluster.device)
        future = cluster.client.submit(loaded, used, pure=False, resources=cluster.inference)
        assert future.result(timeout=60) == (1, 1, "cpu", 2)
    log = outside.log(worker)
    assert log.count("torch sees none here") == 1


def test_model_that_a_gpu_worker_does_not_have(outside: Any, opened: Open, model: Any) -> None:
    outside.worker("--resources", "GPU=1", "--name", "rose", CUDA_VISIBLE_DEVICES="")
    message = refusal(opened(outside.address, device="auto", model=replace(model, sha256="0" * 64)), ModelError)
    assert "worker rose (tcp://127.0.0.1:" in message
    assert "sha256 is" in message


FAKE_GPU = """
import types
import torch
torch.cuda.is_available = lambda: True
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_properties = lambda k: types.SimpleNamespace(uuid="of-{name}")
"""


def test_two_workers_on_one_gpu(outside: Any, opened: Open, tmp_path: Path) -> None:
    options = ["--resources", "GPU=1", *preload(tmp_path, FAKE_GPU.format(name=tmp_path.name))]
    first = outside.worker(*options)
    with opened(outside.address, device="gpu"):
        pass
    with opened(outside.address, device="gpu"):  # the same worker in the next run
        pass
    second = outside.worker(*options)
    message = refusal(opened(outside.address, 2, device="gpu"))
    assert f"used by process {first.pid} already, process {second.pid} cannot" in message
    assert "CUDA_VISIBLE_DEVICES" in message


# Coming and going


def test_worker_that_comes_late_is_used(outside: Any, opened: Open) -> None:
    first = outside.worker()
    with opened(outside.address) as cluster:
        second = outside.worker()
        assert set(pids(cluster, 40)) == {first.pid, second.pid}


@pytest.mark.parametrize("nanny", ["--nanny", "--no-nanny"])
def test_worker_that_comes_late_and_is_not_fit(outside: Any, opened: Open, tmp_path: Path, nanny: str) -> None:
    first = outside.worker()
    notices: list[str] = []
    with opened(outside.address, on_notice=notices.append) as cluster:
        late = outside.worker(*other_version(tmp_path, sgclassify="0.0.7"), nanny)
        assert set(pids(cluster, 40)) == {first.pid}
        assert late.wait(timeout=20) == 0
        wait_for(lambda: notices)
    (notice,) = notices
    assert "a worker that came late was refused and closed" in notice
    assert "runs sgclassify 0.0.7" in notice
    assert "runs sgclassify 0.0.7" in outside.log(late)


def test_worker_that_its_nanny_starts_again_is_used(outside: Any, opened: Open) -> None:
    outside.worker("--nanny", "--resources", "CPU=1")
    with opened(outside.address) as cluster:
        (first,) = set(pids(cluster, 2))
        os.kill(first, signal.SIGKILL)
        (second,) = set(pids(cluster, 2))
        assert second != first


def test_nothing_is_left_on_the_scheduler(outside: Any, opened: Open, tmp_path: Path) -> None:
    outside.worker()
    with opened(outside.address):
        pass
    assert not (tmp_path / "preflight").exists()
    other = outside.worker(*other_version(tmp_path, sgclassify="0.0.7"))
    wait_for(lambda: "Registered to" in outside.log(other))
    assert other.poll() is None


def test_all_workers_are_lost_and_others_come(outside: Any, opened: Open) -> None:
    lost = [outside.worker(), outside.worker()]
    fresh: list[subprocess.Popen[bytes]] = []
    with opened(outside.address, 2, lost_workers_timeout_s=60.0) as cluster:

        def replace_workers() -> None:
            for worker in lost:
                worker.send_signal(signal.SIGKILL)
            time.sleep(5)
            fresh.append(outside.worker())

        thread = threading.Timer(3.0, replace_workers)
        thread.start()
        done = pids(cluster, 24, 0.5)
        thread.join()
    assert len(done) == 24
    assert fresh[0].pid in done
    assert {worker.pid for worker in lost} & set(done)


# TLS


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)


def certificates(folder: Path) -> dict[str, Any]:
    """Dask's settings with a new authority and a certificate of it, by the commands of docs/clusters.md."""
    if shutil.which("openssl") is None:
        pytest.skip("certificates are made with the openssl command, which is not installed")
    folder.mkdir()
    key = ["-newkey", "rsa:3072", "-noenc"]
    openssl(
        folder,
        *["req", "-x509", *key, "-days", "3650", "-subj", "/CN=sgclassify authority"],
        *["-keyout", "authority.key", "-out", "authority.pem"],
    )
    openssl(folder, "req", *key, "-subj", "/CN=sgclassify", "-keyout", "dask.key", "-out", "dask.csr")
    openssl(
        folder,
        *[
            "x509",
            "-req",
            "-in",
            "dask.csr",
            "-days",
            "365",
            "-CA",
            "authority.pem",
            "-CAkey",
            "authority.key",
        ],
        *["-CAcreateserial", "-out", "dask.pem"],
    )
    own = {"cert": str(folder / "dask.pem"), "key": str(folder / "dask.key")}
    return {
        "ca-file": str(folder / "authority.pem"),
        **{f"{role}.{name}": path for role in ("client", "scheduler", "worker") for name, path in own.items()},
    }


def configured(settings: dict[str, Any]) -> Any:
    return dask.config.set({f"distributed.comm.tls.{name}": value for name, value in settings.items()})


def variables(settings: dict[str, Any]) -> dict[str, str]:
    return {
        "DASK_DISTRIBUTED__COMM__TLS__" + name.upper().replace(".", "__").replace("-", "_"): value
        for name, value in settings.items()
    }


@pytest.fixture
def ours(tmp_path: Path) -> dict[str, Any]:
    return certificates(tmp_path / "ours")


@pytest.fixture
def guarded(tmp_path: Path, processes: Any, ours: dict[str, Any]) -> Any:
    """A scheduler and a worker that ask for certificates."""
    started = processes(tmp_path, variables(ours), "tls://127.0.0.1")
    started.worker()
    return started


def test_tls(guarded: Any, opened: Open, ours: dict[str, Any], tmp_path: Path) -> None:
    assert guarded.address.startswith("tls://")
    with configured(ours), opened(guarded.address) as cluster:
        assert len(pids(cluster, 2)) == 2
    with configured(ours), opened(None, scheduler_file=guarded.file) as cluster:
        assert cluster.address == guarded.address
    start = time.monotonic()
    message = refusal(opened(guarded.address))
    assert "no certificates are configured" in message
    assert "DASK_DISTRIBUTED__COMM__TLS__" in message
    with configured({**ours, "ca-file": str(tmp_path / "nowhere.pem")}):
        assert "cannot be read" in refusal(opened(guarded.address))
    with configured(certificates(tmp_path / "theirs")):
        message = refusal(opened(guarded.address))
    assert "does not answer" in message
    assert "one authority" in message
    assert "a tls:// scheduler" in refusal(opened(guarded.address.replace("tls", "tcp"), worker_timeout_s=2.0))
    assert time.monotonic() - start < 20


def test_scheduler_file_is_read_as_dask_writes_it(outside: Any) -> None:
    assert json.loads(outside.file.read_text())["address"] == outside.address
