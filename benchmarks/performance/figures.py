"""Figures with their spread, the results of a whole benchmark as JSON, and its table."""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1
"""Version of the layout of the JSON."""

RATIOS = "ratios"
"""Group of the figures that compare two others of the same benchmark."""


@dataclass(frozen=True)
class Figure:
    """One measured figure: the median of what was measured.

    Attributes
    ----------
    group, case, quantity : str
        What was measured: of which part, in which case, and what. Together unique in a benchmark.
    unit : str
        Empty for a number without a unit.
    each : tuple of float
        All the measurements, in order.
    note : str
        What a reader must know, or why there is no figure.
    """

    group: str
    case: str
    quantity: str
    unit: str
    each: tuple[float, ...]
    note: str = ""

    @property
    def value(self) -> float:
        """The median; NaN without a measurement."""
        return statistics.median(self.each) if self.each else float("nan")

    @property
    def spread(self) -> float:
        """Half of what lies between the smallest and the largest measurement, relative to the median."""
        if len(self.each) < 2 or not self.value:
            return 0.0
        return (max(self.each) - min(self.each)) / 2 / abs(self.value)


@dataclass
class Results:
    """A whole benchmark: where and how it was measured, and its figures."""

    about: dict[str, Any]
    figures: list[Figure] = field(default_factory=list)

    def add(
        self, group: str, case: str, quantity: str, unit: str, each: float | Iterable[float], note: str = ""
    ) -> None:
        """Enter a figure; a later one of the same name takes the place of an earlier one."""
        values = (float(each),) if isinstance(each, int | float) else tuple(float(v) for v in each)
        new = Figure(group, case, quantity, unit, values, note)
        self.figures = [f for f in self.figures if (f.group, f.case, f.quantity) != (group, case, quantity)]
        self.figures.append(new)

    def skip(self, group: str, case: str, why: str) -> None:
        """Enter that something was not measured, and why."""
        self.add(group, case, "not measured", "", (), why)

    def find(self, group: str, case: str, quantity: str) -> Figure | None:
        """The figure of this name, None if it was not measured."""
        for figure in self.figures:
            if (figure.group, figure.case, figure.quantity) == (group, case, quantity) and figure.each:
                return figure
        return None

    def value(self, group: str, case: str, quantity: str) -> float | None:
        """Median of the figure of this name, None if it was not measured."""
        figure = self.find(group, case, quantity)
        return figure.value if figure is not None else None

    def to_json(self) -> str:
        """The benchmark as text."""
        figures = [{**dataclasses.asdict(f), "value": f.value if f.each else None} for f in self.figures]
        return json.dumps({"format": FORMAT, "about": self.about, "figures": figures}, indent=1, sort_keys=True) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Results:
        """The benchmark that `to_json` described; `ValueError` if the text has another layout."""
        raw = json.loads(text)
        if raw.get("format") != FORMAT:
            raise ValueError(f"results of format {raw.get('format')}, not {FORMAT}")
        names = [f.name for f in dataclasses.fields(Figure)]
        figures = [Figure(**{**{n: one[n] for n in names}, "each": tuple(one["each"])}) for one in raw["figures"]]
        return cls(raw["about"], figures)

    @classmethod
    def read(cls, path: Path) -> Results:
        """The benchmark in a file."""
        return cls.from_json(path.read_text(encoding="utf-8"))

    def write(self, path: Path) -> None:
        """Write the JSON, so that a benchmark that is stopped keeps what it has."""
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        part.write_text(self.to_json(), encoding="utf-8")
        part.replace(path)


def shown(value: float, unit: str) -> str:
    """A figure for people: three digits, and its unit."""
    if value != value:
        return "-"
    size = abs(value)
    digits = 0 if size >= 100 or value == int(value) else 1 if size >= 10 else 2 if size >= 1 else 3
    text = f"{value:,.{digits}f}" if size >= 0.001 or not value else f"{value:.1e}"
    return f"{text} {unit}".rstrip()


def table(results: Results) -> str:
    """The one table of a benchmark, as Markdown: a row per figure, the ratios first."""
    lines = ["| part | case | quantity | figure | spread | remark |", "|---|---|---|---:|---:|---|"]
    for figure in sorted(results.figures, key=lambda f: f.group != RATIOS):
        spread = f"{100 * figure.spread:.0f} %" if len(figure.each) > 1 else ""
        cells = (figure.group, figure.case, figure.quantity, shown(figure.value, figure.unit), spread, figure.note)
        lines.append("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |")
    return "\n".join(lines)


def heading(about: dict[str, Any]) -> str:
    """Where and how a benchmark was measured, in lines."""
    machine = about.get("machine", {})
    lines = [f"sgclassify {about.get('version', '?')}, commit {about.get('commit', '?')}, {about.get('date', '?')}"]
    if machine:
        lines.append(
            f"{machine.get('cpu', '?')}, {machine.get('cores', '?')} cores, {machine.get('isa', '?')},"
            f" {machine.get('memory_gib', '?')} GiB, {machine.get('gpu', 'no GPU')}"
        )
        lines.append(", ".join(f"{name} {value}" for name, value in machine.get("software", {}).items()))
    if about.get("options"):
        lines.append("options: " + ", ".join(f"{name} {value}" for name, value in about["options"].items()))
    return "\n".join(lines)


def speedups(results: Results, group: str, new: str, old: str, quantities: Sequence[str], more_is_better: bool) -> None:
    """Enter, for each quantity that both cases have, by which factor the new one is better."""
    for quantity in quantities:
        a, b = results.value(group, new, quantity), results.value(group, old, quantity)
        if a and b:
            results.add(RATIOS, f"{group}: {new} against {old}", quantity, "x", a / b if more_is_better else b / a)
