"""Receipts: which part of a run is complete, and of which inputs, so that the same command continues from there.

A receipt is written after the product that it stands for. It lies below ``.receipts`` in the output folder and
outlives the run, so that exposures that are appended to the list later add only what they touch.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
import pyarrow.parquet as pq

from sgclassify.pipeline.record.sample import SAMPLE, Sample
from sgclassify.stages.arrays import I64
from sgclassify.stages.read.checksum import sha256_of
from sgclassify.stages.read.names import ExposureFiles
from sgclassify.stages.write.atomic import write_atomic_text

if TYPE_CHECKING:
    from sgclassify.stages.tiling import Tile

RECEIPT: Final = b"sgclassify:receipt"
"""Key of a tile's receipt in the metadata of its file of members."""

PREPARED: Final = ".prepared.json"
"""End of the name of the receipt of a prepared exposure."""


@dataclass(frozen=True)
class ExposureReceipt:
    """What a run knows of a good exposure.

    Attributes
    ----------
    exposure_id, catalog_stem : str
    digest : str
        Of the exposure's content: of all its files, wherever they lie.
    stats : dict of str to list of int
        Size in bytes and time of change in ns of each file, by path.
    sha256 : dict of str to str
        Checksum of each file, by path.
    rows, usable : int
        Rows of its catalogue, and those with a usable position.
    notes : tuple of str
    tiles : tuple of int
        Pixels of the tiles that it touches, ascending.
    tile_rows : tuple of int
        Usable rows in each of these; empty where unknown.
    seconds : float
        Time spent on a worker.
    worker : str
        Where: host and process.
    peak_mib : float
        Largest memory of that process so far, MiB.
    join_key : str
        What its product was made of; empty where there is none yet.
    scored, size : int
        Rows of the product that have a probability; its bytes.
    """

    exposure_id: str
    catalog_stem: str
    digest: str
    stats: Mapping[str, tuple[int, int]]
    sha256: Mapping[str, str]
    rows: int
    usable: int
    notes: tuple[str, ...]
    tiles: tuple[int, ...]
    seconds: float = 0.0
    worker: str = ""
    peak_mib: float = 0.0
    tile_rows: tuple[int, ...] = ()
    join_key: str = ""
    scored: int = 0
    size: int = 0

    def __str__(self) -> str:
        return f"exposure {self.exposure_id}"

    def rows_in(self, pixel: int) -> int:
        """Usable rows in one of its tiles; 0 where unknown."""
        place = bisect_left(self.tiles, pixel)
        return self.tile_rows[place] if place < len(self.tile_rows) and self.tiles[place] == pixel else 0

    def write(self, path: Path, **more: Any) -> None:
        """Write the receipt whole or not at all, with ``more`` beside it."""
        write_atomic_text(json.dumps({"receipt": asdict(self), **more}, sort_keys=True) + "\n", path)

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Read a receipt; None if there is none, or it cannot be read."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))["receipt"]
            values["stats"] = {name: tuple(stat) for name, stat in values["stats"].items()}
            for name in ("notes", "tiles", "tile_rows"):
                values[name] = tuple(values[name])
            return cls(**values)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            # written by another version, or damaged: as if it were not there
            return None


@dataclass(frozen=True)
class TileReceipt:
    """What the driver learns of a published tile.

    Attributes
    ----------
    order, pixel : int
    key : str
        What it was made of: see `tile_key`.
    n_objects, n_stars, n_galaxies, n_not_scored : int
    seconds : float
        Time spent on the workers.
    histogram : ndarray of int64, shape (20,)
        Objects by p_star, bins of `sgclassify.pipeline.record.sample.HISTOGRAM_EDGES`.
    sample : ndarray of `sgclassify.pipeline.record.sample.SAMPLE`, shape (k,)
        Some objects for the sky map.
    sample_level : int
        Which: one of every ``2**sample_level``.
    worker : str
        Who published it: host and process.
    device : str
        Where the model ran.
    peak_mib : float
        Largest memory so far of the processes that worked on it, MiB.
    size : int
        Bytes of its partition; 0 where it has none.
    exposures : tuple of str
        The exposures that it was made of.
    """

    order: int
    pixel: int
    key: str
    n_objects: int
    n_stars: int
    n_galaxies: int
    n_not_scored: int
    seconds: float
    histogram: I64
    sample: Sample
    sample_level: int
    worker: str = ""
    device: str = "cpu"
    peak_mib: float = 0.0
    size: int = 0
    exposures: tuple[str, ...] = ()

    def as_json(self) -> str:
        """The receipt as JSON text."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return json.dumps({k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in values.items()})

    @classmethod
    def read(cls, path: Path) -> Self | None:
        """Read the receipt in a tile's file of members; None if there is none, or it cannot be read."""
        try:
            values = json.loads((pq.read_metadata(path).metadata or {})[RECEIPT])
            values["exposures"] = tuple(values["exposures"])
            values["histogram"] = np.array(values["histogram"], dtype=np.int64)
            values["sample"] = np.array([tuple(one) for one in values["sample"]], dtype=SAMPLE)
            return cls(**values)
        except (OSError, ValueError, KeyError, TypeError):
            return None


def digest_of(*parts: object) -> str:
    """Digest of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def content_digest(exposure_id: str, catalog_stem: str, files: ExposureFiles, sha256: Mapping[str, str]) -> str:
    """Digest of an exposure's content: its names and the checksums of its files by kind."""
    kinds = {
        kind: None if path is None else sha256[str(path)]
        for kind, path in ((f.name, getattr(files, f.name)) for f in fields(files))
    }
    return digest_of(exposure_id, catalog_stem, kinds)


def digest_of_files(exposure_id: str, catalog_stem: str, files: ExposureFiles) -> str:
    """`content_digest` of files, which are read for it."""
    sha256 = {str(path): sha256_of(path) for path in files.present.values()}
    return content_digest(exposure_id, catalog_stem, files, sha256)


def tile_key(settings: str, order: int, pixel: int, members: Iterable[tuple[str, str]]) -> str:
    """What decides about the objects of a tile; members are names and content digests of the exposures on it."""
    return digest_of(settings, order, pixel, sorted(members))


def join_key(settings: str, digest: str, tiles: Iterable[tuple[int, str]]) -> str:
    """What decides about the product of an exposure: its content, and pixel and key of its published tiles."""
    return digest_of(settings, digest, sorted(tiles))


def catalogue_key(tiles: Mapping[Tile, str], metadata: Mapping[str, str]) -> str:
    """What decides about the files of the catalogue as a whole: the tiles with their keys, and who writes them."""
    builders = [version("sgclassify"), version("hats")]
    return digest_of(sorted((tile.order, tile.pixel, key) for tile, key in tiles.items()), dict(metadata), builders)


def stats_of(files: ExposureFiles) -> dict[str, tuple[int, int]]:
    """Size and time of change (ns) of each file of an exposure."""
    found = {}
    for path in files.present.values():
        stat = path.stat()
        found[str(path)] = (stat.st_size, stat.st_mtime_ns)
    return found


def is_unchanged(receipt: ExposureReceipt, files: ExposureFiles, catalog_stem: str, verify: bool) -> bool:
    """Whether an exposure is still the one of its receipt.

    Files of the same path, size and time of change are taken as the same. Of others the checksums are compared;
    with `verify`, of all.
    """
    try:
        if not verify and stats_of(files) == receipt.stats:
            return True
        return digest_of_files(receipt.exposure_id, catalog_stem, files) == receipt.digest
    except OSError:
        return False


class Receipts:
    """The receipts of an output folder, in its subfolder ``.receipts``.

    The folder `prepared` holds the prepared exposures until the run is complete; None if none are of use.
    """

    def __init__(self, folder: Path, prepared: Path | None) -> None:
        self.exposures = folder / "exposures"
        self.tiles = folder / "tiles"
        self.catalogue = folder / "catalogue.json"
        self.pictures = folder / "pictures.json"
        self.prepared = prepared

    def known(self) -> dict[str, ExposureReceipt]:
        """Exposures that a run in this folder found good, by name; receipts of published ones come first."""
        found: dict[str, ExposureReceipt] = {}
        for folder, end in ((self.exposures, ".json"), (self.prepared, PREPARED)):
            for path in sorted(folder.glob(f"*{end}")) if folder is not None else ():
                name = path.name.removesuffix(end)
                if name not in found and (receipt := ExposureReceipt.read(path)) is not None:
                    found[name] = receipt
        return found

    def is_prepared(self, receipt: ExposureReceipt) -> bool:
        """Whether the prepared files of this very exposure are there."""
        if self.prepared is None:
            return False
        there = ExposureReceipt.read(self.prepared / f"{receipt.exposure_id}{PREPARED}")
        return there is not None and there.digest == receipt.digest

    def members_path(self, order: int, pixel: int) -> Path:
        """File that holds the members of a tile and their probabilities, and the tile's receipt."""
        return members_path(self.tiles, order, pixel)

    def has_catalogue(self, key: str, root: Path) -> bool:
        """Whether the files of the catalogue as a whole, below `root`, were made of what `key` says and are there."""
        try:
            found = json.loads(self.catalogue.read_text(encoding="utf-8"))
            sizes = {name: (root / name).stat().st_size for name in found["files"]}
            return bool(sizes) and found["key"] == key and sizes == found["files"]
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def enter_catalogue(self, key: str, root: Path, files: Iterable[Path]) -> None:
        """Enter that these files below `root` were made."""
        sizes = {str(path.relative_to(root)): path.stat().st_size for path in files}
        write_atomic_text(json.dumps({"key": key, "files": sizes}) + "\n", self.catalogue)

    def remove_others(self, exposures: set[str], tiles: set[tuple[int, int]]) -> None:
        """Remove the receipts of exposures and tiles that are no longer part of the products."""
        for path in self.exposures.glob("*.json"):
            if path.name.removesuffix(".json") not in exposures:
                path.unlink(missing_ok=True)
        keep = {self.members_path(order, pixel).name for order, pixel in tiles}
        for path in self.tiles.glob("*.parquet"):
            if path.name not in keep:
                path.unlink(missing_ok=True)


def members_path(folder: Path, order: int, pixel: int) -> Path:
    """File of a tile's members in the folder of the receipts of tiles."""
    return folder / f"{order}-{pixel}.parquet"


def changed(pairs: Iterable[tuple[ExposureReceipt, ExposureFiles, str]], threads: int, verify: bool) -> list[str]:
    """Names of the exposures that are not those of their receipts; see `is_unchanged`."""
    pairs = list(pairs)
    with ThreadPoolExecutor(threads) as pool:
        same = pool.map(lambda pair: is_unchanged(pair[0], pair[1], pair[2], verify), pairs)
        return [receipt.exposure_id for (receipt, *_), known in zip(pairs, same, strict=True) if not known]
