"""Prepare one exposure for the tiles: check it, measure its sky and point sources, make its detections canonical.

Every fault of an exposure shows here, before the first tile starts. So an exposure that is set aside has no part in any
object.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from sgclassify.stages.arrays import F32, U16, Bool
from sgclassify.stages.bands import NOMINAL_FWHM_PX, PIXEL_SCALE
from sgclassify.stages.config import StageConfig
from sgclassify.stages.errors import UnusableInputError
from sgclassify.stages.flags import SgFlag
from sgclassify.stages.locus import FEW_STARS, PointSources, fwhm_ratio
from sgclassify.stages.point_sources import PSF_STAMP, measure_point_sources
from sgclassify.stages.read.catalog import Detections, column_notes, read_detections, read_table
from sgclassify.stages.read.header import ExposureHeader
from sgclassify.stages.read.pixels import ExposureCheck, ExposurePixels, check_exposure
from sgclassify.stages.read.prepared import PreparedExposure
from sgclassify.stages.read.stored import Pixels, open_pixels
from sgclassify.stages.rolling import RollingStamps
from sgclassify.stages.sky import SkyMesh, measure_sky_rows
from sgclassify.stages.tangent import offsets
from sgclassify.stages.write.prepared import PixelStore, write_prepared

FWHM_RATIOS = (0.85, 1.25)
"""Widths of the point sources, relative to the FWHM in the header, that need no note. With a right FWHM they are 0.96
to 1.16, as the wings of the PSF count in a second moment (88 simulated exposures)."""

FWHM_STARS = 10
"""Fewest point sources that may contradict the header."""

MAX_MISSED = 10
"""Most sources that the stage may detect where the catalogue has no rows. SExtractor's thresholds are higher."""

STRIP_ROWS = 256
"""Rows read at once for the stamps of a catalogue that the stage has made."""

OFFSET_ARCSEC = 0.05
"""Median offset of a catalogue from the WCS that is worth a note: less than a pixel, more than a calibration error."""

MAX_PSF_DETECTIONS = 20_000
"""Detections of an exposure that are measured for its point-source locus; a locus needs some tens."""


def prepare_exposure(header: ExposureHeader, work_dir: Path, config: StageConfig) -> PreparedExposure:
    """Check an exposure and write its prepared files into ``work_dir``, a folder that exists.

    Raises
    ------
    UnusableInputError
        If a file of the exposure can never be used.
    """
    with PixelStore(header, work_dir) as store:
        return _prepare(header, work_dir, config, store)


def _prepare(header: ExposureHeader, work_dir: Path, config: StageConfig, store: PixelStore) -> PreparedExposure:
    check, first = _first_pass(header, config, store)
    table, detections, stamps, sky = first.table, first.detections, first.stamps, first.sky
    notes = list(header.notes)
    notes += _weight_notes(check, header)
    with open_pixels(header, work_dir) as pixels:
        made = table is None
        if table is None or detections is None:
            table = _detect(pixels, sky, header, config)
            path = header.files.image
            detections = read_detections(table, header, config, path)
            notes.append(f"CAT missing: {table.num_rows} sources detected by the stage")
        elif not table.num_rows and header.files.catalog is not None:
            # A short exposure in NUV may show no source. Where the stage sees many, the rows were lost.
            missed = _detect(pixels, sky, header, config).num_rows
            if missed > MAX_MISSED:
                fault = f"the catalogue has no rows, the stage detects {missed} sources"
                advice = "measure the catalogue again, or remove it to have sources detected"
                raise UnusableInputError(header.files.catalog, fault, advice)
            notes.append("CAT has no rows")
        if stamps is None:
            stamps = _stamps(detections, header)
            for y0 in range(0, header.shape[0], STRIP_ROWS):
                window = pixels.window(y0, min(y0 + STRIP_ROWS, header.shape[0]), 0, header.shape[1])
                stamps.add(y0, window.image, window.valid, window.flags)
    psf, psf_model = measure_point_sources(stamps, sky, _expected_fwhm(header), config)
    offset = _astrometric_offset(detections, header)
    prepared = PreparedExposure(
        header=header,
        work_dir=work_dir,
        n_rows=table.num_rows,
        n_usable=int(detections.usable.sum()),
        sha256=check.sha256,
        offset_deg=offset,
        psf=psf,
        psf_model=psf_model,
        notes=tuple(
            notes
            + column_notes(table)
            + _row_notes(detections)
            + _wcs_notes(detections, made, offset)
            + _psf_notes(psf, header)
        ),
    )
    write_prepared(prepared, _detections_table(detections, made), table, sky)
    return prepared


def _stamps(detections: Detections, header: ExposureHeader) -> RollingStamps:
    """Stamps, not yet cut, for the point sources of an exposure."""
    index = np.flatnonzero(detections.usable)
    index = index[:: max(1, -(-index.size // MAX_PSF_DETECTIONS))]
    return RollingStamps(detections.x[index], detections.y[index], PSF_STAMP, header.shape)


@dataclass(frozen=True)
class _FirstPass:
    """What one pass over the files of an exposure gives; without a CAT, table, detections and stamps are None."""

    table: pa.Table | None
    detections: Detections | None
    stamps: RollingStamps | None
    sky: SkyMesh


def _first_pass(header: ExposureHeader, config: StageConfig, store: PixelStore) -> tuple[ExposureCheck, _FirstPass]:
    """Check the files, read the catalogue, measure the sky and cut the stamps for the PSF.

    The pixels are stored if later passes would have to decode them again.
    """
    found: list[_FirstPass] = []
    catalog = header.files.catalog

    def walk(pixels: ExposurePixels) -> None:
        # The catalogue comes first: reading it is cheap, and a bad one saves the pass over the pixels.
        table = read_table(catalog) if catalog is not None else None
        detections = read_detections(table, header, config, catalog) if table is not None and catalog else None
        stamps = _stamps(detections, header) if detections is not None else None

        def rows(y0: int, y1: int) -> tuple[F32, Bool]:
            window = pixels.window(y0, y1, 0, header.shape[1])
            if pixels.costly:
                store.add(window)
            if stamps is not None:
                stamps.add(y0, window.image, window.valid, window.flags)
            return window.image, window.valid

        found.append(_FirstPass(table, detections, stamps, measure_sky_rows(rows, header.shape, config.sky_box_px)))

    check = check_exposure(header, walk)
    store.finish()
    return check, found[0]


def _detect(pixels: Pixels, sky: SkyMesh, header: ExposureHeader, config: StageConfig) -> pa.Table:
    """The stage's own catalogue of an exposure."""
    # Imported here: every worker would pay for scipy, which few nights need.
    from sgclassify.stages.detect import Calibration, detect_in_strips

    def strip(y0: int, y1: int) -> tuple[F32, Bool, F32, U16]:
        window = pixels.window(y0, y1, 0, header.shape[1])
        level, sigma = sky.at(y0, y1, 0, header.shape[1])
        return window.image - level, window.valid, sigma, window.flags

    calibration = Calibration(header.wcs(), header.zero_point, _expected_fwhm(header), header.exposure_time)
    return detect_in_strips(strip, header.shape, calibration, config)


def _weight_notes(check: ExposureCheck, header: ExposureHeader) -> list[str]:
    notes = []
    if check.moved_zeros:
        notes.append(f"{check.moved_zeros} zeros of WHT were moved when it was quantised: taken for zeros")
    if check.unresolved:
        taken = "usable where FLG says nothing" if header.files.flag is not None else "unusable"
        text = "bright pixels have weights below a step of the quantisation of WHT"
        notes.append(f"{check.unresolved} {text}: taken for {taken}")
    return notes


def _row_notes(detections: Detections) -> list[str]:
    notes = []
    for flag, text in (
        (SgFlag.NO_POSITION, "rows without a usable position"),
        (SgFlag.POSITION_MISMATCH, "rows whose pixel and sky positions disagree"),
        (SgFlag.DUPLICATE_ID, "rows whose objID occurs more than once"),
    ):
        count = int(np.count_nonzero(detections.sg_flags & int(flag)))
        if count:
            notes.append(f"{count} {text}")
    return notes


def _wcs_notes(detections: Detections, made: bool, offset_deg: tuple[float, float]) -> list[str]:
    """A note where no row checks the WCS, or where all rows are off it by the same offset."""
    if made or not detections.usable.any():
        return ["no catalogue to check the WCS against: the positions of its objects rest on the header alone"]
    apart = 3600.0 * float(np.hypot(*offset_deg))
    if apart <= OFFSET_ARCSEC:
        return []
    text = f"pixel and sky positions of the rows differ by {apart:.3f} arcsec in the median: are X and Y 1-based?"
    return [text]


def _psf_notes(psf: PointSources, header: ExposureHeader) -> list[str]:
    if psf.n_stars < FEW_STARS:
        source = "the header" if np.isfinite(header.fwhm_px) else "the camera, as the header has none"
        return [f"the PSF rests on {psf.n_stars} point sources and on the FWHM of {source}"]
    ratio = fwhm_ratio(psf, header.fwhm_px)
    # not finite where there is nothing to compare
    if psf.n_stars < FWHM_STARS or not (ratio < FWHM_RATIOS[0] or ratio > FWHM_RATIOS[1]):
        return []
    width = f"{ratio:.2f} times as wide as the header's FWHM of {header.fwhm_px:g} pixels"
    return [f"the {psf.n_stars} point sources are {width}: correct or delete it"]


def _detections_table(detections: Detections, made: bool) -> pa.Table:
    flags = detections.sg_flags | (int(SgFlag.STAGE_CATALOG) if made else 0)
    return pa.table(
        {
            "row": pa.array(np.arange(len(detections.x), dtype=np.int64)),
            "x": detections.x,
            "y": detections.y,
            "ra": detections.ra,
            "dec": detections.dec,
            "sg_flags": flags.astype(np.int32),
            "usable": detections.usable,
        }
    )


def _astrometric_offset(detections: Detections, header: ExposureHeader) -> tuple[float, float]:
    """Median offset of the catalogue's sky positions from the header's WCS, degrees to the east and the north."""
    good = detections.usable
    if not good.any():
        return 0.0, 0.0
    ra, dec = header.pixel_to_sky(detections.x[good], detections.y[good])
    east, north = offsets(detections.ra[good], detections.dec[good], ra, dec, header.centre)
    return float(np.median(east)), float(np.median(north))


def _expected_fwhm(header: ExposureHeader) -> float:
    """FWHM (pixels) of the header; the camera's, at the pixel scale of the image, where it has none."""
    if np.isfinite(header.fwhm_px):
        return header.fwhm_px
    return NOMINAL_FWHM_PX * PIXEL_SCALE / header.pixel_scale
