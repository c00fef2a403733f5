"""Detector of the foreign fields: from electrons to Level-1 arrays, by the effects of a field.

The order of the random draws is part of the fields: keep it.
"""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from foreign_sky import Array, Rng
from scipy import ndimage

from sgclassify.stages.flags import InputFlag

EXPOSURE_S: Final = 150.0
READ_NOISE_E: Final = 5.0
DARK_E_S: Final = 0.02
BAD, HOT, WARM, SATURATED, COSMIC_RAY, SATELLITE = (
    np.uint16(InputFlag[name]) for name in ("BAD", "HOT", "WARM", "SATURATED", "COSMIC_RAY", "SATELLITE")
)


class Effects:
    """Effects of the detectors, headers and files of a field; a number is 0 in fields without the effect."""

    def __init__(self, rng: Rng) -> None:
        def perhaps(chance: float, low: float, high: float) -> float:
            return rng.uniform(low, high) if rng.random() < chance else 0.0

        self.correlation = perhaps(0.35, 0.02, 0.06)  # of the noise of neighbouring pixels
        self.brighter_fatter = perhaps(0.5, 0.02, 0.08)  # share of a difference that flows back at 90,000 e-
        self.gradient = perhaps(0.55, 0.03, 0.15)  # of the sky, from the middle to the edges
        self.flat = perhaps(0.6, 0.003, 0.01)  # standard deviation of the errors of the flat field
        self.output_gain = perhaps(0.45, 0.002, 0.01)  # standard deviation from output to output
        self.unflagged = perhaps(0.7, 0.03, 0.15)  # share of cosmic rays that the flag image does not mark
        self.satellites = rng.random() < 0.2
        self.any_roll = rng.random() < 0.15  # whether each exposure has its own position angle
        self.parity = int(rng.choice([-1, -1, 1]))  # -1 where right ascension grows to the left
        self.compressed = rng.random() < 0.3  # whether every third exposure is compressed


class Level1(NamedTuple):
    """Level-1 arrays of an exposure."""

    image: Array  # e-/s
    weight: Array  # (e-/s)^-2
    flags: Array
    saturate: float  # e-/s
    cosmic_rays: int  # pixels


def bleed(electrons: Array, full_well: float) -> None:
    """Spill the excess over the full well along the columns, to both sides at once, in place."""
    for c in np.unique(np.nonzero(electrons > full_well)[1]):
        column = electrons[:, c]
        rows = np.nonzero(column > full_well)[0]
        for run in np.split(rows, np.nonzero(np.diff(rows) > 1)[0] + 1):
            excess = (column[run] - full_well).sum()
            column[run] = full_well
            below, above = run[0] - 1, run[-1] + 1
            while excess > 0 and (below >= 0 or above < len(column)):
                for row in (below, above):
                    if 0 <= row < len(column):
                        taken = min(max(full_well - column[row], 0), excess)
                        column[row] += taken
                        excess -= taken
                below, above = below - 1, above + 1


def cosmic_rays(count: int, shape: tuple[int, int], rng: Rng) -> Array:
    """Electrons of straight tracks: four of five are short, the others 10 to 45 pixels long."""
    image = np.zeros(shape, np.float32)
    for _ in range(count):
        x, y = rng.uniform(0, shape[1]), rng.uniform(0, shape[0])
        length = rng.exponential(5.0) + 0.5 if rng.random() < 0.8 else rng.uniform(10, 45)
        angle = rng.uniform(0, 6.3)
        per_pixel = rng.lognormal(6.3, 0.8)
        step = np.arange(int(length * 3) + 1) / 3.0
        xs, ys = (x + step * np.cos(angle)).astype(int), (y + step * np.sin(angle)).astype(int)
        inside = (xs >= 0) & (ys >= 0) & (xs < shape[1]) & (ys < shape[0])
        np.add.at(image, (ys[inside], xs[inside]), per_pixel / 3 * rng.uniform(0.5, 1.5, inside.sum()))
    return image


def read_out(electrons: Array, sky_e: float, x: Array, y: Array, effects: Effects, rng: Rng) -> Array:
    """Electrons of sources and sky (e- per pixel) as read, with noise; `x` and `y` go from -1 to 1."""
    ny, nx = shape = electrons.shape
    background = np.full(shape, sky_e)
    if effects.gradient:
        a = rng.normal(0, 0.6, 5)
        form = a[0] * x + a[1] * y + a[2] * (x**2 - 0.33) + a[3] * (y**2 - 0.33) + a[4] * x * y
        background = background * np.clip(1 + effects.gradient * form, 0.6, 1.6)
    electrons = electrons + background
    if effects.flat:
        coarse = (ny // 8, nx // 8)
        smooth = ndimage.gaussian_filter(rng.normal(size=coarse), 6)
        smooth = ndimage.zoom(smooth / smooth.std(), (ny / coarse[0], nx / coarse[1]), order=1)[:ny, :nx]
        electrons = electrons * (1 + effects.flat * smooth + rng.normal(0, 0.6 * effects.flat, shape))
    if effects.brighter_fatter:
        for axis in (0, 1):
            along = np.moveaxis(electrons, axis, 0)
            mean = 0.5 * (along[1:] + along[:-1])
            flow = np.clip(effects.brighter_fatter * np.minimum(mean / 9e4, 1.0), 0, 0.2)
            flow = flow * np.diff(along, axis=0)
            change = np.zeros_like(along)
            change[:-1] += flow
            change[1:] -= flow
            electrons = electrons + np.moveaxis(change, 0, axis)
    dark = DARK_E_S * EXPOSURE_S
    counted = rng.poisson(np.maximum(electrons + dark, 0)).astype(np.float64) - dark
    noise = counted - electrons + rng.normal(0, READ_NOISE_E, electrons.shape)
    if effects.correlation:
        c = effects.correlation
        kernel = np.array([[c * c, c, c * c], [c, 1, c], [c * c, c, c * c]])
        noise = ndimage.convolve(noise, kernel / np.sqrt((kernel**2).sum()), mode="reflect")
    return electrons + noise


def expose(electrons: Array, sky_e: float, effects: Effects, rng: Rng) -> Level1:
    """Level-1 arrays of an exposure from the electrons of its sources and of the sky (e- per pixel)."""
    ny, nx = shape = electrons.shape
    full_well = rng.uniform(68000, 92000)
    y, x = np.mgrid[-1 : 1 : ny * 1j, -1 : 1 : nx * 1j]
    raw = read_out(electrons, sky_e, x, y, effects, rng)
    flags = np.zeros(shape, np.uint16)
    bleed(raw, full_well)
    flags[ndimage.binary_dilation(raw >= full_well * 0.995, iterations=1)] |= SATURATED
    if effects.output_gain:
        for row in range(2):
            for column in range(4):
                rows = slice(row * ny // 2, (row + 1) * ny // 2)
                columns = slice(column * nx // 4, (column + 1) * nx // 4)
                gain = 1 + rng.normal(0, effects.output_gain)
                raw[rows, columns] = raw[rows, columns] * gain + rng.normal(0, 0.25)
    hits = rng.poisson(ny * nx / 5500.0)
    unflagged = round(hits * effects.unflagged)
    known = cosmic_rays(hits - unflagged, shape, rng)
    raw += known + cosmic_rays(unflagged, shape, rng)
    flags[known > 12] |= COSMIC_RAY
    count = int(1e-4 * raw.size)
    rows, columns = rng.integers(0, ny, count), rng.integers(0, nx, count)
    raw[rows, columns] += rng.lognormal(5.5, 1.2, count)
    flagged = rng.random(count) < 0.92
    flags[rows[flagged], columns[flagged]] |= HOT
    rows, columns = rng.integers(0, ny, count), rng.integers(0, nx, count)
    raw[rows, columns] += rng.uniform(15, 80, count)
    flags[rows, columns] |= WARM
    for _ in range(rng.poisson(1.2)):  # dead columns, most of them from a drawn row on
        column = int(rng.integers(nx))
        row = int(rng.integers(ny)) if rng.random() < 0.6 else 0
        dead = (slice(row, None), slice(column, column + int(rng.integers(1, 3))))
        raw[dead] = 0.0
        flags[dead] |= BAD
    if effects.satellites and rng.random() < 0.3:
        angle = rng.uniform(0, np.pi)
        across = (x * nx / 2) * np.sin(angle) - (y * ny / 2) * np.cos(angle)
        distance = np.abs(across + rng.uniform(-300, 300))
        raw += rng.poisson(rng.uniform(40, 400) * np.exp(-0.5 * (distance / 1.5) ** 2))
        flags[distance < 6] |= SATELLITE
    raw = np.minimum(raw, full_well)
    # as in csster/csst, inst_corr.py
    weight = (EXPOSURE_S * EXPOSURE_S / (np.maximum(raw, 0) + READ_NOISE_E**2)).astype(np.float32)
    weight[flags > 0] = 0
    image = (raw / EXPOSURE_S).astype(np.float32)
    return Level1(image, weight, flags, full_well / EXPOSURE_S, int((known > 12).sum()))
