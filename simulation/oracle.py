"""The best possible classification: the likelihood ratio of star and galaxy, given the true PSF, position and noise.

Each source is drawn anew, alone on an empty sky, with the PSF and the noise of its exposures. It is compared with a
point and with galaxies from the population of the simulation. No classifier knows this much: it must estimate the PSF,
and its sources have neighbours. Colours are not used.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
from astropy.wcs import WCS
from scipy.special import logsumexp

from sgclassify.simulation.camera import jacobian
from sgclassify.simulation.config import SimulationConfig
from sgclassify.simulation.exposure import Conditions
from sgclassify.simulation.render import Scene, draw_stamp, scene
from sgclassify.simulation.simulate import replay
from sgclassify.simulation.sky import SkyModel, Sources, galaxy_shapes
from sgclassify.stages.arrays import F64, Bool
from sgclassify.stages.bands import BANDS

SIZE: Final = 32
"""Side of the stamps, pixels."""

ORDINARY: Final = 96
COMPACT: Final = 96
"""Number of galaxies that a source is compared with: of the whole population, and of its compact tail, which matters
most."""


def log_ratios(config: SimulationConfig, field_index: int, mag_i: F64, used: Bool) -> F64:
    """Logarithm of the likelihood ratio of star and galaxy, for some sources of a field.

    The flux in each band is free under either hypothesis, with a flat prior.

    Parameters
    ----------
    config : SimulationConfig
        What was simulated.
    field_index : int
    mag_i : ndarray, float64, shape (n,)
        True magnitudes; they identify the sources of a field.
    used : ndarray, bool, shape (n, 7)
        Bands to look at.

    Returns
    -------
    ndarray, float64, shape (n,)
        NaN where `mag_i` is not that of a source of the field.
    """
    model, sources, conditions = replay(config, field_index)
    own = {float(m): k for k, m in enumerate(sources.mags[:, BANDS.index("i")])}
    rows = [own.get(float(m), -1) for m in mag_i]
    # of several exposures of a band the deepest one
    deepest: dict[str, Conditions] = {}
    for taken in sorted(conditions, key=lambda c: -c.noise):
        deepest[taken.band] = taken
    scales = {band: jacobian(WCS(taken.true_header), taken.psf.shape) for band, taken in deepest.items()}
    placed = {band: _placed(sources, taken, scales[band]) for band, taken in deepest.items()}
    rng = np.random.default_rng((config.seed, field_index, 2))
    result = np.full(len(rows), np.nan)
    for k, row in enumerate(rows):
        if row < 0:
            continue
        templates, log_weight = _templates(sources, row, model, rng)
        total = np.zeros(len(templates))
        for number, band in enumerate(BANDS):
            if used[k, number] and band in deepest:
                total += _evidence(placed[band], row, templates, deepest[band], scales[band], rng)
        result[k] = total[0] - logsumexp(total[1:] + log_weight)
    return result


def _placed(sources: Sources, taken: Conditions, scale: F64) -> Scene:
    x, y = WCS(taken.true_header).all_world2pix(sources.ra, sources.dec, 0)
    return scene(sources, taken.band, np.asarray(x), np.asarray(y), taken.zero_point, scale)


def _templates(sources: Sources, row: int, model: SkyModel, rng: np.random.Generator) -> tuple[Sources, F64]:
    """A point and galaxies at the place of a source, and logarithms of the galaxies' weights, which sum to 1."""
    n = 1 + ORDINARY + COMPACT
    here = np.full(n, row)
    mag = np.full(ORDINARY, sources.mags[row, BANDS.index("i")])
    share = float(np.mean(model.compact_share))
    shapes = [galaxy_shapes(mag, (0.0, 0.0), rng), galaxy_shapes(mag[:1].repeat(COMPACT), (1.0, 1.0), rng)]
    columns = [np.concatenate([[np.nan], *parts]) for parts in zip(*shapes, strict=True)]
    taken = {
        name: getattr(sources, name)[here]
        for name in ("ra", "dec", "mags", "redshift", "texture", "system", "separation")
    }
    templates = Sources(
        **taken,
        kind=np.array(["star"] + ["galaxy"] * (n - 1)),
        r50=columns[0],
        sersic_n=columns[1],
        axis_ratio=columns[2],
        position_angle=columns[3],
        bulge_fraction=columns[4],
        clumpiness=np.zeros(n),
    )
    weight = np.repeat([(1.0 - share) / ORDINARY, share / COMPACT], [ORDINARY, COMPACT])
    return templates, np.log(weight)


def _evidence(sky: Scene, row: int, templates: Sources, taken: Conditions, scale: F64, rng: np.random.Generator) -> F64:
    """Logarithm of the likelihood of each template for one new exposure of a source, the flux integrated out."""
    x, y = sky.x[row], sky.y[row]
    node = int(taken.psf.node_at(np.array([x]), np.array([y]))[0])
    transform = taken.psf.fourier(node, SIZE)
    truth = draw_stamp(sky, row, transform, SIZE, taken.noise).astype(np.float64)
    variance = taken.noise**2 + np.maximum(truth, 0.0) / taken.detector.exposure_time
    data = truth + np.sqrt(variance) * rng.normal(size=truth.shape)
    here = np.full(len(templates), x), np.full(len(templates), y)
    others = scene(templates, taken.band, *here, taken.zero_point, scale)
    others = replace(others, flux=np.ones(len(templates)))
    drawn = np.stack([draw_stamp(others, k, transform, SIZE, np.inf) for k in range(len(templates))])
    drawn = drawn.astype(np.float64)
    best = (drawn * (data / variance)).sum(axis=(1, 2))
    norm = (drawn**2 / variance).sum(axis=(1, 2))
    return np.asarray(0.5 * best**2 / norm - 0.5 * np.log(norm))
