"""What libraries need as they are imported: a home folder, and sound settings of Dask."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

from sgclassify.stages.errors import UsageError

NO_HOME: Final = os.devnull


def have_home() -> None:
    """Make sure that libraries can look for their settings in a home folder.

    If the process has none (HOME is not set, and its user is not in the password database) or may not read it, the null
    device takes its place: nothing is found below it, and nothing can be written.
    """
    try:
        (Path.home() / ".config").stat()
    except (RuntimeError, PermissionError):
        os.environ["HOME"] = NO_HOME
    except OSError:
        pass  # an empty home is fine


def drop_working_folder() -> None:
    """Take the working folder, where ``python -m`` puts it, off the path of modules: it holds data, not code."""
    if not sys.flags.safe_path:
        del sys.path[0]


def import_dask() -> None:
    """Import Dask, which then reads the user's configuration; `UsageError` names the file if that is malformed."""
    try:
        import distributed  # noqa: F401
    except ImportError:
        raise
    except Exception as error:
        raise UsageError(
            f"Dask's configuration cannot be used: {' '.join(str(error).split())}; correct the file, or name another "
            "folder in DASK_CONFIG"
        ) from error
