"""Counts, shapes and colours of the simulated sky."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("skypy")

from sgclassify.simulation.galaxy_pool import galaxy_pool, igm_dimming, quasar_pool
from sgclassify.simulation.sky import (
    CLASSIFIED_I,
    I_BAND,
    LOCUS,
    SkyModel,
    Sources,
    blended,
    draw_sources,
    galaxy_density,
    truth_table,
)


def model(**changes: float) -> SkyModel:
    values: dict[str, float] = {
        "ra": 359.99, "dec": 60.0, "radius_arcsec": 300.0, "mag_limit_i": 27.0, "star_fraction": 0.25,
        "binary_fraction": 0.08, "quasar_fraction": 0.008, "ebv": 0.0,
    }  # fmt: skip
    return SkyModel(**(values | changes))


@pytest.fixture(scope="module")
def sources() -> Sources:
    return draw_sources(model(), np.random.default_rng(1))


def test_counts_follow_the_models(sources: Sources) -> None:
    area = np.pi * 25.0
    galaxy, mag = sources.kind == "galaxy", sources.mags[:, I_BAND]
    for limit in (24.0, 25.0, 26.0, 27.0):
        expected = galaxy_density(limit) * area
        assert abs((galaxy & (mag < limit)).sum() - expected) < 4 * np.sqrt(expected) + 0.02 * expected
    single = (sources.kind == "star") & ~((sources.system >= 0) & (sources.system != np.arange(len(sources))))
    stars, galaxies = (single & (mag < CLASSIFIED_I)).sum(), (galaxy & (mag < CLASSIFIED_I)).sum()
    assert stars / (stars + galaxies) == pytest.approx(0.25, abs=0.02)
    expected = 0.008 * (stars + galaxies)
    assert abs((sources.kind == "qso").sum() - expected) < 4 * np.sqrt(expected)


def test_shapes_follow_the_models(sources: Sources) -> None:
    galaxy = sources.kind == "galaxy"
    r50, mag = sources.r50[galaxy], sources.mags[galaxy, I_BAND]
    faint = (mag > 24.5) & (mag < 25.5)
    assert np.median(np.log10(r50[faint])) == pytest.approx(-0.53 - 0.125 * 2, abs=0.03)
    assert 0.005 < (r50[mag < 24] < 0.08).mean() < 0.06
    for quantile, value in ((0.16, 0.73), (0.5, 1.42), (0.84, 4.4)):
        assert np.quantile(sources.sersic_n[galaxy], quantile) == pytest.approx(value, rel=0.15)
    for quantile, value in ((0.05, 0.25), (0.5, 0.56), (0.95, 0.90)):
        assert np.quantile(sources.axis_ratio[galaxy], quantile) == pytest.approx(value, abs=0.03)
    assert np.isnan(sources.r50[~galaxy]).all()


def test_stars_lie_on_the_locus(sources: Sources) -> None:
    colors = -np.diff(sources.mags[sources.kind == "star"], axis=1)
    colors = colors[:, [2, 3, 4, 5]]
    steps = np.linspace(0, len(LOCUS) - 1, 400)
    line = np.stack([np.interp(steps, np.arange(len(LOCUS)), LOCUS[:, k]) for k in (2, 3, 4, 5)], 1)
    distance = np.linalg.norm(colors[:, None] - line, axis=2).min(axis=1)
    assert np.median(distance) < 0.06
    assert (distance < 0.15).mean() > 0.95


def test_positions_fill_the_disk_and_wrap(sources: Sources) -> None:
    east = ((sources.ra - 359.99 + 180) % 360 - 180) * np.cos(np.radians(sources.dec)) * 3600
    north = (sources.dec - 60.0) * 3600
    radius = np.hypot(east, north)
    assert radius.max() < 302.0
    assert np.median(radius) == pytest.approx(300 / np.sqrt(2), rel=0.03)
    assert ((sources.ra >= 0) & (sources.ra < 360)).all()


def test_binaries_are_close_pairs(sources: Sources) -> None:
    pair = np.flatnonzero(sources.system >= 0)
    companions = pair[sources.system[pair] != pair]
    assert len(companions) == len(pair) / 2
    primaries = sources.system[companions]
    east = (sources.ra[companions] - sources.ra[primaries] + 180) % 360 - 180
    east *= np.cos(np.radians(60.0)) * 3600
    north = (sources.dec[companions] - sources.dec[primaries]) * 3600
    np.testing.assert_allclose(np.hypot(east, north), sources.separation[companions], rtol=0.01)
    assert ((sources.separation[companions] >= 0.05) & (sources.separation[companions] <= 0.3)).all()
    assert (sources.mags[companions, I_BAND] >= sources.mags[primaries, I_BAND]).all()
    assert blended(sources)[companions].mean() > 0.95


def test_reddening_dims_the_blue_most() -> None:
    clear = draw_sources(model(radius_arcsec=60.0), np.random.default_rng(2))
    dusty = draw_sources(model(radius_arcsec=60.0, ebv=0.1), np.random.default_rng(2))
    dimming = (dusty.mags - clear.mags).mean(axis=0)
    assert (np.diff(dimming) < 0).all()
    assert dimming[3] == pytest.approx(0.26, abs=0.01)


def test_an_empty_sky_is_legal() -> None:
    empty = draw_sources(model(radius_arcsec=1e-3, star_fraction=0.0), np.random.default_rng(3))
    assert len(empty) == 0
    assert truth_table(empty, 3).num_rows == 0


def test_pool_gives_the_wanted_magnitude() -> None:
    wanted = np.linspace(17.0, 27.0, 200)
    for pool, window in ((galaxy_pool(), 60), (quasar_pool(), 2000)):
        redshift, mags = pool.draw(wanted, np.random.default_rng(4), window)
        np.testing.assert_allclose(mags[:, I_BAND], wanted)
        assert np.isfinite(mags).all()
        assert ((redshift > 0) & (redshift < 3)).all()
    bright, _ = galaxy_pool().draw(np.full(500, 21.0), np.random.default_rng(4))
    faint, _ = galaxy_pool().draw(np.full(500, 26.0), np.random.default_rng(4))
    assert np.median(bright) < 0.8 < np.median(faint)


def test_pool_leaves_the_global_generator_alone() -> None:
    np.random.seed(7)  # noqa: NPY002
    expected = np.random.random()  # noqa: NPY002
    np.random.seed(7)  # noqa: NPY002
    galaxy_pool.cache_clear()
    galaxy_pool()
    assert np.random.random() == expected  # noqa: NPY002


def test_the_forest_dims_only_blueward_of_lyman_alpha() -> None:
    dimming = igm_dimming(np.array([[0.5], [2.5]]), np.array([2915.0, 3633.0, 4790.0]))
    assert (dimming[0] == 0).all()
    assert 0 < dimming[1, 0] < dimming[1, 1] < 0.5
    assert dimming[1, 2] == 0
