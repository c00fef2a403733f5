"""The empirical PSF against profiles that are known in closed form, and against the simulator's optics."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgclassify.stages.psf import (
    CLIP,
    CORE_RADIUS,
    FIT_ERRORS,
    FIT_RADIUS,
    MAX_STARS,
    MIN_STARS_VARIATION,
    N_BASIS,
    ORDER,
    TERMS,
    WIDE,
    PsfModel,
    Stars,
    _integrals,
    _lines,
    _place,
    _prior,
    fit_psf,
    round_psf,
)

SIZE = 32
SHAPE = (1000, 1200)


def moffat(x, y, size=SIZE, fwhm=2.2, beta=3.0, e=0.0):
    """Elliptical Moffat profiles that sum to about 1, shape (n, size, size)."""
    axis = np.arange(size)
    dx = axis[None, None, :] - np.asarray(x)[:, None, None]
    dy = axis[None, :, None] - np.asarray(y)[:, None, None]
    alpha = fwhm / 2 / np.sqrt(2 ** (1 / beta) - 1)
    e = np.broadcast_to(np.asarray(e, float), (len(x),))[:, None, None]
    r2 = (dx**2 * (1 + e) + dy**2 * (1 - e)) / alpha**2
    return (beta - 1) / (np.pi * alpha**2) * np.sqrt(1 - e**2) * (1 + r2) ** -beta


def stars(n, seed, e=0.0, slope=0.0):
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(15.5, 16.5, (2, n))
    detector_x, detector_y = rng.uniform(0, SHAPE[1], n), rng.uniform(0, SHAPE[0], n)
    ellipticity = e + slope * (2 * detector_x / SHAPE[1] - 1)
    flux = np.exp(rng.uniform(np.log(30), np.log(3000), n))
    sigma = np.full(n, 0.1, np.float32)
    image = flux[:, None, None] * moffat(x, y, e=ellipticity) + rng.normal(0, 0.1, (n, SIZE, SIZE))
    valid = np.ones(image.shape, bool)
    return Stars(image.astype(np.float32), valid, sigma, flux, x, y, detector_x, detector_y)


def fit(n, seed, **shape):
    return fit_psf(stars(n, seed, **shape), SHAPE, 1.0)


def stamp(model, x=16.3, y=15.8, u=600.0, v=500.0, size=SIZE):
    return model.stamps(np.array([x]), np.array([y]), np.array([u]), np.array([v]), size)[0]


@pytest.mark.parametrize("k", range(N_BASIS))
def test_integrals_of_the_basis_are_sums_over_pixels(k):
    weights = [0.0] * N_BASIS
    weights[k] = 1.0
    # an equal share of the central Gaussian keeps the sum off 0 for the odd functions
    weights[0] += 1.0
    model = PsfModel(1.1, (tuple(weights),), SHAPE, 1)
    assert stamp(model, 40.2, 39.7, size=80).sum() == pytest.approx(1.0, abs=1e-4)
    assert np.isfinite(_integrals(1.1)).all()


@given(seed=st.integers(0, 1000), e=st.floats(-0.25, 0.25), n=st.integers(4, 20))
@settings(max_examples=15, deadline=None)
def test_an_elliptical_psf_is_recovered_from_a_few_stars(seed, e, n):
    got = stamp(fit(n, seed, e=e))
    assert np.abs(got - moffat([16.3], [15.8], e=e)[0]).sum() < 0.12
    assert got.sum() == pytest.approx(1.0, abs=0.02)


def test_it_varies_over_the_detector_where_stars_are_many():
    model = fit(80, 3, slope=0.2)
    for u, e in ((100.0, -1 / 6), (1100.0, 1 / 6)):
        truth = moffat([16.3], [15.8], e=0.2 * (2 * u / SHAPE[1] - 1))[0]
        assert np.sign(e) == np.sign(u - 600)
        assert np.abs(stamp(model, u=u) - truth).sum() < 0.06
    assert len(fit(10, 3, slope=0.2).coefficients) == 1


def test_galaxies_and_neighbours_among_the_stars_are_left_out():
    found = stars(12, 5)
    image, flux, x, y = found.image, found.flux, found.x, found.y
    for k in (0, 1):
        image[k] = flux[k] * moffat(x[k : k + 1], y[k : k + 1], fwhm=5.0)[0]
    image[2] += 2 * flux[2] * moffat(x[2:3] + 2.5, y[2:3])[0].astype(np.float32)
    model = fit_psf(found, SHAPE, 1.0)
    assert model.n_stars <= 9
    assert np.abs(stamp(model) - moffat([16.3], [15.8])[0]).sum() < 0.12


def test_masked_pixels_do_not_count():
    found = stars(6, 7)
    valid = np.random.default_rng(0).random(found.image.shape) > 0.05
    a, b = (
        fit_psf(
            dataclasses.replace(found, image=np.where(valid, found.image, np.float32(bad)), valid=valid),
            SHAPE,
            1.0,
        )
        for bad in (1e6, -1e6)
    )
    np.testing.assert_allclose(a.coefficients, b.coefficients, rtol=1e-9)


def test_without_stars_it_is_round_and_of_the_given_width():
    model = round_psf(0.95, SHAPE)
    got = stamp(model, 16.0, 16.0)
    np.testing.assert_allclose(got, got.T, rtol=1e-5)
    assert model.n_stars == 0
    axis = np.arange(SIZE) - 16.0
    core = got * (axis[:, None] ** 2 + axis[None, :] ** 2 < 2.0**2)
    assert (core.sum(axis=0) * axis**2).sum() / core.sum() == pytest.approx(0.95**2, rel=0.45)


def plain_fit(found, shape, width):
    """The fit as it is meant: each star's design matrix over all pixels of its stamp, one star after the other."""
    found = found.take(np.argsort(-found.flux / found.sigma, kind="stable")[:MAX_STARS])
    n, sigma, flux = len(found.flux), found.sigma, found.flux
    n_place = 3 if n >= MIN_STARS_VARIATION else 1
    place = _place(found.detector_x, found.detector_y, shape)[:, :n_place]
    mean, precision = _prior(n_place, width)
    lines_x, lines_y = _lines(found.x, SIZE, width), _lines(found.y, SIZE, width)
    hx, hy = lines_x[..., : ORDER + 1], lines_y[..., : ORDER + 1]
    wide_x, wide_y = (np.moveaxis(lines[..., ORDER + 1 :], -1, 0) for lines in (lines_x, lines_y))
    parts = [hy[:, :, None, q] * hx[:, None, :, p] for p, q in TERMS]
    parts += [wide_y[k][:, :, None] * wide_x[k][:, None, :] for k in range(len(WIDE))]
    basis = np.stack([part.reshape(n, -1) for part in parts], axis=2)
    axis = np.arange(SIZE)
    r2 = (axis[None, None, :] - found.x[:, None, None]) ** 2 + (axis[None, :, None] - found.y[:, None, None]) ** 2
    window = found.valid.reshape(n, -1) & (r2.reshape(n, -1) < FIT_RADIUS**2)
    inner = window & (r2.reshape(n, -1) < CORE_RADIUS**2)
    pixels = np.where(found.valid, found.image, 0).reshape(n, -1).astype(np.float64)
    profile = basis @ mean[0]
    for error in FIT_ERRORS:
        weight = window / (sigma[:, None] ** 2 + (error * flux[:, None] * profile) ** 2)
        norm = (weight * profile**2).sum(axis=1)
        flux = np.maximum((weight * profile * pixels).sum(axis=1) / np.maximum(norm, 1e-30), 3.0 * sigma)
        variance = (sigma / flux)[:, None] ** 2 + (error * profile) ** 2
        data = pixels / flux[:, None]
        misfit = (inner * (data - profile) ** 2 / variance).sum(axis=1) / np.maximum(inner.sum(axis=1), 1)
        keep = misfit <= (CLIP if error == FIT_ERRORS[0] else CLIP * max(float(np.median(misfit)), 1.0))
        normal, right = precision.copy(), precision @ mean.ravel()
        for k in np.flatnonzero(keep):
            w = window[k] / variance[k]
            normal += np.kron(np.outer(place[k], place[k]), (basis[k] * w[:, None]).T @ basis[k])
            right += np.kron(place[k], basis[k].T @ (w * data[k]))
        solution = np.linalg.solve(normal, right).reshape(n_place, N_BASIS)
        coefficients = solution / (solution[0] @ _integrals(width))
        profile = np.einsum("nkb,nb->nk", basis, place @ coefficients)
    return coefficients, int(keep.sum())


@given(
    seed=st.integers(0, 10_000),
    n=st.sampled_from([1, 2, 7, MIN_STARS_VARIATION - 1, MIN_STARS_VARIATION, 60, MAX_STARS + 9]),
    width=st.floats(0.6, 2.5),
    e=st.floats(-0.2, 0.2),
    slope=st.floats(-0.1, 0.1),
    masked=st.sampled_from([0.0, 0.02, 0.4, 1.0]),
    off=st.sampled_from([0.0, 3.0, 14.0]),
)
@settings(max_examples=40, deadline=None)
def test_it_is_the_fit_over_whole_stamps_one_star_after_the_other(seed, n, width, e, slope, masked, off):
    rng = np.random.default_rng(seed)
    found = stars(n, seed, e=e, slope=slope)
    # a galaxy, to be left out; and stars near or on the edge of their stamps
    if n > 2:
        found.image[0] = found.flux[0] * moffat(found.x[:1], found.y[:1], fwhm=5.0)[0]
    found = dataclasses.replace(
        found,
        valid=rng.random(found.image.shape) >= masked,
        x=found.x + rng.choice([-off, 0.0, off], n),
        y=np.round(found.y + rng.choice([-off, 0.0, off], n)),
    )
    got = fit_psf(found, SHAPE, width)
    expected, n_stars = plain_fit(found, SHAPE, width)
    assert got.n_stars == n_stars
    np.testing.assert_allclose(got.coefficients, expected, rtol=0, atol=1e-9 * np.abs(expected).max())


@pytest.mark.parametrize("place", [(slice(14, 18), slice(14, 18)), (slice(0, 2), slice(0, 2))])
def test_pixels_without_a_value_cost_no_star(place):
    found = stars(12, 4)
    found.image[:4, *place] = np.nan
    found.valid[:4, *place] = False
    model = fit_psf(found, SHAPE, 1.0)
    assert model.n_stars >= 8
    found.image[:4, *place] = 0
    assert fit_psf(found, SHAPE, 1.0) == model


@given(seed=st.integers(0, 10_000), n=st.integers(2, 60))
@settings(max_examples=20, deadline=None)
def test_the_order_of_the_stars_does_not_matter(seed, n):
    found = stars(n, seed)
    shuffled = found.take(np.random.default_rng(seed).permutation(n))
    assert fit_psf(shuffled, SHAPE, 1.0) == fit_psf(found, SHAPE, 1.0)
