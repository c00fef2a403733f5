"""The fields of a data set: as many kinds of sky, camera and detector size as a survey may meet."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from sgclassify.simulation import sextractor
from sgclassify.simulation.config import SimulationConfig
from sgclassify.simulation.filters import SHIFTED_PSF_FAMILY

SHIFTED_SEED = 1_000_003
"""Added to the seed of a data set for its shifted test."""

STRAINED_SHARE = 0.2
STRAINS = (1.3, 3.0)
"""Share of the training fields whose telescope is out of adjustment, and by what factor (see
`sgclassify.simulation.psf.PsfModel.strained`). They prepare the model for cameras other than the simulated one."""

SIDES = (512, 768, 1024, 1280)
"""Sides of the detectors, pixels. Small ones hold few stars for the PSF, and the model must learn that case too."""


def field_config(part: str, seed: int, field: int) -> SimulationConfig:
    """Configuration of one field of a data set; it depends on these three arguments alone.

    Some training fields have worse PSFs than the fields for judging. The shifted test has what training never sees:
    another family of PSFs, a brighter sky, another density, twice the share of compact galaxies. Its fields are drawn
    from a seed of their own. `part` is the folder that the field belongs to: ``"training"`` and ``"shifted"`` differ
    from the others.
    """
    config = _usual_config(seed, field)
    if part == "training":
        rng = np.random.default_rng((seed, field, 2))
        strain = float(rng.uniform(*STRAINS)) if rng.random() < STRAINED_SHARE else 1.0
        return replace(config, psf_strain=strain)
    if part == "shifted":
        return replace(
            config,
            seed=seed + SHIFTED_SEED,
            psf_families=(SHIFTED_PSF_FAMILY,),
            sky_scale=(2.2, 3.5),
            density=(0.5, 0.8) if field % 2 else (1.6, 2.2),
            compact_share=(0.02, 0.06),
            exposure_time=(150.0, 150.0),
        )
    return config


def _usual_config(seed: int, field: int) -> SimulationConfig:
    rng = np.random.default_rng((seed, field, 1))
    side = int(rng.choice(SIDES, p=(0.1, 0.2, 0.4, 0.3)))
    return SimulationConfig(
        seed=seed,
        detector_shape=(side, side),
        exposures_per_band=int(rng.choice((1, 2, 3), p=(0.85, 0.12, 0.03))),
        # share of stars among the detected sources: from a high galactic latitude to half of all
        star_fraction=(0.05, 0.5),
        density=(0.8, 1.6),
        exposure_time=_span(rng, 120.0, 300.0) if rng.random() < 0.5 else (150.0, 150.0),
        sky_scale=(0.8, 2.2),
        read_noise=(4.0, 6.5),
        detection_sigma=(2.2, 4.2),
        cosmic_rays_flagged=(0.9, 0.99),
        zero_point_error=0.02,
        astrometric_error=(0.005, 0.04),
        fwhm_error=0.06,
        no_fwhm_share=0.05,
        compressed_share=0.05,
        variant_share=0.1,
        catalog_program="sextractor" if sextractor.available() and rng.random() < 0.7 else "photutils",
    )


def _span(rng: np.random.Generator, low: float, high: float) -> tuple[float, float]:
    time = float(rng.uniform(low, high))
    return 0.95 * time, 1.05 * time
