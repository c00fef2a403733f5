"""One exposure of a field: its conditions are drawn, its files are written."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from astropy.io import fits
from astropy.wcs import WCS

from sgclassify.simulation import sextractor
from sgclassify.simulation.camera import CHIPS_OF_BAND, Pointing, jacobian, shifted, wcs_header
from sgclassify.simulation.catalog import make_catalog
from sgclassify.simulation.config import SimulationConfig
from sgclassify.simulation.detector import DetectorModel, Level1, expose
from sgclassify.simulation.filters import FILTERS
from sgclassify.simulation.psf import PsfField, draw_psf
from sgclassify.simulation.render import render, scene
from sgclassify.simulation.sky import SkyModel, Sources
from sgclassify.simulation.write import ExposureLabels, start_of, write_exposure, write_table
from sgclassify.stages.config import StageConfig
from sgclassify.stages.detect import Calibration


@dataclass(frozen=True, slots=True)
class Conditions:
    """How one exposure was taken.

    Attributes
    ----------
    band : str
    pointing : Pointing
        Where the detector looked.
    true_header, header : astropy.io.fits.Header
        World coordinates: the true ones, and those that the image claims.
    detector : DetectorModel
        The detector.
    zero_point, claimed_zero_point : float
        AB magnitude of 1 e-/s: the true one, and the one in the header.
    sky : float
        Sky background, e-/s per pixel.
    noise : float
        Standard deviation of the noise of an empty pixel, e-/s.
    psf : PsfField
        Point-spread function.
    """

    band: str
    pointing: Pointing
    true_header: fits.Header
    header: fits.Header
    detector: DetectorModel
    zero_point: float
    claimed_zero_point: float
    sky: float
    noise: float
    psf: PsfField


@dataclass(frozen=True, slots=True)
class Exposure:
    """One exposure that is still to be taken. Its draws come from ``rng``, so it can be taken only once.

    Attributes
    ----------
    config : SimulationConfig
    field_index, number : int
        Number of the field, and of the exposure within it.
    band : str
    roll : float
        Rotation of the field, degrees.
    quality : float
        Width of the PSF, 0 to 1, see `SimulationConfig.psf_quality`.
    rng : numpy.random.Generator
    """

    config: SimulationConfig
    field_index: int
    number: int
    band: str
    roll: float
    quality: float
    rng: np.random.Generator

    def conditions(self, model: SkyModel) -> Conditions:
        """Draw the conditions; the order of the draws is part of the fields."""
        config, rng = self.config, self.rng
        pointing = self._pointing(model)
        true_header = wcs_header(pointing)
        header = self._claimed(true_header)
        detector = self._detector()
        spec = FILTERS[self.band]
        zero_point = spec.zero_point + float(rng.uniform(-1, 1)) * config.zero_point_scatter
        claimed_zero_point = zero_point + float(rng.normal()) * config.zero_point_error
        sky = spec.sky * float(rng.uniform(*config.sky_scale))
        variance = (sky + detector.dark) * detector.exposure_time + detector.read_noise**2
        noise = float(np.sqrt(variance) / detector.exposure_time)
        drawn = draw_psf(self.band, config.psf_families, self.quality, config.psf_nodes, rng)
        psf = PsfField(drawn.strained(config.psf_strain), config.detector_shape)
        return Conditions(
            self.band, pointing, true_header, header, detector, zero_point, claimed_zero_point, sky, noise, psf
        )  # fmt: skip

    def make(self, sources: Sources, model: SkyModel, folder: Path) -> Path:
        """Draw the conditions, expose, and write the files; returns the IMG file."""
        config, rng, shape = self.config, self.rng, self.config.detector_shape
        taken = self.conditions(model)
        detector, wcs = taken.detector, WCS(taken.true_header)
        x, y = wcs.all_world2pix(sources.ra, sources.dec, 0) if len(sources) else (sources.ra, sources.dec)
        scale = jacobian(wcs, shape)
        placed = scene(sources, self.band, np.asarray(x), np.asarray(y), taken.zero_point, scale)
        level1 = expose(render(placed, taken.psf, shape, taken.noise), taken.sky, detector, rng)
        fwhm_px = taken.psf.fwhm_px()
        labels = ExposureLabels(
            obsid=f"{10_800_000_000 + self.field_index * 1000 + self.number}",
            chip=taken.pointing.chip,
            band=self.band,
            start=start_of(self.field_index * 1000 + self.number),
            zero_point=taken.claimed_zero_point,
            sky_level=taken.sky,
            sky_rms=taken.noise,
            fwhm_px=fwhm_px * (1 + float(rng.normal()) * config.fwhm_error),
            compressed=bool(rng.random() < config.compressed_share),
            variant=bool(rng.random() < config.variant_share),
        )
        if rng.random() < config.no_fwhm_share:
            labels = replace(labels, fwhm_px=float("nan"))
        catalog, extracted = self._catalogs(level1, taken, fwhm_px)
        if extracted is not None and config.sextractor_columns:
            stem = labels.file_name("IMG").split(".")[0]
            write_table(folder / f"{stem}.sextractor.parquet", extracted)
        return write_exposure(folder, labels, level1, catalog, taken.header, detector)

    def _catalogs(self, level1: Level1, taken: Conditions, fwhm_px: float) -> tuple[pa.Table | None, pa.Table | None]:
        """The table of the CAT file, and SExtractor's measurements; None for what is not asked for."""
        config = self.config
        threshold = float(self.rng.uniform(*config.detection_sigma))
        calibration = Calibration(WCS(taken.header), taken.claimed_zero_point, fwhm_px, taken.detector.exposure_time)
        by_sextractor = config.catalogs and config.catalog_program == "sextractor"
        extracted = None
        if config.sextractor_columns or by_sextractor:
            saturate, with_psf = taken.detector.saturate, config.sextractor_columns
            extracted = sextractor.extract(level1, taken.header, calibration, saturate, threshold, with_psf)
        if config.catalogs and not by_sextractor:
            own = StageConfig(detect_threshold_sigma=threshold)
            return make_catalog(level1, calibration, own), extracted
        return extracted if by_sextractor else None, extracted

    def _pointing(self, model: SkyModel) -> Pointing:
        config, rng = self.config, self.rng
        east, north = rng.uniform(-1.0, 1.0, 2) * config.dither_arcsec / 3600.0
        return Pointing(
            chip=int(rng.choice(CHIPS_OF_BAND[self.band])),
            shape=config.detector_shape,
            ra=(model.ra + float(east) / np.cos(np.radians(model.dec))) % 360.0,
            dec=model.dec + float(north),
            # All exposures of a field cover the same square of the sky, some upside down.
            roll_deg=(self.roll + float(rng.choice([0.0, 180.0])) + float(rng.uniform(-1.0, 1.0))) % 360.0,
            mirrored=bool(rng.random() < config.mirrored_share),
            distortion=float(rng.uniform(5e-4, 2e-3)) if rng.random() < config.distortion_share else 0.0,
        )

    def _claimed(self, header: fits.Header) -> fits.Header:
        size, angle = self.rng.uniform(*self.config.astrometric_error), self.rng.uniform(0.0, 2 * np.pi)
        return shifted(header, float(size * np.cos(angle)), float(size * np.sin(angle)))

    def _detector(self) -> DetectorModel:
        values = asdict(self.config.detector)
        values["read_noise"] = float(self.rng.uniform(*self.config.read_noise))
        values["exposure_time"] = float(self.rng.uniform(*self.config.exposure_time))
        values["cosmic_rays_flagged"] = float(self.rng.uniform(*self.config.cosmic_rays_flagged))
        values["satellite"] = bool(self.rng.random() < self.config.satellite_share)
        return DetectorModel(**values)
