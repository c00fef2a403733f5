"""The shipped network in the two forms that are measured: as it is stored, and in its own classes."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from sgclassify.model.serve.archive import default_model

BATCH = 64


def stored_network() -> Any:
    """The shipped archive as TorchScript, in float32 on the CPU, not frozen."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.load(str(default_model()), map_location="cpu").float().eval()  # type: ignore[no-untyped-call]


def eager_network(stamp_size: int) -> tuple[Any, str]:
    """The shipped weights in the network's own classes, and what it is; without torchvision, the stored network."""
    stored = stored_network()
    try:
        from sgclassify.model.train.network import Answer, CalibratedNetwork, Calibration, FusionNetwork
    except ImportError as error:
        return stored, f"TorchScript as stored ({error.name} is not installed)"
    weights = stored.state_dict()
    # archives of older versions keep what combines the heads at the top
    weights |= {
        f"whole.{name}": value for name, value in weights.items() if not name.startswith(("networks.", "whole."))
    }
    networks = [FusionNetwork(stamp_size, name) for name in architectures(list(weights))]
    network = CalibratedNetwork(networks, [Answer(torch.zeros_like(weights["whole.weights"]), Calibration())])
    # an archive may hold more than the whole model: what settles most objects before it
    network.load_state_dict({name: weights[name] for name in network.state_dict()})
    return network.float().eval(), "eager"


def architectures(names: list[str]) -> list[str]:
    """Architectures of the networks of an archive, in order, from the names of its weights."""
    numbers = sorted({int(name.split(".")[1]) for name in names if name.startswith("networks.")})
    paper = [any(name.startswith(f"networks.{k}.image_encoder.backbone.") for name in names) for k in numbers]
    return ["resnet50" if is_paper else "bands" for is_paper in paper]
