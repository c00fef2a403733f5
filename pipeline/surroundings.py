"""What a command finds around it and may stumble over as it imports the libraries: a home folder, Dask's settings."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

from sgclassify.stages.errors import UsageError

NO_HOME: Final = os.devnull


def have_home() -> None:
    """Make sure that libraries can look into the home folder for their settings.

    A process that has none (HOME is not set and its user is not in the password database), or must not look into it,
    gets the null device instead, below which nothing is found and nothing can be written.
    """
    try:
        (Path.home() / ".config").stat()
    except (RuntimeError, PermissionError):
        os.environ["HOME"] = NO_HOME
    except OSError:
        pass  # nothing there is fine


def drop_working_folder() -> None:
    """Take the working folder off the path of modules, where ``python -m`` puts it: it holds data, not code."""
    if not sys.flags.safe_path:
        del sys.path[0]


def import_dask() -> None:
    """Import Dask, which reads the user's configuration of it as it is imported.

    Raises
    ------
    UsageError
        If that configuration is malformed; names the file.
    """
    try:
        import distributed  # noqa: F401
    except ImportError:
        raise
    except Exception as error:
        raise UsageError(
            f"Dask's configuration cannot be used: {' '.join(str(error).split())}; correct the file, or name another "
            "folder in DASK_CONFIG"
        ) from error
