"""Write the files of a prepared exposure; `sgclassify.stages.read.prepared` reads them back."""

from __future__ import annotations

import contextlib
import errno
import io
import shutil
import uuid
from pathlib import Path
from types import TracebackType
from typing import IO, Final, Self

import numpy as np
import pyarrow as pa

from sgclassify.stages.read.header import ExposureHeader
from sgclassify.stages.read.pixels import PixelWindow
from sgclassify.stages.read.prepared import PreparedExposure
from sgclassify.stages.read.stored import PLANES, plane_starts, stored_bytes, stored_path
from sgclassify.stages.sky import SkyMesh
from sgclassify.stages.write.atomic import sync, write_atomic, write_atomic_bytes

ROOM: Final = 20
"""Pixels are stored where the disk has room for this many such exposures: results and other runs go first."""

_NO_ROOM: Final = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_prepared(prepared: PreparedExposure, detections: pa.Table, catalog: pa.Table, sky: SkyMesh) -> None:
    """Write each file whole or not at all; both tables have one row for every row of the catalogue."""
    write_atomic(detections, prepared.detections_path, {})
    write_atomic(catalog, prepared.catalog_path, {})
    buffer = io.BytesIO()
    layout = np.array([*sky.shape, sky.box], dtype=np.int64)
    np.savez(buffer, level=sky.level, sigma=sky.sigma, layout=layout)
    write_atomic_bytes(buffer.getvalue(), prepared.sky_path)


class PixelStore:
    """Stores the decoded pixels of an exposure as they are read; a context manager.

    The file is there after `finish`, and stays if the block ends well. One of an earlier try goes first. Where the disk
    has no room nothing is stored, which is no fault: the pixels can be decoded again.

    Parameters
    ----------
    header : ExposureHeader
        The exposure.
    work_dir : Path
        Folder of prepared files.
    """

    def __init__(self, header: ExposureHeader, work_dir: Path) -> None:
        self._shape = header.shape
        self._path = stored_path(work_dir, header.exposure_id)
        self._part = self._path.with_name(f".{self._path.name}.{uuid.uuid4().hex}.part")
        self._starts = plane_starts(header.shape)
        self._file: IO[bytes] | None = None
        self._full = False

    def __enter__(self) -> Self:
        self._path.unlink(missing_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._drop()
        if kind is not None:
            self._path.unlink(missing_ok=True)

    def add(self, window: PixelWindow) -> None:
        """Store some rows of all columns; every row once, in any order."""
        if self._full:
            return
        try:
            if self._file is None:
                needed = stored_bytes(self._shape)
                if shutil.disk_usage(self._path.parent).free < ROOM * needed:
                    self._full = True
                    return
                self._file = self._part.open("wb")
            for name, kind in PLANES.items():
                self._file.seek(self._starts[name] + window.y0 * self._shape[1] * kind.itemsize)
                self._file.write(np.ascontiguousarray(getattr(window, name), dtype=kind).data)
        except OSError as error:
            self._give_up(error)

    def finish(self) -> None:
        """Make the file complete, once all rows are stored; nothing if none was."""
        if self._file is None:
            return
        try:
            self._file.close()
            self._file = None
            sync(self._part)
            self._part.replace(self._path)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if error.errno not in _NO_ROOM:
            raise error
        self._full = True
        self._drop()

    def _drop(self) -> None:
        if self._file is not None:
            # what a full disk refuses once more as the file is closed does not matter any longer
            with contextlib.suppress(OSError):
                self._file.close()
        self._file = None
        self._part.unlink(missing_ok=True)
