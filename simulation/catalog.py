"""The CAT file of a simulated exposure, made by the stage's own source detection."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from astropy.io import fits

from sgclassify.simulation.detector import Level1
from sgclassify.stages.config import StageConfig
from sgclassify.stages.detect import Calibration, Strip, detect_in_strips
from sgclassify.stages.sky import measure_sky

NO_VALUE = -9999
"""CSST catalogues write this where there is no value."""


def make_catalog(data: Level1, calibration: Calibration, config: StageConfig) -> pa.Table:
    """Detect and measure the sources of an exposure, as the stage does where a CAT is missing.

    `calibration` is what the header will claim. The table has one row per detection, under the official names.
    """
    shape = (data.image.shape[0], data.image.shape[1])
    valid = data.weight > 0
    sky = measure_sky(data.image, valid, config.sky_box_px)

    def strip(y0: int, y1: int) -> Strip:
        level, sigma = sky.at(y0, y1, 0, shape[1])
        return data.image[y0:y1] - level, valid[y0:y1], sigma, data.flags[y0:y1]

    return detect_in_strips(strip, shape, calibration, config)


def catalog_hdu(catalog: pa.Table, obsid: str, chip: int, band: str) -> fits.BinTableHDU:
    """A table of `make_catalog` as that of a CAT file: OBSID, CCDNO and Filter added, ``NO_VALUE`` for nulls."""
    n = catalog.num_rows
    columns = [
        fits.Column("OBSID", f"{len(obsid)}A", array=np.full(n, obsid)),
        fits.Column("CCDNO", "J", array=np.full(n, chip, dtype=np.int32)),
    ]
    for field in catalog.schema:
        values = catalog[field.name].fill_null(NO_VALUE).to_numpy()
        code = {pa.int32(): "J", pa.float32(): "E", pa.float64(): "D"}[field.type]
        columns.append(fits.Column(field.name, code, array=values))
    columns.append(fits.Column("Filter", "3A", array=np.full(n, band)))
    return fits.BinTableHDU.from_columns(columns, name="CAT")
