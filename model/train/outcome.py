"""The outcome of a training: its networks, weighed and calibrated, as an archive, and its learning curves."""

from __future__ import annotations

import copy
import hashlib
import io
import logging
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from sgclassify.model.data.rows import Rows
from sgclassify.model.data.shards import Sample
from sgclassify.model.serve.archive import CONTRACT_FILE, REFERENCE_FILE, verified
from sgclassify.model.serve.contract import INPUTS, ModelContract
from sgclassify.model.serve.runtime import early_name, load, torchscript
from sgclassify.model.train.calibrate import fit_calibration, fit_weights
from sgclassify.model.train.cascade import Cascade, Objects, fit_cascade
from sgclassify.model.train.checkpoint import answer_of, networks_of, weights_of
from sgclassify.model.train.network import (
    HEADS,
    Answer,
    CalibratedNetwork,
    Calibration,
    FusionNetwork,
    present_bands,
    weighted,
)
from sgclassify.model.train.trainer import BATCH_NORM_SAMPLE, Trainer
from sgclassify.model.train.validation import figures, measure_batch_norm, predict
from sgclassify.stages.errors import UsageError
from sgclassify.stages.read.checksum import sha256_of

log = logging.getLogger(__name__)

N_REFERENCE = 16
NAMES = {"fused": "fusion-{}-bilstm", "image": "image-{}", "sequence": "sequence-bilstm"}


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
    recipe : dict
        The recipe, with the ``precision`` that was used in place of ``"auto"``.
    history : list of dict
        A row per validation.
    cascade : Cascade or None
        How the fusion answers in stages.
    """

    networks: tuple[FusionNetwork, ...]
    calibrations: dict[str, Calibration]
    weights: dict[str, Tensor]
    prior_star_fraction: float
    stamp_size: int
    recipe: dict[str, Any]
    history: list[dict[str, Any]]
    counts: dict[str, int]
    cascade: Cascade | None = None


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
    logits = answers(trainer.calibration)
    calibrations = _calibrations(trainer, logits, weights)
    cascade = None
    if modality == "fused":
        rows = trainer.calibration
        whole = Answer(weights["fused"], calibrations["fused"])
        objects = Objects(logits, rows.features, rows.label, rows.field)
        cascade = fit_cascade(networks, whole, recipe.prior_star_fraction, objects)
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
        cascade=cascade,
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


def export(trained: Trained, sample: Sample, training_set_id: str, path: Path, head: str = "fused") -> ModelContract:
    """Write the archive in half precision and its ``.sha256``, and load it back as a run would.

    Parameters
    ----------
    sample : Sample
        Objects to take the reference input from, evenly over the sample.
    training_set_id : str
        Checksum of the manifest of the training data.
    path : Path
        The archive, complete under this name or not there.
    head : str
        Head that answers: the fusion, or for ablations the image or the sequence alone.
    """
    calibration = trained.calibrations[head]
    # a copy: half precision is made in place
    weights = trained.weights[head]
    networks = trained.networks[: len(weights) // len(HEADS)]
    cascade = trained.cascade if head == "fused" else None
    answers = [*(cascade.early if cascade is not None else ()), Answer(weights, calibration)]
    module = CalibratedNetwork(*copy.deepcopy((networks, answers))).half().eval()
    digest = hashlib.sha256()
    for name, value in module.state_dict().items():
        digest.update(name.encode())
        digest.update(value.numpy().tobytes())
    contract = ModelContract(
        model_id=f"{NAMES[head].format('-'.join(n.architecture for n in networks))}-{digest.hexdigest()[:12]}",
        stamp_size=trained.stamp_size,
        head=head,
        temperature=float(calibration.log_temperature[0].exp()),
        calibration={name: value.tolist() for name, value in calibration.named_parameters()}
        | {"weights": weights.tolist()},
        prior_star_fraction=trained.prior_star_fraction,
        training_set_id=training_set_id,
        n_parameters=sum(p.numel() for n in networks for p in n.parameters()),
        cascade=None if cascade is None else cascade.contract,
        training={"recipe": trained.recipe, "counts": trained.counts, "validation": trained.history[-1:]},
    )
    rows = np.unique(np.linspace(0, len(sample) - 1, N_REFERENCE).astype(np.int64))
    few = sample.take(rows)
    reference: dict[str, Any] = {name: getattr(few, name) for name in INPUTS}
    reference |= {name: reference[name].astype(np.float32) for name in ("image", "psf")}
    temporary = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with torchscript():
            scripted = torch.jit.script(module)
            # the reference: answers of the half-precision weights, computed in single precision as in a run
            scripted = scripted.float()
            reference |= _reference_answers(scripted, [torch.from_numpy(reference[k]) for k in INPUTS], contract)
            buffer = io.BytesIO()
            np.savez_compressed(buffer, **reference)
            extra = {CONTRACT_FILE: contract.to_json(), REFERENCE_FILE: buffer.getvalue()}
            torch.jit.save(scripted.half(), str(temporary), _extra_files=extra)
        load(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    path.with_name(path.name + ".sha256").write_text(f"{sha256_of(path)}  {path.name}\n")
    return contract


def _reference_answers(scripted: Any, inputs: list[Tensor], contract: ModelContract) -> dict[str, Any]:
    """Probability of a star by the whole model, and by each early stage, under its name in the reference."""
    with torch.inference_mode():
        found = {"p_star": scripted(*inputs)}
        if contract.cascade is not None:
            network = list(scripted.networks.children())[contract.cascade.network]
            early, features = list(scripted.early.children()), inputs[3]
            heads = network.from_sequence(features, present_bands(inputs[1]))[None]
            for (stage, _), answer in zip(contract.cascade.stages, early, strict=True):
                found[early_name(stage)] = answer(heads, features)
                heads = torch.stack(network(*inputs))
    return {name: answer[:, 0].numpy() for name, answer in found.items()}


def with_cascade(path: Path, rows: Rows) -> tuple[Trained, ModelContract]:
    """An archive's model with a cascade fitted on calibration objects: its networks and answers stay what they are.

    Raises
    ------
    UsageError, ModelError
        If the file is no archive, or one of a single modality, or of other stamps than the objects have.
    """
    contract = verified(path).contract()
    if contract.head != "fused":
        raise UsageError(f"{path}: answers from the {contract.head} alone; a cascade needs a model of both")
    if contract.stamp_size != rows.size:
        raise UsageError(f"{path}: takes stamps of {contract.stamp_size} pixels, the data have {rows.size}")
    device = torch.device("cpu")
    networks = networks_of(weights_of(path, device), path, contract.stamp_size, device)
    calibration, weights = answer_of(path, device)
    logits = torch.cat([predict(network, rows, device, network.image_encoder.side) for network in networks])
    objects = Objects(logits, rows.features, rows.label, rows.field)
    prior, made = contract.prior_star_fraction, contract.training
    cascade = fit_cascade(networks, Answer(weights, calibration), prior, objects)
    trained = Trained(
        networks=tuple(networks),
        calibrations={"fused": calibration},
        weights={"fused": weights},
        prior_star_fraction=prior,
        stamp_size=contract.stamp_size,
        recipe=cast("dict[str, Any]", made.get("recipe", {})),
        history=cast("list[dict[str, Any]]", made.get("validation", [])),
        counts=cast("dict[str, int]", made.get("counts", {})),
        cascade=cascade,
    )
    return trained, contract
