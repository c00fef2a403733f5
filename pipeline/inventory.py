"""What the exposure list holds, and what of it earlier runs into the output folder have done."""

from __future__ import annotations

import dataclasses
import logging
import random
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from sgclassify.pipeline.headers import read_headers
from sgclassify.pipeline.progress import Reporter
from sgclassify.pipeline.record.output import OutputFolder
from sgclassify.pipeline.record.receipts import (
    ExposureReceipt,
    TileReceipt,
    changed,
    digest_of,
    digest_of_files,
    join_key,
    tile_key,
)
from sgclassify.pipeline.record.record import DONE, SET_ASIDE, SKIPPED, ExposureRecord, Failure, RunRecord
from sgclassify.pipeline.request import Request
from sgclassify.stages.arrays import I64
from sgclassify.stages.errors import NothingToDoError, SlitlessExposureError
from sgclassify.stages.read.header import ExposureHeader, read_header
from sgclassify.stages.read.names import ExposureFiles, exposure_stem
from sgclassify.stages.tiling import Tile, footprint_tiles, tile_pad_arcsec, tiles_of
from sgclassify.stages.write.publish import partition_path

log = logging.getLogger(__name__)


class Inventory:
    """The exposures of a run, each with an entry in its record. Writes nothing, so that a dry run uses it too.

    Attributes
    ----------
    headers : dict of str to ExposureHeader
        Exposures that are used, by identifier.
    records : dict of str to ExposureRecord
        Their entries in the record.
    good : dict of str to ExposureReceipt
        Those that this run or an earlier one has prepared.
    settings : str
        Digest of what decides about the products beside the inputs.
    """

    def __init__(self, request: Request, folder: OutputFolder, record: RunRecord) -> None:
        self.options = request.options
        self.config = request.config
        self.listed = request.listed
        self.settings = digest_of(request.settings)
        self.folder = folder
        self.receipts = folder.receipts
        self.record = record
        self.records: dict[str, ExposureRecord] = {}
        self.headers: dict[str, ExposureHeader] = {}
        self.good: dict[str, ExposureReceipt] = {}
        self._digests: dict[str, str] = {}

    def read(self, reporter: Reporter) -> None:
        """Read the headers, set aside what they show to be unusable, and find what is known already.

        Raises
        ------
        NothingToDoError
            If no exposure can be used.
        UsageError
            If the inputs are not those of the products in the folder, which must not be replaced.
        """
        for note in self.listed.notes:
            self._note(note)
        for problem in self.listed.problems:
            exposure = ExposureRecord(exposure_stem(problem.path), {"image": problem.path})
            self.record.exposures.append(exposure)
            self._close(exposure, Failure.from_error(problem))
        self._read_headers(reporter)
        if not self.headers:
            raise self.nothing_to_do()
        if all(header.files.catalog is None for header in self.headers.values()):
            # mostly somebody forgot to copy them: it costs time, and the objects get other identifiers
            self._note(
                f"no CAT was found for any of the {len(self.headers)} exposures: the stage detects the sources itself"
            )
        if not self.folder.is_fresh:
            self._compare()

    def _read_headers(self, reporter: Reporter) -> None:
        files = self.listed.files
        taken: dict[str | int, ExposureHeader] = {}
        observed: dict[tuple[str, int, str, str], ExposureHeader] = {}
        found_all = read_headers(files, read_header, self.config.header_threads, self.config.header_timeout_s)
        with reporter.phase("reading headers", len(files)) as steps:
            for one, found in zip(files, found_all, strict=True):
                exposure = ExposureRecord(exposure_stem(one.image), _file_names(one))
                steps.step()
                if isinstance(found, ExposureHeader) and (key := _observation(found)) is not None:
                    other = observed.setdefault(key, found)
                    if other is not found and other.exposure_id == found.exposure_id:
                        self._note(f"{one.image} is the same exposure as {other.files.image}: done once")
                        continue
                    if other is not found:
                        same = "same observation, detector and start"
                        self._note(f"{found} has the {same} as {other}: both are used as if they were two")
                self.record.exposures.append(exposure)
                if isinstance(found, SlitlessExposureError):
                    self._close(exposure, Failure.from_error(found), SKIPPED)
                elif isinstance(found, Failure):
                    self._close(exposure, found)
                elif (clash := _clash(found, taken)) is not None:
                    self._close(exposure, clash)
                else:
                    exposure.band = found.band
                    exposure.notes.extend(found.notes)
                    self.headers[found.exposure_id] = found
                    self.records[found.exposure_id] = exposure

    def _note(self, text: str) -> None:
        """Put a remark into record and log."""
        self.record.notes.append(text)
        log.warning("%s", text)

    def _compare(self) -> None:
        """Compare the exposures with those that an earlier run has read, and take over its receipts."""
        known = self.receipts.known()
        listed = {exposure.id for exposure in self.record.exposures}
        differences = [
            f"{name} can no longer be used" if name in listed else f"{name} is no longer listed"
            for name in sorted(known.keys() - self.headers.keys())
        ]
        here = [(known[n], h.files, h.catalog_stem) for n, h in self.headers.items() if n in known]
        other = changed(here, self.config.header_threads, self.options.verify_inputs)
        differences += [f"{name} has changed" for name in other]
        if differences:
            self.folder.refuse(differences)
            return
        for receipt, _, _ in here:
            self.accept(receipt)

    def accept(self, receipt: ExposureReceipt) -> None:
        """An exposure is good: it is prepared, or was."""
        exposure = self.records[receipt.exposure_id]
        exposure.notes = list(receipt.notes)
        exposure.sha256 = dict(receipt.sha256)
        for name in ("rows", "usable", "seconds", "worker", "peak_mib"):
            setattr(exposure, name, getattr(receipt, name))
        self.good[receipt.exposure_id] = receipt

    def drop(self, name: str, failure: Failure) -> None:
        """Set an exposure aside that its header did not show to be unusable."""
        del self.headers[name]
        self.good.pop(name, None)
        self._close(self.records[name], failure)

    def complete(self, receipt: ExposureReceipt) -> None:
        """The product of an exposure is there."""
        exposure = self.records[receipt.exposure_id]
        exposure.outcome, exposure.scored = DONE, receipt.scored

    def _close(self, exposure: ExposureRecord, failure: Failure, outcome: str = SET_ASIDE) -> None:
        """Set an exposure aside, or skip it, and name it once."""
        exposure.close(outcome, failure)
        log.warning(
            "exposure %s %s: %s",
            exposure.id,
            outcome.replace("_", " "),
            failure,
            extra={"exposure": exposure.id, "outcome": outcome, "file": failure.file, "fault": failure.fault},
        )

    def new(self) -> list[str]:
        """The usable exposures that neither this run nor an earlier one has prepared."""
        return sorted(self.headers.keys() - self.good.keys())

    def tiles(self) -> list[Tile]:
        """The tiles of the exposures, in the order in which they are computed."""
        footprints = {}
        for name, header in list(self.headers.items()):
            try:
                footprints[name] = self._footprint(header)
            except Exception as error:  # noqa: BLE001
                # whatever goes wrong costs this exposure only
                self.drop(name, Failure.from_error(error))
        if not self.headers:
            raise self.nothing_to_do()
        # the largest first, so that no worker is left with one when the others have nothing more to do
        order = sorted(tiles_of(footprints.items(), self.config.tile_order), key=self.rows_of, reverse=True)
        if self.config.tile_shuffle_seed:
            random.Random(self.config.tile_shuffle_seed).shuffle(order)
        return order

    def _footprint(self, header: ExposureHeader) -> I64:
        """Pixels of the tiles that an exposure touches."""
        if (receipt := self.good.get(header.exposure_id)) is not None:
            return np.asarray(receipt.tiles, dtype=np.int64)
        return footprint_tiles(header, self.config.tile_order, tile_pad_arcsec(self.config.stage))

    def rows_of(self, tile: Tile) -> int:
        """About how many objects a tile has: the usable rows of the band that has most of them; 0 where unknown."""
        rows: dict[str, int] = {}
        for receipt in (self.good[name] for name in tile.exposures if name in self.good):
            band = self.records[receipt.exposure_id].band or ""
            rows[band] = rows.get(band, 0) + receipt.rows_in(tile.pixel)
        return max(rows.values(), default=0)

    def key_of(self, tile: Tile) -> str:
        """What decides about the objects of a tile."""
        members = ((name, self._digest(name)) for name in tile.exposures)
        return tile_key(self.settings, tile.order, tile.pixel, members)

    def _digest(self, name: str) -> str:
        """Digest of the content of an exposure; its files are read if it is not prepared yet."""
        if (receipt := self.good.get(name)) is not None:
            return receipt.digest
        if name not in self._digests:
            header = self.headers[name]
            try:
                self._digests[name] = digest_of_files(name, header.catalog_stem, header.files)
            except OSError:
                self._digests[name] = ""
        return self._digests[name]

    def is_known(self, tile: Tile) -> bool:
        """Whether all exposures of a tile are good."""
        return all(name in self.good for name in tile.exposures)

    def published(self, tile: Tile) -> TileReceipt | None:
        """The receipt of a tile that need not be computed again; None for one that must be computed."""
        if self.folder.is_fresh:
            return None
        receipt = TileReceipt.read(self.receipts.members_path(tile.order, tile.pixel))
        # for the key of a tile with new exposures their files are read: only if it was made of these exposures
        if receipt is None or not (self.is_known(tile) or receipt.exposures == tile.exposures):
            return None
        if receipt.key != self.key_of(tile):
            return None
        path = partition_path(self.folder.objects, tile.order, tile.pixel)
        return receipt if not receipt.n_objects or _has_size(path, receipt.size) else None

    def is_joined(self, name: str, tiles: Mapping[int, str]) -> bool:
        """Whether the product of an exposure is there, made of just these tiles: their pixels and keys."""
        receipt = self.good[name]
        key = join_key(self.settings, receipt.digest, tiles.items())
        path = self.folder.detections / f"{receipt.catalog_stem}.parquet"
        return receipt.join_key == key and _has_size(path, receipt.size)

    def nothing_to_do(self) -> NothingToDoError:
        """The error of a list of which nothing can be used."""
        return NothingToDoError(f"{self.options.exposure_list}: no exposure of the list can be used")


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _file_names(files: ExposureFiles) -> dict[str, str | None]:
    """The files of an exposure by kind."""
    return {
        field.name: str(path) if (path := getattr(files, field.name)) is not None else None
        for field in dataclasses.fields(files)
    }


def _observation(header: ExposureHeader) -> tuple[str, int, str, str] | None:
    """What two files of one exposure agree in; None where the headers do not say."""
    if not header.obsid or header.chip is None or not header.date_obs:
        return None
    return header.obsid, header.chip, header.date_obs, header.band


def _clash(header: ExposureHeader, taken: dict[str | int, ExposureHeader]) -> Failure | None:
    """Why an exposure cannot stand beside those already taken: its products would have their names."""
    names = (header.exposure_id, header.catalog_stem, header.exposure_key)
    for name in names:
        if name in taken:
            fault = f"its products would have the names of those of {taken[name].files.image}"
            return Failure(str(header.files.image), fault, "give the file another name, or list one of the two")
    taken.update(dict.fromkeys(names, header))
    return None
