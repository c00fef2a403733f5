"""Progress of a run: log lines, and a bar on a terminal."""

from __future__ import annotations

import functools
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

log = logging.getLogger(__name__)

Observer = Callable[[str, int, int], None]

LOGGER: Final = "sgclassify"
_SECONDS_BETWEEN_LINES: Final = 10.0
# Attributes of every LogRecord; all others were given by ``extra=`` and belong into a JSON line.
_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time (UTC), level, logger, message, and the fields given as ``extra``."""

    def format(self, record: logging.LogRecord) -> str:
        """Format a record."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line.update((key, value) for key, value in vars(record).items() if key not in _STANDARD)
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _ConsoleHandler(logging.Handler):
    """Log lines above a live progress bar."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = {logging.WARNING: "yellow", logging.INFO: ""}.get(record.levelno, "red")
        self._console.print(self.format(record), style=style, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def reporting(log_format: str) -> Iterator[Reporter]:
    """Set up the log of a run on standard error; undone on leaving.

    `log_format` is ``"text"`` (with a progress bar where standard error is a terminal) or ``"json"``.
    """
    console = Console(stderr=True)
    live = log_format == "text" and console.is_terminal
    handler: logging.Handler = _ConsoleHandler(console) if live else logging.StreamHandler(sys.stderr)
    if log_format == "json":
        handler.setFormatter(JsonFormatter())
    elif live:
        handler.setFormatter(logging.Formatter("%(message)s"))
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger(LOGGER)
    before = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield Reporter(console if live else None)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


class Reporter:
    """Tells the progress of a run, phase by phase: in a bar on the `console`, or in log lines where that is None."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._observers: list[Observer] = []

    def observe(self, observer: Observer) -> None:
        """Call ``observer`` with phase, steps done and their total, at the start of each phase and after each step."""
        self._observers.append(observer)

    def _tell(self, phase: Steps) -> None:
        for observer in self._observers:
            observer(phase.name, phase.done, phase.total)

    @contextmanager
    def phase(self, name: str, total: int) -> Iterator[Steps]:
        """A phase of ``total`` steps; ``name`` is what the operator reads."""
        start = time.monotonic()
        with ExitStack() as stack:
            advance = None
            if self._console is None:
                log.info("%s: %d", name, total, extra={"phase": name, "total": total})
            else:
                columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
                text = SpinnerColumn(), TextColumn("{task.description}")
                bar = stack.enter_context(Progress(*text, *columns, console=self._console, transient=True))
                advance = functools.partial(bar.advance, bar.add_task(name, total=total))
            steps = Steps(name, total, self._tell, advance)
            self._tell(steps)
            yield steps
        log.info(
            "%s: %d of %d done in %.1f s",
            name,
            steps.done,
            total,
            time.monotonic() - start,
            extra={"phase": name, "done": steps.done, "total": total},
        )


class Steps:
    """Counts the steps of one phase."""

    def __init__(
        self, name: str, total: int, tell: Callable[[Steps], None], advance: Callable[[], None] | None = None
    ) -> None:
        self.name = name
        self.total = total
        self.done = 0
        self._tell = tell
        self._advance = advance
        self._last_line = time.monotonic()

    def step(self) -> None:
        """One more step is done."""
        self.done += 1
        self._tell(self)
        if self._advance is not None:
            self._advance()
        elif time.monotonic() - self._last_line >= _SECONDS_BETWEEN_LINES and self.done < self.total:
            self._last_line = time.monotonic()
            log.info(
                "%s: %d of %d",
                self.name,
                self.done,
                self.total,
                extra={"phase": self.name, "done": self.done, "total": self.total},
            )
