"""Matching with truth, shards, and how fields are divided."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgclassify.model.dataset import (
    CATALOG_COLUMNS,
    catalog_columns,
    match_truth,
    read_samples,
    read_shard,
    split_of,
    write_shard,
)
from sgclassify.stages.bands import BANDS

ARCSEC = 1 / 3600


def truth_of(ra, dec, mag):
    columns = {"ra": np.asarray(ra, float), "dec": np.asarray(dec, float)}
    return pa.table(columns | {f"mag_{band}": np.asarray(mag, float) for band in BANDS})


def brute_force(ra, dec, truth, mag, radius):
    match = np.full(len(ra), -1)
    for row in np.argsort(mag, kind="stable"):
        d = np.hypot(
            (ra - truth["ra"][row].as_py()) * np.cos(np.radians(dec)), dec - truth["dec"][row].as_py()
        )
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


def test_shards_come_back_as_they_were(tmp_path):
    rng = np.random.default_rng(1)
    parts = []
    for k, n in enumerate((5, 3)):
        arrays = {
            "image": rng.normal(0, 0.1, (n, 7, 12, 12)).astype(np.float32),
            "valid": rng.random((n, 7, 12, 12)) > 0.3,
            "sigma": rng.random((n, 7)).astype(np.float32),
            "features": np.where(rng.random((n, 7, 30)) > 0.2, rng.normal(size=(n, 7, 30)), np.nan).astype(
                np.float32
            ),
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
