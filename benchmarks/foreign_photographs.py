"""Shapes of real galaxies, taken from a colour picture of a deep field."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final

import galsim
import numpy as np
from foreign_sky import I_BAND, Array, Rng, Source
from matplotlib.image import imread
from photutils.segmentation import SourceCatalog, detect_sources
from scipy.ndimage import binary_dilation, gaussian_filter, label

CHANNEL_OF_BAND: Final = np.array([2, 2, 2, 1, 1, 0, 0])  # red, green, blue for NUV, u, g, r, i, z, y
MIN_R50_PX: Final = 2.0  # smaller ones mostly show the picture's own PSF and pixels
MIN_SNR: Final = 120.0
MAX_AREA_PX: Final = 3000  # larger areas are several galaxies that touch
ISOPHOTES: Final = (0.15, 0.35)  # of the peak; several pieces there are several galaxies
WHITE: Final = 0.99  # of the range of the picture; brighter is saturated
FAINTEST: Final = 26.3  # i; fainter galaxies would show no shape


Photograph = list[galsim.GSObject]
"""A galaxy of the picture: profiles of its light in red, green and blue, half-light radius 1."""


def linear(picture: Array) -> Array:
    """Light of the pixels of a picture whose values, 0 to 1, follow the sRGB curve (IEC 61966-2-1)."""
    low = picture <= 0.04045
    return np.where(low, picture / 12.92, ((picture + 0.055) / 1.055) ** 2.4)


def middle(light: Array) -> tuple[float, float]:
    """Centroid (x, y) of the light in an image; GalSim's first pixel is (1, 1)."""
    rows, columns = np.indices(light.shape)
    return float((light * columns).sum() / light.sum()) + 1, float((light * rows).sum() / light.sum()) + 1


def read_photographs(path: Path) -> list[Photograph]:
    """Galaxies of a colour picture that are large, bright and whole enough to show their shapes."""
    picture = imread(path)
    picture = picture / 255.0 if picture.dtype == np.uint8 else picture
    light = linear(np.moveaxis(picture[..., :3], -1, 0).astype(np.float64))
    light -= np.median(light, axis=(1, 2), keepdims=True)
    white = light.sum(axis=0)
    noise = 1.4826 * float(np.median(np.abs(white)))
    segments = detect_sources(gaussian_filter(white, 1.0), 2.0 * noise, 12)
    if segments is None:
        return []
    found = []
    for row in SourceCatalog(white, segments):
        y, x = (slice(max(0, s.start - 2), s.stop + 2) for s in row.slices)
        own = segments.data[y, x] == row.label
        whole = y.start > 0 and x.start > 0 and y.stop < white.shape[0] and x.stop < white.shape[1]
        area = int(own.sum())
        snr = row.segment_flux / (noise * np.sqrt(area))
        saturated = (picture[y, x, :3].max(axis=-1)[own] >= WHITE).any()
        if not whole or saturated or area > MAX_AREA_PX or snr < MIN_SNR:
            continue
        near = binary_dilation(own, iterations=2) & ((segments.data[y, x] == 0) | own)
        colours = np.where(near, np.maximum(light[:, y, x], 0.0), 0.0)
        together = colours.sum(axis=0)
        smooth = gaussian_filter(together, 1.0)
        if any(label(smooth > level * smooth.max())[1] > 1 for level in ISOPHOTES):
            continue
        centre = middle(together)
        radius = galsim.Image(together, scale=1.0).calculateHLR(galsim.PositionD(*centre))
        if radius < MIN_R50_PX:
            continue
        # the place of a source is the middle of its light
        offset = np.subtract(centre, (np.array(together.shape[::-1]) + 1) / 2)
        profiles = []
        for colour in colours:
            # a galaxy that is dark in a colour gets the shape of all its light there
            shape = colour if colour.sum() > 0.05 * together.sum() else together
            image = galsim.Image(shape, scale=1.0 / radius)
            profiles.append(
                galsim.InterpolatedImage(image, x_interpolant="cubic", pad_factor=2.0, flux=1.0, offset=offset)
            )
        found.append(profiles)
    return found


def as_photographed(source: Source, photographs: Sequence[Photograph], rng: Rng) -> Source:
    """A galaxy with a real one's shape, turned and mirrored at random; it keeps its size, colours and class."""
    if source.r50_arcsec is None or source.kind == "compact" or source.magnitudes[I_BAND] > FAINTEST:
        return source
    shape = photographs[int(rng.integers(len(photographs)))]
    angle, mirrored = rng.uniform(0, 2 * np.pi), bool(rng.random() < 0.5)
    components = []
    for channel, profile in enumerate(shape):
        turned = profile.transform(-1, 0, 0, 1) if mirrored else profile
        turned = turned.rotate(angle * galsim.radians).dilate(source.r50_arcsec)
        components.append((turned, np.where(channel == CHANNEL_OF_BAND, source.magnitudes, np.inf)))
    return replace(source, kind="photograph", components=components, sersic_n=None)
