"""Another prior: Bayes' rule by direct computation, tables, and the magnitudes they are read at."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgclassify.stages.bands import BAND_INDEX
from sgclassify.stages.errors import UsageError
from sgclassify.stages.features import FEATURES, FLUX_SOFTENING
from sgclassify.stages.prior import Prior, logit_of, magnitudes, star_probability
from sgclassify.stages.read.prior import read_prior

SHARE = st.floats(1e-4, 1 - 1e-4)
PROBABILITY = st.floats(0.0, 1.0, width=32)


def moved(p_star: float | np.float32, old: float, new: float) -> np.float64:
    """A probability under the prior `old`, as it is under `new`."""
    with np.errstate(divide="ignore"):  # an object that is certain stays so
        logit = np.log(np.float64(p_star)) - np.log1p(-np.float64(p_star))
    return np.float64(star_probability([logit], old, new)[0])


def test_bayes_by_counting() -> None:
    # of 30 stars and 70 galaxies, 24 stars and 14 galaxies look alike: p = 24/38; with twice the stars, 48/62
    old, new = 0.3, 60 / 130
    assert moved(24 / 38, old, new) == pytest.approx(48 / 62, rel=1e-12)


@given(p=PROBABILITY, old=SHARE)
def test_the_own_prior_changes_no_bit(p: float, old: float) -> None:
    assert moved(np.float32(p), old, old).astype(np.float32) == np.float32(p)
    assert np.isnan(star_probability([np.nan], old, old)[0])


@given(p=PROBABILITY, q=PROBABILITY, old=SHARE, new=SHARE, more=SHARE)
def test_monotone_and_inside(p: float, q: float, old: float, new: float, more: float) -> None:
    low, high = sorted((p, q))
    a, b = moved(low, old, new), moved(high, old, new)
    assert a <= b
    few, many = sorted((new, more))
    assert moved(p, old, few) <= moved(p, old, many)
    if 0.0 < low < 1.0:
        assert 0.0 < a < 1.0
    single = a.astype(np.float32)
    assert 0.0 <= single <= 1.0
    assert single + (np.float32(1.0) - single) == np.float32(1.0)


@given(p=st.floats(0.01, 0.99), old=st.floats(0.1, 0.9), new=st.floats(0.1, 0.9))
def test_there_and_back(p: float, old: float, new: float) -> None:
    assert moved(moved(p, old, new), new, old) == pytest.approx(p, abs=1e-9)


@given(logit=st.floats(-80, 80), old=SHARE, new=SHARE, third=SHARE)
def test_a_stored_logit_takes_any_prior_and_back(logit: float, old: float, new: float, third: float) -> None:
    # softmax in single precision, as the network ends
    both = (1.0 / (1.0 + np.exp([[-logit, logit]]))).astype(np.float32)
    stored = logit_of(both)
    assert stored[0] == pytest.approx(logit, rel=1e-6, abs=1e-6)
    assert star_probability(stored, old, old)[0] == pytest.approx(both[0, 0], rel=1e-6)
    # the odds of the prior change the odds of the object, by however much
    odds = np.exp(stored[0]) * (new / (1 - new)) / (old / (1 - old))
    assert star_probability(stored, old, new)[0] == pytest.approx(odds / (1 + odds), rel=1e-9)
    if min(both[0]) > 1e-3:
        p = star_probability(stored, old, new)[0]
        assert moved(p, new, third) == pytest.approx(star_probability(stored, old, third)[0], abs=1e-6)


def test_logit_is_finite_where_a_class_has_no_probability_left() -> None:
    both = np.array([[1.0, 0.0], [0.0, 1.0], [np.nan, np.nan]], dtype=np.float32)
    found = logit_of(both)
    assert np.isfinite(found[:2]).all()
    assert found[0] == -found[1] > 100.0
    assert np.isnan(found[2])


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_table(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"prior{suffix}"
    if suffix == ".csv":
        path.write_text("magnitude,star_fraction\n20,0.8\n24,0.2\n")
    else:
        pq.write_table(pa.table({"star_fraction": [0.8, 0.2], "magnitude": [20.0, 24.0]}), path)
    prior = read_prior(path)
    got = prior.at(np.array([15.0, 20.0, 21.0, 30.0, np.nan]))
    np.testing.assert_allclose(got, [0.8, 0.8, 0.65, 0.2, 0.2])
    assert prior.describe() == {"magnitude": [20.0, 24.0], "star_fraction": [0.8, 0.2]}


def test_one_share_holds_everywhere() -> None:
    np.testing.assert_array_equal(Prior((0.3,)).at(np.array([12.0, np.nan])), [0.3, 0.3])
    assert Prior((0.3,)).as_text() == "0.3"


@pytest.mark.parametrize(
    "text",
    [
        "magnitude,share\n20,0.5\n",
        "magnitude,star_fraction\n20,1.0\n",
        "magnitude,star_fraction\n20,0.5\n20,0.4\n",
        "magnitude,star_fraction\n20,\n",
        "magnitude,star_fraction\n20,many\n",
        "magnitude,star_fraction\n",
        "",
    ],
)
def test_no_prior(tmp_path: Path, text: str) -> None:
    path = tmp_path / "prior.csv"
    path.write_text(text)
    with pytest.raises(UsageError, match=r"prior\.csv"):
        read_prior(path)


def test_magnitude_is_that_of_i_or_else_of_the_next_band_with_a_flux() -> None:
    flux = np.full((4, 7), np.nan)
    used = np.ones((4, 7), dtype=bool)
    flux[0, BAND_INDEX["i"]], flux[0, BAND_INDEX["g"]] = 10.0, 100.0
    flux[1, BAND_INDEX["i"]], flux[1, BAND_INDEX["r"]] = -1.0, 100.0
    flux[2, BAND_INDEX["i"]], flux[2, BAND_INDEX["y"]] = 10.0, 1.0
    used[2, BAND_INDEX["i"]] = False
    features = np.zeros((4, 7, len(FEATURES)), dtype=np.float32)
    features[:, :, FEATURES.index("flux")] = np.arcsinh(flux / FLUX_SOFTENING)
    stamps: Any = type("S", (SimpleNamespace,), {"__len__": lambda self: 4})(features=features, used=used)
    np.testing.assert_allclose(magnitudes(stamps), [20.0, 17.5, 22.5, np.nan], atol=1e-4)
