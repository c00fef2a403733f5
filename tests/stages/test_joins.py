"""Joining the products by ``object_id``, as docs/probabilities.md shows it, in every reader that users have."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.table import Table, join
from astropy.utils.metadata import MergeConflictWarning

from sgclassify.stages import healpix
from sgclassify.stages.classify import scored_table
from sgclassify.stages.columns import NO_OBJECT
from sgclassify.stages.flags import SgFlag
from sgclassify.stages.read.catalog import ROW_BITS
from sgclassify.stages.write import publish

N = 40
KEY = 2_748_779_069_440
"""Exposure key of which the identifiers are made: beyond 2^53, where float64 merges neighbours."""

Frame = tuple[list[int], int, list[float | None]]


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A partition of objects and the detections of one CAT; two rows lack a position, one object a probability."""
    root = tmp_path_factory.mktemp("products")
    ids = (KEY << ROW_BITS) | np.arange(N)
    p_star = np.linspace(0.0, 1.0, N, dtype=np.float32)
    p_star[7] = np.nan
    order, pixel = 10, int(healpix.tile_of([150.0], [2.0], 10)[0])
    objects = scored_table(
        ids,
        np.full(N, 150.0),
        np.full(N, 2.0),
        p_star,
        np.zeros(N),
        np.zeros(N),
        np.full(N, 3),
        ["g,r,i"] * N,
    )
    partition = publish.publish_objects(order, pixel, objects, root / "objects", {})
    assert partition is not None
    columns = objects.drop_columns(["ra", "dec", "logit", "_healpix_29"])
    scores = columns.append_column("row", pa.array(np.arange(N, dtype=np.int64)))
    catalog = pa.table({"objID": np.arange(N + 2, dtype=np.int32)})
    flags = np.zeros(N + 2, dtype=np.int32)
    flags[N:] = int(SgFlag.NO_POSITION)
    path = root / "detections" / "x_CAT.parquet"
    publish.publish_detections(catalog, scores, path, {}, flags)
    return path, partition


def with_pandas(backend: str) -> Callable[[Path, Path], Frame]:
    """Read and merge with pandas; numbers in one of its three back ends."""

    def merge(detections: Path, objects: Path) -> Frame:
        options: Any = {} if backend == "numpy" else {"dtype_backend": backend}
        left, right = (pd.read_parquet(path, **options) for path in (detections, objects))
        assert pd.api.types.is_integer_dtype(left["object_id"].dtype)
        merged = left[left["object_id"] >= 0].merge(right, on="object_id", suffixes=("", "_object"))
        p = merged["p_star_object"].astype("float64").to_numpy(na_value=np.nan).tolist()
        return left["object_id"].tolist(), len(merged), p

    return merge


def with_astropy(kind: str) -> Callable[[Path, Path], Frame]:
    """Read and join with astropy."""

    def merge(detections: Path, objects: Path) -> Frame:
        left, right = (Table.read(path, format=kind) for path in (detections, objects))
        assert left["object_id"].dtype.kind == "i"
        with warnings.catch_warnings():
            # the identifier of a detection is its parent's, that of an object its own: astropy takes one UCD
            warnings.simplefilter("ignore", MergeConflictWarning)
            merged = join(left[left["object_id"] >= 0], right, keys="object_id", table_names=["", "object"])
        p = np.ma.filled(np.ma.asarray(merged["p_star_object"], dtype=np.float64), np.nan)
        return left["object_id"].tolist(), len(merged), p.tolist()

    return merge


def with_polars(detections: Path, objects: Path) -> Frame:
    """Read and join with polars."""
    left, right = pl.read_parquet(detections), pl.read_parquet(objects)
    merged = left.filter(pl.col("object_id") >= 0).join(right, on="object_id", suffix="_object")
    return left["object_id"].to_list(), merged.height, merged["p_star_object"].to_list()


def with_duckdb(detections: Path, objects: Path) -> Frame:
    """Read and join with duckdb."""
    with duckdb.connect() as database:
        ids = database.execute(f"SELECT object_id FROM '{detections}'").fetchall()
        p = database.execute(
            f"SELECT o.p_star FROM '{detections}' AS d JOIN '{objects}' AS o USING (object_id) ORDER BY object_id"
        ).fetchall()
    return [one for (one,) in ids], len(p), [one for (one,) in p]


READERS = {
    "pandas": with_pandas("numpy"),
    "pandas, numpy_nullable": with_pandas("numpy_nullable"),
    "pandas, pyarrow": with_pandas("pyarrow"),
    "astropy, parquet": with_astropy("parquet"),
    "astropy, votable": with_astropy("parquet.votable"),
    "polars": with_polars,
    "duckdb": with_duckdb,
}


@pytest.mark.parametrize("reader", READERS)
def test_every_reader_finds_the_same_objects(products: tuple[Path, Path], reader: str) -> None:
    ids, n_merged, p_star = READERS[reader](*products)
    assert ids == [(KEY << ROW_BITS) | k for k in range(N)] + [NO_OBJECT, NO_OBJECT]
    assert n_merged == N
    # null in the file; a reader without nulls of its own says nan
    expected = np.linspace(0.0, 1.0, N, dtype=np.float32)
    expected[7] = np.nan
    found = np.array([np.nan if p is None else p for p in p_star])
    np.testing.assert_array_equal(found, expected)


def test_a_merge_without_a_thought_for_rows_without_object_adds_nothing(products: tuple[Path, Path]) -> None:
    left, right = (pd.read_parquet(path) for path in products)
    assert len(left.merge(right, on="object_id", how="left")) == len(left)


def test_no_integer_column_may_be_null(products: tuple[Path, Path]) -> None:
    for path in products:
        schema = pq.read_schema(path)
        whole = [f for f in schema if pa.types.is_integer(f.type) and f.name != "objID"]
        assert len(whole) >= 3
        assert not any(field.nullable for field in whole)
