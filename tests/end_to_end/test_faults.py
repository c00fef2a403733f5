"""What goes wrong in a night: workers that die or hang over a tile, disks that fail or fill up, a lost scheduler."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sgclassify.model.judge.scores import read_objects
from sgclassify.stages.flags import SgFlag

pytestmark = [pytest.mark.slow, pytest.mark.faults]


def _run(sgclassify: Callable[..., Any], small: Any, outside: Any, output: Path, *more: str, **settings: Any) -> Any:
    model = small.options[:2]
    given = ("--scheduler-file", str(outside.file), "--workers", "1", *model, *more)
    return sgclassify(small.exposure_list, output, *given, **settings)


DEATHS = {
    "segmentation fault": "os.kill(os.getpid(), signal.SIGSEGV)",
    "killed": "os.kill(os.getpid(), signal.SIGKILL)",
    "out of memory": "hoard = [time.sleep(0.05) or bytearray(b'x') * 2**26 for _ in range(200)]",
    "hangs": "time.sleep(3600)",
}


@pytest.mark.parametrize("death", DEATHS)
def test_a_tile_that_ends_whoever_takes_it(
    sgclassify: Callable[..., Any], small: Any, outside: Any, tmp_path: Path, death: str
) -> None:
    tiles = small.undisturbed.record["tiles"]
    victim = next(tile["pixel"] for tile in tiles[len(tiles) // 2 :] if tile["n_objects"])
    outside.faulty(
        f"""
        import os, signal, time
        from sgclassify.pipeline import tasks
        extract_tile = tasks.honest = getattr(tasks, "honest", tasks.extract_tile)

        def faulty(order, pixel, *arguments, **options):
            if pixel == {victim}:
                {DEATHS[death]}
            return extract_tile(order, pixel, *arguments, **options)

        tasks.extract_tile = faulty
        """
    )
    outside.worker("--memory-limit", "2GiB")
    output = tmp_path / "output"
    done = _run(sgclassify, small, outside, output, task_timeout_s=20.0)
    assert done.code == 3, done.stderr
    aside = [tile for tile in done.record["tiles"] if tile["outcome"] != "done"]
    assert [tile["pixel"] for tile in aside] == [victim]
    assert aside[0]["attempts"] == 2
    assert ("took longer than 20 s" if death == "hangs" else "the worker process ended") in aside[0]["fault"]
    assert f"tile 13/{victim}" in done.stderr
    # all other tiles are there, as they would be without the fault
    objects = done.digests("objects")
    kept = [name for name in small.undisturbed.digests("objects") if "Npix=" in name and str(victim) not in name]
    assert all(objects[name] == small.undisturbed.digests("objects")[name] for name in kept)
    # the same command again, the fault being mended
    again = sgclassify(small.exposure_list, output, *small.options, task_timeout_s=20.0)
    assert again.code == 0, again.stderr
    assert again.digests() == small.undisturbed.digests()
    tried = {tile["pixel"] for tile in again.record["tiles"] if tile["attempts"]}
    assert tried == {victim}


@pytest.mark.parametrize("times", [1, 2])
def test_read_errors(sgclassify: Callable[..., Any], small: Any, outside: Any, tmp_path: Path, times: int) -> None:
    name = small.undisturbed.record["inputs"][0]["id"]
    outside.faulty(
        f"""
        import errno, pathlib
        from sgclassify.pipeline import tasks
        prepare_exposure = tasks.honest = getattr(tasks, "honest", tasks.prepare_exposure)
        counter = pathlib.Path({str(tmp_path / "counter")!r})

        def faulty(header, *arguments):
            failed = len(counter.read_text()) if counter.exists() else 0
            if header.exposure_id == {name!r} and failed < {times}:
                counter.write_text("x" * (failed + 1))
                raise OSError(errno.EIO, "Input/output error", str(header.files.image))
            return prepare_exposure(header, *arguments)

        tasks.prepare_exposure = faulty
        """
    )
    outside.worker()
    done = _run(sgclassify, small, outside, tmp_path / "output")
    assert done.code == (0 if times == 1 else 3), done.stderr
    one = done.inputs[name]
    assert one["attempts"] == 2
    assert one["outcome"] == ("done" if times == 1 else "set_aside")
    if times == 2:
        assert "Input/output error" in one["fault"]
        assert "disk, network" in one["advice"]
        done = _run(sgclassify, small, outside, tmp_path / "output")
        assert done.code == 0, done.stderr
    assert done.digests() == small.undisturbed.digests()


@pytest.mark.parametrize(("most", "sizes"), [(4, "16 8 4"), (0, "16 8 4 2 1 cpu")], ids=["halved", "cpu"])
def test_gpu_out_of_memory(
    sgclassify: Callable[..., Any], small: Any, outside: Any, tmp_path: Path, most: int, sizes: str
) -> None:
    # a worker whose model finds memory for no more than so many objects on what it takes for its GPU
    log = tmp_path / "sizes.txt"
    outside.faulty(
        f"""
        import torch
        from sgclassify.model.serve import runtime
        load, forward = runtime.honest = getattr(runtime, "honest", (runtime.load, runtime.Classifier._forward))

        def note(what):
            with open({str(log)!r}, "a") as file:
                print(what, file=file)

        def faulty_load(path=None, *, device="cpu", **options):
            classifier = load(path, device="cpu", **options)
            if device == "cpu":
                note("cpu")
            classifier.most = {most} if device == "cuda" else 1000
            return classifier

        def faulty_forward(self, arrays):
            most = getattr(self, "most", 1000)
            if most < 1000:
                note(self.batch_size)
            if self.batch_size > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
            return forward(self, arrays)

        runtime.load, runtime.Classifier._forward = faulty_load, faulty_forward
        """
    )
    outside.worker("--resources", "GPU=1")
    done = _run(sgclassify, small, outside, tmp_path / "output", device='"gpu"')
    assert done.code == 0, done.stderr
    assert {tile["attempts"] for tile in done.record["tiles"]} == {1}
    noted = log.read_text().split()
    assert " ".join(noted).startswith(sizes)
    assert set(noted[len(sizes.split()) :]) <= ({"4"} if most else set(sizes.split()))
    # another batch size may change the last bits of a probability, and nothing else
    good, ours = (read_objects(run.output) for run in (small.undisturbed, done))
    np.testing.assert_allclose(ours["p_star"], good["p_star"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(ours["logit"], good["logit"], rtol=0, atol=1e-4)
    probabilities = ["p_star", "p_galaxy", "logit"]
    assert ours.drop_columns(probabilities) == good.drop_columns(probabilities)


def test_probabilities_that_are_not_finite(
    sgclassify: Callable[..., Any], small: Any, outside: Any, tmp_path: Path
) -> None:
    outside.faulty(
        """
        from sgclassify.stages import classify
        score = classify.honest = getattr(classify, "honest", classify._asked)

        def faulty(scorer, inputs):
            p = score(scorer, inputs).copy()
            p[:1] = float("inf")
            return p

        classify._asked = faulty
        """
    )
    outside.worker()
    done = _run(sgclassify, small, outside, tmp_path / "output")
    assert done.code == 0, done.stderr
    good, ours = (read_objects(run.output) for run in (small.undisturbed, done))
    failed = (ours["sg_flags"].to_numpy() & int(SgFlag.NOT_FINITE)) != 0
    assert failed.sum() == sum(tile["n_objects"] > 0 for tile in done.record["tiles"])
    for name in ("p_star", "p_galaxy"):
        assert (ours[name].is_null().to_numpy() == failed).all()
        assert ours[name].filter(~failed) == good[name].filter(~failed)
    assert ours["object_id"] == good["object_id"]


def test_lost_scheduler(sgclassify: Callable[..., Any], small: Any, outside: Any, tmp_path: Path) -> None:
    outside.worker()
    output = tmp_path / "output"

    def lose(driver: subprocess.Popen[str]) -> None:
        while driver.poll() is None and not list(output.glob(".receipts/tiles/*.parquet")):
            time.sleep(0.02)
        outside.scheduler.kill()

    model = small.options[:2]
    given = ("--scheduler-file", str(outside.file), "--workers", "1", *model)
    done = sgclassify(small.exposure_list, output, *given, watch=lose)
    assert done.code == 6, done.stderr
    assert "scheduler" in done.stderr
    assert {one["outcome"] for one in done.inputs.values()} == {"pending"}
    counts, n_tiles = done.record["counts"], len(small.undisturbed.record["tiles"])
    assert counts["tiles_pending"] + counts["tiles_done"] == counts["tiles"] == n_tiles
    assert counts["tiles_pending"] > 0
    assert f"pending     3 exposures and {counts['tiles_pending']} tile" in done.stdout
    outside.start_scheduler()
    outside.worker()
    again = _run(sgclassify, small, outside, output)
    assert again.code == 0, again.stderr
    assert again.digests() == small.undisturbed.digests()
    assert any(tile["attempts"] == 0 for tile in again.record["tiles"])


def test_workers_that_die_are_replaced(
    sgclassify: Callable[..., Any], small: Any, outside: Any, tmp_path: Path
) -> None:
    first = outside.worker()
    output = tmp_path / "output"

    def replace(driver: subprocess.Popen[str]) -> None:
        while driver.poll() is None and not list(output.glob(".receipts/tiles/*.parquet")):
            time.sleep(0.02)
        os.killpg(first.pid, signal.SIGKILL)
        time.sleep(5)
        outside.worker()

    model = small.options[:2]
    given = ("--scheduler-file", str(outside.file), "--workers", "1", *model)
    done = sgclassify(small.exposure_list, output, *given, watch=replace)
    assert done.code == 0, done.stderr
    assert done.digests() == small.undisturbed.digests()


FULL = """
set -u
mount -t tmpfs -o size=200k none "$1" || exit 99
shift
"$@"
echo "full: $?" >&2
mount -o remount,size=100m "$OUTPUT" || exit 99
"$@"
code=$?
cp -r "$OUTPUT/." "$COPY"
exit $code
"""


def test_full_disk(small: Any, tmp_path: Path) -> None:
    own = ["unshare", "--mount", *(() if os.geteuid() == 0 else ("--map-root-user",))]
    if (
        shutil.which("unshare") is None
        or subprocess.run(
            [*own, "mount", "-t", "tmpfs", "none", str(tmp_path)], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("this system lets nobody mount a small file system")
    output, copy = tmp_path / "output", tmp_path / "copy"
    output.mkdir()
    copy.mkdir()
    (tmp_path / "run.toml").write_text('config_version = 1\n[run]\ntile_order = 13\nbatch_size = 16\ndevice = "cpu"\n')
    command = [
        sys.executable,
        "-m",
        "sgclassify.pipeline",
        "run",
        "--exposure-list",
        str(small.exposure_list),
    ]
    command += ["--output", str(output), "--config", str(tmp_path / "run.toml"), *small.options]
    done = subprocess.run(
        [*own, "sh", "-c", FULL, "sh", str(output), *command],
        env={**os.environ, "OUTPUT": str(output), "COPY": str(copy), "OMP_NUM_THREADS": "1"},
        check=False,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "No space left on device" in done.stderr
    assert "make room" in done.stderr
    assert "full: 6" in done.stderr
    run = type(small.undisturbed)(0, done.stdout, done.stderr, copy)
    assert run.digests() == small.undisturbed.digests()
    assert run.leftovers() == []
