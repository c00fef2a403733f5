"""Write the products: Parquet files that are complete under their final name or not there, and HATS metadata.

The same table gives the same bytes, wherever and whenever it is written.
"""

from __future__ import annotations

import logging
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from sgclassify.stages.columns import DETECTION_COLUMNS, NO_OBJECT, OBJECT_COLUMNS, Column, describe, nullable
from sgclassify.stages.flags import SgFlag
from sgclassify.stages.healpix import INDEX_ORDER, index29, tile_of_index
from sgclassify.stages.write.atomic import storable, sync, write_atomic

log = logging.getLogger(__name__)

PARTITIONS_PER_FOLDER: Final = 10_000
"""HATS' rule for ``Dir=``."""

NULL_TEXT: Final = len("None")
"""astropy shows a null text as None, which a shorter column would cut off."""


def publish_objects(order: int, pixel: int, table: pa.Table, root: Path, metadata: Mapping[str, str]) -> Path | None:
    """Write one tile of the object catalogue as a partition of a HATS catalogue.

    Parameters
    ----------
    order, pixel : int
        The tile.
    table : pyarrow.Table
        `OBJECT_COLUMNS`, in any order of rows; ``_healpix_29`` is computed where it is missing.
    root : Path
        Folder of the catalogue.
    metadata : mapping of str to str
        ``model_id``, the prior and what else holds for the whole catalogue: the same for all tiles.

    Returns
    -------
    Path or None
        The file; None for a tile without objects, which has no file.

    Raises
    ------
    ValueError
        If identifiers repeat, or an object does not lie in the tile.
    """
    path = partition_path(root, order, pixel)
    if not table.num_rows:
        path.unlink(missing_ok=True)
        return None
    table = indexed(table)
    if (tile_of_index(table["_healpix_29"].to_numpy(), order) != pixel).any():
        raise ValueError(f"objects outside of tile {order}/{pixel}")
    write_atomic(table, path, _described(table.schema, OBJECT_COLUMNS, metadata, {}))
    return path


def partition_path(root: Path, order: int, pixel: int) -> Path:
    """Where HATS wants the partition of a tile, below the folder of the catalogue."""
    # Every worker asks for it, and importing hats takes seconds. A test compares with hats.io.paths.
    directory = pixel // PARTITIONS_PER_FOLDER * PARTITIONS_PER_FOLDER
    return root / "dataset" / f"Norder={order}" / f"Dir={directory}" / f"Npix={pixel}.parquet"


def import_hats() -> None:
    """Import what `finish_hats` needs, which takes seconds, while there is nothing else to do."""
    # what is wrong shows in finish_hats
    with suppress(Exception):
        import hats.io.parquet_metadata  # noqa: F401


def finish_hats(
    root: Path, partitions: Iterable[tuple[int, int, int]], metadata: Mapping[str, str], name: str = "objects"
) -> list[Path]:
    """Turn the published partitions into a HATS catalogue; returns the files of the catalogue as a whole.

    Partitions that are in the folder but not among `partitions` come from an earlier run and are removed.

    Parameters
    ----------
    root : Path
        Folder of the catalogue.
    partitions : iterable of (int, int, int)
        Order, pixel and number of rows of every tile that has objects, in any order.
    metadata : mapping of str to str
        As given to `publish_objects`; also written to ``hats.properties``.
    name : str
        Name of the catalogue.

    Raises
    ------
    ValueError
        If a tile is listed twice, or its file does not have that many rows.
    FileNotFoundError
        If a listed partition has no file.
    """
    # importing hats takes seconds, and most who write files need nothing of it
    from hats.catalog.catalog_type import CatalogType
    from hats.catalog.dataset.table_properties import TableProperties
    from hats.catalog.partition_info import PartitionInfo
    from hats.io.parquet_metadata import write_parquet_metadata
    from hats.pixel_math.healpix_pixel import HealpixPixel

    listed = sorted(partitions)
    tiles = [HealpixPixel(order, pixel) for order, pixel, _ in listed]
    if len(set(tiles)) != len(tiles):
        raise ValueError("a tile is listed twice")
    for order, pixel, n_rows in listed:
        path = partition_path(root, order, pixel)
        found = pq.read_metadata(path).num_rows
        if found != n_rows:
            raise ValueError(f"{path} has {found} rows, not {n_rows}")
    _remove_strays(root, {partition_path(root, order, pixel) for order, pixel, _ in listed})
    made = root / f".finish-{uuid.uuid4().hex}.part"
    (made / "dataset").mkdir(parents=True)
    try:
        if tiles:
            write_parquet_metadata(root, output_path=made)
        else:
            schema = _empty_objects()
            schema = schema.with_metadata(_described(schema, OBJECT_COLUMNS, metadata, {}))
            pq.write_metadata(schema, made / "dataset" / "_common_metadata")
            pq.write_metadata(schema, made / "dataset" / "_metadata")
        PartitionInfo.from_healpix(tiles).write_to_file(partition_info_file=made / "partition_info.csv")
        properties = TableProperties.model_validate(
            {
                "catalog_name": name,
                "catalog_type": CatalogType.OBJECT,
                "total_rows": sum(n_rows for _, _, n_rows in listed),
                "ra_column": "ra",
                "dec_column": "dec",
                "healpix_column": "_healpix_29",
                "healpix_order": INDEX_ORDER,
                "hats_max_rows": max((n_rows for _, _, n_rows in listed), default=0),
                "moc_sky_fraction": sum(1 / (12 * 4**order) for order, _, _ in listed),
                "hats_builder": f"sgclassify {version('sgclassify')}, hats {version('hats')}",
                "hats_version": "v1.0",
                # No date of creation: it would be all that differs when the same inputs are run again.
                **{key: metadata[key] for key in sorted(metadata)},
            }
        )
        properties.to_properties_file(made)
        # The properties last: with them, the catalogue is one.
        files = sorted((p for p in made.rglob("*") if p.is_file()), key=lambda p: p.suffix == ".properties")
        finals = [root / file.relative_to(made) for file in files]
        for file, final in zip(files, finals, strict=True):
            final.parent.mkdir(parents=True, exist_ok=True)
            sync(file)
            os.replace(file, final)  # noqa: PTH105 - one way of replacing, here and in atomic
    finally:
        shutil.rmtree(made)
    return finals


def publish_detections(
    catalog: pa.Table,
    scores: pa.Table,
    path: Path,
    metadata: Mapping[str, str],
    row_flags: NDArray[np.int32] | None = None,
) -> int:
    """Write an input catalogue with the probabilities of its rows' objects.

    Parameters
    ----------
    catalog : pyarrow.Table
        Every row and column of the input, in its order. A column that is named like an appended one (in any
        case) gets ``_in`` at the end of its name. Integers and booleans have no nulls.
    scores : pyarrow.Table
        ``row`` (int64, number of the catalogue row, each at most once) and `DETECTION_COLUMNS`.
    path : Path
        Final name of the file.
    metadata : mapping of str to str
        ``model_id``, the prior and the like.
    row_flags : ndarray of int32, shape (rows of `catalog`,), optional
        ``sg_flags`` of the rows themselves, joined to those of the scores. Rows without a score get
        NOT_SCORED, the `object_id` -1 and 0 bands.

    Returns
    -------
    int
        Rows that have a probability.

    Raises
    ------
    ValueError
        If a score is for a row that does not exist, two are for the same one, or a column of integers or
        booleans has nulls.
    """
    n = catalog.num_rows
    row = scores["row"].to_numpy().astype(np.int64)
    if len(np.unique(row)) != len(row):
        raise ValueError(f"{path.name}: two scores for one row")
    if len(row) and (row.min() < 0 or row.max() >= n):
        raise ValueError(f"{path.name}: a score for a row that the catalogue does not have")
    source = np.full(n, -1, dtype=np.int64)
    source[row] = np.arange(len(row))
    taken = scores.take(pa.array(source, mask=source < 0))
    flags = np.zeros(n, dtype=np.int32) if row_flags is None else row_flags.astype(np.int32)
    absent = {"object_id": NO_OBJECT, "sg_flags": int(SgFlag.NOT_SCORED), "n_bands": 0}
    appended = {c.name: _typed(taken[c.name], c.type) for c in DETECTION_COLUMNS}
    appended |= {name: appended[name].fill_null(value) for name, value in absent.items()}
    appended["sg_flags"] = pa.array(flags | appended["sg_flags"].to_numpy())
    table = catalog.rename_columns(_free_names(catalog.column_names))
    fields = [field.with_nullable(nullable(field.type)) for field in table.schema]
    table = pa.table(table.columns, schema=pa.schema(fields, metadata=table.schema.metadata))
    for column in DETECTION_COLUMNS:
        table = table.append_column(column.field, appended[column.name])
    if table.num_rows != n:
        raise ValueError(f"{path.name}: {table.num_rows} rows made of {n}")
    lengths = {name: _longest(table[name]) for name in catalog_texts(table)}
    write_atomic(table, path, _described(table.schema, DETECTION_COLUMNS, metadata, lengths))
    return int(n - table["p_star"].null_count)


def catalog_texts(table: pa.Table) -> list[str]:
    """Names of the columns that hold texts, or fixed-size lists of them."""
    return [field.name for field in table.schema if _is_text(field.type)]


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _longest(column: pa.ChunkedArray) -> int:
    """Characters of the longest text, at least 1, and at least `NULL_TEXT` where there are nulls."""
    null = NULL_TEXT if column.null_count else 1
    if pa.types.is_fixed_size_list(column.type):
        column = pc.list_flatten(column)
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return max(pc.max(pc.utf8_length(column)).as_py() or 0, null)


def _free_names(names: Sequence[str]) -> list[str]:
    """Column names of a catalogue beside those that are appended to it."""
    taken = {column.name for column in DETECTION_COLUMNS}
    others = {name.lower() for name in names} | taken
    result = []
    for name in names:
        free = name
        if name.lower() in taken:
            while free.lower() in others:
                free = f"{free}_in"
            others.add(free.lower())
        result.append(free)
    return result


def _typed(values: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    return values if values.type == kind else values.cast(kind)


def _empty_objects() -> pa.Schema:
    """Schema of the object catalogue as it is stored."""
    table = pa.schema([c.field for c in OBJECT_COLUMNS]).empty_table()
    return storable(table, {}).schema


def indexed(table: pa.Table) -> pa.Table:
    """The columns of the object catalogue in their order, with the spatial index, sorted by it, then by ``object_id``.

    Parameters
    ----------
    table : pyarrow.Table
        `OBJECT_COLUMNS`, in any order; ``_healpix_29`` is computed here.

    Raises
    ------
    ValueError
        If identifiers repeat, or a position is off the sky.
    """
    ids = table["object_id"].to_numpy()
    if len(np.unique(ids)) != len(ids):
        raise ValueError("object identifiers repeat")
    index = index29(table["ra"].to_numpy(), table["dec"].to_numpy())
    if "_healpix_29" in table.column_names:
        table = table.drop_columns(["_healpix_29"])
    table = table.append_column("_healpix_29", pa.array(index)).take(pa.array(np.lexsort((ids, index))))
    return pa.table(
        [_typed(table[c.name], c.type) for c in OBJECT_COLUMNS], schema=pa.schema([c.field for c in OBJECT_COLUMNS])
    )


def _described(
    schema: pa.Schema, columns: Sequence[Column], metadata: Mapping[str, str], lengths: Mapping[str, int]
) -> dict[str, str]:
    """Metadata of a product: what the caller says, VOParquet, and the text lengths that astropy asks for."""
    fixed = {c.name: max(c.length, NULL_TEXT) for c in columns if c.length}
    lengths = {**lengths, **fixed}
    texts = {f"table::len::{name}": str(length) for name, length in lengths.items()}
    return {**metadata, **texts, **describe(schema, columns, metadata, lengths)}


def _remove_strays(root: Path, keep: set[Path]) -> None:
    """Remove partitions of an earlier run, and what a killed writer left behind."""
    for path in sorted(root.glob("dataset/Norder=*/Dir=*/*")):
        stray = path.suffix == ".parquet" and path not in keep
        if stray or path.suffix == ".part":
            log.warning("removed %s: not a part of this catalogue", path)
            path.unlink()
