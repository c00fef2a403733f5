"""Errors of the tasks of a run: of the driver and the workers, not of the stages."""

from __future__ import annotations

from sgclassify.stages.errors import ExitCode, SgClassifyError


class TaskKilledError(SgClassifyError):
    """The worker process ended while it computed a task, every time that the scheduler tried.

    `known` is what is known of the worker and its death.
    """

    exit_code = ExitCode.SET_ASIDE
    path = ""
    advice = "its memory may not suffice: give the workers more, or choose smaller tiles (a larger tile_order)"

    def __init__(self, known: str = "") -> None:
        super().__init__(known)
        self.fault = "the worker process ended while it computed this" + (f" ({known})" if known else "")
        if "Fatal Python error" in known:
            self.advice = "a library crashed: report it, with these exposures"

    def __str__(self) -> str:
        return f"{self.fault}; {self.advice}"


class TaskTimeoutError(SgClassifyError):
    """A task took longer than `seconds`, so the worker ended itself; see `sgclassify.pipeline.process.time_limit`."""

    exit_code = ExitCode.SET_ASIDE
    path = ""
    advice = "look after the disk or the network that its files lie on and run again, or raise task_timeout_s"

    def __init__(self, what: str, seconds: float) -> None:
        super().__init__(what, seconds)
        self.fault = f"took longer than {seconds:g} s; each worker that took it ended itself"

    def __str__(self) -> str:
        return f"{self.args[0]}: {self.fault}; {self.advice}"


class StaleRunError(SgClassifyError):
    """The run that asked for this task is over; another one may be at work in its folder."""


class TaskError(Exception):
    """An unexpected error of a task, in a form that can be sent from any process to any other.

    The error itself may hold what cannot be unpickled elsewhere, or a traceback that is too deep for it. The driver
    would then never hear of the task again. `name` is that of the error's class.
    """

    def __init__(self, name: str, text: str, trace: str) -> None:
        super().__init__(name, text, trace)
        self.name = name
        self.text = text
        self.trace = trace

    def __str__(self) -> str:
        return f"{self.name}: {self.text}"
