"""Matching with truth, shards, and how fields are divided."""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgclassify.model.data import dataset as dataset_module
from sgclassify.model.data.dataset import make_dataset
from sgclassify.model.data.match import catalog_columns, match_truth
from sgclassify.model.data.shards import CATALOG_COLUMNS, read_samples, read_shard, split_of, write_shard
from sgclassify.stages.bands import BANDS
from sgclassify.stages.errors import UsageError
from sgclassify.stages.features import FEATURES
from sgclassify.stages.program import TRAINING_DATA, code_digest

ARCSEC = 1 / 3600

SEED = 519
"""Of a data set whose fields 9 and 10 are of the smallest detectors, one exposure a band."""


def truth_of(ra, dec, mag):
    columns = {"ra": np.asarray(ra, float), "dec": np.asarray(dec, float)}
    return pa.table(columns | {f"mag_{band}": np.asarray(mag, float) for band in BANDS})


def brute_force(ra, dec, truth, mag, radius):
    match = np.full(len(ra), -1)
    for row in np.argsort(mag, kind="stable"):
        d = np.hypot((ra - truth["ra"][row].as_py()) * np.cos(np.radians(dec)), dec - truth["dec"][row].as_py())
        d = np.where(match < 0, d, np.inf)
        if len(d) and d.min() < radius * ARCSEC:
            match[np.argmin(d)] = row
    return match


@given(seed=st.integers(0, 2**20), n=st.integers(0, 30), m=st.integers(0, 30))
@settings(max_examples=60, deadline=None)
def test_match_is_one_to_one_brightest_first(seed, n, m):
    rng = np.random.default_rng(seed)
    ra, dec = 359.9999 + rng.uniform(0, 0.8, n) * ARCSEC, 40 + rng.uniform(0, 0.8, n) * ARCSEC
    mag = rng.uniform(18, 26, m)
    truth = truth_of(359.9999 + rng.uniform(0, 0.8, m) * ARCSEC, 40 + rng.uniform(0, 0.8, m) * ARCSEC, mag)
    found = match_truth(ra, dec, truth, 0.15)
    used = found[found >= 0]
    assert len(set(used)) == len(used)
    np.testing.assert_array_equal(found, brute_force(ra, dec, truth, mag, 0.15))


def test_match_works_over_the_meridian():
    truth = truth_of([0.0], [10.0], [20.0])
    assert match_truth([360.0 - 0.1 * ARCSEC], [10.0], truth).tolist() == [0]
    assert match_truth([360.0 - 0.2 * ARCSEC], [10.0], truth).tolist() == [-1]


def test_a_quarter_of_truth_without_a_magnitude_is_matched_last():
    truth = truth_of([10.0, 10.0], [0.0, 0.0], [np.nan, 25.0])
    assert match_truth([10.0], [0.0], truth).tolist() == [1]


def test_truth_without_magnitudes_is_matched_nearest_first():
    positions = pa.table({"ra": [10.0, 10.0 + 0.05 * ARCSEC], "dec": [0.0, 0.0]})
    # both are near the object, the second is nearer, whatever the order of the rows
    assert match_truth([10.0 + 0.06 * ARCSEC], [0.0], positions).tolist() == [1]
    assert match_truth([10.0 + 0.06 * ARCSEC], [0.0], positions.take([1, 0])).tolist() == [0]
    # the closest pair that is still free, not the row that is near an object that is taken
    objects = np.array([0.0, 0.14]) * ARCSEC
    three = pa.table({"ra": 10.0 + np.array([-0.02, 0.03, 0.19]) * ARCSEC, "dec": np.zeros(3)})
    assert match_truth(10.0 + objects, np.zeros(2), three).tolist() == [0, 2]
    # magnitudes of one band are enough
    bright = positions.append_column("mag_z", pa.array([20.0, 21.0]))
    assert match_truth([10.0 + 0.06 * ARCSEC], [0.0], bright).tolist() == [0]


def test_shards_come_back_as_they_were(tmp_path):
    rng = np.random.default_rng(1)
    parts = []
    for k, n in enumerate((5, 3)):
        shape = (n, 7, len(FEATURES))
        arrays = {
            "image": rng.normal(0, 0.1, (n, 7, 12, 12)).astype(np.float32),
            "valid": rng.random((n, 7, 12, 12)) > 0.3,
            "sigma": rng.random((n, 7)).astype(np.float32),
            "features": np.where(rng.random(shape) > 0.2, rng.normal(size=shape), np.nan).astype(np.float32),
            "psf": rng.random((n, 7, 12, 12)).astype(np.float32),
            "catalog": rng.random((n, 7, len(CATALOG_COLUMNS))).astype(np.float32),
        }
        table = pa.table({"object_id": np.arange(n) + 10 * k, "true_class": ["star"] * n})
        write_shard(tmp_path / f"{k}.parquet", table, arrays)
        parts.append((table, arrays))
    sample = read_samples([tmp_path / "0.parquet", tmp_path / "1.parquet"])
    assert len(sample) == 8
    assert sample.table["object_id"].to_pylist() == [0, 1, 2, 3, 4, 10, 11, 12]
    np.testing.assert_array_equal(sample.valid[:5], parts[0][1]["valid"])
    np.testing.assert_array_equal(sample.features[5:], parts[1][1]["features"])
    np.testing.assert_allclose(sample.image[:5], parts[0][1]["image"], rtol=1e-3, atol=1e-7)
    one = read_shard(tmp_path / "1.parquet").take(np.array([2, 0]))
    assert one.table["object_id"].to_pylist() == [12, 10]
    np.testing.assert_array_equal(one.sigma, parts[1][1]["sigma"][[2, 0]])


@pytest.mark.parametrize("n", [10, 40])
def test_a_smaller_set_is_a_prefix_with_the_same_parts(n):
    parts = [split_of(k) for k in range(n)]
    assert parts == [split_of(k) for k in range(2 * n)][:n]
    assert parts.count("training") == 7 * n // 10
    assert {parts.count(name) for name in ("validation", "calibration", "test")} == {n // 10}


def test_catalogue_columns_go_to_the_nearest_object_of_their_band():
    row = {name: np.array([1.0, 2.0]) for name in CATALOG_COLUMNS}
    table = pa.table({"RA": [10.0, 10.0 + 3 * ARCSEC], "DEC": [0.0, 0.0]} | row)
    found = catalog_columns([10.0 + 3.05 * ARCSEC, 10.0 - 0.1 * ARCSEC, 10.01], [0.0] * 3, [("g", table)])
    assert found.shape == (3, 7, len(CATALOG_COLUMNS))
    np.testing.assert_array_equal(found[:2, BANDS.index("g"), 0], [2.0, 1.0])
    assert np.isnan(found[2]).all()
    assert np.isnan(found[:, BANDS.index("i")]).all()
    assert np.isnan(catalog_columns([10.0], [0.0], [])).all()


class Here(ThreadPoolExecutor):
    """Makes the fields in this process, which has imported the simulator."""

    def __init__(self, processes, mp_context):
        super().__init__(1)


@pytest.mark.thorough
@pytest.mark.slow
def test_a_set_is_made_in_parts_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    data, calls = tmp_path / "data", []

    def make(last, **more):
        return make_dataset(data, last, SEED, 16, 2, progress=lambda *done: calls.append(done), first=9, **more)

    with monkeypatch.context() as patch:
        patch.setattr(dataset_module, "ProcessPoolExecutor", Here)
        before = make(10)
        manifest = make(11)
    assert list(before["shards"]) == ["training/field00009.parquet"]
    # the first field was not made again, and is the same in the larger set
    assert calls == [(1, 1), (2, 2)]
    assert manifest["shards"].items() > before["shards"].items()
    assert sorted(manifest["shards"]) == ["training/field00009.parquet", "validation/field00010.parquet"]
    assert json.loads((data / "manifest.json").read_text()) == manifest
    assert sorted(p.name for p in data.iterdir()) == [
        "manifest.json",
        "settings.json",
        "training",
        "validation",
    ]
    for name, shard in manifest["shards"].items():
        assert hashlib.sha256((data / name).read_bytes()).hexdigest() == shard["sha256"]
        kinds = read_shard(data / name).table["true_class"].to_pylist()
        assert {kind: kinds.count(kind) for kind in shard["counts"]} == shard["counts"]
        assert shard["counts"]["star"] > 0
        assert sum(shard["stars_by_mag_i_14_to_28"]) == shard["counts"]["star"]
        assert sum(shard["galaxies_by_mag_i_14_to_28"]) == shard["counts"]["galaxy"]
        # only what is judged keeps what matches nothing
        assert (shard["counts"]["spurious"] > 0) == name.startswith("validation")
    # what is lost is made again, the same, in another process
    (data / "training/field00009.parquet").unlink()
    assert make(11) == manifest
    with pytest.raises(UsageError, match="other settings"):
        make_dataset(data, 11, SEED, 32, 1, first=9)


def test_a_set_is_not_continued_by_another_program(tmp_path, monkeypatch):
    assert make_dataset(tmp_path, 0, 1, 16, 1)["settings"]["code"] == code_digest(TRAINING_DATA)
    monkeypatch.setattr(dataset_module, "code_digest", lambda _: "0123456789abcdef")
    with pytest.raises(UsageError, match=r"another program .*settings\.json"):
        make_dataset(tmp_path, 0, 1, 16, 1)
