"""Shards as tensors in memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sgclassify.model.data.rows import read_rows, unpacked
from sgclassify.model.data.shards import read_samples
from sgclassify.stages.errors import UsageError

CLASSES = ("star", "galaxy")
CPU = torch.device("cpu")


def test_quasars_spurious_and_blind_objects_train_nothing(data):
    paths = sorted((data / "training").glob("*.parquet"))
    rows, sample = read_rows(paths), read_samples(paths)
    kind = sample.table["true_class"].to_pylist()
    keep = [k for k in range(60) if kind[k] in CLASSES and sample.valid[k].any()]
    assert rows.label.tolist() == [CLASSES.index(kind[k]) for k in keep]
    assert rows.field.tolist() == [k // 30 for k in keep]
    batch = rows.batch(torch.arange(len(rows)), CPU)
    for name, got in zip(("image", "valid", "sigma", "features", "psf"), batch, strict=True):
        np.testing.assert_array_equal(got.numpy(), getattr(sample, name)[keep], err_msg=name)
    present, _ = rows.sequence_batch(torch.arange(len(rows)), CPU)
    np.testing.assert_array_equal(present, sample.valid[keep].any(axis=(2, 3)))


def test_processes_share_the_rows(data):
    paths = sorted((data / "training").glob("*.parquet"))
    parts = [read_rows(paths, rank, 3) for rank in range(3)]
    together = torch.cat([part.features for part in parts]).flatten(1)
    whole = read_rows(paths).features.flatten(1)
    assert sorted(together.tolist()) == sorted(whole.tolist())
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_no_data_is_said(tmp_path):
    with pytest.raises(UsageError, match="sgclassify dataset"):
        read_rows([])


@given(n=st.integers(1, 4), bits=st.integers(1, 40), seed=st.integers(0, 99))
def test_masks_come_back_from_their_bits(n, bits, seed):
    mask = np.random.default_rng(seed).random((n, bits)) < 0.5
    packed = torch.from_numpy(np.packbits(mask, axis=1))
    np.testing.assert_array_equal(unpacked(packed, (bits,)), mask)
