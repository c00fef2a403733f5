"""Configuration of a run: one versioned TOML file over the declared defaults."""

from __future__ import annotations

import dataclasses
import json
import textwrap
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar

from sgclassify.stages.config import StageConfig
from sgclassify.stages.errors import UsageError
from sgclassify.stages.settings import declared, setting

CONFIG_VERSION: Final = 1
DEVICES: Final = ("auto", "cpu", "gpu")

_HEAD: Final = f"""\
# Every setting of a run with its default. Give `sgclassify run --config FILE` a file with the settings to change;
# a setting that the file does not name keeps the value below.

# Version of the layout of this file.
config_version = {CONFIG_VERSION}
"""


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run can be told beside its inputs; ``docs/reference.md`` lists the settings.

    `stage` configures the stages; all other attributes are settings.
    """

    tile_order: int = setting(
        10,
        "HEALPix order of the sky tiles, the units of work.",
        "Tiles of order 10 are 3.4 arcmin wide. A higher order makes smaller tiles, which need less memory.",
        low=4,
        high=14,
    )
    window: int = setting(
        2, "Tiles in flight per worker.", "More keep workers busier and hold more stamps in memory.", low=1, high=1000
    )
    batch_size: int = setting(
        64,
        "Objects in one forward pass of the model.",
        "Another value may change the last bits of the probabilities.",
        low=1,
        high=65536,
    )
    device: str = setting(
        "auto",
        "Where the model runs.",
        "auto: GPU workers; the CPU only on a local cluster without a GPU.",
        choices=DEVICES,
    )
    torch_threads: int = setting(
        1,
        "Threads of the model in one CPU worker.",
        "Another value may change the last bits of the probabilities.",
        low=1,
        high=1024,
    )
    header_threads: int = setting(8, "Threads of the driver that read the headers of the exposures.", low=1, high=256)
    worker_timeout_s: float = setting(
        60.0, "Longest wait at the start for workers that can do the work.", unit="s", low=0.1, high=86400
    )
    lost_workers_timeout_s: float = setting(
        300.0, "Longest wait for workers once the run has lost all that can do the work.", unit="s", low=0.1, high=86400
    )
    task_timeout_s: float = setting(
        1800.0,
        "Longest time that a worker may spend on one exposure or tile; 0: no limit.",
        "After it the worker ends itself. The work is tried once more, alone, and set aside if that fails too.",
        unit="s",
        high=86400,
    )
    header_timeout_s: float = setting(
        120.0,
        "Longest time to read the headers of one exposure; after it the exposure is set aside.",
        unit="s",
        low=0.1,
        high=86400,
    )
    tile_shuffle_seed: int = setting(
        0,
        "Seed that shuffles the order in which tiles are computed; 0: in order of their pixel.",
        "For tests: the products do not depend on it.",
        high=2**31 - 1,
    )
    prior_star_fraction: float = setting(
        0.0, "Share of stars that the probabilities assume; 0: that of the model's training sample.", high=0.999999
    )
    prior_table: str = setting(
        "",
        "CSV or Parquet file with that share by AB magnitude (columns magnitude, star_fraction); empty: none.",
        "It excludes `prior_star_fraction`.",
    )
    tta: bool = setting(
        False,
        "Average the probabilities over the eight symmetries of the square.",
        "Each pass asks the whole model, as with `exact`: the model takes eight times as long.",
    )
    exact: bool = setting(
        False,
        "Ask the whole model about every object.",
        "By default, it answers in stages: what a light first one is certain of does not pay for the rest.",
    )
    stage: StageConfig = field(default_factory=StageConfig)

    def as_dict(self) -> dict[str, Any]:
        """The configuration in the layout of its TOML file."""
        run = dataclasses.asdict(self)
        stage = run.pop("stage")
        return {"config_version": CONFIG_VERSION, "run": run, "stage": stage}


SECTIONS: Final = {"run": RunConfig, "stage": StageConfig}
"""The tables of the TOML file."""


def default_text() -> str:
    """The commented TOML file of all defaults, ``default.toml``."""
    lines = [_HEAD]
    for section, kind in SECTIONS.items():
        lines.append(f"[{section}]")
        for one in declared(kind):
            comment = textwrap.wrap(f"{one.meaning} {one.reason}", 116)
            comment += [f"Allowed: {one.allowed}"] if one.allowed else []
            # these types look the same in JSON and TOML
            lines += [*(f"# {line}" for line in comment), f"{one.name} = {json.dumps(one.default)}"]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def load_config(path: Path | None) -> RunConfig:
    """Read a TOML configuration file; None for the defaults.

    Raises
    ------
    UsageError
        If the file cannot be read or has another version, or if a setting is unknown, of the wrong type or not
        allowed. The message names file and setting.
    """
    if path is None:
        return RunConfig()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: the configuration cannot be read: {error}") from error
    return parse_config(text, str(path))


def parse_config(text: str, name: str) -> RunConfig:
    """Parse the text of a configuration file; ``name`` is what messages call it. See `load_config`."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{name}: not valid TOML: {error}") from error
    version = raw.pop("config_version", None)
    if version is None:
        raise UsageError(f"{name}: config_version is missing; write config_version = {CONFIG_VERSION}")
    if isinstance(version, bool) or version != CONFIG_VERSION:
        raise UsageError(f"{name}: config_version is {version!r}, this software reads {CONFIG_VERSION}")
    sections = {section: raw.pop(section, {}) for section in SECTIONS}
    for section, value in sections.items():
        if not isinstance(value, dict):
            raise UsageError(f"{name}: [{section}] must be a table")
    if raw:
        raise UsageError(f"{name}: unknown {_list(raw)}; settings stand below [run] or [stage]")
    stage = _build(StageConfig, sections["stage"], f"{name}: stage")
    config = dataclasses.replace(_build(RunConfig, sections["run"], f"{name}: run"), stage=stage)
    if config.prior_star_fraction and config.prior_table:
        raise UsageError(f"{name}: run.prior_star_fraction and run.prior_table exclude each other")
    return config


def _list(names: Mapping[str, object]) -> str:
    return ("setting " if len(names) == 1 else "settings ") + ", ".join(sorted(names))


T = TypeVar("T", StageConfig, RunConfig)


def _build(kind: type[T], values: dict[str, Any], where: str) -> T:
    """A configuration with checked values; ``where`` is what messages call its table."""
    known = {one.name: one for one in declared(kind)}
    unknown = {key: None for key in values if key not in known}
    if unknown:
        raise UsageError(f"{where}: unknown {_list(unknown)}; known are {', '.join(known)}")
    try:
        return kind(**{key: known[key].checked(value) for key, value in values.items()})
    except ValueError as error:
        raise UsageError(f"{where}.{error}") from None
