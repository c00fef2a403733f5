"""The same stamps get the same probabilities in a run and in ``sgclassify evaluate``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from sgclassify.model.data.shards import CATALOG_COLUMNS, read_shard, write_shard
from sgclassify.model.judge import scores
from sgclassify.model.serve import runtime
from sgclassify.pipeline import tasks
from sgclassify.stages.features import FEATURES
from sgclassify.stages.prior import Prior
from sgclassify.stages.tile import TileStamps
from sgclassify.stages.tiling import Part, Tile

N, SIZE = 12, 32
PLACES = tasks.Places(*([Path("/nowhere")] * 7), token="")


@pytest.fixture(scope="module")
def classifier() -> runtime.Classifier:
    return runtime.load(batch_size=N)


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    """Objects between star and galaxy; the first has no band at all."""
    rng = np.random.default_rng(2)
    valid = rng.random((N, 7, SIZE, SIZE)) > 0.05
    valid[rng.random((N, 7)) < 0.3] = False
    valid[0] = False
    y, x = np.mgrid[:SIZE, :SIZE] - SIZE / 2
    spot = np.exp(-0.5 * (x**2 + y**2) / rng.uniform(0.9, 1.6, (N, 7, 1, 1)) ** 2)
    arrays = {
        "image": (spot + rng.normal(0.0, 0.05, valid.shape)).astype(np.float16),
        "valid": valid,
        "sigma": np.full((N, 7), 0.05, np.float32),
        "features": rng.normal(0.0, 1.0, (N, 7, len(FEATURES))).astype(np.float32),
        "psf": (np.exp(-0.5 * (x**2 + y**2)) / (2.0 * np.pi) * np.ones(valid.shape)).astype(np.float16),
        "catalog": np.full((N, 7, len(CATALOG_COLUMNS)), np.nan, np.float32),
    }
    table = pa.table({"object_id": np.arange(N), "true_class": ["star", "galaxy"] * (N // 2)})
    path = tmp_path / "test" / "field00002.parquet"
    path.parent.mkdir()
    write_shard(path, table, arrays)
    return path


def in_a_run(path: Path, classifier: runtime.Classifier, prior: float | None) -> list[float]:
    """What a run writes for the objects of a shard; NaN for null."""
    sample = read_shard(path)
    image = np.where(sample.valid, sample.image.astype(np.float32), np.float32(0))
    used = sample.valid.any(axis=(2, 3))
    stamps = TileStamps(
        image, sample.valid, sample.sigma, sample.features, sample.psf.astype(np.float32), used,
        object_id=np.arange(N), ra=np.linspace(10.0, 10.1, N), dec=np.zeros(N), sg_flags=np.zeros(N, np.int32),
        members=pa.table({}),
    )  # fmt: skip
    own = classifier.contract.prior_star_fraction
    assumed = None if prior is None else Prior((prior,))
    model = tasks.ModelRef(None, classifier.sha256, N, 1, own_prior=own, prior=assumed)
    scored = tasks.infer(Part(Tile(10, 0, ("e1",)), 10, 0), tasks.Stamps(stamps, 0.0, 0.0), PLACES, model)
    column = scored.objects.sort_by("object_id")["p_star"]
    return [np.nan if p is None else p for p in column.to_pylist()]


@pytest.mark.parametrize("prior", [None, 0.6])
def test_run_and_evaluate_agree_to_the_last_bit(
    shard: Path, classifier: runtime.Classifier, monkeypatch: pytest.MonkeyPatch, prior: float | None
) -> None:
    monkeypatch.setattr(tasks, "classifier_of", lambda model: classifier)
    monkeypatch.setattr(runtime, "load", lambda path: classifier)
    run = in_a_run(shard, classifier, prior)
    judged = scores.scores_of_part(shard.parents[1], "test", None, prior)["p_star"]
    np.testing.assert_array_equal(run, judged.to_numpy(zero_copy_only=False))
    assert np.isnan(run[0])
    assert np.isfinite(run[1:]).all()
    assert len(set(run[1:])) == N - 1
