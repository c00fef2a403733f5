"""The loop that keeps jobs in flight, against a cluster without processes."""

from __future__ import annotations

import errno
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgclassify.pipeline.cluster.dispatch import Outcome, dispatch
from sgclassify.pipeline.errors import TaskKilledError, TaskTimeoutError
from sgclassify.pipeline.record.record import Failure
from sgclassify.stages.errors import ClusterError, ModelError, UnusableInputError


class FakeFuture:
    """A future with its result."""

    def __init__(self, result: Any) -> None:
        self.value = result
        self.cancelled = False

    def cancel(self) -> None:
        self.cancelled = True


class FakeCluster:
    """Ends the futures in flight in a random order."""

    def __init__(self, seed: int = 0) -> None:
        self.random = random.Random(seed)
        self.most = 0
        self.waited_for: list[int] = []
        self.futures: list[FakeFuture] = []

    def submit(self, result: Any) -> FakeFuture:
        self.futures.append(FakeFuture(result))
        return self.futures[-1]

    def wait_any(self, futures: set[Any]) -> set[Any]:
        self.most = max(self.most, len(futures))
        self.waited_for.append(len(futures))
        waiting = sorted(futures, key=id)
        return set(self.random.sample(waiting, self.random.randint(1, len(waiting))))

    def outcome(self, future: Any) -> tuple[Any, BaseException | None, str]:
        if isinstance(future.value, BaseException):
            return None, future.value, "the traceback"
        return future.value, None, ""


@settings(deadline=None, max_examples=30)
@given(n=st.integers(0, 40), in_flight=st.integers(1, 7), seed=st.integers(0, 1000))
def test_every_job_once_and_never_too_many_in_flight(n: int, in_flight: int, seed: int) -> None:
    cluster = FakeCluster(seed)
    outcomes = {
        done.job: done.result for done in dispatch(cluster, range(n), lambda job: cluster.submit(job * job), in_flight)
    }
    assert outcomes == {k: k * k for k in range(n)}
    assert cluster.most <= in_flight
    assert len(cluster.futures) == n


def test_jobs_are_taken_as_they_are_needed() -> None:
    taken: list[int] = []

    def jobs() -> Any:
        for k in range(100):
            taken.append(k)
            yield k

    cluster = FakeCluster()
    outcomes = dispatch(cluster, jobs(), cluster.submit, 3)
    next(outcomes)
    assert len(taken) <= 6
    outcomes.close()
    assert any(future.cancelled for future in cluster.futures)


def test_unexpected_error_is_tried_again() -> None:
    cluster = FakeCluster()
    results = iter([OSError("stale handle"), "fine"])
    done = list(dispatch(cluster, ["a"], lambda _: cluster.submit(next(results)), 1))
    assert done == [Outcome("a", "fine", 2)]


def test_unexpected_error_twice_sets_aside_with_its_traceback() -> None:
    cluster = FakeCluster()
    results = iter([OSError("stale handle"), ZeroDivisionError("x / 0"), "never"])
    (done,) = dispatch(cluster, ["a"], lambda _: cluster.submit(next(results)), 1)
    assert (done.job, done.attempts) == ("a", 2)
    advice = done.result.advice
    assert done.result == Failure("", "unexpected ZeroDivisionError: x / 0", advice, "the traceback")


def test_unusable_input_is_final() -> None:
    cluster = FakeCluster()
    error = UnusableInputError("/a.fits", "truncated", "copy it again")
    outcomes = list(dispatch(cluster, ["a"], lambda _: cluster.submit(error), 1))
    assert outcomes == [Outcome("a", Failure("/a.fits", "truncated", "copy it again"), 1)]
    assert len(cluster.futures) == 1


@pytest.mark.parametrize("error", [ModelError("another model"), ClusterError("lost")])
def test_errors_that_no_other_job_escapes_end_the_run(error: Exception) -> None:
    cluster = FakeCluster()
    with pytest.raises(type(error)):
        list(dispatch(cluster, ["a", "b"], lambda _: cluster.submit(error), 2))


@pytest.mark.parametrize("death", [TaskKilledError(), TaskTimeoutError("b", 9.0)])
def test_what_was_on_a_dead_worker_is_tried_again_alone(death: Exception) -> None:
    cluster = FakeCluster(seed=3)
    tried: list[str] = []
    deaths = {"killer": 9, "innocent": 1}

    def submit(job: str) -> FakeFuture:
        tried.append(job)
        deaths[job] = deaths.get(job, 0) - 1
        return cluster.submit(death if deaths[job] >= 0 else job)

    jobs = ["a", "killer", "b", "innocent", "c", "d"]
    done = {one.job: one for one in dispatch(cluster, jobs, submit, 4)}
    assert {name for name, one in done.items() if isinstance(one.result, Failure)} == {"killer"}
    assert done["killer"].attempts == done["innocent"].attempts == 2
    assert sorted(tried[-2:]) == ["innocent", "killer"], "the suspects come last"
    assert cluster.waited_for[-2:] == [1, 1], "and one at a time"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_ends_the_run(number: int) -> None:
    cluster = FakeCluster()
    error = OSError(number, "the disk is full")
    with pytest.raises(ClusterError, match="goes on from here"):
        list(dispatch(cluster, ["a", "b"], lambda _: cluster.submit(error), 1))
