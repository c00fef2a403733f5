"""Training data: simulated exposures, taken through the stages of the night run, matched to truth.

One shard holds one field; fields, never objects, are divided into training, validation, calibration and test.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from astropy.io import fits
from scipy.spatial import cKDTree

from sgclassify.stages.bands import BANDS, PIXEL_SCALE
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
from sgclassify.stages.write.atomic import write_atomic, write_atomic_bytes

if TYPE_CHECKING:
    from sgclassify.simulation.simulate import FieldResult

log = logging.getLogger(__name__)

MATCH_RADIUS_ARCSEC = 2 * PIXEL_SCALE
TILE_ORDER = 10
SPLITS = ("validation", "calibration", "test")
"""Fields 0, 1 and 2 of every ten, in this order; the other seven are for training."""

PARTS = ("training", *SPLITS, "shifted")
"""Folders of a data set. The shifted test comes from another simulation (other PSFs, brighter sky, more compact
galaxies) that training never sees."""

CATALOG_COLUMNS = (
    "Class_Star", "Spread_Model", "SpreadErr_Model", "Mag_PSF", "Mag_Model", "MagErr_Model", "Mag_Kron", "MagErr_Kron",
    "FWHM", "A", "B", "E", "R50", "Mu_Max", "Mag_Aper1", "MagErr_Aper1", "Mag_Aper3", "MagErr_Aper3", "Flag",
)  # fmt: skip
"""What is kept of SExtractor's and PSFEx's catalogues, for the baselines. The network never reads it."""

REAL: Final = (*CLASSES, "qso")
"""What is judged; all but spurious detections."""

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
    psf : ndarray of float16, shape (n, 7, size, size)
        PSF at the source's place; all 0 where unknown.
    catalog : ndarray of float32, shape (n, 7, len(CATALOG_COLUMNS))
        SExtractor's measurements in each band; nan where it was not run or did not find the object.
    table : pyarrow.Table
        Columns ``field``, ``object_id``, ``ra``, ``dec``, ``sg_flags``, ``n_bands``, ``snr``, ``blended``,
        ``star_density`` (stars of i < 25 per arcmin^2), ``roll_deg`` and the truth: ``true_class`` (``spurious`` where
        nothing matches), magnitudes, redshift, size.
    """

    image: npt.NDArray[np.float16]
    valid: npt.NDArray[np.bool_]
    sigma: npt.NDArray[np.float32]
    features: npt.NDArray[np.float32]
    psf: npt.NDArray[np.float16]
    catalog: npt.NDArray[np.float32]
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
            self.psf[index],
            self.catalog[index],
            self.table.take(index),
        )


def split_of(field: int) -> str:
    """Which part of the data a field belongs to: training, validation, calibration or test."""
    return SPLITS[field % 10] if field % 10 < len(SPLITS) else "training"


def match_truth(
    ra: Any, dec: Any, truth: pa.Table, radius_arcsec: float = MATCH_RADIUS_ARCSEC
) -> npt.NDArray[np.int64]:
    """Match objects to truth, one to one, the brightest truth first, each to its nearest free object.

    Of truth that is equally bright, or without magnitudes, the closest pair of two that are free comes first.

    Parameters
    ----------
    ra, dec : ndarray of float64, shape (n,)
        Positions of the objects, degrees.
    truth : pyarrow.Table
        Truth table (FORMATS section 6); the magnitudes may be absent or null.
    radius_arcsec : float

    Returns
    -------
    ndarray of int64, shape (n,)
        Row of the truth table; -1 where nothing matches.
    """
    match = np.full(len(ra), -1, dtype=np.int64)
    if not len(ra) or not truth.num_rows:
        return match
    tree = cKDTree(_unit_vectors(ra, dec))
    points = _unit_vectors(truth["ra"].to_numpy(), truth["dec"].to_numpy())
    brightness = np.full(truth.num_rows, 99.0)
    for name in (f"mag_{band}" for band in BANDS):
        if name in truth.column_names:
            magnitude = truth[name].to_numpy(zero_copy_only=False)
            brightness = np.minimum(brightness, np.where(np.isfinite(magnitude), magnitude, 99.0))
    radius = np.radians(radius_arcsec / 3600.0)
    pairs = cKDTree(points).sparse_distance_matrix(tree, radius, output_type="ndarray")
    pairs = pairs[np.lexsort((pairs["j"], pairs["i"], pairs["v"], brightness[pairs["i"]]))]
    free = np.ones(truth.num_rows, dtype=bool)
    for row, k in zip(pairs["i"].tolist(), pairs["j"].tolist(), strict=True):
        if free[row] and match[k] < 0:
            match[k], free[row] = row, False
    return match


def near_truth(truth: pa.Table) -> Callable[[Any, Any], npt.NDArray[np.bool_]]:
    """What says of positions (ra, dec, degrees) whether any source of a truth table is within the match radius."""
    radius = np.radians(MATCH_RADIUS_ARCSEC / 3600.0)
    tree = cKDTree(_unit_vectors(truth["ra"].to_numpy(), truth["dec"].to_numpy()))

    def near(ra: Any, dec: Any) -> npt.NDArray[np.bool_]:
        distance, _ = tree.query(_unit_vectors(ra, dec))
        return np.asarray(distance <= radius)

    return near


def extract_field(
    list_path: Path,
    work_dir: Path,
    stamp_size: int,
    config: StageConfig,
    wanted: Callable[[Any, Any], npt.NDArray[np.bool_]] | None = None,
) -> list[TileStamps]:
    """Take the exposures of a list through the stages up to the stamps, without a cluster.

    ``wanted`` says which objects are cut and measured, see `extract_tile`.
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
            # as in a run: an exposure that cannot be used costs only itself
            log.info("set aside: %s", error)
    by_id = {p.exposure_id: p for p in prepared}
    tiles = tiles_of_headers([p.header for p in prepared], TILE_ORDER, tile_pad_arcsec(config))
    return [
        extract_tile(t.order, t.pixel, [by_id[e] for e in t.exposures], stamp_size, config, wanted)
        for t in tiles
    ]


def field_table(
    field: int,
    tiles: list[TileStamps],
    truth: pa.Table,
    catalogs: list[tuple[str, pa.Table]],
    record: dict[str, Any],
) -> tuple[pa.Table, dict[str, Any]]:
    """Join the tiles of one field with its truth and with SExtractor's catalogues.

    Parameters
    ----------
    field : int
    tiles : list of TileStamps
    truth : pyarrow.Table
    catalogs : list of (str, pyarrow.Table)
        Band and SExtractor's table of each exposure; may be empty.
    record : dict
        What the simulator says of the field: ``star_density``, ``roll_deg``.

    Returns
    -------
    table : pyarrow.Table
    arrays : dict of str to ndarray
        In the order of the table.
    """
    ra = np.concatenate([t.ra for t in tiles])
    dec = np.concatenate([t.dec for t in tiles])
    arrays = {
        name: np.concatenate([getattr(t, name) for t in tiles])
        for name in ("image", "valid", "sigma", "features", "psf")
    }
    arrays["catalog"] = catalog_columns(ra, dec, catalogs)
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
    columns |= {name: np.full(len(ra), record[name]) for name in ("star_density", "roll_deg")}
    for name in (*TRUTH_COLUMNS, *(n for n in ("blended", "binary") if n in truth.column_names)):
        column = truth[name].combine_chunks().take(found)
        columns[name] = column.fill_null("spurious") if name == "true_class" else column
    return pa.table(columns), arrays


def catalog_columns(ra: Any, dec: Any, catalogs: list[tuple[str, pa.Table]]) -> npt.NDArray[np.float32]:
    """SExtractor's measurements of each object, by position, shape (n, 7, len(CATALOG_COLUMNS))."""
    result = np.full((len(ra), len(BANDS), len(CATALOG_COLUMNS)), np.nan, dtype=np.float32)
    radius = np.radians(MATCH_RADIUS_ARCSEC / 3600.0)
    points = _unit_vectors(ra, dec)
    for band, table in catalogs:
        if not table.num_rows:
            continue
        distance, row = cKDTree(_unit_vectors(table["RA"].to_numpy(), table["DEC"].to_numpy())).query(points)
        here = (distance < radius) & ~np.isfinite(result[:, BANDS.index(band)]).any(axis=1)
        for k, name in enumerate(CATALOG_COLUMNS):
            values = table[name].cast(pa.float32()).to_numpy(zero_copy_only=False)
            result[here, BANDS.index(band), k] = values[row[here]]
    return result


def _unit_vectors(ra: Any, dec: Any) -> npt.NDArray[np.float64]:
    a, d = np.radians(np.asarray(ra, float)), np.radians(np.asarray(dec, float))
    return np.stack([np.cos(d) * np.cos(a), np.cos(d) * np.sin(a), np.sin(d)], axis=1)


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
        ("psf", arrays["psf"].astype(np.float16)),
        ("catalog", arrays["catalog"]),
    ):
        table = table.append_column(name, tensor(values))
    write_atomic(table, path, {})


def read_table_of(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Columns of a shard, ``features`` among them; all where None.

    Raises
    ------
    UsageError
        If it is damaged, no shard, or of a version that measured other features.
    """
    try:
        table = pq.read_table(path, columns=columns)
        held = table.schema.field("features").type.shape
    except (pa.ArrowException, KeyError, AttributeError, OSError) as error:
        raise UsageError(
            f"{path}: not a shard that can be read ({error}); delete it and run `sgclassify dataset` again"
        ) from error
    if tuple(held) != (len(BANDS), len(FEATURES)):
        raise UsageError(
            f"{path}: {held[-1]} features a band, this version has {len(FEATURES)}; make the data set anew"
        )
    return table


def read_shard(path: Path, classes: Sequence[str] | None = None) -> Sample:
    """Read one shard back (see `read_table_of`); on request only objects of some classes, such as `CLASSES`."""
    table = read_table_of(path)
    if classes is not None:
        table = table.filter(pc.is_in(table["true_class"], pa.array(classes)))

    def tensor(name: str) -> Any:
        return table[name].combine_chunks().to_numpy_ndarray()

    image = tensor("image")
    valid = np.unpackbits(tensor("valid"), axis=1, count=int(np.prod(image.shape[1:]))).astype(bool)
    return Sample(
        image,
        valid.reshape(image.shape),
        tensor("sigma"),
        tensor("features"),
        tensor("psf"),
        tensor("catalog"),
        table.drop_columns(["image", "valid", "sigma", "features", "psf", "catalog"]),
    )


def read_samples(paths: list[Path], classes: Sequence[str] | None = None) -> Sample:
    """Read shards into one sample, in the order of the paths."""
    parts = [read_shard(path, classes) for path in paths]
    names = ("image", "valid", "sigma", "features", "psf", "catalog")
    arrays = [np.concatenate([getattr(part, name) for part in parts]) for name in names]
    table = pa.concat_tables([part.table for part in parts])
    return Sample(*arrays, table=table)  # type: ignore[misc]


def shard_path(data_dir: Path, field: int, shifted: bool = False) -> Path:
    """Path of a field's shard, whose folder is the part of the data that it belongs to."""
    return data_dir / ("shifted" if shifted else split_of(field)) / f"field{field:05d}.parquet"


def make_field(field: int, seed: int, data_dir: Path, stamp_size: int, shifted: bool = False) -> Path:
    """Simulate one field and write its shard.

    Training shards hold only what matches truth; the others keep the spurious detections. Where SExtractor and PSFEx
    are installed, they measure the fields of validation and tests and one in seven of the training fields, for the
    baselines.
    """
    # the simulator is an extra: only making data needs it
    from sgclassify.simulation import sextractor
    from sgclassify.simulation.simulate import simulate_field
    from sgclassify.simulation.training import field_config

    path = shard_path(data_dir, field, shifted)
    scratch = data_dir / "scratch" / path.parent.name / path.stem
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    config = field_config(path.parent.name, seed, field)
    training = path.parent.name == "training"
    if sextractor.available() and (
        path.parent.name in ("validation", "test", "shifted") or field % 10 == len(SPLITS)
    ):
        config = replace(config, sextractor_columns=True)
    result = simulate_field(config, field, scratch)
    list_path = scratch / "list.txt"
    list_path.write_text("".join(f"{Path(image).resolve()}\n" for image in result.images))
    truth = pq.read_table(result.truth)
    # most detections of a deep field are spurious: a training field need not pay for their stamps
    wanted = near_truth(truth) if training and truth.num_rows else None
    tiles = extract_field(list_path, scratch / "work", stamp_size, StageConfig(), wanted)
    tiles = [tile for tile in tiles if len(tile)]
    path.parent.mkdir(parents=True, exist_ok=True)
    if tiles:
        table, arrays = field_table(
            field, tiles, truth, _sextractor_tables(result), _field_record(result, truth)
        )
        if training:
            keep = np.flatnonzero(np.array(table["true_class"].to_pylist()) != "spurious")
            table, arrays = table.take(keep), {name: values[keep] for name, values in arrays.items()}
        write_shard(path, table, arrays)
    shutil.rmtree(scratch)
    return path


def _field_record(result: FieldResult, truth: pa.Table) -> dict[str, Any]:
    record = json.loads((result.folder / "field.json").read_text())
    area = np.pi * (record["sky"]["radius_arcsec"] / 60.0) ** 2
    bright = (np.array(truth["true_class"].to_pylist()) == "star") & (truth["mag_i"].to_numpy() < 25.0)
    return {"star_density": float(bright.sum() / area), "roll_deg": float(record["roll_deg"])}


def _sextractor_tables(result: FieldResult) -> list[tuple[str, pa.Table]]:
    tables = []
    for image in result.images:
        path = image.with_name(f"{image.name.split('.')[0]}.sextractor.parquet")
        if path.is_file():
            tables.append((str(fits.getheader(image, 1)["FILTER"]), pq.read_table(path)))
    return tables


def make_dataset(
    data_dir: Path,
    n_fields: int,
    seed: int,
    stamp_size: int,
    processes: int,
    n_shifted: int = 0,
    progress: Any = None,
    first: int = 0,
) -> dict[str, Any]:
    """Simulate fields in parallel and write one shard each; goes on where an earlier call stopped.

    Parameters
    ----------
    data_dir : Path
    n_fields : int
        Fields 0 .. n_fields - 1: a smaller set is a prefix of a larger one.
    seed, stamp_size, processes : int
    n_shifted : int
        Fields of the shifted test.
    progress : callable, optional
        Called with (fields done, fields in all) after each field.
    first : int
        Leave out the fields before this one, which another machine makes or an earlier model was trained on.

    Returns
    -------
    dict
        The manifest, also written as ``manifest.json``.

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
    manifest: dict[str, Any] = {
        "settings": settings,
        "first_field": first,
        "n_fields": n_fields,
        "n_shifted": n_shifted,
        "shards": {},
    }
    # all that is there, since all of it trains, whichever call has made it
    for path in sorted(path for part in PARTS for path in (data_dir / part).glob("*.parquet")):
        manifest["shards"][str(path.relative_to(data_dir))] = _describe_shard(path)
    write_atomic_bytes(json.dumps(manifest, indent=1, sort_keys=True).encode(), data_dir / "manifest.json")
    return manifest


def _describe_shard(path: Path) -> dict[str, Any]:
    """Checksum and contents of a shard: counts by class, and of stars and galaxies by magnitude, redshift and bands."""
    table = pq.read_table(path, columns=["true_class", "mag_i", "redshift", "n_bands"])
    kind = np.array(table["true_class"].to_pylist())

    def histogram(name: str, classes: tuple[str, ...], edges: npt.NDArray[np.float64]) -> list[int]:
        values = table[name].cast(pa.float64()).to_numpy(zero_copy_only=False)[np.isin(kind, classes)]
        return [int(n) for n in np.histogram(values, edges)[0]]

    return {
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "counts": {name: int((kind == name).sum()) for name in ("star", "galaxy", "qso", "spurious")},
        "stars_by_mag_i_14_to_28": histogram("mag_i", ("star",), np.arange(14.0, 29.0)),
        "galaxies_by_mag_i_14_to_28": histogram("mag_i", ("galaxy",), np.arange(14.0, 29.0)),
        "galaxies_by_redshift_0_to_3_in_0.5": histogram("redshift", ("galaxy",), np.arange(0.0, 3.5, 0.5)),
        "by_n_bands_0_to_7": histogram("n_bands", ("star", "galaxy"), np.arange(9.0)),
    }
