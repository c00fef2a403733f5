"""Write the files of a prepared exposure; `sgclassify.stages.read.prepared` reads them back."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa

from sgclassify.stages.read.prepared import PreparedExposure
from sgclassify.stages.sky import SkyMesh
from sgclassify.stages.write.atomic import write_atomic, write_atomic_bytes


def write_prepared(prepared: PreparedExposure, detections: pa.Table, catalog: pa.Table, sky: SkyMesh) -> None:
    """Write each file whole or not at all; both tables have one row for every row of the catalogue."""
    write_atomic(detections, prepared.detections_path, {})
    write_atomic(catalog, prepared.catalog_path, {})
    buffer = io.BytesIO()
    layout = np.array([*sky.shape, sky.box], dtype=np.int64)
    np.savez(buffer, level=sky.level, sigma=sky.sigma, layout=layout)
    write_atomic_bytes(buffer.getvalue(), prepared.sky_path)
