"""What may stand where in stages/: files are opened in read/ and write/ only, and errors are defined in errors.py."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

MODULES_THAT_OPEN = {"parquet", "csv", "dataset", "fits", "shutil", "tempfile", "mmap", "sqlite3"}
METHODS_THAT_OPEN = {
    "open",
    "read_bytes",
    "read_text",
    "write_bytes",
    "write_text",
    "tofile",
    "unlink",
    "mkdir",
}
NUMPY_THAT_OPENS = {
    "load",
    "save",
    "savez",
    "savez_compressed",
    "memmap",
    "fromfile",
    "loadtxt",
    "savetxt",
    "genfromtxt",
}
EXCEPT = {"program.py"}
"""Reads its own sources."""


def modules() -> Iterator[tuple[str, ast.Module]]:
    spec = find_spec("sgclassify.stages")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    root = Path(spec.submodule_search_locations[0])
    for path in sorted(root.rglob("*.py")):
        yield path.relative_to(root).as_posix(), ast.parse(path.read_text())


def opens(tree: ast.Module) -> set[str]:
    """Names of what opens a file in a module."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[-1] in MODULES_THAT_OPEN}
        elif isinstance(node, ast.ImportFrom):
            parts = {(node.module or "").split(".")[-1], *(alias.name for alias in node.names)}
            found |= parts & MODULES_THAT_OPEN
        elif isinstance(node, ast.Call):
            owner, _, name = ast.unparse(node.func).rpartition(".")
            found |= {name} & (METHODS_THAT_OPEN | (NUMPY_THAT_OPENS if owner == "np" else set()))
    return found


def test_only_read_and_write_open_files() -> None:
    found = {name: opens(tree) for name, tree in modules()}
    outside = {name: what for name, what in found.items() if what and not name.startswith(("read/", "write/"))}
    # the scan sees the files that are opened
    assert {"read/prepared.py", "read/prior.py", "read/image.py", "write/atomic.py"} <= {n for n in found if found[n]}
    assert set(outside) == EXCEPT, outside


def test_errors_are_defined_in_one_place() -> None:
    defined = {
        (name, node.name)
        for name, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef) and node.name.endswith("Error")
    }
    assert ("errors.py", "SlitlessExposureError") in defined
    assert {name for name, _ in defined} == {"errors.py"}
