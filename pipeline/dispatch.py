"""Keep a bounded number of jobs in flight on the cluster, try failures again, and hand back every outcome."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

from sgclassify.pipeline.record import Failure
from sgclassify.stages.errors import ClusterError, ModelError, SgClassifyError

log = logging.getLogger(__name__)

ATTEMPTS = 2
"""Times that a job is tried: an unexpected error may be the machine's and not the data's."""

Job = TypeVar("Job")


class Waiting(Protocol):
    """The part of `sgclassify.pipeline.cluster.Cluster` that is needed here."""

    def wait_any(self, futures: set[Any]) -> set[Any]:
        """Futures that are done, at least one."""
        ...

    def outcome(self, future: Any) -> tuple[Any, BaseException | None, str]:
        """Result, error and traceback of a future that is done."""
        ...


def dispatch(
    cluster: Waiting, jobs: Iterable[Job], submit: Callable[[Job], Any], in_flight: int
) -> Iterator[tuple[Job, Any | Failure]]:
    """Run jobs with at most ``in_flight`` of them on the cluster.

    Parameters
    ----------
    cluster : Cluster
    jobs : iterable
    submit : callable
        Submits a job; returns the future of its receipt.
    in_flight : int
        Jobs on the cluster at a time.

    Yields
    ------
    job, outcome
        In the order in which they end. The outcome is the receipt, or the `Failure` that the job is set aside
        for. An error that was raised on purpose is final; any other is tried once more.

    Raises
    ------
    ModelError, ClusterError
        From a job: no other job can do better.
    """
    waiting = iter(jobs)
    flying: dict[Any, tuple[Job, int]] = {}
    try:
        while True:
            while len(flying) < in_flight:
                try:
                    job = next(waiting)
                except StopIteration:
                    break
                flying[submit(job)] = (job, 1)
            if not flying:
                return
            for future in cluster.wait_any(set(flying)):
                job, attempt = flying.pop(future)
                result, error, trace = cluster.outcome(future)
                if error is None:
                    yield job, result
                elif isinstance(error, (ModelError, ClusterError)):
                    raise error
                elif isinstance(error, SgClassifyError) or attempt >= ATTEMPTS:
                    yield job, Failure.from_error(error, trace)
                else:
                    log.info("%s: %r, tried again", job, error)
                    flying[submit(job)] = (job, attempt + 1)
    finally:
        for future in flying:
            future.cancel()
