"""Whole runs through the command line, on a small simulated field."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import chdir, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from astropy.io import fits
from click.testing import CliRunner

from sgclassify.model.data.shards import CATALOG_COLUMNS, Sample
from sgclassify.model.train.network import HEADS, Calibration, FusionNetwork
from sgclassify.model.train.outcome import Trained, export
from sgclassify.pipeline.cli import main
from sgclassify.simulation.simulate import FieldResult, SimulationConfig, simulate_field
from sgclassify.stages.features import FEATURES
from sgclassify.stages.read.names import find_siblings

FIELD = SimulationConfig(
    seed=11,
    detector_shape=(320, 320),
    mag_limit_i=25.5,
    exposures_per_band=1,
    distortion_share=0.4,
    mirrored_share=0.3,
    compressed_share=0.4,
    variant_share=0.4,
)
"""Seven bands of 24 x 24 arcsec, some with TPV, compressed, or under the older names."""

TILE_ORDER = 13
"""Tiles of 26 arcsec, so that even the small field has several."""

TIMEOUT_S = 600

SIZE = 32
"""Stamps of the untrained network."""

Watch = Callable[[subprocess.Popen[str]], None]


@dataclass(frozen=True)
class Run:
    """What a finished command left behind."""

    code: int
    stdout: str
    stderr: str
    output: Path

    @property
    def record(self) -> dict[str, Any]:
        """The content of run.json."""
        return dict(json.loads((self.output / "run.json").read_text(encoding="utf-8")))

    @property
    def inputs(self) -> dict[str, dict[str, Any]]:
        """Exposures of run.json by their identifier."""
        return {one["id"]: one for one in self.record["inputs"]}

    def digests(self, part: str = "") -> dict[str, str]:
        """SHA-256 of every file of objects/ and detections/ (or the named one) by its path."""
        return {
            str(path.relative_to(self.output)): hashlib.sha256(path.read_bytes()).hexdigest()
            for name in ([part] if part else ["objects", "detections"])
            for path in sorted((self.output / name).rglob("*"))
            if path.is_file()
        }

    def leftovers(self) -> list[str]:
        """Files in the output that are neither a product nor the folder's marker nor a receipt."""
        if not self.output.is_dir():
            return []
        allowed = {".sgclassify", ".receipts", "objects", "detections", "run.json", "report.html"}
        names = [path.relative_to(self.output) for path in self.output.rglob("*")]
        return sorted(
            str(name)
            for name in names
            if name.parts[0] not in allowed or name.name.endswith((".tmp", ".part")) or ".finish" in str(name)
        )


def _words(folder: Path, exposure_list: Path, output: Path, options: tuple[str, ...], settings: Any) -> list[str]:
    """Arguments of a run; its settings stand below [run] of its configuration file in the folder."""
    # Batches are padded to their full size, which the few objects of a tile here need not wait for.
    chosen = {"tile_order": TILE_ORDER, "batch_size": 16, "device": '"cpu"', **settings}
    lines = [f"{name} = {value}\n" for name, value in chosen.items()]
    config = folder / "run.toml"
    config.write_text("config_version = 1\n[run]\n" + "".join(lines))
    given = ["--exposure-list", str(exposure_list), "--output", str(output), "--config", str(config)]
    workers = [] if "--workers" in options else ["--workers", "1"]
    return ["run", *given, *workers, *options]


def _run_here(words: list[str], cwd: Path | None) -> tuple[int, str, str]:
    """Run the command in this process, which has imported all that it needs; its workers are processes as always."""
    with chdir(cwd or Path.cwd()):
        done = CliRunner(env={"OMP_NUM_THREADS": "1"}).invoke(main, words)
    return done.exit_code, done.stdout, done.stderr


def _run_apart(words: list[str], cwd: Path | None, watch: Watch | None) -> tuple[int, str, str]:
    """Run the command in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-m", "sgclassify.pipeline", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        if watch is not None:
            watch(process)
        stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    finally:
        process.kill()
    return process.returncode, stdout, stderr


@pytest.fixture(scope="session")
def sgclassify(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """``sgclassify(list, output, *options, **settings)`` runs the command; the settings go below [run] of its file.

    The driver is this process, unless it shall be one ``apart``, or a ``watch`` is given, which is called with the
    process while it runs.
    """

    def run(
        exposure_list: Path,
        output: Path,
        *options: str,
        cwd: Path | None = None,
        watch: Watch | None = None,
        apart: bool = False,
        **settings: int,
    ) -> Run:
        words = _words(tmp_path_factory.mktemp("config"), exposure_list, output, options, settings)
        if apart or watch is not None:
            return Run(*_run_apart(words, cwd, watch), output)
        return Run(*_run_here(words, cwd), output)

    return run


@pytest.fixture(scope="session")
def field(shared: Callable[..., Any]) -> FieldResult:
    """The simulated field; its folder holds its exposures, a list of them, and nothing else that a run reads."""

    def make(folder: Path) -> FieldResult:
        made = simulate_field(FIELD, 0, folder)
        (made.folder / "exposures.txt").write_text("".join(f"{image.name}\n" for image in made.images))
        return made

    return shared("simulated", make)


@pytest.fixture(scope="session")
def good_list(field: FieldResult) -> Path:
    """List of the exposures of the field, with relative paths."""
    return field.folder / "exposures.txt"


@pytest.fixture(scope="session")
def reference(shared: Callable[..., Any], sgclassify: Callable[..., Run], good_list: Path) -> Run:
    """The run of the field on one worker, with which others are compared."""

    def make(folder: Path) -> Run:
        done = sgclassify(good_list, folder / "output", apart=True)
        assert done.code == 0, done.stderr
        assert sum(tile["n_objects"] > 0 for tile in done.record["tiles"]) > 2
        return done

    return shared("reference", make)


@pytest.fixture(scope="session")
def small_model(shared: Callable[..., Any]) -> Path:
    """An untrained network: the runs are about everything but its answers, and it loads at once."""
    return shared("model", _small_model)


def _small_model(folder: Path) -> Path:
    path = folder / "small.pt"
    torch.manual_seed(3)
    rng = np.random.default_rng(3)
    n = 8
    sample = Sample(
        image=rng.normal(0, 0.02, (n, 7, SIZE, SIZE)).astype(np.float16),
        valid=np.ones((n, 7, SIZE, SIZE), bool),
        sigma=np.full((n, 7), 0.02, np.float32),
        features=rng.normal(size=(n, 7, len(FEATURES))).astype(np.float32),
        psf=np.full((n, 7, SIZE, SIZE), 1 / SIZE**2, np.float16),
        catalog=np.full((n, 7, len(CATALOG_COLUMNS)), np.nan, np.float32),
        table=pa.table({"object_id": np.arange(n)}),
    )
    network = FusionNetwork(SIZE, architecture="bands")
    heads = {name: torch.eye(3)[k] for k, name in enumerate(HEADS)}
    calibration = dict.fromkeys(HEADS, Calibration().requires_grad_(False))
    trained = Trained((network,), calibration, heads, 0.25, SIZE, {}, [], {"training": 0})
    export(trained, sample, "0" * 64, path)
    return path


@dataclass(frozen=True)
class Small:
    """A small job, what an undisturbed run makes of it, and how long that takes."""

    exposure_list: Path
    options: tuple[str, ...]
    undisturbed: Any
    seconds: float


@pytest.fixture(scope="session")
def small(shared: Callable[..., Any], sgclassify: Callable[..., Run], field: Any, small_model: Path) -> Small:
    """A job of three exposures with the untrained network."""

    def make(folder: Path) -> Small:
        listed = folder / "list.txt"
        listed.write_text("".join(f"{image}\n" for image in field.images[2:5]))
        options = ("--model", str(small_model), "--workers", "2")
        start = time.monotonic()
        done = sgclassify(listed, folder / "output", *options, apart=True)
        assert done.code == 0, done.stderr
        assert len(done.record["tiles"]) > 5
        return Small(listed, options, done, time.monotonic() - start)

    return shared("small", make)


QUIET = ("--no-dashboard", "--dashboard-address", "127.0.0.1:0")


class Outside:
    """Scheduler and workers in processes of their own, as an operator starts them; a fault goes into the workers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "scheduler.json"
        self.fault = folder / "fault.py"
        self.fault.write_text("")
        self.running: list[subprocess.Popen[bytes]] = []
        self.scheduler = self.start_scheduler()

    def start_scheduler(self) -> subprocess.Popen[bytes]:
        self.file.unlink(missing_ok=True)
        listening = ("--host", "127.0.0.1", "--port", "0", "--scheduler-file", str(self.file))
        process = self._dask("scheduler", *listening, *QUIET)
        deadline = time.monotonic() + 60
        while not (self.file.exists() and self.file.stat().st_size):
            assert time.monotonic() < deadline, "the scheduler did not start"
            time.sleep(0.1)
        return process

    def worker(self, *options: str) -> subprocess.Popen[bytes]:
        address = str(json.loads(self.file.read_text())["address"])
        local = ("--local-directory", str(self.folder / "local"), "--preload", str(self.fault))
        return self._dask("worker", address, "--host", "127.0.0.1", "--nthreads", "1", *QUIET, *local, *options)

    def faulty(self, code: str) -> None:
        """Code that workers run as they start; in some processes more than once."""
        self.fault.write_text(textwrap.dedent(code))

    def _dask(self, *arguments: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "dask", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            # what the deployment files set: a task that killed a worker is for the driver to try again, alone
            env={
                **os.environ,
                "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": "0",
                "OMP_NUM_THREADS": "1",
            },
        )
        self.running.append(process)
        return process

    def stop(self) -> None:
        for process in reversed(self.running):
            with suppress(ProcessLookupError):
                # nannies and the workers below them
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@pytest.fixture(scope="session")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, ...]]:
    """Options of a run on an outside cluster of one worker, which has its libraries and models loaded already."""
    cluster = Outside(tmp_path_factory.mktemp("warm"))
    cluster.worker("--resources", "CPU=1")
    yield ("--scheduler-file", str(cluster.file), "--workers", "1")
    cluster.stop()


@pytest.fixture(scope="session")
def outside_at() -> Callable[[Path], Outside]:
    """`Outside` itself, for fixtures of a wider scope."""
    return Outside


@pytest.fixture
def outside(tmp_path: Path) -> Iterator[Outside]:
    cluster = Outside(tmp_path)
    yield cluster
    cluster.stop()


Level1 = dict[str, fits.HDUList]
"""Files of an exposure in memory, by kind."""


@pytest.fixture(scope="session")
def clone(field: FieldResult) -> Callable[..., Path]:
    """``clone(folder, obsid, edit, band="i")`` copies a good exposure under another observation number.

    ``edit`` changes the `Level1` before it is written. The copy sorts before the exposures of the field: it
    would be the anchor of its objects and so change them all, were it used. Returns its IMG file.
    """

    def copy(folder: Path, obsid: int, edit: Callable[[Level1], None] | None = None, band: str = "i") -> Path:
        original = _image_of(field, band)
        found = find_siblings(original)
        files = {
            kind: _uncompressed(path, f"{obsid:011d}")
            for kind, path in zip(
                ("IMG", "WHT", "FLG", "CAT"),
                (found.image, found.weight, found.flag, found.catalog),
                strict=True,
            )
            if path is not None
        }
        if edit is not None:
            edit(files)
        folder.mkdir(parents=True, exist_ok=True)
        chip = _chip(original)
        name = f"CSST_MSC_MS_SIM_20270101000000_20270101000230_{obsid:011d}_{chip}_L1_V01_{{}}.fits"
        for kind, hdus in files.items():
            hdus.writeto(folder / name.format(kind), checksum=True)
        return folder / name.format("IMG")

    return copy


def _image_of(field: FieldResult, band: str) -> Path:
    for image in field.images:
        with fits.open(image) as hdus:
            if hdus[1].header["FILTER"] == band:
                return image
    raise LookupError(band)


def _chip(image: Path) -> str:
    with fits.open(image) as hdus:
        return str(hdus[0].header["DETECTOR"]).removeprefix("CHIP")


def _uncompressed(path: Path, obsid: str) -> fits.HDUList:
    """The HDUs of a file in memory, as plain ones."""
    with fits.open(path, memmap=False) as hdus:
        primary = fits.PrimaryHDU(header=hdus[0].header.copy())
        header = hdus[1].header.copy()
        for key in ("CHECKSUM", "DATASUM", "BZERO", "BSCALE"):
            header.remove(key, ignore_missing=True)
        kind = fits.BinTableHDU if isinstance(hdus[1], fits.BinTableHDU) else fits.ImageHDU
        data = np.array(hdus[1].data)
    extension = kind(data, header)
    for hdu in (primary, extension):
        if "OBSID" in hdu.header:
            hdu.header["OBSID"] = obsid
    return fits.HDUList([primary, extension])
