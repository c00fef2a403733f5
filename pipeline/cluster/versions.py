"""Versions of the software, which the driver compares with those of scheduler and workers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import metadata
from typing import Final

from sgclassify.stages.errors import ClusterError
from sgclassify.stages.program import code_digest

CODE: Final = "sgclassify code"
"""Name under which the digest of the program stands among the versions."""

_PACKAGES: Final = ("sgclassify", "dask", "distributed", "numpy", "pyarrow", "torch")
_SAME: Final = ("sgclassify", CODE, "python", "dask", "distributed")


def versions() -> dict[str, str]:
    """Versions of the software of this process that decide whether it can take part in a run."""
    found = {"python": ".".join(map(str, sys.version_info[:2])), CODE: code_digest()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def require_same(theirs: Mapping[str, str], ours: Mapping[str, str], who: str) -> None:
    """Raise `ClusterError` where another version cannot work with ours; only what `theirs` names is compared."""
    for name in _SAME:
        if name in theirs and theirs[name] != ours[name]:
            raise ClusterError(
                f"{who} runs {name} {theirs[name]}, this is {ours[name]}; install the same everywhere, and restart "
                "the workers that run another version"
            )


def differing(theirs: Mapping[str, str], ours: Mapping[str, str]) -> list[str]:
    """Packages whose other version may change the last bits of a product, such as ``numpy 2.1 (here 2.2)``."""
    return [
        f"{name} {theirs[name]} (here {ours[name]})"
        for name in ours
        if name not in _SAME and theirs[name] != ours[name]
    ]
