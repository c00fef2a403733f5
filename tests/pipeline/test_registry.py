"""What others rely on is frozen here as literal tables, and the documentation says the same as the code."""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from importlib import util
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sgclassify.model.serve.archive import default_model
from sgclassify.model.serve.contract import ModelContract
from sgclassify.pipeline.record.record import (
    DONE,
    MODEL_KEYS,
    SET_ASIDE,
    ExposureRecord,
    RunRecord,
    TileRecord,
)
from sgclassify.stages import errors
from sgclassify.stages.classify import scored_table
from sgclassify.stages.errors import ExitCode
from sgclassify.stages.flags import SgFlag
from sgclassify.stages.healpix import tile_cone
from sgclassify.stages.write.publish import publish_detections, publish_objects

ROOT = Path(__file__).parents[2]

FLAGS = {
    "NO_POSITION": 1,
    "POSITION_MISMATCH": 2,
    "NOT_SCORED": 4,
    "NO_WEIGHT": 8,
    "NO_FLAG_IMAGE": 16,
    "STAGE_CATALOG": 32,
    "EDGE": 64,
    "MASKED": 128,
    "SATURATED": 256,
    "COSMIC_RAY": 512,
    "ARTIFACT": 1024,
    "BLENDED": 2048,
    "FEW_BANDS": 4096,
    "LOW_SNR": 8192,
    "DUPLICATE_ID": 16384,
    "NOT_FINITE": 32768,
}

# name, type, nullable: as they are in the files
SCORES = [
    ("p_star", pa.float32(), True),
    ("p_galaxy", pa.float32(), True),
    ("sg_class", pa.string(), True),
    ("sg_flags", pa.int32(), False),
    ("n_bands", pa.int8(), False),
    ("bands", pa.string(), True),
]
OBJECTS = [
    ("object_id", pa.int64(), False),
    ("ra", pa.float64(), True),
    ("dec", pa.float64(), True),
    *SCORES,
    ("logit", pa.float64(), True),
    ("sg_stage", pa.int8(), False),
    ("_healpix_29", pa.int64(), False),
]
DETECTIONS = [("object_id", pa.int64(), False), *SCORES]

EXIT_CODES = {
    "DONE": 0,
    "DEFECT": 1,
    "USAGE": 2,
    "SET_ASIDE": 3,
    "NO_INPUT": 4,
    "NO_MODEL": 5,
    "NO_CLUSTER": 6,
}
ERRORS = {
    "SgClassifyError": 1,
    "UsageError": 2,
    "UnusableInputError": 3,
    "NothingToDoError": 4,
    "ModelError": 5,
    "ClusterError": 6,
}

ARCHIVE_FILES = ["extra/contract.json", "extra/reference.npz"]
CONTRACT = [
    "bands", "calibration", "cascade", "class_order", "contract_version", "features", "flux_unit", "head", "inputs",
    "model_id", "n_parameters", "pixel_scale", "prior_star_fraction", "reference_tolerance", "stamp_size",
    "temperature", "training", "training_set_id",
]  # fmt: skip
REFERENCE = {
    "image": ("float32", (16, 7, 32, 32)),
    "valid": ("bool", (16, 7, 32, 32)),
    "sigma": ("float32", (16, 7)),
    "features": ("float32", (16, 7, 37)),
    "psf": ("float32", (16, 7, 32, 32)),
    "p_star": ("float32", (16,)),
}
FEATURES = [
    "detected", "snr", "flux", "depth", "ratio_0.7", "ratio_1.8", "ratio_2.7", "ratio_4.0", "ratio_6.0", "size",
    "size_wide", "ellipticity", "peak", "excess_0.7", "excess_1.8", "excess_2.7", "excess_4.0", "excess_size",
    "significance_0.7", "significance_1.8", "significance_2.7", "significance_4.0", "psf_flux", "psf_snr",
    "psf_misfit", "extended_1.0", "extended_2.5", "extended_snr_1.0", "extended_snr_2.5", "psf_size",
    "psf_ratio_2.7", "psf_stars", "header_fwhm", "annulus", "valid_core", "valid_stamp", "saturated_core",
]  # fmt: skip

RUN_JSON = [
    "record_version", "exit_code", "message", "started", "finished", "command", "software", "configuration", "model",
    "counts", "notes", "inputs", "tiles", "peak_mib", "timings",
]  # fmt: skip
SOFTWARE = [
    "python", "sgclassify code", "sgclassify", "numpy", "astropy", "photutils", "pyarrow", "hats", "distributed",
    "torch",
]  # fmt: skip
MODEL = ["id", "sha256", "prior_star_fraction", "model_prior_star_fraction", "path", "exact", "device"]
COUNTS = [
    "exposures", "exposures_done", "exposures_set_aside", "exposures_skipped", "exposures_pending", "tiles",
    "tiles_done", "tiles_set_aside", "tiles_pending", "tiles_reused", "retried", "objects", "stars", "galaxies",
    "not_scored", "rows", "rows_scored",
]  # fmt: skip
INPUT = [
    "id", "files", "sha256", "band", "outcome", "file", "fault", "advice", "traceback", "notes", "rows", "usable",
    "scored", "attempts", "seconds", "worker", "peak_mib",
]  # fmt: skip
TILE = [
    "order", "pixel", "exposures", "outcome", "n_objects", "n_stars", "n_galaxies", "n_not_scored", "seconds",
    "attempts", "worker", "device", "peak_mib", "file", "fault", "advice", "traceback",
]  # fmt: skip
REASONS = {"file", "fault", "advice", "traceback"}


def test_flag_bits() -> None:
    assert {flag.name: flag.value for flag in SgFlag} == FLAGS


def test_columns_of_the_products(tmp_path: Path) -> None:
    pixel = 12 * 4**5 // 2
    x, y, z = tile_cone(5, pixel)[0]
    ra, dec = np.degrees(np.arctan2(y, x)), np.degrees(np.arcsin(z))
    table = scored_table([7], [ra], [dec], [0.25], [-1.0], [0], [3], ["g,r,i"])
    path = publish_objects(5, pixel, table, tmp_path, {})
    assert path is not None
    assert [(f.name, f.type, f.nullable) for f in pq.read_schema(path)] == OBJECTS
    scores = table.drop_columns(["ra", "dec", "logit", "_healpix_29"]).append_column("row", pa.array([0]))
    publish_detections(pa.table({"objID": [1, 2]}), scores, tmp_path / "c.parquet", {})
    fields = list(pq.read_schema(tmp_path / "c.parquet"))
    assert [(f.name, f.type, f.nullable) for f in fields[1:]] == DETECTIONS


def test_exit_codes() -> None:
    assert {code.name: code.value for code in ExitCode} == EXIT_CODES
    assert {name: getattr(errors, name).exit_code for name in ERRORS} == ERRORS


def test_layout_of_the_model_archive() -> None:
    with zipfile.ZipFile(default_model()) as archive:
        inside = {name.partition("/")[2]: name for name in archive.namelist()}
        assert sorted(name for name in inside if name.startswith("extra/")) == ARCHIVE_FILES
        contract = json.loads(archive.read(inside["extra/contract.json"]))
        reference = np.load(io.BytesIO(archive.read(inside["extra/reference.npz"])))
    # the shipped archive is of the version before, whose models do not answer in stages
    assert sorted(field.name for field in dataclasses.fields(ModelContract)) == CONTRACT
    assert sorted(contract) == [name for name in CONTRACT if name != "cascade"]
    assert contract["contract_version"] == 2
    assert contract["inputs"] == list(REFERENCE)[:-1]
    assert contract["bands"] == ["NUV", "u", "g", "r", "i", "z", "y"]
    assert contract["features"] == FEATURES
    assert contract["class_order"] == ["star", "galaxy"]
    assert {name: (str(reference[name].dtype), reference[name].shape) for name in reference.files} == REFERENCE


def test_keys_of_run_json(tmp_path: Path) -> None:
    record = RunRecord([], {}, {}, tmp_path)
    bad = {"outcome": SET_ASIDE, "file": "f", "fault": "fault", "advice": "advice", "traceback": "Traceback"}
    record.exposures = [ExposureRecord("a", {}, outcome=DONE), ExposureRecord("b", {}, **bad)]
    record.tiles = [TileRecord(5, 1, ["a"], outcome=DONE), TileRecord(5, 2, ["a"], **bad)]
    record.write(tmp_path / "run.json")
    content = json.loads((tmp_path / "run.json").read_text())
    assert content["record_version"] == 3
    assert list(content) == RUN_JSON
    assert list(content["software"]) == SOFTWARE
    assert list(content["counts"]) == COUNTS
    for kind, keys in (("inputs", INPUT), ("tiles", TILE)):
        done, aside = content[kind]
        assert list(done) == [key for key in keys if key not in REASONS]
        assert list(aside) == keys
    assert list(MODEL_KEYS) == MODEL


@pytest.fixture
def tables() -> ModuleType:
    """The module ``docs/tables.py``."""
    spec = util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_files_say_what_the_code_says(tables: ModuleType) -> None:
    for path, text in tables.generated().items():
        assert path.read_text() == text, f"{path} differs from the code: run `make tables`"
    marks = [mark[1] for mark in tables.MARKED.finditer(tables.REFERENCE.read_text())]
    assert sorted(marks) == sorted(tables.TABLES)


def test_a_stale_table_is_seen(tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "reference.md"
    page.write_text(tables.REFERENCE.read_text().replace("| 64 | EDGE |", "| 65 | EDGE |"))
    monkeypatch.setattr(tables, "REFERENCE", page)
    assert tables.generated()[page] != page.read_text()
    assert tables.generated()[page] == (ROOT / "docs" / "reference.md").read_text()
