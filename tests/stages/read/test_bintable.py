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
    assert found.to_pydict() == {"s": [10.0, 11.5, None], "n": [None, 7, 8], "z": [None, None, None]}


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
    assert table["m"].to_pylist() == [[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11]]]
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


def test_compressed_table_is_named_as_such(tmp_path):
    path = tmp_path / "t.fits"
    table = fits.BinTableHDU.from_columns([fits.Column("a", "J", array=np.arange(3))])
    table.header["ZTABLE"] = True
    table.writeto(path)
    with pytest.raises(UnusableInputError, match="funpack"):
        read_bintable(path, table_hdus(path)[0])
