from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgclassify.stages.sky import SkyMesh, measure_sky, measure_sky_rows

LEVEL, SIGMA = 0.27, 0.055


def noise(shape: tuple[int, int], seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(LEVEL, SIGMA, shape).astype(np.float32)


def all_valid(image: np.ndarray) -> np.ndarray:
    return np.ones(image.shape, dtype=bool)


def add_stars(image: np.ndarray, n: int, flux: float, seed: int = 2) -> None:
    rng = np.random.default_rng(seed)
    ny, nx = image.shape
    dy, dx = np.mgrid[-12:13, -12:13]
    star = np.exp(-0.5 * (dx**2 + dy**2) / 0.9**2) + 0.02 * np.exp(-np.hypot(dx, dy) / 4)
    for _ in range(n):
        y, x = rng.integers(12, ny - 12), rng.integers(12, nx - 12)
        image[y - 12 : y + 13, x - 12 : x + 13] += (flux * rng.pareto(1.0) * star).astype(np.float32)


def test_pure_noise() -> None:
    image = noise((512, 640))
    sky = measure_sky(image, all_valid(image), 128)
    assert sky.level.shape == sky.sigma.shape == (4, 5)
    assert sky.level.dtype == sky.sigma.dtype == np.float32
    assert np.abs(sky.level - LEVEL).max() < 0.05 * SIGMA
    assert np.abs(sky.level.mean() - LEVEL) < 0.01 * SIGMA
    assert np.abs(sky.sigma / SIGMA - 1).max() < 0.05
    assert np.abs(sky.sigma.mean() / SIGMA - 1) < 0.015


def test_sources_do_not_lift_the_sky() -> None:
    image = noise((512, 512))
    add_stars(image, 300, 0.5)
    sky = measure_sky(image, all_valid(image), 128)
    assert np.abs(sky.level - LEVEL).max() < 0.15 * SIGMA
    assert np.abs(sky.sigma / SIGMA - 1).max() < 0.1


def test_crowded_field() -> None:
    image = noise((512, 512))
    add_stars(image, 6000, 0.3)
    sky = measure_sky(image, all_valid(image), 128)
    # Half the pixels are under some star's wings; the plain median is off by more than this.
    assert np.abs(sky.level - LEVEL).max() < 0.8 * SIGMA
    assert np.median(image) - LEVEL > 1.0 * SIGMA


def test_one_bright_star_is_filtered_out() -> None:
    image = noise((640, 640))
    image[256:384, 256:384] += 5.0
    sky = measure_sky(image, all_valid(image), 128)
    assert np.abs(sky.level - LEVEL).max() < 0.1 * SIGMA


def test_follows_a_gradient() -> None:
    image = noise((512, 512))
    slope = np.linspace(0, 1, 512, dtype=np.float32)[None, :]
    image += slope
    level, _ = measure_sky(image, all_valid(image), 64).at(0, 512, 0, 512)
    inner = slice(96, -96)
    assert np.abs(level[:, inner] - LEVEL - slope[:, inner]).mean() < 0.1 * SIGMA


def test_masked_pixels_do_not_count() -> None:
    image, valid = noise((256, 256)), np.random.default_rng(5).random((256, 256)) > 0.4
    image[~valid] = np.nan
    image[:, 5], valid[:, 5] = np.inf, False
    sky = measure_sky(image, valid, 64)
    assert np.abs(sky.level - LEVEL).max() < 0.1 * SIGMA


def test_masked_boxes_are_filled_from_neighbours() -> None:
    image, valid = noise((512, 512)), np.ones((512, 512), dtype=bool)
    valid[:300, :400] = False
    image[~valid] = 1e6
    sky = measure_sky(image, valid, 64)
    assert np.abs(sky.level - LEVEL).max() < 0.15 * SIGMA
    assert np.abs(sky.sigma / SIGMA - 1).max() < 0.1


def test_nothing_valid_is_nan() -> None:
    image = noise((100, 90))
    sky = measure_sky(image, np.zeros(image.shape, dtype=bool), 32)
    level, sigma = sky.at(0, 100, 0, 90)
    assert np.isnan(level).all()
    assert np.isnan(sigma).all()


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (20, 500), (127, 129), (200, 191)])
def test_detectors_smaller_than_a_box_or_of_odd_size(shape: tuple[int, int]) -> None:
    image = noise(shape)
    sky = measure_sky(image, all_valid(image), 128)
    level, sigma = sky.at(0, shape[0], 0, shape[1])
    assert level.shape == sigma.shape == shape
    if image.size >= 1000:
        assert np.abs(level - LEVEL).max() < 0.2 * SIGMA


def test_quantised_and_constant_pixels() -> None:
    counts = np.random.default_rng(3).poisson(0.2, (256, 256)).astype(np.float32)
    sky = measure_sky(counts, all_valid(counts), 128)
    assert (sky.sigma > 0).all()
    constant = np.full((256, 256), 3.0, dtype=np.float32)
    sky = measure_sky(constant, all_valid(constant), 128)
    assert (sky.level == 3).all()
    assert (sky.sigma == 0).all()


def test_coarse_digitisation_does_not_shift_the_sky() -> None:
    step = SIGMA / 5
    image = noise((512, 512)) + np.random.default_rng(7).normal(0, 0.01, (512, 1)).astype(np.float32)
    exact = measure_sky(image, all_valid(image), 128)
    rounded = np.round(image / step).astype(np.float32) * np.float32(step)
    coarse = measure_sky(rounded, all_valid(image), 128)
    assert np.abs(coarse.level - exact.level).max() < 0.02 * SIGMA
    assert np.abs(coarse.sigma / exact.sigma - 1).max() < 0.03


def test_reads_each_row_once_and_in_bands() -> None:
    image, valid = noise((500, 300)), np.random.default_rng(1).random((500, 300)) > 0.1
    asked: list[tuple[int, int]] = []

    def read(y0: int, y1: int) -> tuple[np.ndarray, np.ndarray]:
        asked.append((y0, y1))
        return image[y0:y1].astype(">f4"), valid[y0:y1]

    streamed = measure_sky_rows(read, (500, 300), 128)
    whole = measure_sky(image, valid, 128)
    assert np.array_equal(streamed.level, whole.level)
    assert np.array_equal(streamed.sigma, whole.sigma)
    assert asked == [(0, 128), (128, 256), (256, 384), (384, 500)]


MESH = SkyMesh(
    np.random.default_rng(8).normal(1, 0.3, (4, 3)).astype(np.float32),
    np.random.default_rng(9).normal(1, 0.3, (4, 3)).astype(np.float32),
    32,
    (140, 100),
)
WHOLE = MESH.at(-20, 160, -20, 120)


@settings(max_examples=100, deadline=None)
@given(st.integers(-20, 158), st.integers(1, 60), st.integers(-20, 118), st.integers(1, 60))
def test_value_does_not_depend_on_the_window(y0: int, height: int, x0: int, width: int) -> None:
    y1, x1 = min(y0 + height, 160), min(x0 + width, 120)
    for part, whole in zip(MESH.at(y0, y1, x0, x1), WHOLE, strict=True):
        assert np.array_equal(part, whole[y0 + 20 : y1 + 20, x0 + 20 : x1 + 20])


def test_bilinear_between_centres_and_constant_beyond() -> None:
    level, _ = MESH.at(0, 140, 0, 100)
    # Boxes of 32 pixels have their centre between two pixels; the last row box holds 96 to 139.
    assert np.allclose(level[15:17, 15:17].mean(), MESH.level[0, 0], atol=0.02)
    assert (level[:16, :16] == MESH.level[0, 0]).all()
    assert (level[118:, 85:] == MESH.level[3, 2]).all()
    middle = MESH.level[0:2, 0:2].astype(np.float64).mean()
    assert np.isclose(level[31:33, 31:33].mean(), middle, atol=1e-5)


@pytest.mark.parametrize(("shape", "box"), [((0, 5), 8), ((5, 5), 0)])
def test_refuses_what_has_no_sky(shape: tuple[int, int], box: int) -> None:
    with pytest.raises(ValueError, match="no sky"):
        measure_sky(np.zeros(shape, np.float32), np.zeros(shape, bool), box)
    with pytest.raises(ValueError, match="differ"):
        measure_sky(np.zeros((4, 4), np.float32), np.zeros((4, 5), bool), 8)


def plain_box(samples: np.ndarray, n_pixels: int) -> tuple[float, float]:
    """Level and noise of a box as they are meant: the samples are clipped by masks, round after round."""
    kept = np.sort(samples[~np.isnan(samples)])
    if kept.size < max(9, 0.1 * n_pixels):
        return np.nan, np.nan

    def quantile(q: float) -> float:
        place = q * (kept.size - 1)
        low, high = np.floor([place, min(place + 1, kept.size - 1)]).astype(int)
        return kept[low] + (kept[high].astype(np.float64) - kept[low]) * (place - low)

    for _ in range(12):
        median = quantile(0.5)
        sigma = (median - quantile(0.15865525)) * 1.00382
        near = np.abs(kept.astype(np.float64) - median) <= 3 * sigma if sigma > 0 else np.ones(kept.size, bool)
        if near.all():
            break
        kept = kept[near]
    relative = (kept - np.float32(quantile(0.5))).astype(np.float64)
    centre = relative[int(0.3 * kept.size) : kept.size - int(0.3 * kept.size)].mean()
    below = relative[relative < centre] - centre
    sigma = np.sqrt((below**2).sum() / max(below.size, 1)) * 1.01361
    sigma = sigma if sigma > 0 else relative.std()
    excess = relative.mean() - centre
    return quantile(0.5) + centre - (1.5 * excess if abs(excess) < 0.3 * sigma else 0.0), sigma


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(1, 60),
    st.sampled_from([0.0, 0.02, 0.3]),
    st.sampled_from([0.0, 0.1, 0.9, 1.0]),
    st.sampled_from([0.0, SIGMA / 5, 3 * SIGMA]),
    st.sampled_from([LEVEL, 0.0, -1e4, 1e30]),
)
def test_a_box_is_clipped_round_after_round(
    seed: int, side: int, crowd: float, masked: float, step: float, level: float
) -> None:
    rng = np.random.default_rng(seed)
    image = rng.normal(level, SIGMA * max(abs(level), 1.0), (side, side))
    image += (rng.random(image.shape) < crowd) * SIGMA * rng.pareto(1.0, image.shape) * max(abs(level), 1.0)
    image = (np.round(image / step) * step if step else image).astype(np.float32)
    valid = rng.random(image.shape) >= masked
    # a value that is missing from a pixel said to be valid does not count either
    image[rng.random(image.shape) < 0.05] = np.nan
    sky = measure_sky(image, valid, side)
    assert sky.level.shape == (1, 1)
    expected_level, expected_sigma = plain_box(image[valid], image.size)
    tolerance = 1e-6 * (expected_sigma + 0.1 * abs(expected_level))
    np.testing.assert_allclose(sky.level[0, 0], expected_level, rtol=0, atol=tolerance)
    np.testing.assert_allclose(sky.sigma[0, 0], expected_sigma, rtol=1e-6)


def test_a_box_does_not_depend_on_the_others() -> None:
    image, valid = noise((256, 320)), np.random.default_rng(4).random((256, 320)) > 0.02
    add_stars(image, 80, 0.5)
    mesh = [measure_sky(image, valid, 64), measure_sky(image[::-1, ::-1], valid[::-1, ::-1], 64)]
    assert np.array_equal(mesh[0].level, mesh[1].level[::-1, ::-1])
    assert np.array_equal(mesh[0].sigma, mesh[1].sigma[::-1, ::-1])


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(-20, 130), st.integers(-20, 90)), max_size=6), st.integers(1, 30))
def test_stamps_and_places_have_the_values_of_the_window(places: list[tuple[int, int]], size: int) -> None:
    y, x = np.array(places, dtype=np.int64).reshape(-1, 2).T
    level = MESH.level_of_stamps(y, x, size)
    assert level.shape == (len(places), size, size)
    for k in range(len(places)):
        assert np.array_equal(level[k], WHOLE[0][y[k] + 20 :, x[k] + 20 :][:size, :size])
    y, x = np.clip(y, 0, 139), np.clip(x, 0, 99)
    assert np.array_equal(MESH.noise_at(y, x), WHOLE[1][y + 20, x + 20])
