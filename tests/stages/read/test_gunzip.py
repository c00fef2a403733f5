from __future__ import annotations

import gzip
import io
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgclassify.stages.errors import UnusableInputError
from sgclassify.stages.read.catalog import read_table
from sgclassify.stages.read.fitsfile import verify
from sgclassify.stages.read.gunzip import MAGIC, gunzip
from sgclassify.stages.read.header import read_header
from sgclassify.stages.read.pixels import ExposurePixels

GARBAGE = st.binary(max_size=50).filter(lambda data: not data.lstrip(b"\0").startswith(MAGIC))


@settings(deadline=None, max_examples=100)
@given(
    members=st.lists(st.binary(max_size=300).map(lambda data: data * 500), min_size=1, max_size=3),
    padding=st.integers(0, 70_000),
    garbage=GARBAGE,
    places=st.lists(st.tuples(st.integers(0, 300_000), st.integers(0, 70_000)), max_size=5),
)
def test_what_gzip_reads_whatever_follows(members, padding, garbage, places):
    packed = (bytes(padding)).join(gzip.compress(member, 1) for member in members)
    whole = gzip.decompress(packed)
    assert whole == b"".join(members)
    stream = gunzip(io.BytesIO(packed + bytes(padding) + garbage))
    assert stream.read() == whole
    expected = io.BytesIO(whole)
    for place, size in places:
        # a seek beyond the end ends there: so much is not in the stream
        stream.seek(place)
        expected.seek(min(place, len(whole)))
        assert stream.read(size) == expected.read(size)
        assert stream.tell() == expected.tell()


@settings(deadline=None, max_examples=100)
@given(data=st.binary(min_size=1, max_size=300), cut=st.integers(0, 400), flip=st.integers(0, 400))
def test_damage_is_not_taken_for_the_end(data, cut, flip):
    packed = bytearray(gzip.compress(data, mtime=0))
    with pytest.raises(EOFError):
        gunzip(io.BytesIO(packed[: cut % (len(packed) - 2) + 2])).read()
    # after the fixed header, in which some bytes (time, operating system) mean nothing
    packed[10 + flip % (len(packed) - 10)] ^= 0xFF
    with pytest.raises((zlib.error, EOFError)):
        gunzip(io.BytesIO(packed + bytes(8))).read()


@pytest.mark.parametrize("after", [b"\0" * 512, b"garbage\n", b"\0\0\0x", b"\x1f"])
@pytest.mark.parametrize("packed", [False, True])
def test_bytes_after_a_file_that_is_whole(make_exposure, after, packed):
    files = make_exposure()
    header = read_header(files)
    with ExposurePixels(header) as pixels:
        image = pixels.window(0, header.shape[0], 0, header.shape[1]).image
    table = read_table(files.catalog)
    for path in files.present.values():
        data = path.read_bytes()
        path.write_bytes((gzip.compress(data, 1) if packed else data) + after)
        verify(path)
    header = read_header(files)
    with ExposurePixels(header) as pixels:
        np.testing.assert_array_equal(pixels.window(0, header.shape[0], 0, header.shape[1]).image, image)
    assert read_table(files.catalog).equals(table)


@pytest.mark.parametrize(
    "damage",
    [
        lambda packed: packed[:-1],
        lambda packed: packed[:-8] + bytes([packed[-8] ^ 1]) + packed[-7:],
        lambda packed: packed[:-1] + bytes([packed[-1] ^ 1]),
        lambda packed: packed + packed[:-20],
        lambda packed: packed + MAGIC + b"garbage",
    ],
    ids=["cut", "crc", "length", "second member cut", "second member no gzip"],
)
def test_damaged_members(make_exposure, damage):
    path = make_exposure().catalog
    path.write_bytes(damage(gzip.compress(path.read_bytes(), 1)))
    with pytest.raises(UnusableInputError, match="damaged or truncated gzip"):
        verify(path)
