"""The ceiling: the answers of an oracle that knows the true PSF of simulated objects."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sgclassify.model.data.shards import Sample, true_classes
from sgclassify.stages.arrays import F64
from sgclassify.stages.columns import CLASSES

BIN_WIDTH: Final = 0.5
"""Width (mag) of the bins in which the share of stars is counted."""


class MagnitudePrior:
    """Share of stars by magnitude, counted in shards of the training fields, which the others resemble."""

    def __init__(self, paths: Sequence[Path]) -> None:
        table = pa.concat_tables([pq.read_table(path, columns=["true_class", "mag_i"]) for path in paths])
        kind = true_classes(table)
        magnitude = table["mag_i"].to_numpy()
        self.edges = np.arange(14.0, 30.0, BIN_WIDTH)
        counts = [np.histogram(magnitude[kind == name], self.edges)[0] for name in CLASSES]
        # half an object more in every bin, so that nothing is impossible
        self.logit = np.log(counts[0] + 0.5) - np.log(counts[1] + 0.5)

    def log_odds(self, magnitude: F64) -> F64:
        """Logarithm of the ratio of stars to galaxies at i magnitudes, linear between the bins."""
        return np.asarray(np.interp(magnitude, self.edges[:-1] + BIN_WIDTH / 2, self.logit))


def oracle_probabilities(data_dir: Path, part: str, sample: Sample, count: int, prior: MagnitudePrior) -> F64:
    """Probability of being a star by `sgclassify.simulation.oracle`, NaN for objects that it does not look at.

    It looks at `count` objects, drawn from the single, unblended stars and galaxies of `sample`. This is a shard of
    the data set, or some of its objects.
    """
    # the simulator is an extra, which only this needs here
    from sgclassify.simulation.oracle import log_ratios
    from sgclassify.simulation.training import field_config

    seed = int(json.loads((data_dir / "settings.json").read_text())["seed"])
    field = int(sample.table["field"][0].as_py())
    config = field_config(part, seed, field)
    mixed = np.zeros(len(sample), dtype=bool)
    for name in ("blended", "binary"):
        mixed |= sample.table[name].fill_null(False).to_numpy(zero_copy_only=False)
    used = np.asarray(np.any(sample.valid, axis=(2, 3)))
    fit = np.flatnonzero(np.isin(true_classes(sample.table), CLASSES) & ~mixed & np.any(used, axis=1))
    rows = np.sort(np.random.default_rng((seed, field, 3)).permutation(fit)[:count])
    magnitude = sample.table["mag_i"].to_numpy()[rows]
    ratio = log_ratios(config, field, magnitude, used[rows]) + prior.log_odds(magnitude)
    result = np.full(len(sample), np.nan)
    result[rows] = 1.0 / (1.0 + np.exp(-np.clip(ratio, -700.0, 700.0)))
    return result
