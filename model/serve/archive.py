"""Which model archive a run uses, checked as far as it can be without torch."""

from __future__ import annotations

import zipfile
from importlib import resources
from pathlib import Path

from sgclassify.stages.errors import ModelError
from sgclassify.stages.read.checksum import sha256_of


def default_model() -> Path:
    """Path of the model that ships with the package."""
    return Path(str(resources.files("sgclassify.model").joinpath("weights", "default.pt")))


def verified(path: Path | str | None, expected_sha256: str | None = None) -> tuple[Path, str]:
    """Find a model archive and compare its checksum, before any of its code runs.

    Parameters
    ----------
    path : Path or str or None
        The archive; None for the shipped one.
    expected_sha256 : str, optional
        Checksum that it must have; where None, that of ``<archive>.sha256`` beside it, if there is one.

    Returns
    -------
    path : Path
    sha256 : str

    Raises
    ------
    ModelError
        If the archive is missing, cannot be read, is not the expected one, or is no TorchScript archive.
    """
    path = Path(path) if path is not None else default_model()
    sidecar = path.with_name(path.name + ".sha256")
    try:
        if not path.is_file():
            raise ModelError(f"{path}: no such model archive; give one with --model")
        sha256 = sha256_of(path)
        if expected_sha256 is None and sidecar.is_file():
            expected_sha256 = next(iter(sidecar.read_text(encoding="utf-8", errors="replace").split()), "")
    except OSError as error:
        raise ModelError(f"{path}: the model archive cannot be read ({error.strerror})") from error
    if expected_sha256 is not None and expected_sha256.lower() != sha256:
        raise ModelError(
            f"{path}: sha256 is {sha256}, expected {expected_sha256}; fetch or export the model again"
        )
    if not zipfile.is_zipfile(path):
        raise ModelError(
            f"{path}: not a model archive that can be loaded: it is cut off, or of another kind; fetch or export "
            "the model again"
        )
    return path, sha256
