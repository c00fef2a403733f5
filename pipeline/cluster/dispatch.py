"""Keep a bounded number of jobs on the cluster, try failures again, and return every outcome."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Generic, Protocol, TypeVar

from sgclassify.pipeline.errors import TaskKilledError, TaskTimeoutError
from sgclassify.pipeline.record.record import Failure
from sgclassify.stages.errors import ClusterError, ModelError, SgClassifyError

log = logging.getLogger(__name__)

ATTEMPTS = 2
"""Times that a job is tried: an unexpected error may come from the machine, not from the data."""

_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EROFS})
"""Errors of a file system to which no other job can write either."""

Job = TypeVar("Job")


class Waiting(Protocol):
    """What is needed here of `sgclassify.pipeline.cluster.handle.Cluster`."""

    def wait_any(self, futures: set[Any]) -> set[Any]:
        """Futures that are done, at least one."""
        ...

    def outcome(self, future: Any) -> tuple[Any, BaseException | None, str]:
        """Result, error and traceback of a future that is done."""
        ...


@dataclass(frozen=True)
class Outcome(Generic[Job]):
    """What became of a job: the receipt, or the `Failure` that it is set aside for, and how often it was tried."""

    job: Job
    result: Any
    attempts: int


def dispatch(
    cluster: Waiting, jobs: Iterable[Job], submit: Callable[[Job], Any], in_flight: int
) -> Iterator[Outcome[Job]]:
    """Run jobs with at most ``in_flight`` of them on the cluster; ``submit`` returns the future of a job's receipt.

    Yields
    ------
    Outcome
        In the order in which they end. An error that was raised on purpose is final. After any other, the job is
        tried once more; a job that was on a worker whose process ended, alone and when all others are done. So a
        job that kills its worker harms no other.

    Raises
    ------
    ModelError, ClusterError
        From a job: no other job can do better. A full disk counts as a fault of the cluster.
    """
    waiting = iter(jobs)
    suspects: list[Job] = []
    flying: dict[Any, tuple[Job, int]] = {}
    try:
        while True:
            while len(flying) < in_flight:
                try:
                    job = next(waiting)
                except StopIteration:
                    break
                flying[submit(job)] = (job, 1)
            if not flying and suspects:
                job = suspects.pop(0)
                log.info("%s: tried once more, alone", job)
                flying[submit(job)] = (job, 2)
            if not flying:
                return
            for future in cluster.wait_any(set(flying)):
                job, attempt = flying.pop(future)
                result, error, trace = cluster.outcome(future)
                if error is None:
                    yield Outcome(job, result, attempt)
                elif isinstance(error, (ModelError, ClusterError)):
                    raise error
                elif isinstance(error, OSError) and error.errno in _FULL:
                    raise ClusterError(
                        f"{job}: cannot be written ({error}); make room for products and for temporary files (TMPDIR),"
                        " or mend the file system, and run the same command again: it goes on from here"
                    )
                elif isinstance(error, (TaskKilledError, TaskTimeoutError)) and attempt < ATTEMPTS:
                    suspects.append(job)
                elif isinstance(error, SgClassifyError) or attempt >= ATTEMPTS:
                    yield Outcome(job, Failure.from_error(error, trace), attempt)
                else:
                    log.info("%s: %r, tried again", job, error)
                    flying[submit(job)] = (job, attempt + 1)
    finally:
        for future in flying:
            future.cancel()
