from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from astropy.io import fits
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from sgclassify.stages.errors import UnusableInputError
from sgclassify.stages.read import bintable
from sgclassify.stages.read.bintable import read_bintable, table_hdus


def written(path: Path, *columns: fits.Column, **options) -> pa.Table:
    fits.BinTableHDU.from_columns(list(columns), **options).writeto(path, overwrite=True)
    return read_bintable(path, table_hdus(path)[0])


@settings(max_examples=60, deadline=None)
@given(data=st.data(), n=st.integers(0, 5), width=st.integers(1, 3))
def test_round_trip(data, n, width, tmp_path_factory):
    path = tmp_path_factory.mktemp("table") / "t.fits"
    codes = {"B": "u1", "I": "i2", "J": "i4", "K": "i8", "E": "f4", "D": "f8", "L": "?"}
    code = data.draw(st.sampled_from(sorted(codes)))
    values = data.draw(npst.arrays(codes[code], (n, width)))
    flat = values[:, 0] if width == 1 else values
    table = written(path, fits.Column("a", f"{width}{code}", array=flat, unit="deg"))
    found = table["a"].to_pylist()
    assert table.schema.field("a").metadata == {b"unit": b"deg"}
    np.testing.assert_array_equal(np.array(found, dtype=codes[code]).reshape(flat.shape), flat)
    if width > 1:
        assert pa.types.is_fixed_size_list(table["a"].type)
        assert table["a"].type.list_size == width


def test_unsigned_and_signed_bytes(tmp_path):
    columns = [
        fits.Column("u2", "I", bzero=2**15, array=np.array([0, 2**16 - 1], np.uint16)),
        fits.Column("u4", "J", bzero=2**31, array=np.array([0, 2**32 - 1], np.uint32)),
        fits.Column("u8", "K", bzero=2**63, array=np.array([0, 2**64 - 1], np.uint64)),
        fits.Column("i1", "B", bzero=-128, array=np.array([-128, 127], np.int8)),
    ]
    table = written(tmp_path / "t.fits", *columns)
    assert [str(t) for t in table.schema.types] == ["uint16", "uint32", "uint64", "int8"]
    assert table.to_pydict() == {
        "u2": [0, 2**16 - 1],
        "u4": [0, 2**32 - 1],
        "u8": [0, 2**64 - 1],
        "i1": [-128, 127],
    }


def test_scaled_and_null(tmp_path):
    path = tmp_path / "t.fits"
    columns = [
        fits.Column("s", "I", array=np.array([0, 3, -1], np.int16)),
        fits.Column("n", "J", array=np.array([-1, 7, 8], np.int32)),
        fits.Column("z", "0D"),
    ]
    table = fits.BinTableHDU.from_columns(columns, nrows=3)
    table.writeto(path)
    # Declared afterwards: astropy would scale the values when it writes them.
    for key, value in {"TSCAL1": 0.5, "TZERO1": 10, "TNULL1": -1, "TNULL2": -1}.items():
        fits.setval(path, key, value=value, ext=1)
    found = read_bintable(path, table_hdus(path)[0])
    np.testing.assert_array_equal(found["s"].to_numpy(), [10.0, 11.5, np.nan])
    assert found.select(["n", "z"]).to_pydict() == {"n": [-1, 7, 8], "z": [[], [], []]}
    assert [field.metadata for field in found.schema] == [None, {b"null": b"-1"}, None]
    assert [column.null_count for column in found.columns] == [0, 0, 0]
    assert found["z"].type == pa.list_(pa.float64())


def test_scaled_floats_and_complex_values(tmp_path):
    path = tmp_path / "t.fits"
    columns = [
        fits.Column("mjd", "E", array=np.array([0.125, 0.25], np.float32)),
        fits.Column("c", "C", array=np.array([1 + 2j, 3 - 4j], np.complex64)),
    ]
    fits.BinTableHDU.from_columns(columns).writeto(path)
    for key, value in {"TZERO1": 2460000.5, "TSCAL2": 2.0, "TZERO2": 10.0}.items():
        fits.setval(path, key, value=value, ext=1)
    found = read_bintable(path, table_hdus(path)[0])
    np.testing.assert_array_equal(found["mjd"].to_numpy(), fits.getdata(path, 1)["mjd"])
    assert found["mjd"].to_pylist() == [2460000.625, 2460000.75]
    # the zero belongs to the real part; astropy drops the imaginary one
    assert found["c"].to_pylist() == [[12.0, 4.0], [16.0, -8.0]]


def test_strings(tmp_path):
    columns = [
        fits.Column("a", "6A", array=np.array(["ab", " c  ", ""])),
        fits.Column("v", "6A", dim="(3,2)", array=np.array([["ab", "c"], ["d", "efg"], ["", ""]])),
    ]
    table = written(tmp_path / "t.fits", *columns)
    assert table["a"].to_pylist() == ["ab", " c", ""]
    assert table["v"].to_pylist() == [["ab", "c"], ["d", "efg"], ["", ""]]


def test_matrices_bits_complex_and_variable_length(tmp_path):
    ragged = np.empty(2, dtype=object)
    ragged[:] = [np.array([1.5, 2.5], np.float32), np.array([], np.float32)]
    columns = [
        fits.Column("m", "6J", dim="(3,2)", array=np.arange(12, dtype=np.int32).reshape(2, 2, 3)),
        fits.Column("b", "10X", array=np.eye(2, 10, dtype=bool)),
        fits.Column("c", "M", array=np.array([1 + 2j, 3 - 4j])),
        fits.Column("p", "PE()", array=ragged),
    ]
    table = written(tmp_path / "t.fits", *columns)
    assert table["m"].to_pylist() == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]]
    assert table.schema.field("m").metadata == {b"shape": b"2,3"}
    assert table["b"].to_pylist()[1] == [False, True] + 8 * [False]
    assert table["c"].to_pylist() == [[1.0, 2.0], [3.0, -4.0]]
    assert table["p"].to_pylist() == [[1.5, 2.5], []]


def test_heap_that_ends_early(tmp_path):
    path = tmp_path / "t.fits"
    ragged = np.empty(1, dtype=object)
    ragged[0] = np.arange(3, dtype=np.float64)
    written(path, fits.Column("p", "PD()", array=ragged))
    data = bytearray(path.read_bytes())
    at = table_hdus(path)[0].data_offset
    data[at : at + 4] = (1000).to_bytes(4, "big")
    path.write_bytes(data)
    with pytest.raises(UnusableInputError, match="heap"):
        read_bintable(path, table_hdus(path)[0])


@pytest.mark.parametrize("offset", [-1, 1000, 2**31 - 1])
@pytest.mark.parametrize("form", ["PD()", "PA()"])
def test_empty_rows_point_anywhere(tmp_path, form, offset):
    path = tmp_path / "t.fits"
    rows = np.empty(3, dtype=object)
    rows[:] = ["ab", "", "c"] if form == "PA()" else [np.array([1.0, 2.0]), np.array([]), np.array([3.0])]
    expected = written(path, fits.Column("p", form, array=rows))["p"].to_pylist()
    data = bytearray(path.read_bytes())
    at = table_hdus(path)[0].data_offset + 8
    assert data[at : at + 4] == bytes(4)
    data[at + 4 : at + 8] = offset.to_bytes(4, "big", signed=True)
    path.write_bytes(data)
    assert read_bintable(path, table_hdus(path)[0])["p"].to_pylist() == expected
    # a row that is not empty may not
    data[at : at + 4] = (1).to_bytes(4, "big")
    path.write_bytes(data)
    with pytest.raises(UnusableInputError, match="heap"):
        read_bintable(path, table_hdus(path)[0])


def test_descriptors_that_overflow(tmp_path):
    path = tmp_path / "t.fits"
    ragged = np.empty(1, dtype=object)
    ragged[0] = np.arange(3, dtype=np.float64)
    written(path, fits.Column("p", "QD()", array=ragged))
    at = table_hdus(path)[0].data_offset
    for length, offset in ((3, 2**63 - 1), (2**61, 0), (-(2**61), 0)):
        data = bytearray(path.read_bytes())
        data[at : at + 16] = np.array([length, offset], ">i8").tobytes()
        path.write_bytes(data)
        with pytest.raises(UnusableInputError, match="heap"):
            read_bintable(path, table_hdus(path)[0])


def test_variable_length_bits(tmp_path):
    path = tmp_path / "t.fits"
    ragged = np.empty(2, dtype=object)
    ragged[:] = [np.array([0b10100000, 0b01000000], np.uint8), np.array([0xFF], np.uint8)]
    written(path, fits.Column("p", "PB()", array=ragged))
    # astropy writes no bits of variable length
    data = bytearray(path.read_bytes().replace(b"'PB(2)", b"'PX(9)"))
    at = table_hdus(path)[0].data_offset
    for row, count in enumerate((10, 3)):
        data[at + 8 * row : at + 8 * row + 4] = count.to_bytes(4, "big")
    path.write_bytes(data)
    found = read_bintable(path, table_hdus(path)[0])["p"]
    assert found.type == pa.list_(pa.bool_())
    assert found.to_pylist() == [[True, False, True] + 6 * [False] + [True], [True] * 3]


def test_more_values_than_a_list_column_holds(tmp_path, monkeypatch):
    ragged = np.empty(2, dtype=object)
    ragged[:] = [np.arange(2, dtype=np.complex64), np.arange(1, dtype=np.complex64)]
    monkeypatch.setattr(bintable, "MAX_VALUES", 6)
    written(tmp_path / "t.fits", fits.Column("p", "PC()", array=ragged))
    monkeypatch.setattr(bintable, "MAX_VALUES", 5)
    with pytest.raises(UnusableInputError, match="column p has 6 values") as caught:
        written(tmp_path / "t.fits", fits.Column("p", "PC()", array=ragged))
    assert caught.value.advice


def test_texts_of_any_encoding(tmp_path):
    stored = ["Süd".encode(), "Süd".encode("latin-1"), "巡天".encode(), bytes(range(0x80, 0x8C)), b"a\0b"]
    columns = [
        fits.Column("a", "12A", array=np.array(stored)),
        fits.Column("b", "3A", array=np.full(5, b"x")),
    ]
    table = written(tmp_path / "t.fits", *columns)
    assert table["a"].to_pylist() == ["Süd", "Süd", "巡天", bytes(range(0x80, 0x8C)).decode("latin-1"), "a"]
    assert table.schema.field("a").metadata == {b"note": b"2 texts that are not UTF-8 read as Latin-1"}
    assert table.schema.field("b").metadata is None


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
def test_units_and_names_of_any_encoding(tmp_path, encoding):
    path = tmp_path / "t.fits"
    written(path, fits.Column("Gr__e", "E", unit="__m", array=np.zeros(1, np.float32)))
    for old, new in {"'Gr__e   '": "Größe", "'__m     '": "µm"}.items():
        data = path.read_bytes()
        assert data.count(old.encode()) == 1
        card = f"'{new}".encode(encoding).ljust(len(old) - 1) + b"'"
        path.write_bytes(data.replace(old.encode(), card))
    field = read_bintable(path, table_hdus(path)[0]).schema.field(0)
    assert (field.name, field.metadata[b"unit"].decode()) == ("Größe", "µm")


def test_names_that_are_none(tmp_path):
    columns = [fits.Column(f"n{k}", "B", array=np.zeros(1, np.uint8)) for k in range(4)]
    path = tmp_path / "t.fits"
    written(path, *columns)
    data = path.read_bytes()
    for old, new in {
        b"n0      ": b"        ",
        b"n1      ": b"  lead  ",
        b"n2      ": b"col1    ",
        b"n3": b"\ti",
    }.items():
        assert data.count(b"'" + old) == 1
        data = data.replace(b"'" + old, b"'" + new)
    path.write_bytes(data)
    # no name: the column's number; two of one name: the later one gets a number; blanks around a name are none of it
    assert read_bintable(path, table_hdus(path)[0]).column_names == ["col1", "lead", "col1_2", "i"]


def test_compressed_table_is_named_as_such(tmp_path):
    path = tmp_path / "t.fits"
    table = fits.BinTableHDU.from_columns([fits.Column("a", "J", array=np.arange(3))])
    table.header["ZTABLE"] = True
    table.writeto(path)
    with pytest.raises(UnusableInputError, match="funpack"):
        read_bintable(path, table_hdus(path)[0])
