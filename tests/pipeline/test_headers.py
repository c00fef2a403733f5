"""Headers are read side by side, in order, and none holds up the rest for ever."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sgclassify.pipeline.headers import read_headers
from sgclassify.pipeline.record.record import Failure
from sgclassify.stages.errors import SlitlessExposureError, UnusableInputError
from sgclassify.stages.read.names import ExposureFiles


def _files(n: int) -> list[ExposureFiles]:
    return [ExposureFiles(Path(f"/{k}_IMG.fits")) for k in range(n)]


def _read(files: ExposureFiles) -> Any:
    return SimpleNamespace(files=files)


@pytest.mark.parametrize("n", [0, 1, 5, 1000])
@pytest.mark.parametrize("threads", [1, 8])
def test_one_outcome_for_each_in_order(n: int, threads: int) -> None:
    files = _files(n)
    found = list(read_headers(files, _read, threads, 60.0))
    assert [one.files for one in found if not isinstance(one, Failure)] == files


def test_what_goes_wrong_costs_its_exposure_only() -> None:
    def read(files: ExposureFiles) -> Any:
        if files.image.name.startswith("1"):
            raise UnusableInputError(files.image, "truncated", "copy it again")
        if files.image.name.startswith("2"):
            raise SlitlessExposureError(files.image, "slitless", "")
        if files.image.name.startswith("3"):
            raise ZeroDivisionError("x / 0")
        return _read(files)

    found = list(read_headers(_files(5), read, 2, 60.0))
    assert found[1] == Failure("/1_IMG.fits", "truncated", "copy it again")
    assert isinstance(found[2], SlitlessExposureError)
    assert isinstance(found[3], Failure)
    assert "ZeroDivisionError" in found[3].fault
    assert [k for k in (0, 4) if isinstance(found[k], Failure)] == []


def test_files_that_never_finish_reading() -> None:
    never = threading.Event()

    def read(files: ExposureFiles) -> Any:
        if files.image.name[0] in "03":
            never.wait()
        return _read(files)

    start = time.monotonic()
    found = list(read_headers(_files(8), read, 2, 0.5))
    assert time.monotonic() - start < 30
    stuck = [k for k, one in enumerate(found) if isinstance(one, Failure)]
    assert stuck == [0, 3]
    assert "within 0.5 s" in str(found[0])
    never.set()
