"""The detector: from a noiseless image to the Level-1 image, weight and flag of one exposure.

Electrons are collected, clipped at the full well, bled along columns, read through one of 16 outputs, and digitised.
The Level-1 arithmetic of the public CSST pipeline code (csster/csst, inst_corr.py) then turns counts into electrons per
second: ``img = (raw - bias - dark t) / flat * gain / t`` and
``wht = t^2 / (gain max(data, 0) + read_noise^2)``, 0 where a flag is set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np

from sgclassify.stages.arrays import F32, F64, U16
from sgclassify.stages.flags import InputFlag

PIXEL_CM: Final = 1e-3
"""Side of a pixel, cm (10 um)."""

OUTPUTS: Final = (2, 8)
"""Read-out outputs along y and x: 16 per detector."""

STRIP: Final = 1024
"""Rows handled at a time: bounds the memory for a full-size detector."""


@dataclass(frozen=True, slots=True)
class DetectorModel:
    """Properties of one detector in one exposure.

    Attributes
    ----------
    exposure_time : float
        Seconds.
    gain : float
        Electrons per count.
    read_noise : float
        Electrons.
    dark : float
        Electrons per second and pixel.
    full_well : float
        Electrons; the excess spills along the column.
    bias : float
        Counts.
    converter_limit : float
        Largest count of the analogue-to-digital converter. With a gain of 1.1 it lies below the full well.
    flat_residual : float
        Standard deviation of the sensitivity of a pixel that the flat field did not correct.
    gain_residual : float
        Standard deviation of the gain of an output that was not corrected.
    cosmic_rays : float
        Hits per cm^2 and second.
    cosmic_rays_flagged : float
        Share of the hits that the flag image marks.
    hot_share, warm_share : float
        Share of hot and warm pixels.
    bad_columns : float
        Mean number of dead columns per 1024 columns.
    satellite : bool
        Whether a satellite crosses the detector.
    """

    exposure_time: float = 150.0
    gain: float = 1.1
    read_noise: float = 5.0
    dark: float = 0.02
    full_well: float = 90_000.0
    bias: float = 500.0
    converter_limit: float = 65_535.0
    flat_residual: float = 0.005
    gain_residual: float = 0.01
    cosmic_rays: float = 1.2
    cosmic_rays_flagged: float = 0.97
    hot_share: float = 1e-4
    warm_share: float = 2e-4
    bad_columns: float = 2.5
    satellite: bool = False

    @property
    def saturate(self) -> float:
        """Level at which a pixel counts as saturated, e-/s."""
        converted = (self.converter_limit - self.bias) * self.gain
        return 0.97 * min(self.full_well, converted) / self.exposure_time


@dataclass(frozen=True, slots=True)
class Level1:
    """Level-1 arrays, [y, x].

    Attributes
    ----------
    image : ndarray, float32
        e-/s, sky included.
    weight : ndarray, float32
        Inverse variance, (e-/s)^-2; 0 where a flag is set.
    flags : ndarray, uint16
        Bits of :class:`sgclassify.stages.flags.InputFlag`.
    cosmic_rays : int
        Hits that the flag image marks.
    """

    image: F32
    weight: F32
    flags: U16
    cosmic_rays: int


def expose(rate: F32, sky: float, model: DetectorModel, rng: np.random.Generator) -> Level1:
    """Expose, read out and calibrate.

    Parameters
    ----------
    rate : ndarray, float32, shape (ny, nx)
        Noiseless image of the sources, e-/s. Overwritten.
    sky : float
        Sky background, e-/s per pixel.
    model : DetectorModel
    rng : numpy.random.Generator
    """
    shape = rate.shape
    time = model.exposure_time
    flags = np.zeros(shape, dtype=np.uint16)
    sensitivity = _smooth_residual(shape, model.flat_residual, rng)
    output_gain = _output_gains(model.gain_residual, rng)

    electrons = rate
    for y0 in range(0, shape[0], STRIP):
        rows = slice(y0, min(y0 + STRIP, shape[0]))
        strip = electrons[rows]
        np.maximum(strip, 0.0, out=strip)
        strip += np.float32(sky)
        strip *= zoomed_rows(sensitivity, shape, rows)
        strip *= 1 + rng.normal(0.0, model.flat_residual, strip.shape).astype(np.float32)
        strip += np.float32(model.dark)
        strip *= np.float32(time)
    _add_hot_pixels(electrons, flags, model, rng)
    for y0 in range(0, shape[0], STRIP):
        rows = slice(y0, min(y0 + STRIP, shape[0]))
        electrons[rows] = rng.poisson(electrons[rows])
    cosmic_rays = _add_cosmic_rays(electrons, flags, model, rng)
    if model.satellite:
        _add_satellite(electrons, flags, sky * time, rng)
    _bleed(electrons, model.full_well)
    _flag_saturated(electrons, flags, model.saturate * time)
    _kill_columns(electrons, flags, model, rng)

    weight = np.empty(shape, dtype=np.float32)
    for y0 in range(0, shape[0], STRIP):
        rows = slice(y0, min(y0 + STRIP, shape[0]))
        strip = electrons[rows]
        strip += rng.normal(0.0, model.read_noise, strip.shape).astype(np.float32)
        strip *= _gain_rows(output_gain, shape, rows)
        counts = np.rint(strip / np.float32(model.gain) + np.float32(model.bias))
        np.clip(counts, 0, np.float32(model.converter_limit), out=counts)
        data = (counts - np.float32(model.bias)) * np.float32(model.gain) - np.float32(model.dark * time)
        strip[:] = data / np.float32(time)
        weight[rows] = time**2 / (np.maximum(data, 0.0) + np.float32(model.read_noise**2))
    weight[flags > 0] = 0.0
    return Level1(electrons, weight, flags, cosmic_rays)


def _smooth_residual(shape: tuple[int, ...], sigma: float, rng: np.random.Generator) -> F32:
    # Large-scale errors of the flat field, on a coarse mesh.
    return (1 + rng.normal(0.0, sigma, (6, 6))).astype(np.float32)


def zoomed_rows(mesh: F32, shape: tuple[int, ...], rows: slice) -> F32:
    """Rows of a coarse mesh, interpolated linearly to the detector, without building the whole image."""
    y = np.linspace(0, mesh.shape[0] - 1, shape[0], dtype=np.float32)[rows]
    low = np.minimum(y.astype(int), mesh.shape[0] - 2)
    part = (y - low)[:, None]
    x = np.linspace(0, mesh.shape[1] - 1, shape[1])
    wide = np.stack([np.interp(x, np.arange(mesh.shape[1]), row) for row in mesh]).astype(np.float32)
    return np.asarray(wide[low] * (1 - part) + wide[low + 1] * part, dtype=np.float32)


def _output_gains(sigma: float, rng: np.random.Generator) -> F32:
    return (1 + rng.normal(0.0, sigma, OUTPUTS)).astype(np.float32)


def _gain_rows(gains: F32, shape: tuple[int, ...], rows: slice) -> F32:
    y = np.arange(shape[0])[rows] * OUTPUTS[0] // shape[0]
    x = np.arange(shape[1]) * OUTPUTS[1] // shape[1]
    return gains[y][:, x]


def _add_hot_pixels(electrons: F32, flags: U16, model: DetectorModel, rng: np.random.Generator) -> None:
    kinds = ((model.hot_share, InputFlag.HOT, (1.0, 100.0)), (model.warm_share, InputFlag.WARM, (0.1, 1.0)))
    for share, flag, rates in kinds:
        n = rng.poisson(share * electrons.size)
        where = rng.integers(0, electrons.size, n)
        extra = np.exp(rng.uniform(np.log(rates[0]), np.log(rates[1]), n)) * model.exposure_time
        electrons.ravel()[where] += extra.astype(np.float32)
        known = where[rng.random(n) < 0.97]
        flags.ravel()[known] |= np.uint16(flag)


def _add_cosmic_rays(electrons: F32, flags: U16, model: DetectorModel, rng: np.random.Generator) -> int:
    ny, nx = electrons.shape
    n = rng.poisson(model.cosmic_rays * electrons.size * PIXEL_CM**2 * model.exposure_time)
    length = np.minimum(1 + rng.exponential(6.0, n), 60.0)
    angle = rng.uniform(0.0, 2 * np.pi, n)
    # Thin tracks: a few hundred electrons per pixel, with a long tail.
    per_pixel = np.exp(rng.normal(np.log(350.0), 0.9, n))
    x0, y0 = rng.uniform(-0.5, nx - 0.5, n), rng.uniform(-0.5, ny - 0.5, n)
    known = rng.random(n) < model.cosmic_rays_flagged
    for k in range(n):
        steps = np.arange(0.0, length[k], 0.25)
        x = np.rint(x0[k] + steps * np.cos(angle[k])).astype(int)
        y = np.rint(y0[k] + steps * np.sin(angle[k])).astype(int)
        inside = (x >= 0) & (x < nx) & (y >= 0) & (y < ny)
        x, y = x[inside], y[inside]
        if len(x) == 0:
            continue
        energy = rng.gamma(2.0, 0.5 * 0.25 * per_pixel[k], len(x))
        window = np.s_[max(y.min() - 1, 0) : y.max() + 2, max(x.min() - 1, 0) : x.max() + 2]
        ya, xa = window[0].start, window[1].start
        track = np.zeros(electrons[window].shape)
        np.add.at(track, (y - ya, x - xa), energy)
        track = _diffuse(track)
        electrons[window] += track.astype(np.float32)
        if known[k]:
            flags[window][track > 10.0] |= np.uint16(InputFlag.COSMIC_RAY)
    return int(known.sum())


def _diffuse(track: F64) -> F64:
    # Charge spreads into the four neighbours: 3 % into each.
    spread = 0.88 * track
    spread[1:] += 0.03 * track[:-1]
    spread[:-1] += 0.03 * track[1:]
    spread[:, 1:] += 0.03 * track[:, :-1]
    spread[:, :-1] += 0.03 * track[:, 1:]
    return spread


def _add_satellite(electrons: F32, flags: U16, sky: float, rng: np.random.Generator) -> None:
    ny, nx = electrons.shape
    angle = rng.uniform(0.0, np.pi)
    offset = rng.uniform(-0.4, 0.4) * min(ny, nx)
    width = rng.uniform(1.5, 4.0)
    level = rng.uniform(2.0, 30.0) * np.sqrt(sky + 25.0)
    x = np.arange(nx, dtype=np.float32) - nx / 2
    for y0 in range(0, ny, STRIP):
        rows = slice(y0, min(y0 + STRIP, ny))
        y = np.arange(ny, dtype=np.float32)[rows, None] - ny / 2
        distance = np.abs(x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle)) - np.float32(offset))
        trail = np.exp(-0.5 * (distance / np.float32(width)) ** 2) * np.float32(level)
        electrons[rows] += rng.poisson(trail)
        flags[rows][distance < 3 * width] |= np.uint16(InputFlag.SATELLITE)


def _bleed(electrons: F32, full_well: float) -> None:
    """Clip at the full well and pour the excess into the pixels above and below, as far as it goes."""
    ny = electrons.shape[0]
    for x in np.flatnonzero((electrons > full_well).any(axis=0)):
        column = electrons[:, x].astype(np.float64)
        excess = np.maximum(column - full_well, 0.0)
        np.minimum(column, full_well, out=column)
        room = full_well - column
        for y in np.flatnonzero(excess):
            for step in (1, -1):
                left = excess[y] / 2
                at = y + step
                while left > 0 and 0 <= at < ny:
                    poured = min(left, room[at])
                    column[at] += poured
                    room[at] -= poured
                    left -= poured
                    at += step
        electrons[:, x] = column


def _flag_saturated(electrons: F32, flags: U16, level: float) -> None:
    # Here, since the command line imports this module for its defaults, and scipy takes half a second.
    from scipy.ndimage import binary_dilation

    full = electrons >= np.float32(level)
    if full.any():
        # The neighbours of a full pixel are flagged too.
        flags[binary_dilation(full)] |= np.uint16(InputFlag.SATURATED)


def _kill_columns(electrons: F32, flags: U16, model: DetectorModel, rng: np.random.Generator) -> None:
    ny, nx = electrons.shape
    for _ in range(rng.poisson(model.bad_columns * nx / 1024)):
        x, width = rng.integers(0, nx), rng.choice([1, 1, 1, 2])
        start = 0 if rng.random() < 0.6 else int(rng.integers(0, ny))
        electrons[start:, x : x + width] = 0.0
        flags[start:, x : x + width] |= np.uint16(InputFlag.BAD)
