"""Runs in which workers, the driver or both are killed at a random moment, and the same command afterwards.

``SGCLASSIFY_KILLS`` says how many repetitions there are; each has its own seed.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.faults]

REPETITIONS = int(os.environ.get("SGCLASSIFY_KILLS", "12"))
VICTIMS = ("worker", "driver", "both")


def _workers(driver: subprocess.Popen[str]) -> list[psutil.Process]:
    """Worker processes of a driver."""
    try:
        children = psutil.Process(driver.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    found = []
    for child in children:
        try:
            # they are children of the process that they are forked from, which has the same command
            if child.ppid() != driver.pid and "forkserver" in " ".join(child.cmdline()):
                found.append(child)
        except (psutil.NoSuchProcess, psutil.ZombieProcess):
            continue
    return found


def _assassin(seed: int, seconds: float, output: Path) -> tuple[Callable[[subprocess.Popen[str]], None], str]:
    """What kills at a random moment, and whom."""
    dice = random.Random(seed)
    victim = dice.choice(VICTIMS)
    moment = dice.uniform(0.0, seconds)

    def watch(driver: subprocess.Popen[str]) -> None:
        end = time.monotonic() + moment
        while driver.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        workers = _workers(driver)
        if victim != "driver" and workers:
            chosen = dice.choice(workers)
            with suppress(psutil.NoSuchProcess):
                chosen.kill()
        if victim != "worker":
            driver.kill()

    return watch, f"{victim} after {moment:.2f} s"


@pytest.mark.parametrize("seed", range(REPETITIONS))
def test_random_kill(sgclassify: Callable[..., Any], small: Any, tmp_path: Path, seed: int) -> None:
    output = tmp_path / "output"
    watch, what = _assassin(seed, small.seconds, output)
    disturbed = sgclassify(small.exposure_list, output, *small.options, watch=watch)
    assert disturbed.code in (0, -signal.SIGKILL), f"{what}: {disturbed.stderr}"
    expected = small.undisturbed.digests()
    # what is there by now is whole, and as it will be
    there = {name: digest for name, digest in disturbed.digests().items() if not _is_part(name)}
    assert all(expected.get(name) == digest for name, digest in there.items() if _is_data(name)), what
    again = sgclassify(small.exposure_list, output, *small.options)
    assert again.code == 0, f"{what}: {again.stderr}"
    assert again.digests() == expected, what
    assert again.leftovers() == [], what
    kept = {tile["pixel"] for tile in again.record["tiles"] if tile["attempts"] == 0}
    if disturbed.code == 0:
        assert len(kept) == len(again.record["tiles"]), f"{what}: a complete run computes nothing again"


def _is_part(name: str) -> bool:
    return name.endswith(".part") or "/.finish-" in name


def _is_data(name: str) -> bool:
    return Path(name).suffix == ".parquet"
