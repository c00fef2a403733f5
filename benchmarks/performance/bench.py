"""What all groups of measurements share: options, codes, folders, and the runs of commands."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from performance import inputs
from performance.codes import THIS, Code, python
from performance.figures import Results
from performance.process import Usage, run

ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class MeasurementError(Exception):
    """A command of a measurement failed."""


@dataclass
class Bench:
    """One benchmark under way.

    Attributes
    ----------
    results : Results
    folder : Path
        For inputs, which stay, and for what the runs write.
    repeat : int
        Measurements of each figure; the median counts.
    quick : bool
        Small inputs: to see that everything works.
    large : bool
        Full-size detectors too.
    workers : int
    codes : list of Code
        This one, and what it is compared with; they are measured in turns.
    save : callable
        Keeps the results so far.
    """

    results: Results
    folder: Path
    repeat: int = 5
    quick: bool = False
    large: bool = False
    workers: int = 2
    codes: list[Code] = field(default_factory=list)
    save: Callable[[], None] = lambda: None

    @property
    def work(self) -> Path:
        """Folder for what the runs of this benchmark write."""
        return self.folder / f"work-{os.getpid()}"

    @property
    def field(self) -> str:
        """The field that single parts are measured on."""
        return "f528" if self.quick else "f2560"

    def input(self, name: str) -> Path:
        """The list of a field's exposures."""
        say(f"input {name}")
        return inputs.exposures(name, self.folder, self.workers)

    def fresh(self, name: str) -> Path:
        """A folder that does not exist, below `work`."""
        path = self.work / name
        shutil.rmtree(path, ignore_errors=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def case(self, name: str, code: Code) -> str:
        """Name of a case in the table."""
        return name if code.name == THIS else f"{name} (commit {code.name})"

    def child(self, code: Code, module: str, *arguments: object, env: dict[str, str] | None = None) -> Any:
        """Run a module of the benchmarks as a process that prints JSON; `MeasurementError` if it fails."""
        command = python("-W", "ignore", "-m", module, *(str(one) for one in arguments))
        done = run(command, code.environment(**(env or {})))
        if done.code:
            raise MeasurementError(f"{module}: {last_line(done.errors) or done.code}")
        return json.loads(done.output.strip().splitlines()[-1])

    def classify(
        self, code: Code, listed: Path, output: Path, *options: str, workers: int | None = None, expect: int = 0
    ) -> tuple[Usage, dict[str, Any]]:
        """Run the product; what it cost, and its record."""
        command = python("-m", "sgclassify.pipeline", "run", "--exposure-list", str(listed), "--output", str(output))
        command += ["--workers", str(workers or self.workers), "--log-format", "json"]
        if "--device" not in options:
            command += ["--device", "cpu"]
        # the folder of the partitions, whatever the order of the tiles
        usage = run([*command, *options], code.environment(), output / "objects" / "dataset", "*/*/Npix=*.parquet")
        if usage.code != expect:
            raise MeasurementError(f"run of {listed}: exit status {usage.code}: {last_line(usage.errors)}")
        record = output / "run.json"
        return usage, json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}


def last_line(text: str) -> str:
    """The last line of a text that is not empty."""
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def say(text: str) -> None:
    """Tell whoever waits."""
    print(text, file=sys.stderr, flush=True)
