"""The outcome of a training: its networks, weighed and calibrated, and its learning curves."""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sgclassify.model.data.rows import Rows
from sgclassify.model.train.calibrate import fit_calibration, fit_weights
from sgclassify.model.train.network import HEADS, Calibration, FusionNetwork, weighted
from sgclassify.model.train.trainer import BATCH_NORM_SAMPLE, Trainer
from sgclassify.model.train.validation import figures, measure_batch_norm, predict

log = logging.getLogger(__name__)


@dataclass
class Trained:
    """Outcome of a training.

    Attributes
    ----------
    networks : tuple of FusionNetwork
        The trained network, and those that stand beside it; on the CPU, in evaluation mode.
    calibrations : dict of str to Calibration
        For each head that was trained.
    weights : dict of str to Tensor of float32, shape (3 * number of networks,) or (3,)
        Weights of the logits behind each of them: of all heads of all networks for the fusion, of the head of the first
        network alone for the others.
    prior_star_fraction : float
        Share of stars that the probabilities assume.
    stamp_size : int
    recipe : dict
        The recipe, with the ``precision`` that was used in place of ``"auto"``.
    history : list of dict
        A row per validation.
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


def finish(trainer: Trainer) -> Trained:
    """Weigh the heads of the best weights on the validation fields, and calibrate them on the calibration fields."""
    recipe, state = trainer.recipe, trainer.state
    modality = recipe.modality
    if any(row["stage"] == "joint" for row in state.history):
        measure_batch_norm(trainer.network, trainer.rows, recipe, trainer.side, BATCH_NORM_SAMPLE)
    networks = [trainer.network, *(trainer.beside if modality == "fused" else [])]

    def answers(rows: Rows) -> Tensor:
        sequence_only = modality == "sequence"
        return torch.cat([predict(n, rows, trainer.device, n.image_encoder.side, sequence_only) for n in networks])

    weights = {name: torch.eye(len(HEADS))[k] for k, name in enumerate(HEADS)}
    if modality == "fused":
        logits, label = answers(trainer.validation), trainer.validation.label
        weights["fused"] = fit_weights(logits, label, trainer.weight)
        if len(networks) > 1:
            # one modality alone is what all networks make of it
            for k, name in enumerate(HEADS[1:], 1):
                weights[name] = torch.zeros(len(logits))
                weights[name][k :: len(HEADS)] = fit_weights(logits[k :: len(HEADS)], label, trainer.weight)
        together = figures(weighted(logits, weights["fused"]), label, trainer.weight)
        state.history.append({"stage": "weighted", "seconds": round(state.spent, 1), "fused": together})
        trainer.write_history()
        log.info("weights of the heads: %s; together %s", weights["fused"].tolist(), together)
    calibrations = _calibrations(trainer, answers(trainer.calibration), weights)
    # the precision that was computed in; both, where a training continued on another processor
    used = {row["precision"] for row in state.history if "precision" in row} or {trainer.precision}
    return Trained(
        networks=tuple(network.cpu().eval() for network in networks),
        calibrations=calibrations,
        weights=weights,
        prior_star_fraction=recipe.prior_star_fraction,
        stamp_size=trainer.size,
        recipe=asdict(recipe) | {"precision": "+".join(sorted(used))},
        history=state.history,
        counts={
            "training": trainer.n_rows,
            "training_stars": trainer.n_stars,
            "validation": len(trainer.validation),
            "calibration": len(trainer.calibration),
            "processes": trainer.place.world,
        },
    )


def _calibrations(trainer: Trainer, logits: Tensor, weights: dict[str, Tensor]) -> dict[str, Calibration]:
    """Calibration of each head that was trained, from the logits of the calibration fields."""
    rows, prior, learnt = trainer.calibration, trainer.recipe.prior_star_fraction, trainer.learnt_prior
    brightness = Calibration.brightness(rows.features)
    shift = math.log(prior / (1.0 - prior)) - math.log(learnt / (1.0 - learnt))
    modality = trainer.recipe.modality
    calibrations = {}
    for name in HEADS if modality == "fused" else (modality,):
        total = weighted(logits[: len(weights[name])], weights[name]) + torch.tensor([shift, 0.0])
        found = fit_calibration(total, brightness, rows.label, rows.field, prior)
        found.offset[0] += shift
        calibrations[name] = found
    return calibrations


def draw_history(history: list[dict[str, Any]], path: Path) -> None:
    """Draw the learning curves of a training as a PNG file."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 6.0), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    minutes = [row["seconds"] / 60.0 for row in history]
    names = [name for name in HEADS if any(name in row for row in history)]
    shown = (("loss", "cross entropy"), ("accuracy", "wrong class"), ("auc", "1 - area under ROC"), ("ece", "ECE"))
    for panel, (key, title) in zip(panels.flat, shown, strict=True):
        for name in names:
            values = [row[name][key] if name in row else math.nan for row in history]
            panel.plot(minutes, [1.0 - v if key in ("accuracy", "auc") else v for v in values], label=name)
        panel.set(title=title, yscale="log")
        panel.grid(alpha=0.3)
    panels[0, 0].legend()
    for panel in panels[1]:
        panel.set_xlabel("minutes")
    figure.savefig(path, dpi=120)
