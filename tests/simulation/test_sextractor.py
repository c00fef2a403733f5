"""SExtractor and PSFEx on simulated exposures; skipped where Debian's packages are not installed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

pytest.importorskip("galsim")

from sgclassify.model.data.shards import CATALOG_COLUMNS
from sgclassify.simulation import sextractor
from sgclassify.simulation.simulate import SimulationConfig, simulate_field
from sgclassify.stages.read.catalog import read_table

CONFIG = SimulationConfig(
    seed=3, detector_shape=(768, 768), bands=("i",), star_fraction=(0.5, 0.5), catalog_program="sextractor",
    sextractor_columns=True,
)  # fmt: skip

needs_sextractor = pytest.mark.skipif(
    not sextractor.available(), reason="Debian's packages sextractor and psfex are not installed"
)


@pytest.fixture(scope="module")
def field(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    result = simulate_field(CONFIG, 0, tmp_path_factory.mktemp("field"))
    (image,) = result.images
    return image, result.truth


def near(table: pa.Table, row: dict[str, Any]) -> int | None:
    """Row of a catalogue within 0.1 arcsec of a truth."""
    ra, dec = table["RA"].to_numpy(), table["DEC"].to_numpy()
    distance = np.hypot((ra - row["ra"]) * np.cos(np.radians(row["dec"])), dec - row["dec"]) * 3600
    return int(distance.argmin()) if distance.min() < 0.1 else None


@needs_sextractor
def test_catalogue_has_the_official_columns_and_finds_the_truth(field: tuple[Path, Path]) -> None:
    image, truth_path = field
    table = read_table(image.with_name(image.name.replace("IMG", "CAT")))
    assert {"objID", "X", "Y", "RA", "DEC", "Flag", "Flux_Aper12", "R50", "Class_Star"} <= set(table.column_names)
    truth = pq.read_table(truth_path, columns=["ra", "dec", "mag_i", "true_class"]).to_pylist()
    bright = [row for row in truth if 19.5 < row["mag_i"] < 23 and row["true_class"] == "star"]
    magnitudes = table["Mag_Kron"].to_numpy(zero_copy_only=False)
    matches = [(near(table, row), row) for row in bright]
    differences = [magnitudes[found] - row["mag_i"] for found, row in matches if found is not None]
    assert len(differences) >= 3
    assert abs(np.median(differences)) < 0.15


@needs_sextractor
def test_columns_for_the_baselines_know_points(field: tuple[Path, Path]) -> None:
    image, truth_path = field
    table = pq.read_table(image.with_name(f"{image.name.split('.')[0]}.sextractor.parquet"))
    assert set(CATALOG_COLUMNS) <= set(table.column_names)
    spread: dict[str, list[float]] = {"star": [], "galaxy": []}
    for row in pq.read_table(truth_path, columns=["ra", "dec", "mag_i", "true_class", "blended"]).to_pylist():
        found = near(table, row)
        if found is not None and row["true_class"] in spread and 19.5 < row["mag_i"] < 22.5 and not row["blended"]:
            spread[row["true_class"]].append(table["Spread_Model"][found].as_py())
    assert len(spread["star"]) >= 3
    assert abs(np.median(spread["star"])) < 0.004
    assert np.median(spread["galaxy"]) > 0.004
    flux, mag = table["Flux_Kron"].to_numpy(), table["Mag_Kron"].to_numpy(zero_copy_only=False)
    good = np.isfinite(mag) & (flux > 0)
    np.testing.assert_allclose(22.5 - 2.5 * np.log10(flux[good]), mag[good], atol=2e-3)


@needs_sextractor
def test_a_failing_program_is_named_with_its_last_words(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = tmp_path / "source-extractor"
    fake.write_text("#!/bin/sh\necho 'no memory left' >&2\nexit 3\n")
    fake.chmod(0o755)
    monkeypatch.setattr(sextractor, "_program", lambda: str(fake))
    with pytest.raises(RuntimeError, match="exit code 3: no memory left"):
        simulate_field(CONFIG, 0, tmp_path)


def test_without_the_program_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sextractor, "_program", lambda: None)
    assert not sextractor.available()
    with pytest.raises(RuntimeError, match="sextractor and psfex"):
        simulate_field(CONFIG, 0, tmp_path)


@needs_sextractor
def test_nothing_is_left_in_the_temporary_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    simulate_field(CONFIG, 0, tmp_path / "out")
    assert list(scratch.iterdir()) == []
