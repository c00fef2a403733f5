"""Training data: simulated exposures, taken through the stages of the night run, matched to truth.

One shard holds one field; fields, never objects, are divided into training, validation, calibration and test.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from scipy.spatial import cKDTree

from sgclassify.pipeline.exposure_list import parse_list
from sgclassify.pipeline.plan import make_plan
from sgclassify.stages.atomic import write_atomic, write_atomic_bytes
from sgclassify.stages.bands import BANDS, PIXEL_SCALE
from sgclassify.stages.config import StageConfig
from sgclassify.stages.errors import UnusableInputError
from sgclassify.stages.measure import FEATURES
from sgclassify.stages.prepare import prepare_exposure
from sgclassify.stages.read.header import read_header
from sgclassify.stages.tile import CHAIN_ARCSEC, TileStamps, extract_tile

logger = logging.getLogger(__name__)

MATCH_RADIUS_ARCSEC = 2 * PIXEL_SCALE
TILE_ORDER = 10
PAD_ARCSEC = CHAIN_ARCSEC + 5.0
SPLITS = ("validation", "calibration", "test")
"""Fields 0, 1 and 2 of every ten, in this order; the other seven are for training."""

TRUTH_COLUMNS = ("true_class", "redshift", "r50_arcsec", "sersic_n", *(f"mag_{band}" for band in BANDS))


@dataclass(frozen=True)
class Sample:
    """Objects of one or more fields; the first axis of every array is the object.

    Attributes
    ----------
    image : ndarray of float16, shape (n, 7, size, size)
        Sky-subtracted stamps, nanomaggies, axis order [object, band, y, x].
    valid : ndarray of bool, shape (n, 7, size, size)
    sigma : ndarray of float32, shape (n, 7)
    features : ndarray of float32, shape (n, 7, n_features)
    table : pyarrow.Table
        Columns ``field``, ``object_id``, ``ra``, ``dec``, ``sg_flags``, ``n_bands``, ``snr``, ``blended`` and the
        truth: ``true_class`` (``spurious`` where nothing matches), magnitudes, redshift, size.
    """

    image: npt.NDArray[np.float16]
    valid: npt.NDArray[np.bool_]
    sigma: npt.NDArray[np.float32]
    features: npt.NDArray[np.float32]
    table: pa.Table

    def __len__(self) -> int:
        return len(self.image)

    def take(self, index: npt.NDArray[np.int64]) -> Sample:
        """The objects of an index array, in its order."""
        return Sample(
            self.image[index],
            self.valid[index],
            self.sigma[index],
            self.features[index],
            self.table.take(index),
        )


def split_of(field: int) -> str:
    """Which part of the data a field belongs to: training, validation, calibration or test."""
    return SPLITS[field % 10] if field % 10 < len(SPLITS) else "training"


def match_truth(
    ra: Any, dec: Any, truth: pa.Table, radius_arcsec: float = MATCH_RADIUS_ARCSEC
) -> npt.NDArray[np.int64]:
    """Match objects to truth, one to one, the brightest truth first, each to its nearest free object.

    Parameters
    ----------
    ra, dec : ndarray of float64, shape (n,)
        Positions of the objects, degrees.
    truth : pyarrow.Table
        Truth table (FORMATS section 6).
    radius_arcsec : float

    Returns
    -------
    ndarray of int64, shape (n,)
        Row of the truth table; -1 where nothing matches.
    """

    def vectors(a: Any, d: Any) -> npt.NDArray[np.float64]:
        a, d = np.radians(np.asarray(a, float)), np.radians(np.asarray(d, float))
        return np.stack([np.cos(d) * np.cos(a), np.cos(d) * np.sin(a), np.sin(d)], axis=1)

    match = np.full(len(ra), -1, dtype=np.int64)
    if not len(ra) or not truth.num_rows:
        return match
    tree = cKDTree(vectors(ra, dec))
    points = vectors(truth["ra"].to_numpy(), truth["dec"].to_numpy())
    magnitudes = np.stack([truth[f"mag_{band}"].to_numpy(zero_copy_only=False) for band in BANDS])
    brightness = np.nanmin(np.where(np.isfinite(magnitudes), magnitudes, 99.0), axis=0)
    radius = np.radians(radius_arcsec / 3600.0)
    for row in np.argsort(brightness, kind="stable"):
        near = [k for k in tree.query_ball_point(points[row], radius) if match[k] < 0]
        if near:
            distance = ((tree.data[near] - points[row]) ** 2).sum(axis=1)
            match[near[int(np.argmin(distance))]] = row
    return match


def extract_field(list_path: Path, work_dir: Path, stamp_size: int, config: StageConfig) -> list[TileStamps]:
    """Take the exposures of a list through the stages up to the stamps, without a cluster."""
    work_dir.mkdir(parents=True, exist_ok=True)
    listed = parse_list(list_path)
    if listed.problems:
        raise listed.problems[0]
    prepared = []
    for files in listed.files:
        try:
            prepared.append(prepare_exposure(read_header(files), work_dir, config))
        except UnusableInputError as error:
            # as in a run: an exposure that cannot be used (no detection in NUV, say) costs only itself
            logger.info("set aside: %s", error)
    by_id = {p.exposure_id: p for p in prepared}
    tiles = make_plan([p.header for p in prepared], TILE_ORDER, PAD_ARCSEC)
    return [
        extract_tile(t.order, t.pixel, [by_id[e] for e in t.exposures], stamp_size, config) for t in tiles
    ]


def field_table(field: int, tiles: list[TileStamps], truth: pa.Table) -> tuple[pa.Table, dict[str, Any]]:
    """Join the tiles of one field with its truth; the arrays are in the order of the table."""
    ra = np.concatenate([t.ra for t in tiles])
    dec = np.concatenate([t.dec for t in tiles])
    arrays = {
        name: np.concatenate([getattr(t, name) for t in tiles])
        for name in ("image", "valid", "sigma", "features")
    }
    match = match_truth(ra, dec, truth)
    found = pa.array(np.where(match >= 0, match, 0), mask=match < 0)
    columns: dict[str, Any] = {
        "field": np.full(len(ra), field, dtype=np.int32),
        "object_id": np.concatenate([t.object_id for t in tiles]),
        "ra": ra,
        "dec": dec,
        "sg_flags": np.concatenate([t.sg_flags for t in tiles]),
        "n_bands": np.concatenate([t.n_bands for t in tiles]),
        "snr": pa.FixedSizeListArray.from_arrays(
            np.sinh(arrays["features"][:, :, FEATURES.index("snr")]).astype(np.float32).ravel(), len(BANDS)
        ),
    }
    for name in (*TRUTH_COLUMNS, *(n for n in ("blended", "binary") if n in truth.column_names)):
        column = truth[name].combine_chunks().take(found)
        columns[name] = column.fill_null("spurious") if name == "true_class" else column
    return pa.table(columns), arrays


def write_shard(path: Path, table: pa.Table, arrays: dict[str, Any]) -> None:
    """Write one field as a Parquet shard with fixed-shape tensors."""

    def tensor(values: Any) -> pa.Array:
        return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values))

    n = len(arrays["image"])
    packed = np.packbits(arrays["valid"].reshape(n, -1), axis=1)
    for name, values in (
        ("image", arrays["image"].astype(np.float16)),
        ("valid", packed),
        ("sigma", arrays["sigma"]),
        ("features", arrays["features"]),
    ):
        table = table.append_column(name, tensor(values))
    write_atomic(table, path, {})


def read_shard(path: Path) -> Sample:
    """Read one shard back."""
    table = pq.read_table(path)

    def tensor(name: str) -> Any:
        return table[name].combine_chunks().to_numpy_ndarray()

    image = tensor("image")
    valid = np.unpackbits(tensor("valid"), axis=1, count=int(np.prod(image.shape[1:]))).astype(bool)
    return Sample(
        image,
        valid.reshape(image.shape),
        tensor("sigma"),
        tensor("features"),
        table.drop_columns(["image", "valid", "sigma", "features"]),
    )


def read_samples(paths: list[Path]) -> Sample:
    """Read shards into one sample, in the order of the paths."""
    parts = [read_shard(path) for path in paths]
    return Sample(
        np.concatenate([p.image for p in parts]),
        np.concatenate([p.valid for p in parts]),
        np.concatenate([p.sigma for p in parts]),
        np.concatenate([p.features for p in parts]),
        pa.concat_tables([p.table for p in parts]),
    )


def shard_path(data_dir: Path, field: int) -> Path:
    """Path of a field's shard, which names the part of the data that it belongs to."""
    return data_dir / split_of(field) / f"field{field:05d}.parquet"


def make_field(field: int, seed: int, data_dir: Path, stamp_size: int, keep_exposures: bool = False) -> Path:
    """Simulate one field and write its shard; a shard that is there already is kept."""
    # the simulator is an extra: only making data needs it
    from sgclassify.simulation.simulate import simulate_field
    from sgclassify.simulation.training import training_config

    path = shard_path(data_dir, field)
    if path.is_file():
        return path
    scratch = data_dir / "scratch" / f"field{field:05d}"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    result = simulate_field(training_config(seed, field), field, scratch)
    list_path = scratch / "list.txt"
    list_path.write_text("".join(f"{Path(image).resolve()}\n" for image in result.images))
    tiles = extract_field(list_path, scratch / "work", stamp_size, StageConfig())
    tiles = [tile for tile in tiles if len(tile)]
    if tiles:
        table, arrays = field_table(field, tiles, pq.read_table(result.truth))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_shard(path, table, arrays)
    if not keep_exposures:
        shutil.rmtree(scratch)
    return path


def make_dataset(
    data_dir: Path, n_fields: int, seed: int, stamp_size: int, processes: int, progress: Any = None
) -> dict[str, Any]:
    """Simulate fields in parallel and write one shard each; goes on where an earlier call stopped.

    Parameters
    ----------
    data_dir : Path
    n_fields : int
        Fields 0 .. n_fields - 1: a smaller set is a prefix of a larger one.
    seed, stamp_size, processes : int
    progress : callable, optional
        Called with (fields done, fields in all) after each field.

    Returns
    -------
    dict
        The manifest, also written as ``manifest.json``.
    """
    data_dir.mkdir(parents=True, exist_ok=True)
    settings = {
        "seed": seed,
        "stamp_size": stamp_size,
        "features": list(FEATURES),
        "stages": asdict(StageConfig()),
    }
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(make_field, k, seed, data_dir, stamp_size) for k in range(n_fields)]
        for done, future in enumerate(as_completed(futures), start=1):
            future.result()
            if progress is not None:
                progress(done, n_fields)
    shards: dict[str, Any] = {}
    for field in range(n_fields):
        path = shard_path(data_dir, field)
        if not path.is_file():
            continue
        classes = pq.read_table(path, columns=["true_class"])["true_class"].to_pylist()
        shards[str(path.relative_to(data_dir))] = {
            "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            "counts": {name: classes.count(name) for name in ("star", "galaxy", "qso", "spurious")},
        }
    manifest = {"settings": settings, "n_fields": n_fields, "shards": shards}
    write_atomic_bytes(json.dumps(manifest, indent=1, sort_keys=True).encode(), data_dir / "manifest.json")
    return manifest
