"""Which program this is: a digest of the sources that decide about results.

The version in the metadata of the package is for people. It says nothing of an editable installation, of a working
tree with changes, or of two commits of one version, whose products must not be mixed.
"""

from __future__ import annotations

import functools
import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Final

RESULTS: Final = (
    "stages",
    "model/serve",
    "pipeline/cluster/gpu.py",
    "pipeline/record/receipts.py",
    "pipeline/record/sample.py",
    "pipeline/tasks.py",
)
"""Sources that decide about the products of a run and what its receipts mean. How the work is shared out, recorded
and reported does not. The weights of the model have a checksum of their own."""

TRAINING_DATA: Final = ("stages", "simulation", "model/data/dataset.py", "model/data/match.py", "model/data/shards.py")
"""Sources that decide about a data set."""


@functools.lru_cache
def code_digest(parts: tuple[str, ...] = RESULTS) -> str:
    """Digest, 16 hexadecimal digits, of installed sources, the same for a wheel and a working tree with the same files.

    Of a process that lives on while its files are replaced, it stays what it was at the first call.

    Parameters
    ----------
    parts : tuple of str
        Packages below ``sgclassify``, of which every module counts, such as ``model/serve``, and single modules such as
        ``pipeline/tasks.py``.
    """
    digest = hashlib.sha256()
    for part in sorted(parts):
        package, _, module = part.partition("/")
        root = _root(package)
        for path in [root / module] if module.endswith(".py") else sorted((root / module).rglob("*.py")):
            # The one file that is opened outside of read/ and write/: a source of the program, no input of a run.
            content = path.read_bytes()
            digest.update(f"{package}/{path.relative_to(root).as_posix()} {len(content)}\n".encode())
            digest.update(content)
    return digest.hexdigest()[:16]


def _root(package: str) -> Path:
    """Folder of a package; it is not imported."""
    spec = find_spec(f"sgclassify.{package}")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"sgclassify.{package} is not installed")
    return Path(spec.submodule_search_locations[0])
