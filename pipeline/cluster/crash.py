"""The stack that a worker leaves when it crashes: written by the worker, read by the driver."""

from __future__ import annotations

import faulthandler
import os
from pathlib import Path
from typing import Final

CRASH_DIR: Final = "SGCLASSIFY_CRASH_DIR"
"""Environment variable of a worker: folder for the Python stack of its threads, should it crash."""


def keep_stack(folder: Path) -> None:
    """Have Python write the stack of this process into a file of the folder if it crashes."""
    folder.mkdir(parents=True, exist_ok=True)
    # the file stays open, since it can no longer be opened in a crash
    faulthandler.enable(crash_file(folder, os.getpid()).open("w"))


def crash_file(folder: Path, pid: int) -> Path:
    """File in which the worker with this process id leaves its stack."""
    return folder / f"{pid}.txt"


def crash_of(folder: Path, pid: int) -> str:
    """What the worker with this process id left of its crash, in one line; empty if nothing."""
    try:
        lines = crash_file(folder, pid).read_text(errors="replace").splitlines()
    except OSError:
        return ""
    # "Fatal Python error: ...", then every thread, innermost frame first; the one that crashed is called current
    fault = lines[0] if lines else ""
    start = next((k for k, line in enumerate(lines) if line.startswith("Current thread")), len(lines))
    frames = [line.strip() for line in lines[start:] if line.startswith("  File ")]
    return ", in ".join(filter(None, [fault, *frames[:1]]))
