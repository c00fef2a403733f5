"""Exposures of the foreign fields: where they look, what is drawn on them, and what a field is made of.

Every field has its own mixture of effects of detectors and headers. Some fields lack a band, a catalogue or a file. The
order of the random draws is part of the fields: keep it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

import galsim
import numpy as np
from astropy.io import fits
from astropy.wcs import WCS
from foreign_detector import EXPOSURE_S, Effects, expose
from foreign_files import Exposure, write_exposure, write_truth
from foreign_photographs import Photograph, as_photographed
from foreign_psf import ExposurePsf, PsfTraits
from foreign_sky import Array, Rng, Sky, Source, draw_sources

from sgclassify.simulation.camera import CHIPS_OF_BAND, chip_center
from sgclassify.simulation.filters import FILTERS
from sgclassify.stages.bands import BANDS, PIXEL_SCALE, REAL_SHAPE

MARGIN_PX: Final = 100  # beyond the edges of a field, where sources are drawn too

# special fields, by number
ACROSS_RA_ZERO: Final = 13
MISSING_BANDS: Final = {4: ("NUV",), 7: ("u", "y"), 12: ("z",), 16: ("NUV", "u", "y"), 21: ("g", "r")}
TWO_EXPOSURES_PER_BAND: Final = (2, 10, 19)
PROJECTIONS: Final = ("TAN", "TAN-SIP", "TPV", "TAN")  # in turns


def make_wcs(
    sky: Sky, chip: int, shape: tuple[int, int], roll: float, parity: int, projection: str, rng: Rng
) -> fits.Header:
    """WCS cards of a part (ny, nx) of a detector that looks near a field at a position angle (radians)."""
    ny, nx = shape
    # where the middle of the field falls
    x0, y0 = (nx - 1) / 2 + rng.uniform(-70, 70), (ny - 1) / 2 + rng.uniform(-70, 70)
    x_chip, y_chip = chip_center(chip)
    x_part, y_part = rng.integers(0, REAL_SHAPE[1] - nx), rng.integers(0, REAL_SHAPE[0] - ny)
    scale, cosine, sine = PIXEL_SCALE / 3600, np.cos(roll), np.sin(roll)
    header = fits.Header()
    header["WCSAXES"] = 2
    header["CTYPE1"], header["CTYPE2"] = "RA---" + projection, "DEC--" + projection
    header["CUNIT1"] = header["CUNIT2"] = "deg"
    header["CRVAL1"], header["CRVAL2"] = sky.ra, sky.dec
    header["CRPIX1"] = REAL_SHAPE[1] / 2 - x_chip - x_part
    header["CRPIX2"] = REAL_SHAPE[0] / 2 - y_chip - y_part
    header["CD1_1"], header["CD1_2"] = parity * cosine * scale, -sine * scale
    header["CD2_1"], header["CD2_2"] = parity * sine * scale, cosine * scale
    header["RADESYS"], header["EQUINOX"] = "ICRS", 2000.0
    strength = rng.uniform(0.5, 1.5) * rng.choice([-1, 1])
    if projection == "TAN-SIP":
        header["A_ORDER"] = header["B_ORDER"] = 3
        header["A_3_0"] = header["A_1_2"] = header["B_0_3"] = header["B_2_1"] = strength * 6e-13
        header["A_2_0"], header["B_1_1"], header["B_0_2"] = rng.normal(0, 3e-9, 3)
    if projection == "TPV":
        for axis in (1, 2):
            header[f"PV{axis}_1"] = 1.0
            header[f"PV{axis}_7"] = header[f"PV{axis}_9"] = strength * 1.3e-3
            header[f"PV{axis}_4"], header[f"PV{axis}_5"] = rng.normal(0, 5e-5, 2)
    # the part lies far from the reference pixel: move its sky position until the part looks at the field
    for _ in range(8):
        ra, dec = WCS(header).all_pix2world(x0, y0, 0)
        header["CRVAL1"] = (header["CRVAL1"] + sky.ra - float(ra)) % 360
        header["CRVAL2"] = header["CRVAL2"] + sky.dec - float(dec)
    return header


def sky_to_detector(wcs: WCS, dec: float, shape: tuple[int, int]) -> Array:
    """Matrix from offsets on the sky to offsets on the detector, both in arcsec, at the middle of an exposure."""
    y, x = shape[0] / 2, shape[1] / 2
    ra, decs = wcs.all_pix2world([x, x + 1, x], [y, y, y + 1], 0)
    east = ((ra[1:] - ra[0] + 180) % 360 - 180) * np.cos(np.radians(dec))
    return PIXEL_SCALE * np.linalg.inv(3600 * np.array([east, decs[1:] - decs[0]]))


class Canvas:
    """Image of an exposure (electrons) to draw sources on; `to_detector` comes from `sky_to_detector`."""

    def __init__(self, band: str, zero_point: float, psf: ExposurePsf, to_detector: Array) -> None:
        self.band, self.zero_point = BANDS.index(band), zero_point
        self.psf, self.to_detector = psf, to_detector
        self.image = galsim.ImageF(psf.shape[1], psf.shape[0], xmin=0, ymin=0, scale=PIXEL_SCALE)

    def electrons(self, magnitudes: Array) -> float:
        """Electrons of an exposure."""
        return EXPOSURE_S * 10 ** (0.4 * (self.zero_point - magnitudes[self.band]))

    def add(self, profile: galsim.GSObject, size: int, x: float, y: float, shift: Any = (0, 0)) -> None:
        """Add a profile on a stamp of a size (pixels), shifted from a source at a pixel (0-based)."""
        ny, nx = self.psf.shape
        if not (-size / 2 < x < nx + size / 2 and -size / 2 < y < ny + size / 2):
            return
        centre = galsim.PositionD(x + shift[0], y + shift[1])
        stamp = profile.drawImage(nx=size, ny=size, scale=PIXEL_SCALE, center=centre, dtype=np.float32)
        common = stamp.bounds & self.image.bounds
        if common.isDefined():
            self.image[common] += stamp[common]

    def add_points(self, source: Source, x: float, y: float) -> None:
        """Add a star or a quasar."""
        for dx, dy, magnitudes in source.points:
            flux = self.electrons(magnitudes)
            size = 48 if flux < 5e3 else 96 if flux < 4e4 else 240 if flux < 1e6 else 512
            shift = self.to_detector @ (dx, dy) / PIXEL_SCALE
            self.add(self.psf.at(x, y, bright=flux > 4e4).withFlux(flux), size, x, y, shift)

    def add_galaxy(self, source: Source, x: float, y: float) -> None:
        """Add a galaxy; faint galaxies get smaller stamps and coarser Fourier transforms."""
        total = source.magnitudes[self.band]
        if total < 26.3:
            reach, limits = 7 * source.r50_arcsec * (1.5 if total < 23 else 1.0) + 1.2, (36, 320)
        else:
            reach, limits = 5 * source.r50_arcsec + 0.8, (28, 80)
        size = int(np.clip(2 * np.ceil(reach / PIXEL_SCALE / 2), *limits))
        parts = [(profile, self.electrons(magnitudes)) for profile, magnitudes in source.components]
        flux = sum(part for _, part in parts)
        profiles = [profile.withFlux(part) for profile, part in parts if part > 0.004 * flux]
        galaxy = profiles[0] if len(profiles) == 1 else galsim.Sum(profiles)
        galaxy = galaxy.transform(*self.to_detector.ravel()).withFlux(flux)
        folding, maxk, kvalue = (5e-3, 1e-3, 1e-5) if total < 24 else (2e-2, 4e-3, 1e-4)
        gsparams = galsim.GSParams(
            folding_threshold=folding, maxk_threshold=maxk, kvalue_accuracy=kvalue, maximum_fft_size=16384
        )
        seen = galsim.Convolve([galaxy, self.psf.at(x, y)], gsparams=gsparams, propagate_gsparams=False)
        self.add(seen, size, x, y)


def simulate_field(number: int, family: str, folder: Path, photographs: Sequence[Photograph] = ()) -> None:
    """Simulate a field with PSFs of a family: exposures, their list and, last, ``truth.parquet``, in a new folder.

    Galaxies have the shapes of `photographs`, if there are any.
    """
    rng = np.random.default_rng(910000 + number)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    ny, nx = shape = tuple(int(size) for size in rng.choice([992, 1024, 1024, 1056], 2))
    sky = Sky(rng)
    sky.ra = 0.002 if number == ACROSS_RA_ZERO else sky.ra
    traits = PsfTraits(family, rng)
    effects = Effects(rng)
    sources = draw_sources(sky, (ny + 2 * MARGIN_PX, nx + 2 * MARGIN_PX), rng)
    if photographs:
        # a generator of their own: everything else stays as without photographs
        shapes = np.random.default_rng(930000 + number)
        sources = [as_photographed(source, photographs, shapes) for source in sources]
    ras, decs = np.array([source.ra for source in sources]), np.array([source.dec for source in sources])
    field_roll = rng.uniform(0, 2 * np.pi)
    start = datetime(2029, 1, 1) + timedelta(days=number * 9 + 3, seconds=int(rng.integers(80000)))
    times = 2 if number in TWO_EXPOSURES_PER_BAND else 1
    bands = [band for band in BANDS if band not in MISSING_BANDS.get(number, ()) for _ in range(times)]
    lines = ["# one exposure a line"]
    for k, band in enumerate(bands):
        chip = int(rng.choice(CHIPS_OF_BAND[band]))
        identifier = f"{20970000000 + number * 100000 + k * 1013 + int(rng.integers(900)):011d}"
        start += timedelta(seconds=int(rng.integers(200, 400)))
        roll = rng.uniform(0, 6.283) if effects.any_roll else field_roll + np.radians(rng.normal(0, 0.4))
        header = make_wcs(sky, chip, shape, roll, effects.parity, PROJECTIONS[number % 4], rng)
        wcs = WCS(header)
        psf = ExposurePsf(traits, band, shape, rng)
        zero_point = FILTERS[band].zero_point + rng.normal(0, 0.02)
        small = effects.compressed and k % 3 == 1
        exposure = Exposure(number, band, chip, identifier, start, header, small, zero_point, psf.fwhm_px)
        sky_e = FILTERS[band].sky * sky.brightness * rng.uniform(0.93, 1.07) * EXPOSURE_S
        error = rng.uniform(-0.02, 0.02, 2) / np.sqrt(2)  # of the WCS, arcsec
        xs, ys = wcs.all_world2pix(ras, decs, 0)
        xs, ys = xs + error[0] / PIXEL_SCALE, ys + error[1] / PIXEL_SCALE
        canvas = Canvas(band, zero_point, psf, sky_to_detector(wcs, sky.dec, shape))
        for source, x, y in zip(sources, xs, ys, strict=True):
            if -0.5 <= x <= nx - 0.5 and -0.5 <= y <= ny - 0.5:
                source.bands.add(band)
            if source.magnitudes[BANDS.index(band)] > 29.3:
                continue
            add = canvas.add_points if source.points else canvas.add_galaxy
            add(source, x, y)
        data = expose(np.maximum(canvas.image.array.astype(np.float64), 0.0), sky_e, effects, rng)
        write_exposure(folder, exposure, data, k % 2 == 1, rng)
        lines.append(str(exposure.path("IMG")))
    (folder / "exposures.txt").write_text("\n".join(lines) + "\n")
    write_truth(folder / "truth.parquet", number, sources)
