"""The output folder: its owner, the lock that lets one run at a time write it, and what is removed from it."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from sgclassify.pipeline.record.receipts import Receipts
from sgclassify.stages.errors import UsageError
from sgclassify.stages.read.names import is_utf8
from sgclassify.stages.write.atomic import write_atomic_text

log = logging.getLogger(__name__)

MARKER: Final = ".sgclassify"
MARKER_FORMAT: Final = 2
LOCK: Final = ".lock"
WORK: Final = ".work"
RECEIPTS: Final = ".receipts"
PRODUCTS: Final = ("objects", "detections", "run.json", "report.html")
SETTINGS: Final = "settings.json"
TOKEN: Final = "token"
NOTES: Final = "notes"
SCRATCH: Final = "dask"
PROGRESS: Final = "progress.json"
MOST_NAMED: Final = 10
"""Differences that a message names; more are counted."""


class OutputFolder:
    """The output folder of one run, locked while the context is open; made if it is missing.

    Parameters
    ----------
    path : Path
    settings : dict of str to (str, float, int, bool or None)
        What decides about the products beside the inputs: model and configuration, by name.
    overwrite : bool
        Whether products of other settings or inputs may be replaced.

    Raises
    ------
    UsageError
        On entering: if the folder cannot be written, holds files that are not of sgclassify, holds products of other
        settings and `overwrite` is not set, or another run is at work in it.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], overwrite: bool) -> None:
        self.path = path.absolute()
        # as JSON gives them back, so that they can be compared
        self._settings: dict[str, Any] = json.loads(json.dumps(settings))
        self._overwrite = overwrite
        self._lock: int | None = None
        self.is_fresh = False
        self.token = uuid.uuid4().hex

    @property
    def work(self) -> Path:
        """Folder for what lives until the run is complete."""
        return self.path / WORK

    @property
    def prepared(self) -> Path:
        """Folder of the prepared exposures."""
        return self.work / "exposures"

    @property
    def objects(self) -> Path:
        """Folder of the object catalogue."""
        return self.path / "objects"

    @property
    def detections(self) -> Path:
        """Folder of the input catalogues with the probabilities joined back."""
        return self.path / "detections"

    @property
    def receipts(self) -> Receipts:
        """Receipts of what is complete, and of what is prepared with these settings."""
        return Receipts(self.path / RECEIPTS, self.prepared if self._work_is_ours() else None)

    def __enter__(self) -> OutputFolder:
        self._check_owner()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.path / LOCK)
            self._check_settings()
            if not (self.path / MARKER).exists():
                self._mark()
            if self.is_fresh or not self._work_is_ours():
                _remove(self.work)
            for name in (SCRATCH, NOTES, PROGRESS):
                _remove(self.work / name)
            self.prepared.mkdir(parents=True, exist_ok=True)
            (self.work / NOTES).mkdir()
            write_atomic_text(json.dumps(self._settings) + "\n", self.work / SETTINGS)
            write_atomic_text(self.token, self.work / TOKEN)
            self._remove_parts()
        except OSError as error:
            self._release()
            raise self._not_written(error.strerror or str(error)) from error
        except UsageError:
            self._release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._release()

    @property
    def has_products(self) -> bool:
        """Whether the folder holds products or receipts; the record of a run alone does not count."""
        return any((self.path / name).exists() for name in ("objects", "detections", RECEIPTS))

    def inspect(self) -> None:
        """Raise what entering would raise, without writing anything; another run may be at work in the folder."""
        self._check_owner()
        place = next(one for one in (self.path, *self.path.parents) if os.path.lexists(one))
        if not place.is_dir():
            raise self._not_written(os.strerror(errno.ENOTDIR))
        if not os.access(place, os.W_OK | os.X_OK):
            raise self._not_written(f"{os.strerror(errno.EACCES)}: {place}")
        if self.path.exists():
            self._check_settings()

    def check_free(self) -> None:
        """Raise `UsageError` if another run is at work in the folder, without writing anything."""
        try:
            descriptor = os.open(self.path / LOCK, os.O_RDWR)
        except OSError:
            return  # there is none; what else is wrong shows on entering
        try:
            _check_holder(descriptor, self.path / LOCK)
        finally:
            os.close(descriptor)

    def refuse(self, differences: Sequence[str]) -> None:
        """Refuse inputs that are not those of the products, or treat the folder as fresh if these may be replaced.

        The `UsageError` names the differences.
        """
        if self.has_products and not self._overwrite:
            raise UsageError(
                f"{self.path}: holds the work of a run with other inputs: {_some(differences)}; choose another "
                "folder, or start again with --overwrite"
            )
        self.is_fresh = True

    def start_afresh(self) -> None:
        """Remove what an earlier run with other inputs has prepared."""
        for path in self.prepared.glob("*"):
            _remove(path)

    def open_products(self) -> None:
        """Make the folders of the products; those of other settings or inputs are removed.

        To be called once the run has something to write: a run that cannot start must not cost any products.
        """
        receipts = self.receipts
        try:
            if self.is_fresh:
                # receipts first: they must never stand for what is not there
                for name in (RECEIPTS, *PRODUCTS):
                    _remove(self.path / name)
                self.is_fresh = False
            if read_json(self.path / MARKER).get("settings") != self._settings:
                self._mark()
            for name in (*PRODUCTS[:2], RECEIPTS):
                # a link would lead out of the output folder
                if (self.path / name).is_symlink():
                    (self.path / name).unlink()
            for folder in (self.objects, self.detections, receipts.exposures, receipts.tiles):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"{self.path}: products of an earlier run cannot be replaced: {error}") from error

    def remove_stray_detections(self, keep: set[str]) -> None:
        """Remove products of exposures that are not part of this run."""
        for path in self.detections.glob("*.parquet"):
            if path.name not in keep:
                path.unlink(missing_ok=True)

    def remove_work(self, whole: bool = True) -> None:
        """Remove the work folder, or only the part that the next run cannot use."""
        path = self.work if whole else self.work / SCRATCH
        try:
            _remove(path)
        except OSError as error:
            log.warning("%s could not be removed: %s", path, error)

    def _remove_parts(self) -> None:
        """Remove what killed writers left; a writer that is still there belongs to no run."""
        for name in (*PRODUCTS[:2], RECEIPTS, WORK):
            for path in (self.path / name).rglob(".*.part"):
                _remove(path)
        for path in self.path.glob(".*.part"):
            _remove(path)

    def _check_owner(self) -> None:
        if not is_utf8(str(self.path)):
            raise UsageError(
                f"{str(self.path)!r}: the path is not UTF-8, which Parquet needs; choose another with --output"
            )
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UsageError(f"{self.path}: is a file, not a folder; choose another with --output")
        try:
            content = {entry.name for entry in self.path.iterdir()}
        except OSError as error:
            raise UsageError(f"{self.path}: the output folder cannot be read ({error.strerror})") from error
        others = {name for name in content if name != LOCK and not name.startswith(f".{MARKER}.")}
        if MARKER not in content and others:
            raise UsageError(
                f"{self.path}: the folder holds files that are not of sgclassify; choose an empty or new folder"
            )

    def _not_written(self, reason: str) -> UsageError:
        return UsageError(f"{self.path}: the output folder cannot be written ({reason}); choose another with --output")

    def _work_is_ours(self) -> bool:
        """Whether this run can use what a run that ended early has left in the work folder."""
        return read_json(self.work / SETTINGS) == self._settings

    def _mark(self) -> None:
        marker = {"format": MARKER_FORMAT, "settings": self._settings}
        write_atomic_text(json.dumps(marker, indent=1) + "\n", self.path / MARKER)

    def _check_settings(self) -> None:
        """Refuse products of other settings, or treat the folder as fresh if they may be replaced."""
        if not self.has_products:
            return
        marker = read_json(self.path / MARKER)
        earlier = marker.get("settings")
        if not isinstance(earlier, dict):
            differences = ["an earlier version of the software"]
        else:
            differences = [
                f"{name} was {earlier.get(name)!r} and is {self._settings.get(name)!r}"
                for name in sorted({*earlier, *self._settings})
                if earlier.get(name) != self._settings.get(name)
            ]
        if differences and not self._overwrite:
            raise UsageError(
                f"{self.path}: holds the products of a run with another model, configuration or program: "
                f"{_some(differences)}; choose another folder, or replace them with --overwrite"
            )
        self.is_fresh = bool(differences)

    def _release(self) -> None:
        if self._lock is not None:
            (self.path / LOCK).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None


def _some(items: Sequence[str]) -> str:
    more = f", and {len(items) - MOST_NAMED} more" if len(items) > MOST_NAMED else ""
    return ", ".join(items[:MOST_NAMED]) + more


def holder(path: Path) -> tuple[dict[str, Any], bool]:
    """Who holds this output folder, ``pid`` and ``host``, and whether that run may be alive."""
    found = read_json(path / LOCK)
    if not found:
        return {}, False
    if found.get("host") != socket.gethostname():
        return found, True
    return found, found.get("pid") == os.getpid() or _alive(found.get("pid"))


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty if it cannot be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _lock(path: Path) -> int:
    """Take the lock file; returns its descriptor.

    The kernel frees the lock of a dead holder on this host. A file that names another host is left alone: it may
    belong to a live run, on a shared file system that does not pass locks on.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            _check_holder(descriptor, path)
            if not _same_file(descriptor, path):
                # its holder removed the file before we locked it
                os.close(descriptor)
                continue
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


def _check_holder(descriptor: int, path: Path) -> None:
    """Lock the file that is open; raise `UsageError` where another run holds it."""
    found = read_json(path)
    host, pid = found.get("host"), found.get("pid")
    free = _try_flock(descriptor)
    held = not free if free is not None else _alive(pid)
    if held or (host is not None and host != socket.gethostname()):
        raise UsageError(
            f"{path.parent}: a run is at work in this folder (process {pid} on {host}); wait for "
            f"it, or choose another folder. If that process is no more, remove {path}"
        )


def _try_flock(descriptor: int) -> bool | None:
    """Whether the lock was free and is now ours; None on a file system without locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
            return None
        raise
    return True


def _alive(pid: object) -> bool:
    if not isinstance(pid, int) or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except OSError as error:
        # another user's process is alive too
        return not isinstance(error, ProcessLookupError)
    return True


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        ours, there = os.fstat(descriptor), path.stat()
    except FileNotFoundError:
        return False
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)
