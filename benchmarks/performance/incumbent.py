"""What SExtractor and PSFEx cost on the same exposures: ``python -m performance.incumbent LIST``. Prints JSON."""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings
from pathlib import Path

import numpy as np
from astropy.io import fits
from astropy.wcs import WCS

from performance.inputs import lines_of
from sgclassify.simulation import sextractor
from sgclassify.simulation.detector import Level1
from sgclassify.stages.detect import Calibration


def main() -> None:
    """Detect, model the PSF, measure with it; print CPU seconds by exposure."""
    if not sextractor.available():
        print(json.dumps({"missing": "SExtractor or PSFEx is not installed"}))
        return
    seconds, sources, wall = [], 0, time.monotonic()
    for image in lines_of(Path(sys.argv[1])):
        with fits.open(image) as hdus:
            primary, header, data = hdus[0].header, hdus[1].header.copy(), np.asarray(hdus[1].data, dtype=np.float32)
        weight, flags = (fits.getdata(str(image).replace("_IMG", kind), 1) for kind in ("_WHT", "_FLG"))
        level1 = Level1(data, np.asarray(weight, np.float32), np.asarray(flags, np.uint16), 0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            wcs = WCS(header)
        calibration = Calibration(wcs, float(header["ZP"]), float(header["FWHM"]), float(primary["EXPTIME"]))
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            table = sextractor.extract(level1, header, calibration, float(header["SATURATE"]), 1.5, with_psf=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)
        sources += table.num_rows
    print(json.dumps({"cpu_s": seconds, "sources": sources, "wall_s": time.monotonic() - wall}))


if __name__ == "__main__":
    main()
