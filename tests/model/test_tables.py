"""Truth as others write it: every format gives the same table, and what cannot be meant is refused by name."""

from __future__ import annotations

import gzip
import logging
import warnings
from contextlib import suppress

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy import units as u
from astropy.io import fits
from astropy.table import MaskedColumn, Table
from hypothesis import given, settings
from hypothesis import strategies as st

from sgclassify.model.judge.tables import read_table, read_truth
from sgclassify.stages.errors import UsageError

FORMATS = {"fits": "fits", "csv": "ascii.csv", "ecsv": "ascii.ecsv", "vot": "votable", "parquet": "parquet"}
CLASSES = ["star", "galaxy", "qso", "star"]
RA, DEC = np.array([150.1, 150.2, 150.3, 150.4]), np.array([-2.0, 2.5, 0.0, 89.0])


def plain(**columns):
    return Table({"ra": RA, "dec": DEC, "true_class": CLASSES} | columns)


def written(table, path, kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        table.write(path, format=FORMATS[kind], overwrite=True)
    return path


@pytest.mark.parametrize("kind", FORMATS)
def test_every_format_gives_the_same(tmp_path, kind):
    given = plain(
        object_id=[1, 2, 3, 2**62],
        mag_i=MaskedColumn([20.5, 21.5, 0.0, 22.5], mask=[False, False, True, False]),
        blended=[True, False, False, True],
    )
    # neither the name of the file nor that of the format is asked for
    found = read_truth(written(given, tmp_path / "truth.table", kind))
    assert found["ra"].to_pylist() == RA.tolist()
    assert found["dec"].to_pylist() == DEC.tolist()
    assert found["true_class"].to_pylist() == CLASSES
    assert found["object_id"].to_pylist() == [1, 2, 3, 2**62]
    assert found["mag_i"].to_pylist() == [20.5, 21.5, None, 22.5]
    assert found["blended"].to_pylist() == [True, False, False, True]
    assert found.schema.field("blended").type == pa.bool_()


@pytest.mark.parametrize("kind", ["fits", "csv", "vot"])
def test_compressed(tmp_path, kind):
    path = written(plain(), tmp_path / "plain", kind)
    packed = tmp_path / "packed"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert read_truth(packed) == read_truth(path)


@pytest.mark.parametrize("kind", FORMATS)
def test_names_and_classes_in_any_case(tmp_path, kind):
    given = Table(
        {
            "RA": RA, "Dec": DEC, "TRUE_CLASS": [" STAR", "Galaxy ", "QSO", "sTar"],
            "MAG_nuv": [1.0, 2, 3, 4], "Mag_I": [1, 2, 3, 4], "R50_Arcsec": [0.1, 0.2, 0.3, 0.4],
        }
    )  # fmt: skip
    found = read_truth(written(given, tmp_path / "truth", kind))
    assert found.column_names == ["ra", "dec", "true_class", "mag_NUV", "mag_i", "r50_arcsec"]
    assert found["true_class"].to_pylist() == CLASSES
    assert found["mag_i"].to_pylist() == [1.0, 2.0, 3.0, 4.0]


@pytest.mark.parametrize("kind", ["fits", "ecsv", "vot", "parquet"])
@pytest.mark.parametrize("unit", [u.deg, u.rad, u.arcsec, u.hourangle], ids=str)
def test_stated_units_are_converted(tmp_path, kind, unit):
    given = plain(r50_arcsec=(np.arange(4.0) * u.arcsec).to(u.mas))
    given["ra"], given["dec"] = (RA * u.deg).to(unit), (DEC * u.deg).to(u.rad)
    if unit is u.hourangle and kind in ("fits", "vot"):
        # a unit that the format does not know and astropy does not write
        given["ra"].unit = None
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            given["ra"].unit = u.Unit("hourangle_", parse_strict="silent")
        with pytest.raises(UsageError, match=r"truth: the unit of ra is .*hourangle_.*; convert it to deg"):
            read_truth(written(given, tmp_path / "truth", kind))
        return
    found = read_truth(written(given, tmp_path / "truth", kind))
    np.testing.assert_allclose(found["ra"].to_numpy(), RA, rtol=1e-14)
    np.testing.assert_allclose(found["dec"].to_numpy(), DEC, rtol=1e-14)
    np.testing.assert_allclose(found["r50_arcsec"].to_numpy(), np.arange(4.0), rtol=1e-14)


@pytest.mark.parametrize("unit", ["degrees", "DEG", "Degree"])
def test_degrees_by_other_names(tmp_path, unit):
    columns = [
        fits.Column("ra", "D", unit, array=RA),
        fits.Column("dec", "D", unit, array=DEC),
        fits.Column("true_class", "6A", array=CLASSES),
    ]
    fits.BinTableHDU.from_columns(columns).writeto(tmp_path / "t.fits")
    assert read_truth(tmp_path / "t.fits")["ra"].to_pylist() == RA.tolist()


@pytest.mark.parametrize("kind", FORMATS)
def test_rows_without_a_position_are_left_out(tmp_path, kind, caplog):
    caplog.set_level(logging.WARNING)
    given = plain()
    given["ra"] = MaskedColumn(RA, mask=[False, True, False, False])
    given["dec"][2] = np.nan
    path = written(given, tmp_path / "truth", kind)
    found = read_truth(path)
    assert found["ra"].to_pylist() == [150.1, 150.4]
    assert found["true_class"].to_pylist() == ["star", "star"]
    assert f"{path}: 2 of 4 rows have no position" in caplog.text


def test_magnitudes_that_stand_for_no_value(tmp_path):
    path = tmp_path / "truth.csv"
    path.write_text("ra,dec,true_class,mag_i,redshift\n1,2,star,-9999,\n1,3,star,99.0,\n1,4,star,24.5,\n")
    assert read_truth(path)["mag_i"].to_pylist() == [None, None, 24.5]


def test_classes_without_a_value(tmp_path):
    (tmp_path / "t.csv").write_text("ra,dec,true_class\n1,2,\n3,4,star\n")
    assert read_truth(tmp_path / "t.csv")["true_class"].to_pylist() == [None, "star"]


def test_a_fits_file_of_several_tables_and_types(tmp_path):
    other = fits.BinTableHDU.from_columns([fits.Column("x", "D", array=[1.0])])
    wanted = fits.BinTableHDU.from_columns(
        [
            fits.Column("RA", "E", array=[1.5]), fits.Column("DEC", "I", array=[-3]),
            fits.Column("TRUE_CLASS", "10A", array=["GALAXY"]), fits.Column("vector", "3E", array=[[1, 2, 3]]),
        ]
    )  # fmt: skip
    image = fits.CompImageHDU(np.zeros((8, 8), np.float32))
    fits.HDUList([fits.PrimaryHDU(), image, other, wanted]).writeto(tmp_path / "t.fits")
    found = read_truth(tmp_path / "t.fits")
    assert found.to_pydict() == {"ra": [1.5], "dec": [-3.0], "true_class": ["galaxy"]}


def test_columns_as_pandas_and_editors_write_them(tmp_path):
    table = pa.table(
        {
            "ra": pa.array(["1.5", " 2.5 ", ""]), "dec": pa.array([1, 2, 3], pa.int16()),
            "true_class": pa.array([b"STAR", b"galaxy  ", b"qso"]).dictionary_encode(),
            "blended": [1.0, 0.0, None], "nested": [[1], [], None],
        }
    )  # fmt: skip
    pq.write_table(table, tmp_path / "t.parquet")
    found = read_table(tmp_path / "t.parquet", ("ra",))
    assert found["ra"].to_pylist() == [1.5, 2.5, None]
    assert found["true_class"].to_pylist() == CLASSES[:3]
    assert found["blended"].to_pylist() == [True, False, None]
    assert found["nested"].to_pylist() == [[1], [], None]
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfra,dec,true_class,blended\r\n1,2,Star,True\r\n3,4,,\r\n")
    found = read_truth(tmp_path / "t.csv")
    assert found["ra"].to_pylist() == [1.0, 3.0]
    assert found["blended"].to_pylist() == [True, None]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (None, "no such file"),
        (b"", "not a table that can be read"),
        (b"PAR1", "not a table that can be read"),
        (b"\x89HDF\r\n\x1a\n\0\0", "not a table that can be read"),
        (b"\xff\xfe\x00", "not a table that can be read"),
        pytest.param(fits.PrimaryHDU(np.zeros((3, 3))), "without a table", id="image"),
        (b"<?xml version='1.0'?><html></html>", "not a table that can be read"),
        (b"ra,dec\n1,2\n", "no column true_class; it has ra, dec; rename"),
        (b"ra;dec;true_class\n1;2;star\n", "no column ra; it has ra;dec;true_class"),
        (b"ra,dec,true_class\n10:00:00,2,star\n", "column ra must hold numbers of degrees"),
        (b"ra,dec,true_class,mag_i\n1,2,star,faint\n", "column mag_i must hold numbers: "),
        (b"ra,dec,true_class,blended\n1,2,star,perhaps\n", "column blended must hold true and false"),
        (b"ra,dec,true_class\n1,324000,star\n", "dec is beyond a pole .324000.; give ra and dec in degrees"),
        (b"RA,Ra,dec,true_class\n1,1,2,star\n", r"more than one column ra \(RA, Ra\)"),
        (b"ra,dec,true_class\n1,2,star,4\n", "not a table that can be read"),
    ],
    ids=str,
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, content, fault):
    path = tmp_path / "truth"
    if isinstance(content, fits.PrimaryHDU):
        content.writeto(path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(UsageError, match=fault) as raised:
        read_truth(path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("kind", ["fits", "vot", "parquet"])
def test_another_kind_of_unit_is_refused(tmp_path, kind):
    given = plain()
    given["dec"].unit = u.m
    with pytest.raises(UsageError, match="the unit of dec is m; convert it to deg"):
        read_truth(written(given, tmp_path / "truth", kind))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("formats")
    return [written(plain(mag_i=RA), folder / kind, kind) for kind in FORMATS]


@given(which=st.integers(0, len(FORMATS) - 1), cut=st.floats(0, 1), data=st.binary(max_size=4))
@settings(max_examples=100, deadline=None)
def test_damaged_files_are_read_or_refused(files, which, cut, data):
    raw = files[which].read_bytes()
    k = int(cut * len(raw))
    path = files[0].with_name("damaged")
    for damaged in (raw[:k], raw[:k] + data + raw[k + len(data) :]):
        path.write_bytes(damaged)
        with suppress(UsageError):
            assert {"ra", "dec", "true_class"} <= {*read_truth(path).column_names}
