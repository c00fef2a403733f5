"""The sample for the sky map: one share of all tiles."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgclassify.pipeline.record.receipts import TileReceipt
from sgclassify.pipeline.record.sample import (
    GALAXY,
    MAX_POINTS,
    MAX_SAMPLED,
    NOT_SCORED,
    STAR,
    SkySample,
    draw,
    level_for,
    ranks,
)


def _ids(exposure: int, n: int) -> npt.NDArray[np.int64]:
    """Identifiers as the stage makes them: one exposure, row after row."""
    return (np.int64(exposure) << 32) + np.arange(n, dtype=np.int64)


def _tile(number: int, n: int, level: int = 0) -> TileReceipt:
    """A tile of ``n`` objects whose right ascensions begin with its number."""
    ra, p_star = number + np.linspace(0.0, 0.9, n), np.full(n, 0.9, dtype=np.float32)
    sample = draw(_ids(number, n), ra, ra / 10, p_star, level)
    return TileReceipt(10, number, "key", n, n, 0, 0, 0.1, np.ones(20, dtype=np.int64), sample, level)


def _points(tiles: list[TileReceipt]) -> tuple[list[tuple[float, ...]], int]:
    sample = SkySample()
    for tile in tiles:
        sample.add(tile)
    points, every = sample.points()
    return sorted(points.tolist()), every


def test_ranks_are_those_of_coins() -> None:
    for ids in (_ids(77, 40_000), _ids(78, 40_000)[::-1] * 7, np.arange(40_000, dtype=np.int64)):
        found = ranks(ids)
        for level in range(7):
            expected, n = len(ids) / 2**level, np.count_nonzero(found >= level)
            assert abs(n - expected) <= 5 * np.sqrt(expected), level
    assert ranks(np.empty(0, dtype=np.int64)).shape == (0,)
    # what a run keeps today, the next one must understand
    assert ranks(np.array([0, 1, 2, 3, -1, 2**62], dtype=np.int64)).tolist() == [1, 0, 0, 1, 0, 0]


def test_every_tile_shows_the_same_share_of_its_objects() -> None:
    numbers = [7_701, 3_000, 1_500, 700, 400, 60, 20_000, 31_000]
    points, every = _points([_tile(k, n) for k, n in enumerate(numbers)])
    assert every == 4
    drawn = np.bincount(np.asarray([p[0] for p in points]).astype(int), minlength=len(numbers))
    expected = np.asarray(numbers) / every
    assert (np.abs(drawn - expected) <= 5 * np.sqrt(expected)).all(), drawn / numbers


def test_a_small_field_shows_all_of_its_objects() -> None:
    numbers = [1_827, 400, 611, 200]
    points, every = _points([_tile(k, n) for k, n in enumerate(numbers)])
    assert (len(points), every) == (sum(numbers), 1)
    # of a field with seven bands and some thousands of objects, the tiles keep all
    assert level_for(7 * 7_000) == 0


@given(
    numbers=st.lists(st.integers(0, 9_000), min_size=1, max_size=6),
    data=st.data(),
)
def test_order_and_history_do_not_matter(numbers: list[int], data: st.DataObject) -> None:
    """Tiles of earlier runs kept more; taken in any order, the picture is that of one run."""
    at_once = _points([_tile(k, n, level=2) for k, n in enumerate(numbers)])
    levels = data.draw(
        st.lists(st.integers(0, 2), min_size=len(numbers), max_size=len(numbers)).filter(lambda one: 2 in one)
    )
    tiles = [_tile(k, n, level) for k, (n, level) in enumerate(zip(numbers, levels, strict=True))]
    assert _points(data.draw(st.permutations(tiles))) == at_once


@pytest.mark.parametrize("rows", [0, 1, MAX_SAMPLED, MAX_SAMPLED + 1, 10**6, 10**9])
def test_receipts_stay_small_whatever_the_size_of_the_run(rows: int) -> None:
    level = level_for(rows)
    assert rows / 2**level <= MAX_SAMPLED
    assert level == 0 or rows / 2 ** (level - 1) > MAX_SAMPLED


def test_memory_does_not_grow_with_the_tiles() -> None:
    sample, n, number = SkySample(), 500, 600
    one = _tile(0, n)
    for k in range(number):
        part = _tile(k, n).sample
        sample.add(replace(one, pixel=k, sample=part))
        assert sum(len(part) for part in sample._parts) <= 2 * MAX_POINTS + n
    for k in range(20_000):
        sample.add(replace(one, pixel=number + k, n_objects=1, histogram=np.zeros(20, int), sample=part[:1]))
        assert len(sample._parts) < 5_000
    points, every = sample.points()
    assert every == 16
    assert MAX_POINTS / 4 < len(points) <= MAX_POINTS
    assert sample.n_objects == n * number + 20_000
    assert (sample.histogram == number).all()


def test_what_an_object_is() -> None:
    p_star = np.array([0.9, 0.5, 0.49999, np.nan], dtype=np.float32)
    ra = np.array([0.0, 359.9999999, 1.0 + 1e-9, 2.0])
    drawn = draw(np.arange(4, dtype=np.int64), ra, -ra / 4, p_star, 0)
    assert drawn["kind"].tolist() == [STAR, STAR, GALAXY, NOT_SCORED]
    assert drawn["ra"].tolist() == [0.0, 360.0, 1.0, 2.0]
