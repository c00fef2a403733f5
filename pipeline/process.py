"""This process, of the driver or of a worker: its name, its memory, a limit to its time."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from sgclassify.stages.write.atomic import write_atomic_text

STUCK: Final = 70
"""Exit status of a process that ended itself in `time_limit`."""

_NOTE_S: Final = 5.0

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
KEPT_BYTES: Final = 2**26
"""Freed memory at the end of the heap that a worker keeps, 67 MB. More costs peak memory and wins no time."""
LARGEST_KEPT: Final = 2**24
"""Arrays up to this size come from kept memory, 17 MB. The C library allows 34 MB at most."""


def process_name() -> str:
    """Host and process number."""
    return f"{socket.gethostname()}:{os.getpid()}"


def peak_mib() -> float:
    """Largest resident memory of this process so far, MiB (Linux counts in KiB)."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def keep_freed_memory() -> None:
    """Let this process use freed memory again, rather than hand every array back to the system.

    Dask sets the C library of its workers to hand back all but 64 KiB. Each new array is then mapped and zeroed anew, a
    page fault for every 4 KiB, which costs more time than most of what is done with the array.
    """
    # other C libraries than that of GNU have no mallopt
    with contextlib.suppress(AttributeError, OSError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT)
        mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES)


@contextmanager
def time_limit(seconds: float, what: str, note: Path) -> Iterator[None]:
    """End this process if the block takes too long: nothing else ends a thread that is stuck in a read.

    The limit is off at 0 or less. Before the process ends it writes the file `note`, JSON: ``what`` is done,
    ``seconds``, ``pid``, ``time``.
    """
    if seconds <= 0:
        yield
        return
    watchdog = threading.Timer(seconds, _end, (seconds, what, note))
    watchdog.daemon = True
    watchdog.start()
    try:
        yield
    finally:
        watchdog.cancel()


def _end(seconds: float, what: str, note: Path) -> None:
    def write() -> None:
        content = {"what": what, "seconds": seconds, "pid": os.getpid(), "time": time.time()}
        note.parent.mkdir(parents=True, exist_ok=True)
        write_atomic_text(json.dumps(content), note)

    # in a thread, as the note may lie on the very disk that hangs
    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    writer.join(_NOTE_S)
    os._exit(STUCK)
