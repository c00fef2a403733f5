"""Train the fusion network on shards of simulated fields."""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from sgclassify.model.dataset import Sample, read_samples
from sgclassify.model.network import N_BANDS, FusionNetwork
from sgclassify.stages.measure import FEATURES

logger = logging.getLogger(__name__)

BATCH_NORM_SAMPLE = 6_000
"""Objects that the statistics of the final weights are measured on."""

PSF_FEATURES = tuple(name for name in FEATURES if name.startswith(("psf_", "excess_", "significance_")))


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; the defaults are for two CPU cores.

    Attributes
    ----------
    epochs, batch_size : int
    learning_rate : float
        Peak of the one-cycle schedule.
    weight_decay : float
    band_dropout : float
        Share of objects that lose a random subset of their bands, so that missing bands are familiar.
    psf_dropout : float
        Share of objects whose point-source locus is hidden, as in exposures without stars.
    header_dropout : float
        Share of objects without the header's FWHM.
    auxiliary_weight : float
        Weight of the losses of the image alone and of the sequence alone.
    ema_decay : float
        Decay of the exponential moving average of the weights, per step.
    seed : int
    """

    epochs: int = 8
    batch_size: int = 96
    learning_rate: float = 1.5e-3
    weight_decay: float = 0.02
    band_dropout: float = 0.4
    psf_dropout: float = 0.05
    header_dropout: float = 0.3
    auxiliary_weight: float = 0.3
    ema_decay: float = 0.995
    seed: int = 1


def labels_of(sample: Sample) -> npt.NDArray[np.int64]:
    """Class index (0 star, 1 galaxy) of each object; -1 for quasars and spurious detections, which train nothing."""
    index = {"star": 0, "galaxy": 1}
    return np.array([index.get(name, -1) for name in sample.table["true_class"].to_pylist()], dtype=np.int64)


def usable(sample: Sample) -> npt.NDArray[np.int64]:
    """Rows that have a label and at least one band."""
    return np.flatnonzero((labels_of(sample) >= 0) & sample.valid.any(axis=(1, 2, 3)))


def tensors(sample: Sample, index: npt.NDArray[np.int64], device: torch.device) -> list[Tensor]:
    """Network inputs of the given rows."""
    return [
        torch.from_numpy(np.ascontiguousarray(a)).to(device)
        for a in (
            sample.image[index].astype(np.float32),
            sample.valid[index],
            sample.sigma[index],
            sample.features[index],
        )
    ]


def augment(batch: list[Tensor], recipe: Recipe, generator: torch.Generator) -> list[Tensor]:
    """Randomly turn and mirror stamps, hide bands, and hide features.

    The features do not depend on orientation, so only the stamps turn.
    """
    image, valid, sigma, features = batch
    n = len(image)
    image, valid, features = image.clone(), valid.clone(), features.clone()
    group = torch.randint(0, 8, (n,), generator=generator)
    for k in range(1, 8):
        rows = torch.nonzero(group == k).flatten()
        for stack in (image, valid):
            turned = torch.rot90(stack[rows], k % 4, dims=(2, 3))
            stack[rows] = turned.flip(3) if k >= 4 else turned
    present = valid.flatten(2).any(dim=2)
    # a rate of its own for each object, so that few and many missing bands are equally common
    rate = torch.rand(n, 1, generator=generator)
    keep = torch.rand(n, N_BANDS, generator=generator) > rate
    keep |= torch.rand(n, 1, generator=generator) >= recipe.band_dropout
    keep |= ~(keep & present).any(dim=1, keepdim=True)
    valid &= keep[:, :, None, None]
    features[~keep] = torch.nan
    no_psf = torch.rand(n, generator=generator) < recipe.psf_dropout
    for name in PSF_FEATURES:
        features[no_psf, :, FEATURES.index(name)] = torch.nan
    no_header = torch.rand(n, generator=generator) < recipe.header_dropout
    features[no_header, :, FEATURES.index("header_fwhm")] = torch.nan
    return [image, valid, sigma, features]


def fit_normalization(network: FusionNetwork, sample: Sample, index: npt.NDArray[np.int64]) -> None:
    """Set the mean and the standard deviation of every feature from the training sample."""
    features = sample.features[index].astype(np.float64)
    count = np.isfinite(features).sum(axis=0)
    mean = np.nansum(features, axis=0) / np.maximum(count, 1)
    variance = np.nansum((features - mean) ** 2, axis=0) / np.maximum(count, 1)
    encoder = network.sequence_encoder
    deviation = np.where(variance > 1e-12, np.sqrt(variance), 1.0)
    buffers = dict(encoder.named_buffers(recurse=False))
    buffers["mean"].copy_(torch.from_numpy(mean))
    buffers["std"].copy_(torch.from_numpy(deviation))


def _decayed(network: nn.Module, average: nn.Module, decay: float) -> None:
    with torch.no_grad():
        for mine, theirs in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
            if mine.dtype.is_floating_point:
                mine.lerp_(theirs, 1.0 - decay)
            else:
                mine.copy_(theirs)


def predict(
    network: FusionNetwork,
    sample: Sample,
    index: npt.NDArray[np.int64],
    device: torch.device,
    batch_size: int = 256,
) -> Tensor:
    """Logits (3, n, 2) of fusion, image alone and sequence alone, without augmentation."""
    network.eval()
    parts = []
    with torch.inference_mode():
        for first in range(0, len(index), batch_size):
            outputs = network(*tensors(sample, index[first : first + batch_size], device))
            parts.append(torch.stack(outputs).float().cpu())
    return torch.cat(parts, dim=1)


def figures(logits: Tensor, label: Tensor) -> dict[str, float]:
    """Loss, recall of either class and accuracy of one head."""
    predicted = logits.argmax(dim=1)
    return {
        "loss": float(nn.functional.cross_entropy(logits, label)),
        "star_recall": float((predicted[label == 0] == 0).float().mean()),
        "galaxy_recall": float((predicted[label == 1] == 1).float().mean()),
        "accuracy": float((predicted == label).float().mean()),
    }


def fit_temperature(logits: Tensor, label: Tensor) -> float:
    """Temperature that minimises the cross entropy on the calibration fields."""
    log_t = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([log_t], lr=0.2, max_iter=60)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(logits / log_t.exp(), label)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return float(log_t.detach().exp())


def _estimate_batch_norm(
    network: FusionNetwork, sample: Sample, rows: npt.NDArray[np.int64], recipe: Recipe, device: torch.device
) -> None:
    """Measure the batch-normalisation statistics of averaged weights, which are not the average of statistics."""
    layers = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    momentum = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # a plain mean over the batches
    network.train()
    generator = torch.Generator().manual_seed(recipe.seed)
    few = np.random.default_rng(recipe.seed).permutation(rows)[:BATCH_NORM_SAMPLE]
    with torch.no_grad():
        for first in range(0, len(few), recipe.batch_size):
            index = few[first : first + recipe.batch_size]
            # a batch of one has no variance
            if len(index) > 1:
                batch = augment(tensors(sample, index, torch.device("cpu")), recipe, generator)
                network(*(t.to(device) for t in batch))
    for layer, value in zip(layers, momentum, strict=True):
        layer.momentum = value
    network.eval()


def _batches(
    index: npt.NDArray[np.int64], size: int, rng: np.random.Generator
) -> Iterator[npt.NDArray[np.int64]]:
    order = rng.permutation(index)
    for first in range(0, len(order) - size + 1, size):
        yield order[first : first + size]


@dataclass
class Trained:
    """Outcome of a training."""

    network: FusionNetwork
    temperature: float
    prior_star_fraction: float
    stamp_size: int
    recipe: dict[str, Any]
    history: list[dict[str, Any]]
    counts: dict[str, int]


def train(
    data_dir: Path,
    out_dir: Path,
    recipe: Recipe,
    *,
    device: str = "cpu",
    resume: bool = False,
    max_minutes: float = math.inf,
) -> Trained:
    """Train, keep the best epoch on the validation fields, and calibrate on the calibration fields.

    Parameters
    ----------
    data_dir : Path
        Folder that `make_dataset` filled.
    out_dir : Path
        Folder for ``checkpoint.pt``, written after every epoch.
    recipe : Recipe
    device : str
    resume : bool
        Go on from the checkpoint in `out_dir`.
    max_minutes : float
        Stop after the epoch that passes this time.

    Returns
    -------
    Trained
    """
    where = torch.device(device)
    out_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(recipe.seed)
    train_set, valid_set, calibration_set = (
        read_samples(sorted((data_dir / name).glob("*.parquet")))
        for name in ("training", "validation", "calibration")
    )
    rows, valid_rows, calibration_rows = usable(train_set), usable(valid_set), usable(calibration_set)
    label = torch.from_numpy(labels_of(train_set))
    valid_label = torch.from_numpy(labels_of(valid_set)[valid_rows])
    stamp_size = train_set.image.shape[-1]
    logger.info("training on %d objects, validating on %d", len(rows), len(valid_rows))

    network = FusionNetwork(stamp_size)
    fit_normalization(network, train_set, rows)
    network.to(where)
    network.to(memory_format=torch.channels_last)
    average = copy.deepcopy(network)
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay
    )
    steps = recipe.epochs * (len(rows) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, recipe.learning_rate, total_steps=steps, pct_start=0.2
    )
    checkpoint = out_dir / "checkpoint.pt"
    first_epoch, history, best = 0, [], (math.inf, copy.deepcopy(average.state_dict()))
    if resume and checkpoint.is_file():
        state = torch.load(checkpoint, map_location=where, weights_only=True)
        if state["recipe"] != asdict(recipe) or state["n_rows"] != len(rows):
            raise ValueError(f"{checkpoint}: made with another recipe or other data; train without --resume")
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first_epoch, history, best = state["epoch"], state["history"], (state["best_loss"], state["best"])

    began = time.monotonic()
    for epoch in range(first_epoch, recipe.epochs):
        # seeded by epoch, so that a resumed training sees what an undisturbed one would
        rng = np.random.default_rng((recipe.seed, epoch))
        generator = torch.Generator().manual_seed(recipe.seed * 100_003 + epoch)
        torch.manual_seed(recipe.seed * 100_019 + epoch)  # of the dropout
        network.train()
        total, count = 0.0, 0
        for index in _batches(rows, recipe.batch_size, rng):
            batch = [
                t.to(where)
                for t in augment(tensors(train_set, index, torch.device("cpu")), recipe, generator)
            ]
            target = label[index].to(where)
            fused, image, sequence = network(*batch)
            loss = nn.functional.cross_entropy(fused, target) + recipe.auxiliary_weight * (
                nn.functional.cross_entropy(image, target) + nn.functional.cross_entropy(sequence, target)
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(network.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            _decayed(network, average, recipe.ema_decay)
            total, count = total + float(loss.detach()), count + 1
            if count % 50 == 0:
                logger.info("epoch %d step %d loss %.4f", epoch + 1, count, total / count)
        logits = predict(average, valid_set, valid_rows, where)
        row: dict[str, Any] = {"epoch": epoch + 1, "training_loss": total / max(count, 1)}
        for name, head in zip(("fused", "image", "sequence"), logits, strict=True):
            row[name] = figures(head, valid_label)
        history.append(row)
        logger.info("epoch %d of %d: %s", epoch + 1, recipe.epochs, row)
        if row["fused"]["loss"] < best[0]:
            best = (row["fused"]["loss"], copy.deepcopy(average.state_dict()))
        temporary = checkpoint.with_suffix(".tmp")
        torch.save(
            {
                "network": network.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "epoch": epoch + 1,
                "history": history,
                "best_loss": best[0],
                "best": best[1],
                "recipe": asdict(recipe),
                "n_rows": len(rows),
                "stamp_size": stamp_size,
            },
            temporary,
        )
        temporary.replace(checkpoint)
        if time.monotonic() - began > 60.0 * max_minutes:
            logger.info("stopping after %.0f minutes", (time.monotonic() - began) / 60)
            break
    average.load_state_dict(best[1])
    _estimate_batch_norm(average, train_set, rows, recipe, where)
    calibration_label = torch.from_numpy(labels_of(calibration_set)[calibration_rows])
    logits = predict(average, calibration_set, calibration_rows, where)[0]
    return Trained(
        network=average.cpu().eval(),
        temperature=fit_temperature(logits, calibration_label),
        prior_star_fraction=float((label[rows] == 0).float().mean()),
        stamp_size=stamp_size,
        recipe=asdict(recipe),
        history=history,
        counts={
            "training": len(rows),
            "validation": len(valid_rows),
            "calibration": len(calibration_rows),
            "training_stars": int((label[rows] == 0).sum()),
        },
    )
