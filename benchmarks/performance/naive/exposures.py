"""Exposures as a user would hold them: whole in memory, with their sky, catalogue, WCS and PSF."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.nddata import Cutout2D, NoOverlapError
from astropy.table import Table
from astropy.wcs import WCS
from scipy.ndimage import generic_filter, map_coordinates

from performance.naive.measure import Source, measure
from performance.naive.psf import Psf, point_source_psf
from sgclassify.stages.arrays import F32, F64, U16, Bool
from sgclassify.stages.bands import nanomaggies_per_count
from sgclassify.stages.config import StageConfig
from sgclassify.stages.flags import InputFlag

SIZE = 32
"""Side of the stamps, pixels."""

HARMLESS = int(InputFlag.GHOST | InputFlag.SCATTERED)


@dataclass
class Exposure:
    """One exposure; arrays are [y, x]. `image` is without the sky, in e-/s; positions are 0-based pixels."""

    name: str
    band: str
    image: F32
    valid: Bool
    flags: U16
    noise: F32
    wcs: WCS
    zero_point: float
    seconds: float
    fwhm: float
    catalog: Table
    psf: Psf = field(init=False)

    @property
    def scale(self) -> float:
        """Nanomaggies per e-/s."""
        return nanomaggies_per_count(self.zero_point)

    def source(self, x: float, y: float, scale: float = 1.0) -> tuple[Source, tuple[int, int]] | None:
        """The stamp round a position, and its first column and row; None off the detector."""
        try:
            cut = Cutout2D(self.image, (x, y), SIZE, mode="partial", fill_value=0.0)
        except NoOverlapError:
            return None
        valid = Cutout2D(self.valid, (x, y), SIZE, mode="partial", fill_value=False).data
        flags = Cutout2D(self.flags, (x, y), SIZE, mode="partial", fill_value=0).data
        column, row = int(np.ceil(x - SIZE / 2)), int(np.ceil(y - SIZE / 2))
        ny, nx = self.image.shape
        noise = float(self.noise[int(np.clip(np.rint(y), 0, ny - 1)), int(np.clip(np.rint(x), 0, nx - 1))])
        image = np.where(valid, cut.data * np.float32(scale), 0.0)
        saturated = (flags & int(InputFlag.SATURATED)) != 0
        return Source(image, valid, saturated, noise * scale, x - column, y - row), (column, row)


def read_exposure(path: Path, config: StageConfig) -> Exposure:
    """Read the four files of an exposure, measure its sky, and find its PSF."""
    with fits.open(path) as hdus, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        primary, header = hdus[0].header, hdus[1].header
        image = np.asarray(hdus[1].data, dtype=np.float32)
        wcs = WCS(header)
    weight = np.asarray(fits.getdata(str(path).replace("_IMG", "_WHT"), 1), dtype=np.float32)
    flags = np.asarray(fits.getdata(str(path).replace("_IMG", "_FLG"), 1), dtype=np.uint16)
    catalog = Table.read(str(path).replace("_IMG", "_CAT"), hdu=1)
    valid = (weight > 0) & np.isfinite(image) & ((flags & (0xFFFF & ~HARMLESS)) == 0)
    level, noise = sky(image, valid, config.sky_box_px)
    exposure = Exposure(
        path.name, str(header["FILTER"]), image - level, valid & (noise > 0), flags, noise, wcs,
        float(header["ZP"]), float(primary["EXPTIME"]), float(header["FWHM"]), catalog,
    )  # fmt: skip
    sources, corners = [], []
    for row in catalog:
        found = exposure.source(float(row["X"]) - 1.0, float(row["Y"]) - 1.0)
        if found is not None:
            measure(found[0], config.core_radius_px)
            sources.append(found[0])
            corners.append(found[1])
    exposure.psf = point_source_psf(sources, corners, exposure.fwhm, image.shape, config.core_radius_px)
    return exposure


def sky(image: F32, valid: Bool, box: int) -> tuple[F32, F32]:
    """Level and noise of every pixel of an image, from the statistics of its boxes."""
    edges = [_edges(n, box) for n in image.shape]
    level, noise = (np.full((len(edges[0]) - 1, len(edges[1]) - 1), np.nan) for _ in range(2))
    for j, k in np.ndindex(*level.shape):
        part = np.s_[edges[0][j] : edges[0][j + 1], edges[1][k] : edges[1][k + 1]]
        pixels = image[part][valid[part]]
        if pixels.size >= max(9, 0.1 * valid[part].size):
            level[j, k], noise[j, k] = box_sky(np.sort(pixels).astype(np.float64))
    at = []
    for n, edge in zip(image.shape, edges, strict=True):
        centres = (np.array(edge[:-1]) + np.array(edge[1:]) - 1) / 2
        at.append(np.interp(np.arange(n), centres, np.arange(len(centres))))
    places = np.meshgrid(*at, indexing="ij")
    maps = []
    for mesh in (level, noise):
        mesh = np.where(np.isnan(mesh), np.nanmedian(mesh), mesh)
        mesh = generic_filter(mesh, np.nanmedian, size=3, mode="constant", cval=np.nan)
        maps.append(map_coordinates(mesh, places, order=1, mode="nearest").astype(np.float32))
    return maps[0], maps[1]


def _edges(n: int, box: int) -> list[int]:
    count = max(1, (n + box // 2) // box)
    return [*(box * k for k in range(count)), n]


def box_sky(pixels: F64) -> tuple[float, float]:
    """Mode and standard deviation of the sky in a box, from its sorted pixels."""
    for _ in range(12):
        median, lower = np.quantile(pixels, [0.5, 0.15865525])
        sigma = (median - lower) * 1.00382
        if not sigma > 0:
            break
        kept = pixels[(pixels >= median - 3.0 * sigma) & (pixels <= median + 3.0 * sigma)]
        if kept.size == pixels.size:
            break
        pixels = kept
    mean, cut = pixels.mean(), int(0.3 * pixels.size)
    centre = pixels[cut : pixels.size - cut].mean()
    below = pixels[pixels < centre]
    sigma = np.sqrt(((below - centre) ** 2).mean()) * 1.01361 if below.size else pixels.std()
    excess = mean - centre
    return float(centre - (1.5 * excess if abs(excess) < 0.3 * sigma else 0.0)), float(sigma)
