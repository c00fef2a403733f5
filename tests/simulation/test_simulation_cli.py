"""The command ``simulate``."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("galsim")
pytest.importorskip("skypy")

from sgclassify.simulation.cli import simulate


def test_makes_fields_and_says_where_the_list_is(tmp_path: Path) -> None:
    arguments = ["-o", str(tmp_path), "--size", "48", "32", "--bands", "g,r", "--seed", "4", "--no-catalogs"]
    first = CliRunner().invoke(simulate, arguments)
    assert first.exit_code == 0, first.output
    assert "1 fields made, 0 kept, 2 exposures" in first.output
    assert str(tmp_path / "exposures.txt") in first.output
    again = CliRunner().invoke(simulate, arguments)
    assert "0 fields made, 1 kept" in again.output
    other = CliRunner().invoke(simulate, [*arguments, "--star-fraction", "0.1", "0.2"])
    assert other.exit_code == 1
    assert "another configuration" in other.output


@pytest.mark.parametrize("wrong", [["--bands", "V"], ["--size", "4", "4"], ["--star-fraction", "0.5", "0.1"]])
def test_refuses_what_makes_no_sense(tmp_path: Path, wrong: list[str]) -> None:
    result = CliRunner().invoke(simulate, ["-o", str(tmp_path), *wrong])
    assert result.exit_code == 2
