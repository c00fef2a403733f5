from __future__ import annotations

import numpy as np
import pytest

from sgclassify.stages.config import StageConfig
from sgclassify.stages.errors import UnusableInputError
from sgclassify.stages.prepare import prepare_exposure
from sgclassify.stages.read.header import read_header
from sgclassify.stages.tile import _project

SHAPE = (300, 300)


def stars(columns):
    """Stars of 2.4 pixels FWHM at the places of a catalogue, in noise."""
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]]
    image = 0.3 + 0.01 * np.random.default_rng(1).standard_normal(SHAPE)
    for column, row in zip(columns["X"], columns["Y"], strict=True):
        image += 5.0 * np.exp(-0.5 * ((x - column + 1) ** 2 + (y - row + 1) ** 2) / (2.4 / 2.3548) ** 2)
    return image.astype(np.float32)


@pytest.mark.parametrize(("shift", "noted"), [(0.0, False), (0.3, False), (-1.0, True)])
def test_positions_that_count_pixels_otherwise_are_noted(make_exposure, make_columns, tmp_path, shift, noted):
    columns = make_columns(30)
    columns["X"] = columns["X"] + shift
    columns["Y"] = columns["Y"] + shift
    prepared = prepare_exposure(read_header(make_exposure(columns=columns)), tmp_path, StageConfig())
    assert prepared.n_usable == 30
    assert any("1-based" in note for note in prepared.notes) == noted


@pytest.mark.parametrize("dec", [2.0, 60.0, 89.999, 90.0, -90.0])
@pytest.mark.parametrize("ra", [150.0, 0.0])
def test_a_wcs_that_is_off_its_catalogue_is_put_right(make_exposure, make_columns, tmp_path, ra, dec):
    columns = make_columns(30)
    true = {"CRVAL1": ra, "CRVAL2": dec, "CRPIX1": 25.5, "CRPIX2": 20.5}
    header = read_header(make_exposure(name="a_{KIND}.fits", cards=true))
    columns["RA"], columns["DEC"] = header.pixel_to_sky(columns["X"] - 1, columns["Y"] - 1)
    moved = make_exposure(cards=true | {"CRPIX1": 27.5, "CRPIX2": 19.5}, columns=columns)
    prepared = prepare_exposure(read_header(moved), tmp_path, StageConfig())
    assert np.hypot(*prepared.offset_deg) * 3600 == pytest.approx(0.074 * 5**0.5, rel=1e-6)
    assert any("differ by 0.165 arcsec in the median" in note for note in prepared.notes)
    x, y = _project(prepared, columns["RA"], columns["DEC"])
    np.testing.assert_allclose((x + 1, y + 1), (columns["X"], columns["Y"]), rtol=0, atol=1e-4)


NOT_CHECKED = "no catalogue to check the WCS against: the positions of its objects rest on the header alone"


@pytest.mark.parametrize(
    ("options", "noted"), [({}, False), ({"kinds": "IMG WHT FLG"}, True), ({"n_rows": 0}, True)], ids=str
)
def test_what_the_wcs_was_checked_against_is_noted(make_exposure, tmp_path, options, noted):
    prepared = prepare_exposure(read_header(make_exposure(**options)), tmp_path, StageConfig())
    assert (NOT_CHECKED in prepared.notes) == noted


@pytest.mark.parametrize(("fwhm", "noted"), [(2.4, False), (2.6, False), (1.7, True), (3.4, True), (None, False)])
def test_a_header_that_the_point_sources_contradict_is_noted(make_exposure, make_columns, tmp_path, fwhm, noted):
    columns = make_columns(40, SHAPE)
    files = make_exposure(shape=SHAPE, image=stars(columns), columns=columns, cards={"FWHM": fwhm})
    prepared = prepare_exposure(read_header(files), tmp_path, StageConfig())
    notes = [note for note in prepared.notes if "point sources are" in note]
    assert bool(notes) == noted, prepared.notes
    assert prepared.psf.n_stars >= 10
    if noted:
        assert f"FWHM of {fwhm:g} pixels" in notes[0]


@pytest.mark.parametrize("scale", [0.074, 0.05])
def test_without_stars_and_fwhm_the_psf_is_the_cameras(make_exposure, tmp_path, scale):
    cards = {"FWHM": None, "CD1_1": -scale / 3600, "CD2_2": scale / 3600}
    files = make_exposure(cards=cards, kinds="IMG WHT FLG")
    prepared = prepare_exposure(read_header(files), tmp_path, StageConfig())
    assert prepared.psf.n_stars == prepared.psf_model.n_stars == 0
    assert prepared.psf_model.sigma == pytest.approx(2.2 / 2.3548 * 0.074 / scale, rel=1e-4)
    assert np.isfinite([*prepared.psf.measures.values()]).all()
    assert any("rests on 0 point sources" in note and "header has none" in note for note in prepared.notes)


def test_a_catalogue_without_rows_is_believed_where_there_is_nothing_to_see(make_exposure, make_columns, tmp_path):
    image = stars(make_columns(2, SHAPE))
    prepared = prepare_exposure(read_header(make_exposure(shape=SHAPE, image=image, n_rows=0)), tmp_path, StageConfig())
    assert (prepared.n_rows, prepared.n_usable) == (0, 0)
    assert "CAT has no rows" in prepared.notes
    assert not any(note.startswith("CAT missing") for note in prepared.notes)
    image = stars(make_columns(40, SHAPE))
    files = make_exposure(name="b_{KIND}.fits", shape=SHAPE, image=image, n_rows=0)
    with pytest.raises(UnusableInputError, match=r"no rows, the stage detects [34]\d sources.*remove it"):
        prepare_exposure(read_header(files), tmp_path, StageConfig())
