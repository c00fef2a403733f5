"""What a run is doing, or how far it came: written by the driver, read by ``sgclassify status``."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from sgclassify.pipeline.record.output import MARKER, PROGRESS, RECEIPTS, WORK, holder, read_json
from sgclassify.pipeline.record.record import SET_ASIDE, RunRecord, pending
from sgclassify.stages.errors import UsageError
from sgclassify.stages.write.atomic import write_atomic_text

log = logging.getLogger(__name__)

SECONDS_BETWEEN_WRITES: Final = 2.0


class ProgressFile:
    """Keeps the progress of a run in a file, together with the failures that its record has so far."""

    def __init__(self, path: Path, record: RunRecord) -> None:
        self._path = path
        self._record = record
        self._written = float("-inf")

    def step(self, phase: str, done: int, total: int) -> None:
        """Take note of a step; the file is written at both ends of a phase and every few seconds between."""
        now = time.monotonic()
        if 0 < done < total and now - self._written < SECONDS_BETWEEN_WRITES:
            return
        self._written = now
        record = self._record
        exposures = [e for e in record.exposures if e.outcome == SET_ASIDE]
        tiles = [t for t in record.tiles if t.outcome == SET_ASIDE]
        values = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "started": record.started.isoformat(timespec="seconds"),
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
            "phase": phase,
            "done": done,
            "total": total,
            "set_aside": [{"id": e.id, "file": e.file, "fault": e.fault} for e in exposures]
            + [{"id": f"tile {t.order}/{t.pixel}", "file": t.file, "fault": t.fault} for t in tiles],
        }
        # a run continues even if this cannot be written
        with suppress(OSError):
            write_atomic_text(json.dumps(values) + "\n", self._path)


def read_status(folder: Path) -> dict[str, Any]:
    """The state of the run in an output folder.

    Returns
    -------
    dict
        ``state``: ``running``, ``dead`` (ended before it was complete), ``finished`` or ``empty``. ``holder``: pid and
        host of a running one. ``progress``: of a running or dead one. ``exit_code``, ``message``, ``counts`` and
        ``set_aside``: of the last run that wrote its record. ``tiles_complete`` and ``exposures_complete``: how many
        have receipts.

    Raises
    ------
    UsageError
        If the folder is not an output folder of ``sgclassify run``.
    """
    if not (folder / MARKER).is_file():
        raise UsageError(f"{folder}: is no output folder of sgclassify run")
    lock, alive = holder(folder)
    progress = read_json(folder / WORK / PROGRESS)
    record = read_json(folder / "run.json")
    if alive:
        state = "running"
    elif (record and record.get("exit_code") not in (0, 3, 4)) or (
        (folder / WORK).is_dir() and (not record or _is_later(progress, record))
    ):
        state = "dead"
    else:
        state = "finished" if record else "empty"
    status: dict[str, Any] = {
        "state": state,
        "tiles_complete": sum(1 for _ in (folder / RECEIPTS / "tiles").glob("*.parquet")),
        "exposures_complete": sum(1 for _ in (folder / RECEIPTS / "exposures").glob("*.json")),
    }
    if state == "running":
        status["holder"] = lock
    if state in ("running", "dead"):
        status["progress"] = progress
    if record and (state == "finished" or not _is_later(progress, record)):
        status |= {
            "exit_code": record.get("exit_code"),
            "message": record.get("message", ""),
            "finished": record.get("finished"),
            "counts": record.get("counts", {}),
            "set_aside": [
                {"id": item.get("id", f"tile {item.get('order')}/{item.get('pixel')}"), "fault": item["fault"]}
                for item in [*record.get("inputs", []), *record.get("tiles", [])]
                if item.get("outcome") == SET_ASIDE
            ],
        }
    return status


def describe(status: dict[str, Any]) -> str:
    """The state as a table for people."""
    state = status["state"]
    holder_of = status.get("holder", {})
    says = {
        "running": f"running: process {holder_of.get('pid')} on {holder_of.get('host')}",
        "dead": "ended before it was complete; the same command goes on from what is complete",
        "finished": f"finished with exit code {status.get('exit_code')}",
        "empty": "nothing was done yet",
    }
    rows = [("state", says[state])]
    if progress := status.get("progress"):
        rows += [
            ("phase", f"{progress.get('phase')}: {progress.get('done')} of {progress.get('total')}"),
            ("last step", f"{progress.get('updated')}, {_ago(progress.get('updated'))}"),
        ]
    if "finished" in status:
        rows.append(("ended", str(status["finished"])))
    if message := status.get("message"):
        rows.append(("because", str(message)))
    rows += [
        ("tiles", f"{status['tiles_complete']} complete"),
        ("exposures", f"{status['exposures_complete']} complete"),
    ]
    if waiting := pending(status.get("counts", {})):
        rows.append(("pending", f"{waiting}: the run ended before their turn"))
    aside = status.get("set_aside") or status.get("progress", {}).get("set_aside", [])
    rows += [("set aside", f"{item['id']}: {item['fault']}") for item in aside]
    # names of files and messages come from outside: they must not send control characters to the terminal
    return "\n".join(f"{name:<12}{_printable(text)}" for name, text in rows)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text.encode("utf-8", "replace").decode())


def _is_later(progress: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether a run began after the one that wrote the record."""
    return bool(progress) and str(progress.get("started")) > str(record.get("started", ""))


def _ago(text: object) -> str:
    try:
        seconds = (datetime.now(UTC) - datetime.fromisoformat(str(text))).total_seconds()
    except (ValueError, TypeError):
        return "?"
    return f"{seconds:.0f} s ago"
