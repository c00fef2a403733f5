"""The configuration file: defaults, versions, and what is refused."""

from __future__ import annotations

import dataclasses
import re
import tomllib
from pathlib import Path

import pytest

from sgclassify.pipeline.config import RunConfig, default_text, load_config, parse_config
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
