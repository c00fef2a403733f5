"""The model of a worker process: which one it is, loaded once."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sgclassify.stages.prior import Prior

if TYPE_CHECKING:
    from sgclassify.model.serve.runtime import Classifier


@dataclass(frozen=True)
class ModelRef:
    """Which model the workers load, and how.

    Attributes
    ----------
    path : Path or None
        The archive; None for the one that the worker's own installation ships.
    sha256 : str
        Checksum that it must have.
    batch_size, threads : int
    device : str
        ``"cpu"`` or ``"cuda"``.
    tta : bool
        Average over the eight symmetries of the square.
    own_prior : float
        Share of stars that the model assumes.
    prior : Prior or None
        What to assume instead.
    exact : bool
        Ask the whole model about every object, not in stages.
    """

    path: Path | None
    sha256: str
    batch_size: int
    threads: int
    device: str = "cpu"
    tta: bool = False
    own_prior: float = 0.5
    prior: Prior | None = None
    exact: bool = False


@functools.lru_cache(maxsize=1)
def classifier_of(model: ModelRef) -> Classifier:
    """The model of this process: loaded, checked and warmed at the first call, then kept.

    `ModelError` if this worker does not have the very model that the driver checked.
    """
    # Imported here, so that workers which only read and cut do not load torch.
    import torch

    from sgclassify.model.serve import runtime

    # The nanny sets OMP_NUM_THREADS=1 in embedded workers only. Sums are split by threads, so their number
    # decides about the last bits and must be the same wherever a tile is computed.
    torch.set_num_threads(model.threads)
    return runtime.load(model.path, device=model.device, batch_size=model.batch_size, expected_sha256=model.sha256)
