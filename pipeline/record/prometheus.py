"""Metrics of a run for the textfile collector of Prometheus' node exporter."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Final

from sgclassify.pipeline.process import peak_mib
from sgclassify.pipeline.record.record import DONE, PENDING, SET_ASIDE, SKIPPED, RunRecord
from sgclassify.stages.write.atomic import write_atomic_text

SECONDS_BETWEEN_WRITES: Final = 15.0
_PREFIX: Final = "sgclassify_run"


class MetricsFile:
    """Writes the metrics of a run into a file, complete at any time. Prometheus reads names that end in ``.prom``."""

    def __init__(self, path: Path, record: RunRecord) -> None:
        self._path = path.absolute()
        self._record = record
        self._written = float("-inf")
        self._progress: tuple[str, int, int] = ("", 0, 0)

    def step(self, phase: str, done: int, total: int) -> None:
        """Take note of a step; the file is written at the start of a phase and every few seconds."""
        self._progress = (phase, done, total)
        if done == 0 or time.monotonic() - self._written >= SECONDS_BETWEEN_WRITES:
            self.write(finished=False)

    def write(self, *, finished: bool) -> None:
        """Write the file; the run continues even if that fails."""
        self._written = time.monotonic()
        with suppress(OSError):
            write_atomic_text(self.text(finished=finished), self._path)

    def text(self, *, finished: bool) -> str:
        """The metrics in Prometheus' text format."""
        record = self._record
        lines: list[str] = []

        def add(name: str, text: str, values: list[tuple[str, float]]) -> None:
            lines.append(f"# HELP {_PREFIX}_{name} {text}")
            lines.append(f"# TYPE {_PREFIX}_{name} gauge")
            lines.extend(f"{_PREFIX}_{name}{labels} {value:.17g}" for labels, value in values)

        add("start_time_seconds", "When the run began.", [("", record.started.timestamp())])
        add("running", "1 while the run is at work.", [("", 0.0 if finished else 1.0)])
        if finished:
            add("end_time_seconds", "When the run ended.", [("", time.time())])
            add("exit_code", "Exit code of the run.", [("", record.exit_code)])
        phase, done, total = self._progress
        if phase and not finished:
            label = f'{{phase="{phase}"}}'
            add("phase_done", "Steps done of the present phase.", [(label, done)])
            add("phase_total", "Steps of the present phase.", [(label, total)])
        counts = record.counts()
        for kind in ("exposures", "tiles"):
            outcomes = (DONE, SET_ASIDE, PENDING, *([SKIPPED] if kind == "exposures" else []))
            values = [(f'{{outcome="{name}"}}', float(counts[f"{kind}_{name}"])) for name in outcomes]
            add(kind, f"{kind.capitalize()} by outcome.", values)
        add("retried", "Exposures and tiles that were tried more than once.", [("", counts["retried"])])
        classes = [(f'{{class="{name}"}}', float(counts[f"{name}s" if name != "galaxy" else "galaxies"]))
                   for name in ("star", "galaxy")]  # fmt: skip
        add("objects", "Objects by class.", [*classes, ('{class=""}', float(counts["not_scored"]))])
        seconds = [(f'{{phase="{name}"}}', value) for name, value in record.timings.items()]
        if seconds:
            add("phase_seconds", "Time spent in each phase.", seconds)
        peaks = [e.peak_mib for e in record.exposures] + [t.peak_mib for t in record.tiles]
        add(
            "peak_memory_bytes",
            "Largest resident memory of a process.",
            [('{process="driver"}', peak_mib() * 2**20), ('{process="worker"}', max(peaks, default=0.0) * 2**20)],
        )
        return "\n".join(lines) + "\n"
