"""Catalogues (CAT): all rows and columns unchanged, and the positions that the stage can use."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sgclassify.stages.arrays import F64, I32, Bool
from sgclassify.stages.config import StageConfig
from sgclassify.stages.errors import UnusableInputError
from sgclassify.stages.flags import SgFlag
from sgclassify.stages.read.bintable import column_names, read_bintable, table_hdus
from sgclassify.stages.read.header import NO_VALUE, ExposureHeader
from sgclassify.stages.read.wcs import MAX_DECLINATION, MAX_RIGHT_ASCENSION, right_ascension

ROW_BITS: Final = 21
"""Bits of ``object_id`` for the row of the catalogue; the other 42 hold the key of its exposure."""

MAX_COLUMN_NOTES: Final = 5
"""Most columns of one catalogue that get their own remark in the report."""

ALIASES: Final[dict[str, tuple[str, ...]]] = {
    "objID": ("objid", "obj_id", "number"),
    "X": ("x", "xwin_image", "x_image"),
    "Y": ("y", "ywin_image", "y_image"),
    "RA": ("ra", "alphawin_j2000", "alpha_j2000", "x_world"),
    "DEC": ("dec", "deltawin_j2000", "delta_j2000", "y_world"),
}
"""Required CAT column -> its possible names in lower case, in order of preference: the official one, SExtractor's."""


@dataclass(frozen=True)
class Detections:
    """Rows of one CAT, in its order; all arrays have its length.

    Attributes
    ----------
    x, y : float64
        Pixel position, 0-based: the centre of the first pixel is 0.0. NaN where the row has none.
    ra, dec : float64
        ICRS position, degrees, 0 <= ra < 360; NaN where the row has none.
    sg_flags : int32
        NO_POSITION, POSITION_MISMATCH, DUPLICATE_ID, STAGE_CATALOG.
    usable : bool
        The row has a position on the sky and on the detector, and the two agree.
    """

    x: F64
    y: F64
    ra: F64
    dec: F64
    sg_flags: I32
    usable: Bool

    def __len__(self) -> int:
        return len(self.x)


def read_table(path: str | Path) -> pa.Table:
    """Read every row and column of a CAT file.

    Parameters
    ----------
    path : str or Path
        FITS file with one binary table, or with several of which one has the required columns, such as
        ``LDAC_OBJECTS`` in a SExtractor LDAC file.

    Returns
    -------
    pyarrow.Table
        See `sgclassify.stages.read.bintable.read_bintable`; no value is dropped.

    Raises
    ------
    UnusableInputError
        If the file is damaged, has no table, or has several possible catalogues, or if two columns share the name
        of a column that the stage reads.
    """
    path = Path(path)
    tables = [hdu for hdu in table_hdus(path) if hdu.name != "LDAC_IMHEAD"]
    if not tables:
        raise UnusableInputError(path, "no binary table in any HDU", "is this a catalogue?")
    whole = [hdu for hdu in tables if all(_find(column_names(hdu), name) for name in ALIASES)]
    if len(whole) > 1:
        fault = f"{' and '.join(hdu.label for hdu in whole)} are catalogues, where one is expected"
        raise UnusableInputError(path, fault, "write one file for each detector")
    hdu = (whole or tables)[0]
    _refuse_twins(column_names(hdu), path)
    return read_bintable(path, hdu)


def _refuse_twins(names: list[str], path: Path) -> None:
    """Refuse two columns with one name (in upper or lower case) where the stage reads one of them."""
    for official in ALIASES:
        found = _find(names, official)
        twins = [name for name in names if found is not None and name.lower() == found.lower()]
        # The exact official name decides, if only one column has it.
        if len(twins) > 1 and (found != official or names.count(found) > 1):
            fault = f"two columns may be its {official}: {' and '.join(map(repr, twins))}"
            raise UnusableInputError(path, fault, "rename or remove the one that is not")


def column_notes(table: pa.Table) -> list[str]:
    """Remarks for the report on columns that differ from the file, for a table from `read_table`.

    One line per column; at most `MAX_COLUMN_NOTES`, then the number of the others.
    """
    notes = [
        f"CAT column {field.name}: {field.metadata[b'note'].decode()}"
        for field in table.schema
        if b"note" in (field.metadata or {})
    ]
    more = len(notes) - MAX_COLUMN_NOTES
    return notes if more <= 0 else [*notes[:MAX_COLUMN_NOTES], f"{more} more CAT columns have such remarks"]


def find_column(table: pa.Table, name: str) -> str | None:
    """Name of an official CAT column in a table; None if the table does not have it.

    The official name comes before aliases, and its exact spelling before upper or lower case.
    """
    return _find(table.column_names, name)


def _find(columns: Sequence[str], name: str) -> str | None:
    if name in columns:
        return name
    for alias in ALIASES.get(name, (name.lower(),)):
        for column in columns:
            if column.lower() == alias:
                return column
    return None


def read_detections(table: pa.Table, header: ExposureHeader, config: StageConfig, path: str | Path) -> Detections:
    """Find the usable positions of a catalogue, and refuse a catalogue that cannot belong to its image.

    Parameters
    ----------
    table : pyarrow.Table
        From `read_table`, or (if ``header.files.catalog`` is None) from the stage's own detection, whose columns
        have the official names.
    config : StageConfig
        Its ``position_...``, ``max_bad_rows`` and ``min_px_per_row`` are used.

    Raises
    ------
    UnusableInputError
        If a required column is missing or not numeric, the detector cannot hold so many rows, or too many rows have
        no usable position.
    """
    own = header.files.catalog is None
    n = table.num_rows
    columns: dict[str, str] = {}
    for name in ALIASES:
        column = find_column(table, name)
        if column is None:
            raise UnusableInputError(path, f"missing column {name}", "deliver a Level-1 catalogue")
        columns[name] = column
    ny, nx = header.shape
    if n > 2**ROW_BITS or (not own and ny * nx < config.min_px_per_row * n):
        fault = f"{n} rows on {nx} x {ny} pixels: more than the image can hold"
        raise UnusableInputError(path, fault, "measure the catalogue again")

    x, y, ra, dec = (_numbers(table, columns[name], path) for name in ("X", "Y", "RA", "DEC"))
    x, y = x - 1.0, y - 1.0
    margin = 0.5 + config.position_margin_px
    with np.errstate(invalid="ignore"):
        placed = (x >= -margin) & (x <= nx - 1 + margin) & (y >= -margin) & (y <= ny - 1 + margin)
        placed &= (np.abs(ra) <= MAX_RIGHT_ASCENSION) & (np.abs(dec) <= MAX_DECLINATION)
    for values in (x, y, ra, dec):
        values[~placed] = np.nan
    ra, dec = right_ascension(ra), np.clip(dec, -90.0, 90.0)
    apart = separation_arcsec(ra, dec, *header.pixel_to_sky(x, y))
    agree = placed & (apart <= config.position_tolerance_arcsec)

    flags = np.zeros(n, dtype=np.int32)
    flags[~placed] |= SgFlag.NO_POSITION
    flags[placed & ~agree] |= SgFlag.POSITION_MISMATCH
    flags[_repeated(_with_nulls(table, columns["objID"]), path)] |= SgFlag.DUPLICATE_ID
    if own:
        flags |= SgFlag.STAGE_CATALOG
    bad = n - int(agree.sum())
    if bad > config.max_bad_rows * n:
        mismatches = int((placed & ~agree).sum())
        units = "".join(_unit_fault(table, columns[name]) for name in ("RA", "DEC"))
        fault = f"{bad} of {n} rows have no usable position ({mismatches} disagree with the WCS of the image{units})"
        raise UnusableInputError(path, fault, "measure the catalogue again")

    return Detections(x, y, ra, dec, flags, agree)


def separation_arcsec(ra1: F64, dec1: F64, ra2: F64, dec2: F64) -> F64:
    """Angular distance of pairs of positions (degrees), arcsec; by the haversine, exact for small angles too."""
    ra1, dec1, ra2, dec2 = (np.radians(angle) for angle in (ra1, dec1, ra2, dec2))
    half = np.sin((dec2 - dec1) / 2) ** 2 + np.cos(dec1) * np.cos(dec2) * np.sin((ra2 - ra1) / 2) ** 2
    apart: F64 = np.degrees(2 * np.arcsin(np.sqrt(np.clip(half, 0, 1)))) * 3600.0
    return apart


def _numbers(table: pa.Table, name: str, path: str | Path) -> F64:
    """A column as float64; NaN for "no value"."""
    column = _with_nulls(table, name)
    if not (pa.types.is_floating(column.type) or pa.types.is_integer(column.type)):
        raise UnusableInputError(path, f"column {name} holds no numbers", "deliver a Level-1 catalogue")
    values = np.array(pc.cast(column, pa.float64(), safe=False).to_numpy(), dtype=np.float64)
    values[values == NO_VALUE] = np.nan
    return values


def _unit_fault(table: pa.Table, name: str) -> str:
    """Hint that the unit of an angle may be the cause; empty where it is degrees or not given."""
    metadata = table.schema.field(name).metadata or {}
    unit = metadata.get(b"unit", b"").decode()
    return "" if unit.lower() in ("", "deg", "degree", "degrees") else f"; {name} is in {unit}, not degrees"


def _with_nulls(table: pa.Table, name: str) -> pa.ChunkedArray:
    """A column with nulls in place of the value that TNULL declares."""
    column, declared = table.column(name), (table.schema.field(name).metadata or {}).get(b"null")
    if declared is None:
        return column
    return pc.if_else(pc.equal(column, pa.scalar(int(declared), column.type)), None, column)


def _repeated(column: pa.ChunkedArray, path: str | Path) -> Bool:
    """Rows whose identifier occurs in other rows too; "no value" does not count."""
    if not len(column):
        return np.zeros(0, dtype=bool)
    if pa.types.is_nested(column.type):
        fault = "the identifiers (objID) are vectors"
        raise UnusableInputError(path, fault, "deliver a Level-1 catalogue")
    codes = column.combine_chunks().dictionary_encode()
    index = codes.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    counts = np.bincount(index[index >= 0], minlength=1)
    repeated = (index >= 0) & (counts[index] > 1)
    if pa.types.is_integer(column.type) or pa.types.is_floating(column.type):
        values = pc.cast(column, pa.float64(), safe=False).fill_null(NO_VALUE).to_numpy()
        repeated &= np.isfinite(values) & (values != NO_VALUE)
    return np.asarray(repeated, dtype=bool)
