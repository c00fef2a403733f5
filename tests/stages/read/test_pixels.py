from __future__ import annotations

import hashlib
import tracemalloc
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np
import pytest
from astropy.io import fits
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sgclassify.stages.errors import UnusableInputError
from sgclassify.stages.flags import InputFlag
from sgclassify.stages.read.fitsfile import verify
from sgclassify.stages.read.header import read_header
from sgclassify.stages.read.pixels import UNKNOWN_BIT, ExposurePixels, WeightedWindow, check_exposure

SHAPE = (40, 50)


def read_all(files) -> WeightedWindow:
    header = read_header(files)
    with ExposurePixels(header) as pixels:
        return pixels.weighted_window(0, header.shape[0], 0, header.shape[1])


def fault_of_check(files) -> str:
    with pytest.raises(UnusableInputError) as caught:
        check_exposure(read_header(files))
    assert caught.value.advice
    return caught.value.fault


def noisy(seed=0, shape=SHAPE):
    return (0.3 + 0.05 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"in_primary": True},
        {"gz": "IMG WHT FLG"},
        {"compress": "GZIP_1"},
        {"compress": "GZIP_2", "gz": "CAT"},
    ],
    ids=str,
)
def test_lossless_variants_give_the_pixels(make_exposure, variant):
    rng = np.random.default_rng(3)
    image, weight = noisy(), rng.uniform(100, 400, SHAPE).astype(np.float32)
    flag = rng.choice(np.array([0, 1, 8, 64, 128, 40000], np.uint16), SHAPE)
    image[3, 4] = np.nan
    weight[5, 6:9] = [0, -1, np.nan]
    window = read_all(make_exposure(image=image, weight=weight, flag=flag, **variant))
    np.testing.assert_array_equal(window.image, image)
    np.testing.assert_array_equal(window.flags, flag)
    np.testing.assert_array_equal(window.weight, np.where(weight > 0, weight, 0))
    for array, dtype in ((window.image, np.float32), (window.weight, np.float32), (window.flags, np.uint16)):
        assert array.dtype == np.dtype(dtype)
        assert array.dtype.isnative
        assert array.flags.writeable
    harmless = np.isin(flag, [0, 64, 128])
    np.testing.assert_array_equal(window.valid, harmless & np.isfinite(image) & (weight > 0))


@pytest.mark.parametrize("method", ["RICE_1", "GZIP_1"])
def test_quantised_image(make_exposure, method):
    image = noisy()
    image[3, 4] = np.nan
    window = read_all(make_exposure(image=image, compress=method))
    assert np.isnan(window.image[3, 4])
    np.testing.assert_allclose(window.image, image, atol=0.05 / 16)


@pytest.mark.parametrize("compress", [None, "RICE_1"])
@pytest.mark.parametrize("dtype", ["i2", "i4"])
def test_scaled_integers_with_blank(tmp_path, make_exposure, dtype, compress):
    files = make_exposure(kinds="IMG", checksum=False)
    stored = np.arange(2000, dtype=dtype).reshape(SHAPE)
    stored[0, 0] = -32768
    with fits.open(files.image) as hdus:
        cards = {k: v for k, v in hdus[1].header.items() if k not in ("XTENSION", "BITPIX", "PCOUNT", "GCOUNT")}
    made = fits.ImageHDU(stored)
    made.header.update({k: v for k, v in cards.items() if not k.startswith("NAXIS")})
    if compress:
        made = fits.CompImageHDU(stored, made.header, compression_type=compress, do_not_scale_image_data=True)
    made.header["BLANK"] = -32768
    made.header["BSCALE"], made.header["BZERO"] = 0.001, 0.25
    made.writeto(files.image, overwrite=True, output_verify="ignore")
    window = read_all(files)
    assert np.isnan(window.image[0, 0])
    expected = np.arange(2000).reshape(SHAPE) * 0.001 + 0.25
    np.testing.assert_allclose(window.image.ravel()[1:], expected.ravel()[1:], rtol=1e-6)


@pytest.mark.parametrize("dtype", ["u1", "i2", "i4", "u4", "f4", "f8"])
def test_flags_of_any_type(make_exposure, dtype):
    values = np.zeros(SHAPE, dtype=dtype)
    values[0, :3] = [1, 8, 64]
    if dtype not in ("u1",):
        values[1, 0] = -1 if np.dtype(dtype).kind != "u" else 70000
    if dtype.startswith("f"):
        values[1, 1:3] = [np.nan, 0.5]
    window = read_all(make_exposure(flag=values))
    assert window.flags[0, :3].tolist() == [1, 8, 64]
    assert (window.flags[1, :1] & UNKNOWN_BIT).all() or dtype == "u1"
    assert not dtype.startswith("f") or (window.flags[1, 1:3] & UNKNOWN_BIT).all()
    assert not window.flags[2:].any()


def test_every_flag_masks_but_ghost_and_scattered_light(make_exposure):
    flag = np.zeros(SHAPE, np.uint16)
    flag[0, :16] = 1 << np.arange(16)
    masked = ~read_all(make_exposure(flag=flag)).valid
    harmless = {int(InputFlag.GHOST), int(InputFlag.SCATTERED)}
    assert masked[0, :16].tolist() == [1 << k not in harmless for k in range(16)]
    assert not masked[1:].any()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), variant=st.sampled_from(["plain", "rice", "gz"]))
def test_windows_are_pieces_of_the_whole(data, variant, tmp_path_factory, request):
    header, whole = request.getfixturevalue("wholes")[variant]
    y0 = data.draw(st.integers(0, SHAPE[0] - 1))
    y1 = data.draw(st.integers(y0 + 1, SHAPE[0]))
    x0 = data.draw(st.integers(0, SHAPE[1] - 1))
    x1 = data.draw(st.integers(x0 + 1, SHAPE[1]))
    with ExposurePixels(header) as pixels:
        window, plain = pixels.weighted_window(y0, y1, x0, x1), pixels.window(y0, y1, x0, x1)
    assert (window.y0, window.x0) == (plain.y0, plain.x0) == (y0, x0)
    for name in ("image", "weight", "flags", "valid"):
        np.testing.assert_array_equal(getattr(window, name), getattr(whole, name)[y0:y1, x0:x1])
    for name in ("image", "flags", "valid"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(window, name))


@pytest.fixture(scope="module")
def wholes(tmp_path_factory, write_level1):
    flag = np.random.default_rng(1).choice(np.array([0, 0, 8, 300], np.uint16), SHAPE)
    made = {}
    for name, options in {"plain": {}, "rice": {"compress": "RICE_1"}, "gz": {"gz": "IMG WHT FLG"}}.items():
        files = write_level1(tmp_path_factory.mktemp(name), flag=flag, **options)
        made[name] = (read_header(files), read_all(files))
    return made


@pytest.mark.parametrize("box", [(0, 0, 0, 5), (-1, 5, 0, 5), (0, 41, 0, 5), (0, 5, 0, 51), (0, 5, 5, 4)])
def test_window_off_the_detector(make_exposure, box):
    header = read_header(make_exposure())
    with ExposurePixels(header) as pixels, pytest.raises(ValueError, match="window"):
        pixels.window(*box)


def test_window_outside_the_block(make_exposure):
    pixels = ExposurePixels(read_header(make_exposure()))
    with pytest.raises(ValueError, match="with block"):
        pixels.window(0, 1, 0, 1)
    with pixels:
        assert pixels.window(0, 1, 0, 1).image.shape == (1, 1)
    with pixels:  # can be entered again
        assert pixels.window(0, 1, 0, 1).image.shape == (1, 1)


def test_missing_weight_follows_the_noise_model(make_exposure):
    image = noisy()
    image[0, :3] = [-0.5, np.nan, 100]
    window = read_all(make_exposure(image=image, kinds="IMG FLG"))
    expected = 150.0**2 / (np.maximum(image, 0) * 150.0 + 5.0**2)
    np.testing.assert_allclose(window.weight, np.nan_to_num(expected), rtol=1e-5)


@pytest.mark.parametrize("options", [{"primary": {"EXPTIME": None}}, {"cards": {"RDNOISE1": None}}])
def test_missing_weight_from_the_sky_noise(make_exposure, options):
    image = noisy()
    image[0, 0] = 100
    weight = read_all(make_exposure(image=image, kinds="IMG FLG", **options)).weight
    np.testing.assert_allclose(np.median(weight), 0.05**-2, rtol=0.3)
    assert (weight[0, 0] < weight[1, 1]) == ("cards" in options)


def test_missing_flags_tell_saturation(make_exposure):
    image = noisy()
    image[2, 3] = 460
    window = read_all(make_exposure(image=image, kinds="IMG WHT"))
    assert window.flags[2, 3] == InputFlag.SATURATED
    assert np.count_nonzero(window.flags) == 1
    assert not read_all(make_exposure(image=image, kinds="IMG WHT", cards={"SATURATE": None}, chip=9)).flags.any()


@pytest.mark.parametrize("variant", [{}, {"compress": "RICE_1"}, {"gz": "IMG CAT"}, {"checksum": False}], ids=str)
def test_check_of_a_good_exposure(make_exposure, variant):
    files = make_exposure(shape=(300, 310), **variant)
    check = check_exposure(read_header(files))
    paths = (files.image, files.weight, files.flag, files.catalog)
    assert check.sha256 == {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"image": np.full(SHAPE, np.nan, np.float32)}, "nan"),
        ({"weight": np.zeros(SHAPE, np.float32)}, "every weight is zero"),
        ({"flag": np.ones(SHAPE, np.uint16)}, "no pixel is valid"),
    ],
)
def test_nothing_to_see(make_exposure, options, fault):
    assert fault in fault_of_check(make_exposure(**options))


@pytest.mark.parametrize("kind", ["image", "weight", "flag", "catalog"])
@pytest.mark.parametrize("variant", [{}, {"compress": "RICE_1"}], ids=str)
def test_flipped_bit_in_the_data(make_exposure, kind, variant):
    files = make_exposure(**variant)
    path = getattr(files, kind)
    data = bytearray(path.read_bytes())
    with fits.open(path, disable_image_compression=True) as hdus:
        data[hdus[1].fileinfo()["datLoc"] + 5] ^= 4
        name = hdus[1].name
    path.write_bytes(data)
    assert f"DATASUM of HDU 1 ({name})" in fault_of_check(files)


def test_changed_header(make_exposure):
    files = make_exposure()
    path = files.image
    path.write_bytes(path.read_bytes().replace(b"26.0", b"26.1", 1))
    assert "CHECKSUM of HDU 1 (IMG)" in fault_of_check(files)


def test_checksum_of_an_hdu_behind_the_image(make_exposure):
    files = make_exposure()
    with fits.open(files.image) as hdus:
        copy = fits.HDUList([hdu.copy() for hdu in hdus])
        copy.append(fits.ImageHDU(np.arange(10, dtype=np.int16), name="EXTRA"))
        copy.writeto(files.image, overwrite=True, checksum=True)
    data = bytearray(files.image.read_bytes())
    data[-2880] ^= 1
    files.image.write_bytes(data)
    assert "HDU 2 (EXTRA)" in fault_of_check(files)


@pytest.mark.parametrize("cut", [0.5, 0.9])
def test_truncated_gzip(make_exposure, cut):
    files = make_exposure(gz="IMG WHT FLG")
    data = files.weight.read_bytes()
    header = read_header(files)
    files.weight.write_bytes(data[: int(cut * len(data))])
    with pytest.raises(UnusableInputError, match=r"gzip|truncated"):
        check_exposure(header)
    with pytest.raises(UnusableInputError, match=r"gzip|truncated"), ExposurePixels(header):
        pass


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
@example(seed=299316)  # a tile descriptor that points before the file
def test_damaged_tiles_are_a_fault_of_the_file(seed, wholes, tmp_path_factory):
    header, _ = wholes["rice"]
    path = tmp_path_factory.mktemp("damaged") / "x_IMG.fits.fz"
    data = bytearray(header.files.image.read_bytes())
    rng = np.random.default_rng(seed)
    with fits.open(header.files.image, disable_image_compression=True) as hdus:
        start = hdus[1].fileinfo()["datLoc"]
    at = rng.integers(start, len(data), 30)
    for k in at:
        data[k] = rng.integers(256)
    path.write_bytes(data)
    files = type(header.files)(path, *(getattr(header.files, k) for k in ("weight", "flag", "catalog")))
    with suppress(UnusableInputError):  # nothing else may come out
        read_all(files)


def test_file_that_changed_its_shape(make_exposure):
    header = read_header(make_exposure())
    make_exposure(shape=(30, 30))
    with pytest.raises(UnusableInputError, match="shape"), ExposurePixels(header):
        pass


def test_threads_read_at_once(make_exposure):
    header = read_header(make_exposure(compress="RICE_1"))
    whole = read_all(header.files).image
    before = list(warnings.filters)

    def rows(k):
        with ExposurePixels(header) as pixels:
            return pixels.window(k, k + 1, 0, 50).image

    with ThreadPoolExecutor(4) as pool:
        np.testing.assert_array_equal(np.concatenate(list(pool.map(rows, range(40)))), whole)
    assert list(warnings.filters) == before


def test_check_holds_no_whole_image(make_exposure):
    header = read_header(make_exposure(shape=(3000, 1000), n_rows=5))
    tracemalloc.start()
    check_exposure(header)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * 8.4e6 + 1e6  # pieces of 4.2 MB of bytes; the image alone has 12 MB, all files 30 MB


def test_verify_without_sums(make_exposure):
    files = make_exposure(checksum=False)
    assert verify(files.image) == hashlib.sha256(files.image.read_bytes()).hexdigest()
