from __future__ import annotations

import dataclasses
import gzip

import numpy as np
import pyarrow as pa
import pytest
from astropy.io import fits
from hypothesis import given, settings
from hypothesis import strategies as st

from sgclassify.stages.config import StageConfig
from sgclassify.stages.errors import UnusableInputError
from sgclassify.stages.flags import SgFlag
from sgclassify.stages.read import catalog
from sgclassify.stages.read.catalog import (
    Detections,
    column_notes,
    find_column,
    read_detections,
    read_table,
    separation_arcsec,
)
from sgclassify.stages.read.header import read_header

CONFIG = StageConfig()


def detections(files, config=CONFIG) -> Detections:
    return read_detections(read_table(files.catalog), read_header(files), config, files.catalog)


def fault_of(files) -> str:
    with pytest.raises(UnusableInputError) as caught:
        detections(files)
    assert caught.value.path == str(files.catalog)
    assert caught.value.advice
    return caught.value.fault


def test_a_good_catalogue(make_exposure, make_columns):
    columns = make_columns(20)
    found = detections(make_exposure(columns=columns))
    assert len(found) == 20
    np.testing.assert_array_equal(found.x, columns["X"] - 1)
    np.testing.assert_array_equal(found.y, columns["Y"] - 1)
    np.testing.assert_array_equal(found.ra, columns["RA"])
    assert found.usable.all()
    assert not found.sg_flags.any()
    kinds = {
        "x": "f8",
        "y": "f8",
        "ra": "f8",
        "dec": "f8",
        "sg_flags": "i4",
        "usable": "?",
    }
    for name, kind in kinds.items():
        assert getattr(found, name).dtype == np.dtype(kind), name


NAMES = {
    "lower": str.lower,
    "upper": str.upper,
    "sextractor": {
        "objID": "NUMBER",
        "X": "X_IMAGE",
        "Y": "Y_IMAGE",
        "RA": "ALPHA_J2000",
        "DEC": "DELTA_J2000",
    }.get,
    "windowed": {
        "objID": "NUMBER",
        "X": "XWIN_IMAGE",
        "Y": "YWIN_IMAGE",
        "RA": "ALPHAWIN_J2000",
        "DEC": "DELTAWIN_J2000",
    }.get,
    "world": {"objID": "NUMBER", "X": "x_image", "Y": "y_image", "RA": "X_WORLD", "DEC": "Y_WORLD"}.get,
}


@pytest.mark.parametrize("names", NAMES)
def test_aliases(make_exposure, make_columns, names):
    columns = make_columns()
    renamed = {NAMES[names](name) or name: values for name, values in columns.items()}
    found = detections(make_exposure(columns=renamed))
    np.testing.assert_array_equal(found.x, columns["X"] - 1)
    np.testing.assert_array_equal(found.dec, columns["DEC"])


def test_official_name_is_preferred():
    table = pa.table({"x_image": [1.0], "x": [2.0], "X": [3.0]})
    assert find_column(table, "X") == "X"
    assert find_column(table.drop_columns(["X"]), "X") == "x"
    assert find_column(table, "RA") is None
    assert find_column(pa.table({"FWHM": [1.0]}), "fwhm") == "FWHM"


def renamed(path, names):
    """Give columns other names of as many characters; astropy does not write two of one name."""
    data = path.read_bytes()
    for old, new in names.items():
        assert data.count(f"'{old:8}'".encode()) == 1
        data = data.replace(f"'{old:8}'".encode(), f"'{new:8}'".encode())
    path.write_bytes(data)


def test_twins_of_a_column_that_is_read(make_exposure, make_columns):
    columns = make_columns()
    files = make_exposure(columns={**columns, "r": columns["RA"] + 1}, checksum=False)
    renamed(files.catalog, {"r": "ra"})
    # the exact official name tells which one it is; the other comes back beside it
    np.testing.assert_array_equal(detections(files).ra, columns["RA"])
    assert read_table(files.catalog).column_names[-1] == "ra_2"
    renamed(files.catalog, {"RA": "Ra"})
    assert fault_of(files) == "two columns may be its RA: 'Ra' and 'ra'"
    renamed(files.catalog, {"Ra": "RA", "ra": "RA"})
    assert fault_of(files) == "two columns may be its RA: 'RA' and 'RA'"


def test_twins_of_columns_that_are_not_read(make_exposure, make_columns):
    columns = make_columns()
    extra = {f"n{k}": columns["X"] + k for k in range(7)}
    files = make_exposure(columns={**columns, **extra}, checksum=False)
    renamed(files.catalog, {"n0": "Flag", "n1": "FLAG", "n2": "x_image", "n3": "x_image"})
    assert len(detections(files)) == 12
    table = read_table(files.catalog)
    assert table.column_names[-7:] == ["Flag_2", "FLAG_3", "x_image", "x_image_2", "n4", "n5", "n6"]
    for name, values in zip(table.column_names[-7:], extra.values(), strict=True):
        np.testing.assert_array_equal(table[name], values)
    notes = [
        "CAT column Flag_2: named Flag in its file, as another column is",
        "CAT column FLAG_3: named FLAG in its file, as another column is",
        "CAT column x_image_2: named x_image in its file, as another column is",
    ]
    assert column_notes(table) == notes
    # of many, the first five
    renamed(files.catalog, {"n4": "x_image", "n5": "x_image", "n6": "x_image"})
    found = column_notes(read_table(files.catalog))
    assert found[:3] == notes
    assert found[5:] == ["1 more CAT columns have such remarks"]


def test_values_that_are_declared_to_be_none(make_exposure, make_columns):
    columns = {**make_columns(), "objID": np.arange(12)}
    columns["objID"][:3] = -1
    columns["X"] = np.rint(columns["X"]).astype(np.int32)
    columns["X"][5] = -1
    files = make_exposure(columns=columns)
    config = dataclasses.replace(CONFIG, position_tolerance_arcsec=1.0)
    before = [*[SgFlag.DUPLICATE_ID] * 3, 0, 0, SgFlag.POSITION_MISMATCH]
    assert detections(files, config).sg_flags[:6].tolist() == before
    for k, name in enumerate(columns, start=1):
        if name in ("objID", "X"):
            fits.setval(files.catalog, f"TNULL{k}", value=-1, ext=1)
    assert detections(files, config).sg_flags[:6].tolist() == [0, 0, 0, 0, 0, SgFlag.NO_POSITION]
    table = read_table(files.catalog)
    assert table["objID"].to_pylist()[:4] == [-1, -1, -1, 3]
    assert table["X"].null_count == 0


def test_ldac_catalogue(make_exposure, make_columns, make_table):
    files = make_exposure()
    columns = make_columns(7)
    head = fits.BinTableHDU.from_columns(
        [fits.Column("Field Header Card", "2880A", array=np.array(["x" * 2880]))], name="LDAC_IMHEAD"
    )
    rows = make_table(columns)
    rows.name = "LDAC_OBJECTS"
    fits.HDUList([fits.PrimaryHDU(), head, rows]).writeto(files.catalog, overwrite=True)
    assert len(detections(files)) == 7


def test_no_value(make_exposure, make_columns):
    columns = make_columns()
    columns["X"][0] = columns["DEC"][1] = -9999.0
    found = detections(make_exposure(columns=columns))
    assert found.sg_flags[:3].tolist() == [SgFlag.NO_POSITION, SgFlag.NO_POSITION, 0]
    for name in ("x", "y", "ra", "dec"):
        assert np.isnan(getattr(found, name)[:2]).all()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X", np.nan),
        ("X", np.inf),
        ("X", -2.0),
        ("Y", 43.6),
        ("X", 1e300),
        ("RA", np.nan),
        ("RA", 721.0),
        ("RA", -721.0),
        ("RA", 1e5),
        ("DEC", -91.0),
        ("DEC", 90.0001),
        ("DEC", -np.inf),
    ],
)
def test_rows_without_a_position_keep_their_place(make_exposure, make_columns, name, value):
    columns = make_columns()
    columns[name][5] = value
    found = detections(make_exposure(columns=columns))
    assert found.sg_flags.tolist() == [SgFlag.NO_POSITION if k == 5 else 0 for k in range(12)]
    assert found.usable.tolist() == [k != 5 for k in range(12)]


def test_positions_just_off_the_detector_are_usable(make_exposure, make_columns):
    files = make_exposure()
    columns = make_columns()
    columns["X"][:2] = [-1.4, 52.4]  # 2.4 and 1.9 pixels outside the first and the last pixel's centre
    columns["RA"], columns["DEC"] = read_header(files).pixel_to_sky(columns["X"] - 1, columns["Y"] - 1)
    assert detections(make_exposure(columns=columns)).usable.all()


@pytest.mark.parametrize(("shift", "agrees"), [(1.9, True), (2.1, False), (3600.0, False)])
def test_sky_and_pixel_positions_that_differ(make_exposure, make_columns, shift, agrees):
    columns = make_columns()
    columns["DEC"][4] += shift / 3600
    found = detections(make_exposure(columns=columns))
    assert found.sg_flags[4] == (0 if agrees else SgFlag.POSITION_MISMATCH)
    assert found.usable[4] == agrees
    assert np.isfinite(found.x[4])


def test_negative_right_ascension_is_the_same_place(make_exposure, make_columns):
    columns = make_columns()
    columns["RA"] = columns["RA"] - 360.0
    assert detections(make_exposure(columns=columns)).usable.all()
    columns["RA"] = columns["RA"] - 720.0
    assert fault_of(make_exposure(columns=columns)).startswith("12 of 12 rows")
    files = make_exposure(cards={"CRVAL1": 359.9999}, columns=make_columns())
    ra, dec = read_header(files).pixel_to_sky(columns["X"] - 1, columns["Y"] - 1)
    columns["RA"], columns["DEC"] = np.where(ra > 180, ra - 360, ra), dec
    found = detections(make_exposure(cards={"CRVAL1": 359.9999}, columns=columns))
    assert found.usable.all()
    np.testing.assert_allclose(found.ra, ra, rtol=0, atol=1e-9)


@pytest.mark.parametrize("turn", [-360.0, 0.0, 360.0])
@pytest.mark.parametrize("centre", [0.0, 150.0, 180.0, 359.9999])
@pytest.mark.parametrize("dec", [2.0, 90.0, -90.0])
def test_right_ascensions_may_be_counted_in_any_range(make_exposure, make_columns, turn, centre, dec):
    cards = {"CRVAL1": centre, "CRVAL2": dec}
    columns = make_columns()
    header = read_header(make_exposure(cards=cards))
    ra, columns["DEC"] = header.pixel_to_sky(columns["X"] - 1, columns["Y"] - 1)
    # part of the rows below 0, part beyond 360, as a program counts that makes the range of a field unbroken
    columns["RA"] = np.where(ra > centre + 180, ra - 360, ra) + turn
    found = detections(make_exposure(cards=cards, columns=columns))
    assert found.usable.all()
    assert separation_arcsec(found.ra, found.dec, ra, columns["DEC"]).max() < 1e-8
    assert (found.ra >= 0).all()
    assert (found.ra < 360).all()


def test_positions_just_round_zero_and_the_pole(make_exposure, make_columns):
    columns = make_columns(6)
    cards = {"CRVAL1": 0.0, "CRPIX1": columns["X"][0], "CRPIX2": columns["Y"][0]}
    columns["RA"], columns["DEC"] = (
        np.full(6, value)
        for value in read_header(make_exposure(cards=cards)).pixel_to_sky(*(columns[name][0] - 1 for name in "XY"))
    )
    columns["X"][:], columns["Y"][:] = columns["X"][0], columns["Y"][0]
    columns["RA"] = np.array([0.0, -0.0, -1e-20, 360.0, 360.0003, -0.0001])
    found = detections(make_exposure(cards=cards, columns=columns))
    np.testing.assert_allclose(found.ra, [0, 0, 0, 0, 0.0003, 359.9999], rtol=0, atol=1e-12)
    assert found.usable.all()
    cards["CRVAL2"] = 90.0
    columns["RA"], columns["DEC"] = np.arange(6.0), 90.0 + np.array([0, 1e-12, 2e-14, 0, 0, -1e-6])
    found = detections(make_exposure(cards=cards, columns=columns))
    assert found.usable.all()
    assert found.dec.max() == 90.0


@pytest.mark.parametrize(("unit", "factor"), [("hourangle", 1 / 15), ("rad", np.pi / 180)])
def test_angles_in_other_units_are_named(make_exposure, make_columns, make_table, unit, factor):
    columns = make_columns()
    files = make_exposure()
    table = make_table(columns | {"RA": columns["RA"] * factor, "DEC": columns["DEC"] * factor})
    table.columns["RA"].unit = unit
    table.columns["DEC"].unit = "deg"
    write_tables(files, table)
    assert fault_of(files).endswith(f"disagree with the WCS of the image; RA is in {unit}, not degrees)")


def test_repeated_identifiers(make_exposure, make_columns):
    columns = make_columns()
    columns["objID"][[2, 5, 9]] = 77
    columns["objID"][[3, 4]] = -9999
    found = detections(make_exposure(columns=columns))
    assert np.flatnonzero(found.sg_flags & SgFlag.DUPLICATE_ID).tolist() == [2, 5, 9]
    assert found.usable.all()


def test_text_identifiers(make_exposure, make_columns):
    columns = make_columns()
    columns["objID"] = np.array([f"s{k % 11}" for k in range(12)], dtype="S8")
    found = detections(make_exposure(columns=columns))
    assert np.flatnonzero(found.sg_flags).tolist() == [0, 11]


@pytest.mark.parametrize("name", ["objID", "X", "Y", "RA", "DEC"])
def test_missing_column(make_exposure, make_columns, name):
    columns = make_columns()
    del columns[name]
    assert fault_of(make_exposure(columns=columns)) == f"missing column {name}"


def test_optional_columns_may_be_missing(make_exposure, make_columns):
    columns = {name: values for name, values in make_columns().items() if name in ("objID", "X", "Y", "RA", "DEC")}
    assert detections(make_exposure(columns=columns)).usable.all()


@pytest.mark.parametrize(
    "values", [np.full(12, b"A"), np.ones(12, bool), np.zeros((12, 2))], ids=["text", "logical", "vector"]
)
def test_optional_columns_may_hold_anything(make_exposure, make_columns, values):
    columns = {**make_columns(), "Flag": values, "Mag_Kron": values}
    assert detections(make_exposure(columns=columns)).usable.all()


def test_identifiers_that_are_vectors(make_exposure, make_columns):
    columns = {**make_columns(), "objID": np.zeros((12, 2))}
    assert "objID" in fault_of(make_exposure(columns=columns))


def write_tables(files, *tables):
    for k, table in enumerate(tables):
        table.name = f"T{k}"
    fits.HDUList([fits.PrimaryHDU(), *tables]).writeto(files.catalog, overwrite=True)


def test_the_catalogue_among_other_tables(make_exposure, make_columns, make_table):
    files = make_exposure()
    other = fits.BinTableHDU.from_columns([fits.Column("KEY", "8A", array=np.array(["a", "b"]))])
    write_tables(files, other, make_table(make_columns(7)), other.copy())
    assert len(detections(files)) == 7
    # rows of one of two catalogues would be lost
    write_tables(files, make_table(make_columns(7)), make_table(make_columns(5)))
    assert fault_of(files) == "HDU 1 (T0) and HDU 2 (T1) are catalogues, where one is expected"


def test_more_rows_than_identifiers_can_tell_apart(make_exposure, make_columns, monkeypatch):
    monkeypatch.setattr(catalog, "ROW_BITS", 3)
    assert len(detections(make_exposure(columns=make_columns(8)))) == 8
    assert "9 rows" in fault_of(make_exposure(name="b_{KIND}.fits", columns=make_columns(9)))


@pytest.mark.parametrize("values", [np.full(12, b"12.5"), np.zeros((12, 2))], ids=["text", "vector"])
def test_column_that_holds_no_numbers(make_exposure, make_columns, values):
    assert "holds no numbers" in fault_of(make_exposure(columns={**make_columns(), "X": values}))


def test_no_rows(make_exposure):
    assert len(detections(make_exposure(n_rows=0))) == 0


def test_garbage_rows(make_exposure):
    assert "100000 rows on 50 x 40 pixels" in fault_of(make_exposure(n_rows=100_000))


@pytest.mark.parametrize(("bad", "usable"), [(6, True), (7, False)])
def test_share_of_bad_rows(make_exposure, make_columns, bad, usable):
    columns = make_columns()
    columns["X"][:bad] = np.nan
    files = make_exposure(columns=columns)
    if usable:
        assert detections(files).usable.sum() == 12 - bad
    else:
        assert fault_of(files).startswith("7 of 12 rows have no usable position (0 disagree")


def test_catalogue_of_another_exposure(make_exposure, make_columns):
    columns = make_columns()
    columns["RA"] = columns["RA"] + 1
    assert "12 disagree with the WCS" in fault_of(make_exposure(columns=columns))


def test_own_detections(make_exposure, make_columns):
    files = make_exposure(kinds="IMG WHT FLG")
    header = read_header(files)
    found = read_detections(pa.table(make_columns()), header, CONFIG, files.image)
    assert set(found.sg_flags.tolist()) == {int(SgFlag.STAGE_CATALOG)}
    empty = pa.table({name: pa.array([], pa.float64()) for name in ("objID", "X", "Y", "RA", "DEC")})
    assert len(read_detections(empty, header, CONFIG, files.image)) == 0


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda data: b"", "0 bytes"),
        (lambda data: b"X,Y\n1,2\n", "not a FITS file"),
        (lambda data: data[:6000], "truncated"),
        (lambda data: data.replace(b"TFORM2  = 'D", b"TFORM2  = 'E"), "do not add up"),
        (lambda data: data.replace(b"TFORM2  = 'D", b"TFORM2  = 'Z"), "unknown format"),
        (lambda data: data.replace(b"TTYPE3  = 'Y", b"TTYPE3  = 'X"), "two columns"),
        (lambda data: gzip.compress(data)[:-400], "gzip"),
    ],
)
def test_unreadable(make_exposure, damage, fault):
    files = make_exposure(checksum=False)
    files.catalog.write_bytes(damage(files.catalog.read_bytes()))
    assert fault in fault_of(files)


def test_no_table(make_exposure):
    files = make_exposure(compress="GZIP_1")
    files.catalog.write_bytes(files.image.read_bytes())
    assert "no binary table" in fault_of(files)


def test_compressed_catalogue(make_exposure, make_columns):
    found = detections(make_exposure(gz="CAT"))
    np.testing.assert_array_equal(found.x, make_columns()["X"] - 1)


@settings(max_examples=100, deadline=None)
@given(
    ra=st.floats(0, 360),
    dec=st.floats(-89, 89),
    step=st.floats(0.001, 1000),
)
def test_separation_along_a_meridian(ra, dec, step):
    other = dec + step / 3600 if dec < 0 else dec - step / 3600
    found = separation_arcsec(*(np.array([v]) for v in (ra, dec, ra - 360, other)))
    np.testing.assert_allclose(found, step, rtol=1e-6, atol=1e-6)
