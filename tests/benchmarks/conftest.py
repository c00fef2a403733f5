"""The package of the benchmarks, which is not installed, and a field that is small enough for it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
if str(BENCHMARKS) not in sys.path:
    sys.path.append(str(BENCHMARKS))


@pytest.fixture(scope="session")
def listed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven exposures of 300 x 280 pixels."""
    pytest.importorskip("galsim")
    folder = tmp_path_factory.mktemp("benchmarks") / "field"
    command = [sys.executable, "-m", "sgclassify.pipeline", "simulate", "--output", str(folder), "--seed", "7"]
    subprocess.run([*command, "--size", "300", "280"], check=True, capture_output=True)
    return folder / "exposures.txt"
