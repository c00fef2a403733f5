"""What the stages are measured through, in this version of the program and in older ones: functions that have moved."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from sgclassify import stages

PLACES = {
    "classifier_of": ("model.serve.loaded", "pipeline.tasks"),
    "ModelRef": ("model.serve.loaded", "pipeline.tasks"),
    "default_model": ("model.serve.archive", "model.runtime"),
    "parse_list": ("stages.read.exposure_list", "pipeline.exposure_list"),
    "footprint_tiles": ("stages.tiling", "pipeline.plan"),
    "tiles_of": ("stages.tiling",),
    "plan_tiles": ("pipeline.plan",),
    "tile_pad_arcsec": ("stages.tiling", "pipeline.tasks"),
    "members_path": ("pipeline.record.receipts", "pipeline.receipts"),
    "finish_hats": ("stages.write.publish", "stages.publish"),
}
"""Modules below ``sgclassify`` that have or had each name, the newest first."""


def door(*names: str) -> Any:
    """The first of these names that this version of the program has."""
    # an installed version, too, offers modules that this one does not have
    root = Path(stages.__path__[0]).parent
    for name in names:
        for module in PLACES[name]:
            if (root / f"{module.replace('.', '/')}.py").is_file():
                found = importlib.import_module(f"sgclassify.{module}")
                if hasattr(found, name):
                    return getattr(found, name)
    raise ImportError(f"no {' or '.join(names)} in this version of the program")
