"""Load a model archive and score stamps: the only seam between the stages and TorchScript.

This module must stay importable without torchvision, training code or the simulator: it runs on every worker.
"""

from __future__ import annotations

import functools
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from sgclassify.model.serve.archive import REFERENCE_FILE, Archive, verified
from sgclassify.model.serve.cascade import LEAST_SIZE, Ask, Stages, in_stages
from sgclassify.model.serve.contract import INPUTS, ModelContract
from sgclassify.stages.arrays import F32, F64
from sgclassify.stages.cascade import Answers, Stage
from sgclassify.stages.errors import ModelError
from sgclassify.stages.tile import Inputs

log = logging.getLogger(__name__)

DEFAULT_BATCH = 64


@contextmanager
def torchscript() -> Iterator[None]:
    """Without the warnings that TorchScript is deprecated upstream (torch 2.11); it is what this project ships."""
    with warnings.catch_warnings():
        for category in (DeprecationWarning, FutureWarning):
            warnings.filterwarnings("ignore", message=".*torch.jit.*", category=category)
        yield


class _NoRoomError(Exception):
    """The memory of the device does not suffice for one object."""


@dataclass(eq=False)
class Classifier:
    """A loaded model that turns stamps into probabilities.

    Attributes
    ----------
    module : callable
        The fusion network in evaluation mode.
    sha256 : str
        Checksum of the archive.
    batch_size : int
        Objects in one forward pass. Short batches are padded to this size, so that a probability depends
        neither on the number of objects that happen to share its batch nor on their order. Where the memory of
        a GPU does not suffice, batches are halved, and stay so.
    on_cpu : callable, optional
        Loads the same model for the CPU, where even one object is too much for the memory of a GPU.
    stages : Stages, optional
        The parts of a model that can answer in stages.
    """

    module: Any
    contract: ModelContract
    sha256: str
    device: torch.device
    batch_size: int
    on_cpu: Callable[[], Classifier] | None = None
    stages: Stages | None = None

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
        arrays = image, valid, sigma, features, psf
        asked = self.batch_size
        try:
            (p,) = self._in_batches(lambda parts: [self._forward(parts)], arrays, 1.0)
        except _NoRoomError:
            return self._other(asked).probabilities(*arrays)
        return _finite(p)

    @property
    def cascade(self) -> Callable[[Inputs, F64], Answers] | None:
        """The model in stages, as `sgclassify.stages.classify` takes it; None if it can only be asked as a whole."""
        return None if self.stages is None else self._in_stages

    def _in_stages(self, inputs: Inputs, shift: F64) -> Answers:
        assert self.stages is not None
        asked = self.batch_size
        try:
            found = in_stages(self.stages, self._parts_in_batches, inputs, shift)
        except _NoRoomError:
            return self._other(asked)._in_stages(inputs, shift)
        return Answers(_finite(found.both), found.stage)

    def _other(self, asked: int) -> Classifier:
        """The same model on the CPU, for a tile that does not fit into the GPU; the next one tries again."""
        self.batch_size = asked
        assert self.on_cpu is not None
        return self.on_cpu()

    def _parts_in_batches(self, ask: Ask, arrays: Sequence[npt.NDArray[Any]], share: float) -> list[npt.NDArray[Any]]:
        def forward(parts: list[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
            return self._padded(ask, parts, self._size(share))

        return self._in_batches(forward, arrays, share)

    def _size(self, share: float) -> int:
        """Objects in one forward pass of a part of the model."""
        return max(min(LEAST_SIZE, self.batch_size), int(share * self.batch_size))

    def _in_batches(
        self,
        forward: Callable[[list[npt.NDArray[Any]]], list[npt.NDArray[Any]]],
        arrays: Sequence[npt.NDArray[Any]],
        share: float,
    ) -> list[npt.NDArray[Any]]:
        """Answers of one part of the model, whose batches are `share` times as large as those of the whole.

        Where the memory of the device does not suffice, all batches are halved. `_NoRoomError` if it does not suffice
        for one object, and the CPU can take its place.
        """
        found: list[list[npt.NDArray[Any]]] = []
        n, first, asked = len(arrays[0]), 0, self.batch_size
        while first < n or not found:
            last = min(first + self._size(share), n)
            try:
                found.append(forward([a[first:last] for a in arrays]))
            except torch.OutOfMemoryError as error:
                fault = str(error).partition("\n")[0]
            else:
                if self.batch_size < asked:
                    log.warning(
                        "%s: its memory does not suffice for batches of %d objects; this worker goes on with %d, "
                        "which may change the last bits of the probabilities", self.device, asked, self.batch_size,
                    )  # fmt: skip
                    asked = self.batch_size
                first = last
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
            raise _NoRoomError
        return [np.concatenate(parts) for parts in zip(*found, strict=True)]

    def _forward(self, arrays: list[npt.NDArray[Any]]) -> F32:
        """One pass of the network, padded to the batch size."""
        (p,) = self._padded(lambda batch: [self.module(*batch)], arrays, self.batch_size)
        return p

    def _padded(self, ask: Ask, arrays: list[npt.NDArray[Any]], size: int) -> list[npt.NDArray[Any]]:
        """What a part of the model answers about a batch that is padded to this size."""
        n = len(arrays[0])
        batch = []
        for values in arrays:
            padded = np.zeros((size, *values.shape[1:]), dtype=values.dtype)
            padded[:n] = values
            batch.append(torch.from_numpy(padded).to(self.device))
        with torch.inference_mode():
            return [answer.cpu().numpy()[:n] for answer in ask(batch)]


def _finite(p: F32) -> F32:
    """Probabilities, both nan where one of them is no number from 0 to 1."""
    good = (np.isfinite(p) & (p >= 0) & (p <= 1)).all(axis=1, keepdims=True)
    return np.where(good, p, np.float32(np.nan))


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
            loaded = torch.jit.load(str(path), map_location=where)  # type: ignore[no-untyped-call]
            module, stages = _specialised(loaded.float().eval(), contract, where)
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{path}: not a model archive that can be loaded: {error}") from error
    on_cpu = functools.partial(load, path, device="cpu", batch_size=batch_size, expected_sha256=archive.sha256)
    classifier = Classifier(module, contract, archive.sha256, where, batch_size, on_cpu, stages)
    _reproduce(classifier, archive.extra(REFERENCE_FILE), path)
    return classifier


def _specialised(loaded: Any, contract: ModelContract, where: torch.device) -> tuple[Any, Stages | None]:
    """A loaded network made ready to answer, as a whole and in stages if it can."""

    def ready(module: Any, *other: str) -> Any:
        # networks of version 2 do not say themselves where an input is not finite
        if where.type == "cuda" or contract.contract_version == 2:
            return torch.jit.freeze(module, preserved_attrs=list(other))
        # convolutions joined with what follows them: a tenth to a fifth less time
        return torch.jit.optimize_for_inference(module, list(other))

    if contract.cascade is None:
        return ready(loaded), None
    networks = [
        ready(network, *(["from_sequence"] if number == contract.cascade.network else []))
        for number, network in enumerate(loaded.networks.children())
    ]
    early = [torch.jit.freeze(answer) for answer in loaded.early.children()]
    stages = Stages(networks, early, torch.jit.freeze(loaded.whole), contract.cascade)
    return stages.ask_all, stages


def _reproduce(classifier: Classifier, raw: bytes, path: Path) -> None:
    """Run the archive's reference input and compare with its expected output."""
    if not raw:
        raise ModelError(f"{path}: the archive carries no reference; export the model again")
    stages = classifier.stages
    names = ["p_star", *(early_name(stage) for stage, _ in (stages.contract.stages if stages is not None else []))]
    try:
        with np.load(io.BytesIO(raw), allow_pickle=False) as reference:
            arrays = {name: reference[name] for name in (*INPUTS, *names)}
    except (ValueError, KeyError, OSError) as error:
        raise ModelError(f"{path}: the archive's reference cannot be read: {error}") from error
    # as it is, without padding
    batch = [torch.from_numpy(arrays[name]).to(classifier.device) for name in INPUTS]
    with torch.inference_mode():
        found = {"p_star": classifier.module(*batch)}
        if stages is not None:
            present = batch[1].flatten(2).any(dim=2)
            found |= {early_name(stage): p for stage, p in stages.early_answers(batch, present).items()}
    for name in names:
        got = found[name][:, 0].cpu().numpy()
        difference = float(np.max(np.abs(got - arrays[name]), initial=0.0))
        if not difference <= classifier.contract.reference_tolerance:
            raise ModelError(
                f"{path}: the reference output is not reproduced (largest difference {difference:.2g}, allowed"
                f" {classifier.contract.reference_tolerance:.2g}); this build of torch cannot serve this model"
            )


def early_name(stage: Stage) -> str:
    """Name in the archive's reference of what an early stage answers."""
    return f"p_star_{stage.name.lower()}"
