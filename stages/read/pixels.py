"""Pixels of an exposure: image, weight and flags. Reads them in windows, and checks them all."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

import numpy as np
import numpy.typing as npt

from sgclassify.stages.arrays import F32, U16, Bool
from sgclassify.stages.errors import UnusableInputError
from sgclassify.stages.flags import InputFlag
from sgclassify.stages.read.fitsfile import RECOPY, verify
from sgclassify.stages.read.header import ExposureHeader
from sgclassify.stages.read.image import ImageReader, open_image, temporary_copy

HARMLESS: Final = int(InputFlag.GHOST | InputFlag.SCATTERED)
"""Bits of FLG that leave a pixel valid: the light is real, though not from the source."""

UNKNOWN_BIT: Final = 1 << 15
"""Set in the flags where the value in FLG is not a uint16 bit mask."""

CHECK_ROWS: Final = 256
"""Rows read at once by `check_exposure` (9 MB of a 9216-pixel row of float32)."""

HALF_STEP: Final = 0.501
"""Largest distance, in steps, of a quantised zero from 0: half a step, plus rounding in the decoder."""

MAX_UNRESOLVED: Final = 0.1
"""Largest share of pixels whose weight may be below a step of WHT. Usually it is 0.001: the cores of stars."""


PIECE_PIXELS: Final = 2**17
"""Pixels of the whole rows that go through all steps together: few enough to stay in the processor's cache."""

MASKING: Final = np.uint16(0xFFFF & ~HARMLESS)


@dataclass(slots=True)
class PixelWindow:
    """Pixels of one exposure in a rectangle of its detector; all arrays are [y, x].

    Attributes
    ----------
    image : float32 array
        e-/s, sky not subtracted; NaN where the file has no value.
    flags : uint16 array
        Bits of `sgclassify.stages.flags.InputFlag`.
    valid : bool array
        Pixels with data: weight > 0, finite, and no flag except ghost or scattered light.
    x0, y0 : int
        Detector position (0-based) of the window's first pixel.
    """

    image: F32
    flags: U16
    valid: Bool
    x0: int
    y0: int


@dataclass(slots=True)
class WeightedWindow(PixelWindow):
    """A window with its weights.

    Attributes
    ----------
    weight : float32 array
        Inverse variance, (e-/s)^-2; 0 where the pixel is unusable.
    """

    weight: F32


@dataclass(frozen=True, slots=True)
class ExposureCheck:
    """Outcome of `check_exposure`.

    Attributes
    ----------
    sha256 : dict
        Path of each file of the exposure -> SHA-256 of the file on disk, hexadecimal.
    moved_zeros, unresolved : int
        As in `ExposurePixels`, over all pixels.
    """

    sha256: dict[str, str]
    moved_zeros: int
    unresolved: int


class ExposurePixels:
    """Windows into the pixels of one exposure; a context manager, used by one thread at a time.

    Nothing is mapped into memory, and no whole image is held: a window costs only its own rows. (A compressed image
    also costs the strip that was decoded last, and a .gz file a decompressed copy in the temporary folder.)

    Parameters
    ----------
    header : ExposureHeader
        The exposure.
    unpacked : mapping of Path to binary file, optional
        Decompressed content of its .gz files, for those where it is there already; not closed.

    Attributes
    ----------
    moved_zeros : int
        Pixels of the windows read so far with a weight above 0 that is taken for 0: quantisation of WHT has moved it.
    unresolved : int
        Pixels of these windows that are so bright that their weight is less than a step of the quantisation:
        usable where FLG has no flag, unusable where there is no FLG.

    Raises
    ------
    UnusableInputError
        On entering, if a file cannot be opened, its image does not have the shape in the header, or its compression
        has lost the meaning of the pixels.
    """

    def __init__(self, header: ExposureHeader, unpacked: Mapping[Path, IO[bytes]] | None = None) -> None:
        self.header = header
        self._unpacked = unpacked or {}
        self.moved_zeros = self.unresolved = 0
        self._stack = ExitStack()
        self._image: ImageReader | None = None
        self._weight: ImageReader | None = None
        self._flag: ImageReader | None = None

    def __enter__(self) -> Self:
        files = self.header.files
        with ExitStack() as stack:
            self._image = self._open(stack, files.image, "IMG")
            self._weight = self._open(stack, files.weight, "WHT") if files.weight is not None else None
            self._flag = self._open(stack, files.flag, "FLG") if files.flag is not None else None
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._image = self._weight = self._flag = None
        self._stack.close()

    @property
    def costly(self) -> bool:
        """Whether each reading of these pixels decompresses them; within the ``with`` block."""
        return any(r is not None and r.costly for r in (self._image, self._weight, self._flag))

    def window(self, y0: int, y1: int, x0: int, x1: int) -> PixelWindow:
        """Read the pixels [y0:y1, x0:x1], a 0-based range; in native byte order, owned by the caller.

        Raises
        ------
        ValueError
            If the range is empty or goes beyond the edge of the detector.
        UnusableInputError
            If the data cannot be decoded.
        """
        return self._read((y0, y1, x0, x1), None)

    def weighted_window(self, y0: int, y1: int, x0: int, x1: int) -> WeightedWindow:
        """Read a window as `window` does, and its weights, which double the memory of the image."""
        require_window(self.header.shape, y0, y1, x0, x1)
        weight = np.empty((y1 - y0, x1 - x0), np.float32)
        found = self._read((y0, y1, x0, x1), weight)
        return WeightedWindow(found.image, found.flags, found.valid, x0=x0, y0=y0, weight=weight)

    def _read(self, box: tuple[int, int, int, int], weight: F32 | None) -> PixelWindow:
        """Read a window, and fill the array of its weights if there is one."""
        require_window(self.header.shape, *box)
        if self._image is None:
            raise ValueError("ExposurePixels is used outside its with block")
        y0, y1, x0, x1 = box
        shape = (y1 - y0, x1 - x0)
        image, flags, valid = np.empty(shape, np.float32), np.empty(shape, np.uint16), np.empty(shape, np.bool_)
        rows = max(1, PIECE_PIXELS // self.header.shape[1])
        for top in range(y0, y1, rows):
            end = min(top + rows, y1)
            at = slice(top - y0, end - y0)
            part = np.empty((end - top, x1 - x0), np.float32) if weight is None else weight[at]
            self._read_piece((top, end, x0, x1), self._image, image[at], part, flags[at])
            np.greater(part, 0, out=valid[at])
            # The extremes are not finite where any pixel is not; finding them costs less than a mask of all.
            if not (math.isfinite(image[at].min()) and math.isfinite(image[at].max())):
                valid[at] &= np.isfinite(image[at])
            if flags[at].any():
                valid[at] &= (flags[at] & MASKING) == 0
        return PixelWindow(image, flags, valid, x0=x0, y0=y0)

    def _read_piece(
        self, box: tuple[int, int, int, int], reader: ImageReader, image: F32, weight: F32, flags: U16
    ) -> None:
        """Fill the three arrays with the pixels of a box (y0, y1, x0, x1)."""
        _fill(image, reader.read(*box))
        if self._weight is None:
            weight[...] = _noise_weight(image, self.header)
        else:
            _fill(weight, self._weight.read(*box))
            self._mask_dead(weight, image, self._weight, self._weight.step(*box))
        if self._flag is None:
            flags[...] = 0
            if math.isfinite(self.header.saturate):
                flags[image >= self.header.saturate] = InputFlag.SATURATED
        else:
            flags[...] = _as_flags(self._flag.read(*box))

    def _mask_dead(self, weight: F32, image: F32, reader: ImageReader, step: npt.NDArray[np.float64] | float) -> None:
        """Set the weight of unusable pixels to 0, also where quantisation of WHT has moved a 0.

        The weight of a bright pixel may be less than a step because of its own light, and then looks like a moved 0.
        Only FLG can tell the two apart.
        """
        near = HALF_STEP * step
        if not np.any(near) and weight.min() >= 0 and weight.max() < np.inf:
            return
        # no step is negative, so a weight that is more than it and less than infinity is a number above 0
        dead = ~((weight > near) & (weight < np.inf))
        if reader.quantised:
            small = np.abs(weight) <= near
            if reader.keeps_zeros:
                alive = small & (weight != 0)
            else:
                # Photon noise alone limits the weight to t / data, data in e-/s.
                with np.errstate(invalid="ignore", over="ignore"):
                    unresolved = small & (step > 0) & (image * step >= self.header.exposure_time)
                alive = unresolved & (self._flag is not None)
                self.unresolved += int(np.count_nonzero(unresolved))
                self.moved_zeros += int(np.count_nonzero(small & (weight > 0) & ~unresolved))
            # The middle of the weights that round to this value.
            weight[alive] = ((weight + near) / 2)[alive]
            dead &= ~alive
        np.copyto(weight, 0, where=dead)

    def _open(self, stack: ExitStack, path: Path, kind: str) -> ImageReader:
        reader = open_image(stack, path, self._unpacked.get(path))
        if reader.shape != self.header.shape:
            raise UnusableInputError(path, f"its image changed its shape to {reader.shape}", RECOPY)
        loss = _loss(kind, reader)
        if loss:
            advice = f"compress {kind} without loss: " + (
                "integers by RICE_1 or GZIP_2" if kind == "FLG" else "HCOMPRESS_1 with SCALE 0, or RICE_1"
            )
            raise UnusableInputError(path, f"{kind} is {loss}", advice)
        return reader


def require_window(shape: tuple[int, int], y0: int, y1: int, x0: int, x1: int) -> None:
    """Raise ValueError if the pixels [y0:y1, x0:x1] are none, or not all on a detector of this shape."""
    ny, nx = shape
    if not (0 <= y0 < y1 <= ny and 0 <= x0 < x1 <= nx):
        raise ValueError(f"window [{y0}:{y1}, {x0}:{x1}] is empty or not within {ny} x {nx} (rows x columns)")


class _CountedPixels(ExposurePixels):
    """Counts the pixels of its windows, and tells whether one of them has a value, has a weight, is valid."""

    def __init__(self, header: ExposureHeader, unpacked: Mapping[Path, IO[bytes]]) -> None:
        super().__init__(header, unpacked)
        self.seen = 0
        self.finite = self.weighted = self.valid = False

    def window(self, y0: int, y1: int, x0: int, x1: int) -> PixelWindow:
        window = self.weighted_window(y0, y1, x0, x1)
        self.seen += window.image.size
        # A valid pixel has a value and a weight: where there is one, these need not be looked for.
        self.valid = self.valid or bool(window.valid.any())
        self.finite = self.finite or self.valid or bool(np.isfinite(window.image).any())
        self.weighted = self.weighted or self.valid or bool(window.weight.any())
        return window


def _walk(pixels: ExposurePixels) -> None:
    ny, nx = pixels.header.shape
    for y0 in range(0, ny, CHECK_ROWS):
        pixels.window(y0, min(y0 + CHECK_ROWS, ny), 0, nx)


def check_exposure(header: ExposureHeader, walk: Callable[[ExposurePixels], None] | None = None) -> ExposureCheck:
    """Read every byte of an exposure once, and refuse an exposure that is damaged or empty.

    Parameters
    ----------
    walk : callable, optional
        Uses the pixels as they are decoded for the check: reads windows of all columns that hold every row once. It
        also gets the pixels of an exposure that is refused afterwards.

    Raises
    ------
    UnusableInputError
        If a file is truncated, a CHECKSUM or DATASUM does not match, data cannot be decoded, IMG is all NaN, WHT is
        all zero, or no pixel is valid.
    """
    files = header.files
    ny, nx = header.shape
    with ExitStack() as stack:
        unpacked: dict[Path, IO[bytes]] = {}

        def copy_of(path: Path) -> IO[bytes]:
            return unpacked.setdefault(path, stack.enter_context(temporary_copy()))

        sha256 = {
            str(path): verify(path, partial(copy_of, path) if path != files.catalog else None)
            for path in files.present.values()
        }
        pixels = stack.enter_context(_CountedPixels(header, unpacked))
        (walk or _walk)(pixels)
    if pixels.seen != ny * nx:
        raise ValueError(f"{pixels.seen} of {ny * nx} pixels were read for the check")
    if not pixels.finite:
        raise UnusableInputError(files.image, "every pixel of IMG is nan", "process the exposure again")
    if pixels.unresolved > MAX_UNRESOLVED * ny * nx:
        share = 100.0 * pixels.unresolved / (ny * nx)
        fault = f"WHT is quantised too coarsely: {share:.0f} percent of its weights are less than a step"
        raise UnusableInputError(files.weight or files.image, fault, "compress WHT again, without loss")
    if not pixels.weighted:
        lost = ", or lost in the steps of its quantisation" if pixels.moved_zeros else ""
        fault = "every weight is zero" + lost
        raise UnusableInputError(files.weight or files.image, fault, "process the exposure again")
    if not pixels.valid:
        fault = "no pixel is valid: WHT, FLG and IMG together mask all"
        raise UnusableInputError(files.flag or files.image, fault, "process the exposure again")
    return ExposureCheck(sha256, pixels.moved_zeros, pixels.unresolved)


def _loss(kind: str, reader: ImageReader) -> str:
    """Information that compression of an image has lost and the stage needs; empty where there is none."""
    if kind == "FLG" and (reader.quantised or reader.smeared):
        return f"{reader.quantised or reader.smeared}: its bits are lost"
    if kind == "WHT" and reader.smeared:
        return f"{reader.smeared}: which pixels have weight 0 is lost"
    if kind == "IMG" and reader.smeared and reader.has_blank:
        return f"{reader.smeared}, and has pixels without a value: which these are is lost"
    return ""


def _fill(out: F32, values: npt.NDArray[Any]) -> None:
    with np.errstate(over="ignore"):  # values beyond float32 become infinite, and so not valid
        out[...] = values


def _as_flags(values: npt.NDArray[Any]) -> U16:
    """FLG as a bit mask, perhaps the array itself; a value that is not a uint16 gets a bit that masks the pixel."""
    if values.dtype == np.uint16:
        return values
    strange = ~((values >= 0) & (values <= 0xFFFF))
    whole = np.where(strange, 0, values).astype(np.uint16)
    whole[strange | (whole != np.where(strange, 0, values))] |= np.uint16(UNKNOWN_BIT)
    return whole


def _noise_weight(image: F32, header: ExposureHeader) -> F32:
    """Inverse variance from photon and read noise: t^2 / (max(data, 0) t + RN^2), data in e-/s.

    The data are electrons, so the photon noise needs no gain. Where EXPTIME or RDNOISE1 is missing, SKY_RMS is the
    noise of every pixel; the photon noise of the sources is added if EXPTIME and SKY_BKG are known.
    """
    time = header.exposure_time
    signal = np.maximum(image, np.float32(0))
    if math.isfinite(time) and math.isfinite(header.read_noise):
        variance = (signal * time + header.read_noise**2) / time**2
    else:
        variance = np.full_like(image, header.sky_rms**2)
        if math.isfinite(time) and math.isfinite(header.sky_background):
            variance += np.maximum(signal - header.sky_background, 0) / time
    good = np.isfinite(image) & (variance > 0)
    return np.where(good, 1.0 / np.where(good, variance, 1.0), 0.0).astype(np.float32)
