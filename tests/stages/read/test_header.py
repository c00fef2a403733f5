from __future__ import annotations

import gzip
import math
import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from astropy.io import fits
from astropy.wcs import WCS

from sgclassify.stages.bands import BANDS, DETECTOR_FILTER, SLITLESS
from sgclassify.stages.errors import SlitlessExposureError, UnusableInputError
from sgclassify.stages.read.header import read_header
from sgclassify.stages.read.names import ExposureFiles

OLD = "MSC_MS_210525121500_100000001_06_{kind}.fits"


def fault_of(files: ExposureFiles) -> str:
    with pytest.raises(UnusableInputError) as caught:
        read_header(files)
    error = caught.value
    assert error.fault
    assert error.advice
    assert isinstance(pickle.loads(pickle.dumps(error)), type(error))
    return error.fault


def test_everything_that_a_header_says(make_exposure):
    files = make_exposure()
    header = read_header(files)
    assert header.exposure_id == files.image.name.removesuffix("_IMG.fits")
    assert header.catalog_stem == header.exposure_id + "_CAT"
    assert (header.obsid, header.chip, header.band, header.shape) == ("10160000001", 8, "g", (40, 50))
    assert (header.zero_point, header.exposure_time, header.gain, header.read_noise) == (
        26.0,
        150.0,
        1.1,
        5.0,
    )
    assert (header.saturate, header.sky_background, header.sky_rms, header.fwhm_px) == (460.0, 0.3, 0.05, 2.1)
    assert header.date_obs == "2028-06-10T03:03:51"
    assert header.notes == ()
    assert 0 <= header.exposure_key < 2**42
    assert pickle.loads(pickle.dumps(header)) == header


def test_exposure_key_is_frozen(make_exposure):
    """Object identifiers contain it: it must never change."""
    assert read_header(make_exposure()).exposure_key == 3763109605980


@pytest.mark.parametrize(
    "variant",
    [
        {
            "cards": {
                "GAIN1": None,
                "GAIN01": 1.1,
                "RDNOISE1": None,
                "RDNOIS01": 5.0,
                "ZP": None,
                "CCDZP": 26.0,
            }
        },
        {"in_primary": True},
        {"checksum": False},
        {"compress": "RICE_1"},
        {"compress": "GZIP_2"},
        {"gz": "IMG WHT FLG CAT"},
        {"gz": "IMG"},
        {"primary": {"DETECTOR": None}, "cards": {"CHIPID": 8}},
        {"primary": {"DETECTOR": None}},
        {"primary": {"OBSID": None}},
        {"cards": {"OBSID": "10160000001"}, "primary": {"OBSID": None}},
        {"cards": {"FILTER": None}, "primary": {"FILTER": "G"}},
        {"cards": {"GAIN1": "1.1", "ZP": "26.0"}},
        {"cards": {"HIERARCH odd key": 1, "COMMENT": "odd"}},
    ],
    ids=str,
)
def test_legal_variants_say_the_same(make_exposure, variant):
    header = read_header(make_exposure(**variant))
    assert (header.obsid, header.chip, header.band, header.shape) == ("10160000001", 8, "g", (40, 50))
    assert (header.zero_point, header.gain, header.read_noise) == (26.0, 1.1, 5.0)
    assert header.notes == ()


@pytest.mark.parametrize(
    "card", [b"BLANK   =                   -1", b"lower= 1", b"OBSERVER= 'M\xfcller'", b"\xff" * 80]
)
def test_odd_cards_are_no_concern(make_exposure, card):
    files = make_exposure(cards={"OBSERVER": "?"}, checksum=False)
    data = files.image.read_bytes()
    at = data.index(b"OBSERVER=")
    files.image.write_bytes(data[:at] + card.ljust(80) + data[at + 80 :])
    assert read_header(files).notes == ()


def test_old_name(make_exposure):
    header = read_header(make_exposure(name=OLD, chip=6, obsid="100000001"))
    assert (header.exposure_id, header.chip, header.band) == ("MSC_MS_210525121500_100000001_06", 6, "y")


def test_absent_numbers_are_nan_and_strange_ones_noted(make_exposure):
    cards = {"GAIN1": -9999.0, "SATURATE": None, "SKY_RMS": None, "FWHM": -1.0}
    header = read_header(make_exposure(cards=cards))
    assert all(math.isnan(v) for v in (header.gain, header.saturate, header.sky_rms, header.fwhm_px))
    assert header.notes == ("FWHM is -1.0: ignored",)


@pytest.mark.parametrize("fwhm", [0.16, 99.0])
def test_fwhm_that_is_not_in_pixels(make_exposure, fwhm):
    header = read_header(make_exposure(cards={"FWHM": fwhm}))
    assert math.isnan(header.fwhm_px)
    assert header.notes == (f"FWHM is {fwhm}: ignored",)


@pytest.mark.parametrize(("scale", "noted"), [(0.074, False), (0.075, False), (0.05, True), (0.148, True)])
def test_another_pixel_scale_is_noted(make_exposure, scale, noted):
    header = read_header(make_exposure(cards={"CD1_1": -scale / 3600, "CD2_2": scale / 3600}))
    assert header.notes == ((f"the pixel scale is {scale} arcsec, the camera's 0.074: binned or resampled?",) * noted)


def test_missing_exposure_time_and_other_units_are_noted(make_exposure):
    header = read_header(make_exposure(cards={"BUNIT": "ADU"}, primary={"EXPTIME": None}))
    assert math.isnan(header.exposure_time)
    assert [note.split(":")[0] for note in header.notes] == ["no EXPTIME", "BUNIT is ADU"]


@pytest.mark.parametrize("chip", sorted(DETECTOR_FILTER))
def test_every_detector(make_exposure, chip):
    files = make_exposure(chip=chip)
    if DETECTOR_FILTER[chip] in SLITLESS:
        with pytest.raises(SlitlessExposureError, match="slitless"):
            read_header(files)
    else:
        header = read_header(files)
        assert header.band == DETECTOR_FILTER[chip]
        assert header.band in BANDS


def test_slitless_by_its_detector_alone(make_exposure):
    with pytest.raises(SlitlessExposureError):
        read_header(make_exposure(chip=1, cards={"FILTER": None}))


def test_filter_wins_over_the_detector(make_exposure):
    header = read_header(make_exposure(chip=8, cards={"FILTER": "r"}))
    assert header.band == "r"
    assert any("FILTER is r" in note for note in header.notes)


def test_detector_wins_over_the_file_name(make_exposure):
    header = read_header(make_exposure(chip=8, primary={"DETECTOR": "CHIP23"}))
    assert header.chip == 23
    assert any("file name 8" in note for note in header.notes)


def test_missing_companions_are_noted(make_exposure):
    header = read_header(make_exposure(kinds="IMG"))
    assert [note.split()[1] for note in header.notes] == ["WHT", "FLG", "CAT"]


def test_missing_weight_needs_a_noise_model(make_exposure):
    fault = fault_of(make_exposure(kinds="IMG FLG", cards={"SKY_RMS": None}, primary={"EXPTIME": None}))
    assert "no WHT" in fault


@pytest.mark.parametrize(
    ("cards", "fault"),
    [
        ({"FILTER": None}, "no FILTER"),
        ({"FILTER": "H"}, "unknown FILTER 'H'"),
        ({"ZP": None}, "no zero point"),
        ({"ZP": -9999.0}, "no zero point"),
        ({"ZP": 0.0}, "zero point 0.0"),
        ({"ZP": "bad"}, "zero point 'bad'"),
        ({"CTYPE1": None}, "CTYPE"),
        ({"CTYPE1": "GLON-TAN", "CTYPE2": "GLAT-TAN"}, "CTYPE"),
        ({"CRVAL1": None}, "CRVAL1"),
        ({"CRVAL2": 91.0}, "CRVAL2"),
        ({"CRPIX1": "x"}, "CRPIX1"),
        ({"CUNIT1": "rad"}, "CUNIT1"),
        ({"RADESYS": "FK4"}, "RADESYS"),
        ({"RADESYS": "FK5", "EQUINOX": 1950.0}, "RADESYS"),
        ({"RADESYS": None, "EQUINOX": 1950.0}, "RADESYS"),
        ({"RADESYS": None, "RADECSYS": "FK4"}, "RADESYS"),
        ({"CD1_1": 0.0}, "WCS"),
        ({"CD1_1": None, "CD1_2": None, "CD2_1": None, "CD2_2": None}, "neither CD nor CDELT"),
        ({"CD1_1": -0.074, "CD2_2": 0.074}, "WCS"),
        ({"CD1_1": -1e-9, "CD2_2": 1e-9}, "pixel scale"),
        ({"CD1_1": -8e-5}, "pixel scales"),
        ({"CRPIX1": 1e9}, "WCS"),
        ({"CTYPE1": "RA---XYZ", "CTYPE2": "DEC--XYZ"}, "WCS"),
    ],
    ids=str,
)
def test_unusable_headers(make_exposure, cards, fault):
    assert fault in fault_of(make_exposure(cards=cards))


@pytest.mark.parametrize("word", ["NaN", "-Inf", "1.0.0"])
@pytest.mark.parametrize("key", ["ZP", "CRVAL1", "CD1_1"])
def test_numbers_that_are_none(make_exposure, key, word):
    files = make_exposure(checksum=False)
    data = files.image.read_bytes()
    at = data.index(f"{key:8}=".encode())
    files.image.write_bytes(data[:at] + f"{key:8}= {word:>20}".ljust(80).encode() + data[at + 80 :])
    assert word.lower().lstrip("-")[:3] in fault_of(files).lower()


def test_other_words_for_the_same_wcs(make_exposure):
    plain = read_header(make_exposure(name="a_{KIND}.fits"))
    scale = 0.074 / 3600
    other = {"CD1_1": None, "CD1_2": None, "CD2_1": None, "CD2_2": None, "RADESYS": None}
    other |= {"CDELT1": -scale, "CDELT2": scale, "CUNIT1": "DEG", "CUNIT2": None}
    same = read_header(make_exposure(name="b_{KIND}.fits", cards=other))
    np.testing.assert_allclose(same.pixel_to_sky(3, 30), plain.pixel_to_sky(3, 30), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "cards",
    [
        {"CRVAL1": "150.0", "CRVAL2": " 2D0 ", "CD1_1": "-2.0555555555555555e-05"},
        {"CTYPE1": "RA---TPV", "CTYPE2": "DEC--TPV"},
        {"CTYPE1": "RA---TPV", "CTYPE2": "DEC--TPV", "PV2_1": 1.0},
        {"PV1_0": 0.0, "PV1_1": 1.0, "PV1_2": 0.0, "PV2_0": 0.0, "PV2_1": 1.0, "PV2_2": 0.0},
        {"EQUINOX": fits.card.UNDEFINED},
        {"EQUINOX": "J2000.0", "RADESYS": None},
        {"LONPOLE": fits.card.UNDEFINED, "CUNIT1": fits.card.UNDEFINED},
        {"CRVAL1": 510.0},
        {"CRVAL1": -570.0},
    ],
    # the same in every process
    ids=lambda cards: str({k: "undefined" if v is fits.card.UNDEFINED else v for k, v in cards.items()}),
)
def test_legal_cards_of_the_same_wcs(make_exposure, cards):
    plain = read_header(make_exposure(name="a_{KIND}.fits"))
    same = read_header(make_exposure(name="b_{KIND}.fits", cards=cards))
    assert same.notes == plain.notes == ()
    x, y = np.array([0.0, 49.0, 3.0]), np.array([0.0, 39.0, 30.0])
    np.testing.assert_allclose(same.pixel_to_sky(x, y), plain.pixel_to_sky(x, y), rtol=0, atol=1e-10)


def test_wcs_is_read_from_the_primary_header_too(make_exposure):
    plain = read_header(make_exposure(name="a_{KIND}.fits"))
    cards = dict(fits.getheader(plain.files.image, 1))
    keys = [key for key in cards if key[:2] in ("CT", "CU", "CR", "CD") or key == "RADESYS"]
    moved = make_exposure(name="b_{KIND}.fits", cards=dict.fromkeys(keys), primary={key: cards[key] for key in keys})
    np.testing.assert_array_equal(read_header(moved).pixel_to_sky(3, 30), plain.pixel_to_sky(3, 30))


PV = {"PV1_0": 1e-5, "PV1_1": 1.001, "PV1_2": 2e-4, "PV1_4": 0.1, "PV1_7": 0.5}
PV |= {"PV2_0": 0.0, "PV2_1": 0.999, "PV2_2": 1e-4, "PV2_5": 0.2}


@pytest.mark.parametrize("projection", ["TPV", "TAN"])
def test_tpv_under_its_own_name_and_as_scamp_wrote_it(make_exposure, projection):
    cards = {"CTYPE1": f"RA---{projection}", "CTYPE2": f"DEC--{projection}", **PV}
    header = read_header(make_exposure(cards=cards, compress="RICE_1"))
    reference = fits.getheader(header.files.image, 1)
    reference["CTYPE1"], reference["CTYPE2"] = "RA---TPV", "DEC--TPV"
    x, y = np.array([0.0, 49.0, 10.5]), np.array([0.0, 39.0, 7.25])
    expected = WCS(reference).all_pix2world(x, y, 0)
    found = header.pixel_to_sky(x, y)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11)
    np.testing.assert_allclose(header.sky_to_pixel(*found), (x, y), atol=1e-6)


@pytest.mark.parametrize("rotation", ["PC", "CROTA2", "none"])
def test_tpv_with_cdelt(make_exposure, rotation):
    scale, angle = 0.074 / 3600, np.radians(0.0 if rotation == "none" else 30.0)
    cos, sin = np.cos(angle), np.sin(angle)
    tpv = {"CTYPE1": "RA---TPV", "CTYPE2": "DEC--TPV", **PV}
    # CD = diag(CDELT) PC; with CDELT1 = -CDELT2, CROTA2 turns the other way (Calabretta & Greisen 2002, section 6.1)
    linear = {"CD1_1": -scale * cos, "CD1_2": scale * sin, "CD2_1": scale * sin, "CD2_2": scale * cos}
    turned = {
        "PC": {"PC1_1": cos, "PC1_2": -sin, "PC2_1": sin, "PC2_2": cos},
        "CROTA2": {"CROTA2": -30.0},
        "none": {},
    }[rotation]
    expected = read_header(make_exposure(name="a_{KIND}.fits", cards={**tpv, **linear}))
    other = dict.fromkeys(linear) | {"CDELT1": -scale, "CDELT2": scale} | turned
    found = read_header(make_exposure(name="b_{KIND}.fits", cards={**tpv, **other}))
    np.testing.assert_allclose(found.pixel_to_sky(3, 30), expected.pixel_to_sky(3, 30), rtol=0, atol=1e-10)


@pytest.mark.parametrize("pixel", [25.5, 25.0, -3000.0])
def test_detector_at_a_pole(make_exposure, pixel):
    header = read_header(make_exposure(cards={"CRVAL2": 90.0, "CRPIX1": pixel, "CRPIX2": 20.5}))
    x, y = header.sky_to_pixel(*header.pixel_to_sky(3.0, 30.0))
    np.testing.assert_allclose((x, y), (3.0, 30.0), atol=1e-6)


def test_sip(make_exposure):
    cards = {"CTYPE1": "RA---TAN-SIP", "CTYPE2": "DEC--TAN-SIP", "A_ORDER": 2, "B_ORDER": 2}
    cards |= {"A_2_0": 1e-5, "A_0_2": 2e-5, "A_1_1": 0.0, "B_2_0": 1e-5, "B_0_2": 0.0, "B_1_1": 1e-5}
    header = read_header(make_exposure(cards=cards))
    expected = WCS(fits.getheader(header.files.image, 1)).all_pix2world([[49.0, 39.0]], 0)[0]
    found = header.pixel_to_sky(49.0, 39.0)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-11)
    np.testing.assert_allclose(header.sky_to_pixel(*found), (49.0, 39.0), atol=1e-3)


def test_distortion_that_does_not_invert(make_exposure):
    cards = {"CTYPE1": "RA---TPV", "CTYPE2": "DEC--TPV", **PV, "PV1_7": 1e12}
    assert "WCS" in fault_of(make_exposure(cards=cards))


def test_transforms_keep_what_is_not_finite(make_exposure):
    header = read_header(make_exposure())
    x = np.array([[0.0, np.nan, np.inf], [5.0, 1e300, -np.inf]])
    ra, dec = header.pixel_to_sky(x, 1.0)
    assert ra.shape == (2, 3)
    assert np.isfinite(ra[:, 0]).all()
    assert np.isnan(ra[:, 1:][[0, 0, 1], [0, 1, 1]]).all()
    np.testing.assert_array_equal(np.isnan(ra), np.isnan(dec))
    back = header.sky_to_pixel([150.0, 330.0, np.nan], [2.0, -2.0, 2.0])
    assert np.isfinite(back[0][0])
    assert np.isnan(back[0][1:]).all()
    assert header.pixel_to_sky([], [])[0].shape == (0,)


def test_right_ascension_wraps(make_exposure):
    header = read_header(make_exposure(cards={"CRVAL1": 0.0}))
    ra, _ = header.pixel_to_sky([0.0, 49.0], [0.0, 0.0])
    assert ra[0] < 1
    assert ra[1] > 359


def test_wcs_is_shared_within_a_thread_only(make_exposure):
    header = read_header(make_exposure())
    assert header.wcs() is header.wcs()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(header.wcs).result() is not header.wcs()


def test_missing_file(tmp_path):
    assert "does not exist" in fault_of(ExposureFiles(tmp_path / "x_IMG.fits"))


def test_folder(tmp_path):
    assert "not a regular file" in fault_of(ExposureFiles(tmp_path))


@pytest.mark.parametrize("kind", ["image", "weight", "flag"])
def test_empty_file(make_exposure, kind):
    files = make_exposure()
    getattr(files, kind).write_bytes(b"")
    assert "0 bytes" in fault_of(files)


@pytest.mark.parametrize("kind", ["image", "weight", "flag"])
@pytest.mark.parametrize("keep", [0.3, 0.7, 0.99])
def test_truncated_file(make_exposure, kind, keep):
    files = make_exposure(shape=(60, 80))
    path = getattr(files, kind)
    data = path.read_bytes()
    size = 60 * 80 * (2 if kind == "flag" else 4)
    end = len(data) + size - -(-size // 2880) * 2880  # without the padding, which may be missing
    path.write_bytes(data[: int(keep * end)])
    assert "truncated" in fault_of(files)


def test_missing_padding_is_no_loss(make_exposure):
    files = make_exposure()
    data = files.image.read_bytes()
    files.image.write_bytes(data[: len(data) - (-(40 * 50 * 4) % 2880)])
    assert read_header(files).band == "g"


@pytest.mark.parametrize("content", [b"hello\n" * 1000, b"\x89PNG" + bytes(9000), b"SIMPLE  =", b"\x1f\x8bno"])
def test_no_fits(make_exposure, content):
    files = make_exposure()
    files.image.write_bytes(content)
    assert fault_of(files)


def test_header_without_end(make_exposure):
    files = make_exposure()
    files.image.write_bytes(b"SIMPLE  =                    T".ljust(80) + b" " * 4_000_000)
    assert "END" in fault_of(files)


@pytest.mark.parametrize("shape", [(50,), (2, 40, 50)])
def test_wrong_dimensions(make_exposure, shape):
    assert "not two-dimensional" in fault_of(make_exposure(image=np.zeros(shape, np.float32)))


def test_no_image(make_exposure):
    files = make_exposure()
    files.image.write_bytes(files.catalog.read_bytes())
    assert "no two-dimensional image" in fault_of(files)


@pytest.mark.parametrize("packed", [False, True])
def test_absurd_size(make_exposure, packed):
    files = make_exposure(checksum=False)
    data = files.image.read_bytes()
    for key in (b"NAXIS1  =", b"NAXIS2  ="):
        at = data.index(key)
        data = data[:at] + key + b" " * 14 + b"1000000" + data[at + 30 :]
    files.image.write_bytes(gzip.compress(data, 1) if packed else data)
    assert "1000000 x 1000000" in fault_of(files)


@pytest.mark.parametrize("value", [b"-5", b"'40'", b"F"])
def test_malformed_size(make_exposure, value):
    files = make_exposure(checksum=False)
    data = files.image.read_bytes()
    at = data.index(b"NAXIS1  =")
    files.image.write_bytes(data[:at] + b"NAXIS1  =" + value.rjust(21) + data[at + 30 :])
    assert "malformed" in fault_of(files)


@pytest.mark.parametrize("kind", ["weight", "flag"])
def test_shapes_differ(make_exposure, kind):
    dtype = np.float32 if kind == "weight" else np.uint16
    fault = fault_of(make_exposure(**{kind: np.ones((40, 49), dtype)}))
    assert "49 x 40" in fault
    assert "50 x 40" in fault


def test_weight_of_another_exposure(make_exposure):
    files = make_exposure(chip=8)
    other = make_exposure(chip=23)
    fault = fault_of(ExposureFiles(files.image, other.weight, files.flag, files.catalog))
    assert "DETECTOR of WHT" in fault


def test_gzip_damage(make_exposure):
    files = make_exposure(gz="IMG")
    data = files.image.read_bytes()
    files.image.write_bytes(data[:200])
    assert "gzip" in fault_of(files)
