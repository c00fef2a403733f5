"""Simulate fields: draw the sky, expose every band, write Level-1 files and truth.

Field ``k`` depends on the configuration, its seed and ``k`` alone: not on how many fields are made, by how
many processes, or in which order.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
import logging
import multiprocessing
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS

from sgclassify.simulation import sextractor
from sgclassify.simulation.camera import CHIPS_OF_BAND, REAL_SHAPE, Pointing, jacobian, shifted, wcs_header
from sgclassify.simulation.catalog import make_catalog
from sgclassify.simulation.detector import DetectorModel, expose
from sgclassify.simulation.filters import ALL_PSF_FAMILIES, FILTERS, PSF_FAMILIES
from sgclassify.simulation.psf import PsfField, draw_psf
from sgclassify.simulation.render import render, scene
from sgclassify.simulation.sky import COMPACT_SHARE, SkyModel, Sources, draw_sources, truth_table
from sgclassify.simulation.write import ExposureLabels, start_of, write_exposure, write_table
from sgclassify.stages.bands import BANDS, PIXEL_SCALE
from sgclassify.stages.config import StageConfig
from sgclassify.stages.detect import Calibration
from sgclassify.stages.write.atomic import write_atomic_text

log = logging.getLogger(__name__)

Span = tuple[float, float]


@dataclass(frozen=True)
class SimulationConfig:
    """What to simulate. A pair of numbers is a range from which a value is drawn evenly.

    Attributes
    ----------
    seed : int
        Seed of everything.
    n_fields : int
        Number of fields.
    detector_shape : tuple of int
        (ny, nx) of a detector, pixels.
    bands : tuple of str
        Bands observed.
    exposures_per_band : int
        Exposures of each band in each field.
    mag_limit_i : float
        Faintest source drawn, AB mag in i.
    star_fraction : pair of float
        Stars / (stars + galaxies) to i = 25.5; drawn for each field.
    binary_fraction, quasar_fraction : pair of float
        Close binaries among stars; quasars among all sources; drawn for each field.
    ebv : pair of float
        Foreground reddening E(B-V), mag; drawn for each field.
    dec_range : pair of float
        Declinations of the fields, degrees.
    density : pair of float
        Galaxies in units of the mean counts; drawn for each field.
    compact_share : pair of float
        Range of the share of galaxies with a half-light radius below 0.08 arcsec.
    exposure_time : pair of float
        Seconds; drawn for each exposure.
    sky_scale : pair of float
        Sky background in units of the dark sky; drawn for each exposure.
    psf_families : tuple of str
        Kinds of PSF; one is drawn for each exposure.
    psf_quality : pair of float
        0 is the sharpest PSF (FWHM 1.8 pixels), 1 the widest (2.8); drawn for each field.
    psf_nodes : int
        Nodes of the PSF along each axis of a detector.
    psf_strain : float
        Aberrations, shears and their changes over the detector in units of the usual ones, see
        `sgclassify.simulation.psf.PsfModel.strained`.
    read_noise : pair of float
        Electrons; drawn for each exposure.
    zero_point_scatter : float
        Largest departure of an exposure's zero point from the nominal one, mag; the header tells the true
        one.
    fwhm_error : float
        Standard deviation of the relative error of the FWHM in the header.
    no_fwhm_share : float
        Share of the exposures whose header has no FWHM.
    cosmic_rays_flagged : pair of float
        Share of the cosmic rays that the flag image knows; drawn for each exposure.
    zero_point_error : float
        Standard deviation of the error of the zero point in the header, mag.
    astrometric_error : pair of float
        Error of the WCS in the header, arcsec; drawn for each exposure.
    dither_arcsec : float
        Largest offset of an exposure from the centre of its field along each axis.
    distortion_share, mirrored_share, compressed_share, variant_share, satellite_share : float
        Share of the exposures with a distorted (TPV) WCS, with an image of the other parity, with
        tile-compressed images, with the older names and keywords, with a satellite trail.
    detection_sigma : pair of float
        Detection threshold of the CAT files, in standard deviations of the smoothed image; drawn for each
        exposure.
    catalogs : bool
        Whether CAT files are written.
    catalog_program : str
        ``"photutils"`` (the stage's own detection) or ``"sextractor"``: what makes the CAT files.
    sextractor_columns : bool
        Whether ``<IMG stem>.sextractor.parquet``, SExtractor's and PSFEx's measurements, is written beside each IMG.
    detector : DetectorModel
        The detector.
    """

    seed: int = 1
    n_fields: int = 1
    detector_shape: tuple[int, int] = (1024, 1024)
    bands: tuple[str, ...] = BANDS
    exposures_per_band: int = 1
    mag_limit_i: float = 27.0
    star_fraction: Span = (0.05, 0.5)
    binary_fraction: Span = (0.05, 0.10)
    quasar_fraction: Span = (0.005, 0.01)
    ebv: Span = (0.0, 0.1)
    dec_range: Span = (-75.0, 75.0)
    density: Span = (1.0, 1.0)
    compact_share: Span = COMPACT_SHARE
    exposure_time: Span = (150.0, 150.0)
    sky_scale: Span = (1.0, 1.9)
    psf_families: tuple[str, ...] = PSF_FAMILIES
    psf_quality: Span = (0.0, 1.0)
    psf_nodes: int = 3
    psf_strain: float = 1.0
    read_noise: Span = (4.7, 5.5)
    zero_point_scatter: float = 0.1
    zero_point_error: float = 0.01
    fwhm_error: float = 0.03
    no_fwhm_share: float = 0.0
    cosmic_rays_flagged: Span = (0.97, 0.97)
    astrometric_error: Span = (0.01, 0.03)
    dither_arcsec: float = 4.0
    distortion_share: float = 0.25
    mirrored_share: float = 0.1
    compressed_share: float = 0.0
    variant_share: float = 0.0
    satellite_share: float = 0.03
    detection_sigma: Span = (2.7, 3.5)
    catalogs: bool = True
    catalog_program: str = "photutils"
    sextractor_columns: bool = False
    detector: DetectorModel = field(default_factory=DetectorModel)

    def __post_init__(self) -> None:
        unknown = [band for band in self.bands if band not in FILTERS]
        if unknown or not self.bands:
            raise ValueError(f"bands must be some of {', '.join(BANDS)}, not {', '.join(unknown) or 'none'}")
        families = [name for name in self.psf_families if name not in ALL_PSF_FAMILIES]
        if families or not self.psf_families:
            raise ValueError(f"PSF families must be some of {', '.join(ALL_PSF_FAMILIES)}")
        if self.catalog_program not in ("photutils", "sextractor"):
            raise ValueError(f"catalog_program must be photutils or sextractor, not {self.catalog_program}")
        if min(self.detector_shape) < 16 or any(
            a > b for a, b in zip(self.detector_shape, REAL_SHAPE, strict=True)
        ):
            raise ValueError(f"a detector has from 16 x 16 to {REAL_SHAPE[1]} x {REAL_SHAPE[0]} pixels")
        if self.n_fields < 1 or self.exposures_per_band < 1 or self.seed < 0:
            raise ValueError("n_fields and exposures_per_band must be at least 1, seed at least 0")
        if not 0 <= self.star_fraction[0] <= self.star_fraction[1] < 1:
            raise ValueError(f"star_fraction must lie from 0 to below 1, not {self.star_fraction}")

    def digest(self) -> str:
        """Hexadecimal digest of all that a field depends on (all but the number of fields)."""
        values = asdict(self) | {"n_fields": 0}
        return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()


@dataclass(frozen=True, slots=True)
class FieldResult:
    """One simulated field.

    Attributes
    ----------
    index : int
        Number of the field.
    folder : Path
        Its folder.
    images : tuple of Path
        IMG files.
    truth : Path
        Truth table.
    n_sources : int
        Rows of the truth table.
    made : bool
        False if the field had been made before.
    """

    index: int
    folder: Path
    images: tuple[Path, ...]
    truth: Path
    n_sources: int
    made: bool = True


def simulate_field(config: SimulationConfig, field_index: int, out_dir: Path) -> FieldResult:
    """Simulate one field, unless it is there already.

    Parameters
    ----------
    config : SimulationConfig
        What to simulate.
    field_index : int
        Number of the field, from 0.
    out_dir : Path
        Folder in which the field gets its own folder ``field_<number>``.

    Returns
    -------
    FieldResult
    """
    folder = Path(out_dir) / f"field_{field_index:05d}"
    done = _finished(folder, config, field_index)
    if done is not None:
        return done
    folder.mkdir(parents=True, exist_ok=True)
    model, sources, roll, quality, exposures = _draw_field(config, field_index)
    truth = folder / "truth.parquet"
    write_table(truth, truth_table(sources, field_index))
    images = [exposure.make(sources, model, folder) for exposure in exposures]
    record = {
        "config": config.digest(), "field": field_index, "seed": config.seed, "n_sources": len(sources),
        "images": [path.name for path in images], "sky": asdict(model), "roll_deg": roll,
        "psf_quality": quality, "catalog_program": config.catalog_program,
    }  # fmt: skip
    write_atomic_text(json.dumps(record, indent=1) + "\n", folder / "field.json")
    return FieldResult(field_index, folder, tuple(images), truth, len(sources))


def replay(config: SimulationConfig, field_index: int) -> tuple[SkyModel, Sources, list[Conditions]]:
    """What one field was made of, drawn again without exposing anything: for those who may know the truth.

    Parameters
    ----------
    config : SimulationConfig
        What was simulated.
    field_index : int
        Number of the field, from 0.

    Returns
    -------
    model : SkyModel
    sources : Sources
        In the order of the truth table.
    conditions : list of Conditions
        Of every exposure, in the order of `FieldResult.images`.
    """
    model, sources, _, _, exposures = _draw_field(config, field_index)
    return model, sources, [exposure.conditions(model) for exposure in exposures]


def simulate(
    config: SimulationConfig,
    out_dir: Path,
    processes: int = 1,
    progress: Callable[[FieldResult], None] | None = None,
) -> list[FieldResult]:
    """Simulate all fields and write ``exposures.txt``, the list that ``sgclassify run`` reads.

    Parameters
    ----------
    config : SimulationConfig
        What to simulate.
    out_dir : Path
        Folder of the fields; fields that are there already, made with the same configuration, are kept.
    processes : int, optional
        Processes that work at the same time.
    progress : callable, optional
        Called in this process after each field.

    Returns
    -------
    list of FieldResult
        In order of the field's number.
    """
    out_dir = Path(out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    results: list[FieldResult] = []

    def finished(result: FieldResult) -> None:
        results.append(result)
        log.debug("field %d: %d sources, %d exposures", result.index, result.n_sources, len(result.images))
        if progress is not None:
            progress(result)

    if processes <= 1:
        for index in range(config.n_fields):
            finished(simulate_field(config, index, out_dir))
    else:
        # Not fork: the caller may hold threads (of torch, Dask, Arrow).
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(processes, mp_context=context) as pool:
            futures = [
                pool.submit(simulate_field, config, index, out_dir) for index in range(config.n_fields)
            ]
            try:
                for future in concurrent.futures.as_completed(futures):
                    finished(future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    results.sort(key=lambda result: result.index)
    lines = [str(image.relative_to(out_dir)) for result in results for image in result.images]
    write_atomic_text(
        "# one exposure a line\n" + "".join(f"{line}\n" for line in lines), out_dir / "exposures.txt"
    )
    return results


def _draw_model(config: SimulationConfig, rng: np.random.Generator) -> SkyModel:
    ny, nx = config.detector_shape
    low, high = np.sin(np.radians(config.dec_range))
    return SkyModel(
        ra=float(rng.uniform(0.0, 360.0)),
        dec=float(np.degrees(np.arcsin(rng.uniform(low, high)))),
        # The half diagonal of the detector, the dither, and what shines in from outside.
        radius_arcsec=float(np.hypot(ny, nx) / 2 * PIXEL_SCALE + np.sqrt(2) * config.dither_arcsec + 5.0),
        mag_limit_i=config.mag_limit_i,
        star_fraction=float(rng.uniform(*config.star_fraction)),
        binary_fraction=float(rng.uniform(*config.binary_fraction)),
        quasar_fraction=float(rng.uniform(*config.quasar_fraction)),
        ebv=float(rng.uniform(*config.ebv)),
        density=float(rng.uniform(*config.density)),
        compact_share=config.compact_share,
    )


def _draw_field(
    config: SimulationConfig, field_index: int
) -> tuple[SkyModel, Sources, float, float, list[_Exposure]]:
    sky_seed, *seeds = np.random.SeedSequence((config.seed, field_index)).spawn(
        1 + len(BANDS) * config.exposures_per_band
    )
    rng = np.random.default_rng(sky_seed)
    model = _draw_model(config, rng)
    sources = draw_sources(model, rng)
    roll, quality = float(rng.uniform(0.0, 360.0)), float(rng.uniform(*config.psf_quality))
    # Every band has its seeds whether it is observed or not: leaving one out changes no other.
    exposures = [
        _Exposure(config, field_index, number, band, roll, quality, np.random.default_rng(seed))
        for number, seed in enumerate(seeds)
        if (band := BANDS[number % len(BANDS)]) in config.bands
    ]
    return model, sources, roll, quality, exposures


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
class _Exposure:
    config: SimulationConfig
    field_index: int
    number: int
    band: str
    roll: float
    quality: float
    rng: np.random.Generator

    def conditions(self, model: SkyModel) -> Conditions:
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
        config, rng, shape = self.config, self.rng, self.config.detector_shape
        taken = self.conditions(model)
        detector, header, psf = taken.detector, taken.header, taken.psf
        zero_point, claimed_zero_point = taken.zero_point, taken.claimed_zero_point
        sky, noise, true_wcs = taken.sky, taken.noise, WCS(taken.true_header)

        x, y = (
            true_wcs.all_world2pix(sources.ra, sources.dec, 0) if len(sources) else (sources.ra, sources.dec)
        )
        placed = scene(
            sources, self.band, np.asarray(x), np.asarray(y), zero_point, jacobian(true_wcs, shape)
        )
        level1 = expose(render(placed, psf, shape, noise), sky, detector, rng)
        fwhm_px = psf.fwhm_px()
        labels = ExposureLabels(
            obsid=f"{10_800_000_000 + self.field_index * 1000 + self.number}",
            chip=taken.pointing.chip,
            band=self.band,
            start=start_of(self.field_index * 1000 + self.number),
            zero_point=claimed_zero_point,
            sky_level=sky,
            sky_rms=noise,
            fwhm_px=fwhm_px * (1 + float(rng.normal()) * config.fwhm_error),
            compressed=bool(rng.random() < config.compressed_share),
            variant=bool(rng.random() < config.variant_share),
        )
        if rng.random() < config.no_fwhm_share:
            labels = replace(labels, fwhm_px=float("nan"))
        threshold = float(rng.uniform(*config.detection_sigma))
        extracted = None
        if config.sextractor_columns or (config.catalogs and config.catalog_program == "sextractor"):
            extracted = sextractor.extract(
                level1, header, zero_point=claimed_zero_point, fwhm_px=fwhm_px,
                exposure_time=detector.exposure_time, saturate=detector.saturate, threshold=threshold,
                with_psf=config.sextractor_columns,
            )  # fmt: skip
        if extracted is not None and config.sextractor_columns:
            stem = labels.file_name("IMG").split(".")[0]
            write_table(folder / f"{stem}.sextractor.parquet", extracted)
        catalog = extracted if config.catalogs and config.catalog_program == "sextractor" else None
        if config.catalogs and catalog is None:
            calibration = Calibration(WCS(header), claimed_zero_point, fwhm_px, detector.exposure_time)
            catalog = make_catalog(level1, calibration, StageConfig(detect_threshold_sigma=threshold))
        return write_exposure(folder, labels, level1, catalog, header, detector)

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


def _finished(folder: Path, config: SimulationConfig, field_index: int) -> FieldResult | None:
    record = folder / "field.json"
    if not record.is_file():
        return None
    try:
        values = json.loads(record.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return None
    if values.get("config") != config.digest():
        raise ValueError(f"{folder} was made with another configuration: choose another folder, or remove it")
    images = tuple(folder / name for name in values["images"])
    truth = folder / "truth.parquet"
    if not all(path.is_file() for path in (*images, truth)):
        return None
    return FieldResult(field_index, folder, images, truth, int(values["n_sources"]), made=False)
