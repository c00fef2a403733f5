"""Write files so that they are complete under their final name or not there, with bytes that depend on nothing else
than their content.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP_ROWS = 65_536


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary name in the folder of `path`, which takes its place if the block ends well.

    Parameters
    ----------
    path : Path
        Final name; its folder exists.

    Yields
    ------
    Path
        Write here, and close the file before the block ends. After an exception nothing is left of it.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(table: pa.Table, path: Path, metadata: Mapping[str, str]) -> None:
    """Write a Parquet file, read its footer back, and give it its name.

    Parameters
    ----------
    table : pyarrow.Table
    path : Path
        Final name; its folder exists.
    metadata : mapping of str to str
        Added to the key-value metadata of the file.

    Raises
    ------
    OSError
        If the file cannot be written, or does not hold the rows that it should.
    """
    known = {k: v for k, v in (table.schema.metadata or {}).items() if k != b"pandas"}
    table = table.replace_schema_metadata({**known, **{k.encode(): v.encode() for k, v in metadata.items()}})
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", row_group_size=ROW_GROUP_ROWS)
        rows = pq.read_metadata(temporary).num_rows
        if rows != table.num_rows:
            raise OSError(f"{path}: {rows} rows were written, not {table.num_rows}")


def write_atomic_bytes(data: bytes, path: Path) -> None:
    """Write a file of bytes under its final name, complete."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
