"""Standard output and error of a command, which never stop it.

With a full disk or a closed pipe behind them, a terminal that is gone, or a character that it cannot show, the command
continues and reports the fault at its end.
"""

from __future__ import annotations

import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _Lenient(io.FileIO):
    """A descriptor that is written as long as that works; `failure` is the first error."""

    failure: OSError | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        """Write bytes, or drop them once writing has failed."""
        while self.failure is None:
            try:
                written = super().write(data)
            except OSError as error:
                self.failure = error
            else:
                if written is not None:
                    return written
                # another process has made the pipe or terminal non-blocking, and it is full
                select.select([], [self], [])
        return memoryview(data).nbytes


@dataclass
class Output:
    """Standard output of a command."""

    raw: _Lenient | None

    def failure(self) -> OSError | None:
        """The first error of writing; None if all was written."""
        sys.stdout.flush()
        return self.raw.failure if self.raw is not None else None


@contextmanager
def lenient() -> Iterator[Output]:
    """Standard streams that take whatever is written to them, while the context is open.

    Characters that they cannot show become ``\\x`` or ``\\u`` and a number. Streams that are not those of the
    process, such as those of a test, stay as they are.
    """
    _fill()
    before = sys.stdout, sys.stderr
    raw = [_replace(name) for name in ("stdout", "stderr")]
    try:
        yield Output(raw[0])
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before


def _fill() -> None:
    """Open the null device for a closed standard stream: else the next file that is opened would take its place."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


def _replace(name: str) -> _Lenient | None:
    old = getattr(sys, name)
    if not isinstance(old, io.TextIOWrapper) or old is not getattr(sys, f"__{name}__"):
        return None
    old.flush()
    raw = _Lenient(old.fileno(), "w", closefd=False)
    new = io.TextIOWrapper(
        io.BufferedWriter(raw),
        encoding=old.encoding,
        errors="backslashreplace",
        newline="\n",
        line_buffering=old.line_buffering,
        write_through=old.write_through,
    )
    setattr(sys, name, new)
    return raw
