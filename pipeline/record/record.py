"""The record of a run: what becomes run.json, and what the report shows.

Each key of run.json is declared once, with its meaning: those of exposures and tiles with the fields of their
records, all others in `MODEL_KEYS`, `COUNTS` and `ENTRIES`.
"""

from __future__ import annotations

import json
import platform
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Final

from sgclassify.stages.program import code_digest
from sgclassify.stages.write.atomic import write_atomic_bytes

RECORD_VERSION: Final = 3
"""Raised where the meaning of an entry changes; docs/operations.md says how."""

DONE: Final = "done"
SET_ASIDE: Final = "set_aside"
SKIPPED: Final = "skipped"
PENDING: Final = "pending"
"""Outcome of every exposure and tile until it is closed. At the end: the run ended before its turn."""

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
    """One exposure of the list. Each field is a key of ``inputs`` in run.json, with its meaning."""

    id: Annotated[str, "official name of the exposure"]
    files: Annotated[dict[str, str | None], "paths by kind: image, weight, flag, catalog; null where a file is missing"]
    sha256: Annotated[dict[str, str], "checksums of the files, by path"] = field(default_factory=dict)
    band: Annotated[str | None, "band; null where the header could not be read"] = None
    outcome: Annotated[str, "`done`, `set_aside`, `skipped` or `pending` (the run ended before its turn)"] = PENDING
    file: Annotated[str, "file at fault, where set aside or skipped"] = ""
    fault: Annotated[str, "what is wrong, where set aside or skipped"] = ""
    advice: Annotated[str, "what to do about it, where set aside or skipped"] = ""
    traceback: Annotated[str, "traceback of an unexpected error"] = ""
    notes: Annotated[list[str], "remarks on the exposure"] = field(default_factory=list)
    rows: Annotated[int, "rows of its catalogue"] = 0
    usable: Annotated[int, "of these, rows with a usable position"] = 0
    scored: Annotated[int, "of these, rows with a probability"] = 0
    attempts: Annotated[int, "tries of this run to prepare it; 0 where an earlier run had, or where none was made"] = 0
    seconds: Annotated[float, "time of its preparation, s"] = 0.0
    worker: Annotated[str, "worker that prepared it"] = ""
    peak_mib: Annotated[float, "largest memory of that worker so far, MiB"] = 0.0


@dataclass
class TileRecord(_Recorded):
    """One sky tile. Each field is a key of ``tiles`` in run.json, with its meaning."""

    order: Annotated[int, "HEALPix order"]
    pixel: Annotated[int, "HEALPix pixel, nested"]
    exposures: Annotated[list[str], "`id` of the exposures that cover it"]
    outcome: Annotated[str, "`done`, `set_aside` or `pending` (the run ended before its turn)"] = PENDING
    n_objects: Annotated[int, "objects"] = 0
    n_stars: Annotated[int, "of these, stars"] = 0
    n_galaxies: Annotated[int, "of these, galaxies"] = 0
    n_not_scored: Annotated[int, "of these, objects without a probability"] = 0
    seconds: Annotated[float, "time of the try that published it, s"] = 0.0
    attempts: Annotated[int, "tries of this run; 0 where an earlier run had published it, or where none was made"] = 0
    worker: Annotated[str, "worker of that try"] = ""
    device: Annotated[str, "device of the model in that try"] = ""
    peak_mib: Annotated[float, "largest memory so far of the processes that worked on it, MiB"] = 0.0
    file: Annotated[str, "file at fault, where set aside"] = ""
    fault: Annotated[str, "what is wrong, where set aside"] = ""
    advice: Annotated[str, "what to do about it, where set aside"] = ""
    traceback: Annotated[str, "traceback of an unexpected error"] = ""


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
        See `MODEL_KEYS`.
    exposures, tiles : list
        Outcome of each; tiles are listed once they are planned.
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
        """Numbers of exposures, tiles, objects and catalogue rows; see `COUNTS`."""
        return {key: count(self) for key, (_, count) in COUNTS.items()}

    def as_dict(self) -> dict[str, Any]:
        """The content of run.json; see `ENTRIES`."""
        return {key: value(self) for key, (_, value) in ENTRIES.items()}

    def write(self, path: Path) -> None:
        """Write run.json; it is complete under its name or not there."""
        write_text(path, json.dumps(self.as_dict(), indent=1) + "\n")


def _exposures(outcome: str) -> Callable[[RunRecord], int]:
    return lambda record: sum(exposure.outcome == outcome for exposure in record.exposures)


def _tiles(outcome: str) -> Callable[[RunRecord], int]:
    return lambda record: sum(tile.outcome == outcome for tile in record.tiles)


MODEL_KEYS: Final = {
    "id": "name of the model, unique by its training",
    "sha256": "checksum of its archive",
    "prior_star_fraction": "share of stars that the probabilities assume, or a table of it by magnitude",
    "model_prior_star_fraction": "the model's own share",
    "path": "path of the archive; `default` for the shipped one",
    "exact": "whether the whole model was asked about every object",
    "device": "where the model ran: `cpu` or `cuda`; empty if no worker was needed",
}
"""Keys of ``model`` in run.json."""

COUNTS: Final[Mapping[str, tuple[str, Callable[[RunRecord], int]]]] = {
    "exposures": ("exposures of the list", lambda r: len(r.exposures)),
    "exposures_done": ("prepared and used", _exposures(DONE)),
    "exposures_set_aside": ("not used for a fault of their own", _exposures(SET_ASIDE)),
    "exposures_skipped": ("not used, without a fault (slitless)", _exposures(SKIPPED)),
    "exposures_pending": ("not reached", _exposures(PENDING)),
    "tiles": ("planned tiles", lambda r: len(r.tiles)),
    "tiles_done": ("published", _tiles(DONE)),
    "tiles_set_aside": ("not published for a fault of their own", _tiles(SET_ASIDE)),
    "tiles_pending": ("not reached", _tiles(PENDING)),
    "tiles_reused": (
        "published by an earlier run",
        lambda r: sum(t.outcome == DONE and not t.attempts for t in r.tiles),
    ),
    "retried": (
        "exposures and tiles tried more than once",
        lambda r: sum(e.attempts > 1 for e in r.exposures) + sum(t.attempts > 1 for t in r.tiles),
    ),
    "objects": ("objects", lambda r: sum(t.n_objects for t in r.tiles)),
    "stars": ("of these, stars", lambda r: sum(t.n_stars for t in r.tiles)),
    "galaxies": ("of these, galaxies", lambda r: sum(t.n_galaxies for t in r.tiles)),
    "not_scored": ("of these, objects without a probability", lambda r: sum(t.n_not_scored for t in r.tiles)),
    "rows": ("catalogue rows", lambda r: sum(e.rows for e in r.exposures)),
    "rows_scored": ("of these, rows with a probability", lambda r: sum(e.scored for e in r.exposures)),
}
"""Keys of ``counts`` in run.json: meaning, and how it is counted."""

ENTRIES: Final[Mapping[str, tuple[str, Callable[[RunRecord], Any]]]] = {
    "record_version": ("version of this layout", lambda _: RECORD_VERSION),
    "exit_code": ("exit code", lambda r: r.exit_code),
    "message": ("why the run ended early; empty where it did not", lambda r: r.message),
    "started": ("start, UTC", lambda r: r.started.isoformat(timespec="seconds")),
    "finished": ("end, UTC", lambda _: datetime.now(UTC).isoformat(timespec="seconds")),
    "command": ("command line, word by word", lambda r: r.command),
    "software": ("versions, and the digest of the sources that decide about products", lambda _: software()),
    "configuration": ("settings, in the layout of the TOML file", lambda r: r.configuration),
    "model": ("the model", lambda r: r.model),
    "counts": ("numbers of exposures, tiles, objects and rows", lambda r: r.counts()),
    "notes": ("remarks on the exposure list", lambda r: r.notes),
    "inputs": (
        "exposures of the list, by `id`",
        lambda r: [_trimmed(asdict(e)) for e in sorted(r.exposures, key=lambda e: (e.id, str(e.files)))],
    ),
    "tiles": (
        "planned tiles, by order and pixel",
        lambda r: [_trimmed(asdict(t)) for t in sorted(r.tiles, key=lambda t: (t.order, t.pixel))],
    ),
    "peak_mib": ("largest memory of the driver, MiB", lambda r: r.peak_mib),
    "timings": ("seconds of each phase", lambda r: {name: round(seconds, 3) for name, seconds in r.timings.items()}),
}
"""Keys of run.json: meaning, and how it is made."""


def pending(counts: Mapping[str, int]) -> str:
    """What a run did not reach, such as ``2 exposures and 1 tile``; empty where there is nothing.

    Records of earlier versions count nothing as pending.
    """
    numbers = [(counts.get(f"{kind}s_pending", 0), kind) for kind in ("exposure", "tile")]
    return " and ".join(f"{n:,} {kind}{'s' * (n != 1)}" for n, kind in numbers if n)


def _trimmed(item: dict[str, Any]) -> dict[str, Any]:
    """An entry without the reasons where it needs none."""
    if item["outcome"] in (DONE, PENDING):
        return {key: value for key, value in item.items() if key not in ("file", "fault", "advice", "traceback")}
    return item if item["traceback"] else {key: value for key, value in item.items() if key != "traceback"}


def software() -> dict[str, str]:
    """Versions of the software that decides about the products."""
    installed = {name: metadata.version(name) for name in _PACKAGES}
    return {"python": platform.python_version(), "sgclassify code": code_digest(), **installed}


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is complete under its name or not there."""
    # The names of files may hold bytes that are no UTF-8, which Python carries as lone surrogates.
    write_atomic_bytes(text.encode("utf-8", "backslashreplace"), path)
