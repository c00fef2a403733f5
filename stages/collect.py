"""Collect the stamps of one tile's objects from the exposures, band by band."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt

from sgclassify.stages.arrays import F32, F64, I64, U16, Bool
from sgclassify.stages.bands import BAND_INDEX, BANDS, nanomaggies_per_count
from sgclassify.stages.config import StageConfig
from sgclassify.stages.features import FEATURES, PSF_MEASURES
from sgclassify.stages.flags import InputFlag, SgFlag
from sgclassify.stages.measure import CHUNK, Measured, StampLocus, Stamps, feature_table, measure_stamps
from sgclassify.stages.read.header import ExposureHeader
from sgclassify.stages.read.prepared import PreparedExposure
from sgclassify.stages.read.stored import Pixels
from sgclassify.stages.sky import SkyMesh
from sgclassify.stages.stamps import Boxes, cut_stamps, stamp_origin

CORE_BITS = (
    (InputFlag.SATURATED, SgFlag.SATURATED),
    (InputFlag.COSMIC_RAY, SgFlag.COSMIC_RAY),
    (InputFlag.SATELLITE | InputFlag.GHOST | InputFlag.SCATTERED, SgFlag.ARTIFACT),
)

STRIP_ROWS: Final = 1024
"""Rows of an exposure whose stamps are cut together: more take more memory, and no less time."""


@dataclass
class BandStamps:
    """Best stamp of each object in each band, filled exposure by exposure; ``size``: side of the stamps, pixels."""

    n_objects: int
    size: int
    image: F32 = field(init=False)
    valid: Bool = field(init=False)
    sigma: F32 = field(init=False)
    exposure: I64 = field(init=False)
    psf: F32 = field(init=False)
    _saturated: Bool = field(init=False)
    _weight: F64 = field(init=False)
    _x: F64 = field(init=False)
    _y: F64 = field(init=False)
    _first: F64 = field(init=False)
    _flags: npt.NDArray[np.int32] = field(init=False)

    def __post_init__(self) -> None:
        shape = (self.n_objects, len(BANDS))
        stamp = (*shape, self.size, self.size)
        self.image = np.zeros(stamp, dtype=np.float32)
        self.valid = np.zeros(stamp, dtype=bool)
        self.psf = np.zeros(stamp, dtype=np.float32)
        self._saturated = np.zeros(stamp, dtype=bool)
        self._first = np.zeros((*shape, 2), dtype=np.float64)
        self.sigma = np.ones(shape, dtype=np.float32)
        self.exposure = np.full(shape, -1, dtype=np.int64)
        self._weight = np.zeros(shape, dtype=np.float64)
        self._x = np.zeros(shape, dtype=np.float64)
        self._y = np.zeros(shape, dtype=np.float64)
        self._flags = np.zeros(shape, dtype=np.int32)

    @property
    def used(self) -> Bool:
        """Bands of each object that have a stamp with enough valid pixels, shape (n, 7)."""
        return np.asarray(self.exposure >= 0)

    def add_exposure(self, prepared: PreparedExposure, number: int, x: F64, y: F64, config: StageConfig) -> None:
        """Cut the stamps of one exposure and keep those that are better than the stamps so far.

        The better stamp has the larger sum of inverse variance over its core. Of two equal ones the first stays.

        Parameters
        ----------
        number : int
            Number by which the exposure is remembered.
        x, y : ndarray of float64, shape (n,)
            Positions of all objects on its detector, 0-based pixels; not finite where an object has none.
        """
        ny, nx = prepared.header.shape
        margin = config.position_margin_px
        on_detector = (x > -0.5 - margin) & (x < nx - 0.5 + margin) & (y > -0.5 - margin) & (y < ny - 0.5 + margin)
        index = np.flatnonzero(on_detector)
        if not index.size:
            return
        sky, first_y = prepared.sky(), stamp_origin(y, self.size)
        with prepared.pixels() as pixels:
            for strip in _strips(index, first_y):
                found = _cut(pixels, sky, prepared.header, x[strip], y[strip], self.size)
                self._keep_better(found, strip, number, prepared.header, config)

    def _keep_better(self, cut: _Cut, index: I64, number: int, header: ExposureHeader, config: StageConfig) -> None:
        """Keep those stamps of one exposure, of the objects ``index``, that are better than theirs so far."""
        box = Boxes(cut.x, cut.y, config.core_radius_px, self.size)
        core = box.r2 <= config.core_radius_px**2
        share = (core & box.cut(cut.valid)).sum(axis=(1, 2)) / np.maximum(core.sum(axis=(1, 2)), 1)
        weight = np.where(share >= config.min_valid_core, share / cut.sigma.astype(np.float64) ** 2, 0.0)
        band = BAND_INDEX[header.band]
        better = weight > self._weight[index, band]

        bits = np.bitwise_or.reduce(np.where(core, box.cut(cut.bits), 0), axis=(1, 2))
        flags = np.zeros(index.size, dtype=np.int32)
        flags[~cut.whole] |= int(SgFlag.EDGE)
        flags[share < 1.0] |= int(SgFlag.MASKED)
        for mask, flag in CORE_BITS:
            flags[(bits & int(mask)) != 0] |= int(flag)
        if header.files.weight is None:
            flags |= int(SgFlag.NO_WEIGHT)
        if header.files.flag is None:
            flags |= int(SgFlag.NO_FLAG_IMAGE)

        place = index[better], band
        self.image[place] = cut.image[better]
        self.valid[place] = cut.valid[better]
        self._saturated[place] = (cut.bits[better] & int(InputFlag.SATURATED)) != 0
        self.sigma[place] = cut.sigma[better]
        self.exposure[place] = number
        self._weight[place] = weight[better]
        self._x[place], self._y[place] = cut.x[better], cut.y[better]
        self._first[place] = cut.first[better]
        self._flags[place] = flags[better]

    def flags(self) -> npt.NDArray[np.int32]:
        """Quality bits of each object over the bands it uses, shape (n,)."""
        flags = np.asarray(np.bitwise_or.reduce(self._flags, axis=1), dtype=np.int32)
        count = self.used.sum(axis=1)
        flags[count < 3] |= int(SgFlag.FEW_BANDS)
        flags[count == 0] |= int(SgFlag.NOT_SCORED)
        return flags

    def measure(self, exposures: Sequence[PreparedExposure], detected: Bool, config: StageConfig) -> F32:
        """Catalogue sequence of every object, shape (n, 7, n_features); NaN for an absent band. Fills `psf` too.

        Parameters
        ----------
        exposures : sequence of PreparedExposure
            Indexed by the numbers given to `add_exposure`.
        detected : ndarray of bool, shape (n, 7)
            Bands in which the object has a detection.
        """
        features = np.full((self.n_objects, len(BANDS), len(FEATURES)), np.nan, dtype=np.float32)
        stars = np.array([e.psf.n_stars for e in exposures], dtype=np.float64)
        fwhm = np.array([e.header.fwhm_px for e in exposures], dtype=np.float64)
        # photons: the variance of a pixel grows with its flux by one electron's worth
        shot = np.array([nanomaggies_per_count(e.header.zero_point) / e.header.exposure_time for e in exposures])
        locus = {name: np.array([e.psf.measures[name] for e in exposures]) for name in PSF_MEASURES}
        # stamps of one exposure follow each other, as they share a PSF
        order = np.argsort(self.exposure, axis=None, kind="stable")[np.count_nonzero(self.exposure < 0) :]
        for start in range(0, order.size, CHUNK):
            place = np.unravel_index(order[start : start + CHUNK], self.exposure.shape)
            image, valid, sigma = self.image[place], self.valid[place], self.sigma[place]
            saturated, x, y = self._saturated[place], self._x[place], self._y[place]
            measured = measure_stamps(image, valid, saturated, sigma, x, y, config.core_radius_px)
            source = self.exposure[place]
            psf = self._psf(measured, source, self._first[place], exposures)
            self.psf[place] = psf
            measures = {name: values[source] for name, values in locus.items()}
            features[place] = feature_table(
                measured,
                detected[place],
                Stamps(image, valid, sigma, psf, shot[source]),
                StampLocus(measures, stars[source], fwhm[source]),
            )
        return features

    def _psf(self, measured: Measured, source: I64, first: F64, exposures: Sequence[PreparedExposure]) -> F32:
        """PSF at the places of sources, each on the exposure of its stamp."""
        psf = np.empty((source.size, self.size, self.size), dtype=np.float32)
        for number in np.unique(source):
            own = source == number
            x, y = measured.x[own], measured.y[own]
            at = first[own, 0] + x, first[own, 1] + y
            psf[own] = exposures[number].psf_model.stamps(x, y, *at, self.size)
        return psf


@dataclass(frozen=True)
class _Cut:
    """Stamps of n objects on one exposure.

    Attributes
    ----------
    image : ndarray of float32, shape (n, size, size)
        Sky-subtracted pixels, nanomaggies, [object, y, x]; 0 where not valid.
    valid : ndarray of bool, shape (n, size, size)
        Pixels that are data.
    bits : ndarray of uint16, shape (n, size, size)
        Bits of `sgclassify.stages.flags.InputFlag`; 0 outside the detector.
    sigma : ndarray of float32, shape (n,)
        Noise of the pixel nearest to the object; 1 where unknown.
    x, y : ndarray of float64, shape (n,)
        Places in the stamps, 0-based pixels.
    first : ndarray of int64, shape (n, 2)
        First pixel of each stamp on the detector, x and y.
    whole : ndarray of bool, shape (n,)
        Whether all pixels of the stamp are on the detector.
    """

    image: F32
    valid: Bool
    bits: U16
    sigma: F32
    x: F64
    y: F64
    first: I64
    whole: Bool


def _strips(index: I64, first_y: I64) -> Iterator[I64]:
    """Objects whose stamps begin in the same `STRIP_ROWS` rows, strip by strip; ``index``: those to take."""
    strip = first_y[index] // STRIP_ROWS
    order = np.argsort(strip, kind="stable")
    yield from np.split(index[order], np.flatnonzero(np.diff(strip[order])) + 1)


def _cut(pixels: Pixels, sky: SkyMesh, header: ExposureHeader, x: F64, y: F64, size: int) -> _Cut:
    """Cut the stamps of some objects, at least one, from an exposure.

    Parameters
    ----------
    x, y : ndarray of float64, shape (n,)
        Positions on the detector, 0-based pixels, finite.
    """
    ny, nx = header.shape
    first_x, first_y = stamp_origin(x, size), stamp_origin(y, size)
    x0, x1 = max(0, int(first_x.min())), min(nx, int(first_x.max()) + size)
    y0, y1 = max(0, int(first_y.min())), min(ny, int(first_y.max()) + size)
    window = pixels.window(y0, y1, x0, x1)
    at = (x - x0, y - y0, size)
    scale = np.float32(nanomaggies_per_count(header.zero_point))
    image = (cut_stamps(window.image, *at)[0] - sky.level_of_stamps(first_y, first_x, size)) * scale
    valid = cut_stamps(window.valid, *at, fill=False)[0]
    valid &= np.isfinite(image)
    if not (sky.sigma > 0).all():
        # a box without any noise holds no data
        valid &= sky.noise_of_stamps(first_y, first_x, size) > 0
    np.copyto(image, np.float32(0), where=~valid)
    noise = sky.noise_near(x, y)
    return _Cut(
        image=image,
        valid=valid,
        bits=cut_stamps(window.flags, *at)[0],
        sigma=np.where(noise > 0, noise * scale, np.float32(1.0)),
        x=x - first_x,
        y=y - first_y,
        first=np.stack([first_x, first_y], axis=1),
        whole=(first_x >= 0) & (first_x <= nx - size) & (first_y >= 0) & (first_y <= ny - size),
    )
