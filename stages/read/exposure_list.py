"""The exposure list: which exposures to classify."""

from __future__ import annotations

import csv
import errno
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sgclassify.stages.errors import NothingToDoError, UnusableInputError, UsageError
from sgclassify.stages.read.names import (
    ExposureFiles,
    exposure_stem,
    file_kind,
    find_siblings,
    has_fits_extension,
    is_utf8,
    parse_name,
)

CSV_COLUMNS: Final = ("image", "weight", "flag", "catalog")

MAX_LIST_BYTES: Final = 2**28
"""Longest list accepted, 256 MiB (about two million paths); a longer file is not a list."""

Entry = ExposureFiles | UnusableInputError


@dataclass(frozen=True, slots=True)
class ExposureList:
    """Content of an exposure list.

    Attributes
    ----------
    files : tuple of ExposureFiles
        One per exposure, sorted by exposure and path, whatever the order of the list.
    notes : tuple of str
        Entries that repeat another entry.
    problems : tuple of UnusableInputError
        Entries that cannot be used, sorted.
    """

    files: tuple[ExposureFiles, ...]
    notes: tuple[str, ...]
    problems: tuple[UnusableInputError, ...]


def parse_list(path: str | Path) -> ExposureList:
    """Read an exposure list.

    Parameters
    ----------
    path : str or Path
        Either a text file with one path per line: an IMG file, or a folder (all IMG files below it); blank lines and
        lines that begin with ``#`` are skipped. Or a ``.csv`` file with the header ``image[,weight,flag,catalog]``; for
        an empty cell the file is found by its name. Relative paths start at the folder of the list.

    Returns
    -------
    ExposureList
        Two entries are the same exposure if they are the same file (links followed), have the same official name,
        which holds observation and detector, or have the same stem in the same folder. The alphabetically first
        path is kept. ``files`` may be empty if there are problems.

    Raises
    ------
    UsageError
        If the list is missing or not text, or its CSV header or rows are malformed.
    NothingToDoError
        If it names no exposure at all.
    """
    path = Path(path)
    lines = _lines(path)
    base = path.absolute().parent
    if path.suffix.lower() == ".csv":
        entries = list(_csv_entries(path, lines, base))
    else:
        entries = [entry for line in lines for entry in _line_entries(base / line)]
    if not entries:
        raise NothingToDoError(f"the exposure list {path} names no exposure")
    problems = {str(e): e for e in entries if isinstance(e, UnusableInputError)}
    files, notes = _unique([entry for entry in entries if isinstance(entry, ExposureFiles)])
    return ExposureList(files, notes, tuple(problems[text] for text in sorted(problems)))


def _lines(path: Path) -> list[str]:
    """Lines of a text file, without blank lines and comments."""
    try:
        if path.is_dir():
            raise UsageError(f"{path} is a folder; put its path into a text file, and give that")
        with path.open("rb") as stream:
            data = stream.read(MAX_LIST_BYTES + 1)
    except FileNotFoundError:
        raise UsageError(f"the exposure list {path} does not exist") from None
    except OSError as error:
        raise UsageError(f"the exposure list {path} cannot be read: {error.strerror}") from None
    if b"\0" in data or data.startswith(b"SIMPLE  =") or len(data) > MAX_LIST_BYTES:
        raise UsageError(f"{path} is no text file; an exposure list is UTF-8 text, a path a line")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(f"the exposure list {path} is not UTF-8 (line {line})") from None
    # Not str.splitlines: it also splits at characters that a path may contain.
    lines = (line.strip(" \t\v\f") for line in re.split(r"\r\n|\n|\r", text))
    return [line for line in lines if line and not line.startswith("#")]


def _line_entries(path: Path) -> Iterator[Entry]:
    """Exposures of one line: the file, or all IMG files below the folder."""
    try:
        is_folder = path.is_dir()
    except OSError as error:
        yield _unreadable(path, error)
        return
    if not is_folder:
        yield _entry(path)
        return
    faults: list[UnusableInputError] = []
    images = list(_images_below(path, faults))
    yield from faults
    for image in images:
        yield _entry(image)
    if not images and not faults:
        yield UnusableInputError(path, "no IMG file in this folder or below it", "correct the exposure list")


def _images_below(folder: Path, faults: list[UnusableInputError]) -> Iterator[Path]:
    """All IMG files below a folder; links to folders are followed once."""

    visited: set[str] = set()
    walk = os.walk(folder, onerror=lambda error: faults.append(_unreadable(folder, error)), followlinks=True)
    for root, folders, names in walk:
        real = os.path.realpath(root)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        # Sorted, so that every run follows the same one of two links to a folder.
        folders.sort()
        for name in sorted(names):
            if file_kind(name) == "IMG" and has_fits_extension(name) and not name.startswith("."):
                yield Path(root, name)


def _unreadable(path: Path, error: OSError) -> UnusableInputError:
    """Turn an error of the system into the fault of one path of the list."""
    advice = "correct the exposure list" if error.errno == errno.ENAMETOOLONG else "see to its permissions and its disk"
    return UnusableInputError(error.filename or path, f"cannot be read: {error.strerror}", advice)


def _entry(image: Path) -> Entry:
    """One image of the list and its companions, found by name."""
    try:
        fault = _image_fault(image)
        return fault if fault is not None else find_siblings(image)
    except OSError as error:
        return _unreadable(image, error)


def _image_fault(image: Path) -> UnusableInputError | None:
    if image.is_dir():
        return UnusableInputError(image, "is a folder, where an image is expected", "name its IMG files")
    if not image.exists():
        return UnusableInputError(image, "the file does not exist", "correct the exposure list")
    if not image.is_file():
        return UnusableInputError(image, "not a regular file", "correct the exposure list")
    kind = file_kind(image)
    if kind not in (None, "IMG"):
        return UnusableInputError(image, f"is a {kind} file", "list the IMG file of the exposure instead")
    if not is_utf8(image.name):
        # Products are named after their exposures, and Parquet allows only UTF-8.
        return UnusableInputError(image, "the name of the file is not UTF-8", "rename the files of the exposure")
    return None


def _csv_entries(path: Path, lines: Sequence[str], base: Path) -> Iterator[Entry]:
    rows = csv.reader(lines, skipinitialspace=True, strict=True)
    try:
        header = [cell.strip().lower() for cell in next(rows, [])]
        table = [[cell.strip() for cell in row] for row in rows]
    except csv.Error as error:
        raise UsageError(f"the exposure list {path} is malformed CSV: {error}") from None
    if not header:
        return
    unknown = [name for name in header if name not in CSV_COLUMNS]
    if unknown or "image" not in header or len(set(header)) < len(header):
        columns = ",".join(CSV_COLUMNS)
        raise UsageError(f"the exposure list {path} has the header {','.join(header)}; expected is {columns}")
    for row in table:
        if not any(row):
            continue
        if len(row) > len(header):
            raise UsageError(f"the exposure list {path} has more cells than columns in: {','.join(row)}")
        cells = dict(zip(header, row, strict=False))
        if not cells["image"]:
            raise UsageError(f"the exposure list {path} has no image in: {','.join(row)}")
        paths = {name: base / cell for name, cell in cells.items() if cell}
        try:
            yield _csv_entry(paths)
        except OSError as error:
            yield _unreadable(paths["image"], error)


def _csv_entry(paths: dict[str, Path]) -> Entry:
    image = paths["image"]
    fault = _image_fault(image)
    if fault is not None:
        return fault
    for name in CSV_COLUMNS[1:]:
        if name in paths and not paths[name].is_file():
            return UnusableInputError(paths[name], f"the {name} file does not exist", "correct the exposure list")
    beside = find_siblings(image)
    return ExposureFiles(
        image, paths.get("weight", beside.weight), paths.get("flag", beside.flag), paths.get("catalog", beside.catalog)
    )


def _unique(entries: list[ExposureFiles]) -> tuple[tuple[ExposureFiles, ...], tuple[str, ...]]:
    """Drop repeated exposures; the order of the list does not matter."""
    kept: list[ExposureFiles] = []
    by_stem: dict[str | Path, Path] = {}
    by_file: dict[Path, Path] = {}
    notes: list[str] = []
    for files in sorted(entries, key=lambda files: tuple(map(str, _paths(files)))):
        stem, real = _name(files.image), files.image.resolve()
        first = by_stem.get(stem) or by_file.get(real)
        if first is None:
            kept.append(files)
            by_stem[stem] = by_file[real] = files.image
        else:
            notes.append(f"{files.image} is the same exposure as {first}: done once")
    kept.sort(key=lambda files: (exposure_stem(files.image), str(files.image)))
    return tuple(kept), tuple(notes)


def _name(image: Path) -> str | Path:
    """Key that two paths of one exposure share; a name that is not official holds only within its folder."""
    stem = exposure_stem(image)
    return stem if parse_name(image) is not None else image.parent / stem


def _paths(files: ExposureFiles) -> tuple[Path | None, ...]:
    return files.image, files.weight, files.flag, files.catalog
