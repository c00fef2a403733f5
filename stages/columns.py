"""Registry of the product's columns, and the VOParquet metadata that describe them.

VOParquet 1.0 (IVOA Note) stores a VOTable without data in the footer of a Parquet file: one FIELD per column,
with unit, UCD and description.
"""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import pyarrow as pa
from astropy import units

from sgclassify.stages.cascade import Stage

NO_OBJECT: Final = -1
"""``object_id`` of a row that belongs to no object. It is not null: readers turn integers with nulls into floats, which
changes identifiers beyond 2^53 into those of other objects."""

CLASSES: Final = ("star", "galaxy")
"""Values of ``sg_class``, in the order of its dictionary."""


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a product.

    Attributes
    ----------
    type : pyarrow.DataType or None
        None for columns of the input, which keep the type they come with.
    unit : str
        VOUnit; empty for numbers without unit.
    ucd : str
        UCD1+; empty where none fits.
    length : int
        Longest text of a string column.
    """

    name: str
    type: pa.DataType | None
    unit: str
    ucd: str
    description: str
    length: int = 0

    @property
    def field(self) -> pa.Field:
        """The column in an Arrow schema."""
        return pa.field(self.name, self.type, nullable=nullable(self.type))


def nullable(kind: pa.DataType) -> bool:
    """Whether a column of this type may have nulls: not integers and booleans, which readers would change."""
    return not (pa.types.is_integer(kind) or pa.types.is_boolean(kind))


_P_STAR: Final = Column(
    "p_star",
    pa.float32(),
    "",
    "stat.probability;src.class.starGalaxy",
    "calibrated probability that the object is a star; null where not scored",
)
_P_GALAXY: Final = Column(
    "p_galaxy",
    pa.float32(),
    "",
    "stat.probability;src.class.starGalaxy",
    "calibrated probability that the object is a galaxy, 1 - p_star; null where not scored",
)
_SG_CLASS: Final = Column(
    "sg_class",
    pa.dictionary(pa.int8(), pa.string()),
    "",
    "src.class.starGalaxy",
    "the more probable class, star or galaxy; null where not scored",
    max(map(len, CLASSES)),
)
_SG_FLAGS: Final = Column("sg_flags", pa.int32(), "", "meta.code.qual", "quality bit mask; 0 = nothing to remark")
_N_BANDS: Final = Column(
    "n_bands",
    pa.int8(),
    "",
    "meta.number;instr.bandpass",
    "number of bands that the probabilities rest on; 0 where not scored",
)
_BANDS: Final = Column(
    "bands",
    pa.string(),
    "",
    "meta.id;instr.bandpass",
    "bands that the probabilities rest on, in order of wavelength, separated by commas",
    len("NUV,u,g,r,i,z,y"),
)
_SCORES: Final = (_P_STAR, _P_GALAXY, _SG_CLASS, _SG_FLAGS, _N_BANDS, _BANDS)

OBJECT_COLUMNS: Final = (
    Column("object_id", pa.int64(), "", "meta.id;meta.main", "identifier of the object"),
    Column("ra", pa.float64(), "deg", "pos.eq.ra;meta.main", "right ascension of the anchor detection, ICRS"),
    Column("dec", pa.float64(), "deg", "pos.eq.dec;meta.main", "declination of the anchor detection, ICRS"),
    *_SCORES,
    Column(
        "logit",
        pa.float64(),
        "",
        "stat.value;src.class.starGalaxy",
        "ln(p_star / p_galaxy) under the model's own prior (model_prior_star_fraction); null where not scored",
    ),
    Column(
        "sg_stage",
        pa.int8(),
        "",
        "meta.code",
        "stage of the model that decided: " + ", ".join(f"{stage} {stage.meaning}" for stage in Stage),
    ),
    Column("_healpix_29", pa.int64(), "", "pos.healpix", "HEALPix index of the position, order 29, nested scheme"),
)
"""Columns of the object catalogue, in their order."""

DETECTION_COLUMNS: Final = (
    Column(
        "object_id",
        pa.int64(),
        "",
        "meta.id.parent",
        "identifier of the object that the detection belongs to; -1 for a row that belongs to none",
    ),
    *_SCORES,
)
"""Columns appended to the rows of an input catalogue, in their order."""

INPUT_COLUMNS: Final = {
    column.name.lower(): column
    for column in (
        Column("objID", None, "", "meta.id;meta.main", "identifier of the detection in its catalogue"),
        Column("X", None, "pix", "pos.cartesian.x;instr.det", "column, 1-based FITS pixels"),
        Column("Y", None, "pix", "pos.cartesian.y;instr.det", "row, 1-based FITS pixels"),
        Column("RA", None, "deg", "pos.eq.ra;meta.main", "right ascension, ICRS"),
        Column("DEC", None, "deg", "pos.eq.dec;meta.main", "declination, ICRS"),
        Column("Flag", None, "", "meta.code.qual", "quality flag of the input catalogue"),
    )
}
"""What is known of columns of input catalogues, by lower-case name."""

VERSION_KEY: Final = "IVOA.VOTable-Parquet.version"
CONTENT_KEY: Final = "IVOA.VOTable-Parquet.content"

_XML_START: Final = (
    r"A-Z_a-z\u00C0-\u00D6\u00D8-\u00F6\u00F8-\u02FF\u0370-\u037D\u037F-\u1FFF\u200C-\u200D\u2070-\u218F"
    r"\u2C00-\u2FEF\u3001-\uD7FF\uF900-\uFDCF\uFDF0-\uFFFD\U00010000-\U000EFFFF"
)
_XML_NAME: Final = re.compile(rf"[{_XML_START}][{_XML_START}.0-9\u00B7\u0300-\u036F\u203F-\u2040-]*")
"""What XML allows as an ID: a name without a colon (Namespaces in XML 1.0, production 4)."""

_VOTABLE_TYPES: Final = (
    (pa.types.is_boolean, "boolean"),
    (pa.types.is_uint8, "unsignedByte"),
    (pa.types.is_int8, "short"),
    (pa.types.is_int16, "short"),
    (pa.types.is_uint16, "int"),
    (pa.types.is_int32, "int"),
    # VOTable has no unsigned 64-bit integers. With its only unsigned type astropy keeps them, long makes them floats.
    (pa.types.is_uint64, "unsignedByte"),
    (pa.types.is_integer, "long"),
    (pa.types.is_float16, "float"),
    (pa.types.is_float32, "float"),
    (pa.types.is_float64, "double"),
)


def describe(
    schema: pa.Schema, columns: Sequence[Column], infos: Mapping[str, str], lengths: Mapping[str, int]
) -> dict[str, str]:
    """VOParquet metadata of a table.

    Parameters
    ----------
    schema : pyarrow.Schema
        The table as written. Field metadata ``unit``, ``ucd``, ``null``, ``shape`` and ``note`` (see
        `sgclassify.stages.read.bintable.read_bintable`) describe columns that are not in `columns`.
    columns : sequence of Column
        What is known of some columns, by name.
    infos : mapping of str to str
        Facts about the whole table (model, prior), written as INFO.
    lengths : mapping of str to int
        Longest text of each string column.

    Returns
    -------
    dict of str to str
        Entries for the key-value metadata of the Parquet file; the same input gives the same text. There is one FIELD
        per column, with its name. astropy names a column by its ID if it has one. A column that astropy cannot join
        to the data (a list of texts, or a name that is no XML identifier) gets an ID that is the name of no column.
    """
    known = {column.name: column for column in columns}
    root = ET.Element("VOTABLE", version="1.4", xmlns="http://www.ivoa.net/xml/VOTable/v1.3")
    resource = ET.SubElement(root, "RESOURCE", type="results")
    ET.SubElement(resource, "COOSYS", ID="icrs", system="ICRS")
    for key in sorted(infos):
        ET.SubElement(resource, "INFO", name=key, value=infos[key])
    table = ET.SubElement(resource, "TABLE")
    taken = {*schema.names, "icrs"}
    for field in schema:
        column = known.get(field.name) or _input_column(field)
        attributes = {"name": field.name, **_datatype(field.type, lengths.get(field.name, 0))}
        identifier = _identifier(field, taken)
        if identifier != field.name or not identifier.isascii():
            taken.add(identifier)
            attributes["ID"] = identifier
        if column.unit:
            attributes["unit"] = column.unit
        if column.ucd:
            attributes["ucd"] = column.ucd
        if column.ucd.startswith("pos.eq."):
            attributes["ref"] = "icrs"
        element = ET.SubElement(table, "FIELD", attributes)
        if column.description:
            ET.SubElement(element, "DESCRIPTION").text = column.description
        null = (field.metadata or {}).get(b"null")
        if null is not None and not pa.types.is_uint64(_element(field.type)):
            ET.SubElement(element, "VALUES", null=null.decode())
    text = ET.tostring(root, encoding="unicode")
    return {VERSION_KEY: "1.0", CONTENT_KEY: f'<?xml version="1.0" encoding="UTF-8"?>\n{text}'}


def _input_column(field: pa.Field) -> Column:
    """Description of an input column: from its file if the file has one, else from the registry."""
    registered = INPUT_COLUMNS.get(field.name.lower(), Column(field.name, None, "", "", ""))
    said = {key.decode(): value.decode("utf-8", "replace") for key, value in (field.metadata or {}).items()}
    remarks = [said.get("description") or registered.description]
    unit = registered.unit
    if said.get("unit"):
        unit = _vounit(said["unit"])
        remarks += [] if unit else [f"(unit: {said['unit']})"]
    if "shape" in said:
        remarks.append(f"(array of shape {said['shape']}, the last axis varying fastest)")
    if pa.types.is_uint64(_element(field.type)):
        remarks.append("(unsigned 64-bit integers, for which VOTable has no type)")
    if "note" in said:
        remarks.append(f"({said['note']})")
    return Column(
        field.name, None, unit, said.get("ucd") or registered.ucd, " ".join(remark for remark in remarks if remark)
    )


def _identifier(field: pa.Field, taken: Collection[str]) -> str:
    """ID of a FIELD: the name of its column where XML allows it, else a name that is not taken."""
    texts = pa.types.is_fixed_size_list(field.type) and _datatype(field.type, 1)["datatype"] == "unicodeChar"
    if _XML_NAME.fullmatch(field.name) and not texts:
        return str(field.name)
    identifier = "_" + re.sub(r"[^A-Za-z0-9_.-]", "_", field.name)
    while identifier in taken:
        identifier += "_"
    return identifier


def _element(kind: pa.DataType) -> pa.DataType:
    """Type of the values in a column of lists; for any other column, its own type."""
    is_list = pa.types.is_fixed_size_list(kind) or pa.types.is_list(kind)
    return kind.value_type if is_list else kind


def _vounit(text: str) -> str:
    """A unit of a FITS header in VOUnit notation; empty if VOUnit cannot write it."""
    for notation in ("vounit", "fits", "generic"):
        try:
            found = units.Unit(text, format=notation, parse_strict="raise")
            vounit = str(found.to_string("vounit"))
            units.Unit(vounit, format="vounit", parse_strict="raise")
        except (ValueError, TypeError):
            continue
        return vounit
    return ""


def _datatype(kind: pa.DataType, length: int) -> dict[str, str]:
    """VOTable datatype and arraysize of an Arrow type."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if pa.types.is_fixed_size_list(kind):
        # The lists of the file are flat. astropy refuses a document in which texts have two axes.
        inner = _datatype(kind.value_type, length)
        return {**inner, "arraysize": str(kind.list_size * int(inner.get("arraysize", 1)))}
    if pa.types.is_list(kind):
        return {**_datatype(kind.value_type, length), "arraysize": "*"}
    for matches, datatype in _VOTABLE_TYPES:
        if matches(kind):
            return {"datatype": datatype}
    # A fixed size, since astropy cannot join texts of variable length with those of the file.
    return {"datatype": "unicodeChar", "arraysize": str(max(length, 1))}
