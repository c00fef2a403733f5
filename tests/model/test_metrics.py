"""Measures of a classifier: known answers, and scikit-learn as an independent oracle."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as oracle

from sgclassify.model.judge import metrics


def draws(seed, n=400, digits=None):
    rng = np.random.default_rng(seed)
    p = rng.beta(0.4, 0.6, n)
    p = np.round(p, digits) if digits else p
    return p, rng.random(n) < p


@given(seed=st.integers(0, 10_000), digits=st.sampled_from([None, 1]))
@settings(max_examples=40, deadline=None)
def test_area_under_the_curve_is_that_of_scikit_learn(seed, digits):
    p, star = draws(seed, digits=digits)
    assert metrics.roc_auc(p, star) == pytest.approx(oracle.roc_auc_score(star, p), abs=1e-12)
    assert metrics.brier(p, star) == pytest.approx(oracle.brier_score_loss(star, p), abs=1e-12)
    inside = np.clip(p, metrics.SMALLEST_P, 1 - metrics.SMALLEST_P)
    assert metrics.cross_entropy(p, star) == pytest.approx(oracle.log_loss(star, inside, labels=[0, 1]), abs=1e-5)


@given(seed=st.integers(0, 10_000), digits=st.sampled_from([None, 1]), level=st.floats(0.05, 0.99))
@settings(max_examples=40, deadline=None)
def test_purity_and_completeness_are_points_of_the_curve(seed, digits, level):
    p, star = draws(seed, digits=digits)
    purity, completeness, _ = oracle.precision_recall_curve(star, p)
    # the strictest threshold that is complete enough; ties go together
    k = np.flatnonzero(completeness >= level - 1e-12).max()
    assert metrics.purity_at_completeness(p, star, level) == pytest.approx(purity[k])
    pure = purity[:-1] >= level
    expected = completeness[:-1][pure].max() if pure.any() else 0.0
    assert metrics.completeness_at_purity(p, star, level) == pytest.approx(expected)


@given(seed=st.integers(0, 10_000), level=st.floats(0.001, 0.5))
@settings(max_examples=40, deadline=None)
def test_true_positives_at_a_share_of_false_ones(seed, level):
    p, star = draws(seed)
    false, true, _ = oracle.roc_curve(star, p, drop_intermediate=False)
    assert metrics.true_positives_at(p, star, level) == pytest.approx(true[false <= level].max())


def test_weights_stand_for_another_class_ratio():
    p = np.array([0.9, 0.8, 0.7, 0.1])
    star = np.array([True, False, True, False])
    assert metrics.purity_at_completeness(p, star, 1.0) == pytest.approx(2 / 3)
    assert metrics.purity_at_completeness(p, star, 1.0, np.where(star, 3.0, 1.0)) == pytest.approx(6 / 7)
    assert metrics.completeness_at_purity(p, star, 0.85, np.where(star, 3.0, 1.0)) == 1.0


def test_calibration_error_of_known_bins():
    p = np.repeat([0.2, 0.6], 50)
    star = np.concatenate([np.arange(50) < 15, np.arange(50) < 30])
    assert metrics.ece(p, star, bins=2) == pytest.approx(0.5 * 0.1 + 0.5 * 0.0)


@given(seed=st.integers(0, 1000))
@settings(max_examples=15, deadline=None)
def test_exact_probabilities_have_only_the_error_of_noise(seed):
    p, star = draws(seed, n=3000)
    noise = metrics.expected_ece(p)
    assert metrics.ece(p, star) < 2.5 * noise
    assert metrics.ece(np.clip(p + 0.2, 0, 1), star) > 3 * noise


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_calibration_error_does_not_depend_on_the_order_of_the_rows(seed):
    # half of the objects have one and the same probability, as those that a method knows nothing of
    p, star = draws(seed)
    p[::2] = 0.4
    order = np.random.default_rng(seed).permutation(len(p))
    stars_first = np.argsort(~star, kind="stable")
    expected = metrics.ece(p, star)
    for index in (order, stars_first):
        assert metrics.ece(p[index], star[index]) == pytest.approx(expected, abs=1e-12)


def test_one_class_and_nothing_have_no_figures():
    p, star = np.array([0.2, 0.7]), np.array([True, True])
    for found in (
        metrics.roc_auc(p, star),
        metrics.purity_at_completeness(p, star, 0.9),
        metrics.completeness_at_purity(p, star, 0.9),
        metrics.true_positives_at(p, star, 0.01),
        metrics.ece(p[:0], star[:0]),
        metrics.brier(p[:0], star[:0]),
    ):
        assert np.isnan(found)


def test_interval_over_fields_is_wider_when_fields_differ():
    rng = np.random.default_rng(3)
    field = np.repeat(np.arange(20), 50)
    alike = (rng.random(1000) < 0.2).astype(float)
    different = (rng.random(1000) < np.repeat(rng.choice([0.0, 0.4], 20), 50)).astype(float)

    def width(x):
        low, high = metrics.bootstrap_interval(lambda k: float(x[k].mean()), field)
        assert low <= x.mean() <= high
        return high - low

    assert width(alike) == pytest.approx(2 * 1.96 * np.sqrt(0.16 / 1000), rel=0.4)
    assert width(different) > 2 * width(alike)
