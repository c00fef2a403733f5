"""The output folder: whose it is, that one run at a time writes it, and what is removed from it."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import socket
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from sgclassify.stages.atomic import write_atomic_text
from sgclassify.stages.errors import UsageError
from sgclassify.stages.read.names import is_utf8

log = logging.getLogger(__name__)

MARKER: Final = ".sgclassify"
LOCK: Final = ".lock"
WORK: Final = ".work"
PRODUCTS: Final = ("objects", "detections", "run.json", "report.html")


class OutputFolder:
    """The output folder of one run, locked while the context is open.

    Parameters
    ----------
    path : Path
        The folder; it is made where it is missing.
    run_key : str
        Digest of what decides about the products (inputs, model, configuration).
    overwrite : bool
        Whether products of a run with another key may be replaced.

    Raises
    ------
    UsageError
        On entering: if the folder cannot be written, holds files of others, holds the products of another run
        and `overwrite` is not set, or another run is at work in it.
    """

    def __init__(self, path: Path, run_key: str, overwrite: bool) -> None:
        self.path = path.absolute()
        self._run_key = run_key
        self._overwrite = overwrite
        self._lock: int | None = None

    @property
    def work(self) -> Path:
        """Folder for what lives only during the run."""
        return self.path / WORK

    @property
    def objects(self) -> Path:
        """Folder of the object catalogue."""
        return self.path / "objects"

    @property
    def detections(self) -> Path:
        """Folder of the input catalogues with the probabilities joined back."""
        return self.path / "detections"

    def __enter__(self) -> OutputFolder:
        self._check_owner()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.path / LOCK)
            self._check_key()
            if not (self.path / MARKER).exists():
                self._mark()
            _remove(self.work)
            self.work.mkdir()
        except OSError as error:
            self._release()
            raise UsageError(
                f"{self.path}: the output folder cannot be written ({error.strerror or error}); "
                "choose another with --output"
            ) from error
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
        """Whether products stand in the folder."""
        return any((self.path / name).exists() for name in PRODUCTS)

    def clear(self) -> None:
        """Remove the products of an earlier run and make the folders of this one.

        To be called once the run is known to have something to write, so that a run that cannot even start
        costs nothing.
        """
        try:
            for name in PRODUCTS:
                _remove(self.path / name)
            self._mark()
            for folder in (self.objects, self.detections):
                folder.mkdir()
        except OSError as error:
            raise UsageError(
                f"{self.path}: products of an earlier run cannot be replaced: {error}"
            ) from error

    def remove_work(self) -> None:
        """Remove what lived only during the run."""
        try:
            _remove(self.work)
        except OSError as error:
            log.warning("%s could not be removed: %s", self.work, error)

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
        if MARKER not in content and content - {LOCK}:
            raise UsageError(
                f"{self.path}: the folder holds files that are not of sgclassify; choose an empty or new "
                "folder"
            )

    def _mark(self) -> None:
        write_atomic_text(json.dumps({"format": 1, "run_key": self._run_key}) + "\n", self.path / MARKER)

    def _check_key(self) -> None:
        if not self.has_products:
            return
        earlier = _read_json(self.path / MARKER).get("run_key")
        if earlier != self._run_key and not self._overwrite:
            raise UsageError(
                f"{self.path}: holds the products of a run with other inputs, model or configuration; choose "
                "another folder, or replace them with --overwrite"
            )

    def _release(self) -> None:
        if self._lock is not None:
            (self.path / LOCK).unlink(missing_ok=True)
            os.close(self._lock)
            self._lock = None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _lock(path: Path) -> int:
    """Take the lock file; returns its descriptor.

    The kernel lets go of a dead holder's lock on the same host. A file that names another host may belong
    to a live run on a shared file system that does not pass locks on, so it is left alone.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            holder = _read_json(path)
            host, pid = holder.get("host"), holder.get("pid")
            free = _try_flock(descriptor)
            held = not free if free is not None else _alive(pid)
            if held or (host is not None and host != socket.gethostname()):
                raise UsageError(
                    f"{path.parent}: a run is at work in this folder (process {pid} on {host}); wait for "
                    f"it, or choose another folder. If that process is no more, remove {path}"
                )
            if not _same_file(descriptor, path):
                # Its holder removed the file between our opening and locking it.
                os.close(descriptor)
                continue
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor


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
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _same_file(descriptor: int, path: Path) -> bool:
    try:
        ours, there = os.fstat(descriptor), path.stat()
    except FileNotFoundError:
        return False
    return (ours.st_dev, ours.st_ino) == (there.st_dev, there.st_ino)
