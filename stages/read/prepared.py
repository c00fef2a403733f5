"""A prepared exposure: its values, and its files read back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sgclassify.stages.locus import PointSources
from sgclassify.stages.psf import PsfModel
from sgclassify.stages.read.header import ExposureHeader
from sgclassify.stages.read.names import ExposureFiles
from sgclassify.stages.read.stored import Pixels, open_pixels
from sgclassify.stages.sky import SkyMesh


@dataclass(frozen=True)
class PreparedExposure:
    """What the tiles and the report need of a prepared exposure; small enough to send to another process.

    Attributes
    ----------
    work_dir : Path
        Folder that holds the exposure's prepared files.
    n_rows, n_usable : int
        Rows of the catalogue, and those with a usable position.
    sha256 : dict of str to str
        Checksum of each input file, by path.
    offset_deg : tuple of float
        Median offset of the catalogue's sky positions from the header's WCS, degrees to the east and the north at
        the centre of the image (see `sgclassify.stages.tangent`).
    psf : PointSources
        Locus of the point sources.
    psf_model : PsfModel
        Empirical PSF; round, of the expected width, where the exposure has no point sources.
    notes : tuple of str
        Remarks for the report.
    """

    header: ExposureHeader
    work_dir: Path
    n_rows: int
    n_usable: int
    sha256: dict[str, str]
    offset_deg: tuple[float, float]
    psf: PointSources
    psf_model: PsfModel
    notes: tuple[str, ...]

    def __str__(self) -> str:
        return str(self.header)

    @property
    def exposure_id(self) -> str:
        """Unique key of the exposure in a run."""
        return self.header.exposure_id

    @property
    def detections_path(self) -> Path:
        """Canonical detections, a Parquet table with one row for every row of the catalogue."""
        return self.work_dir / f"{self.exposure_id}.detections.parquet"

    @property
    def catalog_path(self) -> Path:
        """The catalogue as it was read or made: every row, every column."""
        return self.work_dir / f"{self.exposure_id}.catalog.parquet"

    @property
    def sky_path(self) -> Path:
        """The sky mesh."""
        return self.work_dir / f"{self.exposure_id}.sky.npz"

    def as_dict(self) -> dict[str, Any]:
        """The values in a form for JSON; `from_dict` turns them back into the exposure."""
        values = dataclasses.asdict(self)
        values["work_dir"] = str(self.work_dir)
        values["header"]["files"] = {
            kind: None if path is None else str(path) for kind, path in values["header"]["files"].items()
        }
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], work_dir: Path) -> PreparedExposure:
        """The exposure that `as_dict` described; ``work_dir`` holds its prepared files."""
        header = dict(values["header"])
        files = {kind: None if path is None else Path(path) for kind, path in header["files"].items()}
        header |= {
            "files": ExposureFiles(**files),  # type: ignore[arg-type]
            "shape": tuple(header["shape"]),
            "notes": tuple(header["notes"]),
        }
        model = values["psf_model"]
        coefficients = tuple(tuple(row) for row in model["coefficients"])
        model = PsfModel(**{**model, "coefficients": coefficients, "shape": tuple(model["shape"])})
        return cls(
            **{
                **values,
                "header": ExposureHeader(**header),
                "work_dir": work_dir,
                "offset_deg": tuple(values["offset_deg"]),
                "psf": PointSources(**values["psf"]),
                "psf_model": model,
                "notes": tuple(values["notes"]),
            }
        )

    def pixels(self) -> Pixels:
        """Windows into the pixels, a context manager; they are not decoded again where they are stored."""
        return open_pixels(self.header, self.work_dir)

    def sky(self) -> SkyMesh:
        """Read the sky mesh back."""
        with np.load(self.sky_path, allow_pickle=False) as data:
            ny, nx, box = (int(v) for v in data["layout"])
            return SkyMesh(level=data["level"], sigma=data["sigma"], box=box, shape=(ny, nx))

    def usable_detections(self) -> pa.Table:
        """Read the detections with a usable position: ``row``, ``x``, ``y``, ``ra``, ``dec``, ``sg_flags``."""
        names = ["row", "x", "y", "ra", "dec", "sg_flags"]
        with pq.ParquetFile(self.detections_path) as file:
            table = file.read(columns=[*names, "usable"])
        return table.filter(table["usable"]).select(names)
