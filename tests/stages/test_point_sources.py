"""Point sources from rolling stamps against a measurement of all detections on the whole image."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgclassify.stages import locus
from sgclassify.stages import point_sources as module_of_point_sources
from sgclassify.stages.config import StageConfig
from sgclassify.stages.flags import InputFlag
from sgclassify.stages.locus import MIN_SNR, candidates, gaussian_width, point_source_members, point_sources
from sgclassify.stages.measure import measure_stamps
from sgclassify.stages.point_sources import CHUNK, PSF_STAMP, measure_point_sources, snr_limit
from sgclassify.stages.psf import Stars, fit_psf
from sgclassify.stages.rolling import RollingStamps
from sgclassify.stages.sky import SkyMesh, measure_sky
from sgclassify.stages.stamps import cut_stamps

LEVEL, SIGMA = 0.3, 0.05
CONFIG = StageConfig()


def field(seed, n, shape=(400, 360), snr=(3.0, 300.0)):
    """Image, which pixels are data, FLG, and places of stars and galaxies in a sky with a slope."""
    rng = np.random.default_rng(seed)
    ny, nx = shape
    image = rng.normal(LEVEL, SIGMA, shape) + np.linspace(0, 0.2, nx)
    x, y = rng.uniform(-2, nx + 1, n), rng.uniform(-2, ny + 1, n)
    axis_x, axis_y = np.arange(nx), np.arange(ny)
    for k in range(n):
        width = 0.95 if k % 3 else rng.uniform(1.2, 4.0)
        light = SIGMA * 3.4 * np.exp(rng.uniform(*np.log(snr))) / (2 * np.pi * width**2)
        image += light * np.outer(np.exp(-0.5 * ((axis_y - y[k]) / width) ** 2),
                                  np.exp(-0.5 * ((axis_x - x[k]) / width) ** 2))  # fmt: skip
    image, valid = image.astype(np.float32), rng.random(shape) > 0.003
    flags = np.where(image > 20, int(InputFlag.SATURATED), 0).astype(np.uint16)
    valid &= flags == 0
    image[~valid & (rng.random(shape) < 0.5)] = np.nan
    # the catalogue's centroids are a little off
    return image, valid, flags, x + rng.normal(0, 0.1, n), y + rng.normal(0, 0.1, n)


def rolled(image, valid, flags, x, y, band):
    stamps = RollingStamps(x, y, PSF_STAMP, image.shape)
    for y0 in range(0, len(image), band):
        stamps.add(y0, image[y0 : y0 + band], valid[y0 : y0 + band], flags[y0 : y0 + band])
    return stamps


def plain(image, valid, flags, x, y, sky):
    """Measures and stamps of all detections, cut from the whole image without its sky, noise of each."""
    ny, nx = image.shape
    level, noise = sky.at(0, ny, 0, nx)
    cut, _ = cut_stamps(image - level, x, y, PSF_STAMP)
    good = cut_stamps(valid, x, y, PSF_STAMP)[0]
    saturated = cut_stamps((flags & int(InputFlag.SATURATED)) != 0, x, y, PSF_STAMP)[0]
    sigma = noise[np.clip(np.rint(y).astype(int), 0, ny - 1), np.clip(np.rint(x).astype(int), 0, nx - 1)]
    first_x, first_y = np.ceil(x - PSF_STAMP / 2), np.ceil(y - PSF_STAMP / 2)
    measured = measure_stamps(cut, good, saturated, sigma, x - first_x, y - first_y, CONFIG.core_radius_px)
    place = (first_x + measured.x, first_y + measured.y)
    return measured, Stars(cut, good, sigma, measured.reference_flux, measured.x, measured.y, *place), sigma


@pytest.mark.parametrize("band", [64, 101, 700])
def test_locus_and_psf_are_those_of_all_detections_measured_on_the_whole_image(band):
    image, valid, flags, x, y = field(2, 250, shape=(700, 660))
    sky = measure_sky(image, valid, 128)
    measured, stars, _ = plain(image, valid, flags, x, y, sky)
    bright = np.flatnonzero(measured.snr >= MIN_SNR)
    assert 30 < bright.size < 150
    members = bright[point_source_members(measured.take(bright), 2.3)]
    assert members.size >= 15
    expected = point_sources(measured, members)
    psf, model = measure_point_sources(rolled(image, valid, flags, x, y, band), sky, 2.3, CONFIG)
    assert psf == expected
    assert model == fit_psf(stars.take(members), image.shape, gaussian_width(expected.measures["size"]))


def test_only_the_brightest_are_measured_where_they_are_many(monkeypatch):
    for module in (locus, module_of_point_sources):
        monkeypatch.setattr(module, "MAX_CANDIDATES", 30)
    monkeypatch.setattr(module_of_point_sources, "CHUNK", 16)
    seen = []
    monkeypatch.setattr(
        module_of_point_sources,
        "measure_stamps",
        lambda image, *rest: seen.append(len(image)) or measure_stamps(image, *rest),
    )
    image, valid, flags, x, y = field(4, 250, shape=(700, 660))
    sky = measure_sky(image, valid, 128)
    measured, stars, _ = plain(image, valid, flags, x, y, sky)
    members = point_source_members(measured, 2.3)
    assert 10 <= members.size <= 30 < np.count_nonzero(candidates(measured))
    psf, model = measure_point_sources(rolled(image, valid, flags, x, y, 64), sky, 2.3, CONFIG)
    assert psf == point_sources(measured, members)
    assert model == fit_psf(stars.take(members), image.shape, gaussian_width(psf.measures["size"]))
    assert max(seen) <= 16
    assert sum(seen) < 0.7 * np.count_nonzero(measured.snr >= MIN_SNR)


def test_chunks_do_not_show():
    image, valid, flags, x, y = field(3, 40)
    sky = measure_sky(image, valid, 128)
    once = measure_point_sources(rolled(image, valid, flags, x, y, 128), sky, 2.3, CONFIG)
    # the same detections again, far more than a chunk: the locus is the same, and every star counts as often
    again = CHUNK // 10
    many = rolled(image, valid, flags, np.repeat(x, again), np.repeat(y, again), 128)
    assert len(many) > 3 * CHUNK
    psf, _ = measure_point_sources(many, sky, 2.3, CONFIG)
    assert psf.measures == once[0].measures
    assert psf.n_stars == again * once[0].n_stars


@given(
    seed=st.integers(0, 10_000),
    level=st.sampled_from([0.0, 0.3, 300.0]),
    neighbour=st.sampled_from([0.0, 1e3, 1e6]),
    shift=st.floats(-0.7, 0.7),
)
@settings(max_examples=40, deadline=None)
def test_no_detection_exceeds_its_limit(seed, level, neighbour, shift):
    image, valid, flags, x, y = field(seed, 60, snr=(10.0, 40.0))
    image += np.float32(level)
    rng = np.random.default_rng(seed)
    # neighbours that are brighter by far, and beside the box that is looked at or just in it
    for k in range(0, 60, 4):
        row, column = (int(np.rint(c[k])) + rng.choice([-6, -5, 5, 6]) for c in (y, x))
        image[np.clip(row, 0, 399), np.clip(column, 0, 359)] += SIGMA * neighbour
    x, y = x + shift, y - shift
    mesh = np.full((4, 3), LEVEL + level, np.float32)
    sky = SkyMesh(mesh, np.full((4, 3), SIGMA, np.float32), 128, image.shape)
    measured, _, noise = plain(image, valid, flags, x, y, sky)
    limit = snr_limit(rolled(image, valid, flags, x, y, 128), sky, noise)
    assert (measured.snr <= limit).all()


def test_most_faint_detections_need_no_measurement():
    image, valid, flags, x, y = field(5, 300, shape=(1200, 1000), snr=(3.0, 12.0))
    sky = measure_sky(image, valid, 128)
    measured, _, noise = plain(image, valid, flags, x, y, sky)
    possible = snr_limit(rolled(image, valid, flags, x, y, 128), sky, noise) >= MIN_SNR
    assert (measured.snr < MIN_SNR).mean() > 0.9
    assert possible.mean() < 0.3


@pytest.mark.parametrize("n", [0, 1])
def test_without_a_detection_that_counts_the_psf_is_round(n):
    image, valid, flags, x, y = field(6, n, snr=(3.0, 5.0))
    sky = measure_sky(image, valid, 128)
    psf, model = measure_point_sources(rolled(image, valid, flags, x, y, 128), sky, 2.3548, CONFIG)
    assert (psf.n_stars, model.n_stars, model.sigma) == (0, 0, pytest.approx(1.0))
