"""The oracle knows stars from galaxies as far as the pixels tell them apart."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("galsim")

from sgclassify.simulation.oracle import log_ratios
from sgclassify.simulation.simulate import SimulationConfig, replay, simulate_field
from sgclassify.stages.bands import BAND_INDEX, BANDS

CONFIG = SimulationConfig(
    seed=3, detector_shape=(200, 200), bands=("g", "r", "i"), star_fraction=(0.5, 0.5), density=(1.5, 1.5)
)
EVERY = np.ones((1, len(BANDS)), dtype=bool)


@pytest.fixture(scope="module")
def sources():
    return replay(CONFIG, 4)[1]


def test_clear_cases_are_clear(sources):
    mag = sources.mags[:, BAND_INDEX["i"]]
    single = sources.system < 0
    stars = np.flatnonzero((sources.kind == "star") & single & (mag < 23.0))[:8]
    galaxies = np.flatnonzero((sources.kind == "galaxy") & (sources.r50 > 0.2) & (mag < 23.5))[:8]
    assert len(stars) >= 3
    assert len(galaxies) >= 3
    ratio = log_ratios(CONFIG, 4, mag[np.r_[stars, galaxies]], np.repeat(EVERY, len(stars) + len(galaxies), 0))
    assert (ratio[: len(stars)] > 1.0).all()
    assert (ratio[len(stars) :] < -10.0).all()


def test_what_is_not_there_has_no_answer(sources):
    mag = sources.mags[:1, BAND_INDEX["i"]]
    assert np.isnan(log_ratios(CONFIG, 4, mag + 0.5, EVERY)).all()
    # no band, no evidence
    nothing = log_ratios(CONFIG, 4, mag, np.zeros_like(EVERY))
    assert nothing == pytest.approx(0.0, abs=1e-9)


def test_the_same_again_and_more_from_more_bands(sources):
    mag = sources.mags[:, BAND_INDEX["i"]]
    few = np.flatnonzero((sources.kind == "galaxy") & (sources.r50 > 0.2) & (mag < 24.5))[:8]
    every = np.repeat(EVERY, len(few), 0)
    three = log_ratios(CONFIG, 4, mag[few], every)
    np.testing.assert_array_equal(three, log_ratios(CONFIG, 4, mag[few], every))
    alone = every.copy()
    alone[:, [BAND_INDEX["g"], BAND_INDEX["r"]]] = False
    assert three.sum() < log_ratios(CONFIG, 4, mag[few], alone).sum()


def test_a_field_is_replayed_as_it_was_made(tmp_path, sources):
    import pyarrow.parquet as pq
    from astropy.io import fits

    result = simulate_field(CONFIG, 4, tmp_path)
    truth = pq.read_table(result.truth)
    np.testing.assert_array_equal(truth["mag_i"].to_numpy(), sources.mags[:, BAND_INDEX["i"]])
    for path, taken in zip(result.images, replay(CONFIG, 4)[2], strict=True):
        header = fits.getheader(path, 1)
        assert header["FILTER"] == taken.band
        assert header["ZP"] == pytest.approx(taken.claimed_zero_point)
        assert header["CRVAL1"] == pytest.approx(taken.header["CRVAL1"])
