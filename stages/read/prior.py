"""Read a table of the prior: the share of stars by magnitude."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from sgclassify.stages.errors import UsageError
from sgclassify.stages.prior import Prior


def read_prior(path: Path) -> Prior:
    """Read a prior by magnitude: CSV (with a header) or Parquet with the columns ``magnitude`` and ``star_fraction``.

    Raises
    ------
    UsageError
        If the file cannot be read, or its numbers are no prior.
    """
    try:
        table = pq.read_table(path) if path.suffix == ".parquet" else pacsv.read_csv(path)
        columns = [table[name].cast(pa.float64()).to_pylist() for name in ("star_fraction", "magnitude")]
    except (OSError, KeyError, pa.ArrowException) as error:
        raise UsageError(
            f"{path}: not a CSV or Parquet table with the columns magnitude and star_fraction: {error}"
        ) from error
    if any(value is None for column in columns for value in column):
        raise UsageError(f"{path}: a number of the prior is missing")
    try:
        return Prior(*(tuple(column) for column in columns))
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from error
