"""The record of a run: what becomes run.json, and what the report shows."""

from __future__ import annotations

import json
import platform
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, Final

from sgclassify.stages.program import code_digest
from sgclassify.stages.write.atomic import write_atomic_bytes

RECORD_VERSION: Final = 3
"""Raised where the meaning of an entry changes; docs/operations.md says how."""

DONE: Final = "done"
SET_ASIDE: Final = "set_aside"
SKIPPED: Final = "skipped"
PENDING: Final = "pending"
"""What every exposure and tile is until something closes it: in the end, that the run ended before its turn."""

_PACKAGES: Final = ("sgclassify", "numpy", "astropy", "photutils", "pyarrow", "hats", "distributed", "torch")


@dataclass(frozen=True)
class Failure:
    """Why an exposure or a tile was set aside or skipped.

    Attributes
    ----------
    file : str
        File at fault; empty where none is.
    fault, advice : str
        What is wrong, and what the operator can do about it.
    traceback : str
        Of an unexpected error; empty for one that the stages know.
    """

    file: str
    fault: str
    advice: str = ""
    traceback: str = ""

    @classmethod
    def from_error(cls, error: BaseException, trace: str = "") -> Failure:
        """Describe an error; ``path``, ``fault`` and ``advice`` are taken from those that have them."""
        if hasattr(error, "fault"):
            return cls(str(getattr(error, "path", "")), str(error.fault), str(getattr(error, "advice", "")))
        if hasattr(error, "trace"):
            return cls("", f"unexpected {error}", "see the traceback in run.json and report it", error.trace)
        trace = trace or "".join(traceback.format_exception(error))
        fault = f"unexpected {type(error).__name__}: {error}"
        advice = (
            "look after disk, network and permissions, and run again"
            if isinstance(error, OSError)
            else "see the traceback in run.json and report it"
        )
        return cls("", fault, advice, trace)

    def __str__(self) -> str:
        text = f"{self.file}: {self.fault}" if self.file else self.fault
        return f"{text}; {self.advice}" if self.advice else text


class _Recorded:
    """What exposures and tiles have in common."""

    outcome: str
    file: str
    fault: str
    advice: str
    traceback: str

    def close(self, outcome: str, failure: Failure) -> None:
        """Set it aside, or skip it, for a reason."""
        self.outcome = outcome
        self.file, self.fault, self.advice = failure.file, failure.fault, failure.advice
        self.traceback = failure.traceback


@dataclass
class ExposureRecord(_Recorded):
    """One exposure of the list.

    ``rows``, ``usable`` and ``scored`` count rows of its catalogue; ``attempts`` how often this run tried to prepare
    it, 0 for one that an earlier run had prepared; ``seconds``, ``worker`` and ``peak_mib`` are of its preparation.
    """

    id: str
    files: dict[str, str | None]
    sha256: dict[str, str] = field(default_factory=dict)
    band: str | None = None
    outcome: str = PENDING
    file: str = ""
    fault: str = ""
    advice: str = ""
    traceback: str = ""
    notes: list[str] = field(default_factory=list)
    rows: int = 0
    usable: int = 0
    scored: int = 0
    attempts: int = 0
    seconds: float = 0.0
    worker: str = ""
    peak_mib: float = 0.0


@dataclass
class TileRecord(_Recorded):
    """One sky tile: HEALPix order and nested pixel, the exposures that cover it, and what became of it.

    ``attempts`` says how often this run tried it, 0 for one that an earlier run had published; ``seconds``,
    ``worker``, ``device`` and ``peak_mib`` (largest memory so far of the processes that worked on it) are of the try
    that published it.
    """

    order: int
    pixel: int
    exposures: list[str]
    outcome: str = PENDING
    n_objects: int = 0
    n_stars: int = 0
    n_galaxies: int = 0
    n_not_scored: int = 0
    seconds: float = 0.0
    attempts: int = 0
    worker: str = ""
    device: str = ""
    peak_mib: float = 0.0
    file: str = ""
    fault: str = ""
    advice: str = ""
    traceback: str = ""


@dataclass
class RunRecord:
    """Everything that run.json says, gathered while the run goes on.

    Attributes
    ----------
    command : list of str
        The command line.
    configuration : dict
        In the layout of its TOML file.
    model : dict
        ``id``, ``sha256``, ``prior_star_fraction``, ``path``, ``device``.
    exposures, tiles : list
        Outcome of each; the tiles are there from when they are planned.
    notes : list of str
        Remarks on the exposure list.
    timings : dict of str to float
        Seconds of each phase.
    peak_mib : dict of str to float
        Largest memory of the driver, MiB; that of the workers stands with the exposures and tiles.
    message : str
        Why the run ended early; empty where it did not.
    """

    command: list[str]
    configuration: dict[str, Any]
    model: dict[str, Any]
    output: Path
    started: datetime = field(default_factory=lambda: datetime.now(UTC))
    exposures: list[ExposureRecord] = field(default_factory=list)
    tiles: list[TileRecord] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    timings: dict[str, float] = field(default_factory=dict)
    peak_mib: dict[str, float] = field(default_factory=dict)
    message: str = ""
    exit_code: int = 1

    def counts(self) -> dict[str, int]:
        """Numbers of exposures, tiles, objects and catalogue rows."""

        def number(items: list[Any], outcome: str) -> int:
            return sum(item.outcome == outcome for item in items)

        return {
            "exposures": len(self.exposures),
            "exposures_done": number(self.exposures, DONE),
            "exposures_set_aside": number(self.exposures, SET_ASIDE),
            "exposures_skipped": number(self.exposures, SKIPPED),
            "exposures_pending": number(self.exposures, PENDING),
            "tiles": len(self.tiles),
            "tiles_done": number(self.tiles, DONE),
            "tiles_set_aside": number(self.tiles, SET_ASIDE),
            "tiles_pending": number(self.tiles, PENDING),
            "tiles_reused": sum(t.outcome == DONE and t.attempts == 0 for t in self.tiles),
            "retried": sum(e.attempts > 1 for e in self.exposures) + sum(t.attempts > 1 for t in self.tiles),
            "objects": sum(t.n_objects for t in self.tiles),
            "stars": sum(t.n_stars for t in self.tiles),
            "galaxies": sum(t.n_galaxies for t in self.tiles),
            "not_scored": sum(t.n_not_scored for t in self.tiles),
            "rows": sum(e.rows for e in self.exposures),
            "rows_scored": sum(e.scored for e in self.exposures),
        }

    def as_dict(self) -> dict[str, Any]:
        """The content of run.json."""
        return {
            "record_version": RECORD_VERSION,
            "exit_code": self.exit_code,
            "message": self.message,
            "started": self.started.isoformat(timespec="seconds"),
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": self.command,
            "software": software(),
            "configuration": self.configuration,
            "model": self.model,
            "counts": self.counts(),
            "notes": self.notes,
            "inputs": [
                _trimmed(asdict(e)) for e in sorted(self.exposures, key=lambda e: (e.id, str(e.files)))
            ],
            "tiles": [_trimmed(asdict(t)) for t in sorted(self.tiles, key=lambda t: (t.order, t.pixel))],
            "peak_mib": self.peak_mib,
            "timings": {name: round(seconds, 3) for name, seconds in self.timings.items()},
        }

    def write(self, path: Path) -> None:
        """Write run.json; it is complete under its name or not there."""
        write_text(path, json.dumps(self.as_dict(), indent=1) + "\n")


def pending(counts: Mapping[str, int]) -> str:
    """What a run did not reach, such as ``2 exposures and 1 tile``; empty where there is nothing.

    Parameters
    ----------
    counts : mapping of str to int
        Of a record; those of earlier versions tell of nothing pending.
    """
    numbers = [(counts.get(f"{kind}s_pending", 0), kind) for kind in ("exposure", "tile")]
    return " and ".join(f"{n:,} {kind}{'s' * (n != 1)}" for n, kind in numbers if n)


def _trimmed(item: dict[str, Any]) -> dict[str, Any]:
    """Without the reasons of what needs none."""
    if item["outcome"] in (DONE, PENDING):
        return {
            key: value for key, value in item.items() if key not in ("file", "fault", "advice", "traceback")
        }
    return item if item["traceback"] else {key: value for key, value in item.items() if key != "traceback"}


def software() -> dict[str, str]:
    """Versions of the software that decides about the products."""
    installed = {name: metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), "sgclassify code": code_digest(), **installed}


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is complete under its name or not there."""
    # The names of files may hold bytes that are no UTF-8, which Python carries as lone surrogates.
    write_atomic_bytes(text.encode("utf-8", "backslashreplace"), path)
