"""Figures of a data set, with bands hidden, in bins, beside other methods, and the page that shows them."""

from __future__ import annotations

import html
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from sgclassify.model.cli import evaluate as command
from sgclassify.model.data.shards import CATALOG_COLUMNS, read_shard, write_shard
from sgclassify.model.judge.evaluate import BINNINGS, PAPER_GALAXIES, PAPER_STARS, Judged, evaluate
from sgclassify.model.judge.results import MODEL, as_text, plain
from sgclassify.model.judge.robustness import by_bands, by_symmetry
from sgclassify.model.judge.scores import scores_of_part, shards_of
from sgclassify.model.serve import runtime
from sgclassify.stages.bands import BANDS
from sgclassify.stages.errors import UsageError
from sgclassify.stages.features import FEATURES

SIZE = 8
EDGES = (18.0, 22.0, 26.0)
CONTRACT = SimpleNamespace(prior_star_fraction=0.25, stamp_size=SIZE)


def answering(score):
    """A classifier with these probabilities of being a star."""

    def probabilities(*arrays):
        p_star = score(*arrays)
        return np.stack([p_star, 1 - p_star], axis=1)

    return SimpleNamespace(contract=CONTRACT, probabilities=probabilities, cascade=None)


def table_of(n, seed):
    """Objects whose every property is known; every tenth is a quasar, every seventh spurious."""
    rng = np.random.default_rng(seed)
    kind = np.where(rng.random(n) < 0.4, "star", "galaxy").astype(object)
    kind[::10], kind[::7] = "qso", "spurious"
    galaxy = kind == "galaxy"
    snr = rng.uniform(1, 100, (n, len(BANDS))).astype(np.float32)
    return pa.table(
        {
            "field": np.full(n, seed, np.int32),
            "object_id": np.arange(n, dtype=np.int64) + 1000 * seed,
            "sg_flags": np.zeros(n, np.int32),
            "n_bands": np.full(n, 7, np.int8),
            "snr": pa.FixedSizeListArray.from_arrays(snr.ravel(), len(BANDS)),
            "star_density": np.full(n, 2.0 + 5 * seed),
            "roll_deg": np.full(n, 100.0 * seed),
            "true_class": kind.tolist(),
            "redshift": np.where(galaxy, rng.uniform(0.1, 3, n), 0.0),
            "r50_arcsec": np.where(galaxy, rng.uniform(0.03, 0.6, n), 0.0),
            "blended": rng.random(n) < 0.3,
        }
        | {f"mag_{band}": rng.uniform(18, 26, n) for band in BANDS}
    )


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Two fields, and a model that knows the class wherever three bands or more are there; one object has none."""
    for seed in (1, 2):
        table = table_of(80, seed)
        n = table.num_rows
        star = np.array(table["true_class"].to_pylist()) == "star"
        features = np.zeros((n, len(BANDS), len(FEATURES)), np.float32)
        features[:, :, 0] = star[:, None]
        features[:, :, 1] = np.arange(n)[:, None]
        valid = np.ones((n, len(BANDS), SIZE, SIZE), bool)
        valid[1] = False
        valid[2, :3] = False
        arrays = {
            "image": np.random.default_rng(seed).normal(size=valid.shape).astype(np.float16),
            "valid": valid, "sigma": np.ones((n, len(BANDS)), np.float32), "features": features,
            "psf": np.ones(valid.shape, np.float16),
            "catalog": np.full((n, len(BANDS), len(CATALOG_COLUMNS)), np.nan, np.float32),
        }  # fmt: skip
        path = tmp_path / "validation" / f"field{seed:05d}.parquet"
        path.parent.mkdir(exist_ok=True)
        write_shard(path, table, arrays)

    def score(image, valid, sigma, features, psf):
        there = valid.any(axis=(2, 3))
        # what is hidden is hidden everywhere
        assert not image[~valid].any()
        star = np.nanmax(np.where(there[:, :, None], features, 0)[:, :, 0], axis=1) > 0.5
        return np.where((there.sum(axis=1) >= 3) == star, 0.9, 0.1).astype(np.float32)

    monkeypatch.setattr(runtime, "load", lambda path: answering(score))
    return tmp_path


def test_differences_between_the_symmetries(data, monkeypatch):
    # what an object is called depends on the field alone, how surely on the orientation: on pixel [0, 0]
    def score(image, valid, sigma, features, psf):
        star = np.nanmax(features[:, :, 0], axis=1) > 0.5
        p = 0.9 + 0.001 * image[:, 3, 0, 0]
        return np.where(valid.any(axis=(1, 2, 3)), np.where(star, p, 1 - p), np.nan)

    monkeypatch.setattr(runtime, "load", lambda path: answering(score))
    found = by_symmetry(data, "validation", None)
    corners, n = [], 0
    for path in sorted((data / "validation").glob("*.parquet")):
        sample = read_shard(path, ("star", "galaxy"))
        seen = sample.valid.any(axis=(1, 2, 3))
        image = np.where(sample.valid, sample.image.astype(float), 0)[seen, 3]
        corners.append(image[:, [0, 0, -1, -1], [0, -1, 0, -1]])
        n += seen.sum()
    spread = 0.001 * np.ptp(np.concatenate(corners), axis=1)
    assert found.n == n
    assert found.median == pytest.approx(np.median(spread), rel=1e-3)
    assert found.largest == pytest.approx(spread.max(), rel=1e-3)
    assert found.error == found.error_of_mean == 0.0
    assert by_symmetry(data, "validation", None, most=6).n <= 6
    # nearly all are called stars: what is wrong are the galaxies
    certain = by_symmetry(data, "validation", None, 0.999_999)
    assert certain.median < 1e-4 < found.median
    assert 0.0 < certain.error == certain.error_of_mean < 1.0


def test_another_prior_can_be_assumed(data, monkeypatch):
    plain = scores_of_part(data, "validation", None)["p_star"].to_numpy(zero_copy_only=False)
    moved = scores_of_part(data, "validation", None, 0.5)["p_star"].to_numpy(zero_copy_only=False)
    known = np.isfinite(plain)
    assert known.any()
    # odds of 1 to 3 become 1 to 1: three times the odds
    odds = 3.0 * plain[known] / (1.0 - plain[known])
    np.testing.assert_allclose(moved[known], odds / (1.0 + odds), rtol=1e-6)
    assert np.isnan(moved[~known]).all()
    # a prior that leaves no doubt decides everything
    certain = by_bands(data, "validation", None, 0.999_999, draws=1)
    assert certain.number["7"].error != by_bands(data, "validation", None, draws=1).number["7"].error


def test_errors_with_hidden_bands(data):
    found = by_bands(data, "validation", None, draws=2)
    tables = [table_of(80, seed).slice(0) for seed in (1, 2)]
    kinds = np.array([t["true_class"].to_pylist() for t in tables])
    # two objects of each field lack bands of their own
    n = int(np.isin(kinds[:, np.r_[0, 3:80]], ("star", "galaxy")).sum())
    assert list(found.number) == ["7", "1", "2", "3", "4", "5", "6"]
    for count, row in found.number.items():
        assert row.n == n * (1 if count == "7" else 2)
        assert row.error == (1.0 if int(count) < 3 else 0.0), count
        assert row.low <= row.error <= row.high
    assert {row.error for row in found.alone.values()} == {1.0}
    assert {row.error for row in found.without.values()} == {0.0}
    assert list(found.alone) == list(found.without) == list(BANDS)
    assert {row.error for row in found.trios.values()} == {0.0}


def test_every_object_is_in_one_bin_of_each_kind():
    table = pa.concat_tables([table_of(300, seed) for seed in range(3)])
    p = np.random.default_rng(0).random(900)
    found = evaluate(table.append_column("p_star", pa.array(p)), "i", EDGES)
    own = found.methods[MODEL]
    judged = Judged(table.append_column("p_star", pa.array(p)))
    n = found.sample.objects
    assert n == own.overall.n == sum(row.figures.n for row in own.by_magnitude) == judged.scored.sum()
    assert own.by["bright_star_arcsec"] == []  # of which there are none here
    for name, rows in own.by.items():
        if name == "bright_star_arcsec":
            continue
        galaxies_only = name in ("r50_arcsec", "redshift")
        assert sum(row.figures.n for row in rows) == (n - found.sample.stars if galaxies_only else n), name
        for row in rows:
            values = judged.values[name][judged.scored]
            inside = (values >= row.low) & (values < row.high)
            wrong = (p[judged.scored] >= 0.5) != judged.star[judged.scored]
            assert row.figures.error == pytest.approx(wrong[inside].mean()), (name, row.low)
    assert set(own.by) == set(BINNINGS)
    snr = table["snr"].combine_chunks().flatten().to_numpy().reshape(-1, 7)
    np.testing.assert_array_equal(judged.values["snr"], np.nanmax(np.nan_to_num(snr), axis=1))
    text = as_text(found)
    assert "largest SNR" in text
    assert f"of {own.by['snr'][-1].figures.star.n}" in text
    assert found.quasars.n == judged.quasar.sum()
    assert found.quasars.called_star == (p[judged.quasar] >= 0.5).sum()


def test_distance_from_bright_stars():
    # two stars brighter than 18, the second a galaxy's neighbour in the other field, far away; a bright galaxy
    kinds = ["star", "galaxy", "star", "star", "galaxy", "galaxy"]
    ra = [150.0, 150.0 + 3 / 3600, 150.0, 359.9999, 0.0001, 150.0]
    dec = [0.0, 0.0, 0.0 + 7 / 3600, 0.0, 0.0, -30 / 3600]
    magnitude = [17.0, 24.0, 23.0, 15.0, 22.0, 17.5]
    table = pa.table(
        {"true_class": kinds, "ra": ra, "dec": dec, "mag_i": magnitude, "p_star": np.full(6, 0.9)}
        | {"sg_flags": np.zeros(6, np.int32)}
    )
    found = Judged(table).values["bright_star_arcsec"]
    np.testing.assert_allclose(found, [np.nan, 3.0, 7.0, np.nan, 0.72, 30.0], rtol=1e-5)
    result = evaluate(table, "i", (14.0, 28.0))
    rows = result.methods[MODEL].by["bright_star_arcsec"]
    assert [(row.low, row.figures.n, row.figures.error) for row in rows] == [
        (0, 1, 1.0), (2, 1, 1.0), (5, 1, 0.0), (20, 1, 1.0),
    ]  # fmt: skip
    assert "bright star at" in as_text(result)


def test_the_sample_of_the_papers_kind_has_its_class_ratio():
    table = table_of(2000, 1)
    star = np.array(table["true_class"].to_pylist()) == "star"
    p = np.clip(0.3 + 0.4 * star + np.random.default_rng(1).normal(0, 0.25, 2000), 0, 1)
    found = evaluate(table.append_column("p_star", pa.array(p)), "i", EDGES, paper=True)
    snr = table["snr"].combine_chunks().flatten().to_numpy().reshape(2000, 7)[:, BANDS.index("i")]
    known = np.isin(table["true_class"].to_pylist(), ("star", "galaxy"))
    keep = known & (snr >= 10) & ~table["blended"].to_numpy(zero_copy_only=False)
    assert found.sample.objects == keep.sum()
    n_star, n_galaxy = (keep & star).sum(), (keep & ~star).sum()
    assert found.sample.star_weight * n_star / n_galaxy == pytest.approx(PAPER_STARS / PAPER_GALAXIES)
    # galaxy purity where 96 % of the galaxies are found, stars counting as in the paper
    cut = np.sort(p[keep & ~star])[int(np.ceil(0.96 * n_galaxy)) - 1]
    false = found.sample.star_weight * (p[keep & star] <= cut).sum()
    true = (p[keep & ~star] <= cut).sum()
    own = found.methods[MODEL].overall
    assert own.galaxy_purity == pytest.approx(true / (true + false), abs=0.01)


def test_other_methods_are_compared_on_the_same_objects():
    table = pa.concat_tables([table_of(200, seed) for seed in range(6)])
    star = np.array(table["true_class"].to_pylist()) == "star"
    rng = np.random.default_rng(2)
    good = np.where(rng.random(len(star)) < 0.02, ~star, star) * 0.8 + 0.1
    bad = np.where(rng.random(len(star)) < 0.2, ~star, star) * 0.8 + 0.1
    bad[::3] = np.nan
    mask = np.isnan(bad)
    table = table.append_column("p_star", pa.array(good)).append_column("p_bad", pa.array(bad, mask=mask))
    table = table.append_column("p_same", pa.array(good))
    found = evaluate(table, "i", EDGES)
    pair, same = found.paired["bad"], found.paired["same"]
    here = Judged(table).scored & ~mask
    assert pair.n == here.sum()
    assert pair.excess.error_of_model == pytest.approx(((good >= 0.5) != star)[here].mean())
    assert 0 < pair.excess.errors.low < pair.excess.errors.difference < pair.excess.errors.high
    assert same.excess.errors.difference == same.excess.errors.low == same.excess.errors.high == 0.0
    surplus = pair.excess.cross_entropy
    assert 0 < surplus.low < surplus.difference < surplus.high
    wrong = ((bad >= 0.5) != star)[here], ((good >= 0.5) != star)[here]
    # all probabilities are 0.1 or 0.9
    expected = (wrong[0].mean() - wrong[1].mean()) * np.log(9.0)
    assert surplus.difference == pytest.approx(expected)
    assert same.excess.cross_entropy.difference == 0.0


def test_command_writes_figures_and_a_page_with_the_mistakes(data, tmp_path):
    out = tmp_path / "out"
    arguments = [
        "--data", str(data), "--bands", "--json", str(out / "figures.json"), "--report", str(out / "page.html"),
        "--edges", "18,22,26",
    ]  # fmt: skip
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 0, done.output
    figures = json.loads((out / "figures.json").read_text())
    assert figures["bands"]["number"]["2"]["error"] == 1.0
    # one object of each field has no band, and no probability
    kinds = [k for seed in (1, 2) for k in [table_of(80, seed)["true_class"][1].as_py()]]
    assert figures["sample"]["not_scored"] == len(kinds)
    assert "all but NUV" in done.output
    page = (out / "page.html").read_text()
    assert not re.search(r"(src|href)=['\"]?(https?:)?//", page), "the page opens offline"
    assert page.count("data:image/png") == 3
    assert "None." in page, "there are no mistakes with all bands"
    assert not list(out.glob(".*"))


def test_mistakes_are_shown_the_surest_first(data, tmp_path, monkeypatch):
    true_load = runtime.load

    def worse(path):
        def score(image, valid, sigma, features, psf):
            p = true_load(path).probabilities(image, valid, sigma, features, psf)[:, 0]
            row = np.nanmax(features[:, :, 1], axis=1)
            p = np.where(row == 4, 1 - p, p)
            return np.where(row == 8, np.where(p < 0.5, 0.7, 0.3), p)

        return answering(score)

    monkeypatch.setattr(runtime, "load", worse)
    page = tmp_path / "page.html"
    done = CliRunner().invoke(command, ["--data", str(data), "--report", str(page)])
    assert done.exit_code == 0, done.output
    shown = [int(k) for k in re.findall(r"object_id (\d+)", page.read_text())]
    expected = {1000 * seed + k for seed in (1, 2) for k in (4, 8)}
    wanted = {
        table["object_id"][k].as_py(): k
        for table in (table_of(80, 1), table_of(80, 2))
        for k in (4, 8)
        if not table["blended"][k].as_py() and table["true_class"][k].as_py() in ("star", "galaxy")
    }
    assert set(shown) == set(wanted) <= expected
    assert wanted, "the sample must hold some"
    assert [wanted[k] for k in shown] == sorted(wanted.values())


def test_any_labelled_table_can_be_judged(tmp_path):
    names = "a <b>&"
    path = tmp_path / f"{names}.csv"
    path.write_text("true_class,p_star,mag_i\nstar,0.9,20\ngalaxy,0.7,21\ngalaxy,0.2,25\n")
    page = tmp_path / "page.html"
    done = CliRunner().invoke(command, ["--table", str(path), "--report", str(page)])
    assert done.exit_code == 0, done.output
    assert "3 objects, 1 of them stars" in done.output
    assert names not in page.read_text()
    assert html.escape(names) in page.read_text()
    path.write_text("true_class,p\nstar,0.9\n")
    done = CliRunner().invoke(command, ["--table", str(path)])
    assert done.exit_code == 1
    assert "no column p_star; it has true_class, p" in done.output
    broken = tmp_path / "x.parquet"
    broken.write_bytes(b"PAR1")
    done = CliRunner().invoke(command, ["--table", str(broken)])
    assert done.exit_code == 1
    assert "not a table" in done.output


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--bands", "--table", "x.parquet"],
        ["--run", "x"],
        ["--data", "x", "--table", "y"],
        ["--data", "x", "--edges", "20,18"],
        ["--data", "x", "--edges", "20"],
        ["--data", "x", "--edges", "bright,faint"],
    ],
)
def test_what_to_judge_must_be_clear(arguments):
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 2, done.output


@pytest.mark.parametrize(
    ("columns", "arguments", "fault"),
    [
        ({"p_model": [0.1, 0.2]}, [], "p_model"),
        ({"p_star": [99.0, 1.0]}, [], "per cent"),
        ({"true_class": ["Stern", "Galaxie"]}, [], "stern"),
        ({}, ["--band", "Q"], "mag_Q"),
        ({}, ["--paper"], "snr"),
        ({}, ["--min-snr", "5"], "snr"),
        ({"snr": [9.0, 8.0]}, ["--paper"], "snr"),
        ({"sg_flags": None}, ["--unblended"], "blended"),
        ({}, ["--model", "other.pt"], "--model"),
    ],
    ids=str,
)
def test_what_cannot_be_judged_as_asked_is_refused(tmp_path, columns, arguments, fault):
    plain = {
        "true_class": ["star", "galaxy"],
        "mag_i": [20.0, 21.0],
        "p_star": [0.9, 0.1],
        "sg_flags": [0, None],
    }
    path = tmp_path / "scores.parquet"
    pq.write_table(pa.table(plain), path)
    assert CliRunner().invoke(command, ["--table", str(path), "--unblended"]).exit_code == 0
    pq.write_table(pa.table({k: v for k, v in (plain | columns).items() if v is not None}), path)
    done = CliRunner().invoke(command, ["--table", str(path), *arguments])
    assert done.exit_code in (1, 2)
    assert isinstance(done.exception, SystemExit)
    assert fault in done.output


def test_faint_objects_are_left_out_by_their_best_band(tmp_path):
    table = table_of(400, 3)
    p = np.random.default_rng(4).random(400)
    snr = np.array(table["snr"].to_pylist())
    table = table.append_column("p_star", pa.array(p))
    found = evaluate(table, "i", EDGES, min_snr=90.0)
    kind = np.array(table["true_class"].to_pylist())
    magnitude = table["mag_i"].to_numpy()
    inside = (magnitude >= EDGES[0]) & (magnitude < EDGES[-1]) & np.isin(kind, ("star", "galaxy"))
    keep = inside & (snr.max(axis=1) >= 90)
    assert 0 < keep.sum() < inside.sum()
    assert found.sample.objects == keep.sum()
    wrong = (p >= 0.5) != (kind == "star")
    assert found.methods[MODEL].overall.error == pytest.approx(wrong[keep].mean())
    assert "in some band at least 90" in as_text(found)
    path = tmp_path / "scores.parquet"
    pq.write_table(table, path)
    done = CliRunner().invoke(command, ["--table", str(path), "--min-snr", "90", "--edges", "18,22,26"])
    assert f"{keep.sum()} objects" in done.output


def test_models_are_judged_beside_each_other(data, monkeypatch):
    def load(path):
        p = 0.25 if path is None else float(path.stem[1:]) / 10
        return answering(lambda image, *_: np.full(len(image), p, np.float32))

    monkeypatch.setattr(runtime, "load", load)
    table = scores_of_part(data, "validation", None, others={"image": Path("m7.pt")})
    seen = table["p_star"].is_valid().to_numpy()
    assert table["p_star"].to_numpy()[seen] == pytest.approx(0.25)
    assert table["p_image"].to_numpy()[seen] == pytest.approx(0.7)
    assert (table["p_image"].is_valid().to_numpy() == seen).all()
    arguments = ["--data", str(data), "--model", "m1.pt", "--model", "image=m7.pt"]
    done = CliRunner().invoke(command, arguments)
    assert done.exit_code == 0, done.output
    rows = {line.split()[0]: line.split() for line in done.output.splitlines() if line.strip()}
    stars = np.array(table["true_class"].to_pylist())[seen] == "star"
    magnitude = table["mag_i"].to_numpy()[seen]
    inside = (magnitude >= 18) & (magnitude < 26)
    kinds = np.array(table["true_class"].to_pylist())[seen]
    inside &= np.isin(kinds, ("star", "galaxy"))
    # one calls nothing a star, the other everything
    assert rows["model"][1] == f"{100 * stars[inside].mean():.2f}"
    assert rows["image"][1] == f"{100 * (1 - stars[inside].mean()):.2f}"


@pytest.mark.parametrize("option", ["--json", "--report"])
def test_figures_that_cannot_be_written(tmp_path, option):
    path = tmp_path / "scores.parquet"
    pq.write_table(pa.table({"true_class": ["star", "galaxy"], "p_star": [0.9, 0.2]}), path)
    (tmp_path / "file").touch()
    done = CliRunner().invoke(command, ["--table", str(path), option, str(tmp_path / "file" / "x")])
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)
    assert "file" in done.output


def test_data_of_another_kind_are_refused(data, monkeypatch):
    monkeypatch.setattr(
        runtime,
        "load",
        lambda path: SimpleNamespace(contract=SimpleNamespace(prior_star_fraction=0.25, stamp_size=32)),
    )
    with pytest.raises(UsageError, match="32 pixels, the data set holds stamps of 8"):
        scores_of_part(data, "validation", None)
    path = sorted((data / "validation").glob("*.parquet"))[0]
    table = pq.read_table(path)
    few = np.zeros((table.num_rows, len(BANDS), len(FEATURES) - 1), np.float32)
    k = table.schema.get_field_index("features")
    tensors = pa.FixedShapeTensorArray.from_numpy_ndarray(few)
    pq.write_table(table.set_column(k, "features", tensors), path)
    with pytest.raises(UsageError, match=f"{path.name}: {len(FEATURES) - 1} features a band"):
        scores_of_part(data, "validation", None)
    pq.write_table(pa.table({"x": [1]}), path)
    with pytest.raises(UsageError, match=f"{path.name}: not a shard"):
        scores_of_part(data, "validation", None)


def test_a_page_without_magnitudes(tmp_path):
    path = tmp_path / "scores.parquet"
    pq.write_table(pa.table({"true_class": ["star", "galaxy"] * 20, "p_star": [0.9, 0.1] * 20}), path)
    done = CliRunner().invoke(command, ["--table", str(path), "--report", str(tmp_path / "page.html")])
    assert done.exit_code == 0, done.output
    assert (tmp_path / "page.html").stat().st_size > 1000


def test_nothing_to_judge_is_said(tmp_path):
    done = CliRunner().invoke(command, ["--data", str(tmp_path)])
    assert done.exit_code == 1
    assert "sgclassify dataset" in done.output


def test_json_knows_no_nan():
    value = {"a": [float("nan"), np.float64(1.5), np.inf], 3: (1, None)}
    assert json.loads(json.dumps(plain(value), allow_nan=False)) == {
        "a": [None, 1.5, None],
        "3": [1, None],
    }


def test_all_fields_are_those_of_every_part_but_the_shifted_one(tmp_path):
    for part, name in (
        ("training", "f3"),
        ("test", "f2"),
        ("shifted", "f9"),
        ("validation", "f0"),
        ("scratch", "f7"),
    ):
        (tmp_path / part).mkdir()
        (tmp_path / part / f"{name}.parquet").touch()
    assert [path.stem for path in shards_of(tmp_path, "all")] == ["f0", "f2", "f3"]
    assert [path.stem for path in shards_of(tmp_path, "shifted")] == ["f9"]
    with pytest.raises(UsageError, match="no shards here"):
        shards_of(tmp_path / "test", "all")


def test_bins_have_rising_edges():
    for edges in BINNINGS.values():
        assert all(a < b for a, b in itertools.pairwise(edges))


def test_magnitudes_may_be_of_another_band(tmp_path):
    table = table_of(100, 1).append_column("p_star", pa.array(np.full(100, 0.2)))
    path = tmp_path / "scores.parquet"
    pq.write_table(table, path)
    done = CliRunner().invoke(command, ["--table", str(path), "--band", "g", "--edges", "18,19"])
    inside = (table["mag_g"].to_numpy() < 19) & np.isin(table["true_class"].to_pylist(), ("star", "galaxy"))
    assert f"{inside.sum()} objects" in done.output
