"""What the fields of a training set look like: as many kinds of sky, camera and detector size as a survey meets."""

from __future__ import annotations

import numpy as np

from sgclassify.simulation.simulate import SimulationConfig

SIDES = (512, 768, 1024, 1280)
"""Sides of the detectors, pixels. In small ones few stars tell the PSF, which the model must get used to."""


def training_config(seed: int, field: int) -> SimulationConfig:
    """Configuration of one field of a training set.

    Parameters
    ----------
    seed : int
        Seed of the training set.
    field : int
        Number of the field; the configuration depends on these two alone.

    Returns
    -------
    SimulationConfig
    """
    rng = np.random.default_rng((seed, field, 1))
    side = int(rng.choice(SIDES, p=(0.2, 0.2, 0.4, 0.2)))
    return SimulationConfig(
        seed=seed,
        detector_shape=(side, side),
        exposures_per_band=2 if rng.random() < 0.1 else 1,
        # the detected sources that are stars: from a high galactic latitude to half of all
        star_fraction=(0.05, 0.5),
        detection_sigma=(3.0, 4.2),
        astrometric_error=(0.005, 0.04),
        compressed_share=0.05,
        variant_share=0.1,
    )
