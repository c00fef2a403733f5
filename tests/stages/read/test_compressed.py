"""Strips of compressed images, against what astropy decodes of the whole file at once."""

from __future__ import annotations

from pathlib import Path

import fitsio
import numpy as np
import pytest
from astropy.io import fits

from sgclassify.stages.errors import UnusableInputError
from sgclassify.stages.read import compressed
from sgclassify.stages.read.compressed import TileRows
from sgclassify.stages.read.fitsfile import first_image

SHAPE = (40, 50)
TILES = {"row": (1, 50), "column": (40, 1), "whole": (40, 50), "odd": (7, 13), "rows": (16, 50)}


def data_of(kind: str) -> np.ndarray:
    rng = np.random.default_rng(3)
    if kind == "i2":
        return rng.integers(0, 2**12, SHAPE).astype(np.int16)
    data = (0.3 + 0.05 * rng.standard_normal(SHAPE)).astype(kind)
    data[5, 6] = np.nan
    # nothing varies: stored in another column, without loss
    data[20:23] = 0
    return data


def write(path: Path, data: np.ndarray, algorithm="RICE_1", tile=(1, 50), dither=1, level=4.0) -> None:
    options = {}
    if data.dtype.kind == "f":
        options = {"quantize_level": level, "quantize_method": dither, "dither_seed": 9_990}
    fits.CompImageHDU(data, compression_type=algorithm, tile_shape=tile, **options).writeto(path, overwrite=True)


def rows_of(path: Path, *ranges: tuple[int, int]) -> list[np.ndarray]:
    hdu, hdus = first_image(path)
    start = hdus[-2].data_offset + hdus[-2].padded_bytes
    with path.open("rb") as stream:
        tiles = TileRows(path, stream, hdu, start)
        return [np.array(tiles.rows(*one)) for one in ranges]


RANGES = ((0, 40), (0, 1), (39, 40), (3, 4), (3, 38), (10, 17), (16, 20))


WAYS = (
    ("i2", "RICE_1", 1),
    ("i2", "PLIO_1", 1),
    ("f4", "RICE_1", -1),
    ("f4", "RICE_1", 1),
    ("f8", "RICE_1", 2),
    ("f4", "GZIP_2", 2),
    ("f4", "HCOMPRESS_1", 1),
)


@pytest.mark.parametrize("pixels", [1, 120, 800, 10**6])
@pytest.mark.parametrize(
    ("kind", "algorithm", "dither", "tile"),
    [
        (*way, tile)
        for way in WAYS
        for tile in TILES
        # its tiles, and what is left over at the edges, have at least 4 x 4 pixels
        if way[1] != "HCOMPRESS_1" or tile in ("whole", "rows")
    ],
)
def test_strips_are_pieces_of_the_whole(tmp_path, monkeypatch, kind, algorithm, dither, tile, pixels):
    monkeypatch.setattr(compressed, "STRIP_PIXELS", pixels)
    path = tmp_path / "x.fits.fz"
    write(path, data_of(kind), algorithm, TILES[tile], dither)
    with fits.open(path, do_not_scale_image_data=True) as hdus:
        whole = np.array(hdus[1].data)
    for (y0, y1), found in zip(RANGES, rows_of(path, *RANGES), strict=True):
        assert found.dtype == whole.dtype
        assert found.tobytes() == whole[y0:y1].tobytes()
    if kind == "f4" and algorithm == "RICE_1":
        np.testing.assert_array_equal(whole, fitsio.read(str(path), ext=1))


def change(path: Path, edit) -> None:
    """Change the table of a compressed image; the sums do not matter here."""
    with fits.open(path, mode="update", disable_image_compression=True) as hdus:
        edit(hdus[1])


def pointers(path: Path) -> tuple[int, np.ndarray]:
    """Where the table of tiles begins in the file, and its pairs of length and offset."""
    hdu, _ = first_image(path)
    width, n_rows = hdu.axes_stored
    raw = np.fromfile(path, np.uint8)[hdu.data_offset : hdu.data_offset + width * n_rows].reshape(n_rows, width)
    return hdu.data_offset, np.ascontiguousarray(raw[:, :8]).view(">i4")


def put(path: Path, row: int, pair: tuple[int, int]) -> None:
    hdu, _ = first_image(path)
    at = hdu.data_offset + row * hdu.axes_stored[0]
    with path.open("r+b") as stream:
        stream.seek(at)
        stream.write(np.array(pair, ">i4").tobytes())


def test_tiles_in_any_order_in_the_heap(tmp_path, monkeypatch):
    """Two tiles of equal size change places, in the heap and in the table."""
    monkeypatch.setattr(compressed, "STRIP_PIXELS", 120)
    path = tmp_path / "x.fits.fz"
    write(path, data_of("i2"))
    (whole,) = rows_of(path, (0, 40))
    start, pairs = pointers(path)
    sizes = pairs[:, 0].tolist()
    a, b = next((j, k) for k in range(40) for j in range(k) if sizes[j] == sizes[k] and k - j > 5)
    hdu, _ = first_image(path)
    heap = start + hdu.axes_stored[0] * 40
    raw = bytearray(path.read_bytes())
    place = {k: slice(heap + int(pairs[k, 1]), heap + int(pairs[k, 1]) + sizes[k]) for k in (a, b)}
    raw[place[a]], raw[place[b]] = raw[place[b]], raw[place[a]]
    path.write_bytes(raw)
    put(path, a, (sizes[a], int(pairs[b, 1])))
    put(path, b, (sizes[b], int(pairs[a, 1])))
    np.testing.assert_array_equal(rows_of(path, (0, 40))[0], whole)


@pytest.mark.parametrize("pair", [(10**6, 0), (-1, 0), (20, -5), (20, 10**8), (2**31 - 1, 2**31 - 1)])
def test_a_tile_outside_of_the_heap(tmp_path, pair):
    path = tmp_path / "x.fits.fz"
    write(path, data_of("i2"))
    put(path, 30, pair)
    with pytest.raises(ValueError, match="outside of the heap"):
        rows_of(path, (30, 31))


@pytest.mark.parametrize(("key", "value"), [("ZTILE1", 0), ("ZTILE2", "x"), ("ZTILE1", None)])
def test_tiles_that_make_no_sense(tmp_path, key, value):
    path = tmp_path / "x.fits.fz"
    write(path, data_of("i2"))

    def edit(hdu):
        del hdu.header[key]
        if value is not None:
            hdu.header[key] = value

    change(path, edit)
    with pytest.raises(ValueError, match=key):
        rows_of(path, (0, 1))


def test_more_tiles_than_rows_of_the_table(tmp_path):
    path = tmp_path / "x.fits.fz"
    write(path, data_of("i2"))
    change(path, lambda hdu: hdu.header.set("ZTILE1", 10))
    with pytest.raises(ValueError, match="40 tiles of 10 x 1"):
        rows_of(path, (0, 1))


@pytest.mark.parametrize("seed", [None, 7, 10_000])
def test_the_seed_of_the_dither(tmp_path, monkeypatch, seed):
    path = tmp_path / "x.fits.fz"
    write(path, data_of("f4"), dither=2)

    def edit(hdu):
        del hdu.header["ZDITHER0"]
        if seed is not None:
            hdu.header["ZDITHER0"] = seed

    change(path, edit)
    whole = fits.getdata(path, 1)
    monkeypatch.setattr(compressed, "STRIP_PIXELS", 120)
    found = rows_of(path, (2, 40))[0]
    assert found.tobytes() == whole[2:].tobytes()


def test_a_seed_that_is_no_number(tmp_path):
    path = tmp_path / "x.fits.fz"
    write(path, data_of("f4"), dither=2)
    change(path, lambda hdu: hdu.header.set("ZDITHER0", "often"))
    with pytest.raises(TypeError, match="ZDITHER0"):
        rows_of(path, (0, 40))


def test_one_strip_is_held(tmp_path, monkeypatch):
    """Windows that go down the image decode each strip once."""
    monkeypatch.setattr(compressed, "STRIP_PIXELS", 400)
    path = tmp_path / "x.fits.fz"
    write(path, data_of("i2"))
    decoded = []
    original = TileRows._decode

    def decode(self, y0, y1):
        decoded.append((y0, y1))
        return original(self, y0, y1)

    monkeypatch.setattr(TileRows, "_decode", decode)
    rows_of(path, *[(k, min(k + 3, 40)) for k in range(0, 40, 3)])
    assert decoded == [(k, k + 8) for k in range(0, 40, 8)]


def test_a_table_that_ends_early(tmp_path):
    path = tmp_path / "x.fits.fz"
    write(path, data_of("i2"))
    hdu, hdus = first_image(path)
    start = hdus[-2].data_offset + hdus[-2].padded_bytes
    path.write_bytes(path.read_bytes()[: hdu.data_offset + 100])
    with path.open("rb") as stream, pytest.raises(UnusableInputError, match="no whole table"):
        TileRows(path, stream, hdu, start)
