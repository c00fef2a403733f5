"""Read labelled tables of any origin: Parquet, FITS, VOTable, ECSV, CSV, told apart by their content."""

from __future__ import annotations

import gzip
import logging
import warnings
import zlib
from pathlib import Path
from typing import Any, Final
from xml.parsers.expat import ExpatError

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from astropy import units as u
from astropy.io import fits
from astropy.table import Column, Table
from astropy.table.meta import YamlParseError, get_header_from_yaml

from sgclassify.stages.bands import BANDS
from sgclassify.stages.errors import UsageError
from sgclassify.stages.read.header import NO_VALUE

log = logging.getLogger(__name__)

ANGLES: Final = {"ra": u.deg, "dec": u.deg, "r50_arcsec": u.arcsec}
"""Columns that are angles, and the unit that they are read in, which is also the unit where the table states none."""

NUMBERS: Final = (*ANGLES, "redshift", "sersic_n", *(f"mag_{band}" for band in BANDS), "p_star", "p_galaxy")
FLAGS: Final = ("blended", "binary")
NO_MAGNITUDE: Final = 90.0
"""A magnitude of this or more means "no value", as does `NO_VALUE`."""
OTHERS: Final = ("true_class", "object_id", "field", "sg_flags", "n_bands", "snr", "star_density", "roll_deg")

_KNOWN: Final = {name.lower(): name for name in (*NUMBERS, *FLAGS, *OTHERS)}

_UNREADABLE: Final = (
    OSError, ValueError, TypeError, KeyError, IndexError, EOFError, AttributeError, zlib.error, ExpatError,
    fits.VerifyError, YamlParseError, pa.ArrowException,
)  # fmt: skip
"""Errors of astropy and pyarrow on a file that is no table, or a damaged one."""

Units = dict[str, str]


def read_table(path: Path, needed: tuple[str, ...]) -> pa.Table:
    """Read a table of any of the formats.

    Parameters
    ----------
    path : Path
        Parquet, FITS (the first table that has the needed columns), VOTable, ECSV, or CSV with a header line; all but
        Parquet may be compressed by gzip.
    needed : tuple of str
        Columns that the table must have.

    Returns
    -------
    pyarrow.Table
        Its columns of one value per row; from Parquet, all columns. The known columns (`NUMBERS`, `FLAGS`, `OTHERS`)
        have these names, whatever their case in the file. Numbers are float64, flags bool, ``ra`` and ``dec`` in
        degrees, ``r50_arcsec`` in arcsec, and ``true_class`` is lower case, without blanks around it. Null where there
        is no value.

    Raises
    ------
    UsageError
        If the file cannot be read as a table, lacks a needed column, or has impossible values in a known one.
    """
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give a table in Parquet, FITS, VOTable, ECSV or CSV")
    try:
        # the warnings are of peculiarities of the file: units, multiple tables, names of columns
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table, units = _read(path, needed)
            columns = table.column_names
    except _UNREADABLE as error:
        raise UsageError(
            f"{path}: not a table that can be read ({str(error).strip() or type(error).__name__});"
            " give one in Parquet, FITS, VOTable, ECSV or CSV"
        ) from error
    names = _names(path, columns)
    units = {new: units[old] for old, new in zip(columns, names, strict=True) if old in units}
    table = table.rename_columns(names)
    for name in needed:
        if name not in names:
            raise UsageError(f"{path}: no column {name}; it has {', '.join(names)}; rename the one that is meant")
    for name in (*NUMBERS, *FLAGS, "true_class"):
        if name in names:
            table = table.set_column(names.index(name), name, _typed(path, name, table[name], units.get(name)))
    return table


def read_truth(path: Path) -> pa.Table:
    """Read a truth table: ``ra``, ``dec``, ``true_class``, and any other columns of `read_table`.

    Rows without a position are left out, with a warning. `UsageError` as of `read_table`, and if a declination is
    beyond a pole.
    """
    table = read_table(path, ("ra", "dec", "true_class"))
    ra, dec = (table[name].to_numpy() for name in ("ra", "dec"))
    known = np.isfinite(ra) & np.isfinite(dec)
    if (np.abs(dec[known]) > 90.0).any():
        raise UsageError(
            f"{path}: dec is beyond a pole ({dec[known][np.abs(dec[known]).argmax()]:g}); give ra and dec in degrees,"
            " or state their unit in the table"
        )
    if not known.all():
        log.warning("%s: %d of %d rows have no position and are left out", path, (~known).sum(), len(known))
        table = table.filter(pa.array(known))
    return table


def _read(path: Path, needed: tuple[str, ...]) -> tuple[pa.Table, Units]:
    """The table as it stands in the file, and the units that it states."""
    with path.open("rb") as file:
        start = file.read(4096)
    if start.startswith(b"PAR1"):
        table = pq.read_table(path, partitioning=None)
        return _masked(table), _units_of_parquet(table.schema)
    if start.startswith(b"\x1f\x8b"):
        with gzip.open(path) as unpacked:
            start = unpacked.read(4096)
    if start.startswith(b"SIMPLE"):
        with fits.open(path, memmap=False) as hdus:
            found = _first_table(hdus, needed)
            return _from_astropy(Table.read(hdus, hdu=found))
    if start.lstrip(b"\xef\xbb\xbf \t\r\n").startswith((b"<?xml", b"<VOTABLE")):
        return _from_astropy(Table.read(path, format="votable", table_id=0, use_names_over_ids=True))
    raw = path.read_bytes()
    # some editors put a mark in front of a text
    text = (gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw).decode("utf-8-sig")
    if "\0" in start.decode("latin-1") or not text.strip():
        raise ValueError("neither of these formats, nor a text")
    kind = "ascii.ecsv" if text.startswith("# %ECSV") else "ascii.csv"
    return _from_astropy(Table.read(text.splitlines(), format=kind))


def _first_table(hdus: fits.HDUList, needed: tuple[str, ...]) -> int:
    """Number of the first table that has the needed columns, else of the first one."""
    tables = [k for k, hdu in enumerate(hdus) if isinstance(hdu, fits.BinTableHDU | fits.TableHDU)]
    tables = [k for k in tables if not isinstance(hdus[k], fits.CompImageHDU)]
    if not tables:
        raise ValueError("a FITS file without a table")
    return next((k for k in tables if {*needed} <= {name.lower() for name in hdus[k].columns.names}), tables[0])


def _from_astropy(table: Table) -> tuple[pa.Table, Units]:
    columns: dict[str, pa.Array] = {}
    units: Units = {}
    for name in table.colnames:
        column = table[name]
        # no times, no sky coordinates, no vectors
        if not isinstance(column, Column) or column.ndim != 1 or column.dtype.kind not in "biufSUO":
            continue
        mask = np.asarray(getattr(column, "mask", np.zeros(len(column), dtype=bool)))
        values = np.ma.getdata(column)
        if column.dtype.kind in "SUO":
            texts = [None if m else _text(v) for v, m in zip(values.tolist(), mask, strict=True)]
            columns[name] = pa.array(texts, pa.string())
        else:
            columns[name] = pa.array(np.asarray(values, dtype=column.dtype.newbyteorder("=")), mask=mask)
        if column.unit is not None and str(column.unit):
            units[name] = str(column.unit)
    return pa.table(columns), units


def _masked(table: pa.Table) -> pa.Table:
    """The table with nulls where astropy has written them to Parquet as a column of its own."""
    for name in (n.removesuffix(".mask") for n in table.column_names if n.endswith(".mask")):
        if name in table.column_names:
            mask = table[f"{name}.mask"].cast(pa.bool_())
            values = pc.if_else(mask, pa.scalar(None, table.schema.field(name).type), table[name])
            table = table.set_column(table.column_names.index(name), name, values).drop_columns(f"{name}.mask")
    return table


def _units_of_parquet(schema: pa.Schema) -> Units:
    """Units that astropy has written with a Parquet file."""
    raw = (schema.metadata or {}).get(b"table_meta_yaml")
    if raw is None:
        return {}
    header = get_header_from_yaml(raw.decode().split("\n"))
    return {one["name"]: str(one["unit"]) for one in header["datatype"] if "unit" in one}


def _text(value: Any) -> str | None:
    if value is None:
        return None
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _names(path: Path, names: list[str]) -> list[str]:
    """Names of the columns, known ones spelt as here; an exact match wins over other spellings of the same name."""
    renamed = []
    for name in names:
        known = _KNOWN.get(name.strip().lower(), name)
        renamed.append(name if known in names else known)
    for name in _KNOWN.values():
        if renamed.count(name) > 1:
            same = [old for old, new in zip(names, renamed, strict=True) if new == name]
            raise UsageError(f"{path}: more than one column {name} ({', '.join(same)}); keep one of them")
    return renamed


def _typed(path: Path, name: str, column: pa.ChunkedArray, unit: str | None) -> pa.ChunkedArray:
    """A known column in its type and unit."""
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if name == "true_class":
        texts = (_text(value) for value in column.to_pylist())
        clean = [None if t is None else t.strip(" \t\r\n\0").lower() for t in texts]
        return pa.chunked_array([pa.array(clean, pa.string())])
    target = pa.bool_() if name in FLAGS else pa.float64()
    try:
        if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
            column = pc.utf8_trim_whitespace(column)
            column = pc.if_else(pc.equal(column, ""), None, column)
        column = column.cast(target, safe=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        wanted = "true and false" if name in FLAGS else f"numbers{' of degrees' * (name in ('ra', 'dec'))}"
        raise UsageError(f"{path}: column {name} must hold {wanted}: {error}") from error
    if name.startswith("mag_"):
        # catalogues write these for "no value"
        absent = pc.or_(pc.equal(column, NO_VALUE), pc.greater_equal(column, NO_MAGNITUDE))
        column = pc.if_else(absent, None, column)
    if name in ANGLES and unit is not None:
        factor = _factor(path, name, unit)
        # without a conversion there is no rounding
        column = column if factor == 1.0 else pc.multiply(column, factor)
    return column


def _factor(path: Path, name: str, unit: str) -> float:
    try:
        # names of units in any case, and plurals such as degrees
        found = u.Unit(unit, parse_strict="silent")
        if isinstance(found, u.UnrecognizedUnit):
            found = u.Unit(unit.strip().lower().removesuffix("s"))
        return float(found.to(ANGLES[name]))
    except (ValueError, TypeError, u.UnitConversionError) as error:
        raise UsageError(f"{path}: the unit of {name} is {unit}; convert it to {ANGLES[name]}") from error
