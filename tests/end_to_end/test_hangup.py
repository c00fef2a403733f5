"""A terminal that closes while a run works."""

from __future__ import annotations

import json
import os
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


def hang_up(output: Path) -> Callable[[subprocess.Popen[str]], None]:
    """Send SIGHUP to the driver and to all that it started, as a terminal does, once tiles are computed."""

    def watch(driver: subprocess.Popen[str]) -> None:
        progress = output / ".work" / "progress.json"
        while driver.poll() is None:
            with suppress(OSError, ValueError):
                if json.loads(progress.read_text())["phase"] == "classifying tiles":
                    break
            time.sleep(0.02)
        for process in [*psutil.Process(driver.pid).children(recursive=True), driver]:
            with suppress(psutil.NoSuchProcess):
                os.kill(process.pid, signal.SIGHUP)

    return watch


def test_it_ends_in_order_and_goes_on_later(
    sgclassify: Callable[..., Any], warm: tuple[str, ...], small: Any, tmp_path: Path
) -> None:
    output = tmp_path / "output"
    ended = sgclassify(small.exposure_list, output, *small.options, watch=hang_up(output))
    assert ended.code == 128 + signal.SIGHUP, ended.stderr
    assert ended.record["exit_code"] == ended.code
    assert "Traceback" not in ended.stderr
    assert not (output / ".lock").exists()
    again = sgclassify(small.exposure_list, output, *small.options[:2], *warm)
    assert again.code == 0, again.stderr
    assert again.digests() == small.undisturbed.digests()


def test_under_nohup_it_does_not_end(sgclassify: Callable[..., Any], small: Any, tmp_path: Path) -> None:
    output = tmp_path / "output"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        done = sgclassify(small.exposure_list, output, *small.options, watch=hang_up(output))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert done.code == 0, done.stderr
    assert done.digests() == small.undisturbed.digests()
    assert done.record["counts"]["tiles_set_aside"] == 0
