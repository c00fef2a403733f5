"""Images as astropy and CFITSIO (through fitsio) store them, against what both read back."""

from __future__ import annotations

import itertools
import warnings
from contextlib import ExitStack
from pathlib import Path

import fitsio
import numpy as np
import pytest
from astropy.io import fits
from hypothesis import given, settings
from hypothesis import strategies as st

from sgclassify.stages.config import StageConfig
from sgclassify.stages.errors import UnusableInputError
from sgclassify.stages.flags import InputFlag
from sgclassify.stages.prepare import prepare_exposure
from sgclassify.stages.read.header import read_header
from sgclassify.stages.read.image import _decoding, open_image
from sgclassify.stages.read.pixels import UNKNOWN_BIT, ExposurePixels, WeightedWindow, check_exposure

SHAPE = (40, 50)
TILES = {"row": (1, 50), "column": (40, 1), "whole": (40, 50), "odd": (7, 13)}
INTEGERS = ("u1", "i1", "i2", "u2", "i4", "u4", "i8", "u8")
ALGORITHMS = ("RICE_1", "GZIP_1", "GZIP_2", "PLIO_1", "HCOMPRESS_1", "NOCOMPRESS")
WRITERS = ("astropy", "fitsio")
DITHERS = {"NO_DITHER": -1, "SUBTRACTIVE_DITHER_1": 1, "SUBTRACTIVE_DITHER_2": 2}


def writes(writer: str, dtype: str, algorithm: str, tile: str) -> bool:
    """Whether a program can write this at all."""
    if algorithm == "HCOMPRESS_1" and tile in ("row", "column"):
        return False  # its tiles have at least 4 x 4 pixels
    if writer == "fitsio" and (dtype in ("i8", "u8") or algorithm == "NOCOMPRESS"):
        return False
    if algorithm == "PLIO_1":
        # integers from 0 to 2^24; an offset is left out by CFITSIO, for 16 bits only
        return dtype in (("u1", "i1", "i2", "u2", "i4") if writer == "fitsio" else ("u1", "i1", "i2", "i4", "i8"))
    return True


def write_packed(
    path: Path, data: np.ndarray, writer: str, algorithm: str, tile=(1, 50), *, cards=(), **options
) -> None:
    """Write a compressed image, and cards into the header of its table. Options are astropy's."""
    path.unlink(missing_ok=True)
    options.setdefault("dither_seed", 7)  # the clock's by default
    if writer == "astropy":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that 64 bits became 32
            made = fits.CompImageHDU(data, compression_type=algorithm, tile_shape=tile, **options)
            fits.HDUList([fits.PrimaryHDU(), made]).writeto(path)
    else:
        names = {"quantize_level": "qlevel", "quantize_method": "qmethod"}
        options = {names.get(key, key): value for key, value in options.items()}
        with fitsio.FITS(str(path), "rw") as file:
            file.write(data, compress=algorithm, tile_dims=list(tile), **options)
    add_cards(path, dict(cards))


def add_cards(path: Path, cards: dict) -> None:
    with fits.open(path, mode="update", disable_image_compression=True, memmap=False) as hdus:
        assert hdus[1].header["ZIMAGE"] is True
        for key, value in cards.items():
            hdus[1].header[key] = value


def write_plain(path: Path, data: np.ndarray, **cards) -> None:
    made = fits.ImageHDU(data)
    made.header.update(cards)
    fits.HDUList([fits.PrimaryHDU(), made]).writeto(path, overwrite=True, output_verify="ignore")


def read(path: Path, window=(0, 40, 0, 50)) -> np.ndarray:
    with ExitStack() as stack:
        return open_image(stack, path).read(*window)


def step_of(path: Path, window=(0, 40, 0, 50)) -> np.ndarray:
    with ExitStack() as stack:
        return np.broadcast_to(open_image(stack, path).step(*window), SHAPE)


def integers(dtype: str, algorithm: str = "") -> np.ndarray:
    rng = np.random.default_rng(5)
    data = rng.choice([0, 0, 0, 1, 2, 8, 64, 127], SHAPE).astype(dtype)
    limits = np.iinfo(dtype)
    data[0, :3] = [limits.min, limits.max, 5]
    if algorithm == "PLIO_1":
        data[0, :3] = [0, min(limits.max, 2**24 - 1), 5]
    if algorithm in ("RICE_1", "HCOMPRESS_1") and limits.bits >= 32:
        data[0, :3] = [1, 2**24, 5]  # neither has more than 32 bits; large steps are not HCOMPRESS's
    return data


def floats(dtype: str) -> np.ndarray:
    rng = np.random.default_rng(6)
    data = (300 + 20 * rng.standard_normal(SHAPE)).astype(dtype)
    data[3:6, 5:9] = 0
    data[[7, 21], [7, 48]] = np.nan
    data[30:33] = 300  # without noise a row is not quantised
    return data


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", INTEGERS)
@pytest.mark.parametrize("writer", WRITERS)
def test_integers_through_every_compression(tmp_path, writer, dtype, algorithm):
    data = integers(dtype, algorithm)
    write_plain(tmp_path / "plain.fits", data)
    plain = read(tmp_path / "plain.fits")
    np.testing.assert_array_equal(plain, data)
    for name, tile in TILES.items():
        path = tmp_path / f"{name}.fits.fz"
        if not writes(writer, dtype, algorithm, name):
            with pytest.raises((ValueError, OSError)):
                write_packed(path, data, writer, algorithm, tile)
            continue
        write_packed(path, data, writer, algorithm, tile)
        np.testing.assert_array_equal(read(path), data)
        np.testing.assert_array_equal(read(path, (5, 23, 11, 38)), data[5:23, 11:38])
        with ExitStack() as stack:
            reader = open_image(stack, path)
            assert not reader.quantised
            assert not reader.smeared


@pytest.mark.parametrize("algorithm", ["GZIP_1", "GZIP_2", "NOCOMPRESS"])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("writer", WRITERS)
def test_floats_without_loss(tmp_path, writer, dtype, algorithm):
    data = floats(dtype)
    for name, tile in TILES.items():
        path = tmp_path / f"{name}.fits.fz"
        if writes(writer, dtype, algorithm, name):
            write_packed(path, data, writer, algorithm, tile, quantize_level=0.0)
            np.testing.assert_array_equal(read(path), data)
            assert not step_of(path).any()


@pytest.mark.parametrize("dither", DITHERS)
@pytest.mark.parametrize("algorithm", ["RICE_1", "GZIP_1", "GZIP_2", "HCOMPRESS_1", "NOCOMPRESS"])
@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("writer", WRITERS)
def test_quantised_floats(tmp_path, writer, dtype, algorithm, dither):
    """The same pixels as astropy and CFITSIO decode, each within half a step of what it was."""
    data = floats(dtype)
    options = {"quantize_level": 4.0, "quantize_method": DITHERS[dither]}
    for name, tile in TILES.items():
        if not writes(writer, dtype, algorithm, name):
            continue
        path = tmp_path / f"{name}.fits.fz"
        write_packed(path, data, writer, algorithm, tile, **options)
        found, step = read(path), step_of(path)
        np.testing.assert_array_equal(found, fits.getdata(path, 1))
        if algorithm != "NOCOMPRESS":
            np.testing.assert_array_equal(found, fitsio.read(str(path), ext=1))
        np.testing.assert_array_equal(np.isnan(found), np.isnan(data))
        apart = np.abs(found.astype(np.float64) - data)
        assert (apart <= 0.5001 * step)[np.isfinite(data)].all()
        assert step.any()
        if name == "row":
            assert not step[30:33].any()
        with ExitStack() as stack:
            if open_image(stack, path).keeps_zeros:
                np.testing.assert_array_equal(found == 0, data == 0)


@pytest.mark.parametrize("algorithm", ["RICE_1", "GZIP_2"])
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    ("dtype", "cards"),
    [
        ("i2", {"BLANK": -32768, "BZERO": 32768}),
        ("i2", {"BLANK": 7}),
        ("i2", {"BLANK": 7, "BSCALE": 0.01, "BZERO": 3.25}),
        ("u1", {"BLANK": 64, "BZERO": -128}),
        ("i4", {"BSCALE": 1e-4, "BZERO": -12.5}),
        ("i4", {"BLANK": -(2**31), "BZERO": 2.0**31}),
        ("f4", {"BSCALE": 0.5, "BZERO": 100.0}),
    ],
    ids=str,
)
def test_scaling_does_not_depend_on_compression(tmp_path, dtype, cards, writer, algorithm):
    stored = floats(dtype) if dtype == "f4" else integers(dtype, "PLIO_1")
    stored[0, :2] = cards.get("BLANK", 3), 7
    with fits.open(tmp_path / "plain.fits", mode="append") as hdus:
        hdus.append(fits.PrimaryHDU())
        hdus.append(fits.ImageHDU(stored, do_not_scale_image_data=True))
    with fits.open(tmp_path / "plain.fits", mode="update", do_not_scale_image_data=True) as hdus:
        hdus[1].header.update(cards)
    packed = tmp_path / "packed.fits.fz"
    options = {"quantize_level": 0.0 if algorithm == "GZIP_2" else 4.0} if dtype == "f4" else {}
    write_packed(packed, stored, writer, algorithm, cards=cards, **options)
    plain, found = read(tmp_path / "plain.fits"), read(packed)
    if dtype == "f4" and algorithm == "RICE_1":
        np.testing.assert_allclose(found, plain, rtol=0, atol=0.51 * step_of(packed).max())
        assert step_of(packed).max() < 10
        return
    assert found.dtype.newbyteorder("=") == plain.dtype.newbyteorder("=")
    np.testing.assert_array_equal(found, plain)
    blank = np.zeros(SHAPE, bool) if "BLANK" not in cards else stored == cards["BLANK"]
    expected = stored * cards.get("BSCALE", 1.0) + cards.get("BZERO", 0.0)
    np.testing.assert_allclose(found, np.where(blank, np.nan, expected), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("level", [0.0, 4.0])
def test_blank_means_nothing_to_floats(tmp_path, dtype, level):
    data = np.round(floats(dtype))
    data[~np.isfinite(data)] = 7
    path = tmp_path / "x.fits.fz"
    write_packed(path, data, "astropy", "GZIP_1", quantize_level=level, cards={"BLANK": 7})
    assert np.isfinite(read(path)).all()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("key", "value"),
    [("BSCALE", 0.0), ("BSCALE", "much"), ("BZERO", "none"), ("BZERO", True), ("BLANK", 2.5), ("BLANK", "x")],
)
def test_scaling_that_makes_no_sense_is_refused(tmp_path, key, value, packed):
    path = tmp_path / "x.fits"
    if packed:
        write_packed(path, integers("i2"), "astropy", "RICE_1", cards={key: value})
    else:
        write_plain(path, integers("i2"), **{key: value})
    with pytest.raises(UnusableInputError, match=key) as caught:
        read(path)
    assert repr(value) in caught.value.fault
    assert caught.value.advice


@pytest.mark.parametrize("packed", [False, True])
def test_scaling_in_quotes_or_undefined(tmp_path, packed):
    path, cards = tmp_path / "x.fits", {"BSCALE": "0.5", "BZERO": fits.card.Undefined()}
    if packed:
        write_packed(path, integers("i2", "PLIO_1"), "astropy", "RICE_1", cards=cards)
    else:
        write_plain(path, integers("i2", "PLIO_1"), **cards)
    np.testing.assert_array_equal(read(path), integers("i2", "PLIO_1") * 0.5)


@pytest.mark.parametrize(
    ("options", "cards", "fault"),
    [
        ({"algorithm": "RICE_1", "quantize_level": 0.0}, {}, "only whole numbers are left"),
        ({"algorithm": "GZIP_1", "quantize_level": 0.0}, {"ZSCALE": 0.5}, "without a column ZSCALE"),
        ({"algorithm": "RICE_1"}, {"ZCMPTYPE": "BZIP2_1"}, "unknown method .*BZIP2_1"),
        ({"algorithm": "RICE_1"}, {"ZQUANTIZ": "WISHFUL"}, "WISHFUL"),
    ],
)
def test_compression_that_cannot_be_read_back(tmp_path, options, cards, fault):
    path = tmp_path / "x.fits.fz"
    data = np.nan_to_num(floats("f4"), nan=1.5)
    write_packed(path, data, "astropy", **options)
    add_cards(path, cards)
    with pytest.raises(UnusableInputError, match=fault) as caught:
        read(path)
    assert caught.value.path == str(path)
    assert caught.value.advice


def test_no_memory_is_no_fault_of_the_file(tmp_path):
    with pytest.raises(MemoryError), _decoding(tmp_path):
        raise MemoryError


def test_compressed_image_behind_others(tmp_path):
    path = tmp_path / "x.fits.fz"
    table = fits.BinTableHDU.from_columns([fits.Column("a", "J", array=[1, 2])])
    made = fits.CompImageHDU(integers("u2"), compression_type="RICE_1", tile_shape=(7, 13))
    fits.HDUList([fits.PrimaryHDU(), table, fits.ImageHDU(np.arange(4)), made]).writeto(path)
    np.testing.assert_array_equal(read(path), integers("u2"))


# What becomes of weights and flags.


def repack(path: Path, data: np.ndarray, writer: str, algorithm: str, tile=(1, 50), **options) -> None:
    """Write a file of an exposure again, compressed, with the cards that it has."""
    skip = ("SIMPLE", "XTENSION", "BITPIX", "PCOUNT", "GCOUNT", "EXTEND", "BSCALE", "BZERO", "COMMENT")
    with fits.open(path) as hdus:
        cards = {**hdus[0].header, **hdus[1].header}
    cards = {key: value for key, value in cards.items() if key not in skip and not key.startswith("NAXIS")}
    write_packed(path, data, writer, algorithm, tile, cards=cards, **options)


def read_all(files) -> WeightedWindow:
    with ExposurePixels(read_header(files)) as pixels:
        return pixels.weighted_window(0, *SHAPE[:1], 0, SHAPE[1])


def fault_of(files) -> str:
    with pytest.raises(UnusableInputError) as caught:
        check_exposure(read_header(files))
    assert caught.value.advice
    return caught.value.fault


def weights(seed: int = 4) -> np.ndarray:
    """Weights of about 400 with 300 dead pixels, a dead column, and rows where nothing varies."""
    rng = np.random.default_rng(seed)
    weight = (400 + 25 * rng.standard_normal(SHAPE)).astype(np.float32)
    weight[30:33] = 400
    weight.flat[rng.choice(weight.size, 300, replace=False)] = 0
    weight[:, 17] = 0
    return weight


@pytest.mark.parametrize("dither", DITHERS)
@pytest.mark.parametrize("algorithm", ["RICE_1", "GZIP_2", "HCOMPRESS_1"])
@pytest.mark.parametrize("writer", WRITERS)
def test_dead_pixels_stay_dead(make_exposure, writer, algorithm, dither):
    files = make_exposure(weight=weights(), checksum=False)
    plain = read_all(files)
    for name, tile in TILES.items():
        if writes(writer, "f4", algorithm, name):
            options = {"quantize_level": 4.0, "quantize_method": DITHERS[dither]}
            repack(files.weight, weights(), writer, algorithm, tile, **options)
            window = read_all(files)
            np.testing.assert_array_equal(window.valid, plain.valid)
            np.testing.assert_array_equal(window.weight == 0, weights() == 0)
            np.testing.assert_array_equal(window.image, plain.image)


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    level=st.floats(0.5, 32) | st.floats(-60, -0.01),
    dither=st.sampled_from(sorted(DITHERS)),
    writer=st.sampled_from(WRITERS),
    tile=st.sampled_from(sorted(TILES)),
)
def test_no_dead_pixel_comes_to_life(write_level1, tmp_path_factory, seed, level, dither, writer, tile):
    """What was 0 is 0, what was more than a step is not, whatever window is read."""
    weight = weights(seed)
    rng = np.random.default_rng(seed)
    weight *= rng.choice([1, 0.3, 0.05], SHAPE).astype(np.float32)
    files = write_level1(tmp_path_factory.mktemp("zeros"), weight=weight, checksum=False, kinds="IMG WHT FLG")
    repack(
        files.weight,
        weight,
        writer,
        "RICE_1",
        TILES[tile],
        quantize_level=level,
        quantize_method=DITHERS[dither],
    )
    window, step = read_all(files), step_of(files.weight)
    found = window.weight
    # Brighter ones are for FLG to tell; here they are those of tiles with a step of more than all weights.
    assert not found[(weight == 0) & (window.image * step < 149)].any()
    assert found[weight > 1.01 * step].all()
    y0, x0 = rng.integers(0, 30), rng.integers(0, 40)
    with ExposurePixels(read_header(files)) as pixels:
        part = pixels.weighted_window(y0, y0 + 9, x0, x0 + 8).weight
    np.testing.assert_array_equal(part, found[y0 : y0 + 9, x0 : x0 + 8])


@pytest.mark.parametrize("with_flags", [True, False])
@pytest.mark.parametrize("dither", DITHERS)
def test_star_cores_are_told_from_dead_pixels(make_exposure, dither, with_flags):
    """Their own light makes their weights less than a step; those that are dead have a flag."""
    rng = np.random.default_rng(8)
    image = (0.3 + 0.05 * rng.standard_normal(SHAPE)).astype(np.float32)
    weight = weights()
    core, dead_core = (slice(10, 13), slice(20, 24)), (slice(12, 13), slice(22, 24))
    image[core], weight[core] = 80.0, 150 / 80.0
    weight[dead_core] = 0
    flag = np.zeros(SHAPE, np.uint16)
    flag[dead_core] = InputFlag.COSMIC_RAY
    kinds = "IMG WHT FLG" if with_flags else "IMG WHT"
    files = make_exposure(image=image, weight=weight, flag=flag, kinds=kinds, checksum=False)
    plain = read_all(files)
    assert plain.valid[core].sum() == 10
    options = {"quantize_level": 2.0, "quantize_method": DITHERS[dither]}
    repack(files.weight, weight, "fitsio", "RICE_1", **options)
    assert step_of(files.weight)[core].min() > 150 / 80.0
    window, check = read_all(files), check_exposure(read_header(files))
    exact = dither == "SUBTRACTIVE_DITHER_2"
    if with_flags or exact:
        np.testing.assert_array_equal(window.valid, plain.valid)
    else:
        assert not window.valid[dead_core].any()
        assert window.valid[core].sum() == 12 - check.unresolved
        outside = np.ones(SHAPE, bool)
        outside[core] = False
        np.testing.assert_array_equal(window.valid[outside], plain.valid[outside])
    # some of the live ones still decode to more than half a step
    assert check.unresolved in ([0] if exact else range(7, 13))
    assert bool(check.moved_zeros) == (dither == "SUBTRACTIVE_DITHER_1")


@pytest.mark.parametrize(("kinds", "taken"), [("IMG WHT FLG CAT", "FLG says nothing"), ("IMG WHT CAT", "unusable")])
def test_notes_say_what_the_steps_hide(make_exposure, tmp_path, kinds, taken):
    image, weight = np.full(SHAPE, 0.3, np.float32), weights()
    image[10, 20:24], weight[10, 20:24] = 80.0, 150 / 80.0
    files = make_exposure(image=image, weight=weight, kinds=kinds, checksum=False)
    assert not any("quantis" in note for note in prepare_exposure(read_header(files), tmp_path, StageConfig()).notes)
    repack(files.weight, weight, "fitsio", "RICE_1", quantize_level=2.0, quantize_method=1)
    moved, bright = (
        note for note in prepare_exposure(read_header(files), tmp_path, StageConfig()).notes if "quantis" in note
    )
    decoded = fitsio.read(str(files.weight), ext=1)
    assert moved.startswith(f"{np.count_nonzero((weight == 0) & (decoded > 0))} zeros of WHT")
    assert bright.startswith(("3 bright", "4 bright"))
    assert bright.endswith(taken)


@pytest.mark.parametrize("writer", [None, *WRITERS])
def test_zeros_of_scaled_integers(make_exposure, writer):
    """A zero that the steps of BSCALE do not meet: 3 steps of 0.1 below it is BZERO, and a third of one."""
    stored = np.full(SHAPE, 4000, np.int16)
    stored[5, :6] = [-2, -3, -4, -5, -1, 0]
    scaling = {"BSCALE": 0.1, "BZERO": 0.333}
    files = make_exposure(checksum=False)
    if writer:
        repack(files.weight, stored, writer, "RICE_1")
        add_cards(files.weight, scaling)
    else:
        write_plain(files.weight, stored)
        with fits.open(files.weight, mode="update", do_not_scale_image_data=True) as hdus:
            hdus[1].header.update(scaling)
    window = read_all(files)
    np.testing.assert_allclose(window.weight[5, :6], [0.133, 0, 0, 0, 0.233, 0.333], rtol=1e-5)
    assert (window.weight[6:] > 400).all()


def test_weights_below_the_step_everywhere(make_exposure):
    files = make_exposure(weight=weights(), checksum=False)
    repack(files.weight, weights(), "fitsio", "RICE_1", quantize_level=-2000.0)
    assert "quantised too coarsely" in fault_of(files)


@pytest.mark.parametrize(
    ("kind", "options", "fault"),
    [
        ("flag", {"algorithm": "RICE_1", "dtype": "f4"}, "its bits are lost"),
        ("flag", {"algorithm": "HCOMPRESS_1", "dtype": "u2", "hcomp_scale": 4.0}, "its bits are lost"),
        ("weight", {"algorithm": "HCOMPRESS_1", "hcomp_scale": 2.5}, "weight 0 is lost"),
        ("image", {"algorithm": "HCOMPRESS_1", "hcomp_scale": 2.5, "nan": True}, "without a value"),
    ],
)
@pytest.mark.parametrize("writer", WRITERS)
def test_losses_that_cannot_be_done_without(make_exposure, writer, kind, options, fault):
    options = dict(options)
    dtype, algorithm = options.pop("dtype", "f4"), options.pop("algorithm")
    data = floats("f4")
    if not options.pop("nan", False):
        data = np.nan_to_num(data, nan=2.0).astype(dtype)
    files = make_exposure(checksum=False)
    path = getattr(files, kind)
    repack(path, data, writer, algorithm, (20, 50), **options)
    found = fault_of(files)
    assert fault in found
    assert {"flag": "FLG", "weight": "WHT", "image": "IMG"}[kind] in found


@pytest.mark.parametrize("writer", WRITERS)
def test_image_compressed_with_loss(make_exposure, writer):
    files = make_exposure(checksum=False)
    data = np.nan_to_num(floats("f4"), nan=2.0)
    repack(files.image, data, writer, "HCOMPRESS_1", (20, 50), hcomp_scale=2.5)
    np.testing.assert_array_equal(read_all(files).image, fitsio.read(str(files.image), ext=1))


@pytest.mark.parametrize(
    ("writer", "algorithm", "dtype"),
    [
        (writer, algorithm, dtype)
        for writer, algorithm, dtype in itertools.product(WRITERS, ALGORITHMS, (*INTEGERS, "f4", "f8"))
        if writes(writer, dtype, algorithm, "row") and (dtype[0] != "f" or algorithm in ("GZIP_1", "GZIP_2"))
    ],
)
def test_flags_of_any_type_through_any_compression(make_exposure, writer, algorithm, dtype):
    bits = [1, 2, 8, 16, 64] + ([255] if dtype == "u1" else []) + ([32768] if np.dtype(dtype).itemsize > 2 else [])
    flag = np.random.default_rng(2).choice([0, 0, 0, 0, *bits], SHAPE).astype(dtype)
    files = make_exposure(checksum=False)
    options = {"quantize_level": 0.0} if dtype[0] == "f" else {}
    repack(files.flag, flag, writer, algorithm, **options)
    np.testing.assert_array_equal(read_all(files).flags, flag.astype(np.uint16))


@pytest.mark.parametrize("writer", [None, *WRITERS])
def test_flags_without_a_value_mask(make_exposure, writer):
    """BLANK beside the BZERO of unsigned integers."""
    stored = np.full(SHAPE, -32768, np.int16)
    stored[3, :2] = [-32767, 77]
    cards = {"BZERO": 32768, "BLANK": 77}
    files = make_exposure(checksum=False)
    if writer:
        repack(files.flag, stored, writer, "RICE_1")
        add_cards(files.flag, cards)
    else:
        write_plain(files.flag, stored)
        with fits.open(files.flag, mode="update", do_not_scale_image_data=True) as hdus:
            hdus[1].header.update(cards)
    flags = read_all(files).flags
    assert flags[3, :3].tolist() == [1, UNKNOWN_BIT, 0]
    assert np.count_nonzero(flags) == 2


def test_flags_of_64_bits_without_sign_are_exact(make_exposure):
    flag = np.zeros(SHAPE, np.uint64)
    flag[2, :3] = [1, 8, 64]
    assert read_all(make_exposure(flag=flag)).flags[2, :3].tolist() == [1, 8, 64]
