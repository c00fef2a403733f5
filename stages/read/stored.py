"""Pixels of an exposure as the stage has decoded them: a file beside its other prepared files, for quick windows.

Only an exposure whose files are compressed has one: decoding costs ten times as much as reading. The file holds the
whole detector, plane after plane, without a header. It costs 7 bytes for each pixel until the run is complete: 46 MB
for 2560 x 2560 pixels, 0.6 GB for a full detector. Without it the files of the exposure are read again.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self

import numpy as np
import numpy.typing as npt

from sgclassify.stages.read.header import ExposureHeader
from sgclassify.stages.read.pixels import PIECE_PIXELS, ExposurePixels, PixelWindow, require_window

PLANES: Final[dict[str, np.dtype[Any]]] = {
    "image": np.dtype("<f4"),
    "flags": np.dtype("<u2"),
    "valid": np.dtype(np.bool_),
}
"""Planes of the file, in its order: attributes of `PixelWindow`, and how their pixels are stored."""


def stored_path(work_dir: Path, exposure_id: str) -> Path:
    """File with the decoded pixels of an exposure, which may not be there."""
    return work_dir / f"{exposure_id}.pixels"


def stored_bytes(shape: tuple[int, int]) -> int:
    """Size of the file for a detector of this shape."""
    return math.prod(shape) * sum(kind.itemsize for kind in PLANES.values())


def plane_starts(shape: tuple[int, int]) -> dict[str, int]:
    """Byte at which each plane begins."""
    ends = np.cumsum([math.prod(shape) * kind.itemsize for kind in PLANES.values()])
    return dict(zip(PLANES, [0, *ends.tolist()], strict=False))


class StoredPixels:
    """Windows into stored pixels; a context manager, used by one thread at a time.

    Parameters
    ----------
    header : ExposureHeader
        The exposure.
    path : Path
        Its file, complete.
    """

    def __init__(self, header: ExposureHeader, path: Path) -> None:
        self.header = header
        self._path = path
        self._starts = plane_starts(header.shape)
        self._file: BinaryIO | None = None

    def __enter__(self) -> Self:
        self._file = self._path.open("rb", buffering=0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        self._file = None

    def window(self, y0: int, y1: int, x0: int, x1: int) -> PixelWindow:
        """Read the pixels [y0:y1, x0:x1] as `ExposurePixels.window` does, without the weights.

        Raises
        ------
        ValueError
            If the range is empty or goes beyond the edge of the detector.
        """
        require_window(self.header.shape, y0, y1, x0, x1)
        return PixelWindow(**{name: self._read(name, y0, y1, x0, x1) for name in PLANES}, x0=x0, y0=y0)

    def _read(self, name: str, y0: int, y1: int, x0: int, x1: int) -> npt.NDArray[Any]:
        if self._file is None:
            raise ValueError("StoredPixels is used outside its with block")
        nx, kind = self.header.shape[1], PLANES[name]
        found = np.empty((y1 - y0, x1 - x0), kind)
        self._file.seek(self._starts[name] + y0 * nx * kind.itemsize)
        rows = max(1, PIECE_PIXELS // nx)
        for top in range(0, y1 - y0, rows):
            part = found[top : top + rows]
            data = self._file.read(len(part) * nx * kind.itemsize)
            part[...] = np.frombuffer(data, kind).reshape(len(part), nx)[:, x0:x1]
        return found


Pixels = ExposurePixels | StoredPixels


def open_pixels(header: ExposureHeader, work_dir: Path) -> Pixels:
    """Windows into an exposure: into its stored pixels where they are complete, into its files otherwise."""
    path = stored_path(work_dir, header.exposure_id)
    try:
        complete = path.stat().st_size == stored_bytes(header.shape)
    except FileNotFoundError:
        complete = False
    return StoredPixels(header, path) if complete else ExposurePixels(header)
