"""Write the tables of docs/reference.md and pipeline/default.toml from the declarations in the code.

``python docs/tables.py`` (or ``make tables``) rewrites both; a test fails where they differ from the code.
"""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa

from sgclassify.pipeline.config import SECTIONS, default_text
from sgclassify.pipeline.record.record import COUNTS, ENTRIES, MODEL_KEYS, ExposureRecord, TileRecord
from sgclassify.stages.columns import DETECTION_COLUMNS, INPUT_COLUMNS, OBJECT_COLUMNS, Column, nullable
from sgclassify.stages.errors import ExitCode
from sgclassify.stages.features import DECLARED
from sgclassify.stages.flags import SgFlag
from sgclassify.stages.settings import declared

ROOT: Final = Path(__file__).parent.parent
REFERENCE: Final = ROOT / "docs" / "reference.md"
DEFAULTS: Final = ROOT / "pipeline" / "default.toml"
MARKED: Final = re.compile(r"<!-- generated: ([\w ]+) -->\n.*?<!-- end -->", re.DOTALL)


def table(head: str, rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table.

    Parameters
    ----------
    head : str
        Names of the columns, separated by commas.
    rows : iterable of sequences
        The cells.

    Returns
    -------
    str
    """
    names = head.split(", ")
    cells = [names, ["---"] * len(names), *([str(cell).replace("|", r"\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _type(kind: pa.DataType) -> str:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return str(kind) if pa.types.is_string(kind) else np.dtype(kind.to_pandas_dtype()).name


def _columns(columns: Iterable[Column]) -> str:
    return table(
        "column, type, unit, UCD, nullable, description",
        (
            (
                f"`{c.name}`",
                _type(c.type),
                c.unit,
                c.ucd,
                "yes" if nullable(c.type) else "no",
                c.description,
            )
            for c in columns
        ),
    )


def _settings(section: str) -> str:
    return table(
        "setting, type, default, allowed, meaning",
        (
            (
                f"`{s.name}`",
                s.type.__name__,
                f"`{json.dumps(s.default)}`",
                s.allowed,
                f"{s.meaning} {s.reason}".strip(),
            )
            for s in declared(SECTIONS[section])
        ),
    )


def _keys(meanings: Iterable[tuple[str, str]]) -> str:
    return table("key, meaning", ((f"`{key}`", meaning) for key, meaning in meanings))


def _fields(kind: type) -> str:
    hints = typing.get_type_hints(kind, include_extras=True)
    return _keys((f.name, hints[f.name].__metadata__[0]) for f in dataclasses.fields(kind))


TABLES: Final[dict[str, Callable[[], str]]] = {
    "flags": lambda: table("bit, name, meaning", ((int(f), f.name, f.meaning) for f in SgFlag)),
    "columns of objects": lambda: _columns(OBJECT_COLUMNS),
    "columns of detections": lambda: _columns(DETECTION_COLUMNS),
    "columns of catalogues": lambda: table(
        "column, unit, UCD, description",
        ((f"`{c.name}`", c.unit, c.ucd, c.description) for c in INPUT_COLUMNS.values()),
    ),
    "exit codes": lambda: table(
        "code, name, meaning, cases, what to do",
        ((int(c), c.name, c.meaning, c.cases, c.advice) for c in ExitCode),
    ),
    "settings of run": lambda: _settings("run"),
    "settings of stage": lambda: _settings("stage"),
    "features": lambda: table("feature, unit, definition", ((f"`{f.name}`", f.unit, f.definition) for f in DECLARED)),
    "run json": lambda: _keys((key, meaning) for key, (meaning, _) in ENTRIES.items()),
    "run json model": lambda: _keys(MODEL_KEYS.items()),
    "run json counts": lambda: _keys((key, meaning) for key, (meaning, _) in COUNTS.items()),
    "run json inputs": lambda: _fields(ExposureRecord),
    "run json tiles": lambda: _fields(TileRecord),
}
"""What stands between ``<!-- generated: NAME -->`` and ``<!-- end -->``."""


def generated() -> dict[Path, str]:
    """The generated files as they should be."""
    reference = MARKED.sub(
        lambda mark: f"<!-- generated: {mark[1]} -->\n\n{TABLES[mark[1]]()}\n\n<!-- end -->",
        REFERENCE.read_text(encoding="utf-8"),
    )
    return {REFERENCE: reference, DEFAULTS: default_text()}


if __name__ == "__main__":
    for path, text in generated().items():
        path.write_text(text, encoding="utf-8")
