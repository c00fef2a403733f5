"""How far a training is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any


@dataclass
class State:
    """How far a training is; its checkpoint holds this.

    Attributes
    ----------
    stage : int
        Number of the stage.
    step : int
        Steps done in this stage.
    cost : float
        Work done in this stage; a step on whole stamps costs 1.
    spent, began : float
        Seconds spent in all, and before this stage.
    total, count : float, int
        Sum of the losses since the last validation, and the number of their steps.
    history : list of dict
        A row per validation.
    best_loss, best_side, since_best : float, int, int
        Lowest validation loss of this stage, side of its stamps, and validations since then.
    """

    stage: int = 0
    step: int = 0
    cost: float = 0.0
    spent: float = 0.0
    began: float = 0.0
    total: float = 0.0
    count: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best_loss: float = math.inf
    best_side: int = 0
    since_best: int = 0

    def end_stage(self, number: int) -> None:
        """Make the stage after this one the current one."""
        self.stage, self.step, self.cost, self.began = number + 1, 0, 0.0, self.spent
        self.best_loss, self.best_side, self.since_best = math.inf, 0, 0

    def rate(self, loss: float, side: int, whole: int) -> bool:
        """Count a validation loss on stamps of this side, and tell whether it is the best so far.

        A loss on smaller stamps is no rival, and does not use up the patience: `whole` is the side of whole stamps.
        """
        better = side > self.best_side or loss < self.best_loss
        if better:
            self.best_loss, self.best_side = loss, side
        self.since_best = 0 if better or side < whole else self.since_best + 1
        self.total, self.count = 0.0, 0
        return better
