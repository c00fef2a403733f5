"""The naive pipeline from the exposure list to the Parquet files."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import astropy.units as u
import numpy as np
import pandas as pd  # type: ignore[import-untyped]
import torch
from astropy.coordinates import SkyCoord

from performance.naive.exposures import SIZE, Exposure, read_exposure
from performance.naive.measure import Surroundings, features, grid, measure
from performance.network import BATCH, eager_network
from sgclassify.stages.arrays import F32, F64, I64
from sgclassify.stages.bands import ANCHOR_ORDER, BANDS
from sgclassify.stages.config import StageConfig
from sgclassify.stages.features import FEATURES


@dataclass(frozen=True)
class Objects:
    """What came out: positions (degrees) and probabilities, and CPU seconds by step."""

    ra: F64
    dec: F64
    p_star: F32
    seconds: dict[str, float]
    network: str


class Clock:
    """CPU seconds of the steps."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Time a block."""
        start = time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - start


def run(listed: Path, output: Path) -> Objects:
    """Classify the sources of a list of exposures that have all their files, of the official names."""
    torch.set_num_threads(1)
    clock, config = Clock(), StageConfig()
    lines = [line.strip() for line in listed.read_text().splitlines()]
    images = [listed.parent / line for line in lines if line and not line.startswith("#")]
    with clock.step("prepare"):
        exposures = [read_exposure(path, config) for path in images]
    exposures.sort(key=lambda e: (ANCHOR_ORDER.index(e.band), e.name))
    with clock.step("extract"):
        sky, members = associate(exposures, config.match_radius_arcsec)
        inputs = [look(k, sky, exposures, members, config) for k in range(len(sky))]
    with clock.step("model"):
        network, kind = eager_network(SIZE)
    with clock.step("network"):
        p_star = score(network, inputs)
    with clock.step("publish"):
        write(output, sky, exposures, members, p_star)
    return Objects(np.asarray(sky.ra.deg), np.asarray(sky.dec.deg), p_star, clock.seconds, kind)


def associate(exposures: list[Exposure], radius_arcsec: float) -> tuple[SkyCoord, list[dict[int, int]]]:
    """Objects, and for each exposure the catalogue row of each object that it shows.

    Exposures come one after the other, the deepest band first: a detection joins the object next to it, the nearer one
    of two, or begins a new one.
    """
    sky: SkyCoord | None = None
    members: list[dict[int, int]] = []
    for exposure in exposures:
        own = SkyCoord(exposure.catalog["RA"], exposure.catalog["DEC"], unit="deg")
        rows: dict[int, int] = {}
        if sky is not None and len(own):
            nearest, apart, _ = own.match_to_catalog_sky(sky)
            for row in np.argsort(apart, kind="stable"):
                if apart[row] <= radius_arcsec * u.arcsec and int(nearest[row]) not in rows:
                    rows[int(nearest[row])] = int(row)
        new = sorted(set(range(len(own))) - set(rows.values()))
        known = 0 if sky is None else len(sky)
        rows |= {known + k: row for k, row in enumerate(new)}
        if new:
            ra, dec = own.ra.deg[new], own.dec.deg[new]
            if sky is not None:
                ra, dec = np.concatenate([sky.ra.deg, ra]), np.concatenate([sky.dec.deg, dec])
            sky = SkyCoord(ra, dec, unit="deg")
        members.append(rows)
    assert sky is not None
    return sky, members


def look(
    k: int, sky: SkyCoord, exposures: list[Exposure], members: list[dict[int, int]], config: StageConfig
) -> dict[str, Any]:
    """What the network is given of one object, from the best exposure of each band."""
    arrays = {
        "image": np.zeros((7, SIZE, SIZE), np.float32),
        "valid": np.zeros((7, SIZE, SIZE), bool),
        "sigma": np.ones(7, np.float32),
        "features": np.full((7, len(FEATURES)), np.nan, np.float32),
        "psf": np.zeros((7, SIZE, SIZE), np.float32),
    }
    best = dict.fromkeys(BANDS, 0.0)
    chosen: dict[str, tuple[Any, tuple[int, int], Exposure]] = {}
    detected = set()
    for exposure, rows in zip(exposures, members, strict=True):
        if k in rows:
            row = exposure.catalog[rows[k]]
            x, y = float(row["X"]) - 1.0, float(row["Y"]) - 1.0
            detected.add(exposure.band)
        else:
            x, y = (float(v) for v in exposure.wcs.world_to_pixel(sky[k]))
        found = position_of(exposure, x, y, config)
        if found is None:
            continue
        source, corner = found
        core = grid(source)[2] <= config.core_radius_px**2
        share = float((core & source.valid).sum()) / max(int(core.sum()), 1)
        weight = share / source.sigma**2 if share >= config.min_valid_core else 0.0
        if weight > best[exposure.band]:
            best[exposure.band], chosen[exposure.band] = weight, (source, corner, exposure)
    for band, (source, (column, row), exposure) in chosen.items():
        b = BANDS.index(band)
        arrays["image"][b], arrays["valid"][b], arrays["sigma"][b] = source.image, source.valid, source.sigma
        measure(source, config.core_radius_px)
        psf = exposure.psf.stamp(source.x, source.y, column + source.x, row + source.y, SIZE)
        arrays["psf"][b] = psf
        around = Surroundings(
            exposure.psf.locus, exposure.psf.n_stars, exposure.fwhm, exposure.scale / exposure.seconds, band in detected
        )
        arrays["features"][b] = features(source, arrays["psf"][b].astype(np.float64), around)
    return arrays


def position_of(exposure: Exposure, x: float, y: float, config: StageConfig) -> Any:
    """The source at a position, in nanomaggies; None too far off the detector."""
    ny, nx = exposure.image.shape
    margin = 0.5 + config.position_margin_px
    if not (-margin < x < nx - 1 + margin and -margin < y < ny - 1 + margin):
        return None
    return exposure.source(x, y, exposure.scale)


def score(network: Any, inputs: list[dict[str, Any]]) -> F32:
    """Probabilities of stars, one batch after the other."""
    found = []
    with torch.no_grad():
        for first in range(0, len(inputs), BATCH):
            part = inputs[first : first + BATCH]
            tensors = [torch.from_numpy(np.stack([one[name] for one in part])) for name in part[0]]
            found.append(network(*tensors)[:, 0].numpy())
    p_star = np.concatenate(found)
    used = np.array([one["valid"].any() for one in inputs])
    return np.where(used, p_star, np.float32(np.nan)).astype(np.float32)


def write(output: Path, sky: SkyCoord, exposures: list[Exposure], members: list[dict[int, int]], p_star: F32) -> None:
    """One table of objects, and every catalogue with the probabilities of its rows."""
    output.mkdir(parents=True, exist_ok=True)
    objects = pd.DataFrame({"object_id": np.arange(len(sky)), "ra": sky.ra.deg, "dec": sky.dec.deg, "p_star": p_star})
    objects["p_galaxy"] = 1 - objects["p_star"]
    objects["sg_class"] = np.where(objects["p_star"] >= 0.5, "star", "galaxy")
    objects.to_parquet(output / "objects.parquet")
    for exposure, rows in zip(exposures, members, strict=True):
        owner: I64 = np.full(len(exposure.catalog), -1, dtype=np.int64)
        for k, row in rows.items():
            owner[row] = k
        names = [name for name in exposure.catalog.colnames if exposure.catalog[name].ndim == 1]
        table = exposure.catalog[names].to_pandas()
        table["object_id"] = owner
        joined = table.merge(objects[["object_id", "p_star", "p_galaxy", "sg_class"]], on="object_id", how="left")
        joined.to_parquet(output / f"{exposure.name.split('.')[0]}.parquet")
