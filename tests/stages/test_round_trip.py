"""From a FITS table through `publish_detections` to the readers that users have: every value, whatever the column.

What astropy.io.fits reads is the oracle.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from astropy.io import fits
from astropy.table import Table
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from sgclassify.stages.columns import DETECTION_COLUMNS
from sgclassify.stages.read.bintable import read_bintable, table_hdus
from sgclassify.stages.write import publish

Columns = dict[str, list[Any]]

N = 3
NUMBERS = {"B": "u1", "I": "i2", "J": "i4", "K": "i8", "E": "f4", "D": "f8", "C": "c8", "M": "c16", "L": "?"}
UNSIGNED = {"I": (2**15, "u2"), "J": (2**31, "u4"), "K": (2**63, "u8"), "B": (-128, "i1")}
NAMES = [
    *("a", "A b", "_A_b", "'q'", '"', "x.y", "1a", "icrs", "<&>", "x[0]", "a/b", "*", "%s", "table"),
    *("row", "exposure_id", "__index_level_0__", "sg_flags", "Object_ID", "object_id_in", "bands"),
]
NO_SCORES = pa.table({"row": pa.array([], pa.int64()), **{c.name: pa.array([], c.type) for c in DETECTION_COLUMNS}})


def product(
    columns: list[fits.Column], folder: Path, edit: Callable[[bytes], bytes] = bytes, stem: str = "x_CAT"
) -> Path:
    """The detections file of a CAT with these columns; `edit` changes the bytes of the CAT."""
    cat = folder / f"{stem}.fits"
    fits.BinTableHDU.from_columns(columns, nrows=N).writeto(cat, overwrite=True)
    cat.write_bytes(edit(cat.read_bytes()))
    path = folder / "detections" / f"{stem}.parquet"
    publish.publish_detections(read_bintable(cat, table_hdus(cat)[0]), NO_SCORES, path, {})
    return path


def plain(value: Any) -> Any:
    """A value as Python's own: lists of lists, numbers, texts; nan as a text, which is equal to itself."""
    if isinstance(value, (list, tuple, np.ndarray, pl.Series)):
        return [plain(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    if value is pd.NA:  # what numpy_nullable makes of nan
        value = math.nan
    assert value is None or isinstance(value, (bool, int, float, str)), type(value)
    return "nan" if isinstance(value, float) and math.isnan(value) else value


def by_astropy(kind: str) -> Callable[[Path], Columns]:
    def read(path: Path) -> Columns:
        table = Table.read(path, format=kind)
        assert len(table) == N
        return {name: list(table[name]) for name in pq.read_schema(path).names}

    return read


def by_pandas(**options: Any) -> Callable[[Path], Columns]:
    def read(path: Path) -> Columns:
        frame = pd.read_parquet(path, **options)
        return {name: frame[name].tolist() for name in frame.columns}

    return read


def by_duckdb(path: Path) -> Columns:
    with duckdb.connect() as database:
        found = database.execute("SELECT * FROM read_parquet(?)", [str(path)])
        names = [column[0] for column in found.description]
        return dict(zip(names, zip(*found.fetchall(), strict=True), strict=True))


READERS: dict[str, Callable[[Path], Columns]] = {
    "pyarrow": lambda path: pq.read_table(path).to_pydict(),
    "astropy, parquet": by_astropy("parquet"),
    "astropy, votable": by_astropy("parquet.votable"),
    "pandas": by_pandas(),
    "pandas, numpy_nullable": by_pandas(dtype_backend="numpy_nullable"),
    "pandas, pyarrow": by_pandas(dtype_backend="pyarrow"),
    "polars": lambda path: pl.read_parquet(path).to_dict(as_series=False),
    "duckdb": by_duckdb,
}


def assert_all_read(path: Path, expected: Columns) -> None:
    """Every reader finds these columns of the input, in this order, and no nulls in them."""
    appended = {column.name for column in DETECTION_COLUMNS}
    for reader, read in READERS.items():
        found = {name: plain(values) for name, values in read(path).items() if name not in appended}
        assert found == {name: plain(values) for name, values in expected.items()}, reader
        assert list(found) == list(expected), reader


def ragged(rows: list[Any]) -> np.ndarray:
    made = np.empty(len(rows), dtype=object)
    made[:] = rows
    return made


@st.composite
def fits_columns(draw: st.DrawFn, name: str) -> fits.Column:
    kind = draw(st.sampled_from(["number", "unsigned", "array", "ragged", "zero width", "bits", "text", "texts"]))
    code = draw(st.sampled_from(sorted(NUMBERS)))
    width = draw(st.integers(1, 3))
    if kind == "zero width":
        # 0A and 0X, which astropy does not always write or read, have a test of their own
        return fits.Column(name, f"0{code}")
    if kind == "bits":
        bits = 5 * width
        return fits.Column(name, f"{bits}X", array=draw(npst.arrays(bool, (N, bits))))
    if kind in ("text", "texts"):
        alphabet = st.characters(min_codepoint=32, codec="utf-8", exclude_categories=["Cs"])
        fields = st.text(alphabet, max_size=4).map(lambda text: text.rstrip().encode())
        width += 1
        shape = (N,) if kind == "text" else (N, width)
        values = draw(npst.arrays("S16", shape, elements=fields))
        if kind == "text":
            return fits.Column(name, "16A", array=values)
        return fits.Column(name, f"{16 * width}A", dim=f"(16,{width})", array=values)
    if kind == "unsigned":
        code = draw(st.sampled_from(sorted(UNSIGNED)))
        zero, dtype = UNSIGNED[code]
        return fits.Column(name, code, bzero=zero, array=draw(npst.arrays(dtype, N)))
    if kind == "ragged":
        lengths = draw(st.lists(st.integers(0, 4), min_size=N, max_size=N))
        rows = [draw(npst.arrays(NUMBERS[code], n)) for n in lengths]
        return fits.Column(name, f"{draw(st.sampled_from('PQ'))}{code}()", array=ragged(rows))
    if kind == "array":
        values = draw(npst.arrays(NUMBERS[code], (N, 2, width)))
        return fits.Column(name, f"{2 * width}{code}", dim=f"({width},2)", array=values)
    values = draw(npst.arrays(NUMBERS[code], (N, width)))
    return fits.Column(name, f"{width}{code}", array=values if width > 1 else values[:, 0])


def oracle(cat: Path, name: str) -> list[Any]:
    """Rows of a column as astropy.io.fits reads them; arrays flat, complex values as pairs."""
    with fits.open(cat, character_as_bytes=True) as hdus:
        form = hdus[1].columns[name].format
        if form.startswith("0"):
            return [[]] * N
        rows = []
        for row in hdus[1].data[name]:
            values = np.asarray(row)
            if values.dtype.kind == "c":
                values = np.stack([values.real, values.imag], axis=-1)
            if values.dtype.kind == "S":
                values = np.char.decode(np.char.rstrip(values), "utf-8")
            rows.append(values.ravel().tolist() if values.ndim else values.item())
    return rows


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_what_astropy_reads_of_a_cat_every_reader_finds(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    names = data.draw(st.lists(st.sampled_from(NAMES), min_size=1, max_size=5, unique=True))
    # astropy writes no table that has columns of zero width alone
    number = fits.Column("objID", "K", array=np.arange(N) + 2**62)
    with warnings.catch_warnings():
        # odd names, which is what they are here for
        warnings.simplefilter("ignore", fits.verify.VerifyWarning)
        columns = [number, *(data.draw(fits_columns(name)) for name in names)]
        path = product(columns, tmp_path_factory.mktemp("round"))
        cat = path.parents[1] / "x_CAT.fits"
        names = ["objID", *names]
        expected = [oracle(cat, name) for name in names]
    assert_all_read(path, dict(zip(publish._free_names(names), expected, strict=True)))


def cards(values: dict[str, str]) -> Callable[[bytes], bytes]:
    """Edit of a CAT that puts other values (names, units, formats), of as many bytes, into its cards."""

    def edit(data: bytes) -> bytes:
        for old, new in values.items():
            before, after = f"'{old} ".encode(), f"'{new} ".encode()
            assert data.count(before) == 1
            assert len(before) == len(after), (old, new)
            data = data.replace(before, after)
        return data

    return edit


def test_zero_width_columns_keep_their_type(tmp_path: Path) -> None:
    columns = [
        fits.Column("objID", "J", array=np.arange(N)),
        fits.Column("text", "0B"),
        fits.Column("bits", "0I"),
        fits.Column("list", "0J"),
        fits.Column("texts", "0K"),
        fits.Column("vector", "0E"),
    ]
    path = product(columns, tmp_path, cards({"0B": "0A", "0I": "0X", "0J ": "0PE", "0K ": "0PA"}))
    kinds = dict(zip(pq.read_schema(path).names, pq.read_schema(path).types, strict=True))
    assert [str(kinds[name]) for name in ("text", "texts")] == ["string", "string"]
    assert [str(kinds[name].value_type) for name in ("bits", "list", "vector")] == ["bool", "float", "float"]
    empty: dict[str, list[Any]] = {"text": [""] * N, "bits": [[]] * N, "list": [[]] * N}
    assert_all_read(path, {"objID": [0, 1, 2], **empty, "texts": [""] * N, "vector": [[]] * N})


def test_the_catalogues_of_a_run_open_as_one_data_set(tmp_path: Path) -> None:
    texts = {"a": ["", "", ""], "b": ["x", "é", "blended"]}
    for number, (name, values) in enumerate(texts.items()):
        rows = [np.arange(number + k, dtype=np.int32) for k in range(N)]
        columns = [
            fits.Column("objID", "J", array=np.arange(N)),
            # written as what the longest text needs: nothing, or some bytes
            fits.Column("Remark", "0B")
            if number == 0
            else fits.Column("Remark", "13A", array=np.array([value.encode() for value in values])),
            fits.Column("VIGNET", "6E", dim="(3,2)", array=np.full((N, 2, 3), number, np.float32)),
            fits.Column("Neighbours", "PJ()", array=ragged(rows)),
            fits.Column("good", "L", array=np.ones(N, bool)),
        ]
        edit = cards({"0B": "0A"}) if number == 0 else bytes
        product(columns, tmp_path, edit, f"{name}_CAT")
    folder = tmp_path / "detections"
    expected = [*texts["a"], *texts["b"]]
    assert pyarrow.dataset.dataset(folder).to_table()["Remark"].to_pylist() == expected
    assert pd.read_parquet(folder)["Remark"].tolist() == expected
    lazy = pl.scan_parquet(folder / "*.parquet")
    assert lazy.collect()["Remark"].to_list() == expected
    with duckdb.connect() as database:
        found = database.execute(
            "SELECT Remark, VIGNET[6], len(Neighbours), good FROM read_parquet(?)", [f"{folder}/*.parquet"]
        ).fetchall()
    lengths = [0, 1, 2, 1, 2, 3]
    assert sorted(found) == sorted(zip(expected, [0.0] * 3 + [1.0] * 3, lengths, [True] * 6, strict=True))


def test_catalogues_that_differ_are_joined_as_the_documentation_says(tmp_path: Path) -> None:
    big = 2**62 + 1
    for stem, kind, name in (("a", "I", "first"), ("b", "J", "second")):
        columns = [
            fits.Column("objID", "K", array=np.full(N, big)),
            fits.Column("n", kind, array=np.arange(N)),
            fits.Column(name, "D", array=np.ones(N)),
        ]
        product(columns, tmp_path, stem=stem)
    folder = tmp_path / "detections"
    files = sorted(folder.glob("*.parquet"))
    tables = {
        "polars": pl.concat([pl.scan_parquet(file) for file in files], how="diagonal_relaxed")
        .collect()
        .to_dict(as_series=False),
        "pyarrow": pa.concat_tables([pq.read_table(file) for file in files], promote_options="permissive").to_pydict(),
        "pandas": pd.concat([pd.read_parquet(file) for file in files]).to_dict("list"),
    }
    with duckdb.connect() as database:
        query = "SELECT objID, n, first FROM read_parquet(?, union_by_name = true)"
        rows = database.execute(query, [f"{folder}/*.parquet"]).fetchall()
        tables["duckdb"] = dict(zip(["objID", "n", "first"], zip(*rows, strict=True), strict=True))
    for reader, table in tables.items():
        assert plain(table["objID"]) == [big] * 2 * N, reader
        assert plain(table["n"]) == [0, 1, 2, 0, 1, 2], reader
        first = plain(table["first"])
        assert (first[:N], set(first[N:]) <= {None, "nan"}) == ([1.0] * N, True), reader


def test_text_that_is_not_ascii(tmp_path: Path) -> None:
    names = ["α Lyrae", "Südfeld", "巡天"]
    columns = [
        fits.Column("Origin", "12A", array=np.array([name.encode() for name in names])),
        fits.Column("Groesse", "E", unit="xxm", array=np.arange(N, dtype=np.float32)),
        fits.Column("size ab", "E", array=np.arange(N, dtype=np.float32)),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fits.verify.VerifyWarning)
        path = product(columns, tmp_path, cards({"Groesse": "Größe", "xxm ": "µm ", "size ab": "size µ"}))
    expected = {"Origin": names, "Größe": [0.0, 1.0, 2.0], "size µ": [0.0, 1.0, 2.0]}
    assert_all_read(path, expected)
    assert pq.read_schema(path).field("Größe").metadata[b"unit"].decode() == "µm"
    table = Table.read(path, format="parquet.votable")
    assert str(table["Größe"].unit) == "um"


def test_values_that_stand_for_none(tmp_path: Path) -> None:
    ids = np.array([-1, 2**62 + 1, 5], np.int64)
    columns = [
        fits.Column("id", "K", null=-1, array=ids),
        fits.Column("n", "I", null=-32768, bzero=2**15, array=np.array([0, 7, 2**16 - 1], np.uint16)),
        fits.Column("pair", "2J", null=9, array=np.array([[9, 1], [2, 9], [3, 4]], np.int32)),
        fits.Column("good", "L", array=np.array([True, False, True])),
    ]

    def undefine(data: bytes) -> bytes:
        # the last byte of the last row: that of the last column
        end = len(data.rstrip(b"\0"))
        assert data[end - 1 : end] == b"T"
        return data[: end - 1] + b"\0" + data[end:]

    path = product(columns, tmp_path, undefine)
    assert_all_read(
        path,
        {
            "id": ids.tolist(),
            "n": [0, 7, 2**16 - 1],
            "pair": [[9, 1], [2, 9], [3, 4]],
            "good": [True, False, False],
        },
    )
    schema = pq.read_schema(path)
    assert [schema.field(name).metadata[b"null"] for name in ("id", "n", "pair")] == [b"-1", b"0", b"9"]
    assert not any(schema.field(name).nullable for name in ("id", "n", "good"))
    table = Table.read(path, format="parquet.votable")
    assert {name: table[name].meta["values"]["null"] for name in ("id", "n")} == {"id": -1, "n": 0}
    assert table["good"].description == "(1 undefined values written as false)"


def test_arrays_say_their_shape(tmp_path: Path) -> None:
    stamps = np.arange(N * 6, dtype=np.float32).reshape(N, 2, 3)
    waves = (stamps + 1j).astype(np.complex64)
    names = np.array([["ab", "c"], ["d", "efg"], ["", "é"]])
    columns = [
        fits.Column("VIGNET", "6E", dim="(3,2)", array=stamps),
        fits.Column("wave", "6C", dim="(3,2)", array=waves),
        fits.Column("names", "6A", dim="(3,2)", array=np.char.encode(names, "utf-8")),
    ]
    path = product(columns, tmp_path)
    pairs = np.stack([waves.real, waves.imag], axis=-1)
    assert_all_read(
        path,
        {
            "VIGNET": stamps.reshape(N, 6).tolist(),
            "wave": pairs.reshape(N, 12).tolist(),
            "names": names.tolist(),
        },
    )
    shapes = [field.metadata and field.metadata.get(b"shape") for field in pq.read_schema(path)]
    assert shapes[:3] == [b"2,3", b"2,3,2", None]
    table = Table.read(path, format="parquet.votable")
    assert table["VIGNET"].description == "(array of shape 2,3, the last axis varying fastest)"
    np.testing.assert_array_equal(np.asarray(table["VIGNET"]).reshape(N, 2, 3), stamps)


def test_a_name_twice(tmp_path: Path) -> None:
    columns = [
        fits.Column(name, "J", array=np.arange(N) + 10 * k)
        for k, name in enumerate(["Flag", "FLAG2", "Flag_2", "FLAG4"])
    ]
    path = product(columns, tmp_path, cards({"FLAG2": "FLAG ", "FLAG4": "Flag "}))
    first = {"Flag": [0, 1, 2], "FLAG_3": [10, 11, 12], "Flag_2": [20, 21, 22], "Flag_4": [30, 31, 32]}
    assert_all_read(path, first)
    assert pq.read_schema(path).field("FLAG_3").metadata == {b"note": b"named FLAG in its file, as another column is"}
