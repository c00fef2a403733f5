"""One run from the exposure list to the finished products: the driver."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sgclassify.model import runtime
from sgclassify.model.contract import ModelContract
from sgclassify.pipeline import tasks
from sgclassify.pipeline.cluster import Cluster, open_cluster
from sgclassify.pipeline.config import RunConfig, load_config
from sgclassify.pipeline.dispatch import dispatch
from sgclassify.pipeline.exposure_list import ExposureList, parse_list
from sgclassify.pipeline.outdir import OutputFolder
from sgclassify.pipeline.plan import TilePlan, plan_tiles
from sgclassify.pipeline.progress import Reporter
from sgclassify.pipeline.record import (
    DONE,
    SET_ASIDE,
    SKIPPED,
    ExposureRecord,
    Failure,
    RunRecord,
    TileRecord,
)
from sgclassify.pipeline.report import write_report
from sgclassify.stages.errors import NothingToDoError, SgClassifyError, UsageError
from sgclassify.stages.prepare import PreparedExposure
from sgclassify.stages.prior import Prior, read_prior
from sgclassify.stages.read.header import ExposureHeader, SlitlessExposureError, read_header
from sgclassify.stages.read.names import ExposureFiles, exposure_stem

log = logging.getLogger(__name__)

# The further a tile has come, the sooner it goes on: stamps leave the memory of the workers first.
EXTRACT_PRIORITY, INFER_PRIORITY, PUBLISH_PRIORITY = 0, 10, 20


@dataclass(frozen=True)
class Options:
    """What the command line says.

    Attributes
    ----------
    exposure_list, output : Path
    model : Path or None
        Model archive; None for the shipped one.
    scheduler : str or None
        Address of an existing scheduler; None for an embedded cluster.
    workers : int or None
        Worker processes.
    config : Path or None
        Configuration file.
    prior : str or None
        Share of stars to assume, or a table of it by magnitude; None for what the configuration says.
    tta : bool
        Average over the eight symmetries of the square; also if the configuration says so.
    overwrite, keep_work : bool
    command : tuple of str
        The command line, for the record.
    """

    exposure_list: Path
    output: Path
    model: Path | None = None
    scheduler: str | None = None
    workers: int | None = None
    config: Path | None = None
    prior: str | None = None
    tta: bool = False
    overwrite: bool = False
    keep_work: bool = False
    command: tuple[str, ...] = ()


def run(options: Options, reporter: Reporter) -> RunRecord:
    """Carry out a run.

    Parameters
    ----------
    options : Options
    reporter : Reporter

    Returns
    -------
    RunRecord
        Its ``exit_code`` is that of the command: 0 all done, 3 something was set aside, 4 no usable input,
        6 the cluster could not do the work.

    Raises
    ------
    UsageError, ModelError
        Before anything is written.
    """
    config = with_prior(load_config(options.config), options.prior)
    config = dataclasses.replace(config, tta=config.tta or options.tta)
    prior = prior_of(config)
    listed = parse_list(options.exposure_list)
    classifier = runtime.load(options.model, batch_size=config.batch_size)
    model = tasks.ModelRef(
        path=options.model.absolute() if options.model is not None else None,
        sha256=classifier.sha256,
        batch_size=config.batch_size,
        threads=config.torch_threads,
        tta=config.tta,
        own_prior=classifier.contract.prior_star_fraction,
        prior=prior,
    )
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
    with OutputFolder(
        options.output, _run_key(listed, classifier.sha256, config, prior), options.overwrite
    ) as folder:
        driver = _Driver(options, config, listed, model, classifier.contract, folder, reporter, record)
        try:
            driver.carry_out()
        except SgClassifyError as error:
            record.exit_code, record.message = error.exit_code, str(error)
            log.error("%s", error, extra={"exit_code": error.exit_code})
        except BaseException as error:
            record.message = f"ended by {type(error).__name__}: {error}"
            raise
        finally:
            driver.close()
    return record


def with_prior(config: RunConfig, value: str | None) -> RunConfig:
    """The configuration with the prior of the command line, a number or the path of a table, if there is one."""
    if value is None:
        return config
    try:
        share = float(value)
    except ValueError:
        return dataclasses.replace(config, prior_star_fraction=0.0, prior_table=value)
    if not 0.0 < share < 1.0:
        raise UsageError(f"the prior share of stars is {value}, it must lie between 0 and 1")
    return dataclasses.replace(config, prior_star_fraction=share, prior_table="")


def prior_of(config: RunConfig) -> Prior | None:
    """The prior that a configuration asks for; None for the model's own."""
    if config.prior_table:
        return read_prior(Path(config.prior_table))
    return Prior((config.prior_star_fraction,)) if config.prior_star_fraction else None


def _run_key(listed: ExposureList, model_sha256: str, config: RunConfig, prior: Prior | None) -> str:
    """Digest of what decides about the products; how the work is shared out does not."""
    relevant = {
        "inputs": sorted(str(files.image.resolve()) for files in listed.files),
        "model": model_sha256,
        "stage": dataclasses.asdict(config.stage),
        "tile_order": config.tile_order,
    }
    # only where asked for, so that folders of runs without them stay theirs
    if prior is not None:
        relevant["prior"] = prior.describe()
    if config.tta:
        relevant["tta"] = True
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


def _try_header(files: ExposureFiles) -> ExposureHeader | SlitlessExposureError | Failure:
    """Read a header; a task border, so that whatever goes wrong costs this exposure only."""
    try:
        return read_header(files)
    except SlitlessExposureError as error:
        return error
    except Exception as error:  # noqa: BLE001
        return Failure.from_error(error)


class _Driver:
    """The phases of a run, in order; each fills its part of the record."""

    def __init__(
        self,
        options: Options,
        config: RunConfig,
        listed: ExposureList,
        model: tasks.ModelRef,
        contract: ModelContract,
        folder: OutputFolder,
        reporter: Reporter,
        record: RunRecord,
    ) -> None:
        self.options = options
        self.config = config
        self.listed = listed
        self.model = model
        self.contract = contract
        self.folder = folder
        self.reporter = reporter
        self.record = record
        self.receipts: list[tasks.TileReceipt] = []
        self._exposures: dict[str, ExposureRecord] = {}
        self._footprints: dict[str, npt.NDArray[np.int64]] = {}
        self._cleared = False

    def carry_out(self) -> None:
        """All phases; an error that ends the run early is raised."""
        self.record.notes.extend(self.listed.notes)
        with self._timed("headers"):
            headers = self._read_headers()
        self._require(headers)
        with self._open_cluster() as cluster:
            self.record.model["device"] = cluster.device
            self.model = dataclasses.replace(self.model, device=cluster.device)
            with self._timed("prepare"):
                prepared = self._prepare(cluster, headers)
            self._require(prepared)
            self.folder.clear()
            self._cleared = True
            with self._timed("tiles"):
                plan = self._run_tiles(cluster, prepared)
            with self._timed("detections"):
                self._join(cluster, prepared, plan)
        with self._timed("finish"):
            tasks.finish(self.folder, self.receipts, self._metadata)
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
                        scratch=self.folder.work / "dask",
                        shared=self.folder.work,
                    )
                )
            yield cluster

    def close(self) -> None:
        """Write report and record, and remove the work folder."""
        for exposure in self.record.exposures:
            if exposure.outcome == SET_ASIDE and not exposure.fault:
                exposure.fault, exposure.advice = "the run ended before this exposure was done", "run again"
        try:
            if self._cleared or not self.folder.has_products:
                self._write_report_and_record()
            else:
                log.warning("%s: the products of the earlier run were left as they are", self.folder.path)
        finally:
            if not self.options.keep_work:
                self.folder.remove_work()

    def _write_report_and_record(self) -> None:
        try:
            write_report(self.record, self.receipts, self.folder.path / "report.html")
        except BaseException as error:
            self.record.exit_code, self.record.message = 1, f"no report: {error!r}"
            raise
        finally:
            self.record.write(self.folder.path / "run.json")

    def _require(self, exposures: Sequence[object]) -> None:
        if not exposures:
            raise NothingToDoError(f"{self.options.exposure_list}: no exposure of the list can be used")

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.record.timings[phase] = time.monotonic() - start

    def _set_aside(self, exposure: ExposureRecord, failure: Failure, outcome: str = SET_ASIDE) -> None:
        """Set an exposure aside, or skip it, and name it once."""
        exposure.close(outcome, failure)
        log.warning(
            "exposure %s %s: %s",
            exposure.id,
            "skipped" if outcome == SKIPPED else "set aside",
            failure,
            extra={"exposure": exposure.id, "outcome": outcome, "file": failure.file, "fault": failure.fault},
        )

    def _read_headers(self) -> list[ExposureHeader]:
        """Headers of the exposures that can be used so far, in order of their name."""
        for problem in self.listed.problems:
            exposure = ExposureRecord(exposure_stem(problem.path), {"image": problem.path})
            self.record.exposures.append(exposure)
            self._set_aside(exposure, Failure.from_error(problem))
        files = self.listed.files
        headers: list[ExposureHeader] = []
        taken: dict[str | int, ExposureHeader] = {}
        with (
            self.reporter.phase("reading headers", len(files)) as phase,
            ThreadPoolExecutor(self.config.header_threads) as pool,
        ):
            for one, found in zip(files, pool.map(_try_header, files), strict=True):
                exposure = ExposureRecord(exposure_stem(one.image), _file_names(one))
                self.record.exposures.append(exposure)
                phase.step()
                if isinstance(found, SlitlessExposureError):
                    self._set_aside(exposure, Failure.from_error(found), SKIPPED)
                elif isinstance(found, Failure):
                    self._set_aside(exposure, found)
                elif (clash := _clash(found, taken)) is not None:
                    self._set_aside(exposure, clash)
                else:
                    exposure.band = found.band
                    exposure.notes.extend(found.notes)
                    headers.append(found)
                    self._exposures[found.exposure_id] = exposure
        return headers

    def _prepare(self, cluster: Cluster, headers: Sequence[ExposureHeader]) -> list[PreparedExposure]:
        """Check and prepare the exposures; those that are good, in order of their name."""
        folder = self.folder.work / "exposures"
        folder.mkdir()
        prepared: list[PreparedExposure] = []

        def submit(header: ExposureHeader) -> Any:
            return cluster.client.submit(
                tasks.prepare,
                header,
                folder,
                self.config.tile_order,
                self.config.stage,
                pure=False,
                resources=cluster.cpu,
            )

        with self.reporter.phase("preparing exposures", len(headers)) as phase:
            for header, found in dispatch(cluster, headers, submit, 2 * cluster.n_slots):
                phase.step()
                exposure = self._exposures[header.exposure_id]
                if isinstance(found, Failure):
                    self._set_aside(exposure, found)
                    continue
                good, tiles = found
                exposure.notes = list(good.notes)
                exposure.sha256 = good.sha256
                exposure.rows, exposure.usable = good.n_rows, good.n_usable
                prepared.append(good)
                self._footprints[good.exposure_id] = tiles
        return sorted(prepared, key=lambda p: p.exposure_id)

    def _run_tiles(self, cluster: Cluster, prepared: Sequence[PreparedExposure]) -> list[TilePlan]:
        """Compute and publish every tile; the tiles that were published."""
        by_id = {p.exposure_id: p for p in prepared}
        order = plan_tiles(self._footprints.items(), self.config.tile_order)
        if self.config.tile_shuffle_seed:
            random.Random(self.config.tile_shuffle_seed).shuffle(order)
        members = self.folder.work / "members"
        members.mkdir()
        metadata = self._metadata
        published: list[TilePlan] = []

        def submit(tile: TilePlan) -> Any:
            stamps = cluster.client.submit(
                tasks.extract,
                tile,
                [by_id[name] for name in tile.exposures],
                self.contract.stamp_size,
                self.config.stage,
                pure=False,
                resources=cluster.cpu,
                priority=EXTRACT_PRIORITY,
            )
            scored = cluster.client.submit(
                tasks.infer,
                stamps,
                self.model,
                pure=False,
                resources=cluster.inference,
                priority=INFER_PRIORITY,
            )
            return cluster.client.submit(
                tasks.publish,
                tile,
                scored,
                self.folder.objects,
                members,
                metadata,
                pure=False,
                resources=cluster.cpu,
                priority=PUBLISH_PRIORITY,
            )

        with self.reporter.phase("classifying tiles", len(order)) as phase:
            for tile, found in dispatch(cluster, order, submit, self.config.window * cluster.n_slots):
                phase.step()
                tile_record = TileRecord(tile.order, tile.pixel, list(tile.exposures))
                self.record.tiles.append(tile_record)
                if isinstance(found, Failure):
                    self._set_tile_aside(tile_record, found)
                    continue
                tile_record.outcome = DONE
                for name in ("n_objects", "n_stars", "n_galaxies", "n_not_scored", "seconds"):
                    setattr(tile_record, name, getattr(found, name))
                self.receipts.append(found)
                published.append(tile)
        self.receipts.sort(key=lambda receipt: receipt.pixel)
        return published

    def _set_tile_aside(self, tile: TileRecord, failure: Failure) -> None:
        tile.set_aside(failure)
        for name in tile.exposures:
            self._exposures[name].notes.append(f"tile {tile.order}/{tile.pixel} was set aside")
        log.warning(
            "tile %d/%d set aside: %s",
            tile.order,
            tile.pixel,
            failure,
            extra={"tile": f"{tile.order}/{tile.pixel}", "outcome": SET_ASIDE, "fault": failure.fault},
        )

    def _join(self, cluster: Cluster, prepared: Sequence[PreparedExposure], plan: Sequence[TilePlan]) -> None:
        """Join the probabilities back to the catalogue of every exposure."""
        tiles: dict[str, list[Path]] = {p.exposure_id: [] for p in prepared}
        for tile in plan:
            for name in tile.exposures:
                tiles[name].append(tasks.members_path(self.folder.work / "members", tile))
        metadata = self._metadata

        def submit(exposure: PreparedExposure) -> Any:
            return cluster.client.submit(
                tasks.join,
                exposure,
                sorted(tiles[exposure.exposure_id]),
                self.folder.detections,
                metadata,
                pure=False,
                resources=cluster.cpu,
            )

        with self.reporter.phase("joining catalogues", len(prepared)) as phase:
            for exposure, found in dispatch(cluster, prepared, submit, 2 * cluster.n_slots):
                phase.step()
                one = self._exposures[exposure.exposure_id]
                if isinstance(found, Failure):
                    self._set_aside(one, found)
                else:
                    one.outcome, one.scored = DONE, found

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
