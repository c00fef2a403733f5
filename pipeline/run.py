"""One run from the exposure list to the finished products: the driver."""

from __future__ import annotations

import dataclasses
import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING

from sgclassify.model.serve.contract import ModelContract
from sgclassify.pipeline import surroundings
from sgclassify.pipeline.book import TileBook
from sgclassify.pipeline.inventory import Inventory
from sgclassify.pipeline.plan import Plan, describe, make_plan
from sgclassify.pipeline.process import peak_mib
from sgclassify.pipeline.progress import Reporter
from sgclassify.pipeline.record.output import NOTES, PROGRESS, SCRATCH, TOKEN, OutputFolder
from sgclassify.pipeline.record.prometheus import MetricsFile
from sgclassify.pipeline.record.receipts import ExposureReceipt, catalogue_key
from sgclassify.pipeline.record.record import DONE, RunRecord, pending
from sgclassify.pipeline.record.report import write_report
from sgclassify.pipeline.record.sample import SkySample
from sgclassify.pipeline.record.status import ProgressFile
from sgclassify.pipeline.request import Request
from sgclassify.stages.errors import ExitCode, SgClassifyError, UsageError
from sgclassify.stages.write.publish import finish_hats, import_hats

if TYPE_CHECKING:
    from sgclassify.pipeline.cluster.handle import Cluster
    from sgclassify.pipeline.tasks import Places

log = logging.getLogger(__name__)


def run(request: Request, reporter: Reporter) -> RunRecord:
    """Carry out a run.

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
    options, contract = request.options, request.model.contract()
    record = _record(request, contract)
    with request.folder() as folder:
        driver = _Driver(request, contract, folder, reporter, record)
        reporter.observe(ProgressFile(folder.work / PROGRESS, record).step)
        if options.metrics_file is not None:
            reporter.observe(MetricsFile(options.metrics_file, record).step)
        try:
            driver.carry_out()
        except SgClassifyError as error:
            record.exit_code, record.message = error.exit_code, str(error)
            if isinstance(error, UsageError):
                raise
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
    """What `run` would do, as a text; nothing is written. Raises what the run would raise."""
    # imported here: a run leaves the loading to its workers
    from sgclassify.model.serve import runtime

    contract = runtime.load(request.model, batch_size=request.config.batch_size).contract
    folder = request.folder()
    folder.inspect()
    inventory = Inventory(request, folder, _record(request, contract))
    inventory.read(reporter)
    return describe(make_plan(inventory), inventory)


def _record(request: Request, contract: ModelContract) -> RunRecord:
    options, prior = request.options, request.prior
    return RunRecord(
        command=list(options.command),
        configuration=request.config.as_dict(),
        model={
            "id": contract.model_id,
            "sha256": request.model.sha256,
            "prior_star_fraction": prior.describe() if prior else contract.prior_star_fraction,
            "model_prior_star_fraction": contract.prior_star_fraction,
            "path": str(options.model or "default"),
            "exact": request.is_exact(contract),
            "device": "",
        },
        output=options.output,
    )


class _Driver:
    """The steps of a run, in order; each fills its part of the record."""

    def __init__(
        self, request: Request, contract: ModelContract, folder: OutputFolder, reporter: Reporter, record: RunRecord
    ) -> None:
        self.request, self.contract = request, contract
        self.folder, self.reporter, self.record = folder, reporter, record
        self.inventory = Inventory(request, folder, record)
        self._model, self._metadata = request.model_ref(contract), request.metadata(contract)
        self._sample = SkySample()
        self._opened = False
        self._complete = False

    def carry_out(self) -> None:
        """All steps; an error that ends the run early is raised."""
        inventory = self.inventory
        with self._timed("headers"):
            inventory.read(self.reporter)
            if self.folder.is_fresh:
                self.folder.start_afresh()
            # new exposures are prepared before the plan: receipts then say which tiles they touch
            plan = None if inventory.new() else make_plan(inventory)
        if plan is not None and plan.is_done:
            self._open_products()
            book = self._enter(plan)
        else:
            # seconds in which this process has nothing to do: the workers start
            threading.Thread(target=import_hats, name="import hats", daemon=True).start()
            with self._cluster() as cluster:
                book = self._work(cluster, plan)
        with self._timed("finish"):
            self._finish(book)
        self._complete = True
        counts = self.record.counts()
        aside = counts["exposures_set_aside"] or counts["tiles_set_aside"]
        self.record.exit_code = ExitCode.SET_ASIDE if aside else ExitCode.DONE

    def _work(self, cluster: Cluster, plan: Plan | None) -> TileBook:
        """What needs the workers; without a plan there are new exposures, which come first."""
        from sgclassify.pipeline.phases import Classification, Join, ModelCheck, Preparation, Work

        inventory = self.inventory
        work = Work(cluster, self._places(), inventory, self.reporter, self._metadata)
        model = dataclasses.replace(self._model, device=cluster.device)
        check = ModelCheck(work, model)

        def prepare(names: list[str]) -> None:
            Preparation(work).carry_out([inventory.headers[name] for name in names])
            if not inventory.good:
                raise inventory.nothing_to_do()

        if plan is None or plan.todo:
            check.begin()
        with self._timed("prepare"):
            if plan is None:
                prepare(inventory.new())
                plan = make_plan(inventory)
            # a model that does not work must not cost products
            check.end()
        self._open_products()
        with self._timed("tiles"):
            book = self._enter(plan)
            while plan.again:
                prepare(plan.again)
                plan = make_plan(inventory)
                book = self._enter(plan)
            if done := len(plan.tiles) - len(plan.todo):
                log.info("%d tiles are complete already", done, extra={"tiles_complete": done})
            Classification(work, model, self.contract.stamp_size, book).carry_out(plan.todo)
        with self._timed("detections"):
            Join(work, book.published).carry_out(self._to_join(book))
        return book

    def _open_products(self) -> None:
        self.folder.open_products()
        self._opened = True

    def _enter(self, plan: Plan) -> TileBook:
        """Enter the tiles of a plan into the record, and the exposures with which nothing is to do."""
        book = TileBook(plan, self.inventory)
        self.record.tiles = list(book.records.values())
        self._sample = book.sample
        for name in plan.complete:
            self.inventory.complete(self.inventory.good[name])
        return book

    def _to_join(self, book: TileBook) -> list[ExposureReceipt]:
        """Exposures whose catalogues were not made of just the published tiles; those set aside were planned too."""
        todo = []
        for name, receipt in sorted(self.inventory.good.items()):
            if self.inventory.is_joined(name, book.published[name]):
                self.inventory.complete(receipt)
            else:
                todo.append(receipt)
        return todo

    def _finish(self, book: TileBook) -> None:
        """Make the partitions a catalogue, and remove what is no part of this run's products."""
        folder, good = self.folder, self.inventory.good
        done = [tile for tile in self.record.tiles if tile.outcome == DONE]
        filled = [(t.order, t.pixel, t.n_objects) for t in done if t.n_objects]
        key = catalogue_key(book.keys, self._metadata)
        if not folder.receipts.has_catalogue(key, folder.objects):
            files = finish_hats(folder.objects, filled, self._metadata)
            folder.receipts.enter_catalogue(key, folder.objects, files)
        folder.remove_stray_detections({f"{receipt.catalog_stem}.parquet" for receipt in good.values()})
        folder.receipts.remove_others(set(good), {(t.order, t.pixel) for t in done})

    def close(self) -> None:
        """Write report and record; remove the work folder of a run that is complete."""
        self.record.peak_mib["driver"] = peak_mib()
        if self._opened or not self.folder.has_products:
            try:
                self._write_report_and_record()
            except OSError as error:
                # if a full disk, say, has ended the run, that must be reported, and not this
                if self._complete:
                    raise
                log.error("%s: the record of this run could not be written: %s", self.folder.path, error)
            if waiting := pending(self.record.counts()):
                log.warning("%s: the run ended before their turn; run the same command again", waiting)
        else:
            log.warning("%s: the products of the earlier run were left as they are", self.folder.path)
        # what was prepared is of use to the next run, unless this one is complete
        useful = not self._complete and any(self.folder.prepared.iterdir())
        if not self.request.options.keep_work:
            self.folder.remove_work(whole=not useful)

    def _write_report_and_record(self) -> None:
        try:
            write_report(self.record, self._sample, self.folder.path / "report.html", self.folder.receipts.pictures)
        except BaseException as error:
            if self._complete:
                self.record.exit_code, self.record.message = ExitCode.DEFECT, f"no report: {error!r}"
            raise
        finally:
            self.record.write(self.folder.path / "run.json")

    @contextmanager
    def _cluster(self) -> Iterator[Cluster]:
        # Imported here, as all that needs Dask: it takes a second, and a run with nothing to do needs no workers.
        surroundings.import_dask()
        from sgclassify.pipeline.cluster.handle import open_cluster

        options, folder = self.request.options, self.folder
        with ExitStack() as stack:
            with self._timed("cluster"):
                cluster = stack.enter_context(
                    open_cluster(
                        self.request.config,
                        scheduler=options.scheduler,
                        n_workers=options.workers,
                        scratch=folder.work / SCRATCH,
                        shared=folder.work,
                        scheduler_file=options.scheduler_file,
                        model=self._model,
                        on_notice=self.record.notes.append,
                    )
                )
            self.record.model["device"] = cluster.device
            yield cluster

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.monotonic()
        try:
            yield
        finally:
            self.record.timings[phase] = self.record.timings.get(phase, 0.0) + time.monotonic() - start

    def _places(self) -> Places:
        from sgclassify.pipeline.tasks import Places

        folder = self.folder
        return Places(
            prepared=folder.prepared,
            objects=folder.objects,
            detections=folder.detections,
            exposures=folder.receipts.exposures,
            tiles=folder.receipts.tiles,
            notes=folder.work / NOTES,
            token_path=folder.work / TOKEN,
            token=folder.token,
            limit_s=self.request.config.task_timeout_s,
        )
