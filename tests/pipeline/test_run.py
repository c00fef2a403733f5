"""The driver with fake stages and without processes: outcomes, exit codes, record."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sgclassify.model.serve import runtime
from sgclassify.model.serve.archive import Archive
from sgclassify.model.serve.loaded import ModelRef
from sgclassify.pipeline import inventory, tasks
from sgclassify.pipeline import run as run_module
from sgclassify.pipeline.cluster import handle
from sgclassify.pipeline.progress import Reporter
from sgclassify.pipeline.record import pictures
from sgclassify.pipeline.record.pictures import Picture
from sgclassify.pipeline.record.receipts import (
    PREPARED,
    RECEIPT,
    ExposureReceipt,
    TileReceipt,
    content_digest,
    members_path,
    stats_of,
)
from sgclassify.pipeline.record.record import MODEL_KEYS, RunRecord
from sgclassify.pipeline.record.sample import MAX_SAMPLED, draw
from sgclassify.pipeline.request import Options, check
from sgclassify.pipeline.run import plan, run
from sgclassify.stages.errors import (
    ClusterError,
    ModelError,
    SlitlessExposureError,
    UnusableInputError,
    UsageError,
)
from sgclassify.stages.read.names import ExposureFiles, exposure_stem
from sgclassify.stages.tiling import Part, Tile
from sgclassify.stages.write.publish import partition_path


@dataclass
class Stages:
    """Fake stages; what is named here goes wrong."""

    slitless: set[str] = field(default_factory=set)
    bad_header: set[str] = field(default_factory=set)
    bad_pixels: set[str] = field(default_factory=set)
    bad_join: set[str] = field(default_factory=set)
    defect_in_tile: set[int] = field(default_factory=set)
    error_in_tile: Exception | None = None
    end_at_tile: int | None = None
    end_at_exposure: str | None = None
    defect_in_finish: bool = False
    tile_order: list[int] = field(default_factory=list)
    prepared: list[str] = field(default_factory=list)
    joined: list[str] = field(default_factory=list)
    bad_model: bool = False
    checked: int = 0
    finished: int = 0
    usable: int = 9
    tile_rows: dict[str, tuple[int, int]] = field(default_factory=dict)

    def forget(self) -> None:
        """What was done so far counts no more."""
        self.tile_order, self.prepared, self.joined = [], [], []

    def read_header(self, files: ExposureFiles) -> Any:
        name = exposure_stem(files.image)
        if name in self.slitless:
            raise SlitlessExposureError(files.image, "slitless spectrum", "")
        if name in self.bad_header:
            raise UnusableInputError(files.image, "no WCS", "calibrate it")
        key = int(name.removeprefix("e"))
        return SimpleNamespace(
            exposure_id=name,
            catalog_stem=f"{name}_CAT",
            exposure_key=key,
            files=files,
            band="g",
            notes=("no WHT",),
        )

    def footprint_tiles(self, header: Any, tile_order: int, pad_arcsec: float) -> np.ndarray[Any, Any]:
        return np.array([header.exposure_key, header.exposure_key + 1])

    def prepare(self, header: Any, places: tasks.Places, tile_order: int, config: object) -> Any:
        if header.exposure_id == self.end_at_exposure:
            raise SystemExit(143)
        self.prepared.append(header.exposure_id)
        if header.exposure_id in self.bad_pixels:
            raise UnusableInputError(header.files.image, "checksum differs", "copy it again")
        sha256 = {str(header.files.image): hashlib.sha256(header.files.image.read_bytes()).hexdigest()}
        receipt = ExposureReceipt(
            exposure_id=header.exposure_id,
            catalog_stem=header.catalog_stem,
            digest=content_digest(header.exposure_id, header.catalog_stem, header.files, sha256),
            stats=stats_of(header.files),
            sha256=sha256,
            rows=10,
            usable=self.usable,
            notes=header.notes,
            tiles=(header.exposure_key, header.exposure_key + 1),
            tile_rows=self.tile_rows.get(header.exposure_id, ()),
        )
        receipt.write(places.prepared / f"{header.exposure_id}{PREPARED}")
        return receipt

    def check(self, model: ModelRef) -> None:
        self.checked += 1
        if self.bad_model:
            raise ModelError("the reference output is not reproduced")

    def extract(self, part: Part, places: tasks.Places, stamp_size: int, config: object) -> Any:
        tile = part.tile
        for name in tile.exposures:
            assert (places.prepared / f"{name}{PREPARED}").is_file()
        if tile.pixel == self.end_at_tile:
            # not in a worker: what a signal does to the driver while it submits the tile
            raise SystemExit(143)
        self.tile_order.append(tile.pixel)
        if tile.pixel in self.defect_in_tile:
            raise ZeroDivisionError("x / 0")
        if self.error_in_tile is not None:
            raise self.error_in_tile
        return tile.pixel

    def infer(self, part: Part, extracted: Any, places: tasks.Places, model: ModelRef) -> Any:
        assert model.device == "cpu"
        return extracted

    def publish(
        self,
        tile: Tile,
        key: str,
        scored: Any,
        places: tasks.Places,
        metadata: dict[str, str],
        level: int,
    ) -> TileReceipt:
        path = partition_path(places.objects, tile.order, tile.pixel)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
        one = np.array([tile.pixel])
        histogram = np.zeros(20, dtype=np.int64)
        histogram[-1] = 2
        sample = draw(one, one.astype(float), one.astype(float), np.array([0.99], dtype=np.float32), level)
        receipt = TileReceipt(tile.order, tile.pixel, key, 4, 2, 1, 1, 0.1, histogram, sample, level, size=1)
        members = members_path(places.tiles, tile.order, tile.pixel)
        pq.write_table(pa.table({"a": [1]}, metadata={RECEIPT: receipt.as_json()}), members)
        return receipt

    def join(
        self, receipt: ExposureReceipt, key: str, members: list[Path], places: tasks.Places, _: dict[str, str]
    ) -> ExposureReceipt:
        self.joined.append(receipt.exposure_id)
        if receipt.exposure_id in self.bad_join:
            raise ZeroDivisionError("x / 0")
        (places.detections / f"{receipt.catalog_stem}.parquet").write_text("xy")
        done = replace(receipt, join_key=key, scored=2 * len(members), size=2)
        done.write(places.exposures / f"{receipt.exposure_id}.json")
        return done

    def finish(self, objects: Path, tiles: Iterator[tuple[int, int, int]], metadata: dict[str, str]) -> list[Path]:
        if self.defect_in_finish:
            raise ZeroDivisionError("x / 0")
        self.finished = len(list(tiles))
        (objects / "hats.properties").write_text("z")
        return [objects / "hats.properties"]


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch, cluster: Any) -> Stages:
    fake = Stages()
    contract = SimpleNamespace(model_id="test", prior_star_fraction=0.25, stamp_size=32, cascade=None)
    monkeypatch.setattr(inventory, "read_header", fake.read_header)
    monkeypatch.setattr(inventory, "footprint_tiles", fake.footprint_tiles)
    monkeypatch.setattr(Archive, "contract", lambda _: contract)
    monkeypatch.setattr(runtime, "load", lambda *_, **__: SimpleNamespace(contract=contract))
    for name in ("check", "prepare", "extract", "infer", "publish", "join"):
        monkeypatch.setattr(tasks, name, getattr(fake, name))
    monkeypatch.setattr(run_module, "finish_hats", fake.finish)
    # test_report.py and test_pictures.py look at the pictures
    dot = Picture(b"", 1, 1, "a dot")
    monkeypatch.setattr(pictures, "sky_map", lambda *_: dot)
    monkeypatch.setattr(pictures, "histogram", lambda *_: dot)
    return fake


@pytest.fixture
def options(tmp_path: Path) -> Options:
    names = [f"e{k}_IMG.fits" for k in (1, 2, 5)]
    for name in names:
        (tmp_path / name).write_text("x")
    (tmp_path / "list.txt").write_text("\n".join(names))
    return Options(tmp_path / "list.txt", tmp_path / "out", command=("sgclassify", "run", "<&>"))


def _record(options: Options) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((options.output / "run.json").read_text())
    return record


def _outcomes(record: dict[str, Any]) -> dict[str, str]:
    return {item["id"]: item["outcome"] for item in record["inputs"]}


def _pixels(options: Options) -> list[int]:
    """Tiles that have a partition."""
    found = (options.output / "objects").rglob("Npix=*.parquet")
    return sorted(int(path.stem.removeprefix("Npix=")) for path in found)


def _run(options: Options) -> RunRecord:
    return run(check(options), Reporter())


def test_all_done(stages: Stages, options: Options) -> None:
    assert _run(options).exit_code == 0
    record = _record(options)
    assert record["exit_code"] == 0
    assert record["message"] == ""
    assert _outcomes(record) == {"e1": "done", "e2": "done", "e5": "done"}
    first = record["inputs"][0]
    assert first["band"] == "g"
    assert (first["rows"], first["usable"], first["scored"]) == (10, 9, 4)
    assert first["notes"] == ["no WHT"]
    assert first["files"]["image"].endswith("e1_IMG.fits")
    assert "fault" not in first
    assert [tile["pixel"] for tile in record["tiles"]] == [1, 2, 3, 5, 6]
    assert record["tiles"][1]["exposures"] == ["e1", "e2"]
    assert record["counts"]["objects"] == 20
    assert record["counts"]["stars"] == 10
    assert record["model"]["id"] == "test"
    assert list(record["model"]) == list(MODEL_KEYS)
    assert record["configuration"]["config_version"] == 1
    assert set(record["timings"]) == {"headers", "cluster", "prepare", "tiles", "detections", "finish"}
    assert stages.finished == 5
    assert not (options.output / ".work").exists()
    assert not (options.output / ".lock").exists()
    html = (options.output / "report.html").read_text()
    assert "Everything was done" in html
    assert "&lt;&amp;&gt;" in html
    assert "<&>" not in html


def test_a_list_without_a_single_catalogue_is_noted(
    stages: Stages, options: Options, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    note = "no CAT was found for any of the 3 exposures"
    assert _run(options).exit_code == 0
    assert note in caplog.text
    assert any(text.startswith(note) for text in _record(options)["notes"])
    caplog.clear()
    (tmp_path / "e1_CAT.fits").write_bytes(b"")
    _run(replace(options, output=tmp_path / "other"))
    assert "no CAT" not in caplog.text


@pytest.mark.parametrize(("usable", "level"), [(9, 0), (MAX_SAMPLED // 3, 0), (MAX_SAMPLED, 2)])
def test_tiles_keep_samples_by_the_size_of_the_run(stages: Stages, options: Options, usable: int, level: int) -> None:
    stages.usable = usable
    assert _run(options).exit_code == 0
    for pixel in _pixels(options):
        receipt = TileReceipt.read(members_path(options.output / ".receipts" / "tiles", 10, pixel))
        assert receipt is not None
        assert receipt.sample_level == level


def test_bad_exposures_are_set_aside_and_touch_no_tile(
    stages: Stages, options: Options, caplog: pytest.LogCaptureFixture
) -> None:
    stages.bad_header, stages.bad_pixels = {"e2"}, {"e5"}
    assert _run(options).exit_code == 3
    record = _record(options)
    assert _outcomes(record) == {"e1": "done", "e2": "set_aside", "e5": "set_aside"}
    assert record["inputs"][1]["fault"] == "no WCS"
    assert record["inputs"][2]["advice"] == "copy it again"
    assert record["inputs"][2]["file"].endswith("e5_IMG.fits")
    assert [tile["pixel"] for tile in record["tiles"]] == [1, 2]
    for name in ("e2", "e5"):
        assert sum(f"exposure {name} " in line for line in caplog.messages) == 1


def test_missing_file_of_the_list_is_set_aside(stages: Stages, options: Options, tmp_path: Path) -> None:
    (tmp_path / "e2_IMG.fits").unlink()
    assert _run(options).exit_code == 3
    assert _outcomes(_record(options))["e2"] == "set_aside"


def test_slitless_is_skipped_and_no_fault(stages: Stages, options: Options) -> None:
    stages.slitless = {"e5"}
    assert _run(options).exit_code == 0
    record = _record(options)
    assert _outcomes(record)["e5"] == "skipped"
    assert record["inputs"][2]["fault"] == "slitless spectrum"
    assert record["counts"]["exposures_skipped"] == 1


@pytest.mark.parametrize("where", ["slitless", "bad_header", "bad_pixels"])
def test_nothing_usable(stages: Stages, options: Options, where: str) -> None:
    setattr(stages, where, {"e1", "e2", "e5"})
    assert _run(options).exit_code == 4
    record = _record(options)
    assert record["exit_code"] == 4
    assert "no exposure" in record["message"]
    assert len(record["inputs"]) == 3
    assert not (options.output / "objects").exists()
    assert not (options.output / ".work").exists()


def test_nothing_usable_leaves_earlier_products(stages: Stages, options: Options) -> None:
    assert _run(options).exit_code == 0
    stages.bad_header = {"e1", "e2", "e5"}
    assert _run(options).exit_code == 4
    assert _record(options)["exit_code"] == 0
    assert _pixels(options) == [1, 2, 3, 5, 6]


def test_defect_in_a_tile_is_tried_twice_and_set_aside(stages: Stages, options: Options) -> None:
    stages.defect_in_tile = {2}
    assert _run(options).exit_code == 3
    record = _record(options)
    assert stages.tile_order.count(2) == 2
    tile = record["tiles"][1]
    assert tile["outcome"] == "set_aside"
    assert "ZeroDivisionError" in tile["fault"]
    assert tile["traceback"] == "the traceback"
    assert record["counts"]["tiles_done"] == 4
    assert record["inputs"][0]["notes"] == ["no WHT", "tile 10/2 was set aside"]
    assert record["inputs"][0]["scored"] == 2
    assert _outcomes(record)["e1"] == "done"
    assert "Tiles set aside" in (options.output / "report.html").read_text()


@pytest.mark.parametrize(("error", "code"), [(ModelError("another"), 5), (ClusterError("lost"), 6)])
def test_errors_that_end_the_run_leave_a_record(stages: Stages, options: Options, error: Exception, code: int) -> None:
    stages.error_in_tile = error
    assert _run(options).exit_code == code
    record = _record(options)
    assert record["exit_code"] == code
    assert record["message"] == str(error)


def test_cluster_that_cannot_be_opened_leaves_a_record(
    stages: Stages, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def open_cluster(*_: Any, **__: Any) -> Iterator[None]:
        raise ClusterError("no worker came")
        yield

    monkeypatch.setattr(handle, "open_cluster", open_cluster)
    assert _run(options).exit_code == 6
    record = _record(options)
    assert record["message"] == "no worker came"
    assert set(_outcomes(record).values()) == {"pending"}


def _ended_by_a_signal(stages: Stages, options: Options, tmp_path: Path, pixel: int) -> Options:
    """Run with two tiles in flight and SIGTERM while ``pixel`` is submitted; the options that were used."""
    (tmp_path / "run.toml").write_text("config_version = 1\n[run]\nwindow = 1\n")
    chosen = replace(options, config=tmp_path / "run.toml", metrics_file=tmp_path / "m.prom")
    stages.end_at_tile = pixel
    with pytest.raises(SystemExit):
        _run(chosen)
    stages.end_at_tile = None
    return chosen


def test_what_a_run_never_reached_is_pending(stages: Stages, options: Options, tmp_path: Path) -> None:
    stages.bad_header = {"e5"}
    used = _ended_by_a_signal(stages, options, tmp_path, pixel=3)
    record = _record(used)
    assert record["record_version"] == 3
    assert (record["exit_code"], record["message"]) == (143, "ended by SIGTERM")
    assert _outcomes(record) == {"e1": "pending", "e2": "pending", "e5": "set_aside"}
    assert {tile["pixel"]: tile["outcome"] for tile in record["tiles"]} == {
        1: "done", 2: "done", 3: "pending",
    }  # fmt: skip
    for item in (record["inputs"][0], record["tiles"][2]):
        assert "fault" not in item
        assert item["exposures" if "pixel" in item else "id"]
    counts = record["counts"]
    assert (counts["exposures_pending"], counts["exposures_set_aside"], counts["tiles_pending"]) == (2, 1, 1)
    assert (counts["tiles"], counts["tiles_done"], counts["tiles_set_aside"]) == (3, 2, 0)
    metrics = (tmp_path / "m.prom").read_text()
    for kind, outcome, number in (
        ("exposures", "set_aside", 1), ("exposures", "pending", 2), ("tiles", "set_aside", 0), ("tiles", "pending", 1),
    ):  # fmt: skip
        assert f'sgclassify_run_{kind}{{outcome="{outcome}"}} {number}\n' in metrics
    # the same command goes on, and nothing waits any more
    assert _run(used).exit_code == 3
    counts = _record(used)["counts"]
    assert (counts["exposures_pending"], counts["tiles_pending"], counts["tiles_done"]) == (0, 0, 3)


def test_a_run_that_ended_while_it_prepared_has_no_tiles_yet(stages: Stages, options: Options) -> None:
    stages.end_at_exposure = "e2"
    with pytest.raises(SystemExit):
        _run(options)
    record = _record(options)
    assert set(_outcomes(record).values()) == {"pending"}
    assert record["tiles"] == []
    assert record["counts"]["exposures_set_aside"] == 0


def test_what_an_earlier_run_has_done_is_done_when_the_next_one_ends_early(
    stages: Stages, options: Options, tmp_path: Path
) -> None:
    assert _run(options).exit_code == 0
    (tmp_path / "e9_IMG.fits").write_text("x")
    options.exposure_list.write_text(options.exposure_list.read_text() + "\ne9_IMG.fits")
    used = _ended_by_a_signal(stages, options, tmp_path, pixel=9)
    record = _record(used)
    assert _outcomes(record) == {"e1": "done", "e2": "done", "e5": "done", "e9": "pending"}
    assert [tile["outcome"] for tile in record["tiles"]] == 5 * ["done"] + 2 * ["pending"]
    assert record["counts"]["rows_scored"] == 3 * 4


def test_failed_join_sets_the_exposure_aside(stages: Stages, options: Options) -> None:
    stages.bad_join = {"e2"}
    assert _run(options).exit_code == 3
    assert _outcomes(_record(options)) == {"e1": "done", "e2": "set_aside", "e5": "done"}


def test_defect_of_the_driver_leaves_a_record(stages: Stages, options: Options) -> None:
    stages.defect_in_finish = True
    with pytest.raises(ZeroDivisionError):
        _run(options)
    record = _record(options)
    assert record["exit_code"] == 1
    assert "ZeroDivisionError" in record["message"]
    assert not (options.output / ".lock").exists()


def test_contract_is_checked_before_anything_is_written(
    stages: Stages, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    def contract(_: Archive) -> Any:
        raise ModelError("of another version")

    monkeypatch.setattr(Archive, "contract", contract)
    with pytest.raises(ModelError):
        _run(options)
    assert not options.output.exists()


def test_model_that_does_not_work_leaves_products_as_they_are(stages: Stages, options: Options) -> None:
    stages.bad_model = True
    assert _run(options).exit_code == 5
    assert _record(options)["message"] == "the reference output is not reproduced"
    assert not (options.output / "objects").exists()
    stages.bad_model = False
    assert _run(options).exit_code == 0
    before = {path: path.read_bytes() for path in options.output.rglob("*") if path.is_file()}
    # even such as may be replaced
    other = options.exposure_list.with_name("other.txt")
    other.write_text("e1_IMG.fits\n")
    stages.bad_model = True
    assert _run(replace(options, exposure_list=other, overwrite=True)).exit_code == 5
    assert {path: path.read_bytes() for path in options.output.rglob("*") if path.is_file()}.items() >= before.items()


def test_run_with_nothing_to_do_needs_no_cluster_and_makes_no_catalogue(
    stages: Stages, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    _run(options)
    first = _record(options)
    stages.forget()
    stages.checked = stages.finished = 0

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("not needed")

    monkeypatch.setattr(handle, "open_cluster", refuse)
    monkeypatch.setattr(pictures, "sky_map", refuse)
    assert _run(options).exit_code == 0
    assert (stages.checked, stages.finished, stages.prepared, stages.tile_order, stages.joined) == (0, 0, [], [], [])
    again = _record(options)
    assert again["counts"] == {**first["counts"], "tiles_reused": len(first["tiles"])}
    # what is missing is made again
    (options.output / "objects" / "hats.properties").unlink()
    assert _run(options).exit_code == 0
    assert stages.finished == 5


def test_shuffled_tiles(stages: Stages, options: Options, tmp_path: Path) -> None:
    config = tmp_path / "c.toml"
    config.write_text("config_version = 1\n[run]\ntile_shuffle_seed = 3\n")
    _run(Options(options.exposure_list, options.output, config=config))
    assert sorted(stages.tile_order) == [1, 2, 3, 5, 6]
    assert stages.tile_order != [1, 2, 3, 5, 6]
    assert [tile["pixel"] for tile in _record(options)["tiles"]] == [1, 2, 3, 5, 6]


def test_largest_tiles_come_first(stages: Stages, options: Options) -> None:
    stages.tile_rows = {"e1": (3, 20), "e2": (5, 900), "e5": (30, 0)}
    _run(options)
    # of tile 3 in its four parts
    assert stages.tile_order == [3, 3, 3, 3, 5, 2, 1, 6]


def test_other_inputs_need_overwrite(stages: Stages, options: Options, tmp_path: Path) -> None:
    _run(options)
    other = tmp_path / "other.txt"
    other.write_text("e1_IMG.fits\n")
    with pytest.raises(UsageError, match="--overwrite"):
        _run(Options(other, options.output))
    assert _run(Options(other, options.output, overwrite=True)).exit_code == 0
    assert _pixels(options) == [1, 2]
    # The same list in another order is the same run.
    other.write_text("# a comment\n\n./e1_IMG.fits\n")
    assert _run(Options(other, options.output)).exit_code == 0


def test_clash_of_product_names(stages: Stages, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_header(files: ExposureFiles) -> Any:
        header = Stages().read_header(files)
        header.catalog_stem = "same_CAT"
        return header

    monkeypatch.setattr(inventory, "read_header", read_header)
    assert _run(options).exit_code == 3
    record = _record(options)
    assert _outcomes(record) == {"e1": "done", "e2": "set_aside", "e5": "set_aside"}
    assert "names of those of" in record["inputs"][1]["fault"]


def test_work_folder_is_kept_on_demand(stages: Stages, options: Options) -> None:
    _run(Options(options.exposure_list, options.output, keep_work=True))
    assert (options.output / ".work" / "exposures").is_dir()
    assert _run(options).exit_code == 0
    assert not (options.output / ".work").exists()


def test_the_same_command_again_does_nothing_twice(stages: Stages, options: Options) -> None:
    _run(options)
    stages.forget()
    assert _run(options).exit_code == 0
    assert (stages.prepared, stages.tile_order, stages.joined) == ([], [], [])
    record = _record(options)
    assert record["counts"]["tiles_reused"] == record["counts"]["tiles_done"] == 5
    assert record["inputs"][0]["scored"] == 4
    assert record["inputs"][0]["sha256"]
    assert stages.finished == 5


def test_appended_exposures_add_what_they_touch(stages: Stages, options: Options, tmp_path: Path) -> None:
    _run(options)
    stages.forget()
    (tmp_path / "e6_IMG.fits").write_text("six")
    options.exposure_list.write_text(options.exposure_list.read_text() + "\ne6_IMG.fits\n")
    assert _run(options).exit_code == 0
    # e5 touches tile 6 too, so that it is prepared once more and joined again; tile 5 is as it was
    assert sorted(stages.prepared) == ["e5", "e6"]
    assert sorted(stages.tile_order) == [6, 7]
    assert sorted(stages.joined) == ["e5", "e6"]
    assert _pixels(options) == [1, 2, 3, 5, 6, 7]


def test_a_run_that_ended_early_is_gone_on_with(stages: Stages, options: Options) -> None:
    stages.error_in_tile = ClusterError("lost")
    assert _run(options).exit_code == 6
    assert sorted(stages.prepared) == ["e1", "e2", "e5"]
    assert (options.output / ".work").is_dir()
    stages.error_in_tile = None
    stages.forget()
    assert _run(options).exit_code == 0
    assert stages.prepared == []
    assert sorted(stages.tile_order) == [1, 2, 3, 5, 6]
    assert not (options.output / ".work").exists()


def test_products_that_are_gone_are_made_again(stages: Stages, options: Options) -> None:
    _run(options)
    stages.forget()
    partition_path(options.output / "objects", 10, 3).unlink()
    (options.output / "detections" / "e5_CAT.parquet").write_text("cut off?")
    assert _run(options).exit_code == 0
    assert stages.tile_order == [3]
    assert "e5" in stages.joined
    assert "e1" not in stages.joined
    assert _pixels(options) == [1, 2, 3, 5, 6]


def test_what_was_set_aside_is_tried_again(stages: Stages, options: Options, tmp_path: Path) -> None:
    stages.bad_pixels, stages.defect_in_tile = {"e2"}, {5}
    assert _run(options).exit_code == 3
    stages.bad_pixels, stages.defect_in_tile = set(), set()
    stages.forget()
    (tmp_path / "e2_IMG.fits").write_text("copied again")
    assert _run(options).exit_code == 0
    assert sorted(stages.tile_order) == [2, 3, 5]
    assert sorted(stages.joined) == ["e1", "e2", "e5"]


@pytest.mark.parametrize("how", ["changed", "removed", "unreadable"])
def test_other_inputs_are_refused_by_name(stages: Stages, options: Options, tmp_path: Path, how: str) -> None:
    _run(options)
    stages.forget()
    if how == "changed":
        (tmp_path / "e2_IMG.fits").write_text("other")
    elif how == "removed":
        options.exposure_list.write_text("e1_IMG.fits\ne5_IMG.fits\n")
    else:
        stages.bad_header = {"e2"}
    with pytest.raises(UsageError, match="--overwrite") as caught:
        _run(options)
    assert "e2 " in str(caught.value)
    assert "e1" not in str(caught.value)
    assert _record(options)["exit_code"] == 0, "the products and their record are left alone"
    assert _pixels(options) == [1, 2, 3, 5, 6]
    assert _run(replace(options, overwrite=True)).exit_code == (3 if how == "unreadable" else 0)
    assert _pixels(options) == ([1, 2, 3, 5, 6] if how == "changed" else [1, 2, 5, 6])
    assert len(stages.tile_order) == len(_pixels(options)), "everything is computed anew"


def test_a_file_that_was_only_copied_is_the_same(stages: Stages, options: Options, tmp_path: Path) -> None:
    _run(options)
    stages.forget()
    image = tmp_path / "e2_IMG.fits"
    content = image.read_bytes()
    image.unlink()
    image.write_bytes(content)
    os.utime(image, (1, 1))
    assert _run(options).exit_code == 0
    assert stages.prepared == []


def test_a_change_that_size_and_time_hide_is_found_on_request(stages: Stages, options: Options, tmp_path: Path) -> None:
    _run(options)
    image = tmp_path / "e2_IMG.fits"
    stat = image.stat()
    image.write_text("y")
    os.utime(image, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert _run(options).exit_code == 0
    with pytest.raises(UsageError, match="e2 has changed"):
        _run(replace(options, verify_inputs=True))


def test_dry_run_writes_nothing(stages: Stages, options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = {"e1": [1, 2], "e2": [2, 3], "e5": [5, 6]}
    monkeypatch.setattr(inventory, "footprint_tiles", lambda header, *_: np.array(tiles[header.exposure_id]))
    stages.slitless = {"e5"}
    text = plan(check(options, dry=True), Reporter())
    assert "exposure e1: to be prepared" in text
    assert "exposure e5: skipped: slitless spectrum" in text
    assert "tile 10/2: 2 exposures, to be computed" in text
    assert not options.output.exists()
    _run(options)
    before = {path: path.stat().st_mtime_ns for path in options.output.rglob("*")}
    text = plan(check(options, dry=True), Reporter())
    assert "exposure e1: known" in text
    assert "tile 10/2: 2 exposures, complete" in text
    assert "3 tiles, 3 of them are complete" in text
    assert {path: path.stat().st_mtime_ns for path in options.output.rglob("*")} == before
    stages.bad_header = {"e2"}
    with pytest.raises(UsageError, match="e2 can no longer be used"):
        plan(check(options, dry=True), Reporter())
