"""Checkpoints, and the weights of earlier trainings from them and from model archives."""

from __future__ import annotations

import logging
import pickle
import re
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from sgclassify.model.serve.runtime import torchscript
from sgclassify.model.train.network import Calibration, FusionNetwork
from sgclassify.stages.errors import UsageError

log = logging.getLogger(__name__)

FIRST_LAYER: Final = "image_encoder.backbone.conv1.0.weight"

_UNREADABLE: Final = (OSError, EOFError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError)
"""Errors of torch on a file that is no checkpoint, or a damaged one."""


def write(contents: dict[str, Any], path: Path) -> None:
    """Write a checkpoint, complete under its name or not there."""
    temporary = path.with_suffix(".tmp")
    torch.save(contents, temporary)
    temporary.replace(path)


def read(path: Path, device: torch.device) -> dict[str, Any]:
    """Contents of a checkpoint; `UsageError` if it is damaged."""
    try:
        found: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    except _UNREADABLE as error:
        raise UsageError(f"{path}: a damaged checkpoint; remove it, or train without --resume") from error
    return found


def weights_of(path: Path, device: torch.device) -> list[dict[str, Tensor]]:
    """Best weights of a checkpoint, or the weights of each network of an archive."""
    if not path.is_file():
        raise UsageError(f"{path}: no such file; give a checkpoint of a training, or a model archive")
    try:
        with torchscript():
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
        raise UsageError(f"{path}: neither a checkpoint of a training nor a model archive: {error}") from error
    return [found]


def answer_of(path: Path, device: torch.device) -> tuple[Calibration, Tensor]:
    """Calibration of an archive's answer by the whole model, and the weights of its heads."""
    with torchscript():
        values = torch.jit.load(str(path), map_location=device).float().state_dict()  # type: ignore[no-untyped-call]
    # archives without a cascade had them at their root
    values = {name.removeprefix("whole."): value for name, value in values.items()}
    calibration = Calibration()
    calibration.load_state_dict({name: values[f"calibration.{name}"] for name in calibration.state_dict()})
    return calibration.requires_grad_(False), values["weights"]


def networks_of(
    weights: list[dict[str, Tensor]], path: Path, stamp_size: int, device: torch.device
) -> list[FusionNetwork]:
    """Networks of these weights, which are from `path`, in evaluation mode."""
    networks = []
    for values in weights:
        network = FusionNetwork(stamp_size, architecture="resnet50" if FIRST_LAYER in values else "bands")
        try:
            network.load_state_dict(values)
        except RuntimeError as error:
            raise UsageError(f"{path}: a network of other stamps or features cannot stand beside this one") from error
        networks.append(network.to(device).eval())
    return networks


def take_over(own: dict[str, Tensor], found: dict[str, Tensor], path: Path) -> None:
    """Replace in `own` the tensors that have the same names and shapes in `found`, which is from `path`."""
    taken = [name for name in own if name in found and found[name].shape == own[name].shape]
    own |= {name: found[name] for name in taken}
    old, new = found.get(FIRST_LAYER), own.get(FIRST_LAYER)
    if FIRST_LAYER not in taken and old is not None and new is not None and old.shape[1] < new.shape[1]:
        # channels were added behind those that were there
        new[:, : old.shape[1]] = old
        taken.append(FIRST_LAYER)
        log.info("the first layer has %d channels there, %d here", old.shape[1], new.shape[1])
    log.info("took %d of %d tensors from %s", len(taken), len(own), path)
    log.info("not taken: %s", ", ".join(sorted(own.keys() - taken)) or "none")
