"""The process from which the workers of this machine are forked.

It imports what workers need once, while the driver reads headers. A worker that is forked from it is ready at once, and
shares the memory of the libraries with the others.
"""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from typing import Final

log = logging.getLogger(__name__)

FORK: Final = "forkserver"
SPAWN: Final = "spawn"
"""How Dask starts a worker: values of ``distributed.worker.multiprocessing-method``."""

PRELOADED: Final = "sgclassify.pipeline.cluster.preloaded"
"""Module that the process imports as it starts."""

SURROUNDINGS: Final[Mapping[str, str]] = {
    # new processes would look for modules in the working folder first, which holds data
    "PYTHONSAFEPATH": "1",
    # Dask sets these for its workers, too late for libraries that are imported before the fork
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
"""Environment variables of the process."""


def start() -> str:
    """Start the process unless it runs; returns how workers are to be started: `FORK`, or `SPAWN` if it cannot run.

    It ends by itself, once the driver and all workers have ended.
    """
    forkserver.set_forkserver_preload([PRELOADED])
    # what a terminal sends to all its processes is left to the driver, which ends the others in order
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP, signal.SIGINT})
    try:
        with surroundings(SURROUNDINGS):
            # the process in which Python counts semaphores comes first, as the other uses it
            resource_tracker.ensure_running()
            forkserver.ensure_running()
    except OSError as error:
        # its socket lies in the temporary folder, whose path may be too long for one
        log.debug("workers are started one by one: %s", error)
        return SPAWN
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    return FORK


@contextmanager
def surroundings(given: Mapping[str, str]) -> Iterator[None]:
    """Environment of new processes: these variables, and none of the user's settings of Dask, which are for others."""
    before = {name: os.environ.get(name) for name in (*os.environ, *given) if name.startswith("DASK_") or name in given}
    for name in before:
        os.environ.pop(name, None)
    os.environ.update(given)
    try:
        yield
    finally:
        for name in (*given, *(name for name in os.environ if name.startswith("DASK_"))):
            os.environ.pop(name, None)
        os.environ.update({name: value for name, value in before.items() if value is not None})
