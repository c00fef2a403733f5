"""Read the headers of a list of exposures, many at a time, each within a time limit."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from sgclassify.pipeline.record.record import Failure
from sgclassify.stages.errors import SlitlessExposureError
from sgclassify.stages.read.header import ExposureHeader
from sgclassify.stages.read.names import ExposureFiles

Found = ExposureHeader | SlitlessExposureError | Failure

_POLL_S: Final = 0.2
_AHEAD: Final = 256
"""Headers that are read ahead."""


class _Reading:
    """One exposure on its way through the threads."""

    def __init__(self, files: ExposureFiles) -> None:
        self.files = files
        self.started: float | None = None
        self.found: Found | None = None
        self.done = threading.Event()


def read_headers(
    files: Sequence[ExposureFiles], read: Callable[[ExposureFiles], ExposureHeader], threads: int, timeout_s: float
) -> Iterator[Found]:
    """Read headers in threads; yields one outcome for each exposure, in the order given.

    `timeout_s` is the longest time for one exposure. A thread that is stuck in a read cannot be ended: another one
    takes its place, and the program can end without it.
    """
    jobs: queue.SimpleQueue[_Reading | None] = queue.SimpleQueue()

    def work() -> None:
        while (job := jobs.get()) is not None:
            job.started = time.monotonic()
            job.found = _outcome(job.files, read)
            job.done.set()

    def start() -> None:
        threading.Thread(target=work, name="headers", daemon=True).start()

    for _ in range(min(threads, max(1, len(files)))):
        start()
    flying: list[_Reading] = []
    waiting = iter(files)
    try:
        while True:
            for one in waiting:
                flying.append(_Reading(one))
                jobs.put(flying[-1])
                if len(flying) >= _AHEAD:
                    break
            if not flying:
                return
            head = flying.pop(0)
            while not head.done.wait(_POLL_S):
                if head.started is not None and time.monotonic() - head.started > timeout_s:
                    start()
                    break
            yield head.found if head.found is not None else _stuck(head.files, timeout_s)
    finally:
        for _ in range(threads + len(files)):
            jobs.put(None)


def _outcome(files: ExposureFiles, read: Callable[[ExposureFiles], ExposureHeader]) -> Found:
    """Whatever goes wrong costs this exposure only."""
    try:
        return read(files)
    except SlitlessExposureError as error:
        return error
    except Exception as error:  # noqa: BLE001
        return Failure.from_error(error)


def _stuck(files: ExposureFiles, timeout_s: float) -> Any:
    return Failure(
        str(files.image),
        f"its headers could not be read within {timeout_s:g} s",
        "look after the disk or the network that it lies on, and run again",
    )
