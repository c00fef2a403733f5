"""Pixels of an exposure: image, weight and flags. Reads them in windows, and checks them all."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
import numpy.typing as npt

from sgclassify.stages.arrays import F32, U16, Bool
from sgclassify.stages.errors import UnusableInputError
from sgclassify.stages.flags import InputFlag
from sgclassify.stages.read.fitsfile import RECOPY, verify
from sgclassify.stages.read.header import ExposureHeader
from sgclassify.stages.read.image import ImageReader, open_image

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


@dataclass(slots=True)
class PixelWindow:
    """Pixels of one exposure in a rectangle of its detector; all arrays are [y, x].

    Attributes
    ----------
    image : float32 array
        e-/s, sky not subtracted; NaN where the file has no value.
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
        """Pixels with data, [y, x]: weight > 0, finite, and no flag except ghost or scattered light."""
        masking = np.uint16(0xFFFF & ~HARMLESS)
        good: Bool = (self.weight > 0) & np.isfinite(self.image) & ((self.flags & masking) == 0)
        return good


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

    Nothing is mapped into memory, and no whole image is held: a window costs only its own rows. (A .gz file also
    costs a decompressed copy in the temporary folder.)

    Parameters
    ----------
    header : ExposureHeader
        The exposure.

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

    def __init__(self, header: ExposureHeader) -> None:
        self.header = header
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

    def window(self, y0: int, y1: int, x0: int, x1: int) -> PixelWindow:
        """Read the pixels [y0:y1, x0:x1], a 0-based range; in native byte order, owned by the caller.

        Raises
        ------
        ValueError
            If the range is empty or goes beyond the edge of the detector.
        UnusableInputError
            If the data cannot be decoded.
        """
        ny, nx = self.header.shape
        if not (0 <= y0 < y1 <= ny and 0 <= x0 < x1 <= nx):
            raise ValueError(f"window [{y0}:{y1}, {x0}:{x1}] is empty or not within {ny} x {nx} (rows x columns)")
        if self._image is None:
            raise ValueError("ExposurePixels is used outside its with block")
        image = _as_float32(self._image.read(y0, y1, x0, x1))
        if self._weight is None:
            weight = _noise_weight(image, self.header)
        else:
            weight = _as_float32(self._weight.read(y0, y1, x0, x1))
            self._mask_dead(weight, image, self._weight, self._weight.step(y0, y1, x0, x1))
        if self._flag is None:
            flags = np.zeros(image.shape, dtype=np.uint16)
            if math.isfinite(self.header.saturate):
                flags[image >= self.header.saturate] = InputFlag.SATURATED
        else:
            flags = _as_flags(self._flag.read(y0, y1, x0, x1))
        return PixelWindow(image, weight, flags, x0=x0, y0=y0)

    def _mask_dead(self, weight: F32, image: F32, reader: ImageReader, step: npt.NDArray[np.float64] | float) -> None:
        """Set the weight of unusable pixels to 0, also where quantisation of WHT has moved a 0.

        The weight of a bright pixel may be less than a step because of its own light, and then looks like a moved 0.
        Only FLG can tell the two apart.
        """
        near = HALF_STEP * step
        dead = ~(np.isfinite(weight) & (weight > near))
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
        weight[dead] = 0

    def _open(self, stack: ExitStack, path: Path, kind: str) -> ImageReader:
        reader = open_image(stack, path)
        if reader.shape != self.header.shape:
            raise UnusableInputError(path, f"its image changed its shape to {reader.shape}", RECOPY)
        loss = _loss(kind, reader)
        if loss:
            advice = f"compress {kind} without loss: " + (
                "integers by RICE_1 or GZIP_2" if kind == "FLG" else "HCOMPRESS_1 with SCALE 0, or RICE_1"
            )
            raise UnusableInputError(path, f"{kind} is {loss}", advice)
        return reader


def check_exposure(header: ExposureHeader) -> ExposureCheck:
    """Read every byte of an exposure once, and refuse an exposure that is damaged or empty.

    Raises
    ------
    UnusableInputError
        If a file is truncated, a CHECKSUM or DATASUM does not match, data cannot be decoded, IMG is all NaN, WHT is
        all zero, or no pixel is valid.
    """
    files = header.files
    sha256 = {str(path): verify(path) for path in files.present.values()}
    ny, nx = header.shape
    finite = weighted = valid_pixels = 0
    with ExposurePixels(header) as pixels:
        for y0 in range(0, ny, CHECK_ROWS):
            window = pixels.window(y0, min(y0 + CHECK_ROWS, ny), 0, nx)
            finite += int(np.isfinite(window.image).sum())
            weighted += int((window.weight > 0).sum())
            valid_pixels += int(window.valid.sum())
    if not finite:
        raise UnusableInputError(files.image, "every pixel of IMG is nan", "process the exposure again")
    if pixels.unresolved > MAX_UNRESOLVED * ny * nx:
        share = 100.0 * pixels.unresolved / (ny * nx)
        fault = f"WHT is quantised too coarsely: {share:.0f} percent of its weights are less than a step"
        raise UnusableInputError(files.weight or files.image, fault, "compress WHT again, without loss")
    if not weighted:
        lost = ", or lost in the steps of its quantisation" if pixels.moved_zeros else ""
        fault = "every weight is zero" + lost
        raise UnusableInputError(files.weight or files.image, fault, "process the exposure again")
    if not valid_pixels:
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


def _as_float32(values: npt.NDArray[Any]) -> F32:
    with np.errstate(over="ignore"):  # values beyond float32 become infinite, and so not valid
        return np.array(values, dtype=np.float32, order="C")


def _as_flags(values: npt.NDArray[Any]) -> U16:
    """FLG as a bit mask; a value that is not a uint16 gets a bit that masks the pixel."""
    if values.dtype == np.uint16:
        return np.array(values, dtype=np.uint16)
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
