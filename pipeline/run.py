"""One run from the exposure list to the finished products: the driver."""

from __future__ import annotations

import dataclasses
import logging
import random
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sgclassify.model.serve import runtime
from sgclassify.pipeline import tasks
from sgclassify.pipeline.cluster.dispatch import dispatch
from sgclassify.pipeline.cluster.handle import Cluster, open_cluster
from sgclassify.pipeline.cluster.worker import TaskTimeoutError
from sgclassify.pipeline.config import RunConfig
from sgclassify.pipeline.headers import read_headers
from sgclassify.pipeline.progress import Reporter
from sgclassify.pipeline.record.output import NOTES, PROGRESS, SCRATCH, TOKEN, OutputFolder
from sgclassify.pipeline.record.prometheus import MetricsFile
from sgclassify.pipeline.record.receipts import (
    ExposureReceipt,
    Receipts,
    TileReceipt,
    changed,
    digest_of,
    join_key,
    tile_key,
)
from sgclassify.pipeline.record.record import (
    DONE,
    SET_ASIDE,
    SKIPPED,
    ExposureRecord,
    Failure,
    RunRecord,
    TileRecord,
    pending,
)
from sgclassify.pipeline.record.report import write_report
from sgclassify.pipeline.record.sample import SkySample, level_for
from sgclassify.pipeline.record.status import ProgressFile
from sgclassify.pipeline.request import Options, Request
from sgclassify.stages.errors import NothingToDoError, SgClassifyError, SlitlessExposureError, UsageError
from sgclassify.stages.read.exposure_list import ExposureList
from sgclassify.stages.read.header import ExposureHeader, read_header
from sgclassify.stages.read.names import ExposureFiles, exposure_stem
from sgclassify.stages.tiling import Tile, footprint_tiles, tile_pad_arcsec, tiles_of
from sgclassify.stages.write.publish import partition_path

log = logging.getLogger(__name__)

# The further a tile has come, the sooner it goes on: stamps leave the memory of the workers first.
EXTRACT_PRIORITY, INFER_PRIORITY, PUBLISH_PRIORITY = 0, 10, 20


def run(request: Request, reporter: Reporter) -> RunRecord:
    """Carry out a run.

    Parameters
    ----------
    request : Request
    reporter : Reporter

    Returns
    -------
    RunRecord
        Its ``exit_code`` is that of the command: 0 all done, 3 something was set aside, 4 no usable input,
        6 the cluster could not do the work.

    Raises
    ------
    UsageError, ModelError
        Before anything is written. UsageError also where the inputs are not those of the products in the folder.
    """
    options, config, prior = request.options, request.config, request.prior
    setup = set_up(request)
    classifier = setup.classifier
    record = RunRecord(
        command=list(options.command),
        configuration=config.as_dict(),
        model={
            "id": classifier.contract.model_id,
            "sha256": classifier.sha256,
            "prior_star_fraction": prior.describe() if prior else classifier.contract.prior_star_fraction,
            "model_prior_star_fraction": classifier.contract.prior_star_fraction,
            "path": str(options.model or "default"),
        },
        output=options.output,
    )
    with request.folder() as folder:
        driver = _Driver(options, setup, folder, reporter, record)
        reporter.observe(ProgressFile(folder.work / PROGRESS, record).step)
        if options.metrics_file is not None:
            reporter.observe(MetricsFile(options.metrics_file, record).step)
        try:
            driver.carry_out()
        except UsageError as error:
            record.exit_code, record.message = error.exit_code, str(error)
            raise
        except SgClassifyError as error:
            record.exit_code, record.message = error.exit_code, str(error)
            log.error("%s", error, extra={"exit_code": error.exit_code})
        except BaseException as error:
            record.message = f"ended by {type(error).__name__}: {error}"
            if isinstance(error, SystemExit) and isinstance(error.code, int):
                # a signal, see `sgclassify.pipeline.cli`
                record.exit_code = error.code
                with suppress(ValueError):
                    record.message = f"ended by {signal.Signals(error.code - 128).name}"
            raise
        finally:
            driver.close()
            if options.metrics_file is not None:
                MetricsFile(options.metrics_file, record).write(finished=True)
    return record


def plan(request: Request, reporter: Reporter) -> str:
    """What a run would do, as a text; nothing is written.

    Raises
    ------
    UsageError, NothingToDoError, ModelError
        As the run would.
    """
    options, setup = request.options, set_up(request)
    folder = request.folder()
    folder.inspect()
    record = RunRecord(list(options.command), setup.config.as_dict(), {}, options.output)
    inventory = Inventory(options, setup, folder.receipts, record)
    inventory.read(reporter)
    if not folder.is_fresh and (differences := inventory.compare()):
        folder.refuse(differences)
        inventory.forget()
    pad = tile_pad_arcsec(setup.config.stage)
    footprints = (
        (name, footprint_tiles(header, setup.config.tile_order, pad))
        for name, header in inventory.headers.items()
    )
    lines = []
    for exposure in record.exposures:
        if exposure.fault:
            lines.append(f"exposure {exposure.id}: {exposure.outcome.replace('_', ' ')}: {exposure.fault}")
        else:
            lines.append(
                f"exposure {exposure.id}: {'known' if exposure.id in inventory.good else 'to be prepared'}"
            )
    n_known = 0
    tiles = tiles_of(footprints, setup.config.tile_order)
    for tile in tiles:
        known = all(name in inventory.good for name in tile.exposures)
        complete = known and inventory.published(tile, folder.objects) is not None
        n_known += complete
        state = "complete" if complete else "to be computed"
        lines.append(f"{tile}: {len(tile.exposures)} exposures, {state}")
    lines.append(
        f"{len(inventory.headers)} exposures can be used, {len(inventory.good)} of them are known already; "
        f"{len(tiles)} tiles, {n_known} of them are complete"
    )
    return "\n".join(lines)


@dataclass(frozen=True)
class Setup:
    """What a run works with, apart from its inputs.

    Attributes
    ----------
    config : RunConfig
    listed : ExposureList
    classifier : Classifier
        The model as the driver loaded and checked it.
    model : ModelRef
    settings : dict
        What decides about the products beside the inputs.
    """

    config: RunConfig
    listed: ExposureList
    classifier: runtime.Classifier
    model: tasks.ModelRef
    settings: dict[str, Any]


def set_up(request: Request) -> Setup:
    """Load and check the model.

    Raises
    ------
    ModelError
    """
    options, config = request.options, request.config
    classifier = runtime.load(
        options.model, batch_size=config.batch_size, expected_sha256=request.model_sha256
    )
    model = tasks.ModelRef(
        path=options.model.absolute() if options.model is not None else None,
        sha256=classifier.sha256,
        batch_size=config.batch_size,
        threads=config.torch_threads,
        tta=config.tta,
        own_prior=classifier.contract.prior_star_fraction,
        prior=request.prior,
    )
    return Setup(config, request.listed, classifier, model, request.settings)


class Inventory:
    """What the list holds and what of it is known already; the part of a run that writes nothing.

    Parameters
    ----------
    options : Options
    setup : Setup
    receipts : Receipts
    record : RunRecord
        Gets an entry for every exposure.
    """

    def __init__(self, options: Options, setup: Setup, receipts: Receipts, record: RunRecord) -> None:
        self.options = options
        self.config = setup.config
        self.listed = setup.listed
        self.settings = digest_of(setup.settings)
        self.receipts = receipts
        self.record = record
        self.records: dict[str, ExposureRecord] = {}
        self.headers: dict[str, ExposureHeader] = {}
        self.good: dict[str, ExposureReceipt] = {}

    def read(self, reporter: Reporter) -> None:
        """Read the headers, and set aside what they show to be unusable."""
        for note in self.listed.notes:
            self.note(note)
        for problem in self.listed.problems:
            exposure = ExposureRecord(exposure_stem(problem.path), {"image": problem.path})
            self.record.exposures.append(exposure)
            self.set_aside(exposure, Failure.from_error(problem))
        files = self.listed.files
        taken: dict[str | int, ExposureHeader] = {}
        observed: dict[tuple[str, int, str, str], ExposureHeader] = {}
        found_all = read_headers(files, read_header, self.config.header_threads, self.config.header_timeout_s)
        with reporter.phase("reading headers", len(files)) as phase:
            for one, found in zip(files, found_all, strict=True):
                exposure = ExposureRecord(exposure_stem(one.image), _file_names(one))
                phase.step()
                if isinstance(found, ExposureHeader) and (key := _observation(found)) is not None:
                    other = observed.setdefault(key, found)
                    if other is not found and other.exposure_id == found.exposure_id:
                        self.note(f"{one.image} is the same exposure as {other.files.image}: done once")
                        continue
                    if other is not found:
                        same = "same observation, detector and start"
                        self.note(f"{found} has the {same} as {other}: both are used as if they were two")
                self.record.exposures.append(exposure)
                if isinstance(found, SlitlessExposureError):
                    self.set_aside(exposure, Failure.from_error(found), SKIPPED)
                elif isinstance(found, Failure):
                    self.set_aside(exposure, found)
                elif (clash := _clash(found, taken)) is not None:
                    self.set_aside(exposure, clash)
                else:
                    exposure.band = found.band
                    exposure.notes.extend(found.notes)
                    self.headers[found.exposure_id] = found
                    self.records[found.exposure_id] = exposure
        if not self.headers:
            raise self.nothing_to_do()
        if all(header.files.catalog is None for header in self.headers.values()):
            # mostly a staging area without them: it costs time, and the objects get other identifiers
            self.note(
                f"no CAT was found for any of the {len(self.headers)} exposures: the stage detects the sources itself"
            )

    def note(self, text: str) -> None:
        """Tell the operator, in the record and on the terminal, what costs nothing."""
        self.record.notes.append(text)
        log.warning("%s", text)

    def compare(self) -> list[str]:
        """Compare the exposures with those that an earlier run in the folder has read, and take over what is known.

        Returns
        -------
        list of str
            What differs: exposures that are gone, cannot be read any more, or have changed.
        """
        known = self.receipts.known()
        listed = {exposure.id for exposure in self.record.exposures}
        gone = [
            f"{name} can no longer be used" if name in listed else f"{name} is no longer listed"
            for name in sorted(known.keys() - self.headers.keys())
        ]
        here = [(known[n], h.files, h.catalog_stem) for n, h in self.headers.items() if n in known]
        other = changed(here, self.config.header_threads, self.options.verify_inputs)
        for receipt, _, _ in here:
            self.accept(receipt)
        return gone + [f"{name} has changed" for name in other]

    def forget(self) -> None:
        """Nothing is known: everything is computed anew."""
        self.good.clear()

    def accept(self, receipt: ExposureReceipt) -> None:
        """An exposure is good."""
        exposure = self.records[receipt.exposure_id]
        exposure.notes = list(receipt.notes)
        exposure.sha256 = dict(receipt.sha256)
        exposure.rows, exposure.usable = receipt.rows, receipt.usable
        exposure.seconds, exposure.worker, exposure.peak_mib = (
            receipt.seconds, receipt.worker, receipt.peak_mib,
        )  # fmt: skip
        self.good[receipt.exposure_id] = receipt

    def set_aside(self, exposure: ExposureRecord, failure: Failure, outcome: str = SET_ASIDE) -> None:
        """Set an exposure aside, or skip it, and name it once."""
        self.good.pop(exposure.id, None)
        exposure.close(outcome, failure)
        log.warning(
            "exposure %s %s: %s",
            exposure.id,
            "skipped" if outcome == SKIPPED else "set aside",
            failure,
            extra={"exposure": exposure.id, "outcome": outcome, "file": failure.file, "fault": failure.fault},
        )

    def plan(self) -> list[Tile]:
        """The tiles of the good exposures, in the order in which they are computed."""
        footprints = ((name, np.asarray(r.tiles, dtype=np.int64)) for name, r in self.good.items())
        order = tiles_of(footprints, self.config.tile_order)
        if self.config.tile_shuffle_seed:
            random.Random(self.config.tile_shuffle_seed).shuffle(order)
        return order

    def key_of(self, tile: Tile) -> str:
        """What decides about the objects of a tile."""
        members = ((name, self.good[name].digest) for name in tile.exposures)
        return tile_key(self.settings, tile.order, tile.pixel, members)

    def published(self, tile: Tile, objects: Path) -> TileReceipt | None:
        """The receipt of a tile that needs not be computed again; None for one that does."""
        receipt = TileReceipt.read(self.receipts.members_path(tile.order, tile.pixel))
        if receipt is None or receipt.key != self.key_of(tile):
            return None
        if receipt.n_objects and not _has_size(partition_path(objects, tile.order, tile.pixel), receipt.size):
            return None
        return receipt

    def nothing_to_do(self) -> NothingToDoError:
        """The error of a list of which nothing can be used."""
        return NothingToDoError(f"{self.options.exposure_list}: no exposure of the list can be used")


def _has_size(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


class _Driver:
    """The phases of a run, in order; each fills its part of the record."""

    def __init__(
        self, options: Options, setup: Setup, folder: OutputFolder, reporter: Reporter, record: RunRecord
    ) -> None:
        self.options = options
        self.config = setup.config
        self.model = setup.model
        self.contract = setup.classifier.contract
        self.folder = folder
        self.reporter = reporter
        self.record = record
        self.inventory = Inventory(options, setup, folder.receipts, record)
        self.sample = SkySample()
        self._tiles: dict[Tile, TileRecord] = {}
        self._opened = False
        self._complete = False
        receipts = folder.receipts
        self.places = tasks.Places(
            prepared=folder.prepared,
            objects=folder.objects,
            detections=folder.detections,
            exposures=receipts.exposures,
            tiles=receipts.tiles,
            notes=folder.work / NOTES,
            token_path=folder.work / TOKEN,
            token=folder.token,
            limit_s=self.config.task_timeout_s,
        )

    def carry_out(self) -> None:
        """All phases; an error that ends the run early is raised."""
        inventory = self.inventory
        with self._timed("headers"):
            inventory.read(self.reporter)
            if not self.folder.is_fresh and (differences := inventory.compare()):
                self.folder.refuse(differences)
                self.folder.start_afresh()
                inventory.forget()
        with self._open_cluster() as cluster:
            self.record.model["device"] = cluster.device
            self.model = dataclasses.replace(self.model, device=cluster.device)
            with self._timed("prepare"):
                self._prepare(cluster, [n for n in inventory.headers if n not in inventory.good])
            self.folder.open_products()
            self._opened = True
            with self._timed("tiles"):
                published = self._run_tiles(cluster)
            with self._timed("detections"):
                self._join(cluster, published)
        with self._timed("finish"):
            self._finish()
        self._complete = True
        counts = self.record.counts()
        self.record.exit_code = 3 if counts["exposures_set_aside"] or counts["tiles_set_aside"] else 0

    @contextmanager
    def _open_cluster(self) -> Iterator[Cluster]:
        with ExitStack() as stack:
            with self._timed("cluster"):
                cluster = stack.enter_context(
                    open_cluster(
                        self.config,
                        scheduler=self.options.scheduler,
                        n_workers=self.options.workers,
                        scratch=self.folder.work / SCRATCH,
                        shared=self.folder.work,
                        scheduler_file=self.options.scheduler_file,
                        model=self.model,
                        on_notice=self.record.notes.append,
                    )
                )
            yield cluster

    def close(self) -> None:
        """Write report and record; remove the work folder of a run that is complete."""
        self.record.peak_mib["driver"] = tasks.peak_mib()
        if self._opened or not self.folder.has_products:
            try:
                self._write_report_and_record()
            except OSError as error:
                # of a run that was ended by a full disk, say, what ended it is to be heard
                if self._complete:
                    raise
                log.error("%s: the record of this run could not be written: %s", self.folder.path, error)
            if waiting := pending(self.record.counts()):
                log.warning("%s: the run ended before their turn; run the same command again", waiting)
        else:
            log.warning("%s: the products of the earlier run were left as they are", self.folder.path)
        # what was prepared is of use to the next run, unless this one is complete
        useful = not self._complete and any(self.folder.prepared.iterdir())
        if not self.options.keep_work:
            self.folder.remove_work(whole=not useful)

    def _write_report_and_record(self) -> None:
        try:
            write_report(self.record, self.sample, self.folder.path / "report.html")
        except BaseException as error:
            if self._complete:
                self.record.exit_code, self.record.message = 1, f"no report: {error!r}"
            raise
        finally:
            self.record.write(self.folder.path / "run.json")

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.record.timings[phase] = self.record.timings.get(phase, 0.0) + time.monotonic() - start

    def _prepare(self, cluster: Cluster, names: Sequence[str]) -> None:
        """Check and prepare exposures; those that are good go into the inventory."""
        inventory = self.inventory

        def submit(header: ExposureHeader) -> Any:
            self._new_try(str(header))
            return cluster.submit(
                tasks.prepare,
                header,
                self.places,
                self.config.tile_order,
                self.config.stage,
                resources=cluster.cpu,
            )

        headers = [inventory.headers[name] for name in sorted(names)]
        with self.reporter.phase("preparing exposures", len(headers)) as phase:
            for outcome in dispatch(cluster, headers, submit, 2 * cluster.n_slots):
                phase.step()
                name = outcome.job.exposure_id
                inventory.records[name].attempts = outcome.attempts
                if isinstance(outcome.result, Failure):
                    failure = self._explained(outcome.result, str(outcome.job))
                    inventory.set_aside(inventory.records[name], failure)
                    continue
                receipt: ExposureReceipt = outcome.result
                if name in inventory.good and inventory.good[name].digest != receipt.digest:
                    raise UsageError(
                        f"{inventory.headers[name].files.image}: has changed since an earlier run into "
                        f"{self.folder.path} read it; choose another folder, or start again with --overwrite"
                    )
                inventory.accept(receipt)
        if not inventory.good:
            raise inventory.nothing_to_do()

    def _new_try(self, what: str) -> None:
        """Forget that an earlier try of a job took too long."""
        self.places.note(what).unlink(missing_ok=True)

    def _explained(self, failure: Failure, what: str) -> Failure:
        """The failure, or that the worker ended itself over this job, where it has left a note of it."""
        if self.places.note(what).is_file():
            return Failure.from_error(TaskTimeoutError(what, self.places.limit_s))
        return failure

    def _plan(self, cluster: Cluster) -> tuple[list[Tile], dict[str, dict[int, str]]]:
        """Tiles to compute, and pixel and key of the complete ones of every good exposure; all are recorded.

        What is needed for the rest is prepared: the prepared files of a run that was completed are gone, so that what
        new exposures touch is prepared again.
        """
        inventory = self.inventory
        while True:
            tiles = inventory.plan()
            self._tiles = {tile: TileRecord(tile.order, tile.pixel, list(tile.exposures)) for tile in tiles}
            self.record.tiles = list(self._tiles.values())
            self.sample = SkySample()
            todo: list[Tile] = []
            published: dict[str, dict[int, str]] = {name: {} for name in inventory.good}
            for tile in tiles:
                receipt = inventory.published(tile, self.folder.objects)
                if receipt is None:
                    todo.append(tile)
                else:
                    self._take(tile, receipt, 0, published)
            touched = {name for tile in todo for name in tile.exposures}
            complete = {n for n in inventory.good if n not in touched and self._joined(n, published[n])}
            # an exposure without a product of what is complete is joined again even if no tile of it is computed
            lacking = [
                name
                for name, receipt in inventory.good.items()
                if name not in complete and not inventory.receipts.is_prepared(receipt)
            ]
            if not lacking:
                for name in complete:
                    self._close(name, inventory.good[name])
                return todo, published
            self._prepare(cluster, lacking)

    def _run_tiles(self, cluster: Cluster) -> dict[str, dict[int, str]]:
        """Compute and publish the tiles; pixel and key of the published ones of every exposure."""
        inventory = self.inventory
        todo, published = self._plan(cluster)
        if done := len(self._tiles) - len(todo):
            log.info("%d tiles are complete already", done, extra={"tiles_complete": done})
        keys = {tile: inventory.key_of(tile) for tile in todo}
        about = self._metadata
        level = level_for(sum(receipt.usable for receipt in inventory.good.values()))

        def submit(tile: Tile) -> Any:
            self._new_try(str(tile))
            stamps = cluster.submit(
                tasks.extract,
                tile,
                self.places,
                self.contract.stamp_size,
                self.config.stage,
                resources=cluster.cpu,
                priority=EXTRACT_PRIORITY,
            )
            scored = cluster.submit(
                tasks.infer,
                tile,
                stamps,
                self.places,
                self.model,
                resources=cluster.inference,
                priority=INFER_PRIORITY,
            )
            return cluster.submit(
                tasks.publish,
                tile,
                keys[tile],
                scored,
                self.places,
                about,
                level,
                resources=cluster.cpu,
                priority=PUBLISH_PRIORITY,
            )

        with self.reporter.phase("classifying tiles", len(todo)) as phase:
            for outcome in dispatch(cluster, todo, submit, self.config.window * cluster.n_slots):
                phase.step()
                tile, receipt = outcome.job, outcome.result
                if isinstance(receipt, Failure):
                    self._set_tile_aside(tile, self._explained(receipt, str(tile)), outcome.attempts)
                    continue
                self._take(tile, receipt, outcome.attempts, published)
        return published

    def _take(
        self, tile: Tile, receipt: TileReceipt, attempts: int, published: dict[str, dict[int, str]]
    ) -> None:
        """Take a published tile into the record, the report, and what is published of its exposures."""
        one = self._tiles[tile]
        one.outcome, one.attempts = DONE, attempts
        for name in (
            "n_objects", "n_stars", "n_galaxies", "n_not_scored", "seconds", "worker", "device", "peak_mib",
        ):  # fmt: skip
            setattr(one, name, getattr(receipt, name))
        self.sample.add(receipt)
        for name in tile.exposures:
            published[name][tile.pixel] = receipt.key

    def _set_tile_aside(self, tile: Tile, failure: Failure, attempts: int) -> None:
        one = self._tiles[tile]
        one.attempts = attempts
        one.set_aside(failure)
        for name in tile.exposures:
            self.inventory.records[name].notes.append(f"tile {tile.order}/{tile.pixel} was set aside")
        log.warning(
            "%s set aside: %s",
            tile,
            failure,
            extra={"tile": f"{tile.order}/{tile.pixel}", "outcome": SET_ASIDE, "fault": failure.fault},
        )

    def _joined(self, name: str, tiles: Mapping[int, str]) -> bool:
        """Whether the product of an exposure is there, made of just these tiles."""
        receipt = self.inventory.good[name]
        key = join_key(self.inventory.settings, receipt.digest, tiles.items())
        path = self.folder.detections / f"{receipt.catalog_stem}.parquet"
        return receipt.join_key == key and _has_size(path, receipt.size)

    def _join(self, cluster: Cluster, published: Mapping[str, Mapping[int, str]]) -> None:
        """Join the probabilities back to the catalogue of every exposure that has no such product yet."""
        inventory = self.inventory
        order = self.config.tile_order
        about = self._metadata
        todo = []
        for name in sorted(inventory.good):
            if self._joined(name, published[name]):
                self._close(name, inventory.good[name])
            else:
                todo.append(name)

        def submit(name: str) -> Any:
            self._new_try(f"exposure {name}")
            receipt, tiles = inventory.good[name], published[name]
            return cluster.submit(
                tasks.join,
                receipt,
                join_key(inventory.settings, receipt.digest, tiles.items()),
                [inventory.receipts.members_path(order, pixel) for pixel in sorted(tiles)],
                self.places,
                about,
                resources=cluster.cpu,
            )

        with self.reporter.phase("joining catalogues", len(todo)) as phase:
            for outcome in dispatch(cluster, todo, submit, 2 * cluster.n_slots):
                phase.step()
                if isinstance(outcome.result, Failure):
                    failure = self._explained(outcome.result, f"exposure {outcome.job}")
                    inventory.set_aside(inventory.records[outcome.job], failure)
                else:
                    self._close(outcome.job, outcome.result)

    def _close(self, name: str, receipt: ExposureReceipt) -> None:
        """The product of an exposure is there."""
        exposure = self.inventory.records[name]
        exposure.outcome, exposure.scored = DONE, receipt.scored

    def _finish(self) -> None:
        """Make the partitions a catalogue, and remove what is no part of this run's products."""
        done = [tile for tile in self.record.tiles if tile.outcome == DONE]
        tasks.finish(self.folder.objects, ((t.order, t.pixel, t.n_objects) for t in done), self._metadata)
        good = self.inventory.good
        self.folder.remove_stray_detections({f"{receipt.catalog_stem}.parquet" for receipt in good.values()})
        self.folder.receipts.remove_others(set(good), {(t.order, t.pixel) for t in done})

    @property
    def _metadata(self) -> dict[str, str]:
        """What every Parquet file says of the model; nothing that differs between two equal runs."""
        own, prior = repr(self.contract.prior_star_fraction), self.model.prior
        return {
            "model_id": self.contract.model_id,
            "model_sha256": self.model.sha256,
            "prior_star_fraction": own if prior is None else prior.as_text(),
            "model_prior_star_fraction": own,
            "tta": str(self.model.tta).lower(),
        }


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
            return Failure(
                str(header.files.image), fault, "give the file another name, or list one of the two"
            )
    taken.update(dict.fromkeys(names, header))
    return None
