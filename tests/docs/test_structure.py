"""The rules of the structure (docs/architecture.md), checked on the sources by docs/structure.py."""

from __future__ import annotations

import ast
import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _load(path: Path) -> ModuleType:
    """A script of docs/ as a module; docs is no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


structure = _load(ROOT / "docs" / "structure.py")


def _write(root: Path, sources: dict[str, str]) -> None:
    """Write modules below ``root``, with the packages that they need."""
    for part in structure.LAYERS:
        (root / part).mkdir(parents=True)
    for name, text in sources.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


# --- this project


def test_sources_keep_the_rules() -> None:
    assert structure.faults(structure.read_structure()) == []


def test_every_module_is_read() -> None:
    found = structure.read_structure()
    paths = [path for part in structure.LAYERS for path in (ROOT / part).rglob("*.py")]
    assert len(found.imports) == len(paths)
    # an import that only stands within a function, and one below TYPE_CHECKING, would be missed by a look at run time
    assert "stages.errors" in found.imports["pipeline.run"]


def test_exceptions_are_needed() -> None:
    found = structure.read_structure()
    assert all(found.opened[module] for module in structure.OPENED_BY_DESIGN)


def test_page_has_the_diagram_of_the_sources() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    drawn = structure.diagram(structure.read_structure())
    assert structure.with_diagram(page, drawn) == page, "python docs/structure.py --write"


# --- the rules themselves


@pytest.mark.parametrize(
    ("one", "fault"),
    [
        ("from sgclassify.stages import b", "import circle: stages.a, stages.b"),
        ("from sgclassify.stages.b import thing", "import circle: stages.a, stages.b"),
        ("import sgclassify.stages.b", "import circle: stages.a, stages.b"),
        ("def f():\n    from sgclassify.stages.b import thing", "import circle: stages.a, stages.b"),
        (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from sgclassify.stages.b import Thing",
            "import circle: stages.a, stages.b",
        ),
        ("from sgclassify.model import c", "stages.a imports model.c, which is a higher layer"),
        (
            "def f():\n    import sgclassify.pipeline.d",
            "stages.a imports pipeline.d, which is a higher layer",
        ),
        ("f = open('x')", "stages.a opens a file in line 1: open"),
        ("import numpy as np\nf = np.load('x')", "stages.a opens a file in line 2: np.load"),
        (
            "from pathlib import Path\ntext = Path('x').read_text()",
            "stages.a opens a file in line 2: Path('x').read_text",
        ),
        (
            "from astropy.io import fits\nwith fits.open('x') as f: ...",
            "stages.a opens a file in line 2: fits.open",
        ),
        (
            "from pyarrow.parquet import ParquetFile\nfile = ParquetFile('x')",
            "stages.a opens a file in line 2: ParquetFile",
        ),
    ],
)
def test_what_goes_against_the_rules_is_found(tmp_path: Path, one: str, fault: str) -> None:
    _write(
        tmp_path,
        {
            "stages/a.py": one,
            "stages/b.py": "import sgclassify.stages.a",
            "model/c.py": "",
            "pipeline/d.py": "",
        },
    )
    assert structure.faults(structure.read_structure(tmp_path)) == [fault]


@pytest.mark.parametrize(
    "one",
    [
        "import io\nimport numpy as np\nbuffer = io.BytesIO()\nnp.savez(buffer, a=1)",
        "from sgclassify.stages.read import table\ntable.open('x')",
        "def f(load):\n    return load(3)",
        "from sgclassify.stages.read.table import read_table\nread_table('x')",
    ],
)
def test_what_opens_no_file_is_no_fault(tmp_path: Path, one: str) -> None:
    _write(tmp_path, {"stages/a.py": one, "stages/read/table.py": "f = open('x')", "stages/read/__init__.py": ""})
    assert structure.faults(structure.read_structure(tmp_path)) == []


def test_circle_of_three_modules(tmp_path: Path) -> None:
    _write(
        tmp_path,
        {
            "model/a.py": "import sgclassify.model.b",
            "model/b.py": "import sgclassify.model.c",
            "model/c.py": "import sgclassify.model.a, sgclassify.model.d",
            "model/d.py": "",
        },
    )
    assert structure.circles(structure.read_structure(tmp_path).imports) == [["model.a", "model.b", "model.c"]]


def test_names_of_modules_and_of_what_they_hold() -> None:
    tree = ast.parse("from sgclassify.stages import errors\nfrom sgclassify.stages.errors import UsageError\nimport os")
    assert list(structure.imported(tree, {"stages", "stages.errors"})) == ["stages.errors", "stages.errors"]
    with pytest.raises(ImportError, match=r"sgclassify\.other"):
        list(structure.imported(ast.parse("import sgclassify.other"), {"stages"}))


# --- the walks of the architecture page


def _places() -> list[tuple[str, str]]:
    """Files of the architecture page, each with the name that the page says is there."""
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    found = re.findall(r"`((?:pipeline|model|simulation|stages)/[\w/]*(?:\.\w+)?)(?::\s+([\w.]+))?`", page)
    assert len(found) > 30
    return found


@pytest.mark.parametrize(("path", "name"), _places())
def test_page_names_what_is_there(path: str, name: str) -> None:
    assert (ROOT / path).exists()
    if not name:
        return
    body: list[ast.stmt] = ast.parse((ROOT / path).read_text(encoding="utf-8")).body
    for word in name.split("."):
        (node,) = [node for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name == word]
        body = node.body
