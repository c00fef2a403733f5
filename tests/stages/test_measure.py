"""Measures of synthetic sources whose true moments and flux ratios are known in closed form."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgclassify.stages.features import (
    FEATURES,
    FLUX_SOFTENING,
    MOMENT_SIGMA,
    PSF_MEASURES,
    RATIO_SIGMAS,
    REFERENCE_SIGMA,
)
from sgclassify.stages.locus import point_source_members, point_sources
from sgclassify.stages.measure import (
    Measured,
    StampLocus,
    Stamps,
    feature_table,
    fit_with_psf,
    measure_stamps,
)

SIZE = 32


def gaussian_stamps(x, y, width, flux):
    axis = np.arange(SIZE)
    x, y, width, flux = (np.atleast_1d(np.asarray(a, float)) for a in (x, y, width, flux))
    r2 = (axis[None, None, :] - x[:, None, None]) ** 2 + (axis[None, :, None] - y[:, None, None]) ** 2
    profile = np.exp(-0.5 * r2 / width[:, None, None] ** 2) / (2 * np.pi * width[:, None, None] ** 2)
    return (flux[:, None, None] * profile).astype(np.float32)


def measure(image, x, y, sigma=1e-3, valid=None, saturated=None):
    n = len(image)
    return measure_stamps(
        image,
        np.ones(image.shape, bool) if valid is None else valid,
        np.zeros(image.shape, bool) if saturated is None else saturated,
        np.full(n, sigma, np.float32),
        np.broadcast_to(np.asarray(x, float), (n,)).copy(),
        np.broadcast_to(np.asarray(y, float), (n,)).copy(),
        4.0,
    )


@given(x=st.floats(14.6, 17.4), y=st.floats(14.6, 17.4), width=st.floats(0.9, 2.5), flux=st.floats(5.0, 500.0))
@settings(max_examples=40, deadline=None)
def test_gaussian_source_matches_closed_form(x, y, width, flux):
    # a Gaussian of width w under a Gaussian weight s: flux s^2/(w^2+s^2), moment 2 w^2 s^2/(w^2+s^2)
    found = measure(gaussian_stamps(x, y, width, flux), x, y)
    weighted = {s: flux * s**2 / (s**2 + width**2) for s in (*RATIO_SIGMAS, REFERENCE_SIGMA)}
    for s in RATIO_SIGMAS[:4]:
        # sampling of the narrowest weight on whole pixels costs some per mille
        assert found.ratio[s][0] == pytest.approx(weighted[s] / weighted[REFERENCE_SIGMA], rel=0.02)
    expected = 2 * width**2 * MOMENT_SIGMA**2 / (width**2 + MOMENT_SIGMA**2)
    assert found.size[0] == pytest.approx(expected, rel=0.02)
    assert found.ellipticity[0] < 0.02
    assert found.x[0] == pytest.approx(x, abs=0.02)


@given(dx=st.floats(-0.5, 0.5), dy=st.floats(-0.5, 0.5))
@settings(max_examples=25, deadline=None)
def test_bright_source_is_recentred(dx, dy):
    image = gaussian_stamps(16.0, 15.7, 1.1, 50.0)
    offset = measure(image, 16.0 + dx, 15.7 + dy)
    exact = measure(image, 16.0, 15.7)
    assert offset.size[0] == pytest.approx(exact.size[0], rel=0.02)
    assert offset.x[0] == pytest.approx(16.0, abs=0.05)


@given(k=st.integers(1, 3), flip=st.booleans(), seed=st.integers(0, 2**16))
@settings(max_examples=25, deadline=None)
def test_features_do_not_depend_on_orientation(k, flip, seed):
    rng = np.random.default_rng(seed)
    image = gaussian_stamps(15.5, 15.5, 1.4, 30.0) + rng.normal(0, 0.05, (1, SIZE, SIZE)).astype(np.float32)
    valid = rng.random(image.shape) > 0.02
    turned, turned_valid = np.rot90(image, k, axes=(1, 2)), np.rot90(valid, k, axes=(1, 2))
    if flip:
        turned, turned_valid = turned[:, :, ::-1], turned_valid[:, :, ::-1]
    rows = [
        table(measure(i.copy(), 15.5, 15.5, sigma=0.05, valid=v.copy()), i, v)
        for i, v in ((image, valid), (turned, turned_valid))
    ]
    np.testing.assert_allclose(rows[0], rows[1], rtol=2e-4, atol=2e-5)


def table(measured, image, valid, psf=None, stars=5.0, fwhm=2.1, known_psf=True):
    n = len(measured.x)
    model = gaussian_stamps(measured.x, measured.y, 0.95, 1 / (2 * np.pi * 0.95**2)) * known_psf
    locus = psf or {
        "ratio_0.7": 0.4,
        "ratio_1.8": 1.4,
        "ratio_2.7": 1.7,
        "ratio_4.0": 1.8,
        "size": 1.5,
    }
    sigma, shot = np.full(n, 0.05, np.float32), np.full(n, 1e-3)
    measures = {name: np.full(n, value) for name, value in locus.items()}
    return feature_table(
        measured,
        np.ones(n, bool),
        Stamps(image, valid, sigma, model.astype(np.float32), shot),
        StampLocus(measures, np.full(n, stars), np.full(n, fwhm)),
    )


def test_unknown_locus_gives_nan_only_where_it_is_needed():
    image = gaussian_stamps([16.0, 16.0], [16.0, 16.0], [1.0, 2.0], [20.0, 20.0])
    unknown = dict.fromkeys(PSF_MEASURES, np.nan)
    measured = measure(image, 16.0, 16.0)
    valid = np.ones(image.shape, bool)
    features = table(measured, image, valid, psf=unknown, fwhm=np.nan, known_psf=False)
    missing = {name for name, column in zip(FEATURES, features.T, strict=True) if np.isnan(column).any()}
    assert missing == {n for n in FEATURES if n.startswith(("excess_", "significance_", "extended_"))} | {
        "psf_flux",
        "psf_snr",
        "psf_misfit",
        "psf_size",
        "psf_ratio_2.7",
        "header_fwhm",
    }


def test_nothing_but_masked_pixels_is_survived():
    image = np.full((1, SIZE, SIZE), np.nan, np.float32)
    valid = np.zeros(image.shape, bool)
    features = table(measure(image, 16.0, 16.0, valid=valid), image, valid)
    assert features[0, FEATURES.index("valid_core")] == 0
    assert features[0, FEATURES.index("valid_stamp")] == 0


@given(seed=st.integers(0, 1000), n_stars=st.integers(6, 40), hint=st.sampled_from([np.nan, 2.0, 2.6, 99.0]))
@settings(max_examples=15, deadline=None)
def test_point_source_locus_is_found_among_galaxies(seed, n_stars, hint):
    rng = np.random.default_rng(seed)
    n_galaxies = 60
    width = np.concatenate([np.full(n_stars, 0.95), rng.uniform(1.1, 3.0, n_galaxies)])
    n = len(width)
    x, y = rng.uniform(15.0, 16.0, n), rng.uniform(15.0, 16.0, n)
    image = gaussian_stamps(x, y, width, rng.uniform(5, 100, n))
    image += rng.normal(0, 0.02, image.shape).astype(np.float32)
    measured = measure(image, x, y, sigma=0.02)
    found = point_sources(measured, point_source_members(measured, fwhm_px=hint))
    expected = 2 * 0.95**2 * MOMENT_SIGMA**2 / (0.95**2 + MOMENT_SIGMA**2)
    assert found.measures["size"] == pytest.approx(expected, rel=0.06)
    assert found.n_stars >= n_stars // 2


def test_no_point_sources_in_an_empty_exposure():
    image = np.random.default_rng(0).normal(0, 1, (5, SIZE, SIZE)).astype(np.float32)
    measured = measure(image, 16.0, 16.0, sigma=1.0)
    assert not point_source_members(measured, np.nan).size
    assert not point_source_members(measured, 2.2).size


def test_concatenate_keeps_order():
    image = gaussian_stamps([16.0, 16.0, 16.0], [16.0] * 3, [1.0, 1.5, 2.0], [10.0, 20.0, 30.0])
    whole = measure(image, 16.0, 16.0)
    parts = Measured.concatenate([measure(image[:1], 16.0, 16.0), measure(image[1:], 16.0, 16.0)])
    np.testing.assert_array_equal(whole.size, parts.size)
    for s in RATIO_SIGMAS:
        np.testing.assert_array_equal(whole.ratio[s], parts.ratio[s])


def test_few_point_sources_are_chosen_by_the_header():
    # two stars of the header's width, and three galaxies that agree better with each other
    width = np.array([0.95, 0.97, 2.0, 2.01, 2.02])
    image = gaussian_stamps([16.0] * 5, [16.0] * 5, width, [50.0] * 5)
    measured = measure(image, 16.0, 16.0, sigma=0.02)
    assert point_source_members(measured, fwhm_px=2.1).tolist() == [0, 1]
    assert point_source_members(measured.take(np.array([0])), fwhm_px=2.1).tolist() == [0]
    assert point_source_members(measured.take(np.array([2])), fwhm_px=2.1).size == 0


@given(hint=st.sampled_from([1.7, 2.1, 2.4, 2.8]), angle=st.floats(0, 3.1), seed=st.integers(0, 100))
@settings(max_examples=20, deadline=None)
def test_cosmic_rays_are_no_point_sources(hint, angle, seed):
    # two stars, and more streaks than stars that are smaller than they, where a wrong header looks for point sources
    rng = np.random.default_rng(seed)
    width = 2.35 / 2.3548
    image = gaussian_stamps([16.0] * 6, [16.0] * 6, [width] * 2 + [1.0] * 4, [50.0] * 6)
    axis = np.arange(SIZE) - 16.0
    for k in range(2, 6):
        turned = angle + rng.uniform(-0.3, 0.3)
        along = axis[None, :] * np.cos(turned) + axis[:, None] * np.sin(turned)
        across = axis[:, None] * np.cos(turned) - axis[None, :] * np.sin(turned)
        image[k] = 8.0 * (np.abs(along) < 2.0) * np.exp(-0.5 * (across / 0.35) ** 2)
    measured = measure(image, 16.0, 16.0, sigma=0.02)
    assert point_source_members(measured, fwhm_px=hint).tolist() == [0, 1]


@pytest.mark.parametrize("error", [0.8, 0.9, 1.0, 1.1, 1.25])
def test_stars_stand_against_a_header_that_is_wrong_by_a_fifth(error):
    width = np.array([0.99, 1.0, 1.01, 2.0, 2.3, 2.6, 3.0, 1.5])
    image = gaussian_stamps([16.0] * 8, [16.0] * 8, width, [50.0] * 8)
    measured = measure(image, 16.0, 16.0, sigma=0.02)
    assert point_source_members(measured, fwhm_px=2.3548 * error).tolist() == [0, 1, 2]


def fitted(image, psf, sigma, shot=0.0):
    n = len(image)
    valid, middle = np.ones(image.shape, bool), np.full(n, 16.0)
    return fit_with_psf(Stamps(image, valid, np.full(n, sigma, np.float32), psf, np.full(n, shot)), middle, middle)


def test_fit_of_a_noiseless_star_gives_its_flux_and_nothing_extended():
    psf = gaussian_stamps([16.0], [16.0], [0.95], [1.0])
    found = fitted(7.0 * psf, psf, 0.01)
    assert np.sinh(found["psf_flux"][0]) * FLUX_SOFTENING == pytest.approx(7.0, rel=1e-4)
    for name in ("extended_1.0", "extended_2.5", "extended_snr_1.0", "extended_snr_2.5"):
        assert found[name][0] == pytest.approx(0.0, abs=1e-3)
    assert found["psf_misfit"][0] < 0


def test_fit_finds_the_share_of_light_that_was_widened():
    psf = gaussian_stamps([16.0], [16.0], [0.95], [1.0])
    wide = gaussian_stamps([16.0], [16.0], [np.hypot(0.95, 1.0)], [1.0])
    found = fitted(10.0 * (0.6 * psf + 0.4 * wide), psf, 1e-4)
    assert found["extended_1.0"][0] == pytest.approx(0.4, abs=0.02)
    assert found["extended_snr_1.0"][0] > 3


def test_noise_alone_is_scored_in_units_of_its_errors():
    rng = np.random.default_rng(2)
    psf = np.repeat(gaussian_stamps([16.0], [16.0], [0.95], [1.0]), 2000, axis=0)
    image = (1.0 * psf + rng.normal(0, 0.01, psf.shape)).astype(np.float32)
    found = fitted(image, psf, 0.01)
    for name in ("extended_snr_1.0", "extended_snr_2.5"):
        z = np.sinh(found[name])
        assert abs(z.mean()) < 0.1
        assert z.std() == pytest.approx(1.0, abs=0.15)
