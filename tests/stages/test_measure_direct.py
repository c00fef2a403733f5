"""The measures of stamps against the sums that define them, pixel by pixel, and their independence of other stamps."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sgclassify.stages import measure as measure_module
from sgclassify.stages.features import (
    ANNULUS,
    FEATURES,
    FLUX_SOFTENING,
    MOMENT_SIGMA,
    PSF_MEASURES,
    PSF_SIGMAS,
    RATIO_SIGMAS,
    REFERENCE_SIGMA,
    TOTAL_RADIUS,
    WIDE_MOMENT_SIGMA,
    WIDENINGS,
)
from sgclassify.stages.measure import (
    PSF_ERROR,
    PSF_RADIUS,
    Measured,
    StampLocus,
    Stamps,
    feature_table,
    measure_stamps,
)
from sgclassify.stages.psf import N_BASIS, ORDER, TERMS, WIDE, PsfModel, _integrals

CORE = 4.0


def gauss(r2, s):
    return np.exp(-0.5 * r2 / s**2)


def grid(x, y, size):
    axis = np.arange(size, dtype=float)
    return axis[None, :] - x, axis[:, None] - y


def direct_measures(image, valid, saturated, sigma, x, y, core_radius=CORE):
    """Measures of one stamp, as they are defined: every weight at every pixel."""
    size = len(image)
    data = np.where(valid, image, 0.0).astype(float)
    noise = max(float(sigma), 1e-30)
    x0, y0 = x, y
    for _ in range(3):
        dx, dy = grid(x, y, size)
        weight = gauss(dx**2 + dy**2, 1.5)
        flux = (weight * data).sum()
        if flux > 8.0 * noise * np.sqrt((weight**2 * valid).sum()):
            move_x = np.clip(2.0 * (weight * data * dx).sum() / flux, -0.5, 0.5)
            move_y = np.clip(2.0 * (weight * data * dy).sum() / flux, -0.5, 0.5)
            x, y = np.clip(x + move_x, x0 - 0.7, x0 + 0.7), np.clip(y + move_y, y0 - 0.7, y0 + 0.7)
    dx, dy = grid(x, y, size)
    r2 = dx**2 + dy**2
    radius = np.sqrt(r2)
    reference = gauss(r2, REFERENCE_SIGMA)
    reference_flux = (reference * data).sum()
    reference_error = noise * np.sqrt(max((reference**2 * valid).sum(), 1e-6))
    floor = max(reference_flux, reference_error)

    def moments(s):
        weighted = gauss(r2, s) * data
        total = max(weighted.sum(), 2.0 * noise * s)
        xx, yy, xy = ((weighted * a * b).sum() / total for a, b in ((dx, dx), (dy, dy), (dx, dy)))
        trace = np.clip(xx + yy, 0.05, 4.0 * s**2)
        return trace, np.clip(np.hypot(xx - yy, 2.0 * xy) / trace, 0.0, 1.5)

    moment, ellipticity = moments(MOMENT_SIGMA)
    core = radius <= core_radius
    near = data[radius <= 2.5]
    return {
        "x": x,
        "y": y,
        "snr": reference_flux / reference_error,
        "reference_flux": reference_flux,
        "reference_error": reference_error,
        "total_flux": (np.clip(TOTAL_RADIUS + 0.5 - radius, 0.0, 1.0) * data).sum(),
        "ratios": [np.clip((gauss(r2, s) * data).sum() / floor, -5.0, 40.0) for s in RATIO_SIGMAS],
        "size": moment,
        "size_wide": moments(WIDE_MOMENT_SIGMA)[0],
        "ellipticity": ellipticity,
        "peak": np.clip((near.max() if near.size else 0.0) / floor, -2.0, 2.0),
        "annulus_flux": data[(radius >= ANNULUS[0]) & (radius < ANNULUS[1])].sum(),
        "valid_core": (core & valid).sum() / max(core.sum(), 1),
        "valid_stamp": valid.sum() / size**2,
        "saturated_core": (core & saturated).sum() / max(core.sum(), 1),
    }


def direct_fit(image, valid, sigma, psf, shot, x, y):
    """The features of the fit with the PSF, of one stamp."""
    size = len(image)
    dx, dy = grid(x, y, size)
    data, model = np.where(valid, image, 0.0).astype(float), psf.astype(float)
    window = valid & (dx**2 + dy**2 < PSF_RADIUS**2)
    square = (window * model**2).sum()
    if not ((window * model).sum() > 0.5 and square > 0):
        return dict.fromkeys(f for f in FEATURES if f.startswith(("psf_flux", "psf_snr", "psf_misfit", "extended")))
    bright = np.maximum(max((window * model * data).sum() / square, 0.0) * model, 0.0)
    variance = float(sigma) ** 2 + np.nan_to_num(shot) * bright + (PSF_ERROR * bright) ** 2
    weight = window / np.maximum(variance, 1e-30)
    pp, pd = (weight * model**2).sum(), (weight * model * data).sum()
    fitted, error = pd / pp, 1.0 / np.sqrt(pp)
    count = max(window.sum(), 2.0) - 1.0
    chi2 = (weight * (data - fitted * model) ** 2).sum()
    found = {
        "psf_flux": np.arcsinh(fitted / FLUX_SOFTENING),
        "psf_snr": np.arcsinh(fitted / error),
        "psf_misfit": np.arcsinh((chi2 - count) / np.sqrt(2.0 * count)),
    }
    axis = np.arange(size)
    for width in WIDENINGS:
        kernel = gauss((axis[:, None] - axis[None, :]) ** 2, width) / (np.sqrt(2.0 * np.pi) * width)
        moved = kernel @ model @ kernel - model
        mm, pm, md = (weight * moved**2).sum(), (weight * model * moved).sum(), (weight * moved * data).sum()
        determinant = max(mm * pp - pm**2, 1e-12 * max(mm * pp, 1e-30))
        amount = (md * pp - pm * pd) / determinant
        total = max((pd * mm - pm * md) / determinant, 2.0 * error)
        found[f"extended_{width}"] = np.clip(amount / total, -3.0, 6.0)
        found[f"extended_snr_{width}"] = np.arcsinh(amount / np.sqrt(pp / determinant))
    return found


def direct_features(measures, detected, image, valid, sigma, psf, shot, locus, n_stars, fwhm):
    """The features of one stamp."""
    size = len(image)
    dx, dy = grid(measures["x"], measures["y"], size)
    r2 = dx**2 + dy**2
    ratio = dict(zip(RATIO_SIGMAS, measures["ratios"], strict=True))
    found = {
        "detected": float(detected),
        "snr": np.arcsinh(measures["snr"]),
        "flux": np.arcsinh(measures["total_flux"] / FLUX_SOFTENING),
        "depth": 22.5 - 2.5 * np.log10(5.0 * measures["reference_error"]) - 25.0,
        **{name: measures[name] for name in ("size", "size_wide", "ellipticity", "peak")},
        **{name: measures[name] for name in ("valid_core", "valid_stamp", "saturated_core")},
        "excess_size": np.log(measures["size"] / locus["size"]),
        "psf_size": locus["size"],
        "psf_ratio_2.7": locus["ratio_2.7"],
        "psf_stars": np.log1p(n_stars),
        "header_fwhm": fwhm,
        "annulus": np.clip(
            measures["annulus_flux"] / max(abs(measures["total_flux"]), 3.0 * TOTAL_RADIUS * float(sigma)), -5.0, 5.0
        ),
        **direct_fit(image, valid, sigma, psf, shot, measures["x"], measures["y"]),
        **{f"ratio_{s}": ratio[s] for s in RATIO_SIGMAS},
    }
    for s in PSF_SIGMAS:
        expected = locus[f"ratio_{s}"]
        difference = gauss(r2, s) - expected * gauss(r2, REFERENCE_SIGMA)
        error = float(sigma) * np.sqrt(max((difference**2 * valid).sum(), 1e-6))
        excess = ratio[s] - expected
        found[f"excess_{s}"] = excess / expected
        scale = max(measures["reference_flux"], measures["reference_error"])
        found[f"significance_{s}"] = np.arcsinh(excess * scale / max(error, 1e-30))
    return np.array([np.nan if found[name] is None else found[name] for name in FEATURES])


@dataclasses.dataclass
class Case:
    """Stamps with all that their features depend on."""

    image: np.ndarray
    valid: np.ndarray
    saturated: np.ndarray
    sigma: np.ndarray
    x: np.ndarray
    y: np.ndarray
    detected: np.ndarray
    shot: np.ndarray
    locus: dict
    n_stars: np.ndarray
    fwhm: np.ndarray

    def take(self, index):
        locus = {name: values[index] for name, values in self.locus.items()}
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "locus"}
        return Case(**{name: values[index] for name, values in fields.items()}, locus=locus)

    def measures(self):
        return measure_stamps(self.image, self.valid, self.saturated, self.sigma, self.x, self.y, CORE)

    def psf(self, measured):
        return PSF.stamps(measured.x, measured.y, 40.0 * self.x, 30.0 * self.y, self.image.shape[-1])

    def features(self):
        measured = self.measures()
        stamps = Stamps(self.image, self.valid, self.sigma, self.psf(measured), self.shot)
        return feature_table(measured, self.detected, stamps, StampLocus(self.locus, self.n_stars, self.fwhm))


def psf_model():
    rng = np.random.default_rng(1)
    coefficients = 0.02 * rng.normal(size=(3, N_BASIS))
    coefficients[0, 0], coefficients[0, len(TERMS) :], coefficients[1:] = 1.0, (0.035, 0.0015), coefficients[1:] / 4
    coefficients /= coefficients[0] @ _integrals(0.95)
    return PsfModel(0.95, tuple(map(tuple, coefficients.tolist())), (960, 1280), 30)


PSF = psf_model()


def case(seed, n, size=32):
    """Stars, galaxies and empty sky with neighbours, masks from none to all pixels, NaN and saturated pixels."""
    rng = np.random.default_rng(seed)
    middle = size / 2
    x, y = rng.uniform(middle - 1, middle, (2, n))
    x[rng.random(n) < 0.1] = middle
    axis = np.arange(size)
    image = rng.normal(0, 1, (n, size, size))
    sigma = 10 ** rng.uniform(-4, 0, n)
    image *= sigma[:, None, None]
    for flux, width, place_x, place_y in (
        (10 ** rng.uniform(-1, 4, n), rng.uniform(0.8, 3, n), x + rng.normal(0, 0.3, n), y + rng.normal(0, 0.3, n)),
        (10 ** rng.uniform(-1, 5, n), rng.uniform(0.8, 3, n), *rng.uniform(0, size, (2, n))),
    ):
        flux = flux * sigma * (rng.random(n) < 0.8)
        r2 = (axis[None, None, :] - place_x[:, None, None]) ** 2 + (axis[None, :, None] - place_y[:, None, None]) ** 2
        image += flux[:, None, None] * gauss(r2, width[:, None, None])
    share = rng.choice([0.0, 0.0, 0.02, 0.3, 0.95, 1.0], n)
    valid = rng.random(image.shape) >= share[:, None, None]
    valid[rng.random(n) < 0.1, :, size // 2 :] = False
    saturated = ~valid & (rng.random(image.shape) < 0.3)
    image = image.astype(np.float32)
    image[~valid & (rng.random(image.shape) < 0.5)] = np.nan
    locus = {name: rng.uniform(0.3, 2.0, n) for name in PSF_MEASURES}
    unknown = rng.random(n) < 0.1
    for values in locus.values():
        values[unknown] = np.nan
    shot = np.where(rng.random(n) < 0.2, np.nan, sigma * 0.01)
    fwhm = np.where(rng.random(n) < 0.2, np.nan, 2.1)
    return Case(
        image,
        valid,
        saturated,
        sigma.astype(np.float32),
        x,
        y,
        rng.random(n) < 0.5,
        shot,
        locus,
        rng.uniform(0, 9, n),
        fwhm,
    )


@given(seed=st.integers(0, 2**32), size=st.sampled_from([32, 32, 31, 20, 12, 5]))
@settings(max_examples=40, deadline=None)
def test_measures_and_features_are_the_sums_that_define_them(seed, size):
    found = case(seed, 6, size)
    measured, features = found.measures(), found.features()
    psf = found.psf(measured)
    for k in range(len(found.x)):
        stamp = (found.image[k], found.valid[k])
        plain = direct_measures(*stamp, found.saturated[k], found.sigma[k], found.x[k], found.y[k])
        for name, value in plain.items():
            got = getattr(measured, name)[k]
            np.testing.assert_allclose(got, value, rtol=1e-9, atol=1e-9 * float(found.sigma[k]), err_msg=name)
        locus = {name: values[k] for name, values in found.locus.items()}
        expected = direct_features(
            plain,
            found.detected[k],
            *stamp,
            found.sigma[k],
            psf[k],
            found.shot[k],
            locus,
            found.n_stars[k],
            found.fwhm[k],
        )
        # the features are float32, and scatter by about 1
        np.testing.assert_allclose(features[k], expected, rtol=1e-6, atol=1e-6)


@given(seed=st.integers(0, 2**32), n=st.integers(1, 70), chunk=st.sampled_from([1, 7, 64, 256]))
@settings(max_examples=40, deadline=None)
def test_a_stamp_has_the_same_features_alone_and_among_others(seed, n, chunk):
    found = case(seed, n)
    rng = np.random.default_rng(seed)
    index = rng.permutation(n)[: rng.integers(1, n + 1)]
    with pytest.MonkeyPatch.context() as patch:
        together, measures, psf = found.features(), found.measures(), found.psf(found.measures())
        patch.setattr(measure_module, "CHUNK", chunk)
        part = found.take(index)
        np.testing.assert_array_equal(part.features(), together[index])
        for field in dataclasses.fields(Measured):
            np.testing.assert_array_equal(getattr(part.measures(), field.name), getattr(measures, field.name)[index])
        np.testing.assert_array_equal(part.psf(part.measures()), psf[index])
        alone = found.take(index[:1])
        np.testing.assert_array_equal(alone.features(), together[index[:1]])


def test_no_stamps_have_no_features():
    assert case(0, 3).take(np.zeros(0, np.int64)).features().shape == (0, len(FEATURES))


@given(seed=st.integers(0, 2**32), size=st.sampled_from([32, 31, 8]))
@settings(max_examples=20, deadline=None)
def test_stamps_of_the_psf_are_sums_of_the_basis(seed, size):
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(-3, size + 3, (2, 4))
    at_x, at_y = rng.uniform(-50, 1400, (2, 4))
    got = PSF.stamps(x, y, at_x, at_y, size)
    ny, nx = PSF.shape
    for k in range(4):
        u, v = np.clip(2 * (at_x[k] + 0.5) / nx - 1, -1, 1), np.clip(2 * (at_y[k] + 0.5) / ny - 1, -1, 1)
        weights = np.array([1.0, u, v]) @ np.array(PSF.coefficients)
        dx, dy = grid(x[k], y[k], size)
        tx, ty = dx / PSF.sigma, dy / PSF.sigma

        def hermite(order, t):
            unit = np.zeros(ORDER + 1)
            unit[order] = 1.0
            norm = np.sqrt(2.0**order * np.prod(np.arange(1.0, order + 1)))
            return np.polynomial.hermite.hermval(t, unit) / norm * np.exp(-0.5 * t**2)

        plain = sum(w * hermite(p, tx) * hermite(q, ty) for w, (p, q) in zip(weights, TERMS, strict=False))
        for w, width in zip(weights[len(TERMS) :], WIDE, strict=True):
            plain = plain + w * gauss(dx**2 + dy**2, width * PSF.sigma)
        plain = plain / (weights @ _integrals(PSF.sigma))
        np.testing.assert_allclose(got[k], plain, rtol=1e-6, atol=1e-8 * np.abs(plain).max())
