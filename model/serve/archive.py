"""Which model archive a run uses, checked as far as it can be without torch."""

from __future__ import annotations

import zipfile
import zlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sgclassify.stages.errors import ModelError
from sgclassify.stages.read.checksum import sha256_of

if TYPE_CHECKING:
    from sgclassify.model.serve.contract import ModelContract

CONTRACT_FILE: Final = "contract.json"
REFERENCE_FILE: Final = "reference.npz"


def default_model() -> Path:
    """Path of the model that ships with the package."""
    return Path(str(resources.files("sgclassify.model").joinpath("weights", "default.pt")))


@dataclass(frozen=True)
class Archive:
    """A model archive whose checksum was compared; none of its code has run."""

    path: Path
    sha256: str

    def extra(self, name: str) -> bytes:
        """A file that the archive carries beside the network, empty if it is not there; `ModelError` if unreadable."""
        try:
            with zipfile.ZipFile(self.path) as archive:
                found = [one for one in archive.namelist() if one.endswith(f"/extra/{name}")]
                return archive.read(found[0]) if found else b""
        except (OSError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise ModelError(f"{self.path}: not a model archive that can be loaded: {error}") from error

    def contract(self) -> ModelContract:
        """The contract, read and checked; `ModelError` if there is none that this version of the stages can serve."""
        # imported here: it needs the stages, and wrong usage is refused before they are imported
        from sgclassify.model.serve.contract import ModelContract

        return ModelContract.from_json(self.extra(CONTRACT_FILE))


def verified(path: Path | str | None, expected_sha256: str | None = None) -> Archive:
    """Find a model archive and compare its checksum, before any of its code runs.

    Parameters
    ----------
    path : Path or str or None
        The archive; None for the shipped one.
    expected_sha256 : str, optional
        Checksum that it must have; where None, that of ``<archive>.sha256`` beside it, if there is one.

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
        raise ModelError(f"{path}: sha256 is {sha256}, expected {expected_sha256}; fetch or export the model again")
    if not zipfile.is_zipfile(path):
        raise ModelError(
            f"{path}: not a model archive that can be loaded: it is cut off, or of another kind; fetch or export "
            "the model again"
        )
    return Archive(path, sha256)
