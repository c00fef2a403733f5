"""Training on a few random objects: what it does, not how well."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sgclassify.model.dataset import Sample, write_shard
from sgclassify.model.network import FusionNetwork
from sgclassify.model.train import (
    Recipe,
    augment,
    fit_normalization,
    fit_temperature,
    labels_of,
    train,
    usable,
)
from sgclassify.stages.measure import FEATURES

SIZE = 16
CLASSES = ("star", "galaxy", "qso", "spurious")


def sample(n, seed):
    rng = np.random.default_rng(seed)
    valid = np.ones((n, 7, SIZE, SIZE), bool)
    valid[rng.random((n, 7)) < 0.2] = False
    valid[0] = False
    return Sample(
        rng.normal(0, 0.05, (n, 7, SIZE, SIZE)).astype(np.float16),
        valid,
        np.full((n, 7), 0.02, np.float32),
        rng.normal(3.0, 2.0, (n, 7, len(FEATURES))).astype(np.float32),
        pa.table({"true_class": [CLASSES[k % 4] for k in range(n)]}),
    )


def test_quasars_spurious_and_blind_objects_train_nothing():
    few = sample(9, 0)
    assert labels_of(few).tolist() == [0, 1, -1, -1, 0, 1, -1, -1, 0]
    assert usable(few).tolist() == [1, 4, 5, 8]


@given(seed=st.integers(0, 1000), dropout=st.floats(0, 1))
@settings(max_examples=15, deadline=None)
def test_augmentation_keeps_pixels_and_at_least_one_band(seed, dropout):
    few = sample(12, seed)
    batch = [torch.from_numpy(a) for a in (few.image.astype(np.float32), few.valid, few.sigma, few.features)]
    before = [t.clone() for t in batch]
    recipe = Recipe(band_dropout=dropout)
    image, valid, _, features = augment(batch, recipe, torch.Generator().manual_seed(seed))
    for old, new in zip(before, batch, strict=True):
        assert torch.equal(old, new), "the sample itself must not change"
    np.testing.assert_allclose(np.sort(image.flatten(2)), np.sort(before[0].flatten(2)))
    present, was = valid.flatten(2).any(2), before[1].flatten(2).any(2)
    assert (present.any(1) == was.any(1)).all()
    assert not (present & ~was).any()
    # a band that is hidden in the image is hidden in the sequence too
    assert torch.isnan(features[was & ~present]).all()


def test_normalization_is_that_of_the_sample():
    many = sample(200, 3)
    many.features[:50] = np.nan
    network = FusionNetwork(SIZE)
    fit_normalization(network, many, np.arange(200))
    expected = many.features[50:].astype(np.float64)
    np.testing.assert_allclose(network.sequence_encoder.mean.numpy(), expected.mean(0), rtol=1e-4)
    np.testing.assert_allclose(network.sequence_encoder.std.numpy(), expected.std(0), rtol=1e-4)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.5])
def test_temperature_is_recovered(temperature):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(40_000, 2, generator=generator) * 2
    label = (torch.rand(40_000, generator=generator) < torch.softmax(logits / temperature, 1)[:, 1]).long()
    assert fit_temperature(logits, label) == pytest.approx(temperature, rel=0.1)


def test_a_resumed_training_ends_like_an_undisturbed_one(tmp_path):
    for name, n, seed in (("training", 40, 1), ("validation", 12, 2), ("calibration", 12, 3)):
        part = sample(n, seed)
        (tmp_path / "data" / name).mkdir(parents=True)
        arrays = {k: getattr(part, k) for k in ("image", "valid", "sigma", "features")}
        write_shard(tmp_path / "data" / name / "f.parquet", part.table, arrays)
    recipe = Recipe(epochs=2, batch_size=8)
    torch.set_num_threads(1)
    whole = train(tmp_path / "data", tmp_path / "whole", recipe)
    train(tmp_path / "data", tmp_path / "parts", recipe, max_minutes=0.0)
    resumed = train(tmp_path / "data", tmp_path / "parts", recipe, resume=True)
    assert [row["epoch"] for row in resumed.history] == [1, 2]
    for (name, a), b in zip(
        whole.network.state_dict().items(), resumed.network.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    with pytest.raises(ValueError, match="another recipe"):
        train(tmp_path / "data", tmp_path / "parts", Recipe(epochs=3, batch_size=8), resume=True)
