"""Run a command and account for all the processes that it starts."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_SUBREAPER: Final = 36
"""PR_SET_CHILD_SUBREAPER of Linux' prctl."""

_POLL_S: Final = 0.01
_ORPHANS_S: Final = 10.0


@dataclass(frozen=True)
class Usage:
    """What a command cost.

    Attributes
    ----------
    wall_s, cpu_s : float
        Time, and CPU time of all its processes, user and system.
    first_s : float
        Time to the first file of the kind that was asked for; NaN if there was none.
    code : int
        Exit status.
    output, errors : str
        What it printed.
    """

    wall_s: float
    cpu_s: float
    first_s: float
    code: int
    output: str
    errors: str


def adopt_orphans() -> None:
    """Become the parent of descendants whose own parent has ended, so that their CPU time is seen (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_SUBREAPER, 1, 0, 0, 0)


def run(
    command: Sequence[str], env: Mapping[str, str] | None = None, folder: Path | None = None, pattern: str = ""
) -> Usage:
    """Run a command to its end.

    Parameters
    ----------
    env : mapping, optional
        Its whole environment.
    folder, pattern : Path and str, optional
        Folder, and pattern of the files in it, at whose appearance the clock of ``first_s`` stops.
    """
    adopt_orphans()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        start = time.monotonic()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env)
        watch = _Watch(folder, pattern, start)
        watch.start()
        _, status, own = os.wait4(process.pid, 0)
        wall = time.monotonic() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        first = watch.end()
        cpu = own.ru_utime + own.ru_stime + _orphans()
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read().decode("utf-8", "replace"))
    return Usage(wall, cpu, first, process.returncode, texts[0], texts[1])


def _orphans() -> float:
    """CPU time of the processes that a command has left behind, once they have ended."""
    cpu, start = 0.0, time.monotonic()
    while time.monotonic() - start < _ORPHANS_S:
        try:
            pid, _, usage = os.wait4(-1, os.WNOHANG)
        except ChildProcessError:
            break
        if pid:
            cpu += usage.ru_utime + usage.ru_stime
        else:
            time.sleep(_POLL_S)
    return cpu


class _Watch(threading.Thread):
    """Looks for the first file of a pattern in a folder."""

    def __init__(self, folder: Path | None, pattern: str, start: float) -> None:
        super().__init__(daemon=True)
        self._folder, self._pattern, self._since = folder, pattern, start
        self._first = float("nan")
        self._over = threading.Event()

    def run(self) -> None:
        while self._folder is not None and not self._over.wait(_POLL_S):
            # a folder may go while it is looked through
            try:
                found = any(True for _ in self._folder.glob(self._pattern))
            except OSError:
                found = False
            if found:
                self._first = time.monotonic() - self._since
                return

    def end(self) -> float:
        self._over.set()
        self.join()
        if self._first != self._first and self._folder is not None and any(self._folder.glob(self._pattern)):
            self._first = time.monotonic() - self._since
        return self._first
