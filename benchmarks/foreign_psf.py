"""Point-spread functions of the foreign fields: a field has one of six families.

The order of the random draws is part of the fields: keep it.
"""

from __future__ import annotations

from typing import Any, Final

import galsim
import numpy as np
from foreign_sky import Array, Rng

from sgclassify.simulation.filters import FILTERS
from sgclassify.simulation.psf import MIRROR_DIAMETER_M, REFERENCE_WAVELENGTH_NM
from sgclassify.stages.bands import PIXEL_SCALE

PSF_FAMILIES: Final = ("optical", "moffat", "optical_obsc", "airy_gauss", "core_wing", "double_gauss")
"""Aberrated aperture, Moffat, aberrated aperture with obscuration and struts, Airy and Gaussian, Kolmogorov core with
Moffat wing, two Gaussians."""

OVERSAMPLING: Final = 10
MAX_ELLIPTICITY: Final = 0.1
NODES: Final = 3  # of a PSF along each axis of the detector; a source takes the nearest one
PIVOT_NM: Final = {band: spec.pivot_a / 10 for band, spec in FILTERS.items()}


class PsfTraits:
    """What the PSFs of a field's exposures share. Every number is drawn; each family uses some of them."""

    def __init__(self, family: str, rng: Rng) -> None:
        self.family = family
        self.aberrations = rng.normal(0, 0.035, 8)  # Zernike 4 to 11 (Noll), waves at REFERENCE_WAVELENGTH_NM
        self.ellipticity = rng.uniform(0, 0.09)
        self.angle = rng.uniform(0, 3.2)  # of the ellipticity, radians
        self.diffusion_arcsec = PIXEL_SCALE * rng.uniform(0.15, 0.35)  # of charge, standard deviation
        self.moffat_beta = rng.uniform(2.2, 4.5)
        self.wing_beta = rng.uniform(2.0, 3.0)
        self.wing_size = rng.uniform(1.5, 3.0)  # half-light radius over the FWHM of the core
        self.wing_share = rng.uniform(0.06, 0.25)  # of the light; also of the outer Gaussian
        self.outer_size = rng.uniform(1.8, 3.0)  # FWHM of the outer Gaussian over that of the inner one
        self.struts = int(rng.choice([0, 3, 4]))
        self.strut_angle_deg = rng.uniform(0, 90)
        self.airy_obscuration = float(rng.choice([0.0, 0.3]))
        self.fwhm_px = rng.uniform(1.95, 2.5)  # after the pixel, in the middle of the bands
        self.fwhm_slope = rng.uniform(-0.06, 0.12)  # from there to the ends


def oversampled(psf: galsim.GSObject) -> Array:
    """Image of a PSF after the pixel, `OVERSAMPLING` samples per pixel."""
    seen = galsim.Convolve(psf, galsim.Pixel(PIXEL_SCALE))
    return seen.drawImage(nx=161, ny=161, scale=PIXEL_SCALE / OVERSAMPLING, method="no_pixel").array


def fwhm_px(psf: galsim.GSObject) -> float:
    """Diameter, pixels, of the circle of the area above half the peak."""
    image = oversampled(psf)
    return 2 * np.sqrt((image > image.max() / 2).sum() / np.pi) / OVERSAMPLING


def centroid_px(psf: galsim.GSObject) -> tuple[float, float]:
    """Centroid of a PSF under a Gaussian window of 1 pixel, from its origin."""
    image = oversampled(psf)
    y, x = (np.mgrid[:161, :161] - 80) / OVERSAMPLING
    x0 = y0 = 0.0
    for _ in range(30):
        weight = image * np.exp(-0.5 * ((x - x0) ** 2 + (y - y0) ** 2))
        x0 += 1.5 * ((weight * (x - x0)).sum() / weight.sum())
        y0 += 1.5 * ((weight * (y - y0)).sum() / weight.sum())
    return x0, y0


class ExposurePsf:
    """PSF of one exposure in a band; `shape` is (ny, nx) of the detector, `fwhm_px` the FWHM after the pixel."""

    def __init__(self, traits: PsfTraits, band: str, shape: tuple[int, int], rng: Rng) -> None:
        self.traits, self.wavelength_nm, self.shape = traits, PIVOT_NM[band], shape
        target = traits.fwhm_px * (1 + traits.fwhm_slope * ((PIVOT_NM[band] - 630) / 340))
        target = np.clip(target * rng.normal(1, 0.035), 1.92, 2.66)
        scatter = rng.normal((1.0, 0.0), (0.15, 0.008), (8, 2))
        self.aberrations = traits.aberrations * scatter[:, 0] + scatter[:, 1]
        self.aberrations[0] += rng.normal(0, 0.025)  # focus
        # slopes along x and y, from the middle of the detector to the next node
        self.aberration_slopes = rng.normal(0, 0.012, (8, 2))
        self.ellipticity_slopes = rng.normal(0, 0.012, (2, 2))
        self.size_slopes = rng.uniform(-0.03, 0.03, 2)
        e, angle = traits.ellipticity * rng.uniform(0.7, 1.3), traits.angle + rng.normal(0, 0.4)
        self.ellipticity = np.array([e * np.cos(2 * angle), e * np.sin(2 * angle)])
        self.centroid = (0.0, 0.0)  # arcsec
        self.nodes: dict[tuple[int, int, bool], galsim.GSObject] = {}
        core = self._core((0, 0))
        low, high = 0.002, 0.35
        for _ in range(9):
            self.size = 0.5 * (low + high)  # arcsec; FWHM, or jitter beside diffraction
            wide = fwhm_px(self._finished(core, (0, 0))) >= target
            low, high = (low, self.size) if wide else (self.size, high)
        self.size = 0.5 * (low + high)
        if traits.family.startswith("optical"):
            # a WCS is fitted to measured centroids, so the mean shift by coma is taken out
            x, y = centroid_px(self._finished(core, (0, 0)))
            self.centroid = (x * PIXEL_SCALE, y * PIXEL_SCALE)
        self.fwhm_px = fwhm_px(self.at(shape[1] / 2, shape[0] / 2))

    def _core(self, node: tuple[float, float], gsparams: Any = None) -> galsim.GSObject | None:
        """Diffraction pattern at a node, -1 to 1 along x and y; None in families without it."""
        traits = self.traits
        optics = {"lam": self.wavelength_nm, "diam": MIRROR_DIAMETER_M, "gsparams": gsparams}
        if traits.family == "airy_gauss":
            return galsim.Airy(obscuration=traits.airy_obscuration, **optics)
        if not traits.family.startswith("optical"):
            return None
        if traits.family == "optical_obsc":
            optics |= {"obscuration": 0.3, "nstruts": traits.struts, "strut_thick": 0.03}
            optics["strut_angle"] = traits.strut_angle_deg * galsim.degrees
        waves = (self.aberrations + self.aberration_slopes @ node) * REFERENCE_WAVELENGTH_NM / self.wavelength_nm
        return galsim.OpticalPSF(aberrations=[0.0] * 4 + list(waves), **optics)

    def _finished(
        self, core: galsim.GSObject | None, node: tuple[float, float], gsparams: Any = None
    ) -> galsim.GSObject:
        """PSF at a node, arcsec, from its core."""
        traits, share = self.traits, self.traits.wing_share
        size = self.size * (1 + self.size_slopes @ node)
        e1, e2 = self.ellipticity + self.ellipticity_slopes @ node
        e = np.hypot(e1, e2)
        if e > MAX_ELLIPTICITY:
            e1, e2 = e1 * MAX_ELLIPTICITY / e, e2 * MAX_ELLIPTICITY / e
        if traits.family.startswith("optical"):
            jitter = galsim.Gaussian(sigma=np.hypot(size, traits.diffusion_arcsec))
            psf = galsim.Convolve(core, jitter.shear(e1=e1 * 0.6, e2=e2 * 0.6), gsparams=gsparams)
            return psf.shift(-self.centroid[0], -self.centroid[1])
        if traits.family == "airy_gauss":
            jitter = galsim.Gaussian(sigma=np.hypot(size, traits.diffusion_arcsec))
            psf = galsim.Convolve(core, jitter, gsparams=gsparams)
        elif traits.family == "moffat":
            psf = galsim.Moffat(beta=traits.moffat_beta, fwhm=size, trunc=0, gsparams=gsparams)
        elif traits.family == "core_wing":
            inner = galsim.Kolmogorov(fwhm=size, gsparams=gsparams)
            radius = size * traits.wing_size
            wing = galsim.Moffat(beta=traits.wing_beta, half_light_radius=radius, gsparams=gsparams)
            diffusion = galsim.Gaussian(sigma=traits.diffusion_arcsec, gsparams=gsparams)
            both = galsim.Sum(inner.withFlux(1 - share), wing.withFlux(share))
            psf = galsim.Convolve(both, diffusion, gsparams=gsparams)
        else:
            inner = galsim.Gaussian(fwhm=size, flux=1 - share, gsparams=gsparams)
            psf = inner + galsim.Gaussian(fwhm=size * traits.outer_size, flux=share, gsparams=gsparams)
        return psf.shear(e1=e1, e2=e2)

    def at(self, x: float, y: float, bright: bool = False) -> galsim.GSObject:
        """PSF at the node nearest to a pixel, arcsec; for bright stars it reaches farther."""
        column = int(np.clip(NODES * x / self.shape[1], 0, NODES - 1))
        row = int(np.clip(NODES * y / self.shape[0], 0, NODES - 1))
        if (column, row, bright) not in self.nodes:
            threshold = 1.5e-3 if bright else 5e-3
            gsparams = galsim.GSParams(folding_threshold=threshold, maximum_fft_size=16384)
            node = (column - 1.0, row - 1.0)
            self.nodes[column, row, bright] = self._finished(self._core(node, gsparams), node, gsparams)
        return self.nodes[column, row, bright]
