"""Shards of a data set: the objects of one field in a Parquet file, and where it lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sgclassify.stages.bands import BANDS
from sgclassify.stages.columns import CLASSES
from sgclassify.stages.errors import UsageError
from sgclassify.stages.features import FEATURES
from sgclassify.stages.write.atomic import write_atomic

SPLITS = ("validation", "calibration", "test")
"""Fields 0, 1 and 2 of every ten, in this order; the other seven are for training."""

PARTS = ("training", *SPLITS, "shifted")
"""Folders of a data set. The shifted test comes from another simulation (other PSFs, brighter sky, more compact
galaxies), which training never sees."""

TENSORS = ("image", "valid", "sigma", "features", "psf", "catalog")
"""Arrays of a shard, one row per object."""

CATALOG_COLUMNS = (
    "Class_Star", "Spread_Model", "SpreadErr_Model", "Mag_PSF", "Mag_Model", "MagErr_Model", "Mag_Kron", "MagErr_Kron",
    "FWHM", "A", "B", "E", "R50", "Mu_Max", "Mag_Aper1", "MagErr_Aper1", "Mag_Aper3", "MagErr_Aper3", "Flag",
)  # fmt: skip
"""Columns of SExtractor's and PSFEx's catalogues that are kept for the baselines. The network never reads them."""

REAL: Final = (*CLASSES, "qso")
"""True classes that are judged: all but spurious detections."""

SPURIOUS: Final = "spurious"
"""Class in a data set of a detection that matches no truth."""


@dataclass(frozen=True)
class Sample:
    """Objects of one or more fields; the first axis of every array is the object.

    Attributes
    ----------
    image : ndarray of float16, shape (n, 7, size, size)
        Sky-subtracted stamps, nanomaggies, axis order [object, band, y, x].
    valid : ndarray of bool, shape (n, 7, size, size)
    sigma : ndarray of float32, shape (n, 7)
    features : ndarray of float32, shape (n, 7, n_features)
    psf : ndarray of float16, shape (n, 7, size, size)
        PSF at the source's place; all 0 where unknown.
    catalog : ndarray of float32, shape (n, 7, len(CATALOG_COLUMNS))
        SExtractor's measurements in each band; NaN where it was not run or did not find the object.
    table : pyarrow.Table
        Columns ``field``, ``object_id``, ``ra``, ``dec``, ``sg_flags``, ``n_bands``, ``snr``, ``blended``,
        ``star_density`` (stars of i < 25 per arcmin^2), ``roll_deg`` and the truth: ``true_class`` (``spurious`` where
        nothing matches), magnitudes, redshift, size.
    """

    image: npt.NDArray[np.float16]
    valid: npt.NDArray[np.bool_]
    sigma: npt.NDArray[np.float32]
    features: npt.NDArray[np.float32]
    psf: npt.NDArray[np.float16]
    catalog: npt.NDArray[np.float32]
    table: pa.Table

    def __len__(self) -> int:
        return len(self.image)

    def take(self, index: npt.NDArray[np.int64]) -> Sample:
        """The objects of an index array, in its order."""
        arrays = {name: getattr(self, name)[index] for name in TENSORS}
        return Sample(**arrays, table=self.table.take(index))


def true_classes(table: pa.Table) -> npt.NDArray[np.object_]:
    """True class of each row."""
    return np.array(table["true_class"].to_pylist(), dtype=object)


def split_of(field: int) -> str:
    """Which part of the data a field belongs to: training, validation, calibration or test."""
    return SPLITS[field % 10] if field % 10 < len(SPLITS) else "training"


def shard_path(data_dir: Path, field: int, shifted: bool = False) -> Path:
    """Path of a field's shard, whose folder is the part of the data that it belongs to."""
    return data_dir / ("shifted" if shifted else split_of(field)) / f"field{field:05d}.parquet"


def write_shard(path: Path, table: pa.Table, arrays: dict[str, Any]) -> None:
    """Write one field as a Parquet shard with fixed-shape tensors."""

    def tensor(values: Any) -> pa.Array:
        return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values))

    n = len(arrays["image"])
    packed = np.packbits(arrays["valid"].reshape(n, -1), axis=1)
    stored = arrays | {"valid": packed} | {name: arrays[name].astype(np.float16) for name in ("image", "psf")}
    for name in TENSORS:
        table = table.append_column(name, tensor(stored[name]))
    write_atomic(table, path, {})


def read_table_of(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """Read columns of a shard, all by default; ``features`` must be among them.

    `UsageError` if the file is damaged or no shard, or if its version measured other features.
    """
    try:
        table = pq.read_table(path, columns=columns)
        held = table.schema.field("features").type.shape
    except (pa.ArrowException, KeyError, AttributeError, OSError) as error:
        raise UsageError(
            f"{path}: not a shard that can be read ({error}); delete it and run `sgclassify dataset` again"
        ) from error
    if tuple(held) != (len(BANDS), len(FEATURES)):
        raise UsageError(
            f"{path}: {held[-1]} features a band, this version has {len(FEATURES)}; make the data set anew"
        )
    return table


def read_shard(path: Path, classes: Sequence[str] | None = None) -> Sample:
    """Read one shard (see `read_table_of`); with `classes`, only objects of these true classes."""
    table = read_table_of(path)
    if classes is not None:
        table = table.filter(pc.is_in(table["true_class"], pa.array(classes)))
    arrays = {name: table[name].combine_chunks().to_numpy_ndarray() for name in TENSORS}
    shape = arrays["image"].shape
    bits = np.unpackbits(arrays["valid"], axis=1, count=int(np.prod(shape[1:])))
    arrays["valid"] = bits.astype(bool).reshape(shape)
    return Sample(**arrays, table=table.drop_columns([*TENSORS]))


def read_samples(paths: list[Path], classes: Sequence[str] | None = None) -> Sample:
    """Read shards into one sample, in the order of the paths."""
    parts = [read_shard(path, classes) for path in paths]
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in TENSORS}
    return Sample(**arrays, table=pa.concat_tables([part.table for part in parts]))
