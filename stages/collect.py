"""Collect the stamps of one tile's objects from the exposures, band by band."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from sgclassify.stages.arrays import F32, F64, I64, Bool
from sgclassify.stages.bands import BAND_INDEX, BANDS, nanomaggies_per_count
from sgclassify.stages.config import StageConfig
from sgclassify.stages.features import FEATURES, PSF_MEASURES
from sgclassify.stages.flags import InputFlag, SgFlag
from sgclassify.stages.measure import StampLocus, Stamps, feature_table, measure_stamps
from sgclassify.stages.read.prepared import PreparedExposure
from sgclassify.stages.stamps import cut_sources, squared_radius, stamp_origin

CORE_BITS = (
    (InputFlag.SATURATED, SgFlag.SATURATED),
    (InputFlag.COSMIC_RAY, SgFlag.COSMIC_RAY),
    (InputFlag.SATELLITE | InputFlag.GHOST | InputFlag.SCATTERED, SgFlag.ARTIFACT),
)


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
        x, y = x[index], y[index]
        first_x, first_y = stamp_origin(x, self.size), stamp_origin(y, self.size)
        x0, x1 = max(0, int(first_x.min())), min(nx, int(first_x.max()) + self.size)
        y0, y1 = max(0, int(first_y.min())), min(ny, int(first_y.max()) + self.size)
        with prepared.pixels() as pixels:
            window = pixels.window(y0, y1, x0, x1)
        level, noise = prepared.sky().at(y0, y1, x0, x1)
        scale = nanomaggies_per_count(prepared.header.zero_point)
        data = (window.image - level) * np.float32(scale)
        good = window.valid & np.isfinite(data) & (noise > 0)

        cut = cut_sources(window, data, good, noise, x, y, self.size)
        image, valid, bits = cut.image, cut.valid, cut.flags
        sigma = np.where(cut.noise > 0, cut.noise * np.float32(scale), np.float32(1.0))

        core = squared_radius(x - first_x, y - first_y, self.size) <= config.core_radius_px**2
        share = (core & valid).sum(axis=(1, 2)) / np.maximum(core.sum(axis=(1, 2)), 1)
        weight = np.where(share >= config.min_valid_core, share / sigma.astype(np.float64) ** 2, 0.0)
        band = BAND_INDEX[prepared.header.band]
        better = weight > self._weight[index, band]
        chosen = index[better]

        flags = np.zeros(index.size, dtype=np.int32)
        flags[~cut.inside.all(axis=(1, 2))] |= int(SgFlag.EDGE)
        flags[share < 1.0] |= int(SgFlag.MASKED)
        for mask, flag in CORE_BITS:
            flags[(core & ((bits & int(mask)) != 0)).any(axis=(1, 2))] |= int(flag)
        if prepared.header.files.weight is None:
            flags |= int(SgFlag.NO_WEIGHT)
        if prepared.header.files.flag is None:
            flags |= int(SgFlag.NO_FLAG_IMAGE)

        self.image[chosen, band] = np.where(valid[better], image[better], 0.0)
        self.valid[chosen, band] = valid[better]
        self._saturated[chosen, band] = (bits[better] & int(InputFlag.SATURATED)) != 0
        self.sigma[chosen, band] = sigma[better]
        self.exposure[chosen, band] = number
        self._weight[chosen, band] = weight[better]
        self._x[chosen, band] = (x - first_x)[better]
        self._y[chosen, band] = (y - first_y)[better]
        self._first[chosen, band] = np.stack([first_x, first_y], axis=1)[better]
        self._flags[chosen, band] = flags[better]

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
        for band in range(len(BANDS)):
            index = np.flatnonzero(self.exposure[:, band] >= 0)
            if not index.size:
                continue
            valid, sigma = self.valid[index, band], self.sigma[index, band]
            measured = measure_stamps(
                self.image[index, band],
                valid,
                self._saturated[index, band],
                sigma,
                self._x[index, band],
                self._y[index, band],
                config.core_radius_px,
            )
            source = self.exposure[index, band]
            corner = self._first[index, band]
            for number in np.unique(source):
                own = source == number
                x, y = measured.x[own], measured.y[own]
                place = corner[own] + np.stack([x, y], axis=1)
                model = exposures[number].psf_model
                self.psf[index[own], band] = model.stamps(x, y, place[:, 0], place[:, 1], self.size)
            stamps = Stamps(self.image[index, band], valid, sigma, self.psf[index, band], shot[source])
            measures = {name: values[source] for name, values in locus.items()}
            features[index, band] = feature_table(
                measured, detected[index, band], stamps, StampLocus(measures, stars[source], fwhm[source])
            )
        return features
