"""A cluster that does its tasks at once, in the process of the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from sgclassify.pipeline.cluster import handle


class Future:
    """Of a task that is done; a task of a future that failed fails like it."""

    def __init__(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        self.error: BaseException | None = None
        self.value: Any = None
        for argument in arguments:
            for one in argument if isinstance(argument, list) else [argument]:
                if isinstance(one, Future) and one.error is not None:
                    self.error = one.error
                    return
        try:
            self.value = function(*(_value(argument) for argument in arguments))
        except Exception as error:  # noqa: BLE001
            self.error = error

    def cancel(self) -> None:
        pass


def _value(argument: Any) -> Any:
    if isinstance(argument, list):
        return [_value(one) for one in argument]
    return argument.value if isinstance(argument, Future) else argument


class InlineCluster:
    """What a run needs of a cluster; `done` are the tasks that were submitted: their names and first arguments."""

    n_slots = 2
    cpu: dict[str, float] = {}  # noqa: RUF012
    inference: dict[str, float] = {}  # noqa: RUF012
    device = "cpu"

    def __init__(self) -> None:
        self.done: list[tuple[str, Any]] = []

    def submit(self, function: Callable[..., Any], *arguments: Any, **_: Any) -> Future:
        self.done.append((function.__name__, arguments[0]))
        return Future(function, arguments)

    def wait_any(self, futures: set[Any]) -> set[Any]:
        return set(futures)

    def outcome(self, future: Future) -> tuple[Any, BaseException | None, str]:
        return future.value, future.error, "the traceback"


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> InlineCluster:
    """The cluster of every run of this test."""
    inline = InlineCluster()

    @contextmanager
    def open_cluster(*_: Any, **__: Any) -> Iterator[InlineCluster]:
        yield inline

    monkeypatch.setattr(handle, "open_cluster", open_cluster)
    return inline
