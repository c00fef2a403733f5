from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgclassify.stages.read.names import (
    KINDS,
    ExposureFiles,
    catalog_stem,
    exposure_stem,
    file_kind,
    find_siblings,
    parse_name,
)

STEM = "CSST_MSC_MS_WIDE_20280610030351_20280610030621_10860103802_22_L1_V01"
OLD = "MSC_MS_210525121500_100000001_06"

digits = st.text("0123456789", min_size=14, max_size=14)


@settings(max_examples=100, deadline=None)
@given(
    survey=st.sampled_from(["WIDE", "DEEP", "SCI", "CALS-F"]),
    start=digits,
    stop=digits,
    obsid=st.text("0123456789", min_size=9, max_size=11),
    chip=st.integers(1, 30),
    version=st.from_regex(r"V[0-9]{2}(\.[0-9])?", fullmatch=True),
    kind=st.sampled_from([*KINDS, *(kind.lower() for kind in KINDS)]),
    extension=st.sampled_from([".fits", ".fits.fz", ".fits.gz", ".FITS"]),
)
def test_standard_name_round_trip(survey, start, stop, obsid, chip, version, kind, extension):
    stem = f"CSST_MSC_MS_{survey}_{start}_{stop}_{obsid}_{chip:02d}_L1_{version}"
    path = f"/night/{stem}_{kind}{extension}"
    name = parse_name(path)
    assert name is not None
    assert (name.obsid, name.chip, name.version, name.kind) == (obsid, chip, version, kind.upper())
    assert name.stem == exposure_stem(path) == stem
    assert file_kind(path) == kind.upper()


@pytest.mark.parametrize(
    ("name", "kind"),
    [(f"{OLD}_img_L1.fits", "IMG"), (f"{OLD}_wht_L1.fits.fz", "WHT"), (f"{OLD}_cat.fits", "CAT")],
)
def test_old_names(name, kind):
    parsed = parse_name(name)
    assert parsed is not None
    assert (parsed.obsid, parsed.chip, parsed.version, parsed.kind) == ("100000001", 6, "", kind)
    assert parsed.stem == exposure_stem(name) == OLD


@pytest.mark.parametrize("name", ["image.fits", f"{STEM}_IMG.txt", f"{STEM}_PSF.fits", "_IMG.fits", "CSST_IMG.fits"])
def test_other_names_are_not_parsed(name):
    assert parse_name(name) is None


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("field.fits", "field"),
        ("field_IMG.fits", "field"),
        ("field_img.fits.gz", "field"),
        ("a.b_img.fits.fz", "a.b"),
        ("plain", "plain"),
        (f"{STEM}_IMG.fits", STEM),
    ],
)
def test_exposure_stem(name, stem):
    assert exposure_stem(name) == stem


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).touch()


def test_siblings_of_a_standard_name(tmp_path):
    touch(tmp_path, *(f"{STEM}_{kind}.fits" for kind in KINDS))
    files = find_siblings(tmp_path / f"{STEM}_IMG.fits")
    assert files == ExposureFiles(*(tmp_path / f"{STEM}_{kind}.fits" for kind in KINDS))
    assert catalog_stem(files) == f"{STEM}_CAT"


def test_siblings_of_an_old_name(tmp_path):
    names = [f"{OLD}_img_L1.fits", f"{OLD}_wht_L1.fits", f"{OLD}_flg_L1.fits", f"{OLD}_cat.fits"]
    touch(tmp_path, *names)
    files = find_siblings(tmp_path / names[0])
    assert files == ExposureFiles(*(tmp_path / name for name in names))
    assert catalog_stem(files) == f"{OLD}_cat"


def test_siblings_of_mixed_compression_and_case(tmp_path):
    touch(tmp_path, "f_IMG.fits.fz", "f_wht.fits.gz", "f_FLG.fits", "f_CAT.fits")
    files = find_siblings(tmp_path / "f_IMG.fits.fz")
    assert [p and p.name for p in (files.weight, files.flag, files.catalog)] == [
        "f_wht.fits.gz",
        "f_FLG.fits",
        "f_CAT.fits",
    ]


def test_sibling_most_like_the_image_is_preferred(tmp_path):
    touch(tmp_path, "f_IMG.fits.fz", "f_WHT.fits", "f_WHT.fits.fz", "f_wht.fits.fz")
    assert find_siblings(tmp_path / "f_IMG.fits.fz").weight == tmp_path / "f_WHT.fits.fz"


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (f"{STEM}_IMG.fits.fz", f"{STEM}_CAT"),
        (f"{OLD}_img_L1.fits", f"{OLD}_cat"),
        ("field.fits", "field_CAT"),
    ],
)
def test_missing_companions(tmp_path, image, expected):
    touch(tmp_path, image)
    files = find_siblings(tmp_path / image)
    assert (files.weight, files.flag, files.catalog) == (None, None, None)
    assert catalog_stem(files) == expected


def test_companions_beside_what_a_link_leads_to(tmp_path):
    archive, staged, listed = (tmp_path / name for name in ("archive", "staged", "listed"))
    for folder in (archive, staged, listed):
        folder.mkdir()
    touch(archive, *(f"{STEM}_{kind}.fits" for kind in KINDS))
    image = f"{STEM}_IMG.fits"
    # two steps, one of them relative and of another name
    (staged / "ab12.fits").symlink_to(Path("..") / "archive" / image)
    (listed / image).symlink_to(staged / "ab12.fits")
    files = find_siblings(listed / image)
    assert files.image == listed / image
    expected = [archive / f"{STEM}_{kind}.fits" for kind in KINDS[1:]]
    found = [files.weight, files.flag, files.catalog]
    assert [path.resolve() for path in found if path is not None] == [path.resolve() for path in expected]
    # what lies beside the link is preferred
    touch(staged, "ab12_WHT.fits")
    touch(listed, f"{STEM}_CAT.fits.gz")
    files = find_siblings(listed / image)
    assert (files.weight, files.catalog) == (staged / "ab12_WHT.fits", listed / f"{STEM}_CAT.fits.gz")


def test_links_that_lead_nowhere_or_in_a_circle(tmp_path):
    (tmp_path / "a_IMG.fits").symlink_to(tmp_path / "b_IMG.fits")
    assert find_siblings(tmp_path / "a_IMG.fits") == ExposureFiles(tmp_path / "a_IMG.fits")
    (tmp_path / "b_IMG.fits").symlink_to(tmp_path / "a_IMG.fits")
    assert find_siblings(tmp_path / "a_IMG.fits") == ExposureFiles(tmp_path / "a_IMG.fits")
