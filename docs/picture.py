"""Draw docs/demo.png from the products of `make demo`: the i-band exposure with every object marked by its class."""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from sgclassify.model.judge.scores import read_objects
from sgclassify.stages.read.exposure_list import parse_list
from sgclassify.stages.read.header import read_header
from sgclassify.stages.read.pixels import ExposurePixels


def main() -> None:
    """Read the folder of the demonstration and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, default=Path("demo"))
    parser.add_argument("--output", type=Path, default=Path("docs/demo.png"))
    given = parser.parse_args()
    headers = [read_header(files) for files in parse_list(given.demo / "field" / "exposures.txt").files]
    header = next(h for h in headers if h.band == "i")
    side = 520
    with ExposurePixels(header) as pixels:
        window = pixels.window(0, side, 0, side)
    objects = read_objects(given.demo / "output")
    x, y = header.wcs().wcs_world2pix(objects["ra"].to_numpy(), objects["dec"].to_numpy(), 0)
    p_star = objects["p_star"].to_numpy(zero_copy_only=False)
    bright = (objects["sg_flags"].to_numpy() & (1 << 13)) == 0
    inside = (x > 5) & (x < side - 5) & (y > 5) & (y < side - 5) & bright & np.isfinite(p_star)
    image = window.image - np.median(window.image)
    figure, axes = plt.subplots(figsize=(6.4, 5.6), layout="constrained")
    axes.imshow(np.arcsinh(image / 0.1), origin="lower", cmap="gray_r", vmin=-0.6, vmax=3.5)
    colors = matplotlib.colormaps["coolwarm"]
    axes.scatter(x[inside], y[inside], s=90, facecolors="none", edgecolors=colors(p_star[inside]))
    scale = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(0, 1), colors)
    figure.colorbar(scale, ax=axes, label="p_star", shrink=0.9)
    axes.set(xlabel="x (pixels)", ylabel="y (pixels)", title="i band of the demonstration field, objects by p_star")
    figure.savefig(given.output, dpi=90)


if __name__ == "__main__":
    main()
