"""Export a trained network as a TorchScript archive that carries its contract and a reference."""

from __future__ import annotations

import copy
import hashlib
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sgclassify.model.data.shards import Sample
from sgclassify.model.serve.archive import CONTRACT_FILE, REFERENCE_FILE
from sgclassify.model.serve.contract import ModelContract
from sgclassify.model.serve.runtime import load
from sgclassify.model.train.network import HEADS, CalibratedNetwork
from sgclassify.model.train.outcome import Trained
from sgclassify.stages.read.checksum import sha256_of

N_REFERENCE = 16
NAMES = {"fused": "fusion-{}-bilstm", "image": "image-{}", "sequence": "sequence-bilstm"}


def _archive(network: torch.jit.ScriptModule, contract: ModelContract, reference: dict[str, Any], path: Path) -> None:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **reference)
    extra = {CONTRACT_FILE: contract.to_json(), REFERENCE_FILE: buffer.getvalue()}
    torch.jit.save(network, str(path), _extra_files=extra)


def export(trained: Trained, sample: Sample, training_set_id: str, path: Path, head: str = "fused") -> ModelContract:
    """Write the archive in half precision and its ``.sha256``, and load it back as a run would.

    Parameters
    ----------
    trained : Trained
    sample : Sample
        Objects to take the reference input from, evenly over the sample.
    training_set_id : str
        Checksum of the manifest of the training data.
    path : Path
        The archive, complete under this name or not there.
    head : str
        Head that answers: the fusion, or for ablations the image or the sequence alone.

    Returns
    -------
    ModelContract
    """
    calibration = trained.calibrations[head]
    # a copy: half precision is made in place
    weights = trained.weights[head]
    networks = trained.networks[: len(weights) // len(HEADS)]
    module = CalibratedNetwork(*copy.deepcopy((networks, calibration, weights))).half().eval()
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
        training={"recipe": trained.recipe, "counts": trained.counts, "validation": trained.history[-1:]},
    )
    rows = np.unique(np.linspace(0, len(sample) - 1, N_REFERENCE).astype(np.int64))
    few = sample.take(rows)
    reference: dict[str, Any] = {
        "image": few.image.astype(np.float32),
        "valid": few.valid,
        "sigma": few.sigma,
        "features": few.features,
        "psf": few.psf.astype(np.float32),
    }
    temporary = path.with_name(path.name + ".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with warnings.catch_warnings():
            # TorchScript is deprecated upstream since torch 2.11; it is what this project ships (DESIGN).
            warnings.filterwarnings("ignore", message=".*torch.jit.*")
            scripted = torch.jit.script(module)
            # the reference: answers of the half-precision weights, computed in single precision as in a run
            with torch.inference_mode():
                answer = scripted.float()(*(torch.from_numpy(reference[k]) for k in reference))
            reference["p_star"] = answer[:, 0].numpy()
            _archive(scripted.half(), contract, reference, temporary)
        load(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    path.with_name(path.name + ".sha256").write_text(f"{sha256_of(path)}  {path.name}\n")
    return contract
