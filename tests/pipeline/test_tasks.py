"""The functions that run on workers, from stamps to the joined catalogue."""

from __future__ import annotations

import os
import pickle
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sgclassify.model.serve import runtime
from sgclassify.model.serve.loaded import ModelRef, classifier_of
from sgclassify.pipeline import tasks
from sgclassify.pipeline.errors import StaleRunError, TaskError, TaskTimeoutError
from sgclassify.pipeline.record.receipts import ExposureReceipt, TileReceipt, members_path
from sgclassify.pipeline.record.record import Failure
from sgclassify.pipeline.record.sample import GALAXY, NOT_SCORED, STAR
from sgclassify.pipeline.tasks import Places, Scored, Stamps
from sgclassify.stages.cascade import Answers
from sgclassify.stages.classify import object_table
from sgclassify.stages.config import StageConfig
from sgclassify.stages.errors import UnusableInputError
from sgclassify.stages.features import FEATURES
from sgclassify.stages.flags import SgFlag
from sgclassify.stages.healpix import index29, tile_of_index
from sgclassify.stages.prior import Prior, logit_of
from sgclassify.stages.tile import TileStamps
from sgclassify.stages.tiling import Part, Tile, tile_pad_arcsec
from sgclassify.stages.write.publish import finish_hats

ORDER = 10
METADATA = {"model_id": "test", "prior_star_fraction": "0.5"}


def _stamps(n: int = 5, size: int = 8) -> TileStamps:
    """Objects around one point; the last but one has no band to be scored on."""
    flags = np.zeros(n, dtype=np.int32)
    used = np.zeros((n, 7), dtype=bool)
    used[:, 2:4] = True
    if n > 1:
        flags[-2] = int(SgFlag.NOT_SCORED)
        used[-2] = False
    object_id = np.arange(100, 100 + n)
    members = pa.table(
        {
            "exposure_id": pa.array(["e1"] * n + ["e2"] * n, pa.string()),
            "row": np.concatenate([np.arange(n)[::-1], np.arange(n) + 1]),
            "object_id": np.concatenate([object_id, object_id]),
            "sg_flags": np.zeros(2 * n, dtype=np.int32),
        }
    )
    return TileStamps(
        object_id=object_id,
        ra=np.linspace(150.0, 150.0001, n),
        dec=np.full(n, 2.0),
        sg_flags=flags,
        used=used,
        image=np.zeros((n, 7, size, size), dtype=np.float32),
        valid=np.ones((n, 7, size, size), dtype=bool),
        sigma=np.ones((n, 7), dtype=np.float32),
        features=np.zeros((n, 7, len(FEATURES)), dtype=np.float32),
        psf=np.zeros((n, 7, size, size), dtype=np.float32),
        members=members,
    )


def _tile() -> Tile:
    (pixel,) = tile_of_index(index29([150.0], [2.0]), ORDER)
    return Tile(ORDER, int(pixel), ("e1", "e2"))


P_STAR = np.array([0.9, 0.2, np.nan, 0.7, 0.5], dtype=np.float32)
BOTH = np.stack([P_STAR, 1 - P_STAR], axis=1)
LOGIT = logit_of(BOTH)


def test_objects_that_cannot_be_scored_are_null_and_say_why() -> None:
    table = object_table(_stamps(), P_STAR, LOGIT).sort_by("object_id").to_pydict()
    assert table["p_star"] == [pytest.approx(0.9), pytest.approx(0.2), None, None, 0.5]
    assert table["sg_class"] == ["star", "galaxy", None, None, "star"]
    assert table["sg_flags"] == [0, 0, int(SgFlag.NOT_SCORED | SgFlag.NOT_FINITE), int(SgFlag.NOT_SCORED), 0]
    assert table["n_bands"] == [2, 2, 0, 0, 2]
    assert table["bands"] == ["g,r", "g,r", "", "", "g,r"]


class Fake:
    """A classifier that knows the answers."""

    device = torch.device("cpu")
    cascade = None

    def __init__(self) -> None:
        self.calls = 0

    def probabilities(self, image: Any, *_: Any) -> Any:
        self.calls += 1
        return BOTH[: len(image)]


class Turned(Fake):
    """Another answer in each symmetry, half of the right one on average."""

    def probabilities(self, image: Any, *_: Any) -> Any:
        p_star = P_STAR * self.calls / 7
        self.calls += 1
        return np.stack([p_star, 1 - p_star], axis=1)


def test_infer_uses_the_model_once_for_all_and_not_for_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fake = Fake()
    monkeypatch.setattr(tasks, "classifier_of", lambda model: fake)
    # a worker that offers a GPU where torch sees none
    model = ModelRef(None, "00", 64, 1, device="cuda")
    scored = tasks.infer(Part(_tile(), 11, 8), Stamps(_stamps(), 1.0, 0.0), _places(tmp_path), model)
    assert scored.objects.num_rows == 5
    assert fake.calls == 1
    assert scored.seconds >= 1.0
    assert scored.device == "cpu"
    monkeypatch.setattr(tasks, "classifier_of", lambda model: pytest.fail("nothing to score"))
    nothing = tasks.infer(Part(_tile(), 11, 8), Stamps(_stamps(0), 1.0, 0.0), _places(tmp_path), model)
    assert (nothing.objects.num_rows, nothing.device) == (0, "")


def test_infer_assumes_another_prior_and_averages_where_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    turned = Turned()
    monkeypatch.setattr(tasks, "classifier_of", lambda model: turned)
    prior = Prior((0.2, 0.8), (20.0, 24.0))
    model = ModelRef(None, "00", 64, 1, tta=True, own_prior=0.5, prior=prior)
    table = (
        tasks.infer(Part(_tile(), 11, 8), Stamps(_stamps(), 1.0, 0.0), _places(tmp_path), model)
        .objects.sort_by("object_id")
        .to_pydict()
    )
    assert turned.calls == 8
    # without a flux, the faint end: four stars to a galaxy
    assert table["p_star"][0] == pytest.approx(0.45 * 4 / (0.45 * 4 + 0.55))
    assert table["p_star"][2] is None
    assert table["p_galaxy"][0] == pytest.approx(1.0 - table["p_star"][0])
    # under the model's own prior, so that any other can be assumed later
    assert table["logit"][0] == pytest.approx(np.log(0.45 / 0.55))
    assert table["logit"][2] is None
    assert hash(model) == hash(pickle.loads(pickle.dumps(model)))


@pytest.mark.parametrize("options", [{}, {"exact": True}, {"tta": True}])
def test_infer_asks_in_stages_unless_told_not_to(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, options: dict[str, bool]
) -> None:
    stage = np.array([1, 2, 3, 1, 3], dtype=np.int8)
    shifts = []

    class Staged(Fake):
        def cascade(self, inputs: Any, shift: Any) -> Answers:
            shifts.append(shift.tolist())
            return Answers(BOTH[::-1], stage)

    fake = Staged()
    monkeypatch.setattr(tasks, "classifier_of", lambda model: fake)
    model = ModelRef(None, "00", 64, 1, own_prior=0.5, prior=Prior((0.8,)), **options)
    table = tasks.infer(Part(_tile(), 11, 8), Stamps(_stamps(), 1.0, 0.0), _places(tmp_path), model).objects.sort_by(
        "object_id"
    )
    # the model has no number for the third object, and the fourth has no band
    if options:
        assert not shifts
        assert table["sg_stage"].to_pylist() == [3, 3, 0, 0, 3]
        assert table["logit"][0].as_py() == pytest.approx(LOGIT[0])
    else:
        assert shifts == [[pytest.approx(np.log(4.0))] * 5]
        assert fake.calls == 0
        assert table["sg_stage"].to_pylist() == [1, 2, 0, 0, 3]
        assert table["logit"][0].as_py() == pytest.approx(LOGIT[4])


def test_classifier_is_loaded_once_and_must_be_the_very_model(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def load(path: Path | None, **options: Any) -> object:
        calls.append((path, options))
        return object()

    monkeypatch.setattr(runtime, "load", load)
    classifier_of.cache_clear()
    model = ModelRef(Path("/m.pt"), "ab", 32, 1)
    assert classifier_of(model) is classifier_of(pickle.loads(pickle.dumps(model)))
    assert calls == [(Path("/m.pt"), {"device": "cpu", "batch_size": 32, "expected_sha256": "ab"})]
    classifier_of.cache_clear()


def _places(folder: Path) -> Places:
    places = Places(
        *(folder / n for n in ("prepared", "objects", "detections", "exposures", "tiles", "notes", "token")),
        "t",
    )
    for path in (places.prepared, places.objects, places.detections, places.exposures, places.tiles):
        path.mkdir(parents=True, exist_ok=True)
    places.token_path.write_text("t")
    return places


def _publish(tmp_path: Path, stamps: TileStamps, p_star: np.ndarray[Any, Any], level: int = 0) -> TileReceipt:
    scored = Scored(object_table(stamps, p_star, np.zeros(len(p_star))), stamps.members, 1.0, "cpu", 12.5)
    return tasks.publish(_tile(), "key", [scored], _places(tmp_path), METADATA, level)


def _exposure() -> ExposureReceipt:
    return ExposureReceipt("e2", "e2_CAT", "dd", {}, {}, 7, 6, (), ())


def test_publish_and_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    receipt = _publish(tmp_path, _stamps(), P_STAR)
    counts = receipt.n_objects, receipt.n_stars, receipt.n_galaxies, receipt.n_not_scored
    assert counts == (5, 2, 1, 2)
    assert receipt.histogram.sum() == 3
    sample = np.sort(receipt.sample, order="ra")
    assert sample["kind"].tolist() == [STAR, GALAXY, NOT_SCORED, NOT_SCORED, STAR]
    np.testing.assert_allclose(sample["ra"], np.linspace(150.0, 150.0001, 5), atol=6e-7)
    assert receipt.peak_mib > 12.5
    assert receipt.worker.endswith(f":{os.getpid()}")
    assert len(pickle.dumps(receipt)) < 20_000
    (partition,) = (tmp_path / "objects").rglob("*.parquet")
    assert receipt.size == partition.stat().st_size
    # the receipt that a later run finds
    places = _places(tmp_path)
    files = [members_path(places.tiles, receipt.order, receipt.pixel)]
    found = TileReceipt.read(files[0])
    assert found is not None
    assert found.as_json() == receipt.as_json()

    catalog = pa.table({"objID": np.arange(7), "Mag_Kron": np.linspace(20, 26, 7)})
    own = np.zeros(7, dtype=np.int32)
    own[0] = int(SgFlag.NO_POSITION)
    pq.write_table(catalog, tmp_path / "catalog.parquet")
    pq.write_table(pa.table({"sg_flags": own}), tmp_path / "detections.parquet")
    prepared: Any = SimpleNamespace(
        catalog_path=tmp_path / "catalog.parquet", detections_path=tmp_path / "detections.parquet"
    )
    monkeypatch.setattr(tasks, "load_prepared", lambda *_: prepared)
    done = tasks.join(_exposure(), "made of", files, places, METADATA)
    assert (done.scored, done.join_key) == (3, "made of")
    assert ExposureReceipt.read(places.exposures / "e2.json") == done
    assert done.size == (tmp_path / "detections" / "e2_CAT.parquet").stat().st_size
    table = pq.read_table(tmp_path / "detections" / "e2_CAT.parquet")
    assert table.column_names[:3] == ["objID", "Mag_Kron", "object_id"]
    assert table["object_id"].to_pylist() == [-1, 100, 101, 102, 103, 104, -1]
    assert table["p_star"].to_pylist()[1] == pytest.approx(0.9)
    flags = table["sg_flags"].to_pylist()
    assert flags[0] == int(SgFlag.NO_POSITION | SgFlag.NOT_SCORED)
    assert flags[1] == 0
    assert flags[6] == int(SgFlag.NOT_SCORED)

    assert tasks.join(_exposure(), "", [], places, METADATA).scored == 0
    table = pq.read_table(tmp_path / "detections" / "e2_CAT.parquet")
    assert table["p_star"].null_count == 7
    assert all(flag & SgFlag.NOT_SCORED for flag in table["sg_flags"].to_pylist())


def test_the_parts_of_a_tile_make_one_product(tmp_path: Path) -> None:
    whole = _publish(tmp_path / "whole", stamps := _stamps(), P_STAR)
    objects = object_table(stamps, P_STAR, np.zeros(5))
    parts = []
    for chosen in ([100, 103], [101, 102, 104], []):
        where = pa.array(np.isin(objects["object_id"].to_numpy(), chosen))
        members = stamps.members.filter(pa.array(np.isin(stamps.members["object_id"].to_numpy(), chosen)))
        parts.append(Scored(objects.filter(where), members, 1.0, "cpu" if chosen else ""))
    places = _places(tmp_path / "parts")
    receipt = tasks.publish(_tile(), "key", parts, places, METADATA, 0)
    assert (receipt.device, receipt.n_objects, receipt.n_stars) == ("cpu", whole.n_objects, whole.n_stars)
    assert receipt.seconds >= 3.0
    one, other = ((tmp_path / name / "objects").rglob("*.parquet") for name in ("whole", "parts"))
    assert next(one).read_bytes() == next(other).read_bytes()
    rows = [
        pq.read_table(members_path(tmp_path / name / "tiles", receipt.order, receipt.pixel)).sort_by("row").to_pylist()
        for name in ("whole", "parts")
    ]
    assert rows[0] == rows[1]


def test_tile_without_objects_has_no_partition(tmp_path: Path) -> None:
    receipt = _publish(tmp_path, _stamps(0), P_STAR[:0])
    assert receipt.n_objects == 0
    assert not list((tmp_path / "objects").rglob("*.parquet"))
    assert members_path(tmp_path / "tiles", receipt.order, receipt.pixel).is_file()
    finish_hats(tmp_path / "objects", [], METADATA)
    assert (tmp_path / "objects" / "hats.properties").is_file()


def test_tile_of_a_large_run_sends_a_small_receipt(tmp_path: Path) -> None:
    stamps, p_star = _stamps(2000, size=1), np.full(2000, 0.9, dtype=np.float32)
    receipt = _publish(tmp_path, stamps, p_star, level=2)
    assert 400 < len(receipt.sample) < 600
    assert receipt.sample_level == 2
    assert len(pickle.dumps(receipt)) < 20_000
    assert len(receipt.as_json()) < 20_000
    # the same objects, whatever else the tile keeps
    every = _publish(tmp_path, stamps, p_star).sample
    assert len(every) == 2000
    assert every[every["rank"] >= 2].tolist() == receipt.sample.tolist()


def test_pad_covers_the_tolerances_of_the_stages() -> None:
    config = StageConfig()
    assert tile_pad_arcsec(config) >= config.position_tolerance_arcsec + 2 * config.blend_radius_arcsec


def test_nothing_is_written_for_a_run_that_is_over(tmp_path: Path) -> None:
    places = _places(tmp_path)
    places.token_path.write_text("another run's")
    scored = Scored(object_table(_stamps(), P_STAR, LOGIT), _stamps().members, 1.0)
    with pytest.raises(StaleRunError):
        tasks.publish(_tile(), "key", [scored], places, METADATA, 0)
    assert not list(places.objects.iterdir())
    places.token_path.unlink()
    with pytest.raises(StaleRunError):
        places.check()


def _deep(n: int) -> int:
    return _deep(n + 1)


class _Odd(Exception):
    """Cannot be unpickled: its constructor wants more than it passes on."""

    def __init__(self, one: str, two: str) -> None:
        super().__init__(one)


def _raise(error: Exception) -> None:
    raise error


def test_any_error_crosses_the_border_of_a_process() -> None:
    with pytest.raises(TaskError) as deep:
        tasks.bordered(_deep)(0)
    with pytest.raises(TaskError) as odd:
        tasks.bordered(_raise)(_Odd("a", "b"))
    for caught, name in ((deep, "RecursionError"), (odd, "_Odd")):
        back = pickle.loads(pickle.dumps(caught.value))
        failure = Failure.from_error(back)
        assert failure.fault.startswith(f"unexpected {name}: ")
        assert "line" in failure.traceback
        assert len(failure.traceback) < 20_000
    with pytest.raises(UnusableInputError) as known:
        tasks.bordered(_raise)(UnusableInputError("/a", "b", "c"))
    assert vars(pickle.loads(pickle.dumps(known.value))) == vars(UnusableInputError("/a", "b", "c"))
    with pytest.raises(FileNotFoundError) as system:
        tasks.bordered(_raise)(FileNotFoundError(2, "No such file", "/a.fits"))
    assert str(pickle.loads(pickle.dumps(system.value))) == "[Errno 2] No such file: '/a.fits'"


def test_a_job_that_ended_a_worker_is_not_taken_by_the_next_one(tmp_path: Path) -> None:
    places = replace(_places(tmp_path), limit_s=60.0)
    places.notes.mkdir()
    scored = Scored(object_table(_stamps(), P_STAR, LOGIT), _stamps().members, 1.0)
    places.note(str(_tile())).write_text("{}")
    with pytest.raises(TaskTimeoutError, match="took longer than 60 s") as caught:
        tasks.publish(_tile(), "key", [scored], places, METADATA, 0)
    back = pickle.loads(pickle.dumps(caught.value))
    assert Failure.from_error(back).advice.startswith("look after the disk")
    places.note(str(_tile())).unlink()
    assert tasks.publish(_tile(), "key", [scored], places, METADATA, 0).n_objects == 5
