"""Train the fusion network on shards of simulated fields.

Two stages: the sequence encoder alone, which is cheap, then everything together, first on the middle of the stamps,
then on the whole of them.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import pickle
import re
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from sgclassify.model.data.rows import Rows, cropped, read_rows, sent
from sgclassify.model.judge.metrics import ece, roc_auc
from sgclassify.model.train.augment import augment, hide
from sgclassify.model.train.calibrate import fit_calibration, fit_weights, prior_weights
from sgclassify.model.train.network import HEADS, Calibration, FusionNetwork, weighted
from sgclassify.model.train.precision import computes_bf16
from sgclassify.model.train.recipe import Recipe
from sgclassify.stages.errors import UsageError
from sgclassify.stages.write.atomic import write_atomic_bytes

log = logging.getLogger(__name__)

BATCH_NORM_SAMPLE: Final = 6_000
"""Objects that the statistics of the final weights are measured on; a third of them before each validation."""

VALIDATION_SAMPLE: Final = 16_000
"""Objects that the epochs are compared on, drawn from all validation fields."""

CHECKPOINT_SECONDS: Final = 180.0

SEQUENCE_TIME: Final = 0.15
"""Largest share of a limited time that the first stage takes."""

SMALL_COST: Final = 0.5
"""Cost of a step on 16-pixel stamps over that of one on 32 pixels, measured on two CPU cores."""


def fit_normalization(network: FusionNetwork, features: Tensor) -> None:
    """Set the mean and the standard deviation of every feature from a sample, shape (n, 7, n_features)."""
    values = features.double()
    known = torch.isfinite(values)
    count = known.sum(dim=0).clamp(min=1)
    mean = torch.where(known, values, 0.0).sum(dim=0) / count
    variance = torch.where(known, (values - mean) ** 2, 0.0).sum(dim=0) / count
    buffers = dict(network.sequence_encoder.named_buffers(recurse=False))
    buffers["mean"].copy_(mean)
    buffers["std"].copy_(torch.where(variance > 1e-12, variance.sqrt(), 1.0))


def predict(
    network: FusionNetwork, rows: Rows, device: torch.device, size: int, sequence_only: bool = False
) -> Tensor:
    """Logits (3, n, 2) of fusion, image alone and sequence alone, in single precision, without augmentation.

    The central `size` pixels of the stamps are used. With `sequence_only` the image is not looked at, and the others
    are 0.
    """
    network.eval()
    parts = []
    with torch.inference_mode():
        for index in torch.split(torch.arange(len(rows)), 256):
            if sequence_only:
                logits = _SequenceOnly(network)(*rows.sequence_batch(index, device))
                heads = torch.stack([torch.zeros_like(logits), torch.zeros_like(logits), logits])
            else:
                heads = torch.stack(network(*cropped(rows.batch(index, device), size)))
            parts.append(heads.float().cpu())
    return torch.cat(parts, dim=1)


def figures(logits: Tensor, label: Tensor, weight: Tensor) -> dict[str, float]:
    """Loss, recall of either class, accuracy, area under the ROC curve and calibration error of one head.

    The classes weigh in the loss as in training; for the calibration error the prior that this makes is taken back.
    """
    predicted = logits.argmax(dim=1)
    p_star = torch.softmax(logits.double() - weight.double().log(), dim=1)[:, 0].numpy()
    star = (label == 0).numpy()
    return {
        "loss": float(nn.functional.cross_entropy(logits, label, weight=weight)),
        "star_recall": float((predicted[label == 0] == 0).float().mean()),
        "galaxy_recall": float((predicted[label == 1] == 1).float().mean()),
        "accuracy": float((predicted == label).float().mean()),
        "auc": roc_auc(p_star, star),
        "ece": ece(p_star, star),
    }


def one_cycle(progress: float) -> float:
    """Share of the peak learning rate: up from 1/25 in the first fifth, then down along a cosine to 1/1000."""
    if progress < 0.2:
        return 0.04 + 0.96 * (0.5 - 0.5 * math.cos(math.pi * progress / 0.2))
    return 0.001 + 0.999 * (0.5 + 0.5 * math.cos(math.pi * min(1.0, (progress - 0.2) / 0.8)))


def measure_batch_norm(network: FusionNetwork, rows: Rows, recipe: Recipe, side: int, count: int) -> None:
    """Measure the batch-normalisation statistics of averaged weights, which are not the average of statistics.

    Parameters
    ----------
    network : FusionNetwork
        Left in evaluation mode.
    rows : Rows
        Objects, of which `count` random ones are taken, augmented as in training.
    recipe : Recipe
    side : int
        Size of the stamps, pixels.
    count : int
    """
    device = next(network.parameters()).device
    layers = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momentum = [layer.momentum for layer in layers]
    network.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain mean over the batches
        layer.train()
    generator = torch.Generator(device=device).manual_seed(recipe.seed)
    few = torch.randperm(len(rows), generator=torch.Generator().manual_seed(recipe.seed))
    with torch.no_grad():
        for index in torch.split(few[:count], recipe.batch_size):
            # a batch of one has no variance
            if len(index) > 1:
                image, valid, sigma, _, psf = augment(rows.batch(index, device), recipe, generator, side)
                network.image_encoder(image, valid, sigma, psf)
    for layer, value in zip(layers, momentum, strict=True):
        layer.momentum = value
    network.eval()


@dataclass
class Trained:
    """Outcome of a training.

    Attributes
    ----------
    networks : tuple of FusionNetwork
        What was trained, and what stands beside it; on the CPU, in evaluation mode.
    calibrations : dict of str to Calibration
        For each head that was trained.
    weights : dict of str to Tensor of float32, shape (3 * number of networks,) or (3,)
        Weights of the logits behind each of them: of all heads of all networks for the fusion, of the head of the first
        network alone for the others.
    prior_star_fraction : float
        Share of stars that the probabilities assume.
    stamp_size : int
    recipe : dict
        The recipe, its ``precision`` the one that was used, not ``"auto"``.
    history : list of dict
        A row for each epoch.
    counts : dict of str to int
    """

    networks: tuple[FusionNetwork, ...]
    calibrations: dict[str, Calibration]
    weights: dict[str, Tensor]
    prior_star_fraction: float
    stamp_size: int
    recipe: dict[str, Any]
    history: list[dict[str, Any]]
    counts: dict[str, int]


class _SequenceOnly(nn.Module):
    """The sequence branch, to train it alone."""

    def __init__(self, network: FusionNetwork) -> None:
        super().__init__()
        self.encoder, self.head = network.sequence_encoder, network.sequence_head

    def forward(self, present: Tensor, features: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(features, present))
        return out


_UNREADABLE: Final = (OSError, EOFError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError)
"""What torch raises on a file that is no checkpoint, or a damaged one."""

FIRST_LAYER: Final = "image_encoder.backbone.conv1.0.weight"


def _weights_of(path: Path, device: torch.device) -> list[dict[str, Tensor]]:
    """Weights of a checkpoint, the best so far, or of each network of an archive."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give a checkpoint of a training, or a model archive")
    try:
        with warnings.catch_warnings():
            # TorchScript is deprecated upstream since torch 2.11; it is what this project ships (DESIGN).
            warnings.filterwarnings("ignore", message=".*torch.jit.*")
            module = torch.jit.load(str(path), map_location=device)  # type: ignore[no-untyped-call]
        values = module.float().state_dict()
        parts: dict[str, dict[str, Tensor]] = {}
        for name, value in values.items():
            # archives of one network had it under a name of its own
            prefix = re.match(r"networks\.\d+\.|network\.", name)
            if prefix is not None:
                parts.setdefault(prefix[0], {})[name.removeprefix(prefix[0])] = value
    except RuntimeError:
        pass  # no archive
    else:
        if not parts:
            raise UsageError(f"{path}: an archive of something else than this package's networks")
        return list(parts.values())
    try:
        found: dict[str, Tensor] = torch.load(path, map_location=device, weights_only=True)["best"]
    except _UNREADABLE as error:
        raise UsageError(
            f"{path}: neither a checkpoint of a training nor a model archive: {error}"
        ) from error
    return [found]


def _network(weights: dict[str, Tensor], path: Path, stamp_size: int, device: torch.device) -> FusionNetwork:
    """A network of these weights, which are from `path`, in evaluation mode."""
    network = FusionNetwork(stamp_size, architecture="resnet50" if FIRST_LAYER in weights else "bands")
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise UsageError(
            f"{path}: a network of other stamps or features cannot stand beside this one"
        ) from error
    return network.to(device).eval()


@contextmanager
def _termination() -> Iterator[threading.Event]:
    """An event that SIGTERM sets."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = signal.signal(signal.SIGTERM, lambda *_: event.set())
    try:
        yield event
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _processes(device: str) -> Iterator[tuple[int, int, torch.device]]:
    """Rank, number of processes and device; joins the group that torchrun made."""
    try:
        where = torch.device(device)
    except RuntimeError:
        raise UsageError(f"there is no device {device}: give cpu or cuda") from None
    if where.type == "cuda" and not torch.cuda.is_available():
        raise UsageError(f"no GPU that PyTorch can use is here: --device {device}")
    if "WORLD_SIZE" not in os.environ:
        yield 0, 1, where
        return
    if where.type == "cuda":
        where = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(where)
    # the first process validates alone, and the others wait for it
    distributed.init_process_group("nccl" if where.type == "cuda" else "gloo", timeout=timedelta(hours=1))
    try:
        yield distributed.get_rank(), distributed.get_world_size(), where
    finally:
        distributed.destroy_process_group()


def _with_both_classes(n: int, n_stars: int, folder: Path) -> None:
    if not 0 < n_stars < n:
        kind = "star" if not n_stars else "galaxy"
        raise UsageError(f"{folder}: no {kind} in its shards; make more fields with `sgclassify dataset`")


class _Trainer:
    """A training; `state`, the weights and the optimizer are what a checkpoint holds."""

    def __init__(
        self,
        data_dir: Path,
        out_dir: Path,
        recipe: Recipe,
        place: tuple[int, int, torch.device],
        minutes: float,
        beside: Path | None = None,
        fields: int | None = None,
    ) -> None:
        self.rank, self.world, self.device = place
        self.recipe, self.seconds, self.out_dir = recipe, 60.0 * minutes, out_dir
        automatic = "bf16" if self.device.type == "cuda" else "fp32"
        self.precision = automatic if recipe.precision == "auto" else recipe.precision
        if self.precision == "bf16" and self.device.type == "cpu" and self.agreed(not computes_bf16())[0]:
            # all processes alike: their gradients are averaged
            self.precision = "fp32"
            if self.rank == 0:
                log.warning("this processor cannot train in bf16 (no AVX-512): training in fp32 instead")

        def paths(part: str) -> list[Path]:
            return sorted((data_dir / part).glob("*.parquet"))

        self.rows = read_rows(paths("training")[:fields], self.rank, self.world)
        self.size = self.rows.size
        counts = torch.tensor([len(self.rows), int((self.rows.label == 0).sum())], device=self.device)
        fewest = counts[:1].clone()
        if self.world > 1:
            distributed.all_reduce(counts)
            distributed.all_reduce(fewest, distributed.ReduceOp.MIN)
        self.n_rows, self.n_stars = counts.tolist()
        self.per_process = int(fewest)
        _with_both_classes(self.n_rows, self.n_stars, data_dir / "training")
        self.learnt_prior = 0.5 if recipe.class_balance else self.n_stars / self.n_rows
        self.weight = torch.ones(2)
        if recipe.class_balance:
            self.weight = prior_weights(self.n_stars / self.n_rows, 0.5)
        if self.rank == 0:
            found = read_rows(paths("validation"))
            order = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
            self.validation = found.take(order[:VALIDATION_SAMPLE])
            self.calibration = read_rows(paths("calibration"))
            for part, rows in (("validation", self.validation), ("calibration", self.calibration)):
                _with_both_classes(len(rows), int((rows.label == 0).sum()), data_dir / part)
            log.info(
                "training on %d objects, %d of them stars (%.1f GB in each process); validating on %d of %d",
                self.n_rows,
                self.n_stars,
                self.rows.nbytes / 1e9,
                len(self.validation),
                len(found),
            )
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
        self.beside = [] if beside is None else self.networks(_weights_of(beside, self.device), beside)
        self.average = copy.deepcopy(self.network)
        self.best = copy.deepcopy(self.average.state_dict())
        self.optimizer_state: dict[str, Any] = {}
        self.state: dict[str, Any] = {"stage": 0, "step": 0, "cost": 0.0, "spent": 0.0, "began": 0.0}
        self.state |= {"total": 0.0, "count": 0, "history": []}
        self.state |= {"best_loss": math.inf, "best_side": 0, "since_best": 0}

    def save(self, optimizer: torch.optim.Optimizer) -> None:
        """Write a checkpoint, complete under its name or not there."""
        if self.rank:
            return
        path = self.out_dir / "checkpoint.pt"
        temporary = path.with_suffix(".tmp")
        torch.save(
            {
                "network": self.network.state_dict(),
                "average": self.average.state_dict(),
                "best": self.best,
                "optimizer": optimizer.state_dict(),
                "state": self.state,
                "recipe": asdict(self.recipe),
                "n_rows": self.n_rows,
            },
            temporary,
        )
        temporary.replace(path)

    def resume(self) -> None:
        """Go on from the checkpoint, if there is one."""
        path = self.out_dir / "checkpoint.pt"
        if not path.is_file():
            return
        try:
            found = torch.load(path, map_location=self.device, weights_only=True)
        except _UNREADABLE as error:
            raise UsageError(f"{path}: a damaged checkpoint; remove it, or train without --resume") from error
        if found["recipe"] != asdict(self.recipe) or found["n_rows"] != self.n_rows:
            raise UsageError(f"{path}: made with another recipe or other data; train without --resume")
        self.network.load_state_dict(found["network"])
        self.average.load_state_dict(found["average"])
        self.best, self.state, self.optimizer_state = found["best"], found["state"], found["optimizer"]

    def networks(self, weights: list[dict[str, Tensor]], path: Path) -> list[FusionNetwork]:
        """Networks that answer together with this one."""
        return [_network(one, path, self.size, self.device) for one in weights]

    def start_from(self, path: Path) -> None:
        """Take from a checkpoint or an archive what has the same names and shapes, and what stands beside it there."""
        found, *others = _weights_of(path, self.device)
        self.beside = self.beside or self.networks(others, path)
        own = self.network.state_dict()
        taken = [name for name in own if name in found and found[name].shape == own[name].shape]
        own |= {name: found[name] for name in taken}
        old, new = found.get(FIRST_LAYER), own.get(FIRST_LAYER)
        if FIRST_LAYER not in taken and old is not None and new is not None and old.shape[1] < new.shape[1]:
            # channels were added behind those that were there
            new[:, : old.shape[1]] = old
            taken.append(FIRST_LAYER)
            log.info("the first layer has %d channels there, %d here", old.shape[1], new.shape[1])
        self.network.load_state_dict(own)
        # a stage without an epoch keeps it
        self.best = copy.deepcopy(own)
        log.info("took %d of %d tensors from %s", len(taken), len(own), path)
        log.info("not taken: %s", ", ".join(sorted(own.keys() - taken)) or "none")

    @property
    def learns_sequence(self) -> bool:
        """Whether the second stage changes the sequence encoder."""
        return self.recipe.pretrained_rate > 0 or not self.recipe.sequence_epochs

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
            [
                {"params": p, "lr": rate, "peak": rate, "weight_decay": decay}
                for (rate, decay), p in groups.items()
            ]
        )
        if self.optimizer_state:
            found.load_state_dict(self.optimizer_state)
            self.optimizer_state = {}
        return found

    def batches(self, joint: bool, steps: int, size: int) -> Iterator[tuple[list[Tensor], Tensor]]:
        """Inputs and labels from the current step on, each read while the one before it trains."""
        orders: dict[int, Tensor] = {}

        def load(step: int) -> tuple[list[Tensor], Tensor]:
            epoch, k = divmod(step, steps)
            if epoch not in orders:
                orders.clear()
                rng = np.random.default_rng((self.recipe.seed, int(joint), epoch))
                orders[epoch] = torch.from_numpy(rng.permutation(len(self.rows)))
            index = orders[epoch][k * size : (k + 1) * size]
            inputs = (self.rows.batch if joint else self.rows.sequence_batch)(index, self.device)
            return inputs, sent(self.rows.label[index.to(self.rows.label.device)], self.device)

        with ThreadPoolExecutor(1) as reader:
            step = int(self.state["step"])
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
        seed = ((recipe.seed * 2 + int(joint)) * 1_000_003 + int(self.state["step"])) * 1_000 + self.rank
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
            "seconds": round(state["spent"], 1),
            "training_loss": state["total"] / max(state["count"], 1),
        }
        shown = (
            HEADS
            if joint and self.recipe.modality == "fused"
            else (self.recipe.modality if joint else "sequence",)
        )
        for name in shown:
            row[name] = figures(logits[HEADS.index(name)], self.validation.label, self.weight)
        state["history"].append(row)
        text = ", ".join(f"{name} {row[name]['loss']:.4f} ({row[name]['accuracy']:.4f})" for name in shown)
        log.info(
            "%s epoch %.2f, %d px: training loss %.4f, validation loss (accuracy) %s",
            row["stage"], epoch, side, row["training_loss"], text,
        )  # fmt: skip
        loss = row[shown[0]]["loss"]
        # a figure of smaller stamps is no rival
        better = side > state["best_side"] or loss < state["best_loss"]
        if better:
            state |= {"best_loss": loss, "best_side": side}
            self.best = copy.deepcopy(self.average.state_dict())
        state["since_best"] = 0 if better or side < self.side else state["since_best"] + 1
        state |= {"total": 0.0, "count": 0}
        self.write_history()

    def write_history(self) -> None:
        """Write what the validations have found so far."""
        write_atomic_bytes(
            json.dumps(self.state["history"], indent=1).encode(), self.out_dir / "history.json"
        )

    def run_stage(self, joint: bool, stop: threading.Event) -> None:
        """Train the sequence alone, or everything, from wherever the state is in this stage.

        The learning rate and the size of the stamps follow the progress: the share of the work, or of the time where
        that is limited, whichever is further on.
        """
        recipe, state = self.recipe, self.state
        size = min(recipe.batch_size if joint else recipe.sequence_batch_size, self.per_process)
        steps = self.per_process // size
        progressive = joint and recipe.architecture == "resnet50"
        small = SMALL_COST * recipe.small_epochs if progressive else 0.0
        work = steps * (small + recipe.epochs if joint else recipe.sequence_epochs)
        if not work:
            return
        until = self.seconds * (0.95 if joint else SEQUENCE_TIME)
        # a gradient that the first stage has left behind would count when they are clipped
        self.network.zero_grad(set_to_none=True)
        for parameter in self.network.sequence_parameters():
            parameter.requires_grad_(not joint or self.learns_sequence)
        optimizer = self.optimizer(joint)
        model: nn.Module = self.network if joint else _SequenceOnly(self.network)
        if self.world > 1:
            model = DistributedDataParallel(model, find_unused_parameters=recipe.modality != "fused")
        if state["step"] == 0:
            self.average.load_state_dict(self.network.state_dict())
        weights, averages = (
            [t for t in n.state_dict().values() if t.is_floating_point()]
            for n in (self.network, self.average)
        )
        start = time.monotonic() - state["spent"]
        saved = time.monotonic()
        self.network.train()
        batches = self.batches(joint, steps, size)
        while True:
            spent, ended, worse = self.agreed(
                time.monotonic() - start, float(stop.is_set()), state["since_best"]
            )
            state["spent"] = spent
            if ended:
                self.save(optimizer)
                raise SystemExit(128 + signal.SIGTERM)
            progress = max(state["cost"] / work, (spent - state["began"]) / max(1e-9, until - state["began"]))
            if progress >= 1.0 or worse >= recipe.patience:
                break
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                self.save(optimizer)
                saved = time.monotonic()
            shrunk = progress * work < steps * small
            side = min(recipe.small_stamp, self.side) if shrunk else self.side
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * one_cycle(progress)
            inputs, target = next(batches)
            loss = self.loss(model, inputs, target, joint, side)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
            optimizer.step()
            # at first a short memory: the weights that training began with are no good
            decay = min(recipe.ema_decay, (1 + state["step"]) / (10 + state["step"]))
            with torch.no_grad():
                get_ema_multi_avg_fn(decay)(averages, weights, 0)  # type: ignore[no-untyped-call]
            state["step"] += 1
            state["cost"] += SMALL_COST if shrunk else 1.0
            state["count"] += 1
            # on a GPU, waiting for the loss of every step would hold up the next
            if self.device.type == "cpu" or state["step"] % 20 == 0:
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise UsageError(
                        f"the training diverged at step {state['step']} of the {'second' if joint else 'first'} stage;"
                        f" the last checkpoint in {self.out_dir} is from before: start again from it by --initial,"
                        " with a lower --learning-rate or --precision fp32"
                    )
                state["total"] += value * (1 if self.device.type == "cpu" else 20)
            if state["step"] % 100 == 0 and joint and self.rank == 0:
                log.info(
                    "step %d, %d px, %.1f %% done: loss %.4f",
                    state["step"], side, 100 * progress, state["total"] / state["count"],
                )  # fmt: skip
            last = state["cost"] >= work - 1e-6
            if (state["step"] % steps == 0 or last) and self.rank == 0:
                self.validate(joint, side, state["step"] / steps)
                self.network.train()
        batches.close()  # type: ignore[attr-defined]
        if self.rank == 0 and state["count"]:
            self.validate(joint, self.side, state["step"] / steps)
        # so that to resume what is complete changes nothing, unless it is given more time or epochs
        self.save(optimizer)

    def agreed(self, *values: float) -> list[float]:
        """The largest of each number over the processes."""
        if self.world == 1:
            return list(values)
        together = torch.tensor(values, device=self.device, dtype=torch.float64)
        distributed.all_reduce(together, distributed.ReduceOp.MAX)
        found: list[float] = together.tolist()
        return found

    def run(self, stop: threading.Event) -> None:
        """Both stages."""
        stages = {"fused": (False, True), "image": (True,), "sequence": (False,)}[self.recipe.modality]
        for number, joint in enumerate(stages):
            if number < self.state["stage"]:
                continue
            self.run_stage(joint, stop)
            if self.world > 1:
                # only the first process has chosen
                distributed.barrier()
                for value in self.best.values():
                    distributed.broadcast(value, 0)
            self.network.load_state_dict(self.best)
            self.state |= {"stage": number + 1, "step": 0, "cost": 0.0, "began": self.state["spent"]}
            self.state |= {"best_loss": math.inf, "best_side": 0, "since_best": 0}

    def finish(self) -> Trained:
        """Calibrate the best weights."""
        modality = self.recipe.modality
        if any(row["stage"] == "joint" for row in self.state["history"]):
            measure_batch_norm(self.network, self.rows, self.recipe, self.side, BATCH_NORM_SAMPLE)
        networks = [self.network, *(self.beside if modality == "fused" else [])]

        def answers(rows: Rows) -> Tensor:
            parts = [
                predict(n, rows, self.device, n.image_encoder.side, modality == "sequence") for n in networks
            ]
            return torch.cat(parts)

        weights = {name: torch.eye(len(HEADS))[k] for k, name in enumerate(HEADS)}
        if modality == "fused":
            logits, label = answers(self.validation), self.validation.label
            weights["fused"] = fit_weights(logits, label, self.weight)
            if len(networks) > 1:
                # what the model makes of one modality alone is what all of its networks make of it
                for k, name in enumerate(HEADS[1:], 1):
                    weights[name] = torch.zeros(len(logits))
                    weights[name][k :: len(HEADS)] = fit_weights(logits[k :: len(HEADS)], label, self.weight)
            together = figures(weighted(logits, weights["fused"]), label, self.weight)
            self.state["history"].append(
                {"stage": "weighted", "seconds": round(self.state["spent"], 1), "fused": together}
            )
            self.write_history()
            log.info("weights of the heads: %s; together %s", weights["fused"].tolist(), together)
        logits = answers(self.calibration)
        brightness = Calibration.brightness(self.calibration.features)
        prior = self.recipe.prior_star_fraction
        shift = math.log(prior / (1.0 - prior)) - math.log(self.learnt_prior / (1.0 - self.learnt_prior))
        calibrations = {}
        for name in HEADS if modality == "fused" else (modality,):
            total = weighted(logits[: len(weights[name])], weights[name]) + torch.tensor([shift, 0.0])
            found = fit_calibration(total, brightness, self.calibration.label, self.calibration.field, prior)
            found.offset[0] += shift
            calibrations[name] = found
        # what was computed in, not what was asked for; both, where a training went on on another processor
        used = {row["precision"] for row in self.state["history"] if "precision" in row} or {self.precision}
        return Trained(
            networks=tuple(network.cpu().eval() for network in networks),
            calibrations=calibrations,
            weights=weights,
            prior_star_fraction=prior,
            stamp_size=self.size,
            recipe=asdict(self.recipe) | {"precision": "+".join(sorted(used))},
            history=self.state["history"],
            counts={
                "training": self.n_rows,
                "training_stars": self.n_stars,
                "validation": len(self.validation),
                "calibration": len(self.calibration),
                "processes": self.world,
            },
        )


def train(
    data_dir: Path,
    out_dir: Path,
    recipe: Recipe,
    *,
    device: str = "cpu",
    resume: bool = False,
    max_minutes: float = math.inf,
    initial: Path | None = None,
    beside: Path | None = None,
    fields: int | None = None,
) -> Trained | None:
    """Train, keep the best epoch on the validation fields, and calibrate on the calibration fields.

    Under ``torchrun`` each process trains on a share of the rows, and the first one validates and writes.

    Parameters
    ----------
    data_dir : Path
        Folder that `make_dataset` filled.
    out_dir : Path
        Folder for ``checkpoint.pt``, written every three minutes and on SIGTERM, and ``history.json``.
    recipe : Recipe
    device : str
    resume : bool
        Go on from the checkpoint in `out_dir`, if there is one.
    max_minutes : float
        Shorten the schedule so that training ends in this time.
    initial : Path, optional
        Checkpoint or archive of another training to start from, as far as names and shapes agree; of a first layer
        with fewer channels, those that it has. The further networks of an archive stand beside the first one here too,
        unless `beside` is given.
    beside : Path, optional
        Checkpoint or archive of another training, on other fields, whose networks answer together with this one.
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
    out_dir.mkdir(parents=True, exist_ok=True)
    with _processes(device) as place, _termination() as stop:
        trainer = _Trainer(data_dir, out_dir, recipe, place, max_minutes, beside, fields)
        if initial is not None:
            trainer.start_from(initial)
        if resume:
            trainer.resume()
        trainer.run(stop)
        return trainer.finish() if trainer.rank == 0 else None


def draw_history(history: list[dict[str, Any]], path: Path) -> None:
    """Draw the learning curves of a training as a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 6.0), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    minutes = [row["seconds"] / 60.0 for row in history]
    names = [name for name in HEADS if any(name in row for row in history)]
    for panel, (key, title) in zip(
        panels.flat,
        (
            ("loss", "cross entropy"),
            ("accuracy", "wrong class"),
            ("auc", "1 - area under ROC"),
            ("ece", "ECE"),
        ),
        strict=True,
    ):
        for name in names:
            values = [row[name][key] if name in row else math.nan for row in history]
            panel.plot(minutes, [1.0 - v if key in ("accuracy", "auc") else v for v in values], label=name)
        panel.set(title=title, yscale="log")
        panel.grid(alpha=0.3)
    panels[0, 0].legend()
    for panel in panels[1]:
        panel.set_xlabel("minutes")
    figure.savefig(path, dpi=120)
