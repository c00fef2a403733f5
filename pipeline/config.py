"""Configuration of a run: one versioned TOML file over documented defaults."""

from __future__ import annotations

import dataclasses
import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Final, TypeVar

from sgclassify.stages.config import StageConfig
from sgclassify.stages.errors import UsageError

CONFIG_VERSION: Final = 1
DEVICES: Final = ("auto", "cpu", "gpu")

# Numbers outside these ranges can only be slips; a setting that is not named must be 0 or more.
_RANGE: Final[dict[str, tuple[float, float]]] = {
    "tile_order": (4, 14),
    "window": (1, 1000),
    "batch_size": (1, 65536),
    "torch_threads": (1, 1024),
    "header_threads": (1, 256),
    "worker_timeout_s": (0.1, 86400.0),
    "lost_workers_timeout_s": (0.1, 86400.0),
    "task_timeout_s": (0.0, 86400.0),
    "header_timeout_s": (0.1, 86400.0),
    "tile_shuffle_seed": (0, 2**31 - 1),
    "prior_star_fraction": (0.0, 0.999999),
    "match_radius_arcsec": (0.001, 5.0),
    "max_bad_rows": (0.0, 1.0),
    "detect_threshold_sigma": (0.1, 1000.0),
    "detect_min_px": (1, 10000),
    "deblend_contrast": (0.0, 1.0),
    "sky_box_px": (8, 4096),
    "blend_radius_arcsec": (0.0, 5.0),
    "min_valid_core": (0.0, 1.0),
    "core_radius_px": (1.0, 64.0),
}


@dataclass(frozen=True)
class RunConfig:
    """Everything that a run can be told beside its inputs; ``default.toml`` explains each setting.

    Attributes
    ----------
    tile_order : int
        HEALPix order of the tiles.
    window : int
        Tiles in flight for every worker.
    batch_size : int
        Objects in one forward pass of the model.
    device : str
        ``"auto"``, ``"cpu"`` or ``"gpu"``.
    torch_threads : int
        Threads of the model in one CPU worker.
    header_threads : int
        Threads of the driver that read headers.
    worker_timeout_s : float
        Seconds to wait for workers at the start.
    lost_workers_timeout_s : float
        Seconds to wait for workers once the run has lost them all.
    task_timeout_s : float
        Longest time on a worker for an exposure or a tile; 0 for no limit.
    header_timeout_s : float
        Longest time to read the headers of an exposure.
    tile_shuffle_seed : int
        Seed that shuffles the order of the tiles; 0 keeps it.
    prior_star_fraction : float
        Share of stars that the probabilities shall assume; 0 for the model's own.
    prior_table : str
        Table of that share by magnitude, instead; empty for none.
    tta : bool
        Average over the eight symmetries of the square.
    stage : StageConfig
        Configuration of the stages.
    """

    tile_order: int = 10
    window: int = 2
    batch_size: int = 64
    device: str = "auto"
    torch_threads: int = 1
    header_threads: int = 8
    worker_timeout_s: float = 60.0
    lost_workers_timeout_s: float = 300.0
    task_timeout_s: float = 1800.0
    header_timeout_s: float = 120.0
    tile_shuffle_seed: int = 0
    prior_star_fraction: float = 0.0
    prior_table: str = ""
    tta: bool = False
    stage: StageConfig = field(default_factory=StageConfig)

    def as_dict(self) -> dict[str, Any]:
        """The configuration in the layout of its TOML file."""
        run = dataclasses.asdict(self)
        stage = run.pop("stage")
        return {"config_version": CONFIG_VERSION, "run": run, "stage": stage}


def default_text() -> str:
    """The commented file of all defaults."""
    return resources.files("sgclassify.pipeline").joinpath("default.toml").read_text(encoding="utf-8")


def load_config(path: Path | None) -> RunConfig:
    """Read a configuration file.

    Parameters
    ----------
    path : Path or None
        A TOML file; None for the defaults.

    Returns
    -------
    RunConfig

    Raises
    ------
    UsageError
        If the file cannot be read, has another version, or a setting is unknown, of the wrong type or out of
        its range. The message names file and setting.
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
    sections: dict[str, dict[str, Any]] = {}
    for section in ("run", "stage"):
        value = raw.pop(section, {})
        if not isinstance(value, dict):
            raise UsageError(f"{name}: [{section}] must be a table")
        sections[section] = value
    if raw:
        raise UsageError(f"{name}: unknown {_list(raw)}; settings stand below [run] or [stage]")
    stage = _build(StageConfig, sections["stage"], f"{name}: stage")
    if "stage" in sections["run"]:
        raise UsageError(f"{name}: unknown setting run.stage")
    config = _build(RunConfig, {**sections["run"], "stage": stage}, f"{name}: run")
    if config.device not in DEVICES:
        raise UsageError(f"{name}: run.device is {config.device!r}, it must be one of {', '.join(DEVICES)}")
    if config.prior_star_fraction and config.prior_table:
        raise UsageError(f"{name}: run.prior_star_fraction and run.prior_table exclude each other")
    return config


def _list(names: Mapping[str, object]) -> str:
    return ("setting " if len(names) == 1 else "settings ") + ", ".join(sorted(names))


T = TypeVar("T", StageConfig, RunConfig)


def _build(kind: type[T], values: dict[str, Any], where: str) -> T:
    known = {f.name: f for f in dataclasses.fields(kind)}
    unknown = {key: None for key in values if key not in known}
    if unknown:
        raise UsageError(
            f"{where}: unknown {_list(unknown)}; known are {', '.join(n for n in known if n != 'stage')}"
        )
    checked = {
        key: _value(value, str(known[key].type), f"{where}.{key}", key) for key, value in values.items()
    }
    return kind(**checked)


def _value(value: Any, kind: str, where: str, key: str) -> Any:
    """Check one value against the annotation of its field."""
    if kind == "float" and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    wanted = {"int": int, "float": float, "str": str, "bool": bool, "StageConfig": StageConfig}[kind]
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise UsageError(f"{where} is {value!r}, it must be of type {kind}")
    if isinstance(value, int | float) and wanted is not bool:
        low, high = _RANGE.get(key, (0.0, math.inf))
        if not (low <= value <= high and math.isfinite(value)):
            raise UsageError(f"{where} is {value!r}, it must be between {low:g} and {high:g}")
    return value
