"""When a stage of a model is certain, against a computation object by object."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sgclassify.stages.cascade import Certainty, Stage, brightness
from sgclassify.stages.columns import OBJECT_COLUMNS
from sgclassify.stages.features import FEATURES

NUMBERS = st.floats(-12.0, 12.0)


@given(
    objects=st.lists(st.tuples(NUMBERS, NUMBERS, st.floats(-3.0, 4.0)), min_size=1, max_size=20),
    level=st.floats(-2.0, 2.0),
    slope=st.floats(-0.5, 0.5),
)
def test_a_stage_is_certain_under_both_priors(
    objects: list[tuple[float, float, float]], level: float, slope: float
) -> None:
    logit, shift, bright = (np.array(values) for values in zip(*objects, strict=True))
    expected = []
    for own, more, bright_one in objects:
        least = float(np.exp(level + slope * bright_one))
        star = own >= least and own + more >= least
        galaxy = own <= -least and own + more <= -least
        expected.append(star or galaxy)
    assert Certainty(level, slope).settled(logit, shift, bright).tolist() == expected


def test_no_number_is_never_certain() -> None:
    nothing, zero = np.array([np.nan]), np.zeros(1)
    assert not Certainty(-9.0, 0.0).settled(nothing, zero, zero).any()


def test_brightness_is_that_of_the_best_band() -> None:
    snr = [[1.0, 10.0, np.nan], [np.nan] * 3, [-4.0, -1.0, -2.0], [1e4, 2.0, 1.0]]
    features = np.full((4, 7, len(FEATURES)), np.nan, dtype=np.float32)
    features[:, :3, FEATURES.index("snr")] = np.arcsinh(snr)
    expected = [math.asinh(10.0) - 3.0, -3.0, -3.0, 4.0]
    assert brightness(features) == pytest.approx(expected, abs=1e-6)


def test_the_column_explains_its_values() -> None:
    (column,) = (column for column in OBJECT_COLUMNS if column.name == "sg_stage")
    assert [int(stage) for stage in Stage] == [0, 1, 2, 3]
    for stage in Stage:
        assert f"{int(stage)} {stage.meaning}" in column.description
