"""The naive pipeline: written by other means, with the same answers."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.thorough]


def test_answers_are_those_of_the_product(listed: Path, tmp_path: Path) -> None:
    from performance import stages
    from performance.agreement import agreement, objects_of
    from performance.naive.pipeline import run

    pytest.importorskip("pandas")
    found = stages.measure(listed, tmp_path / "work", exact_products=True)
    product = objects_of(tmp_path / "work")
    naive = run(listed, tmp_path / "naive")
    assert len(product[0]) == found["extract"]["count"] == len(naive.ra) > 30
    same = agreement(product, (naive.ra, naive.dec, naive.p_star.astype(np.float64)))
    assert same.objects == 1.0
    assert same.same == 1.0
    # both read: rows of all catalogues, each with the probability of its object
    tables = sorted((tmp_path / "naive").glob("*_L1_V01_IMG.parquet"))
    assert sum(pq.read_metadata(path).num_rows for path in tables) == found["join"]["count"]
    joined = pq.read_table(tables[0])
    assert joined["p_star"].null_count == 0


def test_stages_are_all_measured(listed: Path, tmp_path: Path) -> None:
    from performance import stages
    from performance.parts import NOT_NETWORK

    found = stages.repeated(lambda work: stages.measure(listed, work), tmp_path / "work")
    assert {*NOT_NETWORK, "network", "model", "written"} <= set(json.loads(json.dumps(found)))
    assert all(one["cpu_s"] > 0 and one["count"] > 0 for name, one in found.items() if name != "written")
    assert found["written"]["bytes"] > 0
    # nothing is left of what was measured
    assert not (tmp_path / "work").exists()


def test_agreement_sees_another_answer() -> None:
    from performance.agreement import agreement

    ra, dec, p = np.array([10.0, 10.1, 10.2]), np.zeros(3), np.array([0.1, 0.9, np.nan])
    assert agreement((ra, dec, p), (ra, dec, p)).same == 1.0
    other = agreement((ra, dec, p), (ra, dec, np.array([0.1, 0.902, np.nan])))
    assert (other.same, other.objects) == (pytest.approx(2 / 3), 1.0)
    assert other.largest == pytest.approx(0.002)
    # a probability that only one of the two has
    assert agreement((ra, dec, p), (ra, dec, np.array([0.1, 0.9, 0.5]))).largest == 1.0
    # an object that only one of the two has
    assert agreement((ra, dec, p), (ra[:2], dec[:2], p[:2])).objects == pytest.approx(2 / 3)
