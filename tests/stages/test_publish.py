"""Products: whole or absent, the same bytes for the same table, readable by those who should read them."""

from __future__ import annotations

import io
import os
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.io.votable import parse as parse_votable
from astropy.io.votable.ucd import check_ucd
from astropy.table import Table
from hypothesis import given, settings
from hypothesis import strategies as st

from sgclassify.stages import healpix
from sgclassify.stages.classify import scored_table
from sgclassify.stages.columns import DETECTION_COLUMNS, INPUT_COLUMNS, OBJECT_COLUMNS
from sgclassify.stages.flags import SgFlag
from sgclassify.stages.write import atomic, publish

METADATA = {"model_id": "sg-1", "prior_star_fraction": "0.257"}
ORDER = 10


@contextmanager
def deprecations_of_lsdb() -> Iterator[None]:
    """lsdb and nested-pandas use options of pandas that are to go; they are no affair of ours."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(lsdb|nested_pandas)\.")
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"(lsdb|nested_pandas)\.")
        warnings.filterwarnings("ignore", message=r".*(mode\.chained_assignment|NestedFrame)")
        yield


def objects(n: int, seed: int = 0, ra: float = 150.0, dec: float = 2.0, spread: float = 0.05) -> pa.Table:
    rng = np.random.default_rng(seed)
    p_star = rng.random(n, dtype=np.float32)
    p_star[::5] = np.nan
    p_star[2::9] = np.inf
    return scored_table(
        rng.permutation(n) + (1 << 60),
        (ra + rng.uniform(-spread, spread, n)) % 360.0,
        dec + rng.uniform(-spread, spread, n),
        p_star,
        4.0 * np.linspace(-1, 1, n),
        np.zeros(n),
        rng.integers(1, 8, n),
        [("g,r,i", "NUV,u,g,r,i,z,y")[k % 2] for k in range(n)],
    )


def write_catalog(root: Path, table: pa.Table, reverse: bool = False) -> list[tuple[int, int, int]]:
    tiles = healpix.tile_of_index(table["_healpix_29"].to_numpy(), ORDER)
    partitions = []
    for pixel in np.unique(tiles)[:: -1 if reverse else 1].tolist():
        part = table.filter(pa.array(tiles == pixel))
        assert publish.publish_objects(ORDER, pixel, part, root, METADATA) is not None
        partitions.append((ORDER, pixel, part.num_rows))
    publish.finish_hats(root, partitions, METADATA)
    return partitions


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def catalog(n: int) -> pa.Table:
    """A CAT with all kinds of columns, one of them named like one of ours."""
    rng = np.random.default_rng(7)
    unit = {"unit": "mag"}
    return pa.table(
        {
            "objID": pa.array(np.arange(n, dtype=np.int32)),
            "X": rng.uniform(1, 9216, n),
            "RA": pa.array([None if k % 4 == 3 else 10.0 + k for k in range(n)], pa.float64()),
            "P_STAR": rng.random(n),
            "flux": pa.FixedSizeListArray.from_arrays(pa.array(rng.random(3 * n), pa.float32()), 3),
            "Note": pa.array([None if k % 2 else "é" * k for k in range(n)], pa.string()),
            "good": pa.array([True, False, False, True][:n] + [True] * (n - 4), pa.bool_()),
            "Mag_Kron": rng.uniform(18, 26, n),
        },
        schema=pa.schema(
            [
                ("objID", pa.int32()),
                ("X", pa.float64()),
                ("RA", pa.float64()),
                ("P_STAR", pa.float64()),
                ("flux", pa.list_(pa.float32(), 3)),
                ("Note", pa.string()),
                ("good", pa.bool_()),
                pa.field("Mag_Kron", pa.float64(), metadata=unit),
            ]
        ),
    )


def scores(rows: list[int]) -> pa.Table:
    n = len(rows)
    rng = np.random.default_rng(n)
    p_star = rng.random(n, dtype=np.float32)
    return pa.table(
        {
            "row": pa.array(rows, pa.int64()),
            "object_id": pa.array([(1 << 60) + row for row in rows], pa.int64()),
            "p_star": pa.array(p_star),
            "p_galaxy": pa.array(np.float32(1) - p_star),
            "sg_class": pa.array(["star" if p >= 0.5 else "galaxy" for p in p_star], pa.string()),
            "sg_flags": pa.array([int(SgFlag.EDGE)] * n, pa.int32()),
            "n_bands": pa.array([3] * n, pa.int8()),
            "bands": pa.array(["g,r,i"] * n, pa.string()),
        }
    )


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 40), st.integers(0, 1000))
def test_scored_rows(n: int, seed: int) -> None:
    table = objects(n, seed)
    assert table.num_rows == n
    assert table.schema.names == [c.name for c in OBJECT_COLUMNS]
    assert [f.type for f in table.schema] == [c.type for c in OBJECT_COLUMNS]
    index, ids = table["_healpix_29"].to_numpy(), table["object_id"].to_numpy()
    assert np.array_equal(np.lexsort((ids, index)), np.arange(n))
    names = ("p_star", "p_galaxy", "sg_class", "sg_flags", "logit", "n_bands")
    for star, galaxy, name, flags, logit, n_bands in zip(*(table[c].to_pylist() for c in names), strict=True):
        assert (star is None) == (galaxy is None) == (name is None) == bool(flags & SgFlag.NOT_SCORED)
        assert (logit is None) == (star is None) == (n_bands == 0)
        if star is not None:
            assert np.float32(star) + np.float32(galaxy) == np.float32(1.0)
            assert name == ("star" if star >= galaxy else "galaxy")


@settings(deadline=None, max_examples=100)
@given(st.floats(0.0, 1.0, width=32))
def test_probabilities_add_up_to_exactly_one(p: float) -> None:
    table = scored_table([1], [0.0], [0.0], [p], [0.0], [0], [1], ["g"])
    total = table["p_star"].to_numpy() + table["p_galaxy"].to_numpy()
    assert total.dtype == np.float32
    assert total[0] == 1.0


def test_what_cannot_be_published() -> None:
    one = ([0.0, 1.0], [0.0, 1.0])
    with pytest.raises(ValueError, match="repeat"):
        scored_table([5, 5], *one, [0.5, 0.5], [0.0, 0.0], [0, 0], [1, 1], ["g", "g"])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        scored_table([5, 6], *one, [0.5, 1.5], [0.0, 0.0], [0, 0], [1, 1], ["g", "g"])
    with pytest.raises(ValueError, match="finite"):
        scored_table([5, 6], [np.nan, 1.0], [0.0, 1.0], [0.5, 1.0], [0.0, 9.0], [0, 0], [1, 1], ["g", "g"])
    table = scored_table([5], [10.0], [10.0], [0.5], [0.0], [int(SgFlag.NOT_SCORED)], [1], ["g"])
    (row,) = table.select(["p_star", "logit", "n_bands", "bands"]).to_pylist()
    assert row == {"p_star": None, "logit": None, "n_bands": 0, "bands": ""}


def test_a_row_in_the_wrong_tile_is_refused(tmp_path: Path) -> None:
    table = objects(3)
    pixel = int(healpix.tile_of([200.0], [-30.0], ORDER)[0])
    with pytest.raises(ValueError, match="outside"):
        publish.publish_objects(ORDER, pixel, table, tmp_path, METADATA)
    assert contents(tmp_path) == {}


@given(order=st.integers(0, 29), share=st.floats(0, 1, exclude_max=True))
@settings(deadline=None, max_examples=100)
def test_partitions_lie_where_hats_looks(order: int, share: float) -> None:
    from hats.io.paths import pixel_catalog_file
    from hats.pixel_math.healpix_pixel import HealpixPixel

    pixel = int(share * (12 << 2 * order))
    theirs = pixel_catalog_file(Path("/objects"), HealpixPixel(order, pixel))
    assert str(publish.partition_path(Path("/objects"), order, pixel)) == str(theirs)


@pytest.mark.parametrize("position", [(150.0, 2.0), (0.0, -41.8), (20.0, 89.94)])
def test_the_catalogue_is_read_by_hats_and_lsdb(tmp_path: Path, position: tuple[float, float]) -> None:
    import dask
    import hats
    from hats.io.validation import is_valid_catalog

    table = objects(60, 1, *position)
    partitions = write_catalog(tmp_path / "objects", table)
    assert len(partitions) > 1
    assert is_valid_catalog(tmp_path / "objects", strict=True)
    read = hats.read_hats(tmp_path / "objects")
    assert read.catalog_info.total_rows == 60
    assert read.catalog_info.__pydantic_extra__["model_id"] == "sg-1"
    assert [(p.order, p.pixel) for p in read.get_healpix_pixels()] == [p[:2] for p in partitions]
    with deprecations_of_lsdb():
        import lsdb

        opened = lsdb.open_catalog(tmp_path / "objects")
        with dask.config.set(scheduler="synchronous"):
            frame = opened.compute(progress_bar=False)
    assert set(frame.columns) >= {"object_id", "ra", "dec", "p_star", "sg_class", "bands"}
    expected = dict(zip(table["object_id"].to_pylist(), table["p_star"].to_pylist(), strict=True))
    assert len(frame) == len(expected)
    found = dict(zip(frame["object_id"], frame["p_star"].to_numpy(na_value=-1.0), strict=True))
    assert found == {key: -1.0 if value is None else value for key, value in expected.items()}


def test_the_catalogue_does_not_depend_on_the_order_of_its_tiles(tmp_path: Path) -> None:
    table = objects(50)
    write_catalog(tmp_path / "a", table)
    write_catalog(tmp_path / "b", table.take(pa.array(np.arange(50)[::-1])), reverse=True)
    first, second = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert first.keys() >= {"hats.properties", "partition_info.csv", "dataset/_metadata"}
    assert first == second
    # Finishing again changes nothing and leaves nothing behind.
    tiles = [
        (ORDER, int(Path(name).stem.split("=")[1]), pq.read_metadata(tmp_path / "a" / name).num_rows)
        for name in first
        if name.endswith(".parquet")
    ]
    publish.finish_hats(tmp_path / "a", tiles[::-1], METADATA)
    assert contents(tmp_path / "a") == first


def test_partitions_of_an_earlier_run_go(tmp_path: Path) -> None:
    write_catalog(tmp_path, objects(40))
    kept = write_catalog(tmp_path, objects(10, spread=0.001))
    (tmp_path / "dataset" / "Norder=10" / "Dir=0").mkdir()
    (tmp_path / "dataset" / "Norder=10" / "Dir=0" / ".Npix=1.parquet.abc.part").write_bytes(b"half")
    publish.finish_hats(tmp_path, kept, METADATA)
    assert {p for p in tmp_path.rglob("*.pa*") if p.is_file()} == {
        publish.partition_path(tmp_path, order, pixel) for order, pixel, _ in kept
    }


def test_a_tile_without_objects_has_no_file(tmp_path: Path) -> None:
    (tile,) = write_catalog(tmp_path, objects(5, spread=1e-4))
    assert publish.publish_objects(*tile[:2], objects(0), tmp_path, METADATA) is None
    assert not publish.partition_path(tmp_path, *tile[:2]).exists()


def test_a_catalogue_without_objects(tmp_path: Path) -> None:
    publish.finish_hats(tmp_path, [], METADATA)
    assert pq.read_schema(tmp_path / "dataset" / "_common_metadata").names == [c.name for c in OBJECT_COLUMNS]
    assert "hats_nrows=0" in (tmp_path / "hats.properties").read_text()


def test_finishing_checks_the_partitions(tmp_path: Path) -> None:
    (tile,) = write_catalog(tmp_path, objects(5, spread=1e-4))
    with pytest.raises(ValueError, match="5 rows"):
        publish.finish_hats(tmp_path, [(*tile[:2], 6)], METADATA)
    with pytest.raises(ValueError, match="twice"):
        publish.finish_hats(tmp_path, [tile, tile], METADATA)
    with pytest.raises(FileNotFoundError):
        publish.finish_hats(tmp_path, [(*tile[:2][:1], tile[1] + 1, 5)], METADATA)


@settings(deadline=None, max_examples=25)
@given(st.integers(4, 30), st.data())
def test_rows_in_are_rows_out(tmp_path_factory: pytest.TempPathFactory, n: int, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("detections") / "x_CAT.parquet"
    rows = data.draw(st.lists(st.integers(0, n - 1), unique=True))
    row_flags = np.where(np.arange(n) % 4 == 3, int(SgFlag.NO_POSITION), 0).astype(np.int32)
    cat, score = catalog(n), scores(rows)
    assert publish.publish_detections(cat, score, path, METADATA, row_flags) == len(rows)
    written = pq.read_table(path)
    assert written.num_rows == n
    appended = [c.name for c in DETECTION_COLUMNS]
    assert written.column_names == ["P_STAR_in" if name == "P_STAR" else name for name in cat.column_names] + appended
    for name, original in zip(written.column_names, cat.columns, strict=False):
        assert written[name].combine_chunks().equals(original.combine_chunks())
    for k in range(n):
        line = {name: written[name][k].as_py() for name in appended}
        if k in rows:
            expected = {name: score[name][rows.index(k)].as_py() for name in appended}
            assert line == {**expected, "sg_flags": int(SgFlag.EDGE) | int(row_flags[k])}
        else:
            whole = {name: line.pop(name) for name in ("object_id", "sg_flags", "n_bands")}
            flags = int(SgFlag.NOT_SCORED) | int(row_flags[k])
            assert whole == {"object_id": -1, "sg_flags": flags, "n_bands": 0}
            assert set(line.values()) == {None}
    # In pieces, the same table gives the same bytes.
    before = path.read_bytes()
    pieces = pa.concat_tables([cat.slice(0, 2), cat.slice(2)])
    publish.publish_detections(pieces, score, path, METADATA, row_flags)
    assert path.read_bytes() == before


def test_scores_for_rows_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not have"):
        publish.publish_detections(catalog(5), scores([5]), tmp_path / "x.parquet", METADATA)
    with pytest.raises(ValueError, match="two scores"):
        publish.publish_detections(catalog(5), scores([1, 1]), tmp_path / "x.parquet", METADATA)


@pytest.mark.parametrize("kind", [pa.bool_(), pa.int8(), pa.uint64()])
def test_no_integer_or_boolean_of_the_input_is_null(tmp_path: Path, kind: pa.DataType) -> None:
    path = tmp_path / "x.parquet"
    publish.publish_detections(pa.table({"a": pa.array([0, 1]).cast(kind)}), scores([0]), path, METADATA)
    assert not pq.read_schema(path).field("a").nullable
    with pytest.raises(ValueError, match="null"):
        publish.publish_detections(pa.table({"a": pa.nulls(2, kind)}), scores([0]), path, METADATA)


def test_names_of_the_input_give_way_without_clashing() -> None:
    names = ["object_id", "OBJECT_ID_in", "ra", "Bands"]
    cat = pa.table({name: [1] for name in names})
    assert publish._free_names(cat.column_names) == ["object_id_in_in", "OBJECT_ID_in", "ra", "Bands_in"]


@pytest.mark.parametrize("which", ["objects", "detections"])
def test_astropy_reads_the_products(tmp_path: Path, which: str) -> None:
    if which == "objects":
        (tile,) = write_catalog(tmp_path, objects(12, spread=1e-4))
        path, n = publish.partition_path(tmp_path, *tile[:2]), 12
    else:
        path, n = tmp_path / "x_CAT.parquet", 6
        publish.publish_detections(catalog(n), scores([0, 2, 5]), path, METADATA)
    plain = Table.read(path, format="parquet")
    described = Table.read(path, format="parquet.votable")
    assert len(plain) == len(described) == n
    assert described.colnames == plain.colnames == pq.read_schema(path).names
    assert set(plain["sg_class"]) <= {"star", "galaxy", "None"}
    for name in ("p_star", "sg_flags", "object_id", "bands"):
        assert described[name].description
    positions = {"objects": ("ra", "dec"), "detections": ("RA",)}[which]
    assert all(str(described[name].unit) == "deg" for name in positions)
    footer = pq.read_metadata(path).metadata
    assert footer[b"IVOA.VOTable-Parquet.version"] == b"1.0"
    assert footer[b"model_id"] == b"sg-1"
    votable = parse_votable(io.BytesIO(footer[b"IVOA.VOTable-Parquet.content"]), verify="exception")
    fields = votable.get_first_table().fields
    assert [field.name for field in fields] == plain.colnames
    assert {info.name: info.value for info in votable.resources[0].infos} == METADATA
    if which == "detections":
        assert str(described["Mag_Kron"].unit) == "mag"


def test_every_column_has_a_field(tmp_path: Path) -> None:
    """VOParquet wants one each, with the column's name, in a document that is valid XML: IDs are names, and unique."""
    names = ["a b", "a_b", "_a_b", "Größe", "µ", "1a", "icrs", "x-y", "-x", "<&>", "texts", "big"]
    kinds = {"texts": pa.list_(pa.string(), 2), "big": pa.uint64()}
    arrays = [pa.array([["a", "b"]] if name == "texts" else [1], kinds.get(name, pa.int32())) for name in names]
    path = tmp_path / "x.parquet"
    publish.publish_detections(pa.table(arrays, names=names), scores([0]), path, METADATA)
    footer = pq.read_metadata(path).metadata
    root = ET.fromstring(footer[b"IVOA.VOTable-Parquet.content"])
    fields = [element for element in root.iter() if element.tag.endswith("}FIELD")]
    assert [field.get("name") for field in fields] == pq.read_schema(path).names
    given = {str(field.get("name")): field.get("ID") for field in fields}
    assert {name: given[name] for name in names} == {
        "a b": "_a_b_",
        "a_b": None,
        "_a_b": None,
        "Größe": "Größe",
        "µ": "__",
        "1a": "_1a",
        "icrs": None,
        "x-y": None,
        "-x": "_-x",
        "<&>": "____",
        "texts": "_texts",
        "big": None,
    }
    # a column of its own for a FIELD that astropy could not join to the data: empty, and the data beside it
    table = Table.read(path, format="parquet.votable")
    assert set(table.colnames) - set(pq.read_schema(path).names) == {
        "_a_b_",
        "__",
        "_1a",
        "_-x",
        "____",
        "_texts",
    }
    assert table["texts"].tolist() == [["a", "b"]]
    assert table["big"].dtype == np.uint64


def test_units_that_are_none_go_into_the_description(tmp_path: Path) -> None:
    fields = [
        pa.field(name, pa.float64(), metadata={"unit": unit})
        for name, unit in {"a": "nmgy/foo", "b": "pixel", "c": "count", "d": "deg", "e": "**"}.items()
    ]
    cat = pa.table([[1.0]] * 5, schema=pa.schema(fields))
    publish.publish_detections(cat, scores([0]), tmp_path / "x.parquet", METADATA)
    table = Table.read(tmp_path / "x.parquet", format="parquet.votable")
    assert [str(table[name].unit) for name in "abcde"] == ["None", "pix", "ct", "deg", "None"]
    assert table["a"].description == "(unit: nmgy/foo)"


def test_registry() -> None:
    for column in (*OBJECT_COLUMNS, *DETECTION_COLUMNS, *INPUT_COLUMNS.values()):
        assert column.description
        assert check_ucd(column.ucd, check_controlled_vocabulary=column.ucd != "pos.healpix")


def test_a_product_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "x.parquet"
    table = pa.table({"a": [1, 2, 3]})

    def fail(*_args: object, **_kwargs: object) -> None:
        raise OSError("disk full")

    def half(_table: pa.Table, where: Path, **_kwargs: object) -> None:
        where.write_bytes(b"PAR1 half a file")
        raise OSError("disk full")

    for target, name, broken in ((os, "replace", fail), (pq, "write_table", half), (os, "fsync", fail)):
        with monkeypatch.context() as patch:
            patch.setattr(target, name, broken)
            with pytest.raises(OSError, match="disk full"):
                atomic.write_atomic(table, path, {})
        assert contents(tmp_path) == {}
    atomic.write_atomic(table, path, {"k": "v"})
    before = contents(tmp_path)
    assert list(before) == ["deep/x.parquet"]
    # A failed attempt to replace it leaves the old one.
    monkeypatch.setattr(pq, "write_table", half)
    with pytest.raises(OSError, match="disk full"):
        atomic.write_atomic(pa.table({"a": [9]}), path, {})
    assert contents(tmp_path) == before


def test_what_is_read_back_must_be_what_was_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_table = pq.write_table
    monkeypatch.setattr(pq, "write_table", lambda table, *a, **k: write_table(table.slice(1), *a, **k))
    with pytest.raises(OSError, match="2 rows read back of 3"):
        atomic.write_atomic(pa.table({"a": [1, 2, 3]}), tmp_path / "x.parquet", {})
    assert contents(tmp_path) == {}


def test_plain_files(tmp_path: Path) -> None:
    atomic.write_atomic_text("Größe", tmp_path / "a" / "x.txt")
    atomic.write_atomic_bytes(b"\0\1", tmp_path / "y")
    assert contents(tmp_path) == {"a/x.txt": "Größe".encode(), "y": b"\0\1"}
    # Readable by whom the user's umask allows, unlike files from the tempfile module.
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "y").stat().st_mode & 0o777 == 0o666 & ~umask
