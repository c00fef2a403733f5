"""Figures of a run against truth."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from astropy.table import Table
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest

from sgclassify.model.cli import evaluate as evaluate_command
from sgclassify.model.judge.evaluate import evaluate
from sgclassify.model.judge.metrics import recall
from sgclassify.model.judge.results import MODEL
from sgclassify.model.judge.scores import scores_of_run
from sgclassify.stages.bands import BANDS


@given(n=st.integers(1, 400), share=st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_interval_is_clopper_pearson(n, share):
    right = round(share * n)
    found = recall(right, n)
    expected = binomtest(right, n).proportion_ci(0.95, method="exact")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert found.share == right / n


@pytest.fixture
def run(tmp_path):
    """Eight objects: stars 0-2 (one called a galaxy), galaxies 3-6 (one not scored), a quasar."""
    ra = 10 + np.arange(8) / 1000
    p_star = [0.9, 0.8, 0.2, 0.1, 0.2, 0.4, None, 0.95]
    magnitude = np.array([19.0, 21.0, 21.0, 19.0, 21.0, 21.0, 21.0, 21.0])
    folder = tmp_path / "run" / "objects" / "dataset" / "Norder=10" / "Dir=0"
    folder.mkdir(parents=True)
    objects = pa.table(
        {
            "ra": ra,
            "dec": np.zeros(8),
            "p_star": pa.array(p_star, pa.float32()),
            "p_galaxy": pa.array([None if p is None else 1 - p for p in p_star], pa.float32()),
            "sg_flags": pa.array([0] * 8, pa.int32()),
            "n_bands": pa.array([7] * 8, pa.int8()),
        }
    )
    pq.write_table(objects, folder / "Npix=1.parquet")
    truth = pa.table(
        {
            "ra": ra[::-1],
            "dec": np.zeros(8),
            "true_class": ["qso"] + ["galaxy"] * 4 + ["star"] * 3,
            "blended": [False] * 6 + [True, False],
            # as another simulator may count them: not what was scored
            "n_bands": [1] * 8,
        }
        | {f"mag_{band}": magnitude[::-1] for band in BANDS}
    )
    pq.write_table(truth, tmp_path / "truth.parquet")
    return tmp_path / "run", tmp_path / "truth.parquet"


def judged(run, edges, unblended=False):
    return evaluate(scores_of_run(*run), "i", edges, unblended).methods[MODEL]


def test_recall_by_magnitude(run):
    found = judged(run, (18.0, 20.0, 22.0))
    whole, (bright, faint) = found.overall, (row.figures for row in found.by_magnitude)
    assert (whole.star.right, whole.star.n) == (2, 3)
    # what was not scored is in neither number
    assert (whole.galaxy.right, whole.galaxy.n) == (3, 3)
    assert (bright.star.n, faint.star.n) == (1, 2)
    assert faint.star.share == 0.5


def test_bands_are_those_of_the_products(run):
    table = scores_of_run(*run)
    assert table["n_bands"].to_pylist() == [7] * 8


def test_blended_objects_can_be_left_out(run):
    assert judged(run, (18.0, 22.0), unblended=True).overall.star.n == 2


def test_command_prints_a_table_and_names_what_is_missing(run, tmp_path):
    done = CliRunner().invoke(
        evaluate_command, ["--run", str(run[0]), "--truth", str(run[1]), "--json", str(tmp_path / "x.json")]
    )
    assert done.exit_code == 0, done.output
    assert "66.67 %" in done.output
    assert (tmp_path / "x.json").is_file()
    wrong = CliRunner().invoke(evaluate_command, ["--run", str(tmp_path), "--truth", str(run[1])])
    assert wrong.exit_code != 0
    assert "no object catalogue" in wrong.output


@pytest.fixture
def bare(run):
    """Function (format, edit) that writes the truth of the run, of three columns, in a format; gives arguments."""

    def write(kind="fits", edit=lambda table: None):
        folder, truth = run
        table = Table(pq.read_table(truth, columns=["ra", "dec", "true_class"]).to_pydict())
        edit(table)
        path = truth.with_name("bare")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table.write(path, format=kind, overwrite=True)
        return ["--run", str(folder), "--truth", str(path)]

    return write


@pytest.mark.parametrize("kind", ["fits", "ascii.csv", "ascii.ecsv", "votable", "parquet"])
def test_truth_needs_no_more_than_positions_and_classes(bare, tmp_path, kind):
    written = ["--json", str(tmp_path / "x.json"), "--report", str(tmp_path / "x.html")]
    done = CliRunner().invoke(evaluate_command, bare(kind) + written)
    assert done.exit_code == 0, done.output
    # the same six objects are judged as with magnitudes
    assert "6 objects, 3 of them stars" in done.output
    assert "66.67 %" in done.output
    for told in (
        "no mag_i in the truth: no bins by magnitude",
        "no redshift of galaxies in the truth",
        "no r50_arcsec of galaxies in the truth",
        "no blended in the truth: sg_flags tell what is blended",
    ):
        assert told in done.output
    assert "18.0" not in done.output
    found = json.loads((tmp_path / "x.json").read_text())
    model = found["methods"][MODEL]
    assert model["by_magnitude"] == model["by"]["redshift"] == model["by"]["r50_arcsec"] == []
    assert model["overall"]["galaxy"]["n"] == 3
    assert len(found["left_out"]) == 4
    page = (tmp_path / "x.html").read_text()
    assert "no mag_i in the truth" in page
    assert "Errors by magnitude" not in page


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["--unblended", "--edges", "10,12"], 0, "6 objects, 3 of them stars, in 1 fields, not blended"),
        (["--band", "g"], 0, "no mag_g in the truth"),
        (["--paper"], 1, "no signal-to-noise ratios"),
        (["--min-snr", "5"], 1, "no signal-to-noise ratios"),
    ],
    ids=str,
)
def test_options_where_truth_is_bare(bare, arguments, code, told):
    done = CliRunner().invoke(evaluate_command, bare() + arguments)
    assert done.exit_code == code, done.output
    assert told in done.output


def _other_range(table):
    table["ra"] -= 360.0


def _magnitudes_of_another_band(table):
    table["mag_g"] = 20.0


def _magnitudes_of_some(table):
    table["mag_i"] = [20.0, 20.0, np.nan] + [20.0] * 5


def _another_class(table):
    table["true_class"] = [*table["true_class"][:6], "AGN", "star"]


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (_other_range, "6 objects, 3 of them stars"),
        (_magnitudes_of_another_band, "there are magnitudes of g: --band"),
        (_magnitudes_of_some, "1 objects have no mag_i: they are in no figure"),
        (_another_class, "1 objects of true_class agn are in no figure"),
    ],
)
def test_what_is_odd_in_truth_is_said(bare, edit, told):
    done = CliRunner().invoke(evaluate_command, bare("fits", edit))
    assert done.exit_code == 0, done.output
    assert told in done.output


def test_a_band_that_is_asked_for_must_be_there(bare):
    done = CliRunner().invoke(evaluate_command, [*bare("fits", _magnitudes_of_another_band), "--band", "i"])
    assert done.exit_code == 2
    assert "no column mag_i; there are mag_g" in done.output


def test_truth_of_another_field_says_what_is_wanted(bare):
    def away(table):
        table["ra"] /= 15

    done = CliRunner().invoke(evaluate_command, bare("fits", away))
    assert done.exit_code == 1
    assert "bare: no object of" in done.output
    assert "ra and dec in degrees" in done.output
