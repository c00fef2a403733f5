from __future__ import annotations

import pytest

from sgclassify.stages.config import StageConfig
from sgclassify.stages.prepare import prepare_exposure
from sgclassify.stages.read.header import read_header


@pytest.mark.parametrize(("shift", "noted"), [(0.0, False), (0.3, False), (-1.0, True)])
def test_positions_that_count_pixels_otherwise_are_noted(make_exposure, make_columns, tmp_path, shift, noted):
    columns = make_columns(30)
    columns["X"] = columns["X"] + shift
    columns["Y"] = columns["Y"] + shift
    prepared = prepare_exposure(read_header(make_exposure(columns=columns)), tmp_path, StageConfig())
    assert prepared.n_usable == 30
    assert any("1-based" in note for note in prepared.notes) == noted
