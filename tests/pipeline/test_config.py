"""The configuration file: defaults, versions, and what is refused."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from sgclassify.model.serve.contract import CascadeContract
from sgclassify.pipeline.config import RunConfig, default_text, load_config, parse_config
from sgclassify.pipeline.request import Options, check
from sgclassify.stages.cascade import Certainty
from sgclassify.stages.config import StageConfig
from sgclassify.stages.errors import UsageError


def test_default_file_is_the_default_configuration() -> None:
    assert parse_config(default_text(), "default.toml") == RunConfig()
    assert tomllib.loads(default_text()) == RunConfig().as_dict()


def test_default_file_names_every_setting_and_explains_it() -> None:
    raw = tomllib.loads(default_text())
    assert set(raw["stage"]) == {f.name for f in dataclasses.fields(StageConfig)}
    assert set(raw["run"]) == {f.name for f in dataclasses.fields(RunConfig)} - {"stage"}
    lines = default_text().splitlines()
    for number, line in enumerate(lines):
        if re.match(r"\w+ = ", line):
            assert lines[number - 1].startswith("# "), line


def test_no_file_means_defaults() -> None:
    assert load_config(None) == RunConfig()


def test_settings_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "night.toml"
    path.write_text('config_version = 1\n[run]\ndevice = "cpu"\n[stage]\nmatch_radius_arcsec = 1\n')
    config = load_config(path)
    assert config.device == "cpu"
    assert config.stage.match_radius_arcsec == 1.0
    assert isinstance(config.stage.match_radius_arcsec, float)
    assert config.window == RunConfig().window


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[run]\nwindow = 2", "config_version"),
        ("config_version = 2", "config_version"),
        ("config_version = true", "config_version"),
        ("config_version = 1\nwindow = 2", "window"),
        ("config_version = 1\n[run]\nwindwo = 2", "windwo"),
        ("config_version = 1\n[stage]\nradius = 2", "radius"),
        ("config_version = 1\n[run]\nwindow = 2.0", "window"),
        ("config_version = 1\n[run]\nwindow = true", "window"),
        ("config_version = 1\n[run]\nwindow = 0", "window"),
        ("config_version = 1\n[run]\ntta = 1", "tta"),
        ("config_version = 1\n[run]\nprior_star_fraction = 1.0", "prior_star_fraction"),
        ('config_version = 1\n[run]\nprior_star_fraction = 0.3\nprior_table = "t.csv"', "prior_table"),
        ("config_version = 1\n[run]\ndevice = 3", "device"),
        ('config_version = 1\n[run]\ndevice = "tpu"', "device"),
        ("config_version = 1\n[run.stage]\nsky_box_px = 3", "stage"),
        ("config_version = 1\n[stage]\nmatch_radius_arcsec = nan", "match_radius_arcsec"),
        ("config_version = 1\n[stage]\nposition_margin_px = inf", "position_margin_px"),
        ("config_version = 1\n[stage]\nposition_margin_px = -1.0", "position_margin_px"),
        ("config_version = 1\nrun = 3", "run"),
        ("config_version = 1\n[run", "TOML"),
    ],
)
def test_what_is_wrong_is_named_with_its_file(tmp_path: Path, text: str, names: str) -> None:
    path = tmp_path / "night.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=names) as caught:
        load_config(path)
    assert str(path) in str(caught.value)


def test_unreadable_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.toml"):
        load_config(tmp_path / "none.toml")
    binary = tmp_path / "binary.toml"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"binary\.toml"):
        load_config(binary)


@pytest.mark.parametrize("given", ["option", "file", "tta", "archive", ""])
def test_what_asks_the_whole_model(tmp_path: Path, given: str) -> None:
    path, listed = tmp_path / "run.toml", tmp_path / "list.txt"
    path.write_text(f"config_version = 1\n[run]\nexact = {str(given == 'file').lower()}\n")
    listed.write_text(f"{tmp_path}\n")
    (tmp_path / "CSST_MSC_MS_SCI_20270810081950_20270810082220_10160000001_08_L1_V01_IMG.fits").write_bytes(b"")
    options = Options(listed, tmp_path / "out", config=path, exact=given == "option", tta=given == "tta")
    request = check(options)
    exact = given in ("option", "file")
    # another choice must not continue the products
    assert request.config.exact == request.settings["exact"] == exact
    cascade = None if given == "archive" else CascadeContract(0, {"SEQUENCE": Certainty(0.0, 0.0)})
    contract = dataclasses.replace(request.model.contract(), cascade=cascade)
    assert request.model_ref(contract).exact == exact
    assert request.metadata(contract)["exact"] == ("true" if given else "false")
