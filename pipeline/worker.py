"""Loaded by the embedded workers as they start."""

from __future__ import annotations

import signal


def dask_setup(worker: object) -> None:
    """Leave Ctrl-C, which a terminal sends to the workers too, to the driver: it ends them in order."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
