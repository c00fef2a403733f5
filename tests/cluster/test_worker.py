"""What a worker process does beside its tasks: the lock of its GPU, its time limit, the stack of its crash."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from sgclassify.pipeline.cluster import gpu
from sgclassify.pipeline.cluster.crash import crash_file, crash_of
from sgclassify.pipeline.cluster.versions import differing, require_same, versions
from sgclassify.pipeline.process import time_limit
from sgclassify.stages.errors import ClusterError

CLAIM = (
    "import sys, time; from sgclassify.pipeline.cluster.gpu import claim; claim(sys.argv[1]); print('mine', flush=True)"
)


def test_one_process_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    env = {"TMPDIR": str(tmp_path), "PYTHONSAFEPATH": "1"}

    def start(uuid: str, code: str = CLAIM) -> Any:
        return subprocess.Popen(
            [sys.executable, "-c", code, uuid],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    with start("GPU-1", CLAIM + "; time.sleep(60)") as holder:
        assert holder.stdout.readline() == "mine\n"
        with pytest.raises(ClusterError, match=f"used by process {holder.pid} already.*CUDA_VISIBLE_DEVICES"):
            gpu.claim("GPU-1")
        with start("GPU-2") as other:
            assert other.stdout.readline() == "mine\n"
        holder.kill()
    gpu.claim("GPU-1")  # a dead process holds nothing
    gpu.claim("GPU-1")
    with start("GPU-1") as late:
        assert "ClusterError: GPU GPU-1 is used by process" in late.communicate()[1]


def test_lock_file_of_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(gpu, "_open", lambda path: _read_only(path))
    (tmp_path / "sgclassify-gpu-theirs.lock").write_text("77\n")
    gpu.claim("theirs")
    assert (tmp_path / "sgclassify-gpu-theirs.lock").read_text() == "77\n"


def _read_only(path: Path) -> int:
    import os

    return os.open(path, os.O_RDONLY)


def test_what_is_in_time_is_left_alone(tmp_path: Path) -> None:
    note = tmp_path / "note.json"
    start = time.perf_counter()
    for _ in range(100):
        with time_limit(0.5, "nothing", note), time_limit(0.0, "no limit", note):
            pass
    assert time.perf_counter() - start < 0.4
    time.sleep(0.6)
    assert not note.exists()


def test_what_takes_too_long_ends_its_process(tmp_path: Path) -> None:
    note = tmp_path / "notes" / "note.json"
    code = (
        "import os, sys; from pathlib import Path; from sgclassify.pipeline.process import time_limit\n"
        "reader, _ = os.pipe()\n"
        "with time_limit(0.3, 'reading', Path(sys.argv[1])): os.read(reader, 1)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(note)], timeout=60, check=False)
    assert done.returncode == 70
    content = json.loads(note.read_text())
    assert (content["what"], content["seconds"]) == ("reading", 0.3)
    assert content["pid"] > 0
    assert abs(time.time() - content["time"]) < 60


def test_stack_of_a_crash(tmp_path: Path) -> None:
    assert crash_of(tmp_path, 7) == ""
    crash_file(tmp_path, 7).write_text("")
    assert crash_of(tmp_path, 7) == ""
    crash_file(tmp_path, 7).write_text(
        'Fatal Python error: Bus error\n\nThread 1 [python] (most recent call first):\n  File "/a.py", line 3 in read\n'
        '  File "/b.py", line 9 in wait\n\nCurrent thread 2 [python] (most recent call first):\n'
        '  File "/c.py", line 5 in cut\n  File "/d.py", line 6 in run\n'
    )
    assert crash_of(tmp_path, 7) == 'Fatal Python error: Bus error, in File "/c.py", line 5 in cut'


def test_versions_that_matter() -> None:
    ours = versions()
    assert set(ours) == {
        "sgclassify",
        "sgclassify code",
        "python",
        "dask",
        "distributed",
        "numpy",
        "pyarrow",
        "torch",
    }
    require_same({"dask": ours["dask"]}, ours, "scheduler")
    require_same({**ours, "numpy": "1"}, ours, "worker")
    with pytest.raises(ClusterError, match=r"worker a runs dask 1\.0, this is 20"):
        require_same({**ours, "dask": "1.0"}, ours, "worker a")
    assert differing(ours, ours) == []
    assert differing({**ours, "dask": "1", "torch": "1.0"}, ours) == [f"torch 1.0 (here {ours['torch']})"]
