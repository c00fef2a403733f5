"""A model in stages: the sequence, then the lightest network, then the others; each only for what is still open."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sgclassify.model.serve.contract import CascadeContract
from sgclassify.stages.arrays import F64
from sgclassify.stages.cascade import Answers, Stage, brightness
from sgclassify.stages.prior import logit_of
from sgclassify.stages.tile import Inputs

Ask = Callable[[list[Tensor]], list[Tensor]]
"""Part of a model: tensors in and out, whose first axis is the object."""

Batched = Callable[[Ask, Sequence[npt.NDArray[Any]], float], list[npt.NDArray[Any]]]
"""Asks a part of a model in batches of one size, which is a multiple of the one of the whole model."""

SIZES: Final = {Stage.SEQUENCE: 4.0, Stage.PART: 0.5, Stage.WHOLE: 0.5}
"""Objects in a batch of each stage over those of the whole model. The last stages see few objects of a tile: a small
batch is padded less. On one thread of a CPU, the ResNet takes 8 % more time per object in batches of 32 than of 64."""

LEAST_SIZE: Final = 32
"""Smallest batch of a stage: of fewer objects, the last one of an LSTM differs from the others in the last bit."""


@dataclass(eq=False)
class Stages:
    """The parts of a loaded model.

    Attributes
    ----------
    networks : sequence of ScriptModule
        Each gives the logits of its three heads.
    early : sequence of ScriptModule
        The answer of each early stage from the logits of its heads.
    whole : ScriptModule
        The answer from all heads.
    contract : CascadeContract
    """

    networks: Sequence[Any]
    early: Sequence[Any]
    whole: Any
    contract: CascadeContract

    def ask_all(self, image: Tensor, valid: Tensor, sigma: Tensor, features: Tensor, psf: Tensor) -> Tensor:
        """Probabilities (n, 2) by the whole model."""
        heads = [head for network in self.networks for head in network(image, valid, sigma, features, psf)]
        answer: Tensor = self.whole(torch.stack(heads), features)
        return answer

    def ask_sequence(self, arrays: list[Tensor]) -> list[Tensor]:
        """Probabilities by the sequence, from features and present bands."""
        features, present = arrays
        head = self.networks[self.contract.network].from_sequence(features, present)
        return [self.early[0](head[None], features)]

    def ask_part(self, arrays: list[Tensor]) -> list[Tensor]:
        """Probabilities by the lightest network, and the logits of its heads, shape (n, 3, 2), from the inputs."""
        heads = torch.stack(self.networks[self.contract.network](*arrays))
        return [self.early[1](heads, arrays[3]), heads.transpose(0, 1)]

    def ask_rest(self, arrays: list[Tensor]) -> list[Tensor]:
        """Probabilities by the whole model, from the inputs and what `ask_part` gave of the logits."""
        *inputs, known = arrays
        heads: list[Tensor] = []
        for number, network in enumerate(self.networks):
            heads += known.unbind(1) if number == self.contract.network else network(*inputs)
        return [self.whole(torch.stack(heads), inputs[3])]

    def early_answers(self, inputs: list[Tensor], present: Tensor) -> dict[Stage, Tensor]:
        """What each early stage answers about all of these objects."""
        found = {Stage.SEQUENCE: self.ask_sequence([inputs[3], present])[0]}
        if len(self.early) > 1:
            found[Stage.PART] = self.ask_part(inputs)[0]
        return found


def in_stages(stages: Stages, batched: Batched, inputs: Inputs, shift: F64) -> Answers:
    """Ask each stage about the objects that the one before it is not certain of.

    Parameters
    ----------
    batched : callable
        Asks one part about any number of objects; what it answers about one must not depend on the others.
    shift : ndarray of float64, shape (n,)
        See `sgclassify.stages.cascade.Certainty.settled`.
    """
    n = len(inputs)
    both = np.full((n, 2), np.nan, dtype=np.float32)
    stage = np.full(n, Stage.WHOLE, dtype=np.int8)
    bright = brightness(inputs.features)
    present = np.any(inputs.valid, axis=(2, 3))
    known: list[npt.NDArray[Any]] = []

    def stamps(rows: npt.NDArray[np.int64]) -> list[npt.NDArray[Any]]:
        return [a[rows] for a in (inputs.image, inputs.valid, inputs.sigma, inputs.features, inputs.psf)]

    rows = np.arange(n)
    for number, certainty in stages.contract.stages:
        if not len(rows):
            break
        if number is Stage.SEQUENCE:
            answer, *known = batched(stages.ask_sequence, [inputs.features, present], SIZES[number])
        else:
            answer, *known = batched(stages.ask_part, stamps(rows), SIZES[number])
        # an object without any band is not scored
        certain = certainty.settled(logit_of(answer), shift[rows], bright[rows]) | ~present[rows].any(axis=1)
        both[rows] = answer
        stage[rows[certain]] = number
        known = [values[~certain] for values in known]
        rows = rows[~certain]
    if len(rows):
        if known:
            (both[rows],) = batched(stages.ask_rest, [*stamps(rows), *known], SIZES[Stage.WHOLE])
        else:
            (both[rows],) = batched(lambda a: [stages.ask_all(*a)], stamps(rows), SIZES[Stage.WHOLE])
    return Answers(both, stage)
