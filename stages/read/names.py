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
        Observation number, its leading zeros kept.
    chip : int
        Detector number.
    version : str
        Version of the Level-1 processing; empty in the older names.
    kind : str
        ``IMG``, ``WHT``, ``FLG`` or ``CAT``, upper case whatever the file's name has.
    stem : str
        What the four files of the exposure have in common.
    """

    obsid: str
    chip: int
    version: str
    kind: str
    stem: str


@dataclass(frozen=True, slots=True)
class ExposureFiles:
    """The files of one exposure; None for one that is missing."""

    image: Path
    weight: Path | None = None
    flag: Path | None = None
    catalog: Path | None = None

    @property
    def present(self) -> dict[str, Path]:
        """The files that are there, by kind."""
        return {kind.name: path for kind in fields(self) if (path := getattr(self, kind.name)) is not None}


def strip_extension(name: str) -> str:
    """File name without ``.fits``, ``.fits.fz`` or ``.fits.gz``, or else without its last suffix."""
    short = _EXTENSION.sub("", name)
    return short if short != name else Path(name).stem


def has_fits_extension(name: str) -> bool:
    """Whether a file name ends like a FITS file's."""
    return _EXTENSION.search(name) is not None


def is_utf8(name: str) -> bool:
    """Whether a file name can be written as UTF-8; Python carries bytes that cannot as lone surrogates."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def parse_name(path: str | Path) -> ExposureName | None:
    """Take a CSST file name apart.

    Parameters
    ----------
    path : str or Path
        File name, with or without its folder. Read are
        ``CSST_MSC_MS_<TYPE>_<start>_<stop>_<obsid>_<chip>_L1_<version>_<KIND>.fits`` and the older
        ``..._<obsid>_<chip>_<kind>[_L1].fits``, in either case of letters, and ``.fits.fz``, ``.fits.gz``.

    Returns
    -------
    ExposureName or None
        None if the name is of another form.
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
    """Kind that a file name ends on (``IMG``, ``WHT``, ``FLG``, ``CAT``), standard name or not; else None."""
    match = _OTHER.fullmatch(strip_extension(Path(path).name))
    return match["kind"].upper() if match else None


def exposure_stem(path: str | Path) -> str:
    """Name of the exposure that a file belongs to: its name without extension, kind and ``_L1`` after that.

    The four files of an exposure have the same stem. It is the exposure's identifier within a run.
    """
    bare = strip_extension(Path(path).name)
    match = _STANDARD.fullmatch(bare) or _OTHER.fullmatch(bare)
    return match["stem"] if match else bare


def find_siblings(image: Path) -> ExposureFiles:
    """Find WHT, FLG and CAT beside an image, by name.

    Either case of the kind, and any of the three extensions, whatever the image's own: one exposure may be
    compressed in part. Of several, the one most like the image's name is taken. Where the image is a link, as a
    staging area has them, what does not lie beside the link is looked for beside the file that it leads to.

    Parameters
    ----------
    image : Path
        The IMG file.

    Returns
    -------
    ExposureFiles
        With None for what is not there.
    """
    places = _linked(image)
    found = {
        kind: next((p for place in places for p in _candidates(place, kind) if _is_file(p)), None)
        for kind in KINDS[1:]
    }
    return ExposureFiles(image, found["WHT"], found["FLG"], found["CAT"])


def _linked(path: Path) -> list[Path]:
    """A path and, where it is a link, what it leads to, step by step."""
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
        # the other spellings of a name may be longer than the system bears, though it is not
        if error.errno == errno.ENAMETOOLONG:
            return False
        raise


def catalog_stem(files: ExposureFiles) -> str:
    """Name of the CAT file without its extension, or the name that it would have had where it is missing."""
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
    # The older names have _L1 after the kind of the images, but not of the catalogue.
    levels = dict.fromkeys(("", level) if kind == "CAT" else (level, ""))
    for spelling in (kind.lower(), kind) if lower else (kind, kind.lower()):
        for tail in levels:
            for extension in dict.fromkeys((own, *EXTENSIONS)):
                yield image.with_name(f"{stem}_{spelling}{tail}{extension}")
