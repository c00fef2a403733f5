"""File names of CSST Level-1 exposures, and which files belong together by name."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Final

KINDS: Final = ("IMG", "WHT", "FLG", "CAT")
"""Image, inverse variance, flags, catalogue (FORMATS: Level-1 files)."""

EXTENSIONS: Final = (".fits", ".fits.fz", ".fits.gz")

_EXTENSION = re.compile(r"\.(?:fits|fit)(?:\.fz|\.gz)?$", re.IGNORECASE)

_STANDARD = re.compile(
    r"(?P<stem>CSST_MSC_MS_(?P<survey>[A-Z0-9-]+)_(?P<start>\d{14})_(?P<stop>\d{14})"
    r"_(?P<obsid>\d{9,11})_(?P<chip>\d{2})_L1_(?P<version>[A-Z0-9.-]+))_(?P<kind>IMG|WHT|FLG|CAT)",
    re.IGNORECASE | re.ASCII,
)

_OLD = re.compile(
    r"(?P<stem>(?:\w+_)?(?P<obsid>\d{6,11})_(?P<chip>\d{2}))_(?P<kind>IMG|WHT|FLG|CAT)(?P<level>_L1)?",
    re.IGNORECASE | re.ASCII,
)

_OTHER = re.compile(r"(?P<stem>.+)_(?P<kind>IMG|WHT|FLG|CAT)(?P<level>_L1)?", re.IGNORECASE | re.DOTALL)


@dataclass(frozen=True, slots=True)
class ExposureName:
    """Parts of a CSST file name.

    Attributes
    ----------
    obsid : str
        Observation number, with its leading zeros.
    chip : int
        Detector number.
    version : str
        Version of the Level-1 processing; empty in the older names.
    kind : str
        ``IMG``, ``WHT``, ``FLG`` or ``CAT``, always upper case.
    stem : str
        The part that the names of the four files have in common.
    """

    obsid: str
    chip: int
    version: str
    kind: str
    stem: str


@dataclass(frozen=True, slots=True)
class ExposureFiles:
    """The files of one exposure; None for a missing one."""

    image: Path
    weight: Path | None = None
    flag: Path | None = None
    catalog: Path | None = None

    @property
    def present(self) -> dict[str, Path]:
        """The files that exist, by kind."""
        return {kind.name: path for kind in fields(self) if (path := getattr(self, kind.name)) is not None}


def strip_extension(name: str) -> str:
    """File name without ``.fits``, ``.fits.fz`` or ``.fits.gz``, or else without its last suffix."""
    short = _EXTENSION.sub("", name)
    return short if short != name else Path(name).stem


def has_fits_extension(name: str) -> bool:
    """Whether a file name ends like a FITS file's."""
    return _EXTENSION.search(name) is not None


def is_utf8(name: str) -> bool:
    """Whether a file name is UTF-8; Python represents other bytes as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def parse_name(path: str | Path) -> ExposureName | None:
    """Split a CSST file name, with or without its folder, into its parts; None if the name has another form.

    Two forms are known: ``CSST_MSC_MS_<TYPE>_<start>_<stop>_<obsid>_<chip>_L1_<version>_<KIND>.fits`` and the older
    ``..._<obsid>_<chip>_<kind>[_L1].fits``, in upper or lower case, also with ``.fits.fz`` or ``.fits.gz``.
    """
    name = Path(path).name
    if not has_fits_extension(name):
        return None
    bare = strip_extension(name)
    match = _STANDARD.fullmatch(bare) or _OLD.fullmatch(bare)
    if match is None:
        return None
    parts = match.groupdict()
    version = parts.get("version") or ""
    return ExposureName(parts["obsid"], int(parts["chip"]), version, parts["kind"].upper(), parts["stem"])


def file_kind(path: str | Path) -> str | None:
    """Kind at the end of any file name (``IMG``, ``WHT``, ``FLG``, ``CAT``); None if there is none."""
    match = _OTHER.fullmatch(strip_extension(Path(path).name))
    return match["kind"].upper() if match else None


def exposure_stem(path: str | Path) -> str:
    """Name of the exposure that a file belongs to: its name without the kind, the ``_L1`` after it and the extension.

    The four files of an exposure have the same stem. It identifies the exposure within a run.
    """
    bare = strip_extension(Path(path).name)
    match = _STANDARD.fullmatch(bare) or _OTHER.fullmatch(bare)
    return match["stem"] if match else bare


def find_siblings(image: Path) -> ExposureFiles:
    """Find WHT, FLG and CAT beside an image (IMG), by name; None for each missing file.

    The kind may be in upper or lower case, and each file may have any of the three extensions: one exposure may be
    compressed in part. If several files match, the one with the name most like the image's is taken. Where the image
    is a link, as in a staging area, files that are not beside the link are looked for beside its target.
    """
    places = _linked(image)
    found = {
        kind: next((p for place in places for p in _candidates(place, kind) if _is_file(p)), None) for kind in KINDS[1:]
    }
    return ExposureFiles(image, found["WHT"], found["FLG"], found["CAT"])


def _linked(path: Path) -> list[Path]:
    """A path and, where it is a link, its targets, step by step."""
    places = [path]
    while places[-1].is_symlink():
        place = places[-1].parent / places[-1].readlink()
        if place in places:
            break
        places.append(place)
    return places


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        # Other spellings of a legal name may be longer than the system allows.
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


def catalog_stem(files: ExposureFiles) -> str:
    """Name of the CAT file without its extension; where CAT is missing, the name that it would have."""
    path = files.catalog if files.catalog is not None else next(_candidates(files.image, "CAT"))
    return strip_extension(path.name)


def _candidates(image: Path, kind: str) -> Iterator[Path]:
    """Paths that a companion of an image may have, the likeliest first."""
    bare = strip_extension(image.name)
    own = image.name[len(bare) :]
    match = _STANDARD.fullmatch(bare) or _OTHER.fullmatch(bare)
    stem = match["stem"] if match else bare
    level = (match.groupdict().get("level") or "") if match else ""
    lower = match is not None and match["kind"].islower()
    # Older names have _L1 after the kind, except for the catalogue.
    levels = dict.fromkeys(("", level) if kind == "CAT" else (level, ""))
    for spelling in (kind.lower(), kind) if lower else (kind, kind.lower()):
        for tail in levels:
            for extension in dict.fromkeys((own, *EXTENSIONS)):
                yield image.with_name(f"{stem}_{spelling}{tail}{extension}")
