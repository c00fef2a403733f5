"""Every stage alone, one after the other in one process: ``python -m performance.stages LIST WORK``.

Uses the tasks of the run, so that what is measured is what a worker does. Prints JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import inspect
import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from performance.doors import door

# imported before the clocks start: a worker imports once
from sgclassify.pipeline import tasks
from sgclassify.stages.config import StageConfig
from sgclassify.stages.read.header import read_header

classifier_of, ModelRef, finish_hats = door("classifier_of"), door("ModelRef"), door("finish_hats")
footprint_tiles, tiles_of = door("footprint_tiles"), door("tiles_of", "plan_tiles")

T = TypeVar("T")
TILE_ORDER = 10


class Clock:
    """Wall and CPU seconds of the stages, with what they were spent on."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, Any]] = {}

    @contextmanager
    def stage(self, name: str, count: int, per: str) -> Iterator[None]:
        """Time a block that works on ``count`` things of a kind."""
        wall, cpu = time.monotonic(), time.process_time()
        yield
        entry = {"cpu_s": time.process_time() - cpu, "wall_s": time.monotonic() - wall, "count": count, "per": per}
        self.found[name] = entry


def places_in(work: Path) -> tasks.Places:
    """Folders as a run has them."""
    names = ("prepared", "objects", "detections", "exposures", "tiles", "notes")
    for name in names:
        (work / name).mkdir(parents=True)
    (work / "token").write_text("benchmark", encoding="utf-8")
    folders: dict[str, Any] = {name: work / name for name in names}
    return tasks.Places(**folders, token_path=work / "token", token="benchmark")


def model_ref(batch_size: int = 64) -> tuple[Any, int]:
    """The shipped model as the workers get it, and the side of its stamps."""
    path = door("default_model")()
    with zipfile.ZipFile(path) as archive:
        name = next(one for one in archive.namelist() if one.endswith("/extra/contract.json"))
        contract = json.loads(archive.read(name))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    own = contract["prior_star_fraction"]
    return ModelRef(path=None, sha256=sha256, batch_size=batch_size, threads=1, own_prior=own), contract["stamp_size"]


def exact_of(model: Any) -> Any:
    """The whole model for every object; None if this code knows nothing else."""
    if any(field.name == "exact" for field in dataclasses.fields(ModelRef)):
        return dataclasses.replace(model, exact=True)
    return None


def measure(listed: Path, work: Path, exact_products: bool = False) -> dict[str, dict[str, Any]]:
    """Seconds of every stage on the exposures of a list; `work` then has the products, on request the exact ones."""
    config, clock, places = StageConfig(), Clock(), places_in(work)
    files = door("parse_list")(listed).files
    with clock.stage("headers", len(files), "exposure"):
        headers = [read_header(one) for one in files]
    with clock.stage("plan", len(files), "exposure"):
        pad = door("tile_pad_arcsec")(config)
        tiles = tiles_of([(h.exposure_id, footprint_tiles(h, TILE_ORDER, pad)) for h in headers], TILE_ORDER)
    with clock.stage("prepare", len(files), "exposure"):
        receipts = [tasks.prepare(header, places, TILE_ORDER, config) for header in headers]
    model, size = model_ref()
    with clock.stage("extract", 0, "object"):
        # the tasks of newer versions are for parts of a tile, one of which may be all of it
        part: Any = getattr(tasks, "Part", None)
        parts: list[Any] = [part(tile, tile.order, tile.pixel) if part else tile for tile in tiles]
        stamps = [tasks.extract(one, places, size, config) for one in parts]
    n_objects = sum(len(one.stamps) for one in stamps)
    clock.found["extract"]["count"] = n_objects
    with clock.stage("model", 1, "process"):
        classifier_of(model)
    with clock.stage("network", n_objects, "object"):
        scored = [tasks.infer(*pair, places, model) for pair in zip(parts, stamps, strict=True)]
    exact = exact_of(model)
    if exact is not None:
        classifier_of(exact)
        with clock.stage("network --exact", n_objects, "object"):
            whole = [tasks.infer(*pair, places, exact) for pair in zip(parts, stamps, strict=True)]
        scored = whole if exact_products else scored
    meta = {"model_id": "benchmark"}
    # older versions draw no sample for the report
    with_sample = "sample_level" in inspect.signature(tasks.publish).parameters
    publish: Any = functools.partial(tasks.publish, sample_level=0) if with_sample else tasks.publish
    with clock.stage("publish", n_objects, "object"):
        of_tiles: list[Any] = [[one] for one in scored] if part else scored
        done = [publish(t, "", s, places, meta) for t, s in zip(tiles, of_tiles, strict=True)]
    with clock.stage("join", sum(receipt.rows for receipt in receipts), "row"):
        for receipt in receipts:
            here = set(receipt.tiles)
            members = [door("members_path")(places.tiles, t.order, t.pixel) for t in tiles if t.pixel in here]
            tasks.join(receipt, "", members, places, meta)
    _finish(clock, [(t.order, t.pixel, t.n_objects) for t in done if t.n_objects], places.objects, meta)
    clock.found["written"] = {"bytes": _size(places.objects) + _size(places.detections), "objects": n_objects}
    return clock.found


def _finish(clock: Clock, filled: list[tuple[int, int, int]], root: Path, meta: dict[str, str]) -> None:
    # once before the clock, for its imports
    finish_hats(root, filled, meta)
    with clock.stage("finish", len(filled), "tile"):
        finish_hats(root, filled, meta)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def repeated(function: Callable[[Path], T], work: Path) -> T:
    """Call a function with an empty folder, which is removed again."""
    shutil.rmtree(work, ignore_errors=True)
    try:
        return function(work)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def main() -> None:
    """Measure once, print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("list", type=Path)
    parser.add_argument("work", type=Path)
    arguments = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(json.dumps(repeated(lambda work: measure(arguments.list, work), arguments.work)))


if __name__ == "__main__":
    main()
