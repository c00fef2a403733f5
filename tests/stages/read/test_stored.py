"""Stored pixels, against the files that they were decoded from."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgclassify.stages.config import StageConfig
from sgclassify.stages.errors import UnusableInputError
from sgclassify.stages.prepare import prepare_exposure
from sgclassify.stages.read.header import read_header
from sgclassify.stages.read.pixels import ExposurePixels
from sgclassify.stages.read.stored import StoredPixels, open_pixels, stored_bytes, stored_path
from sgclassify.stages.write.prepared import PixelStore

SHAPE = (90, 70)
RAW = {"compress": "RICE_1"}


def flags():
    return np.random.default_rng(1).choice(np.array([0, 0, 0, 8, 64, 300], np.uint16), SHAPE)


def store(header, work_dir, bands):
    with PixelStore(header, work_dir) as made, ExposurePixels(header) as pixels:
        for y0, y1 in bands:
            made.add(pixels.window(y0, y1, 0, SHAPE[1]))
        made.finish()
    return stored_path(work_dir, header.exposure_id)


@pytest.fixture(scope="module")
def stored(tmp_path_factory, write_level1):
    """An exposure with the file of its pixels, written in an odd order."""
    folder = tmp_path_factory.mktemp("stored")
    image = (0.3 + 0.05 * np.random.default_rng(5).standard_normal(SHAPE)).astype(np.float32)
    image[4, 7] = np.nan
    header = read_header(write_level1(folder, shape=SHAPE, image=image, flag=flags(), **RAW))
    path = store(header, folder, [(60, 90), (0, 1), (1, 60)])
    assert path.stat().st_size == stored_bytes(SHAPE) == 7 * 90 * 70
    return header, folder


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_windows_are_those_of_the_files(stored, data):
    header, folder = stored
    y0, x0 = (data.draw(st.integers(0, n - 1)) for n in SHAPE)
    y1, x1 = data.draw(st.integers(y0 + 1, SHAPE[0])), data.draw(st.integers(x0 + 1, SHAPE[1]))
    with open_pixels(header, folder) as quick, ExposurePixels(header) as slow:
        assert isinstance(quick, StoredPixels)
        found, expected = quick.window(y0, y1, x0, x1), slow.window(y0, y1, x0, x1)
    assert (found.x0, found.y0) == (x0, y0)
    for name in ("image", "flags", "valid"):
        got, wanted = getattr(found, name), getattr(expected, name)
        assert got.dtype == wanted.dtype
        assert got.tobytes() == wanted.tobytes()
        assert got.flags.writeable


@pytest.mark.parametrize("box", [(0, 0, 0, 5), (-1, 5, 0, 5), (0, 91, 0, 5), (0, 5, 0, 71), (0, 5, 5, 4)])
def test_window_off_the_detector(stored, box):
    with open_pixels(*stored) as pixels, pytest.raises(ValueError, match="window"):
        pixels.window(*box)


def test_window_outside_the_block(stored):
    pixels = open_pixels(*stored)
    with pytest.raises(ValueError, match="with block"):
        pixels.window(0, 1, 0, 1)


def test_a_file_of_another_size_is_not_believed(stored, tmp_path):
    header, folder = stored
    path = stored_path(tmp_path, header.exposure_id)
    shutil.copy(stored_path(folder, header.exposure_id), path)
    assert isinstance(open_pixels(header, tmp_path), StoredPixels)
    path.write_bytes(path.read_bytes()[:-1])
    assert isinstance(open_pixels(header, tmp_path), ExposurePixels)


@pytest.mark.parametrize(
    ("options", "kept"), [({}, False), (RAW, True), ({"gz": "FLG"}, True), ({"gz": "CAT"}, False)], ids=str
)
def test_only_pixels_that_cost_decoding_are_stored(make_exposure, tmp_path, options, kept):
    prepared = prepare_exposure(read_header(make_exposure(**options)), tmp_path, StageConfig())
    assert isinstance(prepared.pixels(), StoredPixels) == kept
    assert any(tmp_path.glob("*.pixels")) == kept
    assert not any(tmp_path.glob(".*"))


def test_stored_pixels_change_nothing(make_exposure, tmp_path, monkeypatch):
    """A full disk: the same prepared files, and no word about it."""
    header = read_header(make_exposure(shape=(300, 260), compress="RICE_1", gz="CAT", n_rows=9))
    with_store, without = tmp_path / "with", tmp_path / "without"
    with_store.mkdir()
    without.mkdir()
    first = prepare_exposure(header, with_store, StageConfig())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 10**4))
    second = prepare_exposure(header, without, StageConfig())
    assert isinstance(second.pixels(), ExposurePixels)
    assert isinstance(first.pixels(), StoredPixels)
    assert first.as_dict() | {"work_dir": ""} == second.as_dict() | {"work_dir": ""}
    for path in without.iterdir():
        assert path.read_bytes() == (with_store / path.name).read_bytes()


class Full:
    """A file on a disk that becomes full at some call."""

    def __init__(self, file, fault, calls):
        self.file, self.fault, self.calls = file, fault, calls

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.calls -= 1
        if self.calls < 0:
            raise self.fault
        return self.file.write(data)


@pytest.mark.parametrize("calls", [0, 4])
def test_a_disk_that_becomes_full_is_no_fault(make_exposure, tmp_path, monkeypatch, calls):
    header = read_header(make_exposure(shape=SHAPE, **RAW))
    original = Path.open

    def opened(path, mode="r", *arguments, **options):
        file = original(path, mode, *arguments, **options)
        return Full(file, OSError(errno.ENOSPC, "full"), calls) if ".pixels." in path.name else file

    monkeypatch.setattr(Path, "open", opened)
    path = store(header, tmp_path, [(0, 40), (40, 90)])
    assert not path.exists()
    assert not any(tmp_path.glob("*.part"))
    assert not any(tmp_path.glob(".*.part"))


def test_a_disk_that_fails_is_a_fault(make_exposure, tmp_path, monkeypatch):
    header = read_header(make_exposure(shape=SHAPE, **RAW))
    original = Path.open

    def opened(path, mode="r", *arguments, **options):
        file = original(path, mode, *arguments, **options)
        return Full(file, OSError(errno.EIO, "broken"), 2) if ".pixels." in path.name else file

    monkeypatch.setattr(Path, "open", opened)
    with pytest.raises(OSError, match="broken"):
        store(header, tmp_path, [(0, 90)])
    assert not any(tmp_path.glob(".*.part"))


def test_a_refused_exposure_leaves_nothing(make_exposure, make_columns, tmp_path):
    columns = make_columns(30)
    columns["X"] = columns["X"] + 1000
    work = tmp_path / "work"
    work.mkdir()
    header = read_header(make_exposure(columns=columns, **RAW))
    # what an earlier try left goes too
    stored_path(work, header.exposure_id).write_bytes(b"old")
    with pytest.raises(UnusableInputError, match="no usable position"):
        prepare_exposure(header, work, StageConfig())
    assert not any(work.iterdir())


def test_pixels_of_an_earlier_try_are_not_used(make_exposure, tmp_path):
    header = read_header(make_exposure(name="a_{KIND}.fits", **RAW))
    prepare_exposure(header, tmp_path, StageConfig())
    # delivered again, and not compressed
    again = read_header(make_exposure(name="a_{KIND}.fits"))
    assert again.exposure_id == header.exposure_id
    assert isinstance(prepare_exposure(again, tmp_path, StageConfig()).pixels(), ExposurePixels)
