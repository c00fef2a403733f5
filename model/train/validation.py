"""Answers of a network during its training, and how good they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sgclassify.model.data.rows import Rows, cropped
from sgclassify.model.judge.metrics import ece, roc_auc
from sgclassify.model.train.augment import augment
from sgclassify.model.train.network import FusionNetwork
from sgclassify.model.train.recipe import Recipe


class SequenceOnly(nn.Module):
    """The sequence branch, to train it alone."""

    def __init__(self, network: FusionNetwork) -> None:
        super().__init__()
        self.encoder, self.head = network.sequence_encoder, network.sequence_head

    def forward(self, present: Tensor, features: Tensor) -> Tensor:
        out: Tensor = self.head(self.encoder(features, present))
        return out


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


def measure_batch_norm(network: FusionNetwork, rows: Rows, recipe: Recipe, side: int, count: int) -> None:
    """Measure the batch-normalisation statistics of averaged weights, which are not the average of statistics.

    They are measured on `count` random objects of `rows`, augmented as in training, in stamps of `side` pixels. The
    network is left in evaluation mode.
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


def predict(network: FusionNetwork, rows: Rows, device: torch.device, size: int, sequence_only: bool = False) -> Tensor:
    """Logits (3, n, 2) of fusion, image alone and sequence alone, in single precision, without augmentation.

    The network sees the central `size` pixels of the stamps. With `sequence_only` it does not see the image, and the
    logits of the other heads are 0.
    """
    network.eval()
    parts = []
    with torch.inference_mode():
        for index in torch.split(torch.arange(len(rows)), 256):
            if sequence_only:
                logits = SequenceOnly(network)(*rows.sequence_batch(index, device))
                heads = torch.stack([torch.zeros_like(logits), torch.zeros_like(logits), logits])
            else:
                heads = torch.stack(network(*cropped(rows.batch(index, device), size)))
            parts.append(heads.float().cpu())
    return torch.cat(parts, dim=1)


def figures(logits: Tensor, label: Tensor, weight: Tensor) -> dict[str, float]:
    """Loss, recall of either class, accuracy, area under the ROC curve and calibration error of one head.

    The loss weighs the classes as in training. The calibration error takes these weights out of the probabilities.
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
