"""Worker processes import the functions of these tests by name, wherever the tests were started from."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def importable_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Put a folder that holds nothing but ``tests`` on the path of this process and of those that it starts.

    The repository itself must not be on it: there ``model`` and ``stages`` could be imported by their bare names.
    """
    folder = tmp_path_factory.mktemp("path")
    (folder / "tests").symlink_to(Path(__file__).parents[1], target_is_directory=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        patch.setenv(
            "PYTHONPATH", os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
        )
        yield
    assert str(folder) not in sys.path
