"""Train the fusion network on shards of simulated fields.

Two stages: the sequence encoder alone, which is cheap, then everything together, first on the middle of the stamps,
then on the whole of them.
"""

from __future__ import annotations

import logging
import math
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from sgclassify.model.train.outcome import Trained, finish
from sgclassify.model.train.processes import joined, termination
from sgclassify.model.train.recipe import Recipe
from sgclassify.model.train.trainer import Trainer

log = logging.getLogger(__name__)

CHECKPOINT_SECONDS: Final = 180.0

SEQUENCE_TIME: Final = 0.15
"""Largest share of a limited time that the first stage takes."""

SMALL_COST: Final = 0.5
"""Cost of a step on 16-pixel stamps over that of one on 32 pixels, measured on two CPU cores."""


@dataclass(frozen=True)
class Earlier:
    """What a training takes from earlier ones.

    Attributes
    ----------
    resume : bool
        Go on from the checkpoint in the output folder, if there is one.
    initial : Path, optional
        Checkpoint or archive of another training to start from, as far as names and shapes agree. If its first layer
        has fewer channels, these are taken. Further networks of an archive stand beside the first one here too, unless
        `beside` is given.
    beside : Path, optional
        Checkpoint or archive of another training, on other fields, whose networks answer together with this one.
    """

    resume: bool = False
    initial: Path | None = None
    beside: Path | None = None


def train(
    data_dir: Path,
    out_dir: Path,
    recipe: Recipe,
    *,
    device: str = "cpu",
    max_minutes: float = math.inf,
    fields: int | None = None,
    earlier: Earlier | None = None,
) -> Trained | None:
    """Train, keep the best epoch on the validation fields, and calibrate on the calibration fields.

    Under ``torchrun`` each process trains on a share of the rows, and the first one validates and writes.

    Parameters
    ----------
    data_dir : Path
        Folder that `make_dataset` filled.
    out_dir : Path
        Folder for ``checkpoint.pt``, written every three minutes and on SIGTERM, and ``history.json``.
    max_minutes : float
        Shorten the schedule so that training ends in this time.
    fields : int, optional
        Train on so many of the training fields only, the first ones: for ablations and learning curves.

    Returns
    -------
    Trained or None
        None in all processes but the first.

    Raises
    ------
    UsageError
        If a part of the data is missing, or the checkpoint is of another training.
    """
    earlier = earlier or Earlier()
    out_dir.mkdir(parents=True, exist_ok=True)
    with joined(device) as place, termination() as stop:
        trainer = Trainer(data_dir, out_dir, recipe, place, max_minutes, earlier.beside, fields)
        if earlier.initial is not None:
            trainer.start_from(earlier.initial)
        if earlier.resume:
            trainer.resume()
        stages = {"fused": (False, True), "image": (True,), "sequence": (False,)}[recipe.modality]
        for number, joint in enumerate(stages):
            if number >= trainer.state.stage:
                run_stage(trainer, joint, stop)
                trainer.end_stage(number)
        return finish(trainer) if place.rank == 0 else None


def run_stage(trainer: Trainer, joint: bool, stop: threading.Event) -> None:
    """Train the sequence alone, or everything (`joint`), from the current state of this stage.

    The learning rate and the size of the stamps follow the progress. This is the share of the work that is done, or
    the share of the time where that is limited and further on.
    """
    recipe, state = trainer.recipe, trainer.state
    size = min(recipe.batch_size if joint else recipe.sequence_batch_size, trainer.per_process)
    steps = trainer.per_process // size
    progressive = joint and recipe.architecture == "resnet50"
    small = SMALL_COST * recipe.small_epochs if progressive else 0.0
    work = steps * (small + recipe.epochs if joint else recipe.sequence_epochs)
    if not work:
        return
    until = trainer.seconds * (0.95 if joint else SEQUENCE_TIME)
    model, optimizer = trainer.prepare(joint)
    start = time.monotonic() - state.spent
    saved = time.monotonic()
    batches = trainer.batches(joint, steps, size)
    while True:
        state.spent, ended, worse = trainer.place.agreed(
            time.monotonic() - start, float(stop.is_set()), state.since_best
        )
        if ended:
            trainer.save(optimizer)
            raise SystemExit(128 + signal.SIGTERM)
        progress = max(state.cost / work, (state.spent - state.began) / max(1e-9, until - state.began))
        if progress >= 1.0 or worse >= recipe.patience:
            break
        if time.monotonic() - saved > CHECKPOINT_SECONDS:
            trainer.save(optimizer)
            saved = time.monotonic()
        shrunk = progress * work < steps * small
        side = min(recipe.small_stamp, trainer.side) if shrunk else trainer.side
        rate = one_cycle(progress)
        inputs, target = next(batches)
        loss = trainer.loss(model, inputs, target, joint, side)
        trainer.descend(loss, optimizer, rate)
        trainer.count(loss, SMALL_COST if shrunk else 1.0, joint)
        if state.step % 100 == 0 and joint and trainer.place.rank == 0:
            log.info(
                "step %d, %d px, %.1f %% done: loss %.4f",
                state.step, side, 100 * progress, state.total / state.count,
            )  # fmt: skip
        last = state.cost >= work - 1e-6
        if (state.step % steps == 0 or last) and trainer.place.rank == 0:
            trainer.validate(joint, side, state.step / steps)
            trainer.network.train()
    batches.close()
    if trainer.place.rank == 0 and state.count:
        trainer.validate(joint, trainer.side, state.step / steps)
    # a complete training that is resumed stays as it is, unless it gets more time or epochs
    trainer.save(optimizer)


def one_cycle(progress: float) -> float:
    """Share of the peak learning rate: up from 1/25 in the first fifth, then down along a cosine to 1/1000."""
    if progress < 0.2:
        return 0.04 + 0.96 * (0.5 - 0.5 * math.cos(math.pi * progress / 0.2))
    return 0.001 + 0.999 * (0.5 + 0.5 * math.cos(math.pi * min(1.0, (progress - 0.2) / 0.8)))
