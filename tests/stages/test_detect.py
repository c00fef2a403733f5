from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from astropy.wcs import WCS
from hypothesis import given, settings
from hypothesis import strategies as st
from photutils.aperture import CircularAperture, aperture_photometry
from photutils.segmentation import detect_sources
from photutils.utils.exceptions import NoDetectionsWarning
from scipy.ndimage import maximum_filter

from sgclassify.stages import deblend as deblending
from sgclassify.stages import detect, photometry
from sgclassify.stages.config import StageConfig
from sgclassify.stages.deblend import deblend
from sgclassify.stages.detect import (
    CATALOG_SCHEMA,
    FLAG_BIASED,
    FLAG_BLENDED,
    FLAG_SATURATED,
    FLAG_TRUNCATED,
    Calibration,
    detect_in_strips,
)
from sgclassify.stages.flags import InputFlag
from sgclassify.stages.photometry import APERTURE_RADII

SIGMA, ZERO_POINT, FWHM = 0.055, 25.96, 2.1
STAR = FWHM / 2.3548


def gaussians(shape: tuple[int, int], sources: list[tuple[float, float, float, float, float, float]]) -> np.ndarray:
    """Noiseless image of Gaussian sources (x, y, flux, major sigma, minor sigma, angle in degrees)."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(float)
    image = np.zeros(shape)
    for x0, y0, flux, a, b, angle in sources:
        cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
        u, v = (x - x0) * cos + (y - y0) * sin, (y - y0) * cos - (x - x0) * sin
        image += flux / (2 * np.pi * a * b) * np.exp(-0.5 * ((u / a) ** 2 + (v / b) ** 2))
    return image.astype(np.float32)


def stars(shape: tuple[int, int], x: np.ndarray, y: np.ndarray, flux: np.ndarray) -> np.ndarray:
    return gaussians(shape, [(a, b, f, STAR, STAR, 0) for a, b, f in zip(x, y, flux, strict=True)])


def noise(shape: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, SIGMA, shape).astype(np.float32)


def sky_wcs() -> WCS:
    wcs = WCS(naxis=2)
    wcs.wcs.ctype = "RA---TAN", "DEC--TAN"
    wcs.wcs.cdelt = -2.0556e-5, 2.0556e-5
    wcs.wcs.crval = 359.9999, 20.0
    wcs.wcs.crpix = 100.5, 80.5
    return wcs


def run(image: np.ndarray, valid: np.ndarray | None = None, **more: Any) -> pa.Table:
    valid = np.ones(image.shape, dtype=bool) if valid is None else valid
    config, sigma, flags = (more.pop(k, v) for k, v in (("config", StageConfig()), ("sigma", SIGMA), ("flags", None)))
    values = {"wcs": sky_wcs(), "zero_point": ZERO_POINT, "fwhm_px": FWHM} | more
    whole = len(image)
    return detect_in_strips(
        lambda y0, y1: (image, valid, sigma, flags), image.shape, Calibration(**values), config, whole
    )


def column(table: pa.Table, name: str) -> np.ndarray:
    return table[name].to_numpy()


def grid_of_stars(shape: tuple[int, int], seed: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Positions on a grid of 60 pixels, each at another place within its pixel."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[30 : shape[0] - 29 : 60, 30 : shape[1] - 29 : 60].astype(float)
    return x.ravel() + rng.uniform(-0.5, 0.5, x.size), y.ravel() + rng.uniform(-0.5, 0.5, y.size)


def test_isolated_stars() -> None:
    shape = (300, 420)
    x, y = grid_of_stars(shape)
    flux = np.geomspace(20, 200, x.size)
    table = run(noise(shape) + stars(shape, x, y, flux))
    assert table.schema == CATALOG_SCHEMA
    bright = column(table, "Flux_Aper1") > 0.3
    table = table.filter(pa.array(bright))
    order = np.lexsort((column(table, "X"), np.round(column(table, "Y") / 60)))
    table = table.take(pa.array(order))
    assert table.num_rows == x.size
    assert np.hypot(column(table, "X") - 1 - x, column(table, "Y") - 1 - y).max() < 0.05
    nanomaggies = flux * 10 ** (0.4 * (22.5 - ZERO_POINT))
    assert np.abs(column(table, "Flux_Aper4") / nanomaggies - 1).max() < 0.1
    assert np.abs(column(table, "Flux_Kron") / nanomaggies - 1).max() < 0.1
    assert np.allclose(column(table, "Mag_Aper4"), 22.5 - 2.5 * np.log10(column(table, "Flux_Aper4")), atol=1e-5)
    assert np.abs(column(table, "FWHM") / FWHM - 1).max() < 0.1
    # Half the light, of the star spread over the area of a pixel.
    assert np.abs(column(table, "R50") / (1.1774 * np.hypot(STAR, 12**-0.5)) - 1).max() < 0.1
    assert np.allclose(column(table, "FluxErr_Aper4"), SIGMA * np.sqrt(np.pi) * 6 * nanomaggies[0] / flux[0], rtol=0.03)
    assert (column(table, "Flag") == 0).all()
    ra, dec = sky_wcs().all_pix2world(column(table, "X"), column(table, "Y"), 1)
    assert np.allclose(column(table, "RA"), ra, atol=1e-12)
    assert np.allclose(column(table, "DEC"), dec, atol=1e-12)


def test_rows_are_numbered_and_in_order_of_y() -> None:
    shape = (200, 200)
    rng = np.random.default_rng(3)
    table = run(noise(shape) + stars(shape, rng.uniform(5, 195, 40), rng.uniform(5, 195, 40), np.full(40, 10.0)))
    assert table.num_rows > 20
    assert np.array_equal(column(table, "objID"), np.arange(1, table.num_rows + 1))
    assert (np.diff(column(table, "Y")) >= 0).all()


def test_pure_noise_has_few_sources() -> None:
    found = [run(noise((700, 700), seed)).num_rows for seed in range(3)]
    # About 5 in 1024x1024 pixels.
    assert sum(found) <= 14


def test_faint_stars_are_found() -> None:
    shape = (480, 480)
    x, y = grid_of_stars(shape)
    # Signal-to-noise ratio of 8 for the best filter, whose noise is sigma * sqrt(4 pi) * star.
    flux = np.full(x.size, 8 * SIGMA * np.sqrt(4 * np.pi) * STAR)
    table = run(noise(shape) + stars(shape, x, y, flux))
    near = np.hypot(column(table, "X")[:, None] - 1 - x, column(table, "Y")[:, None] - 1 - y).min(axis=0)
    assert (near < 1.5).mean() > 0.95
    assert np.median(near) < 0.2


def test_apertures_are_as_exact_overlap() -> None:
    shape = (121, 121)
    image = gaussians(shape, [(60.3, 59.6, 500, 5, 3, 30)])
    table = run(image, sigma=0.01)
    place = (column(table, "X")[0] - 1, column(table, "Y")[0] - 1)
    assert np.hypot(place[0] - 60.3, place[1] - 59.6) < 0.01
    apertures = [CircularAperture(place, radius) for radius in APERTURE_RADII]
    exact = aperture_photometry(image.astype(np.float64), apertures)
    scale = 10 ** (0.4 * (22.5 - ZERO_POINT))
    for k in range(len(APERTURE_RADII)):
        assert column(table, f"Flux_Aper{k + 1}")[0] == pytest.approx(exact[f"aperture_sum_{k}"][0] * scale, rel=5e-3)
    assert column(table, "Flux_Kron")[0] == pytest.approx(500 * scale, rel=0.07)
    # East is towards smaller x: an axis 30 degrees above the x axis points 60 degrees west of north.
    assert column(table, "PA")[0] == pytest.approx(-60, abs=1)
    assert column(table, "A")[0] == pytest.approx(5, rel=0.1)
    assert column(table, "AB")[0] == pytest.approx(column(table, "A")[0] / column(table, "B")[0], rel=1e-5)
    assert column(table, "E")[0] == pytest.approx(1 - 1 / column(table, "AB")[0], abs=1e-5)
    radii = [column(table, name)[0] for name in ("R20", "R50", "R90")]
    assert radii == sorted(radii)
    assert radii[1] == pytest.approx(1.1774 * np.sqrt(15), rel=0.07)


def test_small_radii_of_a_point_source() -> None:
    """A source in one pixel: its light is spread evenly over the pixel, wherever its centre lies."""
    image = np.zeros((101, 101), dtype=np.float32)
    image[50, 50] = 10
    table = run(image, sigma=0.01)
    assert column(table, "R20")[0] == pytest.approx(np.sqrt(0.2 / np.pi), abs=0.08)
    assert column(table, "R50")[0] == pytest.approx(np.sqrt(0.5 / np.pi), abs=0.08)


def test_photon_noise_enters_the_errors() -> None:
    image = gaussians((101, 101), [(50, 50, 1000, STAR, STAR, 0)])
    plain, full = run(image), run(image, exposure_time=150.0)
    scale = 10 ** (0.4 * (22.5 - ZERO_POINT))
    added = column(full, "FluxErr_Aper4")[0] ** 2 - column(plain, "FluxErr_Aper4")[0] ** 2
    assert added == pytest.approx(1000 / 150 * scale**2, rel=0.02)


def test_two_stars_are_told_apart() -> None:
    image = noise((80, 80)) + gaussians((80, 80), [(38, 40, 60, STAR, STAR, 0), (42.6, 40, 30, STAR, STAR, 0)])
    table = run(image).filter(pa.array(column(run(image), "Mag_Aper1") < 24))
    assert table.num_rows == 2
    assert (column(table, "Flag") & FLAG_BLENDED > 0).all()
    assert np.abs(np.sort(column(table, "X")) - [39, 43.6]).max() < 0.25


def test_a_smooth_galaxy_stays_whole() -> None:
    shape = (200, 200)
    galaxies = [(100, 100, 800, 8, 5, 20), (100, 100, 200, 3, 2, 20)]
    for seed in range(3):
        table = run(noise(shape, seed) + gaussians(shape, galaxies))
        assert (np.hypot(column(table, "X") - 101, column(table, "Y") - 101) < 25).sum() == 1


def test_masked_pixels_are_bridged() -> None:
    shape = (120, 120)
    image = noise(shape) + gaussians(shape, [(60, 60, 100, STAR, STAR, 0)])
    valid = np.ones(shape, dtype=bool)
    valid[:, 61] = False
    image[:, 61] = np.nan
    table = run(image, valid)
    near = np.hypot(column(table, "X") - 61, column(table, "Y") - 61) < 2
    assert near.sum() == 1
    assert column(table, "Flag")[near][0] & FLAG_BIASED
    scale = 10 ** (0.4 * (22.5 - ZERO_POINT))
    # The masked column is replaced by the one opposite.
    assert column(table, "Flux_Aper4")[near][0] == pytest.approx(100 * scale, rel=0.1)


def test_rest_of_a_cosmic_ray_is_no_source() -> None:
    image, valid = noise((80, 80)), np.ones((80, 80), dtype=bool)
    image[40, 30:50] += 50
    image[41, 36] += 0.35
    valid[40, 30:50] = False
    table = run(image, valid)
    assert not (np.hypot(column(table, "X") - 38, column(table, "Y") - 42) < 5).any()


def test_saturated_star() -> None:
    shape = (150, 150)
    image = noise(shape) + gaussians(shape, [(70, 80, 3e4, 2, 2, 0)])
    flags = np.where(image > 400, int(InputFlag.SATURATED), 0).astype(np.uint16)
    image = np.minimum(image, 400)
    table = run(image, flags == 0, flags=flags)
    near = np.hypot(column(table, "X") - 71, column(table, "Y") - 81) < 20
    assert near.sum() == 1
    assert column(table, "Flag")[near][0] & FLAG_SATURATED
    assert np.hypot(column(table, "X")[near] - 71, column(table, "Y")[near] - 81)[0] < 0.2
    assert (column(table, "Flag")[~near] & FLAG_SATURATED == 0).all()


def test_star_on_the_edge() -> None:
    image = noise((60, 60)) + gaussians((60, 60), [(0.2, 30, 100, STAR, STAR, 0)])
    table = run(image)
    near = np.hypot(column(table, "X") - 1.2, column(table, "Y") - 31) < 2
    assert column(table, "Flag")[near] & FLAG_TRUNCATED


def test_values_that_do_not_exist_are_null() -> None:
    shape = (150, 150)
    image = noise(shape) + gaussians(shape, [(70, 80, 2, STAR, STAR, 0)])
    image[60:101, 50:91] -= 0.05
    image[79:82, 69:72] += 0.3
    table = run(image)
    k = int(np.argmin(np.hypot(column(table, "X") - 71, column(table, "Y") - 81)))
    assert table["Flux_Aper9"][k].as_py() < 0
    assert table["Mag_Aper9"][k].as_py() is None
    assert table["MagErr_Aper9"][k].as_py() is None
    assert table["FluxErr_Aper9"][k].as_py() > 0
    for name in table.column_names:
        if pa.types.is_floating(table.schema.field(name).type):
            assert np.isfinite(table[name].drop_null().to_numpy()).all()


@pytest.mark.parametrize("kind", ["zeros", "masked", "nan", "no sigma"])
def test_nothing_to_find(kind: str) -> None:
    image, valid, sigma = np.zeros((64, 50), np.float32), np.ones((64, 50), bool), SIGMA
    if kind == "masked":
        image, valid = noise((64, 50)) + 9, ~valid
    if kind == "nan":
        image[:] = np.nan
    if kind == "no sigma":
        image, sigma = noise((64, 50)) + 9, np.nan
    table = run(image, valid, sigma=sigma)
    assert table.num_rows == 0
    assert table.schema == CATALOG_SCHEMA


def test_uneven_noise() -> None:
    """Where the noise is larger, the threshold is: no more false detections than elsewhere."""
    sigma = np.full((400, 400), SIGMA, dtype=np.float32)
    sigma[:, 200:] *= 5
    image = np.random.default_rng(1).normal(0, 1, sigma.shape).astype(np.float32) * sigma
    assert run(image, sigma=sigma).num_rows <= 5


def crowded(shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(12)
    n = 150
    sources = [
        (x, y, f, s, s * q, t)
        for x, y, f, s, q, t in zip(
            rng.uniform(0, shape[1], n), rng.uniform(0, shape[0], n), 3 * rng.pareto(1, n) + 1,
            rng.uniform(STAR, 3, n), rng.uniform(0.4, 1, n), rng.uniform(0, 180, n), strict=True,
        )
    ]  # fmt: skip
    valid = rng.random(shape) > 0.01
    return noise(shape) + gaussians(shape, sources), valid


@pytest.mark.parametrize("strip_rows", [100, 117, 400])
def test_strips_give_what_the_whole_gives(strip_rows: int) -> None:
    shape = (400, 150)
    image, valid = crowded(shape)
    flags = np.zeros(shape, dtype=np.uint16)
    asked = []

    def read(y0: int, y1: int) -> tuple[np.ndarray, np.ndarray, float, np.ndarray]:
        asked.append((y0, y1))
        return image[y0:y1], valid[y0:y1], SIGMA, flags[y0:y1]

    whole = run(image, valid, flags=flags)
    strips = detect_in_strips(read, shape, Calibration(sky_wcs(), ZERO_POINT, FWHM), StageConfig(), strip_rows)
    assert whole.num_rows > 80
    assert strips.num_rows == whole.num_rows
    for name in ("X", "Y", "Flux_Kron", "Flux_Aper12", "R50", "FWHM"):
        assert np.allclose(column(strips, name), column(whole, name), rtol=1e-5, equal_nan=True), name
    assert np.array_equal(column(strips, "Flag"), column(whole, "Flag"))
    assert min(asked)[0] == 0
    assert max(asked)[1] == 400


def test_the_same_again_is_identical() -> None:
    image, valid = crowded((200, 150))
    assert run(image, valid).equals(run(image.copy(), valid))


def test_inputs_are_left_alone_and_any_byte_order_will_do() -> None:
    image, valid = crowded((120, 100))
    before, before_valid = image.copy(), valid.copy()
    table = run(image, valid)
    assert np.array_equal(image, before)
    assert np.array_equal(valid, before_valid)
    assert run(image.astype(">f4"), valid).equals(table)


def test_threshold_and_area_are_taken_from_the_configuration() -> None:
    image, valid = crowded((200, 150))
    few = run(image, valid, config=dataclasses.replace(StageConfig(), detect_threshold_sigma=20.0))
    large = run(image, valid, config=dataclasses.replace(StageConfig(), detect_min_px=40))
    everything = run(image, valid).num_rows
    assert 0 < few.num_rows < everything
    assert 0 < large.num_rows < everything


def test_refuses_what_does_not_fit() -> None:
    image = np.zeros((5, 6), np.float32)
    with pytest.raises(ValueError, match="differ in shape"):
        run(image, np.ones((6, 5), bool))
    with pytest.raises(ValueError, match="strips of 0 rows"):
        detect_in_strips(
            lambda y0, y1: (image, image > 0, 1.0, None),
            (5, 6),
            Calibration(sky_wcs(), 25.0),
            StageConfig(),
            0,
        )


def peaks(*heights: tuple[int, int, float]) -> tuple[np.ndarray, np.ndarray]:
    image = gaussians((40, 60), [(x, y, h * 2 * np.pi * 4, 2, 2, 0) for x, y, h in heights])
    return image, (image > 1).astype(np.int32)


def split(image: np.ndarray, labels: np.ndarray, **more: float) -> np.ndarray:
    values = {"contrast": 0.005, "min_px": 5, "prominence_sigma": 3.0} | more
    return deblend(image, np.full(image.shape, 0.1, np.float32), labels, **values)


def test_deblending_splits_at_the_saddle() -> None:
    image, labels = peaks((20, 20, 100), (29, 20, 40), (38, 20, 100))
    parts = split(image, labels)
    assert sorted(np.unique(parts)) == [0, 1, 2, 3]
    assert np.array_equal(parts > 0, labels > 0)
    assert len({parts[20, 20], parts[20, 29], parts[20, 38]}) == 3
    assert parts[20, 22] == parts[20, 20]


@pytest.mark.parametrize("limit", [{"contrast": 0.5}, {"min_px": 200}, {"prominence_sigma": 1000.0}])
def test_deblending_keeps_lesser_peaks_in(limit: dict[str, float]) -> None:
    image, labels = peaks((20, 20, 100), (28, 20, 20))
    assert split(image, labels).max() == 2
    assert np.array_equal(split(image, labels, **limit), labels)


def test_deblending_leaves_other_segments_alone() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image, labels = peaks((10, 10, 100), (40, 30, 50), (47, 30, 50))
        labels[labels > 0] = 1
        labels[20:][labels[20:] > 0] = 2
        parts = split(image, labels)
        assert parts[10, 10] == 1
        assert {int(parts[30, 40]), int(parts[30, 47])} == {2, 3}
        assert split(image, np.zeros_like(labels)).max() == 0


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(3, 40),
    st.integers(3, 40),
    st.floats(0.2, 0.9),
    st.integers(1, 12),
    st.booleans(),
)
def test_segments_are_those_of_photutils_with_enough_data(
    seed: int, ny: int, nx: int, quantile: float, min_px: int, masked: bool
) -> None:
    rng = np.random.default_rng(seed)
    significance = rng.normal(size=(ny, nx)).astype(np.float32)
    usable = rng.random((ny, nx)) > (0.3 if masked else 0.0)
    significance[rng.random((ny, nx)) < 0.02] = np.nan
    threshold = float(np.nanquantile(significance, quantile))
    config = StageConfig(detect_threshold_sigma=threshold, detect_min_px=min_px, deblend_contrast=1.0)
    _, parents = detect._segment(np.ones_like(significance), significance, usable, config)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NoDetectionsWarning)
        segments = detect_sources(significance, threshold, min_px)
    expected = np.zeros((ny, nx), np.int32)
    for k in [] if segments is None else segments.labels:
        member = segments.data == k
        if np.count_nonzero(member & usable) >= min_px:
            expected[member] = expected.max() + 1
    assert parents.dtype == np.int32
    assert np.array_equal(parents, expected)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 30), st.integers(1, 30), st.integers(1, 200))
def test_peaks_are_the_local_maxima_of_the_image(seed: int, ny: int, nx: int, steps: int) -> None:
    rng = np.random.default_rng(seed)
    # coarse steps make plateaus
    smoothed = np.round(rng.normal(size=(ny, nx)) * steps).astype(np.float32)
    labels = (rng.random((ny, nx)) < 0.5) * rng.integers(1, 4, (ny, nx)).astype(np.int32)
    found = np.zeros((ny, nx), bool)
    found[deblending._peaks(smoothed, labels)] = True
    assert np.array_equal(found, (maximum_filter(smoothed, size=3) == smoothed) & (labels > 0))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 2))
def test_growth_spreads_each_pixel_over_its_width_in_radius(seed: int, n: int) -> None:
    rng, stamp_radius = np.random.default_rng(seed), 42
    side = 2 * stamp_radius + 1
    light = rng.normal(size=(n, side, side)).astype(np.float32)
    x, y = rng.uniform(199.5, 200.5, (2, n))
    # places in the stamps
    u, v = x - np.ceil(x - side / 2), y - np.ceil(y - side / 2)
    axis = np.arange(side)
    dx, dy = (axis - c[:, None] for c in (u, v))
    distance = np.hypot(dx[:, None, :], dy[:, :, None]).astype(np.float32)
    got = photometry._growth(light, distance, x, y, stamp_radius)
    radii = np.arange(got.shape[1]) * 0.125
    for k in range(n):
        flux = np.zeros(radii.size)
        for row in range(side):
            for column in range(side):
                if max(abs(row - stamp_radius), abs(column - stamp_radius)) <= 4:
                    sub = (np.arange(9) + 0.5) / 9 - 0.5
                    places = np.hypot(column + sub[None, :] - u[k], row + sub[:, None] - v[k]).ravel()
                else:
                    places = distance[k, row, column] + np.array([-0.375, -0.125, 0.125, 0.375])
                ring = np.minimum((places * 8).astype(int), radii.size - 1)
                np.add.at(flux, ring, light[k, row, column] / places.size)
        expected = np.concatenate(([0.0], np.cumsum(flux)[:-1]))
        # a radius on the edge of a ring, within rounding, may count on either side of it
        np.testing.assert_allclose(got[k], expected, rtol=0, atol=0.3 * np.abs(light[k]).max())
        assert np.median(np.abs(got[k] - expected)) < 1e-4
