"""Every number that the stages can be told."""

from __future__ import annotations

from dataclasses import dataclass

from sgclassify.stages.settings import setting


@dataclass(frozen=True)
class StageConfig:
    """Configuration of the stages; ``docs/reference.md`` lists the settings."""

    match_radius_arcsec: float = setting(
        0.2,
        "Largest distance between a detection and the anchor of its object.",
        '0.2" is 2.7 pixels: more than the centroid error of a 5-sigma source, less than the separation at which two'
        " sources are told apart.",
        unit="arcsec",
        low=0.001,
        high=5,
    )
    position_tolerance_arcsec: float = setting(
        2.0,
        "Largest distance between the sky position of a catalogue row and its pixel position through the WCS.",
        "A row beyond it has no usable position.",
        unit="arcsec",
    )
    position_margin_px: float = setting(
        2.0, "How far outside the detector the pixel position of a catalogue row may lie.", unit="px"
    )
    max_bad_rows: float = setting(
        0.5, "Share of rows without a usable position above which the whole catalogue is refused.", high=1
    )
    min_px_per_row: float = setting(
        16.0,
        "Detector pixels per catalogue row below which the catalogue cannot be real.",
        "A PSF covers about 5 pixels.",
        unit="px",
    )
    detect_threshold_sigma: float = setting(
        3.3,
        "Threshold of the stage's own detection, in standard deviations of the noise of the smoothed image.",
        "On pure noise, 3.3 with 5 pixels gives about 5 false detections in 1024 x 1024 pixels, 1.5 gives 5000.",
        unit="sigma",
        low=0.1,
        high=1000,
    )
    detect_min_px: int = setting(5, "Connected pixels that make a detection.", unit="px", low=1, high=10000)
    deblend_contrast: float = setting(0.005, "Smallest share of the flux that a deblended peak must hold.", high=1)
    deblend_prominence_sigma: float = setting(
        3.0,
        "Smallest height of a deblended peak above the saddle to its neighbour, in standard deviations of the noise"
        " of the smoothed image.",
        unit="sigma",
    )
    sky_box_px: int = setting(128, "Side of the boxes of the sky mesh.", unit="px", low=8, high=4096)
    blend_radius_arcsec: float = setting(
        1.0, "Another object within this distance sets the BLENDED flag.", unit="arcsec", high=5
    )
    min_valid_core: float = setting(
        0.3, "Share of valid pixels within the core radius below which a band is not used.", high=1
    )
    core_radius_px: float = setting(
        4.0, "Radius of the core, for `min_valid_core` and for the quality flags.", unit="px", low=1, high=64
    )
