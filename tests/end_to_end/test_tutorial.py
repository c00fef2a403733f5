"""The tutorial (docs/tutorial.md) does what it says."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

from sgclassify.pipeline import cli

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "tutorial.md").read_text(encoding="utf-8")


def test_commands_are_understood() -> None:
    commands = [shlex.split(line) for line in PAGE.splitlines() if line.startswith("sgclassify ")]
    assert {words[1] for words in commands} == {"simulate", "run", "status", "evaluate"}
    for _, name, *words in commands:
        command = cli.main.get_command(click.Context(cli.main), name)
        assert command is not None
        parser = command.make_parser(click.Context(command))
        _, left, _ = parser.parse_args(words)
        assert name == "status" or not left


@pytest.mark.slow
def test_python_runs_on_the_products(reference: Any, tmp_path: Path) -> None:
    (tmp_path / "tutorial").mkdir()
    (tmp_path / "tutorial" / "output").symlink_to(reference.output)
    code = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
    assert code.count("print(") > 5
    # other projects' warnings are theirs
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "objects are stars" in done.stdout
    assert "calibrated probability that the object is a star" in done.stdout
    assert re.search(r"^i done", done.stdout, re.MULTILINE)
