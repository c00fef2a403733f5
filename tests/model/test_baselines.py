"""Classical methods on catalogues whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from sgclassify.model.baselines import Baselines, Measured, class_star
from sgclassify.model.dataset import CATALOG_COLUMNS
from sgclassify.stages.errors import UsageError
from sgclassify.stages.measure import FEATURES


def measured(n, seed, found=1.0):
    """Half stars; SExtractor's numbers separate the classes with some noise, in two bands."""
    rng = np.random.default_rng(seed)
    star = rng.random(n) < 0.5
    catalog = np.full((n, 7, len(CATALOG_COLUMNS)), np.nan, np.float32)

    def put(name, values):
        catalog[:, 3:5, CATALOG_COLUMNS.index(name)] = values

    noise = rng.normal(0, 0.05, (n, 2))
    put("Mag_Kron", rng.uniform(20, 25, n)[:, None])
    put("MagErr_Kron", 0.02)
    put("Mag_Model", catalog[:, 3:5, CATALOG_COLUMNS.index("Mag_Kron")])
    put("MagErr_Model", 0.02)
    put("Class_Star", np.where(star, 0.9, 0.1)[:, None] + noise)
    put("Spread_Model", np.where(star, 0.0, 0.01)[:, None] + 0.03 * noise)
    put("SpreadErr_Model", 0.001)
    put(
        "Mag_PSF",
        catalog[:, 3:5, CATALOG_COLUMNS.index("Mag_Kron")] + np.where(star, 0, 0.3)[:, None] + noise,
    )
    put("Mag_Aper1", 23.0 + np.where(star, 0.0, 0.2)[:, None] + noise)
    put("MagErr_Aper1", 0.02)
    put("Mag_Aper3", 22.8)
    put("MagErr_Aper3", 0.02)
    catalog[rng.random(n) > found] = np.nan
    features = rng.normal(0, 1, (n, 7, len(FEATURES))).astype(np.float32)
    features[:, 2, 5] += 4 * star
    return Measured(catalog, features, star)


def test_every_method_learns_what_separates_the_classes():
    test = measured(500, 2)
    found = Baselines(measured(800, 1), 0.5).probabilities(test)
    assert set(found) == {
        "class_star_raw", "class_star", "spread_model", "concentration", "psf_minus_total", "trees_catalog",
        "trees_features",
    }  # fmt: skip
    for name, p in found.items():
        assert p.shape == (500,)
        assert ((p >= 0.5) == test.star).mean() > 0.9, name


def test_what_sextractor_did_not_find_gets_the_prior():
    test = measured(300, 4, found=0.5)
    found = Baselines(measured(800, 3), 0.3).probabilities(test)
    lost = ~test.covered
    assert 100 < lost.sum() < 200
    for name, p in found.items():
        if name != "trees_features":
            np.testing.assert_array_equal(p[lost], 0.3)


def test_the_prior_moves_the_probabilities():
    training, test = measured(800, 1), measured(500, 2)
    few, many = (
        Baselines(training, prior).probabilities(test)["concentration"].mean() for prior in (0.1, 0.9)
    )
    assert few < many


def test_class_star_is_a_mean_over_the_bands_by_their_errors():
    m = measured(1, 0)
    m.catalog[0, :, CATALOG_COLUMNS.index("Class_Star")] = [np.nan, np.nan, np.nan, 1.0, 0.0, np.nan, np.nan]
    m.catalog[0, :, CATALOG_COLUMNS.index("MagErr_Kron")] = [np.nan, np.nan, np.nan, 0.1, 0.2, np.nan, np.nan]
    assert class_star(m)[0] == pytest.approx(0.8)


def test_too_few_objects_are_refused():
    with pytest.raises(UsageError, match="too few"):
        Baselines(measured(50, 0), 0.5)
