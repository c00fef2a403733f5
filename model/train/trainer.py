"""A training at some step: its data, network, optimizer and state, and what one step and one validation do."""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sgclassify.model.data.rows import Rows, read_rows, sent
from sgclassify.model.train import checkpoint
from sgclassify.model.train.augment import augment, hide
from sgclassify.model.train.calibrate import prior_weights
from sgclassify.model.train.network import HEADS, FusionNetwork
from sgclassify.model.train.processes import Place, computes_bf16
from sgclassify.model.train.recipe import Recipe
from sgclassify.model.train.validation import SequenceOnly, figures, fit_normalization, measure_batch_norm, predict
from sgclassify.stages.errors import UsageError
from sgclassify.stages.write.atomic import write_atomic_bytes

log = logging.getLogger(__name__)

BATCH_NORM_SAMPLE: Final = 6_000
"""Objects that the statistics of the final weights are measured on; a third of them before each validation."""

VALIDATION_SAMPLE: Final = 16_000
"""Objects that the epochs are compared on, drawn from all validation fields."""

Batch = tuple[list[Tensor], Tensor]
"""Inputs of the network, and labels."""


@dataclass
class State:
    """How far a training is; its checkpoint holds this.

    Attributes
    ----------
    stage : int
        Number of the stage.
    step : int
        Steps done in this stage.
    cost : float
        Work done in this stage; a step on whole stamps costs 1.
    spent, began : float
        Seconds spent in all, and before this stage.
    total, count : float, int
        Sum of the losses since the last validation, and the number of their steps.
    history : list of dict
        A row per validation.
    best_loss, best_side, since_best : float, int, int
        Lowest validation loss of this stage, side of its stamps, and validations since then.
    """

    stage: int = 0
    step: int = 0
    cost: float = 0.0
    spent: float = 0.0
    began: float = 0.0
    total: float = 0.0
    count: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best_loss: float = math.inf
    best_side: int = 0
    since_best: int = 0

    def end_stage(self, number: int) -> None:
        """Make the stage after this one the current one."""
        self.stage, self.step, self.cost, self.began = number + 1, 0, 0.0, self.spent
        self.best_loss, self.best_side, self.since_best = math.inf, 0, 0

    def rate(self, loss: float, side: int, whole: int) -> bool:
        """Count a validation loss on stamps of this side, and tell whether it is the best so far.

        A loss on smaller stamps is no rival, and does not use up the patience: `whole` is the side of whole stamps.
        """
        better = side > self.best_side or loss < self.best_loss
        if better:
            self.best_loss, self.best_side = loss, side
        self.since_best = 0 if better or side < whole else self.since_best + 1
        self.total, self.count = 0.0, 0
        return better


class Trainer:
    """A training; a checkpoint holds its `state`, the weights and the optimizer.

    Parameters
    ----------
    minutes : float
        Time that the training may take.
    beside : Path, optional
        Checkpoint or archive whose networks answer together with this one.
    fields : int, optional
        Train on so many fields only.

    Attributes
    ----------
    rows, validation, calibration : Rows
        What this process trains on, and in the first process what it validates on and calibrates on.
    size : int
        Side of the stamps in the data, pixels.
    n_rows, n_stars : int
        Objects and stars that all processes train on.
    per_process : int
        Objects of the process that has the fewest.
    """

    rows: Rows
    validation: Rows
    calibration: Rows
    size: int
    n_rows: int
    n_stars: int
    per_process: int

    def __init__(
        self, data_dir: Path, out_dir: Path, recipe: Recipe, place: Place, minutes: float,
        beside: Path | None = None, fields: int | None = None,
    ) -> None:  # fmt: skip
        self.place, self.device = place, place.device
        self.recipe, self.seconds, self.out_dir = recipe, 60.0 * minutes, out_dir
        self.precision = self._usable_precision()
        self._read(data_dir, fields)
        share = self.n_stars / self.n_rows
        self.learnt_prior = 0.5 if recipe.class_balance else share
        self.weight = prior_weights(share, 0.5) if recipe.class_balance else torch.ones(2)
        torch.manual_seed(recipe.seed)
        self.network = FusionNetwork(self.size, architecture=recipe.architecture)
        self.side = self.network.image_encoder.side
        fit_normalization(self.network, self.rows.features)
        self.network.to(self.device).to(memory_format=torch.channels_last)
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
            # room for network, optimizer and batches beside the data
            if self.rows.nbytes + 12e9 < torch.cuda.mem_get_info(self.device)[0]:
                self.rows = self.rows.to(self.device)
        self.beside = [] if beside is None else self._networks(checkpoint.weights_of(beside, self.device), beside)
        self.average = copy.deepcopy(self.network)
        # the same tensors to the end: their values are replaced in place
        self._averaged = [
            [t for t in network.state_dict().values() if t.is_floating_point()]
            for network in (self.average, self.network)
        ]
        self.best = copy.deepcopy(self.average.state_dict())
        self.optimizer_state: dict[str, Any] = {}
        self.state = State()

    def _usable_precision(self) -> str:
        automatic = "bf16" if self.device.type == "cuda" else "fp32"
        precision = automatic if self.recipe.precision == "auto" else self.recipe.precision
        # all processes use the same precision: their gradients are averaged
        if precision == "bf16" and self.device.type == "cpu" and self.place.agreed(not computes_bf16())[0]:
            precision = "fp32"
            if self.place.rank == 0:
                log.warning("this processor cannot train in bf16 (no AVX-512): training in fp32 instead")
        return precision

    def _read(self, data_dir: Path, fields: int | None) -> None:
        """Read the rows of this process, and in the first process those of validation and calibration."""

        def paths(part: str) -> list[Path]:
            return sorted((data_dir / part).glob("*.parquet"))

        self.rows = read_rows(paths("training")[:fields], self.place.rank, self.place.world)
        self.size = self.rows.size
        counts = torch.tensor([len(self.rows), int((self.rows.label == 0).sum())], device=self.device)
        fewest = counts[:1].clone()
        if self.place.world > 1:
            distributed.all_reduce(counts)
            distributed.all_reduce(fewest, distributed.ReduceOp.MIN)
        self.n_rows, self.n_stars = counts.tolist()
        self.per_process = int(fewest)
        _with_both_classes(self.n_rows, self.n_stars, data_dir / "training")
        if self.place.rank == 0:
            found = read_rows(paths("validation"))
            order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
            self.validation = found.take(order[:VALIDATION_SAMPLE])
            self.calibration = read_rows(paths("calibration"))
            for part, rows in (("validation", self.validation), ("calibration", self.calibration)):
                _with_both_classes(len(rows), int((rows.label == 0).sum()), data_dir / part)
            log.info(
                "training on %d objects, %d of them stars (%.1f GB in each process); validating on %d of %d",
                self.n_rows, self.n_stars, self.rows.nbytes / 1e9, len(self.validation), len(found),
            )  # fmt: skip

    def _networks(self, weights: list[dict[str, Tensor]], path: Path) -> list[FusionNetwork]:
        return checkpoint.networks_of(weights, path, self.size, self.device)

    def save(self, optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint, in the first process."""
        if self.place.rank:
            return
        contents = {
            "network": self.network.state_dict(),
            "average": self.average.state_dict(),
            "best": self.best,
            "optimizer": optimizer.state_dict(),
            "state": asdict(self.state),
            "recipe": asdict(self.recipe),
            "n_rows": self.n_rows,
        }
        checkpoint.write(contents, self.out_dir / "checkpoint.pt")

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one."""
        path = self.out_dir / "checkpoint.pt"
        if not path.is_file():
            return
        found = checkpoint.read(path, self.device)
        if found["recipe"] != asdict(self.recipe) or found["n_rows"] != self.n_rows:
            raise UsageError(f"{path}: made with another recipe or other data; train without --resume")
        self.network.load_state_dict(found["network"])
        self.average.load_state_dict(found["average"])
        self.best, self.optimizer_state = found["best"], found["optimizer"]
        self.state = State(**found["state"])

    def start_from(self, path: Path) -> None:
        """Take weights from a checkpoint or an archive, and the networks that stand beside them there."""
        found, *others = checkpoint.weights_of(path, self.device)
        self.beside = self.beside or self._networks(others, path)
        own = self.network.state_dict()
        checkpoint.take_over(own, found, path)
        self.network.load_state_dict(own)
        # a stage without an epoch keeps it
        self.best = copy.deepcopy(own)

    def prepare(self, joint: bool) -> tuple[nn.Module, torch.optim.AdamW]:
        """Model and optimizer of a stage: the sequence alone, or everything (`joint`)."""
        # a gradient that the first stage has left behind would count when they are clipped
        self.network.zero_grad(set_to_none=True)
        learns_sequence = self.recipe.pretrained_rate > 0 or not self.recipe.sequence_epochs
        for parameter in self.network.sequence_parameters():
            parameter.requires_grad_(not joint or learns_sequence)
        optimizer = self.optimizer(joint)
        model: nn.Module = self.network if joint else SequenceOnly(self.network)
        if self.place.world > 1:
            model = DistributedDataParallel(model, find_unused_parameters=self.recipe.modality != "fused")
        if self.state.step == 0:
            self.average.load_state_dict(self.network.state_dict())
        self.network.train()
        return model, optimizer

    def optimizer(self, joint: bool) -> torch.optim.AdamW:
        """AdamW over what the stage trains; biases, norms and positions do not decay."""
        recipe = self.recipe
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        for name, parameter in self.network.named_parameters():
            sequence = name.startswith("sequence_")
            if parameter.requires_grad and (joint or sequence):
                rate = recipe.learning_rate if joint else recipe.sequence_learning_rate
                if joint and sequence and recipe.sequence_epochs:
                    rate *= recipe.pretrained_rate
                decay = recipe.weight_decay if parameter.ndim > 1 and "position" not in name else 0.0
                groups.setdefault((rate, decay), []).append(parameter)
        found = torch.optim.AdamW(
            [{"params": p, "lr": rate, "peak": rate, "weight_decay": decay} for (rate, decay), p in groups.items()]
        )
        if self.optimizer_state:
            found.load_state_dict(self.optimizer_state)
            self.optimizer_state = {}
        return found

    def batches(self, joint: bool, steps: int, size: int) -> Generator[Batch, None, None]:
        """Inputs and labels from the current step on, each read while the one before it trains."""
        orders: dict[int, Tensor] = {}

        def load(step: int) -> Batch:
            epoch, k = divmod(step, steps)
            if epoch not in orders:
                orders.clear()
                rng = np.random.default_rng((self.recipe.seed, int(joint), epoch))
                orders[epoch] = torch.from_numpy(rng.permutation(len(self.rows)))
            index = orders[epoch][k * size : (k + 1) * size]
            inputs = (self.rows.batch if joint else self.rows.sequence_batch)(index, self.device)
            return inputs, sent(self.rows.label[index.to(self.rows.label.device)], self.device)

        with ThreadPoolExecutor(1) as reader:
            step = self.state.step
            ahead = reader.submit(load, step)
            while True:
                batch = ahead.result()
                step += 1
                ahead = reader.submit(load, step)
                yield batch

    def loss(self, model: nn.Module, inputs: list[Tensor], target: Tensor, joint: bool, side: int) -> Tensor:
        """Loss of one batch, augmented."""
        recipe = self.recipe
        # seeded by the step, so that a resumed training sees what an undisturbed one would
        seed = ((recipe.seed * 2 + int(joint)) * 1_000_003 + self.state.step) * 1_000 + self.place.rank
        torch.manual_seed(seed)  # of the dropout
        generator = torch.Generator(device=self.device).manual_seed(seed)
        if joint:
            inputs = augment(inputs, recipe, generator, side)
        else:
            present, features = inputs
            keep, _, features = hide(present, features, recipe, generator)
            inputs = [present & keep, features]
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.precision == "bf16"):
            out = model(*inputs)
        weight = self.weight.to(self.device)

        def entropy(logits: Tensor) -> Tensor:
            return nn.functional.cross_entropy(logits.float(), target, weight=weight)

        if not joint:
            return entropy(out)
        if recipe.modality == "image":
            return entropy(out[1])
        return entropy(out[0]) + recipe.auxiliary_weight * (entropy(out[1]) + entropy(out[2]))

    def descend(self, loss: Tensor, optimizer: torch.optim.Optimizer, rate: float) -> None:
        """Change the weights by one step, at this share of the peak learning rate, and average them."""
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * rate
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
        optimizer.step()
        # at first a short memory: the weights that training began with are no good
        decay = min(self.recipe.ema_decay, (1 + self.state.step) / (10 + self.state.step))
        with torch.no_grad():
            get_ema_multi_avg_fn(decay)(*self._averaged, 0)  # type: ignore[no-untyped-call]

    def count(self, loss: Tensor, cost: float, joint: bool) -> None:
        """Count a step that is done, and its loss; refuse to go on if the training diverged."""
        state = self.state
        state.step += 1
        state.cost += cost
        state.count += 1
        # on a GPU, waiting for the loss of every step would hold up the next
        each = 1 if self.device.type == "cpu" else 20
        if state.step % each == 0:
            value = float(loss.detach())
            if not math.isfinite(value):
                raise UsageError(
                    f"the training diverged at step {state.step} of the {'second' if joint else 'first'} stage;"
                    f" the last checkpoint in {self.out_dir} is from before: start again from it by --initial,"
                    " with a lower --learning-rate or --precision fp32"
                )
            state.total += value * each

    def validate(self, joint: bool, side: int, epoch: float) -> None:
        """Add a row to the history, and keep the averaged weights if they are the best so far."""
        state = self.state
        if joint:
            measure_batch_norm(self.average, self.rows, self.recipe, side, BATCH_NORM_SAMPLE // 3)
        logits = predict(self.average, self.validation, self.device, side, not joint)
        row: dict[str, Any] = {
            "stage": "joint" if joint else "sequence",
            "epoch": epoch,
            "stamp": side,
            "precision": self.precision,
            "seconds": round(state.spent, 1),
            "training_loss": state.total / max(state.count, 1),
        }
        heads: tuple[str, ...] = ("sequence",)
        if joint:
            heads = HEADS if self.recipe.modality == "fused" else (self.recipe.modality,)
        for name in heads:
            row[name] = figures(logits[HEADS.index(name)], self.validation.label, self.weight)
        state.history.append(row)
        text = ", ".join(f"{name} {row[name]['loss']:.4f} ({row[name]['accuracy']:.4f})" for name in heads)
        log.info(
            "%s epoch %.2f, %d px: training loss %.4f, validation loss (accuracy) %s",
            row["stage"], epoch, side, row["training_loss"], text,
        )  # fmt: skip
        if state.rate(row[heads[0]]["loss"], side, self.side):
            self.best = copy.deepcopy(self.average.state_dict())
        self.write_history()

    def write_history(self) -> None:
        """Write the figures of the validations so far."""
        write_atomic_bytes(json.dumps(self.state.history, indent=1).encode(), self.out_dir / "history.json")

    def end_stage(self, number: int) -> None:
        """Go on to the next stage from the best weights of this one, in all processes."""
        if self.place.world > 1:
            # only the first process has chosen
            distributed.barrier()
            for value in self.best.values():
                distributed.broadcast(value, 0)
        self.network.load_state_dict(self.best)
        self.state.end_stage(number)


def _with_both_classes(n: int, n_stars: int, folder: Path) -> None:
    if not 0 < n_stars < n:
        kind = "star" if not n_stars else "galaxy"
        raise UsageError(f"{folder}: no {kind} in its shards; make more fields with `sgclassify dataset`")
