"""This process, of the driver or of a worker: its name, its memory, a limit to its time."""

from __future__ import annotations

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


def process_name() -> str:
    """Host and process number."""
    return f"{socket.gethostname()}:{os.getpid()}"


def peak_mib() -> float:
    """Largest resident memory of this process so far, MiB (Linux counts in KiB)."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


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
