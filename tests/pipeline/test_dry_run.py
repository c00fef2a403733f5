"""What the dry run says is what the run does: the real stages on tiny exposures, on a cluster in this process."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sgclassify.model.serve import runtime
from sgclassify.model.serve.archive import Archive
from sgclassify.pipeline import run as run_module
from sgclassify.pipeline import tasks
from sgclassify.pipeline.progress import Reporter
from sgclassify.pipeline.record.receipts import members_path
from sgclassify.pipeline.request import Options, check
from sgclassify.pipeline.run import plan, run
from sgclassify.stages.errors import UsageError

TILE_ORDER = 13
"""Tiles of 26 arcsec, so that even exposures of 10 arcsec have several."""

SHAPE = (130, 130)

Work = tuple[set[str], set[str], set[str]]
"""Exposures to prepare, tiles to compute, catalogues to join."""


class Night:
    """An exposure list that grows, and its output folder."""

    def __init__(self, folder: Path, write: Callable[..., Any], columns: Any, cluster: Any) -> None:
        self.folder = folder
        self.cluster = cluster
        self._write, self._columns = write, columns
        config = folder / "run.toml"
        config.write_text(f"config_version = 1\n[run]\ntile_order = {TILE_ORDER}\nwindow = 1\n")
        self.options = Options(folder / "list.txt", folder / "out", config=config, keep_work=False)

    def append(self, name: str, chip: int, offset_arcsec: float = 0.0) -> Path:
        """Append an exposure, so far north of the first."""
        offset = offset_arcsec / 3600
        columns = self._columns(12, SHAPE)
        columns["DEC"] = columns["DEC"] + offset
        files = self._write(
            self.folder / "in", name=f"{name}_{{KIND}}.fits", chip=chip, shape=SHAPE, columns=columns,
            cards={"CRVAL2": 2.0 + offset}, primary={"DATE-OBS": f"2028-06-{chip:02d}T03:03:51"},
        )  # fmt: skip
        with self.options.exposure_list.open("a") as stream:
            stream.write(f"{files.image}\n")
        return Path(files.image)

    def said(self, **options: Any) -> Work:
        """What the dry run says that is to do."""
        text = plan(check(replace(self.options, **options), dry=True), Reporter())
        exposures = dict(re.findall(r"^exposure (\S+): (.*)$", text, re.MULTILINE))
        work = (
            {name for name, state in exposures.items() if "to be prepared" in state},
            set(re.findall(r"^(tile \S+): .*, to be computed$", text, re.MULTILINE)),
            {name for name, s in exposures.items() if s == "to be prepared" or "joined" in s},
        )
        counts = re.findall(
            r"to do: (\d+) exposures to prepare, (\d+) tiles to compute, (\d+) cat", text.splitlines()[-1]
        )
        assert counts == [tuple(str(len(part)) for part in work)]
        return work

    def did(self, **options: Any) -> Work:
        """What the run then does."""
        self.cluster.done.clear()
        run(check(replace(self.options, **options)), Reporter())
        tasks_of = {kind: [job for name, job in self.cluster.done if name == kind] for kind in (
            "prepare", "extract", "join")}  # fmt: skip
        return (
            {header.exposure_id for header in tasks_of["prepare"]},
            {str(tile) for tile in tasks_of["extract"]},
            {receipt.exposure_id for receipt in tasks_of["join"]},
        )


@pytest.fixture
def night(
    tmp_path: Path,
    write_level1: Callable[..., Any],
    make_columns: Any,
    cluster: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> Night:
    class Classifier:
        device = torch.device("cpu")
        cascade = None
        contract = SimpleNamespace(model_id="test", prior_star_fraction=0.5, stamp_size=8, cascade=None)

        def probabilities(self, image: Any, *_: Any) -> Any:
            return np.full((len(image), 2), 0.5, dtype=np.float32)

    monkeypatch.setattr(runtime, "load", lambda *_, **__: Classifier())
    monkeypatch.setattr(Archive, "contract", lambda _: Classifier.contract)
    monkeypatch.setattr(tasks, "classifier_of", lambda _: Classifier())
    # they take longer than all the rest, and decide nothing here
    monkeypatch.setattr(run_module, "write_report", lambda *_: None)
    monkeypatch.setattr(run_module, "finish_hats", lambda *_: [])
    made = Night(tmp_path, write_level1, make_columns, cluster)
    made.append("a", 8)
    made.append("b", 9, 20.0)
    return made


def ended_at(task: str, number: int, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """SIGTERM while the task of this number is submitted."""
    honest, seen = getattr(tasks, task), []

    def ending(*arguments: Any) -> Any:
        seen.append(arguments)
        if len(seen) == number:
            raise SystemExit(143)
        return honest(*arguments)

    ending.__name__ = task
    monkeypatch.setattr(tasks, task, ending)
    return monkeypatch


def failing_join(*_: Any) -> None:
    raise OSError(5, "Input/output error")


def test_fresh_folder_and_the_same_command_again(night: Night) -> None:
    said = night.said()
    assert said[0] == said[2] == {"a", "b"}
    assert len(said[1]) > 3
    assert not night.options.output.exists()
    assert night.did() == said
    assert night.said() == night.did() == (set(), set(), set())


@pytest.mark.parametrize(("task", "number"), [("prepare", 2), ("extract", 1), ("extract", 4), ("join", 1), ("join", 2)])
def test_half_done_folder(night: Night, monkeypatch: pytest.MonkeyPatch, task: str, number: int) -> None:
    everything = night.said()
    with monkeypatch.context() as patch:
        ended_at(task, number, patch)
        with pytest.raises(SystemExit):
            night.did()
    said = night.said()
    assert said != everything
    assert night.did() == said
    assert night.said() == (set(), set(), set())


def test_appended_exposures(night: Night) -> None:
    night.did()
    night.append("c", 23, 20.0)
    night.append("d", 24, 3600.0)
    said = night.said()
    # c shares tiles with a and b, d with none
    assert said[0] == said[2] == {"a", "b", "c", "d"}
    assert night.did() == said
    assert night.said() == night.did() == (set(), set(), set())


def test_appended_exposures_in_a_half_done_folder(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    night.did()
    night.append("c", 23, 20.0)
    with monkeypatch.context() as patch:
        ended_at("extract", 2, patch)
        with pytest.raises(SystemExit):
            night.did()
    night.append("d", 24, 3600.0)
    said = night.said()
    assert said[0] == {"d"}, "what the first run prepared once more is of use"
    assert night.did() == said


def test_what_was_set_aside(night: Night, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "join", failing_join)
        night.did()
    said = night.said()
    # their tiles are complete, which shows in the content of their files
    assert said == ({"a", "b"}, set(), {"a", "b"})
    assert night.did() == said


def test_products_that_are_gone(night: Night) -> None:
    night.did()
    output = night.options.output
    (output / "detections" / "a_CAT.parquet").unlink()
    assert night.said() == night.did() == ({"a"}, set(), {"a"})
    partition = sorted((output / "objects").rglob("Npix=*.parquet"))[0]
    partition.unlink()
    said = night.said()
    pixel = int(partition.stem.removeprefix("Npix="))
    assert said[1] == {f"tile {TILE_ORDER}/{pixel}"}
    assert night.did() == said
    members_path(output / ".receipts" / "tiles", TILE_ORDER, pixel).unlink()
    assert night.said() == night.did() == said


@pytest.mark.parametrize("complete", [False, True])
def test_work_of_other_settings(night: Night, monkeypatch: pytest.MonkeyPatch, complete: bool) -> None:
    """What a run of other settings has prepared is of no use: a run removes it, the dry run does not see it."""
    if complete:
        night.did()
    night.append("c", 23, 20.0)
    with monkeypatch.context() as patch:
        ended_at("prepare", 3, patch)
        with pytest.raises(SystemExit):
            night.did(prior="0.3", overwrite=True)
    said = night.said()
    assert said[0] == {"a", "b", "c"}, "c shares tiles with both"
    assert night.did() == said


@pytest.mark.parametrize("how", ["settings", "inputs"])
def test_products_that_are_replaced(night: Night, how: str) -> None:
    everything = night.did()
    options: dict[str, Any] = {}
    if how == "settings":
        options = {"prior": "0.3"}
    else:
        lines = night.options.exposure_list.read_text().splitlines()
        night.options.exposure_list.write_text(lines[0] + "\n")
    with pytest.raises(UsageError, match="--overwrite"):
        night.said(**options)
    said = night.said(overwrite=True, **options)
    assert said == everything if how == "settings" else said[0] == {"a"}
    assert night.did(overwrite=True, **options) == said
    assert night.said(**options) == (set(), set(), set())
