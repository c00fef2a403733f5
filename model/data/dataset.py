"""Make training data: simulate exposures, take them through the stages of a run, match the objects with truth.

One shard holds one field. Fields, never objects, are divided into training, validation, calibration and test.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from astropy.io import fits

from sgclassify.model.data.match import catalog_columns, match_truth, near_truth
from sgclassify.model.data.shards import PARTS, REAL, SPLITS, SPURIOUS, shard_path, true_classes, write_shard
from sgclassify.stages.bands import BANDS
from sgclassify.stages.columns import CLASSES
from sgclassify.stages.config import StageConfig
from sgclassify.stages.errors import UnusableInputError, UsageError
from sgclassify.stages.features import FEATURES
from sgclassify.stages.prepare import prepare_exposure
from sgclassify.stages.program import TRAINING_DATA, code_digest
from sgclassify.stages.read.exposure_list import parse_list
from sgclassify.stages.read.header import read_header
from sgclassify.stages.tile import TileStamps, extract_tile
from sgclassify.stages.tiling import tile_pad_arcsec, tiles_of_headers
from sgclassify.stages.write.atomic import write_atomic_bytes

if TYPE_CHECKING:
    from sgclassify.simulation.simulate import FieldResult

log = logging.getLogger(__name__)

TILE_ORDER = 10
TRUTH_COLUMNS = ("true_class", "redshift", "r50_arcsec", "sersic_n", *(f"mag_{band}" for band in BANDS))


def extract_field(
    list_path: Path,
    work_dir: Path,
    stamp_size: int,
    config: StageConfig,
    wanted: Callable[[Any, Any], npt.NDArray[np.bool_]] | None = None,
) -> list[TileStamps]:
    """Take the exposures of a list through the stages up to the stamps, without a cluster.

    ``wanted`` chooses the objects that are cut and measured, see `extract_tile`.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    listed = parse_list(list_path)
    if listed.problems:
        raise listed.problems[0]
    prepared = []
    for files in listed.files:
        try:
            prepared.append(prepare_exposure(read_header(files), work_dir, config))
        except UnusableInputError as error:
            # as in a run, the other exposures still count
            log.info("set aside: %s", error)
    by_id = {p.exposure_id: p for p in prepared}
    tiles = tiles_of_headers([p.header for p in prepared], TILE_ORDER, tile_pad_arcsec(config))
    return [extract_tile(t.order, t.pixel, [by_id[e] for e in t.exposures], stamp_size, config, wanted) for t in tiles]


def field_table(
    field: int, tiles: list[TileStamps], truth: pa.Table, catalogs: list[tuple[str, pa.Table]], record: dict[str, Any]
) -> tuple[pa.Table, dict[str, Any]]:
    """Join the tiles of one field with its truth and with SExtractor's catalogues: a table, and arrays in its order.

    `catalogs` has the band and SExtractor's table of each exposure; it may be empty. `record` has facts about the field
    from the simulator: ``star_density``, ``roll_deg``.
    """

    def joined(name: str) -> npt.NDArray[Any]:
        return np.concatenate([getattr(t, name) for t in tiles])

    ra, dec = joined("ra"), joined("dec")
    arrays = {name: joined(name) for name in ("image", "valid", "sigma", "features", "psf")}
    arrays["catalog"] = catalog_columns(ra, dec, catalogs)
    match = match_truth(ra, dec, truth)
    found = pa.array(np.where(match >= 0, match, 0), mask=match < 0)
    columns: dict[str, Any] = {
        "field": np.full(len(ra), field, dtype=np.int32),
        "object_id": joined("object_id"),
        "ra": ra,
        "dec": dec,
        "sg_flags": joined("sg_flags"),
        "n_bands": joined("n_bands"),
        "snr": pa.FixedSizeListArray.from_arrays(
            np.sinh(arrays["features"][:, :, FEATURES.index("snr")]).astype(np.float32).ravel(), len(BANDS)
        ),
    }
    columns |= {name: np.full(len(ra), record[name]) for name in ("star_density", "roll_deg")}
    for name in (*TRUTH_COLUMNS, *(n for n in ("blended", "binary") if n in truth.column_names)):
        column = truth[name].combine_chunks().take(found)
        columns[name] = column.fill_null(SPURIOUS) if name == "true_class" else column
    return pa.table(columns), arrays


def make_field(field: int, seed: int, data_dir: Path, stamp_size: int, shifted: bool = False) -> Path:
    """Simulate one field and write its shard.

    A training shard holds only objects that match truth; the others keep the spurious detections. Where SExtractor and
    PSFEx are installed, they measure all fields of validation and tests, and one in seven training fields, for the
    baselines.
    """
    # the simulator is an extra, which only this needs
    from sgclassify.simulation import sextractor
    from sgclassify.simulation.simulate import simulate_field
    from sgclassify.simulation.training import field_config

    path = shard_path(data_dir, field, shifted)
    scratch = data_dir / "scratch" / path.parent.name / path.stem
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    config = field_config(path.parent.name, seed, field)
    training = path.parent.name == "training"
    if sextractor.available() and (path.parent.name in ("validation", "test", "shifted") or field % 10 == len(SPLITS)):
        config = replace(config, sextractor_columns=True)
    result = simulate_field(config, field, scratch)
    list_path = scratch / "list.txt"
    list_path.write_text("".join(f"{Path(image).resolve()}\n" for image in result.images))
    truth = pq.read_table(result.truth)
    # most detections of a deep field are spurious, and training does not use their stamps
    wanted = near_truth(truth) if training and truth.num_rows else None
    tiles = extract_field(list_path, scratch / "work", stamp_size, StageConfig(), wanted)
    tiles = [tile for tile in tiles if len(tile)]
    path.parent.mkdir(parents=True, exist_ok=True)
    if tiles:
        table, arrays = field_table(field, tiles, truth, _sextractor_tables(result), _field_record(result, truth))
        if training:
            keep = np.flatnonzero(true_classes(table) != SPURIOUS)
            table, arrays = table.take(keep), {name: values[keep] for name, values in arrays.items()}
        write_shard(path, table, arrays)
    shutil.rmtree(scratch)
    return path


def _field_record(result: FieldResult, truth: pa.Table) -> dict[str, Any]:
    record = json.loads((result.folder / "field.json").read_text())
    area = np.pi * (record["sky"]["radius_arcsec"] / 60.0) ** 2
    bright = (true_classes(truth) == "star") & (truth["mag_i"].to_numpy() < 25.0)
    return {"star_density": float(bright.sum() / area), "roll_deg": float(record["roll_deg"])}


def _sextractor_tables(result: FieldResult) -> list[tuple[str, pa.Table]]:
    tables = []
    for image in result.images:
        path = image.with_name(f"{image.name.split('.')[0]}.sextractor.parquet")
        if path.is_file():
            tables.append((str(fits.getheader(image, 1)["FILTER"]), pq.read_table(path)))
    return tables


def make_dataset(
    data_dir: Path, n_fields: int, seed: int, stamp_size: int, processes: int, n_shifted: int = 0,
    progress: Callable[[int, int], None] | None = None, first: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """Simulate fields in parallel and write one shard each; continue where an earlier call stopped.

    The manifest is returned, and written as ``manifest.json``.

    Parameters
    ----------
    n_fields : int
        Fields 0 .. n_fields - 1: a smaller set is a prefix of a larger one.
    n_shifted : int
        Fields of the shifted test.
    progress : callable, optional
        Called with (fields done, fields in all) after each field.
    first : int
        Leave out the fields before this one, say because another machine makes them.

    Raises
    ------
    UsageError
        If the folder was begun with other settings, or by another program.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    settings = {
        # another program may draw other fields from the same seed, or measure them otherwise
        "code": code_digest(TRAINING_DATA),
        "seed": seed,
        "stamp_size": stamp_size,
        "features": list(FEATURES),
        "stages": asdict(StageConfig()),
    }
    begun = data_dir / "settings.json"
    if begun.is_file() and json.loads(begun.read_text()) != settings:
        raise UsageError(
            f"{data_dir} was begun with other settings, or by another program ({begun}); choose another folder, or "
            "remove it"
        )
    write_atomic_bytes(json.dumps(settings, indent=1, sort_keys=True).encode(), begun)
    wanted = [(k, False) for k in range(first, n_fields)] + [(k, True) for k in range(n_shifted)]
    lacking = [one for one in wanted if not shard_path(data_dir, *one).is_file()]
    known = len(wanted) - len(lacking)
    if known:
        log.info("%d of %d fields are there already", known, len(wanted))
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(make_field, k, seed, data_dir, stamp_size, shifted) for k, shifted in lacking]
        try:
            for done, future in enumerate(as_completed(futures), start=known + 1):
                future.result()
                if progress is not None:
                    progress(done, len(wanted))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    shutil.rmtree(data_dir / "scratch", ignore_errors=True)
    # every shard that is there trains, whichever call made it
    paths = sorted(path for part in PARTS for path in (data_dir / part).glob("*.parquet"))
    manifest = {
        "settings": settings,
        "first_field": first,
        "n_fields": n_fields,
        "n_shifted": n_shifted,
        "shards": {str(path.relative_to(data_dir)): _describe_shard(path) for path in paths},
    }
    write_atomic_bytes(json.dumps(manifest, indent=1, sort_keys=True).encode(), data_dir / "manifest.json")
    return manifest


def _describe_shard(path: Path) -> dict[str, Any]:
    """Checksum of a shard, and counts by class, magnitude, redshift and number of bands."""
    table = pq.read_table(path, columns=["true_class", "mag_i", "redshift", "n_bands"])
    kind = true_classes(table)

    def histogram(name: str, classes: tuple[str, ...], edges: npt.NDArray[np.float64]) -> list[int]:
        values = table[name].cast(pa.float64()).to_numpy(zero_copy_only=False)[np.isin(kind, classes)]
        return [int(n) for n in np.histogram(values, edges)[0]]

    return {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "counts": {name: int((kind == name).sum()) for name in (*REAL, SPURIOUS)},
        "stars_by_mag_i_14_to_28": histogram("mag_i", ("star",), np.arange(14.0, 29.0)),
        "galaxies_by_mag_i_14_to_28": histogram("mag_i", ("galaxy",), np.arange(14.0, 29.0)),
        "galaxies_by_redshift_0_to_3_in_0.5": histogram("redshift", ("galaxy",), np.arange(0.0, 3.5, 0.5)),
        "by_n_bands_0_to_7": histogram("n_bands", CLASSES, np.arange(9.0)),
    }
