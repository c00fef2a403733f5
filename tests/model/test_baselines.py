"""Classical methods on catalogues whose answer is known."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from sgclassify.model.cli import baselines as command
from sgclassify.model.cli import evaluate as evaluate_command
from sgclassify.model.data.shards import CATALOG_COLUMNS, write_shard
from sgclassify.model.judge import baselines as baselines_module
from sgclassify.model.judge.baselines import METHODS, RAW, Baselines, CatalogSample, class_star, inputs
from sgclassify.model.judge.ceiling import MagnitudePrior
from sgclassify.model.serve import runtime
from sgclassify.stages.bands import BAND_INDEX
from sgclassify.stages.errors import UsageError
from sgclassify.stages.features import FEATURES

G, R, I = (BAND_INDEX[band] for band in "gri")  # noqa: E741


def measured(n, seed, found=1.0, share=0.5):
    """Objects of which a share are stars; SExtractor's numbers tell them apart with some noise, in r and i."""
    rng = np.random.default_rng(seed)
    star = rng.random(n) < share
    catalog = np.full((n, 7, len(CATALOG_COLUMNS)), np.nan, np.float32)

    def put(name, values):
        catalog[:, [R, I], CATALOG_COLUMNS.index(name)] = values

    noise = rng.normal(0, 0.05, (n, 2))
    magnitude = rng.uniform(20, 25, n)[:, None]
    put("Mag_Kron", magnitude)
    put("Mag_Model", magnitude)
    put("Class_Star", np.where(star, 0.9, 0.1)[:, None] + noise)
    put("Spread_Model", np.where(star, 0.0, 0.01)[:, None] + 0.03 * noise)
    put("SpreadErr_Model", 0.001)
    put("Mag_PSF", magnitude + np.where(star, 0, 0.3)[:, None] + noise)
    put("Mag_Aper1", 23.0 + np.where(star, 0.0, 0.2)[:, None] + noise)
    put("Mag_Aper3", 22.8)
    for name in ("MagErr_Kron", "MagErr_Model", "MagErr_Aper1", "MagErr_Aper3"):
        put(name, 0.02)
    catalog[rng.random(n) > found] = np.nan
    features = rng.normal(0, 1, (n, 7, len(FEATURES))).astype(np.float32)
    features[:, 2, 5] += 4 * star
    return CatalogSample(catalog, features, star)


@pytest.fixture(scope="module", autouse=True)
def small_trees():
    """Enough for these catalogues."""
    with pytest.MonkeyPatch.context() as patch:
        for settings_of in baselines_module.TREES.values():
            patch.setitem(settings_of, "max_iter", 20)
            # weighted quantiles take a second for every ten bins of these many columns
            patch.setitem(settings_of, "max_bins", 16)
        yield


@functools.cache
def fit(seed, prior):
    """Methods that are fitted to 800 objects."""
    return Baselines(measured(800, seed), prior)


@pytest.fixture(scope="module")
def fitted():
    return fit(1, 0.5)


def test_every_method_learns_what_separates_the_classes(fitted):
    test = measured(500, 2)
    probabilities, covered = fitted.probabilities(test)
    assert set(probabilities) == set(covered) == set(METHODS)
    for name, p in probabilities.items():
        assert p.shape == (500,)
        assert covered[name].all()
        assert ((p >= 0.5) == test.star).mean() > 0.9, name


@pytest.mark.parametrize(
    ("column", "blind"),
    [
        ("Spread_Model", {"spread_model"}),
        ("Mag_PSF", {"psf_model"}),
        ("Mag_Aper3", {"concentration"}),
        ("Class_Star", {RAW, "class_star"}),
        (slice(None), set(METHODS) - {"trees_features"}),
    ],
)
def test_what_a_method_does_not_know_gets_the_prior(column, blind):
    test = measured(300, 4)
    lost = np.arange(300) < 120
    test.catalog[lost, :, column if isinstance(column, slice) else CATALOG_COLUMNS.index(column)] = np.nan
    probabilities, covered = fit(3, 0.3).probabilities(test)
    for name, p in probabilities.items():
        np.testing.assert_array_equal(covered[name], ~lost | (name not in blind))
        assert (p[lost] == 0.3).all() == (name in blind), name


def test_the_raw_class_is_that_of_the_i_band(fitted):
    test = measured(50, 6)
    test.catalog[:, R, CATALOG_COLUMNS.index("Class_Star")] = 0.5
    expected = test.catalog[:, I, CATALOG_COLUMNS.index("Class_Star")]
    np.testing.assert_array_equal(fitted.probabilities(test)[0][RAW], expected)


def test_the_prior_moves_the_probabilities():
    test = measured(500, 2)
    few, many = (fit(1, prior).probabilities(test)[0]["concentration"].mean() for prior in (0.1, 0.9))
    assert few < many


def test_the_prior_is_that_of_all_objects_not_of_those_found():
    """Where SExtractor finds mostly stars, an object that it found, and of which no more is known, is one."""
    training = measured(4000, 8, share=0.3)
    names = ("Spread_Model", "Class_Star", "Mag_PSF", "Mag_Aper1")
    training.catalog[:, :, [CATALOG_COLUMNS.index(name) for name in names]] = np.float32(0.5)
    # nine of ten galaxies go: among the found, stars are then 0.3 / (0.3 + 0.07) = 0.81
    training.catalog[~training.star & (np.arange(4000) % 10 > 0)] = np.nan
    probabilities, covered = Baselines(training, float(training.star.mean())).probabilities(training)
    for name in ("class_star", "spread_model", "psf_model"):
        assert probabilities[name][covered[name]].mean() == pytest.approx(0.81, abs=0.02), name


def test_class_star_is_a_mean_over_the_bands_by_their_errors():
    m = measured(1, 0)
    m.catalog[0, :, CATALOG_COLUMNS.index("Class_Star")] = [np.nan, np.nan, np.nan, 1.0, 0.0, np.nan, np.nan]
    m.catalog[0, :, CATALOG_COLUMNS.index("MagErr_Kron")] = [np.nan, np.nan, np.nan, 0.1, 0.2, np.nan, np.nan]
    assert class_star(m)[0] == pytest.approx(0.8)


@given(value=st.floats(-0.1, 0.1), error=st.floats(1e-3, 0.1), n_bands=st.integers(1, 7))
@settings(max_examples=30, deadline=None)
def test_bands_of_one_value_add_up_to_it_with_a_smaller_error(value, error, n_bands):
    m = measured(1, 0)
    m.catalog[:, :, CATALOG_COLUMNS.index("Spread_Model")] = np.where(np.arange(7) < n_bands, value, np.nan)
    m.catalog[:, :, CATALOG_COLUMNS.index("SpreadErr_Model")] = error
    mean, significance, log_error = inputs(m)["spread_model"][0, :3]
    assert mean == pytest.approx(value, abs=1e-7)
    assert 10**log_error == pytest.approx(error / np.sqrt(n_bands), rel=1e-5)
    assert np.sinh(significance) == pytest.approx(mean / 10**log_error, rel=1e-5, abs=1e-9)


def test_fits_repeat():
    test = measured(200, 2)
    one, two = (one.probabilities(test)[0] for one in (fit(1, 0.9), Baselines(measured(800, 1), 0.9)))
    for name in METHODS:
        np.testing.assert_array_equal(one[name], two[name])


def test_methods_with_too_few_objects_are_left_out(caplog):
    with pytest.raises(UsageError, match="too few"):
        Baselines(measured(50, 0), 0.5)
    caplog.clear()
    left = Baselines(measured(500, 0, found=0.1), 0.5)
    assert list(left.fitted) == list(left.fitted_to) == ["trees_features"]
    assert "class_star is left out: " in caplog.text
    assert "sextractor" in caplog.text
    probabilities, covered = left.probabilities(measured(100, 1))
    assert set(probabilities) == set(covered) == {RAW, "trees_features"}


SIZE = 4


def write(path, m, field):
    """A shard of these objects; its quasar, the last row, is neither star nor galaxy."""
    n = len(m.star)
    kind = np.where(m.star, "star", "galaxy").astype(object)
    kind[-1] = "qso"
    blank = np.zeros((n, 7, SIZE, SIZE), np.float16)
    arrays = {
        "image": blank, "valid": np.ones(blank.shape, bool), "sigma": np.ones((n, 7), np.float32),
        "features": m.features, "psf": blank, "catalog": m.catalog,
    }  # fmt: skip
    table = {"field": np.full(n, field, np.int32), "true_class": kind.tolist(), "mag_i": np.full(n, 23.0)}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_shard(path, pa.table(table), arrays)


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A data set, and archives that answer with their second character over ten for every object."""
    write(tmp_path / "training" / "field00003.parquet", measured(400, 1), 3)
    write(tmp_path / "training" / "field00004.parquet", measured(400, 2, found=0.0), 4)
    write(tmp_path / "test" / "field00002.parquet", measured(101, 3, found=0.6), 2)
    write(tmp_path / "validation" / "field00000.parquet", measured(20, 4, found=0.0), 0)

    def load(path):
        p = 0.9 if path is None else int(path.name[1]) / 10
        contract = SimpleNamespace(prior_star_fraction=0.4, stamp_size=SIZE)
        return SimpleNamespace(
            cascade=None,
            contract=contract,
            probabilities=lambda image, *_: np.full((len(image), 2), [p, 1 - p], np.float32),
        )

    monkeypatch.setattr(runtime, "load", load)
    return tmp_path


def run(data, *more, part="test"):
    output = data / "out" / "scores.parquet"
    arguments = ["--data", str(data), "--part", part, "--output", str(output), *more]
    return CliRunner().invoke(command, arguments), output


def test_command_writes_a_table_that_evaluate_reads(data):
    result, output = run(data, "--model", "m2.pt", "--model", "image=m7.pt")
    assert result.exit_code == 0, result.output
    table = pq.read_table(output)
    assert table.num_rows == 101
    assert {f"p_{name}" for name in METHODS} <= set(table.column_names)
    assert table["p_star"].to_numpy() == pytest.approx(0.2)
    assert table["p_image"].to_numpy() == pytest.approx(0.7)
    found = table["found"].to_numpy()
    assert 40 < found.sum() < 80
    assert (table["p_spread_model"].to_numpy()[~found] == 0.4).all()
    rows = {line.split()[0]: line.split() for line in result.output.splitlines()[2:]}
    assert set(rows) == {*METHODS, "model", "image"}
    assert rows["spread_model"][1:3] == ["399", f"{100 * found[:-1].mean():.1f}%"]
    assert rows["trees_features"][1:3] == ["798", "100.0%"]
    stars = (np.array(table["true_class"].to_pylist()) == "star")[:-1]
    # the model calls nothing a star: its errors are the stars
    assert rows["spread_model"][4] == f"{100 * stars[found[:-1]].mean():.2f}%"
    assert rows["model"][5] == f"{100 * stars.mean():.2f}%"
    judged = CliRunner().invoke(evaluate_command, ["--table", str(output)])
    assert judged.exit_code == 0, judged.output
    assert "trees_catalog" in judged.output


def test_command_leaves_out_what_was_not_found_on_request(data):
    result, output = run(data, "--found-only")
    assert result.exit_code == 0, result.output
    table = pq.read_table(output)
    assert table["found"].to_numpy().all()
    assert table["p_star"].to_numpy() == pytest.approx(0.9)


def test_a_part_without_sextractor(data):
    result, output = run(data, "--found-only", part="validation")
    assert result.exit_code == 1
    assert "measured none" in result.output
    assert not output.exists()
    # what the stage has measured itself can be judged
    result, output = run(data, part="validation")
    assert result.exit_code == 0, result.output
    assert not pq.read_table(output)["found"].to_numpy().any()
    rows = {line.split()[0]: line.split() for line in result.output.splitlines()[2:]}
    assert rows["trees_features"][2] == "100.0%"
    assert rows["class_star"][2] == "0.0%"


def test_methods_fitted_elsewhere_judge_a_whole_data_set(data):
    result, output = run(data, part="all")
    assert result.exit_code == 1
    assert "--training" in result.output
    assert not output.exists()
    new = data / "new"
    new.mkdir()
    for part in ("test", "validation"):
        (data / part).rename(new / part)
    result, output = run(new, "--training", str(data), part="all")
    assert result.exit_code == 0, result.output
    both = [pq.read_table(new / part, columns=["field"]) for part in ("test", "validation")]
    assert pq.read_table(output).num_rows == sum(table.num_rows for table in both)
    rows = {line.split()[0]: line.split() for line in result.output.splitlines()[2:]}
    assert rows["spread_model"][1] == "399"


@pytest.mark.parametrize("more", [("m1.pt", "m2.pt"), ("star=m1.pt",), ("class_star=m1.pt",), ("image=",)])
def test_names_of_models_are_checked(data, more):
    result, _ = run(data, *(text for one in more for text in ("--model", one)))
    assert result.exit_code == 2
    assert "--model" in result.output


def test_the_oracle_judges_some_single_objects(tmp_path, monkeypatch):
    from sgclassify.model.judge import ceiling
    from sgclassify.simulation import oracle

    rng = np.random.default_rng(5)
    n = 40
    kind = np.array(["star", "galaxy", "qso", "spurious"])[rng.integers(0, 4, n)]
    table = pa.table(
        {
            "field": np.full(n, 12, np.int32),
            "true_class": kind.tolist(),
            "mag_i": rng.uniform(20, 26, n),
            "blended": pa.array(rng.random(n) < 0.2, mask=kind == "spurious"),
            "binary": pa.array(rng.random(n) < 0.2, mask=kind == "spurious"),
        }
    )
    valid = np.ones((n, 7, 4, 4), bool)
    valid[::3, 2:] = False

    class Objects(SimpleNamespace):
        def __len__(self):
            return n

    sample = Objects(table=table, valid=valid)
    (tmp_path / "settings.json").write_text('{"seed": 9}')
    asked = []

    def log_ratios(config, field, mag_i, used):
        asked.append((config, field, mag_i, used))
        return np.where(mag_i < 23.0, 800.0, -1.0)

    monkeypatch.setattr(oracle, "log_ratios", log_ratios)
    prior = SimpleNamespace(log_odds=lambda magnitude: np.full(len(magnitude), 1.0))
    p = ceiling.oracle_probabilities(tmp_path, "test", sample, 5, prior)
    rows = np.flatnonzero(np.isfinite(p))
    assert len(rows) == 5
    assert set(kind[rows]) <= {"star", "galaxy"}
    assert not any(table[name][int(k)].as_py() for name in ("blended", "binary") for k in rows)
    (config, field, mag_i, used), magnitude = asked[0], table["mag_i"].to_numpy()
    assert (config.seed, field) == (9, 12)
    np.testing.assert_array_equal(mag_i, magnitude[rows])
    np.testing.assert_array_equal(used, valid[rows].any(axis=(2, 3)))
    np.testing.assert_allclose(p[rows], np.where(magnitude[rows] < 23.0, 1.0, 0.5))
    shifted = ceiling.oracle_probabilities(tmp_path, "shifted", sample, 5, prior)
    assert np.isfinite(shifted).sum() == 5
    assert asked[1][0].seed != 9


def test_the_share_of_stars_by_magnitude_is_counted(tmp_path):
    kinds = ["star"] * 30 + ["galaxy"] * 10 + ["galaxy"] * 40 + ["qso"] * 9
    magnitude = np.r_[np.full(40, 20.25), np.full(40, 25.25), np.full(9, 20.25)]
    pq.write_table(pa.table({"true_class": kinds, "mag_i": magnitude}), tmp_path / "a.parquet")
    prior = MagnitudePrior([tmp_path / "a.parquet"])
    expected = np.log([30.5 / 10.5, 0.5 / 40.5])
    np.testing.assert_allclose(prior.log_odds(np.array([20.25, 25.25])), expected)
