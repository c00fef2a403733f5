"""Shards of random stamps."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

from sgclassify.model.data.shards import CATALOG_COLUMNS, write_shard
from sgclassify.stages.features import FEATURES

SIZE = 16
CLASSES = ("star", "galaxy", "qso", "spurious")


def _arrays_of(n, seed):
    rng = np.random.default_rng(seed)
    valid = rng.random((n, 7, SIZE, SIZE)) > 0.05
    valid[rng.random((n, 7)) < 0.2] = False
    valid[0] = False
    return {
        "image": rng.normal(0, 0.05, (n, 7, SIZE, SIZE)).astype(np.float16),
        "valid": valid,
        "sigma": rng.uniform(0.01, 0.03, (n, 7)).astype(np.float32),
        "features": rng.normal(3.0, 2.0, (n, 7, len(FEATURES))).astype(np.float32),
        "psf": rng.random((n, 7, SIZE, SIZE)).astype(np.float16),
        "catalog": np.full((n, 7, len(CATALOG_COLUMNS)), np.nan, np.float32),
    }


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Sums in the same order whatever else the machine does; what is small here is fastest so."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def arrays_of():
    """Function (n, seed) that makes the arrays of a shard of n objects."""
    return _arrays_of


@pytest.fixture(scope="session")
def inputs():
    """Function (n, seed) that makes the inputs of a network."""

    def make(n, seed):
        arrays = _arrays_of(n, seed)
        arrays |= {name: arrays[name].astype(np.float32) for name in ("image", "psf")}
        return [torch.from_numpy(arrays[name]) for name in ("image", "valid", "sigma", "features", "psf")]

    return make


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Folder of a small data set."""
    folder = tmp_path_factory.mktemp("shards")
    for seed, (name, shards) in enumerate((("training", 2), ("validation", 1), ("calibration", 2))):
        (folder / name).mkdir()
        for k in range(shards):
            table = pa.table({"true_class": [CLASSES[j % 4] for j in range(30)]})
            write_shard(folder / name / f"f{k}.parquet", table, _arrays_of(30, 10 * seed + k))
    (folder / "manifest.json").write_text("{}")
    return folder
