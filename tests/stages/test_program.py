"""The digest that tells one program from another: the same files give the same, another line in one gives another."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from sgclassify.stages import program

NAMES = ("pipeline", "stages", "model", "simulation")
NO_RESULT = {"pipeline/errors.py", "pipeline/process.py"}
"""Imported by what decides about results, but only for where, when and of which files these are computed."""


def folder(package: str) -> Path:
    spec = find_spec(f"sgclassify.{package}")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])


@pytest.fixture
def installation(tmp_path: Path) -> Callable[[str], Path]:
    """Another installation of the package: ``installation(name)`` gives a folder for PYTHONPATH."""

    def install(name: str) -> Path:
        root = tmp_path / name
        for package in NAMES:
            shutil.copytree(
                folder(package),
                root / "sgclassify" / package,
                ignore=shutil.ignore_patterns("weights", "__pycache__"),
            )
        return root

    return install


def digest_in(root: Path, parts: str = "RESULTS") -> str:
    code = f"from sgclassify.stages import program; print(program.__file__, program.code_digest(program.{parts}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    path, digest = done.stdout.split()
    assert Path(path).is_relative_to(root)
    return digest


@pytest.mark.parametrize("parts", ["RESULTS", "TRAINING_DATA"])
def test_the_same_files_elsewhere_are_the_same_program(installation: Callable[[str], Path], parts: str) -> None:
    root = installation("copy")
    assert digest_in(root, parts) == program.code_digest(getattr(program, parts))
    # what Python or an editor leaves beside the sources
    (root / "sgclassify/stages/__pycache__").mkdir(exist_ok=True)
    (root / "sgclassify/stages/__pycache__/tile.cpython-311.pyc").write_bytes(b"\0")
    (root / "sgclassify/stages/tile.py~").write_text("x")
    assert digest_in(root, parts) == program.code_digest(getattr(program, parts))


@pytest.mark.parametrize(
    ("module", "decides"),
    [
        ("stages/measure.py", True),
        ("stages/read/pixels.py", True),
        ("model/serve/runtime.py", True),
        ("pipeline/tasks.py", True),
        ("pipeline/record/report.py", False),
        ("model/train/loop.py", False),
    ],
)
def test_a_line_more_is_another_program(installation: Callable[[str], Path], module: str, decides: bool) -> None:
    root = installation("changed")
    path = root / "sgclassify" / module
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as stream:
        stream.write("\n# another line\n")
    assert (digest_in(root) != program.code_digest()) == decides


def test_a_module_that_is_renamed_or_new_is_another_program(installation: Callable[[str], Path]) -> None:
    root = installation("more")
    digests = {program.code_digest()}
    (root / "sgclassify/stages/bands.py").rename(root / "sgclassify/stages/band.py")
    digests.add(digest_in(root))
    (root / "sgclassify/stages/new.py").write_text("")
    digests.add(digest_in(root))
    assert len(digests) == 3


def modules_of(parts: tuple[str, ...]) -> Iterator[Path]:
    for part in parts:
        package, _, module = part.partition("/")
        single = module.endswith(".py")
        yield from [folder(package) / module] if single else (folder(package) / module).rglob("*.py")


@pytest.mark.parametrize("parts", [program.RESULTS, program.TRAINING_DATA], ids=["results", "data"])
def test_nothing_that_decides_is_left_out(parts: tuple[str, ...]) -> None:
    counted = {path.resolve() for path in modules_of(parts)}
    missing = set()
    for path in counted:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("sgclassify."):
                continue
            _, package, *rest = (node.module or "").split(".")
            names = [rest] if rest else [[alias.name] for alias in node.names]
            for name in names:
                module = folder(package).joinpath(*name).with_suffix(".py").resolve()
                if module.is_file() and module not in counted:
                    missing.add("/".join([package, *name]) + ".py")
    assert missing <= NO_RESULT
