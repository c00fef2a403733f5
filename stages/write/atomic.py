"""Files that are complete under their final name or not there, with bytes that depend on their content alone."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP_ROWS: Final = 131_072
"""Rows of a row group. Fixed, as it decides about the bytes."""


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path that takes its final name when the block ends well, and vanishes when it does not.

    It is a hidden name in the same folder, ending on ``.part``. The folder is made if need be; a file of the final
    name is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        yield part
        sync(part)
        os.replace(part, path)  # noqa: PTH105 - the one call that everything here is about
    finally:
        part.unlink(missing_ok=True)
    # Some file systems cannot sync a folder; the file itself is safe by then.
    with contextlib.suppress(OSError):
        sync(path.parent)


def write_atomic_bytes(data: bytes, path: Path) -> None:
    """Write a file whole or not at all."""
    with atomic_path(path) as part:
        part.write_bytes(data)


def write_atomic_text(text: str, path: Path) -> None:
    """Write a UTF-8 text file whole or not at all."""
    write_atomic_bytes(text.encode("utf-8"), path)


def write_atomic(table: pa.Table, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a Parquet file whole or not at all, always with the same bytes for the same table.

    Parameters
    ----------
    table : pyarrow.Table
        Written as it is, in its order, but for dictionary columns: they are stored as plain columns with
        Parquet's own dictionary encoding, since astropy cannot read Arrow's.
    metadata : mapping of str to str
        Key-value metadata of the file, added to those of the table's schema.

    Raises
    ------
    OSError
        If the file read back does not hold what was written.
    """
    table = storable(table, metadata)
    texts = [f.name for f in table.schema if pa.types.is_string(f.type) or pa.types.is_large_string(f.type)]
    with atomic_path(path) as part:
        pq.write_table(
            table,
            part,
            row_group_size=ROW_GROUP_ROWS,
            compression="zstd",
            compression_level=3,
            use_dictionary=texts,
            write_page_checksum=True,
            version="2.6",
        )
        footer = pq.read_metadata(part)
        names = footer.schema.to_arrow_schema().names
        if footer.num_rows != table.num_rows or names != table.column_names:
            raise OSError(f"{path}: {footer.num_rows} rows read back of {table.num_rows} written")


def storable(table: pa.Table, metadata: Mapping[str, str]) -> pa.Table:
    """The table in one piece, without Arrow dictionaries, its metadata sorted: so its bytes are settled."""
    fields, arrays = [], []
    for field, values in zip(table.schema, table.columns, strict=True):
        if pa.types.is_dictionary(field.type):
            field, values = field.with_type(field.type.value_type), values.cast(field.type.value_type)
        fields.append(field)
        arrays.append(values)
    everything = {**{k.decode(): v.decode() for k, v in (table.schema.metadata or {}).items()}, **metadata}
    schema = pa.schema(fields, metadata={key: everything[key] for key in sorted(everything)})
    return pa.table(arrays, schema=schema).combine_chunks()


def sync(path: Path) -> None:
    """Make sure that a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
