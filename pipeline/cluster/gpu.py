"""One worker process per GPU: which GPU it is, and that no other worker of this machine uses it too."""

from __future__ import annotations

import fcntl
import functools
import logging
import os
import re
import tempfile
from pathlib import Path
from typing import Final

from sgclassify.stages.errors import ClusterError

log = logging.getLogger(__name__)

_held: Final[dict[str, int]] = {}
"""Open lock files of this process by GPU; never closed, so that the kernel frees them when it ends."""


@functools.cache
def claim_gpu() -> str:
    """Claim the GPU of this process for as long as the process lives; calling it again does no harm.

    Returns its UUID; empty where torch sees no GPU, with a warning: the model then runs on the CPU. `ClusterError` if
    another process of this machine has claimed it.
    """
    import torch

    if not torch.cuda.is_available():
        log.warning(
            "this worker offers a GPU, but torch sees none here: the model runs on its CPU; look at the driver, "
            "at CUDA_VISIBLE_DEVICES and whether this torch was built for CUDA"
        )
        return ""
    if torch.cuda.device_count() > 1:
        log.warning(
            "this worker sees %d GPUs and uses the first; start one worker for each, with CUDA_VISIBLE_DEVICES",
            torch.cuda.device_count(),
        )
    uuid = str(torch.cuda.get_device_properties(0).uuid)
    claim(uuid)
    return uuid


def claim(uuid: str) -> None:
    """Take the lock of a GPU, unless this process has it; `ClusterError` if another process of this machine holds it.

    It is a lock of the kernel on a file in the temporary folder, which ends with its process.
    """
    if uuid in _held:
        return
    path = Path(tempfile.gettempdir()) / f"sgclassify-gpu-{re.sub('[^0-9A-Za-z-]', '_', uuid)}.lock"
    handle = _open(path)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(handle, 20, 0).decode("ascii", "replace").strip() or "unknown"
        os.close(handle)
        raise ClusterError(
            f"GPU {uuid} is used by process {holder} already, process {os.getpid()} cannot share it; start one "
            "worker per GPU, each with its own CUDA_VISIBLE_DEVICES, or ask for the CPU: --device cpu"
        ) from None
    _held[uuid] = handle
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()}\n".encode(), 0)
    except OSError:
        log.debug("%s: belongs to another user, the lock holds all the same", path)


def _open(path: Path) -> int:
    """The lock file; one of another user can only be read, which suffices for a lock."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
    except PermissionError:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
