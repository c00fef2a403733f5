"""The three phases of a run on the workers. Each submits its jobs, and accepts or refuses their outcomes."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final, Generic, TypeVar

from sgclassify.model.serve.loaded import ModelRef
from sgclassify.pipeline import tasks
from sgclassify.pipeline.book import TileBook
from sgclassify.pipeline.cluster.dispatch import dispatch
from sgclassify.pipeline.cluster.handle import Cluster
from sgclassify.pipeline.errors import TaskTimeoutError
from sgclassify.pipeline.inventory import Inventory
from sgclassify.pipeline.progress import Reporter
from sgclassify.pipeline.record.receipts import ExposureReceipt, TileReceipt, join_key
from sgclassify.pipeline.record.record import SET_ASIDE, Failure
from sgclassify.pipeline.record.sample import level_for
from sgclassify.stages.errors import ModelError, UsageError
from sgclassify.stages.read.header import ExposureHeader
from sgclassify.stages.tiling import Tile, parts_of

log = logging.getLogger(__name__)

# The further a tile has come, the sooner it goes on: stamps leave the memory of the workers first.
EXTRACT_PRIORITY, INFER_PRIORITY, PUBLISH_PRIORITY = 0, 10, 20
CHECK_PRIORITY = 30

PER_SLOT: Final = 2
"""Exposures on the cluster per CPU slot: no worker waits for the driver."""

Job = TypeVar("Job")
Receipt = TypeVar("Receipt")


@dataclass(frozen=True)
class Work:
    """What all phases need; `metadata` is what every Parquet file says of the model."""

    cluster: Cluster
    places: tasks.Places
    inventory: Inventory
    reporter: Reporter
    metadata: Mapping[str, str]


class Phase(ABC, Generic[Job, Receipt]):
    """One phase: independent jobs, each of which ends with a receipt or a failure."""

    title: ClassVar[str]
    """What the operator reads."""

    def __init__(self, work: Work) -> None:
        self.cluster = work.cluster
        self.places = work.places
        self.inventory = work.inventory
        self.config = work.inventory.config
        self.metadata = work.metadata
        self._reporter = work.reporter

    def carry_out(self, jobs: Sequence[Job]) -> None:
        """Do all the jobs; raises what `dispatch` raises."""

        def submit(job: Job) -> Any:
            # forget that an earlier try took too long
            self.places.note(str(job)).unlink(missing_ok=True)
            return self.submit(job)

        with self._reporter.phase(self.title, len(jobs)) as steps:
            for outcome in dispatch(self.cluster, jobs, submit, self.in_flight()):
                steps.step()
                job, result = outcome.job, outcome.result
                if not isinstance(result, Failure):
                    self.accept(job, result, outcome.attempts)
                    continue
                if self.places.note(str(job)).is_file():
                    # the worker ended itself over this job
                    result = Failure.from_error(TaskTimeoutError(str(job), self.places.limit_s))
                self.refuse(job, result, outcome.attempts)

    def in_flight(self) -> int:
        """Most jobs on the cluster at a time."""
        return PER_SLOT * self.cluster.n_slots

    @abstractmethod
    def submit(self, job: Job) -> Any:
        """Submit a job; returns the future of its receipt."""

    @abstractmethod
    def accept(self, job: Job, receipt: Receipt, attempts: int) -> None:
        """Take the receipt of a job that is done."""

    @abstractmethod
    def refuse(self, job: Job, failure: Failure, attempts: int) -> None:
        """Set aside what a job has failed on."""


class ModelCheck:
    """The check of the model on a worker, beside the preparation of exposures; a worker keeps a model that it loads."""

    def __init__(self, work: Work, model: ModelRef) -> None:
        self._cluster = work.cluster
        self._model = model
        self._begun: list[Any] = []

    def begin(self) -> None:
        """Submit the check."""
        self._begun.append(self._submit(self._model))

    def end(self) -> None:
        """Wait for a check that was begun; `ModelError` if the model cannot be used."""

        def submit(model: ModelRef) -> Any:
            return self._begun.pop() if self._begun else self._submit(model)

        for outcome in dispatch(self._cluster, [self._model] if self._begun else [], submit, in_flight=1):
            if isinstance(outcome.result, Failure):
                raise ModelError(f"the model cannot be loaded on a worker: {outcome.result}")

    def _submit(self, model: ModelRef) -> Any:
        return self._cluster.submit(tasks.check, model, resources=self._cluster.inference, priority=CHECK_PRIORITY)


class Preparation(Phase[ExposureHeader, ExposureReceipt]):
    """Check and prepare exposures; those that are good go into the inventory."""

    title = "preparing exposures"

    def submit(self, job: ExposureHeader) -> Any:
        arguments = job, self.places, self.config.tile_order, self.config.stage
        return self.cluster.submit(tasks.prepare, *arguments, resources=self.cluster.cpu)

    def accept(self, job: ExposureHeader, receipt: ExposureReceipt, attempts: int) -> None:
        inventory, name = self.inventory, job.exposure_id
        inventory.records[name].attempts = attempts
        if name in inventory.good and inventory.good[name].digest != receipt.digest:
            raise UsageError(
                f"{job.files.image}: has changed since an earlier run into "
                f"{inventory.folder.path} read it; choose another folder, or start again with --overwrite"
            )
        inventory.accept(receipt)

    def refuse(self, job: ExposureHeader, failure: Failure, attempts: int) -> None:
        self.inventory.records[job.exposure_id].attempts = attempts
        self.inventory.drop(job.exposure_id, failure)


class Classification(Phase[Tile, TileReceipt]):
    """Compute and publish tiles; the book gets the outcomes."""

    title = "classifying tiles"

    def __init__(self, work: Work, model: ModelRef, stamp_size: int, book: TileBook) -> None:
        super().__init__(work)
        self._model = model
        self._stamp_size = stamp_size
        self._book = book
        self._level = level_for(sum(receipt.usable for receipt in self.inventory.good.values()))

    def in_flight(self) -> int:
        return self.config.window * self.cluster.n_slots

    def submit(self, job: Tile) -> Any:
        submit, cpu, places = self.cluster.submit, self.cluster.cpu, self.places
        parts = []
        for part in parts_of(job, self.inventory.rows_of(job)):
            cut = part, places, self._stamp_size, self.config.stage
            stamps = submit(tasks.extract, *cut, resources=cpu, priority=EXTRACT_PRIORITY)
            score = part, stamps, places, self._model
            parts.append(submit(tasks.infer, *score, resources=self.cluster.inference, priority=INFER_PRIORITY))
        write = job, self.inventory.key_of(job), parts, places, self.metadata, self._level
        return submit(tasks.publish, *write, resources=cpu, priority=PUBLISH_PRIORITY)

    def accept(self, job: Tile, receipt: TileReceipt, attempts: int) -> None:
        self._book.take(job, receipt, attempts)

    def refuse(self, job: Tile, failure: Failure, attempts: int) -> None:
        one = self._book.records[job]
        one.attempts = attempts
        one.close(SET_ASIDE, failure)
        for name in job.exposures:
            self.inventory.records[name].notes.append(f"{job} was set aside")
        log.warning(
            "%s set aside: %s",
            job,
            failure,
            extra={"tile": f"{job.order}/{job.pixel}", "outcome": SET_ASIDE, "fault": failure.fault},
        )


class Join(Phase[ExposureReceipt, ExposureReceipt]):
    """Join the probabilities of published tiles back to the catalogues of exposures; see `TileBook`."""

    title = "joining catalogues"

    def __init__(self, work: Work, published: Mapping[str, Mapping[int, str]]) -> None:
        super().__init__(work)
        self._published = published

    def submit(self, job: ExposureReceipt) -> Any:
        inventory, tiles = self.inventory, self._published[job.exposure_id]
        key = join_key(inventory.settings, job.digest, tiles.items())
        members = [inventory.receipts.members_path(self.config.tile_order, pixel) for pixel in sorted(tiles)]
        arguments = job, key, members, self.places, self.metadata
        return self.cluster.submit(tasks.join, *arguments, resources=self.cluster.cpu)

    def accept(self, job: ExposureReceipt, receipt: ExposureReceipt, attempts: int) -> None:
        self.inventory.complete(receipt)

    def refuse(self, job: ExposureReceipt, failure: Failure, attempts: int) -> None:
        self.inventory.drop(job.exposure_id, failure)
