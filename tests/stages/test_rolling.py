"""Stamps from bands of rows against stamps from the whole image."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sgclassify.stages.flags import InputFlag
from sgclassify.stages.rolling import RollingStamps
from sgclassify.stages.stamps import cut_stamps

RNG = np.random.default_rng(1)
SHAPE = (61, 47)
IMAGE = RNG.normal(size=SHAPE).astype(np.float32)
VALID = RNG.random(SHAPE) < 0.9
FLAGS = RNG.choice(np.array([0, InputFlag.SATURATED, InputFlag.GHOST | InputFlag.SATURATED, 1], np.uint16), SHAPE)
PLACE = st.one_of(st.floats(-30, 95), st.integers(-60, 190).map(lambda k: k / 2))


@settings(max_examples=300, deadline=None)
@given(
    places=st.lists(st.tuples(PLACE, PLACE), max_size=12),
    size=st.integers(1, 40) | st.just(70),
    cuts=st.sets(st.integers(1, SHAPE[0] - 1), max_size=20),
)
def test_bands_give_the_stamps_of_the_whole_image(places, size, cuts) -> None:
    x, y = np.array(places, dtype=np.float64).reshape(-1, 2).T
    stamps = RollingStamps(x, y, size, SHAPE)
    for y0, y1 in itertools.pairwise([0, *sorted(cuts), SHAPE[0]]):
        # what is handed over may be used again by its owner
        band = [array[y0:y1].copy() for array in (IMAGE, VALID, FLAGS)]
        stamps.add(y0, *band)
        for array in band:
            array[:] = 1
    for got, array in (
        (stamps.image, np.where(VALID, IMAGE, np.float32(0))),
        (stamps.valid, VALID),
        (stamps.saturated, (FLAGS & int(InputFlag.SATURATED)) != 0),
    ):
        expected, _ = cut_stamps(array, x, y, size)
        assert got.dtype == expected.dtype
        assert np.array_equal(got, expected)
    assert len(stamps) == len(places)


def test_only_the_rows_of_a_stamp_are_kept() -> None:
    stamps = RollingStamps(np.array([20.0]), np.array([55.0]), 8, SHAPE)
    for y0 in range(0, 60, 20):
        stamps.add(y0, IMAGE[y0 : y0 + 20], VALID[y0 : y0 + 20], FLAGS[y0 : y0 + 20])
        kept = stamps._before
        assert len(kept.image) == len(kept.valid) == len(kept.flags) == 7
        assert kept.image.base is None
