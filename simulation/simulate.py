"""Simulate fields: draw the sky, expose every band, write Level-1 files and truth.

Field ``k`` depends only on the configuration, its seed and ``k``: not on the number of fields, of processes, or on the
order of the work.
"""

from __future__ import annotations

import concurrent.futures
import json
import logging
import multiprocessing
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from sgclassify.simulation.config import SimulationConfig
from sgclassify.simulation.exposure import Conditions, Exposure
from sgclassify.simulation.sky import SkyModel, Sources, draw_sources, truth_table
from sgclassify.simulation.write import write_table
from sgclassify.stages.bands import BANDS, PIXEL_SCALE
from sgclassify.stages.write.atomic import write_atomic_text

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FieldResult:
    """One simulated field: its number, folder, IMG files and truth table.

    Attributes
    ----------
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
    """Simulate one field, numbered from 0, in its own folder ``field_<number>``, unless it is there already."""
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
    """Draw again what one field was made of, without exposing anything: for comparison with the truth.

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
    config: SimulationConfig, out_dir: Path, processes: int = 1, progress: Callable[[FieldResult], None] | None = None
) -> list[FieldResult]:
    """Simulate all fields and write ``exposures.txt``, the list that ``sgclassify run`` reads.

    Fields that are there already, made with the same configuration, are kept. `progress` is called in this process
    after each field. The results are in order of the field's number.
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
            futures = [pool.submit(simulate_field, config, index, out_dir) for index in range(config.n_fields)]
            try:
                for future in concurrent.futures.as_completed(futures):
                    finished(future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    results.sort(key=lambda result: result.index)
    lines = [str(image.relative_to(out_dir)) for result in results for image in result.images]
    write_atomic_text("# one exposure a line\n" + "".join(f"{line}\n" for line in lines), out_dir / "exposures.txt")
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


def _draw_field(config: SimulationConfig, field_index: int) -> tuple[SkyModel, Sources, float, float, list[Exposure]]:
    sky_seed, *seeds = np.random.SeedSequence((config.seed, field_index)).spawn(
        1 + len(BANDS) * config.exposures_per_band
    )
    rng = np.random.default_rng(sky_seed)
    model = _draw_model(config, rng)
    sources = draw_sources(model, rng)
    roll, quality = float(rng.uniform(0.0, 360.0)), float(rng.uniform(*config.psf_quality))
    # Every band has its seeds whether it is observed or not: leaving one out changes no other.
    exposures = [
        Exposure(config, field_index, number, band, roll, quality, np.random.default_rng(seed))
        for number, seed in enumerate(seeds)
        if (band := BANDS[number % len(BANDS)]) in config.bands
    ]
    return model, sources, roll, quality, exposures


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
