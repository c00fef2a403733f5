"""Load a model archive and score stamps: the only seam between the stages and TorchScript.

This module must stay importable without torchvision, training code or the simulator: it runs on every worker.
"""

from __future__ import annotations

import functools
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sgclassify.model.serve.archive import REFERENCE_FILE, Archive, verified
from sgclassify.model.serve.contract import INPUTS, ModelContract
from sgclassify.stages.arrays import F32
from sgclassify.stages.errors import ModelError

log = logging.getLogger(__name__)

DEFAULT_BATCH = 64


@contextmanager
def torchscript() -> Iterator[None]:
    """Without the warnings that TorchScript is deprecated upstream (torch 2.11); it is what this project ships."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", message=".*torch.jit.*", category=category)
        yield


@dataclass(eq=False)
class Classifier:
    """A loaded model that turns stamps into probabilities.

    Attributes
    ----------
    module : torch.jit.ScriptModule
        The fusion network in evaluation mode.
    sha256 : str
        Checksum of the archive.
    batch_size : int
        Objects in one forward pass. Short batches are padded to this size, so that a probability depends
        neither on the number of objects that happen to share its batch nor on their order. Where the memory of
        a GPU does not suffice, batches are halved, and stay so.
    on_cpu : callable, optional
        Loads the same model for the CPU, where even one object is too much for the memory of a GPU.
    """

    module: Any
    contract: ModelContract
    sha256: str
    device: torch.device
    batch_size: int
    on_cpu: Callable[[], Classifier] | None = None

    def probabilities(self, image: F32, valid: npt.NDArray[np.bool_], sigma: F32, features: F32, psf: F32) -> F32:
        """Probabilities of the two classes: the scorer of `sgclassify.stages.classify`.

        Parameters
        ----------
        image : ndarray of float32, shape (n, 7, size, size)
            Sky-subtracted stamps, nanomaggies, axis order [object, band, y, x].
        valid : ndarray of bool, shape (n, 7, size, size)
            Pixels that are data; all False for an absent band.
        sigma : ndarray of float32, shape (n, 7)
            Noise of a sky pixel, nanomaggies; any positive number for an absent band.
        features : ndarray of float32, shape (n, 7, n_features)
            Catalogue sequence; nan where a feature has no value.
        psf : ndarray of float32, shape (n, 7, size, size)
            PSF at the source's place in the stamp; all 0 where unknown.

        Returns
        -------
        ndarray of float32, shape (n, 2)
            p_star and p_galaxy, calibrated; both nan where the model gave no finite number. Each has the relative
            precision of float32, so that the smaller one tells more than 1 minus the larger.
        """
        result = np.full((len(image), 2), np.nan, dtype=np.float32)
        first, asked = 0, self.batch_size
        while first < len(image):
            part = slice(first, min(first + self.batch_size, len(image)))
            try:
                p = self._forward([a[part] for a in (image, valid, sigma, features, psf)])
            except torch.OutOfMemoryError as error:
                fault = str(error).partition("\n")[0]
            else:
                if self.batch_size < asked:
                    log.warning(
                        "%s: its memory does not suffice for batches of %d objects; this worker goes on with %d, "
                        "which may change the last bits of the probabilities", self.device, asked, self.batch_size,
                    )  # fmt: skip
                    asked = self.batch_size
                good = (np.isfinite(p) & (p >= 0) & (p <= 1)).all(axis=1, keepdims=True)
                result[part] = np.where(good, p, np.float32(np.nan))
                first = part.stop
                continue
            # out of the handler, whose traceback holds on to the tensors
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            if self.batch_size > 1:
                self.batch_size //= 2
                continue
            if self.on_cpu is None:
                raise ModelError(f"{self.device}: its memory does not suffice for one object: {fault}")
            log.warning(
                "%s: its memory does not suffice for one object, a tile goes to the CPU: %s", self.device, fault
            )
            self.batch_size = asked
            result[first:] = self.on_cpu().probabilities(
                image[first:], valid[first:], sigma[first:], features[first:], psf[first:]
            )
            break
        return result

    def _forward(self, arrays: list[npt.NDArray[Any]]) -> F32:
        """One pass of the network, padded to the batch size."""
        n = len(arrays[0])
        pad = self.batch_size - n
        batch = [torch.from_numpy(np.pad(a, [(0, pad)] + [(0, 0)] * (a.ndim - 1))).to(self.device) for a in arrays]
        with torch.inference_mode():
            p: F32 = self.module(*batch).cpu().numpy()[:n]
        return p


def load(
    archive: Archive | Path | str | None = None,
    *,
    device: str = "cpu",
    batch_size: int = DEFAULT_BATCH,
    expected_sha256: str | None = None,
) -> Classifier:
    """Load a model archive, check it, and reproduce its reference output.

    A model is a trusted file: loading it runs code. So its checksum is compared first, with `expected_sha256`
    or with the ``<archive>.sha256`` beside it.

    Parameters
    ----------
    archive : Archive or Path or str, optional
        The TorchScript archive, or its path; the shipped default where None. The checksum of an `Archive` is not
        compared once more.
    device : str
        ``"cpu"`` or a CUDA device; where torch sees none, the CPU takes its place, with a warning.
    batch_size : int
        Objects in one forward pass.
    expected_sha256 : str, optional
        Checksum that the archive must have.

    Raises
    ------
    ModelError
        If the archive is missing, damaged, not the expected one, or does not reproduce its reference.
    """
    if not isinstance(archive, Archive):
        archive = verified(archive, expected_sha256)
    path, contract = archive.path, archive.contract()
    where = torch.device(device)
    if where.type == "cuda" and not torch.cuda.is_available():
        log.warning("the model is asked for on %s, which torch does not see: it runs on the CPU", device)
        where = torch.device("cpu")
    if where.type == "cuda":
        # the precision of the CPU (Ampere and later would round convolutions to 10 bits), the same in every run
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
    try:
        with torchscript():
            module = torch.jit.load(str(path), map_location=where)  # type: ignore[no-untyped-call]
            module = torch.jit.freeze(module.float().eval())
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{path}: not a model archive that can be loaded: {error}") from error
    on_cpu = functools.partial(load, path, device="cpu", batch_size=batch_size, expected_sha256=archive.sha256)
    classifier = Classifier(module, contract, archive.sha256, where, batch_size, on_cpu)
    _reproduce(classifier, archive.extra(REFERENCE_FILE), path)
    return classifier


def _reproduce(classifier: Classifier, raw: bytes, path: Path) -> None:
    """Run the archive's reference input and compare with its expected output."""
    if not raw:
        raise ModelError(f"{path}: the archive carries no reference; export the model again")
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as reference:
            arrays = {name: reference[name] for name in (*INPUTS, "p_star")}
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(f"{path}: the archive's reference cannot be read: {error}") from error
    got = classifier.probabilities(*(arrays[name] for name in INPUTS))[:, 0]
    difference = float(np.max(np.abs(got - arrays["p_star"]), initial=0.0))
    if not difference <= classifier.contract.reference_tolerance:
        raise ModelError(
            f"{path}: the reference output is not reproduced (largest difference {difference:.2g}, allowed"
            f" {classifier.contract.reference_tolerance:.2g}); this build of torch cannot serve this model"
        )
