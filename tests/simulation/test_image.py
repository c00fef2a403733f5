"""From sources to pixels: PSF, renderer, detector and world coordinates."""

from __future__ import annotations

import numpy as np
import pytest
from astropy.wcs import WCS
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("galsim")

import galsim

from sgclassify.simulation.camera import CHIPS_OF_BAND, Pointing, chip_center, jacobian, shifted, wcs_header
from sgclassify.simulation.detector import DetectorModel, _bleed, expose
from sgclassify.simulation.filters import PSF_FAMILIES
from sgclassify.simulation.psf import PsfField, draw_psf
from sgclassify.simulation.render import Scene, clumps, render
from sgclassify.simulation.training import STRAINS, field_config
from sgclassify.stages.bands import BANDS, PIXEL_SCALE
from sgclassify.stages.flags import InputFlag

QUIET = DetectorModel(
    read_noise=5.0, flat_residual=0.0, gain_residual=0.0, cosmic_rays=0.0, hot_share=0.0, warm_share=0.0,
    bad_columns=0.0,
)  # fmt: skip


def one_source(
    x: float,
    y: float,
    flux: float,
    n: float = np.nan,
    bulge: float = np.nan,
    r: float = 3.0,
    clumpiness: float = 0.0,
) -> Scene:
    shape = np.array([[[r, 0.4 * r], [-0.2 * r, 0.7 * r]]]) * (0.0 if np.isnan(n) else 1.0)
    values = ([x], [y], [flux], [bool(np.isnan(n))], [n], [bulge])
    return Scene(*(np.array(v) for v in values), shape, np.array([clumpiness]), np.array([7]))


def psf_field(family: str, seed: int = 0, shape: tuple[int, int] = (96, 96), band: str = "g") -> PsfField:
    return PsfField(draw_psf(band, (family,), 0.5, 3, np.random.default_rng(seed)), shape)


def elliptical(n: float, radius: float, shape: np.ndarray) -> galsim.GSObject:
    """A Sersic profile of unit flux, stretched by a matrix in pixels."""
    jac = (shape * PIXEL_SCALE).ravel()
    return galsim.Transform(galsim.Sersic(n, half_light_radius=radius), jac=jac).withFlux(1.0)


@pytest.mark.parametrize("family", PSF_FAMILIES)
def test_renderer_equals_galsim(family: str) -> None:
    psf = psf_field(family)
    x, y = 47.3, 48.8
    profile = psf.profile(int(psf.node_at(np.array([x]), np.array([y]))[0]))
    for n, bulge, share in ((np.nan, np.nan, 0.0), (1.0, np.nan, 0.0), (4.0, np.nan, 0.0), (1.5, 0.4, 0.3)):
        source = one_source(x, y, 100.0, n, bulge, clumpiness=share)
        ours = render(source, psf, (96, 96), 1e-4)
        shape = source.shape[0]
        if np.isnan(n):
            theirs = profile
        elif np.isnan(bulge):
            theirs = galsim.Convolve(elliptical(n, 1.0, shape), profile)
        else:
            # the bulge is half way between the disk and a circle: its quadratic form is the mean of theirs
            rounder = np.linalg.cholesky(0.5 * (shape @ shape.T + np.linalg.det(shape) * np.eye(2)))
            smooth = galsim.Sum([
                bulge * elliptical(4.0, 0.6, rounder), (1 - bulge) * elliptical(1.0, 1.15, shape)
            ])  # fmt: skip
            places, widths, shares = clumps(7)
            knots = galsim.Sum([
                galsim.Gaussian(sigma=w * np.sqrt(np.linalg.det(shape)) * PIXEL_SCALE, flux=f)
                .shift(*(shape @ place * PIXEL_SCALE))
                for place, w, f in zip(places, widths, shares, strict=True)
            ])  # fmt: skip
            theirs = galsim.Convolve(galsim.Sum([(1 - share) * smooth, share * knots]), profile)
        theirs = (100.0 * theirs).shift((x - 47.5) * PIXEL_SCALE, (y - 47.5) * PIXEL_SCALE)
        expected = theirs.drawImage(nx=96, ny=96, scale=PIXEL_SCALE, method="no_pixel").array
        assert np.abs(ours - expected).max() < 2e-3 * expected.max()
        assert ours.sum() == pytest.approx(expected.sum(), rel=0.01)


@pytest.mark.parametrize("band", ["NUV", "y"])
def test_psf_width_is_that_of_the_camera(band: str) -> None:
    for seed, family in enumerate(PSF_FAMILIES):
        for quality, low, high in ((0.0, 1.65, 2.4), (1.0, 2.2, 3.0)):
            model = draw_psf(band, (family,), quality, 3, np.random.default_rng(seed))
            assert low < PsfField(model, (64, 64)).fwhm_px() < high


@pytest.mark.parametrize("family", PSF_FAMILIES)
def test_a_telescope_out_of_adjustment_blurs_and_elongates(family: str) -> None:
    model = draw_psf("i", (family,), 0.5, 3, np.random.default_rng(1))
    same = model.strained(1.0)
    assert (same.aberrations == model.aberrations).all()
    assert (same.shear == model.shear).all()
    assert same.trail == 0.0

    def moments(factor: float) -> tuple[float, float]:
        drawn = PsfField(model.strained(factor), (96, 96)).profile(4).drawImage(nx=96, ny=96, scale=PIXEL_SCALE)
        shape = drawn.FindAdaptiveMom()
        return shape.moments_sigma, shape.observed_shape.e

    width, elongation = moments(1.0)
    wider, longer = moments(3.0)
    assert wider > 1.05 * width
    assert longer > elongation + 0.02


def test_only_training_meets_worse_psfs() -> None:
    strains = np.array([field_config("training", 20260, field).psf_strain for field in range(400)])
    strained = strains[strains != 1.0]
    assert 0.14 < len(strained) / 400 < 0.26
    assert STRAINS[0] <= strained.min() < 1.6 < 2.6 < strained.max() <= STRAINS[1]
    for part in ("validation", "calibration", "test", "shifted"):
        assert all(field_config(part, 20260, field).psf_strain == 1.0 for field in range(50))


def test_psf_varies_over_the_detector() -> None:
    psf = psf_field("optical")
    corner, middle = psf.fourier(0, 32), psf.fourier(4, 32)
    assert np.abs(corner - middle).max() > 0.01
    assert psf.node_at(np.array([-5.0, 0, 48, 95, 200]), np.array([0.0, 0, 48, 95, 0])).tolist() == [
        0,
        0,
        4,
        8,
        2,
    ]


@given(x=st.floats(30, 60), y=st.floats(30, 60), family=st.sampled_from(PSF_FAMILIES), seed=st.integers(0, 5))
@settings(max_examples=12, deadline=None)
def test_star_has_its_flux_and_place(x: float, y: float, family: str, seed: int) -> None:
    image = render(one_source(x, y, 1000.0), psf_field(family, seed), (96, 96), 0.05).astype(float)
    assert image.sum() == pytest.approx(1000.0, rel=0.02)
    yy, xx = np.mgrid[:96, :96]
    weight = image * np.exp(-0.5 * ((xx - x) ** 2 + (yy - y) ** 2) / 2.5**2)
    assert abs((weight * xx).sum() / weight.sum() - x) < 0.1
    assert abs((weight * yy).sum() / weight.sum() - y) < 0.1


def test_sources_off_the_edge_shine_in_and_nothing_else_breaks() -> None:
    psf = psf_field("moffat")
    whole = render(one_source(48.0, 48.0, 5000.0), psf, (96, 96), 0.05)
    for x, y in ((-3.0, 10.0), (97.5, 50.0), (20.0, -2.2)):
        image = render(one_source(x, y, 5000.0), psf, (96, 96), 0.05)
        assert 0 < image.sum() < 0.5 * whole.sum()
    assert render(one_source(-4000.0, 10.0, 5000.0), psf, (96, 96), 0.05).sum() == 0
    assert render(one_source(np.nan, np.nan, 5000.0), psf, (96, 96), 0.05).sum() == 0


def test_flux_through_the_detector_is_that_of_the_zero_point() -> None:
    psf = psf_field("optical", seed=1)
    image = render(one_source(48.2, 47.7, 200.0), psf, (96, 96), 0.05)
    level1 = expose(image, 0.2, QUIET, np.random.default_rng(0))
    yy, xx = np.mgrid[:96, :96]
    inside = np.hypot(xx - 48.2, yy - 47.7) < 20
    sky = np.median(level1.image[~inside])
    assert (level1.image[inside] - sky).sum() == pytest.approx(200.0, rel=0.015)
    assert sky == pytest.approx(0.2, abs=0.01)


def test_weight_is_the_inverse_variance_of_the_contract() -> None:
    level1 = expose(np.full((64, 64), 30.0, np.float32), 0.2, DetectorModel(), np.random.default_rng(0))
    ok = level1.flags == 0
    expected = 150.0**2 / (np.maximum(level1.image * 150.0, 0) + 25.0)
    np.testing.assert_allclose(level1.weight[ok], expected[ok], rtol=1e-5)
    assert (level1.weight[~ok] == 0).all()
    quiet = expose(np.full((256, 256), 2.0, np.float32), 0.2, QUIET, np.random.default_rng(0))
    # Counts are whole numbers of 1.1 electrons, which adds 1.1^2 / 12; the dark current adds its own noise.
    expected_sigma = np.sqrt((2.2 + 0.02) * 150 + 25 + 1.1**2 / 12) / 150
    assert quiet.image.std() == pytest.approx(expected_sigma, rel=0.02)
    assert quiet.image.mean() == pytest.approx(2.2, rel=0.005)


def test_flags_mark_the_artefacts() -> None:
    rng = np.random.default_rng(3)
    noisy = DetectorModel(cosmic_rays=20.0, hot_share=2e-3, warm_share=2e-3, bad_columns=20.0, satellite=True)
    level1 = expose(np.zeros((256, 256), np.float32), 0.2, noisy, rng)
    bits = {flag: (level1.flags & flag) > 0 for flag in InputFlag}
    for flag in (
        InputFlag.BAD, InputFlag.HOT, InputFlag.WARM, InputFlag.COSMIC_RAY, InputFlag.SATELLITE,
    ):  # fmt: skip
        assert bits[flag].any()
    assert not bits[InputFlag.SATURATED].any()
    clean = level1.flags == 0
    sky = np.median(level1.image[clean])
    assert np.median(level1.image[bits[InputFlag.HOT] & ~bits[InputFlag.BAD]]) > sky + 0.5
    assert np.median(level1.image[bits[InputFlag.COSMIC_RAY] & ~bits[InputFlag.BAD]]) > sky + 0.1
    assert level1.image[bits[InputFlag.BAD]].max() < 0.3
    assert level1.cosmic_rays > 0


def test_a_bright_star_saturates_and_bleeds_along_its_column() -> None:
    image = render(one_source(48.0, 48.0, 60_000.0), psf_field("moffat"), (96, 96), 0.05)
    level1 = expose(image, 0.2, QUIET, np.random.default_rng(0))
    full = (level1.flags & InputFlag.SATURATED) > 0
    assert full[48, 48]
    rows, columns = full.any(axis=1).sum(), full.any(axis=0).sum()
    assert rows > 1.5 * columns
    assert level1.image.max() == pytest.approx((65_535 - 500) * 1.1 / 150, rel=1e-3)
    assert level1.image[level1.flags == 0].max() < QUIET.saturate


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=40), st.floats(100, 1e5))
@settings(max_examples=60, deadline=None)
def test_bleeding_keeps_charge_and_fills_no_pixel_over_the_brim(column: list[float], full_well: float) -> None:
    electrons = np.array(column, dtype=np.float32)[:, None]
    before = electrons.astype(np.float64).sum()
    _bleed(electrons, full_well)
    assert electrons.max() <= np.float32(full_well) * (1 + 1e-6)
    after = electrons.astype(np.float64).sum()
    assert after <= before * (1 + 1e-5)
    if (electrons < 0.999 * full_well).all():
        assert after == pytest.approx(before, rel=1e-5)


@given(
    chip=st.integers(1, 30), dec=st.floats(-80, 80), ra=st.floats(0, 359.999), roll=st.floats(0, 360),
    mirrored=st.booleans(), distortion=st.sampled_from([0.0, 1e-3]),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_world_coordinates(chip: int, dec: float, ra: float, roll: float, mirrored: bool, distortion: float) -> None:
    pointing = Pointing(chip, (100, 200), ra, dec, roll, mirrored, distortion)
    wcs = WCS(wcs_header(pointing))
    middle = wcs.all_pix2world(99.5, 49.5, 0)
    assert abs((float(middle[0]) - ra + 180) % 360 - 180) * np.cos(np.radians(dec)) < 1e-7
    assert float(middle[1]) == pytest.approx(dec, abs=1e-7)
    x, y = np.array([0.0, 199, 30]), np.array([0.0, 99, 80])
    back = wcs.all_world2pix(*wcs.all_pix2world(x, y, 0), 0)
    np.testing.assert_allclose(back, [x, y], atol=1e-5)
    if distortion:
        flat = WCS(wcs_header(Pointing(chip, (100, 200), ra, dec, roll, mirrored, 0.0)))
        assert np.abs(np.subtract(flat.all_world2pix(*wcs.all_pix2world(x, y, 0), 0), [x, y])).max() > 1e-4
    scale = jacobian(wcs, (100, 200))
    assert abs(np.linalg.det(scale)) == pytest.approx(PIXEL_SCALE**-2, rel=0.01)
    assert (np.linalg.det(scale) > 0) == mirrored


def test_detectors_are_those_of_the_camera() -> None:
    assert set(BANDS) <= set(CHIPS_OF_BAND)
    assert CHIPS_OF_BAND["i"] == (7, 24)
    assert chip_center(19) == (-4875.0, 10130.0)
    assert chip_center(30) == (-4875.0 * 5 - 775.0, 20260.0)
    with pytest.raises(ValueError, match="no detector"):
        chip_center(31)
    header = wcs_header(Pointing(19, (9232, 9216), 10.0, 0.0, 0.0))
    assert (header["CRPIX1"], header["CRPIX2"]) == (4608.5 + 4875, 4616.5 - 10130)


def test_astrometric_error_moves_the_claim_only() -> None:
    header = wcs_header(Pointing(7, (64, 64), 10.0, 60.0, 30.0))
    moved = shifted(header, 0.03, -0.02)
    ra0, dec0 = WCS(header).all_pix2world(31.5, 31.5, 0)
    ra1, dec1 = WCS(moved).all_pix2world(31.5, 31.5, 0)
    assert (ra1 - ra0) * np.cos(np.radians(60.0)) * 3600 == pytest.approx(0.03, abs=2e-3)
    assert (dec1 - dec0) * 3600 == pytest.approx(-0.02, abs=2e-3)
