"""Every number that the stages can be told, with its default and its reason."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StageConfig:
    """Configuration of the stages; lengths are in the unit that the name ends on.

    Attributes
    ----------
    match_radius_arcsec : float
        Largest distance between a detection and the anchor of its object. 0.2" is 2.7 pixels: more than the
        centroid error of a 5-sigma source, less than the separation at which two sources are told apart.
    position_tolerance_arcsec : float
        Largest distance between a catalogue row's sky position and its pixel position through the header's
        WCS; beyond it the row has no usable position.
    position_margin_px : float
        How far outside the detector a catalogue row's pixel position may lie.
    max_bad_rows : float
        Share of rows without a usable position above which the whole catalogue is refused.
    min_px_per_row : float
        Detector pixels per catalogue row below which the catalogue cannot be real (a PSF covers about 5).
    detect_threshold_sigma : float
        Threshold of the stage's own detection, in standard deviations of the noise of the smoothed image. On
        pure noise, 3.3 with 5 pixels gives about 5 false detections in 1024x1024 pixels, 1.5 gives 5000.
    detect_min_px : int
        Connected pixels that make a detection.
    deblend_contrast : float
        Smallest share of the flux that a deblended peak must hold.
    deblend_prominence_sigma : float
        Smallest height of a deblended peak above the saddle to its neighbour, in standard deviations of the
        noise of the smoothed image.
    sky_box_px : int
        Side of the boxes of the sky mesh.
    blend_radius_arcsec : float
        Another object within this distance sets the BLENDED flag.
    min_valid_core : float
        Share of valid pixels within the core radius below which a band is not used.
    core_radius_px : float
        Radius of the core, for that share and for the quality flags.
    """

    match_radius_arcsec: float = 0.2
    position_tolerance_arcsec: float = 2.0
    position_margin_px: float = 2.0
    max_bad_rows: float = 0.5
    min_px_per_row: float = 16.0
    detect_threshold_sigma: float = 3.3
    detect_min_px: int = 5
    deblend_contrast: float = 0.005
    deblend_prominence_sigma: float = 3.0
    sky_box_px: int = 128
    blend_radius_arcsec: float = 1.0
    min_valid_core: float = 0.3
    core_radius_px: float = 4.0
