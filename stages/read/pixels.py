"""Pixels of an exposure: image, weight and flags, read in windows, and the check of all of them."""

from __future__ import annotations

import errno
import math
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Protocol, Self, cast

import numpy as np
import numpy.typing as npt
from astropy.io import fits
from astropy.io.fits.hdu.compressed._compression import CfitsioException
from astropy.utils.exceptions import AstropyUserWarning

from sgclassify.stages.errors import UnusableInputError
from sgclassify.stages.flags import InputFlag
from sgclassify.stages.read.fitsfile import RECOPY, Hdu, copy_stream, first_image, open_stream, verify
from sgclassify.stages.read.header import ExposureHeader

F32 = npt.NDArray[np.float32]
U16 = npt.NDArray[np.uint16]
Bool = npt.NDArray[np.bool_]

HARMLESS: Final = int(InputFlag.GHOST | InputFlag.SCATTERED)
"""Bits of FLG that leave a pixel valid: the light is real, if not the source's own."""

UNKNOWN_BIT: Final = 1 << 15
"""Set in the flags where FLG holds a value that is no uint16 bit mask."""

CHECK_ROWS: Final = 256
"""Rows read at once by `check_exposure` (9 MB of a 9216-pixel row of float32)."""

SKY_SAMPLES: Final = 200_000
"""About this many pixels give the robust sky: its error is then 0.3 percent of the noise."""

_DTYPE: Final = {8: ">u1", 16: ">i2", 32: ">i4", 64: ">i8", -32: ">f4", -64: ">f8"}

_DECODING_ERRORS = (
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    OSError,
    CfitsioException,
)
"""What astropy was seen to raise on damaged tiles; its decoders do not share a base class."""

_FAULTS_OF_THE_FILE = (None, errno.EINVAL, errno.EOVERFLOW)
"""System errors of a seek to where only a damaged tile descriptor can point; None is astropy's own OSError."""

_OPENING = threading.Lock()
"""Held while warnings are filtered: the filters belong to the process, not to the thread."""


@dataclass(slots=True)
class PixelWindow:
    """Pixels of one exposure in a rectangle of its detector; all arrays are [y, x].

    Attributes
    ----------
    image : float32 array
        e-/s, sky not subtracted; nan where the file has no value.
    weight : float32 array
        Inverse variance, (e-/s)^-2; 0 where the pixel is unusable.
    flags : uint16 array
        Bits of `sgclassify.stages.flags.InputFlag`.
    x0, y0 : int
        Detector position (0-based) of the window's first pixel.
    """

    image: F32
    weight: F32
    flags: U16
    x0: int
    y0: int

    @property
    def valid(self) -> Bool:
        """Pixels that are data, [y, x]: weight > 0, finite, and no flag but ghost or scattered light."""
        masking = np.uint16(0xFFFF & ~HARMLESS)
        good: Bool = (self.weight > 0) & np.isfinite(self.image) & ((self.flags & masking) == 0)
        return good


@dataclass(frozen=True, slots=True)
class ExposureCheck:
    """Outcome of `check_exposure`.

    Attributes
    ----------
    sha256 : dict
        Path of each file of the exposure -> SHA-256 of the file as it lies on disk, hexadecimal.
    sky_level, sky_sigma : float
        Robust level and standard deviation of the valid pixels, e-/s.
    valid_fraction : float
        Share of valid pixels.
    """

    sha256: dict[str, str]
    sky_level: float
    sky_sigma: float
    valid_fraction: float


class ExposurePixels:
    """Windows into the pixels of one exposure; a context manager, used by one thread at a time.

    Nothing is mapped into memory and no whole image is held: a window costs its own rows. (A tile-compressed
    file costs its compressed bytes besides, a .gz file a decompressed copy in the temporary folder.)

    Parameters
    ----------
    header : ExposureHeader
        The exposure.

    Raises
    ------
    UnusableInputError
        On entering, if a file cannot be opened or its image has not the shape that the header says.
    """

    def __init__(self, header: ExposureHeader) -> None:
        self.header = header
        self._stack = ExitStack()
        self._image: _Reader | None = None
        self._weight: _Reader | None = None
        self._flag: _Reader | None = None

    def __enter__(self) -> Self:
        files = self.header.files
        with ExitStack() as stack:
            self._image = self._open(stack, files.image)
            self._weight = self._open(stack, files.weight) if files.weight is not None else None
            self._flag = self._open(stack, files.flag) if files.flag is not None else None
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._image = self._weight = self._flag = None
        self._stack.close()

    def window(self, y0: int, y1: int, x0: int, x1: int) -> PixelWindow:
        """Read the pixels [y0:y1, x0:x1].

        Parameters
        ----------
        y0, y1, x0, x1 : int
            Half-open range of rows and columns, 0-based, within the detector and not empty.

        Returns
        -------
        PixelWindow
            In native byte order, owned by the caller.

        Raises
        ------
        ValueError
            If the range is empty or reaches over the detector's edge.
        UnusableInputError
            If the data cannot be decoded.
        """
        ny, nx = self.header.shape
        if not (0 <= y0 < y1 <= ny and 0 <= x0 < x1 <= nx):
            raise ValueError(
                f"window [{y0}:{y1}, {x0}:{x1}] is empty or not within {ny} x {nx} (rows x columns)"
            )
        if self._image is None:
            raise ValueError("ExposurePixels is used outside its with block")
        image = _as_float32(self._image.read(y0, y1, x0, x1))
        if self._weight is None:
            weight = _noise_weight(image, self.header)
        else:
            weight = _as_float32(self._weight.read(y0, y1, x0, x1))
            weight[~(np.isfinite(weight) & (weight > 0))] = 0
        if self._flag is None:
            flags = np.zeros(image.shape, dtype=np.uint16)
            if math.isfinite(self.header.saturate):
                flags[image >= self.header.saturate] = InputFlag.SATURATED
        else:
            flags = _as_flags(self._flag.read(y0, y1, x0, x1))
        return PixelWindow(image, weight, flags, x0=x0, y0=y0)

    def _open(self, stack: ExitStack, path: Path) -> _Reader:
        reader = _open_image(stack, path)
        if reader.shape != self.header.shape:
            raise UnusableInputError(path, f"its image changed its shape to {reader.shape}", RECOPY)
        return reader


def check_exposure(header: ExposureHeader) -> ExposureCheck:
    """Read every byte of an exposure once, and refuse what is damaged or empty.

    Parameters
    ----------
    header : ExposureHeader
        The exposure.

    Returns
    -------
    ExposureCheck

    Raises
    ------
    UnusableInputError
        If a file is truncated, a CHECKSUM or DATASUM does not match, data cannot be decoded, IMG is all nan,
        WHT all zero, or no pixel is valid.
    """
    files = header.files
    sha256 = {str(path): verify(path) for path in files.present.values()}
    ny, nx = header.shape
    step = max(1, math.isqrt(ny * nx // SKY_SAMPLES))
    finite = weighted = valid_pixels = 0
    samples: list[F32] = []
    with ExposurePixels(header) as pixels:
        for y0 in range(0, ny, CHECK_ROWS):
            window = pixels.window(y0, min(y0 + CHECK_ROWS, ny), 0, nx)
            valid = window.valid
            finite += int(np.isfinite(window.image).sum())
            weighted += int((window.weight > 0).sum())
            valid_pixels += int(valid.sum())
            grid = (slice(-y0 % step, None, step), slice(None, None, step))
            samples.append(window.image[grid][valid[grid]])
    if not finite:
        raise UnusableInputError(files.image, "every pixel of IMG is nan", "process the exposure again")
    if not weighted:
        raise UnusableInputError(
            files.weight or files.image, "every weight is zero", "process the exposure again"
        )
    if not valid_pixels:
        fault = "no pixel is valid: WHT, FLG and IMG together mask all"
        raise UnusableInputError(files.flag or files.image, fault, "process the exposure again")
    level, sigma = _robust(np.concatenate(samples))
    return ExposureCheck(sha256, level, sigma, valid_pixels / (ny * nx))


class _Reader(Protocol):
    """Reads physical values (BSCALE, BZERO and BLANK applied) of one image."""

    shape: tuple[int, int]

    def read(self, y0: int, y1: int, x0: int, x1: int) -> npt.NDArray[Any]: ...


class _PlainReader:
    """Image that lies uncompressed in its file."""

    def __init__(self, path: Path, stream: BinaryIO, hdu: Hdu) -> None:
        self.path = path
        self.stream = stream
        self.hdu = hdu
        self.shape = (hdu.axes[1], hdu.axes[0])
        self.dtype = np.dtype(_DTYPE[int(hdu.number("BITPIX", 8))])

    def read(self, y0: int, y1: int, x0: int, x1: int) -> npt.NDArray[Any]:
        row = self.shape[1] * self.dtype.itemsize
        self.stream.seek(self.hdu.data_offset + y0 * row)
        data = self.stream.read((y1 - y0) * row)
        if len(data) < (y1 - y0) * row:
            raise UnusableInputError(self.path, f"truncated: rows {y0} to {y1} are not there", RECOPY)
        stored = np.frombuffer(data, dtype=self.dtype).reshape(y1 - y0, -1)[:, x0:x1]
        return self._physical(stored)

    def _physical(self, stored: npt.NDArray[Any]) -> npt.NDArray[Any]:
        scale, zero = self.hdu.number("BSCALE", 1.0), self.hdu.number("BZERO", 0.0)
        blank = self.hdu.values.get("BLANK") if self.dtype.kind in "iu" else None
        if blank is None and scale == 1.0 and zero == 0.0:
            return stored
        if blank is None and scale == 1.0 and zero.is_integer() and self.dtype.str in (">u1", ">i2"):
            # Unsigned integers, such as the flags, stay integers: BZERO is 32768, or -128.
            return stored.astype(np.int32) + int(zero)
        values = stored * scale + zero
        if blank is not None:
            values[stored == blank] = np.nan
        return values


class _CompressedReader:
    """Tile-compressed image: astropy decodes the tiles that a section touches."""

    def __init__(self, path: Path, stack: ExitStack, location: Path, hdu: Hdu) -> None:
        self.path = path
        self.shape = (hdu.axes[1], hdu.axes[0])
        with _OPENING, warnings.catch_warnings(), _decoding(path):
            # Odd cards elsewhere in the header are no concern of ours; damage raises.
            warnings.simplefilter("ignore", AstropyUserWarning)
            hdus = stack.enter_context(fits.open(location, memmap=False))
            self.section = hdus[hdu.index].section
            self.section[:1, :1]

    def read(self, y0: int, y1: int, x0: int, x1: int) -> npt.NDArray[Any]:
        with _decoding(self.path):
            found: npt.NDArray[Any] = np.asarray(self.section[y0:y1, x0:x1])
        return found


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Turn what astropy raises on damaged compressed data into a fault of the file."""
    try:
        # Damaged tiles hold any number; what is not finite is masked later.
        with np.errstate(all="ignore"):
            yield
    except _DECODING_ERRORS as error:
        if isinstance(error, OSError) and error.errno not in _FAULTS_OF_THE_FILE:
            raise  # the disk's or the network's fault, which may pass
        text = " ".join(str(error).split())
        raise UnusableInputError(path, f"compressed image cannot be decoded ({text})", RECOPY) from error


def _open_image(stack: ExitStack, path: Path) -> _Reader:
    hdu, _ = first_image(path)
    stream, size = stack.enter_context(open_stream(path))
    location = path
    if size is None:
        # Windows would seek backwards in the gzip stream, each time from its start: decompress it once.
        temporary = tempfile.NamedTemporaryFile(prefix="sgclassify-", suffix=".fits")  # noqa: SIM115
        copy = stack.enter_context(temporary)
        copy_stream(stream, copy, path, hdu)
        stream, location = cast(BinaryIO, copy), Path(copy.name)
    if hdu.compressed:
        return _CompressedReader(path, stack, location, hdu)
    return _PlainReader(path, stream, hdu)


def _as_float32(values: npt.NDArray[Any]) -> F32:
    with np.errstate(over="ignore"):  # beyond float32 is infinite, and so not valid
        return np.array(values, dtype=np.float32, order="C")


def _as_flags(values: npt.NDArray[Any]) -> U16:
    """Bit mask of what FLG holds; a value that is no uint16 gets a bit that masks the pixel."""
    if values.dtype == np.uint16:
        return np.array(values, dtype=np.uint16)
    strange = ~((values >= 0) & (values <= 0xFFFF))
    whole = np.where(strange, 0, values).astype(np.uint16)
    whole[strange | (whole != np.where(strange, 0, values))] |= np.uint16(UNKNOWN_BIT)
    return whole


def _noise_weight(image: F32, header: ExposureHeader) -> F32:
    """Inverse variance from photon and read noise: t^2 / (max(data, 0) t + RN^2), data in e-/s.

    The data are electrons, so that the photon noise needs no gain. Where EXPTIME or RDNOISE1 is missing,
    SKY_RMS stands for the noise of every pixel, and the photon noise of the sources is added if it is known.
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


def _robust(values: F32) -> tuple[float, float]:
    """Median and 1.4826 MAD of what is left after clipping at 4 sigma."""
    values = values.astype(np.float64)
    level = sigma = math.nan
    for _ in range(10):
        level = float(np.median(values)) if values.size else math.nan
        sigma = 1.4826 * float(np.median(np.abs(values - level))) if values.size else math.nan
        kept = values[np.abs(values - level) <= 4 * sigma]
        if kept.size == values.size or not kept.size:
            break
        values = kept
    return level, sigma
